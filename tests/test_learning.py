"""How the host's networks are called by training: the codec goes on where a walk does, the transformer sees what a walk shows."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from learners import generator, look, wall
from torch.testing import assert_close

from lyra_core.cameras.camera import pinhole
from lyra_core.memory.depth import room_box
from lyra_core.training import losses, optimisation, sets
from lyra_core.training.contracts import Encoders, stack
from lyra_core.training.examples import evaluating, example
from lyra_core.training.painting import paint
from lyra_core.training.recipe import Recipe
from lyra_core.training.sample import Sample, Window
from lyra_core.world.world import append, begin, keyframe_ids, plan

SIZE = (16, 32)
NET = {"rank": 8, "dim": 24, "ffn_dim": 48, "num_heads": 2, "num_layers": 2, "text_dim": 16, "freq_dim": 32}


@pytest.fixture(scope="module")
def vae(comfy_host, tiny_models, tmp_path_factory):
    import comfy.sd
    from safetensors.torch import load_file

    return comfy.sd.VAE(sd=load_file(tiny_models.write_vae(tmp_path_factory.mktemp("vae") / "vae.safetensors", dim=4)))


@pytest.fixture(scope="module")
def codec(vae):
    from lyra_core.models import learning, streaming_vae

    streaming_vae.load(vae, (2, 4))
    return learning.HostCodec(vae)


@pytest.fixture
def model(comfy_host, tiny_models, tmp_path):
    import comfy.sd

    with torch.inference_mode(False):
        path = tiny_models.write_lyra2(tmp_path / "lyra2.safetensors", {**tiny_models.LYRA2_14B, **NET})
        return comfy.sd.load_diffusion_model(str(path), {"dtype": torch.float32})


@pytest.fixture(scope="module")
def sample():
    return wall(161, SIZE)


def encoders(codec):
    from lyra_core.models import learning

    def tell(caption):
        return torch.tensor([[float(len(caption) + i) / 20 for i in range(16)]] * 3)

    def see(picture):
        return look(picture).new_zeros(257, 1280) + picture.mean()

    return Encoders(codec, see, learning.padded(tell))


def test_a_video_encoded_in_parts_is_the_video_encoded_at_once(codec):
    frames = torch.cat([(video := wall(129, (16, 16))).pictures([0] * 8), video.pictures(range(129))])
    whole = codec.encode(frames)
    assert_close(codec.encode(frames[129:], frames[:129]), whole[:, 33:], atol=1e-5, rtol=1e-4)
    decoded = codec.decode(whole)
    assert_close(codec.decode(whole[:, 33:], whole[:, :33]), decoded[129:], atol=1e-5, rtol=1e-4)
    assert decoded.shape == frames.shape and whole.std() < 50


def test_training_sees_what_a_walk_shows(codec, vae, model):
    """The second chunk of a world, packed by the loop and made into an example."""
    import comfy.clip_vision

    from lyra_core.models import generation, learning, lyra2_host

    room = room_box(SIZE, pinhole(SIZE, 40.0).K[0], (0.5, 0.5), (0.3, 0.3, 0.7, 0.7), 4.0)
    path = wall(161, SIZE).cameras
    world = begin(wall(1, SIZE).picture(0) / 2 + 0.5, room.depth, path[:1])
    frames, depths = wall(161, SIZE).frames, {}
    first = plan(world, path[1:81], views=1)
    depths = {frame: room.depth for frame in keyframe_ids(first)}
    world = append(world, first, frames[1:81], torch.zeros(80, *SIZE, dtype=torch.bool), depths)
    second = plan(world, path[81:161], views=1)
    packed = generation.pack(world, second, vae)
    sample = Sample("walk", torch.cat([world.first.frames, frames[1:]]), path, {0: room.depth, **depths})
    shown = example(sample, Window(1, 81, 80), encoders(codec), evaluating(Recipe()), generator()).condition
    base = model.model
    assert_close(shown.history, base.process_latent_in(packed.latents[None])[0], atol=2e-5, rtol=1e-4)
    assert_close(shown.warped, base.process_latent_in(packed.warped[None])[0], atol=1e-3, rtol=1e-3)
    guides = packed.guides()
    assert_close(shown.rays, guides.rays)
    assert_close(shown.correspondences, guides.correspondences)
    velocity = learning.as_model(base.diffusion_model)(noisy := torch.randn(1, 16, 20, 2, 4), torch.tensor([700.0]), stack([shown]))
    seen = comfy.clip_vision.Output()
    seen["penultimate_hidden_states"] = shown.image[None]
    told = {**lyra2_host.conditioning(packed), "clip_vision_output": seen, "cross_attn": shown.text[None]}
    conds = base.extra_conds(noise=noisy, device=torch.device("cpu"), **told)
    with torch.no_grad():
        clean = base.apply_model(noisy, torch.tensor([0.7]), **{name: part.process_cond(1, area=None).cond for name, part in conds.items()})
    assert_close((noisy - clean) / 0.7, velocity, atol=1e-3, rtol=1e-3)


def test_a_step_trains_the_transformer_where_the_filter_says_with_and_without_checkpoints(codec, model, sample):
    from lyra_core.models import learning

    network = model.model.diffusion_model
    weights = optimisation.trained(network, optimisation.of_lyra2)
    shown, found = example(sample, Window(0, 1, 80), encoders(codec), Recipe(), generator()), []
    for checkpointed in (False, True):
        network.zero_grad()
        call = learning.as_model(network, checkpointed=checkpointed)
        loss = losses.flow_loss(call, [shown], Recipe(), generator(2), losses.nearest_timestep(600))
        loss.backward()
        found.append((loss.item(), {name: weight.grad.clone() for name, weight in weights.items()}))
        assert all(weight.grad is None for name, weight in network.named_parameters() if name not in weights)
    assert found[0][0] == found[1][0] > 0
    assert_close(found[0][1], found[1][1])
    assert all(grad.abs().sum() > 0 for grad in found[0][1].values())


# ----------------------------------------------------------------------------------------------------------- adapters


@pytest.fixture(scope="module")
def shown(codec, sample):
    return example(sample, Window(0, 1, 80), encoders(codec), evaluating(Recipe()), generator())


@pytest.fixture(scope="module")
def small(comfy_host, tiny_models, tmp_path_factory):
    """A transformer for chunks of 8 frames."""
    import comfy.sd

    from lyra_core.models import lyra2_host

    lyra2_host.register()
    config = {**tiny_models.LYRA2_14B, **NET, "num_layers": 1, "framepack": "f1k1f1s1f1k2f1k1_g2"}
    path = tiny_models.write_lyra2(tmp_path_factory.mktemp("small") / "lyra2.safetensors", config)
    with torch.inference_mode(False):
        return comfy.sd.load_diffusion_model(str(path), {"dtype": torch.float32})


def train_a_little(trainee, shown, steps=12, rate=0.05, **more):
    from lyra_core.models import adapters

    adam, found = optimisation.optimiser(trainee.weights.values(), rate), []
    with adapters.in_place(trainee, [], **more) as call:
        for _ in range(steps):
            adam.zero_grad()
            loss = losses.flow_loss(call, [shown], Recipe(), generator(1), losses.nearest_timestep(850))
            loss.backward()
            adam.step()
            found.append(loss.item())
    return found


def test_a_lora_is_learned_where_the_filter_says_and_the_stock_loader_takes_it(model, shown):
    import comfy.sd

    from lyra_core.models import adapters, learning

    before = {name: weight.clone() for name, weight in model.model.state_dict().items()}
    trainee = adapters.with_adapters(model, optimisation.of_lyra2, 4)
    found = train_a_little(trainee, shown)
    assert found[-1] < 0.9 * found[0]
    lora = trainee.lora()
    modules = {name.split(".lora_")[0].removeprefix("diffusion_model.") for name in lora if ".lora_" in name}
    matrices = {name for name, weight in model.model.diffusion_model.named_parameters() if weight.ndim > 1}
    assert {f"{module}.weight" for module in modules} == set(filter(optimisation.of_lyra2, matrices))
    assert all(lora[f"diffusion_model.{module}.alpha"] == 4 for module in modules)
    assert all(weight.grad is None and not weight.requires_grad for weight in trainee.network.parameters())
    assert all(torch.equal(before[name], weight) for name, weight in model.model.state_dict().items())
    noise, errors = torch.randn(shown.target.shape, generator=generator(4)), []
    for loaded in (model, comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0)[0]):
        comfy.model_management.load_models_gpu([loaded])
        painted = paint(learning.as_model(loaded.model.diffusion_model), shown.condition, noise, 4)
        errors.append((painted - shown.target).abs().mean())
        comfy.model_management.unload_all_models()
    assert errors[1] < 0.9 * errors[0]


def test_the_transformer_learns_one_chunk_by_heart_within_two_hundred_steps(small, codec):
    from lyra_core.models import adapters

    recipe = Recipe(layout=small.model.diffusion_model.layout)
    shown = example(wall(17, SIZE), Window(0, 1, 8), encoders(codec), evaluating(recipe), generator())
    trainee = adapters.of_all_weights(small, optimisation.everything)
    adam, found = optimisation.optimiser(trainee.weights.values(), 5e-3), []
    with adapters.in_place(trainee, [], checkpointed=False) as call:
        while len(found) < 200 and not (found and found[-1] < found[0] / 10):
            adam.zero_grad()
            loss = losses.flow_loss(call, [shown], recipe, generator(1), losses.nearest_timestep(900))
            loss.backward()
            adam.step()
            found.append(loss.item())
    assert 5 < len(found) < 200


def test_all_weights_are_learned_and_their_differences_are_a_lora(model, shown):
    import comfy.sd

    from lyra_core.models import adapters, learning

    trainee = adapters.of_all_weights(model, optimisation.of_lyra2)
    found = train_a_little(trainee, shown, 4, 1e-3)
    assert found[-1] < found[0]
    patched = comfy.sd.load_lora_for_models(model, None, trainee.lora(), 1.0, 0)[0]
    comfy.model_management.load_models_gpu([patched])
    loaded = dict(patched.model.diffusion_model.named_parameters())
    for name, weight in trainee.weights.items():
        assert_close(loaded[name], weight, atol=1e-6, rtol=1e-5)
    assert learning.as_model(patched.model.diffusion_model)
    comfy.model_management.unload_all_models()


def test_products_may_be_in_bfloat16(model, shown):
    from lyra_core.models import adapters

    trainee = adapters.with_adapters(model, optimisation.matching("self_attn"), 2)
    found = train_a_little(trainee, shown, 2, half=True)
    assert all(weight.dtype == torch.float32 and weight.grad.isfinite().all() for weight in trainee.weights.values())
    exact = train_a_little(adapters.with_adapters(model, optimisation.matching("self_attn"), 2), shown, 1)
    assert found[0] == pytest.approx(exact[0], rel=0.05) and found[0] != exact[0]


def test_what_can_not_be_trained_is_refused(model):
    from lyra_core.models import adapters

    with pytest.raises(ValueError, match="a rank of 1 at least, found 0"):
        adapters.with_adapters(model, optimisation.of_lyra2, 0)
    with pytest.raises(ValueError, match="nothing would be learned"):
        adapters.with_adapters(model, optimisation.matching("nowhere"), 4)


# ----------------------------------------------------------------------------------------------------- memory and time


def test_a_lora_of_the_released_model_fits_one_card_of_80_gb_as_counted(comfy_host, tiny_models):
    from lyra_core.models import planner
    from lyra_core.models.lyra2 import Lyra2Model

    network = Lyra2Model(**tiny_models.LYRA2_14B, device="meta", operations=torch.nn)
    shapes = {name: weight.shape for name, weight in network.named_parameters()}
    whole = 2 * sum(shape.numel() for shape in shapes.values())
    lora = sum(16 * (s[0] + s[1:].numel()) for name, s in shapes.items() if len(s) > 1 and optimisation.of_lyra2(name))
    card = planner.Card("one card of 80 GB", 80e9 / 2**30, 660.0)
    found = planner.teaching(network, (480, 832), 2, lora, whole)
    assert found.tokens == 38246 and 60 < found.needed < card.memory
    told = "\n".join(found.lines(card, 1000))
    assert "one card of 80 GB, 75 GiB: fits" in told and "counted, not measured" in told
    assert planner.teaching(network, (480, 832), 2, lora, whole, checkpointed=False).needed > 200
    full = planner.teaching(network, (480, 832), 2, sum(s.numel() for s in shapes.values()), whole)
    assert "does not fit: switch offload on" in "\n".join(full.lines(card, 1))
    assert "not known without a GPU" in found.lines(None, 1)[1]


# ------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def command(small, vae, monkeypatch, tmp_path):
    """tools/train.py with networks that fit a test, and a set of one wall."""
    import comfy.model_patcher
    from conftest import load_tool

    from lyra_core.models import lessons

    sets.add(tmp_path / "set", wall(17, SIZE), {}, 8)
    cpu = torch.device("cpu")
    patcher = comfy.model_patcher.ModelPatcher(torch.nn.Linear(1, 1), cpu, cpu)
    clip = SimpleNamespace(tokenize=len, encode_from_tokens_scheduled=lambda n: [[torch.full((1, 3, 16), n / 10), {}]])
    eyes = SimpleNamespace(
        patcher=patcher, load_device=cpu, model=lambda pixel_values, **_: (None, pixel_values.mean().expand(1, 257, 1280))
    )
    monkeypatch.setitem(sys.modules, "host", load_tool("host"))
    tool = load_tool("train")
    monkeypatch.setattr(tool, "networks", lambda options: lessons.Networks(small, clip, eyes, vae))
    return lambda *words: tool.main([str(tmp_path / "set"), str(tmp_path / "out" / "lora.safetensors"), *words])


def test_the_command_trains_and_goes_on(command, capsys, tmp_path):
    from safetensors.torch import load_file

    out = tmp_path / "out"
    assert command("--steps", "2", "--rank", "2", "--rate", "0.01", "--preview", "2") == 0
    said = capsys.readouterr().out
    assert "counted, not measured" in said and "step 2 of 2: loss" in said and "wrote" in said
    assert {file.name for file in out.iterdir()} == {"lora.safetensors", "lora.training.safetensors", "lora_2.png"}
    lora = load_file(out / "lora.safetensors")
    assert command("--steps", "4", "--rank", "2", "--rate", "0.01") == 0
    assert any((load_file(out / "lora.safetensors")[name] != weight).any() for name, weight in lora.items())
    assert command("--steps", "4", "--rank", "3", "--rate", "0.01") == 1
    assert "the training was of other weights" in capsys.readouterr().err
    assert command("--steps", "0") == 1 and command("--rank", "0") == 1
    assert "a rank of 1 at least" in capsys.readouterr().err
