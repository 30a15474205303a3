"""Lyra 2 as a native model: the host's own nodes load, patch, sample, train and save it, on tiny random checkpoints."""

from __future__ import annotations

import json
import logging
import threading
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

SIZE = (6, 8)  # latents


@pytest.fixture(autouse=True)
def inference():
    """As the host runs its nodes."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def models(comfy_host, tiny_models):
    """The folder of transformer files, with one Lyra 2 and one plain Wan in it."""
    folder = comfy_host / "models" / "diffusion_models"
    tiny_models.write_lyra2(folder / "lyra2.safetensors")
    tiny_models.write_wan(folder / "wan.safetensors")
    return folder


@pytest.fixture
def load(models):
    """The host's UNETLoader."""
    import nodes

    return lambda name="lyra2.safetensors", dtype="default": nodes.UNETLoader().load_unet(name, dtype)[0]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def history_of(spec: str, seed: int = 0, size: tuple[int, int] = SIZE):
    from lyra_core.conditioning.framepack import FramePackLayout
    from lyra_core.conditioning.history import RAY_CHANNELS, SLOT_CHANNELS, Guides, History

    layout = FramePackLayout.parse(spec)
    slots, spatial, new = layout.slots(), layout.slots("spatial"), layout.new_latents
    guides = Guides(
        random(RAY_CHANNELS, slots + new, *size, seed=seed + 2),
        random(SLOT_CHANNELS * spatial, spatial + new, *size, seed=seed + 3).clamp(-1, 1),
    )
    latents, warped = random(16, slots, *size, seed=seed), random(16, new, *size, seed=seed + 1)
    return History(layout, latents, warped, lambda device: guides)


@pytest.fixture
def history(tiny_models):
    return history_of(tiny_models.TINY["framepack"])


def prompt(history, seed: int, tokens: int = 512, width: int = 64) -> list:
    """A CONDITIONING about a chunk."""
    from lyra_core.models.lyra2_host import conditioning

    image = SimpleNamespace(penultimate_hidden_states=random(1, 257, 1280, seed=99))
    return [[random(1, tokens, width, seed=seed), {**conditioning(history), "clip_vision_output": image}]]


@pytest.fixture
def prompts(history):
    """A positive and a negative CONDITIONING."""
    return prompt(history, 10), prompt(history, 11)


def empty_latent(batch: int = 1, latents: int = 3) -> dict:
    return {"samples": torch.zeros(batch, 16, latents, *SIZE)}


def sample(model, prompts, sampler="euler", cfg=1.0, steps=2, latent=None) -> torch.Tensor:
    """The host's KSampler."""
    import nodes

    latent = latent or empty_latent()
    return nodes.KSampler().sample(model, 7, steps, cfg, sampler, "simple", *prompts, latent)[0]["samples"]


@pytest.fixture
def spy(monkeypatch):
    """Counts what the network does: encodings of a history, forward passes and the timesteps they are given."""
    from lyra_core.models.lyra2 import Lyra2Model

    seen = SimpleNamespace(encoded=0, timesteps=[], batches=[])
    encode, forward = Lyra2Model.encode, Lyra2Model._forward

    def encoding(self, *args, **kwargs):
        seen.encoded += 1
        return encode(self, *args, **kwargs)

    def stepping(self, x, timestep, *args, **kwargs):
        seen.timesteps += timestep.tolist()[:1]
        seen.batches.append(len(x))
        return forward(self, x, timestep, *args, **kwargs)

    monkeypatch.setattr(Lyra2Model, "encode", encoding)
    monkeypatch.setattr(Lyra2Model, "_forward", stepping)
    return seen


# -------------------------------------------------------------------------------------------------------------- loading


def test_the_stock_loader_makes_a_lyra_2_model_of_its_file(load):
    from lyra_core.models import lyra2, lyra2_host

    model = load().model
    assert type(model) is lyra2_host.Lyra2Base and type(model.diffusion_model) is lyra2.Lyra2Model
    assert model.model_sampling.shift == 5.0


def test_a_plain_wan_file_is_still_plain_wan(load):
    import comfy.model_base

    assert type(load("wan.safetensors").model) is comfy.model_base.WAN21


def test_registering_again_changes_nothing(comfy_host):
    import comfy.supported_models

    from lyra_core.models import lyra2_host

    before = list(comfy.supported_models.models)
    lyra2_host.register()
    assert comfy.supported_models.models == before and lyra2_host.Lyra2 in before


