"""The pack inside the real ComfyUI: started as a server, driven over HTTP, killed and started again."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.error
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import servers
import torch
from PIL import Image
from plyfile import PlyData

from lyra_core.cameras import camera_files
from lyra_core.cameras.camera import pinhole
from lyra_core.world import world_files

NODES = {
    "Lyra2PresetTrajectory",
    "Lyra2ZoomTrajectory",
    "Lyra2LoadTrajectory",
    "Lyra2SaveTrajectory",
    "Lyra2EditTrajectory",
    "Lyra2DrawTrajectory",
    "Lyra2CamerasFromLoad3D",
    "Lyra2CamerasToLoad3D",
    "Lyra2Depth",
    "Lyra2LoadDepth",
    "Lyra2Photos",
    "Lyra2PickFrames",
    "Lyra2LoadCapture",
    "Lyra2Panorama",
    "Lyra2SplatViews",
    "Lyra2BeginWorld",
    "Lyra2RetrieveHistory",
    "Lyra2PreviewChunks",
    "Lyra2SaveWorld",
    "Lyra2LoadWorld",
    "Lyra2RewindWorld",
    "Lyra2WorldFrames",
    "Lyra2WorldVideo",
    "Lyra2Consistency",
    "Lyra2WorldGaussians",
    "Lyra2RenderSplat",
    "Lyra2WorldMesh",
    "Lyra2LoadReconstructor",
    "Lyra2Reconstruct",
    "Lyra2PruneSplat",
    "Lyra2OptimizeSplat",
    "Lyra2Planner",
    "Lyra2Sigmas",
    "Lyra2UniPC",
    "Lyra2ConvertCheckpoint",
    "Lyra2DA3Estimator",
    "Lyra2MoGeEstimator",
    "Lyra2MemoryEstimator",
    "Lyra2CaptionPrompt",
    "Lyra2FramePack",
    "Lyra2ChunkConditioning",
    "Lyra2Noise",
    "Lyra2SampleChunk",
    "Lyra2AppendChunk",
    "Lyra2Explore",
    "Lyra2ExploreChunk",
    "Lyra2ExportWorld",
    "Lyra2Explorer",
    "Lyra2AppendFrames",
    "Lyra2ControlViews",
    "Lyra2ExpertSigmas",
    "Lyra2LeftoverNoise",
    "Lyra2SampleVace",
    "Lyra2TrainLoRA",
    "Lyra2TrainingSet",
    "Lyra2TrustKnown",
    "Lyra2VaceConditioning",
}
CASES = Path(__file__).parent / "cases"
SMALL = ["ImageScale.width=96", "ImageScale.height=64"]


def picture(file: Path, size: tuple[int, int] = (130, 90), mode: str = "RGB") -> Path:
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    channels = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
    pixels = np.stack([x, y, (x * 3) % 255, 255 - x][:channels], -1).astype(np.uint8)
    Image.fromarray(pixels.squeeze()).save(file)
    return file


def trajectory(file: Path, frames: int, step: float = 0.03) -> Path:
    cameras = pinhole((64, 96), 80.0, frames)
    cameras.w2c[:, 2, 3] = -step * torch.arange(frames)
    camera_files.save_npz(file, cameras)
    return file


@pytest.fixture(scope="module")
def writers(launcher):
    """tests/writers.py as a module."""
    file = Path(__file__).parent / "writers.py"
    spec = importlib.util.spec_from_file_location("lyra_writers", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("host")


# A node whose output may be linked to any input and holds any value, as those of other packs.
ANYTHING = """
VALUES = {"none": None, "true": True, "text": "7", "nan": float("nan"), "infinity": float("inf"), "list": [5], "half": 0.5}
class Anything:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"value": ("STRING", {}), "kind": (["number", *VALUES], {})}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("*",), "run", "tests"
    def run(self, value, kind):
        return (int(value) if kind == "number" else VALUES[kind],)
