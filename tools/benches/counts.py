"""What stands for a GPU's time where there is none: kernels, waits and bytes of a chunk's geometry, on a device that is not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

from host import TOOLS

from . import Result

PIXELS, RELEASED = 48 * 64, 480 * 832  # of the views that are counted, and of Lyra 2's


def bench_counts() -> Iterator[Result]:
    """In a process of its own, because torch learns of a device for good."""
    tests = TOOLS.parent / "tests"
    paths = os.pathsep.join([str(TOOLS.parent), str(tests), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(tests / "devices.py"), "counts"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": paths})
    for name, found in json.loads(done.stdout)["counts"].items():
        views = found["views"]
        yield Result(f"{name}: kernels a view, of {views}", f"{found['kernels'] / views:.0f}")
        yield Result(f"{name}: waits for the device in all", str(found["waits"]))
        moved = found["moved"] * RELEASED / PIXELS / 1e6
        yield Result(f"{name}: bytes between the two, in proportion for 480x832", f"{moved:.0f} MB")


BENCHES = {"counts": bench_counts}
