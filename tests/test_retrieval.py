"""Retrieval is the greedy coverage of its definition, and remembering never forgets or overwrites."""

from __future__ import annotations

import math

import pytest
import torch

from lyra_core.cameras.camera import Cameras, pinhole, quaternion_to_rotation, unproject
from lyra_core.memory.retrieval import Keyframe, SpatialMemory, retrieve

STRIDE, TOLERANCE = 4, 0.1  # the reference's, not read from the product
SIZE = (36, 50)  # no multiples of the stride
WALLS = (3.0, 2.0, 4.0)  # half the room's width, height and length


def camera_at(position, yaw=0.0, pitch=0.0, size=SIZE, focal=30.0):
    w2c = torch.eye(4)
    w2c[:3, :3] = quaternion_to_rotation(
        torch.tensor([math.cos(pitch / 2), math.sin(pitch / 2), 0.0, 0.0])
    ) @ quaternion_to_rotation(torch.tensor([math.cos(yaw / 2), 0.0, math.sin(yaw / 2), 0.0]))
    w2c[:3, 3] = -w2c[:3, :3] @ torch.tensor(position, dtype=torch.float32)
    return Cameras(w2c[None], pinhole(size, focal).K, size)


def depth_in_room(camera):
    """Where each pixel's ray leaves a box around the world's origin."""
    rays = unproject(torch.ones(1, *camera.size), camera)[0] - camera.centers[0]  # z = 1 along the camera's axis
    walls = torch.tensor(WALLS)
    return torch.where(rays.abs() > 1e-9, (torch.sign(rays) * walls - camera.centers[0]) / rays, math.inf).amin(-1)


def keyframe(frame, *place, unknown=0.0, generator=None, **settings):
    camera = camera_at(*place, **settings)
    depth = depth_in_room(camera)
    if unknown:
        depth = torch.where(torch.rand(depth.shape, generator=generator) < unknown, 0.0, depth)
    return Keyframe(frame, depth, camera)


def random_room(seed, count=9, unknown=0.0):
    """Keyframes here and there in the room, and two cameras that could look at anything."""
    generator = torch.Generator().manual_seed(seed)

    def place(spread=0.7):
        x, y, z, yaw, pitch = (2 * torch.rand(5, generator=generator) - 1).tolist()
        return (spread * x * WALLS[0], spread * y * WALLS[1], spread * z * WALLS[2]), math.pi * yaw, 0.4 * pitch

    keyframes = [keyframe(8 * i, *place(), unknown=unknown, generator=generator) for i in range(count)]
    targets = [camera_at(*place()) for _ in range(2)]
    return keyframes, Cameras(torch.cat([t.w2c for t in targets]), torch.cat([t.K for t in targets]), SIZE)


def random_layers(seed, count=12):
    """Keyframes that each show a small patch, many of them just before or behind one another, and two cameras."""
    generator = torch.Generator().manual_seed(seed)

    def chance(*choices):
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]

    def place():
        return (chance(-1.0, 0.0, 1.0), chance(-0.5, 0.0, 0.5), chance(-1.0, 0.0, 1.5)), chance(-0.4, 0.0, 0.0, 0.3)

    keyframes = []
    for i in range(count):
        depth, (position, yaw) = torch.zeros(SIZE), place()
        top, left = chance(0, 8, 20), chance(0, 12, 28)
        depth[top : top + chance(4, 12, 36), left : left + chance(4, 12, 50)] = (
            4 + chance(0.0, 0.06, 0.13, 0.5, 3.0) - position[2]
        )
        keyframes.append(Keyframe(8 * i, depth, camera_at(position, yaw)))
    targets = [camera_at(*place()) for _ in range(2)]
    return keyframes, Cameras(torch.cat([t.w2c for t in targets]), torch.cat([t.K for t in targets]), SIZE)


