"""What a video model is shown of a chunk that it shall paint, and how its colours are brought back to the photo's.

Any model that takes a video and a mask of what to keep can grow a world between `control_views` and `append`. The memory is
looked up as for the geometry preview, but nothing is made up: what no past frame shows is exactly mid-grey, and masked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cameras.camera import join
from .preview import look_up, remembered_sources
from .world import ChunkPlan, World, keyframe_ids, to_uint8

HOLE = 0.5  # what video models take for nothing
TOGETHER = 16  # views that come to the processor at a time
BLOCK = 8  # pixels a side of the blocks whose mean colours are compared: details may move, colours may not
LEAST_KNOWN = 0.05  # share of the pixels that must be known before a fit of colours counts
STEADY = (2 / 255) ** 2  # variance of colours below which they say nothing about contrast
TRIM, ROUNDS = 2.5, 5  # robust standard deviations that a block may be off, and how often the fit is repeated without others


@dataclass(frozen=True)
class MaskRule:
    """Which known pixels a model may paint over all the same."""

    dilation: int = 2  # pixels by which holes grow: what is beside them is the least certain
    bend: float = 0.05  # relative disparity by which a surface may bend before its depth counts as an edge; 0: keep edges
    widening: int = 2  # pixels by which such edges grow


@dataclass(frozen=True)
class ControlViews:
    """L frames: the newest known ones, then the planned ones."""

    video: Tensor  # (L, H, W, 3) 0..1, exactly 0.5 where `generate`
    generate: Tensor  # (L, H, W) bool: what shall be painted; nothing in the known frames
    disparity: Tensor  # (L, H, W) 0..1 in each frame, 1 = nearest; complete
    overlap: int  # how many frames in front are known


@dataclass(frozen=True)
class Tint:
    """How a model's colours differ from those it was shown: shown = gain * control + offset, per channel."""

    gain: tuple[float, float, float] = (1.0, 1.0, 1.0)
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def removed(self, frames: Tensor) -> Tensor:
        """Frames (..., 3) as they would be without it."""
        return ((frames - frames.new_tensor(self.offset)) / frames.new_tensor(self.gain)).clamp(0, 1)


def control_views(
    world: World,
    plan: ChunkPlan,
    overlap: int = 1,
    rule: MaskRule = MaskRule(),  # noqa: B008 (frozen)
    device: torch.device | None = None,
    on_frame: Callable[[int, int, Tensor], None] = lambda done, total, image: None,
) -> ControlViews:
    """The planned frames as the memory knows them, behind the world's newest ones; all of them if it has fewer than asked.

    The look-up runs on `device`, the result is on the CPU. ValueError for a plan of another world.
    """
    if plan.world_key != world.key:
        raise ValueError("this plan was made for another world, or for this one before it grew; plan again")
    if overlap < 1:
        raise ValueError(f"an overlap of {overlap} frames: at least the newest frame must lead over to the new ones")
    overlap = min(overlap, len(world))
    first = len(world) - overlap
    known = torch.stack([world.exact(frame) * 0.5 + 0.5 for frame in range(first, len(world))]).clamp(0, 1)
    cameras = join(world.cameras[first:], plan.target.to(world.last_camera.w2c.device))
    sources = remembered_sources(world, plan, device)
    device = sources[0].depth.device
    cameras, known = cameras.to(device), known.to(device)
    video, generate = torch.empty(len(cameras), *world.size, 3), torch.empty(len(cameras), *world.size, dtype=torch.bool)
    disparity, looked_up = torch.empty(len(cameras), *world.size), []
    for index in range(len(cameras)):
        look = look_up(sources, cameras[index], make_up=False)
        if index < overlap:
            picture, holes = known[index], torch.zeros_like(look.found)
        else:
            holes = uncertain(look.found, look.depth, rule)
            picture = torch.where(holes[..., None], HOLE, look.image)
        looked_up.append((picture, holes, _nearness(look.depth)))
        on_frame(index + 1, len(cameras), to_uint8(picture))
        if len(looked_up) == TOGETHER or index + 1 == len(cameras):  # a GPU is waited for once for all of them
            some = slice(index + 1 - len(looked_up), index + 1)
            for kept, parts in zip((video, generate, disparity), zip(*looked_up, strict=True), strict=True):
                kept[some] = torch.stack(parts)
            looked_up.clear()
    return ControlViews(video, generate, disparity, overlap)


