"""What cameras, memory, conditioning, world and splats give on another device is what they give on the processor.

The other device is not there: `elsewhere` stands for it and refuses what a GPU refuses. Every public function of the rooms
that takes tensors is a case here, or belongs to the processor for a reason. `python tests/devices.py` in a process of its
own, because torch learns of a device for good; test_devices.py does that.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch
from elsewhere import Elsewhere, elsewhere, tensors, there

from lyra_core.cameras import camera, camera_path, presets, trajectory
from lyra_core.conditioning import correspondence, framepack, schedules
from lyra_core.memory import depth, depth_alignment, patches, planes, retrieval, warp
from lyra_core.splats import alignment, gaussian_adapter, gaussians, rasterize
from lyra_core.world import caption, control, made_up, preview
from lyra_core.world import world as worlds

SIZE = (48, 64)
TO_THE_BIT = ("cameras.camera.product", "cameras.camera.unproject")  # what decides whether a point lies on a pixel


def scene() -> SimpleNamespace:
    """A world of one photo, of a box that stands before a wall, and a path of 16 frames into it."""
    generator = torch.Generator().manual_seed(3)
    photo = torch.rand(6, 8, 3, generator=generator).repeat_interleave(8, 0).repeat_interleave(8, 1)
    start = camera.pinhole(SIZE, 50.0)
    room = depth.ground(SIZE, start.K[0], 0.4, 1.0, 4.0).depth.clone()
    room[20:34, 26:36] = 1.5
    room[:3, :5] = 0  # not known
    world = worlds.begin(photo, room, start)
    target = _path(start, 16)
    plan = worlds.plan(world, target)
    splat = gaussians.from_views([photo], [room], start)
    return SimpleNamespace(
        photo=photo, start=start, depth=room, world=world, target=target, plan=plan, splat=splat,
        points=warp.lift(room, start, photo), raw=torch.randn(1, 12, 16, 37, generator=generator),
        colours=torch.rand(17, *SIZE, 3, generator=generator), keyframes=list(world.memory.keyframes), generator=generator,
    )


def _path(start, frames: int):
    """Forwards and to the side, turning a little."""
    u = torch.linspace(0, 1, frames + 1)[1:]
    w2c = torch.eye(4).repeat(frames, 1, 1)
    w2c[:, 0, 0] = w2c[:, 2, 2] = torch.cos(0.2 * u)
    w2c[:, 0, 2], w2c[:, 2, 0] = torch.sin(0.2 * u), -torch.sin(0.2 * u)
    w2c[:, 0, 3], w2c[:, 2, 3] = -0.2 * u, -0.4 * u
    return camera.Cameras(w2c, start.K.repeat(frames, 1, 1), start.size)


def scene_there(scene, move=Elsewhere) -> SimpleNamespace:
    """What a caller moves to a GPU; the world, its keyframes and its plan stay where they are."""
    stays = ("world", "keyframes", "plan", "generator")
    return SimpleNamespace(**{name: v if name in stays else there(v, move) for name, v in vars(scene).items()})


def _device(scene):
    return scene.depth.device


def _grown(s):
    """A chunk appended from tensors of the device."""
    made = preview.generate(s.world, s.plan, device=_device(s))
    depths = {frame: d.to(_device(s)) for frame, d in made.depths.items()}
    return worlds.append(s.world, s.plan, made.frames.to(_device(s)), made.invented.to(_device(s)), depths)


def _painted(s):
    """A chunk of any pictures."""
    return worlds.new_chunk(s.plan, worlds.to_uint8(s.colours[1:]), s.colours[1:, ..., 0] > 0.5)


def _sources(s):
    return preview.remembered_sources(s.world, s.plan, _device(s))


def _estimate(s):
    return depth_alignment.Estimate(s.depth.repeat(4, 1, 1) * 1.7, s.target[:4])


LAYOUT = framepack.LYRA2
# modules, and functions of others, that work on the processor wherever their tensors come from or don't take any
PROCESSOR = {
    "cameras.camera_files": "read files",
    "cameras.colmap_files": "read files",
    "cameras.nerfstudio_files": "read files",
    "cameras.records": "read files",
    "cameras.load3d": "numbers of a browser",
    "cameras.next_path": "numbers of a browser",
    "cameras.path_picture": "draws with Pillow",
    "cameras.camera.pinhole": "makes new cameras",
    "cameras.camera_path.evaluate": "a path is of the processor's double precision",
    "cameras.camera_path.resample": "as above",
    "cameras.camera_path.path_cameras": "as above",
    "cameras.camera_path.motion": "as above",
    "cameras.camera_path.even_index": "as above",
    "cameras.panorama": "views of a picture that a world begins with",
    "memory.matches": "OpenCV",
    "memory.posing": "OpenCV",
    "memory.resection": "OpenCV",
    "memory.video_frames": "OpenCV",
    "memory.depth.read_picture": "a depth map by hand",
    "memory.depth.distance_from_moge": "what a network says of a panorama comes on the processor",
    "memory.depth.da3_cameras": "what a network says of photos comes on the processor",
    "memory.synthesis": "searches textures on the processor, where `filled` takes pictures",
    "world.made_up.beyond": "as above",
    "world.made_up.by_example": "as above",
    "world.made_up.carried_on": "as above",
    "world.consistency": "OpenCV; what it looks up is a case",
    "world.consistency_picture": "draws with Pillow",
    "memory.depth_files": "read files",
    "memory.layout": "OpenCV",
    "memory.resampling": "OpenCV",
    "memory.point_cloud": "numpy, for a server's thread",
    "memory.preflight": "numpy, for a server's thread",
    "memory.depth.assumed_lens": "makes a new lens",
    "memory.depth.plane": "a depth map by hand; its lens is the processor's",
    "memory.depth.ground": "as above",
    "memory.depth.room_box": "as above",
    "memory.depth.box": "as above",
    "memory.depth.axes_through": "as above",
    "conditioning.schedules.full": "makes a new schedule",
    "conditioning.schedules.dmd": "as above",
    "conditioning.schedules.dmd_table": "as above",
    "conditioning.schedules.initial_noise": "the seed's noise is the processor's, as the host's",
    "world.chunk_files": "write files",
    "world.world_files": "write files",
    "world.world.as_mask": "stored bits are the processor's",
    "world.world.hashes": "hashes are made on the processor",
    "world.world.keyframe_ids": "numbers of frames",
    "world.preview.coarse_to_fine": "numbers of frames",
    "splats.splat_files": "write files",
    "splats.optimize": "gsplat, which needs a real GPU",
    "splats.reconstruct": "its parts are cases; what a network says of frames comes on the processor",
}
CASES = {
    "cameras.camera": {
        "product": lambda s: camera.product(s.target.w2c[:, :3, :3], s.start.K[0]),
        "rescaled_as_reference": lambda s: camera.rescaled_as_reference(s.target, (96, 64)),
        "join": lambda s: camera.join(s.start, s.target),
        "check": lambda s: camera.check(s.target),
        "check_lens": lambda s: camera.check_lens(s.target),
        "pixel_grid": lambda s: camera.pixel_grid(SIZE, _device(s)),
        "unproject": lambda s: camera.unproject(s.depth[None], s.start),
        "project": lambda s: camera.project(s.points.xyz, s.target),
        "about": lambda s: camera.about(s.target, (1.0, 2.0, 3.0)),
        "to_corner_origin": lambda s: camera.to_corner_origin(s.target.K),
        "from_corner_origin": lambda s: camera.from_corner_origin(s.target.K),
        "from_normalized": lambda s: camera.from_normalized(s.target.K / 64, SIZE),
        "near_origin": lambda s: camera.near_origin(s.target.c2w.double() + 1e5),
        "c2w_of_file": lambda s: camera.c2w_of_file(s.target),
        "flip_camera_axes": lambda s: camera.flip_camera_axes(s.target.c2w),
        "rotation_to_quaternion": lambda s: camera.rotation_to_quaternion(s.target.w2c[:, :3, :3]),
        "quaternion_to_rotation": lambda s: camera.quaternion_to_rotation(s.target.w2c[:, 0]),
    },
    "cameras.camera_path": {
        "path_of": lambda s: [key.c2w for key in camera_path.path_of(s.target).keys],
        "slerp": lambda s: camera_path.slerp(s.target.w2c[:1, 0], s.target.w2c[1:2, 0], s.depth.new_tensor([0.3])),
    },
    "cameras.presets": {
        "preset": lambda s: presets.preset(next(iter(presets.PRESETS)), s.start, 9, 2.0),
        "poses": lambda s: presets.poses(s.target.w2c[:, :3, :3], s.target.w2c[:, :3, 3]),
        "standing": lambda s: presets.standing(s.target.w2c[:, :3, :3], s.target.centers),
    },
    "cameras.trajectory": {
        "known": lambda s: trajectory.known(s.depth),
        "center_depth": lambda s: trajectory.center_depth(s.depth),
        "zoom": lambda s: trajectory.zoom(s.start, s.depth, frames=9),
        "along_ground": lambda s: trajectory.along_ground(s.target, s.depth.new_tensor([0.0, -1.0, 0.0]), 0.1),
        "ground_normal": lambda s: trajectory.ground_normal(s.depth, s.start.K[0], torch.Generator().manual_seed(1)),
        "reverse": lambda s: trajectory.reverse(s.target),
        "scale": lambda s: trajectory.scale(s.target, 0.5),
        "retime": lambda s: trajectory.retime(s.target, 9, by="uniform motion"),
        "between": lambda s: trajectory.between(s.target, torch.tensor([0.0, 1.5, 3.0]).to(_device(s))),
        "pad_to_chunks": lambda s: trajectory.pad_to_chunks(s.target[:9], 8),
        "chain": lambda s: trajectory.chain(s.target, s.target),
        "guard": lambda s: trajectory.guard(s.target, s.points.xyz, 0.2)[0],
    },
    "memory.depth": {
        "depth_map": lambda s: depth.depth_map(s.depth, s.start.K[0], "a test"),
        "from_picture": lambda s: depth.from_picture(s.depth / 4, s.start.K[0].cpu(), "disparity", 1.0, 9.0),
        "doubts": lambda s: len(depth.doubts(s.depth / 4, "disparity")),
        "from_moge": lambda s: depth.from_moge({"depth": s.depth[None], "intrinsics": s.start.K / 64}),
        "from_da3": lambda s: depth.from_da3({"depth": s.depth[None]}),
        "onto": lambda s: depth.onto(s.depth, (24, 32)),
        "lens": lambda s: depth.lens(s.target, (96, 128)),
        "sharpened": lambda s: depth.sharpened(s.depth),
        "rays": lambda s: depth.rays(SIZE, s.start.K[0]),
    },
    "memory.depth_alignment": {
        "known_depth": lambda s: depth_alignment.known_depth(s.keyframes, s.target[:4]),
        "in_scene_units": lambda s: depth_alignment.in_scene_units(_estimate(s), s.target[:4], s.depth.repeat(4, 1, 1))[0],
        "memory_scale": lambda s: depth_alignment.memory_scale(s.depth[None] * 3, s.depth[None]).scale,
        "to_one_scale": lambda s: depth_alignment.to_one_scale(s.depth[None] * 3, s.depth[None]),
        "camera_scale": lambda s: depth_alignment.camera_scale(s.target, s.target)[0],
        "stretched": lambda s: depth_alignment.stretched(s.depth[None], (24, 32)),
    },
    "memory.patches": {
        "merge": lambda s: patches.merge(*(source.surface for source in _sources(s))),
        "patches": lambda s: patches.patches(s.depth, s.start),
        "draw": lambda s: patches.draw(patches.patches(s.depth, s.start), s.target[3]),
    },
    "memory.planes": {
        "planes": lambda s: planes.planes(s.depth, s.depth > 0),
        "in_front": lambda s: planes.in_front(planes.planes(s.depth, s.depth > 0)),
    },
    "memory.retrieval": {
        "coverage": lambda s: torch.tensor(list(retrieval.coverage(_grown(s).memory, s.target[[7, 15]]).values())),
        "retrieve": lambda s: torch.tensor(
            retrieval.retrieve(_grown(s).memory, s.target[[7, 15]]) + retrieval.retrieve(s.keyframes, s.target, by="ownership")
        ),
    },
    "memory.warp": {
        "reliable": lambda s: warp.reliable(s.depth),
        "lift": lambda s: warp.lift(s.depth, s.start, s.photo),
        "merge": lambda s: warp.merge(s.points, s.points),
        "splat": lambda s: warp.splat(s.points, s.target),
        "splat_views": lambda s: list(warp.splat_views(s.points, s.target)),
    },
    "conditioning.correspondence": {
        "canonical_coordinates": lambda s: correspondence.canonical_coordinates(SIZE, 2, device=_device(s)),
        "ray_maps": lambda s: correspondence.ray_maps(s.target, s.start),
        "on_latents": lambda s: correspondence.on_latents(s.photo.movedim(-1, 0)[:, None]),
        "guides": lambda s: correspondence.guides(LAYOUT, s.keyframes, s.world.cameras, _long(s)),
        "canonical_history": lambda s: correspondence.canonical_history(LAYOUT, SIZE, _device(s)),
        "warped_correspondences": lambda s: correspondence.warped_correspondences(LAYOUT, s.keyframes, _long(s)),
    },
    "conditioning.schedules": {"timesteps": lambda s: schedules.timesteps(s.depth.new_tensor([0.9, 0.5]))},
    "world.caption": {"caption_pictures": lambda s: caption.caption_pictures(s.world, s.target)},
    "world.control": {
        "control_views": lambda s: control.control_views(s.world, s.plan, device=_device(s)),
        "uncertain": lambda s: control.uncertain(s.depth > 2, s.depth, control.MaskRule()),
        "fit_tint": lambda s: control.fit_tint(s.colours[1:], _views(s), range(1, 17))[1],
        "grown": lambda s: control.grown(s.depth > 2, 2),
        "anchored": lambda s: control.anchored(
            s.world, s.plan, preview.generate(s.world, s.plan).frames.float() / 255, _device(s)
        )[0],
    },
    "world.preview": {
        "explore": lambda s: preview.explore(
            s.world, camera.join(s.world.last_camera, s.target.to("cpu")), chunk_frames=8, device=_device(s)
        ),
        "generate": lambda s: preview.generate(s.world, s.plan, device=_device(s)),
        "remembered_sources": _sources,
        "filled": lambda s: preview.filled(preview.look_up(_sources(s), s.target[7]), s.target[7], _sources(s), 0),
        "look_up": lambda s: preview.look_up(_sources(s), s.target[7]),
        "surface_depth": lambda s: preview.surface_depth(_sources(s), s.target[7]),
        "continued": lambda s: made_up.continued(s.photo, s.depth, s.depth > 2),
    },
    "world.made_up": {
        "deep": lambda s: float(made_up.deep(s.depth <= 2)),
        "softly": lambda s: made_up.softly(s.photo, s.depth, s.depth > 2),
        "continued": lambda s: made_up.continued(s.photo, s.depth, s.depth > 2),
        "sample": lambda s: made_up.sample(s.photo, s.depth.view(-1), s.depth.view(-1)),
    },
    "world.world": {
        "begin": lambda s: worlds.begin(s.photo, s.depth, s.start),
        "to_uint8": lambda s: worlds.to_uint8(s.photo),
        "as_bits": lambda s: worlds.as_bits(s.depth > 2),
        "to_float": lambda s: worlds.to_float((s.photo * 255).to(torch.uint8)),
        "plan": lambda s: worlds.plan(_grown(s), s.target, device=_device(s)),
        "warped_views": lambda s: worlds.warped_views(s.world, s.target),
        "continuation": lambda s: worlds.continuation(s.world, s.target)[0],
        "fingerprint": lambda s: worlds.fingerprint(s.target),
        "in_chunks": lambda s: worlds.in_chunks(s.target, 8),
        "append": _grown,
        "new_chunk": _painted,
        "remembering": lambda s: worlds.remembering(s.world, s.plan, _painted(s), dict.fromkeys(worlds.keyframe_ids(s.plan), s.depth)),
    },
    "splats.gaussian_adapter": {
        "nearest": lambda s: gaussian_adapter.nearest(s.depth[None], (6, 8)),
        "from_head": lambda s: gaussian_adapter.from_head(s.raw, s.raw[..., 0].sigmoid(), s.depth[None], s.start),
        "turned_sh": lambda s: gaussian_adapter.turned_sh(s.raw[..., :27].unflatten(-1, (9, 3)), s.target.w2c[3, :3, :3]),
    },
    "splats.gaussians": {
        "drawable": lambda s: gaussians.drawable(s.splat),
        "sound": lambda s: gaussians.sound(s.splat),
        "merge": lambda s: gaussians.merge(s.splat, s.splat),
        "colors_to_sh": lambda s: gaussians.colors_to_sh(s.photo),
        "degree": lambda s: gaussians.degree(s.splat),
        "harmonics": lambda s: gaussians.harmonics(s.points.xyz, 2),
        "seen_colors": lambda s: gaussians.seen_colors(s.splat, s.target.centers[3]),
        "from_views": lambda s: gaussians.from_views([s.photo] * 2, [s.depth] * 2, s.target[:2]),
        "fuse": lambda s: gaussians.fuse([(s.photo, s.depth, s.target[0]), (s.photo, s.depth, s.target[5])]),
        "covered": lambda s: gaussians.covered(s.splat.means, s.depth, s.target[3]),
        "from_pixels": lambda s: gaussians.from_pixels(s.photo, s.depth, s.start, s.depth > 2),
        "prune": lambda s: gaussians.prune(s.splat, 0.1, 0.5),
        "faintest": lambda s: gaussians.faintest(s.splat.opacities, 0.3),
        "without_outliers": lambda s: gaussians.without_outliers(s.splat, 3.0),
        "at_most": lambda s: gaussians.at_most(s.splat, 100),
        "voxel_reduce": lambda s: gaussians.voxel_reduce(s.splat, 0.3),
    },
    "splats.rasterize": {
        "render": lambda s: rasterize.render(s.splat, s.target[:2], backend="torch"),
        "render_frames": lambda s: list(rasterize.render_frames(s.splat, s.target[:2], backend="torch")),
    },
    "splats.alignment": {
        "align": lambda s: alignment.align(s.target, s.target),
        "disagreement": lambda s: alignment.disagreement(s.target, s.target, alignment.align(s.target, s.target)),
        "on_all_frames": lambda s: alignment.on_all_frames(s.target, range(0, 32, 2), 31),
        "in_world": lambda s: alignment.in_world(s.raw.expand(16, -1, -1, -1), s.raw[..., 0].sigmoid().expand(16, -1, -1),
                                                 s.depth.expand(16, -1, -1), s.target, s.target),
        "same_pixels": lambda s: _pairs(s),
        "fit_points": lambda s: float(alignment.fit_points(*_pairs(s)).scale),
        "fit_chunk": lambda s: float(alignment.fit_chunk(*_pairs(s), s.target, s.target).scale),
        "stand_still": lambda s: alignment.stand_still(s.target),
        "seen_from_first": lambda s: alignment.seen_from_first(s.target),
        "inverse_depth_weights": lambda s: alignment.inverse_depth_weights(s.depth.view(-1)),
        "owned": lambda s: alignment.owned(s.points.xyz, 0, [s.target[:8], s.target[8:]]),
    },
}


def _views(s):
    """Control views on the scene's device, of which the world's own are on the processor."""
    views = control.control_views(s.world, s.plan)
    return control.ControlViews(*(t.to(_device(s)) for t in (views.video, views.generate, views.disparity)), views.overlap)


def _pairs(s):
    points = camera.unproject(s.depth.expand(4, -1, -1), s.target[:4]).flatten(1, 2)
    return alignment.same_pixels(2 * points, points, s.target[:4])


def _long(s):
    """As many new frames as the transformer makes at once."""
    return s.target[[i % 16 for i in range(LAYOUT.new_frames)]]


def _numbers(found) -> list[torch.Tensor]:
    if isinstance(found, str):
        return [torch.tensor(list(found.encode()))]
    if isinstance(found, tuple) and all(isinstance(number, float) for number in found):
        return [torch.tensor(found)]
    return [torch.tensor(float(found))] if isinstance(found, (int, float)) else tensors(found)


def compared(run, here: SimpleNamespace, within: float) -> dict:
    """What a case gives there and here: `error` if that differs or can't be computed, and how often a GPU would wait."""
    try:
        with elsewhere() as mode:
            found = [t.inner if isinstance(t, Elsewhere) else t for t in _numbers(run(scene_there(here)))]
        expected = _numbers(run(here))
        assert len(found) == len(expected) > 0, f"{len(found)} and {len(expected)} tensors"
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=within, rtol=within, equal_nan=True)
    except Exception as error:
        places = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
        return {"error": f"{type(error).__name__}: {error} ({' > '.join(places[-6:])})"}
    return {"error": "", "waits": mode.waits}


