"""Two servers that grow one world for a minute: what they write, and whether anything of it is lost."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from host import TOOLS, load

from lyra_core.world import world_files

from . import Result

SECONDS, FOLDER = 60.0, "worlds/both"


def writers_module():
    file = TOOLS.parent / "tests" / "writers.py"
    spec = importlib.util.spec_from_file_location("lyra_writers", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["lyra_writers"] = module
    spec.loader.exec_module(module)
    return module


def bench_writers() -> Iterator[Result]:
    writers, launcher = writers_module(), load("lyra_comfy", TOOLS / "comfy.py")
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as stack:
        output = Path(place) / "output"
        servers = [stack.enter_context(launcher.Server(Path(place) / f"base{number}", output)) for number in range(2)]
        start = time.perf_counter()
        said = writers.grow_together(launcher, servers, FOLDER, SECONDS)
        taken = time.perf_counter() - start
        lost = writers.lost(output / FOLDER, said)
        listed = len(world_files.read_manifest(output / FOLDER))
    counts = " and ".join(str(len(some)) for some in said)
    yield Result(f"writers: walks that two servers saved in one world in {taken:.0f} s", f"{counts}; {listed} states")
    yield Result("writers: states lost", str(len(lost)), "<= 0", not lost)


BENCHES = {"writers": bench_writers}
