"""One chunk by the transformer: what it is shown of a world, and what becomes of the latents that it paints.

plan -> pack -> (the host samples) -> grow -> plan -> ...
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial

import comfy.clip_vision
import comfy.model_management
import torch
import torch.nn.functional as F
from comfy.sd import VAE
from torch import Tensor

from ..cameras.camera import Cameras, join
from ..conditioning.correspondence import guides
from ..conditioning.framepack import LATENT_FRAMES, LYRA2, FramePackLayout, spatial_frames, temporal_latents
from ..conditioning.history import Guides, History
from ..memory.depth import sharpened
from ..memory.depth_alignment import DepthEstimator, NoScaleError, in_scene_units, known_depth
from ..memory.patches import draw, patches
from ..world import control
from ..world.world import (
    ChunkPlan,
    Latents,
    World,
    append,
    keyframe_ids,
    new_chunk,
    remembering,
    to_uint8,
    warped_views,
)
from . import streaming_vae
from .depth_estimators import MemoryEstimator
from .devices import PROCESSOR, geometry_device
from .streaming_vae import FRAMES, PAIR, Stream

STILL = 25  # latents of the photo, repeated, that stand for the time before a world's first chunk
STILL_FRAMES = 1 + FRAMES * (STILL - 1)
CLIP_SIZE = 224
CLIP_MEAN, CLIP_SPREAD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

log = logging.getLogger(__name__)

Progress = Callable[[int, int, Tensor | None], None]


def quiet(done: int, total: int, picture: Tensor | None = None) -> None:
    """A progress callback for those who don't want one."""


# --------------------------------------------------------------------------------------------------------- what it sees


def pack(
    world: World, plan: ChunkPlan, vae: VAE, layout: FramePackLayout = LYRA2, on_step: Progress = quiet
) -> History:
    """The history of the planned chunk. ValueError if the plan is for another world or does not fill the layout."""
    _check_plan(world, plan)
    if len(plan.target) != layout.new_frames:
        raise ValueError(
            f"the transformer makes {layout.new_frames} frames at a time, this plan asks for {len(plan.target)}; "
            "plan chunks of that length"
        )
    streaming_vae.load(vae, _latent_size(world))
    frames, latents = _slots(world, plan, vae, layout)
    on_step(1, 3)
    warped = warped_latents(world, plan, vae)
    on_step(2, 3)
    cameras = join(*(_camera(world, frame) for frame in frames))
    retrieved = [world.memory[frame] for frame in plan.retrieved]

    def make(device: torch.device | None) -> Guides:
        return guides(layout, retrieved, cameras, plan.target.to(device or "cpu"))

    return History(layout, latents, warped, make)


def _check_plan(world: World, plan: ChunkPlan) -> None:
    if plan.world_key != world.key:
        raise ValueError("this plan was made for another world, or for this one before it grew; plan again")


def _slots(world: World, plan: ChunkPlan, vae: VAE, layout: FramePackLayout) -> tuple[list[int], Tensor]:
    """Which frame each history slot stands for (the last one of its latent), and the latents (16, slots, h, w)."""
    chosen = temporal_latents(layout, STILL + _new_latents(world))
    recent = recent_latents(world, vae, chosen[1], "history")
    temporal = [(0, _alone(world, vae, [0])[0])]
    temporal += [(_frame_of(latent), recent[:, latent - chosen[1]]) for latent in chosen[1:]]
    ids = spatial_frames(layout, plan.retrieved)
    spatial = list(zip(ids, _alone(world, vae, ids), strict=True))
    sources = {"temporal": iter(temporal), "spatial": iter(spatial)}
    order = [next(sources[s.source]) for s in layout.segments for _ in range(s.slots)]
    return [frame for frame, _ in order], torch.stack([latent for _, latent in order], 1)


def _frame_of(latent: int) -> int:
    """The last frame of a latent, counted from the first of the still ones."""
    return max(0, FRAMES * (latent - STILL + 1))


