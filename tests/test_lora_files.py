"""LoRAs of every trainer: what the host's LoRA loader adds to the weights is what they were trained to add, or they are refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lyra_core.conditioning.framepack import LYRA2

CASE = Path(__file__).parent / "cases" / "lora-with-its-alpha-beside-it"
CONFIG = {
    "rank": 4, "model_type": "i2v", "in_dim": 36, "out_dim": 16, "dim": 24, "ffn_dim": 32, "freq_dim": 8, "text_dim": 8,
    "num_heads": 2, "num_layers": 2,
}  # fmt: skip
Q = "blocks.1.self_attn.q"
R, OUT, IN, ALPHA = 3, 24, 24, 12.0


@pytest.fixture(scope="module")
def patcher(comfy_host, tmp_path_factory):
    """A tiny network of the host, 24 wide."""
    import comfy.sd

    from lyra_core.models import checkpoints, lyra2_host

    folder = tmp_path_factory.mktemp("loras")
    random = torch.Generator().manual_seed(1)
    shapes = lyra2_host.weight_shapes({**CONFIG, "framepack": str(LYRA2)})
    weights = {f"net.{name}": torch.randn(shape, generator=random) for name, shape in shapes.items()}
    save_file(weights, folder / "source.safetensors")
    checkpoints.convert(folder / "source.safetensors", folder / "t.safetensors", torch.float32, stored={"num_heads": 2})
    return comfy.sd.load_diffusion_model(str(folder / "t.safetensors"), {"dtype": torch.float32})


@pytest.fixture
def added(patcher, tmp_path, caplog):
    """Converts a LoRA and says what the host's loader adds with it: {parameter: difference}, and the report."""
    import comfy.lora
    import comfy.sd

    from lyra_core.models import checkpoints

    def convert(source: Path) -> tuple[dict[str, torch.Tensor], object]:
        target = tmp_path / "converted" / "lora.safetensors"
        target.unlink(missing_ok=True)
        report = checkpoints.convert(source, target)
        caplog.clear()
        file = load_file(target)
        patched = comfy.sd.load_lora_for_models(patcher, None, dict(file), 1.0, 0)[0]
        weights, found = patcher.model.state_dict(), {}
        for key, patches in patched.patches.items():
            before = weights[key].float()
            after = comfy.lora.calculate_weight(patches, before.clone(), key)
            found[key.removeprefix("diffusion_model.")] = after - before
        said = caplog.text.lower()
        assert not any(word in said for word in ("not loaded", "error", "mismatch", "failed")), said
        return found, report

    return convert


def saved(tmp_path: Path, tensors: dict, metadata: dict | None = None) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "lora.safetensors", metadata)
    return tmp_path / "lora.safetensors"


