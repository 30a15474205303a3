"""What saving a scene of gaussians costs, beside writing as many bytes plainly."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from lyra_core.splats.gaussians import Gaussians
from lyra_core.splats.splat_files import BLOCK, load_ply, load_splat, save_ply, save_splat

from . import Result, peak_mib, seconds

TOOLS = Path(__file__).resolve().parents[1]
COUNT, ROUNDS = 2_000_000, 5
SLOWER = 3.0  # times the plain way
BLOCK_MIB = BLOCK * 17 * 4 / 2**20
MARGIN = 8.0  # MiB beyond one block: fields of a block in float32, and what an allocator differs by from run to run


def scene(count: int) -> Gaussians:
    """Random gaussians, filled in place, so that making them leaves no peak behind."""
    generator = torch.Generator().manual_seed(0)
    return Gaussians(
        torch.empty(count, 3).normal_(generator=generator),
        torch.empty(count, 4).uniform_(0.1, 1, generator=generator),
        torch.empty(count, 3).uniform_(1e-3, 0.1, generator=generator),
        torch.empty(count).uniform_(generator=generator),
        torch.empty(count, 1, 3).normal_(generator=generator),
    )


def plain_write(content: np.ndarray, file: Path) -> None:
    """One write of everything, and as certainly on the disk as ours."""
    with open(file, "wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())


def report_peak() -> None:
    """Print by how many MiB saving raises this process's peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        save_ply(scene(1000), Path(folder) / "first.ply")  # loads what every save needs
        gaussians = scene(COUNT)
        before = peak_mib()
        save_ply(gaussians, Path(folder) / "scene.ply")
        print(peak_mib() - before)


def bench_splats() -> Iterator[Result]:
    gaussians, ours, plain = scene(COUNT), [], []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "scene.ply"
        save_ply(gaussians, file)
        size = file.stat().st_size
        content = np.ones(size // 4, np.float32)
        for _ in range(ROUNDS):  # in turns, so that a busy disk is busy for both
            plain.append(seconds(lambda: plain_write(content, Path(folder) / "plain")))
            ours.append(seconds(lambda: save_ply(gaussians, file)))
        read = seconds(lambda: load_ply(file))
        small = Path(folder) / "scene.splat"
        splat, read_splat = seconds(lambda: save_splat(gaussians, small)), seconds(lambda: load_splat(small))
    what, took = f"splats: {COUNT // 10**6} million", min(ours)  # the least disturbed of each
    yield Result(f"{what} to a PLY of {size / 1e6:.0f} MB", f"{took:.2f} s, {size / took / 1e6:.0f} MB/s")
    yield Result(f"{what} from it", f"{read:.2f} s")
    yield Result(f"{what} to a .splat, and back", f"{splat:.2f} s {read_splat:.2f} s")
    ratio = took / min(plain)
    yield Result("splats: times as long as one plain write", f"{ratio:.1f}", f"<= {SLOWER:.0f}", ratio <= SLOWER)
    yield memory()


def memory() -> Result:
    """In a process of its own: a peak is never forgotten."""
    program = "import sys; sys.path.insert(0, sys.argv[1]); import benches, host; host.boot(); "
    program += "from benches.splats import report_peak; report_peak()"
    done = subprocess.run([sys.executable, "-c", program, str(TOOLS)], capture_output=True, text=True, check=True)
    above = float(done.stdout.split()[-1])
    allowed = BLOCK_MIB + MARGIN
    bar = f"<= block of {BLOCK_MIB:.1f} + {MARGIN:.0f} MiB"
    return Result("splats: peak memory of a save above the gaussians", f"{above:.1f} MiB", bar, above <= allowed)