def _alone(world: World, vae: VAE, frames: list[int]) -> list[Tensor]:
    """Latents (16, h, w) of frames, each encoded alone; those that the memory keeps are not encoded again."""
    kept = {keyframe.frame: keyframe.latent for keyframe in world.memory.keyframes}
    missing = [frame for frame in dict.fromkeys(frames) if kept.get(frame) is None]
    if missing:
        made = streaming_vae.encode_alone(vae, torch.stack([world.exact(frame) for frame in missing]))
        kept |= dict(zip(missing, made, strict=True))
    return [kept[frame] for frame in frames]


def warped_latents(world: World, plan: ChunkPlan, vae: VAE) -> Tensor:
    """(16, T, h, w): the warped views, the first one repeated in front, as a video of its own."""
    views = warped_views(world, plan.target.to(geometry_device(world.size)))[0] * 2 - 1
    video = torch.cat([views[:1], views])
    return torch.cat(list(streaming_vae.encode(vae, video, streaming_vae.fresh(vae))), 1)[:, 1:]


def look(clip_vision: comfy.clip_vision.ClipVisionModel, world: World) -> comfy.clip_vision.Output:
    """CLIP's view of the newest frame."""
    comfy.model_management.load_model_gpu(clip_vision.patcher)
    seen = comfy.clip_vision.Output()
    seen["penultimate_hidden_states"] = look_at(clip_vision, world.exact(len(world) - 1))
    return seen


def look_at(clip_vision: comfy.clip_vision.ClipVisionModel, picture: Tensor) -> Tensor:
    """CLIP's view (1, tokens, width) of a picture (H, W, 3) in -1 .. 1, by a model that is loaded.

    As the reference prepares it: stretched to a square, nothing cropped or rounded.
    """
    picture = picture.movedim(-1, 0)[None].to(clip_vision.load_device)
    picture = F.interpolate(picture, (CLIP_SIZE, CLIP_SIZE), mode="bicubic", align_corners=False) * 0.5 + 0.5
    mean, spread = (picture.new_tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_SPREAD))
    hidden = clip_vision.model(pixel_values=(picture - mean) / spread, intermediate_output=-2)[1]
    return hidden.to(comfy.model_management.intermediate_device())


# ------------------------------------------------------------------------------------------------ what becomes of it


