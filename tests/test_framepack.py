"""A layout's notation, counts and token positions are those of its definition, slot by slot."""

from __future__ import annotations

import itertools
import random

import pytest

from lyra_core.conditioning.framepack import (
    LYRA2,
    FramePackLayout,
    Segment,
    spatial_frames,
    temporal_latents,
)

PRODUCTION = "f1k1f4s2f1s1f16k4f2k2f1k1_g20"
GRID = (60, 104)  # latents of 480 x 832 pixels


def random_layout(seed: int) -> FramePackLayout:
    dice = random.Random(seed)
    segments = tuple(
        Segment(dice.randint(1, 9), dice.choice(["temporal", "spatial"]), dice.randint(1, 5))
        for _ in range(dice.randint(1, 6))
    )
    return FramePackLayout(segments, dice.randint(1, 30))


def random_size(seed: int) -> tuple[int, int]:
    dice = random.Random(-1 - seed)
    return 2 * dice.randint(1, 9), 2 * dice.randint(1, 9)


def clamped_windows(values: list, window: int) -> list[list]:
    """The values cut into windows, the last value repeated until it fills its window."""
    padded = [*values, *[values[-1]] * (-len(values) % window)]
    return [padded[i : i + window] for i in range(0, len(padded), window)]


def slow_positions(layout: FramePackLayout, size: tuple[int, int], new: int) -> list[list[tuple[float, float, float]]]:
    """Per segment, the mean of the positions (slot, row, column) of every kernel-1 token that a token stands for."""
    result, slot = [], 0
    for slots, kernel, packs_time in [
        *((s.slots, s.kernel, s.source == "temporal") for s in layout.segments),
        (new, 1, False),
    ]:
        axes = (range(slot, slot + slots), range(size[0] // 2), range(size[1] // 2))
        windows = (
            clamped_windows(list(axis), step)
            for axis, step in zip(axes, (kernel if packs_time else 1, kernel, kernel), strict=True)
        )
        tokens = []
        for window in itertools.product(*windows):
            covered = list(itertools.product(*window))
            tokens.append(tuple(sum(place[axis] for place in covered) / len(covered) for axis in range(3)))
        result.append(tokens)
        slot += slots
    return result


def test_the_layout_that_the_weights_know_is_the_reference_s():
    assert FramePackLayout.parse(PRODUCTION) == LYRA2
    assert str(LYRA2) == PRODUCTION
    assert [(s.slots, s.source, s.kernel) for s in LYRA2.segments] == [
        (1, "temporal", 1),
        (4, "spatial", 2),
        (1, "spatial", 1),
        (16, "temporal", 4),
        (2, "temporal", 2),
        (1, "temporal", 1),
    ]
    assert [s.patch for s in LYRA2.segments] == [(1, 2, 2), (1, 4, 4), (1, 2, 2), (4, 8, 8), (2, 4, 4), (1, 2, 2)]


def test_the_layout_that_the_weights_know_has_the_reference_s_counts():
    assert (LYRA2.slots(), LYRA2.slots("temporal"), LYRA2.slots("spatial")) == (25, 20, 5)
    assert (LYRA2.new_latents, LYRA2.new_frames) == (20, 80)
    assert LYRA2.positions("spatial") == [1, 2, 3, 4, 5]
    assert LYRA2.positions("temporal") == [0, *range(6, 25)]
    per_segment = [t * h * w for t, h, w in (s.grid(*GRID) for s in LYRA2.segments)]
    assert per_segment == [1560, 1560, 1560, 416, 390, 1560]
    assert LYRA2.history_tokens(*GRID) == 7046
    every = [len(t) * len(h) * len(w) for t, h, w in LYRA2.token_positions(*GRID, 20)]
    assert every == [*per_segment, 31200] and sum(every) == 38246


@pytest.mark.parametrize("seed", range(20))
def test_parsing_is_the_inverse_of_writing(seed):
    layout = random_layout(seed)
    assert FramePackLayout.parse(str(layout)) == layout
    assert str(FramePackLayout.parse(str(layout))) == str(layout)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "g20",
        "_g20",
        "f1k1",
        "f1k1_g",
        "f1k1_g0",
        "f1k1_g020",
        "f1k1g20",
        "f0k1_g20",
        "f1k0_g20",
        "f1x1_g20",
        "f1k_g20",
        "k1f1_g20",
        "F1K1_G20",
        "f1k1_g20_",
        "f1k1_g20\n",
        " f1k1_g20",
        "f-1k1_g20",
        "f1k1.5_g20",
        "f1k1,f1s1_g20",
        "f1k1_f1s1_g20",
        "f1k1_g2\N{ARABIC-INDIC DIGIT ZERO}",
    ],
)
def test_anything_else_is_refused_with_its_text(text):
    with pytest.raises(ValueError) as refusal:
        FramePackLayout.parse(text)
    assert repr(text) in str(refusal.value) and PRODUCTION in str(refusal.value)


