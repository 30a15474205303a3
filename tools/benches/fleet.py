"""Many small worlds on two workers of Ray, one of which is killed, beside the same worlds made by one worker."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from . import Result

PROJECT = Path(__file__).resolve().parents[2]
PRESETS = ("orbit_horizontal", "rotate_spot", "horizontal_zoom", "spiral", "orbit_vertical", "horizontal_lift")
SIZE, FRAMES, CHUNK = (96, 64), 25, 8  # (width, height); three chunks a world
FLAT, MARGIN = 1.05, 32  # a worker's last job against its second; MiB by which an allocator differs
IMPOSSIBLE = {"path": "no_such_move"}


def small_workflow(size: tuple[int, int] = SIZE, frames: int = FRAMES, chunk: int = CHUNK) -> dict:
    """A photo of which the geometry preview makes a small world along a preset, saved chunk by chunk, and its video."""
    return {
        "1": node("LoadImage", image="example.png"),
        "2": node("ImageScale", image=["1", 0], upscale_method="lanczos", width=size[0], height=size[1], crop="center"),
        "3": node("Lyra2Depth", image=["2", 0], source="auto", **{"source.camera_height": 1.6, "source.field_of_view": 60.0}, median=0.0),
        "4": node("Lyra2PresetTrajectory", depth=["3", 0], preset="original", frames=frames, seed=0),
        "5": node("Lyra2BeginWorld", image=["2", 0], depth=["3", 0]),
        "6": node("Lyra2PreviewChunks", world=["5", 0], cameras=["4", 0], retrieve=3, chunk_frames=chunk, save_to="world"),
        "7": node("Lyra2WorldVideo", world=["6", 0], first=0, count=0, backwards=False, fps=16.0),
        "8": node("SaveVideo", video=["7", 0], filename_prefix="walk", format="auto", codec="auto"),
    }  # fmt: skip


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def write_jobs(folder: Path, photos: int, presets: tuple[str, ...]) -> Path:
    """A table of jobs in a folder: every photo along every preset, and one that can't succeed; the photos are parts of one."""
    from PIL import Image

    (folder / "small.json").write_text(json.dumps(small_workflow()))
    with Image.open(PROJECT / "tools" / "demo" / "room.png") as room:
        for number in range(photos):
            room.crop((8 * number, 0, room.width - 8 * (photos - number), room.height)).save(folder / f"room_{number}.png")
    rows = [{"photo": f"room_{number}.png", "path": preset} for number in range(photos) for preset in presets]
    rows.insert(len(rows) // 2, {"photo": "room_0.png", **IMPOSSIBLE})
    jobs = folder / "jobs.jsonl"
    jobs.write_text("".join(json.dumps({"workflow": "small.json", **row}) + "\n" for row in rows))
    return jobs


def begin(jobs: Path, output: Path, *options: str) -> subprocess.Popen:
    """`fleet` in a process of its own; a thread for each worker, so that all of them compute the same bits."""
    command = [sys.executable, str(PROJECT / "tools" / "comfy.py"), "fleet", str(jobs), "--output", str(output), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def kill_a_worker(fleet: subprocess.Popen, output: Path, done: int = 0) -> list[int]:
    """Kill -9 one of Ray's workers in the middle of a world, once so many are done; the processes that it had started."""
    import psutil

    while fleet.poll() is None:
        time.sleep(0.05)
        busy = [p for p in psutil.Process(fleet.pid).children(recursive=True) if name_of(p).startswith("ray::Remote.run")]
        if busy and len(results_of(output)) >= done and in_the_middle(output) == len(busy):
            servers = [child.pid for child in busy[0].children() if child.is_running()]
            os.kill(busy[0].pid, signal.SIGKILL)
            return servers
    return []


def results_of(output: Path) -> set[str]:
    return {file.stem for file in output.glob("results/*.json")}


def in_the_middle(output: Path) -> int:
    """How many worlds lie there of which a chunk is saved, and that are not finished."""
    saved = Counter(file.parents[1].name for file in output.glob("worlds/*/*/*.safetensors"))
    return sum(count > 1 for key, count in saved.items() if key not in results_of(output))


def name_of(process) -> str:
    import psutil

    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def rows_of(output: Path) -> dict[str, dict]:
    return {row["key"]: row for row in map(json.loads, (output / "results.jsonl").read_text().splitlines())}


def digests(output: Path) -> dict[str, str]:
    """What every file below worlds/ holds; without videos, as x264 makes other bytes of equal frames from time to time."""
    found = sorted(file for file in (output / "worlds").rglob("*") if file.is_file() and file.suffix not in (".mp4", ".lock"))
    return {file.relative_to(output).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in found}


def grown(rows: list[dict]) -> int:
    """By how much a worker's memory grew from its second job to its last, MiB beyond what is allowed."""
    memory: dict[str, list[int]] = {}
    for row in sorted(rows, key=lambda row: row["ended"]):
        memory.setdefault(row["worker"], []).append(row["memory_mib"])
    return max(used[-1] - round(FLAT * used[1] + MARGIN) for used in memory.values() if len(used) > 2)


def working(rows: list[dict]) -> float:
    """Seconds from the begin of the first of these jobs to the end of the last."""
    return max(row["ended"] for row in rows) - min(row["ended"] - row["seconds"] for row in rows)


def bench_fleet() -> Iterator[Result]:
    with tempfile.TemporaryDirectory(prefix="lyra-fleet-") as name:
        folder = Path(name)
        jobs, one, two, killed = write_jobs(folder, 4, PRESETS), folder / "one", folder / "two", folder / "killed"
        seconds = {}
        for output, workers in ((one, "1"), (two, "2")):
            start = time.perf_counter()
            said = begin(jobs, output, "--workers", workers).communicate()[0]
            seconds[output] = time.perf_counter() - start
            print(said, file=sys.stderr)
        fleet = begin(jobs, killed, "--workers", "2")
        servers = kill_a_worker(fleet, killed, 8)
        said = fleet.communicate()[0]
        print(said, file=sys.stderr)
        yield from report(one, two, killed, seconds, servers)


def report(one: Path, two: Path, killed: Path, seconds: dict[Path, float], servers: list[int]) -> Iterator[Result]:
    import psutil

    rows = {output: rows_of(output) for output in (one, two, killed)}
    done = {output: [row for row in found.values() if row["status"] == "done"] for output, found in rows.items()}
    aside = [row for row in rows[killed].values() if row["status"] == "failed"]
    again = [row for row in done[killed] if row["attempts"] > 1]
    what = "fleet: 24 worlds and one job that can't succeed, 2 workers, one killed: done, set aside"
    yield Result(what, f"{len(done[killed])}, {len(aside)}", "24, 1", (len(done[killed]), len(aside)) == (24, 1))
    whole = len(again) == 1 and again[0]["resumed_chunks"] > 0
    yield Result("fleet: jobs taken up again, chunks that they went on from", f"{[(row['attempts'], row['resumed_chunks']) for row in again]}",
                 "one, at least 1", whole)  # fmt: skip
    same = digests(one) == digests(killed) == digests(two)
    yield Result("fleet: files of all worlds, bit by bit those of one worker", f"{len(digests(killed))}", "the same", same)
    left = [pid for pid in servers if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
    yield Result("fleet: what the killed worker had started and still runs", f"{len(left)}", "0", bool(servers) and not left)
    beyond = max(grown(found) for found in done.values())
    yield Result("fleet: memory of a worker, second job to last, beyond 5 % and 32 MiB", f"{beyond} MiB", "<= 0", beyond <= 0)
    for what, spent in (("of the command", seconds), ("from the first job's begin", {output: working(done[output]) for output in (one, two)})):
        ratio = f"{spent[one]:.0f} / {spent[two]:.0f} s = {spent[one] / spent[two]:.2f}"
        yield Result(f"fleet: wall time {what}, one worker over two (two shared cores)", ratio)


BENCHES = {"fleet": bench_fleet}
