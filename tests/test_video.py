"""A world as the host's VIDEO: the frames, in any order, after other videos, and never all of them in memory."""

from __future__ import annotations

import json
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from lyra_core.cameras.camera import pinhole
from lyra_core.world import world as worlds

SIZE = (64, 96)


def shade(frame: int) -> int:
    return 20 + frame * 12


def world_of(frames: int, size=SIZE) -> worlds.World:
    """Frame number f is grey of `shade(f)`; as many frames as wanted share the bytes of few."""
    camera = pinhole(size, 50.0)
    first = torch.full((*size, 3), shade(0) / 255)
    world = worlds.begin(first, torch.full(size, 2.0), camera)
    target = pinhole(size, 50.0, frames - 1)
    plan = worlds.plan(world, target)
    made = torch.stack([torch.full((*size, 3), shade(f % 16), dtype=torch.uint8) for f in range(1, frames)])
    depths = {i: torch.full(size, 2.0) for i in worlds.keyframe_ids(plan)}
    return worlds.append(world, plan, made, torch.zeros(made.shape[:3], dtype=torch.bool), depths)


@pytest.fixture(scope="module")
def world():
    return world_of(10)


@pytest.fixture
def node(pack):
    return pack.video.WorldVideo


def video_of(node, world, first=0, count=0, backwards=False, fps=16.0, **more):
    return node.execute(world, first, count, backwards, fps, **more).args[0]


def shades(file) -> list[int]:
    """Which frame of the world each frame of a file shows."""
    with av.open(file) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert all(picture.shape == (*SIZE, 3) for picture in pictures)
    return [round((float(np.median(picture)) - 20) / 12) for picture in pictures]


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({}, [*range(10)]),
        ({"first": 7}, [7, 8, 9]),
        ({"first": 2, "count": 3, "backwards": True}, [4, 3, 2]),
        ({"first": 8, "count": 99}, [8, 9]),
    ],
)
def test_the_chosen_frames_are_saved_in_the_order_asked_for(node, world, tmp_path, settings, shown):
    video = video_of(node, world, **settings)
    video.save_to(str(tmp_path / "a.mp4"))
    assert shades(str(tmp_path / "a.mp4")) == shown
    assert video.get_frame_count() == len(shown) and video.get_dimensions() == SIZE[::-1]


def test_the_components_are_the_frames_exactly(node, world):
    parts = video_of(node, world, fps=23.976).get_components()
    assert torch.equal(parts.images, torch.stack([worlds.to_float(world.frame(i)) for i in range(10)]))
    assert parts.frame_rate == Fraction(23976, 1000) and parts.audio is None


def test_one_video_after_another_of_any_kind(node, world, tmp_path):
    from comfy_api.latest import InputImpl, Types

    there = video_of(node, world, first=1)
    both = video_of(node, world, count=4, backwards=True, before=there)
    both.save_to(str(tmp_path / "both.mp4"))
    assert shades(str(tmp_path / "both.mp4")) == [*range(1, 10), 3, 2, 1, 0] and both.get_frame_count() == 13
    from_file = video_of(node, world, count=2, before=InputImpl.VideoFromFile(str(tmp_path / "both.mp4")))
    from_file.save_to(str(tmp_path / "more.mp4"))
    assert shades(str(tmp_path / "more.mp4")) == [*range(1, 10), 3, 2, 1, 0, 0, 1] and from_file.get_frame_count() == 15
    part = InputImpl.VideoFromFile(str(tmp_path / "both.mp4")).as_trimmed(2 / 16, 3 / 16)
    trimmed = video_of(node, world, count=1, before=part)
    assert [shade(i) for i in (3, 4, 5, 0)] == pytest.approx([float(f.float().median()) for f in trimmed.frames()], abs=4)
    assert trimmed.get_frame_count() == 4
    images = torch.full((2, *SIZE, 3), shade(5) / 255)
    batch = InputImpl.VideoFromComponents(Types.VideoComponents(images=images, frame_rate=Fraction(16)))
    after = video_of(node, world, count=1, before=batch)
    assert [int(f[0, 0, 0]) for f in after.frames()] == [shade(5), shade(5), shade(0)]


