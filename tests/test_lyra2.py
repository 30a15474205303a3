"""The network is its definition written down slowly, and what is constant over a chunk can be computed once."""

from __future__ import annotations

import itertools
import math
from contextlib import contextmanager
from math import prod

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

SIZE = (6, 10)  # 3 x 5 tokens: windows of 2 stick out along both axes
NEW = 3
TEXT, IMAGE = 11, 5  # tokens; the network takes any number of both
SPATIAL = 3  # slots of tiny_models.TINY

# model.md 1.10, without the blocks: every weight of the released file
OUTER_KEYS = {
    "patch_embedding.weight": (5120, 36, 1, 2, 2),  # (5120, 144) in a file
    "patch_embedding.bias": (5120,),
    "text_embedding.0.weight": (5120, 4096),
    "text_embedding.0.bias": (5120,),
    "text_embedding.2.weight": (5120, 5120),
    "text_embedding.2.bias": (5120,),
    "time_embedding.0.weight": (5120, 256),
    "time_embedding.0.bias": (5120,),
    "time_embedding.2.weight": (5120, 5120),
    "time_embedding.2.bias": (5120,),
    "time_projection.1.weight": (30720, 5120),
    "time_projection.1.bias": (30720,),
    "img_emb.proj.0.weight": (1280,),
    "img_emb.proj.0.bias": (1280,),
    "img_emb.proj.1.weight": (1280, 1280),
    "img_emb.proj.1.bias": (1280,),
    "img_emb.proj.3.weight": (5120, 1280),
    "img_emb.proj.3.bias": (5120,),
    "img_emb.proj.4.weight": (5120,),
    "img_emb.proj.4.bias": (5120,),
    "head.modulation": (1, 2, 5120),
    "head.head.weight": (64, 5120),
    "head.head.bias": (64,),
    **{
        f"clean_patch_embeddings.{i}.{part}": shape
        for i, values in enumerate((144, 576, 144, 9216, 1152, 144))
        for part, shape in (("weight", (5120, values)), ("bias", (5120,)))
    },
}
SQUARE = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o")
SQUARE += tuple(f"cross_attn.{name}" for name in ("q", "k", "v", "o", "k_img", "v_img"))
NORMS = ("self_attn.norm_q", "self_attn.norm_k", "cross_attn.norm_q", "cross_attn.norm_k", "cross_attn.norm_k_img")
BLOCK_KEYS = {
    "modulation": (1, 6, 5120),
    **{f"{name}.weight": (5120, 5120) for name in SQUARE},
    **{f"{name}.bias": (5120,) for name in SQUARE},
    **{f"{name}.weight": (5120,) for name in NORMS},
    "norm3.weight": (5120,),
    "norm3.bias": (5120,),
    "ffn.0.weight": (13824, 5120),
    "ffn.0.bias": (13824,),
    "ffn.2.weight": (5120, 13824),
    "ffn.2.bias": (5120,),
    "cam_encoder.weight": (5120, 1536),
    "buffer_encoder.0.weight": (256, 20480),
    "buffer_encoder.1.weight": (5120, 256),
}


@pytest.fixture(scope="module")
def lyra2(comfy_host):
    from lyra_core.models import lyra2

    return lyra2


@pytest.fixture(scope="module")
def build(lyra2, tiny_models):
    """Networks of random weights; those of the same config and seed have the same, in any dtype."""
    import comfy.ops

    def build(dtype=torch.float32, **changes):
        network = lyra2.Lyra2Model(
            **{**tiny_models.TINY, **changes}, device="cpu", dtype=dtype, operations=comfy.ops.disable_weight_init
        )
        shapes = {key: tuple(weight.shape) for key, weight in network.state_dict().items()}
        network.load_state_dict(dict(tiny_models.random_weights(shapes, seed=1)))
        return network.requires_grad_(False)

    return build


@pytest.fixture(scope="module")
def network(build):
    return build()


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def maps(lyra2):
    """Random HistoryMaps; sample i of a batch is the history of seed + i."""

    def one(seed: int, size, new: int, slots: int, spatial: int):
        return (
            random(1, 36, slots, *size, seed=3 * seed),
            random(1, 384, slots + new, *size, seed=3 * seed + 1),
            random(1, 256 * spatial, spatial + new, *size, seed=3 * seed + 2).tanh(),
        )

    def maps(seed: int = 0, batch: int = 1, size=SIZE, new: int = NEW, slots: int = 8, spatial: int = SPATIAL):
        samples = [one(seed + i, size, new, slots, spatial) for i in range(batch)]
        return lyra2.HistoryMaps(*map(torch.cat, zip(*(sample[:3] for sample in samples), strict=True)))

    return maps


def inputs(seed: int = 0, batch: int = 1, size=SIZE, new: int = NEW, image: int = IMAGE) -> dict:
    """What the network takes besides the history; every sample differs in all of it."""
    return {
        "x": random(batch, 36, new, *size, seed=1000 + seed),
        "timestep": torch.tensor([833.25, 125.0, 999.0, 500.5])[:batch],
        "context": random(batch, TEXT, 64, seed=1001 + seed),
        "clip_fea": random(batch, image, 1280, seed=1002 + seed),
    }


def sample(given, i: int):
    """The i-th sample of inputs or maps, as a batch of one."""
    if isinstance(given, dict):
        return {key: value[i : i + 1] for key, value in given.items()}
    return type(given)(*(tensor[i : i + 1] for tensor in given[:3]))


# ------------------------------------------------------------------------------- the definition, written down slowly


def clamped(start: int, count: int, end: int) -> list[int]:
    """`count` places from `start`, those past the end being the last."""
    return [min(i, end - 1) for i in range(start, start + count)]


def slow_patches(x: torch.Tensor, patch: tuple[int, int, int]) -> torch.Tensor:
    """Tokens (n, values) of latents (C, T, h, w)."""
    tokens = []
    for corner in itertools.product(*(range(0, n, step) for n, step in zip(x.shape[1:], patch, strict=True))):
        t, y, x_ = (clamped(start, step, n) for start, step, n in zip(corner, patch, x.shape[1:], strict=True))
        tokens.append(x[:, t][:, :, y][:, :, :, x_].flatten())
    return torch.stack(tokens)


