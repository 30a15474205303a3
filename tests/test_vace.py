"""Wan VACE on the host's own classes, with a tiny checkpoint: what it is told, what stays exact, what it is refused."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

LENGTH, SIZE = 9, (64, 96)
LATENTS, CELLS = 3, (8, 12)


@pytest.fixture(autouse=True)
def inference():
    """As the host runs its nodes."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def host(comfy_host, tiny_models, tmp_path_factory):
    """The tiny networks through the host's loaders, and its nodes."""
    import comfy.sd
    from comfy_extras import nodes_custom_sampler, nodes_model_advanced, nodes_wan
    from safetensors.torch import load_file

    folder = tmp_path_factory.mktemp("vace")
    with torch.inference_mode(False):
        vae = comfy.sd.VAE(sd=load_file(tiny_models.write_vae(folder / "vae.safetensors")))
        models = [
            comfy.sd.load_diffusion_model(
                str(tiny_models.write_vace(folder / f"vace{layers}.safetensors", layers)), {"dtype": torch.float32}
            )
            for layers in (1, 2)
        ]
    return SimpleNamespace(
        vae=vae, model=models[0], other=models[1], wan=nodes_wan, sampling=nodes_custom_sampler, advanced=nodes_model_advanced
    )


@pytest.fixture(scope="module")
def vace(comfy_host):
    return importlib.import_module("lyra_core.models.vace")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def video() -> torch.Tensor:
    return noise(LENGTH, *SIZE, 3)


def text(seed: int = 3) -> list:
    return [[noise(1, 77, 768, seed=seed) - 0.5, {}]]


def same_in_all_frames() -> torch.Tensor:
    mask = torch.zeros(LENGTH, *SIZE, dtype=torch.bool)
    mask[:, 10:40, 33:] = True
    return mask


def sampled(host, model, told, mask=True, steps=2, seed=5, strength=1.0, cfg=3.0):
    """Latents (1, 16, T, h, w) by the host's own sampler, references cut off."""
    import comfy.sample

    positive, negative = (
        [[c[0], {**c[1], **told.entries(strength)}] for c in prompt] for prompt in (text(3), text(4))
    )
    samples = comfy.sample.sample(
        model,
        comfy.sample.prepare_noise(told.latent, seed),
        steps,
        cfg,
        "euler",
        "simple",
        positive,
        negative,
        told.latent,
        noise_mask=told.noise_mask if mask else None,
        disable_pbar=True,
    )
    return samples[:, :, told.references :]


# --------------------------------------------------------------------------------------------------------- what it is told


@pytest.mark.parametrize("references", [0, 1])
def test_the_conditioning_is_the_host_s_bit_for_bit(host, vace, references):
    shown, mask = video(), same_in_all_frames()
    pictures = noise(references, *SIZE, 3, seed=9) if references else None
    theirs = host.wan.WanVaceToVideo.execute(
        text(), text(), host.vae, SIZE[1], SIZE[0], LENGTH, 1, 0.7, shown, mask.float(), pictures
    ).args
    ours = vace.control(host.vae, shown, mask, 0, pictures)
    for key, (value,) in ours.entries(0.7).items():
        (expected,) = theirs[0][0][1][key]
        assert torch.equal(value, expected) if isinstance(value, torch.Tensor) else value == expected, key
    assert torch.equal(ours.latent, theirs[2]["samples"]) and ours.references == theirs[3] == references


