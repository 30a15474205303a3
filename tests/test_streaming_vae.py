"""The Wan VAE in pieces gives what it gives at once, forgets what it may forget, and holds no more than a pair of latents."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

PRIMED, CHUNK, CHUNKS = 25, 20, 6
REACHES = {2: (38, 112), 1: (30, 80)}  # (latents, frames) by blocks per level; 2 as released
ROUNDING = {"rtol": 0, "atol": 2e-6}  # convolutions of pictures that lie in memory in another order


@pytest.fixture(autouse=True)
def inference():
    """As the host runs its nodes."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def weights(comfy_host, tiny_models):
    from safetensors.torch import load_file

    return load_file(tiny_models.write_vae(comfy_host / "models" / "vae" / "streamed.safetensors", dim=4))


@pytest.fixture(scope="module")
def vae(weights):
    import comfy.sd

    with torch.inference_mode(False):
        return comfy.sd.VAE(sd=dict(weights))


@pytest.fixture(scope="module")
def sv(comfy_host):
    """The module."""
    from lyra_core.models import streaming_vae

    return streaming_vae


def with_blocks(count: int, vae):
    """A VAE of the host with another number of blocks per level, and so with another memory."""
    from comfy.ldm.wan.vae import WanVAE

    if count == 2:
        return vae
    torch.manual_seed(0)
    with torch.inference_mode(False):
        network = WanVAE(4, 16, num_res_blocks=count, temperal_downsample=[False, True, True]).requires_grad_(False)
        for weight in network.parameters():
            spread = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.1
            weight.copy_(spread * torch.randn(weight.shape))
    return SimpleNamespace(first_stage_model=network, device=torch.device("cpu"), vae_dtype=torch.float32)


def latents(count: int, size=(2, 2), seed: int = 0) -> torch.Tensor:
    return torch.randn(16, count, *size, generator=torch.Generator().manual_seed(seed))


def frames(count: int, size=(16, 16), seed: int = 0) -> torch.Tensor:
    return torch.rand(count, *size, 3, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def caches(stream) -> list:
    """Everything that a stream remembers."""
    return [*stream.decoder, *stream.encoder]


def same(ours: list, theirs: list) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a is b or a == b
        for a, b in zip(ours, theirs, strict=True)
    )


# --------------------------------------------------------------------------------------------- pieces make up the whole


def test_decoding_in_pieces_is_the_host_s_decoding(sv, vae):
    z, stream = latents(13, (4, 6)), sv.fresh(vae)
    parts = [part for piece in z.split([5, 2, 6], 1) for part in sv.decode(vae, piece, stream)]
    assert [len(part) for part in parts] == [1, *[8] * 6]
    whole = vae.first_stage_model.decode(z[None])[0].movedim(0, -1)
    assert torch.equal(torch.cat(parts), whole)
    assert_close((torch.cat(parts) * 0.5 + 0.5).clamp(0, 1), vae.decode(z[None])[0], rtol=0, atol=1e-6)


def test_encoding_in_pieces_is_the_host_s_encoding(sv, vae):
    video, stream = frames(49, (32, 48)), sv.fresh(vae)
    parts = [part for piece in video.split([9, 16, 24]) for part in sv.encode(vae, piece, stream)]
    assert [part.shape[1] for part in parts] == [1, *[2] * 6]
    assert_close(torch.cat(parts, 1), vae.encode(video * 0.5 + 0.5)[0], rtol=0, atol=1e-6)
    whole = vae.first_stage_model.encode(video.movedim(-1, 0)[None])[0]
    assert torch.equal(torch.cat(parts, 1), whole)


def test_priming_is_the_encoding_of_the_repeated_photo_and_its_decoding(sv, vae):
    photo = frames(1, (32, 48))[0]
    history, stream = sv.prime(vae, photo, 9)
    still = photo.expand(33, *photo.shape)
    assert_close(history, vae.first_stage_model.encode(still.movedim(-1, 0)[None])[0], **ROUNDING)
    after, more = latents(4, (4, 6), seed=1), sv.fresh(vae)
    list(sv.encode(vae, still, more))
    assert same(caches(stream)[len(stream.decoder) :], more.encoder)
    decoded = vae.first_stage_model.decode(torch.cat([history, after], 1)[None])[0].movedim(0, -1)
    assert_close(torch.cat(list(sv.decode(vae, after, stream))), decoded[33:], **ROUNDING)


