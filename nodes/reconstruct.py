"""From frames to a splat by Depth Anything 3 with a Gaussian head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io, ui

from ..lyra_core.cameras.camera import Cameras
from ..lyra_core.memory.depth import DepthMap, resized
from ..lyra_core.models import da3_files
from ..lyra_core.models.reconstructor import Reconstructor, metres
from ..lyra_core.splats import alignment as fits
from ..lyra_core.splats import gaussian_adapter, reconstruct
from ..lyra_core.splats import gaussians as splats
from ..lyra_core.world.world import World, to_float
from . import types
from .depth_estimator import Da3Model
from .node import Node
from .splat import to_splat

FOLDER = "geometry_estimation"
NONE = "none"
DTYPES = {"default": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class LoadReconstructor(Node):
    @classmethod
    def define_schema(cls):
        files = folder_paths.get_filename_list(FOLDER)
        return io.Schema(
            node_id="Lyra2LoadReconstructor",
            display_name="Lyra 2 Load Reconstructor",
            category=types.CATEGORY,
            description="Depth Anything 3 giant with its Gaussian head, from the files as they were published: Lyra 2's "
            "reconstruction weights, or Depth Anything 3 giant or nested. Also estimates depth for Lyra 2 Explore.",
            inputs=[
                io.Combo.Input(
                    "model_name", options=files, tooltip="In models/geometry_estimation: .pt or .safetensors."
                ),
                io.Combo.Input(
                    "base",
                    options=[NONE, *files],
                    default=NONE,
                    tooltip="Where the weights are only a tuned part: the file of Depth Anything 3 that they were tuned from.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(DTYPES),
                    default="default",
                    advanced=True,
                    tooltip="Of the backbone. default: half precision where the device can. The heads stay in float32.",
                ),
            ],
            outputs=[Da3Model.Output(display_name="da3_model")],
        )

    @classmethod
    def execute(cls, model_name, base=NONE, weight_dtype="default") -> io.NodeOutput:
        source, tuned_from = (
            None if name == NONE else Path(folder_paths.get_full_path_or_raise(FOLDER, name))
            for name in (model_name, base)
        )
        return io.NodeOutput(da3_files.load(source, tuned_from, DTYPES[weight_dtype], types.progress()))


class Reconstruct(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lyra2Reconstruct",
            display_name="Lyra 2 Reconstruct",
            category=types.CATEGORY,
            description="A splat of a world or of any video of a still scene, by Depth Anything 3 with a Gaussian head. The "
            "cameras of the world, or given ones, say where everything is; without any, the network finds them.",
            inputs=[
                Da3Model.Input("da3_model", tooltip="From Lyra 2 Load Reconstructor."),
                types.World.Input("world", optional=True, tooltip="Its frames and cameras. Or give images."),
                io.Image.Input("images", optional=True, tooltip="The frames of a video, instead of a world."),
                types.Cameras.Input("cameras", optional=True, tooltip="Of the images, one each. A world has its own."),
                io.Combo.Input(
                    "poses",
                    options=list(reconstruct.POSES),
                    default="auto",
                    tooltip="given: the frames were taken by the world's or the given cameras. network: it looks twice and finds "
                    "them itself, which takes twice as long. auto: given, and network if the frames do not follow them.",
                ),
                io.Int.Input(
                    "views",
                    default=128,
                    min=2,
                    max=1024,
                    tooltip="Frames that are looked at together, evenly taken. More: finer, and memory and time grow with "
                    "their square. 48 to 64 fit smaller cards.",
                ),
                io.Int.Input(
                    "chunks",
                    default=0,
                    min=0,
                    max=64,
                    tooltip=f"In how many overlapping parts a long video is looked at. 0: one for each "
                    f"{reconstruct.FRAMES_AT_ONCE} frames.",
                ),
                io.Int.Input(
                    "spacing",
                    default=2,
                    min=1,
                    max=8,
                    tooltip="Pixels between gaussians. 2: as the reference, 11 million from 128 views of 832x480; 1: four "
                    "times as many.",
                ),
                io.Float.Input(
                    "prune",
                    default=0.0,
                    min=0.0,
                    max=0.99,
                    step=0.05,
                    tooltip="Share of the gaussians that goes, the faintest first. 0.5 halves the file and is hard to see.",
                ),
                io.Int.Input(
                    "resolution",
                    default=0,
                    min=0,
                    max=2520,
                    step=14,
                    advanced=True,
                    tooltip="Longest side in pixels at which the network looks. 0: that of the frames, as the reference.",
                ),
                io.Int.Input(
                    "overlap",
                    default=10,
                    min=3,
                    max=64,
                    advanced=True,
                    tooltip="Frames that neighbouring chunks share.",
                ),
                io.Combo.Input(
                    "alignment",
                    options=list(fits.ALIGNMENTS),
                    default="orientation",
                    advanced=True,
                    tooltip="How the network's world is laid over the cameras. orientation: by where they look, safe on "
                    "straight paths. centers: by where they stand, as the reference.",
                ),
                io.Combo.Input(
                    "follow",
                    options=["predicted", "given"],
                    default="predicted",
                    advanced=True,
                    tooltip="From where the pixels are sent out: the cameras that the network believes in, as the "
                    "reference, or exactly the given ones.",
                ),
                io.Boolean.Input(
                    "trim_border", default=True, advanced=True, tooltip="Leave 3 % at each border of a frame away."
                ),
                io.Boolean.Input(
                    "harmonics",
                    default=False,
                    advanced=True,
                    tooltip="Keep how colours change with the viewing direction: files grow 2.4 times.",
                ),
                io.Float.Input(
                    "largest",
                    default=1.0,
                    min=0.1,
                    max=4.0,
                    step=0.1,
                    advanced=True,
                    tooltip="How large gaussians may become, 1 as the weights were trained. Higher closes holes.",
                ),
                Da3Model.Input(
                    "metric_model",
                    optional=True,
                    tooltip="DA3METRIC-LARGE: cameras that the network finds are in metres then.",
                ),
            ],
            outputs=[
                io.Splat.Output(display_name="splat"),
                types.Cameras.Output(display_name="cameras", tooltip="Of every frame, as the splat was made."),
                io.Image.Output(display_name="views", tooltip="The frames that were looked at."),
                types.Cameras.Output(display_name="view_cameras"),
                types.Depth.Output(display_name="depth", tooltip="Of the views, in scene units."),
                io.String.Output(display_name="report"),
            ],
        )

    @classmethod
    def execute(
        cls, da3_model, poses="auto", views=128, chunks=0, spacing=2, prune=0.0, resolution=0, overlap=10,
        alignment="orientation", follow="predicted", trim_border=True, harmonics=False, largest=1.0,
        world=None, images=None, cameras=None, metric_model=None,
    ) -> io.NodeOutput:  # fmt: skip
        source = _source(world, images, cameras)
        plan = reconstruct.chunks_of(source.total, views, chunks, overlap)
        _check_memory(source, sum(len(chunk) for chunk in plan), spacing)
        found = reconstruct.reconstruct(
            Reconstructor(da3_model, spacing, resolution, types.progress()),
            source.frames, plan, source.cameras, source.known, poses, alignment, follow, trim_border,
            largest * gaussian_adapter.LARGEST, harmonics, metric_model and metres(metric_model),
        )  # fmt: skip
        gaussians = found.gaussians
        if prune:
            gaussians = splats.prune(gaussians, splats.faintest(gaussians.opacities, prune))
        every = fits.on_all_frames(found.cameras, found.frames, source.total)
        report = "\n".join(found.report)
        return io.NodeOutput(
            to_splat(gaussians), every, source.frames(found.frames), found.cameras, _depth_maps(found), report,
            ui=ui.PreviewText(report),
        )  # fmt: skip


@dataclass(frozen=True)
class _Source:
    """A video, wherever it comes from."""

    total: int  # frames
    frames: Callable[[Sequence[int]], torch.Tensor]  # those of these numbers, (F, H, W, 3)
    cameras: Cameras | None
    known: Callable[[Sequence[int]], torch.Tensor | None]  # their depth (F, H, W) in scene units, 0 where unknown


def _source(world: World | None, images: torch.Tensor | None, cameras: Cameras | None) -> _Source:
    if (world is None) == (images is None):
        raise ValueError("connect either a world or the images of a video")
    if world is not None:
        if cameras is not None:
            raise ValueError("a world has cameras of its own; connect cameras to images only")
        return _of_world(world)
    images = types.colour(images)
    size = tuple(images.shape[1:3])
    if cameras is not None and len(cameras) != len(images):
        raise ValueError(f"{len(images)} images and {len(cameras)} cameras; one camera for each image is needed")
    if cameras is not None and cameras.size != size:
        raise ValueError(f"the cameras are for pictures of {cameras.size}, the images are {size}; scale the images")
    return _Source(len(images), lambda frames: images[list(frames)], cameras, lambda frames: None)


def _check_memory(source: _Source, views: int, spacing: int) -> None:
    height, width = source.frames([0]).shape[1:3]
    gaussians = views * height * width // spacing**2
    what = f"{views} views of {width}x{height} and up to {gaussians:,} gaussians"
    types.afford(views * height * width * 12 + gaussians * 40, what)


def _of_world(world: World) -> _Source:
    depths = {keyframe.frame: keyframe.depth for keyframe in world.memory.keyframes}
    unknown = torch.zeros(world.size)

    def frames(wanted: Sequence[int]) -> torch.Tensor:
        return to_float(torch.stack([world.frame(frame) for frame in wanted]))

    def known(wanted: Sequence[int]) -> torch.Tensor:
        return torch.stack([depths.get(frame, unknown) for frame in wanted])

    return _Source(len(world), frames, world.cameras, known)


def _depth_maps(found: reconstruct.Reconstruction) -> tuple[DepthMap, ...]:
    """One for each view, in the size of the frames."""
    small = found.cameras.resized(tuple(found.depth.shape[1:]))
    maps = zip(found.depth, small.K, found.frames, strict=True)
    return tuple(resized(DepthMap(depth, K, f"frame {frame}"), found.cameras.size) for depth, K, frame in maps)
