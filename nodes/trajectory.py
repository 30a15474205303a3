"""Camera paths: made, loaded, edited, drawn, saved."""

from __future__ import annotations

import json
from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io, ui

from ..lyra_core.cameras import camera_files, camera_path, path_picture, presets
from ..lyra_core.cameras import trajectory as paths
from ..lyra_core.cameras.camera import unproject
from ..lyra_core.cameras.captions import load_captions
from ..lyra_core.world.world import CHUNK_FRAMES, to_float
from . import types
from .inputs import seed_input
from .node import Node

# what "strength" means, where it is not a multiple of the scene's depth
RADIANS, DEGREES = ("orbit_horizontal", "orbit_vertical"), ("rotate_spot", "rotate_spot_noise")
WITHOUT_STRENGTH = ("original", "spiral_center", "back", "back_simple", "dolly_zoom")
WITHOUT_DIRECTION = ("original", "spiral_center", "dolly_zoom")
DEMO = Path(__file__).parents[1] / "tools" / "demo"
# offered beside the input folder's own files, so that a workflow runs before anybody brought one
WALK, CAPTIONS = "shipped: walk.json", "shipped: captions.json"
SHIPPED = {WALK: DEMO / "path.json", CAPTIONS: DEMO / "captions.json"}


def strength_of(preset: str) -> tuple[float, str] | None:
    """Default and unit of a preset's strength; None if it has none."""
    if preset in WITHOUT_STRENGTH:
        return None
    return (0.5, "radians") if preset in RADIANS else (30.0, "degrees") if preset in DEGREES else (0.2, "depths")


def _frames(default: int = 1 + CHUNK_FRAMES):
    return io.Int.Input(
        "frames",
        default=default,
        min=2,
        max=8001,
        tooltip="Number of cameras, the first one (where the world stands) included: 1 + 80 for every chunk.",
    )


def _start():
    return types.Cameras.Input(
        "start", optional=True, tooltip="Start where these end instead of at the photo, to go on from there."
    )


def _direction(options: list[str], tooltip: str):
    return io.Combo.Input("direction", options=options, default=options[0], tooltip=tooltip)


def _start_camera(depth, start):
    return depth[0].camera if start is None else start[-1:]


def _preset_option(name: str) -> io.DynamicCombo.Option:
    inputs = []
    if name not in WITHOUT_DIRECTION:
        inputs.append(
            _direction(
                list(presets.DIRECTIONS), "Which way. Most paths only tell 'right' from the rest, as in the reference."
            )
        )
    if name in RADIANS:
        inputs.append(
            io.Float.Input(
                "strength", default=0.5, min=0.0, max=20.0, step=0.05, tooltip="Angle travelled, in radians."
            )
        )
    elif name in DEGREES:
        inputs.append(
            io.Float.Input("strength", default=30.0, min=0.0, max=720.0, step=1.0, tooltip="Angle turned, in degrees.")
        )
    elif name not in WITHOUT_STRENGTH:
        inputs.append(
            io.Float.Input(
                "strength",
                default=0.2,
                min=0.0,
                max=10.0,
                step=0.05,
                tooltip="How far, as a multiple of the scene's depth (its 25 % quantile).",
            )
        )
    return io.DynamicCombo.Option(name, inputs)


class PresetTrajectory(Node):
    @classmethod
    def define_schema(cls):
        notes = "; ".join(f"{name}: {note}" for name, note in presets.PRESET_NOTES.items())
        return io.Schema(
            node_id="Lyra2PresetTrajectory",
            display_name="Lyra 2 Preset Trajectory",
            category=types.CATEGORY,
            description=f"The camera moves of the Lyra 2 reference, scaled by the depth of the scene. Notes: {notes}",
            inputs=[
                types.Depth.Input("depth", tooltip="Gives the camera and the scene's depth."),
                io.DynamicCombo.Input(
                    "preset",
                    options=[_preset_option(name) for name in sorted(presets.PRESETS)],
                    tooltip="The camera move.",
                ),
                _frames(),
                seed_input(2**63 - 1, "For the *_noise presets.", default=0, advanced=True),
                _start(),
            ],
            outputs=[types.Cameras.Output(display_name="cameras")],
        )

    @classmethod
    def execute(cls, depth, preset, frames, seed, start=None) -> io.NodeOutput:
        return io.NodeOutput(
            presets.preset(
                preset["preset"],
                _start_camera(depth, start),
                frames,
                paths.center_depth(depth[0].depth),
                preset.get("direction", "right"),
                preset.get("strength", 0.0),
                torch.Generator().manual_seed(seed),
            )
        )