NODE_CLASS_MAPPINGS = {"TestAnything": Anything}
"""


@pytest.fixture(scope="module")
def server(launcher, folder):
    (folder / "base" / "custom_nodes").mkdir(parents=True)
    (folder / "base" / "custom_nodes" / "anything.py").write_text(ANYTHING)
    with launcher.Server(folder / "base", folder / "output") as running:
        yield running


@pytest.fixture
def prompt_of(launcher, server, project):
    """The API prompt of a shipped workflow with some widgets set."""

    def build(name: str, *settings: str) -> dict:
        object_info = servers.object_info(server)
        prompt = launcher.to_api_format(json.loads((project / "workflows" / name).read_text()), object_info)
        launcher.apply_settings(prompt, list(settings), server.base / "input", object_info)
        return prompt

    return build


@pytest.fixture
def custom(prompt_of, folder):
    """The custom-trajectory workflow, small: 24 new frames in chunks of 8."""

    def build(*settings: str, frames: int = 25) -> dict:
        return prompt_of(
            "custom_trajectory.json",
            *SMALL,
            f"LoadImage.image=@{picture(folder / 'photo.png')}",
            f"Lyra2LoadTrajectory.file=@{trajectory(folder / 'path.npz', frames)}",
            f"Lyra2LoadTrajectory.frames={frames}",
            "Lyra2LoadTrajectory.width=96",
            "Lyra2LoadTrajectory.height=64",
            "Lyra2LoadTrajectory.pose_scale=1.0",
            "Lyra2PreviewChunks.chunk_frames=8",
            *settings,
        )

    return build


def test_the_host_lists_exactly_our_nodes(server):
    info = server.get("/object_info")
    ours = {name for name, node in info.items() if node["python_module"].startswith("custom_nodes.ComfyUI-LyraWorlds")}
    assert ours == NODES


def test_every_input_has_a_tooltip_or_speaks_for_itself(server):
    info = server.get("/object_info")
    obvious = ("LYRA2_WORLD", "LYRA2_CAMERAS", "LYRA2_DEPTH", "IMAGE", "SPLAT")
    silent = [
        f"{node}.{name}"
        for node in NODES
        for group in ("required", "optional")
        for name, spec in info[node]["input"].get(group, {}).items()
        if spec[0] not in obvious and not (len(spec) > 1 and spec[1].get("tooltip"))
    ]
    assert not silent


def test_every_workflow_and_its_thumbnail_is_offered_as_a_template(server, project):
    offered = server.get("/api/workflow_templates")["ComfyUI-LyraWorlds"]
    assert sorted(offered) == sorted(file.stem for file in (project / "workflows").glob("*.json"))
    assert all((project / "workflows" / f"{name}.jpg").stat().st_size > 5000 for name in offered)


def run_command(project, folder: Path, workflow: str, *settings: str) -> subprocess.CompletedProcess:
    flags = [part for s in settings for part in ("--set", s)]
    return subprocess.run(
        [
            sys.executable,
            str(project / "tools" / "comfy.py"),
            "run",
            str(project / "workflows" / workflow),
            *flags,
            "--output",
            str(folder / "command"),
        ],
        capture_output=True,
        text=True,
        timeout=400,
        cwd=folder,
    )


def frames_of(video: Path) -> int:
    with av.open(str(video)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_the_custom_workflow_runs_from_the_command_line(project, folder):
    captions = folder / "captions.json"
    captions.write_text('{"0": "a hall", "9": "a door"}')
    done = run_command(
        project,
        folder,
        "custom_trajectory.json",
        *SMALL,
        f"LoadImage.image=@{picture(folder / 'photo.png', mode='RGBA')}",
        f"Lyra2LoadTrajectory.file=@{trajectory(folder / 'cli.npz', 17)}",
        "Lyra2LoadTrajectory.frames=17",
        "Lyra2LoadTrajectory.width=96",
        "Lyra2LoadTrajectory.height=64",
        f"Lyra2LoadTrajectory.captions=@{captions}",
        "Lyra2PreviewChunks.chunk_frames=8",
        "Lyra2PreviewChunks.save_to=worlds/cli",
    )
    assert done.returncode == 0, done.stderr + done.stdout
    out = folder / "command"
    world = world_files.load(out / "worlds" / "cli")
    assert len(world) == 17 and [c.prompt for c in world.chunks] == ["a hall", "a door"]
    assert frames_of(next((out / "lyra2").glob("custom_trajectory*.mp4"))) == 17
    splat = PlyData.read(next((out / "lyra2").glob("*.ply")))["vertex"]
    assert len(splat) >= 96 * 64 and np.isfinite(splat["scale_0"]).all()
    cameras = camera_files.load_npz(next((out / "lyra2").glob("*.npz")))
    torch.testing.assert_close(cameras.w2c, world.cameras.w2c)
    assert (
        all(f"wrote {Path('command')}" in line for line in done.stdout.splitlines() if "wrote" in line)
        and done.stdout.count("wrote") == 5
    )


@pytest.fixture
def command(launcher, server, folder, project, monkeypatch, capsys):
    """The command line in this process, on the running server; returns the exit status and what was said."""
    monkeypatch.setattr(launcher, "inside_environment", lambda: True)
    monkeypatch.setattr(launcher, "home", lambda: folder)
    monkeypatch.setattr(launcher, "Server", lambda base, output, *extra: contextlib.nullcontext(server))
    monkeypatch.chdir(folder)

    def run(name: str, *arguments: str) -> SimpleNamespace:
        code = launcher.main([name, *arguments])
        said = capsys.readouterr()
        return SimpleNamespace(code=code, out=said.out, err=said.err)

    return run


def sets(*settings: str) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


def test_the_zoom_workflow_runs_from_the_command_line(command, project, server, folder):
    done = command(
        "run",
        str(project / "workflows" / "zoom.json"),
        *sets(
            *SMALL,
            f"LoadImage.image=@{picture(folder / 'grey.png', mode='L')}",
            "Path in.frames=9",
            "Path out.frames=17",
            "Walk in.chunk_frames=8",
            "Walk out.chunk_frames=8",
        ),
    )
    assert done.code == 0, done.err + done.out
    assert frames_of(next((server.output / "lyra2").glob("zoom_0*.mp4"))) == 17 + 9 - 1, "the photo must appear once"


def test_a_failing_node_ends_the_command_with_its_message(command, project, folder):
    workflow = str(project / "workflows" / "custom_trajectory.json")
    short = f"Lyra2LoadTrajectory.file=@{trajectory(folder / 'short.npz', 5)}"
    done = command("run", workflow, *sets(f"LoadImage.image=@{picture(folder / 'photo.png')}", short))
    assert done.code == 1 and "Lyra2LoadTrajectory" in done.err and "5" in done.err and "161" in done.err
    assert done.err.count("\n") == 1
    done = command("run", workflow, *sets("LoadImage.picture=x"))
    assert done.code == 1 and "no input 'picture'" in done.err


def bad_value(**changes) -> dict:
    """The case's workflow with a good stride, and other inputs of its nodes by id; None takes an input away."""
    prompt = json.loads((CASES / "workflow-with-one-bad-value" / "workflow.json").read_text())
    prompt["5"]["inputs"]["stride"] = 1
    for key, inputs in changes.items():
        prompt[key]["inputs"] = {k: v for k, v in {**prompt[key]["inputs"], **inputs}.items() if v is not None}
    return prompt


