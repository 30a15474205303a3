"""Frames of a video that a world begins from: by how far the view moves, sharp ones, up to the first cut."""

from __future__ import annotations

import importlib
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lyra_core.memory import video_frames
from lyra_core.memory.video_frames import Motion, chosen, measured

SIZE = (120, 200)


@pytest.fixture(scope="module")
def walked(scenes):
    """Frames of a walk to the right that is slow first and fast later, and where each was taken."""
    x = 0.9 * np.linspace(0, 1, 40) ** 2
    cameras = scenes.standing([(float(a), 0.0, 0.0) for a in x], SIZE, 140.0)
    return (scenes.traced(scenes.FURNISHED, cameras)[0] * 255).to(torch.uint8), x


def test_frames_are_equally_far_apart_however_fast_the_walk_was(walked):
    frames, x = walked
    found = chosen(measured(frames), 6)
    steps = np.diff(x[found])
    assert 5 <= len(found) <= 6 and found[0] < 10 and found[-1] > 34
    assert steps.max() < 2.5 * steps.min(), "equal steps in time would be 9 times as far at the end"


def test_a_walk_has_parallax_and_a_turn_has_none(walked, scenes):
    turned = scenes.standing([(0.0, 0.0, 0.0, float(a)) for a in np.linspace(0, 12, 25)], SIZE, 140.0)
    turn = measured((scenes.traced(scenes.FURNISHED, turned)[0] * 255).to(torch.uint8))
    walk = measured(walked[0])
    assert walk.parallax > 0.01 > 3 * turn.parallax and turn.way[-1] > 0.1


def test_a_blurred_frame_is_passed_over(walked):
    frames, _ = walked
    before = chosen(measured(frames), 6)
    blurred = frames.clone()
    soft = F.avg_pool2d(frames[before[2]].movedim(-1, 0)[None].float(), 7, 1, 3, count_include_pad=False)[0].movedim(0, -1)
    blurred[before[2]] = soft.to(torch.uint8)
    assert before[2] not in chosen(measured(blurred), 6)


def test_what_follows_a_cut_is_another_place(walked, scenes):
    frames, _ = walked
    elsewhere = scenes.Room(scenes.box(-9, -4, -2, 7, 3, 20), ())
    other = (scenes.traced(elsewhere, scenes.standing([(3, -1, 1, 130, 20)], SIZE, 140.0))[0] * 255).to(torch.uint8)
    noise = torch.randint(0, 256, (1, *SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert not measured(frames).cut
    for shot in (other, noise):
        motion = measured([*frames, *shot.expand(4, *SIZE, 3)])
        assert motion.cut and len(motion.way) == 40


@pytest.mark.parametrize("frames", [torch.zeros(8, *SIZE, 3, dtype=torch.uint8), None])
def test_a_video_that_stands_still_is_refused(walked, frames):
    frames = walked[0][:1].expand(8, *SIZE, 3) if frames is None else frames
    with pytest.raises(ValueError, match="of its width only, up to frame .*take one of its frames as a photo"):
        chosen(measured(frames), 8)


def test_a_long_walk_is_not_spread_so_thin_that_frames_no_longer_overlap():
    motion = Motion(np.linspace(0, 20, 400), 1.0, np.ones(400), False)
    found = chosen(motion, 8)
    assert len(found) == 8 and np.diff(motion.way[found]).max() < 1.6 * video_frames.STEP


def test_other_counts_are_refused_and_an_empty_video_too():
    with pytest.raises(ValueError, match="choose 5 to 10"):
        chosen(Motion(np.linspace(0, 1, 9), 0.1, np.ones(9), False), 12)
    with pytest.raises(ValueError, match="has no frame"):
        measured([])


def test_the_node_takes_those_frames_of_a_file_and_says_which(pack, walked, tmp_path):
    from comfy_api.latest import InputImpl

    node, video = importlib.import_module("lyra_pack.nodes.photos"), importlib.import_module("lyra_pack.nodes.video")
    video.encode(str(tmp_path / "walk.mp4"), walked[0], Fraction(16), crf=10)
    images, report = node.PickFrames.execute(InputImpl.VideoFromFile(str(tmp_path / "walk.mp4")), 6).args
    numbers = [int(n) for n in report.splitlines()[0].removeprefix("frames ").split(", ")]
    assert len(images) == len(numbers) >= 5
    assert float((images - walked[0][numbers].float() / 255).abs().mean()) < 0.02
