"""Many worlds on many machines: `python tools/comfy.py fleet JOBS [--address ray://HEAD:10001]`.

JOBS is a .jsonl or .csv with a job in each row, or a folder of photos, each of which is walked along every one of --paths.
A row says: workflow (a template's name or a file), photo, path (a file, or the name of a preset), prompt, seed, and settings
(NODE.INPUT=VALUE; in a .csv, a column for each NODE.INPUT). All but the workflow may be missing; names of files are relative to
JOBS. The same command again makes only what is missing; Ctrl-C loses at most the chunk that was being made.

Ray schedules the jobs, on this machine or on the machines of a cluster that --address names; each of them has the pack and the
photos at the same path, and Ray runs in the launcher's environment. Without Ray the jobs run one after another. Everything
goes to --output (see fleet_worker.py).
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import html
import importlib.util
import json
import os
import re
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType

PHOTOS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
WORKFLOW = "custom_trajectory"  # of jobs that name none: the preview along a path, which needs no model
ATTEMPTS = 3  # after so many a job is set aside, and a worker that does not start is done without
CORES = 2  # of a worker, where no GPUs say how many workers there are
TABLE_EVERY = 10.0  # seconds between two states of the table and the page
OBJECT_STORE = 80 * 2**20  # bytes, the least that Ray takes: jobs are short texts and worlds go to files
SHORT = 200  # letters of an error on the screen; the log has all
SAYS = ("workflow", "photo", "path", "prompt", "seed", "settings")


def worker_module() -> ModuleType:
    """fleet_worker.py of this folder, which is on no path."""
    if "lyra_fleet_worker" not in sys.modules:
        spec = importlib.util.spec_from_file_location("lyra_fleet_worker", Path(__file__).with_name("fleet_worker.py"))
        sys.modules["lyra_fleet_worker"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["lyra_fleet_worker"])
    return sys.modules["lyra_fleet_worker"]


fleet_worker = worker_module()
comfy = fleet_worker.launcher()
WorkflowError, say = comfy.WorkflowError, comfy.say


# ------------------------------------------------------------------------------------------------------------- the jobs


@dataclass(frozen=True)
class Job:
    """All that is said of one world, files by absolute paths or URLs; equal jobs make equal worlds and have one key."""

    workflow: str = WORKFLOW
    photo: str = ""
    path: str = ""
    prompt: str = ""
    seed: int | None = None
    settings: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """A name that people can read, and a hash of all that the job says."""
        said = json.dumps(asdict(self), sort_keys=True)
        names = [re.sub(r"[^A-Za-z0-9]+", "_", Path(name).stem).strip("_")[:24] for name in (self.photo, self.path)]
        return "-".join([*filter(None, names), hashlib.sha256(said.encode()).hexdigest()[:12]])

    @property
    def order(self) -> dict:
        """What a worker is told."""
        return {**asdict(self), "key": self.key}


def read_jobs(source: Path, template: Job, paths: Iterable[str] = ()) -> list[Job]:
    """The jobs of a .jsonl, a .csv or a folder of photos, each once; what a row does not say is as in `template`."""
    if source.is_dir():
        photos = sorted((file for file in source.iterdir() if file.suffix.lower() in PHOTOS), key=lambda f: files().natural(f.name))
        if not photos:
            raise WorkflowError(f"{source}: holds no photos ({', '.join(PHOTOS)})")
        walks = [located(path, Path()) for path in paths] or [template.path]
        jobs = [replace(template, photo=str(photo.resolve()), path=path) for photo in photos for path in walks]
    elif source.suffix in (".jsonl", ".csv"):
        if paths:
            raise WorkflowError(f"--paths goes with a folder of photos; {source} says the path of each job itself")
        rows = csv_rows(source) if source.suffix == ".csv" else json_rows(source)
        jobs = [job_of(row, template, f"{source}, line {number}", source.resolve().parent) for number, row in rows]
    else:
        raise WorkflowError(f"{source}: expected a .jsonl, a .csv or a folder of photos")
    if not jobs:
        raise WorkflowError(f"{source}: holds no jobs")
    return list(dict.fromkeys(jobs))


def files() -> ModuleType:
    from lyra_core import files

    return files


def json_rows(source: Path) -> Iterable[tuple[int, dict]]:
    for number, line in enumerate(files().read_text(source).splitlines(), 1):
        if line.strip():
            row = files().parse_json(line, f"{source}, line {number}")
            if not isinstance(row, dict):
                raise WorkflowError(f"{source}, line {number}: is {line.strip()[:60]!r}; a job is an object, such as {{\"photo\": \"a.jpg\"}}")
            yield number, row


def csv_rows(source: Path) -> Iterable[tuple[int, dict]]:
    """Rows without their empty cells; a column NODE.INPUT is a setting."""
    reader = csv.DictReader(files().read_text(source).splitlines(), skipinitialspace=True)
    for row in reader:
        if None in row:
            raise WorkflowError(f"{source}, line {reader.line_num}: has more cells than the first line has names; quote those with commas")
        filled = {name.strip(): value.strip() for name, value in row.items() if value and value.strip()}
        settings = {name: filled.pop(name) for name in list(filled) if "." in name}
        yield reader.line_num, {**filled, **({"settings": settings} if settings else {})}


def job_of(row: dict, template: Job, where: str, folder: Path) -> Job:
    """A job of a row; WorkflowError that names the place."""
    if unknown := sorted(set(row) - set(SAYS)):
        raise WorkflowError(f"{where}: says {', '.join(map(repr, unknown))}; a job says {', '.join(SAYS)}")
    said = {name: value for name, value in row.items() if value not in ("", None)}
    if wrong := [name for name in ("workflow", "photo", "path", "prompt") if not isinstance(said.get(name, ""), str)]:
        raise WorkflowError(f"{where}: {wrong[0]} is {said[wrong[0]]!r}, which is no text")
    for name in {"photo", "path"} & said.keys():
        said[name] = located(said[name], folder)
    if said.get("workflow", "").endswith((".json", *PHOTOS)):
        said["workflow"] = located(said["workflow"], folder)
    if "seed" in said:
        said["seed"] = whole(said["seed"], where)
    return replace(template, **{**said, "settings": (*template.settings, *settings_in(said.get("settings", {}), where))})


def located(name: str, folder: Path) -> str:
    """The absolute path of a file of this name in a folder; URLs and names of presets as they are."""
    is_file = Path(name).suffix.lower() in (*PHOTOS, *fleet_worker.PATH_FILES)
    return str((folder / name).expanduser().resolve()) if is_file and "://" not in name else name


def whole(value: object, where: str) -> int:
    if isinstance(value, bool) or not re.fullmatch(r"\d{1,20}", str(value)):
        raise WorkflowError(f"{where}: seed is {value!r}, which is no whole number")
    return int(value)


def settings_in(value: object, where: str) -> list[str]:
    """Settings of a row, as {"NODE.INPUT": value} or ["NODE.INPUT=VALUE"]."""
    if isinstance(value, dict):
        value = [f"{target}={setting}" for target, setting in value.items()]
    if not isinstance(value, list) or any(not isinstance(v, str) or "." not in v.partition("=")[0] or "=" not in v for v in value):
        raise WorkflowError(f"{where}: settings are {str(value)[:80]}; expected {{\"NODE.INPUT\": value}} or [\"NODE.INPUT=VALUE\"]")
    return value


def contents(jobs: Iterable[Job]) -> dict[str, dict]:
    """The workflows that jobs name, read."""
    prompts = comfy.prompts
    names = {job.workflow: Path(job.workflow) for job in jobs}
    return {name: prompts.read_workflow(file if file.suffix else prompts.WORKFLOWS / f"{name}.json") for name, file in names.items()}


# -------------------------------------------------------------------------------------------------------- who does them


class InTurn:
    """One worker, in this process: jobs one after another."""

    slots = (0,)

    def __init__(self, place: str, bases: Path):
        self.worker = fleet_worker.Worker(place, str(bases / "0"), 0)

    def submit(self, slot: int, order: dict | None) -> object:
        return time.monotonic_ns()

    def wait(self, running: dict) -> tuple[object, dict]:
        ticket, (_, order) = next(iter(running.items()))
        return ticket, self.worker.start() if order is None else self.worker.run(order)

    def forget(self, slot: int) -> None:
        self.worker.stop()

    def close(self) -> None:
        self.worker.stop()


class OnRay:
    """Workers as Ray actors, here or on a cluster."""

    def __init__(self, place: str, bases: Path, address: str | None, asked: int):
        self.ray, self.folder = start_ray(address)
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        count, self.share = shares([(int(n.get("CPU", 0)), int(n.get("GPU", 0))) for n in nodes], asked)
        self.slots, self.place, self.bases, self.actors = range(count), place, bases, {}

    def submit(self, slot: int, order: dict | None) -> object:
        if slot not in self.actors:
            actor = remote(self.ray, self.share)
            self.actors[slot] = actor.remote(str(Path(fleet_worker.__file__).resolve()), self.place, str(self.bases / str(slot)), slot)
        actor = self.actors[slot]
        return actor.start.remote() if order is None else actor.run.remote(order)

    def wait(self, running: dict) -> tuple[object, dict]:
        (ticket, *_), _ = self.ray.wait(list(running), num_returns=1)
        try:
            return ticket, self.ray.get(ticket)
        except self.ray.exceptions.RayError as problem:
            return ticket, {"error": f"the worker was lost: {str(problem).splitlines()[0]}", "log": str(problem), "lost": True}

    def forget(self, slot: int) -> None:
        self.ray.kill(self.actors.pop(slot))

    def close(self) -> None:
        for slot in list(self.actors):
            self.forget(slot)
        self.ray.shutdown()
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)


def start_ray(address: str | None) -> tuple[ModuleType, str | None]:
    """Ray, connected to a cluster or started here, for this machine alone and with little memory; and the folder it has then."""
    quiet = {"logging_level": "ERROR", "log_to_driver": False, "configure_logging": False}
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if not address:  # all of these are read when Ray is imported
        own = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        os.environ.update(own)  # the first makes it listen on 127.0.0.1 only
    import ray

    if address:
        ray.init(address, **quiet)
        return ray, None
    for _ in range(ATTEMPTS):
        folder = tempfile.mkdtemp(prefix="lyra-ray-")  # short: paths of sockets may have 107 letters
        try:
            ray.init(include_dashboard=False, _temp_dir=folder, object_store_memory=OBJECT_STORE, **quiet)
            return ray, folder
        except Exception as fault:  # Ray waits half a minute for itself, which is too short on a busy machine, and raises a plain one
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)
            problem = fault
    raise WorkflowError(f"Ray does not start on this machine ({problem}); --workers 1 does without it")


def remote(ray: ModuleType, share: dict):
    """The actor's class. It is sent as it is and loads the rest from the pack, which lies at the same path everywhere."""

    class Remote:
        def __init__(self, file: str, place: str, base: str, slot: int):
            import importlib.util
            import sys

            spec = importlib.util.spec_from_file_location("lyra_fleet_worker", file)
            sys.modules["lyra_fleet_worker"] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            self.worker = module.Worker(place, base, slot)

        def start(self) -> dict:
            return self.worker.start()

        def run(self, order: dict) -> dict:
            return self.worker.run(order)

    return ray.remote(**share, max_restarts=0)(Remote)


