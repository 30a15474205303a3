"""One worker of a fleet: a ComfyUI that stays warm, and the place where what it makes is kept.

A place is a folder that every worker sees, or a URL that fsspec opens (s3://bucket/worlds, gs://...; its driver must be
installed). Into a folder ComfyUI writes directly; from a URL a world is fetched as far as it is, and every chunk goes there as
soon as it is saved, so that whoever takes the job next goes on from it.

    worlds/KEY/            what a job made: the worlds that its workflow saves, videos, splats, thumbnail.jpg
    results/KEY.json       that it is done or was set aside, written last
    failed/KEY.log         why it was set aside
    results.jsonl          all results in one table
    index.html             all thumbnails on one page
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import json
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

LAUNCHER = Path(__file__).with_name("comfy.py")
PICTURES, VIDEOS = (".png", ".jpg", ".jpeg", ".webp"), (".mp4", ".webm", ".mkv", ".mov")
THUMBNAIL, TALL = "thumbnail.jpg", 160
SENT_EVERY = 3.0  # seconds between two looks at what a running job has saved, where that must be sent
PATH_FILES = (".json", ".npz")
# nodes whose `folder` they write to; others that have one read from it
WRITE_FOLDERS = ("Lyra2ExportWorld", "Lyra2SaveWorld", "Lyra2Explorer")


def launcher() -> ModuleType:
    """tools/comfy.py, whether or not its folder is on a path."""
    if "lyra_comfy" not in sys.modules:
        if str(LAUNCHER.parents[1]) not in sys.path:
            sys.path.append(str(LAUNCHER.parents[1]))  # lyra_core
        spec = importlib.util.spec_from_file_location("lyra_comfy", LAUNCHER)
        sys.modules["lyra_comfy"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["lyra_comfy"])
    return sys.modules["lyra_comfy"]


class Place:
    """Where results are kept."""

    def __init__(self, name: str):
        from fsspec.core import url_to_fs

        self.name, self.is_folder = name, "://" not in name
        self.files, self.root = url_to_fs(name if not self.is_folder else str(Path(name).expanduser().resolve()))

    def at(self, name: str) -> str:
        return f"{self.root}/{name}"

    def found(self, name: str) -> dict[str, dict]:
        """Every file below a folder, as it is now: others write there too."""
        self.files.invalidate_cache()
        return self.files.find(self.at(name), detail=True)

    def write(self, name: str, content: bytes) -> None:
        """All of it or nothing, as far as the place can do that: object stores can, and so can folders."""
        from lyra_core import files

        if self.is_folder:
            with files.replacing(self.at(name)) as partial:
                partial.write_bytes(content)
        else:
            self.files.makedirs(self.at(name).rpartition("/")[0], exist_ok=True)
            self.files.pipe_file(self.at(name), content)

    def results(self) -> dict[str, dict]:
        """The rows of all that was done or set aside, by key; one that cannot be read is as if it was not there."""
        names = self.found("results")
        rows = {}
        for name, content in self.files.cat(list(names)).items() if names else ():
            with contextlib.suppress(ValueError):
                rows[name.rpartition("/")[2].removesuffix(".json")] = json.loads(content)
        return rows

    def sizes(self) -> dict[str, int]:
        """Bytes of every file below worlds/, by its name there."""
        begin = len(self.at("worlds")) + 1
        return {name[begin:]: entry["size"] for name, entry in self.found("worlds").items()}

    def fetch(self, name: str, folder: Path) -> None:
        """A folder of the place as a local one, if it is there."""
        for file in self.found(name):
            target = folder / file[len(self.at(name)) + 1 :]
            target.parent.mkdir(parents=True, exist_ok=True)
            self.files.get_file(file, str(target))

    def send(self, folder: Path, name: str, sent: dict[Path, tuple], only: tuple[str, ...] = ()) -> None:
        """The files of a local folder that are new or changed since `sent`; each world's list after the files that it lists."""
        from lyra_core import files

        lists = {file: file.read_bytes() for file in sorted(folder.rglob("world.json"))}  # as it is before its files are looked at
        found = [file for file in sorted(folder.rglob("*")) if file.is_file() and not file.name.endswith(files.PARTIAL)]
        for file in [file for file in found if file not in lists and (not only or file.suffix in only)]:
            state = (file.stat().st_size, file.stat().st_mtime_ns)
            if sent.get(file) != state:
                self._put(file.relative_to(folder), name, file)
                sent[file] = state
        for file, content in lists.items():
            if sent.get(file) != content:
                self.write(f"{name}/{file.relative_to(folder).as_posix()}", content)
                sent[file] = content

    def _put(self, inner: Path, name: str, file: Path) -> None:
        target = self.at(f"{name}/{inner.as_posix()}")
        self.files.makedirs(target.rpartition("/")[0], exist_ok=True)
        self.files.put_file(str(file), target)


