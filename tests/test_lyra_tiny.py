"""lyra-tiny: one checkpoint of transformer, codec and words that stock loaders load, and what it begins and learns with."""

from __future__ import annotations

import pytest
import torch

from lyra_core.conditioning.framepack import LYRA2

SMALL = {"rank": 12, "dim": 48, "ffn_dim": 64, "num_heads": 2, "num_layers": 2}


@pytest.fixture(scope="module")
def network(train):
    return train.painter.new(0, {**train.painter.CONFIG, **SMALL})


@pytest.fixture(scope="module")
def codec(train):
    return train.codec.new(0, 4)


@pytest.fixture(scope="module")
def loaded(comfy_host, train, network, codec):
    """The checkpoint, loaded by the host's own node: model, clip, vae."""
    import nodes

    folder = comfy_host / "models" / "checkpoints"
    train.release.write(folder / "lyra_tiny.safetensors", network, codec)
    return nodes.CheckpointLoaderSimple().load_checkpoint("lyra_tiny.safetensors")


@pytest.mark.parametrize("frames", [1, 5, 9, 17])
def test_the_codec_learns_in_the_sums_that_the_host_works_in(train, codec, frames):
    video = torch.rand(1, 3, frames, 32, 48, generator=torch.Generator().manual_seed(frames)) * 2 - 1
    with torch.no_grad():
        for weight in codec.parameters():  # what begins as nothing would agree whatever came before
            weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
        latents = codec.encode(video)
        torch.testing.assert_close(train.codec.encode(codec, video), latents, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(train.codec.decode(codec, latents), codec.decode(latents), rtol=1e-4, atol=1e-5)


def test_latents_have_the_mean_and_spread_of_the_hosts_format_and_pictures_stay(train, codec):
    from comfy.latent_formats import Wan21

    videos = torch.rand(3, 3, 5, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        there = train.codec.in_format(codec, videos)
        latents = Wan21().process_in(train.codec.encode(there, videos))
        torch.testing.assert_close(latents.mean((0, 2, 3, 4)), torch.zeros(16), rtol=0, atol=1e-3)
        torch.testing.assert_close(latents.std((0, 2, 3, 4)), torch.ones(16), rtol=1e-3, atol=0)
        before, after = (train.codec.decode(net, train.codec.encode(net, videos)) for net in (codec, there))
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)


def test_a_chunk_encoded_after_others_is_that_part_of_the_whole(train, codec):
    coder = train.codec.TrainingCodec(codec)
    frames = torch.rand(1 + 88, 32, 48, 3, generator=torch.Generator().manual_seed(2)) * 2 - 1
    whole = coder.encode(frames)
    part = coder.encode(frames[81:], frames[:81])
    assert part.shape[1] == 2
    torch.testing.assert_close(part, whole[:, -2:], rtol=0.02, atol=0.05)  # bfloat16
    decoded = coder.decode(whole)
    torch.testing.assert_close(coder.decode(whole[:, -2:], whole[:, :-2]), decoded[-8:], rtol=0.02, atol=0.05)


def test_the_stock_loader_makes_model_words_and_codec_of_one_file(train, loaded, network):
    from lyra_core.models.lyra2_host import Lyra2Base

    model, clip, vae = loaded
    assert type(model.model) is Lyra2Base and model.model.diffusion_model.layout == LYRA2
    assert model.model.diffusion_model.img_emb is None
    theirs = model.model.diffusion_model.state_dict()
    for name, weight in network.state_dict().items():
        torch.testing.assert_close(theirs[name].float(), weight.view_as(theirs[name]), rtol=0.01, atol=0.01)
    text = clip.encode_from_tokens_scheduled(clip.tokenize("a red room"))[0][0]
    assert text.shape == (1, 3, train.painter.CONFIG["text_dim"])
    torch.testing.assert_close(text[0], train.release.tell("a red room"), rtol=0.01, atol=0.01)
    assert vae.decode(torch.zeros(1, 16, 3, 4, 6)).shape == (1, 9, 32, 48, 3)


def test_unknown_words_are_named_and_the_order_of_words_counts(loaded, caplog):
    clip = loaded[1]
    said = [clip.encode_from_tokens_scheduled(clip.tokenize(text))[0][0] for text in ("red floor", "floor red", "Zebra red", "")]
    assert not torch.allclose(said[0].flip(1), said[1])
    assert "zebra" in caplog.text and said[3].shape[1] == 1


def test_a_chunk_is_painted_by_the_stock_sampler_without_any_clip_vision(train, loaded):
    import nodes
    from lyra_core.models import generation
    from lyra_core.models.lyra2_host import conditioning
    from lyra_core.world import world as worlds

    model, clip, vae = loaded
    film = train.films.film(3, train.painter.RECIPE, chunks=1, size=(32, 48))
    world = worlds.begin(film.frames[0].float() / 255, film.depths[0], film.cameras[:1])
    plan = worlds.plan(world, film.cameras[1:])
    with torch.inference_mode():
        history = generation.pack(world, plan, vae)
        text = clip.encode_from_tokens_scheduled(clip.tokenize(film.captions[0]))[0]
        prompt = [[text[0], {**text[1], **conditioning(history)}]]
        empty = {"samples": torch.zeros(1, *history.warped.shape)}
        latents = nodes.KSampler().sample(model, 1, 1, 1.0, "euler", "simple", prompt, prompt, empty)[0]["samples"]
    assert latents.shape == (1, 16, 20, 4, 6) and torch.isfinite(latents).all() and latents.std() > 0.1


def test_attention_begins_where_correspondences_point(train):
    """A new token looks hardest at that token of the memory whose pixels it shows."""
    network = train.painter.new(1)
    layer, dim, heads = network.blocks[0], network.dim, network.blocks[0].self_attn.num_heads
    from lyra_core.conditioning.correspondence import canonical_history
    from lyra_core.models.lyra2 import correspondence_tokens, octaves

    with torch.no_grad():
        seen = canonical_history(LYRA2, (64, 96))[:, 4:]  # the best frame's own pixels, by name
        segment = next(s for s in LYRA2.segments if s.source == "spatial" and s.kernel == 1)
        code = layer.buffer_encoder(octaves(correspondence_tokens(seen[:, 0][None], segment)))[0]  # (tokens, dim)
        noise = torch.randn(2, len(code), dim, generator=torch.Generator().manual_seed(3))
        q, k = (projection(code + noise[i]) for i, projection in enumerate((layer.self_attn.q, layer.self_attn.k)))
        scores = torch.nn.functional.normalize(q, dim=-1) @ torch.nn.functional.normalize(k, dim=-1).T
    assert (scores.argmax(1) == torch.arange(len(code))).float().mean() > 0.7 and heads == 3


def test_a_training_that_was_stopped_goes_on_to_the_same_weights(train, tmp_path, monkeypatch):
    monkeypatch.setattr(train.codec, "SCENES", 2)
    monkeypatch.setattr(train.codec, "CUT", (16, 16))
    monkeypatch.setattr(train.codec, "REPORTED", 2)
    monkeypatch.setattr(train.codec, "films", lambda seed, count: torch.rand(2, 3, 9, 16, 16, generator=torch.Generator().manual_seed(seed)))
    whole = train.codec.train(tmp_path / "a", 4, width=4, say=lambda text: None)

    def stop(text: str) -> None:
        if " 2/4" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.codec.train(tmp_path / "b", 4, width=4, say=stop)
    again = train.codec.train(tmp_path / "b", 4, width=4, say=lambda text: None)
    for name, weight in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    with pytest.raises(ValueError, match="training with"):
        train.codec.train(tmp_path / "b", 5, width=4)