def shares(nodes: list[tuple[int, int]], asked: int) -> tuple[int, dict]:
    """How many workers these machines (cores, GPUs) take, and what Ray gives each; `asked` 0: as many as there are GPUs."""
    gpus = sum(gpu for _, gpu in nodes)
    if gpus:
        if asked > gpus:
            raise WorkflowError(f"--workers {asked}, but there are {gpus} GPUs, and a worker has one")
        return asked or gpus, {"num_gpus": 1, "num_cpus": max(1, min(cores // gpu for cores, gpu in nodes if gpu))}
    cores = sum(cores for cores, _ in nodes)
    if asked > cores:
        raise WorkflowError(f"--workers {asked}, but there are {cores} cores")
    share = CORES if not asked else max(c for c in range(1, cores + 1) if sum(own // c for own, _ in nodes) >= asked)
    return asked or max(1, sum(own // share for own, _ in nodes)), {"num_gpus": 0, "num_cpus": min(share, max(own for own, _ in nodes))}


def drive(orders: list[dict], pool, on_end: Callable[[dict, dict, list[str]], None]) -> list[dict]:
    """Hand jobs to whoever is free; `on_end(order, row, log)` for each that ends. Returns those that no worker was left for."""
    waiting, idle, starts, faults = deque(orders), set(), Counter(), defaultdict(list)
    running = {pool.submit(slot, None): (slot, None) for slot in pool.slots}
    while running:
        ticket, outcome = pool.wait(running)
        slot, order = running.pop(ticket)
        if order is not None:
            if "error" not in outcome:
                on_end(order, {**outcome, "attempts": 1 + len(faults[order["key"]])}, [])
            else:
                faults[order["key"]].append(outcome)
                settle(order, faults[order["key"]], waiting, on_end)
        if outcome.get("lost") or (order is None and "error" in outcome):
            starts[slot] = 1 if order is not None else starts[slot] + 1
            pool.forget(slot)
            if starts[slot] < ATTEMPTS:
                running[pool.submit(slot, None)] = (slot, None)
            else:
                say(f"worker {slot} does not start and is done without: {outcome['error']}")
        else:
            starts[slot] = 0
            idle.add(slot)
        while waiting and idle:
            slot, order = idle.pop(), waiting.popleft()
            running[pool.submit(slot, order)] = (slot, order)
    return list(waiting)


def settle(order: dict, faults: list[dict], waiting: deque, on_end: Callable) -> None:
    """A job that failed is taken up again after the others, or set aside with all that was said of it."""
    error = faults[-1]["error"]
    say(f"{order['key']}: attempt {len(faults)} of {ATTEMPTS}: {error[:SHORT]}")
    if len(faults) < ATTEMPTS:
        waiting.append(order)
        return
    log = [f"attempt {n}: {fault['error']}\n{fault.get('log', '')}" for n, fault in enumerate(faults, 1)]
    on_end(order, {"key": order["key"], "status": "failed", "attempts": len(faults), "error": error}, log)


# ---------------------------------------------------------------------------------------------------------- the results


class Results:
    """What is known of the jobs of a place: a row for each key, one table and one page of them."""

    def __init__(self, place: str, jobs: list[Job]):
        self.place, self.jobs, self.written = fleet_worker.Place(place), {job.key: job for job in jobs}, 0.0
        sizes = self.place.sizes()
        rows = {key: row for key, row in self.place.results().items() if key in self.jobs}
        self.rows = {key: row for key, row in rows.items() if row["status"] == "failed" or is_there(row, sizes)}

    def missing(self, retry: bool) -> list[Job]:
        """Jobs that were not done; those that were set aside only if they are to be tried again."""
        aside = ("failed",) if not retry else ()
        return [job for key, job in self.jobs.items() if self.rows.get(key, {}).get("status", "") not in ("done", *aside)]

    def add(self, order: dict, row: dict, log: list[str]) -> None:
        row = {**row, **{name: order[name] for name in SAYS}}
        if log:
            self.place.write(f"failed/{row['key']}.log", "\n\n".join(log).encode())
        self.place.write(f"results/{row['key']}.json", json.dumps(row).encode())
        self.rows[row["key"]] = row
        done = f"{row['seconds']:.1f} s on {row['worker']}" if row["status"] == "done" else f"set aside, see failed/{row['key']}.log"
        say(f"[{len(self.rows)}/{len(self.jobs)}] {row['key']}: {done}")
        if time.monotonic() - self.written > TABLE_EVERY:
            self.write()

    def write(self) -> None:
        """The table and the page, in the order of the jobs."""
        rows = [self.rows[key] for key in self.jobs if key in self.rows]
        self.place.write("results.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows).encode())
        self.place.write("index.html", page(rows, len(self.jobs)).encode())
        self.written = time.monotonic()


def is_there(row: dict, sizes: dict[str, int]) -> bool:
    """Whether every file of a result is where it was put, as long as it was."""
    return all(sizes.get(f"{row['key']}/{name}") == size for name, size in row["files"].items())


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>body{{font:14px system-ui,sans-serif;margin:16px;background:#fff;color:#222}}
main{{display:grid;grid-template-columns:repeat(auto-fill,minmax(220px,1fr));gap:12px}}
figure{{margin:0}}img{{width:100%;aspect-ratio:16/9;object-fit:cover;background:#ddd;display:block}}
figcaption{{overflow-wrap:anywhere;padding:4px 0}}small{{color:#666}}.failed figcaption{{border-left:4px solid #b00;padding-left:8px}}
@media(prefers-color-scheme:dark){{body{{background:#181818;color:#ddd}}small{{color:#999}}}}</style>
<h1>{title}</h1><p>{summary}</p><main>
{cards}
</main></html>
"""


def page(rows: list[dict], total: int) -> str:
    """One page with a picture of every world, and what was set aside first."""
    done, failed = ([row for row in rows if row["status"] == status] for status in ("done", "failed"))
    hours = sum(row["seconds"] for row in done) / 3600
    summary = f"{len(done)} of {total} done, {len(failed)} set aside; {hours:.2f} hours of work in all"
    return PAGE.format(title="Worlds", summary=summary, cards="\n".join(map(card, [*failed, *done])))


def card(row: dict) -> str:
    said = {name: html.escape(str(value)) for name, value in row.items()}
    names = " · ".join(filter(None, (html.escape(Path(row[name]).stem) for name in ("photo", "path")))) or said["workflow"]
    more = [said["prompt"][:120], f"seed {said['seed']}" if row["seed"] is not None else ""]
    if row["status"] == "failed":
        end = f'<a href="failed/{said["key"]}.log">set aside after {said["attempts"]} attempts</a>: {said["error"][:300]}'
        return f'<figure class="failed"><figcaption><b>{names}</b><br>{end}</figcaption></figure>'
    more.append(f"{row['seconds']:.0f} s" + (f", {row['attempts']} attempts" if row["attempts"] > 1 else ""))
    folder = f"worlds/{said['key']}"
    picture = f'<a href="{folder}/"><img loading="lazy" src="{folder}/{fleet_worker.THUMBNAIL}" alt="{names}"></a>'
    return f"<figure>{picture}<figcaption><b>{names}</b><br><small>{' · '.join(filter(None, more))}</small></figcaption></figure>"


# ---------------------------------------------------------------------------------------------------------- the command


def bases_of(place: str) -> Path:
    """Where the workers of a place have their base folders."""
    return comfy.home() / "fleet" / hashlib.sha256(place.encode()).hexdigest()[:12]


def pool_for(options, place: str):
    """Whoever does the jobs: Ray's workers where Ray is, else this process."""
    bases = bases_of(place)
    if importlib.util.find_spec("ray") is None:
        how = f"{comfy.venv_python()} -m pip install 'ray[client]'"
        if options.address:
            raise WorkflowError(f"--address needs Ray: {how}")
        say(f"Ray is not installed, so the jobs run one after another; for several workers and machines: {how}")
        return InTurn(place, bases)
    if options.workers == 1 and not options.address:
        return InTurn(place, bases)
    return OnRay(place, bases, options.address, options.workers)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="comfy.py fleet", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", type=Path, help="a .jsonl or .csv, or a folder of photos")
    parser.add_argument("--address", help="of a Ray cluster, such as ray://HEAD:10001 (default: this machine)")
    parser.add_argument("--workers", type=int, default=0, help="default: one for each GPU; without GPUs one for every two cores")
    parser.add_argument("--output", default="output/fleet", help="a folder that all workers see, or a URL for fsspec (default %(default)s)")
    parser.add_argument("--workflow", default=WORKFLOW, help="of jobs that name none (default %(default)s)")
    parser.add_argument("--paths", nargs="+", default=[], metavar="PATH", help="with a folder of photos: files, or names of presets")
    parser.add_argument("--set", action="append", default=[], metavar="NODE.INPUT=VALUE", dest="settings", help="in all jobs")
    parser.add_argument("--retry", action="store_true", help="try again what was set aside")
    return parser


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    if not options.jobs.exists():
        raise WorkflowError(f"{options.jobs}: no such file or folder")
    try:
        template = Job(workflow=located(options.workflow, Path()), settings=tuple(settings_in(options.settings, "--set")))
        jobs = read_jobs(options.jobs, template, options.paths)
        read = contents(jobs)
    except files().FileError as problem:
        raise WorkflowError(problem) from problem
    place = options.output if "://" in options.output else str(Path(options.output).expanduser().resolve())
    results = Results(place, jobs)
    missing = results.missing(options.retry)
    aside = sum(row["status"] == "failed" for row in results.rows.values())
    kept = f", {aside} were set aside before (--retry tries them again)" if aside and not options.retry else ""
    say(f"{len(jobs)} jobs, {len(missing)} to do{kept}; results in {place}")
    return carry_out(options, results, [{**job.order, "content": read[job.workflow]} for job in missing])


def carry_out(options, results: Results, orders: list[dict]) -> int:
    """Do what is missing; 1 if something was not done."""
    left, pool = [], None
    try:
        if orders:
            pool = pool_for(options, results.place.name)
            left = drive(orders, pool, results.add)
    except KeyboardInterrupt:
        say(f"interrupted; {len(results.missing(False))} jobs are not done, and the same command goes on with them")
        raise
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher hands Ctrl-C on, so it comes twice
        if pool:
            pool.close()
            shutil.rmtree(bases_of(results.place.name), ignore_errors=True)  # on this machine; on others they are used again
        results.write()
        signal.signal(signal.SIGINT, signal.default_int_handler)
    failed = [row["key"] for row in results.rows.values() if row["status"] == "failed"]
    if left:
        say(f"{len(left)} jobs are not done, because no worker could be started")
    say(f"{len(results.rows) - len(failed)} of {len(results.jobs)} done; {len(failed)} set aside")
    return int(bool(left or failed))