def test_chunk_after_chunk_is_all_at_once(sv, vae):
    """Frames and remembered latents of two chunks after priming, against the host's network in one go."""
    photo, z = frames(1, (32, 48))[0], latents(8, (4, 6), seed=2)
    history, stream = sv.prime(vae, photo, 5)
    made: list[torch.Tensor] = []
    remembered = [sv.advance(vae, chunk, stream, made.append) for chunk in z.split(4, 1)]
    assert [len(part) for part in made] == [8] * 4
    decoded = vae.first_stage_model.decode(torch.cat([history, z], 1)[None])[0].movedim(0, -1)[17:]
    assert_close(torch.cat(made), decoded, **ROUNDING)
    video = torch.cat([photo.expand(17, *photo.shape), decoded])
    whole = vae.first_stage_model.encode(video.movedim(-1, 0)[None])[0]
    assert_close(torch.cat(remembered, 1), whole[:, 5:], **ROUNDING)


def test_frames_are_neither_clamped_nor_left_in_the_vae_s_precision(sv, vae):
    made = torch.cat(list(sv.decode(vae, 5 * latents(5), sv.fresh(vae))))
    assert made.dtype == torch.float32 and made.abs().max() > 1


def test_pictures_encoded_alone_know_nothing_of_each_other(sv, vae):
    pictures = frames(3)
    alone = sv.encode_alone(vae, pictures)
    assert alone.shape == (3, 16, 2, 2)
    for picture, latent in zip(pictures, alone, strict=True):
        assert torch.equal(vae.first_stage_model.encode(picture.movedim(-1, 0)[None, :, None])[0, :, 0], latent)


def test_a_vae_in_bfloat16_streams_as_well(sv, vae, weights):
    import comfy.sd

    half = comfy.sd.VAE(sd=dict(weights), dtype=torch.bfloat16)
    assert half.vae_dtype == torch.bfloat16
    z, stream = latents(9), sv.fresh(half)
    made = torch.cat([part for piece in z.split([5, 4], 1) for part in sv.decode(half, piece, stream)])
    whole = half.first_stage_model.decode(z[None].bfloat16())[0].movedim(0, -1)
    assert made.dtype == torch.float32 and torch.equal(made, whole.float())
    exact = torch.cat(list(sv.decode(vae, z, sv.fresh(vae))))
    assert 0 < (made - exact).norm() / exact.norm() < 0.05
    _history, stream = sv.prime(half, frames(1)[0], 3)
    assert sv.advance(half, z[:, :4], stream).isfinite().all()


def test_in_half_precision_on_a_gpu_channels_lie_last_and_the_numbers_stay(sv, vae, monkeypatch):
    """On the processor and in float32 here, where what rounds less can be told from what is wrong."""
    z, video = latents(5, (4, 6), seed=4), frames(9, (32, 48))
    plain = [torch.cat(list(sv.decode(vae, z, sv.fresh(vae)))), torch.cat(list(sv.encode(vae, video, sv.fresh(vae))), 1)]
    plain.append(sv.encode_alone(vae, video))
    norms, forward = [], sv._Norm.forward
    monkeypatch.setattr(sv._Norm, "forward", lambda self, x: norms.append(x) or forward(self, x))
    monkeypatch.setattr(sv, "_rounds", lambda vae: True)
    ours = [torch.cat(list(sv.decode(vae, z, sv.fresh(vae)))), torch.cat(list(sv.encode(vae, video, sv.fresh(vae))), 1)]
    ours.append(sv.encode_alone(vae, video))
    for a, b in zip(ours, plain, strict=True):
        assert_close(a, b, atol=2e-5, rtol=1e-4)
    assert len(norms) > 100 and sv._alike(video.movedim(-1, 0)[None], vae).stride(1) == 1


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_a_norm_is_the_host_s_whichever_way_it_is_computed(sv, dtype, near):
    from comfy.ldm.wan.vae import RMS_norm

    host = RMS_norm(96, images=False)
    host.gamma.data = torch.rand(96, 1, 1, 1) + 0.5
    x = torch.randn(1, 96, 2, 3, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-6, 1e-2, 1, 1e3])
    x[..., 0, :] = 0  # a pixel of nothing stays one
    wanted, last = host(x).movedim(1, -1), x.to(dtype).movedim(1, -1)
    for way in (sv.in_one_pass, sv.by_products):
        assert_close(way(last, host.gamma.flatten().to(dtype)).float(), wanted, atol=1e-6, rtol=near)


