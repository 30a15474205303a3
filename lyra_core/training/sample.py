"""What is learned from: videos whose cameras and depths are known, and the windows that a step looks at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..cameras.camera import Cameras, check
from ..conditioning.framepack import LATENT_FRAMES
from ..memory.retrieval import Keyframe
from .contracts import Codec


@dataclass(frozen=True)
class CleanLatents:
    """What a codec makes of a sample that nobody has spoilt; made once, because every step asks for it."""

    stream: Tensor  # (16, still + T, h, w) the first frame repeated, then the video, encoded as one
    alone: Mapping[int, Tensor]  # frame -> (16, h, w) the frame encoded as a picture of its own
    codec: str  # what made them, see `codec_key`


@dataclass(frozen=True)
class Window:
    """A chunk of a sample that is to be painted, and all before it as its history."""

    segment: int  # which chunk, from 0
    first: int  # its first frame
    count: int  # its frames

    @property
    def newest(self) -> int:
        """The last frame of the history."""
        return self.first - 1

    @property
    def frames(self) -> range:
        return range(self.first, self.first + self.count)


@dataclass(frozen=True)
class Sample:
    """A video of a scene in which nothing moves but the camera. ValueError where its parts don't fit each other."""

    name: str
    frames: Tensor  # (F, H, W, 3) uint8
    cameras: Cameras  # F
    depths: Mapping[int, Tensor]  # frame -> (H, W) along z, scene units, 0 = unknown; of those that may be remembered
    captions: Mapping[int, str] = field(default_factory=lambda: {0: ""})  # from which frame on
    latents: CleanLatents | None = None
    spoilt: Mapping[int, Tensor] = field(default_factory=dict)  # frame -> (H, W, 3) in -1 .. 1, in place of the true one

    def __post_init__(self):
        if self.frames.ndim != 4 or self.frames.shape[-1] != 3 or self.frames.dtype != torch.uint8:
            found = f"{self.frames.dtype} {tuple(self.frames.shape)}"
            raise ValueError(f"{self.name}: expected uint8 frames (frames, height, width, 3), found {found}")
        if len(self.frames) != len(self.cameras) or tuple(self.frames.shape[1:3]) != self.cameras.size:
            raise ValueError(
                f"{self.name}: {len(self.frames)} frames of {self.frames.shape[2]}x{self.frames.shape[1]}, but "
                f"{len(self.cameras)} cameras of {self.cameras.size[1]}x{self.cameras.size[0]}"
            )
        if any(side % 16 for side in self.size):
            raise ValueError(f"{self.name}: {self.size[1]}x{self.size[0]}; both sides must be multiples of 16")
        check(self.cameras, self.name)
        for frame, depth in self.depths.items():
            if not 0 <= frame < len(self) or tuple(depth.shape) != self.size:
                raise ValueError(f"{self.name}: the depth of frame {frame} is {tuple(depth.shape)}, of {len(self)} frames {self.size}")

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.cameras.size

    def picture(self, frame: int) -> Tensor:
        """(H, W, 3) float32 in -1 .. 1, as it was spoilt if it was."""
        spoilt = self.spoilt.get(frame)
        return self.frames[frame].float() / 127.5 - 1 if spoilt is None else spoilt

    def pictures(self, frames) -> Tensor:
        """(N, H, W, 3) float32 in -1 .. 1."""
        frames = list(frames)
        made = self.frames[frames].float() / 127.5 - 1
        for place, frame in enumerate(frames):
            if frame in self.spoilt:
                made[place] = self.spoilt[frame]
        return made

    def keyframe(self, frame: int) -> Keyframe:
        """ValueError if its depth is not known, or can't be one."""
        if frame not in self.depths:
            raise ValueError(f"{self.name}: frame {frame} has no depth, and a window needs it")
        depth = self.depths[frame].float()
        if not (torch.isfinite(depth) & (depth >= 0)).all():
            raise ValueError(f"{self.name}: the depth of frame {frame} has NaN, infinite or negative numbers; give it again")
        return Keyframe(frame, depth, self.cameras[frame : frame + 1])

    def cameras_of(self, window: Window) -> Cameras:
        return self.cameras[window.first : window.first + window.count]

    def caption(self, frame: int) -> str:
        """The caption that holds at a frame."""
        begins = [first for first in self.captions if first <= frame]
        return self.captions[max(begins)] if begins else ""

    def windows(self, chunk: int, most: int) -> list[Window]:
        """All chunks of so many frames, at most `most`; ValueError if the video is too short for one."""
        count = min((len(self) - 1) // chunk, most)
        if count < 1:
            raise ValueError(f"{self.name}: {len(self)} frames are too few, a chunk takes {chunk} after the first one")
        return [Window(segment, 1 + chunk * segment, chunk) for segment in range(count)]


def mirrored(sample: Sample, frames: int) -> Sample:
    """The sample, walked there and back until it has at least so many frames."""
    if len(sample) >= frames:
        return sample
    ids = there_and_back(len(sample), frames)
    depths = {frame: sample.depths[its] for frame, its in enumerate(ids) if its in sample.depths}
    spoilt = {frame: sample.spoilt[its] for frame, its in enumerate(ids) if its in sample.spoilt}
    return replace(sample, frames=sample.frames[ids], cameras=sample.cameras[ids], depths=depths, spoilt=spoilt)


def there_and_back(count: int, frames: int) -> list[int]:
    """`frames` numbers below `count`: up to the last and back and on, as the reference repeats short clips."""
    around = [*range(count), *range(count - 2, 0, -1)]
    return [around[frame % len(around)] for frame in range(frames)]


def still(sample: Sample, latents: int) -> Tensor:
    """(F, H, W, 3) the first frame, repeated: the time before the video, of so many latents, its own frame last."""
    return sample.picture(0).expand(1 + LATENT_FRAMES * (latents - 1), *sample.size, 3)


def encoded(sample: Sample, codec: Codec, latents: int, chunk: int, stride: int) -> Sample:
    """The sample with its latents, the still ones in front, unless it has them from this codec already."""
    key = codec_key(codec, latents, chunk, stride)
    whole = (len(sample) - 1) // chunk * chunk  # a codec may not take any other number of frames
    known = sample.latents
    if known is not None and known.codec == key and known.stream.shape[1] >= latents + whole // LATENT_FRAMES:
        return sample
    stream = codec.encode(torch.cat([still(sample, latents), sample.pictures(range(1, 1 + whole))]))
    alone = {frame: codec.encode(sample.picture(frame)[None])[:, 0] for frame in {0, *candidates(sample, stride)}}
    return replace(sample, latents=CleanLatents(stream, alone, key))


def codec_key(codec: Codec, latents: int, chunk: int, stride: int) -> str:
    """Tells latents of one codec, with so many still ones in front, from others."""
    return f"{codec.name} still {latents} chunk {chunk} stride {stride}"


def candidates(sample: Sample, stride: int) -> list[int]:
    """Frames that may be remembered."""
    return [frame for frame in range(0, len(sample), stride) if frame in sample.depths]
