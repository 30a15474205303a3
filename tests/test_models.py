"""`comfy.py models`: lists what is needed, downloads one file when asked and its licence is accepted, and goes on later.

The hub is a local server that speaks its protocol to the real client; nothing here reaches the internet.
"""

from __future__ import annotations

import builtins
import dataclasses
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest
import torch
from safetensors.torch import load_file, save

from lyra_core import files

SHA = "0123456789abcdef0123456789abcdef01234567"
LARGE = 4096  # bytes from which a file is kept apart from its repository, as LFS
VAE = "split_files/vae/wan_2.1_vae.safetensors"
WAN = "Comfy-Org/Wan_2.1_ComfyUI_repackaged"
LYRA = "nvidia/Lyra-2.0"


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub(ThreadingHTTPServer):
    """Repositories of bytes; what a request got is in `served`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.served: list[SimpleNamespace] = []  # one per request, filled in by Answer
        self.token: str | None = None  # the only one that may download, if any
        self.hidden = False  # whether the repository itself is denied, too
        self.cut: int | None = None  # the next file's connection breaks after so many bytes
        self.stall = False  # or hangs there
        self.broken = False  # files can't be had
        self.ignores_ranges = False
        self.blob: str | None = None  # said to be git's SHA-1 of every file
        self.poisoned: dict[str, bytes] = {}  # what is sent of a file instead
        self.lies: str | None = None  # a checksum that is said to be that of every large file

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def transfers(self) -> list[SimpleNamespace]:
        return [answer for answer in self.served if answer.path.startswith("/cdn/")]

    def handle_error(self, request, client_address) -> None:
        pass  # a client that goes away is part of the tests


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def log_message(self, *_) -> None:
        pass

    def answer(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        self.served = SimpleNamespace(
            method=self.command,
            path=path,
            range=self.headers.get("Range"),
            authorization=self.headers.get("Authorization"),
            encoding=self.headers.get("Accept-Encoding"),
            status=None,
            sent=0,
        )
        hub.served.append(self.served)
        denied = hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}"
        if path.startswith("/api/models/"):
            repository = hub.repositories.get(path.removeprefix("/api/models/"))
            if denied and hub.hidden:
                return self.reply(401, b"", {"X-Error-Code": "RepoNotFound"})
            if repository is None:
                return self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})
            return self.reply(200, json.dumps(self.described(repository)).encode())
        if path.startswith("/cdn/"):
            return self.file(hub.repositories["/".join(path.split("/")[2:4])]["/".join(path.split("/")[4:])])
        repository, _, rest = path[1:].partition("/resolve/")
        revision, _, name = rest.partition("/")
        assert revision == SHA, "a file is taken of the version that was listed"
        if denied:
            status = 403 if self.headers.get("Authorization") else 401
            return self.reply(status, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
        content = hub.poisoned.get(name, hub.repositories[repository][name])
        if hub.broken:
            return self.reply(503, b"")
        if len(content) < LARGE:
            return self.reply(200, content, {"X-Repo-Commit": SHA, "ETag": '"small"'})
        # another host name, as the hub's CDN has: no token must reach it
        location = f"http://localhost:{hub.server_port}/cdn/{repository}/{name}"
        linked = {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        self.reply(302, b"", {"Location": location, "X-Repo-Commit": SHA, **linked})

    def described(self, repository: dict[str, bytes]) -> dict:
        def sibling(name: str, content: bytes) -> dict:
            said = self.server.blob
            found = {"rfilename": name, "size": len(content), "blobId": git_sha1(content) if said is None else said}
            if len(content) >= LARGE:
                checksum = self.server.lies or hashlib.sha256(content).hexdigest()
                found["lfs"] = {"sha256": checksum, "size": len(content), "pointerSize": 134}
            return found

        siblings = [sibling(name, content) for name, content in repository.items()]
        return {"id": "x/y", "modelId": "x/y", "sha": SHA, "private": False, "tags": [], "siblings": siblings}

    def file(self, content: bytes) -> None:
        hub, start, status = self.server, 0, 200
        if self.headers.get("Range") and not hub.ignores_ranges:
            start, status = int(self.headers["Range"].removeprefix("bytes=").rstrip("-")), 206
        headers = {"ETag": '"large"', "Accept-Ranges": "bytes"}
        if status == 206:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        cut, hub.cut = hub.cut, None
        self.reply(status, content[start:], headers, cut)

    def reply(self, status: int, body: bytes, headers: dict | None = None, cut: int | None = None) -> None:
        self.served.status = status
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
            self.wfile.flush()
            self.served.sent = len(body[:cut])
        if cut is not None:
            if self.server.stall:
                threading.Event().wait(20)
            self.server.broken = not self.server.stall
            self.close_connection = True


@pytest.fixture(scope="module")
def models(project):
    """tools/models.py as a module."""
    sys.path.insert(0, str(project / "tools"))
    try:
        spec = importlib.util.spec_from_file_location("lyra_models", project / "tools" / "models.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["lyra_models"] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(project / "tools"))
    return module


@pytest.fixture
def hub():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def machine(tmp_path, hub, monkeypatch) -> Path:
    """A ComfyUI with a models folder and a launcher that knows only the local hub; returns the models folder."""
    import huggingface_hub.constants

    comfyui = tmp_path / "ComfyUI"
    (comfyui / "models").mkdir(parents=True)
    (comfyui / "main.py").touch()
    for name, value in environment(tmp_path, hub).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(builtins, "input", never_asked)
    free(monkeypatch, 10**15)
    return comfyui / "models"


def environment(tmp_path: Path, hub: Hub) -> dict[str, str]:
    return {
        "COMFYUI_PATH": str(tmp_path / "ComfyUI"),
        "LYRA2_HOME": str(tmp_path / "home"),
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def never_asked(*_) -> str:
    raise AssertionError("nobody was to be asked")


def free(monkeypatch, count: int) -> None:
    """So many bytes are free on every disk."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=count))


