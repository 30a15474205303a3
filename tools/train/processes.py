"""Processes of this package's modules, each of one thread, told as JSON what to do. Nothing here needs the host or torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Processes:
    """Those that somebody has started, until they leave."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen] = []

    def start(self, module: list[str], told: dict, **variables: str) -> None:
        """One more, of `python -m module`, which finds `told` on its standard input."""
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")])
        alone = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **variables}
        process = subprocess.Popen([sys.executable, "-m", *module], stdin=subprocess.PIPE, env={**os.environ, **alone}, text=True)
        self.processes.append(process)
        process.stdin.write(json.dumps(told))
        process.stdin.close()

    def __enter__(self):
        return self

    def __exit__(self, *_exception) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()


def give_way() -> None:
    """The training itself must not wait."""
    if hasattr(os, "nice"):
        os.nice(5)
