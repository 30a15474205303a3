"""What the Explorer's server half costs: bytes and time of a chunk's points, the preflight and how true its coverage is."""

from __future__ import annotations

import gzip
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from host import TOOLS
from PIL import Image

from lyra_core.cameras import camera_files, next_path
from lyra_core.cameras.camera import Cameras, pinhole, pixel_grid
from lyra_core.cameras.camera_path import CameraPath, PathKey, path_cameras
from lyra_core.memory import point_cloud, preflight
from lyra_core.memory.depth import room_box
from lyra_core.memory.retrieval import TOLERANCE, Keyframe, _sightings
from lyra_core.world import opened, preview, world_files
from lyra_core.world.world import CHUNK_FRAMES, World, append, begin, keyframe_ids, plan

from . import Result
from .explorer_page import bench_page

SIZE, FOCAL = (480, 832), 720.7  # 60 degrees across, as the workflows have it
CHUNKS, MANY, RUNS = 10, 40, 10
HALF = (240, 416)  # of a world with many chunks: as many points, a quarter of the disk
HALL = torch.tensor([[-3.0, -1.6, -2.0], [3.0, 1.6, 9.0]])  # two corners of a hall to walk through, scene units
LIVE, SETTLED = 2, preflight.LEVELS


def seconds(work: Callable[[], object]) -> float:
    """Of the one thread that computes: a busy machine makes it wait, but not work more."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


def photo() -> World:
    """The demo's room as the workflows see it."""
    picture = Image.open(TOOLS / "demo" / "room.png").convert("RGB").resize(SIZE[::-1], Image.LANCZOS)
    camera = pinhole(SIZE, FOCAL)
    depth = room_box(SIZE, camera.K[0], (0.5, 0.55), (0.2, 0.1, 0.8, 0.72), 6.0).depth
    return begin(torch.from_numpy(np.array(picture)).float() / 255, depth, camera)


def hall_depth(camera: Cameras) -> torch.Tensor:
    """What a camera inside the hall sees of its walls."""
    rays = pixel_grid(camera.size) @ camera.K_inverse[0].T @ camera.c2w[0, :3, :3].T
    walls = torch.where(rays > 0, HALL[1], HALL[0]) - camera.centers[0]
    return (walls / rays).amin(-1)


def long_world(chunks: int, size: tuple[int, int]) -> World:
    """A walk through the hall and back, keyframes and all, without painting a frame."""
    stops = [((0, 0, 0), 0.0), ((0.8, 0, 3.0), 0.5), ((-1.0, 0.2, 5.0), -0.4), ((0, 0, 7.0), 0.2), ((0.5, 0, 1.0), -0.6)]
    keys = []
    for number, ((x, y, z), yaw) in enumerate(stops):
        c, s = float(np.cos(yaw)), float(np.sin(yaw))
        keys.append(PathKey(torch.tensor([[c, 0, s, x], [0, 1, 0, y], [-s, 0, c, z]]), 36.0, number + 1.0))
    way = path_cameras(CameraPath(tuple(keys), through_keys=True), size, 1 + chunks * CHUNK_FRAMES)
    cameras = Cameras(way.w2c, pinhole(SIZE, FOCAL, len(way)).resized(size).K, size)
    world = begin(torch.zeros(*size, 3), hall_depth(cameras[0]), cameras[0])
    frames = torch.zeros(CHUNK_FRAMES, *size, 3, dtype=torch.uint8)
    for start in range(1, len(cameras), CHUNK_FRAMES):
        planned = plan(world, cameras[start : start + CHUNK_FRAMES], 0)
        depths = {i: hall_depth(cameras[i]) for i in keyframe_ids(planned)}
        world = append(world, planned, frames, frames[..., 0] > 0, depths, settings={"chunk": start})
    return world


