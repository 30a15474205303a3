"""Depth of the photo: laid out by hand, from a picture, or from the host's estimators."""

from __future__ import annotations

import logging

import torch
from comfy_api.latest import io, ui

from ..lyra_core import files
from ..lyra_core.memory import depth as depths
from ..lyra_core.memory import depth_files, layout
from . import types
from .node import Node

log = logging.getLogger(__name__)


def _fov():
    return io.Float.Input(
        "field_of_view",
        default=60.0,
        min=5.0,
        max=150.0,
        step=1.0,
        tooltip="Horizontal field of view of the photo in degrees, used when no cameras are connected. "
        "Phones are about 65, a portrait lens 30.",
    )


def _camera_height():
    return io.Float.Input(
        "camera_height",
        default=1.6,
        min=0.01,
        max=1000.0,
        step=0.1,
        tooltip="Height of the camera above the ground, in scene units. Higher: the ground is farther away.",
    )


def _distance(what: str):
    return io.Float.Input(
        "distance",
        default=layout.USUAL_DISTANCE,
        min=0.01,
        max=10000.0,
        step=0.1,
        tooltip=f"How far away {what} is, in scene units. All paths scale with it; metres if you know them.",
    )


def _fraction(name: str, default: float, tooltip: str, low: float = 0.0, high: float = 1.0):
    return io.Float.Input(
        name, default=default, min=low, max=high, step=0.01, tooltip=tooltip + " In fractions of the picture."
    )


class Depth(Node):
    @classmethod
    def define_schema(cls):
        layouts = [
            io.DynamicCombo.Option("auto", [_camera_height(), _fov()]),
            io.DynamicCombo.Option(
                "room box",
                [
                    _fraction("vanishing_x", layout.USUAL_POINT[0], "Where the room's long edges meet, from the left."),
                    _fraction(
                        "vanishing_y", layout.USUAL_POINT[1], "Where the room's long edges meet, from the top; usually the horizon."
                    ),
                    _fraction("wall_left", layout.USUAL_WALL[0], "Left edge of the back wall.", -1.0),
                    _fraction("wall_top", layout.USUAL_WALL[1], "Top edge of the back wall (the ceiling's far end).", -1.0),
                    _fraction("wall_right", layout.USUAL_WALL[2], "Right edge of the back wall.", 0.0, 2.0),
                    _fraction("wall_bottom", layout.USUAL_WALL[3], "Bottom edge of the back wall (the floor's far end).", 0.0, 2.0),
                    _distance("the back wall"),
                    _fov(),
                ],
            ),
            io.DynamicCombo.Option(
                "ground",
                [
                    _fraction("horizon", 0.5, "Height of the horizon, from the top.", -0.5, 1.5),
                    _camera_height(),
                    _distance("the backdrop"),
                    _fov(),
                ],
            ),
            io.DynamicCombo.Option("plane", [_distance("the wall"), _fov()]),
            io.DynamicCombo.Option(
                "depth picture",
                [
                    io.Image.Input("picture", tooltip="The depth of the whole photo as a grey picture, one per photo; in any size, "
                        "also squeezed to another shape."),
                    io.Combo.Input(
                        "kind",
                        options=["disparity", "linear", "metric"],
                        default="disparity",
                        tooltip="disparity: white is near, 1/depth in between (Depth Anything, MiDaS, ControlNet). "
                        "linear: black is near. metric: value times far is the depth, black is unknown.",
                    ),
                    io.Float.Input(
                        "near",
                        default=1.0,
                        min=0.001,
                        max=10000.0,
                        step=0.1,
                        tooltip="Depth of the nearest value, scene units.",
                    ),
                    io.Float.Input(
                        "far",
                        default=10.0,
                        min=0.002,
                        max=10000.0,
                        step=0.1,
                        tooltip="Depth of the farthest value, scene units.",
                    ),
                    _fov(),
                ],
            ),
            io.DynamicCombo.Option("MoGe", [types.MogeGeometry.Input("moge_geometry", tooltip="From MoGeInference.")]),
            io.DynamicCombo.Option(
                "Depth Anything 3",
                [
                    types.Da3Geometry.Input("da3_geometry", tooltip="From Run Depth Anything 3."),
                    _fov(),
                    io.Boolean.Input(
                        "metres",
                        default=False,
                        optional=True,
                        tooltip="The model is the Metric one, and its depth becomes metres by the photo's focal length. Its "
                        "own numbers are for a focal length of 300 pixels.",
                    ),
                    io.Int.Input(
                        "resolution",
                        default=504,
                        min=14,
                        max=8192,
                        step=14,
                        optional=True,
                        tooltip="For metres: the longest side in pixels at which the model looked at the photo, as in Run "
                        "Depth Anything 3. Twice as many: everything is twice as far.",
                    ),
                ],
            ),
        ]
        return io.Schema(
            node_id="Lyra2Depth",
            display_name="Lyra 2 Depth",
            category=types.CATEGORY,
            description="How far the surfaces in a photo are. The layouts need no weights at all: auto finds where the photo's "
            "lines meet; a room, a ground with a backdrop, or a wall are fitted by eye.",
            inputs=[
                io.Image.Input("image", tooltip="The photo, at the size of the world: both sides multiples of 16."),
                io.DynamicCombo.Input("source", options=layouts, tooltip="Where the depth comes from."),
                types.Cameras.Input(
                    "cameras",
                    optional=True,
                    tooltip="Take focal length and principal point from the first of these instead.",
                ),
                io.Float.Input(
                    "median",
                    default=0.0,
                    min=0.0,
                    max=10000.0,
                    step=0.1,
                    optional=True,
                    advanced=True,
                    tooltip="Scene units of the median depth, for a model without a scale or a path that is made for a certain "
                    "distance. Twice as much: everything is twice as far. 0: as it is.",
                ),
            ],
            outputs=[
                types.Depth.Output(display_name="depth"),
                io.Image.Output(display_name="picture", tooltip="Near is white, unknown is black."),
                io.String.Output(display_name="report", tooltip="Where each depth comes from, and what speaks against it."),
            ],
        )

    @classmethod
    def execute(cls, image, source, cameras=None, median=0.0) -> io.NodeOutput:
        size = tuple(image.shape[1:3])
        _refuse_other_count(source, len(image))
        K = depths.lens(cameras, size) if cameras is not None else None
        maps = tuple(_depth_of(source, index, photo, K) for index, photo in enumerate(types.colour(image)))
        maps = depths.with_median(maps, median) if median else maps
        return _output(maps, [_said(source, index, found) for index, found in enumerate(maps)])