def test_a_turned_video_of_a_phone_is_shown_upright(node, world, tmp_path):
    """A file that says `turn me by 90 degrees` is compared and shown as the host shows it."""
    from comfy_api.latest import InputImpl

    upright = world_of(3, SIZE[::-1])
    video_of(node, upright).save_to(str(tmp_path / "portrait.mp4"))
    raw = (tmp_path / "portrait.mp4").read_bytes()
    plain = np.array([1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30], ">i4").tobytes()
    turned = np.array([0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30], ">i4").tobytes()
    at = raw.index(plain, raw.index(b"tkhd"))
    (tmp_path / "turned.mp4").write_bytes(raw[:at] + turned + raw[at + len(plain) :])
    turned = InputImpl.VideoFromFile(str(tmp_path / "turned.mp4"))
    assert turned.get_components().images.shape[1:3] == SIZE
    assert [tuple(f.shape) for f in video_of(node, world, count=1, before=turned).frames()] == [(*SIZE, 3)] * 4


@pytest.mark.parametrize(
    ("frames", "size", "fps", "message"),
    [
        (3, (48, 96), 16.0, "`before` is 96x48 and the world 96x64; resize"),
        (3, SIZE, 24.0, "24 frames a second and this video 16; set `fps` to 24"),
    ],
)
def test_a_video_that_does_not_fit_before_this_one_is_refused(node, world, frames, size, fps, message):
    other = video_of(node, world_of(frames, size), fps=fps)
    with pytest.raises(ValueError, match=message):
        video_of(node, world, before=other)


def test_no_frames_are_refused(node, world):
    with pytest.raises(ValueError, match="has 10 frames; there is none from 10 on"):
        video_of(node, world, first=10)


def test_metadata_quality_and_depth_are_those_asked_for(node, world, tmp_path):
    video = video_of(node, world)
    video.save_to(str(tmp_path / "fine.mp4"), "mp4", "h264", {"prompt": {"1": "é"}, "workflow": [1]}, 10, 1.0)
    with av.open(str(tmp_path / "fine.mp4")) as container:
        assert json.loads(container.metadata["prompt"]) == {"1": "é"} and container.metadata["workflow"] == "[1]"
        assert container.streams.video[0].format.name == "yuv420p10le"
    raw = (tmp_path / "fine.mp4").read_bytes()
    assert raw.index(b"moov") < raw.index(b"mdat"), "it must play before all of it has come"
    with pytest.raises(ValueError, match="vp9"):
        video.save_to(str(tmp_path / "a.mp4"), codec="vp9")
    with pytest.raises(ValueError, match="webm"):
        video.save_to(str(tmp_path / "a.mp4"), format="webm")


def test_the_host_streams_and_trims_it(node, world):
    video = video_of(node, world)
    source = video.get_stream_source()
    assert isinstance(source, BytesIO) and shades(source) == [*range(10)]
    for window, shown in (((2 / 16, 3 / 16), [2, 3, 4]), ((-2 / 16, 0), [8, 9]), ((8 / 16, 1), [8, 9])):
        part = video.as_trimmed(*window)
        assert shades(part.get_stream_source()) == shown and part.get_duration() == len(shown) / 16
    assert shades(video.as_trimmed(3 / 16, 0).as_trimmed(1 / 16, 2 / 16).get_stream_source()) == [4, 5]
    assert video.as_trimmed(8 / 16, 1, strict_duration=True) is None and video.as_trimmed(1, 0) is None


def test_a_video_that_fails_leaves_no_file(node, world, tmp_path, pack):
    def breaks():
        yield world.frame(0)
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        pack.video.encode(str(tmp_path / "a.mp4"), breaks(), Fraction(16))
    with pytest.raises(ValueError, match="no frame"):
        pack.video.encode(str(tmp_path / "a.mp4"), iter(()), Fraction(16))
    assert not list(tmp_path.iterdir())


def peak_mib() -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def test_saving_a_long_world_holds_a_few_of_its_frames_only(node, tmp_path):
    """500 frames of 256x144 are 211 MiB of floats."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is measured on Linux")
    world = world_of(500, (144, 256))
    video = video_of(node, world, before=video_of(node, world, backwards=True))
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = peak_mib()
    video.save_to(str(tmp_path / "long.mp4"))
    with av.open(str(tmp_path / "long.mp4")) as container:
        assert container.streams.video[0].frames == 1000
    assert peak_mib() - before < 60
