"""The transformer: bare, through the host's apply_model, in bfloat16, and piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import comfy.sd
import torch
from torch import Tensor

from lyra_core.conditioning.framepack import FramePackLayout
from lyra_core.models import lyra2, lyra2_host

from . import Check, Golden, distance, furthest

OUT_LIMIT = 2e-5  # relative L2
BFLOAT16_LIMIT = 1e-2  # relative L2, against the reference's float32
ANGLE_LIMIT = 5e-5  # absolute, of the rotations by an angle
RAW = "block0.buffer_encoder_raw"  # the reference computes it for tokens without correspondences too, and drops those
LABELS = 4 + 16  # channels of y that belong to the patches; the rest are rays


def weights_of(case: dict, golden: Golden) -> tuple[dict[str, Tensor], dict]:
    """The state dict of a case and its config; an overlay replaces the layers that depend on the layout."""
    weights, config = {}, {}
    for i, name in enumerate(case["weights"]):
        part = golden.beside(name)
        if i:
            layered = ("clean_patch_embeddings.", ".buffer_encoder.")
            weights = {key: value for key, value in weights.items() if not any(layer in key for layer in layered)}
        weights |= part.tensors
        config = part.json["config"]
    return weights, config


def load(case: dict, golden: Golden, dtype=torch.float32) -> lyra2_host.Lyra2Base:
    """The host's model, by its own loader."""
    lyra2_host.register()
    weights, config = weights_of(case, golden)
    stored = {"framepack": case["framepack_type"], "num_heads": config["num_heads"]}
    weights[lyra2_host.CONFIG_KEY] = lyra2_host.pack_config(stored)
    return comfy.sd.load_diffusion_model_state_dict(weights, {"dtype": dtype}).model


def inputs_of(tensors: dict[str, Tensor], layout: FramePackLayout) -> tuple[Tensor, Tensor, lyra2.HistoryMaps]:
    """Noisy latents, the labels beside them, and the history, from the reference's one row of all slots."""
    x, y, buffer = (tensors[key] for key in ("x_B_C_T_H_W", "y_B_C_T_H_W", "y_buffer_B_C_T_H_W"))
    slots, seen = layout.slots(), [*layout.positions("spatial"), *range(layout.slots(), x.shape[2])]
    latents = torch.cat([x[:, :, :slots], y[:, :LABELS, :slots]], 1)
    maps = lyra2.HistoryMaps(latents, y[:, LABELS:], buffer[:, :, seen])
    return x[:, :, slots:], y[:, :LABELS, slots:], maps


@torch.inference_mode()
def check_case(golden: Golden) -> Iterator[Check]:
    """`golden` is the expected file of a case; its inputs are beside it."""
    case = golden.name.removesuffix("_expected")
    expected, source = golden.tensors, golden.beside(f"{case}_inputs")
    record, tensors = source.json, source.tensors
    model = load(record, golden)
    network = model.diffusion_model
    noisy, labels, maps = inputs_of(tensors, network.layout)
    times, text = tensors["timesteps_B_T"][:, 0].float(), tensors["crossattn_emb"]
    image = golden.beside(record["clip_file"]).tensors["frame_cond_crossattn_emb_B_L_D"]

    with recorder(network) as pieces:
        out = network(torch.cat([noisy, labels], 1), times, text, clip_fea=image, history=maps)
    yield Check(case, "out", distance(out, expected["out"]), OUT_LIMIT)
    for name, found in velocities(golden, record, noisy, labels, maps, times, text, image):
        limit = BFLOAT16_LIMIT if name == "bfloat16" else OUT_LIMIT
        yield Check(case, f"out_{name}", distance(found, expected["out"]), limit)
    yield from check_tokens(case, network, maps, {key.removeprefix("pack."): value for key, value in expected.items()})
    for key, found in pieces.items():
        if key in expected and key != RAW:
            yield Check(case, key, distance(found, expected[key]), OUT_LIMIT)
    yield from check_partial_pieces(case, network, maps, pieces, expected)


