"""How is learned: every number of the reference's training, and switches for what an ablation leaves out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..conditioning.framepack import LYRA2, FramePackLayout


@dataclass(frozen=True)
class Recipe:
    """The reference's, unless said otherwise. ValueError for what can't be."""

    layout: FramePackLayout = LYRA2
    still: int = 25  # latents of the repeated first frame in front of a video; odd, and enough for the temporal slots
    windows: int = 13  # chunks of a video at most
    stride: int = 8  # every so many frames may be remembered
    apart: int = 16  # frames next to the chunk that are not retrieved for it
    floor: float = 0.02  # by which each candidate's share of the best coverage is raised before one is drawn
    draw: bool = True  # retrieved at random by coverage, from past and future; if not, as a walk does: greedily, from the past
    memory_drop: float = 0.1  # how often some retrieved frames are left out
    text_drop: float = 0.2
    warp_drop: float = 0.0  # how often the warped frame is left out; not in the reference
    corruption: tuple[float, float] | None = (-3.0, 2.0)  # mean and spread of ln sigma, on the latents of retrieved frames
    self_augmented: float = 1.0  # share of every second step whose history the network spoils itself, or that only sees the photo
    photo_only: float = 0.3  # share of those that begin at the photo and remember nothing else
    highest: float = 0.5  # sigma up to which a chunk is noised before the network spoils it
    copy_history: bool = True  # the history is replaced by what the codec makes of it, together with the spoilt chunk
    shift: float = 5.0  # of the noise levels
    remembered_weight: float = 1.0  # of what the memory shows and the newest frame does not; not in the reference
    correspondences: bool = True
    memory: Literal["frames", "cloud"] = "frames"  # cloud: one point cloud of all known frames is warped, none is retrieved
    history: Literal["packed", "newest"] = "packed"  # newest: every temporal slot holds the newest latent

    def __post_init__(self):
        if self.still < self.layout.slots("temporal") or self.still % 2 == 0:
            raise ValueError(f"{self.still} still latents; {self.layout} needs an odd number, {self.layout.slots('temporal')} at least")
        for name in ("memory_drop", "text_drop", "warp_drop", "self_augmented", "photo_only"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share of the steps, 0 to 1, found {getattr(self, name)}")
        if not 0 < self.highest <= 1:
            raise ValueError(f"a chunk is spoilt at sigmas up to 1, found {self.highest}")

    @property
    def chunk(self) -> int:
        """Frames of a chunk."""
        return self.layout.new_frames