def test_one_bad_value_ends_the_command_and_takes_the_rest_from_the_queue(command, server):
    case = CASES / "workflow-with-one-bad-value"
    done = command("run", str(case / "workflow.json"), *sets(f"LoadImage.image=@{case / 'photo.png'}"))
    assert done.code == 1 and done.err.count("\n") == 1
    assert "Lyra2WorldGaussians: Value 99 bigger than max of 16: stride" in done.err
    deadline = time.monotonic() + 20  # an interrupt waits for the node that runs
    while any(server.get("/queue").values()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.get("/queue") == {"queue_running": [], "queue_pending": []}
    assert server.get("/history?max_items=1").popitem()[1]["status"]["status_str"] == "error", "it was interrupted"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"5": {"stride": 0}}, "node 5, Lyra2WorldGaussians: Value 0 smaller than min of 1: stride"),
        ({"5": {"stride": "many"}}, "node 5, Lyra2WorldGaussians: .* a INT value: stride, many"),
        ({"5": {"stride": 2.5}}, "node 5, Lyra2WorldGaussians: input 'stride' is 2.5, which is no whole number"),
        ({"5": {"invented": "no"}}, "node 5, Lyra2WorldGaussians: input 'invented' is 'no', which is neither"),
        ({"5": {"strid": 3}}, "node 5, Lyra2WorldGaussians: has no input 'strid'"),
        ({"5": {"stride": None}}, "node 5, Lyra2WorldGaussians: Required input is missing: stride"),
        ({"6": {"format": "obj"}}, "node 6, SplatToFile3D: Value not in list: format: 'obj' not in"),
        ({"6": {"splat": ["3", 0]}}, "node 6, SplatToFile3D: Return type mismatch .*: splat, received_type.LYRA2_WORLD"),
        ({"6": {"splat": ["99", 0]}}, "node 6, SplatToFile3D: input 'splat' is linked to node 99"),
        ({"6": {"splat": ["6", 0]}}, "node 6, SplatToFile3D"),
        ({"2": {"source": "sphere"}}, "node 2, Lyra2Depth: .*sphere"),
        ({"2": {"source.distance": -1.0}}, "node 2, Lyra2Depth: Value -1.0 smaller than min"),
        ({"1": {"image": "lost.png"}}, "node 1, LoadImage: .*image - Invalid image file: lost.png"),
    ],
)
def test_any_bad_value_is_named_in_one_line(command, server, changes, words, tmp_path):
    picture(server.base / "input" / "photo.png")
    (tmp_path / "workflow.json").write_text(json.dumps(bad_value(**changes)))
    done = command("run", str(tmp_path / "workflow.json"))
    assert done.code == 1 and done.err.count("\n") == 1 and re.search(words, done.err), done.err


