"""Where photos of one place were taken, by what they show of each other and by how far that is.

The first photo's depth gives points of the scene. Whichever photo shows most of them is placed by them (PnP), brings its
own depth to their scale, and then gives points itself, so that photos which show nothing of the first are reached through
their neighbours. Points are never moved to fit the pictures better, which would go wrong where a camera only turns: that
their depth may be wrong is in the weights (see `resection`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from ..cameras.camera import Cameras, check
from .depth import DepthMap
from .depth_alignment import known_depth
from .matches import Features, features, matches
from .resection import FEWEST, LOOSE, Pose, Seen, depth_at, lifted, met, misfit, moving, projected, resected, turned
from .retrieval import Keyframe

LEAST = 30  # matches that must fit before a photo's place is believed
ON_ITS_SIDE = 45.0  # degrees of roll from which on a photo is said to lie on its side
UNSURE_SCALE = 0.25  # relative spread of a depth's scale from which on it is doubted
FOCALS = tuple(1.06**i for i in range(-8, 9))  # factors of the given focal length among which the best is looked for
FLAT = 0.05  # relative gain over the given focal length below which the pictures can't tell
FOCAL_CHOICES = ("as given", "found, one for all", "found, each its own")

OnStep = Callable[[int, int], None]


def nothing(done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class Placed:
    """A photo whose place is known."""

    photo: int  # its number, from 0
    camera: Cameras  # the one it was taken from, in the world of the first photo
    depth: DepthMap  # scene units
    fits: int = 0  # matches that agree with it
    of: int = 0  # matches in all
    error: float = 0.0  # median pixels that the agreeing ones lie off
    notes: tuple[str, ...] = ()  # what to know of it


@dataclass(frozen=True)
class LeftOut:
    """A photo that does not fit."""

    photo: int
    fits: int  # matches that agree, at best
    why: str = ""


@dataclass(frozen=True)
class Placement:
    """Which photos have a place, in their order, and which have none."""

    placed: tuple[Placed, ...]
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...] = ()



# ------------------------------------------------------------------------------------------------- placed by what they show


def place(
    pictures: Tensor,
    maps: Sequence[DepthMap],
    least: int = LEAST,
    focal: str = FOCAL_CHOICES[0],
    on_step: OnStep = nothing,
) -> Placement:
    """Where photos (F, H, W, 3) in 0..1 were taken, in the world of the first, whose camera stands at the origin.

    maps: the depth of each, in units of its own, or that of the first alone: then the others remember only what placed
    photos show of them. The lens of each is that of its map. least: matches that must fit. focal: one of FOCAL_CHOICES;
    the focal lengths that fit best are looked for among FOCALS of the given ones. ValueError where no photo fits the first.
    """
    count = len(pictures)
    _check_photos(pictures, maps)
    if focal not in FOCAL_CHOICES:
        raise ValueError(f"there is no focal {focal!r}; choose one of {', '.join(FOCAL_CHOICES)}")
    found, pairs = _matched(pictures, on_step)
    notes: tuple[str, ...] = ()
    if focal == FOCAL_CHOICES[1]:
        maps, notes = _of_best_focal(found, pairs, maps)
    placed, missed = _chain(found, pairs, maps, least, focal == FOCAL_CHOICES[2])
    left = tuple(LeftOut(i, fits, _why(pictures[i], found, placed, maps, least)) for i, fits in sorted(missed.items()))
    return _some(Placement(tuple(placed[i] for i in sorted(placed)), left, notes), count, least)


def _check_photos(pictures: Tensor, maps: Sequence[DepthMap]) -> None:
    count, size = len(pictures), tuple(pictures.shape[1:3])
    if count < 2:
        raise ValueError(f"{count} photo; give two or more, or begin with the photo and its depth alone")
    if len(maps) not in (1, count):
        raise ValueError(f"{len(maps)} depths for {count} photos; give one for each, in the same order, or the first one's alone")
    for number, found in enumerate(maps, 1):
        if found.size != size:
            raise ValueError(
                f"depth {number} is {found.size[1]}x{found.size[0]}, the photos are {size[1]}x{size[0]}; make it from the same pictures"
            )


def _some(placement: Placement, count: int, least: int) -> Placement:
    if len(placement.placed) < 2:
        raise ValueError("\n".join([f"none of the other photos fits the first ({least} matches are needed):", *said(placement, count)]))
    return placement


def _matched(pictures: Tensor, on_step: OnStep) -> tuple[list[Features], dict[tuple[int, int], np.ndarray]]:
    """Features of each photo, and the matches (M, 2) of each pair of them."""
    couples = list(combinations(range(len(pictures)), 2))
    total, found, pairs = len(pictures) + len(couples), [], {}
    for picture in pictures:
        on_step(len(found), total)
        found.append(features(picture))
    for i, j in couples:
        on_step(len(found) + len(pairs), total)
        pairs[i, j] = matches(found[i], found[j])
    on_step(total, total)
    return found, pairs


def _partners(pairs: dict, i: int, j: int) -> tuple[np.ndarray, np.ndarray]:
    """Which points of i and of j are the same."""
    pair = pairs[min(i, j), max(i, j)]
    return (pair[:, 0], pair[:, 1]) if i < j else (pair[:, 1], pair[:, 0])


def _chain(
    found: list[Features], pairs: dict, maps: Sequence[DepthMap], least: int, own_focal: bool
) -> tuple[dict[int, Placed], dict[int, int]]:
    """Places of the photos that fit, the surest next, and the matches that fit of each of the others."""
    placed = {0: Placed(0, maps[0].camera, maps[0])}
    poses: dict[int, tuple] = {}
    while len(placed) < len(found):
        for i in range(len(found)):
            if i not in placed:
                seen = _seen(i, found, pairs, placed)
                K = _lens(maps, i)
                poses[i] = (seen, *(_best_lens(seen, K, maps[0].size) if own_focal else (resected(seen, K, maps[0].size), K)))
        best = max((i for i in poses), key=lambda i: _fits(poses[i][1]))
        if _fits(poses[best][1]) < max(least, FEWEST):
            break
        seen, pose, K = poses.pop(best)
        placed[best] = _as_placed(best, seen, pose, K, maps, placed)
    return placed, {i: _fits(pose) for i, (_, pose, _) in poses.items()}


def _fits(pose: Pose | None) -> int:
    return 0 if pose is None else int(pose.fits.sum())


def _lens(maps: Sequence[DepthMap], i: int) -> np.ndarray:
    return (maps[i] if len(maps) > 1 else maps[0]).K.double().numpy()


def _seen(i: int, found: list[Features], pairs: dict, placed: dict[int, Placed]) -> Seen:
    """What placed photos know of photo i."""
    parts = []
    for j, its in placed.items():
        there, here = _partners(pairs, j, i)
        others = found[j].pixels[there]
        z, sure = depth_at(its.depth.depth, others)
        points = lifted(others[sure], z[sure], its.camera)
        centers = its.camera.centers.double().numpy().repeat(len(points), 0)
        parts.append((points, found[i].pixels[here[sure]], np.full(len(points), j), others[sure], centers))
    return Seen(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def _as_placed(i: int, seen: Seen, pose: Pose, K: np.ndarray, maps: Sequence[DepthMap], placed: dict[int, Placed]) -> Placed:
    """Photo i where it was found, with its depth brought to the scene's units."""
    size, notes, w2c = maps[0].size, [], pose.w2c
    neighbour = max(placed, key=lambda j: int((pose.fits & (seen.sources == j)).sum()))
    only_turned = turned(seen, pose, K, neighbour, placed[neighbour].camera)
    if only_turned is not None:
        w2c = only_turned
        notes.append(f"turned on the spot where photo {neighbour + 1} was taken")
    notes += _rolled(w2c, placed[0].camera)
    if group := moving(seen, pose, neighbour, size):
        notes.append("{} matches around ({:.0f}, {:.0f}) moved together: what moves can't be remembered".format(*group))
    camera = Cameras(torch.from_numpy(w2c).float()[None], torch.from_numpy(K).float()[None], size)
    if len(maps) == 1:
        depth = _remembered(camera, placed)
    else:
        depth, doubts = _in_scene_units(replace(maps[i], K=camera.K[0]), seen, w2c, pose.fits)
        notes += doubts
    error = np.linalg.norm(projected(seen.points, w2c, K) - seen.pixels, axis=1)[pose.fits]
    return Placed(i, camera, depth, _fits(pose), len(seen.points), float(np.median(error)), tuple(notes))