def bytes_of(count: int, seed: int = 0) -> bytes:
    return bytes(
        torch.randint(256, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8).tolist()
    )


@pytest.fixture
def vae(hub) -> bytes:
    """What the hub has for wan-vae."""
    hub.repositories[WAN] = {"README.md": b"hello", VAE: bytes_of(20_000), VAE + ".json": b"{}"}
    return hub.repositories[WAN][VAE]


def lines_of(text: str) -> dict[str, str]:
    return {line.split()[0]: line for line in text.splitlines() if line}


# ----------------------------------------------------------------------------------------------------------- the table


def test_every_entry_names_a_folder_of_the_host_and_a_licence(models, comfy_host):
    import folder_paths

    for model in models.MODELS:
        assert model.folder in folder_paths.folder_names_and_paths, model.name
        assert Path(model.target).suffix in folder_paths.folder_names_and_paths[model.folder][1]
        assert model.licence in models.LICENCES
    assert len({model.name for model in models.MODELS}) == len(models.MODELS)
    assert len({(model.folder, model.target) for model in models.MODELS}) == len(models.MODELS)


def test_the_folders_that_are_searched_are_the_hosts(models, comfy_host, machine):
    import folder_paths

    for folder in {model.folder for model in models.MODELS}:
        ours = {path.name for path in models.search_folders(folder)}
        assert ours == {Path(path).name for path in folder_paths.folder_names_and_paths[folder][0]}


def test_what_is_nvidias_is_research_only_and_has_to_be_converted_or_renamed(models):
    for model in models.MODELS:
        assert (model.licence == "nvidia") == (model.repo == LYRA)
        assert ("not verified" in model.note) == (model.repo == LYRA or model.repo.startswith("depth-anything/"))
    assert "not commercially" in models.LICENCES["nvidia"].allows
    assert all(licence.url.startswith("https://") for licence in models.LICENCES.values())


def test_the_transformers_size_is_that_of_its_weights(models, comfy_host, tiny_models):
    from lyra_core.models import lyra2_host

    shapes = lyra2_host.weight_shapes(tiny_models.LYRA2_14B)
    assert models.find("lyra2").size == 2 * sum(torch.Size(shape).numel() for shape in shapes.values())


def test_every_url_that_the_hosts_templates_also_have_is_theirs(models):
    templates = pytest.importorskip("comfyui_workflow_templates_json")
    theirs = {}
    for file in Path(templates.__file__).parent.rglob("*.json"):
        collect(json.loads(file.read_text(encoding="utf-8")), theirs)
    entries = models.template_entries([model.name for model in models.MODELS])
    known = [entry for entry in entries if (entry["directory"], entry["name"]) in theirs]
    assert len(known) >= 8
    for entry in known:
        assert entry["url"] in theirs[entry["directory"], entry["name"]]