def _output(maps: tuple[depths.DepthMap, ...], report: list[str]) -> io.NodeOutput:
    text = "\n".join(report)
    return io.NodeOutput(maps, torch.stack([_picture(m.depth) for m in maps]), text, ui=ui.PreviewText(text))


def _refuse_other_count(source: dict, photos: int) -> None:
    given = len(source["picture"]) if source["source"] == "depth picture" else photos
    if given != photos:
        raise ValueError(f"there are {given} depth pictures for {photos} photos; give one for each, in the same order")


def _said(source: dict, index: int, found: depths.DepthMap) -> str:
    """Where a map comes from; doubts about it are said in the log, too."""
    doubts = depths.doubts(source["picture"][index], source["kind"]) if source["source"] == "depth picture" else []
    if doubts:
        log.warning("depth picture %d may not be what it is taken for: %s", index, "; ".join(doubts))
    return "\n".join([found.source, *(f"  doubtful: {doubt}" for doubt in doubts)])


def _depth_of(source: dict, index: int, photo: torch.Tensor, K: torch.Tensor | None) -> depths.DepthMap:
    """Depth of a photo (H, W, 3), whose lens is K (3, 3) if that is known."""
    kind, size = source["source"], tuple(photo.shape[:2])
    if kind == "MoGe":
        return depths.from_moge(source["moge_geometry"], index, size, K)
    if kind == "Depth Anything 3":
        found = depths.from_da3(source["da3_geometry"], index, source["field_of_view"], size, K)
        if not source.get("metres"):
            return found
        depths.refuse_other_than_metric(source["da3_geometry"])
        return depths.in_metres(found, source.get("resolution", 504))
    K = depths.assumed_lens(size, source["field_of_view"]) if K is None else K
    if kind == "depth picture":
        picture = depths.onto(source["picture"][index], size)
        return depths.from_picture(picture, K, source["kind"], source["near"], source["far"])
    if kind == "auto":
        return layout.automatic(photo, K, source["camera_height"])
    if kind == "plane":
        return depths.plane(size, K, source["distance"])
    if kind == "ground":
        return depths.ground(size, K, source["horizon"], source["camera_height"], source["distance"])
    wall = tuple(source[f"wall_{edge}"] for edge in ("left", "top", "right", "bottom"))
    return depths.room_box(size, K, (source["vanishing_x"], source["vanishing_y"]), wall, source["distance"])