def _in_scene_units(own: DepthMap, seen: Seen, w2c: np.ndarray, fits: np.ndarray) -> tuple[DepthMap, list[str]]:
    """A map of one photo in scene units, by the depth of the points that fit; and what speaks against it."""
    z = (seen.points @ w2c[:3, :3].T + w2c[:3, 3])[fits, 2]
    its, sure = depth_at(own.depth, seen.pixels[fits])
    return _scaled(own, z[sure] / its[sure])


def _scaled(own: DepthMap, ratios: np.ndarray) -> tuple[DepthMap, list[str]]:
    """A map times the middle of the ratios (M,) of true to own depth; and what speaks against it."""
    if not len(ratios):
        raise ValueError(f"{own.source}: nothing is known where it shows what other photos show; make the depth again")
    factor = float(np.median(ratios))
    spread = 1.4826 * float(np.median(np.abs(ratios / factor - 1)))
    doubts = [f"doubtful depth: its scale differs by {spread:.0%} from point to point"] if spread > UNSURE_SCALE else []
    return replace(own, depth=own.depth * factor, source=f"{own.source}; times {factor:.4g}"), doubts


def _remembered(camera: Cameras, placed: dict[int, Placed]) -> DepthMap:
    """What placed photos know of a view."""
    known = [Keyframe(-j, its.depth.depth, its.camera) for j, its in placed.items()]
    return DepthMap(known_depth(known, camera)[0], camera.K[0], "what other photos show of it")