def adapter(tmp_path: Path, tensors: dict, config: dict) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file({f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return folder


def pair(module: str = Q, a: str = "lora_A.weight", b: str = "lora_B.weight", rank: int = R, out: int = OUT, into: int = IN, seed=2):
    random = torch.Generator().manual_seed(seed)
    A, B = torch.randn(rank, into, generator=random), torch.randn(out, rank, generator=random)
    joint = "" if b.startswith("_") else "."
    return {f"{module}{joint}{a}": A, f"{module}{joint}{b}": B}, B @ A


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------- the case


@pytest.mark.parametrize("name", ["adapter", "diffusers.safetensors", "adapter/adapter_model.safetensors"])
def test_alpha_beside_a_lora_counts(added, name):
    found, report = added(CASE / name)
    assert list(found) == ["blocks.0.self_attn.q.weight"]
    close(found["blocks.0.self_attn.q.weight"], torch.full((24, 24), 4.0))
    assert "alpha of 1 modules from" in str(report)


# ------------------------------------------------------------------------------------------------------- layouts

LAYOUTS = [
    ("net.{dots}", "lora_A.weight", "lora_B.weight"),
    ("{dots}", "lora_down.weight", "lora_up.weight"),
    ("diffusion_model.{dots}", "lora_A.weight", "lora_B.weight"),
    ("diffusion_model.{dots}", "lora_down.weight", "lora_up.weight"),
    ("model.diffusion_model.{dots}", "lora_A.weight", "lora_B.weight"),
    ("base_model.model.{dots}", "lora_A.default.weight", "lora_B.default.weight"),
    ("base_model.model.net.{dots}", "lora_A.dmd.weight", "lora_B.dmd.weight"),
    ("pipe.dit.{dots}", "lora_A.default.weight", "lora_B.default.weight"),
    ("dit.{dots}", "lora_A.weight", "lora_B.weight"),
    ("unet.{dots}", "lora.down.weight", "lora.up.weight"),
    ("transformer.{dots}", "lora_A.weight", "lora_B.weight"),
    ("transformer.{diffusers}", "lora_A.weight", "lora_B.weight"),
    ("transformer.{diffusers}", "lora.down.weight", "lora.up.weight"),
    ("base_model.model.{diffusers}", "lora_A.weight", "lora_B.weight"),
    ("{diffusers}", "lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    ("{diffusers}", "lora_A", "lora_B"),
    ("transformer.blocks.1.attn1.processor.to_q", "_lora.down.weight", "_lora.up.weight"),
    ("lora_unet_{flat}", "lora_down.weight", "lora_up.weight"),
    ("lora_unet__{flat}", "lora_down.weight", "lora_up.weight"),
    ("lora_transformer_blocks_1_attn1_to_q", "lora_down.weight", "lora_up.weight"),
    ("lycoris_{flat}", "lora_down.weight", "lora_up.weight"),
]


@pytest.mark.parametrize("with_alpha", [True, False])
@pytest.mark.parametrize(("form", "a", "b"), LAYOUTS)
def test_every_layout_adds_the_same(added, tmp_path, form, a, b, with_alpha):
    module = form.format(dots=Q, flat=Q.replace(".", "_"), diffusers="blocks.1.attn1.to_q")
    tensors, product = pair(module, a, b)
    if with_alpha:
        tensors[f"{module}.alpha"] = torch.tensor(ALPHA)
    found, report = added(saved(tmp_path, tensors))
    assert list(found) == [f"{Q}.weight"]
    close(found[f"{Q}.weight"], product * (ALPHA / R if with_alpha else 1))
    assert ("nothing tells the alpha of 1 modules" in str(report)) != with_alpha


def test_every_module_of_diffusers_is_found(added, tmp_path, patcher):
    """Each is matched by the shape of its weight too: attention, image attention, both layers of ffn, embeddings, head."""
    from lyra_core.models import lora_files

    weights = patcher.model.diffusion_model.state_dict()
    tensors, expected = {}, {}
    for number, (ours, theirs) in enumerate(lora_files.DIFFUSERS.items()):
        ours, theirs = ours.replace("N", "1"), theirs.replace("N", "1")
        weight = weights.get(f"{ours}.weight", weights.get(ours))
        if weight.ndim == 2:
            made, product = pair(f"transformer.{theirs}", out=weight.shape[0], into=weight.shape[1], seed=number)
            tensors |= made
        else:
            product = torch.randn(weight.shape)
            tensors[f"transformer.{theirs}.diff"] = product
        expected[f"{ours}.weight" if f"{ours}.weight" in weights else ours] = product
    found, report = added(saved(tmp_path, tensors))
    assert found.keys() == expected.keys() and not report.unknown
    for key, product in expected.items():
        close(found[key], product)


def test_every_layer_of_the_network_can_have_a_lora(added, tmp_path, patcher):
    tensors, expected = {}, {}
    for number, (key, weight) in enumerate(patcher.model.diffusion_model.state_dict().items()):
        if key.endswith(".weight") and weight.ndim == 2:
            flat = key.removesuffix(".weight").replace(".", "_")
            made, expected[key] = pair(f"lora_unet_{flat}", "lora_down.weight", "lora_up.weight", 2, *weight.shape, seed=number)
            tensors |= made
    found, report = added(saved(tmp_path, tensors))
    assert found.keys() == expected.keys() and len(found) > 40 and not report.unknown
    for key, product in expected.items():
        close(found[key], product)


# ------------------------------------------------------------------------------------------------------- alpha and rank


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({"r": R, "lora_alpha": 6}, 2.0),
        ({"r": R, "lora_alpha": 6, "use_rslora": True}, 6 / math.sqrt(R)),
        ({"r": 16, "lora_alpha": 6, "rank_pattern": {"self_attn.q": R}}, 2.0),
        ({"r": R, "lora_alpha": 6, "alpha_pattern": {"self_attn.q": 9}}, 3.0),
        ({"r": R, "lora_alpha": 6, "alpha_pattern": {"self_attn.k": 9}}, 2.0),
        ({"r": R, "lora_alpha": 6, "alpha_pattern": {r"blocks\.[01]\..*\.q": 1.5}}, 0.5),
        ({"r": R, "lora_alpha": 6, "alpha_pattern": {"attn.q": 9}}, 2.0),
        ({"lora_alpha": 6}, 2.0),
        ({"r": R, "lora_alpha": 0.75, "init_lora_weights": True, "use_dora": False, "bias": "none"}, 0.25),
    ],
)
def test_an_adapter_s_settings_count_as_peft_counts_them(added, tmp_path, config, factor):
    tensors, product = pair()
    found, _ = added(adapter(tmp_path, tensors, config))
    close(found[f"{Q}.weight"], factor * product)


@pytest.mark.parametrize(
    "metadata",
    [
        {"lora_adapter_metadata": json.dumps({"transformer.r": R, "transformer.lora_alpha": 6})},
        {"lora_adapter_metadata": json.dumps({"r": R, "lora_alpha": 6, "alpha_pattern": {}})},
        {"lora_adapter_metadata": json.dumps({"transformer.r": 99, "transformer.lora_alpha": 99,
                                              "transformer.rank_pattern": {"attn1.to_q": R},
                                              "transformer.alpha_pattern": {"blocks.1.attn1.to_q": 6}})},
        {"lora_alpha": "6", "r": "3"},
        {"ss_network_alpha": "6.0", "ss_network_dim": "3", "ss_network_module": "networks.lora_wan"},
        {"format": "pt", "lora_alpha": "6", "rank": "3"},
    ],
)  # fmt: skip
def test_alpha_in_the_metadata_counts(added, tmp_path, metadata):
    tensors, product = pair("transformer.blocks.1.attn1.to_q")
    found, report = added(saved(tmp_path, tensors, metadata))
    close(found[f"{Q}.weight"], 2 * product)
    assert "alpha of 1 modules from the metadata of lora.safetensors" in str(report)


def test_a_module_s_own_alpha_goes_before_what_is_told_beside_it(added, tmp_path):
    tensors, product = pair()
    tensors[f"{Q}.alpha"] = torch.tensor([1.5])
    more, other = pair("blocks.0.ffn.2", out=24, into=32)
    found, report = added(saved(tmp_path, tensors | more, {"lora_alpha": "6", "r": "3"}))
    close(found[f"{Q}.weight"], 0.5 * product)
    close(found["blocks.0.ffn.2.weight"], 2 * other)
    assert "alpha of 1 modules" in str(report)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"r": 4, "lora_alpha": 8}, "says rank 4 of .*tensors have rank 3"),
        ({"peft_type": "VERA", "r": 3}, "says peft_type VERA; only LORA, LOHA, LOKR"),
        ({"r": 3, "lora_alpha": 6, "fan_in_fan_out": True}, "fan_in_fan_out True: it stores weights transposed"),
        ({"r": 3, "lora_alpha": 6, "layer_replication": [[0, 4]]}, "layer_replication"),
        ({"r": 3, "lora_alpha": 6, "init_lora_weights": "pissa_niter_16"}, "pissa_niter_16', which also changes the network"),
        ({"r": 3, "lora_alpha": "many"}, "alpha 'many' and rank 3; both must be numbers"),
        ({"r": 0, "lora_alpha": 6}, "the rank positive"),
    ],
)
def test_settings_that_the_loaders_can_not_follow_are_refused(added, tmp_path, config, words):
    with pytest.raises(ValueError, match=rf"(?s)adapter.*{words}"):
        added(adapter(tmp_path, pair()[0], config))


