"""Measures cost: `python tools/bench.py [NAME]...`, all by default; the names are in MODULES.

Scenes and weights are made up on the spot. Every bar is a ratio or a count that holds on any machine; seconds are only
printed. Exit status 1 if a bar is missed. The benches are in benches/.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import import_module

import host
from benches import Result

MODULES = {
    "geometry": ("warp", "retrieval", "preview", "control", "revisit", "memory"),
    "model": ("model",),
    "loop": ("loop",),
    "recon": ("recon",),
    "explorer": ("explorer",),
}
NAMES = [name for names in MODULES.values() for name in names]


def bench(name: str) -> Callable[[], Iterator[Result]]:
    module = next(module for module, names in MODULES.items() if name in names)
    return import_module(f"benches.{module}").BENCHES[name]


def main(names: list[str]) -> int:
    missed = 0
    for name in names or NAMES:
        for result in bench(name)():
            print(result, flush=True)
            missed += not result.met
    print(f"{missed} bars missed" if missed else "every bar met")
    return int(missed > 0)


if __name__ == "__main__":
    host.boot()
    if sys.argv[1:2] == ["--peak"]:  # memory, measured in a process of its own
        import_module("benches.geometry").report_memory(int(sys.argv[2]))
    elif unknown := set(sys.argv[1:]) - set(NAMES):
        sys.exit(f"no bench {', '.join(sorted(unknown))}; choose from {', '.join(NAMES)}")
    else:
        sys.exit(main(sys.argv[1:]))