def collect(value, found: dict) -> None:
    """Every {name, url, directory} in a JSON value."""
    if isinstance(value, dict):
        if {"name", "url", "directory"} <= value.keys():
            found.setdefault((value["directory"], value["name"]), set()).add(value["url"])
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            collect(item, found)


def test_the_missing_model_dialog_gets_only_files_that_work_as_they_are(models):
    entries = models.template_entries(["wan-vae", "lyra2", "lyra2-dmd", "lyra2-reconstruction", "moge"])
    assert entries == [
        {
            "name": "wan_2.1_vae.safetensors",
            "url": f"https://huggingface.co/{WAN}/resolve/main/{VAE}",
            "directory": "vae",
        },
        {
            "name": "moge_2_vitl_normal_fp16.safetensors",
            "url": "https://huggingface.co/Comfy-Org/MoGe/resolve/main/geometry_estimation/"
            "moge_2_vitl_normal_fp16.safetensors",
            "directory": "geometry_estimation",
        },
    ]
    with pytest.raises(models.Refused, match="no model 'vae'"):
        models.template_entries(["vae"])


def test_a_file_that_keeps_its_name_but_has_to_be_converted_is_not_for_the_dialog(models, monkeypatch):
    monkeypatch.setattr(models, "MODELS", [dataclasses.replace(models.find("wan-vae"), convert=True)])
    assert models.template_entries(["wan-vae"]) == []


# --------------------------------------------------------------------------------------------------------- the listing


def test_the_list_says_what_is_there_without_asking_the_hub(models, machine, hub, capsys):
    there = {
        "vae/wan_2.1_vae.safetensors": "wan-vae",
        "clip/umt5_xxl_fp16.safetensors": "umt5-fp16",
        "unet/some/where/lyra2.safetensors": "lyra2",
    }
    for path in there:
        (machine / path).parent.mkdir(parents=True)
        (machine / path).touch()
    (machine / "vae" / "clip_vision_h.safetensors").touch()  # the wrong folder
    (machine / "geometry_estimation").mkdir()
    (machine / "geometry_estimation" / "moge_2_vitl_normal_fp16.safetensors.0123.part").touch()
    (machine.parent.parent / "home" / "downloads" / "lyra2-dmd").mkdir(parents=True)
    assert models.main([]) == 0
    lines = lines_of(capsys.readouterr().out)
    states = {model.name: lines[model.name].split()[1] for model in models.MODELS}
    assert {name for name, state in states.items() if state == "there"} == set(there.values())
    assert {name for name, state in states.items() if state == "begun"} == {"moge", "lyra2-dmd"}
    assert set(states.values()) == {"there", "begun", "missing"}
    for model in models.MODELS:
        for told in (f"{model.folder}/{model.target}", model.purpose, models.LICENCES[model.licence].short):
            assert told in lines[model.name]
    assert "6.7 GB" in lines["umt5-fp8"] and "253.8 MB" in lines["wan-vae"]
    assert "size asked at download" in lines["lyra2-dmd"]
    assert str(machine) in lines["Model"]
    assert not hub.served


def test_folders_of_extra_model_paths_count(models, machine, tmp_path, capsys):
    shared = tmp_path / "shared"
    for path in (
        "VAE/wan_2.1_vae.safetensors",
        "clip/umt5_xxl_fp16.safetensors",
        "t5/umt5_xxl_fp8_e4m3fn_scaled.safetensors",
    ):
        (shared / path).parent.mkdir(parents=True)
        (shared / path).touch()
    config = f"empty:\nother:\n  base_path: {shared}\n  is_default: true\n  vae: VAE\n  clip: |\n    clip\n    t5\n"
    (machine.parent / "extra_model_paths.yaml").write_text(config)
    assert models.installed(models.find("wan-vae")) == shared / "VAE" / "wan_2.1_vae.safetensors"
    assert models.state(models.find("umt5-fp16")) == models.state(models.find("umt5-fp8")) == "there"
    assert models.state(models.find("lyra2")) == "missing"


