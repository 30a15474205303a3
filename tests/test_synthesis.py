from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lyra_core.memory.synthesis import synthesised
from lyra_core.metrics.textures import gradient_distance, patch_distance

SIZE = (72, 112)


def striped(period: float = 9.0) -> torch.Tensor:
    """Slanted stripes with a grain (H, W, 3)."""
    v, u = torch.meshgrid(*(torch.arange(side, dtype=torch.float32) for side in SIZE), indexing="ij")
    grain = torch.rand(*SIZE, generator=torch.Generator().manual_seed(2)) * 0.1
    wave = 0.5 + 0.35 * torch.sin((u + 0.5 * v) * 2 * torch.pi / period)
    return torch.stack([wave + grain, 0.8 * wave + 0.1, 0.3 + 0.3 * wave], -1).clamp(0, 1)


@pytest.fixture(scope="module")
def hidden():
    """The stripes, where they are hidden, and them there as nothing but their mean."""
    picture, hole = striped(), torch.zeros(SIZE, dtype=torch.bool)
    hole[:, 80:] = True
    begun = picture.clone()
    begun[hole] = picture[~hole].mean(0)
    return picture, hole, begun


@pytest.fixture(scope="module")
def filled(hidden):
    _, hole, begun = hidden
    return synthesised(begun, hole, ~hole, seed=1)


def test_stripes_go_on_as_stripes(hidden, filled):
    picture, hole, begun = hidden
    assert torch.equal(filled[~hole], picture[~hole]), "what is known stays as it is"
    assert gradient_distance(filled, picture, hole) < 0.3 * gradient_distance(begun, picture, hole)
    assert patch_distance(filled, picture, hole) < 0.3 * patch_distance(begun, picture, hole)
    profile = filled[36, 80:, 1] - filled[36, 80:, 1].mean()
    strength = torch.fft.rfft(F.pad(profile, (0, 40))).abs()
    assert int(strength[3:].argmax()) + 3 == pytest.approx(72 / 9, abs=1), "of the same period"


def test_the_same_seed_gives_the_same_pixels_and_another_one_others(hidden, filled):
    _, hole, begun = hidden
    assert torch.equal(synthesised(begun, hole, ~hole, seed=1), filled)


def test_only_examples_are_copied(hidden):
    _, hole, begun = hidden
    coloured = begun.clone()
    coloured[:, :40] = torch.rand(SIZE[0], 40, 3) * torch.tensor([0.0, 0.0, 1.0])  # a blue half that is no example
    example = ~hole
    example[:, :40] = False
    made = synthesised(coloured, hole, example, seed=1)
    assert float(made[hole][:, 0].mean()) > 0.3


def test_without_any_example_nothing_is_changed(hidden):
    _, hole, begun = hidden
    assert torch.equal(synthesised(begun, hole, torch.zeros_like(hole)), begun)
    assert torch.equal(synthesised(begun, torch.zeros_like(hole), ~hole), begun)


def test_what_is_begun_keeps_its_large_forms_and_gets_details(hidden):
    picture, hole, begun = hidden
    blurred = F.avg_pool2d(picture.permute(2, 0, 1)[None], 5, 1, 2)[0].permute(1, 2, 0)
    guess = torch.where(hole[..., None], blurred, picture)
    made = synthesised(guess, hole, ~hole, seed=1, begun=hole)
    assert float((made - picture)[hole].abs().mean()) < 0.12
    assert gradient_distance(made, picture, hole) < gradient_distance(guess, picture, hole)


def test_what_nothing_in_the_picture_is_like_stays_as_it_was_begun(hidden):
    picture, hole, _ = hidden
    guess = picture.clone()
    guess[hole] = torch.tensor([0.0, 1.0, 0.0])  # no green anywhere
    made = synthesised(guess, hole, ~hole, seed=1, begun=hole)
    assert float((made - guess)[:, 88:].abs().max()) < 0.05


def test_of_what_is_alike_in_colour_the_same_kind_is_taken():
    """Half known coarse stripes, half known fine ones, and the hole said to be of the one or the other kind."""
    fine, coarse = striped(5.0), striped(14.0)
    picture = torch.cat([fine[:, :40], coarse[:, :40], torch.full((SIZE[0], 32, 3), 0.5)], 1)
    hole = torch.zeros(SIZE, dtype=torch.bool)
    hole[:, 80:] = True
    detail = []
    for like in (1, 2):
        kind = torch.cat([torch.full((SIZE[0], width), number) for width, number in ((40, 1), (40, 2), (32, like))], 1)
        made = synthesised(picture, hole, ~hole, seed=1, kind=kind)
        detail.append(float(made[:, 84:-4, 0].diff(dim=1).abs().mean()))
    assert detail[0] > 1.3 * detail[1]


@pytest.mark.parametrize("distance", [gradient_distance, patch_distance])
def test_a_blur_is_farther_from_a_texture_than_the_same_texture_moved_aside(distance):
    picture = striped()
    everywhere = torch.ones(SIZE, dtype=torch.bool)
    blurred = F.avg_pool2d(picture.permute(2, 0, 1)[None], 9, 1, 4, count_include_pad=False)[0].permute(1, 2, 0)
    assert distance(picture, picture, everywhere) == 0
    assert distance(picture.roll(4, 1), picture, everywhere) < 0.3 * distance(blurred, picture, everywhere)
    with pytest.raises(ValueError, match="too little"):
        distance(picture, picture, ~everywhere)


@pytest.mark.parametrize("colours", [1, 2])
def test_plain_colours_go_on_plain(colours):
    picture, hole = torch.full((*SIZE, 3), 0.4), torch.zeros(SIZE, dtype=torch.bool)
    picture[40:] = 0.4 if colours == 1 else 0.7
    hole[:, 80:] = True
    made = synthesised(picture, hole, ~hole, seed=1)
    assert torch.isfinite(made).all() and float((made - picture).abs().mean()) < 0.01