# ------------------------------------------------------------------------------------------------------------ focal lengths


def _lowest(costs: np.ndarray) -> float | None:
    """The factor, between those of FOCALS, with the lowest cost; None where the given one is as good."""
    given, best = len(FOCALS) // 2, int(costs.argmin())
    if costs[best] > (1 - FLAT) * costs[given] or not 0 < best < len(FOCALS) - 1:
        return None
    before, at, after = costs[best - 1 : best + 2]
    step = 0.5 * (before - after) / max(before - 2 * at + after, 1e-12)
    return float(FOCALS[best] * (FOCALS[1] / FOCALS[0]) ** np.clip(step, -0.5, 0.5))


def _longer(K: np.ndarray, factor: float) -> np.ndarray:
    """K with the focal lengths times a factor."""
    longer = K.copy()
    longer[[0, 1], [0, 1]] *= factor
    return longer


def _best_lens(seen: Seen, K: np.ndarray, size: tuple[int, int]) -> tuple[Pose | None, np.ndarray]:
    """The pose of a photo with the focal length that fits best, and its K."""
    costs = np.array([misfit(seen, _longer(K, factor), size) for factor in FOCALS])
    best = _longer(K, _lowest(costs) or 1.0)
    return resected(seen, best, size), best


def _of_best_focal(
    found: list[Features], pairs: dict, maps: Sequence[DepthMap]
) -> tuple[Sequence[DepthMap], tuple[str, ...]]:
    """The maps with the one factor of focal length with which the first photo and the others agree best; what to say of it."""
    given = float(maps[0].K[0, 0])
    factor = _lowest(np.array([_cost_to_first(found, pairs, _with_focal(maps, factor)) for factor in FOCALS]))
    if factor is None:
        return maps, (f"other focal lengths than {given:.0f} pixels fit no better, or the photos can't tell",)
    return _with_focal(maps, factor), (f"focal length of {factor * given:.0f} pixels found, {given:.0f} given",)


