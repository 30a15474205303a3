"""A world is a value that grows by whole chunks, and the preview grows it without weights and without holes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from lyra_core.cameras.camera import Cameras, pinhole, quaternion_to_rotation
from lyra_core.memory.depth import room_box
from lyra_core.world import preview as preview_
from lyra_core.world.preview import coarse_to_fine, generate, look_up, remembered_sources
from lyra_core.world.world import (
    append,
    begin,
    continuation,
    in_chunks,
    keyframe_ids,
    plan,
    rewind,
    to_float,
    to_uint8,
)

SIZE = (64, 96)
FOCAL = 80.0


def camera_at(position=(0.0, 0.0, 0.0), yaw=0.0):
    w2c = torch.eye(4)
    w2c[:3, :3] = quaternion_to_rotation(torch.tensor([math.cos(yaw / 2), 0.0, math.sin(yaw / 2), 0.0]))
    w2c[:3, 3] = -w2c[:3, :3] @ torch.tensor(position)
    return Cameras(w2c[None], pinhole(SIZE, FOCAL).K, SIZE)


def walk(*stops, frames=8):
    """New cameras on the way from each (position, yaw) to the next, `frames` per leg, the first stop left out."""
    cameras = []
    for (start, from_yaw), (end, to_yaw) in zip(stops, stops[1:], strict=False):
        for i in range(1, frames + 1):
            share = i / frames
            cameras.append(
                camera_at(
                    tuple(a + share * (b - a) for a, b in zip(start, end, strict=True)),
                    from_yaw + share * (to_yaw - from_yaw),
                )
            )
    return Cameras(torch.cat([c.w2c for c in cameras]), torch.cat([c.K for c in cameras]), SIZE)


def picture(seed=0):
    """Smooth colours, none of them dark."""
    noise = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(seed))
    return 0.3 + 0.6 * torch.nn.functional.interpolate(noise, SIZE, mode="bilinear", align_corners=True)[0].permute(
        1, 2, 0
    )


def room():
    return room_box(SIZE, pinhole(SIZE, FOCAL).K[0], (0.5, 0.5), (0.15, 0.12, 0.85, 0.88), 5.0).depth


def photo(image=None, depth=None):
    return begin(picture() if image is None else image, room() if depth is None else depth, camera_at())


def grown(world, target, count=5, **settings):
    """One more chunk by the preview."""
    the_plan = plan(world, target, count)
    made = generate(world, the_plan)
    return append(world, the_plan, made.frames, made.invented, made.depths, **settings)


AWAY = walk(((0.0, 0.0, 0.0), 0.0), ((0.6, 0.0, 1.2), 0.5))
BACK = walk(((0.6, 0.0, 1.2), 0.5), ((0.0, 0.0, 0.0), 0.0))


@pytest.fixture(scope="module")
def there_and_back():
    first = photo()
    away = grown(first, AWAY, prompt="away", settings={"generator": "preview"})
    return first, away, grown(away, BACK, prompt="back")


def blank(the_plan, value=128):
    """Frames, invented, depths of a chunk of nothing."""
    count = len(the_plan.target)
    return (
        torch.full((count, *SIZE, 3), value, dtype=torch.uint8),
        torch.zeros(count, *SIZE, dtype=torch.bool),
        {frame: torch.full(SIZE, 2.0) for frame in keyframe_ids(the_plan)},
    )


# begin


def test_a_world_of_one_photo_holds_that_photo_and_its_depth():
    world = photo()
    assert len(world) == 1 and world.size == SIZE and world.memory.frames == (0,)
    assert torch.equal(world.frame(0), to_uint8(picture())) and not world.invented(0).any()
    assert torch.equal(world.memory[0].depth, room())
    assert torch.equal(world.last_camera.w2c, camera_at().w2c)


def test_bytes_survive_the_way_through_floats():
    stored = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(stored)), stored)
    assert to_uint8(torch.tensor([-1.0, 2.0, 0.5])).tolist() == [0, 255, 128]


def of_size(height, width, image_channels=3):
    return torch.rand(height, width, image_channels), torch.ones(height, width), pinhole((height, width), FOCAL)


IMAGE, DEPTH, CAMERA = of_size(*SIZE)


@pytest.mark.parametrize(
    "view, says",
    [
        (of_size(33, 48), "48x33; both sides must be multiples of 16.*to 48x32"),
        (of_size(32, 50), "50x32; both sides must be multiples of 16.*to 48x32"),
        (of_size(1, 1), "1x1; both sides must be multiples of 16.*to 16x16"),
        (of_size(32, 48, 4), r"colour picture \(height, width, 3\), found \(32, 48, 4\)"),
        (of_size(32, 48, 1), r"colour picture \(height, width, 3\), found \(32, 48, 1\)"),
        ((IMAGE[None], DEPTH, CAMERA), r"found \(1, 64, 96, 3\)"),
        ((IMAGE, DEPTH * math.nan, CAMERA), "the photo: its depth has NaN"),
        ((IMAGE, DEPTH * math.inf, CAMERA), "the photo: its depth has NaN, infinite"),
        ((IMAGE, -DEPTH, CAMERA), "negative numbers"),
        ((IMAGE, DEPTH * 0, CAMERA), "nothing known"),
        ((IMAGE, DEPTH[:32], CAMERA), "96x64 but its depth is 96x32"),
        ((IMAGE, DEPTH, pinhole((48, 96), FOCAL)), "96x64 but its camera is 96x48"),
        ((IMAGE, DEPTH, replace(CAMERA, w2c=2 * CAMERA.w2c)), "the photo: frame 0 has a rotation"),
        ((torch.full_like(IMAGE, float("nan")), DEPTH, CAMERA), "the photo has NaN or infinite pixels"),
        ((torch.zeros(1, 1, 3).expand(4320, 7680, 3), DEPTH, CAMERA), "7680x4320; Lyra 2 reaches 2048"),
        ((IMAGE, DEPTH, AWAY), "8 cameras"),
    ],
)
def test_a_photo_that_cannot_begin_a_world_is_refused_with_its_sizes(view, says):
    with pytest.raises(ValueError, match=says):
        begin(*view)


def test_further_views_are_remembered_under_negative_ids_and_must_fit_the_first():
    view = (picture(1), 2 * room(), camera_at((1.0, 0.0, 0.0)))
    world = begin(picture(), room(), camera_at(), [view])
    assert len(world) == 1 and world.memory.frames == (0, -1)
    assert torch.equal(world.frame(-1), to_uint8(picture(1))) and not world.invented(-1).any()
    with pytest.raises(ValueError, match="view 1 is 64x32 but its first view is 96x64"):
        begin(picture(), room(), camera_at(), [of_size(32, 64)])


# plan


def test_a_plan_knows_its_frames_and_asks_the_memory(there_and_back):
    first, away, _ = there_and_back
    assert plan(first, AWAY).first_frame == 1 and plan(first, AWAY).retrieved == (0,)
    later = plan(away, BACK)
    assert later.first_frame == 9 and later.world_key == away.key
    assert 0 in later.retrieved and set(later.retrieved) <= set(away.memory.frames)
    assert plan(away, BACK, count=0).retrieved == ()


def test_only_what_the_last_camera_sees_is_retrieved_unless_more_are_asked():
    look_back = walk(((0.0, 0.0, 0.0), 0.0), ((0.0, 0.0, 0.0), math.pi))
    assert plan(photo(), look_back).retrieved == ()
    assert plan(photo(), look_back, views=8).retrieved == (0,)


def test_cameras_of_another_size_are_refused():
    with pytest.raises(ValueError, match="for 64x48 but the world is 96x64; resize the trajectory"):
        plan(photo(), pinhole((48, 64), FOCAL, 8))


def test_a_trajectory_continues_where_the_world_stands():
    joined = Cameras(torch.cat([camera_at((0.0, 0.0, 0.25)).w2c, AWAY.w2c]), torch.cat([AWAY.K[:1], AWAY.K]), SIZE)
    target, gap = continuation(photo(), joined)
    assert torch.equal(target.w2c, AWAY.w2c) and gap.distance == pytest.approx(0.25)


def test_whole_chunks_are_cut_and_what_is_left_over_is_refused_with_a_way_out():
    chunks = in_chunks(pinhole(SIZE, FOCAL, 24), 8)
    assert [len(c) for c in chunks] == [8, 8, 8]
    with pytest.raises(ValueError, match=r"of 101 cameras .* chunks of 80 frames; pad or retime it to 81"):
        in_chunks(pinhole(SIZE, FOCAL, 100))
    for frames, offered in ((1, 9), (11, 9), (13, 17)):
        with pytest.raises(ValueError, match=rf"of {frames + 1} cameras .*to {offered} "):
            in_chunks(pinhole(SIZE, FOCAL, frames), 8)
    with pytest.raises(ValueError, match="of 1 cameras .*to 9 "):
        in_chunks(pinhole(SIZE, FOCAL, 3)[0:0], 8)


def test_every_eighth_frame_and_the_last_become_keyframes():
    assert keyframe_ids(plan(photo(), pinhole(SIZE, FOCAL, 80))) == list(range(8, 81, 8))
    assert keyframe_ids(plan(photo(), pinhole(SIZE, FOCAL, 10))) == [8, 10]
    assert keyframe_ids(plan(photo(), pinhole(SIZE, FOCAL, 3))) == [3]


# append


def snapshot(world):
    """Everything in a world that could be changed by accident."""
    tensors = [
        t.clone() for c in (world.first, *world.chunks) for t in (c.frames, c.invented, c.cameras.w2c, c.cameras.K)
    ]
    return tensors + [k.depth.clone() for k in world.memory.keyframes], len(world), world.memory.frames, world.keys


def test_a_world_is_unchanged_by_append():
    world = photo()
    tensors, *rest = snapshot(world)
    longer = grown(grown(world, AWAY), BACK)
    after, *rest_after = snapshot(world)
    assert rest == rest_after and all(torch.equal(a, b) for a, b in zip(tensors, after, strict=True))
    assert len(longer) == 17 and longer.first is world.first and longer.memory.keyframes[0] is world.memory.keyframes[0]


def test_append_adds_the_frames_the_cameras_and_the_keyframes(there_and_back):
    _, away, back = there_and_back
    assert len(away) == 9 and away.memory.frames == (0, 8) and back.memory.frames == (0, 8, 16)
    assert back.chunks[0].prompt == "away" and back.chunks[0].settings == {"generator": "preview"}
    assert torch.equal(back.cameras.w2c, torch.cat([camera_at().w2c, AWAY.w2c, BACK.w2c]))
    assert torch.equal(back.last_camera.w2c, BACK.w2c[-1:])
    assert torch.equal(back.frame(9), back.chunks[1].frames[0]) and torch.equal(
        back.invented(8), back.chunks[0].invented[7]
    )
    assert torch.equal(back.memory[16].camera.w2c, BACK.w2c[-1:])
    with pytest.raises(IndexError, match="17 frames"):
        back.frame(17)


def test_a_plan_made_for_another_world_is_refused(there_and_back):
    first, away, back = there_and_back
    for stale in (plan(first, AWAY), plan(back, AWAY), plan(photo(picture(1)), AWAY)):
        with pytest.raises(ValueError, match="another world, or for this one before it grew"):
            append(away, stale, *blank(stale))


def test_append_refuses_what_the_plan_did_not_ask_for():
    world = photo()
    the_plan = plan(world, AWAY)
    frames, invented, depths = blank(the_plan)
    for wrong, says in (
        (frames[:-1], r"uint8 frames \(8, 64, 96, 3\), found torch.uint8 \(7, 64, 96, 3\)"),
        (to_float(frames), "found torch.float32"),
        (frames[:, :16], r"\(8, 16, 96, 3\)"),
    ):
        with pytest.raises(ValueError, match=says):
            append(world, the_plan, wrong, invented, depths)
    for wrong, says in (
        ({}, "found none"),
        ({8: torch.ones(16, 48)}, r"of 96x64, found \(16, 48\)"),
        ({8: torch.full(SIZE, math.nan)}, "of 96x64"),
    ):
        with pytest.raises(ValueError, match=f"frame 8 needs a finite depth.*{says}"):
            append(world, the_plan, frames, invented, wrong)


def test_append_refuses_a_mask_that_does_not_fit_the_frames():
    world = photo()
    the_plan = plan(world, AWAY)
    frames, invented, depths = blank(the_plan)
    for wrong in (invented[:-1], invented[..., None], invented.float()):
        with pytest.raises(ValueError, match="invented"):
            append(world, the_plan, frames, wrong, depths)


def test_a_world_goes_back_to_any_state_it_was_in(there_and_back):
    first, away, back = there_and_back
    assert rewind(back, 2).keys == back.keys and rewind(back, 0).keys == first.keys
    once = rewind(back, 1)
    assert once.keys == away.keys and once.memory.frames == away.memory.frames and len(once) == 9
    assert len(back) == 17
    again = grown(once, BACK, prompt="back")
    assert again.key == back.key  # and can grow the same way again
    for chunks in (-1, 3):
        with pytest.raises(ValueError, match=f"has 2 chunks; it can't be rewound to {chunks}"):
            rewind(back, chunks)


def test_seed_views_survive_going_back():
    world = begin(picture(), room(), camera_at(), [(picture(1), room(), camera_at((1.0, 0.0, 0.0)))])
    assert rewind(grown(world, AWAY), 0).memory.frames == (0, -1)


# keys


def test_the_same_steps_give_the_same_bytes_and_the_same_keys(there_and_back):
    *_, back = there_and_back
    again = grown(grown(photo(), AWAY, prompt="away", settings={"generator": "preview"}), BACK, prompt="back")
    assert again.keys == back.keys and len(set(back.keys)) == 3
    for one, other in zip(again.chunks, back.chunks, strict=True):
        assert torch.equal(one.frames, other.frames) and torch.equal(one.invented, other.invented)
    assert back.key == back.keys[-1] and back.keys[:1] == photo().keys


def changed(tensor, index, value):
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


def test_whatever_differs_in_a_chunk_gives_another_key(there_and_back):
    chunk = there_and_back[1].chunks[0]
    others = [
        replace(chunk, frames=changed(chunk.frames, (3, 4, 5, 0), 7)),
        replace(chunk, invented_bits=~chunk.invented_bits),
        replace(chunk, prompt="elsewhere"),
        replace(chunk, settings={"seed": 1}),
        replace(chunk, cameras=replace(chunk.cameras, w2c=changed(chunk.cameras.w2c, (0, 0, 3), 9.0))),
        replace(chunk, cameras=replace(chunk.cameras, K=changed(chunk.cameras.K, (0, 0, 0), 9.0))),
    ]
    assert len({chunk.key, *(other.key for other in others)}) == 7
    assert replace(chunk).key == chunk.key


def test_whatever_differs_in_the_seed_gives_another_key():
    image, depth, camera = picture(), room(), camera_at()
    view = (picture(1), room(), camera_at((1.0, 0.0, 0.0)))
    worlds = [
        begin(image, depth, camera),
        begin(picture(1), depth, camera),
        begin(image, 2 * depth, camera),
        begin(image, depth, camera_at((0.1, 0.0, 0.0))),
        begin(image, depth, camera, prompt="a room"),
        begin(image, depth, camera, [view]),
        begin(image, depth, camera, [(view[0], 2 * view[1], view[2])]),
    ]
    assert len({world.key for world in worlds}) == len(worlds)


def test_whatever_differs_in_a_further_view_gives_another_key():
    image, depth, camera = picture(1), room(), camera_at((1.0, 0.0, 0.0))
    worlds = [
        begin(picture(), room(), camera_at(), [view])
        for view in ((image, depth, camera), (picture(2), depth, camera), (image, depth, camera_at((2.0, 0.0, 0.0))))
    ]
    assert len({world.key for world in worlds}) == 3


# the preview


def psnr(a, b):
    return -10 * math.log10(float((to_float(a) - to_float(b)).pow(2).mean()) + 1e-12)


def test_a_camera_that_stands_still_sees_the_photo():
    world = photo()
    made = generate(world, plan(world, Cameras(camera_at().w2c.repeat(4, 1, 1), camera_at().K.repeat(4, 1, 1), SIZE)))
    assert (made.frames.int() - world.frame(0).int()).abs().max() <= 1
    assert not made.invented.any()
    assert_close(made.depths[4], room(), rtol=0.02, atol=0)


def test_every_pixel_of_every_frame_is_filled(there_and_back):
    *_, back = there_and_back
    low, high = (255 * bound for bound in (picture().min(), picture().max()))
    for chunk in back.chunks:
        assert low - 2 <= chunk.frames.min() and chunk.frames.max() <= high + 2
        assert 0 < chunk.invented.float().mean() < 0.5
    for frame in (8, 16):
        assert (back.memory[frame].depth > 0).all() and torch.isfinite(back.memory[frame].depth).all()


def test_what_was_seen_shows_what_was_there(there_and_back):
    """A pixel that is not invented has the colour of the photo at the place its surface projects to."""
    first, away, _ = there_and_back
    coordinates = torch.stack(
        torch.meshgrid(torch.linspace(0, 1, SIZE[0]), torch.linspace(0, 1, SIZE[1]), indexing="ij"), -1
    )
    world = begin(torch.cat([coordinates, torch.zeros(*SIZE, 1)], -1), room(), camera_at())
    made = generate(world, plan(world, AWAY))
    frame = made.frames[-1]
    seen = ~made.invented[-1]
    local = (
        torch.linalg.inv(AWAY.K[-1])
        @ torch.stack([*reversed(seen.nonzero().T.float()), torch.ones(int(seen.sum()))])
        * made.depths[8][seen]
    )
    points = torch.linalg.inv(AWAY.w2c[-1]) @ torch.cat([local, torch.ones(1, local.shape[1])])
    x, y, z = camera_at().K[0] @ points[:3]  # the photo was taken at the origin
    expected = torch.stack([y / z / (SIZE[0] - 1), x / z / (SIZE[1] - 1)], 1).clamp(0, 1)
    error = (to_float(frame)[seen][:, :2] - expected).abs().amax(1)
    assert error.quantile(0.98) < 0.02


def red_square_before_blue(distance=1.5):
    """A blue wall 4 away with a red square before it."""
    image, depth = torch.tensor([0.1, 0.2, 0.9]).expand(*SIZE, 3).clone(), torch.full(SIZE, 4.0)
    image[20:44, 36:60] = torch.tensor([0.9, 0.1, 0.1])
    depth[20:44, 36:60] = distance
    return begin(image, depth, camera_at())


@pytest.mark.parametrize("sideways", [0.3, -0.3])
def test_a_hole_behind_the_foreground_continues_the_background(sideways):
    world = red_square_before_blue()
    made = generate(world, plan(world, walk(((0.0, 0.0, 0.0), 0.0), ((sideways, 0.0, 0.0), 0.0), frames=4)))
    beyond = torch.ones(SIZE, dtype=torch.bool)
    beyond[:, 10:-10] = False  # what comes in from the side
    hole = made.invented[-1] & ~beyond
    assert hole.sum() > 100
    colours = to_float(made.frames[-1])[hole]
    assert (colours[:, 2] > 0.7).float().mean() > 0.95 and (colours[:, 0] < 0.3).float().mean() > 0.95
    assert (made.depths[4][hole] > 3).float().mean() > 0.95


def test_the_foreground_keeps_its_colour_and_moves_by_its_parallax():
    world = red_square_before_blue()
    made = generate(world, plan(world, walk(((0.0, 0.0, 0.0), 0.0), ((0.3, 0.0, 0.0), 0.0), frames=4)))
    red = to_float(made.frames[-1])[..., 0] > 0.6
    shift = 0.3 * FOCAL / 1.5
    columns = red[32].nonzero().flatten()
    assert columns.min().item() == pytest.approx(36 - shift, abs=1) and columns.max().item() == pytest.approx(
        59 - shift, abs=1
    )
    assert not made.invented[-1][22:42, round(38 - shift) : round(58 - shift)].any()


def test_beyond_the_photo_its_border_continues():
    image = torch.tensor([0.3, 0.8, 0.4]).expand(*SIZE, 3).clone()
    image[SIZE[0] // 2 :] = torch.tensor([0.8, 0.5, 0.3])  # green above, brown below
    world = begin(image, torch.full(SIZE, 4.0), camera_at())
    made = generate(world, plan(world, walk(((0.0, 0.0, 0.0), 0.0), ((0.0, 0.0, 0.0), 0.5), frames=4)))
    frame, beyond = to_float(made.frames[-1]), made.invented[-1]
    assert 0.2 < beyond.float().mean() < 0.8
    assert frame.min() > 0.28
    assert_close(
        frame[:16][beyond[:16]], torch.tensor([0.3, 0.8, 0.4]).expand(int(beyond[:16].sum()), 3), atol=0.12, rtol=0
    )
    assert_close(
        frame[-16:][beyond[-16:]], torch.tensor([0.8, 0.5, 0.3]).expand(int(beyond[-16:].sum()), 3), atol=0.12, rtol=0
    )


def test_looking_the_other_way_still_gives_a_picture():
    world = photo()
    made = generate(world, plan(world, walk(((0.0, 0.0, 0.0), math.pi - 0.1), ((0.0, 0.0, 0.0), math.pi), frames=2)))
    assert made.invented.all()
    assert (made.depths[2] > 0).all() and torch.isfinite(made.depths[2]).all()


def test_coming_back_shows_the_photo_again_because_it_was_retrieved(there_and_back):
    first, away, back = there_and_back
    forgetful = grown(away, BACK, count=0)
    remembered, forgotten = (psnr(world.frame(16), first.frame(0)) for world in (back, forgetful))
    assert remembered > forgotten + 6
    assert remembered > 35


def test_what_is_made_up_in_one_frame_stays_in_the_others():
    """A camera that turns to where nothing is known and stands there sees one picture."""
    world = photo()
    still = Cameras(camera_at(yaw=0.7).w2c.repeat(9, 1, 1), camera_at().K.repeat(9, 1, 1), SIZE)
    made = generate(world, plan(world, still))
    assert made.invented.float().mean() > 0.3
    off = (made.frames.int() - made.frames[-1].int()).abs().amax(-1)
    assert (off > 2).float().mean() < 2e-3, "but for a few pixels beside silhouettes"


def test_frames_are_made_coarse_to_fine_and_each_once():
    world = photo()
    for frames in (1, 2, 7, 8, 9, 24, 80):
        the_plan = plan(world, pinhole(SIZE, FOCAL, frames))
        order = coarse_to_fine(the_plan)
        keys = [f - the_plan.first_frame for f in keyframe_ids(the_plan)]
        assert sorted(order) == list(range(frames)) and order[0] == frames - 1
        assert sorted(order[: len(keys)]) == keys


def test_progress_is_told_frame_by_frame():
    world, seen = photo(), []
    made = generate(world, plan(world, AWAY), lambda done, total, image: seen.append((done, total, image)))
    assert [s[:2] for s in seen] == [(i, 8) for i in range(1, 9)]
    assert {tuple(s[2].shape) for s in seen} == {(*SIZE, 3)} and torch.equal(seen[0][2], made.frames[-1])


def test_the_photo_is_asked_before_further_views_and_those_before_later_frames():
    view = (picture(1), room(), camera_at((0.5, 0.0, 0.0)))
    world = grown(begin(picture(), room(), camera_at(), [view]), AWAY)
    the_plan = replace(plan(world, BACK), retrieved=(8, -1, 0))
    cameras = [source.camera.w2c[0] for source in remembered_sources(world, the_plan)]
    for found, expected in zip(cameras, (camera_at(), view[2], AWAY[-1:]), strict=True):
        assert torch.equal(found, expected.w2c[0])


def test_a_source_only_adds_the_surfaces_that_no_earlier_one_shows():
    world = photo()
    twice = replace(plan(world, AWAY), retrieved=())
    source = remembered_sources(world, twice)[0]
    again = preview_._source(source.image, source.invented, source.depth, source.camera, [source])
    assert len(source.surface) == (SIZE[0] - 1) * (SIZE[1] - 1) and not len(again.surface)
    look = look_up([source], source.camera)
    assert_close(look.image, source.image, atol=1e-3, rtol=0)
    assert look.found.all() and not look.invented.any()
    assert_close(look.depth, source.depth, rtol=0.02, atol=0)


def test_a_view_is_looked_up_on_the_device_that_its_sources_are_on(there_and_back):
    *_, back = there_and_back
    sources, camera = remembered_sources(back, plan(back, AWAY)), camera_at(yaw=0.7)
    expected = look_up(sources, camera)
    with torch.device("meta"):  # whatever is made without naming a device lands there, and can't be mixed with the rest
        found = look_up(sources, camera)
    assert not found.found.all() and torch.equal(found.image, expected.image)


def test_nothing_behind_shows_through_a_foreground_that_is_magnified():
    world = red_square_before_blue(distance=1.0)
    look = look_up(remembered_sources(world, plan(world, AWAY)), camera_at((0.0, 0.0, 0.7)))
    assert look.found.all() and (look.image[:, 10:86, 0] > 0.8).float().mean() > 0.99  # 24 pixels are 80 from there


def test_the_photo_is_looked_at_even_where_later_frames_show_as_much(there_and_back):
    """Those were resampled from it: its colours must not fade with every return."""
    _, away, back = there_and_back
    later = replace(plan(back, AWAY), retrieved=(8,))
    assert torch.equal(remembered_sources(back, later)[0].depth, back.memory[0].depth)
    alone = remembered_sources(back, replace(later, retrieved=()))
    assert len(alone) == 1 and torch.equal(alone[0].camera.w2c[0], back.last_camera.w2c[0])


# where a path begins


def begun(**changes):
    """A path whose first camera is where the photo was taken, but for the changes, and how far off that is."""
    cameras = AWAY[[0, 0, 0, 0]]
    w2c, K = cameras.w2c.clone(), cameras.K.clone()
    w2c[0], K[:] = photo().last_camera.w2c[0], photo().last_camera.K[0]
    if "turn" in changes:
        w2c[0, :3, :3] = rotation_about_y(math.radians(changes["turn"])).to(w2c)
    if "move" in changes:
        w2c[0, 0, 3] += changes["move"]
    if "zoom" in changes:
        K[:, (0, 1), (0, 1)] *= changes["zoom"]
    if "aside" in changes:
        K[:, 0, 2] += changes["aside"]
    return continuation(photo(), Cameras(w2c, K, SIZE))[1]


def rotation_about_y(angle):
    return torch.tensor([[math.cos(angle), 0, math.sin(angle)], [0, 1, 0], [-math.sin(angle), 0, math.cos(angle)]])


def test_a_path_that_goes_on_where_the_world_stands_is_said_to():
    gap = begun()
    assert not gap.differences and "same place, turn and lens" in str(gap)
    assert not begun(move=1e-5).differences and not begun(turn=0.01).differences and not begun(zoom=1.001).differences


@pytest.mark.parametrize("change, says", [
    (dict(move=0.5), "0.5 scene units away"), (dict(turn=12.0), "turned by 12 degrees"), (dict(turn=-170.0), "by 170 degrees"),
    (dict(zoom=1.2), "focal length 1.2 times as long"), (dict(zoom=0.8), "0.8 times"), (dict(aside=5.0), "5 pixels aside")])
def test_what_the_eye_would_see_of_a_gap_is_said_each_by_itself(change, says):
    gap = begun(**change)
    assert len(gap.differences) == 1 and says in str(gap) and "the first new frame jumps" in str(gap)


def test_several_differences_are_all_said():
    assert len(begun(move=0.5, turn=5.0, zoom=1.2, aside=-3.0).differences) == 4


def test_a_path_of_another_piece_of_the_map_is_compared_where_it_is():
    here, there = (448000.0, 5411000.0, 100.0), (448001.0, 5411000.0, 100.0)
    first = photo()
    first = replace(first, first=replace(first.first, cameras=replace(first.first.cameras, origin=here)))
    path = replace(AWAY, w2c=AWAY.w2c.clone(), origin=there)
    path.w2c[:] = first.last_camera.w2c[0]
    path.w2c[:, 0, 3] += 1          # a metre to the left of its own origin is that of the other
    target, gap = continuation(first, path)
    assert not gap.differences and target.origin == here
    assert_close(plan(first, path[1:3]).target.w2c, first.last_camera.w2c.expand(2, 4, 4))