def test_a_latent_is_painted_if_any_of_its_frames_shall_be(host, vace):
    mask = torch.zeros(LENGTH, *SIZE, dtype=torch.bool)
    mask[3, 17, 42] = mask[5, 60, 90] = True
    told = vace.control(host.vae, video(), mask)
    expected = torch.zeros(1, 64, LATENTS, *CELLS)
    expected[0, 8 * (17 % 8) + 42 % 8, 1, 17 // 8, 42 // 8] = 1  # of frames 1 to 4
    expected[0, 8 * (60 % 8) + 90 % 8, 2, 60 // 8, 90 // 8] = 1  # of frames 5 to 8
    assert torch.equal(told.mask, expected)


def test_several_references_stand_in_front_each_encoded_alone_and_are_cut_off(host, vace):
    pictures = noise(3, *SIZE, 3, seed=9)
    told, without = (vace.control(host.vae, video(), same_in_all_frames(), 1, p) for p in (pictures, None))
    assert told.references == 3 and told.frames.shape == (1, 32, 3 + LATENTS, *CELLS)
    for index, picture in enumerate(pictures):
        assert torch.equal(told.frames[:, :16, index : index + 1], host.vae.encode(picture[None]))
    assert torch.equal(told.frames[:, :, 3:], without.frames) and not told.mask[:, :, :3].any()
    result = sampled(host, host.model, told)
    assert result.shape == (1, 16, LATENTS, *CELLS) and torch.isfinite(result).all()
    assert host.vae.decode(result).shape == (1, LENGTH, *SIZE, 3)
    assert not torch.allclose(result, sampled(host, host.model, without))


def test_holes_say_something_unless_they_are_mid_grey(host, vace):
    mask = same_in_all_frames()
    grey = torch.where(mask[..., None], 0.5, video())
    black = torch.where(mask[..., None], 0.0, video())
    results = [sampled(host, host.model, vace.control(host.vae, shown, mask)) for shown in (grey, black)]
    assert not torch.allclose(*results)
    streams = vace.control(host.vae, grey, mask).frames[:, 16:]
    assert torch.equal(streams, host.vae.encode(torch.full((LENGTH, *SIZE, 3), 0.5)))  # nothing to react to


def test_at_strength_0_the_control_says_nothing(host, vace):
    first, second = (vace.control(host.vae, noise(LENGTH, *SIZE, 3, seed=s), same_in_all_frames(), 0) for s in (0, 1))
    assert torch.equal(*(sampled(host, host.model, told, strength=0.0) for told in (first, second)))
    assert not torch.equal(*(sampled(host, host.model, told) for told in (first, second)))


# ------------------------------------------------------------------------------------------------------ what stays exact


@pytest.mark.parametrize("pinned, latents, references", [(1, 1, 0), (5, 2, 0), (1, 1, 2)])
def test_pinned_frames_come_out_as_they_went_in(host, vace, pinned, latents, references):
    pictures = noise(references, *SIZE, 3, seed=9) if references else None
    told = vace.control(host.vae, video(), same_in_all_frames(), pinned, pictures)
    known = host.vae.encode(video()[:pinned])
    result = sampled(host, host.model, told)
    assert_close(result[:, :, :latents], known, rtol=0, atol=2e-6)
    assert not torch.allclose(result[:, :, latents:], told.latent[:, :, told.references + latents :])
    alone = host.vae.decode(known)[0]
    assert_close(host.vae.decode(result)[0, :pinned], alone, rtol=0, atol=1e-5)


def experts(host, vace, told, boundary=0.9, steps=6, models=None):
    """Sampled as the nodes do it: the second expert goes on from what the first left."""
    high, low = models or (host.model, host.other)
    sigmas = host.sampling.BasicScheduler.execute(high, "simple", steps, 1.0).args[0]
    solver = host.sampling.KSamplerSelect.execute("euler").args[0]
    latent = {"samples": told.latent, "noise_mask": told.noise_mask}
    prompt = [[c[0], {**c[1], **told.entries(1.0)}] for c in text()]
    rest, left = host.sampling.RandomNoise.execute(5).args[0], None
    parts = zip((high, low), vace.split(sigmas, boundary), strict=True) if low is not None else [(high, sigmas)]
    for model, levels in parts:
        guider = host.sampling.CFGGuider.execute(model, prompt, prompt, 1.0).args[0]
        if left is not None:
            rest = vace.Leftover(left, float(levels[0]))
        left = host.sampling.SamplerCustomAdvanced.execute(rest, guider, solver, levels, latent).args[0]["samples"]
    return left


def test_two_experts_that_are_one_model_paint_as_that_model_alone(host, vace):
    """And known frames stay exact across the change of experts."""
    told = vace.control(host.vae, video(), same_in_all_frames(), 5)
    alone = experts(host, vace, told, models=(host.model, None))
    twice = experts(host, vace, told, models=(host.model, host.model))
    assert_close(twice, alone, rtol=0, atol=1e-4)
    assert_close(twice[:, :, :2], host.vae.encode(video()[:5]), rtol=0, atol=1e-5)
    assert not torch.allclose(experts(host, vace, told), alone, atol=1e-3)


def test_experts_that_one_of_has_nothing_to_do_are_refused(vace):
    sigmas = torch.tensor([1.0, 0.8, 0.5, 0.0])
    high, low = vace.split(sigmas, 0.7)
    assert high.tolist() == pytest.approx([1, 0.8, 0.5]) and low.tolist() == pytest.approx([0.5, 0])
    for boundary in (0.2, 1.1):
        with pytest.raises(ValueError, match="nothing is left for one of the two experts"):
            vace.split(sigmas, boundary)


def test_what_is_known_is_trusted_in_the_first_steps_and_free_afterwards(host, vace):
    told = vace.control(host.vae, video(), same_in_all_frames(), 1, trust=True)
    free = told.mask.amax(1, keepdim=True) > 0
    assert torch.equal(told.noise_mask[:, :, 1:] == vace.TRUSTED, ~free[:, :, 1:]) and not told.noise_mask[:, :, 0].any()
    sigmas = host.sampling.BasicScheduler.execute(host.model, "simple", 4, 1.0).args[0]
    control = host.vae.encode(video())
    known = (~free).expand_as(control)
    off = []
    for steps in (0, 3, 4):
        result = sampled(host, vace.trusting(host.model, sigmas, steps), told, steps=4, cfg=1.0)
        assert_close(result[:, :, :1], control[:, :, :1], rtol=0, atol=2e-2)  # encoded alone or with what follows
        off.append(float((result - control)[known].abs().mean()))
    assert off[2] < 1e-3 < 2 * off[1] < off[0] * 2


def test_a_lora_reaches_both_kinds_of_blocks(host, vace):
    import comfy.sd

    generator = torch.Generator().manual_seed(0)
    results = []
    told = vace.control(host.vae, video(), same_in_all_frames())
    for block in ("blocks.0", "vace_blocks.0"):
        lora = {
            f"diffusion_model.{block}.self_attn.q.lora_{name}.weight": torch.randn(*shape, generator=generator)
            for name, shape in (("A", (4, 128)), ("B", (128, 4)))
        }
        results.append(sampled(host, comfy.sd.load_lora_for_models(host.model, None, lora, 1.0, 0)[0], told))
    plain = sampled(host, host.model, told)
    assert not torch.allclose(results[0], plain) and not torch.allclose(results[1], plain)


# ---------------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "frames, masks, pinned, references, says",
    [
        ((9, 64, 96, 3), (1, 64, 96), 1, None, "One mask is not repeated"),
        ((9, 64, 96, 3), (8, 64, 96), 1, None, "9 frames of 96x64, but its masks are 8 of 96x64"),
        ((9, 64, 96, 3), (9, 64, 80), 1, None, "masks are 9 of 80x64"),
        ((10, 64, 96, 3), (10, 64, 96), 1, None, "10 frames: VACE makes 1 more than a multiple of 4, such as 9"),
        ((9, 64, 88, 3), (9, 64, 88), 1, None, "88x64; both sides must be multiples of 16"),
        ((9, 64, 96, 3), (9, 64, 96), 2, None, "2 frames can't be kept exactly"),
        ((9, 64, 96, 3), (9, 64, 96), 13, None, "13 frames can't be kept exactly"),
        ((9, 64, 96, 3), (9, 64, 96), 1, (2, 32, 96, 3), "the references are 96x32, the control video is 96x64"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_numbers(host, vace, frames, masks, pinned, references, says):
    pictures = None if references is None else torch.zeros(references)
    with pytest.raises(ValueError, match=says):
        vace.control(host.vae, torch.zeros(frames), torch.zeros(masks, dtype=torch.bool), pinned, pictures)


def test_each_generator_refuses_the_other_s_file_and_plain_wan(host, vace, tiny_models, tmp_path):
    import comfy.sd

    from lyra_core.models import lyra2_host

    with torch.inference_mode(False):
        lyra, plain = (
            comfy.sd.load_diffusion_model(str(write(tmp_path / f"{write.__name__}.safetensors")), {"dtype": torch.float32})
            for write in (tiny_models.write_lyra2, tiny_models.write_wan)
        )
    vace.check_model(host.model)
    lyra2_host.check_model(lyra)
    for model, says in ((lyra, "the Lyra 2 transformer, not Wan VACE"), (plain, "a WAN21 model, not Wan VACE.*no vace_patch")):
        with pytest.raises(ValueError, match=says):
            vace.check_model(model)
    for model, says in ((host.model, "WAN21_Vace model, not the Lyra 2.*generator 'Wan VACE'"), (plain, "a WAN21 model, not")):
        with pytest.raises(ValueError, match=says):
            lyra2_host.check_model(model)
