"""The numbers that the small Lyra 2 is judged by, on films of which the answer is known."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch
from conftest import PROJECT, load_package
from learners import ENCODERS, SMALL, Means, Painter

from lyra_core.metrics.pictures import gradient_similarity

SIZE = (32, 48)


@pytest.fixture(scope="module")
def scoring(train):
    return train.scoring


@pytest.fixture(scope="module")
def film(train):
    """Five chunks of 8 frames that come back."""
    return train.films.film(6, SMALL, chunks=5, size=SIZE, comes_back=True)


def knowing(sample, segment: int):
    """A network that knows what it shall paint."""
    from lyra_core.training.examples import prepared

    stream = prepared(sample, ENCODERS.codec, SMALL).latents.stream
    first = SMALL.still + 2 * segment
    clean = stream[:, first : first + 2]
    return lambda noisy, times, shown: (noisy - clean) / (times / 1000).view(-1, 1, 1, 1, 1), clean


def test_the_parts_of_a_chunk_are_all_of_it_and_coming_back_is_remembered(scoring, film):
    windows = film.windows(SMALL.chunk, 13)
    first, last = (scoring.parts(film, window, SMALL) for window in (windows[0], windows[-1]))
    for parts in (first, last):
        assert torch.equal(parts.seen.int() + parts.remembered.int() + parts.new.int(), torch.ones(8, *SIZE, dtype=torch.int))
    assert not first.remembered.any() and first.new.any()
    assert last.remembered.float().mean() > 0.1


def test_a_network_that_knows_is_told_apart_from_one_that_does_not(scoring, film):
    window = film.windows(SMALL.chunk, 13)[3]
    model, clean = knowing(film, 3)
    made, true = scoring.painted(model, ENCODERS, film, window, SMALL, seed=0), scoring.truth(film, window)
    torch.testing.assert_close(made, ENCODERS.codec.decode(clean, clean).clamp(-1, 1) * 0.5 + 0.5, rtol=0, atol=1e-4)
    everywhere = torch.ones(8, *SIZE, dtype=torch.bool)
    good, bad = (scoring.alike(picture, true, everywhere) for picture in (made, torch.rand_like(made)))
    assert good["PSNR"] > bad["PSNR"] + 6 and good["SSIM"] > bad["SSIM"] and good["GMSD"] < bad["GMSD"]
    assert scoring.alike(made, true, ~everywhere) == {}


def test_without_memory_nothing_but_the_photo_fills_the_slots(scoring, film):
    window, painter = film.windows(SMALL.chunk, 13)[-1], Painter()
    for shown in (film, scoring.forgetful(film, window)):
        scoring.painted(painter, ENCODERS, shown, window, SMALL, seed=0, steps=1)
    remembering, forgetting = (call[2] for call in painter.calls)
    slots = SMALL.layout.positions("spatial")
    alone = ENCODERS.codec.encode(film.picture(0)[None])[:, 0]
    assert all(torch.equal(forgetting.history[0][:, slot], alone) for slot in slots)
    assert not all(torch.equal(remembering.history[0][:, slot], alone) for slot in slots)
    assert torch.equal(remembering.warped, forgetting.warped)


def test_a_walk_goes_on_from_what_was_painted(scoring, film):
    painter = Painter()
    short = replace(film, frames=film.frames[:25], cameras=film.cameras[:25], depths={f: d for f, d in film.depths.items() if f < 25})
    codec, encoded = Means(), []
    encode = codec.encode
    codec.encode = lambda frames, before=None: encoded.append(len(frames)) or encode(frames, before)
    made = scoring.walked(painter, replace(ENCODERS, codec=codec), short, SMALL, seed=0, steps=1)
    assert made.shape == (24, *SIZE, 3) and torch.isfinite(made).all()
    assert sorted(encoded)[-4:] == [9, 9, 9, 25]  # what was painted is encoded once: then the still frames are most
    second = painter.calls[1][2]
    seen = ENCODERS.codec.encode(made[:8] * 2 - 1, made[:1])
    torch.testing.assert_close(second.history[0][:, -1], seen[:, -1], rtol=0, atol=1e-4)


def test_the_preview_of_a_scene_keeps_what_the_photo_shows(scoring, film):
    window = film.windows(SMALL.chunk, 1)[0]
    seen = scoring.parts(film, window, SMALL).seen
    made = scoring.previewed(film, window)
    true, photo = scoring.truth(film, window), film.picture(0).expand_as(made) * 0.5 + 0.5
    assert scoring.alike(made, true, seen)["PSNR"] > max(25, 6 + scoring.alike(photo, true, seen)["PSNR"])


def test_a_camera_is_found_again_by_what_its_picture_shows(train, scoring):
    scene = train.scenes.scene(8)
    camera = train.scenes.walk(scene, 3, 5, (48, 64), comes_back=False)[2]
    motion = torch.tensor([[0.01, -0.02, 0.005, 0.05, 0.03, -0.06]])
    picture = train.scenes.render([scene], [scoring._moved(camera, motion)])[0][0, 0]
    degrees, units = scoring.camera_error(picture, scene, camera)
    assert degrees == pytest.approx(float(torch.rad2deg(motion[0, :3].norm())), abs=0.15)
    assert units == pytest.approx(float(motion[0, 3:].norm()), abs=0.015)
    assert max(scoring.camera_error(train.scenes.render([scene], [camera])[0][0, 0], scene, camera)) < 0.01


def test_drift_is_what_grows_from_chunk_to_chunk(scoring):
    true = torch.rand(24, *SIZE, 3, generator=torch.Generator().manual_seed(0))
    darker = true * torch.linspace(1, 0.5, 24).view(-1, 1, 1, 1)
    found = scoring.drift(darker, true, 8)
    assert scoring.slope(found["colour"]) > 0.05 and scoring.slope(found["sharpness"]) < -0.05
    assert scoring.slope([1.0, 3.0, 5.0, 7.0]) == pytest.approx(2.0)
    assert max(map(abs, scoring.drift(true, true, 8)["sharpness"])) < 1e-6


def test_edges_of_equal_pictures_are_alike_and_blurred_ones_less():
    picture = torch.rand(2, 24, 24, 3, generator=torch.Generator().manual_seed(1))
    blurred = (picture + picture.roll(1, 1) + picture.roll(1, 2)) / 3
    assert torch.allclose(gradient_similarity(picture, picture), torch.ones(2, 24, 24))
    assert gradient_similarity(picture, blurred).mean() < 0.95
    flat = torch.full((8, 8, 3), 0.5)
    step = flat.clone()
    step[:, 4:] = 0.8  # Prewitt's kernel over three: 0.3 across, at the two columns beside the edge
    expected = 0.0026 / (0.3**2 + 0.0026)
    torch.testing.assert_close(gradient_similarity(flat, step)[:, 3:5], torch.full((8, 2), expected))


def test_the_table_says_which_way_each_number_points(scoring):
    load_package("lyra_benches", PROJECT / "tools" / "benches")
    ablation = importlib.import_module("lyra_benches.ablation")
    full = {"remembered: PSNR": [20.0, 22.0], "camera, degrees": [1.0, 1.0], "new: PSNR": [20.0]}
    lacking = {"remembered: PSNR": [19.0, 20.0], "camera, degrees": [0.5, 0.7], "new: PSNR": [19.0]}
    lines = [str(row) for row in ablation.rows("no FramePack", lacking, full, scoring)]
    assert "80.61" in lines[0] and "19.500 ± 0.500  as the paper" in lines[1] and "the other way" in lines[2]
    assert "within" not in lines[1] + lines[2] and "19.000, of one  as the paper, within the errors" in lines[3]
    picture = ablation.draw({name: {"colour": [[0.1, 0.2]], "sharpness": [[0.0, -0.3]]} for name in ablation.CHANGES}, "toy")
    assert picture.getcolors(1 << 20) and len(picture.getcolors(1 << 20)) > 8
