"""Views that a world begins from, of a splat or a mesh."""

from __future__ import annotations

import torch
from comfy.model_management import get_torch_device
from comfy_api.latest import io, ui

from ..lyra_core.cameras.camera import Cameras
from ..lyra_core.exports import mesh_views
from ..lyra_core.memory.depth import DepthMap
from ..lyra_core.splats import rasterize
from . import types
from .mesh import from_mesh, texture_of
from .node import Node
from .splat import OPAQUE, shade_of, sound_splat

LEAST_SEEN = 0.01  # share of a picture that shows something, below which it is a view of nothing


class SplatViews(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lyra2SplatViews",
            display_name="Lyra 2 Splat Views",
            category=types.CATEGORY,
            search_aliases=["begin from splat", "begin from mesh", "3d to world"],
            description="Views of a splat or a mesh that a world begins from: what is there is remembered with its depth, and where nothing is, "
            "a generator may paint. The first view is where the world begins.",
            inputs=[
                io.Splat.Input("splat", optional=True),
                io.Mesh.Input("mesh", optional=True, tooltip="Instead of a splat; with its texture, or the colours of its vertices."),
                types.Cameras.Input(
                    "cameras", tooltip="Where to look from, such as a path: so many views are spread over it. Their picture size is the world's."
                ),
                io.Int.Input("views", default=6, min=1, max=32, tooltip="How many. More: more is remembered, and all takes longer."),
                io.Float.Input(
                    "opaque",
                    default=OPAQUE,
                    min=0.05,
                    max=0.99,
                    step=0.05,
                    tooltip="How opaque a splat must be for its depth to count. Higher: hazy surfaces are unknown.",
                ),
                io.Color.Input("background", default="#808080", tooltip="Where nothing is: #rgb, #rrggbb or a CSS name."),
            ],
            outputs=[
                io.Image.Output(display_name="images"),
                types.Depth.Output(display_name="depth"),
                types.Cameras.Output(display_name="cameras"),
                io.String.Output(display_name="report", tooltip="How much of each view is known, and which show nothing."),
            ],
        )

    @classmethod
    def execute(cls, cameras, splat=None, mesh=None, views=6, opaque=OPAQUE, background="#808080") -> io.NodeOutput:
        if (splat is None) == (mesh is None):
            raise ValueError(f"connect a splat or a mesh; found {'neither' if splat is None else 'both'}")
        cameras = cameras[spread(len(cameras), views)]
        shade, on_step = shade_of(background), types.progress(len(cameras))
        source = _drawn_splat(splat, cameras, shade, opaque) if mesh is None else _drawn_mesh(mesh, cameras, shade)
        drawn = []
        for image, depth in source:
            drawn.append((image.clamp(0, 1).float().cpu(), depth.float().cpu()))
            on_step(len(drawn), 0, (drawn[-1][0] * 255).to(torch.uint8))
        chosen, report = _shown([depth for _, depth in drawn])
        maps = tuple(DepthMap(drawn[i][1], cameras.K[i].float().cpu(), "a view of a splat" if mesh is None else "a view of a mesh") for i in chosen)
        return io.NodeOutput(torch.stack([drawn[i][0] for i in chosen]), maps, cameras[chosen], report, ui=ui.PreviewText(report))


def spread(total: int, count: int) -> list[int]:
    """`count` of `total` numbers at most, from the first to the last, equally far apart."""
    count = min(count, total)
    return [round(i * (total - 1) / max(count - 1, 1)) for i in range(count)]


def _drawn_splat(splat, cameras: Cameras, shade: tuple, opaque: float):
    gaussians, _ = sound_splat(splat)
    for frame in rasterize.render_frames(gaussians.to(get_torch_device()), cameras, shade):
        yield frame.images[0], torch.where(frame.alpha[0] > opaque, frame.depth[0], 0.0)


def _drawn_mesh(mesh, cameras: Cameras, shade: tuple):
    surface, texture = from_mesh(mesh), texture_of(mesh)
    for i in range(len(cameras)):
        yield mesh_views.picture(surface, cameras[i], texture, shade), mesh_views.draw(surface, cameras[i]).depth


def _shown(depths: list[torch.Tensor]) -> tuple[list[int], str]:
    """The views that show something, and what to say of each; ValueError if the first shows nothing."""
    shares = [float((depth > 0).float().mean()) for depth in depths]
    chosen = [i for i, share in enumerate(shares) if share >= LEAST_SEEN]
    if chosen[:1] != [0]:
        raise ValueError(
            f"the first view shows nothing ({shares[0]:.1%} of it is opaque), so no world can begin there; turn the first camera to "
            "what is there, or load what should be"
        )
    lines = [
        f"view {i + 1}: {share:.0%} known" if i in chosen else f"view {i + 1}: left out, it shows nothing" for i, share in enumerate(shares)
    ]
    return chosen, "\n".join(lines)