@pytest.mark.parametrize("faster", ["in_one_pass", "by_products"])
def test_large_norms_are_computed_by_what_a_card_is_faster_with(sv, vae, monkeypatch, faster):
    z, used = latents(5, (4, 6), seed=4), []
    monkeypatch.setattr(sv, "_rounds", lambda vae: True)
    plain = torch.cat(list(sv.decode(vae, z, sv.fresh(vae))))
    monkeypatch.setattr(sv, "_worth_a_choice", lambda x: x.shape[1] == 4)

    def fastest(kind, ways, x, gamma):
        chosen = next(way for way in ways if way.__name__ == faster)
        return lambda x, gamma: used.append(kind) or chosen(x, gamma)

    monkeypatch.setattr(sv.kernels, "fastest", fastest)
    assert_close(torch.cat(list(sv.decode(vae, z, sv.fresh(vae)))), plain, atol=2e-5, rtol=1e-4)
    assert len(used) > 20 and set(used) == {("norm", torch.device("cpu"), torch.float32, 4)}


@pytest.mark.parametrize(
    ("cuda", "dtype", "size", "worth"),
    [(True, "bfloat16", 2**24, True), (True, "bfloat16", 2**23, False), (True, "float16", 2**24, False), (False, "bfloat16", 2**24, False)],
)
def test_a_faster_norm_is_looked_for_where_bfloat16_fills_a_gpu(sv, cuda, dtype, size, worth):
    assert sv._worth_a_choice(SimpleNamespace(is_cuda=cuda, dtype=getattr(torch, dtype), numel=lambda: size)) is worth


def test_the_host_gets_its_norms_back_whatever_happens(sv, vae, monkeypatch):
    monkeypatch.setattr(sv, "_rounds", lambda vae: True)
    before = [type(layer) for layer in vae.first_stage_model.modules()]
    with pytest.raises(ZeroDivisionError), sv._channels_last(vae):
        assert [type(layer) for layer in vae.first_stage_model.modules()] != before
        raise ZeroDivisionError
    assert [type(layer) for layer in vae.first_stage_model.modules()] == before


def test_half_precision_alone_is_turned_round_and_only_on_a_gpu(sv):
    for device, dtype, turned in (("cuda", "bfloat16", True), ("cuda", "float16", True), ("cuda", "float32", False), ("cpu", "bfloat16", False)):
        assert sv._rounds(SimpleNamespace(device=torch.device(device), vae_dtype=getattr(torch, dtype))) is turned


def test_no_more_frames_live_than_two_latents_hold(sv, vae):
    """Whatever the length of a chunk."""
    _history, stream = sv.prime(vae, frames(1)[0], 3)
    given, alive = [], []

    def watch(decoded):
        given.append(weakref.ref(decoded))
        alive.append(sum(len(ref()) for ref in given if ref() is not None))

    sv.advance(vae, latents(24), stream, watch)
    assert len(alive) == 12
    assert max(alive) <= 16 and max(alive) == max(alive[:2])


# ----------------------------------------------------------------------------------------------------- what is forgotten


@pytest.mark.parametrize("blocks", REACHES)
def test_the_decoder_reaches_back_exactly_as_far_as_it_says(sv, vae, blocks):
    """By gradients in float64, which are zero exactly where nothing depends on anything."""
    with torch.inference_mode(False):
        one = with_blocks(blocks, vae)
        reach = sv.decoder_reach(one.first_stage_model)
        assert reach == REACHES[blocks][0]
        z, parts = latents(reach + 7 + reach % 2).double().requires_grad_(), []
        network, stream = double(one.first_stage_model), sv.fresh(one)
        for pair in sv._in_groups(z.movedim(1, 0), False, 2, "latents"):
            parts.append(torch.cat(network.decoder(network.conv2(pair.movedim(0, 1)[None]), stream.decoder, [0]), 2))
        for latent, shown in ((z.shape[1] - 2, slice(0, 4)), (z.shape[1] - 1, slice(4, 8))):
            (gradient,) = torch.autograd.grad(parts[-1][:, :, shown].sum(), z, retain_graph=True)
            used = gradient.abs().amax((0, 2, 3)).nonzero().flatten().tolist()
            assert (used[0], used[-1]) == (latent - reach, latent)


