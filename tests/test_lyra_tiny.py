"""lyra-tiny: one checkpoint of transformer, codec and words that stock loaders load, and what it begins and learns with."""

from __future__ import annotations

import subprocess
import sys

import killed
import pytest
import torch
from conftest import PROJECT

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
    assert (scores.argmax(1) == torch.arange(len(code))).float().mean() > 0.7 and heads == 6


@pytest.fixture
def small_steps(train, monkeypatch):
    """The codec learns from noise of 16x16 pixels, and keeps and tells every step."""
    monkeypatch.setattr(train.codec, "SCENES", 2)
    monkeypatch.setattr(train.codec, "CUT", (16, 16))
    monkeypatch.setattr(train.codec, "REPORTED", 1)
    monkeypatch.setattr(train.codec, "SAVED", 0.0)
    monkeypatch.setattr(train.codec, "films", lambda seed, count, device: torch.rand(2, 3, 9, 16, 16, generator=torch.Generator().manual_seed(seed)))


def test_a_training_that_was_stopped_goes_on_to_the_same_weights(train, tmp_path, small_steps):
    whole = train.codec.train(tmp_path / "a", 4, width=4, say=lambda text: None)

    def stop(text: str) -> None:
        if "codec 3: " in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.codec.train(tmp_path / "b", 4, width=4, say=stop)
    again = train.codec.train(tmp_path / "b", 4, width=4, say=lambda text: None)
    for name, weight in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    with pytest.raises(ValueError, match="training with"):
        train.codec.train(tmp_path / "b", 5, width=4)


def test_a_clock_that_ends_a_training_stands_still_while_nobody_trains(train, tmp_path, monkeypatch, small_steps):
    now, said = [0.0], []
    monkeypatch.setattr(train.going_on.time, "monotonic", lambda: now[0])

    def tell(text: str) -> None:
        said.append(text)
        now[0] += 30  # seconds that a step takes
        if len(said) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.codec.train(tmp_path / "a", 1, width=4, say=tell, minutes=2)
    now[0] += 1e6
    train.codec.train(tmp_path / "a", 1, width=4, say=tell, minutes=2)
    shares = [text.split(", ")[-1] for text in said]
    assert shares == ["0 %", "25 %", "50 %", "25 %", "50 %", "75 %", "100 %"]
    before = (tmp_path / "a").stat().st_mtime_ns
    train.codec.train(tmp_path / "a", 1, width=4, say=tell, minutes=2)
    assert len(said) == 7 and (tmp_path / "a").stat().st_mtime_ns == before
    for others in ({}, {"minutes": 3}):
        with pytest.raises(ValueError, match="training with"):
            train.codec.train(tmp_path / "a", 1, width=4, **others)


@pytest.mark.parametrize("given", ["0", "-1", "nan", "inf", "soon"])
def test_a_time_that_is_none_is_refused_before_anything_begins(given):
    done = subprocess.run([sys.executable, PROJECT / "tools" / "train_tiny.py", f"--codec-minutes={given}"], capture_output=True, text=True)
    assert done.returncode == 2 and f"{given!r} minutes; give a number above 0" in done.stderr


# ---------------------------------------------------------------------------------------------------------- the painter


@pytest.fixture(scope="module")
def folder(train, codec, tmp_path_factory):
    """A training set of two films with the codec's latents."""
    place = tmp_path_factory.mktemp("films")
    train.films.training_set(place, 2, train.painter.RECIPE, train.codec.TrainingCodec(codec, "tiny"), size=(32, 48), say=lambda text: None)
    return place


@pytest.fixture(scope="module")
def samples(train, codec, folder):
    """The same, read again."""
    said = []
    made = train.films.training_set(folder, 2, train.painter.RECIPE, train.codec.TrainingCodec(codec, "tiny"), size=(32, 48), say=said.append)
    assert said[0].startswith("0 films")
    return made


def makers(train, folder, processes: int, place):
    names = [train.films.name(number) for number in train.films.learned(2)]
    return train.sights.Makers(folder, names, train.painter.RECIPE, 0, 0, processes, place)


def encoders(train, codec):
    from lyra_core.training.contracts import Encoders

    return Encoders(train.codec.TrainingCodec(codec, "tiny"), lambda picture: torch.zeros(1, 1), train.release.padded)


@pytest.fixture(scope="module")
def examples(train, network, codec, folder, samples):
    """Three of them, of which the network spoilt at least one itself."""
    with makers(train, folder, 0, folder / "sights") as making:
        jobs = [making.take() for _ in range(8)]
    chosen = sorted(jobs, key=lambda job: job.kind)[-3:]
    assert {job.kind for job in chosen} == {"plain", "spoilt"}
    return chosen, train.pool.finished(chosen, samples, train.painter.spoken(network), encoders(train, codec), train.painter.RECIPE, 0)


