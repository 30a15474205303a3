"""The real host walks with Wan VACE from tiny checkpoints: one model or two experts, killed and gone on, generators mixed."""

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
from safetensors.torch import load_file

ONE, HIGH, LOW = (
    f"{name}.safetensors"
    for name in (
        "wan2.1_vace_1.3B_fp16",
        "wan2.2_fun_vace_high_noise_14B_fp8_scaled",
        "wan2.2_fun_vace_low_noise_14B_fp8_scaled",
    )
)
LORA = "lightx2v_rank4.safetensors"


@pytest.fixture(scope="module")
def base(comfy_host, tiny_models, tmp_path_factory, project) -> Path:
    """A photo, a path, and the model files that VACE needs."""
    folder = tmp_path_factory.mktemp("vace_server")
    models = folder / "models"
    tiny_models.write_vace_files(models)
    tiny_models.write_vae(models / "vae" / "wan_2.1_vae.safetensors", dim=2)
    tiny_models.write_text_encoder(models / "text_encoders" / "umt5.safetensors")
    tiny_models.write_wan(models / "diffusion_models" / "wan_i2v.safetensors")
    tiny_models.write_lora(models / "loras" / LORA, 128)
    (folder / "input").mkdir()
    shutil.copyfile(project / "tools" / "demo" / "room.png", folder / "input" / "photo.png")
    w2c = np.tile(np.eye(4), (241, 1, 1))
    w2c[:, 2, 3] = -np.linspace(0, 0.9, 241)
    K = np.tile(np.array([[40.0, 0, 23.5], [0, 40.0, 15.5], [0, 0, 1]]), (241, 1, 1))
    np.savez(folder / "input" / "trajectory.npz", w2c=w2c, intrinsics=K, image_height=32, image_width=48)
    return folder


@pytest.fixture(scope="module")
def start(launcher, base):
    return lambda: launcher.Server(base, base / "output", "--models-directory", str(base / "models"))


@pytest.fixture(scope="module")
def server(start):
    with start() as server:
        yield server


@pytest.fixture(scope="module")
def prompt_of(launcher, project):
    """The shipped walk of the geometry preview with Explore in the preview's place."""

    def prompt_of(server, generator: str = "Wan VACE", model: str = ONE, low: str | None = None, world=None, **inputs) -> dict:
        workflow = json.loads((project / "workflows" / "custom_trajectory.json").read_text(encoding="utf-8"))
        known = servers.object_info(server)
        prompt = launcher.to_api_format(workflow, known)
        settings = ["Lyra2LoadTrajectory.width=48", "Lyra2LoadTrajectory.height=32", "Lyra2LoadTrajectory.frames=241"]
        settings += ["ImageScale.width=48", "ImageScale.height=32"]
        launcher.apply_settings(prompt, settings, server.base / "input", known)
        walk = next(node["inputs"] for node in prompt.values() if node["class_type"] == "Lyra2PreviewChunks")
        begun, cameras = walk["world"], walk["cameras"]
        kept, waiting = {}, [begun[0], cameras[0]]
        while waiting:
            name = waiting.pop()
            kept[name] = prompt[name]
            waiting += [value[0] for value in prompt[name]["inputs"].values() if isinstance(value, list)]
        loaders = {
            "model": ("UNETLoader", {"unet_name": model, "weight_dtype": "default"}),
            "clip": ("CLIPLoader", {"clip_name": "umt5.safetensors", "type": "stable_diffusion", "device": "default"}),
            "vae": ("VAELoader", {"vae_name": "wan_2.1_vae.safetensors"}),
            "depth_estimator": ("Lyra2MemoryEstimator", {}),
        }
        if low:
            loaders["low_noise_model"] = ("UNETLoader", {"unet_name": low, "weight_dtype": "default"})
        loaders = loaders if generator != "geometry preview" else {}
        vace = {"steps": 2, "cfg": 2.0, "shift": 8.0, "boundary": 0.9, "overlap": "1", "dilation": 2, "depth_edges": 0.05}
        vace |= {"references": 0, "strength": 1.0, "trusted_steps": 0, "anchor": True, "lora": LORA, "lora_strength": 1.0}
        explore = {
            "world": begun,
            "cameras": cameras,
            "chunks": 1,
            "prompt": "a room",
            "negative": "",
            "quality": "DMD",
            "quality.dmd_lora": "already in the model",
            "seed": 1,
            "first_chunk": 0,
            "retrieve": 5,
            "views": 3,
            "alignment": "memory",
            "save_to": "",
            "generator": generator,
            **{f"generator.{key}": inputs.pop(key, value) for key, value in vace.items()},
        }
        for name, (kind, values) in loaders.items():
            kept[name], explore[name] = {"class_type": kind, "inputs": values}, [name, 0]
        if world:
            kept["load"] = {"class_type": "Lyra2LoadWorld", "inputs": world}
            explore["world"] = ["load", 0]
        kept["explore"] = {"class_type": "Lyra2Explore", "inputs": explore | inputs}
        return kept

    return prompt_of


def chunks_of(folder: Path) -> list[dict]:
    """Of the latest branch, the photo first."""
    manifest = json.loads((folder / "world.json").read_text())
    by_key, key, found = {c["key"]: c for c in manifest["chunks"]}, manifest["latest"], []
    while key is not None:
        found.insert(0, by_key[key])
        key = by_key[key]["parent"]
    return found