def _with_focal(maps: Sequence[DepthMap], factor: float) -> list[DepthMap]:
    return [replace(its, K=torch.from_numpy(_longer(its.K.numpy(), factor))) for its in maps]


def _cost_to_first(found: list[Features], pairs: dict, maps: Sequence[DepthMap]) -> float:
    """Mean over all photos but the first of the squared pixels that what they show of it lies off."""
    first, size, costs = {0: Placed(0, maps[0].camera, maps[0])}, maps[0].size, []
    for i in range(1, len(found)):
        seen = _seen(i, found, pairs, first)
        costs.append(misfit(seen, _lens(maps, i), size) / max(len(seen.points), 1))
    return float(np.mean(costs))


# ---------------------------------------------------------------------------------------------------------- places known


def fitted(pictures: Tensor, maps: Sequence[DepthMap], cameras: Cameras, least: int = LEAST, on_step: OnStep = nothing) -> Placement:
    """Photos (F, H, W, 3) whose cameras are known, each depth brought to the cameras' units by where matches meet.

    As elsewhere the first photo's camera ends at the origin. maps: the depth of each in units of its own; their lenses give
    way to the cameras'. Photos that show nothing of the others are left out. ValueError if the cameras are not one each, or
    stand in one place, which gives no scale.
    """
    _check_photos(pictures, maps)
    count, size = len(pictures), tuple(pictures.shape[1:3])
    if not len(pictures) == len(maps) == len(cameras):
        raise ValueError(f"{len(cameras)} cameras and {len(maps)} depths for {count} photos; give one each, in the same order")
    if cameras.size != size:
        raise ValueError(f"the cameras are for {cameras.size[1]}x{cameras.size[0]}, the photos are {size[1]}x{size[0]}; resize one")
    if float((check(cameras).centers - cameras.centers[0]).norm(dim=1).max()) < 1e-6:
        raise ValueError("these cameras all stand in one place, which tells no scale; place the photos by what they show alike")
    found, pairs = _matched(pictures, on_step)
    maps, cameras = [replace(its, K=K.float().cpu()) for its, K in zip(maps, cameras.K, strict=True)], _from_first(cameras)
    counts, ratios = np.zeros((count, count), int), [np.empty(0) for _ in maps]
    for (i, j), pair in pairs.items():
        ends = found[i].pixels[pair[:, 0]], found[j].pixels[pair[:, 1]]
        depths, fits = met(ends, cameras[i], cameras[j])
        counts[i, j] = counts[j, i] = len(fits)
        for k, pixels, z in ((i, ends[0][fits], depths[0]), (j, ends[1][fits], depths[1])):
            its, sure = depth_at(maps[k].depth, pixels)
            ratios[k] = np.concatenate([ratios[k], z[sure] / its[sure]])
    return _kept(maps, cameras, counts, [int(p) for p in _totals(pairs, count)], ratios, least)


def _from_first(cameras: Cameras) -> Cameras:
    """The same cameras in the world of the first, which stands at its origin."""
    w2c = cameras.w2c.double() @ torch.linalg.inv(cameras.w2c[0].double())
    return Cameras(w2c.float(), cameras.K.float(), cameras.size)


def agreed(pictures: Tensor, maps: Sequence[DepthMap], cameras: Cameras, least: int = LEAST, on_step: OnStep = nothing) -> Placement:
    """Photos (F, H, W, 3) whose cameras and depths somebody found together: only those that agree with the others.

    Photos of which fewer than `least` matches lie where depth and cameras say are left out; with 0 none are, and none are
    matched.
    """
    count = len(pictures)
    _check_photos(pictures, maps)
    check(cameras)
    if not least:
        return Placement(tuple(Placed(i, cameras[i], its) for i, its in enumerate(maps)), ())
    found, pairs = _matched(pictures, on_step)
    counts = np.zeros((count, count), int)
    for (i, j), pair in pairs.items():
        z, sure = depth_at(maps[i].depth, found[i].pixels[pair[:, 0]])
        points = lifted(found[i].pixels[pair[:, 0]][sure], z[sure], cameras[i])
        seen = projected(points, cameras.w2c[j].double().numpy(), cameras.K[j].double().numpy())
        error = np.linalg.norm(seen - found[j].pixels[pair[:, 1]][sure], axis=1)
        counts[i, j] = counts[j, i] = int((error < LOOSE * max(cameras.size)).sum())
    return _kept(maps, cameras, counts, [int(p) for p in _totals(pairs, count)], None, least)