def test_without_the_pack_the_file_is_refused_and_not_taken_for_plain_wan(load, monkeypatch):
    import comfy.supported_models

    from lyra_core.models import lyra2_host

    others = [model for model in comfy.supported_models.models if model is not lyra2_host.Lyra2]
    monkeypatch.setattr(comfy.supported_models, "models", others)
    with pytest.raises(RuntimeError, match="Could not detect model type"):
        load()


def test_the_reference_s_own_keys_load_too(models, load, tiny_models):
    """A file with `net.` before every key, counters and extra state."""
    weights = {f"net.{key}": weight for key, weight in load_file(models / "lyra2.safetensors").items()}
    extra = {"net.accum_iteration": torch.tensor(3), "net.blocks.0.self_attn.attn_op._extra_state": torch.zeros(1)}
    save_file({**weights, **extra}, models / "net.safetensors")
    found, expected = (
        load(name).model.diffusion_model.state_dict() for name in ("net.safetensors", "lyra2.safetensors")
    )
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def test_a_file_with_weights_missing_is_refused_by_their_names(models, load):
    weights = load_file(models / "lyra2.safetensors")
    del weights["blocks.1.cam_encoder.weight"], weights["head.head.bias"]
    save_file(weights, models / "incomplete.safetensors")
    with pytest.raises(ValueError, match=r"(?s)not complete.*blocks\.1\.cam_encoder\.weight.*head\.head\.bias"):
        load("incomplete.safetensors")


def test_a_half_written_file_is_refused(models, load):
    whole = (models / "lyra2.safetensors").read_bytes()
    (models / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Exception, match="half.safetensors|incomplete|corrupt"):
        load("half.safetensors")


def test_what_shapes_cannot_tell_must_be_stored(models, load, tiny_models):
    from lyra_core.models import lyra2_host

    weights = load_file(models / "lyra2.safetensors")
    for stored, says in (({"framepack": tiny_models.TINY["framepack"]}, "num_heads"), ({"num_heads": 3}, "layout")):
        text = json.dumps(stored).encode()
        weights[lyra2_host.CONFIG_KEY] = torch.tensor(list(text), dtype=torch.uint8)
        save_file(weights, models / "vague.safetensors")
        with pytest.raises(ValueError, match=says):
            load("vague.safetensors")