def frames_of(folder: Path) -> list:
    return [load_file(folder / chunk["file"])["frames"] for chunk in chunks_of(folder)]


def test_a_killed_walk_goes_on_to_the_same_frames(launcher, server, start, prompt_of, base):
    """kill -9 while the second chunk is painted; then one chunk more runs only that chunk."""
    worlds = base / "output" / "worlds"
    launcher.run_prompt(server, prompt_of(server, chunks=2, save_to="worlds/never"))
    expected = frames_of(worlds / "never")
    assert [len(frames) for frames in expected] == [1, 80, 80]
    with start() as doomed:

        def kill_during_the_second_chunk():
            while not (worlds / "killed" / "world.json").exists() or len(chunks_of(worlds / "killed")) < 2:
                time.sleep(0.02)
            time.sleep(0.5)
            os.kill(doomed.process.pid, 9)

        threading.Thread(target=kill_during_the_second_chunk, daemon=True).start()
        with pytest.raises(launcher.WorkflowError, match="the server went away"):
            launcher.run_prompt(doomed, prompt_of(doomed, chunks=2, save_to="worlds/killed"))
    assert len(chunks_of(worlds / "killed")) == 2
    said = launcher.output_texts(launcher.run_prompt(server, prompt_of(server, chunks=2, save_to="worlds/killed")))
    assert any("It was made before" in text for text in said) and any("colours: gain" in text for text in said)
    found = frames_of(worlds / "killed")
    assert len(found) == 3 and all(a.equal(b) for a, b in zip(found, expected, strict=True))
    settings = chunks_of(worlds / "killed")[2]["settings"]
    assert settings["generator"] == "wan vace" and settings["quality"]["quality"] == "Wan VACE"
    assert {"steps", "cfg", "shift", "overlap", "dilation", "references", "anchor"} <= settings["quality"].keys()
    assert {"seed", "path", "made_with", "tint"} <= settings.keys()


def test_two_experts_a_distilled_lora_references_overlap_and_trust_in_one_walk(launcher, server, prompt_of, base):
    options = {"references": 2, "overlap": "5", "trusted_steps": 1, "steps": 3, "cfg": 1.0}
    prompt = prompt_of(server, "Wan VACE distilled", HIGH, LOW, chunks=2, save_to="worlds/experts", **options)
    said = "\n".join(launcher.output_texts(launcher.run_prompt(server, prompt)))
    assert "1 known frame in front dropped" in said and "5 known frames in front dropped" in said
    quality = chunks_of(base / "output" / "worlds" / "experts")[1]["settings"]["quality"]
    assert quality["lora"] == LORA and quality["quality"] == "Wan VACE distilled"


def test_a_world_of_mixed_generators_is_saved_reopened_rewound_and_exported(launcher, server, prompt_of, base):
    folder = "worlds/mixed"
    for index, generator in enumerate(("geometry preview", "Wan VACE", "geometry preview")):
        world = {"folder": folder, "chunks": index, "branch": ""} if index else None
        prompt = prompt_of(server, generator, first_chunk=index, save_to=folder, world=world)
        launcher.run_prompt(server, prompt)
    chunks = chunks_of(base / "output" / folder)
    assert [c["settings"]["generator"] for c in chunks] == ["photo", "geometry preview", "wan vace", "geometry preview"]
    again = {
        "load": {"class_type": "Lyra2LoadWorld", "inputs": {"folder": folder, "chunks": -1, "branch": ""}},
        "rewind": {"class_type": "Lyra2RewindWorld", "inputs": {"world": ["load", 0], "back": 1}},
        "frames": {"class_type": "Lyra2WorldFrames", "inputs": {"world": ["rewind", 0], "first": 0, "count": 0, "backwards": False}},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["frames", 0], "filename_prefix": "rewound/frame"}},
    }
    launcher.run_prompt(server, again)
    assert len(list((base / "output" / "rewound").glob("*.png"))) == 161
    info = server.get("/object_info")["Lyra2ExportWorld"]["input"]["required"]
    export = {name: spec[1]["default"] for name, spec in info.items() if len(spec) > 1 and "default" in spec[1]}
    export |= {name: spec[1]["options"][0] for name, spec in info.items() if spec[0] == "COMBO" and name not in export}
    export["ground"] = "as seen"
    prompt = {"load": again["load"], "export": {"class_type": "Lyra2ExportWorld", "inputs": {**export, "world": ["load", 0]}}}
    launcher.run_prompt(server, prompt)
    text = next((base / "output").rglob("README.md")).read_text(encoding="utf-8")
    assert "Wan VACE" in text and "Geometry preview: no model licence" in text and "commercial use allowed" in text


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"model": "wan_i2v.safetensors"}, "a WAN21 model, not Wan VACE"),
        ({"generator": "Lyra 2"}, "Lyra 2 needs model, clip, clip_vision, vae, depth_estimator; connect clip_vision"),
        ({"chunks": 4}, "chunk 3 needs cameras 241 to 320, the path has 241"),
    ],
)
def test_what_cannot_be_is_named(launcher, server, prompt_of, changes, says):
    with pytest.raises(launcher.WorkflowError, match=says):
        launcher.run_prompt(server, prompt_of(server, **changes))