def test_films_encoded_together_have_the_latents_of_each_alone(train, codec, samples):
    from dataclasses import replace

    from lyra_core.training.examples import prepared

    coder = train.codec.TrainingCodec(codec, "tiny")
    alone = prepared(replace(samples[1], latents=None), coder, train.painter.RECIPE).latents
    assert alone.codec == samples[1].latents.codec and alone.alone.keys() == samples[1].latents.alone.keys()
    torch.testing.assert_close(samples[1].latents.stream, alone.stream, rtol=0.02, atol=0.05)
    torch.testing.assert_close(samples[1].latents.alone[40], alone.alone[40], rtol=0.02, atol=0.05)


def test_geometry_from_processes_is_that_of_the_training(train, folder, tmp_path):
    """In its order, and, by two processes, as it comes."""
    names = [train.films.name(number) for number in train.films.learned(2)]
    found = []
    for ordered, processes in ((True, 1), (False, 2)):
        place = tmp_path / str(ordered)
        with train.sights.Makers(folder, names, train.painter.RECIPE, 0, 0, processes, place, ordered) as making:
            made = [making.take(), making.take()]
            assert len(making.processes) == processes
        assert not list(place.iterdir())
        found.append([job.number for job in made])
        for theirs in made:
            ours = train.sights.job(making.samples, train.painter.RECIPE, 0, theirs.number)
            assert (ours.number, ours.film, ours.kind) == (theirs.number, theirs.film, theirs.kind)
            for one, other in zip(ours.sights, theirs.sights, strict=True):
                assert (one.window, one.retrieved, one.caption) == (other.window, other.retrieved, other.caption)
                assert torch.equal(one.guides.correspondences.bfloat16(), other.guides.correspondences)
                assert torch.equal(one.warped.bfloat16(), other.warped) and torch.equal(one.remembered, other.remembered)
    assert found[0] == [0, 1] and len(set(found[1])) == 2


@killed.needs_fork
def test_what_a_process_was_writing_when_it_ended_goes_away(train, folder, tmp_path, examples):
    def write():
        train.sights.write(examples[0][0], tmp_path / "00000099.safetensors")

    assert killed.in_the_middle_of_a_file(write)
    assert [file.name for file in tmp_path.iterdir()] == ["00000099.part"]
    with makers(train, folder, 1, tmp_path):
        assert not (tmp_path / "00000099.part").exists()
        assert killed.in_the_middle_of_a_file(write)
    assert not list(tmp_path.iterdir())


def test_examples_made_together_are_those_that_training_makes_one_by_one(train, codec, samples, examples):
    from lyra_core.training.examples import evaluating, example

    coders, plain = encoders(train, codec), evaluating(train.painter.RECIPE)
    window = samples[0].windows(80, 3)[1]
    alone = example(samples[0], window, coders, plain, torch.Generator())
    sight = train.sights.sighted(samples[0], window, plain, torch.Generator())
    job = train.sights.Job(0, 0, "plain", (sight,))
    together = train.pool.finished([job, job], samples, None, coders, plain, 0)[1]
    assert torch.equal(together.target, alone.target) and torch.equal(together.remembered, alone.remembered)
    for name, ours, theirs in zip(alone.condition._fields, together.condition, alone.condition, strict=True):
        torch.testing.assert_close(ours.float(), theirs, rtol=0.02, atol=0.05, msg=lambda text, name=name: f"{name}: {text}")
    jobs, made = examples
    for job, got in zip(jobs, made, strict=True):
        first = 25 + 20 * job.sights[-1].window.segment
        stream = samples[job.film].latents.stream
        assert torch.equal(got.target, stream[:, first : first + 20])
        assert torch.equal(got.condition.history[:, -1], stream[:, first - 1]) is (job.kind != "spoilt")