def _spread(g: gaussians.Gaussians) -> torch.Tensor:
    axes = gaussians.quaternion_to_rotation(g.quats) * g.scales[:, None]
    return axes @ axes.mT


def on_a_gpu(run, here: SimpleNamespace) -> dict:
    """What share of a case's numbers a GPU gives otherwise than the processor: where rounding decides what is seen."""
    found, expected = run(scene_there(here, torch.Tensor.cuda)), run(here)
    if isinstance(expected, gaussians.Gaussians):  # the same ellipsoid has many rotations
        found, expected = ((g.means, _spread(g), g.opacities, g.sh) for g in (found, expected))
    found, expected = [t.cpu() for t in _numbers(found)], _numbers(expected)
    assert [t.shape for t in found] == [t.shape for t in expected] != []
    off = [~torch.isclose(a, b, atol=1e-4, rtol=1e-4, equal_nan=True) for a, b in zip(found, expected, strict=True)]
    return {"off": sum(int(wrong.sum()) for wrong in off), "of": sum(wrong.numel() for wrong in off)}


# what a chunk of the transformer's asks of geometry, with five retrieved frames and as many new ones as it makes
CHUNK = {
    "guides": (lambda s: correspondence.guides(LAYOUT, s.keyframes * 5, s.world.cameras, _long(s)), LAYOUT.new_frames),
    "warped views": (lambda s: worlds.warped_views(s.world, _long(s)), LAYOUT.new_frames),
    "known depth of the keyframes": (lambda s: depth_alignment.known_depth(s.keyframes * 5, s.target[:11]), 11),
    "retrieval among 11 keyframes": (lambda s: retrieval.coverage(s.keyframes * 11, s.target[15:]), 1),
    "invented": (lambda s: _drawn(patches.patches(s.depth, s.start), s.target), 16),
}


def _drawn(surface: patches.Patches, target) -> list[torch.Tensor]:
    return [patches.draw(surface, target[i]) for i in range(len(target))]


def counted(run, here: SimpleNamespace) -> dict[str, int]:
    """What `run` costs on a GPU besides its arithmetic."""
    given = scene_there(here)
    with elsewhere() as mode:
        run(given)
    return {"kernels": mode.kernels, "waits": mode.waits, "moved": mode.moved}


def main(only_counts: bool) -> None:
    """JSON of what all cases give and of what those of a chunk cost."""
    torch.set_num_threads(1)
    here = scene()
    cases = {f"{room}.{name}": run for room, runs in CASES.items() for name, run in runs.items()}
    found = {} if only_counts else {name: compared(run, here, 0.0 if name in TO_THE_BIT else 1e-5) for name, run in cases.items()}
    counts = {name: counted(run, here) | {"views": views} for name, (run, views) in CHUNK.items()}
    json.dump({"found": found, "counts": counts}, sys.stdout)


if __name__ == "__main__":
    main("counts" in sys.argv[1:])
