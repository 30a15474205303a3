"""Views that a world begins from, cut out of a panorama."""

from __future__ import annotations

import torch
from comfy_api.latest import io, ui

from ..lyra_core.cameras import panorama
from ..lyra_core.memory import depth as depths
from . import types
from .node import Node

ROOM, SPHERE, PICTURE, MOGE = "room", "sphere", "distance picture", "MoGe"


def _metres(name: str, default: float, tooltip: str):
    return io.Float.Input(name, default=default, min=0.01, max=10000.0, step=0.1, tooltip=tooltip + " In scene units.")


class Panorama(Node):
    @classmethod
    def define_schema(cls):
        distances = [
            io.DynamicCombo.Option(
                ROOM,
                [
                    _metres("room_width", 5.0, "From the left wall to the right one, as seen in the panorama's middle."),
                    _metres("room_length", 5.0, "From the wall behind to the one ahead."),
                    _metres("room_height", 2.7, "From floor to ceiling; a large number for a square under the sky."),
                    _metres("camera_height", 1.6, "Of the camera above the floor. Higher: the floor is farther away."),
                ],
            ),
            io.DynamicCombo.Option(SPHERE, [_metres("radius", 10.0, "How far everything is. Larger: a walk changes less.")]),
            io.DynamicCombo.Option(
                PICTURE,
                [
                    io.Image.Input("picture", tooltip="Distances of the whole panorama as a grey picture, in any size twice as wide as high."),
                    io.Combo.Input(
                        "kind",
                        options=["disparity", "linear", "metric"],
                        default="disparity",
                        tooltip="disparity: white is near, 1/distance in between. linear: black is near. metric: value times far is "
                        "the distance, black is unknown.",
                    ),
                    _metres("near", 1.0, "Distance of the nearest value."),
                    _metres("far", 10.0, "Distance of the farthest value."),
                ],
            ),
            io.DynamicCombo.Option(
                MOGE, [types.MogeGeometry.Input("moge_geometry", tooltip="From Run MoGe Panorama Inference of the same panorama.")]
            ),
        ]
        return io.Schema(
            node_id="Lyra2Panorama",
            display_name="Lyra 2 Panorama",
            category=types.CATEGORY,
            search_aliases=["equirectangular", "360", "spherical", "hdri"],
            description="Cuts a 360 degree panorama into views that a world begins from: all stand in its middle, overlap, and see as much of "
            "it as their number allows. The first is where the world begins; the others are remembered.",
            inputs=[
                io.Image.Input("image", tooltip="One equirectangular panorama, twice as wide as high."),
                io.DynamicCombo.Input("distance", options=distances, tooltip="Where it is known from how far everything is."),
                io.Int.Input(
                    "views",
                    default=12,
                    min=panorama.FEWEST,
                    max=panorama.MOST,
                    tooltip="More: less of the sphere is missing, and more to remember. 12 of 832x480 at 90 degrees see 97 %.",
                ),
                io.Int.Input("width", default=832, min=64, max=2048, step=16, tooltip="Of each view and of the world, pixels."),
                io.Int.Input("height", default=480, min=64, max=2048, step=16, tooltip="Of each view and of the world, pixels."),
                io.Float.Input(
                    "field_of_view",
                    default=90.0,
                    min=30.0,
                    max=120.0,
                    step=1.0,
                    tooltip="Of each view and of the world, degrees across. Wider: fewer views see all, borders look stretched.",
                ),
                io.Float.Input(
                    "heading",
                    default=0.0,
                    min=-360.0,
                    max=360.0,
                    step=1.0,
                    tooltip="Where the first view looks: 0 is the panorama's middle, 90 a quarter to the right.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images"),
                types.Depth.Output(display_name="depth"),
                types.Cameras.Output(display_name="cameras"),
                io.String.Output(display_name="report", tooltip="How much of the panorama the views see, and how far it is."),
            ],
        )

    @classmethod
    def execute(cls, image, distance, views=12, width=832, height=480, field_of_view=90.0, heading=0.0) -> io.NodeOutput:
        picture = _one(types.colour(image), "panorama")
        far = _distances(distance, tuple(panorama.check_panorama(picture).shape[:2]))
        cameras = panorama.around(views, (height, width), field_of_view, heading)
        seen, pictures = panorama.depths(far, cameras), panorama.pictures(picture, cameras)
        cameras = panorama.around(views, (height, width), field_of_view)  # the world begins straight ahead, wherever that looks
        report = _report(cameras, seen)
        known = [i for i, depth in enumerate(seen) if (depth > 0).any()]
        if known[:1] != [0]:
            raise ValueError("no distance is known where the first view looks; turn the heading to where there is something")
        cameras, source = cameras[known], f"view of the panorama, {distance['distance']}"
        maps = tuple(depths.depth_map(seen[i], K, source) for i, K in zip(known, cameras.K, strict=True))
        return io.NodeOutput(pictures[known], maps, cameras, report, ui=ui.PreviewText(report))


def _one(images: torch.Tensor, what: str) -> torch.Tensor:
    if len(images) != 1:
        raise ValueError(f"{len(images)} pictures; give one {what}")
    return images[0].float().cpu()


def _distances(source: dict, size: tuple[int, int]) -> torch.Tensor:
    """Distances (H, W) of the panorama, whose own size they may not have."""
    kind = source["distance"]
    if kind == ROOM:
        return panorama.room(size, *(source[name] for name in ("room_width", "room_length", "room_height", "camera_height")))
    if kind == SPHERE:
        return panorama.sphere(size, source["radius"])
    if kind == PICTURE:
        picture = _one(source["picture"], "picture of distances")
        return depths.read_picture(picture, source["kind"], source["near"], source["far"])
    return depths.distance_from_moge(source["moge_geometry"])


def _report(cameras, seen: torch.Tensor) -> str:
    known = seen[seen > 0] if (seen > 0).any() else seen
    lines = [
        f"{len(cameras)} views of {cameras.size[1]}x{cameras.size[0]} see {panorama.coverage(cameras):.1%} of the panorama; depth "
        f"{known.min():.3g} to {known.max():.3g} scene units, {(seen == 0).float().mean():.1%} unknown"
    ]
    lines += [f"view {i + 1}: left out, no distance is known in it" for i, depth in enumerate(seen) if not (depth > 0).any()]
    return "\n".join(lines)
