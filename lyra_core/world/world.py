"""A world: the frames made so far, the cameras they were seen from, and the memory of where their surfaces are.

    begin -> plan -> (any generator) -> append -> plan -> ...

A generator is anything that turns a plan into frames. Worlds are values: every verb returns a new one that shares its
parts with the old, so undo is keeping the old one and a branch is using it twice. Scene units are those of the first
view's depth; metres only if that was metric.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..array_files import bytes_of
from ..cameras.camera import Cameras, about, check, join
from ..conditioning.framepack import LYRA2
from ..memory.retrieval import Keyframe, SpatialMemory, retrieve
from ..memory.warp import lift, splat_views

KEYFRAME_STRIDE = 8  # every 8th frame enters the memory, and the last of each chunk
CHUNK_FRAMES = LYRA2.new_frames  # generators without the transformer may make chunks of any length
SIZE_MULTIPLE = 16  # the VAE's 8 times the transformer's 2
SAME_PLACE, SAME_TURN, SAME_LENS, SAME_PIXELS = 1e-3, 0.1, 5e-3, 1.0  # of the depth, degrees, relative, pixels
LARGEST_SIDE = 2048  # pixels; 128 positions of the transformer's rotary embedding


class Latents(NamedTuple):
    """A chunk as the video VAE sees it, h x w latents of 8x8 pixels, in the scale of the host's VAE."""

    sampled: Tensor  # (16, T, h, w) what was decoded into the frames
    history: Tensor  # (16, T, h, w) the frames encoded again: what the next chunk remembers


@dataclass(frozen=True)
class Chunk:
    """Frames that were generated together; the photo is a chunk of one."""

    frames: Tensor  # (F, H, W, 3) uint8
    invented_bits: Tensor  # (F, H, W / 8) uint8: pixels not seen in the photo, made up; a bit each, as masks are large
    cameras: Cameras  # F
    prompt: str = ""
    settings: Mapping = field(default_factory=dict)  # what made it; plain JSON values
    newest: Tensor | None = None  # (H, W, 3) float32, -1 .. 1: the last frame before it was clamped and rounded
    latents: Latents | None = None  # of the video VAE; None for a chunk that was made without

    def __len__(self) -> int:
        """Number of frames; nothing is read for it."""
        return len(self.cameras)

    def frame(self, index: int) -> Tensor:
        """One of its frames (H, W, 3) uint8."""
        return self.frames[index]

    def bits(self, index: int) -> Tensor:
        """What of that frame was made up (H, W / 8), a bit each."""
        return self.invented_bits[index]

    @property
    def invented(self) -> Tensor:
        """(F, H, W) bool: pixels not seen in the photo, made up."""
        return as_mask(self.invented_bits)

    @cached_property
    def key(self) -> str:
        """A hash of everything in it."""
        digest = hashlib.sha256(json.dumps([self.prompt, self.settings, self.cameras.size], sort_keys=True).encode())
        for tensor in (
            self.frames,
            self.invented_bits,
            self.cameras.w2c,
            self.cameras.K,
            self.newest,
            *(self.latents or ()),
        ):
            digest.update(b"" if tensor is None else bytes_of(tensor))
        return digest.hexdigest()

    @cached_property
    def sums(self) -> dict[str, list[str]]:
        """A hash of each frame, and of each frame's invented bits, by the names that they have in its file."""
        return {"frames": hashes(self.frames), "invented": hashes(self.invented_bits)}


def hashes(tensors: Iterable[Tensor]) -> list[str]:
    """A hash of each one's numbers, by as many threads as there are processors: hashing does not hold up other Python."""
    with ThreadPoolExecutor() as pool:
        return [*pool.map(lambda tensor: hashlib.sha256(bytes_of(tensor)).hexdigest(), tensors)]


