"""What tests of learning share: a wall that a camera walks along, of which everything is known, and a codec without memory."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lyra_core.cameras.camera import pinhole, pixel_grid
from lyra_core.conditioning.framepack import FramePackLayout
from lyra_core.conditioning.history import RAY_CHANNELS
from lyra_core.training.contracts import Condition, Encoders
from lyra_core.training.recipe import Recipe
from lyra_core.training.sample import Sample

SIZE, WALL = (32, 48), 4.0
LAYOUT = FramePackLayout.parse("f1k1f2s2f1s1f4k2f1k1_g2")
SMALL = Recipe(layout=LAYOUT, still=7, apart=4, stride=4)
WORDS, EYES = 6, 5


def wall(frames: int = 41, size: tuple[int, int] = SIZE, name: str = "wall", seed: int = 0) -> Sample:
    """A textured wall, seen while walking to the side, a little forwards, and back."""
    cameras, turn = pinhole(size, 40.0, frames), torch.arange(frames) * (6.283 / 40)
    centers = torch.stack([0.6 * torch.sin(turn), torch.zeros(frames), 0.3 - 0.3 * torch.cos(turn)], 1)
    cameras.w2c[:, :3, 3] = -centers
    depth = WALL - centers[:, 2]
    rays = pixel_grid(size) @ cameras.K_inverse[0].T
    places = (rays[..., :2] * depth[:, None, None, None] + centers[:, None, None, :2]) / 4
    texture = F.interpolate(torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed)), (48, 48), mode="bicubic")
    frames_ = F.grid_sample(texture.expand(frames, -1, -1, -1), places, padding_mode="reflection", align_corners=False)
    pictures = (frames_.clamp(0, 1) * 255).round().to(torch.uint8).movedim(1, -1)
    depths = {frame: depth[frame].expand(size).clone() for frame in range(0, frames, 4)}
    return Sample(name, pictures, cameras, depths, {0: "a wall", 9: "the same wall"})


class Means:
    """Stands for a codec: a latent is the mean of its frames' 8x8 pixels, in a basis of 16; causal, remembers nothing."""

    name = "means"

    def __init__(self):
        self.basis = torch.linalg.qr(torch.randn(16, 3, generator=torch.Generator().manual_seed(1)))[0]

    def encode(self, frames: Tensor, before: Tensor | None = None) -> Tensor:
        groups = [frames[:1], *frames[1:].split(4)] if before is None else frames.split(4)
        small = torch.stack([F.avg_pool2d(group.mean(0).movedim(-1, 0), 8) for group in groups], 1)
        return torch.einsum("zc,cthw->zthw", self.basis, small)

    def decode(self, latents: Tensor, before: Tensor | None = None) -> Tensor:
        colours = torch.einsum("zc,zthw->tchw", self.basis, latents)
        each = [4 if before is not None or t else 1 for t in range(len(colours))]
        return F.interpolate(colours, scale_factor=8).movedim(1, -1).repeat_interleave(torch.tensor(each), 0)


def tell(caption: str) -> Tensor:
    return torch.tensor([[float(ord(letter)) / 100 for letter in caption[:WORDS].ljust(WORDS)]])


def look(picture: Tensor) -> Tensor:
    return picture.mean((0, 1)).repeat(1, 2)[:, :EYES]


ENCODERS = Encoders(Means(), look, tell)


class Painter(nn.Module):
    """Stands for the transformer: takes all that it is told, and says how it was called."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.patch_embedding = nn.Conv3d(32, 16, 1)
            self.head = nn.Linear(RAY_CHANNELS + WORDS + EYES, 16)
        self.calls: list[tuple[Tensor, Tensor, Condition]] = []

    def forward(self, noisy: Tensor, timesteps: Tensor, shown: Condition) -> Tensor:
        self.calls.append((noisy, timesteps, shown))
        told = torch.cat([shown.rays.mean((2, 3, 4)), shown.text.mean(1), shown.image.mean(1)], 1)
        return self.patch_embedding(torch.cat([noisy, shown.warped], 1)) + self.head(told)[..., None, None, None]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def exactly(recipe: Recipe = SMALL, **changes) -> Recipe:
    """Without chance where a test does not want any."""
    off = {"memory_drop": 0.0, "text_drop": 0.0, "corruption": None}
    return replace(recipe, **{**off, **changes})
