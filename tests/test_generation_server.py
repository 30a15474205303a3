"""The real host with tiny checkpoints: every shipped workflow of the transformer, and a walk that is killed and goes on."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import servers
from learners import wall
from safetensors.torch import load_file

from lyra_core.training import sets
from lyra_core.training import state as training
from lyra_core.world import preview, world_files
from lyra_core.world.world import begin

WIDTH, HEIGHT = 48, 32  # the least that the transformer's history can be packed from
SMALL = [
    f"ImageScale.width={WIDTH}",
    f"ImageScale.height={HEIGHT}",
    "CLIPLoader.type=stable_diffusion",  # UMT5 has only one size, 11 GB; what stands in its place is CLIP L
]
WORKFLOWS = {
    "lyra_zoom": ["Walk out.chunks=1", "Walk in.quality.steps=2", "Walk out.quality.steps=2"],
    "lyra_zoom_dmd": ["Walk out.chunks=1"],
    "lyra_custom_trajectory": ["Lyra2Explore.quality.steps=2"],
    "lyra_custom_trajectory_dmd": ["Lyra2Explore.chunks=1"],
    "lyra_there_and_back": ["Lyra2Explore.quality.steps=2"],
    "lyra_photo_to_splat": ["Lyra2Explore.chunks=1", "Lyra2Reconstruct.views=4"],
    "lyra_step_by_step": ["Lyra2Reconstruct.views=4"],
}

VACE_WORKFLOWS = {
    "vace_zoom": ["Walk out.chunks=1", "Walk in.generator.steps=2", "Walk out.generator.steps=2"],
    "vace_custom_trajectory": ["Lyra2Explore.generator.steps=2", "Lyra2Explore.chunks=1"],
    "any_video_model": ["KSampler.steps=2", f"WanVaceToVideo.width={WIDTH}", f"WanVaceToVideo.height={HEIGHT}"],
}


@pytest.fixture(scope="module")
def base(comfy_host, tiny_models, tmp_path_factory, project) -> Path:
    """A base folder with every model file that the workflows name, a photo, a path and captions."""
    folder = tmp_path_factory.mktemp("generation")
    tiny_models.write_all(folder / "models")
    (folder / "input").mkdir()
    shutil.copyfile(project / "tools" / "demo" / "room.png", folder / "input" / "photo.png")
    steps = np.linspace(0, 0.4, 161)
    w2c = np.tile(np.eye(4), (161, 1, 1))
    w2c[:, 2, 3] = -steps
    K = np.tile(np.array([[40.0, 0, WIDTH / 2 - 0.5], [0, 40.0, HEIGHT / 2 - 0.5], [0, 0, 1]]), (161, 1, 1))
    np.savez(folder / "input" / "trajectory.npz", w2c=w2c, intrinsics=K, image_height=HEIGHT, image_width=WIDTH)
    (folder / "input" / "captions.json").write_text(json.dumps({"0": "a room", "81": "a corridor"}))
    return folder


@pytest.fixture(scope="module")
def start(launcher, base):
    """Starts servers on that folder."""
    return lambda: launcher.Server(base, base / "output", "--models-directory", str(base / "models"))


@pytest.fixture(scope="module")
def server(start):
    """One of them, for all that needs no server of its own."""
    with start() as running:
        yield running


def prompt_of(launcher, server, project, name: str, *settings: str, bypassed: bool = True) -> dict:
    workflow = json.loads((project / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    for node in workflow["nodes"]:
        node["mode"] = node["mode"] if bypassed else 0
    object_info = servers.object_info(server)
    prompt = launcher.to_api_format(workflow, object_info)
    own = {"width": WIDTH, "height": HEIGHT, "file": "trajectory.npz", "captions": "captions.json", "pose_scale": 1.1}
    own = [f"Lyra2LoadTrajectory.{key}={value}" for key, value in own.items()] if "custom" in name else []
    launcher.apply_settings(prompt, [*SMALL, *own, *settings], server.base / "input", object_info)
    return prompt


def only(prompt: dict, last: str, **saved: str) -> dict:
    """A node, by its key or its class, with what it needs and nothing that comes after it; its world saved to folders."""
    last = last if last in prompt else next(key for key, node in prompt.items() if node["class_type"] == last)
    wanted, waiting = {}, [last]
    while waiting:
        key = waiting.pop()
        wanted[key] = prompt[key]
        waiting += [value[0] for value in prompt[key]["inputs"].values() if isinstance(value, list)]
    for name, folder in saved.items():
        wanted[name] = {"class_type": "Lyra2SaveWorld", "inputs": {"world": [last, 0], "folder": folder}}
    return wanted


def chunks_of(folder: Path) -> list[dict]:
    return json.loads((folder / "world.json").read_text())["chunks"]


def latents_of(folder: Path) -> list:
    """What was sampled for each chunk, the latest branch."""
    manifest = json.loads((folder / "world.json").read_text())
    by_key, key, found = {c["key"]: c for c in manifest["chunks"]}, manifest["latest"], []
    while by_key[key]["parent"] is not None:
        found.insert(0, load_file(folder / by_key[key]["file"])["latents.sampled"])
        key = by_key[key]["parent"]
    return found


def of_the_photo(worlds: Path, name: str) -> Path:
    """The folder of the one photo that a shipped workflow of this name has walked from."""
    (folder,) = worlds.glob(f"{name}_????????")
    return folder


def test_every_workflow_of_the_transformer_runs_from_its_file(launcher, server, project, base):
    for name, settings in WORKFLOWS.items():
        outputs = launcher.run_prompt(server, prompt_of(launcher, server, project, name, *settings))
        made = {file.suffix for file in launcher.output_files(outputs, server)}
        made |= {file.suffix for file in server.output.glob(f"exports/{name}/*")}
        assert {".mp4", ".ply", ".glb"} <= made, f"{name} made {made}"
        assert any("TSED" in text for text in launcher.output_texts(outputs)), f"{name} does not end in its scores"
    worlds = base / "output" / "worlds"
    assert {folder.name.rpartition("_")[0] for folder in worlds.iterdir()} == {
        "lyra_zoom_in",
        "lyra_zoom_out",
        "lyra_zoom_dmd_in",
        "lyra_zoom_dmd_out",
        "lyra_custom_trajectory",
        "lyra_custom_trajectory_dmd",
        "lyra_there_and_back",
        "lyra_photo_to_splat",
        "lyra_step_by_step",
    }
    assert [len(latents_of(of_the_photo(worlds, name))) for name in ("lyra_photo_to_splat", "lyra_step_by_step")] == [1, 2]
    captions = [chunk["prompt"] for chunk in chunks_of(of_the_photo(worlds, "lyra_custom_trajectory"))]
    assert captions == ["", "a room", "a corridor"]
    assert chunks_of(of_the_photo(worlds, "lyra_zoom_dmd_in"))[1]["settings"]["quality"]["quality"] == "DMD"


def test_every_workflow_of_vace_runs_from_its_file(launcher, server, project, base):
    for name, settings in VACE_WORKFLOWS.items():
        outputs = launcher.run_prompt(server, prompt_of(launcher, server, project, name, *settings))
        made = {file.suffix for file in launcher.output_files(outputs, server)}
        assert {".mp4", ".ply", ".glb"} <= made, f"{name} made {made}"
        assert any("TSED" in text for text in launcher.output_texts(outputs)), f"{name} does not end in its scores"
    worlds = base / "output" / "worlds"
    made_by = [chunks_of(of_the_photo(worlds, name))[1]["settings"]["generator"] for name in ("vace_zoom_out", "any_video_model")]
    assert made_by == ["wan vace", "another model"]
    assert chunks_of(of_the_photo(worlds, "vace_custom_trajectory"))[1]["prompt"] == "a room"


def test_uni3c_guides_vace_once_its_nodes_are_no_longer_bypassed(launcher, server, project, base):
    name, worlds = "any_video_model", base / "output" / "worlds"
    own = [f"EmptyImage.width={WIDTH}", f"EmptyImage.height={HEIGHT}", "Lyra2AppendFrames.save_to=worlds/uni3c"]
    prompt = prompt_of(launcher, server, project, name, *VACE_WORKFLOWS[name], *own, bypassed=False)
    assert "WanUni3CControlnetApply" in {node["class_type"] for node in prompt.values()}
    launcher.run_prompt(server, only(prompt, "Lyra2AppendFrames", saved="worlds/uni3c"))
    without, guided = (
        load_file(folder / chunks_of(folder)[1]["file"])["frames"] for folder in (of_the_photo(worlds, name), worlds / "uni3c")
    )
    assert guided.shape == without.shape and not guided.equal(without)


def test_lyra_goes_on_where_vace_left_off(launcher, server, project, base):
    settings = [f"Lyra2Explore.{setting}" for setting in ("quality.steps=1", "chunks=1", "save_to=worlds/changed")]
    prompt = prompt_of(launcher, server, project, "lyra_custom_trajectory", *settings)
    last, lyra = next((key, node["inputs"]) for key, node in prompt.items() if node["class_type"] == "Lyra2Explore")
    file = {"unet_name": "wan2.1_vace_1.3B_fp16.safetensors", "weight_dtype": "default"}
    prompt["vace file"] = {"class_type": "UNETLoader", "inputs": file}
    asked = {"steps": 1, "cfg": 1.0, "shift": 8.0, "boundary": 0.875, "overlap": "1", "dilation": 2, "depth_edges": 0.05}
    asked |= {"references": 1, "strength": 1.0, "trusted_steps": 0, "anchor": True}
    chosen = {"model": ["vace file", 0], "generator": "Wan VACE", **{f"generator.{key}": value for key, value in asked.items()}}
    prompt["vace"] = {"class_type": "Lyra2Explore", "inputs": {**lyra, **chosen}}
    lyra |= {"world": ["vace", 0], "first_chunk": 1}
    launcher.run_prompt(server, only(prompt, last))
    chunks = chunks_of(base / "output" / "worlds" / "changed")
    assert [chunk["settings"]["generator"] for chunk in chunks] == ["photo", "wan vace", "lyra 2"]


def test_one_chunk_more_runs_one_chunk_and_a_killed_walk_goes_on(launcher, server, start, project, base):
    """kill -9 of the server while chunk 2 is sampled; then more chunks; another seed is a branch beside."""

    def prompt(server, folder: str, chunks: int, seed: int = 1) -> dict:
        settings = [f"Lyra2Explore.{key}={value}" for key, value in (("chunks", chunks), ("seed", seed))]
        steps, to = "Lyra2Explore.quality.steps=3", f"Lyra2Explore.save_to=worlds/{folder}"
        return only(prompt_of(launcher, server, project, "lyra_custom_trajectory", *settings, steps, to), "Lyra2Explore")

    worlds = base / "output" / "worlds"
    launcher.run_prompt(server, prompt(server, "never", 2))
    expected = latents_of(worlds / "never")
    assert len(expected) == 2
    with start() as doomed:

        def kill_during_the_second_chunk():
            while not (worlds / "killed" / "world.json").exists() or len(chunks_of(worlds / "killed")) < 2:
                time.sleep(0.05)
            time.sleep(0.5)
            os.kill(doomed.process.pid, 9)

        threading.Thread(target=kill_during_the_second_chunk, daemon=True).start()
        with pytest.raises(launcher.WorkflowError, match="the server went away"):
            launcher.run_prompt(doomed, prompt(doomed, "killed", 2))
    assert len(chunks_of(worlds / "killed")) == 2  # the photo and the first chunk
    # another process goes on
    launcher.run_prompt(server, prompt(server, "killed", 2))
    found = latents_of(worlds / "killed")
    assert len(found) == 2 and all(a.equal(b) for a, b in zip(found, expected, strict=True))
    before = {file.name for file in (worlds / "killed").iterdir()}
    # the second chunk again, with another seed
    again = prompt(server, "killed", 1, seed=9)
    explore, begin = (
        next(node for node in again.values() if node["class_type"] == kind)
        for kind in ("Lyra2Explore", "Lyra2BeginWorld")
    )
    explore["inputs"]["first_chunk"] = 1
    begin |= {"class_type": "Lyra2LoadWorld", "inputs": {"folder": "worlds/killed", "chunks": 1, "branch": ""}}
    launcher.run_prompt(server, again)
    branch = {file.name for file in (worlds / "killed").iterdir()} - before
    assert len(branch) == 1  # all other chunks are shared and stay
    found = latents_of(worlds / "killed")
    assert found[0].equal(expected[0]) and not found[1].equal(expected[1])


def test_what_cannot_be_walked_is_said_before_anything_is_sampled(launcher, server, project):
    for settings, says in (
        (["Lyra2Explore.chunks=3"], "chunk 2 needs cameras 161 to 240, the path has 161"),
        (["Lyra2Explore.save_to=../outside"], "no path inside"),
        (["ImageScale.width=90", "Lyra2LoadTrajectory.width=90"], "multiples of 16"),
    ):
        prompt = prompt_of(launcher, server, project, "lyra_custom_trajectory", "Lyra2Explore.quality.steps=1", *settings)
        with pytest.raises(launcher.WorkflowError, match=says):
            launcher.run_prompt(server, prompt)


def test_the_page_is_told_of_every_chunk_and_nothing_planned_leaves_the_world_as_it_is(launcher, server, project, base):
    settings = ["Lyra2Explore.quality.steps=1", "Lyra2Explore.save_to=worlds/told"]
    outputs = {}
    for chunks in (1, 0):
        prompt = prompt_of(launcher, server, project, "lyra_custom_trajectory", *settings, f"Lyra2Explore.chunks={chunks}")
        needed = only(prompt, "Lyra2Explore", saved=f"worlds/told_{chunks}")
        outputs[chunks] = launcher.run_prompt(server, needed)
    worlds = base / "output" / "worlds"
    (made,) = chunks_of(worlds / "told")[1:]
    told = [entry for shown in outputs[1].values() for entry in shown.get("lyra2_world", [])]
    assert told == [
        {"folder": "worlds/told", "state": made["key"], "parent": made["parent"], "chunks": 1, "frames": 81}
    ]
    assert len(chunks_of(worlds / "told_1")) == 2 and len(chunks_of(worlds / "told_0")) == 1
    assert not any("lyra2_world" in shown for shown in outputs[0].values())


def test_an_interrupt_ends_within_a_step_and_leaves_what_was_made(launcher, server, project, base):
    settings = ["Lyra2Explore.quality.steps=1000", "Lyra2Explore.save_to=worlds/interrupted"]
    # of twice the size, so that a step takes longer than a message
    sides = [f"{node}.{side}" for node in ("ImageScale", "Lyra2LoadTrajectory") for side in ("width=96", "height=64")]
    prompt = prompt_of(launcher, server, project, "lyra_custom_trajectory", *settings, *sides)
    steps = []

    def interrupt(node: dict, done: int, total: int) -> None:
        if total == 1000:
            if not steps:
                server.post("/interrupt", {})
            steps.append(done)

    with pytest.raises(launcher.WorkflowError, match="interrupted"):
        launcher.run_prompt(server, prompt, interrupt)
    assert 1 <= len(steps) < 20  # progress reaches us a moment later than it was made
    assert len(chunks_of(base / "output" / "worlds" / "interrupted")) == 1  # the photo


def test_a_lora_is_learned_from_a_world_and_the_same_path_is_walked_with_it(launcher, server, project, base):
    """The shipped workflow train_on_my_world, on a world of two chunks by the geometry preview."""
    name, output, video = "train_on_my_world", base / "output", wall(161, (HEIGHT, WIDTH))
    begun = begin(video.picture(0) / 2 + 0.5, video.depths[0], video.cameras[:1], prompt="a wall")
    preview.explore(begun, video.cameras, folder=output / "worlds" / "home")
    workflow, known = json.loads((project / "workflows" / f"{name}.json").read_text(encoding="utf-8")), server.get("/object_info")
    prompt = launcher.to_api_format(workflow, known)
    for node in prompt.values():
        if node["class_type"] == "Lyra2LoadWorld":
            node["inputs"]["folder"] = "worlds/home"
    few = ["Lyra2TrainLoRA.steps=2", "Lyra2TrainLoRA.trained.rank=2", "Lyra2TrainLoRA.preview_every=0"]
    few += ["CLIPLoader.type=stable_diffusion", "Lyra2Explore.chunks=1", "Lyra2Explore.quality.steps=2"]
    launcher.apply_settings(prompt, few, server.base / "input", known)
    outputs = launcher.run_prompt(server, prompt)
    told = "\n".join(launcher.output_texts(outputs))
    assert "the geometry preview made all of it" in told and "counted, not measured" in told and "2 steps; loss" in told
    assert ".mp4" in {file.suffix for file in launcher.output_files(outputs, server)}
    (sample,) = sets.read(output / "training" / name)
    assert len(sample) == 161 and sample.latents.stream.shape[1] == 25 + 40
    assert training.load(output / "training" / f"{name}_lora" / "training.safetensors").step == 2
    (lora,) = (output / "loras").glob(f"{name}_2_steps_*.safetensors")
    assert any(key.endswith("self_attn.q.lora_up.weight") for key in load_file(lora))
    again = world_files.load(of_the_photo(output / "worlds", name))
    assert len(again) == 81 and again.photo == begun.photo and again.chunks[0].settings["generator"] == "lyra 2"
