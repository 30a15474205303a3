"""The host's own cameras, in and out."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..lyra_core.cameras import load3d
from . import types
from .node import Node


def _field_of_view_input():
    return io.Combo.Input(
        "field_of_view",
        options=list(load3d.FOVS),
        default=load3d.FOVS[0],
        advanced=True,
        tooltip="What the camera's fov is of. Vertical in the 3D viewers; Render Splat takes it for the shorter side, which "
        "differs for upright pictures only.",
    )


class CamerasFromLoad3D(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lyra2CamerasFromLoad3D",
            display_name="Lyra 2 Cameras From 3D",
            category=types.CATEGORY,
            search_aliases=["LOAD3D_CAMERA", "camera_info"],
            description="Cameras of ComfyUI's own 3D nodes (Load 3D, Preview 3D, Create Camera Info), one or many, become a path, in "
            "the order in which they come. Make it smooth and as long as you like with Lyra 2 Edit Trajectory.",
            is_input_list=True,
            inputs=[
                io.Load3DCamera.Input("camera_info", tooltip="One camera, or a list of them."),
                io.Int.Input("width", default=832, min=16, max=8192, step=16, tooltip="Width of the world, pixels."),
                io.Int.Input("height", default=480, min=16, max=8192, step=16, tooltip="Height of the world, pixels."),
                _field_of_view_input(),
            ],
            outputs=[types.Cameras.Output(display_name="cameras")],
        )

    @classmethod
    def execute(cls, camera_info, width, height, field_of_view) -> io.NodeOutput:
        return io.NodeOutput(load3d.from_load3d(camera_info, (height[0], width[0]), field_of_view[0]))


class CamerasToLoad3D(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lyra2CamerasToLoad3D",
            display_name="Lyra 2 Cameras To 3D",
            category=types.CATEGORY,
            search_aliases=["LOAD3D_CAMERA", "camera_info"],
            description="Cameras for ComfyUI's own 3D nodes: Render Splat, Preview 3D, Preview Gaussian Splat.",
            inputs=[
                types.Cameras.Input("cameras"),
                io.Int.Input("first", default=0, min=0, max=1000000, tooltip="First camera."),
                io.Int.Input("count", default=1, min=0, max=1000000, tooltip="How many cameras; 0: all that follow."),
                io.Float.Input(
                    "target_distance",
                    default=1.0,
                    min=0.001,
                    max=10000.0,
                    step=0.01,
                    tooltip="How far ahead the point lies that a 3D viewer turns around, in scene units.",
                ),
                _field_of_view_input(),
            ],
            outputs=[
                io.Load3DCamera.Output(
                    display_name="camera_info", is_output_list=True, tooltip="One by one: what follows runs once for each."
                ),
                io.Load3DCamera.Output(display_name="batch", tooltip="All at once, for nodes that take a list of cameras."),
                io.String.Output(display_name="report", tooltip="What such a camera can't hold."),
            ],
        )

    @classmethod
    def execute(cls, cameras, first, count, target_distance, field_of_view) -> io.NodeOutput:
        chosen = cameras[first : first + count if count else None]
        if not len(chosen):
            raise ValueError(f"there are {len(cameras)} cameras; there is none from {first} on")
        found = load3d.to_load3d(chosen, target_distance, field_of_view)
        bent = sum(bool({"pixel_aspect", "shift"} & camera.keys()) for camera in found)
        report = f"{len(found)} of {len(cameras)} cameras for pictures of {cameras.size[1]}x{cameras.size[0]}"
        if bent:
            report += (
                f"; {bent} of them have wide pixels or their principal point beside the middle, which only Lyra 2 Cameras "
                "From 3D reads again: ComfyUI's nodes will draw them with square pixels around the middle"
            )
        return io.NodeOutput(found, found, report, ui=ui.PreviewText(report))