# ------------------------------------------------------------------------------------------------------- other kinds


def test_a_loha_adds_the_product_of_its_products(added, tmp_path):
    w = [torch.randn(24, 3), torch.randn(3, 24), torch.randn(24, 3), torch.randn(3, 24)]
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    expected = (w[0] @ w[1]) * (w[2] @ w[3])
    own = {f"lycoris_blocks_1_self_attn_q.{name}": part for name, part in zip(names, w, strict=True)}
    found, _ = added(saved(tmp_path, own | {"lycoris_blocks_1_self_attn_q.alpha": torch.tensor(1.5)}))
    close(found[f"{Q}.weight"], 0.5 * expected)
    peft = {f"{Q}.{name}": part for name, part in zip(names, w, strict=True)}
    found, _ = added(adapter(tmp_path, peft, {"peft_type": "LOHA", "r": 3, "alpha": 12}))
    close(found[f"{Q}.weight"], 4 * expected)


@pytest.mark.parametrize("first", ["whole", "product"])
@pytest.mark.parametrize("second", ["whole", "product"])
def test_a_lokr_adds_the_kronecker_product(added, tmp_path, first, second):
    def factor(name, rows, columns, kind):
        if kind == "whole":
            w = torch.randn(rows, columns)
            return {name: w}, w
        a, b = torch.randn(rows, 2), torch.randn(2, columns)
        return {f"{name}_a": a, f"{name}_b": b}, a @ b

    one, w1 = factor("lokr_w1", 4, 6, first)
    two, w2 = factor("lokr_w2", 6, 4, second)
    parts, expected = one | two, torch.kron(w1, w2)
    both_whole = first == second == "whole"
    own = {f"lora_unet_blocks_1_self_attn_q.{name}": part for name, part in parts.items()}
    own["lora_unet_blocks_1_self_attn_q.alpha"] = torch.tensor(3.0)
    found, _ = added(saved(tmp_path, own))
    close(found[f"{Q}.weight"], expected * (1 if both_whole else 1.5))  # LyCORIS leaves whole factors as they are
    found, _ = added(adapter(tmp_path, {f"{Q}.{n}": p for n, p in parts.items()}, {"peft_type": "LOKR", "r": 2, "alpha": 5}))
    close(found[f"{Q}.weight"], expected * 2.5)  # PEFT doesn't


