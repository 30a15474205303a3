from __future__ import annotations

import math

import pytest
import torch

from lyra_core.cameras.camera import pinhole, unproject
from lyra_core.memory.depth import box, ground, room_box
from lyra_core.memory.planes import NONE, in_front, planes
from lyra_core.world import made_up, preview
from lyra_core.world.world import begin, plan

SIZE, FOCAL = (96, 160), 110.0
CAMERA = pinhole(SIZE, FOCAL)


@pytest.fixture(scope="module")
def room():
    return room_box(SIZE, CAMERA.K[0], (0.5, 0.5), (0.3, 0.3, 0.7, 0.7), 6.0).depth


@pytest.fixture(scope="module")
def middle():
    known = torch.zeros(SIZE, dtype=torch.bool)
    known[16:-16, 24:-24] = True
    return known


def test_the_five_planes_of_a_room_are_found_and_go_on_where_nothing_is_known(room, middle):
    found = planes(room, middle)
    assert len(found.disparity) == 5 and bool((found.label[middle] != NONE).float().mean() > 0.99)
    assert in_front(found).all(), "of two walls of a room the nearer one is seen"
    label = made_up.carried_on(found, room, middle)
    row, column = (~middle).nonzero().unbind(1)
    depth = 1 / found.at(row, column)[label[row, column], torch.arange(len(row))]
    assert float(((depth - room[row, column]).abs() / room[row, column]).max()) < 0.02


def test_outside_of_a_corner_the_farther_plane_is_seen():
    """Two walls of a house that meet in an edge towards the camera."""
    u = torch.arange(SIZE[1], dtype=torch.float32)
    disparity = torch.minimum(0.1 + 0.002 * u, 0.1 + 0.002 * (160 - u)).expand(SIZE)
    found = planes(1 / disparity, torch.ones(SIZE, dtype=torch.bool))
    assert len(found.disparity) == 2 and not in_front(found)[0, 1]


def test_what_ends_before_a_wall_does_not_go_on_and_the_wall_does(middle):
    depth = pillar()
    found = planes(depth, middle)
    assert len(found.disparity) == 2 and not in_front(found)[0, 1]
    known = middle & (torch.arange(SIZE[1]) < 80)
    label = made_up.carried_on(found, depth, known)
    assert bool((label[20:70, 115:] == found.label[30, 30]).all())


def test_what_lies_on_no_plane_has_no_label():
    depth = 3 + torch.rand(SIZE, generator=torch.Generator().manual_seed(0)) * 3
    found = planes(depth, torch.ones(SIZE, dtype=torch.bool))
    assert float((found.label != NONE).float().mean()) < 0.5
    assert planes(depth, torch.zeros(SIZE, dtype=torch.bool)).disparity.shape == (0, 3)


def tiles(depth: torch.Tensor) -> torch.Tensor:
    """A floor of square tiles, half a unit a side, under a grey wall, (H, W, 3)."""
    x, y, z = unproject(depth[None], CAMERA)[0].unbind(-1)
    dark = (torch.floor(2 * x) + torch.floor(2 * z)) % 2 == 0
    floor = y > 0.99
    shade = torch.where(floor, torch.where(dark, 0.2, 0.8), 0.5)
    return shade[..., None].expand(-1, -1, 3).contiguous()


def test_a_tiled_floor_goes_on_in_perspective():
    depth = ground(SIZE, CAMERA.K[0], 0.5, 1.0, 12.0).depth
    picture, known = tiles(depth), torch.ones(SIZE, dtype=torch.bool)
    known[-24:] = False
    guess = depth.clone()
    guess[~known] = made_up.continued(depth[..., None], depth, known)[:, 0]
    surfaces = made_up.beyond(guess, known)
    assert float((surfaces.depth / depth - 1).abs().max()) < 0.02 < float((guess / depth - 1).abs().max())
    made = made_up.by_example(torch.where(known[..., None], picture, 0.0), known, surfaces, CAMERA)
    assert torch.equal(made[known], picture[known])
    soft = picture.clone()
    soft[~known] = made_up.softly(picture, depth, known)

    def off(image: torch.Tensor) -> int:
        """In how many more or fewer tiles than there are some rows of the picture cross."""
        changes = [((part[76:94:3, 4:-4, 0] > 0.5).int().diff(dim=1) != 0).sum(1) for part in (image, picture)]
        return int((changes[0] - changes[1]).abs().sum())

    assert off(made) <= 6 and off(soft) > 20, "of 52"
    assert 0.6 < float(made[~known].std() / picture[~known].std()) < 1.4


