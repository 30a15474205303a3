"""A seeded world of boxes: rooms and streets with soft textures, exact depth and cameras, walks that come back.

Everything follows from a seed. Many scenes are traced at once, on the CPU or a GPU: the batch is one tensor of rays.
Scene units are metres, as far as boxes have any; axes are OpenCV's (x right, y down, z forward).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lyra_core.cameras.camera import Cameras, pinhole, pixel_grid

COLOURS = {
    "white": (0.85, 0.84, 0.8),
    "grey": (0.5, 0.5, 0.52),
    "red": (0.75, 0.25, 0.22),
    "orange": (0.85, 0.52, 0.2),
    "yellow": (0.85, 0.78, 0.3),
    "green": (0.3, 0.62, 0.32),
    "blue": (0.25, 0.4, 0.75),
    "violet": (0.52, 0.32, 0.66),
    "brown": (0.48, 0.34, 0.22),
}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
# all that a caption can say
VOCABULARY = ("a", "room", "street", "with", "boxes", "houses", "and", "floor", "walls", "road", *COLOURS, *NUMBERS)
SKY = (0.62, 0.75, 0.92)
THINGS = 12  # boxes in a scene at most
WAVES = 4  # of each surface's texture
FACES = 6  # of the box that a scene lies in, each a surface of its own
CLEARANCE = 0.45  # scene units that a walk keeps between the camera and every surface
EYES = (1.3, 1.7)  # the camera's height over the ground
FOCAL = 0.7  # focal length over the picture's width: 71 degrees across
LIGHT = (0.82, 1.0, 0.68)  # how bright faces across x, y, z are
RAYS = 1 << 17  # traced at a time; more would only leave the cache
RAYS_ON_GPU = 1 << 22


@dataclass(frozen=True)
class Scene:
    """Boxes that stand in a box, and how each surface is painted."""

    walls: Tensor  # (2, 3) lowest and highest corner of what is seen from inside, scene units
    things: Tensor  # (THINGS, 2, 3) the same of each box; boxes of no size fill up the number
    base: Tensor  # (FACES + THINGS, 3) colours, 0 .. 1
    waves: Tensor  # (FACES + THINGS, WAVES, 3) radians per scene unit
    phases: Tensor  # (FACES + THINGS, WAVES)
    tints: Tensor  # (FACES + THINGS, WAVES, 3) what each wave adds to the colour
    caption: str


def scene(seed: int) -> Scene:
    """A room or a street; every second one is a street."""
    generator = torch.Generator().manual_seed(seed)
    return (_street if seed % 2 else _room)(generator)


def _uniform(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=generator)


def _pick(generator: torch.Generator, names: Sequence[str]) -> str:
    return names[int(torch.randint(len(names), (), generator=generator))]


def _room(generator: torch.Generator) -> Scene:
    half, height = _uniform(generator, 3.0, 5.0, 2), float(_uniform(generator, 2.6, 3.4, 1))
    walls = torch.tensor([[-half[0], -height, -half[1]], [half[0], 0.0, half[1]]])
    count = int(torch.randint(5, THINGS + 1, (), generator=generator))
    sizes = _uniform(generator, 0.25, 0.8, count, 3) * torch.tensor([1.0, 2.0, 1.0])
    places = _uniform(generator, -1, 1, count, 2) * (half - 0.8)
    things = _standing(places, sizes)
    floor, wall, thing = (_pick(generator, list(COLOURS)) for _ in range(3))
    caption = f"a room with {wall} walls and a {floor} floor and {NUMBERS[count]} {thing} boxes"
    faces = [wall, wall, "white", floor, wall, wall]
    return _painted(generator, walls, things, [COLOURS[name] for name in faces], thing, caption)


def _street(generator: torch.Generator) -> Scene:
    walls = torch.tensor([[-14.0, -14.0, -9.0], [14.0, 0.0, 26.0]])
    count = int(torch.randint(6, THINGS - 1, (), generator=generator))
    side = torch.where(torch.arange(count) % 2 == 0, -1.0, 1.0)
    sizes = _uniform(generator, 1.2, 2.2, count, 3) * torch.tensor([1.0, 2.0, 1.0])
    along = -6 + 28 * (torch.arange(count) // 2 + _uniform(generator, 0.0, 0.6, count)) / ((count + 1) // 2)
    houses = _standing(torch.stack([side * _uniform(generator, 4.0, 5.5, count), along], 1), sizes)
    parked = 2
    carts = _standing(
        torch.stack([_uniform(generator, -1.6, 1.6, parked), _uniform(generator, 3.0, 14.0, parked)], 1),
        _uniform(generator, 0.3, 0.6, parked, 3),
    )
    road, thing = (_pick(generator, list(COLOURS)) for _ in range(2))
    caption = f"a street with {NUMBERS[count]} {thing} houses and a {road} road"
    faces = [SKY, SKY, SKY, COLOURS[road], SKY, SKY]
    return _painted(generator, walls, torch.cat([houses, carts]), faces, thing, caption)


def _standing(places: Tensor, halves: Tensor) -> Tensor:
    """Boxes (N, 2, 3) on the ground, y = 0, at places (N, 2) along x and z; half their sizes (N, 3)."""
    top, zero = -2 * halves[:, 1], torch.zeros(len(halves))
    low = torch.stack([places[:, 0] - halves[:, 0], top, places[:, 1] - halves[:, 2]], 1)
    high = torch.stack([places[:, 0] + halves[:, 0], zero, places[:, 1] + halves[:, 2]], 1)
    return torch.stack([low, high], 1)


def _painted(generator, walls: Tensor, things: Tensor, faces: list, thing: str, caption: str) -> Scene:
    """Half of the boxes have the colour that the caption names, the others any; every surface gets waves of its own."""
    colours = [thing if i % 2 == 0 else _pick(generator, list(COLOURS)) for i in range(len(things))]
    base = torch.tensor([*faces, *(COLOURS[name] for name in colours)])
    base = base + _uniform(generator, -0.06, 0.06, *base.shape)
    empty = THINGS - len(things)
    base, things = F.pad(base, (0, 0, 0, empty)), torch.cat([things, torch.zeros(empty, 2, 3)])
    surfaces = FACES + THINGS
    directions = F.normalize(torch.randn(surfaces, WAVES, 3, generator=generator), dim=-1)
    lengths = torch.logspace(math.log10(4.0), math.log10(0.9), WAVES)  # scene units a wave
    waves = directions * (2 * math.pi / lengths)[:, None]
    tints = _uniform(generator, -0.09, 0.09, surfaces, WAVES, 3)
    if faces[0] == SKY:
        tints[[0, 1, 2, 4, 5]] = 0.0
        waves[3] *= 0.5  # a road goes far, where finer waves would only flicker
    return Scene(walls, things, base, waves, _uniform(generator, 0, 2 * math.pi, surfaces, WAVES), tints, caption)


# ------------------------------------------------------------------------------------------------------------ walks


def walk(scene: Scene, seed: int, frames: int, size: tuple[int, int], comes_back: bool) -> Cameras:
    """A walk of so many frames through a scene; one that comes back ends with the way that it went, seen a little otherwise.

    It goes from place to place, of which none is nearer than CLEARANCE to anything, nor is any way between them.
    """
    generator = torch.Generator().manual_seed(seed)
    legs = max(2, round(frames / 60))
    legs += comes_back and legs % 2
    keys = [_place(scene, generator)]
    going = legs // 2 if comes_back else legs
    while len(keys) <= going:
        keys.append(_next_place(scene, generator, keys[-1]))
    if comes_back:
        for key in reversed(keys[:going]):
            aside = torch.cat([_uniform(generator, -0.12, 0.12, 3), _uniform(generator, -0.06, 0.06, 2)])
            keys.append(key + aside)
    return _standing_at(_eased(torch.stack(keys), frames), size)


def clearance(scene: Scene, points: Tensor) -> Tensor:
    """(N,) how far points (N, 3) are from the nearest surface; negative inside a box or outside of the walls."""
    inside = torch.minimum(points - scene.walls[0], scene.walls[1] - points).amin(-1)
    real = scene.things[(scene.things[:, 1] > scene.things[:, 0]).all(-1)]
    apart = torch.maximum(real[None, :, 0] - points[:, None], points[:, None] - real[None, :, 1])
    outside = apart.clamp_min(0).norm(dim=-1) + apart.amax(-1).clamp_max(0)
    return torch.minimum(inside, outside.amin(1))


def _place(scene: Scene, generator: torch.Generator) -> Tensor:
    """(5,) a free place to begin at, x, y, z, and where it looks: degrees to the right and down."""
    street = float(scene.walls[1, 2]) > 20
    while True:
        spot = torch.rand(2, generator=generator) * 2 - 1
        spot = spot * torch.tensor([2.0, 4.0]) if street else spot * (scene.walls[1, [0, 2]] - 0.7)
        place = torch.tensor([spot[0], -float(_uniform(generator, *EYES, 1)), spot[1]])
        if clearance(scene, place[None]) > CLEARANCE:
            break
    ahead = 0.0 if street else math.degrees(math.atan2(-float(place[0]), -float(place[2])))
    turn = ahead + float(_uniform(generator, -30, 30, 1))
    return torch.cat([place, torch.tensor([turn, float(_uniform(generator, -4, 10, 1))])])


def _next_place(scene: Scene, generator: torch.Generator, here: Tensor, tries: int = 60) -> Tensor:
    """A place that can be walked to in a straight line; after so many tries, a turn on the spot."""
    for _ in range(tries):
        turn = here[3] + _uniform(generator, -55, 55, 1)
        heading, length = torch.deg2rad(here[3] + _uniform(generator, -70, 70, 1)), _uniform(generator, 0.8, 2.6, 1)
        step = torch.cat([torch.sin(heading) * length, _uniform(generator, -0.1, 0.1, 1), torch.cos(heading) * length])
        there = here[:3] + step
        way = here[:3] + step * torch.linspace(0, 1, 20)[:, None]
        if clearance(scene, way).amin() > CLEARANCE:
            return torch.cat([there, turn, _uniform(generator, -4, 10, 1)])
    return torch.cat([here[:3], here[3:4] + 45, here[4:]])


def _eased(keys: Tensor, frames: int) -> Tensor:
    """(frames, 5) from key to key in equal times, slower near each."""
    at = torch.linspace(0, len(keys) - 1, frames)
    index = at.floor().long().clamp_max(len(keys) - 2)
    share = at - index
    share = (0.35 * share + 0.65 * share**2 * (3 - 2 * share))[:, None]
    return keys[index] * (1 - share) + keys[index + 1] * share


def _standing_at(places: Tensor, size: tuple[int, int]) -> Cameras:
    """Cameras at places (F, 5): x, y, z, degrees to the right, degrees down."""
    yaw, pitch = torch.deg2rad(places[:, 3].double()), torch.deg2rad(places[:, 4].double())
    zero, one = torch.zeros_like(yaw), torch.ones_like(yaw)
    right = torch.stack([yaw.cos(), zero, yaw.sin(), zero, one, zero, -yaw.sin(), zero, yaw.cos()], 1).view(-1, 3, 3)
    down = torch.stack(
        [one, zero, zero, zero, pitch.cos(), pitch.sin(), zero, -pitch.sin(), pitch.cos()], 1
    ).view(-1, 3, 3)
    cameras = pinhole(size, FOCAL * size[1], len(places))
    rotation = (right @ down).mT
    cameras.w2c[:, :3, :3] = rotation.float()
    cameras.w2c[:, :3, 3] = -(rotation @ places[:, :3, None].double()).squeeze(-1).float()
    return cameras


# ---------------------------------------------------------------------------------------------------------- pictures


def render(scenes: Sequence[Scene], cameras: Sequence[Cameras], samples: int = 2, device=None) -> tuple[Tensor, Tensor]:
    """Pictures (B, F, H, W, 3) in 0 .. 1 and depth (B, F, H, W) along z of as many frames of each scene, on `device`.

    Depth is that of a pixel's centre; its colour is the mean of samples x samples rays through it.
    """
    pictures, depths = zip(*(_frames(*pair, samples, device) for pair in _in_parts(scenes, cameras, device)), strict=True)
    frames = len(cameras[0])
    return torch.cat(pictures, 1)[:, :frames], torch.cat(depths, 1)[:, :frames]


def _in_parts(scenes, cameras, device):
    """The same scenes with some of their frames each, few enough to stay in the cache, or to fit a GPU."""
    height, width = cameras[0].size
    step = max(1, (RAYS_ON_GPU if str(device).startswith("cuda") else RAYS) // (height * width * len(scenes)))
    for start in range(0, len(cameras[0]), step):
        yield scenes, [some[start : start + step] for some in cameras]


def _frames(scenes: Sequence[Scene], cameras: Sequence[Cameras], samples: int, device) -> tuple[Tensor, Tensor]:
    shape = (len(scenes), len(cameras[0]), *cameras[0].size)
    walls, things = (torch.stack([getattr(scene, field) for scene in scenes]).to(device) for field in ("walls", "things"))
    things = things[:, : max(1, max(_count(scene) for scene in scenes))]
    paint = torch.stack([_paint(scene) for scene in scenes]).to(device)
    centers = torch.stack([some.centers for some in cameras]).to(device)
    turns = torch.stack([some.c2w[:, :3, :3] for some in cameras]).to(device)
    inverse = torch.stack([some.K_inverse for some in cameras]).to(device)
    pixels = pixel_grid(cameras[0].size, device)
    origins = centers[:, :, None, None].expand(*shape, 3).flatten(1, 3).movedim(-1, 0).contiguous()

    def cast(shift: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        local = (pixels + pixels.new_tensor([*shift, 0.0])) @ inverse.mT[:, :, None]
        rays = (local @ turns.mT[:, :, None]).flatten(1, 3).movedim(-1, 0).contiguous()
        return rays, *_struck(walls, things, origins, rays)

    depth = cast((0.0, 0.0))[1]
    offsets = [(i + 0.5) / samples - 0.5 for i in range(samples)]
    picture = torch.zeros(*shape, 3, device=device)
    for dy in offsets:
        for dx in offsets:
            rays, distance, surface, axis = cast((dx, dy))
            picture += _colours(paint, origins + rays * distance, surface, axis).view(*shape, 3)
    return picture / samples**2, depth.view(shape)


def _count(scene: Scene) -> int:
    return int((scene.things[:, 1] > scene.things[:, 0]).all(-1).sum())


def _struck(walls: Tensor, things: Tensor, origins: Tensor, rays: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How many of their lengths away rays (3, B, P) meet something, which surface, and across which axis; all (B, P)."""
    inverse = 1 / torch.where(rays.abs() < 1e-9, 1e-9, rays)

    def ends(box: Tensor) -> tuple[Tensor, Tensor]:
        """Where the rays cross the two planes of each axis of boxes (B, 2, 3), the nearer ones first; each (3, B, P)."""
        low, high = ((box[:, i].T[..., None] - origins) * inverse for i in (0, 1))
        return torch.minimum(low, high), torch.maximum(low, high)

    (x, y, z) = ends(walls)[1]
    distance = torch.minimum(torch.minimum(x, y), z)
    axis = torch.where(distance == x, 0, torch.where(distance == y, 1, 2))
    surface = 2 * axis + (rays.gather(0, axis[None])[0] > 0)
    for number in range(things.shape[1]):
        (x, y, z), (far_x, far_y, far_z) = ends(things[:, number])
        enters = torch.maximum(torch.maximum(x, y), z)
        hit = (enters < torch.minimum(torch.minimum(far_x, far_y), far_z)) & (enters > 0) & (enters < distance)
        distance = torch.where(hit, enters, distance)
        across = torch.where(enters == x, 0, torch.where(enters == y, 1, 2))
        surface, axis = torch.where(hit, FACES + number, surface), torch.where(hit, across, axis)
    return distance, surface, axis


def _paint(scene: Scene) -> Tensor:
    """(FACES + THINGS, C) all that a surface's colour follows from, in one row: base, phases, waves, tints."""
    return torch.cat([scene.base, scene.phases, scene.waves.flatten(1), scene.tints.flatten(1)], 1)


def _colours(paint: Tensor, points: Tensor, surface: Tensor, axis: Tensor) -> Tensor:
    """Colours (B, P, 3) of points (3, B, P) on surfaces, lit by the axis that they face."""
    first = torch.arange(len(paint), device=paint.device)[:, None] * paint.shape[1]
    row = paint.flatten(0, 1).index_select(0, (surface + first).flatten())
    base, phases, waves, tints = row.split([3, WAVES, 3 * WAVES, 3 * WAVES], 1)
    angles = torch.einsum("pwc,cp->pw", waves.unflatten(1, (WAVES, 3)), points.flatten(1)) + phases
    colours = base + torch.einsum("pw,pwc->pc", torch.sin(angles), tints.unflatten(1, (WAVES, 3)))
    light = paint.new_tensor(LIGHT)[axis.flatten()]
    return (colours * light[:, None]).clamp(0, 1).view(*surface.shape, 3)
