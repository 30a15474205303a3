"""A chunk's points: what is new, how fine, in which order, and byte by byte."""

from __future__ import annotations

import gzip
import math
import struct

import numpy as np
import pytest
import torch

from lyra_core.cameras.camera import Cameras, pinhole, project, unproject
from lyra_core.memory import point_cloud
from lyra_core.memory.point_cloud import LEVELS, View, block, decode, encode, finest_stride, view_of
from lyra_core.memory.retrieval import Keyframe

SIZE = (64, 96)


def camera(x: float = 0.0, z: float = 0.0, size=SIZE, focal: float = 80.0) -> Cameras:
    found = pinhole(size, focal * size[1] / 96)
    found.w2c[0, 0, 3], found.w2c[0, 2, 3] = -x, -z
    return found


def wall(distance: float, x: float = 0.0, z: float = 0.0, frame: int = 0, size=SIZE, focal: float = 80.0) -> View:
    """A wall across the view, `distance` in front of where frame 0 stands."""
    depth = torch.full(size, distance - z)
    image = torch.randint(0, 256, (*size, 3), generator=torch.Generator().manual_seed(frame), dtype=torch.uint8)
    invented = torch.zeros(size, dtype=torch.bool)
    invented[: size[0] // 2] = True
    return view_of(Keyframe(frame, depth, camera(x, z, size, focal)), image, invented)


def slope(frame: int = 0, x: float = 0.0) -> tuple[View, Cameras]:
    """Depths of every kind, some unknown."""
    depth = torch.linspace(0.7, 300.0, SIZE[0] * SIZE[1]).reshape(SIZE).clone()
    depth[10:20, 30:60] = 0
    view = wall(1.0, x, frame=frame)
    return View(frame, depth.numpy(), view.w2c, view.K, view.image, view.invented), camera(x)


def test_every_known_pixel_of_a_photo_is_a_point_where_the_photo_saw_it():
    view, cam = slope()
    found = block([view], [], cam)
    known = view.depth > 0
    assert len(found) == known.sum() and found.views["stride"].tolist() == [8]
    x, y = found.pixels.T
    expected = unproject(torch.from_numpy(view.depth)[None], cam)[0].numpy()[y, x]
    away = np.linalg.norm(found.points() - expected, axis=1)
    assert (away <= 1e-3 * view.depth[y, x]).all()
    assert (found.rgb == view.image[y, x]).all() and (found.invented == view.invented[y, x]).all()


def test_a_block_survives_its_bytes_and_they_lie_where_the_page_looks_for_them():
    view, cam = slope()
    path = Cameras(cam.w2c.repeat(3, 1, 1), cam.K.repeat(3, 1, 1), SIZE)
    path.w2c[:, 0, 3] = torch.tensor([0.0, -1.0, -2.0])
    found = block([view, wall(1.5, 3.0, frame=8)], [], path)
    content, points = encode(found), len(found)
    assert struct.unpack_from("<4sHHIIIIHHIQ", content) == (b"LYPC", 1, 40, points, 2, 3, 4, 96, 64, 0, 0)
    frame, fx, fy, cx, cy = struct.unpack_from("<i4f", content, 40 + 80)
    assert (frame, fx, fy, cx, cy) == (8, 80.0, 80.0, 47.5, 31.5)
    c2w = np.frombuffer(content, "<f4", 12, 40 + 80 + 20).reshape(3, 4)
    assert c2w[0].tolist() == [1, 0, 0, 3]
    near, log_ratio, stride, zero = struct.unpack_from("<ffHH", content, 40 + 80 + 68)
    assert (near, log_ratio, stride, zero) == (1.5, 0.0, 8, 0)
    frames = np.frombuffer(content, "<f4", 3 * 13, 40 + 160).reshape(3, 13)
    assert frames[2, 3] == 2 and frames[0, 12] == pytest.approx(math.degrees(2 * math.atan(32 / 80)), abs=1e-4)
    at = 40 + 160 + 3 * 52
    counts = np.frombuffer(content, "<u4", 8, at).reshape(4, 2)
    assert counts.sum() == points and (counts == found.counts).all()
    x = np.frombuffer(content, "<u2", points, at + 32)
    assert (x == found.pixels[:, 0]).all() and len(content) == at + 32 + 10 * points
    assert content[-points:] == found.invented.astype(np.uint8).tobytes()
    again = decode(content)
    assert encode(again) == content and (again.points() == found.points()).all()


def test_any_beginning_of_the_points_is_an_even_thinning():
    view, cam = slope()
    view = View(0, np.full(SIZE, 2.0, np.float32), view.w2c, view.K, view.image, view.invented)
    found = block([view], [], cam)
    ends = found.counts.sum(1).cumsum()
    for level in range(LEVELS):
        stride = 8 >> level
        expected = {(x, y) for y in range(0, 64, stride) for x in range(0, 96, stride)}
        assert set(map(tuple, found.pixels[: ends[level]].tolist())) == expected
        rows = found.pixels[ends[level - 1] if level else 0 : ends[level], ::-1].tolist()
        assert rows == sorted(rows), "row by row"
    assert ends[-1] == 64 * 96


def test_levels_come_before_views():
    found = block([wall(2.0), wall(2.0, 30.0, frame=8)], [], camera())
    assert (found.counts == found.counts[:, :1]).all() and (found.counts > 0).all()
    x = found.points()[:, 0]
    ends = found.counts.reshape(-1).cumsum()
    assert (x[: ends[0]] < 10).all() and (x[ends[0] : ends[1]] > 10).all() and (x[ends[1] : ends[2]] < 10).all()


def test_what_was_seen_before_is_left_out_and_only_what_lies_beside_it_is_new():
    first, second = wall(2.0), wall(2.0, 0.6, frame=8)
    found = block([second], [first], camera(0.6))
    # the wall's points that fall into the first picture
    x = found.points()[:, 0]
    edge = 48 / 80 * 2.0
    assert len(found) and (x > edge - 0.05).all()
    assert len(found) == pytest.approx((0.6 / 2.0 * 80) * 64, rel=0.05)
    assert len(block([first], [first], camera())) == 0


def test_another_surface_in_front_is_new_however_well_the_one_behind_it_is_known():
    behind, front = wall(3.0), wall(2.0, frame=8)
    assert len(block([front], [behind], camera())) == 64 * 96
    near = wall(3.0 * 1.039, frame=8)
    assert len(block([near], [behind], camera())) == 0, "within four percent it is the same surface"


@pytest.mark.parametrize(("step", "new"), [(0.9, False), (1.1, True)])
def test_walking_up_to_a_wall_shows_it_anew_once_it_is_twice_as_fine(step, new):
    far, near = wall(2.0), wall(2.0, 0.0, step, frame=8)
    assert (len(block([near], [far], camera(0.0, step))) > 0) == new
    assert len(block([far], [near], camera())) < 64 * 96 * (1 if new else 0.8), "what is known finer is not sent coarser"


def test_later_views_of_a_chunk_do_not_repeat_the_earlier_ones():
    views = [wall(2.0, 0.2 * i, frame=8 * i) for i in range(4)]
    found = block(views, [], camera())
    alone = len(block([views[0]], [], camera()))
    each = found.counts.sum(0)
    assert each[0] == alone and (each[1:] < 0.2 * alone).all() and (each[1:] > 0).all()


def brute_force(view: View, earlier: list[View], cameras: Cameras, others: list[Cameras]) -> np.ndarray:
    """Which pixels no earlier view shows, one after the other."""
    points = unproject(torch.from_numpy(view.depth)[None], cameras)[0].reshape(-1, 3)
    new = view.depth.reshape(-1) > 0
    for other, cam in zip(earlier, others, strict=True):
        uv, z = (part[0] for part in project(points, cam))
        x, y = (uv + 0.5).floor().long().unbind(1)
        inside = (z > 0) & (x >= 0) & (x < SIZE[1]) & (y >= 0) & (y < SIZE[0])
        there = torch.from_numpy(other.depth)[y.clamp(0, SIZE[0] - 1), x.clamp(0, SIZE[1] - 1)]
        fine = float(other.K[0, 0]) / z >= 0.5 * float(view.K[0, 0]) / torch.from_numpy(view.depth.reshape(-1))
        new &= ~(inside & ((there - z).abs() < 0.04 * z) & fine).numpy()
    return new.reshape(SIZE)


@pytest.mark.parametrize("seed", range(6))
def test_what_is_new_agrees_with_an_exhaustive_search(seed):
    g = torch.Generator().manual_seed(seed)

    def random_view(frame: int):
        coarse = 1.5 + 2 * torch.rand(1, 1, 5, 6, generator=g)
        depth = torch.nn.functional.interpolate(coarse, SIZE, mode="bilinear", align_corners=True)[0, 0]
        x, z = (0.8 * torch.rand(2, generator=g) - 0.4).tolist()
        cam = camera(x, z)
        return view_of(Keyframe(frame, depth, cam), torch.zeros(*SIZE, 3, dtype=torch.uint8), torch.zeros(SIZE).bool()), cam

    (view, cam), *others = (random_view(frame) for frame in range(5))
    earlier = [other for other, _ in others]
    found = block([view], earlier, cam)
    expected = brute_force(view, earlier, cam, [c for _, c in others])
    mask = np.zeros(SIZE, dtype=bool)
    mask[found.pixels[:, 1], found.pixels[:, 0]] = True
    assert (mask[::2, ::2] == expected[::2, ::2]).mean() > 0.998, "up to rounding"
    # between pixels that are all known, nothing is looked for
    missed = expected & ~mask
    assert missed.mean() < 0.02 and not (mask & ~expected).sum() > 10


def test_a_block_has_a_cap_that_thins_the_finest_level_evenly():
    view = wall(2.0)
    found = block([view, wall(2.0, 30.0, frame=8)], [], camera(), cap=5000)
    whole = block([view, wall(2.0, 30.0, frame=8)], [], camera())
    assert len(found) == 5000
    assert (found.counts[:3] == whole.counts[:3]).all() and abs(int(found.counts[3, 0]) - int(found.counts[3, 1])) <= 1
    rows = np.bincount(found.pixels[found.counts[:3].sum() :, 1], minlength=64)
    assert rows[1::2].max() - rows[1::2].min() <= 2
    few = block([view], [], camera(), cap=200)
    assert len(few) == 200 and few.counts[2:].sum() == 200 - few.counts[:2].sum() and few.counts[3].sum() == 0


@pytest.mark.parametrize(("width", "stride"), [(96, 1), (416, 1), (560, 1), (624, 2), (832, 2), (1280, 4), (1664, 4)])
def test_the_finest_level_has_about_416_points_in_a_row(width, stride):
    assert finest_stride(width) == stride


def test_a_view_that_adds_nothing_and_an_unknown_depth_are_allowed():
    unknown = wall(2.0, frame=8)
    unknown = View(8, 0 * unknown.depth, unknown.w2c, unknown.K, unknown.image, unknown.invented)
    found = block([wall(2.0), wall(2.0, frame=4), unknown], [], camera())
    assert found.counts.sum(0).tolist() == [64 * 96, 0, 0] and len(decode(encode(found)).points()) == 64 * 96


def test_a_skewed_camera_is_refused():
    cam = camera()
    cam.K[0, 0, 1] = 0.1
    with pytest.raises(ValueError, match="skew"):
        view_of(Keyframe(3, torch.ones(SIZE), cam))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda b: b[:-1], "cut off"),
        (lambda b: b + b"\0", "cut off"),
        (lambda b: b[:20], "not a point block"),
        (lambda b: b"PK" + b[2:], "not a point block"),
        (lambda b: b[:4] + b"\2" + b[5:], "version 2"),
    ],
)
def test_bytes_that_are_no_whole_block_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        decode(change(encode(block([wall(2.0)], [], camera()))))


def test_a_photo_of_the_usual_size_takes_ten_bytes_a_point():
    size = (480, 832)
    found = block([wall(2.0, size=size)], [], camera(size=size))
    content = encode(found)
    assert len(found) == 99_840 and found.views["stride"].tolist() == [16]
    assert len(content) < 10.01 * len(found) and len(gzip.compress(content, 1)) < 0.9 * len(content)
    assert len(found) < point_cloud.CAP
