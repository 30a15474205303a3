"""What a language model is shown and asked about the next chunk."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from lyra_core.cameras.camera import Cameras, join, pinhole
from lyra_core.memory.retrieval import retrieve
from lyra_core.memory.warp import lift, merge, splat
from lyra_core.world import preview
from lyra_core.world.caption import caption_pictures, caption_prompt
from lyra_core.world.world import World, begin, to_float

SIZE, FOCAL = (32, 48), 40.0


def path(frames: int, turn: float = 0.0) -> Cameras:
    """Forward, turning to the right."""
    cameras, yaw = pinhole(SIZE, FOCAL, frames), torch.linspace(0, turn, frames)
    cameras.w2c[:, 0, 0], cameras.w2c[:, 0, 2] = yaw.cos(), -yaw.sin()
    cameras.w2c[:, 2, 0], cameras.w2c[:, 2, 2] = yaw.sin(), yaw.cos()
    cameras.w2c[:, 2, 3] = -torch.linspace(0, 0.6, frames)
    return cameras


def photo_world() -> World:
    picture = 0.2 + 0.8 * torch.rand(*SIZE, 3, generator=torch.Generator().manual_seed(1))
    return begin(picture, torch.full(SIZE, 3.0), pinhole(SIZE, FOCAL))


@pytest.fixture(scope="module")
def walked() -> World:
    """Sixteen frames on, and the newest one as bright as a VAE may make it."""
    grown = preview.explore(photo_world(), path(17, 0.5), chunk_frames=8)
    last = grown.chunks[-1]
    newest = (to_float(last.frames[-1]) * 2 - 1) * 1.5
    return replace(grown, chunks=(*grown.chunks[:-1], replace(last, newest=newest)))


def test_first_the_photo_then_the_newest_frame_then_the_views(walked):
    pictures = caption_pictures(walked, path(80))
    assert pictures.shape == (6, *SIZE, 3) and pictures.min() >= 0 and pictures.max() <= 1
    assert_close(pictures[0], walked.exact(0) * 0.5 + 0.5)
    assert_close(pictures[1], (walked.chunks[-1].newest * 0.5 + 0.5).clamp(0, 1))
    assert not torch.equal(pictures[0], pictures[1])


@pytest.mark.parametrize(
    "frames, projections, poses",
    [(80, 4, [19, 39, 59, 79]), (80, 3, [26, 52, 79]), (81, 4, [20, 40, 60, 80]), (2, 4, [0, 1]), (1, 4, [0])],
)
def test_the_views_are_spread_over_the_path_and_end_where_it_ends(walked, frames, projections, poses):
    target = path(frames, 1.0)
    assert poses == sorted(set(torch.linspace(0, frames - 1, projections + 1).long()[1:].tolist()))
    pictures = caption_pictures(walked, target, projections)
    known = dict.fromkeys([16, *retrieve(walked.memory, target[poses[-1:]], 2)])
    points = merge(*(lift(walked.memory[f].depth, walked.memory[f].camera, walked.exact(f) * 0.5 + 0.5) for f in known))
    expected = splat(points, target[poses]).features.clamp(0, 1)
    assert len(pictures) == 2 + len(poses)
    assert_close(pictures[2:], expected)


def test_the_newest_frame_and_at_most_two_others_are_warped(walked, monkeypatch):
    from lyra_core.world import caption

    lifted, asked = [], []
    monkeypatch.setattr(caption, "lift", lambda *args: lifted.append(args) or lift(*args))
    monkeypatch.setattr(caption, "retrieve", lambda *args: asked.append(args) or retrieve(*args))
    target = path(80, 1.0)
    caption_pictures(walked, target)
    ((memory, seen_from, count),) = asked
    assert memory is walked.memory and count == 2 and torch.equal(seen_from.w2c, target.w2c[-1:])
    assert torch.equal(lifted[0][0], walked.memory[16].depth) and 2 <= len(lifted) <= 3
    lifted.clear()
    caption_pictures(photo_world(), target)
    assert len(lifted) == 1  # the photo is the newest frame too, and comes once


def test_black_where_nothing_is_known():
    world = photo_world()
    back = path(2, torch.pi)[1:]
    assert (caption_pictures(world, back)[2:] == 0).all()
    aside = caption_pictures(world, join(path(1), path(5, 0.6)))
    black = (aside[2:] == 0).all(-1)
    assert black[-1].any() and not black[-1].all() and not (aside[0] == 0).all(-1).any()


@pytest.mark.parametrize("pictures", [3, 4, 6, 9])
def test_the_prompt_refers_to_every_picture_and_leaves_the_turn_to_the_model(pictures):
    text = caption_prompt(pictures)
    assert text.count("<|vision_start|><|image_pad|><|vision_end|>") == text.count("<|image_pad|>") == pictures
    assert text.startswith("<|im_start|>user\n") and text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert text.count("<|im_start|>") == 2 and text.count("<|im_end|>") == 1
    assert text.index("photo that the scene began with") < text.index("newest frame")
    for view in range(1, pictures - 1):
        assert text.count(f"View {view} ahead") == 1
    assert f"View {pictures - 1} ahead" not in text


def test_a_hint_is_asked_for_once_and_none_leaves_no_trace():
    plain, hinted = caption_prompt(6), caption_prompt(6, "  a red telescope\n")
    assert hinted.count("a red telescope") == 1 and hinted.count("must contain") == 1
    assert "must contain this, as a natural part of the scene: a red telescope\n" in hinted
    assert plain == caption_prompt(6, " \n") and "must contain" not in plain and "{" not in plain
    assert (
        hinted.replace(
            "What comes newly into view must contain this, as a natural part of the scene: a red telescope\n", ""
        )
        == plain
    )


def test_the_wording_asks_for_a_prompt_of_its_length_and_nothing_else():
    text = caption_prompt(6)
    for asked in ("80 to 100 words", "Answer with the prompt alone", "does not move"):
        assert text.count(asked) == 1