class Worker:
    """One ComfyUI; `run` takes jobs one after another."""

    def __init__(self, place: str, base: str, slot: int):
        launcher()
        self.place, self.base, self.name = Place(place), Path(base), f"{socket.gethostname()}/{slot}"
        self.output = Path(self.place.root) if self.place.is_folder else self.base / "output"
        self.server, self.converted = None, {}

    def start(self) -> dict:
        """The server, up; what went wrong if it is not."""
        comfy = launcher()
        if not comfy.inside_environment():
            python = comfy.venv_python()
            return {
                "error": f"on {socket.gethostname()} Ray runs in {sys.executable}; start it there in the launcher's environment, "
                f"with {python.with_name('ray')} start --address=HEAD:6379"
            }
        self.stop()
        try:
            models = comfy.tool("models").models_folder()
            shutil.rmtree(self.base / "temp", ignore_errors=True)
            self.server = comfy.Server(self.base, self.output, "--models-directory", str(models)).__enter__()
            self.object_info = self.server.get("/object_info")
            self.inputs = {file.name for file in (self.base / "input").iterdir()}
        except (SystemExit, OSError) as problem:
            self.server = None
            return {"error": str(problem)}
        return {"device": self.server.get("/system_stats")["devices"][0]["name"]}

    def stop(self) -> None:
        if self.server is not None:
            self.server.__exit__()
            self.server = None

    def run(self, job: dict) -> dict:
        """The row of a job that is done, or {"error", "log"}; `job` is what Job.order says."""
        comfy = launcher()
        if (self.server is None or self.server.process.poll() is not None) and "error" in (said := self.start()):
            return {**said, "lost": True}  # nothing that this job could help
        here, name, began = self.output / "worlds" / job["key"], f"worlds/{job['key']}", time.time()
        log_from = self.server.log_path.stat().st_size
        try:
            if not self.place.is_folder:
                shutil.rmtree(here, ignore_errors=True)
                self.place.fetch(name, here)
            row = {"key": job["key"], "status": "done", "resumed_chunks": saved_chunks(here)}
            with self.sent_meanwhile(here, name):
                comfy.run_prompt(self.server, self.prompt(job))
            (here / THUMBNAIL).write_bytes(thumbnail(here))
            row |= {"seconds": round(time.time() - began, 2), "ended": round(time.time(), 2), "worker": self.name}
            row |= {"memory_mib": round(self.memory() / 2**20), "files": sizes_of(here)}
            if not self.place.is_folder:
                self.place.send(here, name, {})
            return row
        except Exception as problem:  # of drivers of fsspec and of whatever a file holds: no job may end the others
            known = isinstance(problem, (comfy.WorkflowError, OSError, ValueError))
            return {"error": str(problem) if known else f"{type(problem).__name__}: {problem}", "log": self.log(log_from)}
        finally:
            self.tidy(here)

    @contextlib.contextmanager
    def sent_meanwhile(self, here: Path, name: str) -> Iterator[None]:
        """While a job runs, send every chunk that it has saved; and at its end, whatever that was."""
        if self.place.is_folder:
            yield
            return
        over, sent = threading.Event(), {}

        def send() -> None:
            while not over.wait(SENT_EVERY):
                with contextlib.suppress(Exception):  # whatever a driver of fsspec raises; what stays is raised at the end
                    self.place.send(here, name, sent, (".safetensors",))

        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self.place.send(here, name, sent, (".safetensors",))

    def prompt(self, job: dict) -> dict:
        """The job's workflow for this server: converted once, set, its files going to the job's folder."""
        prompts = launcher().prompts
        said = json.dumps(job["content"], sort_keys=True)
        if said not in self.converted:
            self.converted[said] = prompts.to_api_format(job["content"], self.object_info)
        prompt = copy.deepcopy(self.converted[said])
        with tempfile.TemporaryDirectory() as fetched:
            settings = settings_of(job, prompt, self.object_info, Path(fetched))
            prompts.apply_settings(prompt, settings, self.base / "input", self.object_info)
        redirect(prompt, f"worlds/{job['key']}", self.object_info)
        prompts.check(prompt, self.object_info)
        clear(self.output / "worlds" / job["key"])
        return prompt

    def memory(self) -> int:
        import psutil

        return psutil.Process(self.server.process.pid).memory_info().rss

    def log(self, begin: int) -> str:
        with self.server.log_path.open("rb") as file:
            file.seek(begin)
            return file.read().decode(errors="replace")

    def tidy(self, here: Path) -> None:
        """Nothing of a job stays on the worker: neither its input files nor, where they were sent elsewhere, what it made."""
        for file in (self.base / "input").iterdir():
            if file.name not in self.inputs and file.is_file():
                file.unlink()
        if not self.place.is_folder:
            shutil.rmtree(here, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------- of a job


def settings_of(job: dict, prompt: dict, object_info: dict, fetched: Path) -> list[str]:
    """What a job says, as NODE.INPUT=VALUE; its files are fetched where they have URLs."""
    settings = []
    if job["photo"]:
        settings.append(f"LoadImage.image=@{fetch(job['photo'], fetched)}")
    if job["path"].endswith(PATH_FILES):
        settings.append(f"Lyra2LoadTrajectory.file=@{fetch(job['path'], fetched)}")
    elif job["path"]:
        settings.append(f"Lyra2PresetTrajectory.preset={job['path']}")
    if job["prompt"]:
        settings += [f"{target}={job['prompt']}" for target in takers(prompt, object_info, "STRING", ("prompt",))]
    if job["seed"] is not None:
        settings += [f"{target}={job['seed']}" for target in takers(prompt, object_info, "INT", ("seed", "noise_seed"))]
    return [*settings, *job["settings"]]


def takers(prompt: dict, object_info: dict, kind: str, names: tuple[str, ...]) -> list[str]:
    """NODE.INPUT of every input so called; WorkflowError if the workflow has none."""
    input_specs, found = launcher().prompts.input_specs, []
    for key, node in prompt.items():
        specs = input_specs(object_info[node["class_type"]], node["inputs"]) if node["class_type"] in object_info else {}
        found += [f"{key}.{name}" for name in names if specs.get(name, [None])[0] == kind]
    if not found:
        raise launcher().WorkflowError(f"the job has a {names[0]}, but no node of its workflow takes one; say it as NODE.INPUT=VALUE")
    return found


def fetch(name: str, folder: Path) -> Path:
    """A local file of this path or URL."""
    if "://" not in name:
        return Path(name)
    import fsspec

    target = folder / name.rpartition("/")[2]
    with fsspec.open(name, "rb") as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink)
    return target