def test_differences_of_weights_biases_and_norms_are_added(added, tmp_path):
    parts = {
        f"diffusion_model.{Q}.diff_b": torch.randn(24), "diffusion_model.blocks.0.norm3.diff": torch.randn(24),
        "diffusion_model.blocks.0.norm3.diff_b": torch.randn(24), "lora_unet_blocks_1_norm3.w_norm": torch.randn(24),
        "lora_unet_blocks_1_norm3.b_norm": torch.randn(24), "blocks.0.self_attn.norm_q.diff": torch.randn(24),
        "head.head.diff": torch.randn(64, 24), "blocks.1.modulation.diff": torch.randn(1, 6, 24),
        "head.modulation.diff": torch.randn(1, 2, 24), "patch_embedding.diff": torch.randn(24, 144),
    }  # fmt: skip
    q, product = pair()
    found, report = added(saved(tmp_path, parts | q))
    p = list(parts.values())
    expected = {
        f"{Q}.bias": p[0], f"{Q}.weight": product, "blocks.0.norm3.weight": p[1], "blocks.0.norm3.bias": p[2],
        "blocks.1.norm3.weight": p[3], "blocks.1.norm3.bias": p[4], "blocks.0.self_attn.norm_q.weight": p[5],
        "head.head.weight": p[6], "blocks.1.modulation": p[7], "head.modulation": p[8],
        "patch_embedding.weight": p[9],
    }  # fmt: skip
    assert found.keys() == expected.keys() and not report.unknown
    for key, difference in expected.items():
        close(found[key], difference.view_as(found[key]))


