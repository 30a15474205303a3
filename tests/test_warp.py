"""The forward warp is the soft z-buffer of its definition, pixel by pixel, and each point obeys its laws."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from lyra_core.cameras.camera import Cameras, pinhole, quaternion_to_rotation
from lyra_core.memory import warp
from lyra_core.memory.warp import FAR, Points, lift, merge, reliable, splat, splat_views

SIZE = (14, 18)
HOLES = {
    "nothing unknown": (),
    "unknown pixels": (0.0,),
    "NaN, infinite and negative pixels": (math.nan, math.inf, -1.0, -math.inf),
}
STEEPNESS = 50  # the reference's, not read from the product: the numbers are the contract


def look(size, *views):
    """Cameras that stand at (x, y, z) turned by small angles (pitch, yaw), all with pixels that are not square."""
    w2c = torch.eye(4).repeat(len(views), 1, 1)
    for i, (x, y, z, pitch, yaw) in enumerate(views):
        w2c[i, :3, :3] = quaternion_to_rotation(torch.tensor([1.0, pitch / 2, yaw / 2, 0.01]))
        w2c[i, :3, 3] = -w2c[i, :3, :3] @ torch.tensor([x, y, z], dtype=torch.float32)
    cameras = pinhole(size, 0.9 * size[1], len(views))
    K = cameras.K.clone()
    K[:, 1, 1] *= 1.07
    return Cameras(w2c, K, size)


TARGETS = look(
    SIZE,
    (0.1, 0.03, 0, 0.02, 0.03),
    (-0.4, 0.2, 0.7, -0.1, 0.2),
    (0.3, 0.1, -2.5, 0.05, -0.15),
    (0.05, 0, 2.9, 0, 0.1),
    (0.2, 0.1, 5.5, 0.0, 3.0),
)  # the last two: inside the scene, and turned back


def scene(seed=0, holes=()):
    """Smooth depth with a box in front of it, and noise as colours."""
    generator = torch.Generator().manual_seed(seed)
    v, u = torch.meshgrid(torch.linspace(-1, 1, SIZE[0]), torch.linspace(-1, 1, SIZE[1]), indexing="ij")
    depth = 4 + 0.05 * u + 0.08 * v
    depth[5:11, 6:13] = 2.2 + 0.03 * u[5:11, 6:13]
    for i, value in enumerate(holes):
        depth[2 + 3 * i, 1 + 4 * i] = value
        depth[12, 3 * i : 3 * i + 2] = value
    return depth, torch.rand(*SIZE, 3, generator=generator) * 2 - 1


def slow_splat(views, targets, batch):
    """Features, depth and seen of one warp of [(depth, camera, features)] by the definition: a loop over points and corners.

    Double precision, and no hands shared with the product: continuity, unprojection and weights are written out.
    """
    points = []  # world point, whether it takes part, what travels with it
    for depth, camera, features in views:
        height, width = depth.shape
        clean = [[min(max(FAR if math.isnan(d) else d, 0.0), FAR) for d in row] for row in depth.tolist()]
        c2w, inverse = torch.linalg.inv(camera.w2c[0].double()), torch.linalg.inv(camera.K[0].double())
        for v in range(height):
            for u in range(width):
                window = [
                    clean[y][x]
                    for y in range(v - 2, v + 3)
                    for x in range(u - 2, u + 3)
                    if 0 <= y < height and 0 <= x < width
                ]
                steady = (max(window) - min(window)) / (sum(window) / 25 + 1e-6) < 0.05
                takes_part = clean[v][u] > 0 and steady
                local = inverse @ torch.tensor([u, v, 1.0], dtype=torch.float64) * clean[v][u]
                world = c2w[:3, :3] @ local + c2w[:3, 3] if takes_part else torch.zeros(3, dtype=torch.float64)
                points.append((world, takes_part, features[v, u].double()))
    worlds = torch.stack([world for world, _, _ in points])
    warps = []
    for start in range(0, len(targets), batch):
        views = targets[start : start + batch]
        locals_ = [worlds @ w2c[:3, :3].T + w2c[:3, 3] for w2c in views.w2c.double()]
        largest = max(math.log1p(max(z, 0.0)) for local in locals_ for z in local[:, 2].tolist())
        for local, K in zip(locals_, views.K.double(), strict=True):
            warps.append(slow_splat_one(local @ K.T, local[:, 2].tolist(), points, views.size, largest))
    return [torch.stack(parts) for parts in zip(*warps, strict=True)]


def slow_splat_one(homogeneous, z, points, size, largest):
    height, width = size
    total, weights = torch.zeros(height, width, len(points[0][2]) + 1).double(), torch.zeros(height, width).double()
    for (x, y, w), depth, (_, takes_part, features) in zip(homogeneous.tolist(), z, points, strict=True):
        if not takes_part or depth <= 0:
            continue
        nearness = 1 / (math.exp(min(STEEPNESS * math.log1p(depth) / (largest + 1e-7), 80)) + 1e-7)
        # clamped to one pixel around the picture, and what lands there is thrown away
        x, y = (min(max(c / (w + 1e-7), -1.0), float(n)) for c, n in ((x, width), (y, height)))
        carried = torch.cat([features, features.new_tensor([depth])])
        for row in (math.floor(y), math.ceil(y)):
            for column in (math.floor(x), math.ceil(x)):
                if 0 <= row < height and 0 <= column < width:
                    weight = (1 - abs(x - column)) * (1 - abs(y - row)) * nearness
                    weights[row, column] += weight
                    total[row, column] += weight * carried
    seen = weights > 0
    mean = torch.where(seen[..., None], total / weights.clamp_min(1e-300)[..., None], 0.0).float()
    return mean[..., :-1], mean[..., -1], seen


def assert_same(found, expected):
    assert torch.equal(found.seen, expected[2])
    assert_close(found.features, expected[0], atol=1e-4, rtol=0)
    assert_close(found.depth, expected[1], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("holes", HOLES)
@pytest.mark.parametrize("batch", [1, 2, 16])
def test_every_warped_pixel_is_what_the_definition_says(holes, batch):
    (depth, colours), camera = scene(holes=HOLES[holes]), look(SIZE, (0.1, -0.05, 0.2, 0.03, -0.04))
    found = splat(lift(depth, camera, colours), TARGETS, batch)
    assert_same(found, slow_splat([(depth, camera, colours)], TARGETS, batch))
    assert 0.3 < found.seen[0].float().mean() < 1


def test_views_that_are_merged_compete_in_one_depth_buffer():
    views = []
    for seed, place in enumerate([(0.1, 0, 0.2, 0, 0), (-0.6, 0.1, 0.4, 0.02, 0.15)]):
        depth, colours = scene(seed, HOLES["unknown pixels"])
        views.append((depth, look(SIZE, place), colours))
    together = merge(*(lift(*view) for view in views))
    assert not together.complete
    assert_same(splat(together, TARGETS), slow_splat(views, TARGETS, 16))


def test_a_view_warped_into_itself_is_itself_wherever_it_is_reliable():
    depth, colours = scene()
    camera = look(SIZE, (0.3, -0.2, 0.5, 0.1, -0.2))
    trusted = reliable(depth)
    back = splat(lift(depth, camera, colours), camera)
    assert 0.3 < trusted.float().mean() < 1
    assert back.seen[0][trusted].all()
    assert_close(back.features[0][trusted], colours[trusted], atol=1e-3, rtol=0)
    assert_close(back.depth[0][trusted], depth[trusted], atol=1e-3, rtol=0)


def test_reliable_is_stricter_at_the_border_and_blind_to_a_gentle_slope():
    ramp = torch.linspace(10, 10.8, 16).expand(12, 16)  # 2.1 % over a 5x5 window, but a corner's mean is 9 of 25
    assert reliable(ramp)[2:-2, 2:-2].all()
    assert not reliable(ramp * ramp / 10)[0, 0] and reliable(ramp * ramp / 10)[5, 5]
    step = torch.where(torch.arange(16) < 8, 1.0, 1.2).expand(12, 16)
    assert reliable(step)[5].tolist() == [True] * 6 + [False] * 4 + [True] * 6


def points_on_one_pixel(depths, complete=True):
    """One point per depth, all on the middle pixel of a camera at the origin; the i-th carries 1 in channel i."""
    return Points(torch.tensor([[0.0, 0.0, z] for z in depths]), torch.eye(len(depths)), complete)


def camera_in_the_middle(*z):
    """Cameras on the z axis whose principal point is pixel (2, 2)."""
    cameras = pinhole((5, 5), 4.0, len(z))
    cameras.w2c[:, 2, 3] = -torch.tensor(z)
    return cameras


@pytest.mark.parametrize("complete", [True, False])
def test_how_soft_the_depth_test_is_follows_the_farthest_point_of_the_batch(complete):
    near, far = 1.0, 1.05
    cameras = camera_in_the_middle(0.0, -30.0, -60.0, 0.5)
    share = {}
    for batch in (1, 2, 16):
        found = splat(points_on_one_pixel([near, far], complete), cameras, batch).features[:, 2, 2]
        for i, z in enumerate((0.0, -30.0, -60.0, 0.5)):
            members = [(0.0, -30.0, -60.0, 0.5)[j] for j in range(4) if j // batch == i // batch]
            # an incomplete view counts the world's origin as a point, however near it is
            largest = max(
                math.log1p(max(p - m, 0)) for p in ([near, far] if complete else [near, far, 0.0]) for m in members
            )
            behind = math.exp(-STEEPNESS * (math.log1p(far - z) - math.log1p(near - z)) / largest)
            assert_close(found[i, 1].item(), behind / (1 + behind), atol=1e-4, rtol=0)
            share[batch, i] = found[i, 1].item()
    assert share[1, 0] < 0.2 < 0.3 < share[2, 0] < share[16, 0]  # company from afar lets the background shine through


def test_the_unknown_count_as_the_origin_even_where_it_is_the_farthest_point():
    camera = camera_in_the_middle(-30.0)
    close = Points(torch.tensor([[0, 0, -29.0], [0, 0, -28.9]]), torch.eye(2), True)  # 1 and 1.1 before the camera
    alone = splat(close, camera).features[0, 2, 2, 1]
    with_origin = splat(Points(close.xyz, close.features, False), camera).features[0, 2, 2, 1]
    assert with_origin > 2 * alone


def test_the_nearest_surface_wins_whatever_the_order_of_the_points():
    camera = camera_in_the_middle(0.0)
    for depths in ([1.0, 2.0, 4.0], [4.0, 1.0, 2.0], [2.0, 4.0, 1.0]):
        found = splat(points_on_one_pixel(depths), camera)
        assert found.features[0, 2, 2, depths.index(1.0)] > 0.9999
        assert_close(found.depth[0, 2, 2].item(), 1.0, atol=1e-3, rtol=0)


def test_a_point_between_pixels_is_spread_over_its_four_neighbours():
    camera = camera_in_the_middle(0.0)
    point = Points(torch.tensor([[0.25 * 0.25, 0.5 * 0.25, 1.0]]), torch.ones(1, 1), True)  # pixel (2.25, 2.5)
    found = splat(point, camera)
    expected = torch.zeros(5, 5, dtype=torch.bool)
    expected[2:4, 2:4] = True
    assert torch.equal(found.seen[0], expected)
    assert_close(found.features[0, ..., 0], expected.float())


def test_what_is_behind_or_beside_the_camera_is_not_seen():
    camera = camera_in_the_middle(0.0)
    for place in (
        [0, 0, -1.0],
        [0, 0, 0.0],
        [0, 0, -1e-7],
        [9, 0, 1.0],
        [0, -9, 1.0],
        [1e30, 1e30, 1e-20],
        [5e-8, 5e-8, -1e-7],
    ):  # the last one's pixel is 0 / 0
        found = splat(Points(torch.tensor([place]), torch.ones(1, 1), True), camera)
        assert not found.seen.any() and found.features.abs().max() == 0 and found.depth.abs().max() == 0


def test_unknown_pixels_vanish():
    depth, colours = scene()
    flat = torch.full(SIZE, 3.0)
    camera = look(SIZE, (0, 0, 0, 0, 0))
    flat[:, :5] = 0
    warped = splat(lift(flat, camera, colours, continuity=None), camera)
    assert not warped.seen[0, :, :5].any() and warped.seen[0, :, 5:].all()
    nothing = lift(torch.zeros(SIZE), camera, colours)
    assert len(nothing.xyz) == 0 and not nothing.complete
    assert not splat(nothing, camera).seen.any()


def test_what_is_not_a_number_is_as_far_away_as_can_be():
    colours = scene()[1]
    for value in (math.nan, math.inf, 2 * FAR):
        points = lift(torch.full(SIZE, value), look(SIZE, (0, 0, 0, 0, 0)), colours)
        local = look(SIZE, (0, 0, 0, 0, 0)).w2c[0, :3, :3] @ points.xyz.T
        assert len(points.xyz) > 0.5 * SIZE[0] * SIZE[1]
        assert_close(local[2], torch.full_like(local[2], FAR))


def test_a_point_exactly_on_a_pixel_counts_four_times_there():
    camera = camera_in_the_middle(0.0)
    place = torch.tensor([[0, 0, 8.0], [1.0, 1.0, 8.0]])  # pixels (2, 2) and (2.5, 2.5)
    found = splat(Points(place, torch.eye(2), True), camera).features[0]
    assert_close(found[2, 2], torch.tensor([4.0, 0.25]) / 4.25)
    assert_close(found[3, 3], torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -3.0, 1e30])
def test_broken_depth_neither_crashes_nor_leaves_broken_numbers(value):
    depth, colours = scene()
    for broken in (
        torch.full(SIZE, value),
        torch.where(torch.rand(SIZE, generator=torch.Generator().manual_seed(1)) < 0.2, value, depth),
    ):
        for continuity in (None, 0.05):
            found = splat(lift(broken, TARGETS[0], colours, continuity), TARGETS)
            assert torch.isfinite(found.features).all() and torch.isfinite(found.depth).all()
            assert found.depth.max() <= 1.2 * FAR and found.features.abs().max() <= 1.0001


def test_views_come_one_by_one_and_are_the_whole_warp():
    depth, colours = scene()
    points = lift(depth, TARGETS[0], colours)
    pieces = list(splat_views(points, TARGETS, 2))
    assert [len(piece.depth) for piece in pieces] == [1] * 5
    whole = splat(points, TARGETS, 2)
    assert torch.equal(whole.features, torch.cat([piece.features for piece in pieces]))
    assert torch.equal(whole.depth, torch.cat([piece.depth for piece in pieces]))


def test_depth_can_be_warped_without_any_features_and_nothing_is_changed_by_it():
    depth, colours = scene()
    before = depth.clone(), colours.clone(), TARGETS.w2c.clone()
    bare = splat(lift(depth, TARGETS[0], colours[..., :0]), TARGETS)
    full = splat(lift(depth, TARGETS[0], colours), TARGETS)
    assert bare.features.shape == (5, *SIZE, 0)
    assert torch.equal(bare.depth, full.depth) and torch.equal(bare.seen, full.seen)
    assert all(torch.equal(a, b) for a, b in zip(before, (depth, colours, TARGETS.w2c), strict=True))


def test_a_warp_is_the_same_in_inference_mode():
    depth, colours = scene()
    expected = splat(lift(depth, TARGETS[0], colours), TARGETS)
    with torch.inference_mode():  # in which the host runs every node
        found = splat(lift(depth.clone(), TARGETS[0], colours.clone()), TARGETS)
    assert torch.equal(found.features, expected.features) and torch.equal(found.seen, expected.seen)


def test_no_target_sees_more_than_the_farthest_it_was_given():
    depth, colours = scene()
    found = splat(lift(depth, TARGETS[0], colours), TARGETS)
    assert found.features.abs().max() <= 1.0001  # a mean of values stays among them
    assert (found.depth[found.seen] > 0).all() and (found.depth[~found.seen] == 0).all()


def random_scatter():
    generator = torch.Generator().manual_seed(2)
    cells = torch.randint(0, 50, (300, 4), generator=generator, dtype=torch.int32)
    cells[:40, 1] = cells[:40, 0]  # the same cell twice in one row
    return cells, torch.rand(300, 4, generator=generator), torch.randn(300, 5, generator=generator)


def test_the_sparse_product_is_a_scatter():
    cells, weights, values = random_scatter()
    expected = torch.zeros(60, 5, dtype=torch.float64)
    for n in range(300):
        for k in range(4):
            expected[cells[n, k]] += weights[n, k].double() * values[n].double()
    assert_close(warp._scatter(cells, weights, values, 60), expected.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("at_once", [1, 2**25], ids=["view by view", "all views at once"])
@pytest.mark.parametrize("holes", HOLES.values(), ids=HOLES)
def test_views_made_together_as_on_a_gpu_are_those_made_one_by_one(monkeypatch, at_once, holes):
    depth, colours = scene(holes=holes)
    points = lift(depth, TARGETS[0], colours)
    monkeypatch.setattr(warp, "AT_ONCE", at_once)
    one_by_one = splat(points, TARGETS, batch=3)
    together = list(warp._on_gpu(points, points.xyz.T.contiguous(), TARGETS, 3, [True] * len(TARGETS)))
    for view, expected in enumerate(together):
        assert torch.equal(expected.seen[0], one_by_one.seen[view])
        assert_close(expected.features[0], one_by_one.features[view], atol=1e-5, rtol=0)
        assert_close(expected.depth[0], one_by_one.depth[view], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [warp._on_processor, warp._on_gpu], ids=["processor", "gpu"])
def test_views_of_which_only_depth_is_wanted_have_no_features(make):
    depth, colours = scene()
    points = lift(depth, TARGETS[0], colours)
    whole = splat(points, TARGETS)
    views = list(make(points, points.xyz.T.contiguous(), TARGETS, 16, [view % 2 == 0 for view in range(len(TARGETS))]))
    assert [view.features.shape[-1] for view in views] == [3, 0, 3, 0, 3]
    for number, view in enumerate(views):
        assert torch.equal(view.seen[0], whole.seen[number])
        assert_close(view.depth[0], whole.depth[number], atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_sees_what_the_cpu_sees():
    depth, colours = scene(holes=HOLES["unknown pixels"])
    on_cpu = splat(lift(depth, TARGETS[0], colours), TARGETS)
    on_gpu = splat(lift(depth.cuda(), TARGETS[0].to("cuda"), colours.cuda()), TARGETS.to("cuda"))
    wrong = (on_gpu.features.cpu() - on_cpu.features).abs().amax(-1) > 1e-4
    assert wrong.float().mean() < 1e-3
