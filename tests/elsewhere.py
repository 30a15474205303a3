"""A device that is not there: its tensors say that they lie elsewhere, and compute on the processor.

Whatever would go wrong on a GPU for a tensor left behind goes wrong here, with real numbers: an operation on tensors of
both devices, an index or a mask from the wrong one, `.numpy()` without `.cpu()`. And because the numbers are real, what
comes out can be compared with the processor's.
"""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from functools import cache

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

ELSEWHERE = torch.device("privateuseone:0")  # the name that torch keeps for devices that it doesn't know
TWO_DEVICES = ("_to_copy", "copy_")
INDEXED = ("index", "index_put_", "index_put", "_index_put_impl_")  # a GPU's tensor may be indexed by the processor's
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "bincount", "repeat_interleave")


class Elsewhere(torch.Tensor):
    """A tensor that lies on `ELSEWHERE`."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=ELSEWHERE,
        )
        made.inner = inner
        return made

    def __repr__(self):
        return f"Elsewhere({self.inner})"

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _compute(function, args, kwargs or {})


def _leaves(found) -> list:
    """What lies in the tuples, lists and mappings that torch hands to an operation; its own pytree takes ten times as long."""
    if isinstance(found, dict):
        found = found.values()
    elif not isinstance(found, (tuple, list)):
        return [found]
    return [leaf for part in found for leaf in _leaves(part)]


def _changed(change, found):
    """`found` with its leaves changed."""
    if isinstance(found, dict):
        return {key: _changed(change, part) for key, part in found.items()}
    return type(found)(_changed(change, part) for part in found) if isinstance(found, (tuple, list)) else change(found)


@cache
def _is_kernel(function) -> bool:
    """Whether an operation is no view."""
    return not any(part.alias_info and not part.alias_info.is_write for part in function._schema.returns)


def _inner(found):
    return found.inner if isinstance(found, Elsewhere) else found


def _here(found) -> bool:
    """A tensor of the processor's that no operation of another device takes."""
    return isinstance(found, torch.Tensor) and not isinstance(found, Elsewhere) and found.ndim > 0


def _compute(function, args, kwargs):
    given = _leaves((args, kwargs))
    there = any(isinstance(leaf, Elsewhere) for leaf in given)
    target = kwargs.get("device")
    asked = target is not None and torch.device(target).type == ELSEWHERE.type
    if asked:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    name = function.overloadpacket.__name__
    checked = (args[0], *args[2:]) if name in INDEXED and isinstance(args[0], Elsewhere) else (args, kwargs)
    left = [tuple(leaf.shape) for leaf in _leaves(checked) if _here(leaf)]
    if there and left and name not in TWO_DEVICES:
        raise RuntimeError(f"{function} got tensors of two devices: {left} on the processor")
    made = function(*_changed(_inner, args), **_changed(_inner, kwargs))
    if name == "copy_":
        return args[0]
    if not (asked or (there and target is None)):
        return made
    # an operation in place gives its own tensor back
    own = {id(_inner(leaf)): leaf for leaf in given if isinstance(leaf, Elsewhere)}
    return _changed(lambda t: own.get(id(t), Elsewhere(t)) if isinstance(t, torch.Tensor) else t, made)


class _Factories(TorchDispatchMode):
    """Tensors that are made on `ELSEWHERE` are; counts what it costs on a GPU besides its arithmetic."""

    def __init__(self):
        super().__init__()
        self.waits = 0  # of the processor for the device
        self.kernels = 0  # operations that are no views
        self.moved = 0  # bytes between the two

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [leaf for leaf in _leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(isinstance(leaf, Elsewhere) for leaf in given):
            name = function.overloadpacket.__name__
            masked = name in INDEXED and any(t.dtype is torch.bool for t in _leaves(args[1]) if isinstance(t, torch.Tensor))
            to_processor = name == "_to_copy" and torch.device(kwargs.get("device") or ELSEWHERE).type == "cpu"
            to_processor |= name == "copy_" and not isinstance(args[0], Elsewhere)
            self.waits += name in WAITS or masked or to_processor
            self.kernels += _is_kernel(function)
        made = _compute(function, args, kwargs or {})
        if function.overloadpacket.__name__ in TWO_DEVICES and isinstance(given[-1], Elsewhere) != isinstance(made, Elsewhere):
            self.moved += given[-1].nbytes
        return made


@cache
def _register() -> None:
    """For the rest of the process, so nothing else should run in it."""
    backend_registration._setup_privateuseone_for_python_backend()


@contextmanager
def elsewhere():
    """Where tensors can be made and moved there, and what a GPU has to wait for is counted."""
    _register()
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(.., device) is seen to move
    try:
        with _Factories() as mode:
            yield mode
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


def there(found, move=Elsewhere):
    """`found` with its tensors moved, in tuples, lists, mappings and frozen dataclasses."""
    if isinstance(found, torch.Tensor):
        return move(found)
    if dataclasses.is_dataclass(found):
        return dataclasses.replace(
            found, **{f.name: there(getattr(found, f.name), move) for f in dataclasses.fields(found) if f.init}
        )
    if isinstance(found, tuple) and hasattr(found, "_fields"):
        return type(found)(*(there(part, move) for part in found))
    if isinstance(found, (tuple, list)):
        return type(found)(there(part, move) for part in found)
    return {key: there(value, move) for key, value in found.items()} if isinstance(found, dict) else found


def tensors(found) -> list[torch.Tensor]:
    """All tensors of a result, in order."""
    if isinstance(found, torch.Tensor):
        return [found]
    if dataclasses.is_dataclass(found):
        return [t for f in dataclasses.fields(found) for t in tensors(getattr(found, f.name))]
    if isinstance(found, dict):
        return [t for value in found.values() for t in tensors(value)]
    return [t for value in found for t in tensors(value)] if isinstance(found, (tuple, list)) else []
