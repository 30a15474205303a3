"""A window of a sample as the network sees it, with what training does to it on the way."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..cameras.camera import join
from ..conditioning.correspondence import LATENT_PIXELS, guides
from ..conditioning.framepack import LATENT_FRAMES, spatial_frames, temporal_latents
from ..conditioning.history import SLOT_CHANNELS, Guides
from ..memory.retrieval import Keyframe, coverage, retrieve
from ..memory.warp import lift, merge, splat_views
from .contracts import Codec, Condition, Encoders, Example
from .recipe import Recipe
from .sample import Sample, Window, candidates, encoded

PLACES = SLOT_CHANNELS * 2 // 4  # of a slot's channels, those of x and y


def prepared(sample: Sample, codec: Codec, recipe: Recipe) -> Sample:
    """The sample with its latents; what every step would make again otherwise."""
    return encoded(sample, codec, recipe.still, recipe.chunk, recipe.stride)


def draw_window(sample: Sample, recipe: Recipe, generator: torch.Generator, room: int = 0) -> Window:
    """A chunk at random, `room` others after it; ValueError if the video is too short."""
    windows = sample.windows(recipe.chunk, recipe.windows)
    if len(windows) <= room:
        needed = 1 + recipe.chunk * (room + 1)
        raise ValueError(f"{sample.name}: {len(sample)} frames are too few, {needed} are needed to spoil a chunk and go on")
    return windows[_below(len(windows) - room, generator)]


def example(
    sample: Sample,
    window: Window,
    encoders: Encoders,
    recipe: Recipe,
    generator: torch.Generator,
    photo_only: bool = False,
    history: Tensor | None = None,
) -> Example:
    """The window as an example.

    `photo_only` remembers nothing but the first frame. `history` (16, T, h, w): the latents before the window, if they are
    not the sample's own.
    """
    sample = prepared(sample, encoders.codec, recipe)
    sight = sighted(_for_geometry(sample, encoders.geometry), window, recipe, generator, photo_only)
    return completed(sample, sight, encoders, recipe, generator, history)


def _for_geometry(sample: Sample, device) -> Sample:
    """The sample whose depths and cameras are there."""
    if device is None:
        return sample
    depths = {frame: depth.to(device) for frame, depth in sample.depths.items()}
    return replace(sample, cameras=sample.cameras.to(device), depths=depths)


@dataclass(frozen=True)
class Sight:
    """What geometry says of a window; no network was asked."""

    window: Window
    retrieved: list[int]  # frames, the best one last
    guides: Guides
    warped: Tensor  # (F, H, W, 3) in -1 .. 1, -1 in holes: what is known, seen by the window's cameras
    remembered: Tensor  # (new latents, h, w)
    caption: str


def sighted(sample: Sample, window: Window, recipe: Recipe, generator: torch.Generator, photo_only: bool = False) -> Sight:
    """The part of an example that needs no latents."""
    layout = recipe.layout
    retrieved = [0] if photo_only else retrieved_frames(sample, window, recipe, generator)
    target = sample.cameras_of(window)
    frames = slot_frames(window, retrieved, recipe)
    keyframes = [sample.keyframe(frame) for frame in retrieved]
    cameras = join(*(sample.cameras[frame : frame + 1] for frame in frames))
    made = guides(layout, keyframes if recipe.correspondences else [], cameras, target)
    warped, seen = warped_views(sample, window, recipe)
    if _happens(recipe.warp_drop, generator):
        warped, seen = torch.full_like(warped, -1.0), torch.zeros_like(seen)
    caption = "" if _happens(recipe.text_drop, generator) else sample.caption(window.first)
    return Sight(window, retrieved, made, warped, remembered_share(made.correspondences, seen, recipe), caption)


def completed(
    sample: Sample,
    sight: Sight,
    encoders: Encoders,
    recipe: Recipe,
    generator: torch.Generator,
    history: Tensor | None = None,
    warped: Tensor | None = None,
) -> Example:
    """The example of a sight, of a sample that is `prepared`. `warped` (16, new latents, h, w): latents of `sight.warped`, if they are known."""
    first = recipe.still + recipe.layout.new_latents * sight.window.segment
    stream = sample.latents.stream
    history = stream[:, :first] if history is None else history
    if warped is None:
        shown = sight.warped.to(sample.frames.device)
        warped = encoders.codec.encode(torch.cat([shown[:1], shown]))[:, 1:]
    condition = Condition(
        history_slots(sample, history, sight.retrieved, encoders.codec, recipe, generator),
        warped,
        sight.guides.rays,
        sight.guides.correspondences,
        encoders.tell(sight.caption),
        encoders.look(sample.picture(sight.window.newest)),
    )
    return Example(stream[:, first : first + recipe.layout.new_latents], condition, sight.remembered)


# ------------------------------------------------------------------------------------------------------- what is remembered


def candidate_keyframes(sample: Sample, window: Window, recipe: Recipe) -> list[Keyframe]:
    """What may be retrieved for a window: of the whole video, the future included, or only of the past as on a walk."""
    ids = candidates(sample, recipe.stride)
    if not recipe.draw:
        return [sample.keyframe(frame) for frame in sorted({*ids, window.newest}) if frame < window.first]
    near = range(window.first - recipe.apart, window.first + window.count + recipe.apart)
    return [sample.keyframe(frame) for frame in ids if frame not in near and frame not in (0, window.newest)]


def retrieved_frames(sample: Sample, window: Window, recipe: Recipe, generator: torch.Generator) -> list[int]:
    """Frame ids, the best one last: drawn by how much of the window's last view they see, or as a walk retrieves them."""
    if recipe.memory == "cloud":
        return []
    keyframes, count = candidate_keyframes(sample, window, recipe), recipe.layout.slots("spatial")
    last = sample.cameras_of(window)[-1:]
    if not recipe.draw:
        return retrieve(keyframes, last, count)
    return _some_dropped(drawn(coverage(keyframes, last), count, recipe.floor, generator), recipe.memory_drop, generator)