class ZoomTrajectory(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lyra2ZoomTrajectory",
            display_name="Lyra 2 Zoom Trajectory",
            category=types.CATEGORY,
            description="Straight into the scene or back out of it, as the reference's zoom driver moves.",
            inputs=[
                types.Depth.Input("depth", tooltip="Gives the camera and the scene's depth (its 25 % quantile)."),
                _direction(["in", "out"], "Forward or backward."),
                io.Float.Input(
                    "strength",
                    default=0.5,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How far, as a multiple of the scene's depth. The reference: 0.5 in, 1.5 out.",
                ),
                _frames(),
                io.Float.Input(
                    "upward_ratio",
                    default=0.0,
                    min=0.0,
                    max=2.0,
                    step=0.01,
                    tooltip="Rise while going back, per unit of the way. The reference: 0.15 for zooming out.",
                ),
                io.Boolean.Input(
                    "along_ground",
                    default=False,
                    advanced=True,
                    tooltip="Keep the path parallel to the ground found in the lower part of the picture.",
                ),
                io.Float.Input(
                    "upward_shift",
                    default=0.05,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    advanced=True,
                    tooltip="With along_ground: rise by this many scene units along the path.",
                ),
                _start(),
            ],
            outputs=[types.Cameras.Output(display_name="cameras")],
        )

    @classmethod
    def execute(
        cls, depth, direction, strength, frames, upward_ratio, along_ground, upward_shift, start=None
    ) -> io.NodeOutput:
        normal = paths.ground_normal(depth[0].depth, depth[0].K) if along_ground else None
        return io.NodeOutput(
            paths.zoom(
                _start_camera(depth, start),
                depth[0].depth,
                direction,
                strength,
                frames,
                upward_ratio,
                normal,
                upward_shift,
            )
        )