def velocities(golden, record, noisy, labels, maps, times, text, image) -> Iterator[tuple[str, Tensor]]:
    """What the network predicts when the host's apply_model runs it."""
    for name, dtype in (("apply_model", torch.float32), ("bfloat16", torch.bfloat16)):
        model = load(record, golden, dtype)
        model.manual_cast_dtype = None  # on a CPU the host would compute bfloat16 weights in float32
        history = model.diffusion_model.encode(maps, dtype=dtype)
        sigma = times / 1000
        denoised = model.apply_model(
            noisy, sigma, c_concat=labels, c_crossattn=text, clip_fea=image, history=history, integer_timesteps=False
        )
        yield name, (noisy - denoised) / sigma.view(-1, 1, 1, 1, 1)


class recorder(ExitStack):
    """While entered, keeps what the parts of a network get and give, under the golden names."""

    def __init__(self, network: lyra2.Lyra2Model):
        super().__init__()
        self.network = network

    def __enter__(self) -> dict[str, Tensor]:
        super().__enter__()
        pieces: dict[str, Tensor] = {}

        def keep(module, *names: str | Callable):
            def hook(_module, args, kwargs, out):
                for name in names:
                    pieces.update({name: out} if isinstance(name, str) else name(args, kwargs, out))

            self.callback(module.register_forward_hook(hook, with_kwargs=True).remove)

        network, first = self.network, self.network.blocks[0]
        keep(network.time_embedding, "time_embedding.out")
        keep(network.time_projection, lambda args, kwargs, out: {"time_projection.out": out.flatten(1)})
        keep(network.img_emb, "img_emb.out")
        keep(network.text_embedding, lambda args, kwargs, out: {"text_embedding.out[:, :8]": out[:, :8]})
        keep(first, lambda args, kwargs, out: {"x_tokens": args[0]})
        keep(first.cam_encoder, "block0.cam_emb")
        keep(first.buffer_encoder[1], RAW)
        keep(
            first.self_attn,
            "block0.self_attn.out",
            lambda args, kwargs, out: {"block0.self_attn.in": args[0], "block0.self_attn.kq_bias": args[1][1](torch.zeros_like(args[0]))},
        )
        keep(first.cross_attn, "block0.cross_attn.out")
        for i, block in enumerate(network.blocks):
            keep(block, f"block{i}.out")
        return pieces


def check_partial_pieces(case, network, maps, pieces, expected) -> Iterator[Check]:
    """Pieces that the reference computes for more tokens than matter."""
    seen = correspondence_rows(network, maps)[1]
    if RAW in expected:
        yield Check(case, f"{RAW}_where_valid", distance(pieces[RAW][:, seen], expected[RAW][:, seen]), OUT_LIMIT)
    if "head.out_tokens" in expected:
        tokens = network.head(pieces[f"block{len(network.blocks) - 1}.out"], pieces["time_embedding.out"])
        yield Check(case, "head.out_tokens", distance(tokens, expected["head.out_tokens"]), OUT_LIMIT)


def correspondence_rows(network: lyra2.Lyra2Model, maps: lyra2.HistoryMaps) -> tuple[Tensor, Tensor]:
    """(B, L, C) correspondence tokens, -1 where there are none, and which of the L rows have some."""
    height, width = maps.latents.shape[-2:]
    new = maps.rays.shape[2] - network.layout.slots()
    length = network.positions(height, width, new, None).shape[1]
    rows = maps.rays.new_full((len(maps.rays), length, lyra2.PATCH**2 * maps.correspondences.shape[1]), -1.0)
    seen = torch.zeros(length, dtype=torch.bool)
    for (start, segment), frame in zip(
        network.seen_latents(height, width, new), maps.correspondences.unbind(2), strict=True
    ):
        tokens = lyra2.correspondence_tokens(frame, segment)
        rows[:, start : start + tokens.shape[1]] = tokens
        seen[start : start + tokens.shape[1]] = True
    return rows, seen


