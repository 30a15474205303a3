"""A workflow on several GPUs: as many ComfyUIs, one for each, run the same prompt and share out the transformer's tokens.

What they share, and how, is in lyra_core/models/token_split.py. All save worlds to the same folders, as any processes may;
what else the second and later ones write goes to a folder that is removed. Each holds all the weights: this saves time, not
memory. Without GPUs it is a rehearsal on the CPU.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import ModuleType


def launcher() -> ModuleType:
    """tools/comfy.py, whether or not its folder is on a path."""
    if "lyra_comfy" not in sys.modules:
        spec = importlib.util.spec_from_file_location("lyra_comfy", Path(__file__).with_name("comfy.py"))
        sys.modules["lyra_comfy"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["lyra_comfy"])
    return sys.modules["lyra_comfy"]


def run(workflow: dict, settings: list[str], output: Path, gpus: int, name: Path, base: Path | None = None, extra: tuple[str, ...] = ()) -> dict:
    """Run a workflow to its end on so many GPUs; the outputs of the first. WorkflowError as soon as one of them fails."""
    comfy = launcher()
    base, meeting = base or comfy.home() / "base", f"127.0.0.1:{comfy.free_port()}"
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".gpus-", dir=output) as aside, ThreadPoolExecutor(gpus) as threads:
        servers = [server_of(rank, gpus, meeting, base, output, Path(aside), extra) for rank in range(gpus)]
        started = []
        try:
            for server in servers:
                server.start()
                started.append(server)
            all_of(threads.submit(server.wait) for server in servers)  # at once: none is up before all have met
            first = threads.submit(comfy.run_on, servers[0], workflow, settings, lambda prompt: None, name)
            others = [(server, f"{Path(aside).name}/{rank}") for rank, server in enumerate(servers) if rank]
            return all_of([first, *(threads.submit(follow, server, workflow, settings, folder, name) for server, folder in others)])[0]
        finally:
            for server in started:
                server.process.kill()  # Ctrl-C and faults too: one that waits for another would wait for ever
            for server in started:
                server.__exit__()


def all_of(parts: Iterable[Future]) -> list:
    """What all of them return; whatever the first that fails raises, without waiting for the others."""
    parts = list(parts)
    for part in wait(parts, return_when=FIRST_EXCEPTION).done:
        part.result()
    return [part.result() for part in parts]


def server_of(rank: int, ranks: int, meeting: str, base: Path, output: Path, aside: Path, extra: tuple[str, ...]):
    """The server of one GPU; they differ in what they must not share."""
    variables = {"LYRA2_RANK": str(rank), "LYRA2_RANKS": str(ranks), "LYRA2_MEETING": meeting, **card(rank, ranks)}
    own = []
    for kind in ("user", "temp") if rank else ():
        (aside / f"{kind}{rank}").mkdir()
        own += [f"--{kind}-directory", str(aside / f"{kind}{rank}")]
    return launcher().Server(base, output, *extra, *own, variables=variables, log=f"server{rank or ''}.log")


def card(rank: int, ranks: int) -> dict[str, str]:
    """What shows a process one GPU and no other; nothing where there are none."""
    import torch

    if not torch.cuda.is_available():
        return {}
    if torch.cuda.device_count() < ranks:
        raise launcher().WorkflowError(f"--gpus {ranks}: this machine has {torch.cuda.device_count()}")
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return {"CUDA_VISIBLE_DEVICES": seen[rank] if len(seen) >= ranks else str(rank)}


def follow(server, workflow: dict, settings: list[str], folder: str, name: Path) -> dict:
    """The same prompt on another GPU; all but worlds is written to a folder of the output folder."""

    def change(prompt: dict) -> None:
        for node in prompt.values():
            names = ("filename_prefix", *["folder"] * (node["class_type"] == "Lyra2ExportWorld"))
            node["inputs"] |= {name: f"{folder}/{value}" for name, value in node["inputs"].items() if name in names and isinstance(value, str)}

    comfy = launcher()
    return comfy.run_prompt(server, comfy.prepared(server, workflow, settings, change, name)[0])