@dataclass(frozen=True)
class World:
    """A photo and the chunks grown from it."""

    first: Chunk
    chunks: tuple[Chunk, ...]
    memory: SpatialMemory
    # where a VAE has got to, for the one who continues this world next; not part of what it is, and never saved
    stream: list = field(default_factory=list, compare=False, repr=False)

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """One key per state this world has gone through: after the photo, after the first chunk, ..."""
        # the seed's depths are part of what the world is; later depths follow from the chunks
        digest = hashlib.sha256(self.first.key.encode())
        for keyframe in self.memory.keyframes:
            if keyframe.frame <= 0:
                for part in (keyframe.depth, keyframe.camera.w2c, keyframe.camera.K, keyframe.image):
                    digest.update(b"" if part is None else bytes_of(part))
        keys = [digest.hexdigest()]
        for chunk in self.chunks:
            keys.append(hashlib.sha256((keys[-1] + chunk.key).encode()).hexdigest())
        return tuple(keys)

    @property
    def key(self) -> str:
        return self.keys[-1]

    @property
    def photo(self) -> str:
        """A name of eight letters for the photo at its size, the same wherever it is begun from."""
        return hashlib.sha256(repr(self.size).encode() + self.first.frames.contiguous().numpy().tobytes()).hexdigest()[:8]

    @property
    def size(self) -> tuple[int, int]:
        return self.first.cameras.size

    @property
    def cameras(self) -> Cameras:
        """The cameras of all frames."""
        return join(self.first.cameras, *(c.cameras for c in self.chunks))

    @property
    def last_camera(self) -> Cameras:
        return (self.chunks[-1] if self.chunks else self.first).cameras[-1:]

    def __len__(self) -> int:
        """Number of frames, the photo included."""
        return 1 + sum(len(c) for c in self.chunks)

    def frame(self, index: int) -> Tensor:
        """Frame `index` (H, W, 3) uint8; negative ids are further seed views."""
        return self._locate(index)[0]

    def exact(self, index: int) -> Tensor:
        """Frame `index` (H, W, 3) in -1 .. 1, as it was made if that is known."""
        last = -1
        for chunk in (self.first, *self.chunks):
            last += len(chunk)
            if index == last and (newest := chunk.newest) is not None:
                return newest
        return to_float(self.frame(index)) * 2 - 1

    def invented(self, index: int) -> Tensor:
        """Which pixels (H, W) of frame `index` were made up."""
        return self._locate(index)[1]

    def _locate(self, index: int) -> tuple[Tensor, Tensor]:
        if index < 0:
            image = self.memory[index].image
            return image, torch.zeros(image.shape[:2], dtype=torch.bool)
        for chunk in (self.first, *self.chunks):
            if index < len(chunk):
                return chunk.frame(index), as_mask(chunk.bits(index))
            index -= len(chunk)
        raise IndexError(f"this world has {len(self)} frames")


@dataclass(frozen=True)
class ChunkPlan:
    """What the next chunk shall show and which past frames help."""

    world_key: str  # the state of the world it was made for
    first_frame: int  # id of the first new frame
    target: Cameras  # cameras of the new frames
    retrieved: tuple[int, ...]  # frame ids, the best one last


def begin(
    image: Tensor, depth: Tensor, camera: Cameras, views: list[tuple[Tensor, Tensor, Cameras]] = (), prompt: str = ""
) -> World:
    """A world of one photo.

    image (H, W, 3) in 0..1, depth (H, W) along z with 0 = unknown, camera of length 1; `views`: further posed photos with
    their depth, which only enter the memory. ValueError for sizes that are no multiples of 16 or do not agree.
    """
    for number, (picture, its_depth, its_camera) in enumerate([(image, depth, camera), *views]):
        _check_view(picture, its_depth, its_camera, camera.size, f"view {number}" if views else "the photo")
    frame = to_uint8(image[None])
    seen, newest = torch.zeros(frame.shape[:3], dtype=torch.bool), image.detach().float().cpu() * 2 - 1
    first = Chunk(frame, as_bits(seen), camera.to("cpu"), prompt, {"generator": "photo"}, newest)
    memory = SpatialMemory(
        (
            Keyframe(0, depth.cpu(), first.cameras),
            *(Keyframe(-n, d.cpu(), c.to("cpu"), to_uint8(i)) for n, (i, d, c) in enumerate(views, 1)),
        )
    )
    return World(first, (), memory)


