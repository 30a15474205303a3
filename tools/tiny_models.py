"""Checkpoints of random weights in the layouts of the released files: tiny ones for tests, any size for benchmarks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

TINY = {
    "framepack": "f1k1f2s2f1s1f3k2f1k1_g3",
    "rank": 8,
    "model_type": "i2v",
    "in_dim": 36,
    "out_dim": 16,
    "dim": 96,
    "ffn_dim": 192,
    "freq_dim": 256,
    "text_dim": 64,
    "num_heads": 3,
    "num_layers": 2,
}
LYRA2_14B = {
    **TINY,
    "framepack": "f1k1f4s2f1s1f16k4f2k2f1k1_g20",
    "rank": 256,
    "dim": 5120,
    "ffn_dim": 13824,
    "text_dim": 4096,
    "num_heads": 40,
    "num_layers": 40,
}

# the released layout, as wide as the smallest text encoder of the host needs it
SMALLEST = {**LYRA2_14B, "rank": 8, "dim": 96, "ffn_dim": 192, "num_heads": 3, "num_layers": 2, "text_dim": 768}


def random_weights(
    shapes: Mapping[str, tuple[int, ...]], seed: int, dtype=torch.float32
) -> Iterator[tuple[str, Tensor]]:
    """Weights that keep activations near 1: matrices scaled by their inputs, norms near 1, the rest small."""
    generator = torch.Generator().manual_seed(seed)
    for key, shape in shapes.items():
        yield key, scaled(key, torch.randn(shape, generator=generator)).to(dtype)


def scaled(key: str, values: torch.Tensor) -> torch.Tensor:
    """Normal numbers as the weight of this name."""
    if key.endswith("modulation"):
        return values * 0.5
    if values.ndim > 1:
        return values / prod(values.shape[1:]) ** 0.5
    if "norm" in key and key.endswith("weight") or key in ("img_emb.proj.0.weight", "img_emb.proj.4.weight"):
        return 1 + 0.2 * values
    return values * 0.1


def write_lyra2(path: Path, config: Mapping = TINY, seed: int = 0, dtype=torch.float32) -> Path:
    """A Lyra 2 transformer as the converter writes it."""
    from lyra_core.models import lyra2_host

    weights = dict(random_weights(lyra2_host.weight_shapes(config), seed, dtype))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({**weights, lyra2_host.CONFIG_KEY: lyra2_host.pack_config(config)}, path, {"format": "pt"})
    return path


def write_wan(path: Path, dim: int = 128, num_layers: int = 2, seed: int = 0) -> Path:
    """A plain Wan 2.1 image-to-video transformer."""
    from comfy.ldm.wan.model import WanModel

    sizes = {"dim": dim, "ffn_dim": 2 * dim, "num_heads": dim // 128, "num_layers": num_layers}
    with torch.device("meta"):
        network = WanModel("i2v", in_dim=36, **sizes, device="meta", operations=torch.nn)
    weights = random_weights({key: tuple(w.shape) for key, w in network.state_dict().items()}, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(weights), path, {"format": "pt"})
    return path


def write_vace(path: Path, vace_layers: int = 1, seed: int = 6) -> Path:
    """A Wan 2.1 VACE transformer, as wide as the smallest text encoder of the host needs it; its file says so."""
    from comfy.ldm.wan.model import VaceWanModel

    sizes = {"dim": 128, "ffn_dim": 256, "num_heads": 1, "num_layers": 2, "vace_layers": vace_layers, "text_dim": 768}
    with torch.device("meta"):
        network = VaceWanModel("vace", in_dim=16, vace_in_dim=96, **sizes, device="meta", operations=torch.nn)
    weights = random_weights({key: tuple(w.shape) for key, w in network.state_dict().items()}, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    config = json.dumps({"transformer": {"text_dim": sizes["text_dim"]}})
    save_file(dict(weights), path, {"format": "pt", "config": config})
    return path


def tiled_weights(shapes: Mapping[str, tuple[int, ...]], seed: int, dtype=torch.float16) -> dict[str, Tensor]:
    """random_weights for networks whose size the host fixes: the same thousand numbers again and again, made at once."""
    block = torch.randn(1009, generator=torch.Generator().manual_seed(seed))
    weights = {}
    for key, shape in shapes.items():
        gain = key.endswith("weight") and "norm" in key
        values = block / prod(shape[1:]) ** 0.5 if len(shape) > 1 else 0.1 * block + gain
        count = prod(shape)
        weights[key] = values.to(dtype).repeat(-(-count // len(block)))[:count].view(shape)
    return weights


def _write(path: Path, weights: Mapping[str, Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(weights), path, {"format": "pt"})
    return path


def write_vae(path: Path, dim: int = 8, seed: int = 1) -> Path:
    """A Wan 2.1 VAE, as narrow as asked."""
    from comfy.ldm.wan.vae import WanVAE

    with torch.device("meta"):
        network = WanVAE(dim, 16, temperal_downsample=[False, True, True])
    generator, weights = torch.Generator().manual_seed(seed), {}
    for key, weight in network.state_dict().items():
        values = torch.randn(weight.shape, generator=generator)
        small = 1 + 0.1 * values if key.endswith("gamma") else 0.02 * values
        weights[key] = values / prod(weight.shape[1:]) ** 0.5 if weight.ndim > 1 and "gamma" not in key else small
    return _write(path, weights)


def write_clip_vision(path: Path, seed: int = 2, layers: int = 2) -> Path:
    """CLIP ViT-H, of which the host knows one depth, 32 layers of 40 MB: a server reads fewer by tools/shallow_clip_vision.py.

    The one weight by which the host knows the model is there at every depth.
    """
    weights = _clip_weights("CLIPVisionModelProjection", "clip_vision_config_h.json", seed, num_hidden_layers=layers)
    known_by = "vision_model.encoder.layers.30.layer_norm1.weight"
    return _write(path, {known_by: weights[known_by.replace("30", "0")].clone(), **weights})


def write_text_encoder(path: Path, seed: int = 3) -> Path:
    """CLIP L, 768 wide: the smallest text encoder that the host loads. UMT5 has one size, 11 GB."""
    return _write(path, _clip_weights("CLIPTextModel", "sd1_clip_config.json", seed))


def _clip_weights(kind: str, config: str, seed: int, **changes) -> dict[str, Tensor]:
    import comfy.clip_model

    settings = {**json.loads((Path(comfy.clip_model.__file__).parent / config).read_text()), **changes}
    with torch.device("meta"):
        network = getattr(comfy.clip_model, kind)(settings, torch.float16, "meta", torch.nn)
    return tiled_weights({key: tuple(weight.shape) for key, weight in network.state_dict().items()}, seed)


# the host's names of Depth Anything 3's backbone, and the published ones
PUBLISHED = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.camera_token", "camera_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("encoder.layer", "blocks"),
    ("attention.output.dense", "attn.proj"),
    ("attention.q_norm", "attn.q_norm"),
    ("attention.k_norm", "attn.k_norm"),
    ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
    ("mlp.weights_in", "mlp.w12"),
    ("mlp.weights_out", "mlp.w3"),
    ("layernorm", "norm"),
)
DA3_GAUSSIANS = {
    "width": 384,  # the least that the host knows
    "depth": 12,
    "heads": 6,
    "alt_start": 4,
    "patches": 5,
    "swiglu": True,
    "layers": (5, 7, 9, 11),
    "depth_head": (16, (16, 16, 16, 16)),
    "gaussian_head": (16, (8, 16, 16, 24)),
}


def da3_gaussians_weights(seed: int = 5, config: Mapping = DA3_GAUSSIANS) -> dict[str, Tensor]:
    """Depth Anything 3 with a Gaussian head, by the host's names; heads that say little, so that depth is near 1."""
    from lyra_core.models import da3_gaussians

    weights = dict(random_weights(da3_gaussians.weight_shapes(config), seed))
    for name, weight in weights.items():
        if name.endswith("lambda1") or name.endswith("gamma"):
            weight.fill_(0.2)
        elif ".output_conv2." in name or name.startswith("cam_dec.fc_"):
            weight.mul_(0.3)
    weights["cam_dec.fc_qvec.bias"] = torch.tensor([0.0, 0.0, 0.0, 1.0])
    weights["cam_dec.fc_fov.0.bias"] = torch.tensor([0.8, 1.2])
    return weights