def test_the_released_size_needs_nothing_stored(comfy_host, tiny_models):
    from lyra_core.models import lyra2_host

    config = tiny_models.LYRA2_14B
    assert lyra2_host.complete_config(lyra2_host.weight_shapes(config)) == config
    wan_1_3b = {**config, "dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30}
    assert lyra2_host.complete_config(lyra2_host.weight_shapes(wan_1_3b)) == wan_1_3b


# ------------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("cfg", [1.0, 5.0])
@pytest.mark.parametrize("sampler", ["euler", "uni_pc", "dpmpp_2m", "lcm"])
def test_the_stock_samplers_work_and_encode_a_chunk_once(load, prompts, spy, sampler, cfg):
    out = sample(load(), prompts, sampler, cfg, steps=4)
    assert out.shape == (1, 16, 3, *SIZE) and out.isfinite().all() and out.std() > 0.1
    assert spy.encoded == 1 and set(spy.batches) == {1 if cfg == 1 else 2}


def test_the_guider_with_the_reference_s_solver_tells_the_network_integers(load, prompts, spy, pack):
    from comfy_extras import nodes_custom_sampler as host

    sigmas = pack.sampling.Sigmas.execute({"schedule": "full", "steps": 4, "shift": 5.0}).args[0]
    noise = host.RandomNoise.execute(3).args[0]
    guider = host.CFGGuider.execute(load(), *prompts, 5.0).args[0]
    ran = {}
    for name, solver in (
        ("unipc", pack.sampling.UniPCSampler.execute().args[0]),
        ("euler", host.KSamplerSelect.execute("euler").args[0]),
    ):
        spy.timesteps.clear()
        out = host.SamplerCustomAdvanced.execute(noise, guider, solver, sigmas, empty_latent()).args[0]["samples"]
        assert out.isfinite().all()
        ran[name] = list(spy.timesteps)
    assert ran["unipc"] == (sigmas[:-1] * 1000).floor().tolist()
    assert ran["euler"] == pytest.approx((sigmas[:-1] * 1000).tolist()) and ran["euler"] != ran["unipc"]


def test_the_reference_s_solver_starts_from_the_noise_itself(load, prompts, pack):
    from comfy_extras import nodes_custom_sampler as host

    started = []
    solver = pack.sampling.UniPCSampler.execute().args[0]
    run = solver.sampler_function
    solver.sampler_function = lambda model, x, *args, **kwargs: (started.append(x), run(model, x, *args, **kwargs))[1]
    noise, sigmas = host.RandomNoise.execute(3).args[0], pack.sampling.Sigmas.execute({"schedule": "DMD"}).args[0]
    sigmas = pack.sampling.Sigmas.execute({"schedule": "full", "steps": 1, "shift": 5.0}).args[0]
    guider = host.CFGGuider.execute(load(), *prompts, 1.0).args[0]
    host.SamplerCustomAdvanced.execute(noise, guider, solver, sigmas, empty_latent())
    torch.testing.assert_close(started[0], noise.generate_noise(empty_latent()), rtol=1e-6, atol=1e-6)


def test_the_distilled_schedule_runs_with_lcm_and_exact_times(load, prompts, spy, pack):
    from comfy_extras import nodes_custom_sampler as host

    sigmas = pack.sampling.Sigmas.execute({"schedule": "DMD"}).args[0]
    noise, solver = host.RandomNoise.execute(3).args[0], host.KSamplerSelect.execute("lcm").args[0]
    guider = host.CFGGuider.execute(load(), *prompts, 1.0).args[0]
    host.SamplerCustomAdvanced.execute(noise, guider, solver, sigmas, empty_latent())
    assert spy.timesteps == pytest.approx([1000, 937.5, 833.33331, 625], abs=1e-3)


def test_a_batch_gives_what_its_samples_give_alone(load, prompts):
    model = load()
    both = sample(model, prompts, cfg=5.0, latent=empty_latent(2))
    torch.testing.assert_close(both[:1], sample(model, prompts, cfg=5.0), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(both[0], both[1])


def test_cfg_uses_both_prompts(load, prompts):
    model = load()
    assert not torch.allclose(sample(model, prompts, cfg=5.0), sample(model, (prompts[0], prompts[0]), cfg=5.0))


def test_prompts_about_different_chunks_are_not_mixed(load, tiny_models, history):
    """Both are in one batch's reach, but each keeps its own history."""
    from comfy.samplers import calc_cond_batch  # noqa: F401  the host's batching is what is tested

    model, other = load(), history_of(tiny_models.TINY["framepack"], seed=50)
    mixed = sample(model, (prompt(history, 10), prompt(other, 11)), cfg=2.0, steps=1)
    first, second = (sample(model, (prompt(h, s),) * 2, steps=1) for h, s in ((history, 10), (other, 11)))
    torch.testing.assert_close(mixed, second + 2.0 * (first - second), rtol=1e-4, atol=1e-4)


def test_fp8_weights_stay_close(load, prompts):
    from comfy.utils import get_attr

    model = load(dtype="fp8_e4m3fn")
    assert get_attr(model.model, "diffusion_model.clean_patch_embeddings.0.weight").dtype == torch.float32
    assert get_attr(model.model, "diffusion_model.blocks.0.cam_encoder.weight").dtype == torch.float8_e4m3fn
    exact, rounded = sample(load(), prompts, cfg=5.0), sample(model, prompts, cfg=5.0)
    assert 0 < (exact - rounded).norm() / exact.norm() < 0.2


def test_bfloat16_stays_close(models, prompts):
    import comfy.sd

    path = str(models / "lyra2.safetensors")
    exact, rounded = (
        sample(comfy.sd.load_diffusion_model(path, {"dtype": dtype}), prompts)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert 0 < (exact - rounded).norm() / exact.norm() < 2e-2


def test_a_masked_latent_keeps_what_is_not_to_be_painted(load, prompts):
    known = random(1, 16, 3, *SIZE, seed=5)
    mask = torch.ones(1, 1, 3, *SIZE)
    mask[:, :, 0] = 0
    out = sample(load(), prompts, latent={"samples": known, "noise_mask": mask})
    torch.testing.assert_close(out[:, :, 0], known[:, :, 0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(out[:, :, 1:], known[:, :, 1:], atol=0.1)


def test_model_sampling_sd3_changes_the_schedule(load, prompts, spy):
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    sample(load(), prompts)
    before = list(spy.timesteps)
    spy.timesteps.clear()
    sample(ModelSamplingSD3().patch(load(), 1.0)[0], prompts)
    assert spy.timesteps[1] < before[1]


def test_an_area_as_large_as_the_latent_changes_nothing(load, prompts, spy):
    from node_helpers import conditioning_set_values

    model = load()
    whole = [conditioning_set_values(p, {"area": (3, *SIZE, 0, 0, 0)}) for p in prompts]
    torch.testing.assert_close(sample(model, whole), sample(model, prompts), rtol=1e-4, atol=1e-4)


def test_an_area_sees_its_part_of_the_history(load, history, tiny_models):
    """The left half sampled as an area equals a world that is that half."""
    from node_helpers import conditioning_set_values

    from lyra_core.conditioning.history import Guides, History

    guides = Guides(*(guide[..., :4] for guide in history.guides()))
    half = History(history.layout, history.latents[..., :4], history.warped[..., :4], lambda device: guides)
    model, latent = load(), random(1, 16, 3, *SIZE, seed=8)
    area = conditioning_set_values(prompt(history, 10), {"area": (3, 6, 4, 0, 0, 0)})
    import comfy.samplers

    sigmas = torch.tensor([0.7, 0.0])

    def denoised(noise, conditions):
        sampler = comfy.samplers.ksampler("euler")
        return comfy.samplers.sample(
            model, noise, conditions, conditions, 1.0, "cpu", sampler, sigmas, latent_image=noise, disable_pbar=True
        )

    left = denoised(latent, area)[..., :4]
    torch.testing.assert_close(left, denoised(latent[..., :4].contiguous(), prompt(half, 10)), rtol=1e-3, atol=1e-3)


def test_context_windows_take_their_frames_of_the_history(load, prompts, spy):
    from comfy_extras.nodes_context_windows import WanContextWindowsManualNode

    def windowed(length: int):
        options = {"context_stride": 1, "closed_loop": False, "fuse_method": "pyramid", "freenoise": False}
        args = (load(), length, 0, "standard_static")
        return WanContextWindowsManualNode.execute(*args, **options).args[0]

    torch.testing.assert_close(sample(windowed(9), prompts), sample(load(), prompts))
    assert sample(windowed(5), prompts).isfinite().all()
    assert spy.encoded == 3


# -------------------------------------------------------------------------------------------------- patching and saving

LORA_LAYERS = (
    "blocks.0.self_attn.q",
    "blocks.1.cam_encoder",
    "blocks.0.buffer_encoder.0",
    "blocks.1.buffer_encoder.1",
    "clean_patch_embeddings.1",
    "clean_patch_embeddings.3",
    "patch_embedding",
    "time_projection.1",
    "head.head",
)
STRENGTH = 0.7


@pytest.fixture(scope="module")
def lora(comfy_host, models):
    """A LoRA file for layers of Wan and our own, and the same merged into the checkpoint."""
    weights, parts = load_file(models / "lyra2.safetensors"), {}
    for i, layer in enumerate(LORA_LAYERS):
        weight = weights[f"{layer}.weight"]
        down, up = (
            random(4, weight.shape[1], seed=i) / weight.shape[1] ** 0.5,
            random(weight.shape[0], 4, seed=100 + i) / 4,
        )
        parts[f"diffusion_model.{layer}.lora_A.weight"], parts[f"diffusion_model.{layer}.lora_B.weight"] = down, up
        weights[f"{layer}.weight"] = weight + STRENGTH * (up @ down)
    save_file(parts, comfy_host / "models" / "loras" / "lora.safetensors")
    save_file(weights, models / "merged.safetensors")
    return "lora.safetensors"


def test_a_patched_model_is_the_merged_one_and_leaves_the_original(load, prompts, lora):
    import nodes

    model = load()
    before = sample(model, prompts, cfg=5.0)
    patched = nodes.LoraLoaderModelOnly().load_lora_model_only(model, lora, STRENGTH)[0]
    assert len(patched.patches) == len(LORA_LAYERS)
    torch.testing.assert_close(
        sample(patched, prompts, cfg=5.0), sample(load("merged.safetensors"), prompts, cfg=5.0), rtol=1e-4, atol=1e-4
    )
    assert torch.equal(sample(model, prompts, cfg=5.0), before)


def test_a_lora_hook_on_the_prompts_is_the_patched_model(load, prompts, lora, spy):
    """Hooks swap weights between steps, so nothing encoded before may be used."""
    from comfy.hooks import set_hooks_for_conditioning
    from comfy_extras.nodes_hooks import CreateHookLoraModelOnly

    import nodes

    patched = nodes.LoraLoaderModelOnly().load_lora_model_only(load(), lora, STRENGTH)[0]
    expected = sample(patched, prompts, cfg=5.0)
    assert not torch.allclose(expected, sample(load(), prompts, cfg=5.0), atol=1e-2)
    hooks = CreateHookLoraModelOnly().create_hook_model_only(lora, STRENGTH)[0]
    hooked = tuple(set_hooks_for_conditioning(p, hooks) for p in prompts)
    torch.testing.assert_close(sample(load(), hooked, cfg=5.0), expected, rtol=1e-4, atol=1e-4)


def test_saving_and_loading_again_changes_nothing_and_keeps_the_safe_form(
    comfy_host, load, prompts, models, monkeypatch
):
    import comfy.supported_models
    from comfy_extras.nodes_model_merging import ModelSave

    from lyra_core.models import lyra2_host

    expected = sample(load(), prompts)
    ModelSave().save(load(), "saved")
    saved = next((comfy_host / "output").glob("saved*.safetensors"))
    saved.rename(models / "saved.safetensors")
    with safe_open(models / "saved.safetensors", "pt") as file:
        assert len(file.get_slice("model.diffusion_model.patch_embedding.weight").get_shape()) == 2
    assert torch.equal(sample(load("saved.safetensors"), prompts), expected)
    others = [model for model in comfy.supported_models.models if model is not lyra2_host.Lyra2]
    monkeypatch.setattr(comfy.supported_models, "models", others)
    with pytest.raises(RuntimeError, match="Could not detect model type"):
        load("saved.safetensors")


def test_a_partly_loaded_model_gives_the_same(load, prompts):
    """As with little memory: some weights stay behind and are cast when a layer needs them."""
    model = load()
    expected = sample(model, prompts)
    model.detach()
    model.load(model.load_device, lowvram_model_memory=100_000)
    assert any(getattr(module, "prev_comfy_cast_weights", None) is not None for module in model.model.modules())
    torch.testing.assert_close(sample(model, prompts), expected)


def test_a_training_node_reaches_our_own_layers(load, prompts):
    from comfy_extras.nodes_train import TrainLoraNode

    with torch.inference_mode(False):
        settings = {
            "batch_size": 1,
            "grad_accumulation_steps": 1,
            "steps": 2,
            "learning_rate": 0.01,
            "rank": 2,
            "optimizer": "AdamW",
            "loss_function": "MSE",
            "seed": 0,
            "training_dtype": "none",
            "lora_dtype": "fp32",
            "quantized_backward": False,
            "algorithm": "LoRA",
            "gradient_checkpointing": False,
            "checkpoint_depth": 1,
            "offloading": False,
            "existing_lora": "[None]",
            "bucket_mode": False,
            "bypass_mode": False,
        }
        latents = [{"samples": random(1, 16, 3, *SIZE, seed=3)}]
        result = TrainLoraNode.execute(
            [load()], latents, [prompts[0]], **{key: [value] for key, value in settings.items()}
        )
    trained = result.args[0]
    for layer in ("blocks.0.cam_encoder", "blocks.1.buffer_encoder.0", "clean_patch_embeddings.0", "patch_embedding"):
        up = next(value for key, value in trained.items() if layer in key and "up" in key.lower())
        assert up.abs().max() > 0, f"{layer} was not trained"


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_follows_a_changing_chunk(load, tiny_models, history):
    """What belongs to a chunk must not be frozen into the trace, which is run as it is: compiling it takes most of a minute."""
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    compiled, plain = TorchCompileModel.execute(load(), "eager").args[0], load()
    for h in (history, history_of(tiny_models.TINY["framepack"], seed=50)):
        pair = prompt(h, 10), prompt(h, 11)
        torch.testing.assert_close(sample(compiled, pair, steps=1), sample(plain, pair, steps=1), rtol=1e-3, atol=1e-3)


def test_the_memory_estimate_counts_the_history(load, prompts):
    import comfy.sampler_helpers

    def estimate(prompts):
        converted = {
            name: comfy.sampler_helpers.convert_cond(p)
            for name, p in zip(("positive", "negative"), prompts, strict=True)
        }
        return comfy.sampler_helpers.estimate_memory(load(), (1, 16, 3, *SIZE), converted)[0]

    without = [[text, {}] for text, _ in prompts[0]]
    assert estimate(prompts) > 1.2 * estimate((without, without))


# ------------------------------------------------------------------------------------------------------------- refusals


def refusal(model, prompts, spy, latent=None) -> str:
    """The error of a run that must end before the network is asked anything."""
    with pytest.raises(ValueError) as caught:
        sample(model, prompts, cfg=5.0, latent=latent)
    assert not spy.timesteps
    return str(caught.value)


def test_a_prompt_without_a_history_is_refused(load, prompts, spy):
    bare = [[prompts[1][0][0], {}]]
    assert "Lyra2ChunkConditioning for both" in refusal(load(), (prompts[0], bare), spy)


def test_a_history_of_another_layout_is_refused_with_both_named(load, spy, tiny_models):
    other = "f1k1f2s2f1s1f3k2f1k1_g4"
    text = refusal(load(), (prompt(history_of(other), 1),) * 2, spy)
    assert other in text and tiny_models.TINY["framepack"] in text


def test_a_latent_of_another_size_is_refused_with_both_sizes(load, prompts, spy):
    text = refusal(load(), prompts, spy, {"samples": torch.zeros(1, 16, 3, 6, 10)})
    assert "(3, 6, 10)" in text and "(3, 6, 8)" in text
    assert "(5, 6, 8)" in refusal(load(), prompts, spy, empty_latent(latents=5))


def test_a_prompt_without_the_newest_frame_s_image_is_refused(load, prompts, spy):
    blind = [[text, {k: v for k, v in entries.items() if k != "clip_vision_output"}] for text, entries in prompts[0]]
    assert "CLIPVisionEncode" in refusal(load(), (blind, blind), spy)
    small = SimpleNamespace(penultimate_hidden_states=torch.zeros(1, 50, 768))
    other = [[text, {**entries, "clip_vision_output": small}] for text, entries in prompts[0]]
    assert "(50, 768)" in refusal(load(), (other, other), spy)


def test_a_text_of_another_encoder_is_refused(load, history, spy):
    text = refusal(load(), (prompt(history, 1, width=32),) * 2, spy)
    assert "width 32" in text and "umt5_xxl" in text


def test_a_plain_wan_model_refuses_the_conditioning_of_a_chunk(load, prompts, spy):
    assert "for a Lyra 2 model" in refusal(load("wan.safetensors"), prompts, spy)


def test_an_area_off_the_grid_of_tokens_is_refused(load, prompts):
    from node_helpers import conditioning_set_values

    odd = [conditioning_set_values(p, {"area": (3, 5, 8, 0, 0, 0)}) for p in prompts]
    with pytest.raises(ValueError, match="multiples of 16 pixels"):
        sample(load(), odd)


def test_a_long_prompt_is_cut_with_a_word_and_a_short_one_filled_with_zeros(load, history, caplog):
    model, long = load(), prompt(history, 10, tokens=600)
    with caplog.at_level(logging.WARNING):
        out = sample(model, (long, long))
    assert "600 tokens" in caplog.text
    text, entries = long[0]
    cut = [[text[:, :512], entries]]
    assert torch.equal(out, sample(model, (cut, cut)))
    short, filled = [[text[:, :77], entries]], [[torch.cat([text[:, :77], torch.zeros(1, 435, 64)], 1), entries]]
    assert torch.equal(sample(model, (short, short)), sample(model, (filled, filled)))


# ------------------------------------------------------------------------------------------------- the two sides of CFG


def test_the_host_s_own_node_gives_each_side_of_cfg_to_a_gpu(load, prompts, monkeypatch):
    import comfy.model_management
    from comfy_extras.nodes_multigpu import MultiGPUCFGSplitNode

    from lyra_core.models.lyra2 import Lyra2Model

    expected = sample(load(), prompts, cfg=3.0)
    two = [torch.device("cpu"), torch.device("cpu", 0)]  # the host takes them for two devices
    monkeypatch.setattr(comfy.model_management, "get_all_torch_devices", lambda exclude_current=False: two)
    seen, forward = [], Lyra2Model._forward

    def stepping(self, x, *args, **kwargs):
        seen.append((id(self), len(x), threading.get_ident()))
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(Lyra2Model, "_forward", stepping)
    split = MultiGPUCFGSplitNode.execute(load(), 2).args[0]
    found = sample(split, prompts, cfg=3.0)
    assert [len({entry[place] for entry in seen}) for place in range(3)] == [2, 1, 2] and len(seen) == 4, "not one side for each"
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