def test_slivers_are_no_deep_holes():
    hole = torch.zeros(SIZE, dtype=torch.bool)
    hole[40:43] = True
    assert not made_up.deep(hole) and not made_up.deep(torch.zeros_like(hole))
    hole[40:60] = True
    assert made_up.deep(hole)


def test_the_same_seed_makes_the_same_up(room, middle):
    picture = torch.rand(*SIZE, 3, generator=torch.Generator().manual_seed(4))
    one, two = (made_up.by_example(picture, middle, made_up.beyond(room, middle, 3), CAMERA, 3) for _ in range(2))
    assert torch.equal(one, two)


def test_what_ends_before_a_hole_is_no_example_for_it():
    """Beside a red pillar a grey wall goes on grey."""
    depth, known = pillar(), torch.ones(SIZE, dtype=torch.bool)
    picture = torch.full((*SIZE, 3), 0.5)
    picture[:, 60:80] = torch.tensor([1.0, 0.0, 0.0])
    known[:, 80:100] = False
    made = made_up.by_example(picture, known, made_up.beyond(depth, known), CAMERA)
    assert float((made[:, 80:100] - 0.5).abs().max()) < 0.02 and torch.equal(made[known], picture[known])


def pillar() -> torch.Tensor:
    """A wall six units ahead and a pillar before it."""
    depth = torch.full(SIZE, 6.0)
    depth[:, 60:80] = 2.0
    return depth


def test_nothing_is_made_up_in_front_of_what_was_seen():
    """Behind a pillar its side goes on nearer than the wall; but the photo looked through there to the wall."""
    depth, picture = pillar(), torch.rand(*SIZE, 3, generator=torch.Generator().manual_seed(1))
    world = begin(picture, depth, CAMERA)
    sources = preview.remembered_sources(world, plan(world, CAMERA))
    aside = pinhole(SIZE, FOCAL)
    aside.w2c[:, 0, 3] = -0.5
    look = preview.look_up(sources, aside)
    wrong = preview.Look(look.image, look.invented, torch.where(look.found, look.depth, 2.5), look.found)
    pushed = preview._out_of_sight(wrong.depth, ~wrong.found, aside, sources)
    points = unproject(pushed[None], aside)[0][~wrong.found]
    u, z = points[:, 0] / points[:, 2] * FOCAL + (SIZE[1] - 1) / 2, points[:, 2]
    v = points[:, 1] / points[:, 2] * FOCAL + (SIZE[0] - 1) / 2
    inside = (u.round() >= 0) & (u.round() < SIZE[1]) & (v.round() >= 0) & (v.round() < SIZE[0])
    seen = depth[v[inside].round().long(), u[inside].round().long()]
    assert bool((z[inside] >= 0.95 * seen).all()) and int(inside.sum()) > 50
    assert torch.equal(pushed[wrong.found], wrong.depth[wrong.found])


def test_a_box_open_above_has_no_plane_there():
    depth = box(SIZE, CAMERA.K[0], torch.eye(3), (-2.0, 2.0, -math.inf, 1.0), 8.0, "").depth
    assert len(planes(depth, torch.ones(SIZE, dtype=torch.bool)).disparity) == 4


def test_a_plane_that_goes_on_is_looked_up_where_an_earlier_frame_shows_it():
    depth = ground(SIZE, CAMERA.K[0], 0.5, 1.0, 12.0).depth
    picture = tiles(depth)
    world = begin(picture, depth, CAMERA)
    sources = preview.remembered_sources(world, plan(world, CAMERA))
    look = preview.look_up(sources, CAMERA)
    hidden = look.found.clone()
    hidden[-24:] = False
    guess = look.depth.clone()
    guess[~hidden] = made_up.continued(guess[..., None], guess, hidden)[:, 0]
    less = preview.Look(torch.where(hidden[..., None], look.image, 0.0), ~hidden, guess, hidden)
    made = preview.filled(less, CAMERA, sources, seed=1)
    assert not made.invented[-20:].any() and float((made.image - picture).abs().max()) < 3e-3