def test_a_lora_on_the_patch_embedding_and_a_bias_of_b_are_added(added, tmp_path):
    down, up = torch.randn(2, 36, 1, 2, 2), torch.randn(24, 2, 1, 1, 1)
    bias = torch.randn(24)
    tensors = {"patch_embedding.lora_A.weight": down, "patch_embedding.lora_B.weight": up, "patch_embedding.lora_B.bias": bias}
    found, _ = added(adapter(tmp_path, tensors, {"r": 2, "lora_alpha": 4, "lora_bias": True}))
    close(found["patch_embedding.weight"].flatten(1), 2 * up.flatten(1) @ down.flatten(1))
    close(found["patch_embedding.bias"], 2 * bias)
    difference = torch.randn(24, 36, 1, 2, 2)
    close(added(saved(tmp_path, {"diffusion_model.patch_embedding.diff": difference}))[0]["patch_embedding.weight"], difference)


def test_a_magnitude_per_input_is_what_the_host_does_too(added, tmp_path, patcher):
    tensors, product = pair("blocks.0.ffn.2", out=24, into=32)
    tensors["blocks.0.ffn.2.dora_scale"] = magnitude = torch.rand(1, 32) + 0.5
    found, _ = added(saved(tmp_path, tensors))
    weight = patcher.model.diffusion_model.state_dict()["blocks.0.ffn.2.weight"]
    whole = weight + product
    close(found["blocks.0.ffn.2.weight"], magnitude * whole / whole.norm(dim=0, keepdim=True) - weight)


# ------------------------------------------------------------------------------------------------------- refusals