def _check_view(image: Tensor, depth: Tensor, camera: Cameras, size: tuple[int, int], name: str) -> None:
    if len(camera) != 1:
        raise ValueError(f"{name}: expected the one camera it was taken from, found {len(camera)} cameras")
    if image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"{name}: expected a colour picture (height, width, 3), found {tuple(image.shape)}")
    height, width = image.shape[:2]
    if height % SIZE_MULTIPLE or width % SIZE_MULTIPLE or not min(height, width):
        better = [max(SIZE_MULTIPLE, round(s / SIZE_MULTIPLE) * SIZE_MULTIPLE) for s in (height, width)]
        raise ValueError(
            f"{name} is {width}x{height}; both sides must be multiples of {SIZE_MULTIPLE}: "
            f"put an Upscale Image node before it, to {better[1]}x{better[0]} for instance (480x832 is usual)"
        )
    if max(height, width) > LARGEST_SIDE:
        raise ValueError(
            f"{name} is {width}x{height}; Lyra 2 reaches {LARGEST_SIDE} pixels a side: put an Upscale Image node before it, "
            "480x832 is usual"
        )
    for what, found in (("depth", tuple(depth.shape)), ("camera", camera.size), ("first view", size)):
        if found != (height, width):
            raise ValueError(f"{name} is {width}x{height} but its {what} is {found[1]}x{found[0]}; resize one of them")
    check(camera, name)
    if not torch.isfinite(image).all():
        raise ValueError(f"{name} has NaN or infinite pixels; the node that made it failed")
    if not (torch.isfinite(depth).all() and (depth >= 0).all() and (depth > 0).any()):
        raise ValueError(
            f"{name}: its depth has NaN, infinite or negative numbers, or nothing known; make it with Lyra2Depth"
        )


def to_uint8(image: Tensor) -> Tensor:
    """0..1 floats as the bytes that are stored, rounded; on the CPU."""
    return (image.detach().float().clamp(0, 1) * 255 + 0.5).to(torch.uint8).cpu()


