"""Depth of the photo: laid out by hand, from a picture, or from the host's estimators."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..lyra_core.cameras.camera import pinhole
from ..lyra_core.memory import depth as depths
from . import types


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


def _distance(what: str):
    return io.Float.Input(
        "distance",
        default=6.0,
        min=0.01,
        max=10000.0,
        step=0.1,
        tooltip=f"How far away {what} is, in scene units. All paths scale with it; metres if you know them.",
    )


def _fraction(name: str, default: float, tooltip: str, low: float = 0.0, high: float = 1.0):
    return io.Float.Input(
        name, default=default, min=low, max=high, step=0.01, tooltip=tooltip + " In fractions of the picture."
    )


class Depth(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        layouts = [
            io.DynamicCombo.Option(
                "room box",
                [
                    _fraction("vanishing_x", 0.5, "Where the room's long edges meet, from the left."),
                    _fraction(
                        "vanishing_y", 0.5, "Where the room's long edges meet, from the top; usually the horizon."
                    ),
                    _fraction("wall_left", 0.25, "Left edge of the back wall.", -1.0),
                    _fraction("wall_top", 0.25, "Top edge of the back wall (the ceiling's far end).", -1.0),
                    _fraction("wall_right", 0.75, "Right edge of the back wall.", 0.0, 2.0),
                    _fraction("wall_bottom", 0.75, "Bottom edge of the back wall (the floor's far end).", 0.0, 2.0),
                    _distance("the back wall"),
                    _fov(),
                ],
            ),
            io.DynamicCombo.Option(
                "ground",
                [
                    _fraction("horizon", 0.5, "Height of the horizon, from the top.", -0.5, 1.5),
                    io.Float.Input(
                        "camera_height",
                        default=1.6,
                        min=0.01,
                        max=1000.0,
                        step=0.1,
                        tooltip="Height of the camera above the ground, in scene units. Higher: the ground is farther away.",
                    ),
                    _distance("the backdrop"),
                    _fov(),
                ],
            ),
            io.DynamicCombo.Option("plane", [_distance("the wall"), _fov()]),
            io.DynamicCombo.Option(
                "depth picture",
                [
                    io.Image.Input("picture", tooltip="The depth as a grey picture, one per photo; any size."),
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
                "Depth Anything 3", [types.Da3Geometry.Input("da3_geometry", tooltip="From DA3Inference."), _fov()]
            ),
        ]
        return io.Schema(
            node_id="Lyra2Depth",
            display_name="Lyra 2 Depth",
            category=types.CATEGORY,
            description="How far the surfaces in a photo are. The layouts need no weights at all: a room, a ground with a backdrop, "
            "or a wall, fitted by eye.",
            inputs=[
                io.Image.Input("image", tooltip="The photo, at the size of the world: both sides multiples of 16."),
                io.DynamicCombo.Input("source", options=layouts, tooltip="Where the depth comes from."),
                types.Cameras.Input(
                    "cameras",
                    optional=True,
                    tooltip="Take focal length and principal point from the first of these instead.",
                ),
            ],
            outputs=[
                types.Depth.Output(display_name="depth"),
                io.Image.Output(display_name="picture", tooltip="Near is white, unknown is black."),
            ],
        )

    @classmethod
    def execute(cls, image, source, cameras=None) -> io.NodeOutput:
        size = tuple(image.shape[1:3])
        maps = tuple(depths.resized(_depth_of(source, index, size, cameras), size) for index in range(len(image)))
        return io.NodeOutput(maps, torch.stack([_picture(m.depth) for m in maps]))


def _depth_of(source: dict, index: int, size: tuple[int, int], cameras) -> depths.DepthMap:
    kind = source["source"]
    if kind == "MoGe":
        found = depths.from_moge(source["moge_geometry"], index)
    elif kind == "Depth Anything 3":
        found = depths.from_da3(source["da3_geometry"], index, source["field_of_view"])
    else:
        given = source["picture"][min(index, len(source["picture"]) - 1)] if kind == "depth picture" else None
        grid = size if given is None else tuple(given.shape[:2])
        K = (
            cameras[0].resized(grid)
            if cameras is not None
            else pinhole(grid, depths.focal_from_fov(grid, source["field_of_view"]))
        ).K[0]
        if given is not None:
            return depths.from_picture(given, K, source["kind"], source["near"], source["far"])
        if kind == "plane":
            return depths.plane(size, K, source["distance"])
        if kind == "ground":
            return depths.ground(size, K, source["horizon"], source["camera_height"], source["distance"])
        wall = tuple(source[f"wall_{edge}"] for edge in ("left", "top", "right", "bottom"))
        return depths.room_box(size, K, (source["vanishing_x"], source["vanishing_y"]), wall, source["distance"])
    if cameras is not None:
        return depths.DepthMap(found.depth, cameras[0].resized(found.size).K[0], found.source)
    return found


def _picture(depth: torch.Tensor) -> torch.Tensor:
    disparity = torch.where(depth > 0, 1 / depth.clamp_min(1e-12), 0.0)
    return (
        (disparity / torch.quantile(disparity.flatten()[::7], 0.99).clamp_min(1e-12))
        .clamp(0, 1)[..., None]
        .expand(-1, -1, 3)
    )