def redirect(prompt: dict, folder: str, object_info: dict) -> None:
    """All that the workflow writes goes to one folder of the output folder, and every world that it makes is saved there."""
    for key, node in prompt.items():
        kind, inputs = node["class_type"], node["inputs"]
        if "save_to" in (object_info.get(kind, {}).get("input", {}).get("required") or {}) and not inputs.get("save_to"):
            inputs["save_to"] = f"world_{key}"
        for name in ("filename_prefix", "save_to", *["folder"] * (kind in WRITE_FOLDERS)):
            if isinstance(inputs.get(name), str):
                inputs[name] = f"{folder}/{inputs[name].rpartition('/')[2].replace('_%photo%', '')}"


def clear(folder: Path) -> None:
    """Remove what an attempt that did not end has written beside its worlds: it will be written again."""
    for file in folder.iterdir() if folder.is_dir() else ():
        if file.is_file():
            file.unlink()


def saved_chunks(folder: Path) -> int:
    """How many chunks the worlds in a job's folder list, the photos not counted."""
    from lyra_core.world import world_files

    return sum(entry.parent is not None for file in folder.glob("*/world.json") for entry in world_files.read_manifest(file.parent).values())


def sizes_of(folder: Path) -> dict[str, int]:
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()}


def thumbnail(folder: Path) -> bytes:
    """A JPEG of where a job's walk ends: the last frame of its last world, else of its video, else its newest picture."""
    from PIL import Image

    picture = last_frame(folder)
    picture = picture.convert("RGB") if picture else Image.new("RGB", (TALL, TALL), "#222")
    picture.thumbnail((4 * TALL, TALL), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return file.getvalue()


def last_frame(folder: Path):
    from PIL import Image

    from lyra_core.world import world_files

    found = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != THUMBNAIL)
    if worlds := [file.parent for file in found if file.name == world_files.MANIFEST]:
        world = world_files.load(worlds[-1])
        return Image.fromarray(world.frame(len(world) - 1).numpy())
    if videos := [file for file in found if file.suffix in VIDEOS]:
        import av

        with av.open(str(videos[-1])) as video:
            (frame,) = deque(video.decode(video=0), maxlen=1)  # one at a time: all of a film would be gigabytes
            return frame.to_image()
    pictures = [file for file in found if file.suffix in PICTURES]
    return Image.open(max(pictures, key=lambda file: file.stat().st_mtime)) if pictures else None