@pytest.mark.parametrize("blocks", REACHES)
def test_the_encoder_reaches_back_exactly_as_far_as_it_says(sv, vae, blocks):
    with torch.inference_mode(False):
        one = with_blocks(blocks, vae)
        reach = sv.encoder_reach(one.first_stage_model)
        assert reach == REACHES[blocks][1]
        video = frames(1 + 8 * (reach // 8 + 3), (8, 8)).double().requires_grad_()
        network, stream, made = double(one.first_stage_model), sv.fresh(one), []
        for group in sv._in_groups(video, False, 8, "frames"):
            for pair in group.split(2):
                made.append(network.encoder(pair.movedim(-1, 0)[None], stream.encoder, [0]))
        (gradient,) = torch.autograd.grad(made[-1][:, :, -1].sum(), video)
        used = gradient.abs().amax((1, 2, 3)).nonzero().flatten().tolist()
        assert (used[0], used[-1]) == (len(video) - 1 - reach, len(video) - 1)


def double(network):
    import copy

    return copy.deepcopy(network).double().requires_grad_(False)


@pytest.fixture(scope="module")
def uninterrupted(sv, vae):
    """Per network: the latents of six chunks, and copies of the stream after each."""
    made = {}

    def run(blocks: int):
        if blocks not in made:
            one, photo = with_blocks(blocks, vae), frames(1)[0]
            history, stream = sv.prime(one, photo, PRIMED)
            z = torch.cat([history, latents(CHUNK * CHUNKS + 2, seed=3)], 1)
            states = [copied(sv, stream)]
            for chunk in z[:, PRIMED:-2].split(CHUNK, 1):
                sv.advance(one, chunk, stream)
                states.append(copied(sv, stream))
            made[blocks] = one, photo, z, states
        return made[blocks]

    return run


def copied(sv, stream):
    copies = (
        [c.clone() if isinstance(c, torch.Tensor) else c for c in part] for part in (stream.decoder, stream.encoder)
    )
    return sv.Stream(*copies)


@pytest.mark.parametrize("blocks, chunks", [*((2, chunks) for chunks in range(CHUNKS + 1)), (1, 4), (1, 6)])
def test_a_rebuilt_stream_is_the_uninterrupted_one_bit_by_bit(sv, uninterrupted, blocks, chunks):
    one, photo, z, states = uninterrupted(blocks)
    count, asked = PRIMED + CHUNK * chunks, []

    def sampled(start: int):
        asked.append(start)
        return z[:, start:count]

    stream = sv.rebuild(one, photo, PRIMED, count, sampled)
    assert same(caches(stream), caches(states[chunks]))
    ours, theirs = [], []
    following = [
        sv.advance(one, z[:, -2:], s, made.append) for s, made in ((stream, ours), (copied(sv, states[chunks]), theirs))
    ]
    assert torch.equal(*following) and torch.equal(*map(torch.cat, (ours, theirs)))
    latents_back, frames_back = REACHES[blocks]
    needed = latents_back + 1 + 2 * -(-frames_back // 8)  # of them the last are encoded again, whole groups of 8 frames
    if count - needed <= PRIMED:
        assert asked == [PRIMED] * (chunks > 0)
    else:
        assert len(asked) == 1 and needed <= count - asked[0] <= needed + 1


def test_rebuilding_does_not_run_what_it_does_not_need(sv, uninterrupted, monkeypatch):
    """A world of six chunks costs what one of four costs."""
    one, photo, z, _states = uninterrupted(2)
    decoded, encoded = [], []
    decode, encode = sv.decode, sv.encode
    monkeypatch.setattr(sv, "decode", lambda v, x, s: decoded.append(x.shape[1]) or decode(v, x, s))
    monkeypatch.setattr(sv, "encode", lambda v, x, s: encoded.append(len(x)) or encode(v, x, s))
    sv.rebuild(one, photo, PRIMED, z.shape[1], lambda start: z[:, start:])
    assert sum(decoded) == 67 and sum(encoded) == 113


def test_a_network_of_odd_reach_is_rebuilt_in_whole_pairs_too(sv, uninterrupted, monkeypatch):
    one, photo, z, states = uninterrupted(1)
    reach = sv.decoder_reach(one.first_stage_model)
    monkeypatch.setattr(sv, "decoder_reach", lambda network: reach + 1)
    count = PRIMED + CHUNK * CHUNKS
    assert same(caches(sv.rebuild(one, photo, PRIMED, count, lambda start: z[:, start:count])), caches(states[-1]))


# -------------------------------------------------------------------------------------------------------------- refusals


def test_an_odd_number_is_refused_in_words_and_before_anything_is_used_up(sv, vae):
    _history, stream = sv.prime(vae, frames(1)[0], 3)
    before = caches(stream)
    with pytest.raises(ValueError, match=r"^3 latents can't be streamed .*multiple of 2"):
        sv.advance(vae, latents(3), stream)
    with pytest.raises(ValueError, match=r"^12 frames can't be streamed .*multiple of 8"):
        list(sv.encode(vae, frames(12), stream))
    assert all(a is b for a, b in zip(before, caches(stream), strict=True))
    with pytest.raises(ValueError, match=r"^3 latents after the first one"):
        list(sv.decode(vae, latents(4), sv.fresh(vae)))
    with pytest.raises(ValueError, match=r"^5 frames after the first one"):
        list(sv.encode(vae, frames(6), sv.fresh(vae)))


def test_another_vae_is_refused_by_its_name(sv):
    import comfy.ldm.models.autoencoder
    import comfy.ldm.wan.vae2_2

    with torch.device("meta"):
        wan22 = comfy.ldm.wan.vae2_2.WanVAE(dim=16, z_dim=48, temperal_downsample=[False, True, True])
    for network, name in ((wan22, r"vae2_2\.WanVAE"), (torch.nn.Linear(1, 1), "Linear")):
        other = SimpleNamespace(first_stage_model=network)
        with pytest.raises(ValueError, match=rf"needs the Wan 2.1 VAE \(wan_2.1_vae\), found .*{name}"):
            sv.fresh(other)


def test_the_host_is_asked_for_room_for_the_latents_of_one_step(sv, vae, monkeypatch):
    import comfy.model_management

    asked = []
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda *args, **kwargs: asked.append((args, kwargs)))
    sv.load(vae, (60, 104))
    ((models,), options) = asked[0]
    assert models == [vae.patcher]
    assert options["memory_required"] >= vae.memory_used_decode((1, 16, 2, 60, 104), vae.vae_dtype)


def test_between_chunks_the_features_wait_where_the_host_keeps_results(sv, vae, monkeypatch):
    """On the GPU they would be in the transformer's way."""
    import comfy.model_management

    moved = []
    monkeypatch.setattr(comfy.model_management, "intermediate_device", lambda: "kept here")
    monkeypatch.setattr(sv.Stream, "to", lambda self, device: moved.append(str(device)))
    _history, stream = sv.prime(vae, torch.zeros(16, 16, 3), 3)
    assert moved == ["kept here"]
    sv.advance(vae, torch.zeros(16, 2, 2, 2), stream)
    assert moved == ["kept here", str(vae.device), "kept here"]


def test_one_stream_waits_on_the_gpu_while_everything_that_is_loaded_fits_beside_it(sv, monkeypatch):
    vae, room = SimpleNamespace(device=torch.device("cuda")), {}
    monkeypatch.setattr(sv, "_beside", weakref.WeakSet())
    monkeypatch.setattr(sv, "_room", lambda device: room["bytes"])
    monkeypatch.setattr(sv.Stream, "to", lambda self, device: moved.append((names[id(self)], str(device))))
    streams = [sv.Stream([torch.zeros(250)], [torch.zeros(250), None]) for _ in range(2)]
    names, moved = {id(stream): name for stream, name in zip(streams, "ab", strict=True)}, []
    assert streams[0].nbytes == 2000
    room["bytes"] = 5 * 2000 - 1  # sampling needs four times as much
    sv.set_aside(streams[0], vae)
    room["bytes"] = 5 * 2000
    sv.set_aside(streams[0], vae)
    sv.set_aside(streams[0], vae)
    sv.set_aside(streams[1], vae)  # the host doesn't know of them, so there is never a second one
    assert moved == [("a", "cpu"), ("a", "cuda"), ("a", "cuda"), ("a", "cpu"), ("b", "cuda")]


def test_the_room_on_a_device_is_what_whole_models_leave(sv, monkeypatch):
    import comfy.model_management as management

    gpu, other = torch.device("cuda:0"), torch.device("cpu")
    models = [SimpleNamespace(model_memory=lambda size=size: size, device=device) for size, device in ((7e9, gpu), (1e9, other))]
    monkeypatch.setattr(management, "current_loaded_models", models)
    monkeypatch.setattr(management, "get_total_memory", lambda device: 24e9)
    assert sv._room(gpu) == 24e9 - 7e9 - management.minimum_inference_memory()


def test_all_features_of_a_stream_move_together(sv, vae):
    _history, stream = sv.prime(vae, torch.zeros(16, 16, 3), 3)
    before = [part for part in (*stream.decoder, *stream.encoder) if isinstance(part, torch.Tensor)]
    stream.to("meta")
    after = [part for part in (*stream.decoder, *stream.encoder) if isinstance(part, torch.Tensor)]
    assert len(after) == len(before) > 20 and all(part.is_meta for part in after)