class LoadTrajectory(Node):
    @classmethod
    def define_schema(cls):
        colmap = types.input_folders("cameras.txt", "images.txt")
        return io.Schema(
            node_id="Lyra2LoadTrajectory",
            display_name="Lyra 2 Load Trajectory",
            category=types.CATEGORY,
            description="Cameras from a file in the input folder: the reference's .npz (w2c, intrinsics, image_height, image_width) or "
            "camera-path .json, nerfstudio's transforms.json or viewer path, or a folder with a COLMAP text model. Captions from "
            "a .json that maps frame numbers to texts; 0, 1, 2 count chunks.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=[*types.input_files(".npz", ".json"), *colmap, WALK],
                    tooltip="The camera file. The shipped one is a short walk that suits a room.",
                ),
                _frames(161),
                io.Float.Input(
                    "pose_scale",
                    default=1.0,
                    min=0.0001,
                    max=10000.0,
                    step=0.01,
                    tooltip="All positions are multiplied by this, to fit the depth's units. 1 for paths saved here; 1.1 is what "
                    "the reference takes for those it ships.",
                ),
                io.Int.Input(
                    "width",
                    default=832,
                    min=16,
                    max=8192,
                    step=16,
                    tooltip="Width of the world, pixels; the cameras are brought to it.",
                ),
                io.Int.Input("height", default=480, min=16, max=8192, step=16, tooltip="Height of the world, pixels."),
                io.Combo.Input(
                    "captions",
                    options=["none", *types.input_files(".json"), CAPTIONS],
                    default="none",
                    tooltip="Texts per frame number, one per chunk is used.",
                ),
                io.Combo.Input(
                    "curve",
                    options=list(camera_files.CURVES),
                    default=camera_files.CURVES[0],
                    advanced=True,
                    tooltip="For camera-path files: the reference's B-spline passes beside inner keyframes; the other curve "
                    "meets every one of them.",
                ),
                io.Combo.Input(
                    "motion",
                    options=["uniform motion", "arc length", "time"],
                    default="uniform motion",
                    advanced=True,
                    tooltip="For camera-path files: uniform motion moves and turns equally much in every frame; arc length is "
                    "the reference's, which rushes through turns on the spot; time keeps the keyframes' rhythm.",
                ),
                io.Combo.Input(
                    "fit",
                    options=["crop", "stretch"],
                    default="crop",
                    advanced=True,
                    tooltip="For pictures of another shape than the world: cut around their middle, as the photo is, or stretched "
                    "with their lens as the reference does.",
                ),
                io.Boolean.Input(
                    "without_distortion",
                    default=False,
                    advanced=True,
                    tooltip="Take a bent lens without its bending: right for a path alone, wrong for the pictures of the file.",
                ),
            ],
            outputs=[
                types.Cameras.Output(display_name="cameras"),
                io.String.Output(display_name="captions", tooltip="As JSON: frame number to text."),
                io.String.Output(display_name="report", tooltip="What was read, and what to know of it."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file, captions, **_) -> str:
        read = camera_files.files_read(_file(file))
        return types.fingerprint(*read, *([_file(captions)] if captions != "none" else []))

    @classmethod
    def execute(
        cls, file, frames, pose_scale, width, height, captions, curve, motion, fit="crop", without_distortion=False
    ) -> io.NodeOutput:
        notes: list[str] = []
        options = {"curve": curve, "motion": motion, "fit": fit, "undistorted": without_distortion}
        size, path = (height, width), _file(file)
        cameras = camera_files.load_cameras(path, frames, pose_scale, size, **options, on_note=notes.append)
        texts = load_captions(_file(captions)) if captions != "none" else {}
        way = float(cameras.centers.diff(dim=0).norm(dim=1).sum())
        report = "\n".join([f"{len(cameras)} cameras of {width}x{height}, a way of {way:.4g} scene units", *notes])
        captions = json.dumps({str(k): v for k, v in texts.items()}, ensure_ascii=False)
        return io.NodeOutput(cameras, captions, report, ui=ui.PreviewText(report))


def _file(name: str) -> Path:
    return SHIPPED.get(name) or types.input_path(name)


class SaveTrajectory(Node):
    FORMATS = {"npz": ".npz", "camera path json": ".json", "nerfstudio transforms.json": ".json", "colmap text": ""}

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lyra2SaveTrajectory",
            display_name="Lyra 2 Save Trajectory",
            category=types.CATEGORY,
            is_output_node=True,
            description="Writes cameras to the output folder, for Blender, nerfstudio, COLMAP and for loading them again.",
            inputs=[
                types.Cameras.Input("cameras"),
                io.String.Input(
                    "filename_prefix",
                    default="lyra2/cameras",
                    tooltip="Folder and start of the name, in the output folder.",
                ),
                io.Combo.Input(
                    "format",
                    options=list(cls.FORMATS),
                    default="npz",
                    tooltip="npz: exact, the reference's keys. camera path json: every camera a keyframe. "
                    "colmap text: a folder with cameras.txt, images.txt, points3D.txt.",
                ),
            ],
            outputs=[],
        )

    @classmethod
    def execute(cls, cameras, filename_prefix, format) -> io.NodeOutput:
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory()
        )
        file = Path(folder) / f"{name}_{counter:05}_{cls.FORMATS[format]}"
        write_cameras(file, cameras, format)
        return io.NodeOutput(ui={"files": [{"filename": file.name, "subfolder": subfolder, "type": "output"}]})


def write_cameras(file: Path, cameras, format: str) -> None:
    """Cameras in one of SaveTrajectory's formats; a folder for COLMAP."""
    write = {
        "npz": camera_files.save_npz,
        "nerfstudio transforms.json": camera_files.save_transforms,
        "colmap text": camera_files.save_colmap,
        "camera path json": lambda path, c: camera_files.save_camera_path(path, camera_path.path_of(c)),
    }[format]
    write(file, cameras)