def uncertain(found: Tensor, depth: Tensor, rule: MaskRule) -> Tensor:
    """Which pixels (H, W) of a look-up shall be painted: those not found, those beside them, and edges of depth (H, W)."""
    holes = grown(~found, rule.dilation)
    if rule.bend > 0:
        disparity = 1 / depth
        across, down = (
            F.pad((disparity.roll(2, dim) + disparity.roll(-2, dim) - 2 * disparity).abs().narrow(dim, 2, size - 4), pad)
            for dim, size, pad in ((1, depth.shape[1], (2, 2)), (0, depth.shape[0], (0, 0, 2, 2)))
        )
        holes = holes | grown(torch.maximum(across, down) > rule.bend * disparity, rule.widening)
    return holes


def grown(mask: Tensor, pixels: int) -> Tensor:
    """A mask (H, W) and all within so many pixels of it, across, down or aslant."""
    return F.max_pool2d(mask[None].float(), 2 * pixels + 1, 1, pixels)[0] > 0 if pixels else mask


def _nearness(depth: Tensor) -> Tensor:
    disparity = 1 / depth
    low, high = disparity.min(), disparity.max()
    return (disparity - low) / (high - low).clamp_min(1e-12)


# ------------------------------------------------------------------------------------------------------ colour anchor


def fit_tint(painted: Tensor, views: ControlViews, frames: Sequence[int]) -> tuple[Tint | None, float]:
    """How the colours of frames (K, H, W, 3) differ from those of the control views of the same K `frames`.

    Compared are means of blocks of 8x8 pixels that are known completely, without those that fit least. None where less
    than 5 % of the pixels can be compared; beside it, how many can.
    """
    control, known = views.video[list(frames)], ~views.generate[list(frames)]
    whole = F.avg_pool2d(known.float(), BLOCK)[..., None].expand(-1, -1, -1, 3) == 1
    shown, given = (
        F.avg_pool2d(video.movedim(-1, 1), BLOCK).movedim(1, -1)[whole].view(-1, 3).double() for video in (painted, control)
    )
    share = len(shown) / (whole.numel() / 3)
    if share < LEAST_KNOWN:
        return None, share
    fits = [_line(given[:, c], shown[:, c]) for c in range(3)]
    return Tint(tuple(gain for gain, _ in fits), tuple(offset for _, offset in fits)), share


def _line(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Robust gain and offset of y = gain x + offset; the gain of colours that hardly vary is held near 1."""
    kept = torch.ones_like(x, dtype=torch.bool)
    for _ in range(ROUNDS):
        mx, my = x[kept].mean(), y[kept].mean()
        variance, together = (x[kept] - mx).square().mean(), ((x[kept] - mx) * (y[kept] - my)).mean()
        gain = ((together + STEADY) / (variance + STEADY)).clamp(0.5, 2)
        off = (y - my - gain * (x - mx)).abs()
        kept = off <= TRIM * 1.4826 * off.median() + 1e-6
    return float(gain), float(my - gain * mx)


def anchored(
    world: World, plan: ChunkPlan, frames: Tensor, device: torch.device | None = None
) -> tuple[Tensor, Tint, str]:
    """Painted frames (F, H, W, 3) in the colours of what the memory shows of them, which are the photo's where it is seen.

    Returns them, the tint that was taken out, and a line that says so. Where too little is known the last chunk's counts.
    """
    ids = keyframe_ids(plan)
    some = [frame - plan.first_frame for frame in ids]
    views = control_views(world, ChunkPlan(plan.world_key, plan.first_frame, plan.target[some], plan.retrieved), 1, device=device)
    tint, share = fit_tint(frames[some], views, range(views.overlap, len(views.video)))
    origin = f"from {share:.0%} of the keyframes' pixels"
    if tint is None:
        tint, origin = last_tint(world), f"as before, because only {share:.1%} of the keyframes' pixels can be compared"
    gains, offsets = (", ".join(f"{value:.3f}" for value in values) for values in (tint.gain, tint.offset))
    return tint.removed(frames), tint, f"colours: gain {gains} and offset {offsets} taken out, {origin}"


def last_tint(world: World) -> Tint:
    """What was taken out of the newest chunk that has a tint; none at all if no chunk has."""
    for chunk in reversed(world.chunks):
        if kept := chunk.settings.get("tint"):
            return Tint(tuple(kept["gain"]), tuple(kept["offset"]))
    return Tint()