def test_the_same_workflow_without_a_bad_value_runs(command, server, tmp_path):
    picture(server.base / "input" / "photo.png", (96, 64))
    (tmp_path / "workflow.json").write_text(json.dumps({"prompt": bad_value(), "client_id": "somebody"}))
    done = command("run", str(tmp_path / "workflow.json"))
    assert done.code == 0, done.err
    assert (server.output / "worlds" / "one_bad_value" / "world.json").exists() and "one_bad_value_00001" in done.out
    again = command("run", str(tmp_path / "workflow.json"))
    assert again.code == 0, "what the host has kept counts as run"


@pytest.mark.parametrize("setting", ["Lyra2PreviewChunks.retrieve=20", "SaveVideo.format=mov"])
def test_a_setting_that_a_shipped_workflow_cannot_have_is_named(command, project, folder, setting):
    path = f"Lyra2LoadTrajectory.file=@{trajectory(folder / 'path.npz', 161)}"
    given = [f"LoadImage.image=@{picture(folder / 'photo.png')}", path, setting]
    done = command("run", str(project / "workflows" / "custom_trajectory.json"), *sets(*given))
    kind, name, value = re.split("[.=]", setting)
    assert done.code == 1 and done.err.count("\n") == 1
    assert kind in done.err and name in done.err and value in done.err


def muted(project, tmp_path: Path, *kinds: str) -> str:
    """The custom workflow's file with nodes of some types muted, or all of them."""
    workflow = json.loads((project / "workflows" / "custom_trajectory.json").read_text(encoding="utf-8"))
    for node in workflow["nodes"]:
        node["mode"] = 2 if node["type"] in kinds or not kinds else 0
    (tmp_path / "muted.json").write_text(json.dumps(workflow))
    return str(tmp_path / "muted.json")


def test_what_hangs_on_a_muted_node_ends_the_command(command, project, tmp_path, folder):
    given = sets(*SMALL, f"LoadImage.image=@{picture(folder / 'photo.png')}")
    path = sets(f"Lyra2LoadTrajectory.file=@{trajectory(folder / 'path.npz', 161)}")
    done = command("run", muted(project, tmp_path, "Lyra2WorldGaussians"), *given, *path)
    assert done.code == 1 and done.err.count("\n") == 1
    assert re.search("SplatToFile3D: Required input is missing: splat .nothing is linked to it, or what was is muted", done.err)
    done = command("run", muted(project, tmp_path, "Lyra2LoadTrajectory"), *given, *path)
    assert done.code == 1 and "no node is called 'Lyra2LoadTrajectory', or it is muted in the file" in done.err
    done = command("run", muted(project, tmp_path))
    assert done.code == 1 and "nothing in this workflow saves or shows anything" in done.err


def test_a_muted_output_is_left_out_and_that_is_said(launcher, project, server, tmp_path):
    workflow = json.loads(Path(muted(project, tmp_path, "SaveGLB")).read_text())
    object_info = server.get("/object_info")
    (left,) = launcher.prompts.muted_outputs(workflow, object_info)
    assert left.endswith("SaveGLB") and "SaveGLB" not in str(launcher.to_api_format(workflow, object_info))


def test_an_output_that_did_not_run_is_an_error(launcher, server, monkeypatch):
    """The host itself can be told to run a part of a workflow only."""
    prompt = {"1": {"class_type": "EmptyImage", "inputs": {"width": 16, "height": 16, "batch_size": 1, "color": 0}}}
    prompt |= {key: {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}} for key in ("2", "3")}

    def queue(server, prompt: dict, client_id: str) -> str:
        asked = {"prompt": prompt, "client_id": client_id, "partial_execution_targets": ["2"]}
        return server.post("/prompt", asked)["prompt_id"]

    monkeypatch.setattr(launcher, "queue", queue)
    with pytest.raises(launcher.WorkflowError, match="did not run, though it should save or show something: node 3, PreviewImage"):
        launcher.run_prompt(server, prompt)


def test_a_workflow_in_a_picture_that_the_host_saved_runs_again(command, launcher, server):
    empty = {"width": 24, "height": 16, "batch_size": 1, "color": 255}
    prompt = {"1": {"class_type": "EmptyImage", "inputs": empty}}
    prompt["2"] = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "with_workflow"}}
    launcher.run_prompt(server, prompt)
    done = command("run", str(server.output / "with_workflow_00001_.png"), *sets("SaveImage.filename_prefix=out_of_it"))
    assert done.code == 0, done.err
    assert Image.open(server.output / "out_of_it_00001_.png").size == (24, 16)