REFUSED = {
    "DoRA of PEFT": (lambda q: q | {f"{Q}.lora_magnitude_vector.weight": torch.ones(24)}, "DoRA with a magnitude per output"),
    "DoRA of PEFT, named": (lambda q: q | {f"{Q}.lora_magnitude_vector.default": torch.ones(24)}, "DoRA"),
    "DoRA of LyCORIS": (lambda q: q | {f"{Q}.dora_scale": torch.ones(24, 1)}, "DoRA with a magnitude per output"),
    "half a pair": (lambda q: {f"{Q}.lora_A.weight": torch.ones(3, 24)}, "lacks lora_B.weight.*incomplete"),
    "the other half": (lambda q: {f"{Q}.lora_up.weight": torch.ones(24, 3)}, "lacks lora_down.weight.*incomplete"),
    "an alpha alone": (lambda q: {f"{Q}.alpha": torch.ones(())}, "has only alpha, which adds nothing"),
    "two pairs": (lambda q: q | pair(Q, "lora_down.weight", "lora_up.weight")[0], "the loaders use one pair"),
    "two adapters": (
        lambda q: pair(Q, "lora_A.one.weight", "lora_B.one.weight")[0] | pair(Q, "lora_A.two.weight", "lora_B.two.weight")[0],
        "several tensors for one key.*lora_A.one.weight",
    ),
    "two names": (lambda q: q | pair("transformer.blocks.1.attn1.to_q")[0], "several tensors for one key"),
    "two kinds": (lambda q: q | {f"{Q}.diff": torch.ones(24, 24)}, "has lora and diff for one weight"),
    "ranks": (lambda q: q | {f"{Q}.lora_B.weight": torch.ones(24, 4)}, "which have no rank in common"),
    "Tucker": (lambda q: q | {f"{Q}.lora_mid.weight": torch.ones(3, 3, 1, 1)}, "lora_mid.weight, the core of a convolution"),
    "OFT": (lambda q: {f"{Q}.oft_blocks": torch.ones(2, 3, 3)}, "has oft_blocks; only LoRA, LoHa, LoKr"),
    "GLoRA": (lambda q: {f"{Q}.a1.weight": torch.ones(2, 3)}, "has glora_a1; only LoRA"),
    "whole weights": (lambda q: q | {"head.head.weight": torch.ones(64, 24)}, "whole weights beside a LoRA.*head.head.weight"),
    "whole biases": (lambda q: q | {f"{Q}.bias": torch.ones(24)}, "whole weights beside a LoRA"),
    "alpha of many": (lambda q: q | {f"{Q}.alpha": torch.ones(2)}, "its alpha, of shape .2,., is no finite number"),
    "alpha NaN": (lambda q: q | {f"{Q}.alpha": torch.tensor(math.nan)}, "is no finite number"),
    "half a LoHa": (lambda q: {f"{Q}.hada_w1_a": torch.ones(24, 2)}, "lacks hada_w1_b"),
    "half a LoKr": (lambda q: {f"{Q}.lokr_w1": torch.ones(4, 4)}, "lacks lokr_w2_a"),
    "nothing fits": (lambda q: pair("double_blocks.0.img_attn.qkv")[0], "fits Lyra 2 nowhere.*double_blocks.N.img_attn.qkv"),
    "text encoder only": (lambda q: pair("lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_down.weight", "lora_up.weight")[0],
                          "fits Lyra 2 nowhere"),
    "too many blocks": (lambda q: pair("blocks.40.self_attn.q")[0], "fits Lyra 2 nowhere"),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_what_the_loaders_would_not_use_as_it_was_trained_is_refused_by_name(added, tmp_path, fault):
    change, words = REFUSED[fault]
    with pytest.raises(ValueError, match=f"(?s)lora.safetensors.*{words}"):
        added(saved(tmp_path, change(pair()[0])))
    assert not (tmp_path / "converted").exists() or not list((tmp_path / "converted").iterdir())


def test_what_does_not_fit_is_named_once_for_all_blocks_and_left_out(added, tmp_path):
    tensors = pair()[0]
    for module in ("blocks.0.audio.q", "blocks.1.audio.q", "lora_unet_blocks_7_face", "clean_patch_embeddings.6"):
        tensors |= pair(module)[0]
    tensors["blocks.0.self_attn.norm_q.diff_b"] = torch.ones(24)  # that norm has no bias
    found, report = added(saved(tmp_path, tensors))
    assert list(found) == [f"{Q}.weight"]
    assert report.unknown == (
        "blocks.N.audio.q", "blocks.N.self_attn.norm_q.bias", "blocks_N_face", "clean_patch_embeddings.6",
    )  # fmt: skip
    assert "Lyra 2 has no such modules, they were left out:\nblocks.N.audio.q" in str(report)


def test_a_lora_for_a_network_of_another_width_is_said_to_be_one(added, tmp_path):
    assert "trained for another network: blocks.1.self_attn.q takes 24 numbers and the released Lyra 2's 5120" in str(
        added(saved(tmp_path, pair()[0]))[1]
    )
    from lyra_core.models import checkpoints

    right = saved(tmp_path, pair(out=5120, into=5120)[0])
    assert "another network" not in str(checkpoints.convert(right, tmp_path / "right.safetensors"))


def test_an_adapter_saved_before_safetensors_is_read(added, tmp_path):
    tensors, product = pair()
    folder = adapter(tmp_path, tensors, {"r": 3, "lora_alpha": 6})
    (folder / "adapter_model.safetensors").unlink()
    torch.save({f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, folder / "adapter_model.bin")
    close(added(folder)[0][f"{Q}.weight"], 2 * product)


def test_settings_beside_another_file_are_not_its_own(added, tmp_path):
    shutil.copy(CASE / "adapter" / "adapter_config.json", tmp_path)
    tensors, product = pair()
    close(added(saved(tmp_path, tensors))[0][f"{Q}.weight"], product)