def what_each_sees(keyframes, targets, tolerance=TOLERANCE, unknown_at_origin=False, margin=0.0):
    """Per keyframe the set of coarse target pixels in which it shows the nearest surface; one point at a time, in doubles."""
    height, width = (-(-s // STRIDE) for s in targets.size)
    hits = []
    for k in keyframes:
        inverse, c2w = torch.linalg.inv(k.camera.K[0].double()), torch.linalg.inv(k.camera.w2c[0].double())
        points = []
        for v in range(0, k.depth.shape[0], STRIDE):
            for u in range(0, k.depth.shape[1], STRIDE):
                d = float(k.depth[v, u])
                if d > 0:
                    points.append(c2w[:3, :3] @ (inverse @ torch.tensor([u, v, 1.0]).double() * d) + c2w[:3, 3])
                elif unknown_at_origin:
                    points.append(torch.zeros(3).double())
        mine = []
        for view, (w2c, K) in enumerate(zip(targets.w2c.double(), targets.K.double(), strict=True)):
            for x, y, z in ((torch.stack(points) @ w2c[:3, :3].T + w2c[:3, 3]) @ K.T).tolist() if points else ():
                if z > 0:
                    column, row = round(x / z / STRIDE), round(y / z / STRIDE)
                    if 0 <= row < height and 0 <= column < width:
                        mine.append(((view, row, column), z))
        hits.append(mine)
    nearest = {}
    for cell, z in (hit for mine in hits for hit in mine):
        nearest[cell] = min(z, nearest.get(cell, math.inf))
    return [{cell for cell, z in mine if z <= nearest[cell] + tolerance} for mine in hits]


def exhaustive(keyframes, sees, count):
    """Frame ids by greedy coverage, best last, and by how much each choice was the best."""
    newest = max(range(len(keyframes)), key=lambda i: keyframes[i].frame)
    free = [i for i in range(len(keyframes)) if i != newest or keyframes[newest].frame <= 0]
    covered = set(sees[newest]) if keyframes[newest].frame > 0 else set()
    picked, margins = [], []
    while free and len(picked) < count:
        gains = [len(sees[i] - covered) for i in free]
        best = gains.index(max(gains))
        if not gains[best]:
            break
        margins.append(gains[best] - max([0, *gains[:best], *gains[best + 1 :]]))
        covered |= sees[free[best]]
        picked.append(keyframes[free.pop(best)].frame)
    return picked[::-1], margins


SURE = 2  # coverage cells; rounding in single precision can move a point or two into the next cell


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("unknown", [0.0, 0.3])
def test_retrieval_is_exhaustive_greedy_search(views, unknown):
    sure = 0
    for seed in range(6):
        keyframes, targets = random_room(seed, unknown=unknown)
        targets = targets[:views]
        expected, margins = exhaustive(keyframes, what_each_sees(keyframes, targets), 5)
        # from the first close call on, anything may follow
        certain = next((i for i, margin in enumerate(margins) if margin <= SURE), len(margins))
        found = retrieve(keyframes, targets, 5)
        assert found[::-1][:certain] == expected[::-1][:certain]
        assert len(found) <= 5
        sure += certain
    assert sure >= 6


def test_the_one_that_is_asked_for_is_the_one_that_sees_most():
    for seed in range(8):
        keyframes, targets = random_room(seed)
        keyframes = [Keyframe(-1 - i, k.depth, k.camera) for i, k in enumerate(keyframes)]  # nothing is covered before
        sizes = [len(cells) for cells in what_each_sees(keyframes, targets[:1])]
        best, second = sorted(sizes)[-1], sorted(sizes)[-2]
        if best - second > SURE:
            assert retrieve(keyframes, targets[:1], 1) == [keyframes[sizes.index(best)].frame]


def without_shortcuts(keyframes, targets, count, by="coverage", tolerance=TOLERANCE, unknown_at_origin=False):
    """Frame ids and how many keyframes no target sees: the definition on whole arrays, every point into every view."""
    height, width = (-(-s // STRIDE) for s in targets.size)
    nearest_of = torch.full(
        (len(keyframes), len(targets) * height * width), math.inf
    )  # and the lowest z of each keyframe
    for row, k in zip(nearest_of, keyframes, strict=True):
        depth = k.depth[::STRIDE, ::STRIDE]
        points = unproject(depth[None], k.camera.subsampled(STRIDE))[0].reshape(-1, 3)
        points[depth.flatten() <= 0] = 0 if unknown_at_origin else math.nan
        for view, camera in enumerate(targets.subsampled(STRIDE)[i] for i in range(len(targets))):
            x, y, z = ((points @ camera.w2c[0, :3, :3].T + camera.w2c[0, :3, 3]) @ camera.K[0].T).unbind(1)
            u, v = (x / (z + 1e-7)).round(), (y / (z + 1e-7)).round()
            inside = (z > 0) & (u >= 0) & (u < width) & (v >= 0) & (v < height)
            row.scatter_reduce_(0, ((view * height + v) * width + u)[inside].long(), z[inside], "amin")
    nearest = nearest_of.amin(0)
    blind = int(torch.isinf(nearest_of).all(1).sum())
    ids = [k.frame for k in keyframes]
    sees = torch.isfinite(nearest_of) & (nearest_of <= nearest + (tolerance if by == "coverage" else 1e-6))
    if by == "ownership":
        first = sees & (sees.cumsum(0) == 1)
        order = first.sum(1).argsort(descending=True, stable=True)
        return [ids[i] for i in order.tolist() if first[i].any()][:count][::-1], blind
    newest = ids.index(max(ids))
    left, picked = ~sees[newest] if max(ids) > 0 else torch.ones_like(sees[0]), []
    for _ in range(count):
        gains = (sees & left).sum(1)
        if gains.max() > 0:
            picked.append(ids[int(gains.argmax())])
            left &= ~sees[gains.argmax()]
    return picked[::-1], blind


@pytest.mark.parametrize("options", [{}, {"by": "ownership"}, {"unknown_at_origin": True}, {"tolerance": 1.0}])
def test_what_is_left_out_to_be_fast_never_changes_the_answer(options):
    blind = 0
    scenes = [random_room(seed, count=12, unknown=0.2 * (seed % 3 == 0)) for seed in range(8)]
    for keyframes, targets in [*scenes, *(random_layers(seed) for seed in range(20))]:
        expected, unseen = without_shortcuts(keyframes, targets, 6, **options)
        assert retrieve(keyframes, targets, 6, **options) == expected
        blind += unseen
    assert blind > 8  # there was something to leave out


def test_the_frustum_test_knows_keyframes_of_nothing():
    empty = Keyframe(8, torch.zeros(SIZE), camera_at((0, 0, 0)))
    target = camera_at((0, 0, -3.0))
    assert retrieve([empty], target) == []
    assert retrieve([keyframe(0, (0, 0, 0)), empty], target) == [0]


def test_what_the_newest_frame_shows_needs_no_other():
    place = (0.5, 0, 0), 0.3
    same = [keyframe(0, *place), keyframe(8, *place)]
    assert retrieve(same, same[0].camera) == []
    assert retrieve(same[:1], same[0].camera) == [0]  # frame 0 alone covers nothing before
    beyond = [keyframe(0, (0, 0, 0), 0.0), keyframe(8, (0, 0, 0), 0.6)]
    assert retrieve(beyond, camera_at((0, 0, 0), 0.3)) == [0]
    assert 8 not in retrieve([*beyond, keyframe(16, (0, 0, 0), math.pi)], camera_at((0, 0, 0), math.pi))


def test_the_newest_frame_is_the_one_with_the_largest_id_wherever_it_is_stored():
    left, right = keyframe(16, (0, 0, 0), -0.4), keyframe(8, (0, 0, 0), 0.4)
    assert retrieve([left, right], camera_at((0, 0, 0))) == [8]
    assert retrieve([right, left], camera_at((0, 0, 0))) == [8]


def test_a_tie_goes_to_the_one_remembered_first():
    place = (0.2, 0.1, 0), 0.1
    newest = keyframe(400, (0, 0, 0), math.pi)  # looks the other way
    copies = [keyframe(frame, *place) for frame in (200, 16, 300)]
    assert retrieve([*copies, newest], copies[0].camera) == [200]
    assert retrieve([*copies[::-1], newest], copies[0].camera) == [300]


def test_several_seed_views_cover_nothing_before_and_the_best_comes_last():
    views = [keyframe(-1, (0, 0, 0), math.pi), keyframe(-2, (0, 0, 0), 0.5), keyframe(-3, (0, 0, 0), 0.05)]
    found = retrieve(views, camera_at((0, 0, 0)))
    assert found[-1] == -3 and found == [-2, -3]


def test_the_best_is_last_and_fewer_are_a_tail_of_more():
    for seed in range(6):
        keyframes, targets = random_room(seed)
        most = retrieve(keyframes, targets, 8)
        assert len(set(most)) == len(most)
        assert all(
            retrieve(keyframes, targets, count) == most[len(most) - min(count, len(most)) :] for count in (1, 2, 5)
        )
    assert retrieve(keyframes, targets, 0) == [] and retrieve((), targets) == []


def test_the_last_ones_can_be_left_out_even_as_newest_frame():
    for seed in range(4):
        keyframes, targets = random_room(seed)
        assert retrieve(keyframes, targets, 5, skip_last=3) == retrieve(keyframes[:-3], targets, 5)
    assert retrieve(keyframes, targets, 5, skip_last=len(keyframes)) == []


def test_a_point_counts_up_to_the_tolerance_behind_the_nearest_surface():
    def wall(frame, distance):
        return Keyframe(frame, torch.full(SIZE, distance), camera_at((0, 0, 0)))

    target = camera_at((0, 0, 0))
    pair = [wall(-1, 2.0), wall(-2, 2.05)]
    sees = retrieve(pair, target, 2, by="coverage")
    assert sees == [-1]  # the second is as visible, so the first one leaves nothing
    near_half = Keyframe(-1, torch.where(torch.arange(SIZE[1]) < 20, 2.0, 0.0).expand(SIZE), camera_at((0, 0, 0)))
    assert retrieve([near_half, wall(-2, 2.05)], target, 2) == [-2]
    assert retrieve([near_half, wall(-2, 2.05)], target, 2, tolerance=0.01) == [-1, -2]
    halves = [
        Keyframe(-i, torch.where((torch.arange(SIZE[1]) < 20) == (i == 1), 2.0, 0.0).expand(SIZE), target)
        for i in (1, 2)
    ]
    assert retrieve([*halves, wall(-3, 2.05)], target, 1) == [-3]  # all of it is behind others, yet none shows more
    assert retrieve([*halves, wall(-3, 2.05)], target, 3, tolerance=0.01) == [-1, -2]


def test_ownership_ranks_by_the_pixels_in_which_a_keyframe_is_nearest():
    columns = torch.arange(SIZE[1])
    target = camera_at((0, 0, 0))

    def strip(frame, low, high, distance):
        return Keyframe(frame, torch.where((columns >= low) & (columns < high), distance, 0.0).expand(SIZE), target)

    far, left, right = strip(0, 0, 50, 2.5), strip(8, 0, 12, 2.0), strip(16, 12, 36, 1.0)
    assert retrieve([far, left, right], target, 5, by="ownership") == [8, 0, 16]  # 3, 4 and 6 of 13 coarse columns
    assert retrieve([far, left, right], target, 2, by="ownership") == [0, 16]
    assert retrieve([far, strip(8, 0, 50, 2.5)], target, 5, by="ownership") == [0]  # the first one owns what both touch


def test_unknown_pixels_are_points_at_the_origin_only_if_asked():
    blind = Keyframe(0, torch.zeros(SIZE), camera_at((9, 9, 9)))
    target = camera_at((0, 0, -2.0))
    assert retrieve([blind], target) == []
    assert retrieve([blind], target, unknown_at_origin=True) == [0]
    assert retrieve([blind], camera_at((0, 0, 2.0)), unknown_at_origin=True) == []
    elsewhere = keyframe(0, (0, 0, -2.5), math.pi)  # sees nothing of the target's view
    assert retrieve([elsewhere], target, unknown_at_origin=True) == []
    elsewhere.depth[0, 0] = 0
    assert retrieve([elsewhere], target, unknown_at_origin=True) == [0]


def test_unknown_pixels_at_the_origin_agree_with_exhaustive_search():
    for seed in range(4):
        keyframes, targets = random_room(seed, unknown=0.3)
        sees = what_each_sees(keyframes, targets, unknown_at_origin=True)
        expected, margins = exhaustive(keyframes, sees, 2)
        if margins and min(margins) > SURE:
            assert retrieve(keyframes, targets, 2, unknown_at_origin=True) == expected


def test_a_wrong_way_of_ranking_is_refused():
    with pytest.raises(ValueError, match="by='size': expected 'coverage' or 'ownership'"):
        retrieve([keyframe(0, (0, 0, 0))], camera_at((0, 0, 0)), by="size")


def test_a_frame_that_is_remembered_twice_keeps_its_first_depth():
    first, other = keyframe(8, (0, 0, 0)), keyframe(8, (1, 0, 0))
    memory = SpatialMemory().remember(keyframe(0, (0, 0, 0)), first)
    again = memory.remember(other, keyframe(16, (0, 0, 0)))
    assert again.frames == (0, 8, 16) and again[8] is first
    assert memory.frames == (0, 8)  # the old memory is what it was


def test_two_of_the_same_frame_remembered_at_once_are_one():
    first, other = keyframe(8, (0, 0, 0)), keyframe(8, (1, 0, 0))
    memory = SpatialMemory().remember(first, other)
    assert memory.frames == (8,) and memory[8] is first


def test_the_memory_and_its_keyframes_are_the_same_to_retrieval():
    keyframes, targets = random_room(3)
    assert retrieve(SpatialMemory(tuple(keyframes)), targets) == retrieve(keyframes, targets)


def test_an_unknown_frame_is_named_with_those_there_are():
    with pytest.raises(KeyError, match=r"frame 5 is not in the memory, which holds \[0, 8\]"):
        SpatialMemory((keyframe(0, (0, 0, 0)), keyframe(8, (0, 0, 0))))[5]
