"""Gaussian splats: made from a world without weights, and seen along any path."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from comfy.model_management import get_torch_device, intermediate_device
from comfy_api.latest import Types, io, ui
from PIL import ImageColor

from ..lyra_core.memory.depth import DepthMap
from ..lyra_core.models.devices import geometry_device
from ..lyra_core.splats import gaussians as splats
from ..lyra_core.splats import rasterize
from ..lyra_core.world.world import World, to_float
from . import types
from .node import Node

OPAQUE = 0.5  # from here on a pixel shows a surface that has a depth


def to_splat(gaussians: splats.Gaussians) -> Types.SPLAT:
    """The host's SPLAT: a batch of one, opacities with a trailing axis; same axes, same units."""
    return Types.SPLAT(
        gaussians.means[None],
        gaussians.scales[None],
        gaussians.quats[None],
        gaussians.opacities[None, :, None],
        gaussians.sh[None],
    )


def from_splat(splat: Types.SPLAT) -> splats.Gaussians:
    """The host's SPLAT, which may hold only one item, without its padding."""
    if len(splat.positions) != 1:
        raise ValueError(f"this splat is a batch of {len(splat.positions)}; connect one of them, or merge them first")
    count = splat.positions.shape[1] if splat.counts is None else int(splat.counts[0])
    if not count:
        raise ValueError("this splat is empty; there is nothing to see")
    return splats.Gaussians(
        splat.positions[0, :count],
        splat.rotations[0, :count],
        splat.scales[0, :count],
        splat.opacities[0, :count, 0],
        splat.sh[0, :count],
    )


def sound_splat(splat: Types.SPLAT) -> tuple[splats.Gaussians, str]:
    """What can be drawn of the host's SPLAT, and how many are left out: "3 broken", or nothing."""
    gaussians, broken = splats.sound(from_splat(splat))
    if not len(gaussians):
        raise ValueError(f"all {broken:,} gaussians of this splat {splats.BROKEN}; make or load it again")
    return gaussians, f"{broken:,} broken" if broken else ""


def shade_of(color: str) -> tuple[float, float, float]:
    """A colour in 0..1 from #rgb, #rrggbb or a CSS name; ValueError that names what was found otherwise."""
    try:
        rgb = ImageColor.getrgb(color.strip())
    except (ValueError, AttributeError):
        rgb = ()
    if len(rgb) != 3:
        raise ValueError(f"{color!r} is no colour; write #rgb, #rrggbb or a CSS name, such as #fff, #102030 or black")
    return tuple(part / 255 for part in rgb)


class WorldGaussians(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lyra2WorldGaussians",
            display_name="Lyra 2 World Gaussians",
            category=types.CATEGORY,
            description="A gaussian splat of a world from its own frames and depths, without any weights: one gaussian per pixel of the "
            "photo, then of each keyframe what the earlier ones do not cover.",
            inputs=[
                types.World.Input("world"),
                io.Int.Input(
                    "stride",
                    default=1,
                    min=1,
                    max=16,
                    tooltip="Every how many pixels a gaussian is placed. Higher: smaller files, softer.",
                ),
                io.Boolean.Input(
                    "invented", default=True, tooltip="Also what the preview made up. Off: only what the photo shows."
                ),
            ],
            outputs=[io.Splat.Output(display_name="splat")],
        )

    @classmethod
    def execute(cls, world, stride, invented) -> io.NodeOutput:
        views = on_device(world_views(world, invented), geometry_device(world.size))
        return io.NodeOutput(to_splat(splats.fuse(views, stride).to("cpu")))


def on_device(views: Iterator[tuple], device: torch.device) -> Iterator[tuple]:
    """Views of a picture, its depth, its camera and, maybe, which pixels count."""
    for parts in views:
        yield tuple(None if part is None else part.to(device) for part in parts)


def world_views(world: World, invented: bool) -> Iterator[tuple]:
    """One view per keyframe, the photo first."""
    on_step = types.progress(len(world.memory.keyframes))
    for done, keyframe in enumerate(world.memory.keyframes):
        image = to_float(world.frame(keyframe.frame))
        yield image, keyframe.depth, keyframe.camera, None if invented else ~world.invented(keyframe.frame)
        on_step(done + 1, 0, world.frame(keyframe.frame))


