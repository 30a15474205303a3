"""Servers of tests as forks of one process that has imported what every host imports: two thirds of a start.

A fork runs the host's main.py with the arguments, variables and log of a start of its own; of the host and the pack nothing
is imported before. The tests that run tools/comfy.py as a command start servers from nothing, as users do.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path

# what a start of the host imports of other packages, by the time that it takes
PRELOADED = (
    "torch", "torch._dynamo", "torch.export", "torchvision", "torchaudio", "torchsde", "comfy_kitchen", "transformers",
    "transformers.models.auto.modeling_auto", "scipy.integrate", "scipy.ndimage", "scipy.signal", "scipy.stats", "kornia",
    "spandrel", "sqlalchemy.orm", "alembic.command", "aiohttp.web", "pydantic_settings", "cv2", "av", "PIL.Image",
    "safetensors.torch", "huggingface_hub",
)  # fmt: skip


@functools.cache
def object_info(server) -> dict:
    """What a launcher's server says of its nodes, for converting workflows; a file that came later is in none of its lists."""
    return server.get("/object_info")


class Fork:
    """What of subprocess.Popen the launcher asks of a server, for a process of multiprocessing."""

    def __init__(self, process):
        self.process, self.pid = process, process.pid
        self.terminate, self.kill = process.terminate, process.kill

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired("a forked server", timeout)
        return self.poll()


def is_possible() -> bool:
    """Whether processes can be forked after these imports: not where torch may have begun to talk to a GPU."""
    import torch

    return "forkserver" in multiprocessing.get_all_start_methods() and torch.version.cuda is None and torch.version.hip is None


def start_process(command: list[str], environment: dict[str, str], log) -> Fork:
    """tools/comfy.py's start_process, as a fork."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    process = context.Process(target=run, args=(command[1:], environment, log.name))
    process.start()
    return Fork(process)


def run(arguments: list[str], environment: dict[str, str], log: str) -> None:
    """Be `python ARGUMENTS` with these variables, which writes to a log."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.environ.clear()
    os.environ.update(environment)
    main, project = Path(arguments[0]), Path(__file__).resolve().parent.parent
    of_tests = {project, project / "tests", project / "tools", main.parent}
    sys.path[:] = [str(main.parent), *(entry for entry in sys.path if Path(entry or ".").resolve() not in of_tests)]
    sys.argv[:] = arguments
    runpy.run_path(arguments[0], run_name="__main__")
