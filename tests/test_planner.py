"""What a card can do, by the numbers of the one that was measured."""

from __future__ import annotations

import importlib

import pytest

from lyra_core.models import planner
from lyra_core.models.planner import MEASURED, SIZE, Card, card_of, forecast, largest, report, tokens


def test_the_measured_card_gets_what_was_measured():
    found = forecast(MEASURED.card)
    assert tokens(SIZE) == 38_246
    assert found.measured and found.fits and found.offloaded == 0
    assert found.seconds == pytest.approx(18.5, abs=0.1) and found.first - found.seconds == pytest.approx(4.5)
    assert forecast(MEASURED.card, quality="full").seconds == pytest.approx(258, abs=1)


@pytest.mark.parametrize("memory, precision, peak", [(12, "fp8", 11.8), (16, "fp8", 11.8), (24, "bf16", 19.7)])
def test_what_ran_on_a_capped_card_fits_and_is_said_to_offload(memory, precision, peak):
    found = forecast(Card("capped", memory, MEASURED.card.speed), precision=precision)
    assert found.fits and found.needed <= peak and found.offloaded > 0 and not found.measured
    assert "an estimate" in "\n".join(found.lines())


def test_a_slower_card_takes_longer_and_a_smaller_picture_less_than_in_proportion():
    fast, slow = (forecast(Card("some", 141, speed)) for speed in (783, 100))
    assert slow.seconds > 7 * fast.seconds
    small = forecast(MEASURED.card, (240, 416))
    assert small.seconds < fast.seconds / 4 and small.disk == pytest.approx(fast.disk / 4)
    assert forecast(MEASURED.card, chunks=5).disk == pytest.approx(5 * fast.disk)


def test_what_does_not_fit_is_said_with_the_size_that_would():
    card = Card("small", 8, 40)
    fits, text = report(card, SIZE, 3, "distilled", "bf16")
    smaller = largest(card, "bf16")
    assert not fits and "does not fit" in text and f"{smaller[1]}x{smaller[0]} would fit" in text
    assert forecast(card, smaller).fits and not forecast(card, (smaller[0] + 32, smaller[1] + 64)).fits
    assert report(Card("tiny", 1, 40), SIZE, 3, "distilled", "bf16")[1].endswith("use the geometry preview or Wan VACE 1.3B")


def test_the_card_is_the_given_one_or_this_computers_or_the_measured_one():
    mine = Card("mine", 24, 165)
    assert card_of(0, 0, lambda: mine) is mine
    assert card_of(12, 50, lambda: pytest.fail("not asked for")) == Card("a card of 12 GiB and 50 TFLOP/s", 12, 50)
    assert card_of(12, 0, lambda: mine).speed == 165 and card_of(0, 50, lambda: mine).memory == 24
    none = card_of(0, 0, lambda: None)
    assert "no GPU here" in none.name and forecast(none).measured


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"quality": "best"}, "distilled, full"),
        ({"precision": "fp4"}, "bf16, fp8"),
        ({"size": (480, 100)}, "multiples of 16"),
        ({"chunks": 0}, "at least one"),
        ({"card": Card("none", 0, 100)}, "0 GiB"),
    ],
)
def test_what_cannot_be_planned_is_refused(changed, says):
    with pytest.raises(ValueError, match=says):
        forecast(**{"card": MEASURED.card, **changed})


def test_the_node_says_what_the_planner_says(pack):
    node = importlib.import_module(f"{pack.__name__}.planner").Planner
    found = node.execute(832, 480, 2, "distilled", "fp8", 12.0, 50.0)
    card = Card("a card of 12 GiB and 50 TFLOP/s", 12.0, 50.0)
    assert found.args == planner.report(card, SIZE, 2, "distilled", "fp8")


def test_the_command_says_it_too(launcher, monkeypatch, capsys):
    options = launcher.parser().parse_args(["plan", "--size", "832x480", "--memory", "8", "--speed", "40"])
    monkeypatch.setattr(launcher, "tool", lambda name: type("host", (), {"boot": staticmethod(lambda: None)}))
    assert launcher.plan(options) == 1
    assert "would fit" in capsys.readouterr().out
    assert launcher.plan(launcher.parser().parse_args(["plan", "--size", "832"])) == 1
    assert "expected width x height" in capsys.readouterr().err
