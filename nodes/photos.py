"""Views that a world begins from: several photos, or what a video or a capture has of them, each with its depth and camera."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image

from ..lyra_core.cameras import camera_files
from ..lyra_core.cameras.camera import Cameras
from ..lyra_core.memory import depth as depths
from ..lyra_core.memory import posing, video_frames
from ..lyra_core.world.world import to_float
from . import types
from .node import Node
from .video import frame_count, frames_of

MATCHES, MULTIVIEW, KNOWN = "by what they show alike", "Depth Anything 3", "cameras"


def _depth_input(tooltip: str):
    return types.Depth.Input("depth", tooltip=tooltip)


class Photos(Node):
    @classmethod
    def define_schema(cls):
        ways = [
            io.DynamicCombo.Option(
                MATCHES,
                [
                    _depth_input(
                        "From Lyra 2 Depth of the same photos. With that of the first alone, the others remember only what it shows."
                    ),
                    io.Combo.Input(
                        "focal",
                        options=list(posing.FOCAL_CHOICES),
                        default=posing.FOCAL_CHOICES[0],
                        tooltip="Focal length: that of the depth; the one that fits best, where the camera went around something or "
                        "turned; or one for each photo, for a zoom lens whose first photo is right.",
                    ),
                ],
            ),
            io.DynamicCombo.Option(
                MULTIVIEW,
                [
                    types.Da3Geometry.Input(
                        "da3_geometry", tooltip="From Run Depth Anything 3 of the same photos with mode multiview (Small or Base)."
                    )
                ],
            ),
            io.DynamicCombo.Option(
                KNOWN,
                [
                    types.Cameras.Input("cameras", tooltip="Where the photos were taken, one each, such as from Lyra 2 Load Capture."),
                    _depth_input("From Lyra 2 Depth of the same photos; each is brought to the scale of the cameras."),
                ],
            ),
        ]
        return io.Schema(
            node_id="Lyra2Photos",
            display_name="Lyra 2 Photos",
            category=types.CATEGORY,
            search_aliases=["structure from motion", "colmap", "pose", "several photos", "multi-view"],
            description="Finds where photos of one still place were taken, and brings their depths to one scale. The first is where a world "
            "begins; the others are remembered. What does not fit is left out, and the report says why.",
            inputs=[
                io.Image.Input(
                    "images", tooltip="2 to 10 photos of one place that overlap, all of one size (Batch Images): each shows a third of "
                    "another at least. Both sides multiples of 16."
                ),
                io.DynamicCombo.Input("places", options=ways, tooltip="How it is known where each photo was taken."),
                io.Int.Input(
                    "least_matches",
                    default=posing.LEAST,
                    min=0,
                    max=1000,
                    advanced=True,
                    tooltip="Photos of which fewer points fit to the others are left out. Higher: stricter. 0: all stay that Depth "
                    "Anything 3 has placed.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="Those that fit, the first in front."),
                types.Depth.Output(display_name="depth"),
                types.Cameras.Output(display_name="cameras"),
                io.String.Output(display_name="report", tooltip="How well each photo fits, and which were left out."),
            ],
        )

    @classmethod
    def execute(cls, images, places, least_matches=posing.LEAST) -> io.NodeOutput:
        images = types.colour(images)
        placement = _placement(images, places, least_matches)
        report = "\n".join(posing.said(placement, len(images)))
        chosen = [its.photo for its in placement.placed]
        cameras = [its.camera for its in placement.placed]
        seen = Cameras(torch.cat([c.w2c for c in cameras]), torch.cat([c.K for c in cameras]), cameras[0].size, cameras[0].origin)
        return io.NodeOutput(
            images[chosen], tuple(its.depth for its in placement.placed), seen, report, ui=ui.PreviewText(report)
        )


def _placement(images: torch.Tensor, places: dict, least: int) -> posing.Placement:
    size, on_step = tuple(images.shape[1:3]), types.progress()
    if places["places"] == MATCHES:
        return posing.place(images, places["depth"], least, places["focal"], on_step)
    if places["places"] == KNOWN:
        return posing.fitted(images, places["depth"], places["cameras"].to("cpu"), least, on_step)
    cameras = depths.da3_cameras(places["da3_geometry"], size)
    maps = [depths.from_da3(places["da3_geometry"], i, size=size, K=cameras.K[i]) for i in range(len(cameras))]
    return posing.agreed(images, maps, cameras, least, on_step)


class PickFrames(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lyra2PickFrames",
            display_name="Lyra 2 Pick Frames",
            category=types.CATEGORY,
            search_aliases=["video to photos", "keyframes", "extract frames"],
            description="The few frames of a video that a world begins from: equally far apart by how the picture moves, parallax above all, "
            "and the sharpest around. Up to the first cut. Scale them and connect them to Lyra 2 Photos.",
            inputs=[
                io.Video.Input("video", tooltip="A slow walk through, or around, a still place. Load Video, or any other VIDEO."),
                io.Int.Input(
                    "count",
                    default=8,
                    min=video_frames.FEWEST,
                    max=video_frames.MOST,
                    tooltip="Frames at most. More: they overlap more, and take longer to place.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images"),
                io.String.Output(display_name="report", tooltip="Which frames were taken, and how much the video moves."),
            ],
        )

    @classmethod
    def execute(cls, video, count=8) -> io.NodeOutput:
        on_step, total = types.progress(), frame_count(video)
        motion = video_frames.measured(frames_of(video), lambda done: on_step(done, total))
        chosen = video_frames.chosen(motion, count)
        taken = [to_float(frame) for number, frame in zip(range(chosen[-1] + 1), frames_of(video), strict=False) if number in chosen]
        report = _picked(chosen, motion)
        return io.NodeOutput(torch.stack(taken), report, ui=ui.PreviewText(report))


def _picked(chosen: list[int], motion: video_frames.Motion) -> str:
    lines = [
        f"frames {', '.join(str(number) for number in chosen)}",
        f"the picture moves by {motion.way[-1]:.0%} of its width in {len(motion.way)} frames, with {motion.parallax:.1%} of parallax",
    ]
    if motion.cut:
        lines.append(f"frame {len(motion.way)} begins another shot; what follows was left out")
    left = 1 - motion.way[chosen[-1]] / motion.way[-1]
    if left > 0.1:
        lines.append(f"it moves too far for so few frames: the last {left:.0%} of the way was left out")
    return "\n".join(lines)


class LoadCapture(Node):
    @classmethod
    def define_schema(cls):
        captures = [*types.input_files(".json"), *types.input_folders("cameras.txt", "images.txt")]
        return io.Schema(
            node_id="Lyra2LoadCapture",
            display_name="Lyra 2 Load Capture",
            category=types.CATEGORY,
            search_aliases=["colmap", "nerfstudio", "transforms.json", "polycam", "record3d"],
            description="Pictures of a scan with the cameras they were taken from: a transforms.json (nerfstudio, instant-ngp, Polycam) or a "
            "COLMAP text model, with its pictures beside it or in a folder images. For Lyra 2 Photos, with the depth of the pictures.",
            inputs=[
                io.Combo.Input("file", options=captures, tooltip="The transforms.json, or the folder of the COLMAP model, in the input folder."),
                io.Int.Input("count", default=8, min=2, max=10, tooltip="Pictures at most, spread over those from the first one on."),
                io.Int.Input("first", default=0, min=0, max=100000, tooltip="The picture that the world begins from."),
                io.Int.Input(
                    "step",
                    default=0,
                    min=0,
                    max=100000,
                    tooltip="From one picture to the next. Larger: more is seen, but they must overlap. 0: as far as the capture goes.",
                ),
                io.Int.Input("width", default=832, min=64, max=2048, step=16, tooltip="Of the world, pixels; pictures are cropped to it."),
                io.Int.Input("height", default=480, min=64, max=2048, step=16, tooltip="Of the world, pixels; pictures are cropped to it."),
            ],
            outputs=[
                io.Image.Output(display_name="images"),
                types.Cameras.Output(display_name="cameras"),
                io.String.Output(display_name="report", tooltip="Which pictures were taken, and what to know of their cameras."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file, **_) -> str:
        path = types.input_path(file)
        return types.fingerprint(*camera_files.files_read(path), *camera_files.pictures_of(path))

    @classmethod
    def execute(cls, file, count=8, first=0, step=0, width=832, height=480) -> io.NodeOutput:
        notes: list[str] = []
        path, size = types.input_path(file), (height, width)
        cameras = camera_files.load_cameras(path, size=size, fit="crop", on_note=notes.append)
        pictures = camera_files.pictures_of(path)
        chosen = _spread(len(pictures), count, first, step)
        images = torch.stack([cropped(pictures[i], size) for i in chosen])
        report = "\n".join([", ".join(pictures[i].name for i in chosen), *notes])
        return io.NodeOutput(images, cameras[chosen], report, ui=ui.PreviewText(report))


def _spread(total: int, count: int, first: int, step: int) -> list[int]:
    """At most `count` of `total` numbers from the first on, `step` apart; 0: to the end."""
    left = total - first
    if left < 2:
        raise ValueError(f"the capture has {total} pictures; there are not two from number {first} on")
    step = step or max(1, (left - 1) // (count - 1))
    return list(range(first, total, step))[:count]


def cropped(file: Path, size: tuple[int, int]) -> torch.Tensor:
    """A picture (H, W, 3) enlarged evenly until it covers `size`, and cut around its middle, as `Cameras.cropped`.

    As it lies in the file: captures count its pixels before any EXIF rotation.
    """
    with Image.open(file) as opened:
        picture = opened.convert("RGB")
    scale = max(size[0] / picture.height, size[1] / picture.width)
    x, y = (picture.width - size[1] / scale) / 2, (picture.height - size[0] / scale) / 2
    box = (x, y, picture.width - x, picture.height - y)
    return torch.from_numpy(np.array(picture.resize(size[::-1], Image.Resampling.LANCZOS, box=box))).float() / 255


NODES = [Photos, PickFrames, LoadCapture]