@torch.inference_mode()
def bench_explorer() -> Iterator[Result]:
    with tempfile.TemporaryDirectory() as folder:
        yield from bytes_and_truth(Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        yield from times(Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        yield from many(Path(folder))
    yield from bench_page()


def bytes_and_truth(folder: Path) -> Iterator[Result]:
    """Of the demo's room and two chunks that the preview grows in it."""
    world = photo()
    path = camera_files.load_cameras(TOOLS / "demo" / "path.json", 1 + 2 * CHUNK_FRAMES, size=SIZE)
    world = preview.explore(world, path, folder=folder)
    looking = opened.OpenWorlds()
    blocks = [point_cloud.decode(gzip.decompress(looking.points(folder, key).packed)) for key in world.keys]
    for name, key, block in zip(("photo", "first chunk", "second chunk"), world.keys, blocks, strict=True):
        packed = len(looking.points(folder, key).packed)
        raw = len(point_cloud.encode(block)) / len(block)
        yield Result(f"explorer: points of the demo's {name}", f"{len(block)}, {packed / 1e6:.2f} MB")
        yield Result(f"explorer: bytes a point of the {name}, packed", f"{packed / len(block):.1f}", "<= 4.5", packed <= 4.5 * len(block))
        if name == "photo":
            yield Result("explorer: bytes a point, raw", f"{raw:.2f}", "<= 10.1", raw <= 10.1)
        else:
            yield Result(f"explorer: the {name} on the wire", f"{packed / 1e6:.2f} MB", "<= 0.4 MB", packed <= 0.4e6)
    views = views_in_part(world)
    exact = exact_coverage(world.memory.keyframes, views)
    for name, levels, bar in (("live", LIVE, 0.05), ("settled", SETTLED, 0.03)):
        points = np.concatenate([block.points(levels) for block in blocks])
        grid = preflight.grid_of(SIZE, point_cloud.finest_stride(SIZE[1]) << (point_cloud.LEVELS - levels))
        worst = float(np.abs(preflight.coverage(points, views, grid) - exact).max())
        what = f"explorer: {name} coverage, worst of {len(views)} views ({exact.min():.0%} to {exact.max():.0%})"
        yield Result(what, f"{worst:.3f} off", f"<= {bar}", worst <= bar)


def views_in_part(world: World) -> Cameras:
    """Nine views from the way, turned away from what is known by more and more."""
    some = world.cameras[[0, 80, 160]]
    turns = []
    for degrees in (25.0, 45.0, 65.0):
        c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        turn = torch.eye(4)
        turn[:3, :3] = torch.tensor([[c, 0, s], [0, 1, 0], [-s, 0, c]])
        turns.append(turn @ some.w2c)
    return Cameras(torch.cat(turns), some.K.repeat(3, 1, 1), SIZE)


def exact_coverage(keyframes: tuple[Keyframe, ...], views: Cameras) -> np.ndarray:
    """Share of each view that retrieval's z-buffer finds known."""
    _, nearest = _sightings(list(keyframes), views.subsampled(4), TOLERANCE, False)
    return nearest.view(len(views), -1).isfinite().float().mean(1).numpy()


def times(folder: Path) -> Iterator[Result]:
    world = long_world(CHUNKS, SIZE)
    world_files.save(world, folder)
    looking = opened.OpenWorlds()
    opening = seconds(lambda: looking.world(folder, world.key))
    taken = [seconds(lambda key=key: looking.points(folder, key)) for key in world.keys]
    count = len(world.memory.keyframes)
    what = f"explorer: block of a chunk beside {count - 10} keyframes of {SIZE[1]}x{SIZE[0]}"
    yield Result("explorer: opening that world", f"{opening:.2f} s")
    yield Result(what, f"{taken[-1]:.2f} s", "<= 1 s", taken[-1] <= 1)
    yield Result("explorer: the slowest of its blocks", f"{max(taken):.2f} s", "<= 1 s", max(taken) <= 1)
    cloud, depth = looking.cloud(folder, world.key), looking.depth(folder, world.key)
    text = next_path.text_of(world.cameras[-1 - CHUNK_FRAMES :], world.key)
    cameras = next_path.cameras_of(next_path.read(text), world.last_camera)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def settled() -> None:
        planned = next_path.read(text)
        preflight.preflight(next_path.cameras_of(planned, world.last_camera), cloud, depth)

    runs = sorted(seconds(settled) for _ in range(RUNS))
    what = f"explorer: preflight, {len(next_path.read(text).path.keys)} keys, 1 chunk, {count} keyframes, {len(cloud)} points"
    middle = 1000 * statistics.median(runs)
    yield Result(what, f"{middle:.0f} ms (max {1000 * runs[-1]:.0f})", "<= 200 ms", middle <= 200)
    retrieving = seconds(lambda: plan(world, cameras[1:]))
    torch.set_num_threads(threads)
    yield Result("explorer: retrieval for that chunk, asked for apart", f"{1000 * retrieving:.0f} ms")


def many(folder: Path) -> Iterator[Result]:
    """Of a world of many chunks: what the page asks for first, and the points of the last chunk."""
    world, looking = long_world(MANY, HALF), opened.OpenWorlds()
    world_files.save(world, folder)
    asked = seconds(lambda: opened.summary(looking, folder, world.key))
    yield Result(f"explorer: summary of a world of {MANY} chunks", f"{asked:.2f} s", "<= 1 s", asked <= 1)
    opening = seconds(lambda: looking.world(folder, world.key))
    yield Result(f"explorer: opening it, {len(world.memory.keyframes)} keyframes", f"{opening:.2f} s")
    last = seconds(lambda: looking.points(folder, world.key))
    yield Result("explorer: block of its last chunk", f"{last:.2f} s", "<= 1 s", last <= 1)


BENCHES = {"explorer": bench_explorer}
