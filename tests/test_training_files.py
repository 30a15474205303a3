"""Training sets and trainings on disk: read as they were written, refused by name, gone on with as if nothing had ended them."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from learners import ENCODERS, SMALL, Painter, wall
from torch.testing import assert_close

from lyra_core import files
from lyra_core.cameras.camera import pinhole
from lyra_core.training import optimisation, sets, state
from lyra_core.training.examples import prepared
from lyra_core.training.loop import Course, LossError, train
from lyra_core.world.preview import generate
from lyra_core.world.world import append, begin, plan

COURSE = Course(steps=6, rate=1e-2, warm_up=2, save_every=1e9)


# ---------------------------------------------------------------------------------------------------------------- sets


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    for number in (10, 2):
        scene = wall(17, name=f"scene_{number}", seed=number)
        sets.add(folder, replace(scene, cameras=replace(scene.cameras, origin=(3e6, 0.5, 0.0))), {"scene": number}, 8)
    return folder


def test_a_set_is_read_as_it_was_written(folder):
    samples = sets.read(folder)
    assert [sample.name for sample in samples] == ["scene_2", "scene_10"]
    written = wall(17, name="scene_2", seed=2)
    assert torch.equal(samples[0].frames, written.frames)
    assert samples[0].cameras.origin == (3e6, 0.5, 0.0)
    assert torch.equal(samples[0].cameras.w2c, written.cameras.w2c) and torch.equal(samples[0].cameras.K, written.cameras.K)
    assert samples[0].captions == written.captions and samples[0].depths.keys() == written.depths.keys()
    assert all(torch.equal(samples[0].depths[frame], depth) for frame, depth in written.depths.items())


def test_latents_are_kept_beside_a_video_and_used_by_the_codec_that_made_them(tmp_path):
    sample = prepared(wall(17), ENCODERS.codec, SMALL)
    sets.add(tmp_path, sample, {}, 8)
    sets.keep_latents(tmp_path, sample)
    found = sets.read(tmp_path)[0]
    assert torch.equal(found.latents.stream, sample.latents.stream)
    assert prepared(found, ENCODERS.codec, SMALL) is found
    assert prepared(found, ENCODERS.codec, replace(SMALL, still=9)).latents.stream.shape[1] == 13
    assert sets.names(tmp_path) == ["wall"]


def test_a_video_that_is_there_is_not_made_again(folder):
    assert sets.holds(folder, "scene_2", {"scene": 2})
    assert not sets.holds(folder, "scene_2", {"scene": 3}) and not sets.holds(folder, "scene_3", {"scene": 3})


def test_a_world_brings_all_that_is_learned_from(tmp_path):
    camera = pinhole((32, 48), 40.0)
    world = begin(wall(1).picture(0) / 2 + 0.5, torch.full((32, 48), 4.0), camera, prompt="a wall")
    planned = plan(world, wall(9).cameras[1:])
    made = generate(world, planned)
    world = append(world, planned, made.frames, made.invented, made.depths, "further on", {"generator": "geometry preview"})
    sample = sets.of_world(world, "home")
    assert len(sample) == 9 and sample.captions == {0: "a wall", 1: "further on"}
    assert torch.equal(sample.frames[5], world.frame(5)) and sorted(sample.depths) == [0, 8]
    assert "the geometry preview made all of it" in "\n".join(sets.remarks(world, "home"))
    assert sets.remarks(replace(world, chunks=(replace(world.chunks[0], settings={"generator": "lyra2"}),)), "home") == [
        "home: chunks by lyra2"
    ]
    sets.add(tmp_path, sample, {"world": world.key}, 8)
    assert torch.equal(sets.read(tmp_path)[0].frames, sample.frames)


def test_videos_that_do_not_fit_are_refused_by_name(folder, tmp_path):
    with pytest.raises(sets.SetError, match="large is 64x32 and the set 48x32; a set has one size"):
        sets.add(folder, wall(17, (32, 64), name="large"), {}, 8)
    bare = wall(25, name="bare")
    with pytest.raises(sets.SetError, match=r"bare: frame 8 has no depth \(and 1 more\), where a chunk begins"):
        sets.add(tmp_path, replace(bare, depths={0: bare.depths[0]}), {}, 8)
    with pytest.raises(ValueError, match="short: 5 frames are too few"):
        sets.add(tmp_path, wall(5, name="short"), {}, 8)
    for name in ("", "a/b", "..", ".hidden", "a\0b"):
        with pytest.raises(sets.SetError, match="no name for a video"):
            sets.add(tmp_path, wall(17, name=name), {}, 8)
    with pytest.raises(sets.SetError, match="there is no such training set"):
        sets.read(tmp_path / "none")
    with pytest.raises(sets.SetError, match="is empty; add worlds"):
        sets.read(tmp_path)


def test_sets_that_were_put_together_of_several_sizes_are_refused(folder, tmp_path):
    sets.add(tmp_path, wall(17, name="small"), {}, 8)
    sets.add(tmp_path / "other", wall(17, (32, 64), name="wide"), {}, 8)
    for file in (tmp_path / "other").iterdir():
        file.rename(tmp_path / file.name)
    with pytest.raises(sets.SetError, match="small is 48x32 and wide 64x32"):
        sets.read(tmp_path)


def test_damage_is_named(tmp_path):
    record = sets.add(tmp_path, wall(17), {}, 8)
    tensors, content, said = tmp_path / "wall.safetensors", (tmp_path / "wall.safetensors").read_bytes(), record.read_text()
    tensors.write_bytes(content[:-7])
    with pytest.raises(files.FileError, match="instead of"):
        sets.read(tmp_path)
    tensors.unlink()
    with pytest.raises(files.FileError, match="is gone"):
        sets.read(tmp_path)
    tensors.write_bytes(content)
    for text in ("[]", "{}", said.replace('"version": 1', '"version": 9'), said.replace('"frames": 17', '"frames": 16'), said[:-9]):
        record.write_text(text)
        with pytest.raises(files.FileError, match="wall"):
            sets.read(tmp_path)


def test_a_full_disk_leaves_what_was_there(folder, monkeypatch):
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="Free some space"):
        sets.add(folder, wall(17, name="more"), {}, 8)
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before


# ------------------------------------------------------------------------------------------------------------- trainings


@pytest.fixture(scope="module")
def sample():
    return prepared(wall(25), ENCODERS.codec, SMALL)


def learn(sample, file=None, course=COURSE, painter=None, **more):
    painter = painter or Painter()
    weights = optimisation.trained(painter, optimisation.everything)
    return train([sample], painter, ENCODERS, SMALL, weights, course, file, **more)


def same(one, other) -> bool:
    parts = ((one.weights, other.weights), (one.moments, other.moments))
    equal = all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in parts)
    return equal and torch.equal(one.random, other.random) and one.losses == other.losses and one.step == other.step


def test_going_on_is_never_having_stopped(sample, tmp_path):
    whole, file = learn(sample), tmp_path / "training.safetensors"
    learn(sample, file, replace(COURSE, steps=2))
    learn(sample, file, replace(COURSE, steps=3))
    assert same(learn(sample, file), whole)
    assert same(state.load(file), whole) and len(whole.losses) == 6


class Stopped(Exception):
    """Somebody pressed Stop."""


def test_a_stop_within_a_step_loses_nothing_of_the_steps_before(sample, tmp_path):
    file, seen, asked = tmp_path / "training.safetensors", [], []

    def pause():
        asked.append(len(seen))
        if len(seen) == 2 and asked.count(2) == 2:
            raise Stopped

    with pytest.raises(Stopped):
        learn(sample, file, on_step=seen.append, pause=pause)
    assert state.load(file).step == len(seen) == 2
    assert same(learn(sample, file), learn(sample))


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_state(sample, tmp_path):
    file, painter = tmp_path / "training.safetensors", Painter()

    def spoil(step):
        if step.number == 3:
            with torch.no_grad():
                painter.head.weight.fill_(float("nan"))

    with pytest.raises(LossError, match="the loss of step 4 is nan"):
        learn(sample, file, replace(COURSE, save_every=0.0), painter, on_step=spoil)
    kept = state.load(file)
    assert kept.step == 3 and kept.finite and len(kept.losses) == 3
    assert same(learn(sample, file, replace(COURSE, save_every=0.0)), learn(sample))


def test_a_training_with_other_settings_or_weights_is_not_gone_on_with(sample, tmp_path):
    file = tmp_path / "training.safetensors"
    learn(sample, file, replace(COURSE, steps=1))
    with pytest.raises(ValueError, match="rate was 0.01 and is 0.02"):
        learn(sample, file, replace(COURSE, rate=0.02))
    painter = Painter()
    weights = optimisation.trained(painter, optimisation.matching("head"))
    with pytest.raises(ValueError, match="of other weights: patch_embedding.bias, patch_embedding.weight differ"):
        train([sample], painter, ENCODERS, SMALL, weights, COURSE, file)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(files.FileError, match="training.safetensors"):
        learn(sample, file)
    sets.add(tmp_path / "set", wall(17), {}, 8)
    with pytest.raises(state.StateError, match="is no training of this version"):
        state.load(tmp_path / "set" / "wall.safetensors")


def test_a_full_disk_while_training_keeps_the_file_of_before(sample, tmp_path, monkeypatch):
    file = tmp_path / "training.safetensors"
    learn(sample, file, replace(COURSE, steps=2))
    content = file.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="Free some space"):
        patched.setattr(os, "fsync", full)
        learn(sample, file, replace(COURSE, steps=4))
    assert file.read_bytes() == content and list(tmp_path.iterdir()) == [file]


def test_killing_a_training_loses_at_most_what_was_not_saved(sample, tmp_path):
    file = tmp_path / "training.safetensors"
    child = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        import test_training_files as t
        t.learn(t.prepared(t.wall(25), t.ENCODERS.codec, t.SMALL), Path(sys.argv[1]), t.replace(t.COURSE, steps=10**6, save_every=0.0))
        """
    )
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])}
    process = subprocess.Popen([sys.executable, "-c", child, str(file)], env=environment)
    deadline = time.monotonic() + 120
    while not (file.exists() and state.load(file).step >= 3) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = state.load(file).step
    course = replace(COURSE, steps=reached + 2)
    assert reached >= 3 and same(learn(sample, file, course), learn(sample, course=course))


def test_batches_accumulate_their_examples(sample):
    shown = []

    class Counting(Painter):
        def forward(self, noisy, timesteps, condition):
            shown.append(len(noisy))
            return super().forward(noisy, timesteps, condition)

    course = replace(COURSE, steps=1, batch=3, at_once=2)
    recipe = replace(SMALL, self_augmented=0.0)
    painter = Counting()
    found = train([sample], painter, ENCODERS, recipe, optimisation.trained(painter, optimisation.everything), course)
    assert shown == [2, 1] and len(found.losses) == 1
    with pytest.raises(ValueError, match="each must be 1 at least"):
        replace(COURSE, batch=1, at_once=2)
    with pytest.raises(ValueError, match="must be positive"):
        replace(COURSE, rate=0.0)


def test_settings_are_plain_json(tmp_path):
    told = COURSE.settings(SMALL)
    assert json.loads(json.dumps(told)) == told
    assert_close(told["rate"], 0.01)
