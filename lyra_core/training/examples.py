"""A window of a sample as the network sees it, with what training does to it on the way."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..cameras.camera import join
from ..conditioning.correspondence import LATENT_PIXELS, guides
from ..conditioning.framepack import LATENT_FRAMES, spatial_frames, temporal_latents
from ..conditioning.history import SLOT_CHANNELS
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
    sample, layout = prepared(sample, encoders.codec, recipe), recipe.layout
    first = recipe.still + layout.new_latents * window.segment
    stream = sample.latents.stream
    history = stream[:, :first] if history is None else history
    retrieved = [0] if photo_only else retrieved_frames(sample, window, recipe, generator)
    frames, latents = history_slots(sample, history, retrieved, encoders.codec, recipe, generator)
    target = sample.cameras_of(window)
    keyframes = [sample.keyframe(frame) for frame in retrieved]
    cameras = join(*(sample.cameras[frame : frame + 1] for frame in frames))
    made = guides(layout, keyframes if recipe.correspondences else [], cameras, target)
    warped, seen = warped_views(sample, window, recipe)
    if _happens(recipe.warp_drop, generator):
        warped, seen = torch.full_like(warped, -1.0), torch.zeros_like(seen)
    caption = "" if _happens(recipe.text_drop, generator) else sample.caption(window.first)
    condition = Condition(
        latents,
        encoders.codec.encode(torch.cat([warped[:1], warped]))[:, 1:],
        made.rays,
        made.correspondences,
        encoders.tell(caption),
        encoders.look(sample.picture(window.newest)),
    )
    return Example(
        stream[:, first : first + layout.new_latents], condition, remembered_share(made.correspondences, seen, recipe)
    )


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


def history_slots(
    sample: Sample, history: Tensor, retrieved: list[int], codec: Codec, recipe: Recipe, generator: torch.Generator
) -> tuple[list[int], Tensor]:
    """The frame that each history slot stands for, and the latents (16, slots, h, w)."""
    layout, count = recipe.layout, history.shape[1]
    chosen = temporal_latents(layout, count)
    if recipe.history == "newest":
        chosen = [count - 1] * len(chosen)
    # the photo fills the first slot as a picture, as on a walk; it is what the stream begins with
    temporal = [(max(0, LATENT_FRAMES * (latent - recipe.still + 1)), history[:, latent]) for latent in chosen]
    ids = spatial_frames(layout, retrieved)
    alone = corrupted(torch.stack([_alone(sample, frame, codec) for frame in ids], 1), recipe, generator) if ids else None
    spatial = [(frame, alone[:, place]) for place, frame in enumerate(ids)]
    sources = {"temporal": iter(temporal), "spatial": iter(spatial)}
    slots = [next(sources[s.source]) for s in layout.segments for _ in range(s.slots)]
    return [frame for frame, _ in slots], torch.stack([latent for _, latent in slots], 1)


def _alone(sample: Sample, frame: int, codec: Codec) -> Tensor:
    known = sample.latents.alone.get(frame)
    return codec.encode(sample.picture(frame)[None])[:, 0] if known is None or frame in sample.spoilt else known


def corrupted(latents: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Latents (16, S, h, w) with noise of a strength of its own on each slot, which the network is not told."""
    if recipe.corruption is None:
        return latents
    mean, spread = recipe.corruption
    sigmas = torch.exp(mean + spread * torch.randn(latents.shape[1], generator=generator))
    return latents + sigmas.view(1, -1, 1, 1) * torch.randn(latents.shape, generator=generator)


# -------------------------------------------------------------------------------------------------------- what is warped


def warped_views(sample: Sample, window: Window, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """What is known seen by the window's cameras: pictures (F, H, W, 3) in -1 .. 1, -1 in holes, and what is seen (F, H, W).

    That is the newest frame, or a cloud of all.
    """
    keyframes = [sample.keyframe(window.newest)]
    if recipe.memory == "cloud":
        keyframes += [k for k in candidate_keyframes(sample, window, recipe) if k.frame != window.newest]
    points = merge(*(lift(k.depth, k.camera, sample.picture(k.frame)) for k in keyframes))
    target = sample.cameras_of(window)
    pictures, seen = torch.empty(window.count, *sample.size, 3), torch.empty(window.count, *sample.size, dtype=torch.bool)
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
