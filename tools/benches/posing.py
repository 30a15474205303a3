"""Posing photos of a room of which everything is known, beside what was measured before; and frames of a walk from real ones.

The walk is the shipped one, as the geometry preview renders it from the photos that the command is given (see `photos`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from lyra_core.cameras import camera_files, trajectory
from lyra_core.cameras.camera import Cameras
from lyra_core.memory import posing
from lyra_core.memory.depth import DepthMap
from lyra_core.world import preview
from lyra_core.world.world import begin, plan

from . import Result
from .photos import TOOLS, Photo, photos
from .scenes import FURNISHED, errors, standing, traced

ARC = [(0, 0, 0), (0.5, 0, 0.2, -6), (1, 0.1, 0.2, -12), (1.5, 0.2, 0.2, -20), (-0.8, 0.3, 0.2, 10)]
FAR = [(0, 0, 0), (1.75, 0, 0.05, -35)]
WIDE = [(0, 0, 0), (0.9, 0, 0, -17), (1.8, 0, 0.3, -34), (2.5, 0, 1, -50)]
TURN = [(0, 0, 0), (0, 0, 0, 12), (0, 0, 0, -20), (0, 0, 0, 30, -5)]
DOLLY = [(0, 0, 0), (0, 0, 0.5), (0, 0, 1)]
# what is posed; which focal length is found; what the depth and the focal length are wrong by; the largest error there was
CASES: tuple[tuple[str, list, str, float, float, str, float, float], ...] = (
    ("arc", ARC, "as given", 0, 1, "0.1 deg, 0.014", 0.1, 0.014),
    ("35 deg and 1.75 units away", FAR, "as given", 0, 1, "0.1 deg, 0.014", 0.1, 0.014),
    ("wide pairs through neighbours", WIDE, "as given", 0, 1, "registered", 0.5, 0.05),
    ("turning on the spot", TURN, "as given", 0, 1, "0.07 deg", 0.07, 0.001),
    ("arc, focal length wrong by 15 %", ARC, "as given", 0, 1.15, "4.5 deg, 0.9", 4.5, 0.9),
    ("the same, found", ARC, "found, one for all", 0, 1.15, "restored", 0.5, 0.05),
    ("turn, focal length wrong by 15 %, found", TURN, "found, one for all", 0, 1.15, "-", 0.5, 0.05),
    ("dolly, focal length wrong by 15 %", DOLLY, "found, one for all", 0, 1.15, "not restored", 0.5, 0.05),
    ("arc, depth wrong by 10 %, smoothly", ARC, "as given", 0.1, 1, "0.5 deg, 0.2", 0.5, 0.2),
    ("turn, depth wrong by 10 %, smoothly", TURN, "as given", 0.1, 1, "0.5 deg, 0.2", 0.5, 0.2),
)


def bench_posing() -> Iterator[Result]:
    for name, places, focal, off, factor, before, turn, shift in CASES:
        cameras = standing(places)
        pictures, depths = traced(FURNISHED, cameras)
        K = cameras.K[0] * torch.tensor([[factor, 1, 1], [1, factor, 1], [1, 1, 1]])
        start = time.process_time()
        found = posing.place(pictures, [DepthMap(depth, K, "true") for depth in _bent(depths, off)], focal=focal)
        spent = time.process_time() - start
        at = [its.photo for its in found.placed]
        worst = errors(replace(cameras[at], w2c=torch.cat([its.camera.w2c for its in found.placed])), cameras[at])
        met = len(at) == len(places) and worst[0] <= turn and worst[1] <= shift
        value = f"{worst[0]:.3f} deg, {worst[1]:.4f}"
        yield Result(f"{name}: worst of {len(at) - 1} photos, {spent:.1f} s", value, f"{before} before", met)


def bench_posing_photos() -> Iterator[Result]:
    for photo in photos((288, 496)):
        path, pictures = _walked(photo)
        found = posing.place(pictures, [DepthMap(photo.depth, photo.camera.K[0], "by its lines")])
        at = [its.photo for its in found.placed]
        worst = errors(replace(path[at], w2c=torch.cat([its.camera.w2c for its in found.placed])), path[at])
        way = float(path.centers.norm(dim=1).max())
        yield Result(
            f"{photo.name}: {len(at)} of {len(pictures)} frames of a walk placed, {way:.2f} units away",
            f"{worst[0]:.2f} deg, {worst[1]:.3f}",
        )


def _walked(photo: Photo) -> tuple[Cameras, Tensor]:
    """Five cameras of the shipped walk, as far as the photo's depth lets it go, and what the preview shows there."""
    size, scale = photo.camera.size, float(photo.depth.median()) / 6
    path = trajectory.scale(camera_files.load_cameras(TOOLS / "demo" / "path.json", 49, 1.0, size), scale)
    path = replace(path, w2c=path.w2c @ torch.linalg.inv(path.w2c[0]), K=photo.camera.K.expand(len(path), 3, 3))[::12]
    world = begin(photo.image, photo.depth, photo.camera)
    sources = preview.remembered_sources(world, plan(world, path[1]))
    return path, torch.stack([preview.look_up(sources, path[i]).image for i in range(len(path))])


def _bent(depths: Tensor, off: float) -> Tensor:
    v, u = torch.meshgrid(*(torch.linspace(-1, 1, side) for side in depths.shape[1:]), indexing="ij")
    return torch.stack([depth * (1 + off * torch.sin(2.5 * u + 1.3 * v + i)) for i, depth in enumerate(depths)])


BENCHES: dict[str, Callable[[], Iterator[Result]]] = {"posing": bench_posing, "posing_photos": bench_posing_photos}
