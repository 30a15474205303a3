"""How well a world holds together, measured as others measure theirs, without any weights.

Looked at are a few keyframes of every chunk. Each is compared with what the memory knew of it before its chunk was made
(fidelity, colours), with the photo (drift), with the frames beside it (flicker), with the frame that stood at the same place
earlier (revisits), and with its own camera: by the matches it has in other frames (TSED), and by where those say that it was
taken from (pose).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cameras.camera import Cameras
from ..memory.retrieval import retrieve
from ..metrics import pictures, poses
from . import control
from .preview import VIEWS
from .world import ChunkPlan, World, plan, rewind, to_float

FRAMES = 5  # of a chunk that are looked at
RETRIEVED = 5  # past frames of the memory that a chunk is compared with
REFERENCES = 3  # past frames that a camera is found by, beside the photo
LEAST_SHARED = 0.02  # of a frame that the photo must show, too, to tell a drift of colours
LEAST_BASELINE = 0.5  # pixels that things at the usual depth must move between two cameras, or those only turn
LEAST_WINDOWS = 100  # of SSIM that lie in what was seen


@dataclass(frozen=True)
class Pair:
    """A frame that comes back, beside the one that was there first."""

    first: int
    error: float  # sum of the squared differences of what the first one had not invented
    count: int  # numbers in it
    ssim: float | None  # mean of the windows in which the first one invented nothing; None if there are hardly any


@dataclass(frozen=True)
class Look:
    """What was found of one frame."""

    frame: int
    chunk: int
    known: float  # share of its pixels that the memory knew
    error: float  # sum of the squared differences to them
    error_fitted: float  # the same, once the chunk's gain and offset are taken out
    count: int  # numbers in both
    flicker: float | None  # mean difference to the frames beside it, warped
    drift: float | None  # distance of the mean colours from the photo's, of what the photo shows too
    epipolar: float | None  # median epipolar distance to the frame looked at before, pixels; None: too few matches
    pose: poses.PoseError | None  # against the memory before the chunk; None: not found
    back: Pair | None


@dataclass(frozen=True)
class Scores:
    """Numbers of a chunk, or of all; None where nothing can be said."""

    frames: tuple[int, ...]  # that were looked at
    known: float
    psnr: float | None  # dB, against the control views on known pixels
    psnr_fitted: float | None  # the same, with gain and offset taken out
    gain: tuple[float, float, float] | None
    offset: tuple[float, float, float] | None
    flicker: float | None
    drift: float | None
    tsed: dict[float, float] | None  # share of the pairs of frames below each threshold, of those with enough matches
    pairs: int  # that have enough matches
    registered: float  # share of the frames whose camera was found again
    degrees: float | None  # median rotation error
    distance: float | None  # median translation error, scene units
    ate: float | None  # root of the mean squared distance of the centres, scene units
    revisits: int
    revisit_psnr: float | None  # dB, pooled
    revisit_ssim: float | None


@dataclass(frozen=True)
class Worst:
    """The frame of a chunk that agrees least with the memory, to be looked at."""

    frame: int
    control: Tensor  # (H, W, 3) what was known of it, grey where nothing was
    back: int | None  # the frame of the chunk that agrees least with the one it comes back to
    first: int | None  # and that one


@dataclass(frozen=True)
class Consistency:
    """Of a whole world."""

    whole: Scores
    chunks: tuple[Scores, ...]
    worst: tuple[Worst, ...]  # of each chunk

    def as_plain(self) -> dict:
        """Numbers as JSON takes them."""
        return {"whole": asdict(self.whole), "chunks": [asdict(chunk) for chunk in self.chunks]}


def measure(
    world: World,
    frames: int = FRAMES,
    device: torch.device | None = None,
    on_frame: Callable[[int, int, Tensor | None], None] = lambda done, total, image: None,
) -> Consistency:
    """Look at `frames` keyframes of every chunk; control views are made on `device`. ValueError if nothing has grown yet."""
    if not world.chunks:
        raise ValueError("this world is still the photo alone; there is nothing yet to compare it with")
    chosen = [_chosen(world, index, frames) for index in range(len(world.chunks))]
    total, done = sum(map(len, chosen)), 0
    came_back = {back: first for first, back in pictures.revisits(world.cameras)}
    kept = {0: poses.points(to_float(world.frame(0)))}
    looks, tints, worst, previous = [], [], [], 0
    for index, ids in enumerate(chosen):
        before, views, tint = _remembered(world, index, ids, device)
        tints.append(tint)
        here = []
        for number, frame in enumerate(ids):
            kept[frame] = poses.points(to_float(world.frame(frame)))
            # what is looked at is what is compared later, too; points of other past frames are found when they are needed
            known = ~views.generate[views.overlap + number], views.video[views.overlap + number]
            here.append(_look(world, before, frame, previous, known, tint, kept, came_back.get(frame)))
            previous, done = frame, done + 1
            on_frame(done, total, world.frame(frame))
        worst.append(_worst(here, views))
        looks.append(here)
    parts = tuple(_scores(here, tint) for here, tint in zip(looks, tints, strict=True))
    return Consistency(_scores([look for here in looks for look in here], None), parts, tuple(worst))


def _chosen(world: World, index: int, count: int) -> list[int]:
    """Keyframes of a chunk, spread evenly, its last one among them."""
    first = 1 + sum(len(chunk) for chunk in world.chunks[:index])
    ids = [frame for frame in world.memory.frames if first <= frame < first + len(world.chunks[index])]
    return [ids[-1 - i * len(ids) // min(count, len(ids))] for i in range(min(count, len(ids)))][::-1]


def _remembered(
    world: World, index: int, ids: list[int], device: torch.device | None
) -> tuple[World, control.ControlViews, control.Tint | None]:
    """The world before a chunk, what it knew of frames of the chunk, and how their colours differ from that."""
    before, cameras = rewind(world, index), world.chunks[index].cameras
    asked = plan(before, cameras, RETRIEVED, VIEWS)
    some = cameras[[frame - asked.first_frame for frame in ids]]
    views = control.control_views(before, ChunkPlan(before.key, asked.first_frame, some, asked.retrieved), device=device)
    frames = torch.stack([to_float(world.frame(frame)) for frame in ids])
    return before, views, control.fit_tint(frames, views, range(views.overlap, len(views.video)))[0]


def _look(
    world: World,
    before: World,
    frame: int,
    previous: int,
    remembered: tuple[Tensor, Tensor],
    tint: control.Tint | None,
    kept: dict[int, poses.Points],
    first: int | None,
) -> Look:
    image, keyframe, photo = to_float(world.frame(frame)), world.memory[frame], world.memory[0]
    known, shown = remembered
    a, b = image[known].double(), shown[known].double()
    fitted = a if tint is None else (a - a.new_tensor(tint.offset)) / a.new_tensor(tint.gain)
    seen, its = pictures.shown_by_both(
        image, keyframe.depth, keyframe.camera, to_float(world.frame(0)), photo.camera, photo.depth
    )
    drift = float((seen - its).double().mean(0).norm()) if len(seen) > LEAST_SHARED * known.numel() else None
    camera, still = keyframe.camera, _still(keyframe.depth, keyframe.camera)
    return Look(
        frame,
        len(before.chunks),
        float(known.float().mean()),
        float((a - b).square().sum()),
        float((fitted - b).square().sum()),
        a.numel(),
        _flicker(world, image, frame),
        drift,
        poses.pair_distance(kept[previous], kept[frame], world.cameras[previous], camera, still),
        _pose(before, kept, kept[frame], camera),
        None if first is None else _pair(world, image, first),
    )


def _still(depth: Tensor, camera: Cameras) -> float:
    """Scene units that a camera can move while things at the usual depth stay in their pixel."""
    known = depth[depth > 0]
    return LEAST_BASELINE * float(known.median()) / float(camera.K[0, 0, 0]) if len(known) else 0.0


def _flicker(world: World, image: Tensor, frame: int) -> float | None:
    keyframe, cameras, off = world.memory[frame], world.cameras, []
    for beside in (frame - 1, frame + 1):
        if 0 <= beside < len(world):
            a, b = pictures.shown_by_both(image, keyframe.depth, keyframe.camera, to_float(world.frame(beside)), cameras[beside])
            off += [float((a - b).abs().mean())] if len(a) else []
    return sum(off) / len(off) if off else None


def _pose(before: World, kept: dict[int, poses.Points], found: poses.Points, camera: Cameras) -> poses.PoseError | None:
    """By the photo and what else of the memory sees most of this view."""
    past = {0, max(before.memory.frames), *retrieve(before.memory, camera, REFERENCES)}
    world, pixels = [], []
    for frame in sorted(past):
        if frame not in kept:
            kept[frame] = poses.points(to_float(before.frame(frame)))
        keyframe = before.memory[frame]
        i, j = poses.matches(kept[frame], found)
        places, known = poses.places(kept[frame].pixels[i], keyframe.depth, keyframe.camera)
        world.append(torch.from_numpy(places[known]))
        pixels.append(torch.from_numpy(found.pixels[j][known]))
    return poses.pose_error(torch.cat(world).numpy(), torch.cat(pixels).numpy(), camera)


def _pair(world: World, image: Tensor, first: int) -> Pair | None:
    earlier, seen = to_float(world.frame(first)), ~world.invented(first)
    if not seen.any():
        return None
    windows = -F.max_pool2d(-seen[None].float(), pictures.SSIM_WINDOW, 1)[0] > 0
    alike = pictures.ssim_map(earlier, image).mean(0)[0][windows]
    squares = (earlier - image).double().square()[seen]
    return Pair(first, float(squares.sum()), squares.numel(), float(alike.mean()) if len(alike) > LEAST_WINDOWS else None)


def _worst(looks: Sequence[Look], views: control.ControlViews) -> Worst:
    number = max(range(len(looks)), key=lambda i: looks[i].error_fitted / max(looks[i].count, 1))
    back = max((look for look in looks if look.back), key=lambda look: look.back.error / look.back.count, default=None)
    shown = views.video[views.overlap + number]
    return Worst(looks[number].frame, shown, back and back.frame, back and back.back.first)


def _scores(looks: Sequence[Look], tint: control.Tint | None) -> Scores:
    count = sum(look.count for look in looks)
    pairs = [look.epipolar for look in looks if look.epipolar is not None]
    found = [look.pose for look in looks if look.pose]
    back = [look.back for look in looks if look.back]
    return Scores(
        tuple(look.frame for look in looks),
        sum(look.known for look in looks) / len(looks),
        _decibels(sum(look.error for look in looks), count),
        _decibels(sum(look.error_fitted for look in looks), count),
        tint and tint.gain,
        tint and tint.offset,
        _mean([look.flicker for look in looks]),
        _mean([look.drift for look in looks]),
        {limit: sum(pair < limit for pair in pairs) / len(pairs) for limit in poses.THRESHOLDS} if pairs else None,
        len(pairs),
        len(found) / len(looks),
        _median([pose.degrees for pose in found]),
        _median([pose.distance for pose in found]),
        math.sqrt(sum(pose.distance**2 for pose in found) / len(found)) if found else None,
        len(back),
        _decibels(sum(pair.error for pair in back), sum(pair.count for pair in back)),
        _mean([pair.ssim for pair in back]),
    )


MOST = 99.0  # dB; equal pictures would be infinitely alike, which JSON does not know


def _decibels(error: float, count: int) -> float | None:
    if not count:
        return None
    return min(MOST, -10 * math.log10(error / count)) if error > 0 else MOST


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def _median(values: Sequence[float]) -> float | None:
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5)) if values else None


# -------------------------------------------------------------------------------------------------------------- a table


def table(found: Consistency) -> str:
    """Lines of text: a row per measure, a column for all and for each chunk."""
    columns = [("all", found.whole), *((f"chunk {number}", scores) for number, scores in enumerate(found.chunks))]
    cells = [_cells(scores) for _, scores in columns]
    rows = [("", *(name for name, _ in columns)), *((name, *(cell[name] for cell in cells)) for name in cells[0])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ([text.rjust(width) for text, width in zip(row, widths, strict=True)] for row in rows)
    return "\n".join("  ".join([row[0].ljust(widths[0]), *line[1:]]).rstrip() for row, line in zip(rows, lines, strict=True))


def _cells(scores: Scores) -> dict[str, str]:
    def number(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    def colour(values: Sequence[float] | None, digits: int) -> str:
        return "-" if values is None else " ".join(f"{value:.{digits}f}" for value in values)

    tsed = ["-" if scores.tsed is None else f"{scores.tsed[limit]:.0%}" for limit in poses.THRESHOLDS]
    return {
        "frames looked at": str(len(scores.frames)),
        "known before, share of the pixels": f"{scores.known:.1%}",
        "known pixels against the memory, dB": number(scores.psnr, 1),
        "  with gain and offset taken out, dB": number(scores.psnr_fitted, 1),
        "  gain of red, green, blue": colour(scores.gain, 3),
        "  offset": colour(scores.offset, 3),
        "drift of colours from the photo": number(scores.drift, 4),
        "flicker beside warped neighbours": number(scores.flicker, 4),
        "pairs of frames with enough matches": str(scores.pairs),
        **{f"  TSED at {limit:g} px": share for limit, share in zip(poses.THRESHOLDS, tsed, strict=True)},
        "cameras found again, share": f"{scores.registered:.0%}",
        "  RotErr, degrees, median": number(scores.degrees, 3),
        "  TransErr, scene units, median": number(scores.distance, 4),
        "  ATE, scene units": number(scores.ate, 4),
        "frames that come back": str(scores.revisits),
        "  PSNR of what was not invented, dB": number(scores.revisit_psnr, 1),
        "  SSIM of it": number(scores.revisit_ssim, 3),
    }
