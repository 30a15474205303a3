"""Nothing reaches a node that its schema does not allow: every input of every node, found by looking at the schemas."""

from __future__ import annotations

import asyncio
import math
import re
import time
from fractions import Fraction

import numpy as np
import pytest
import torch

NAN, INF = float("nan"), float("inf")
NO_NUMBERS = (None, True, False, "7", b"7", [5], {}, object(), torch.tensor(5), 1j)
HUGE = (10**8, 10**9, 10**30, -1, -(10**9), -(10**30), 0, 1e300)


@pytest.fixture(scope="module")
def nodes(pack) -> list:
    return asyncio.run(pack.LyraExtension().get_node_list())


@pytest.fixture(scope="module")
def io(pack):
    return pack.node.io


def flat(io, inputs: list, around: tuple = ()):
    """Every input with the choices that bring it along: (chosen, input)."""
    for known in inputs:
        yield around, known
        if isinstance(known, io.DynamicCombo.Input):
            for option in known.options:
                yield from flat(io, option.inputs, (*around, (known.id, option.key)))


def given(around: tuple, name: str, value) -> dict:
    """What `execute` is given if one input, within its choices, is this."""
    for combo, key in reversed(around):
        name, value = combo, {combo: key, name: value}
    return {name: value}


def numbers(io, nodes, *kinds):
    for node in nodes:
        for around, known in flat(io, node.define_schema().inputs):
            if isinstance(known, kinds):
                yield node, around, known


def wrong(io, known) -> list:
    values = [*NO_NUMBERS, NAN, INF, -INF]
    values += [known.min - 1, known.max + 1, *(v for v in HUGE if not known.min <= v <= known.max)]
    return [*values, 2.5, Fraction(5, 2)] if isinstance(known, io.Int.Input) else values


def refusal(node, around, known, value) -> str:
    """What is said when a node is given such a value."""
    is_list = node.define_schema().is_input_list
    with pytest.raises(ValueError) as refused:
        node.execute(**given(around, known.id, [value] if is_list else value))
        pytest.fail(f"{node.__name__} took {value!r} for {known.id}")
    return str(refused.value)


def test_every_number_of_every_node_has_bounds(io, nodes):
    found = list(numbers(io, nodes, io.Int.Input, io.Float.Input))
    assert len(found) > 120
    for node, _, known in found:
        assert known.min is not None and known.max is not None, f"{node.__name__}.{known.id}"
        assert math.isfinite(known.min) and math.isfinite(known.max) and known.min < known.max


def test_no_number_of_any_node_takes_what_its_schema_does_not_allow(io, nodes):
    tried = 0
    for node, around, known in numbers(io, nodes, io.Int.Input, io.Float.Input):
        name = re.escape(".".join([*(combo for combo, _ in around), known.id]))
        for value in wrong(io, known):
            if value is None and known.optional:
                continue
            said = refusal(node, around, known, value)
            pattern = rf"^{re.escape(node.define_schema().display_name)}: input '{name}' is .+; allowed: a (whole|finite) number from"
            assert re.match(pattern, said) and len(said) < 400, said
            tried += 1
    assert tried > 2000


def test_texts_switches_and_choices_are_checked_too(io, nodes):
    for node, around, known in numbers(io, nodes, io.String.Input, io.Boolean.Input, io.Combo.Input, io.DynamicCombo.Input):
        values = {
            io.String.Input: (7, None, ["a"], b"a"),
            io.Boolean.Input: (1, "true", None, NAN, torch.tensor(True)),
            io.DynamicCombo.Input: ({}, "none of these", {known.id: "none of these"}, 3, [1]),
        }.get(type(known), ("none of these", 99, True, None, NAN, ["a"], torch.ones(3)))
        for value in values:
            if value is None and known.optional:
                continue
            said = refusal(node, around, known, value)
            assert said.startswith(f"{node.define_schema().display_name}: input '") and "; allowed: " in said, said
            assert known.id in said and len(said) < 700


def test_the_ends_and_the_default_of_every_range_are_taken_as_plain_numbers(io, nodes, pack):
    for node, _, known in numbers(io, nodes, io.Int.Input, io.Float.Input):
        plain = int if isinstance(known, io.Int.Input) else float
        for value in (known.min, known.max, known.default):
            found = pack.node.admit(known, value)
            assert found == value and type(found) is plain, f"{node.__name__}.{known.id}"
    number = io.Int.Input("n", min=0, max=9)
    assert [type(pack.node.admit(number, v)) for v in (np.int64(3), np.uint8(3))] == [int, int]
    assert type(pack.node.admit(io.Float.Input("x", min=0, max=9), np.float32(0.5))) is float


def test_the_copies_that_the_host_runs_are_checked_as_well(nodes):
    from comfy_api.internal import make_locked_method_func

    for node in nodes:
        copy = node.PREPARE_CLASS_CLONE(None)
        run = make_locked_method_func(node, node.FUNCTION, copy)
        for known in node.define_schema().inputs:
            if known.get_io_type() == "INT":
                with pytest.raises(ValueError, match=f"input '{known.id}' is nan"):
                    run(**{known.id: [NAN] if node.define_schema().is_input_list else NAN})


def test_links_that_a_node_passes_on_are_left_as_they_are(pack, io, nodes):
    for node, around, known in numbers(io, nodes, io.Int.Input):
        if getattr(known, "rawLink", False):
            schema = node.define_schema()
            assert pack.node._admitted(known, ["12", 0], schema, known.id) == ["12", 0] and not around
            break
    else:
        pytest.fail("no node passes on a number any more: this test and `raw_link` in nodes/node.py can go")


def test_checking_costs_next_to_nothing(nodes):
    start = time.perf_counter()
    for node in nodes:
        node.define_schema()
    assert time.perf_counter() - start < 2
