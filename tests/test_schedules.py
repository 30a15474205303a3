"""The noise levels fall to 0 along the shifted line, at the values that the weights were trained and distilled for."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from lyra_core.conditioning import schedules

HIGHEST = 1 - 1 / 1000


def moved(share: float, shift: float) -> float:
    return shift * share / (1 + (shift - 1) * share)


@pytest.mark.parametrize("steps", [1, 2, 4, 35, 50])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 5.0])
def test_every_step_lies_on_the_shifted_line(steps, shift):
    expected = [moved(HIGHEST * (steps - i) / steps, shift) for i in range(steps)]
    found = schedules.full(steps, shift)
    assert found.dtype == torch.float32 and found.shape == (steps + 1,)
    assert_close(found, torch.tensor([*expected, 0.0]), atol=1e-7, rtol=0)


@pytest.mark.parametrize("sigmas", [schedules.full(35), schedules.full(1), schedules.full(7, 0.3), schedules.dmd()])
def test_noise_only_ever_falls_and_ends_at_none(sigmas):
    assert (sigmas.diff() < 0).all()
    assert sigmas[-1] == 0 and sigmas[0] <= 1


def test_the_full_schedule_tells_the_network_the_reference_s_integers():
    thirty_five = schedules.timesteps(schedules.full(35))
    assert not thirty_five.is_floating_point()
    assert thirty_five[:5].tolist() == [999, 993, 987, 981, 974]
    assert thirty_five[-2:].tolist() == [128, 0]
    assert torch.equal(thirty_five, schedules.timesteps(schedules.full(35, 5.0)))  # 5 is what one gets unasked
    assert schedules.timesteps(schedules.full(50))[0] == 999


def test_timesteps_are_cut_not_rounded():
    assert schedules.timesteps(torch.tensor([1.0, 0.9999, 0.0005, 0.0])).tolist() == [1000, 999, 0, 0]


def test_the_distilled_model_works_at_four_levels():
    sigmas = schedules.dmd()
    assert sigmas.dtype == torch.float32
    assert_close(sigmas, torch.tensor([1, 0.9375, 0.8333333, 0.625, 0]), atol=1e-6, rtol=0)
    assert schedules.timesteps(sigmas)[:2].tolist() == [1000, 937]


def test_the_distilled_model_s_levels_are_four_of_a_thousand():
    table = schedules.dmd_table()
    assert table.dtype == torch.float32 and table.shape == (1000,)
    expected = torch.tensor([moved(1 - i / 1000, 5) for i in range(1000)])
    assert_close(table, expected, atol=1e-6, rtol=0)
    assert torch.equal(table[::250], schedules.dmd()[:-1])


@pytest.mark.parametrize(("steps", "shift"), [(0, 5.0), (-3, 5.0), (4, 0.0), (4, -1.0)])
def test_no_steps_and_no_shift_are_refused_with_what_was_found(steps, shift):
    with pytest.raises(ValueError, match=rf"{steps} and {shift}"):
        schedules.full(steps, shift)