@pytest.mark.parametrize("seed", range(40))
def test_a_token_lies_in_the_middle_of_what_it_covers(seed):
    layout, size, new = random_layout(seed), random_size(seed), 1 + seed % 4
    found = [list(itertools.product(*axes)) for axes in layout.token_positions(*size, new)]
    expected = slow_positions(layout, size, new)
    assert [len(tokens) for tokens in found] == [len(tokens) for tokens in expected]
    for tokens, others in zip(found, expected, strict=True):
        for token, other in zip(tokens, others, strict=True):
            assert token == pytest.approx(other, abs=1e-9)


def test_the_end_counts_again_where_a_window_sticks_out():
    (time, rows, columns), new = FramePackLayout.parse("f6k4_g2").token_positions(60, 2, 2)
    assert time == [1.5, 4.75]  # 0 1 2 3 | 4 5 5 5
    assert rows == [1.5, 5.5, 9.5, 13.5, 17.5, 21.5, 25.5, 28.75]  # the last one is 28 29 29 29
    assert columns == [0.0]  # one column, four times
    assert new == ([6.0, 7.0], [float(row) for row in range(30)], [0.0])


@pytest.mark.parametrize("seed", range(20))
def test_grids_and_positions_tell_the_same_number_of_tokens(seed):
    layout, size = random_layout(seed), random_size(seed)
    *history, new = (tuple(map(len, axes)) for axes in layout.token_positions(*size, 3))
    assert history == [segment.grid(*size) for segment in layout.segments]
    assert new == (3, size[0] // 2, size[1] // 2)
    assert layout.history_tokens(*size) == sum(t * h * w for t, h, w in history)


@pytest.mark.parametrize("seed", range(20))
def test_every_slot_has_one_source(seed):
    layout = random_layout(seed)
    both = [*layout.positions("temporal"), *layout.positions("spatial")]
    assert sorted(both) == list(range(layout.slots()))
    for source in ("temporal", "spatial"):
        assert len(layout.positions(source)) == layout.slots(source)
        assert layout.slots(source) == sum(s.slots for s in layout.segments if s.source == source)
        assert layout.positions(source) == sorted(layout.positions(source))


def test_only_temporal_segments_are_packed_along_time():
    assert Segment(7, "spatial", 3).window == (1, 3, 3) and Segment(7, "spatial", 3).grid(12, 12) == (7, 2, 2)
    assert Segment(7, "temporal", 3).window == (3, 3, 3) and Segment(7, "temporal", 3).grid(12, 12) == (3, 2, 2)


def test_temporal_slots_hold_the_first_latent_and_then_the_latest():
    layout = FramePackLayout.parse("f1k1f2s1f3k2_g2")
    assert temporal_latents(layout, 4) == [0, 1, 2, 3]
    assert temporal_latents(layout, 5) == [0, 2, 3, 4]
    assert temporal_latents(layout, 100) == [0, 97, 98, 99]
    assert temporal_latents(LYRA2, 41) == [0, *range(22, 41)]
    assert temporal_latents(FramePackLayout.parse("f1k1_g2"), 9) == [0]


def test_too_short_a_history_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"20 .* found 19"):
        temporal_latents(LYRA2, 19)
    assert temporal_latents(LYRA2, 20) == list(range(20))


def test_missing_retrievals_are_the_first_frame_on_the_left():
    assert spatial_frames(LYRA2, [30, 7]) == [0, 0, 0, 30, 7]
    assert spatial_frames(LYRA2, (30, 7), first=-2) == [-2, -2, -2, 30, 7]
    assert spatial_frames(LYRA2, []) == [0] * 5
    assert spatial_frames(LYRA2, [5, 4, 3, 2, 1]) == [5, 4, 3, 2, 1]


def test_more_retrievals_than_slots_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"6 .* 5 spatial slots"):
        spatial_frames(LYRA2, list(range(6)))