class EditTrajectory(Node):
    @classmethod
    def define_schema(cls):
        chunk = io.Int.Input(
            "chunk_frames",
            default=CHUNK_FRAMES,
            min=1,
            max=8000,
            tooltip="Frames per chunk; Lyra 2's transformer needs 80.",
        )
        edits = [
            io.DynamicCombo.Option("reverse", []),
            io.DynamicCombo.Option(
                "scale",
                [
                    io.Float.Input(
                        "factor",
                        default=1.0,
                        min=0.0001,
                        max=10000.0,
                        step=0.05,
                        tooltip="Positions are multiplied by this.",
                    ),
                    io.Combo.Input(
                        "about",
                        options=["first centre", "origin"],
                        default="first centre",
                        tooltip="The point that stays where it is.",
                    ),
                ],
            ),
            io.DynamicCombo.Option(
                "retime",
                [
                    _frames(),
                    io.Combo.Input(
                        "by",
                        options=["time", "uniform motion"],
                        default="uniform motion",
                        tooltip="time: keep the rhythm. uniform motion: every frame moves and turns equally much.",
                    ),
                ],
            ),
            io.DynamicCombo.Option(
                "pad to whole chunks",
                [
                    chunk,
                    io.Combo.Input(
                        "how",
                        options=["hold", "stretch"],
                        default="hold",
                        tooltip="hold: stay at the last camera. stretch: spread the same path over more frames.",
                    ),
                ],
            ),
            io.DynamicCombo.Option(
                "join",
                [
                    types.Cameras.Input(
                        "then", tooltip="Goes on from where the first path ends; it is moved there as a whole."
                    )
                ],
            ),
            io.DynamicCombo.Option("there and back", []),
            io.DynamicCombo.Option(
                "guard against collisions",
                [
                    types.World.Input("world", tooltip="Its known surfaces are kept clear of."),
                    io.Float.Input(
                        "clearance",
                        default=0.1,
                        min=0.0,
                        max=10.0,
                        step=0.01,
                        tooltip="Distance to keep, as a multiple of the scene's depth (25 % quantile). Larger stops earlier.",
                    ),
                    io.Combo.Input(
                        "how",
                        options=["shorten", "hold"],
                        default="shorten",
                        tooltip="shorten: spread the safe part over all frames. hold: stop at the last safe camera.",
                    ),
                ],
            ),
        ]
        return io.Schema(
            node_id="Lyra2EditTrajectory",
            display_name="Lyra 2 Edit Trajectory",
            category=types.CATEGORY,
            description="One change to a camera path; chain several.",
            inputs=[
                types.Cameras.Input("cameras"),
                io.DynamicCombo.Input("edit", options=edits, tooltip="What to do."),
            ],
            outputs=[types.Cameras.Output(display_name="cameras"), io.String.Output(display_name="report")],
        )

    @classmethod
    def execute(cls, cameras, edit) -> io.NodeOutput:
        edited, report = _edited(cameras, edit)
        return io.NodeOutput(edited, report, ui=ui.PreviewText(report))


def _edited(cameras, edit: dict):
    kind = edit["edit"]
    if kind == "guard against collisions":
        points, depth = _known_points(edit["world"])
        edited, report = paths.guard(cameras, points, edit["clearance"] * depth, edit["how"], types.stop_if_interrupted)
        return edited, str(report)
    edited = {
        "reverse": lambda: paths.reverse(cameras),
        "scale": lambda: paths.scale(cameras, edit["factor"], edit["about"]),
        "retime": lambda: paths.retime(cameras, edit["frames"], edit["by"]),
        "pad to whole chunks": lambda: paths.pad_to_chunks(cameras, edit["chunk_frames"], edit["how"]),
        "join": lambda: paths.chain(cameras, edit["then"]),
        "there and back": lambda: paths.chain(cameras, paths.reverse(cameras)),
    }[kind]()
    return edited, f"{kind}: {len(cameras)} cameras became {len(edited)}"


def _known_points(world, stride: int = 4):
    """World points (N, 3) of all keyframes, and the scene's depth in the first view."""
    points = [
        unproject(k.depth[None, ::stride, ::stride], k.camera.subsampled(stride))[0][k.depth[::stride, ::stride] > 0]
        for k in world.memory.keyframes
    ]
    return torch.cat(points), paths.center_depth(world.memory.keyframes[0].depth)


class DrawTrajectory(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lyra2DrawTrajectory",
            display_name="Lyra 2 Draw Trajectory",
            category=types.CATEGORY,
            description="See a path before running it: over the first view, and on a map from above. Green is the start, red the end.",
            inputs=[
                types.Cameras.Input("cameras"),
                types.World.Input("world", optional=True, tooltip="Drawn beneath the path."),
            ],
            outputs=[io.Image.Output(display_name="over the first view"), io.Image.Output(display_name="from above")],
        )

    @classmethod
    def execute(cls, cameras, world=None) -> io.NodeOutput:
        size = cameras.size
        types.afford(size[0] * size[1] * 36, f"drawing two maps of {size[1]}x{size[0]}")
        if world is None:
            first, points, colours = torch.full((*size, 3), 40, dtype=torch.uint8), torch.zeros(0, 3), torch.zeros(0, 3)
            reach = max(float((cameras.centers - cameras.centers[0]).norm(dim=1).max()), 1.0)
        else:
            first = world.frame(0)
            points, reach = _known_points(world)
            colours = torch.cat(
                [to_float(world.frame(k.frame))[::4, ::4][k.depth[::4, ::4] > 0] for k in world.memory.keyframes]
            )
        over = path_picture.over_first_view(first, cameras, 0.3 * reach)
        above = path_picture.from_above(cameras, points, colours, size)
        return io.NodeOutput(
            to_float(over)[None], to_float(above)[None], ui=ui.PreviewImage(to_float(torch.stack([over, above])))
        )
