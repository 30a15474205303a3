"""Depth Anything 3 giant with a Gaussian head, on the host's classes.

It is the network of the reference's second step: frames, and where they were taken, become depth, cameras and 37 raw
numbers a pixel, which `gaussian_adapter` turns into gaussians. The host has everything of it but the Gaussian head, and
takes the giant for another size of itself, so its list of models gets an entry that knows better: files with a Gaussian
head are recognised by it, whichever of the stock loaders reads them.

Weights keep the host's names; `da3_files` reads the files as they were published.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import comfy.model_base
import comfy.model_management as management
import comfy.supported_models
import torch
from comfy.image_encoders.dino2 import Dinov2Model, SwiGLUFFN
from comfy.ldm.depth_anything_3.camera import CameraDec, CameraEnc
from comfy.ldm.depth_anything_3.dpt import DPT, DualDPT, _add_pos_embed, _custom_interpolate
from comfy.ldm.depth_anything_3.transform import affine_inverse, pose_encoding_to_extri_intri
from torch import Tensor, nn

from ..memory.resampling import PATCH
from ..splats.gaussian_adapter import CHANNELS
from .lyra2_host import listed, put_first

CAMERA_HEADS = 16  # attention heads of the camera encoder at every width; the host builds it with others
LAYERS = {12: (5, 7, 9, 11), 24: (11, 15, 19, 23), 40: (19, 27, 33, 39)}  # whose output the heads see, by depth
HEAD_FRAMES = 8  # that the heads look at together; they don't mix frames, so it only bounds memory
FFN_TOKENS = 1 << 15  # that pass a feed-forward layer together: of 128 views it would else hold 4 GB
KEPT_WIDTHS = 8 + 2 + 6  # of a token: what the heads will see, both streams, and the insides of one attention
HIDDEN = 3  # times a token's width inside a feed-forward layer, about
HEAD_COPIES = 4.5  # of the features in full size that the heads hold at once; 3.4 to 4.4 measured in float32 on a CPU
RAW = sum(CHANNELS)
MARKER = "gs_head.images_merger.0.weight"  # only files with a Gaussian head have it
FLOAT32 = ("head.", "gs_head.", "cam_enc.", "cam_dec.")  # what the reference keeps out of half precision

OnStep = Callable[[int, int], None]


def nothing(done: int, total: int) -> None:
    pass


# ------------------------------------------------------------------------------------------------------- the network


class GaussianHead(DPT):
    """38 numbers for every pixel of a coarser grid, from the backbone's features and the picture itself."""

    def __init__(self, dim_in: int, features: int, out_channels: Sequence[int], device, dtype, operations):
        where = {"device": device, "dtype": dtype}
        super().__init__(
            dim_in, PATCH, RAW + 1, features=features, out_channels=out_channels, pos_embed=True, use_sky_head=False,
            operations=operations, **where,
        )  # fmt: skip
        wide = features // 2
        sizes = (3, wide // 4, wide // 2, wide)
        layers = [operations.Conv2d(a, b, 3, padding=1, **where) for a, b in zip(sizes, sizes[1:], strict=False)]
        self.images_merger = nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU(), layers[2], nn.GELU())

    def forward(
        self, features: Sequence[Tensor], pictures: Tensor, down_ratio: int = 2, whole: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Raw numbers (F, h, w, 37) and densities (F, h, w) in 0..1, h and w being the pictures' over `down_ratio`.

        features: four times (F, patches, dim_in); pictures (F, 3, H, W), normalised. whole: look at the pictures in full
        size and shrink what was seen, as the released weights were trained; else shrink the pictures first.
        """
        height, width = pictures.shape[2:]
        steps, net = (height // PATCH, width // PATCH), self.scratch
        maps = []
        for tokens, project, resize in zip(features, self.projects, self.resize_layers, strict=True):
            maps.append(resize(_add_pos_embed(project(tokens.mT.unflatten(2, steps)), width, height)))
        first, second, third, fourth = (getattr(net, f"layer{i}_rn")(level) for i, level in enumerate(maps, 1))
        fused = net.refinenet4(fourth, size=third.shape[2:])
        fused = net.refinenet3(fused, third, size=second.shape[2:])
        fused = net.refinenet2(fused, second, size=first.shape[2:])
        fused = net.output_conv1(net.refinenet1(fused, first))
        grid = (int(height / down_ratio), int(width / down_ratio))
        fused = _custom_interpolate(fused, grid) + self._picture(pictures, grid, whole)
        answer = net.output_conv2(_add_pos_embed(fused, width, height)).movedim(1, -1)
        return answer[..., :-1], answer[..., -1].sigmoid()

    def _picture(self, pictures: Tensor, grid: tuple[int, int], whole: bool) -> Tensor:
        if whole:
            return nn.functional.adaptive_avg_pool2d(self.images_merger(pictures), grid)
        return self.images_merger(_custom_interpolate(pictures, grid))


class PiecewiseFFN(SwiGLUFFN):
    """The host's layer on a part of the tokens at a time."""

    def forward(self, x: Tensor) -> Tensor:
        parts = x.reshape(-1, x.shape[-1]).split(FFN_TOKENS)
        return torch.cat([super(PiecewiseFFN, self).forward(part) for part in parts]).view(x.shape)


def backbone(
    width: int, depth: int, heads: int, alt_start: int, patches: int, swiglu: bool, device, dtype, operations
) -> Dinov2Model:
    """The host's DINOv2 as Depth Anything 3 has it; `patches`: side of the square that position embeddings are for."""
    network = Dinov2Model(
        {
            "hidden_size": width,
            "num_hidden_layers": depth,
            "num_attention_heads": heads,
            "use_swiglu_ffn": swiglu,
            "layer_norm_eps": 1e-6,
            "patch_size": PATCH,
            "image_size": PATCH * patches,
            "use_mask_token": False,
            "alt_start": alt_start,
            "qknorm_start": alt_start,
            "rope_start": alt_start,
            "cat_token": True,
            "rope_freq": 100.0,
        },
        dtype,
        device,
        operations,
    )
    network.layernorm.eps = 1e-5  # the last one alone
    for layer in network.encoder.layer if swiglu else ():
        layer.mlp = PiecewiseFFN(width, dtype, device, operations)
    return network


def decoded_cameras(told: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """w2c (B, S, 3, 4) and K (B, S, 3, 3), in pixels of `size`, of what the camera decoder says (B, S, 9)."""
    c2w, K = pose_encoding_to_extri_intri(told, size)
    last = torch.eye(4).to(c2w)[3:].expand(*c2w.shape[:2], 1, 4)
    return affine_inverse(torch.cat([c2w, last], 2))[:, :, :3], K


class Da3Gaussians(nn.Module):
    """Frames, and where they were taken, to depth, cameras and what `gaussian_adapter.from_head` asks for."""

    head_type = "dualdpt"  # what the host's nodes and our estimator ask a Depth Anything 3 for
    has_sky, has_conf = False, True

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        alt_start: int,
        patches: int,
        swiglu: bool,
        layers: Sequence[int],
        depth_head: tuple[int, tuple[int, ...]],
        gaussian_head: tuple[int, tuple[int, ...]],
        device=None,
        dtype=None,
        operations=None,
    ):
        """layers: after which blocks the heads look; the heads' features and channels are (features, (a, b, c, d))."""
        super().__init__()
        self.dtype, self.layers = dtype, list(layers)
        self.backbone = backbone(width, depth, heads, alt_start, patches, swiglu, device, dtype, operations)
        exact = {"device": device, "dtype": torch.float32, "operations": operations}
        self.head = DualDPT(2 * width, PATCH, features=depth_head[0], out_channels=depth_head[1], **exact)
        self.gs_head = GaussianHead(2 * width, *gaussian_head, **exact)
        self.cam_enc = CameraEnc(width, num_heads=CAMERA_HEADS, **exact)
        self.cam_dec = CameraDec(2 * width, **exact)

    def forward(
        self,
        image: Tensor,
        extrinsics: Tensor | None = None,
        intrinsics: Tensor | None = None,
        *,
        down_ratio: int = 0,
        on_step: OnStep = nothing,
        **_of_the_host,
    ) -> dict[str, Tensor]:
        """As the host's Depth Anything 3: normalised frames (B, S, 3, H, W), w2c (B, S, 4, 4), K (B, S, 3, 3) in pixels.

        depth and depth_conf (B S, H, W); with two views or more extrinsics (B, S, 3, 4) and intrinsics (B, S, 3, 3).
        down_ratio above 0 adds raw (B S, h, w, 37) and density (B S, h, w). on_step: groups of frames done, and in all.
        """
        image = image[:, None] if image.ndim == 4 else image
        batch, views, _, height, width = image.shape
        told = None
        if extrinsics is not None and intrinsics is not None:
            told = self.cam_enc(extrinsics.float(), intrinsics.float(), (height, width)).to(image.dtype)
        features, _ = self.backbone.get_intermediate_layers_da3(image, self.layers, cam_token=told)
        parts: dict[str, list[Tensor]] = {}
        groups = -(-batch * views // HEAD_FRAMES)
        for done in range(groups):
            on_step(done, groups)
            rows = slice(done * HEAD_FRAMES, (done + 1) * HEAD_FRAMES)
            seen = [level.flatten(0, 1)[rows].float() for level, _ in features]
            for name, value in self._heads(seen, image.flatten(0, 1)[rows].float(), down_ratio).items():
                parts.setdefault(name, []).append(value)
        on_step(groups, groups)
        found = {name: torch.cat(values) for name, values in parts.items()}
        if views > 1:
            told = self.cam_dec(features[-1][1].float())
            found["extrinsics"], found["intrinsics"] = decoded_cameras(told, (height, width))
        return found

    def memory(self, views: int, height: int, width: int, down_ratio: int = 2) -> int:
        """Bytes that looking at so many frames takes, by counting what is held at once."""
        pixels, size = height * width, management.dtype_size(self.dtype or torch.float32)
        dim = self.backbone.embed_dim
        tokens = views * (1 + pixels // PATCH**2)
        blocks = tokens * dim * size * KEPT_WIDTHS + min(tokens, FFN_TOKENS) * 4 * HIDDEN * dim * size
        heads = min(views, HEAD_FRAMES) * pixels * self.head.scratch.output_conv1.weight.shape[0] * int(4 * HEAD_COPIES)
        answers = views * pixels * 4 * 2 + (views * pixels // down_ratio**2 * (RAW + 1) * 4 if down_ratio else 0)
        return blocks + heads + 2 * answers  # once in parts, once together

    def _heads(self, features: list[Tensor], pictures: Tensor, down_ratio: int) -> dict[str, Tensor]:
        answer = self.head([(level[None],) for level in features], *pictures.shape[2:])
        found = {name: answer[name][0] for name in ("depth", "depth_conf")}
        if down_ratio:
            found["raw"], found["density"] = self.gs_head(features, pictures, down_ratio)
        return found


# --------------------------------------------------------------------------------------------------- the host's list


def architecture(shapes: Mapping[str, tuple[int, ...]]) -> dict:
    """Da3Gaussians' arguments from the shapes of its weights; ValueError if some are missing or the depth is unknown."""

    def shape(key: str) -> tuple[int, ...]:
        if key not in shapes:
            raise ValueError(f"{key} is missing: this is no complete Depth Anything 3 with a Gaussian head")
        return tuple(shapes[key])

    def head(name: str) -> tuple[int, tuple[int, ...]]:
        channels = tuple(shape(f"{name}.projects.{i}.weight")[0] for i in range(4))
        return shape(f"{name}.scratch.refinenet1.out_conv.weight")[0], channels

    blocks = {int(key.split(".")[3]) for key in shapes if key.startswith("backbone.encoder.layer.")}
    normed = {int(key.split(".")[3]) for key in shapes if key.endswith(".attention.q_norm.weight")}
    if len(blocks) not in LAYERS or not normed:
        raise ValueError(
            f"a backbone of {len(blocks)} blocks, {len(normed)} of them across views; "
            f"known are {', '.join(map(str, LAYERS))} blocks with a part across views: take Depth Anything 3 giant"
        )
    width = shape("backbone.embeddings.cls_token")[-1]
    first = f"backbone.encoder.layer.{min(normed)}."
    return {
        "width": width,
        "depth": len(blocks),
        "heads": width // shape(f"{first}attention.q_norm.weight")[0],
        "alt_start": min(normed),
        "patches": math.isqrt(shape("backbone.embeddings.position_embeddings")[1] - 1),
        "swiglu": f"{first}mlp.weights_in.weight" in shapes,
        "layers": LAYERS[len(blocks)],
        "depth_head": head("head"),
        "gaussian_head": head("gs_head"),
    }


def weight_shapes(config: Mapping) -> dict[str, tuple[int, ...]]:
    """Every key of the network under the host's names, and its shape."""
    network = Da3Gaussians(**config, device="meta", operations=torch.nn)
    return {key: tuple(weight.shape) for key, weight in network.state_dict().items()}


class Da3GaussiansBase(comfy.model_base.BaseModel):
    """The host's model around the network, for its memory management; it is not sampled from."""

    def __init__(self, model_config, device=None):
        flow = comfy.model_base.ModelType.FLOW
        super().__init__(model_config, flow, device=device, unet_model=Da3Gaussians)


class Da3WithGaussians(comfy.supported_models.DepthAnything3):
    """The entry in the host's list of models."""

    @classmethod
    def matches(cls, unet_config, state_dict=None, unet_key_prefix=""):
        depth_anything = unet_config.get("image_model") == cls.unet_config["image_model"]
        return depth_anything and state_dict is not None and f"{unet_key_prefix}{MARKER}" in state_dict

    def get_model(self, state_dict, prefix="", device=None):
        shapes = {key[len(prefix) :]: tuple(w.shape) for key, w in state_dict.items() if key.startswith(prefix)}
        config = architecture(shapes)
        if wrong := faults(shapes, config):
            raise ValueError(f"this Depth Anything 3 does not fit together, download it again:\n{listed(wrong)}")
        self.unet_config = {**config, "dtype": self.unet_config["dtype"]}
        return Da3GaussiansBase(self, device=device)

    def process_unet_state_dict(self, state_dict):
        """In place: the host's loading takes what is used out of the same dictionary, and reports the rest."""
        for key in [key for key in state_dict if key.startswith(FLOAT32)]:
            state_dict[key] = state_dict[key].float()
        return state_dict


def faults(shapes: Mapping[str, tuple[int, ...]], config: Mapping) -> list[str]:
    """What is wrong with keys and shapes, a line each; further keys don't matter."""
    expected = weight_shapes(config)
    return [
        f"missing: {key}" if key not in shapes else f"{key} is {tuple(shapes[key])}, not {shape}"
        for key, shape in expected.items()
        if tuple(shapes.get(key, ())) != shape
    ]


def register() -> None:
    """Make the host know it: a Depth Anything 3 without Gaussian head goes on to be the host's."""
    put_first(Da3WithGaussians)