def test_a_disc_in_an_upright_photo_stays_round(command, launcher, server, monkeypatch):
    monkeypatch.setattr(launcher, "UPRIGHT", (144, 256))
    done = command("demo", str(CASES / "portrait-photo" / "portrait.jpg"), "--frames", "81")
    assert done.code == 0, done.err
    assert "an upright world of 144x256" in done.out and "nothing is stretched" in done.out
    with av.open(str(next((server.output / "lyra2").glob("portrait*.mp4")))) as container:
        frame = next(container.decode(video=0)).to_ndarray(format="rgb24").astype(int)
    assert frame.shape[:2] == (256, 144)
    y, x = np.nonzero((frame[..., 0] > 150) & (frame[..., 1:] < 100).all(-1))
    width, height = x.max() - x.min() + 1, y.max() - y.min() + 1
    assert 78 <= width <= 82 and width / height == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["ImageScale.width=95"], "multiples of 16"),
        (["ImageScale.width=112"], "another shape"),
        (["Lyra2PreviewChunks.chunk_frames=7"], "does not fill whole chunks"),
        (["Lyra2PreviewChunks.save_to=../outside"], "no path inside"),
        (["Lyra2LoadTrajectory.captions=@{captions}"], "is not a frame number"),
        (["Lyra2LoadTrajectory.file=@{pickled}"], "pickle"),
    ],
)
def test_bad_input_is_an_error_with_a_way_out(launcher, server, custom, folder, settings, words):
    def written() -> list[Path]:  # but for the path itself, which is saved beside the walk
        return sorted(file for file in server.output.rglob("*") if file.is_file() and "custom_trajectory_cameras" not in file.name)

    (folder / "bad.json").write_text('{"first": "x"}')
    np.savez(folder / "bad.npz", w2c=np.array([{"a": 1}], dtype=object), intrinsics=np.eye(3)[None])
    before = written()
    settings = [s.format(captions=folder / "bad.json", pickled=folder / "bad.npz") for s in settings]
    with pytest.raises(launcher.WorkflowError, match=words):
        launcher.run_prompt(server, custom("Lyra2PreviewChunks.save_to=worlds/bad", *settings))
    assert written() == before


def test_an_interrupt_stops_within_a_frame_and_keeps_finished_chunks(launcher, server, custom):
    def interrupt_in_the_second_chunk(node, done, total):
        if node.get("class_type") == "Lyra2PreviewChunks" and done >= 10:
            server.post("/interrupt", {})
            seen.append(done)

    seen: list[int] = []
    prompt = custom("Lyra2PreviewChunks.save_to=worlds/interrupted", "Lyra2PreviewChunks.retrieve=4")
    with pytest.raises(launcher.WorkflowError, match="interrupted in node .*Lyra2PreviewChunks"):
        launcher.run_prompt(server, prompt, interrupt_in_the_second_chunk)
    assert max(seen) < 24
    assert 1 <= len(world_files.load(server.output / "worlds" / "interrupted").chunks) < 3
    launcher.run_prompt(server, prompt)
    assert len(world_files.load(server.output / "worlds" / "interrupted").chunks) == 3


def test_a_second_photo_through_a_shipped_workflow_has_a_folder_of_its_own(launcher, server, custom, folder):
    """Another size of the same photo, as for a draft, is another one too; the first photo again goes on where it was."""

    def saved() -> dict[str, list[int]]:
        folders = sorted((server.output / "worlds").glob("custom_trajectory_*"))
        return {f.name: sorted(file.stat().st_mtime_ns for file in f.glob("*.safetensors")) for f in folders}

    small = [f"{kind}.{side}={n}" for kind in ("ImageScale", "Lyra2LoadTrajectory") for side, n in (("width", 48), ("height", 32))]
    launcher.run_prompt(server, custom(frames=9))
    first = saved()
    launcher.run_prompt(server, custom(*small, frames=9))
    upright = custom(frames=9)
    picture(server.base / "input" / "upright.png", (90, 130), "L")
    next(node for node in upright.values() if node["class_type"] == "LoadImage")["inputs"]["image"] = "upright.png"
    launcher.run_prompt(server, upright)
    everything = saved()
    assert len(first) == 1 and len(everything) == 3 and first.items() <= everything.items()
    assert {len(world_files.load(server.output / "worlds" / name).chunks) for name in everything} == {1}
    launcher.run_prompt(server, custom(frames=17))
    assert {name: len(files) for name, files in saved().items()} == {name: 2 + (name in first) for name in everything}


def test_only_new_frames_run_when_nothing_else_changed(launcher, server, custom):
    prompt = custom("Lyra2PreviewChunks.save_to=worlds/again")
    launcher.run_prompt(server, prompt)
    ran = []
    launcher.run_prompt(server, prompt, lambda node, done, total: ran.append(node["class_type"]))
    assert not ran, "the host's cache must hold for every node"