def _totals(pairs: dict, count: int) -> np.ndarray:
    """How many matches each photo has with all others."""
    totals = np.zeros(count, int)
    for (i, j), pair in pairs.items():
        totals[[i, j]] += len(pair)
    return totals


def _kept(
    maps: Sequence[DepthMap], cameras: Cameras, counts: np.ndarray, totals: list[int], ratios: list[np.ndarray] | None, least: int
) -> Placement:
    """The photos that hang together with the first, by how many matches of each two of them agree (F, F)."""
    reached, waiting = {0}, [0]
    while waiting:
        near = [int(k) for k in (counts[waiting.pop()] >= max(least, 1)).nonzero()[0] if int(k) not in reached]
        reached.update(near)
        waiting += near
    placed = []
    for i in sorted(reached):
        depth, doubts = (maps[i], []) if ratios is None else _scaled(maps[i], ratios[i])
        placed.append(Placed(i, cameras[i], depth, int(counts[i].sum()), totals[i], 0.0, tuple(doubts)))
    left = tuple(LeftOut(i, int(counts[i].max())) for i in range(len(maps)) if i not in reached)
    return _some(Placement(tuple(placed), left), len(maps), least)


# ----------------------------------------------------------------------------------------------------------- what is said


def said(placement: Placement, count: int) -> list[str]:
    """What holds for all photos, and a line for each of `count`."""
    lines = [f"photo {i + 1}: " for i in range(count)]
    for its in placement.placed:
        lines[its.photo] += "; ".join([*_how_well(its), *_where(its, placement.placed[0].camera), *its.notes])
    for its in placement.left_out:
        lines[its.photo] += "; ".join([f"left out, only {its.fits} matches fit", *filter(None, [its.why])])
    return [*placement.notes, *lines]


def _how_well(its: Placed) -> list[str]:
    if not its.of:
        return []
    return [f"{its.fits} of {its.of} matches fit" + (f", {its.error:.1f} pixels off" if its.error else "")]


def _where(its: Placed, first: Cameras) -> list[str]:
    if not its.photo:
        return ["the world begins here"]
    away = float((its.camera.centers - first.centers).norm())
    off = (its.camera.w2c[0, :3, :3].double() @ first.w2c[0, :3, :3].double().T - torch.eye(3)).norm()
    return [f"{away:.3g} scene units away, turned by {np.degrees(2 * np.arcsin(min(float(off) / 8**0.5, 1))):.3g} degrees"]


def _why(picture: Tensor, found: list[Features], placed: dict[int, Placed], maps: Sequence[DepthMap], least: int) -> str:
    """What could be wrong with a photo that does not fit."""
    flipped = features(picture.flip(1))
    pairs = {(j, len(found)): matches(found[j], flipped) for j in placed}
    seen = _seen(len(found), [*found, flipped], pairs, placed)
    if _fits(resected(seen, _lens(maps, 0), maps[0].size)) >= max(least, FEWEST):
        return "it is mirrored, left for right; flip it back"
    return "it shows another place, or too little of what the others show"


def _rolled(w2c: np.ndarray, first: Cameras) -> list[str]:
    """Whether a photo lies on its side beside the first one."""
    down = w2c[:3, :3] @ first.w2c[0, 1, :3].double().numpy()
    roll = float(np.degrees(np.arctan2(-down[0], down[1])))
    if np.hypot(down[0], down[1]) < 0.3 or abs(roll) < ON_ITS_SIDE:
        return []
    return [f"lies on its side, turned by {roll:.0f} degrees; turn it upright if its file forgot to say so"]