class LoadDepth(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lyra2LoadDepth",
            display_name="Lyra 2 Load Depth",
            category=types.CATEGORY,
            description="Depth of a photo from a file: EXR, float TIFF, 16-bit PNG, NumPy. Nothing is cut off or rescaled on the "
            "way in, as it is when Load Image reads such a file. Zero, infinite and too far pixels are unknown.",
            inputs=[
                io.Combo.Input(
                    "file", options=_depth_names(), tooltip="The depth file, in the input folder or a folder in it."
                ),
                io.Image.Input("image", tooltip="The photo, at the size of the world: both sides multiples of 16."),
                io.Combo.Input(
                    "unit",
                    options=[depth_files.AUTO, *depth_files.UNITS],
                    default=depth_files.AUTO,
                    tooltip="What 1 in the file is, after scaling. As usual: whole numbers are millimetres, others metres.",
                ),
                io.Float.Input(
                    "scale",
                    default=1.0,
                    min=0.0000001,
                    max=1000000.0,
                    step=0.0000001,
                    tooltip="The numbers in the file are multiplied by this first: 0.00390625 for KITTI (1/256), 0.2 for TUM with "
                    "unit millimetres. Larger: everything is farther; for a disparity, nearer.",
                ),
                io.Combo.Input(
                    "measure",
                    options=list(depth_files.MEASURES),
                    default=depth_files.MEASURES[0],
                    tooltip="What the numbers measure. depth: along the camera's axis. distance along the ray: from the "
                    "camera's centre, as some renderers and laser scanners give it. disparity: 1 / depth.",
                ),
                io.Float.Input(
                    "far",
                    default=10000.0,
                    min=0.001,
                    max=10000000.0,
                    step=1.0,
                    tooltip="Whatever is farther than so many metres is sky, and unknown.",
                ),
                _fov(),
                io.String.Input(
                    "channel",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Channel of an EXR or array of an .npz that holds the depth. Empty: told by its name.",
                ),
                types.Cameras.Input(
                    "cameras", optional=True, tooltip="Take focal length and principal point from the first of these instead."
                ),
            ],
            outputs=[
                types.Depth.Output(display_name="depth"),
                io.Image.Output(display_name="picture", tooltip="Near is white, unknown is black."),
                io.String.Output(display_name="report", tooltip="What was found, and what speaks against it."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file, **_) -> str:
        return types.fingerprint(types.input_path(file))

    @classmethod
    def execute(
        cls, file, image, unit=depth_files.AUTO, scale=1.0, measure="depth", far=10000.0, field_of_view=60.0, channel="",
        cameras=None,
    ) -> io.NodeOutput:  # fmt: skip
        size = tuple(image.shape[1:3])
        stored = depth_files.read(types.input_path(file), channel.strip())
        K, lens = _lens(stored, size, field_of_view, cameras)
        maps = depth_files.depth_maps(stored, depth_files.Recipe(unit, scale, measure, far), size, K)
        if len(maps) != len(image):
            raise ValueError(f"{file} holds the depth of {len(maps)} pictures, there are {len(image)} photos; give one for each")
        return _output(maps, [*(depth_files.summary(found, stored) for found in maps), lens])


def _lens(stored: depth_files.Stored, size: tuple[int, int], field_of_view: float, cameras) -> tuple[torch.Tensor, str]:
    """K (3, 3) of the photo, and where it comes from."""
    if cameras is not None:
        return depths.lens(cameras, size), "lens of the given cameras"
    own = depth_files.own_lens(stored, size)
    if own is not None:
        return own, f"lens of the file, focal lengths {own[0, 0]:.1f} and {own[1, 1]:.1f} pixels"
    return depths.assumed_lens(size, field_of_view), f"field of view of {field_of_view:g} degrees assumed"


def _depth_names() -> list[str]:
    """Depth files of the input folder and its subfolders, without what file managers leave there."""
    return [
        name
        for name in sorted(types.input_files(""), key=files.natural)
        if name.lower().endswith(depth_files.ENDINGS) and not any(map(files.is_litter, name.split("/")))
    ]


def _picture(depth: torch.Tensor) -> torch.Tensor:
    disparity = torch.where(depth > 0, 1 / depth.clamp_min(1e-12), 0.0)
    return (
        (disparity / torch.quantile(disparity.flatten()[::7], 0.99).clamp_min(1e-12))
        .clamp(0, 1)[..., None]
        .expand(-1, -1, 3)
    )