def test_other_nodes_work_on_the_worlds(launcher, server, custom):
    """Load, rewind, retrieve, join, guard, consistency, presets, splat rendering: the nodes the workflows do not use."""
    launcher.run_prompt(server, custom("Lyra2PreviewChunks.save_to=worlds/others", frames=17))
    graph = {
        "load": ("Lyra2LoadWorld", {"folder": "worlds/others", "chunks": -1, "branch": ""}),
        "frames": ("Lyra2WorldFrames", {"world": ["load", 0], "first": 0, "count": 0, "backwards": False}),
        "there": (
            "Lyra2WorldVideo",
            {"world": ["load", 0], "first": 0, "count": 0, "backwards": False, "fps": 16.0},
        ),
        "and back": (
            "Lyra2WorldVideo",
            {"world": ["load", 0], "first": 0, "count": 16, "backwards": True, "fps": 16.0, "before": ["there", 0]},
        ),
        "film": (
            "SaveVideo",
            {"video": ["and back", 0], "filename_prefix": "there_and_back", "format": "mp4", "codec": "h264"},
        ),
        "back": ("Lyra2EditTrajectory", {"cameras": ["frames", 1], "edit": "reverse"}),
        "walk": (
            "Lyra2PreviewChunks",
            {"world": ["load", 0], "cameras": ["back", 0], "retrieve": 5, "chunk_frames": 8, "save_to": ""},
        ),
        "score": ("Lyra2Consistency", {"world": ["walk", 0]}),
        "rewind": ("Lyra2RewindWorld", {"world": ["walk", 0], "back": 1}),
        "save": ("Lyra2SaveWorld", {"world": ["rewind", 0], "folder": "worlds/rewound"}),
        "preset": (
            "Lyra2PresetTrajectory",
            {
                "depth": ["frames", 3],
                "preset": "orbit_horizontal",
                "preset.direction": "right",
                "preset.strength": 0.2,
                "frames": 9,
                "seed": 0,
            },
        ),
        "guard": (
            "Lyra2EditTrajectory",
            {
                "cameras": ["preset", 0],
                "edit": "guard against collisions",
                "edit.world": ["load", 0],
                "edit.clearance": 0.1,
                "edit.how": "shorten",
            },
        ),
        "plan": (
            "Lyra2RetrieveHistory",
            {"world": ["load", 0], "cameras": ["back", 0], "retrieve": 5, "views": 3, "chunk_frames": 8},
        ),
        "see": ("PreviewImage", {"images": ["plan", 2]}),
        "splat": ("Lyra2WorldGaussians", {"world": ["load", 0], "stride": 2, "invented": False}),
        "render": (
            "Lyra2RenderSplat",
            {"splat": ["splat", 0], "cameras": ["guard", 0], "background": "#102030", "rasteriser": "auto"},
        ),
        "picture": ("SaveImage", {"images": ["render", 0], "filename_prefix": "rendered"}),
        "colmap": (
            "Lyra2SaveTrajectory",
            {"cameras": ["guard", 0], "filename_prefix": "lyra2/colmap", "format": "colmap text"},
        ),
        "path": (
            "Lyra2SaveTrajectory",
            {"cameras": ["guard", 0], "filename_prefix": "lyra2/path", "format": "camera path json"},
        ),
        "nerf": (
            "Lyra2SaveTrajectory",
            {"cameras": ["guard", 0], "filename_prefix": "lyra2/transforms", "format": "nerfstudio transforms.json"},
        ),
    }
    prompt = {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in graph.items()}
    outputs = launcher.run_prompt(server, prompt)
    assert "PSNR" in outputs["score"]["text"][0] and "9" in outputs["guard"]["text"][0]
    assert len(world_files.load(server.output / "worlds" / "rewound").chunks) == 3
    saved = camera_files.load_colmap(next((server.output / "lyra2").glob("colmap*")))
    again = camera_files.load_transforms(next((server.output / "lyra2").glob("transforms*.json")))
    torch.testing.assert_close(saved.w2c, again.w2c, atol=1e-5, rtol=0)
    with av.open(str(next(server.output.glob("there_and_back*.mp4")))) as film:
        assert film.streams.video[0].frames == 33 and "prompt" in film.metadata
    rendered = np.asarray(Image.open(next(server.output.glob("rendered*.png"))))
    assert rendered.std() > 10


def test_a_walk_of_a_server_that_was_killed_goes_on_in_another(launcher, server, custom, folder):
    prompt = custom("Lyra2PreviewChunks.save_to=worlds/killed")
    world_folder = server.output / "worlds" / "killed"
    with launcher.Server(folder / "base", server.output) as doomed:

        def kill_in_the_second_chunk(node, done, total):
            if node.get("class_type") == "Lyra2PreviewChunks" and done >= 10:
                doomed.process.kill()

        with pytest.raises(launcher.WorkflowError, match="went away"):
            launcher.run_prompt(doomed, prompt, kill_in_the_second_chunk)
    finished = {f.name: f.stat().st_mtime_ns for f in world_folder.glob("*.safetensors")}
    assert 2 <= len(finished) < 4
    launcher.run_prompt(server, prompt)
    assert len(world_files.load(world_folder).chunks) == 3
    assert {n: (world_folder / n).stat().st_mtime_ns for n in finished} == finished, (
        "finished chunks must not be written again"
    )