def grow(
    world: World,
    plan: ChunkPlan,
    latents: Tensor,
    vae: VAE,
    estimator: DepthEstimator,
    alignment: str = "memory",
    prompt: str = "",
    settings: Mapping | None = None,
    on_step: Progress = quiet,
) -> tuple[World, str]:
    """The world with the sampled latents (16, T, h, w) as its next chunk, and how its depth got its scale."""
    _check_plan(world, plan)
    expected = (16, len(plan.target) // LATENT_FRAMES, *_latent_size(world))
    if tuple(latents.shape) != expected or not torch.isfinite(latents).all():
        raise ValueError(
            f"expected finite latents {expected}, found {tuple(latents.shape)}; sample the plan's own latent"
        )
    latents, steps = latents.float().cpu().contiguous(), expected[1] // PAIR + 1
    streaming_vae.load(vae, _latent_size(world))
    stream, ids = take_stream(world, vae), keyframe_ids(plan)
    frames, kept = [], {}

    def collect(decoded: Tensor) -> None:
        pictures = to_uint8(decoded * 0.5 + 0.5)  # before they come to the processor: a quarter of the bytes
        for frame, picture in enumerate(decoded, plan.first_frame + len(frames)):
            if frame in ids:
                # a view would keep its neighbours too, and other strides than those of a reopened world round differently
                kept[frame] = picture.cpu().clone(memory_format=torch.contiguous_format)
        frames.extend(pictures.split(1))
        on_step(len(frames) // len(decoded), steps, pictures[-1])

    # nothing may make room for it: the VAE is there now
    device = geometry_device(world.size, make_room=False)
    with beside(device, lambda: (invented(world, plan.target, device), _known_depth(world, plan, ids, device))) as looked_up:
        remembered = streaming_vae.advance(vae, latents, stream, collect)
    outside, known = looked_up.result()
    if not torch.isfinite(remembered).all():
        raise ValueError("the VAE made NaN or infinite numbers of these latents; load it in float32 or bfloat16")
    chunk = new_chunk(plan, torch.cat(frames), outside, prompt, settings, kept[ids[-1]], Latents(latents, remembered))
    pictures = torch.stack([kept[frame] for frame in ids])
    with ThreadPoolExecutor(2) as hashing:  # whoever goes on from the chunk or saves it asks for these
        hashing.submit(lambda: chunk.key)
        hashing.submit(lambda: chunk.sums)
        alone = streaming_vae.encode_alone(vae, pictures)
        depths, report = _depths(known, plan, ids, pictures, estimator, alignment)
    on_step(steps, steps)
    grown = remembering(world, plan, chunk, dict(zip(ids, depths, strict=True)), dict(zip(ids, alone, strict=True)))
    grown.stream.append(stream)
    return grown, report


OVERLAPS = (0, 1, 5, 9, 13)  # known frames that a video model may have been given, and gives back, before the new ones


def append_frames(
    world: World,
    plan: ChunkPlan,
    frames: Tensor,
    estimator: DepthEstimator,
    alignment: str = "memory",
    prompt: str = "",
    settings: Mapping | None = None,
    anchor: bool = True,
    on_step: Progress = quiet,
) -> tuple[World, str]:
    """The world with painted frames (F, H, W, 3) in 0..1 as its next chunk, and a report.

    Known frames in front of the F planned ones are dropped. anchor: colours are brought back to what the memory shows.
    ValueError for another number or size of frames, and for NaN.
    """
    _check_plan(world, plan)
    extra = len(frames) - len(plan.target)
    if extra not in OVERLAPS:
        raise ValueError(
            f"the plan asks for {len(plan.target)} frames, found {len(frames)}; up to {OVERLAPS[-1]} known ones may come "
            f"before them ({', '.join(map(str, OVERLAPS))})"
        )
    if tuple(frames.shape[1:]) != (*world.size, 3):
        raise ValueError(
            f"the frames are {frames.shape[2]}x{frames.shape[1]} with {frames.shape[3]} channels, the world is "
            f"{world.size[1]}x{world.size[0]} with 3; resize them"
        )
    frames, kept, reports = frames[extra:].detach().float().cpu(), dict(settings or {}), []
    if not torch.isfinite(frames).all():
        raise ValueError("the frames have NaN or infinite pixels; the node that made them failed")
    if extra:
        reports.append(f"{extra} known frame{'s' * (extra > 1)} in front dropped")
    on_step(0, 2)
    if anchor:
        frames, tint, report = control.anchored(world, plan, frames, geometry_device(world.size))
        kept["tint"] = {"gain": list(tint.gain), "offset": list(tint.offset)}
        reports.append(report)
    on_step(1, 2, to_uint8(frames[-1]))
    frames, ids = frames.clamp(0, 1), keyframe_ids(plan)
    pictures = torch.stack([frames[frame - plan.first_frame] for frame in ids]) * 2 - 1
    depths, report = _depths(_known_depth(world, plan, ids, geometry_device(world.size)), plan, ids, pictures, estimator, alignment)
    made_up, newest = invented(world, plan.target, geometry_device(world.size)), frames[-1].clone() * 2 - 1
    on_step(2, 2)
    depths = dict(zip(ids, depths, strict=True))
    grown = append(world, plan, to_uint8(frames), made_up, depths, prompt, kept, newest)
    return grown, "; ".join([*reports, report])


@contextmanager
def beside(device: torch.device, work: Callable[[], object]) -> Iterator[Future]:
    """What `work()` gives, on a GPU computed beside what is done meanwhile: it waits for the GPU, and networks keep that busy."""
    if device.type == "cpu":
        done = Future()
        done.set_result(work())
        yield done
        return
    stream, mode = _second_stream(device), torch.is_inference_mode_enabled()
    stream.wait_stream(torch.cuda.current_stream(device))

    def run():
        with torch.inference_mode(mode), torch.no_grad(), torch.cuda.stream(stream):  # a thread's own
            return work()

    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(run)


@cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    """One for good, because torch keeps memory for every stream."""
    return torch.cuda.Stream(device)


def _known_depth(world: World, plan: ChunkPlan, ids: list[int], device: torch.device) -> Tensor:
    """(K, H, W) what the memory knows of a chunk's keyframes, on the CPU."""
    helpful = {*plan.retrieved, len(world) - 1}  # in the memory's order: the oldest first, as they were resampled least
    there = plan.target[[frame - plan.first_frame for frame in ids]].to(device)
    return known_depth([k for k in world.memory.keyframes if k.frame in helpful], there).cpu()


def _depths(known: Tensor, plan, ids, pictures, estimator, alignment) -> tuple[Tensor, str]:
    """Depth of a chunk's keyframes, and how it got its scale. Never the end of a long walk for want of a scale."""
    cameras = plan.target[[frame - plan.first_frame for frame in ids]]
    frames = (pictures * 0.5 + 0.5).clamp(0, 1)
    try:
        return in_scene_units(estimator(frames, cameras, known), cameras, known, alignment)
    except NoScaleError as reason:
        if not known.any():
            raise
        instead = MemoryEstimator()(frames, cameras, known).depth
        report = f"{reason}. The memory's own depth was used for this chunk instead"
        log.warning(report)
        return instead, report


def invented(world: World, target: Cameras, device: torch.device = PROCESSOR) -> Tensor:
    """(F, H, W) which pixels of new views lie outside what the photo shows; looked up on `device`, on the CPU."""
    seed = world.memory[0]
    surface, target = patches(sharpened(seed.depth.to(device)), seed.camera.to(device)), target.to(device)
    return torch.stack([draw(surface, target[i]) <= 0 for i in range(len(target))]).cpu()


# ------------------------------------------------------------------------------------- where the VAE has got to


def take_stream(world: World, vae: VAE) -> Stream:
    """The stream at this world's end: the one that its maker left, or the same one made again, as for another VAE."""
    if world.stream and (stream := world.stream.pop()).network() is streaming_vae.network_of(vae):
        return stream
    count = STILL + _new_latents(world)
    recent = partial(recent_latents, world, vae, which="sampled")
    return streaming_vae.rebuild(vae, world.exact(0), STILL, count, recent)


def recent_latents(world: World, vae: VAE, start: int, which: str) -> Tensor:
    """(16, n, h, w) latents from `start` on, counted from the first still one; `which` of a chunk's Latents.

    Frames of a chunk that was made without a VAE are encoded.
    """
    parts, begin = [], STILL
    if start < STILL:
        parts.append(still_latents(world, vae)[:, start:])
    for index, chunk in enumerate(world.chunks):
        end = begin + len(chunk) // LATENT_FRAMES
        if end > start:
            made = getattr(chunk.latents, which) if chunk.latents is not None else _encoded(world, vae, index)
            parts.append(made[:, max(0, start - begin) :])
        begin = end
    return torch.cat(parts, 1)


def still_latents(world: World, vae: VAE) -> Tensor:
    """(16, STILL, h, w) the photo, repeated, before anything moved. Leaves the stream for the first chunk to go on from."""
    history, stream = streaming_vae.prime(vae, world.exact(0), STILL)
    if not world.chunks:
        world.stream[:] = [stream]
    return history


def _encoded(world: World, vae: VAE, index: int) -> Tensor:
    """(16, T, h, w) of a chunk that has only frames, with as many frames before it as the encoder remembers."""
    length = len(world.chunks[index])
    if length % (PAIR * FRAMES):
        raise ValueError(
            f"chunk {index} has {length} frames; the transformer can go on from chunks of a multiple of {PAIR * FRAMES}"
        )
    first = 1 + sum(len(chunk) for chunk in world.chunks[:index])
    groups = -(-streaming_vae.encoder_reach(streaming_vae.network_of(vae)) // (PAIR * FRAMES))
    start = max(1 - STILL_FRAMES, first - 1 - groups * PAIR * FRAMES)
    frames = torch.stack([world.exact(max(0, frame)) for frame in range(start, first + length)])
    latents = torch.cat(list(streaming_vae.encode(vae, frames, streaming_vae.fresh(vae))), 1)
    return latents[:, -(length // FRAMES) :]


def _new_latents(world: World) -> int:
    return sum(len(chunk) for chunk in world.chunks) // LATENT_FRAMES


def _camera(world: World, frame: int) -> Cameras:
    return world.memory[frame].camera if frame < 0 else world.cameras[frame]


def _latent_size(world: World) -> tuple[int, int]:
    return tuple(side // 8 for side in world.size)