def slow_means(x: torch.Tensor, window: tuple[int, int, int]) -> torch.Tensor:
    """Tokens (n, C): the mean of (C, T, H, W) over every window."""
    tokens = []
    for corner in itertools.product(*(range(0, n, step) for n, step in zip(x.shape[1:], window, strict=True))):
        places = itertools.product(
            *(clamped(start, step, n) for start, step, n in zip(corner, window, x.shape[1:], strict=True))
        )
        tokens.append(torch.stack([x[:, t, y, z] for t, y, z in places]).mean(0))
    return torch.stack(tokens)


def slow_unshuffle(x: torch.Tensor) -> torch.Tensor:
    """(C, T, h, w) -> (4 C, T, h / 2, w / 2)."""
    return torch.stack([c[:, dy::2, dx::2] for c in x for dy in (0, 1) for dx in (0, 1)])


def slow_correspondences(x: torch.Tensor, kernel: int) -> torch.Tensor:
    """Tokens (n, 4 C) of one latent's maps (C, h, w): whole kernel x kernel windows are averaged, then 2x2 are a token."""
    if kernel > 1:
        rows, columns = (range(0, n - kernel + 1, kernel) for n in x.shape[1:])
        x = torch.stack(
            [torch.stack([x[:, r : r + kernel, c : c + kernel].mean((1, 2)) for c in columns], -1) for r in rows], 1
        )
    return slow_patches(x[:, None], (1, 2, 2))


def slow_octaves(x: torch.Tensor) -> torch.Tensor:
    pi = math.pi
    return torch.cat([(pi * x).sin(), (pi * x).cos(), (2 * pi * x).sin(), (2 * pi * x).cos()], -1)