def published(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same under the names of the published files, without any prefix."""
    named = {}
    for name, weight in weights.items():
        if ".attention.attention." in name:
            if ".query." not in name:
                continue
            weight = torch.cat([weights[name.replace("query", part)] for part in ("query", "key", "value")])
            name = name.replace("attention.attention.query", "attn.qkv")
        if name.startswith("backbone."):
            name = name.removeprefix("backbone")
            for host, theirs in PUBLISHED:
                name = name.replace(f".{host}", f".{theirs}")
            name = f"backbone.pretrained{name}"
        named[name] = weight
    return named


def write_da3_gaussians(path: Path, seed: int = 5) -> Path:
    """The nested model as it was published: this network under da3., and a metric branch that does not matter."""
    nested = {f"model.da3.{name}": weight for name, weight in published(da3_gaussians_weights(seed)).items()}
    nested["model.da3_metric.backbone.pretrained.cls_token"] = torch.zeros(1, 1, 4)
    if path.suffix == ".safetensors":
        return _write(path, nested)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": nested}, path)
    return path


def write_da3(path: Path, seed: int = 4) -> Path:
    """A Depth Anything 3 for single pictures: Small's backbone under a tiny head."""
    from comfy.ldm.depth_anything_3.model import DepthAnything3Net

    with torch.device("meta"):
        network = DepthAnything3Net(
            "vits",
            (5, 7, 9, 11),
            -1,
            -1,
            -1,
            cat_token=False,
            head_type="dpt",
            head_dim_in=384,
            head_output_dim=1,
            head_features=8,
            head_out_channels=(8, 8, 8, 8),
            head_use_sky_head=True,
            device="meta",
            dtype=torch.float32,
            operations=torch.nn,
        )
    shapes = {key: tuple(weight.shape) for key, weight in network.state_dict().items()}
    weights = tiled_weights(shapes, seed, torch.float32)
    # nearly the same depth everywhere and no sky: a random head's depth is all jumps, which nobody can use
    return _write(path, {key: w * 0.02 if "output_conv2" in key else w for key, w in weights.items()})


def write_vace_files(models: Path) -> None:
    """Wan 2.1 VACE and the two experts of Wan 2.2 VACE Fun."""
    for seed, name in enumerate(("1_vace_1.3B_fp16", "2_fun_vace_high_noise_14B_fp8_scaled", "2_fun_vace_low_noise_14B_fp8_scaled")):
        write_vace(models / "diffusion_models" / f"wan2.{name}.safetensors", 1 + seed // 2, 6 + seed)


def write_uni3c(path: Path, width: int = 128, seed: int = 9) -> Path:
    """A Uni3C controlnet for a transformer of this width."""
    from comfy.ldm.wan.uni3c import WanUni3CControlnet

    sizes = dict.fromkeys(("conv_out_dim", "out_proj_dim", "time_embed_dim"), width)
    sizes |= {"dim": 96, "ffn_dim": 64, "num_layers": 2, "mid_channels": 16}
    with torch.device("meta"):
        network = WanUni3CControlnet(**sizes, device="meta", operations=torch.nn)
    shapes = {key: tuple(weight.shape) for key, weight in network.state_dict().items()}
    names = {".q.": ".to_q.", ".k.": ".to_k.", ".v.": ".to_v.", ".o.": ".to_out.0."}
    weights = {}
    for key, value in random_weights(shapes, seed):
        for ours, theirs in names.items():
            key = key.replace(f".self_attn{ours}", f".self_attn{theirs}")
        weights[key] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path, {"format": "pt"})
    return path


def write_lora(path: Path, dim: int, seed: int = 5) -> Path:
    """A LoRA of rank 2 on one projection of a transformer that wide."""
    shapes = {f"diffusion_model.blocks.0.self_attn.q.lora_{n}.weight": s for n, s in (("A", (2, dim)), ("B", (dim, 2)))}
    return _write(path, tiled_weights(shapes, seed))


def write_all(models: Path) -> Path:
    """A models folder with every file that the workflows name, small enough to run on a CPU; the server whose it is reads them.

    Its custom nodes lie beside it, and with them the one by which the host reads a shallow CLIP.
    """
    nodes = models.parent / "custom_nodes"
    nodes.mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(__file__).with_name("shallow_clip_vision.py"), nodes)
    write_lyra2(models / "diffusion_models" / "lyra2.safetensors", SMALLEST)
    write_vace_files(models)
    write_vae(models / "vae" / "wan_2.1_vae.safetensors", dim=2)
    write_text_encoder(models / "text_encoders" / "umt5_xxl_fp8_e4m3fn_scaled.safetensors")
    write_clip_vision(models / "clip_vision" / "clip_vision_h.safetensors")
    write_da3(models / "geometry_estimation" / "depth_anything_3_mono_large.safetensors")
    write_da3_gaussians(models / "geometry_estimation" / "lyra2_reconstruction.pt")
    write_lora(models / "loras" / "lyra2_dmd_distillation.safetensors", 96)
    write_uni3c(models / "model_patches" / "Wan21_Uni3C_controlnet_fp16.safetensors")
    return models