def as_bits(mask: Tensor) -> Tensor:
    """A mask (..., W) as bytes (..., W / 8); W is a multiple of 8."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy(), axis=-1))


def as_mask(bits: Tensor) -> Tensor:
    """Bytes (..., W / 8) as the mask (..., W) that they stand for."""
    flat = np.unpackbits(bits.contiguous().numpy().reshape(-1))  # along an axis numpy would take ten times as long
    return torch.from_numpy(flat).view(torch.bool).view(*bits.shape[:-1], -1)


def to_float(frames: Tensor) -> Tensor:
    """Stored bytes as 0..1 floats."""
    return frames.float() / 255


def frame_ids(world: World, first: int = 0, count: int = 0, backwards: bool = False) -> range:
    """`count` frames from `first` on (0: all that follow), in the order asked for; ValueError if there is none."""
    ids = range(len(world))[first : first + count if count else None]
    if not ids:
        raise ValueError(f"this world has {len(world)} frames; there is none from {first} on")
    return ids[::-1] if backwards else ids


def plan(world: World, target: Cameras, count: int = 5, views: int = 1, device: torch.device | None = None) -> ChunkPlan:
    """The next chunk, for the cameras `target` of its new frames.

    `count` past frames at most are retrieved for the last target camera, or for `views` cameras spread over the chunk (the
    reference's option, which also finds what is only seen on the way), computed on `device` (None: the CPU, where worlds are).
    """
    target = about(check(target.to("cpu"), "the target cameras"), world.first.cameras.origin)
    if target.size != world.size:
        raise ValueError(
            f"the target cameras are for {target.size[1]}x{target.size[0]} but the world is "
            f"{world.size[1]}x{world.size[0]}; resize the trajectory"
        )
    asked = [int(i) for i in torch.linspace(0, len(target) - 1, views + 1).long()[1:]]
    retrieved = retrieve(world.memory, target[asked].to(device or "cpu"), count)
    return ChunkPlan(world.key, len(world), target, tuple(retrieved))


def warped_views(
    world: World, target: Cameras, on_view: Callable[[int, int, Tensor], None] | None = None
) -> tuple[Tensor, Tensor]:
    """The newest frame seen by F other cameras: pictures (F, H, W, 3) in 0 .. 1, black holes, and what is seen (F, H, W).

    All on the target's device. `on_view(done, total, (H, W, 3) uint8)`.
    """
    keyframe, device = world.memory[len(world) - 1], target.w2c.device
    points = lift(keyframe.depth.to(device), keyframe.camera.to(device), world.exact(keyframe.frame).to(device))
    pictures = torch.empty(len(target), *world.size, 3, device=device)
    seen = torch.empty(pictures.shape[:3], dtype=torch.bool, device=device)
    for index, warp in enumerate(splat_views(points, target)):
        seen[index] = warp.seen[0]
        pictures[index] = torch.where(warp.seen[0, ..., None], warp.features[0].clamp(-1, 1) * 0.5 + 0.5, 0.0)
        if on_view is not None:
            on_view(index + 1, len(target), to_uint8(pictures[index]))
    return pictures, seen


@dataclass(frozen=True)
class Gap:
    """How far the first camera of a path is from the last one of a world."""

    distance: float  # scene units between their centres
    degrees: float  # by which it is turned
    zoom: float  # its focal length as a multiple of the other's, of x or y, whichever is further off
    aside: float  # pixels between their principal points
    depth: float  # of what the world saw first, its middle, to compare the distance with

    @property
    def differences(self) -> tuple[str, ...]:
        """What the eye would see; nothing if the path goes on where the world stands."""
        found = {
            f"{self.distance:.3g} scene units away": self.distance > SAME_PLACE * self.depth,
            f"turned by {self.degrees:.3g} degrees": self.degrees > SAME_TURN,
            f"with a focal length {self.zoom:.4g} times as long": abs(self.zoom - 1) > SAME_LENS,
            f"with its principal point {self.aside:.3g} pixels aside": self.aside > SAME_PIXELS,
        }
        return tuple(text for text, seen in found.items() if seen)

    def __str__(self) -> str:
        if not self.differences:
            return "The path goes on where the world stands: same place, turn and lens."
        return (
            f"The path does not begin where the world stands but {', '.join(self.differences)}: the first new frame jumps. "
            "Make the path from the world's own cameras (start), or join it to them with Lyra2EditTrajectory."
        )


def continuation(world: World, trajectory: Cameras) -> tuple[Cameras, Gap]:
    """The new cameras of a trajectory whose first camera is where the world stands, and how far off that one is."""
    here, trajectory = world.last_camera, about(trajectory.to("cpu"), world.last_camera.origin)
    there = trajectory[:1].resized(here.size)
    apart = (there.w2c[0, :3, :3].double() - here.w2c[0, :3, :3].double()).norm() / 8**0.5
    zoom = max((there.K / here.K)[0].diagonal()[:2].tolist(), key=lambda ratio: abs(np.log(ratio)))
    depth = world.memory.keyframes[0].depth
    gap = Gap(
        float((there.centers[0] - here.centers[0]).norm()),
        float(2 * torch.asin(apart.clamp(max=1)).rad2deg()),
        zoom,
        float((there.K - here.K)[0, :2, 2].norm()),
        float(depth[depth > 0].median()),
    )
    return trajectory[1:], gap


def fingerprint(cameras: Cameras) -> str:
    """Changes with any camera."""
    return hashlib.sha256(cameras.w2c.cpu().numpy().tobytes() + cameras.K.cpu().numpy().tobytes()).hexdigest()[:16]


def in_chunks(target: Cameras, chunk_frames: int = CHUNK_FRAMES) -> list[Cameras]:
    """Cameras of new frames cut into whole chunks; ValueError if they do not fill them."""
    if not len(target) or len(target) % chunk_frames:
        whole = max(1, round(len(target) / chunk_frames)) * chunk_frames
        raise ValueError(
            f"a trajectory of {len(target) + 1} cameras (the first is where the world stands) does not fill whole "
            f"chunks of {chunk_frames} frames; pad or retime it to {whole + 1} with Lyra2EditTrajectory, or "
            "change the chunk length"
        )
    return [target[start : start + chunk_frames] for start in range(0, len(target), chunk_frames)]


def append(
    world: World,
    plan: ChunkPlan,
    frames: Tensor,
    invented: Tensor,
    depths: Mapping[int, Tensor],
    prompt: str = "",
    settings: Mapping | None = None,
    newest: Tensor | None = None,
    latents: Latents | None = None,
    keyframe_latents: Mapping[int, Tensor] | None = None,
) -> World:
    """The world with one more chunk.

    frames (F, H, W, 3) uint8, invented (F, H, W) bool, depths {frame id: (H, W)} for its keyframes (see `keyframe_ids`);
    the last frame before rounding (H, W, 3); of a VAE the chunk's latents, and each keyframe's (16, h, w), encoded alone.
    Tensors may be on any device; the world is on the CPU.
    ValueError if the plan was made for another state of the world or a depth is missing or unusable.
    """
    return remembering(world, plan, new_chunk(plan, frames, invented, prompt, settings, newest, latents), depths, keyframe_latents)


def new_chunk(
    plan: ChunkPlan,
    frames: Tensor,
    invented: Tensor,
    prompt: str = "",
    settings: Mapping | None = None,
    newest: Tensor | None = None,
    latents: Latents | None = None,
) -> Chunk:
    """The frames of a plan as a chunk, on the CPU; see `append`."""
    expected = (len(plan.target), *plan.target.size, 3)
    if frames.shape != expected or frames.dtype != torch.uint8:
        raise ValueError(f"the plan asks for uint8 frames {expected}, found {frames.dtype} {tuple(frames.shape)}")
    if invented.shape != expected[:3] or invented.dtype != torch.bool:
        raise ValueError(
            f"which pixels are invented: expected bool {expected[:3]}, found {invented.dtype} {tuple(invented.shape)}"
        )
    # in memory as a folder gives them back: matrix products round by layout, and a walk that goes on from a folder shall
    # end in the same bits as one that never stopped
    target = replace(plan.target, w2c=plan.target.w2c.cpu().contiguous(), K=plan.target.K.cpu().contiguous())
    newest = None if newest is None else newest.contiguous()
    return Chunk(frames.cpu(), as_bits(invented.cpu()), target, prompt, dict(settings or {}), newest, latents)


def remembering(
    world: World, plan: ChunkPlan, chunk: Chunk, depths: Mapping[int, Tensor], keyframe_latents: Mapping[int, Tensor] | None = None
) -> World:
    """The world with a chunk that was made for it, whose keyframes enter the memory; see `append`."""
    if plan.world_key != world.key:
        raise ValueError("this plan was made for another world, or for this one before it grew; plan again")
    keyframes = []
    for frame in keyframe_ids(plan):
        depth = depths.get(frame)
        if depth is None or tuple(depth.shape) != world.size or not (torch.isfinite(depth) & (depth >= 0)).all():
            raise ValueError(
                f"frame {frame} needs a finite depth of {world.size[1]}x{world.size[0]}, found "
                f"{'none' if depth is None else tuple(depth.shape)}"
            )
        latent = (keyframe_latents or {}).get(frame)
        keyframes.append(Keyframe(frame, depth.cpu().contiguous(), chunk.cameras[frame - plan.first_frame], latent=latent))
    return World(world.first, (*world.chunks, chunk), world.memory.remember(*keyframes))


def keyframe_ids(plan: ChunkPlan) -> list[int]:
    """Which new frames of the chunk enter the memory: every 8th and the last."""
    ids = range(plan.first_frame, plan.first_frame + len(plan.target))
    return [i for i in ids if i % KEYFRAME_STRIDE == 0 or i == ids[-1]]


def rewind(world: World, chunks: int) -> World:
    """The world as it was after its first `chunks` chunks; ValueError if it never had that many."""
    if not 0 <= chunks <= len(world.chunks):
        raise ValueError(f"this world has {len(world.chunks)} chunks; it can't be rewound to {chunks}")
    kept = world.chunks[:chunks]
    frames = 1 + sum(len(c) for c in kept)
    return World(world.first, kept, SpatialMemory(tuple(k for k in world.memory.keyframes if k.frame < frames)))
