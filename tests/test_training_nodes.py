"""Lyra2TrainingSet and Lyra2TrainLoRA: sets of worlds, scans and videos, and what is learned of them, with tiny networks."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from learners import wall
from PIL import Image

from lyra_core.memory.depth import DepthMap
from lyra_core.memory.depth_alignment import Estimate
from lyra_core.training import sets
from lyra_core.world.preview import generate
from lyra_core.world.world import append, begin, plan

SIZE, CHUNK = (16, 32), 8
NET = {"rank": 4, "dim": 24, "ffn_dim": 24, "num_heads": 2, "num_layers": 1, "text_dim": 16, "freq_dim": 32}
LAYOUT = "f1k1f1s1f1k2f1k1_g2"  # chunks of 8 frames


@pytest.fixture(scope="module")
def training(pack):
    return importlib.import_module(f"{pack.__name__}.training")


@pytest.fixture(scope="module")
def world():
    video = wall(17, SIZE)
    grown = begin(video.picture(0) / 2 + 0.5, video.depths[0], video.cameras[:1], prompt="a wall")
    for first in (1, 9):
        planned = plan(grown, video.cameras[first : first + CHUNK])
        made = generate(grown, planned)
        grown = append(grown, planned, made.frames, made.invented, made.depths, "more wall", {"generator": "geometry preview"})
    return grown


@pytest.fixture
def add(training, comfy_host):
    def add(kind, name, folder="training/test", chunk=CHUNK, **inputs):
        return training.TrainingSet.execute({"source": kind, **inputs}, folder, name, chunk).args

    yield add
    for file in (comfy_host / "output").rglob("*.*"):
        if file.is_file():
            file.unlink()


def seen(frames, cameras, known, on_step=None):
    """Knows that it looks at a wall, and sees everything at twice its size."""
    w2c = cameras.w2c.clone()
    w2c[:, :3, 3] *= 2
    return Estimate((8 - 2 * cameras.centers[:, 2]).view(-1, 1, 1).expand(-1, *cameras.size), replace(cameras, w2c=w2c))


def video_of(sample):
    from comfy_api.latest import InputImpl, Types

    return InputImpl.VideoFromComponents(Types.VideoComponents(images=sample.frames.float() / 255, frame_rate=Fraction(16)))


def test_a_world_is_added_once_and_its_remarks_are_said(training, add, world):
    place, cameras, report = add(training.WORLD, "home", world=world)
    assert "home: the geometry preview made all of it" in report and "home: 17 frames, depth of 3" in report
    assert torch.equal(sets.read(place)[0].frames[0], world.frame(0))
    written = (place / "home.safetensors").stat().st_mtime_ns
    assert "home is there already" in add(training.WORLD, "home", world=world)[2]
    assert torch.equal(cameras.w2c, world.cameras.w2c) and torch.equal(add(training.NOTHING, "x")[1].K, world.cameras.K)
    assert (place / "home.safetensors").stat().st_mtime_ns == written


def test_a_video_brings_cameras_and_depth_or_has_it_estimated(training, add):
    sample = wall(17, SIZE)
    given = tuple(DepthMap(sample.depths.get(i, sample.depths[0]), sample.cameras.K[i], "given") for i in range(17))
    both = {"video": video_of(sample), "cameras": sample.cameras, "caption": '{"0": "a wall", "9": "more"}'}
    place, _cameras, _report = add(training.VIDEO, "given", **both, depth=given)
    add(training.VIDEO, "estimated", **both, depth_estimator=seen)
    estimated, known = sets.read(place)
    assert known.captions == {0: "a wall", 9: "more"} and list(known.depths) == [0, 8, 16]
    for frame in (0, 8, 16):
        torch.testing.assert_close(known.depths[frame], sample.depths[frame])
        torch.testing.assert_close(estimated.depths[frame], sample.depths[frame], atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="bare: no depth is known"):
        add(training.VIDEO, "bare", **both)
    with pytest.raises(ValueError, match="the video has 17 frames, but there are 16 cameras"):
        add(training.VIDEO, "short", **{**both, "cameras": sample.cameras[:16]}, depth=given)
    large = wall(17, (32, 32))
    with pytest.raises(ValueError, match="large is 32x32 and the set 32x16; a set has one size"):
        add(training.VIDEO, "large", video=video_of(large), cameras=large.cameras, caption="", depth_estimator=seen)


def scan_of(sample, folder):
    """A transforms.json with its pictures."""
    folder.mkdir(exist_ok=True)
    frames = []
    for i in range(len(sample)):
        Image.fromarray(sample.frames[i].numpy()).save(folder / f"{i}.png")
        c2w = sample.cameras.c2w[i] @ torch.diag(torch.tensor([1.0, -1, -1, 1]))
        frames.append({"file_path": f"{i}.png", "transform_matrix": c2w.tolist()})
    K = sample.cameras.K[0]
    lens = {"fl_x": 40.0, "fl_y": 40.0, "cx": float(K[0, 2]) + 0.5, "cy": float(K[1, 2]) + 0.5, "w": SIZE[1], "h": SIZE[0]}
    (folder / "transforms.json").write_text(json.dumps({**lens, "frames": frames}))
    return folder / "transforms.json"


def test_a_scan_is_read_with_its_pictures(training, add, comfy_host):
    sample = wall(9, SIZE)
    scan_of(sample, comfy_host / "input" / "scan")
    scan = {"file": "scan/transforms.json", "width": SIZE[1], "height": SIZE[0], "caption": "", "depth_estimator": seen}
    place, _cameras, _report = add(training.SCAN, "scan", **scan)
    found = sets.read(place)[0]
    assert len(found) == 9 and list(found.depths) == [0, 8]
    torch.testing.assert_close(found.cameras.K, sample.cameras.K)
    assert (found.frames.int() - sample.frames.int()).abs().max() <= 1


@pytest.mark.parametrize("given", [True, False])
def test_a_short_video_is_walked_there_and_back(training, add, given):
    sample = wall(6, SIZE)
    known = {"depth": tuple(DepthMap(torch.full(SIZE, 1.0 + i), sample.cameras.K[i], "given") for i in range(6))}
    known = known if given else {"depth_estimator": seen}
    place, cameras, report = add(training.VIDEO, "clip", video=video_of(sample), cameras=sample.cameras, caption="", **known)
    assert "clip: 6 frames are fewer than a chunk of 8 after the first one, so walked there and back" in report
    found, ids = sets.read(place)[0], [0, 1, 2, 3, 4, 5, 4, 3, 2]
    assert len(found) == 9
    assert (found.frames.int() - sample.frames[ids].int()).abs().max() <= 1
    assert torch.equal(cameras.w2c, sample.cameras.w2c[ids]) and list(found.depths) == [0, 8]
    for frame, depth in found.depths.items():
        wanted = torch.full(SIZE, 1.0 + ids[frame]) if given else sample.depths[0]
        torch.testing.assert_close(depth, wanted, atol=1e-2, rtol=1e-2)


def test_a_single_picture_is_no_walk(training, add):
    sample = wall(1, SIZE)
    with pytest.raises(ValueError, match="photo: 1 picture is no walk"):
        add(training.VIDEO, "photo", video=video_of(sample), cameras=sample.cameras, caption="", depth_estimator=seen)


# -------------------------------------------------------------------------------------------------------------- training


class Words:
    """Stands for a text encoder."""

    def tokenize(self, text):
        return text

    def encode_from_tokens_scheduled(self, tokens):
        return [[torch.full((1, 3, 16), len(tokens) / 10), {}]]


@pytest.fixture(scope="module")
def networks(pack, tiny_models, tmp_path_factory):
    import comfy.model_patcher
    import comfy.sd
    from safetensors.torch import load_file

    from lyra_core.models import lyra2_host

    core = f"{pack.__name__.partition('.')[0]}.lyra_core.models.lyra2_host"
    importlib.import_module(core).register()  # as the pack itself does, whose classes are others than those of the tests
    folder = tmp_path_factory.mktemp("networks")
    path = tiny_models.write_lyra2(folder / "lyra2.safetensors", {**tiny_models.LYRA2_14B, **NET, "framepack": LAYOUT})
    with torch.inference_mode(False):
        model = comfy.sd.load_diffusion_model(str(path), {"dtype": torch.float32})
        vae = comfy.sd.VAE(sd=load_file(tiny_models.write_vae(folder / "vae.safetensors", dim=4)))
    patcher = comfy.model_patcher.ModelPatcher(torch.nn.Linear(1, 1), torch.device("cpu"), torch.device("cpu"))

    def hidden(pixel_values, intermediate_output):
        return None, pixel_values.mean((1, 2, 3)).view(-1, 1, 1).expand(-1, 257, 1280)

    eyes = SimpleNamespace(patcher=patcher, load_device=torch.device("cpu"), model=hidden)
    yield {"model": model, "clip": Words(), "clip_vision": eyes, "vae": vae}
    lyra2_host.register()


@pytest.fixture
def train(training, add, networks, world):
    def train(trained=None, folder="training/test", **inputs):
        place = add(training.WORLD, "home", world=world)[0] if folder else None
        trained = trained or {"trained": training.LORA, "rank": 2, "weights": training.REFERENCE}
        values = {"steps": 3, "learning_rate": 1e-2, "preview_every": 0, "save_to": ""} | inputs
        with torch.inference_mode():  # as the host runs its nodes
            return training.TrainLoRA.execute(training_set=place, trained=trained, **networks, **values).args

    return train


def test_a_lora_is_trained_stopped_and_gone_on_with(train, comfy_host, monkeypatch, training):
    lora, model, losses, steps, report = train(save_to="training/run", preview_every=2)
    assert steps == len(losses["loss"]) == 3 and "counted, not measured" in report and "3 steps; loss" in report
    assert any(name.endswith("lora_up.weight") and weight.abs().sum() > 0 for name, weight in lora.items())
    assert len(model.patches) == sum(name.endswith("lora_up.weight") for name in lora)
    longer = train(save_to="training/run", steps=5)
    assert longer[2]["loss"][:3] == losses["loss"] and longer[3] == 5
    whole = train(steps=5)
    assert whole[2] == longer[2] and all(torch.equal(whole[0][name], longer[0][name]) for name in whole[0])


def test_latents_are_kept_with_the_set(train, comfy_host):
    train(steps=1)
    assert (comfy_host / "output" / "training" / "test" / "home.latents.safetensors").is_file()


def test_a_stop_is_obeyed_within_a_step(train, training, monkeypatch, comfy_host):
    import comfy.model_management

    asked = []

    def stop():
        asked.append(1)
        if len(asked) > 6:
            raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(training.types, "stop_if_interrupted", stop)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(steps=1000, save_to="training/stopped")
    assert (comfy_host / "output" / "training" / "stopped" / "training.safetensors").is_file()


def test_all_weights_of_a_small_model_are_trained(train, training):
    lora = train({"trained": training.WEIGHTS, "weights": "ffn"}, steps=2)[0]
    assert lora and all(".ffn." in name and name.endswith((".diff", ".diff_b")) for name in lora)


def test_what_can_not_be_trained_is_said(train, training, add):
    with pytest.raises(ValueError, match="input 'trained.rank' is 0; allowed: a whole number from 1 to 1,024"):
        train({"trained": training.LORA, "rank": 0, "weights": training.REFERENCE})
    with pytest.raises(ValueError, match="nothing would be learned"):
        train({"trained": training.LORA, "rank": 2, "weights": "nowhere"})
    with pytest.raises(ValueError, match="input 'learning_rate' is nan"):
        train(learning_rate=float("nan"))
    with pytest.raises(ValueError, match="the training set is empty|no such training set"):
        training.TrainingSet.execute({"source": training.NOTHING}, "training/none", "x", CHUNK)


def test_a_walk_of_one_chunk_is_gone_there_and_back(training, add, networks, world):
    from lyra_core.world.world import rewind

    place = add(training.WORLD, "short", folder="training/short", world=rewind(world, 1))[0]
    trained = {"trained": training.LORA, "rank": 2, "weights": training.REFERENCE}
    with torch.inference_mode():
        lora, *_, report = training.TrainLoRA.execute(training_set=place, trained=trained, steps=2, learning_rate=1e-2, **networks).args
    assert "short: shorter than two chunks, so walked there and back" in report
    assert lora and all(value.isfinite().all() for value in lora.values())
    assert len(sets.read(place)[0]) == 9


# ------------------------------------------------------------------------------------------------------------ the command


def test_the_command_adds_worlds_and_scans_and_refuses_by_name(training, world, comfy_host, monkeypatch, capsys, tmp_path):
    from conftest import load_tool

    from lyra_core.world import world_files

    monkeypatch.setitem(sys.modules, "host", load_tool("host"))
    tool, place = load_tool("trainset"), tmp_path / "set"
    monkeypatch.setattr(tool, "pack", lambda: training)
    monkeypatch.setattr(tool, "estimator", lambda file: seen)
    world_files.save(world, tmp_path / "my home")
    assert tool.main([str(place), "--world", str(tmp_path / "my home"), "--chunk", "8"]) == 0
    scan = ["--scan", str(scan_of(wall(9, SIZE), tmp_path / "scan")), "--depth-model", "any", "--size", "32x16", "--chunk", "8"]
    assert tool.main([str(place), *scan]) == 0
    said = capsys.readouterr().out
    assert "my_home: the geometry preview made all of it" in said and "scan: 9 frames, depth of 2" in said
    assert tool.main([str(place)]) == 0 and "set: 2 walks, 26 frames of 32x16" in capsys.readouterr().out
    assert tool.main([str(place), "--size", "large"]) == 1 and tool.main([str(place), "--video", "none.mp4"]) == 1
    assert "expected width x height" in capsys.readouterr().err
