"""The small world to learn in: its pictures, depths and walks against what can be said of boxes without tracing."""

from __future__ import annotations

import pytest
import torch

from lyra_core.cameras.camera import check, project, unproject

SIZE = (32, 48)


@pytest.fixture(scope="module")
def filmed(toy_scenes):
    """A room and a street, the walk through each, pictures and depth."""
    made = [toy_scenes.scene(4), toy_scenes.scene(7)]
    walks = [toy_scenes.walk(scene, 1, 121, SIZE, comes_back=True) for scene in made]
    return made, walks, *toy_scenes.render(made, [walk[::20] for walk in walks])


def test_depth_is_the_nearest_of_all_planes_that_bound_a_surface_there(filmed):
    made, walks, _pictures, depths = filmed
    for scene, walk, depth in zip(made, walks, depths, strict=True):
        points = unproject(depth, walk[::20])
        assert scene_distance(scene, points).abs().max() < 1e-4  # every point lies on a surface
        origin = walk[::20].centers[:, None, None]
        for share in (0.25, 0.5, 0.9, 0.99):  # and nothing is in front of it
            assert scene_distance(scene, origin + share * (points - origin)).min() > 0


def scene_distance(scene, points):
    """Of points (..., 3) from the nearest surface, negative where no ray can be; by distances alone."""
    walls, things = scene.walls, scene.things[(scene.things[:, 1] > scene.things[:, 0]).all(-1)]
    room = torch.minimum(points - walls[0], walls[1] - points).amin(-1)
    boxes = torch.stack([torch.maximum(low - points, points - high).amax(-1) for low, high in things])
    return torch.minimum(room, boxes.amin(0))


def test_a_wall_ahead_is_as_far_as_its_plane(toy_scenes):
    room = toy_scenes.scene(2)
    empty = type(room)(**{**vars(room), "things": torch.zeros_like(room.things)})
    camera = toy_scenes._standing_at(torch.tensor([[0.3, -1.4, 0.2, 0.0, 0.0]]), SIZE)
    depth = toy_scenes.render([empty], [camera])[1][0, 0]
    rows, columns = torch.meshgrid(*(torch.arange(side) - (side - 1) / 2 for side in SIZE), indexing="ij")
    x, y = columns / camera.K[0, 0, 0], rows / camera.K[0, 1, 1]
    (left, top, _), (right, floor, far) = (corner.tolist() for corner in room.walls)
    walls = [far - 0.2, *((edge - place) / slope for slope, edges, place in ((x, (left, right), 0.3), (y, (top, floor), -1.4)) for edge in edges)]
    expected = torch.stack([torch.as_tensor(wall).expand(SIZE) for wall in walls])
    torch.testing.assert_close(depth, expected.where(expected > 0, torch.inf).amin(0), rtol=1e-5, atol=1e-5)


def test_a_point_has_one_colour_wherever_it_is_seen_from(toy_scenes, filmed):
    made, walks, *_ = filmed
    pictures, depths = toy_scenes.render(made[:1], [walks[0][:25:12]], samples=1)
    here, there = walks[0][0], walks[0][24]
    pixels, depth = project(unproject(depths[0, :1], here)[0][None], there)
    x, y = pixels[0].round().long().unbind(-1)
    inside = (x >= 0) & (x < SIZE[1]) & (y >= 0) & (y < SIZE[0]) & (depth[0] > 0)
    x, y = x.clamp(0, SIZE[1] - 1), y.clamp(0, SIZE[0] - 1)
    same = inside & ((depths[0, 2][y, x] - depth[0]).abs() < 0.02)
    assert same.float().mean() > 0.3
    assert (pictures[0, 2][y, x] - pictures[0, 0]).abs().mean(-1)[same].mean() < 0.03  # half a pixel apart at most


def test_scenes_walks_and_pictures_repeat_and_do_not_depend_on_the_batch(toy_scenes, filmed):
    made, walks, pictures, depths = filmed
    again = toy_scenes.scene(7)
    walk = toy_scenes.walk(again, 1, 121, SIZE, comes_back=True)
    picture, depth = toy_scenes.render([again], [walk[::20]])
    assert torch.equal(walk.w2c, walks[1].w2c) and again.caption == made[1].caption
    torch.testing.assert_close(depth[0], depths[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(picture[0], pictures[1], rtol=1e-5, atol=1e-5)
    assert not torch.equal(toy_scenes.scene(9).things, again.things)


def test_walks_keep_clear_of_everything_and_those_that_come_back_do(toy_scenes):
    for seed in range(8):
        scene = toy_scenes.scene(seed)
        walk = check(toy_scenes.walk(scene, seed, 161, SIZE, comes_back=True))
        assert toy_scenes.clearance(scene, walk.centers).min() > 0.2
        assert (walk.centers[0] - walk.centers[-1]).norm() < 0.25
        assert (walk.centers - walk.centers[0]).norm(dim=1).max() > 0.5 or _turned(walk) > 40
        assert (walk.centers[1:] - walk.centers[:-1]).norm(dim=1).max() < 0.15


def _turned(walk) -> float:
    looks = walk.w2c[:, 2, :3]
    return float(torch.rad2deg(torch.arccos((looks @ looks[0]).clamp(-1, 1)).max()))


def test_captions_say_nothing_outside_the_vocabulary(toy_scenes):
    captions = [toy_scenes.scene(seed).caption for seed in range(60)]
    assert len(set(captions)) > 40
    assert {word for caption in captions for word in caption.split()} <= set(toy_scenes.VOCABULARY)
