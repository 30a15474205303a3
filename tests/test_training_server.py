"""The real host: a saved world, a LoRA learned from it, and the same path again with it, from the shipped workflow's file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from learners import wall
from safetensors.torch import load_file

from lyra_core.training import sets, state
from lyra_core.world import preview, world_files
from lyra_core.world.world import begin

SIZE = (32, 48)  # the least that the transformer's history can be packed from
NAME = "train_on_my_world"
SETTINGS = [
    "CLIPLoader.type=stable_diffusion",  # UMT5 has only one size, 11 GB; what stands in its place is CLIP L
    "Lyra2TrainLoRA.steps=2",
    "Lyra2TrainLoRA.trained.rank=2",
    "Lyra2TrainLoRA.preview_every=0",
    "Lyra2Explore.chunks=1",
    "Lyra2Explore.quality.steps=2",
]


@pytest.fixture(scope="module")
def base(comfy_host, tiny_models, tmp_path_factory) -> Path:
    """A base folder with every model file that the workflow names, and a world of two chunks by the geometry preview."""
    folder, video = tmp_path_factory.mktemp("training"), wall(161, SIZE)
    tiny_models.write_lyra2(folder / "models" / "diffusion_models" / "lyra2.safetensors", tiny_models.SMALLEST)
    tiny_models.write_vae(folder / "models" / "vae" / "wan_2.1_vae.safetensors", dim=4)
    tiny_models.write_text_encoder(folder / "models" / "text_encoders" / "umt5_xxl_fp8_e4m3fn_scaled.safetensors")
    tiny_models.write_clip_vision(folder / "models" / "clip_vision" / "clip_vision_h.safetensors")
    tiny_models.write_da3(folder / "models" / "geometry_estimation" / "depth_anything_3_mono_large.safetensors")
    world = begin(video.picture(0) / 2 + 0.5, video.depths[0], video.cameras[:1], prompt="a wall")
    preview.explore(world, video.cameras, folder=folder / "output" / "worlds" / "home")
    yield folder
    shutil.rmtree(folder / "models")  # 2 GB


def test_a_lora_is_learned_from_a_world_and_the_same_path_is_walked_with_it(launcher, base, project):
    workflow = json.loads((project / "workflows" / f"{NAME}.json").read_text(encoding="utf-8"))
    with launcher.Server(base, base / "output", "--models-directory", str(base / "models")) as server:
        known = server.get("/object_info")
        prompt = launcher.to_api_format(workflow, known)
        for node in prompt.values():
            if node["class_type"] == "Lyra2LoadWorld":
                node["inputs"]["folder"] = "worlds/home"
        launcher.apply_settings(prompt, SETTINGS, server.base / "input", known)
        outputs = launcher.run_prompt(server, prompt)
        told = "\n".join(launcher.output_texts(outputs))
        assert "the geometry preview made all of it" in told and "counted, not measured" in told and "2 steps; loss" in told
        assert ".mp4" in {file.suffix for file in launcher.output_files(outputs, server)}
    (sample,) = sets.read(base / "output" / "training" / NAME)
    assert len(sample) == 161 and sample.latents.stream.shape[1] == 25 + 40
    assert state.load(base / "output" / "training" / f"{NAME}_lora" / "training.safetensors").step == 2
    (file,) = (base / "output" / "loras").glob(f"{NAME}_2_steps_*.safetensors")
    lora = load_file(file)
    assert any(name.endswith("lora_up.weight") and "self_attn.q" in name for name in lora)
    (walked,) = (base / "output" / "worlds").glob(f"{NAME}_*")
    again, home = world_files.load(walked), world_files.load(base / "output" / "worlds" / "home")
    assert len(again) == 81 and again.photo == home.photo and again.chunks[0].settings["generator"] == "lyra 2"
