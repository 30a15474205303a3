"""Measures cost: `python tools/bench.py [NAME]... [PHOTO or FOLDER]...`, all of UNASKED by default; the names are in MODULES.

Scenes and weights are made up on the spot. Every bar is a ratio or a count that holds on any machine; seconds are only
printed. Exit status 1 if a bar is missed. The benches are in benches/.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import graphs  # noqa: F401  for benches/explorer_page.py: host.boot() takes this folder off the path
import host
import train  # noqa: F401  for benches/ablation.py and lora.py
from benches import Result

MODULES = {
    "geometry": ("warp", "retrieval", "preview", "control", "revisit", "memory"),
    "posing": ("posing", "posing_photos"),
    "model": ("model",),
    "loop": ("loop",),
    "recon": ("recon",),
    "drop": ("drop",),
    "explorer": ("explorer",),
    "gpu": ("gpu",),
    "counts": ("counts",),
    "photos": ("fill", "consistency", "views"),
    "writers": ("writers",),
    "ablation": ("ablation",),
    "lora": ("lora",),
    "fleet": ("fleet",),
}
NAMES = [name for names in MODULES.values() for name in names]
UNASKED = [name for name in NAMES if name != "ablation"]  # that one trains for hours


def bench(name: str) -> Callable[[], Iterator[Result]]:
    module = next(module for module, names in MODULES.items() if name in names)
    return import_module(f"benches.{module}").BENCHES[name]


def main(names: list[str]) -> int:
    missed = 0
    for name in names or UNASKED:
        for result in bench(name)():
            print(result, flush=True)
            missed += not result.met
    print(f"{missed} bars missed" if missed else "every bar met")
    return int(missed > 0)


if __name__ == "__main__":
    host.boot()
    if sys.argv[1:2] == ["--peak"]:  # memory, measured in a process of its own
        import_module("benches.geometry").report_memory(int(sys.argv[2]))
        sys.exit()
    names = [word for word in sys.argv[1:] if word in NAMES]
    photos = [Path(word) for word in sys.argv[1:] if word not in NAMES]
    if unknown := [str(path) for path in photos if not path.exists()]:
        sys.exit(f"no bench and no file {', '.join(unknown)}; choose from {', '.join(NAMES)}")
    import_module("benches.photos").given.extend(photos)
    sys.exit(main(names))