def test_two_servers_that_grow_one_world_lose_nothing(launcher, server, folder, writers):
    """For some seconds; `bench writers` does it for a minute."""
    with launcher.Server(folder / "other", server.output) as other:
        said = writers.grow_together(launcher, [server, other], "worlds/both", 6)
    assert all(said), "both have written"
    assert writers.lost(server.output / "worlds" / "both", said) == []


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="looks at /proc")
def test_many_runs_of_one_server_leave_nothing_behind(launcher, server, writers):
    world_files.save(writers.photo(), server.output / "worlds" / "many")

    def run(number: int) -> tuple[int, int, list[Path]]:
        launcher.run_prompt(server, writers.one_walk("worlds/many", writers.photo().key[:16], 1, 0.1 + 0.01 * number))
        pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
        files = len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))
        left = [f for f in (*server.output.rglob("*.partial*"), *server.output.rglob("*.lock*"), *(server.base / "temp").rglob("*")) if f.is_file()]
        return pages * 4096, files, left

    seen = [run(number) for number in range(25)]
    (memory, files, left), (memory_after, files_after, left_after) = seen[4], seen[-1]
    assert left == left_after and not [f for f in left_after if "temp" not in f.parts]
    assert files_after <= files + 2 and memory_after < memory + 40e6
    assert len(world_files.read_manifest(server.output / "worlds" / "many")) == 26


def cameras_prompt(**load) -> dict:
    widgets = {"frames": 3, "pose_scale": 1.0, "width": 96, "height": 64, "captions": "none"}
    widgets |= {"curve": "as the file says", "motion": "uniform motion", "fit": "crop", "without_distortion": False}
    saved = {"cameras": ["1", 0], "filename_prefix": "lyra2/edited", "format": "npz"}
    return {
        "1": {"class_type": "Lyra2LoadTrajectory", "inputs": widgets | load},
        "2": {"class_type": "Lyra2SaveTrajectory", "inputs": saved},
    }


def test_a_colmap_folder_that_was_edited_is_read_again(launcher, server, project):
    case, scan = project / "tests" / "cases" / "colmap-folder-edited", server.base / "input" / "scan"
    shutil.copytree(case / "before", scan)
    saved = []
    for step in range(3):
        if step == 2:
            shutil.copy(case / "after" / "images.txt", scan / "images.txt")
        launcher.run_prompt(server, cameras_prompt(file="scan"))
        files = sorted((server.output / "lyra2").glob("edited*.npz"))
        saved.append([len(files), camera_files.load_npz(files[-1]).centers[:, 0].tolist()])
    assert saved == [[1, [0, 1, 2]], [1, [0, 1, 2]], [2, [0, 10, 20]]]


def test_the_host_s_cameras_go_in_and_out(launcher, server, folder):
    trajectory(server.base / "input" / "walk.npz", 3)
    prompt = cameras_prompt(file="walk.npz")
    look = {"mode": "look_at", "mode.position_x": 1.0, "mode.position_y": 0.5, "mode.position_z": 4.0}
    look |= {"target_x": 0.0, "target_y": 0.0, "target_z": 0.0, "roll": 0.0, "fov": 40.0, "zoom": 1.0, "camera_type": "perspective"}
    out = {"cameras": ["1", 0], "first": 0, "count": 0, "target_distance": 1.0, "field_of_view": "vertical"}
    size = {"width": 96, "height": 64, "field_of_view": "vertical"}
    prompt |= {
        "3": {"class_type": "Lyra2CamerasToLoad3D", "inputs": out},
        "4": {"class_type": "Lyra2CamerasFromLoad3D", "inputs": {"camera_info": ["3", 0], **size}},
        "5": {"class_type": "CreateCameraInfo", "inputs": look},
        "6": {"class_type": "Lyra2CamerasFromLoad3D", "inputs": {"camera_info": ["5", 0], **size}},
        "7": {"class_type": "Lyra2CamerasFromLoad3D", "inputs": {"camera_info": ["3", 1], **size}},
    }
    for number, (cameras, name) in enumerate((("4", "there"), ("6", "look"), ("7", "batch")), 8):
        saved = {"cameras": [cameras, 0], "filename_prefix": f"lyra2/{name}", "format": "npz"}
        prompt[str(number)] = {"class_type": "Lyra2SaveTrajectory", "inputs": saved}
    launcher.run_prompt(server, prompt)
    there, look, batch = (camera_files.load_npz(next((server.output / "lyra2").glob(f"{n}*.npz"))) for n in ("there", "look", "batch"))
    walk = camera_files.load_npz(server.base / "input" / "walk.npz")
    for found in (there, batch):
        torch.testing.assert_close(found.w2c, walk.w2c, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.K, walk.K, atol=1e-3, rtol=0)
    assert look.centers[0].tolist() == pytest.approx([1.0, -0.5, -4.0], abs=1e-5)