def test_a_linked_folder_counts_as_with_the_host(models, machine, tmp_path):
    (tmp_path / "disk" / "wan").mkdir(parents=True)
    (tmp_path / "disk" / "wan" / "wan_2.1_vae.safetensors").touch()
    (machine / "vae").mkdir()
    try:
        (machine / "vae" / "linked").symlink_to(tmp_path / "disk", target_is_directory=True)
    except OSError:
        pytest.skip("this system makes no links")
    assert models.state(models.find("wan-vae")) == "there"


def test_without_a_models_folder_of_the_host_the_launchers_own_is_used(models, machine, tmp_path):
    machine.rmdir()
    assert models.models_folder() == tmp_path / "home" / "base" / "models"


def test_an_unknown_name_is_refused_with_all_names(models, machine, hub, capsys):
    assert models.main(["--get", "lyra3", "--accept-licence"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error:") and all(model.name in told for model in models.MODELS)
    assert not hub.served


# ----------------------------------------------------------------------------------------------------------- licences


@pytest.mark.parametrize("typed", ["", "no", "y", EOFError()])
def test_nothing_is_downloaded_before_the_licence_is_accepted(typed, models, machine, hub, vae, capsys, monkeypatch):
    def answer(_prompt: str) -> str:
        if isinstance(typed, Exception):
            raise typed
        return typed

    monkeypatch.setattr(builtins, "input", answer)
    assert models.main(["--get", "wan-vae"]) == 1
    told = capsys.readouterr()
    licence = models.LICENCES["apache"]
    assert licence.title in told.out and licence.allows in told.out and licence.url in told.out
    assert "not accepted" in told.err
    assert not hub.served and not any(machine.iterdir())


@pytest.mark.parametrize("typed", ["yes", " YES "])
def test_typing_yes_accepts(typed, models, machine, vae, monkeypatch):
    monkeypatch.setattr(builtins, "input", lambda _prompt: typed)
    assert models.main(["--get", "wan-vae"]) == 0
    assert (machine / "vae" / "wan_2.1_vae.safetensors").read_bytes() == vae


# ----------------------------------------------------------------------------------------------------------- downloads


def test_the_file_lies_in_the_hosts_folder_byte_by_byte(models, machine, hub, vae, capsys):
    assert models.main(["--get", "wan-vae", "--accept-licence"]) == 0
    folder = machine / "vae"
    assert [file.name for file in folder.iterdir()] == ["wan_2.1_vae.safetensors"]
    assert (folder / "wan_2.1_vae.safetensors").read_bytes() == vae
    (transfer,) = hub.transfers()
    assert (transfer.range, transfer.encoding) == (None, "identity")
    told = capsys.readouterr().out
    assert models.LICENCES["apache"].url in told and str(folder / "wan_2.1_vae.safetensors") in told
    assert sorted(path.name for path in machine.iterdir()) == ["vae"]


def test_a_file_is_on_the_disk_before_it_gets_its_name_and_no_bar_but_ours_is_shown(models, machine, vae, monkeypatch):
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars

    enable_progress_bars()
    events, fsync, move = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (events.append("sync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append("name"), move(old, new)))
    assert models.main(["--get", "wan-vae", "--accept-licence"]) == 0
    assert events == ["sync", "name"] and are_progress_bars_disabled()


def test_small_files_come_without_a_detour(models, machine, hub, capsys):
    hub.repositories[WAN] = {VAE: b"small"}
    assert models.main(["--get", "wan-vae", "--accept-licence"]) == 0
    assert (machine / "vae" / "wan_2.1_vae.safetensors").read_bytes() == b"small"


def test_what_is_there_is_not_downloaded_again(models, machine, hub, vae, capsys):
    (machine / "vae" / "mine").mkdir(parents=True)
    (machine / "vae" / "mine" / "wan_2.1_vae.safetensors").write_bytes(b"mine")
    assert models.main(["--get", "wan-vae"]) == 0
    assert "there already" in capsys.readouterr().out
    assert not hub.served and not (machine / "vae" / "wan_2.1_vae.safetensors").exists()


def test_a_second_run_goes_on_where_the_connection_broke(models, machine, hub, vae, capsys):
    hub.cut = 12_345
    assert models.main(["--get", "wan-vae", "--accept-licence"]) == 1
    assert "goes on from there" in capsys.readouterr().err
    assert not (machine / "vae" / "wan_2.1_vae.safetensors").exists()
    (part,) = (machine / "vae").glob("*.part")
    kept = part.stat().st_size
    assert 11_000 <= kept <= 12_345 and part.read_bytes() == vae[:kept]

    hub.broken, hub.served[:] = False, []
    assert models.state(models.find("wan-vae")) == "begun"
    assert models.main(["--get", "wan-vae", "--accept-licence"]) == 0
    (again,) = hub.transfers()
    assert (again.range, again.status, again.sent) == (f"bytes={kept}-", 206, len(vae) - kept)
    assert (machine / "vae" / "wan_2.1_vae.safetensors").read_bytes() == vae
    assert not list((machine / "vae").glob("*.part"))


def begun(models, machine: Path, content: bytes, version: bytes) -> Path:
    """A part that an earlier run left of a file that was `version` then."""
    (machine / "vae").mkdir(exist_ok=True)
    part = machine / "vae" / f"wan_2.1_vae.safetensors.{git_sha1(version)[:12]}.part"
    part.write_bytes(content)
    return part


def test_a_server_that_ignores_ranges_gives_the_whole_file(models, machine, hub, vae):
    begun(models, machine, b"?" * 7000, vae)
    hub.ignores_ranges = True
    assert models.main(["--get", "wan-vae", "--accept-licence"]) == 0
    assert (machine / "vae" / "wan_2.1_vae.safetensors").read_bytes() == vae


def test_a_part_of_an_older_version_is_not_continued(models, machine, hub, vae):
    old = begun(models, machine, b"?" * 7000, b"older")
    assert models.main(["--get", "wan-vae", "--accept-licence"]) == 0
    assert hub.transfers()[0].range is None and not old.exists()
    assert (machine / "vae" / "wan_2.1_vae.safetensors").read_bytes() == vae


def test_a_part_that_is_too_long_starts_again(models, machine, hub, vae):
    begun(models, machine, b"?" * 30_000, vae)
    assert models.main(["--get", "wan-vae", "--accept-licence"]) == 0
    assert (machine / "vae" / "wan_2.1_vae.safetensors").read_bytes() == vae


def test_a_complete_part_only_gets_its_name(models, machine, hub, vae):
    begun(models, machine, vae, vae)
    assert models.main(["--get", "wan-vae", "--accept-licence"]) == 0
    assert not hub.transfers()
    assert (machine / "vae" / "wan_2.1_vae.safetensors").read_bytes() == vae


def test_a_wrong_checksum_is_noticed_and_the_next_run_starts_again(models, machine, hub, vae, capsys):
    begun(models, machine, b"?" * 7000, vae)
    assert models.main(["--get", "wan-vae", "--accept-licence"]) == 1
    assert "checksum" in capsys.readouterr().err
    assert not list((machine / "vae").iterdir())
    assert models.main(["--get", "wan-vae", "--accept-licence"]) == 0
    assert (machine / "vae" / "wan_2.1_vae.safetensors").read_bytes() == vae


def test_progress_counts_what_was_there_and_ends_at_the_whole(models, machine, hub, monkeypatch):
    names = [f"checkpoints/model/{name}" for name in "ab"]
    contents = [bytes_of(3_000_000), bytes_of(2_000_000, 1)]
    hub.repositories[LYRA] = dict(zip(names, contents, strict=True))
    seen = []
    monkeypatch.setattr(models.launcher(), "progress_bar", lambda node, done, total: seen.append((done, total)))
    monkeypatch.setattr(models.launcher(), "convert", lambda source, target: target.parent.mkdir() or target.touch())
    assert models.main(["--get", "lyra2", "--accept-licence"]) == 0
    assert {total for _, total in seen} == {5}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert {done for done, _ in seen} == {0, 1, 2, 3, 4, 5}


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT")
def test_ctrl_c_leaves_what_the_next_run_needs(project, machine, tmp_path, hub):
    content = bytes_of(1 << 20) * 24
    hub.repositories[WAN] = {VAE: content}
    hub.cut, hub.stall = 15 << 20, True
    command = [sys.executable, str(project / "tools" / "models.py"), "--get", "wan-vae", "--accept-licence"]
    variables = {**os.environ, **environment(tmp_path, hub), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not any(p.stat().st_size for p in (machine / "vae").glob("*.part")):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=20)
    assert process.returncode == 130 and "goes on from here" in told and "Traceback" not in told
    (part,) = (machine / "vae").glob("*.part")
    kept = part.stat().st_size
    assert kept and not (machine / "vae" / "wan_2.1_vae.safetensors").exists()
    hub.served.clear()
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    assert sum(answer.sent for answer in hub.transfers()) == len(content) - kept
    assert (machine / "vae" / "wan_2.1_vae.safetensors").read_bytes() == content
    assert not done.stderr  # no bar but ours


def test_a_second_ctrl_c_does_not_disturb_the_first(models, machine, vae, monkeypatch, capsys):
    def interrupted(*_args) -> None:
        raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(models, "download", interrupted)
    try:
        assert models.main(["--get", "wan-vae", "--accept-licence"]) == 130
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, handler)
    assert "the same command goes on from here" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("token, status", [(None, 401), ("wrong", 403)])
def test_a_gated_repository_says_what_to_do(token, status, hidden, models, machine, hub, vae, capsys, monkeypatch):
    hub.token, hub.hidden = "right", hidden
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    assert models.main(["--get", "wan-vae", "--accept-licence"]) == 1
    told = capsys.readouterr().err
    assert f"{hub.url}/{WAN}" in told and "Accept the terms" in told and "auth login" in told and "HF_TOKEN" in told
    assert ("(401)" if hidden else f"({status})") in told
    assert not (machine / "vae" / "wan_2.1_vae.safetensors").exists()


def test_the_token_opens_a_gated_repository_and_reaches_only_the_hub(models, machine, hub, vae, monkeypatch):
    hub.token, hub.hidden = "right", True
    monkeypatch.setenv("HF_TOKEN", "right")
    assert models.main(["--get", "wan-vae", "--accept-licence"]) == 0
    assert (machine / "vae" / "wan_2.1_vae.safetensors").read_bytes() == vae
    assert [answer.authorization for answer in hub.transfers()] == [None]


def test_a_repository_that_does_not_exist_is_named(models, machine, hub, capsys):
    assert models.main(["--get", "wan-vae", "--accept-licence"]) == 1
    assert f"{hub.url}/{WAN} does not exist (404)" in capsys.readouterr().err


@pytest.mark.parametrize("names", [["elsewhere/wan_2.1_vae.safetensors"], []])
def test_a_reorganised_repository_lists_what_it_has(names, models, machine, hub, capsys):
    hub.repositories[WAN] = {name: b"x" for name in names}
    assert models.main(["--get", "wan-vae", "--accept-licence"]) == 1
    told = capsys.readouterr().err
    assert f"has no {VAE}" in told and all(name in told for name in names)


@pytest.mark.parametrize(
    "name",
    ["../../../../evil", "a/../../evil", "..\\..\\evil", "C:evil", "C:/evil", "/evil", "a//evil", "./evil", "a/. /evil", "evil\0"]
    + ["a\nevil", "...", "evil:stream"],
)
def test_names_that_leave_the_folder_on_any_system_are_refused(models, machine, hub, capsys, name):
    hub.repositories[LYRA] = {f"checkpoints/model/{name}": b"x"}
    assert models.main(["--get", "lyra2", "--accept-licence"]) == 1
    assert "would lie elsewhere" in capsys.readouterr().err
    assert len(hub.served) == 1 and not models.download_folder(models.find("lyra2")).exists()


def test_names_as_repositories_have_them_stay_inside():
    names = ("model.safetensors", "checkpoints/model/.metadata", "a/__0_0.distcp", "..a/b..", "Größe 1/x (2).bin")
    assert all(map(files.stays_inside, names))


def test_a_poisoned_small_file_of_the_right_size_is_not_taken(models, machine, hub, capsys):
    hub.repositories[WAN] = {VAE: b"small"}
    hub.poisoned[VAE] = b"sm4ll"
    assert models.main(["--get", "wan-vae", "--accept-licence"]) == 1
    assert "checksum" in capsys.readouterr().err and not list((machine / "vae").iterdir())
    hub.poisoned.clear()
    assert models.main(["--get", "wan-vae", "--accept-licence"]) == 0
    assert (machine / "vae" / "wan_2.1_vae.safetensors").read_bytes() == b"small"


@pytest.mark.parametrize("blob", ["", "../../../../evil", "0123456789abcdef" * 4, "G" * 40])
def test_a_hub_that_gives_no_checksum_is_not_downloaded_from(models, machine, hub, vae, capsys, blob):
    hub.blob = blob
    assert models.main(["--get", "wan-vae", "--accept-licence"]) == 1
    assert "neither size nor SHA-1" in capsys.readouterr().err
    assert not hub.transfers() and not (machine / "vae").exists()


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
@pytest.mark.parametrize("kind", ["symbolic", "dangling", "hard", "folder"])
def test_a_link_in_the_place_of_a_part_is_not_written_through(models, machine, hub, vae, capsys, tmp_path, kind):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    part = begun(models, machine, b"", vae)
    part.unlink()
    if kind == "folder":
        part.mkdir()
    elif kind == "hard":
        os.link(victim, part)
    else:
        part.symlink_to(victim if kind == "symbolic" else tmp_path / "nowhere")
    assert models.main(["--get", "wan-vae", "--accept-licence"]) == 1
    assert part.name in capsys.readouterr().err and not hub.transfers()
    assert victim.read_bytes() == b"precious" and not (tmp_path / "nowhere").exists()


def test_a_hub_out_of_reach_is_one_line_and_no_traceback(models, machine, capsys, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert models.main(["--get", "wan-vae", "--accept-licence"]) == 1
    assert capsys.readouterr().err.startswith(f"error: http://127.0.0.1:9/{WAN}: ")


def test_a_file_that_the_hub_gives_only_to_xet_is_one_line_and_no_traceback(models, machine, vae, capsys, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "MAX_HTTP_DOWNLOAD_SIZE", 1000)
    assert models.main(["--get", "wan-vae", "--accept-licence"]) == 1
    assert "too large" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_one_line_and_no_traceback(models, machine, hub, vae, capsys):
    (machine / "vae").touch()
    assert models.main(["--get", "wan-vae", "--accept-licence"]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_a_full_disk_is_said_before_anything_is_downloaded(models, machine, hub, vae, capsys, monkeypatch):
    free(monkeypatch, len(vae) - 1)
    assert models.main(["--get", "wan-vae", "--accept-licence"]) == 1
    told = capsys.readouterr().err
    assert "needs 0.0 MB more" in told and "free" in told and not hub.transfers()
    assert models.state(models.find("wan-vae")) == "missing"
    free(monkeypatch, len(vae))
    assert models.main(["--get", "wan-vae", "--accept-licence"]) == 0


def test_what_has_arrived_needs_no_room_again(models, machine, hub, vae, monkeypatch):
    begun(models, machine, vae[:15_000], vae)
    free(monkeypatch, 5000)
    assert models.main(["--get", "wan-vae", "--accept-licence"]) == 0


def test_a_conversion_needs_room_for_both_files(models, machine, hub, capsys, monkeypatch):
    hub.repositories[LYRA] = {models.find("lyra2-dmd").source: bytes_of(20_000)}
    free(monkeypatch, 39_999)
    assert models.main(["--get", "lyra2-dmd", "--accept-licence"]) == 1
    assert not hub.transfers() and models.state(models.find("lyra2-dmd")) == "missing"
    assert "needs" in capsys.readouterr().err
    (machine / "loras").mkdir()
    (machine / "loras" / "lyra2_dmd_distillation.safetensors.part").write_bytes(b"x")  # of an interrupted conversion
    models.main(["--get", "lyra2-dmd", "--accept-licence"])
    assert hub.transfers()


# ---------------------------------------------------------------------------------------------------------- conversion


@pytest.fixture(scope="module")
def released(tiny_models, comfy_host, tmp_path_factory) -> tuple[dict[str, bytes], dict[str, torch.Tensor]]:
    """A tiny transformer as the hub would have it, a torch DCP folder, and its weights."""
    import torch.distributed.checkpoint as dcp

    from lyra_core.models import lyra2_host

    folder = tmp_path_factory.mktemp("released")
    weights = dict(tiny_models.random_weights(lyra2_host.weight_shapes(tiny_models.TINY), 0))
    stored = {**weights, lyra2_host.CONFIG_KEY: lyra2_host.pack_config(tiny_models.TINY)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.save({f"net.{name}": value for name, value in stored.items()}, checkpoint_id=folder / "model", no_dist=True)
    files = {f"checkpoints/model/{p.relative_to(folder)}": p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert len(files) > 1
    return files, weights


def test_the_released_transformer_becomes_a_file_that_the_stock_loader_takes(
    released, models, machine, hub, tmp_path, capsys
):
    import comfy.sd

    from lyra_core.models import lyra2_host

    files, weights = released
    hub.repositories[LYRA] = {**files, "checkpoints/vae/vae.pth": bytes_of(9000), "checkpoints/modelcard.txt": b"x"}
    assert models.main(["--get", "lyra2", "--accept-licence"]) == 0
    told = capsys.readouterr().out
    assert models.LICENCES["nvidia"].title in told and "every tensor compared" in told
    target = machine / "diffusion_models" / "lyra2.safetensors"
    loaded = comfy.sd.load_diffusion_model(str(target), {"dtype": torch.bfloat16}).model
    assert isinstance(loaded, lyra2_host.Lyra2Base)
    found = loaded.diffusion_model.state_dict()
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(found[name].flatten().bfloat16(), weight.flatten().bfloat16()), name
    assert not any("vae" in answer.path or "card" in answer.path for answer in hub.served)
    assert not (tmp_path / "home" / "downloads" / "lyra2").exists()
    assert models.state(models.find("lyra2")) == "there"


def test_a_broken_download_of_several_files_fetches_only_what_is_missing(released, models, machine, hub, tmp_path):
    files, _ = released
    hub.repositories[LYRA] = {"checkpoints/model/model/zz.distcp": bytes_of(50_000), **files}
    hub.cut = 20_500  # the first one's
    assert models.main(["--get", "lyra2", "--accept-licence"]) == 1
    assert not any(machine.iterdir())
    hub.broken, hub.served[:] = False, []
    assert models.main(["--get", "lyra2", "--accept-licence", "--keep-download"]) == 0
    kept = tmp_path / "home" / "downloads" / "lyra2"
    for name, content in hub.repositories[LYRA].items():
        assert (kept / name).read_bytes() == content
    assert hub.transfers()[0].range == "bytes=20000-"
    (machine / "diffusion_models" / "lyra2.safetensors").unlink()
    hub.served.clear()
    assert models.main(["--get", "lyra2", "--accept-licence"]) == 0
    assert not hub.transfers()


LORA = {"A": (4, 1536), "B": (5120, 4)}


def test_a_lora_gets_the_keys_of_the_hosts_loaders(models, machine, hub, tmp_path):
    tensors = {f"net.blocks.0.cam_encoder.lora_{part}.weight": torch.randn(*shape) for part, shape in LORA.items()}
    hub.repositories[LYRA] = {models.find("lyra2-dmd").source: save(tensors)}
    assert models.main(["--get", "lyra2-dmd", "--accept-licence"]) == 0
    found = load_file(machine / "loras" / "lyra2_dmd_distillation.safetensors")
    assert sorted(found) == [f"diffusion_model.blocks.0.cam_encoder.lora_{part}.weight" for part in LORA]
    assert all(torch.equal(found[name.replace("net.", "diffusion_model.")], tensor) for name, tensor in tensors.items())


def test_a_conversion_that_fails_keeps_the_download(models, machine, hub, tmp_path, capsys, monkeypatch):
    source = models.find("lyra2-dmd").source
    hub.repositories[LYRA] = {source: save({"something.else": torch.zeros(1)})}
    assert models.main(["--get", "lyra2-dmd", "--accept-licence"]) == 1
    kept = tmp_path / "home" / "downloads" / "lyra2-dmd"
    assert str(kept) in capsys.readouterr().err and (kept / source).is_file()
    assert not list(machine.rglob("*.safetensors"))
    assert models.state(models.find("lyra2-dmd")) == "begun"
    free(monkeypatch, len(hub.repositories[LYRA][source]))  # for the converted file alone
    hub.served.clear()
    assert models.main(["--get", "lyra2-dmd", "--accept-licence"]) == 1
    assert "needs" not in capsys.readouterr().err and not hub.transfers()


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_launcher_has_the_command(launcher, monkeypatch):
    called = []
    monkeypatch.setattr(launcher, "inside_environment", lambda: True)
    monkeypatch.setattr(launcher, "run_models", lambda arguments: called.append(arguments) or 0)
    assert launcher.main(["models", "--get", "wan-vae", "--accept-licence"]) == 0
    assert launcher.main(["models"]) == 0
    assert called == [["--get", "wan-vae", "--accept-licence"], []]
    assert "comfy.py models" in launcher.__doc__
