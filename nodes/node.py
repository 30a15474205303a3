"""What every node of this pack is: nothing reaches its `execute` that its own schema does not allow."""

from __future__ import annotations

import functools
import inspect
import reprlib
from collections.abc import Callable
from numbers import Integral, Real

from comfy_api.latest import io
from comfy_execution.graph_utils import is_link

SHOWN = 80  # letters of a wrong value that its error repeats


class Node(io.ComfyNode):
    """A node whose inputs are checked when it runs, wherever they come from.

    The host compares widgets with the schema before a run, and lets through whatever comes by a link or from a node that
    expanded. So `execute` is preceded by `admit` on each of its inputs; a subclass lists its bounds in its schema alone.
    """

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        own = vars(cls).get("execute")
        if own is not None and not hasattr(own.__func__, "__wrapped__"):  # the host makes copies of a class that is checked already
            cls.execute = classmethod(_checking(own.__func__))


def _checking(execute: Callable) -> Callable:
    names = list(inspect.signature(execute).parameters)[1:]

    @functools.wraps(execute)
    def checked(cls, *values, **inputs):
        inputs = dict(zip(names, values, strict=False)) | inputs
        schema = cls.define_schema()
        for known in schema.inputs:
            if known.id in inputs:
                inputs[known.id] = _admitted(known, inputs[known.id], schema, known.id)
        return execute(cls, **inputs)

    return checked


def _admitted(known: io.Input, value, schema: io.Schema, name: str):
    if (value is None and known.optional) or (getattr(known, "rawLink", False) and is_link(value)):
        return value
    try:
        if schema.is_input_list:
            return [admit(known, each) for each in value]
        return admit(known, value)
    except Refused as refused:
        place = ".".join([name, *refused.inner])
        raise ValueError(f"{schema.display_name}: input '{place}' is {refused.found}; allowed: {refused.allowed}") from None


class Refused(Exception):
    """A value that an input does not allow."""

    def __init__(self, value, allowed: str):
        super().__init__(allowed)
        self.found, self.allowed, self.inner = _shown(value), allowed, ()


def _shown(value) -> str:
    """A value in one short line, whatever it is."""
    if isinstance(value, int) and value.bit_length() > 3 * SHOWN:
        return f"a number of {value.bit_length()} bits"  # Python itself refuses to write very long ones
    some = reprlib.Repr()
    some.maxstring = some.maxother = SHOWN
    text = str(value) if isinstance(value, Real) else some.repr(value)
    return " ".join(text.encode("utf-8", "backslashreplace").decode().split())


def admit(known: io.Input, value):
    """The value as plain Python has it: whole and finite numbers in range, texts, switches, choices; Refused for others.

    Inputs of other types are none of this one's business.
    """
    if isinstance(known, io.DynamicCombo.Input):
        return _choice_of_inputs(known, value)
    kind = known.get_io_type()
    if kind == io.Int.io_type:
        return _number(known, value, Integral, int, "a whole number")
    if kind == io.Float.io_type:
        return _number(known, value, Real, float, "a finite number")
    if kind == io.Boolean.io_type and not isinstance(value, bool):
        raise Refused(value, "true or false")
    if kind in (io.String.io_type, io.Color.io_type) and not isinstance(value, str):
        raise Refused(value, "a text")
    if kind == io.Combo.io_type:
        return _choice(value, known.options)
    return value


def _number(known: io.Int.Input | io.Float.Input, value, kind: type, plain: type, called: str) -> int | float:
    fits = isinstance(value, kind) and not isinstance(value, bool)
    if not fits or not known.min <= value <= known.max:  # which is false for NaN
        raise Refused(value, f"{called} from {known.min:_} to {known.max:_}".replace("_", ","))
    return plain(value)


def _choice(value, options: list):
    if type(value) not in (str, int) or value not in options:
        few = ", ".join(map(str, options[:20])) + (f" and {len(options) - 20} more" if len(options) > 20 else "")
        raise Refused(value, f"one of {few}" if options else "nothing, there is none to choose from")
    return value


def _choice_of_inputs(known: io.DynamicCombo.Input, value) -> dict:
    """The choice and the inputs that it brings along, each of them admitted."""
    if not isinstance(value, dict):
        raise Refused(value, "a choice with its inputs")
    options = {option.key: option.inputs for option in known.options}
    found = {**value, known.id: _choice(value.get(known.id), list(options))}
    for inner in options[found[known.id]]:
        if inner.id not in value or (value[inner.id] is None and inner.optional):
            continue
        try:
            found[inner.id] = admit(inner, value[inner.id])
        except Refused as refused:
            refused.inner = (inner.id, *refused.inner)
            raise
    return found