def drawn(seen: dict[int, int], count: int, floor: float, generator: torch.Generator) -> list[int]:
    """Up to `count` frames without putting any back, by what each sees; the first one drawn is last."""
    weights = torch.tensor(list(seen.values()), dtype=torch.float64)
    if not len(weights) or not weights.max():
        return []
    weights = weights + floor * weights.max()
    count = min(count, int((weights > 0).sum()))
    return [list(seen)[i] for i in torch.multinomial(weights, count, generator=generator).tolist()][::-1]


def _some_dropped(frames: list[int], share: float, generator: torch.Generator) -> list[int]:
    """In a share of the cases, without some of them: one at least, all at most."""
    if not _happens(share, generator) or not frames:
        return frames
    gone = torch.randperm(len(frames), generator=generator)[: 1 + _below(len(frames), generator)].tolist()
    return [frame for place, frame in enumerate(frames) if place not in gone]


def slot_frames(window: Window, retrieved: list[int], recipe: Recipe) -> list[int]:
    """The frame that each history slot stands for."""
    chosen = _temporal(recipe, recipe.still + recipe.layout.new_latents * window.segment)
    # the photo fills the first slot as a picture, as on a walk; it is what the stream begins with
    temporal = [max(0, LATENT_FRAMES * (latent - recipe.still + 1)) for latent in chosen]
    return _in_slots(recipe, temporal, spatial_frames(recipe.layout, retrieved))


def history_slots(
    sample: Sample, history: Tensor, retrieved: list[int], codec: Codec, recipe: Recipe, generator: torch.Generator
) -> Tensor:
    """The latents (16, slots, h, w) that fill them."""
    ids = spatial_frames(recipe.layout, retrieved)
    temporal = [history[:, latent] for latent in _temporal(recipe, history.shape[1])]
    spatial = []
    if ids:
        spatial = corrupted(torch.stack([_alone(sample, frame, codec) for frame in ids], 1), recipe, generator).unbind(1)
    return torch.stack(_in_slots(recipe, temporal, spatial), 1)