def test_all_that_is_told_at_once_is_what_the_network_tells_itself(train, network, examples):
    from lyra_core.models.learning import as_model
    from lyra_core.training.contracts import Condition, stack

    shown = stack([Condition(*(part.float() for part in example.condition)) for example in examples[1][:2]])
    noisy, times = torch.randn(2, 16, 20, 4, 6, generator=torch.Generator().manual_seed(5)), torch.tensor([900.0, 300.0])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        theirs = as_model(network)(noisy, times, shown).float()
    with torch.no_grad():
        ours = train.painter.spoken(network)(noisy, times, shown)
    assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_what_is_painted_begins_as_the_warped_frame(train, examples):
    from lyra_core.training.contracts import Condition, stack

    network = train.painter.new(0)
    shown = stack([Condition(*(part.float() for part in example.condition)) for example in examples[1][:2]])
    noisy = torch.randn(2, 16, 20, 4, 6, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        begun = train.painter.spoken(network)(noisy, torch.tensor([900.0, 500.0]), shown)
    towards = 0.9 * noisy - 0.6 * shown.warped
    assert torch.nn.functional.cosine_similarity(begun.flatten(), towards.flatten(), dim=0) > 0.7


def learner(train, steps: int = 8):
    network = train.painter.new(0, {**train.painter.CONFIG, **SMALL})
    return train.painter.Learner(network, train.painter.RECIPE, train.painter.Course(steps, 2))


def test_a_step_repeats_exactly_and_the_mean_of_the_weights_follows_them(train, examples):
    pool = train.pool.Pool(8)
    for example in examples[1]:
        pool.put(example)
    found = []
    for _ in range(2):
        learned = learner(train)
        begun = [weight.detach().clone() for weight in learned.weights]
        losses = [float(learned.step(pool, step, 1e-3)) for step in range(3)]
        found.append((losses, [weight.detach().clone() for weight in learned.weights], learned.averaged()))
    assert found[0][0] == found[1][0] and len(set(found[0][0])) == 3
    assert all(torch.equal(one, other) for one, other in zip(found[0][1], found[1][1], strict=True))
    averaged = list(found[0][2].parameters())
    between = [((mean - old) * (new - mean)).sum() for mean, old, new in zip(averaged, begun, found[0][1], strict=True)]
    assert torch.stack(between).sum() > 0  # the mean lies on the way


def test_a_step_that_cannot_be_recorded_is_made_anyway(train, examples, monkeypatch, capsys):
    pool = train.pool.Pool(8)
    for example in examples[1]:
        pool.put(example)
    one, other = learner(train), learner(train)
    expected = one.step(pool, 0, 1e-3)
    other.recording.recordable = True  # as on CUDA
    tries = []

    def fails(given):
        tries.append(given)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(other.recording, "_record", fails)
    assert [float(other.step(pool, step, 1e-3)) for step in (0, 1)][0] == float(expected)
    assert len(tries) == 1 and "not recorded" in capsys.readouterr().out


def test_a_painter_that_was_stopped_goes_on_from_its_weights_their_mean_and_its_moments(train, examples, tmp_path):
    pool = train.pool.Pool(8)
    for example in examples[1]:
        pool.put(example)
    whole, half = learner(train), learner(train)
    settings = whole.course.settings(whole.recipe)
    for step in range(4):
        whole.step(pool, step, 1e-3)
        if step < 2:
            half.step(pool, step, 1e-3)
    half.keep(tmp_path / "a.safetensors", 2, settings, 0.5)
    again = learner(train)
    assert again.resume(tmp_path / "a.safetensors", settings) == (2, 0.5)
    for step in (2, 3):
        again.step(pool, step, 1e-3)
    again.keep(tmp_path / "a.safetensors", 4, settings, 1.0)
    assert len(list(tmp_path.iterdir())) == 2
    assert [train.painter.reached(tmp_path / name) for name in ("a.safetensors", "b.safetensors")] == [4, 0]
    for one, other in zip((*whole.weights, *whole.average), (*again.weights, *again.average), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="another one"):
        learner(train).resume(tmp_path / "a.safetensors", {**settings, "batch": 3})
    back = train.painter.new(1, {**train.painter.CONFIG, **SMALL})
    train.painter.put_back(tmp_path / "a.safetensors", back)
    assert torch.equal(next(back.parameters()), whole.average[0])


@pytest.mark.parametrize("minutes", [None, 0.02])
def test_steps_or_the_clock_end_a_training(train, codec, folder, samples, tmp_path, minutes):
    network, said, kept = train.painter.new(0, {**train.painter.CONFIG, **SMALL}), [], []
    course = train.painter.Course(3 if minutes is None else 10**6, 1, 16, 1, minutes)
    with makers(train, folder, 0, tmp_path / "sights") as making:
        made = train.painter.train(
            tmp_path / "t.safetensors", network, making, samples, encoders(train, codec), course, say=said.append,
            kept=lambda averaged, step: kept.append(step),
        )  # fmt: skip
    assert kept and (kept == [3] if minutes is None else 1 <= kept[-1] < 1000)
    assert said[0].startswith("1 examples")
    assert "100 %" in said[-1] and not torch.equal(next(made.parameters()), next(network.parameters()))
