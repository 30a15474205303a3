"""The fastest of several ways to compute the same on a device: measured once, on the very tensors for which it is first asked.

A card that is full of weights has no room for others, and what is fast on one card is slow or missing on the next.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from math import inf

import torch

TRIES = 2  # of each way, after one to warm up

log = logging.getLogger(__name__)
_fastest: dict[Hashable, Callable] = {}  # what is computed, where and of which size -> the way that was fastest there


def fastest(kind: Hashable, ways: Sequence[Callable], *arguments) -> Callable:
    """The one of `ways` that takes the shortest time for the arguments on the current CUDA device; the first must work."""
    if kind not in _fastest:
        times = {ways[0]: milliseconds(lambda: ways[0](*arguments))}
        for way in ways[1:]:
            try:
                times[way] = milliseconds(lambda way=way: way(*arguments))
            except RuntimeError as reason:  # no kernel for this card, this torch or this width, or no memory for it
                log.info("no %s for %s: %s", way.__name__, kind, reason)
                times[way] = inf
        log.info("%s: %s", kind, ", ".join(f"{took:.2f} ms {way.__name__}" for way, took in times.items()))
        _fastest[kind] = min(times, key=times.get)
    return _fastest[kind]


def milliseconds(run: Callable[[], object]) -> float:
    """The fastest of some tries on the current CUDA device."""
    run()
    times = []
    for _ in range(TRIES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return min(times)