def check_tokens(case, network, maps, expected) -> Iterator[Check]:
    """The packing: embedded latents, rotary angles, rays and correspondences of every token, or samples of them."""
    encoded = network.encode(maps)
    rows, seen = correspondence_rows(network, maps)
    if "x_tokens" in expected:
        history = encoded.tokens.shape[1]
        yield Check(case, "history_tokens", distance(encoded.tokens, expected["x_tokens"][:, :history]), OUT_LIMIT)
    if "rope_angles" in expected:
        yield Check(case, "rope_angles", angle_error(encoded.rope, expected["rope_angles"]), ANGLE_LIMIT)
    for name, tokens in (
        ("camera_tokens", encoded.rays),
        ("buffer_tokens", torch.cat([rows, validity(rows, seen)], -1)),
    ):
        for key, value in expected.items():
            if not key.startswith(name):
                continue
            statistic = key.removeprefix(name)
            if statistic.startswith("_ch0::"):
                found = tokens[..., :: int(statistic.rpartition(":")[2])]
            elif statistic == "_validity":
                found = tokens[..., -1]
            elif statistic == "_mean":
                found = tokens.mean(-1)
            elif statistic == "_abssum":
                # the validity channel is not one of the values
                found = (tokens[..., :-1] if name == "buffer_tokens" else tokens).abs().sum(-1)
            else:
                found = tokens
            yield Check(case, key, distance(found, value.float()), OUT_LIMIT)


def validity(rows: Tensor, seen: Tensor) -> Tensor:
    return seen.to(rows).expand(len(rows), -1)[..., None]


def angle_error(rope: Tensor, angles: Tensor) -> float:
    """Rotations (1, L, 1, d, 2, 2) against angles (L, d): a rotation knows its angle up to whole turns."""
    found = rope[0, :, 0, :, :, 0]
    return furthest(found, torch.stack([angles.cos(), angles.sin()], -1))


@torch.inference_mode()
def check_packing(golden: Golden) -> Iterator[Check]:
    source = golden.beside(golden.name.removesuffix("_expected") + "_inputs")
    network = load(source.json, golden).diffusion_model
    noisy, labels, maps = inputs_of(source.tensors, network.layout)
    new = network.patch_embedding(torch.cat([noisy, labels], 1)).flatten(2).mT
    tokens = torch.cat([network.embed_history(maps.latents), new], 1)
    expected = golden.tensors
    yield Check("*", "x_tokens", distance(tokens, expected.pop("x_tokens")), OUT_LIMIT)
    yield from check_tokens("*", network, maps, expected)


def check_angles(golden: Golden) -> Iterator[Check]:
    record, expected = golden.json, golden.tensors
    head = record["head_dim"]
    with torch.device("meta"):
        network = lyra2.Lyra2Model(
            record["framepack_type"], 1, dim=head, num_heads=1, num_layers=0, operations=torch.nn
        )
    positions = network.positions(record["H"], record["W"], network.layout.new_latents, None)
    yield Check("*", "wrong_tokens", abs(positions.shape[1] - record["n_tokens"]), 0)
    rope = network.rope(positions)[:, expected["token_index"]]
    yield Check("*", "rope_angles", angle_error(rope, expected["rope_angles"]), ANGLE_LIMIT)


def check_initial_embeddings(golden: Golden) -> Iterator[Check]:
    expected = golden.tensors
    for i, segment in enumerate(FramePackLayout.parse(golden.json["framepack_type"]).segments):
        name = f"clean_patch_embeddings.{i}"
        found = lyra2.widened(expected["patch_embedding.weight"], segment)
        yield Check(name, "weight", distance(found, expected[f"{name}.weight"]), OUT_LIMIT)
        yield Check(name, "bias", distance(expected["patch_embedding.bias"], expected[f"{name}.bias"]), OUT_LIMIT)


def check_for(golden: Golden) -> Callable[[Golden], Iterator[Check]] | None:
    """By what is in the file: cases come under any name."""
    keys = golden.json.get("tensors", {}).keys()
    if "out" in keys:
        return check_case
    if "x_tokens" in keys:
        return check_packing
    if {"rope_angles", "token_index"} <= keys:
        return check_angles
    if "patch_embedding.weight" in keys and "config" not in golden.json:
        return check_initial_embeddings
    return lambda _golden: [Check("*", skip="read by the cases that name it")]