class RenderSplat(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lyra2RenderSplat",
            display_name="Lyra 2 Render Splat",
            category=types.CATEGORY,
            description="Any splat along any cameras, also from inside a room. gsplat is used where it is installed and a GPU is there; "
            "else plain torch, on GPU or CPU. Colours change with the direction as far as the splat knows; broken gaussians are left out.",
            inputs=[
                io.Splat.Input("splat"),
                types.Cameras.Input("cameras"),
                io.Color.Input("background", default="#000000", tooltip="Where nothing is: #rgb, #rrggbb or a CSS name."),
                io.Combo.Input(
                    "rasteriser",
                    options=list(rasterize.BACKENDS),
                    default="auto",
                    advanced=True,
                    tooltip="gsplat: fast, CUDA only. torch: everywhere. auto: gsplat if it can be used.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images"),
                io.Mask.Output(display_name="alpha"),
                io.Image.Output(display_name="depth", tooltip="Near is white; nothing is black."),
                types.Depth.Output(
                    display_name="scene_depth",
                    tooltip="In scene units, where the splat is opaque: for Lyra 2 World Mesh, which so makes a mesh of any splat.",
                ),
            ],
        )

    @classmethod
    def execute(cls, splat, cameras, background, rasteriser) -> io.NodeOutput:
        shade, (gaussians, broken) = shade_of(background), sound_splat(splat)
        height, width = cameras.size
        types.afford(len(cameras) * height * width * 40, f"rendering {len(cameras)} pictures of {width}x{height}")
        frames, on_step = [], types.progress(len(cameras))
        for frame in rasterize.render_frames(gaussians.to(get_torch_device()), cameras, shade, backend=rasteriser):
            frames.append(tuple(part[0].to(intermediate_device()) for part in (frame.images, frame.alpha, frame.depth)))
            on_step(len(frames), 0, (frames[-1][0].clamp(0, 1) * 255).to(torch.uint8))
        images, alpha, depth = (torch.stack(part) for part in zip(*frames, strict=True))
        disparity = torch.where(depth > 0, 1 / depth.clamp_min(1e-9), 0.0)
        grey = (disparity / disparity.max().clamp_min(1e-9))[..., None].expand(-1, -1, -1, 3)
        opaque = torch.where(alpha > OPAQUE, depth, 0.0)
        maps = tuple(
            DepthMap(d.float().cpu(), K, "splat") for d, K in zip(opaque, cameras.K.float().cpu(), strict=True)
        )
        report = ui.PreviewText(f"{len(gaussians):,} gaussians drawn, {broken} left out") if broken else None
        return io.NodeOutput(images.clamp(0, 1), alpha, grey, maps, ui=report)


class PruneSplat(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lyra2PruneSplat",
            display_name="Lyra 2 Prune Splat",
            category=types.CATEGORY,
            description="A lighter, cleaner splat: without what is faint, oversized or far away, and merged down to a number that a "
            "viewer, a browser or a headset can show.",
            inputs=[
                io.Splat.Input("splat"),
                io.Float.Input(
                    "min_opacity",
                    default=0.02,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Fainter ones go. Higher: smaller files, thinner surfaces.",
                ),
                io.Float.Input(
                    "faintest",
                    default=0.0,
                    min=0.0,
                    max=0.99,
                    step=0.05,
                    tooltip="Share that goes, the faintest first.",
                ),
                io.Float.Input(
                    "max_size",
                    default=0.0,
                    min=0.0,
                    max=1e6,
                    step=0.01,
                    tooltip="Larger ones (standard deviation in scene units) go: the fog of a reconstruction. 0: all sizes stay.",
                ),
                io.Float.Input(
                    "outliers",
                    default=10.0,
                    min=0.0,
                    max=1000.0,
                    step=0.5,
                    tooltip="Those this many times as far from the middle of the scene as half of them are, go. Lower: tighter. "
                    "0: all stay.",
                ),
                io.Int.Input(
                    "at_most",
                    default=0,
                    min=0,
                    max=100_000_000,
                    step=10_000,
                    tooltip="Neighbours are merged until so many are left: about 1,000,000 for a headset or a browser. 0: no limit.",
                ),
            ],
            outputs=[io.Splat.Output(display_name="splat"), io.String.Output(display_name="report")],
        )

    @classmethod
    def execute(cls, splat, min_opacity=0.02, faintest=0.0, max_size=0.0, outliers=10.0, at_most=0) -> io.NodeOutput:
        kept, broken = sound_splat(splat)
        lines = [broken] if broken else []
        for what, wanted, step in (
            ("faint or oversized", True, lambda g: splats.prune(g, min_opacity, max_size or float("inf"))),
            ("the faintest", faintest, lambda g: splats.prune(g, splats.faintest(g.opacities, faintest))),
            ("far away", outliers, lambda g: splats.without_outliers(g, outliers)),
            ("merged into neighbours", at_most, lambda g: splats.at_most(g, at_most, types.stop_if_interrupted)),
        ):
            before = len(kept)
            kept = step(kept) if wanted and before else kept
            lines += [f"{before - len(kept):,} {what}"] if before > len(kept) else []
        if not len(kept):
            raise ValueError(f"nothing is left of this splat ({', '.join(lines)}); prune less")
        report = f"{len(kept):,} gaussians left; gone: {', '.join(lines) or 'none'}"
        return io.NodeOutput(to_splat(kept), report, ui=ui.PreviewText(report))