# ------------------------------------------------------------------------------------ values that come through links


def choices_of(spec: dict):
    """Every input of a node or of a choice: (values of the choices that lead to it, its name, its specification)."""
    for group in ("required", "optional"):
        for name, known in spec.get(group, {}).items():
            yield {}, name, known
            if known[0] == "COMFY_DYNAMICCOMBO_V3":
                for option in known[1]["options"]:
                    for chosen, inner, deeper in choices_of(option["inputs"]):
                        yield {name: option["key"], **{f"{name}.{k}": v for k, v in chosen.items()}}, f"{name}.{inner}", deeper


def usual(spec: dict, chosen: dict, around: str = "") -> dict:
    """A value for every required input; what is no widget is linked to a node that gives anything."""
    found = {}
    for name, (kind, options, *_) in spec.get("required", {}).items():
        whole = around + name
        plain = {"STRING": "", "BOOLEAN": False, "COLOR": "#000000"}.get(kind, ["nothing", 0])
        if kind in ("COMBO", "COMFY_DYNAMICCOMBO_V3"):
            keys = [o["key"] for o in options["options"]] if kind != "COMBO" else options["options"]
            found[whole] = chosen.get(whole, options.get("default", keys[0]))
            if kind != "COMBO":
                inner = next(o["inputs"] for o in options["options"] if o["key"] == found[whole])
                found |= usual(inner, chosen, f"{whole}.")
        else:
            found[whole] = options.get("default", plain)
    return found


def with_one_link(info: dict, kind: str, name: str, chosen: dict, given: tuple[str, str]) -> dict:
    inputs = {**usual(info["input"], chosen), **chosen, name: ["wrong", 0]}
    prompt = {key: {"class_type": "TestAnything", "inputs": {"value": v, "kind": k}} for key, v, k in
              (("nothing", "0", "none"), ("wrong", *given))}  # fmt: skip
    prompt["node"] = {"class_type": kind, "inputs": inputs}
    if not info["output_node"]:
        prompt["see"] = {"class_type": "PreviewAny", "inputs": {"source": ["node", 0]}}
    return prompt


def ended(server, asked: list[str], seconds: float) -> dict:
    """The history once none of these is queued any more."""
    deadline = time.monotonic() + seconds
    while any(server.get("/queue").values()):
        assert time.monotonic() < deadline, f"the queue stands still: {server.log_tail(5)}"
        time.sleep(0.1)
    history = server.get("/history?max_items=10000")
    assert set(asked) <= set(history)
    return history


def test_no_number_through_a_link_gets_past_any_node_and_the_queue_goes_on(server, writers):
    """Too much, too little and none at all, for each number of each node, on one server: each is refused in words."""
    np.save(server.base / "input" / "depth.npy", np.ones((64, 96), np.float32))
    (server.base / "input" / "any.json").write_text("{}")  # every list of files has something to choose
    world_files.save(writers.photo(), server.output / "worlds" / "values")
    info, asked = server.get("/object_info"), {}
    found = [(kind, *each) for kind in sorted(NODES) for each in choices_of(info[kind]["input"])]
    numbers = [each for each in found if each[3][0] in ("INT", "FLOAT") and not each[3][1].get("rawLink")]
    assert len(numbers) > 120
    for which, (kind, chosen, name, (_, options, *_)) in enumerate(numbers):
        wrong = [(str(int(options["max"]) + 1), "number"), (str(int(options["min"]) - 1), "number"), ("0", "nan"), ("0", "text")]
        wrong += [("1" + 30 * "0", "number"), ("0", "infinity"), ("0", "true"), ("0", "list")]
        for given in wrong[which % 4 :: 4]:  # two of them for each input, others for the next
            prompt = with_one_link(info[kind], kind, name, chosen, given)
            try:
                answer = server.post("/prompt", {"prompt": prompt})
            except urllib.error.HTTPError as refused:
                pytest.fail(f"{kind}.{name}: {refused.read()[:500]}")
            asked[answer["prompt_id"]] = kind, name, given
    history = ended(server, list(asked), 120)
    for key, (kind, name, given) in asked.items():
        status = history[key]["status"]
        said = [message["exception_message"] for event, message in status["messages"] if event == "execution_error"]
        assert len(said) == 1 and re.match(rf".*: input '{re.escape(name)}' is .*; allowed: ", said[0]), (kind, name, given, said)
        assert said[0].strip().count("\n") == 0
    assert len(asked) > 240