def slow_angles(positions: torch.Tensor, head: int) -> torch.Tensor:
    """(L, head / 2) rotary angles of (L, 3) positions."""
    side = 2 * (head // 6)
    widths = (head - 2 * side, side, side)
    return torch.cat(
        [
            positions[:, axis, None] * 10000 ** (-torch.arange(0, width, 2).double() / width)
            for axis, width in enumerate(widths)
        ],
        1,
    )


def rotated(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """(heads, L, d): neighbouring values are the coordinates that turn."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1).flatten(-2)


class Slow:
    """The network on one sample, in float64, from its weights alone."""

    def __init__(self, network, segments):
        self.weights = {key: weight.double() for key, weight in network.state_dict().items()}
        self.dim, self.heads, self.layers = network.dim, network.num_heads, len(network.blocks)
        self.segments = segments  # (slots, packs time, kernel)

    def linear(self, x, name):
        y = x @ self.weights[f"{name}.weight"].flatten(1).T
        return y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y

    def layer_norm(self, x, name=None, eps=1e-6):
        y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + eps).sqrt()
        return y * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"] if name else y

    def rms_norm(self, x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.weights[f"{name}.weight"]

    def attention(self, q, k, v, angles=None):
        q, k, v = (x.unflatten(-1, (self.heads, -1)).movedim(1, 0) for x in (q, k, v))
        if angles is not None:
            q, k = rotated(q, angles), rotated(k, angles)
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return (weights @ v).movedim(0, 1).flatten(1)

    def row(self, new: int, size) -> list[tuple[int, int, bool, int, str]]:
        """(first slot, slots, packs time, kernel, embedding) of every segment and of the new latents."""
        starts = itertools.accumulate((slots for slots, *_ in self.segments), initial=0)
        named = [(*s, f"clean_patch_embeddings.{i}") for i, s in enumerate(self.segments)]
        return [(start, *s) for start, s in zip(starts, [*named, (new, False, 1, "patch_embedding")], strict=True)]

    def __call__(self, x, timestep, context, clip_fea, maps):
        given = (t[0].double() for t in (x, context, clip_fea, maps.latents, maps.rays, maps.correspondences))
        x, context, clip_fea, latents, rays, correspondences = given
        size, new = tuple(x.shape[2:]), x.shape[1]
        latents = torch.cat([latents, x], 1)
        tokens, positions, ray_tokens, guides, seen = [], [], [], [], 0
        for start, slots, packs_time, kernel, embedding in self.row(new, size):
            window = (kernel if packs_time else 1, kernel, kernel)
            part = slice(start, start + slots)
            patch = (window[0], 2 * kernel, 2 * kernel)
            tokens.append(self.linear(slow_patches(latents[:, part], patch), embedding))
            axes = (torch.arange(start, start + slots), torch.arange(size[0] // 2), torch.arange(size[1] // 2))
            positions.append(slow_means(torch.stack(torch.meshgrid(*axes, indexing="ij")).double(), window))
            ray_tokens.append(slow_means(slow_unshuffle(rays[:, part]), window))
            if packs_time:
                guides += [None] * len(tokens[-1])
            else:
                for frame in range(seen, seen + slots):
                    guides += list(slow_octaves(slow_correspondences(correspondences[:, frame], kernel)))
                seen += slots
        tokens, ray_tokens = torch.cat(tokens), torch.cat(ray_tokens)
        angles = slow_angles(torch.cat(positions), self.dim // self.heads)

        rates = 10000 ** (-torch.arange(128).double() / 128)
        time = torch.cat([(timestep.double() * rates).cos(), (timestep.double() * rates).sin()])
        time = self.linear(F.silu(self.linear(time, "time_embedding.0")), "time_embedding.2")
        modulation = self.linear(F.silu(time), "time_projection.1").view(6, self.dim)
        text = self.linear(context, "text_embedding.0")
        text = self.linear(F.gelu(text, approximate="tanh"), "text_embedding.2")
        image = self.linear(self.layer_norm(clip_fea, "img_emb.proj.0", 1e-5), "img_emb.proj.1")
        image = self.layer_norm(self.linear(F.gelu(image), "img_emb.proj.3"), "img_emb.proj.4", 1e-5)
        for i in range(self.layers):
            tokens = self.block(f"blocks.{i}", tokens, modulation, angles, text, image, ray_tokens, guides)

        shift, scale = self.weights["head.modulation"][0] + time
        patches = self.linear(self.layer_norm(tokens[-new * prod(size) // 4 :]) * (1 + scale) + shift, "head.head")
        out = torch.zeros(16, new, *size, dtype=torch.float64)
        places = itertools.product(range(new), range(size[0] // 2), range(size[1] // 2))
        for (t, row, column), patch in zip(places, patches, strict=True):
            # the channel is fastest here, other than on the way in
            out[:, t, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = patch.view(2, 2, 16).movedim(-1, 0)
        return out[None]

    def block(self, name, tokens, modulation, angles, text, image, rays, guides):
        m = self.weights[f"{name}.modulation"][0] + modulation
        y = self.layer_norm(tokens) * (1 + m[1]) + m[0]
        bias = torch.stack(
            [
                torch.zeros(self.dim).double()
                if guide is None
                else self.linear(self.linear(guide, f"{name}.buffer_encoder.0"), f"{name}.buffer_encoder.1")
                for guide in guides
            ]
        )
        bias = bias + self.linear(rays, f"{name}.cam_encoder")
        attn = f"{name}.self_attn"
        q, k = (self.rms_norm(self.linear(y + bias, f"{attn}.{p}"), f"{attn}.norm_{p}") for p in "qk")
        out = self.attention(q, k, self.linear(y, f"{attn}.v"), angles)
        tokens = tokens + self.linear(out, f"{attn}.o") * m[2]

        attn = f"{name}.cross_attn"
        q = self.rms_norm(self.linear(self.layer_norm(tokens, f"{name}.norm3"), f"{attn}.q"), f"{attn}.norm_q")
        out = 0
        for source, suffix in ((text, ""), (image, "_img")):
            k = self.rms_norm(self.linear(source, f"{attn}.k{suffix}"), f"{attn}.norm_k{suffix}")
            out = out + self.attention(q, k, self.linear(source, f"{attn}.v{suffix}"))
        tokens = tokens + self.linear(out, f"{attn}.o")
        y = self.linear(self.layer_norm(tokens) * (1 + m[4]) + m[3], f"{name}.ffn.0")
        return tokens + self.linear(F.gelu(y, approximate="tanh"), f"{name}.ffn.2") * m[5]


TINY_SEGMENTS = [(1, True, 1), (2, False, 2), (1, False, 1), (3, True, 2), (1, True, 1)]


@pytest.mark.parametrize("size", [SIZE, (10, 4), (2, 2)])
def test_the_velocity_is_the_definition_s(network, maps, size):
    given, history = inputs(1, size=size), maps(1, size=size)
    found = network(**given, history=history)
    assert found.shape == (1, 16, NEW, *size) and found.dtype == torch.float32
    expected = Slow(network, TINY_SEGMENTS)(**given, maps=history)
    assert (found - expected).norm() / expected.norm() < 1e-5


def test_the_velocity_is_the_definition_s_in_another_layout(build, maps):
    network = build(framepack="f2s1f5k3f1s2f2k1_g2", num_layers=1)
    given, history = inputs(2, size=(4, 8), new=2), maps(2, size=(4, 8), new=2, slots=10)
    expected = Slow(network, [(2, False, 1), (5, True, 3), (1, False, 2), (2, True, 1)])(**given, maps=history)
    assert (network(**given, history=history) - expected).norm() / expected.norm() < 1e-5


# ------------------------------------------------------------------------------------- maps, tokens, batches, nothing lost


def test_maps_and_their_tokens_predict_the_same_to_the_bit(network, maps):
    given, history = inputs(batch=2), maps(batch=2)
    assert torch.equal(network(**given, history=history), network(**given, history=network.encode(history)))


def test_a_batch_with_two_histories_is_two_runs(network, maps):
    given, histories = inputs(batch=2), maps(batch=2)
    for history in (histories, network.encode(histories)):
        together = network(**given, history=history)
        for i in range(2):
            alone = network(**sample(given, i), history=sample(histories, i))
            assert_close(together[i : i + 1], alone, atol=1e-5, rtol=0)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_a_batch_that_shares_a_history_is_as_many_runs(network, maps):
    given, history = inputs(batch=3), maps()
    together = network(**given, history=history)
    for i in range(3):
        assert_close(together[i : i + 1], network(**sample(given, i), history=history), atol=1e-5, rtol=0)


def test_two_histories_take_turns_in_a_larger_batch(network, maps):
    histories = maps(batch=2)
    for batch in (3, 4):
        given = inputs(batch=batch)
        together = network(**given, history=network.encode(histories))
        for i in range(batch):
            alone = network(**sample(given, i), history=sample(histories, i % 2))
            assert_close(together[i : i + 1], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["latents", "rays", "correspondences"])
def test_every_frame_and_channel_of_a_history_matters(network, maps, name):
    given, history = inputs(), maps()
    before = network(**given, history=history)
    tensor = getattr(history, name)
    for frame in range(tensor.shape[2]):
        changed = tensor.clone()
        changed[:, :, frame] = -changed[:, :, frame]
        after = network(**given, history=history._replace(**{name: changed}))
        assert (after - before).abs().max() > 1e-4, frame
    for channel in (0, tensor.shape[1] // 2, tensor.shape[1] - 1):
        changed = tensor.clone()
        changed[:, channel] += 1.3
        assert not torch.equal(network(**given, history=history._replace(**{name: changed})), before)


@pytest.mark.parametrize("name", ["x", "timestep", "context", "clip_fea"])
def test_every_other_input_matters(network, maps, name):
    given, history = inputs(), maps()
    other = given[name] * 0.9 if name == "timestep" else given[name].roll(1, -1)
    after = network(**{**given, name: other}, history=history)
    assert (after - network(**given, history=history)).abs().max() > 1e-3


def test_only_the_new_latents_are_predicted_however_many(network, maps):
    for new in (1, 2, 5):
        out = network(**inputs(new=new), history=maps(new=new))
        assert out.shape == (1, 16, new, *SIZE)


def test_nothing_that_was_given_is_changed(network, maps):
    given, history = inputs(batch=2), maps()
    encoded = network.encode(history)
    before = [tensor.clone() for tensor in (*given.values(), *history[:3], *encoded)]
    network(**given, history=history)
    network(**given, history=encoded)
    after = (*given.values(), *history[:3], *encoded)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_model_without_a_history_says_which_node_is_missing(network):
    with pytest.raises(ValueError, match="Lyra2ChunkConditioning"):
        network(**inputs())


# -------------------------------------------------------------------------------------------------------- the guides


@pytest.mark.parametrize("size", [1.0, 1e-3])  # the smaller is where the norms' epsilon tells
def test_the_bias_reaches_queries_and_keys_but_no_value(build, size):
    network = build()
    attention = network.blocks[0].self_attn
    for layer in (attention.q, attention.k):
        layer.bias.mul_(size)
    x, bias = random(2, 7, 96, seed=1) * size, random(2, 7, 96, seed=2) * size
    positions = random(1, 7, 3, seed=3).abs() * 9
    found = attention(x, (network.rope(positions), lambda tokens: tokens + bias))

    angles = slow_angles(positions[0].double(), 32).float()
    heads = []
    for linear, norm in ((attention.q, attention.norm_q), (attention.k, attention.norm_k)):
        y = F.rms_norm(F.linear(x + bias, linear.weight, linear.bias), (96,), norm.weight, 1e-6)
        heads.append(rotated(y.unflatten(-1, (3, 32)).movedim(2, 1), angles))
    values = F.linear(x, attention.v.weight, attention.v.bias).unflatten(-1, (3, 32)).movedim(2, 1)
    out = F.scaled_dot_product_attention(*heads, values).movedim(1, 2).flatten(2)
    assert_close(found, F.linear(out, attention.o.weight, attention.o.bias), atol=1e-5, rtol=0)


@pytest.mark.parametrize("changed", ["nothing", "forward", "weight_function", "comfy_cast_weights", "dtype", "hook"])
def test_what_guides_is_one_product_while_the_layers_only_multiply(lyra2, build, changed, monkeypatch):
    block = build().blocks[0]
    layer, x = block.cam_encoder, random(1, 7, 96, seed=1)
    rays, told = random(1, 7, layer.in_features, seed=2), random(1, 7, block.buffer_encoder[1].in_features, seed=3)
    expected = x + layer(rays) + block.buffer_encoder[1](told)
    if changed == "forward":  # as the host's bypass of weights does it
        forward = layer.forward
        layer.forward = lambda rays: 2 * forward(rays)
        expected = expected + forward(rays)
    elif changed == "hook":
        layer.register_forward_hook(lambda module, given, out: 0 * out)
        expected = expected - rays @ layer.weight.T
    elif changed == "dtype":
        layer.to(torch.float64)
        rays = rays.double()
    elif changed == "weight_function":
        layer.weight_function = [lambda weight: 3 * weight]
        expected = expected + 2 * (rays @ layer.weight.T)
    elif changed == "comfy_cast_weights":
        layer.comfy_cast_weights = True
    assert lyra2.is_plain(layer, x) is (changed == "nothing")
    assert_close(block._guided(x, rays, told).float(), expected.float(), atol=2e-5, rtol=0)


def test_one_modulation_for_all_samples_is_one_for_each(lyra2):
    norm, x = torch.nn.LayerNorm(96, 1e-6, elementwise_affine=False), random(2, 7, 96, seed=1)
    shift, scale = random(2, 1, 96, seed=2), random(2, 1, 96, seed=3)
    whole = lyra2.modulated(norm, x, shift, scale)
    for i in range(2):
        assert_close(lyra2.modulated(norm, x[i : i + 1], shift[i : i + 1], scale[i : i + 1]), whole[i : i + 1], atol=1e-5, rtol=0)


def test_without_queries_and_keys_the_guides_mean_nothing(build, maps):
    network = build()
    for block in network.blocks:
        for layer in (block.self_attn.q, block.self_attn.k):
            layer.weight.zero_()
    given, history = inputs(), maps()
    elsewhere = maps(7)
    other = history._replace(rays=elsewhere.rays, correspondences=elsewhere.correspondences)
    assert torch.equal(network(**given, history=history), network(**given, history=other))


def token_slots(sizes=(15, 12, 15, 12, 15, 45)) -> list[int]:
    """The segment of every token of SIZE: 0 to 4 are TINY's, 5 the new latents."""
    return [segment for segment, count in enumerate(sizes) for _ in range(count)]


def test_tokens_of_temporal_segments_have_no_correspondences(network, maps):
    temporal = torch.tensor([segment in (0, 3, 4) for segment in token_slots()])
    for seed in (0, 5):
        encoded = network.encode_correspondences(maps(seed, batch=2).correspondences, "cpu", torch.float32)
        assert encoded.shape == (2, 2, len(temporal), 8)
        assert not encoded[:, :, temporal].any()
        assert (encoded[:, :, ~temporal].abs().amax(-1) > 0).all()


def test_each_frame_s_correspondences_reach_its_own_tokens_only(network, maps):
    history = maps()
    before = network.encode(history).correspondences
    owners = [1] * 6 + [2] * 6 + [3] * 15 + [4] * 15 + [5] * 15 + [6] * 15  # of the tokens that have some
    places = [i for i, segment in enumerate(token_slots()) if segment in (1, 2, 5)]
    for frame in range(6):
        changed = history.correspondences.clone()
        changed[:, :, frame] *= 0.5
        after = network.encode(history._replace(correspondences=changed)).correspondences
        touched = (after != before).any(-1).all(0)[0].nonzero()[:, 0].tolist()
        assert touched == [place for place, owner in zip(places, owners, strict=True) if owner == frame + 1]


def test_octaves_are_sines_and_cosines_in_turn(lyra2):
    x = torch.tensor([[[0.125, -0.5]]])
    pi = math.pi
    expected = [
        f(factor * value)
        for factor, f in ((pi, math.sin), (pi, math.cos), (2 * pi, math.sin), (2 * pi, math.cos))
        for value in (0.125, -0.5)
    ]
    assert_close(lyra2.octaves(x)[0, 0], torch.tensor(expected))
    coarse = random(1, 3, 50, seed=1).bfloat16()
    assert lyra2.octaves(coarse).dtype == torch.bfloat16
    assert torch.equal(lyra2.octaves(coarse), lyra2.octaves(coarse.float()).bfloat16())


class Widest(TorchDispatchMode):
    """While entered, notes every tensor that an operation gives and whose last axis has one width."""

    def __init__(self, width: int):
        super().__init__()
        self.width, self.rows = width, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.ndim and tensor.shape[-1] == self.width:
                self.rows.append(tensor.numel() // self.width)
        return out


def test_the_sines_and_cosines_of_more_than_one_latent_never_exist(network, maps):
    history = maps()
    width = 4 * 4 * 256 * SPATIAL
    for compute in (lambda: network.encode(history), lambda: network(**inputs(), history=history)):
        with Widest(width) as seen:
            compute()
        assert 15 in seen.rows and max(seen.rows) == 15, "tokens of one latent"


# -------------------------------------------------------------------------------------------------------- the packing


@pytest.mark.parametrize("patch", [(1, 2, 2), (1, 4, 4), (4, 8, 8), (2, 4, 4), (3, 6, 2)])
@pytest.mark.parametrize("extent", [(5, 6, 10), (1, 2, 2), (4, 8, 8)])
def test_tokens_are_patches_whose_end_is_repeated(lyra2, patch, extent):
    x = random(2, 3, *extent, seed=1)
    found = lyra2.patchify(x, patch)
    assert torch.equal(found, torch.stack([slow_patches(one, patch) for one in x]))
    assert found.shape[2] == 3 * prod(patch)


@pytest.mark.parametrize("window", [(1, 1, 1), (1, 2, 2), (4, 4, 4), (2, 2, 2), (3, 5, 7)])
@pytest.mark.parametrize("extent", [(5, 3, 7), (1, 1, 1), (16, 4, 4)])
def test_pooling_is_a_mean_over_windows_whose_end_is_repeated(lyra2, window, extent):
    x = random(2, 3, *extent, seed=2)
    missing = [-length % step for length, step in zip(extent, window, strict=True)]
    padded = F.pad(x, (0, missing[2], 0, missing[1], 0, missing[0]), mode="replicate")
    assert_close(lyra2.pool(x, window), F.avg_pool3d(padded, window), atol=1e-6, rtol=1e-5)


def test_padding_repeats_the_end_and_leaves_alone_what_is_long_enough(lyra2):
    x = random(1, 2, 2, 3, 2, seed=3)
    assert_close(lyra2.pad_end(x, (4, 5, 3)), F.pad(x, (0, 1, 0, 2, 0, 2), mode="replicate"), atol=0, rtol=0)
    assert lyra2.pad_end(x, (2, 3, 2)) is x and lyra2.pad_end(x, (1, 1, 1)) is x


def test_unshuffling_makes_channels_of_2x2_latents(lyra2):
    x = random(2, 3, 4, 6, 8, seed=4)
    assert torch.equal(lyra2.unshuffle(x), torch.stack([slow_unshuffle(one) for one in x]))


@pytest.mark.parametrize(("kernel", "size"), [(1, (6, 10)), (2, (6, 10)), (2, (2, 4)), (2, (8, 8)), (3, (8, 14))])
def test_coarse_correspondences_are_means_of_whole_windows(lyra2, kernel, size):
    segment = lyra2.Segment(1, "spatial", kernel)
    x = random(2, 5, *size, seed=5)
    expected = torch.stack([slow_correspondences(one, kernel) for one in x])
    rows, columns = segment.grid(*size)[1:]
    if rows * columns != expected.shape[1]:  # a window that no pooled value fills: the end is repeated once more
        assert kernel == 3
        pooled = F.avg_pool2d(x, kernel)
        padded = F.pad(pooled, (0, 2 * columns - pooled.shape[3], 0, 2 * rows - pooled.shape[2]), mode="replicate")
        expected = torch.stack([slow_patches(one[:, None], (1, 2, 2)) for one in padded])
    assert_close(lyra2.correspondence_tokens(x, segment), expected, atol=1e-6, rtol=0)


def test_every_token_s_rays_are_the_mean_over_what_it_stands_for(network, maps):
    rays = maps(batch=2).rays
    expected, start = [], 0
    for slots, packs_time, kernel in (*TINY_SEGMENTS, (NEW, False, 1)):
        window = (kernel if packs_time else 1, kernel, kernel)
        part = rays[:, :, start : start + slots]
        expected.append(torch.stack([slow_means(slow_unshuffle(one), window) for one in part]))
        start += slots
    assert_close(network.ray_tokens(rays), torch.cat(expected, 1), atol=1e-6, rtol=0)


def test_rays_are_averaged_in_float32(network, maps):
    coarse = maps().rays.bfloat16()
    found = network.ray_tokens(coarse)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, network.ray_tokens(coarse.float()).bfloat16())


def test_positions_are_the_layout_s(network):
    expected = [place for axes in network.layout.token_positions(*SIZE, NEW) for place in itertools.product(*axes)]
    found = network.positions(*SIZE, NEW, "cpu")
    assert found.dtype == torch.float32
    assert_close(found[0], torch.tensor(expected), atol=0, rtol=0)


def test_the_stretched_embedding_sees_a_stretched_picture_as_the_plain_one_sees_the_picture(lyra2):
    plain = random(7, 5 * 4, seed=6)
    picture = random(5, 1, 2, 2, seed=7)
    for segment in (lyra2.Segment(4, "temporal", 4), lyra2.Segment(4, "spatial", 2), lyra2.Segment(1, "temporal", 1)):
        wide = lyra2.widened(plain, segment)
        t, y, x = segment.window
        expected = torch.empty(7, 5, t, 2 * y, 2 * x)
        for place in itertools.product(range(t), range(2 * y), range(2 * x)):
            i, row, column = place
            expected[:, :, i, row, column] = plain.view(7, 5, 2, 2)[:, :, row // y, column // x] / (t * y * x)
        assert_close(wide, expected.flatten(1))
        stretched = picture
        for axis, count in ((1, t), (2, y), (3, x)):
            stretched = stretched.repeat_interleave(count, axis)
        assert_close(wide @ stretched.flatten(), plain @ picture.flatten(), atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("frames", [[0], [2], [1, 2], [0, 2], [2, 0], [0, 1, 2]])
def test_tokens_of_some_new_latents_are_a_part_of_all(network, maps, frames):
    whole = network.encode(maps(batch=2))
    part = whole.at(frames)
    index = [*range(69), *(69 + 15 * frame + i for frame in frames for i in range(15))]
    assert torch.equal(part.tokens, whole.tokens)
    assert torch.equal(part.positions, whole.positions[:, index])
    assert torch.equal(part.rope, whole.rope[:, index])
    assert torch.equal(part.rays, whole.rays[:, index])
    assert torch.equal(part.correspondences, whole.correspondences[:, :, index])
    assert part.positions[0, 69::15, 0].tolist() == [
        8.0 + frame for frame in frames
    ]  # not counted from the part's start
    given = inputs(batch=2)
    out = network(**{**given, "x": given["x"][:, :, frames]}, history=part)
    assert out.shape == (2, 16, len(frames), *SIZE)
    if frames == [0, 1, 2]:
        assert torch.equal(out, network(**given, history=whole))
    if frames == [2, 0]:  # attention has no order but the positions
        other = network(**{**given, "x": given["x"][:, :, [0, 2]]}, history=whole.at([0, 2]))
        assert_close(out, other[:, :, [1, 0]], atol=1e-5, rtol=0)


def test_a_part_of_a_part_is_a_part(network, maps):
    whole = network.encode(maps())
    for a, b in zip(whole.at([0, 2]).at([1]), whole.at([2]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("frames", [[0], [1, 2], [3, 0], [0, 1, 2, 3]])
def test_maps_of_some_new_latents_keep_the_whole_past(network, maps, frames):
    whole = maps(batch=2, new=4)
    part = whole.at(frames, slice(None), slice(None))
    assert torch.equal(part.latents, whole.latents)
    assert torch.equal(part.rays, torch.cat([whole.rays[:, :, :8], whole.rays[:, :, [8 + f for f in frames]]], 2))
    expected = [whole.correspondences[:, :, :3], whole.correspondences[:, :, [3 + f for f in frames]]]
    assert torch.equal(part.correspondences, torch.cat(expected, 2))
    for encoded, other in zip(network.encode(part), network.encode(whole).at(frames), strict=True):
        assert torch.equal(encoded, other)
    again = part.at([len(frames) - 1], slice(None), slice(None))
    for encoded, other in zip(network.encode(again), network.encode(whole).at(frames[-1:]), strict=True):
        assert torch.equal(encoded, other)


def test_maps_of_an_area_are_cut_along_both_sides(maps):
    whole = maps()
    for tensor, part in zip(whole[:3], whole.at([0, 1, 2], slice(2, 6), slice(4, 8))[:3], strict=True):
        assert torch.equal(part, tensor[..., 2:6, 4:8])


def test_maps_move_to_another_dtype_all_together(maps, network):
    assert {tensor.dtype for tensor in maps().to("cpu", torch.bfloat16)[:3]} == {torch.bfloat16}
    encoded = network.encode(maps())
    assert all(torch.equal(a, b) for a, b in zip(encoded, encoded.to("cpu"), strict=True))
    assert {tensor.device.type for tensor in encoded.to("meta")} == {"meta"}


def test_encoding_takes_maps_of_another_dtype(network, build, maps):
    history = maps()
    wide = history.to(torch.double)
    for a, b in zip(network.encode(history), network.encode(wide, dtype=torch.float32), strict=True):
        assert torch.equal(a, b)
    coarse = build(torch.bfloat16).encode(history, dtype=torch.bfloat16)
    assert coarse.positions.dtype == coarse.rope.dtype == torch.float32
    assert {t.dtype for t in (coarse.tokens, coarse.rays, coarse.correspondences)} == {torch.bfloat16}
    assert torch.equal(coarse.positions, network.encode(history).positions)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("shared", [False, True])
def test_samples_are_repeated_in_turn(lyra2, count, batch, shared):
    x = random(count, 2, 3, seed=8)
    found = lyra2.for_batch(x, batch, shared=shared)
    if shared and count == 1:
        assert found is x
    else:
        assert torch.equal(found, torch.stack([x[i % count] for i in range(batch)]))
    if count in (1, batch):
        assert found.data_ptr() == x.data_ptr()  # nothing was copied


# --------------------------------------------------------------------------------------------------- precision, training


def test_the_time_is_embedded_as_in_float64(lyra2):
    times = torch.tensor([999.0, 833.3333, 0.0, 1.5])
    for t, found in zip(times.tolist(), lyra2.sinusoid(times, 256), strict=True):
        angles = [t * 10000 ** (-i / 128) for i in range(128)]
        expected = [f(angle) for f in (math.cos, math.sin) for angle in angles]
        assert found.dtype == torch.float32
        assert_close(found, torch.tensor(expected), atol=1e-7, rtol=0)


@contextmanager
def watching(**layers):
    """The dtypes of what these layers get and give."""
    found, handles = {}, []
    for name, layer in layers.items():

        def note(_layer, args, out, name=name):
            found.setdefault(name, set()).add((args[0].dtype, out.dtype))

        handles.append(layer.register_forward_hook(note))
    yield found
    for handle in handles:
        handle.remove()


def islands(network) -> dict:
    """The layers that compute in float32 whatever the weights' dtype."""
    return {
        "time_embedding.0": network.time_embedding[0],
        "time_embedding.2": network.time_embedding[2],
        "time_projection.1": network.time_projection[1],
        "head.head": network.head.head,
        "patch_embedding": network.patch_embedding,
        **{f"clean_patch_embeddings.{i}": layer for i, layer in enumerate(network.clean_patch_embeddings)},
    }


def test_time_head_and_patches_are_computed_in_float32_by_a_bfloat16_network(build, maps, network):
    coarse = build(torch.bfloat16)
    given = inputs()
    low = {key: value if key == "timestep" else value.bfloat16() for key, value in given.items()}
    history = maps()
    layers = {**islands(coarse), **{f"block{i}": block for i, block in enumerate(coarse.blocks)}}
    with watching(**layers) as found:
        out = coarse(**low, history=history.to("cpu", torch.bfloat16))
    for name in islands(coarse):
        assert found[name] == {(torch.float32, torch.float32)}, name
    for i in range(2):
        assert found[f"block{i}"] == {(torch.bfloat16, torch.bfloat16)}
    assert coarse.head.head.weight.dtype == torch.bfloat16
    expected = network(**given, history=history)
    assert (out.float() - expected).norm() / expected.norm() < 3e-2


def test_patch_embeddings_are_kept_in_float32(build):
    coarse = build(torch.bfloat16)
    for layer in (coarse.patch_embedding, *coarse.clean_patch_embeddings):
        assert {weight.dtype for weight in layer.parameters()} == {torch.float32}
    assert coarse.blocks[0].cam_encoder.weight.dtype == torch.bfloat16


def test_training_reaches_every_weight_through_the_maps(build, maps, monkeypatch):
    import comfy.model_management

    monkeypatch.setattr(comfy.model_management, "in_training", True)  # as the host's training node does
    network = build().requires_grad_(True)
    out = network(**inputs(batch=2), history=maps(batch=2))
    (out - random(*out.shape, seed=9)).square().mean().backward()
    for name, weight in network.named_parameters():
        assert weight.grad is not None, name
        assert torch.isfinite(weight.grad).all() and weight.grad.abs().max() > 0, name


def test_inference_mode_changes_nothing(network, maps):
    expected = network(**inputs(), history=maps())
    with torch.inference_mode():  # in which the host samples
        encoded = network.encode(maps())
        assert torch.equal(network(**inputs(), history=encoded), expected)


# ---------------------------------------------------------------------------------------------- what the host patches in


def test_a_block_can_be_replaced_around_the_original(network, maps):
    given, encoded = inputs(), network.encode(maps())
    expected = network(**given, history=encoded)
    calls, originals = [], []

    def keep(args, extra):
        out = extra["original_block"](args)
        calls.append((args, out))
        originals.append(extra["original_block"])
        return out

    replaced = {"patches_replace": {"dit": {("double_block", 0): keep, ("double_block", 1): keep}}}
    assert torch.equal(network(**given, history=encoded, transformer_options=replaced), expected)
    (first, first_out), (second, _) = calls
    assert set(first) == {"img", "txt", "vec", "pe", "transformer_options"}
    assert first["img"].shape == (1, 69 + 45, 96) and first["txt"].shape == (1, IMAGE + TEXT, 96)
    assert first["vec"].shape == (1, 1, 6, 96) and torch.equal(first["pe"], encoded.rope)
    assert torch.equal(second["img"], first_out["img"])
    assert torch.equal(originals[0](first)["img"], first_out["img"])  # still that block's, after the others have run


@pytest.mark.parametrize("skipped", [0, 1])
def test_a_replaced_block_is_what_replaces_it(network, maps, skipped):
    given, encoded = inputs(), network.encode(maps())
    seen = {}

    def skip(args, extra):
        seen["in"] = args["img"]
        return {"img": args["img"] * 2}

    def note(args):
        seen[args["block_index"]] = args["img"]
        return args

    options = {
        "patches_replace": {"dit": {("double_block", skipped): skip}},
        "patches": {"double_block": [note]},
    }
    out = network(**given, history=encoded, transformer_options=options)
    assert torch.equal(seen[skipped], 2 * seen["in"])
    assert not torch.equal(out, network(**given, history=encoded))


def test_a_replacement_may_change_what_the_original_block_gets(network, maps):
    """What it passes on is used, not what it was given."""
    given, encoded = inputs(), network.encode(maps())
    expected = network(**given, history=encoded)
    for key in ("img", "txt", "vec", "pe"):

        def change(args, extra, key=key):
            other = args[key].flip(1) if key != "vec" else args[key] * 0.5
            return extra["original_block"]({**args, key: other})

        options = {"patches_replace": {"dit": {("double_block", 0): change}}}
        assert (network(**given, history=encoded, transformer_options=options) - expected).abs().max() > 1e-4, key
    order = []

    def patched(args):
        order.append(args["transformer_options"]["mark"])
        return args["x"]

    def mark(args, extra):
        options = {**args["transformer_options"], "mark": 1, "patches": {"attn1_patch": [patched]}}
        return extra["original_block"]({**args, "transformer_options": options})

    network(
        **given,
        history=encoded,
        transformer_options={"patches_replace": {"dit": {("double_block", 1): mark}}},
    )
    assert order == [1]


def test_patches_after_a_block_are_told_what_the_host_tells_and_may_change_it(network, maps):
    given, encoded = inputs(), network.encode(maps())
    expected = network(**given, history=encoded)
    calls = []

    def note(args):
        calls.append(args)
        return {"img": args["img"]}

    options = {"patches": {"double_block": [note]}}
    assert torch.equal(network(**given, history=encoded, transformer_options=options), expected)
    assert [args["block_index"] for args in calls] == [0, 1]
    for args in calls:
        assert set(args) == {"img", "x", "vec", "block_index", "img_offset", "transformer_options"}
        assert args["x"] is given["x"] and args["img_offset"] == 69
        assert args["vec"].shape == (1, 1, 96) and args["img"].shape == (1, 114, 96)
        assert args["transformer_options"] is options

    after = []

    def keep(args, extra):
        after.append(args["img"])
        return extra["original_block"](args)

    twice = {
        "patches": {"double_block": [lambda args: {"img": 2 * args["img"]}, note]},
        "patches_replace": {"dit": {("double_block", 1): keep}},
    }
    undisturbed = calls[0]["img"]
    calls.clear()
    network(**given, history=encoded, transformer_options=twice)
    assert torch.equal(calls[0]["img"], 2 * undisturbed) and torch.equal(after[0], 2 * undisturbed)


def test_options_say_where_the_network_is(network, maps):
    told = []

    def note(args):
        options = args["transformer_options"]
        told.append([options[key] for key in ("grid_sizes", "total_blocks", "block_type", "block_index")])
        return args["x"]

    network(**inputs(), history=maps(), transformer_options={"patches": {"attn1_patch": [note]}})
    assert told == [[(NEW, 3, 5), 2, "double", 0], [(NEW, 3, 5), 2, "double", 1]]


def test_patches_of_the_attention_see_queries_and_keys_and_may_change_its_result(network, maps):
    given, encoded = inputs(), network.encode(maps())
    expected = network(**given, history=encoded)
    calls = []

    def note(args):
        calls.append(args)
        return args["x"]

    options = {"patches": {"attn1_patch": [note, note]}}
    attention = network.blocks[0].self_attn
    normed = {"q": [], "k": []}
    handles = [
        layer.register_forward_hook(lambda layer, args, out, name=name: normed[name].append(out))
        for name, layer in (("q", attention.norm_q), ("k", attention.norm_k))
    ]
    assert torch.equal(network(**given, history=encoded, transformer_options=options), expected)
    for handle in handles:
        handle.remove()
    assert len(calls) == 4  # two patches, two blocks
    for args in calls:
        assert args["q"].shape == args["k"].shape == (1, 114, 3, 32) and args["x"].shape == (1, 114, 96)
        assert args["transformer_options"] is options
    angles = slow_angles(encoded.positions[0].double(), 32).float()
    for name in "qk":
        turned = rotated(normed[name][0].unflatten(-1, (3, 32)).movedim(2, 1), angles).movedim(1, 2)
        assert_close(calls[0][name], turned, atol=1e-4, rtol=0)

    halved = {"patches": {"attn1_patch": [lambda args: args["x"] * 0.5]}}
    before_o = []
    handle = network.blocks[0].self_attn.o.register_forward_hook(lambda layer, args, out: before_o.append(args[0]))
    network(**given, history=encoded, transformer_options=halved)
    handle.remove()
    assert torch.equal(before_o[0], calls[0]["x"] * 0.5)


def test_a_wrapper_of_the_diffusion_model_is_called_around_it(network, maps):
    from comfy.patcher_extension import WrappersMP

    calls = []

    def wrapper(executor, *args, **kwargs):
        calls.append((len(args), set(kwargs)))
        return executor(*args, **kwargs) * 2

    given, history = inputs(), maps()
    options = {"wrappers": {WrappersMP.DIFFUSION_MODEL: {"ours": [wrapper]}}}
    found = network(**given, history=history, transformer_options=options)
    assert torch.equal(found, 2 * network(**given, history=history))
    assert len(calls) == 1 and "history" in calls[0][1]


def rope_given(network, history, **rope_options) -> torch.Tensor:
    """The rotations that the first block gets."""
    seen = []

    def note(args, extra):
        seen.append(args["pe"])
        return {"img": args["img"]}

    options = {"patches_replace": {"dit": {("double_block", 0): note}}, "rope_options": rope_options}
    network(**inputs(), history=history, transformer_options=options)
    return seen[0]


def test_scaled_and_shifted_positions_are_what_a_node_asks_for(network, maps):
    encoded = network.encode(maps())
    positions = encoded.positions
    assert torch.equal(rope_given(network, encoded), encoded.rope)
    identity = dict.fromkeys(("scale_t", "scale_y", "scale_x"), 1.0) | dict.fromkeys(
        ("shift_t", "shift_y", "shift_x"), 0.0
    )
    assert torch.equal(rope_given(network, encoded, **identity), encoded.rope)
    for axis, name in enumerate("tyx"):
        scaled, shifted = positions.clone(), positions.clone()
        scaled[..., axis] *= 1.5
        shifted[..., axis] += 2.25
        assert_close(rope_given(network, encoded, **{f"scale_{name}": 1.5}), network.rope(scaled))
        assert_close(rope_given(network, encoded, **{f"shift_{name}": 2.25}), network.rope(shifted))
    both = positions * torch.tensor([1.0, 1.5, 0.5]) + torch.tensor([0.0, 0.0, 3.0])
    assert_close(rope_given(network, encoded, scale_y=1.5, scale_x=0.5, shift_x=3.0), network.rope(both))


def test_rotations_are_those_of_the_positions(network):
    positions = torch.tensor([[[2.5, 0.0, 31.25], [0.0, 64.75, 1.0]]])
    rope = network.rope(positions)
    assert rope.shape == (1, 2, 1, 16, 2, 2) and rope.dtype == torch.float32
    angles = slow_angles(positions[0].double(), 32)
    expected = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], -1).unflatten(-1, (2, 2))
    assert_close(rope[0, :, 0], expected.float(), atol=1e-6, rtol=0)


# ---------------------------------------------------------------------------------------------------- the released one


def test_the_released_configuration_has_the_released_weights(lyra2, tiny_models):
    with torch.device("meta"):
        network = lyra2.Lyra2Model(**tiny_models.LYRA2_14B, device="meta", operations=torch.nn)
    shapes = {key: tuple(weight.shape) for key, weight in network.state_dict().items()}
    assert len(shapes) == 1435
    assert sum(map(prod, shapes.values())) == pytest.approx(17.03e9, abs=5e6)
    added = ("cam_encoder", "buffer_encoder", "clean_patch_embeddings")
    new = sum(prod(shape) for key, shape in shapes.items() if any(name in key for name in added))
    assert new == pytest.approx(0.635e9, abs=5e5 * 2)
    assert {key: shape for key, shape in shapes.items() if not key.startswith("blocks.")} == OUTER_KEYS
    for block in (0, 39):
        prefix = f"blocks.{block}."
        found = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
        assert found == BLOCK_KEYS
    assert not any(key.startswith("blocks.40.") for key in shapes)
    assert (network.layout.slots(), network.layout.new_latents, network.rank) == (25, 20, 256)


def test_the_released_layout_has_the_released_number_of_tokens(lyra2, tiny_models):
    small = {**tiny_models.LYRA2_14B, "dim": 128, "ffn_dim": 8, "num_heads": 1, "num_layers": 0}
    with torch.device("meta"):
        network = lyra2.Lyra2Model(**small, device="meta", operations=torch.nn)
    positions = network.positions(60, 104, 20, "cpu")
    assert positions.shape == (1, 38246, 3)
    assert positions[0, 7046].tolist() == [25.0, 0.0, 0.0] and positions[0, -1].tolist() == [44.0, 29.0, 51.0]
    assert [start for start, _ in network.seen_latents(60, 104, 20)] == [
        *(1560 + 390 * i for i in range(4)),
        3120,
        *(7046 + 1560 * i for i in range(20)),
    ]