def _temporal(recipe: Recipe, count: int) -> list[int]:
    """Which of so many latents of history fill the temporal slots."""
    chosen = temporal_latents(recipe.layout, count)
    return [count - 1] * len(chosen) if recipe.history == "newest" else chosen


def _in_slots(recipe: Recipe, temporal: Iterable, spatial: Iterable) -> list:
    sources = {"temporal": iter(temporal), "spatial": iter(spatial)}
    return [next(sources[s.source]) for s in recipe.layout.segments for _ in range(s.slots)]


def _alone(sample: Sample, frame: int, codec: Codec) -> Tensor:
    known = sample.latents.alone.get(frame)
    return codec.encode(sample.picture(frame)[None])[:, 0] if known is None or frame in sample.spoilt else known


def corrupted(latents: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Latents (16, S, h, w) with noise of a strength of its own on each slot, which the network is not told."""
    if recipe.corruption is None:
        return latents
    mean, spread = recipe.corruption
    sigmas = torch.exp(mean + spread * torch.randn(latents.shape[1], generator=generator))
    noise = sigmas.view(1, -1, 1, 1) * torch.randn(latents.shape, generator=generator)
    return latents + noise.to(latents)


# -------------------------------------------------------------------------------------------------------- what is warped


def warped_views(sample: Sample, window: Window, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """What is known seen by the window's cameras: pictures (F, H, W, 3) in -1 .. 1, -1 in holes, and what is seen (F, H, W).

    That is the newest frame, or a cloud of all.
    """
    keyframes = [sample.keyframe(window.newest)]
    if recipe.memory == "cloud":
        keyframes += [k for k in candidate_keyframes(sample, window, recipe) if k.frame != window.newest]
    points = merge(*(lift(k.depth, k.camera, sample.picture(k.frame).to(k.depth.device)) for k in keyframes))
    target = sample.cameras_of(window)
    device = points.xyz.device
    pictures = torch.empty(window.count, *sample.size, 3, device=device)
    seen = torch.empty(window.count, *sample.size, dtype=torch.bool, device=device)
    for frame, view in enumerate(splat_views(points, target)):
        seen[frame] = view.seen[0]
        pictures[frame] = torch.where(view.seen[0, ..., None], view.features[0].clamp(-1, 1), -1.0)
    return pictures, seen


def remembered_share(correspondences: Tensor, seen: Tensor, recipe: Recipe) -> Tensor:
    """(T, h, w) the share of each latent's pixels, in its last frame, that retrieved frames show and the warp does not."""
    new = correspondences[:, recipe.layout.slots("spatial") :]
    height, width = new.shape[-2:]
    if not new.numel():
        return torch.zeros(recipe.layout.new_latents, height, width)
    places = new.unflatten(0, (-1, SLOT_CHANNELS))[:, :PLACES].unflatten(1, (2, LATENT_PIXELS**2))
    known = (places != -1).any(1).any(0)  # (64, T, h, w)
    warped = seen[LATENT_FRAMES - 1 :: LATENT_FRAMES].unflatten(2, (width, LATENT_PIXELS)).unflatten(1, (height, LATENT_PIXELS))
    warped = warped.permute(2, 4, 0, 1, 3).flatten(0, 1)
    return (known & ~warped).float().mean(0)


def evaluating(recipe: Recipe) -> Recipe:
    """The same, with nothing left to chance: what a walk shows the network, and nothing dropped or corrupted."""
    return replace(recipe, draw=False, memory_drop=0.0, text_drop=0.0, warp_drop=0.0, corruption=None)


def _happens(share: float, generator: torch.Generator) -> bool:
    """Asked for every time, so that switching one thing off does not change what is drawn for the others."""
    return bool(torch.rand((), generator=generator) < share)


def _below(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))
