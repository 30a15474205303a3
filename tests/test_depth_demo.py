"""The demo's depth: the best model that is there, a small one when asked for, else the photo's own lines."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = "Comfy-Org/Depth-Anything-3"
SMALL = "geometry_estimation/depth_anything_3_small.safetensors"


def loaded(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


download = loaded("lyra_test_models", Path(__file__).with_name("test_models.py"))
hub, machine = download.hub, download.machine  # a local hub, and a machine that knows only it


@pytest.fixture(scope="module")
def demo_depth(project):
    return loaded("lyra_demo_depth", project / "tools" / "demo_depth.py")


SMALLEST, BASE = "depth_anything_3_small.safetensors", "depth_anything_3_base.safetensors"
MONO, METRIC = "Depth-Anything-3-Mono-Large.SAFETENSORS", "sub/depth_anything_3_metric_large.safetensors"
MOGE, OLD_MOGE = "moge_2_vitl_normal_fp16.safetensors", "moge_1_vitl.safetensors"


@pytest.mark.parametrize(
    "files, best",
    [
        ([], None),
        (["lyra2_reconstruction.pt", "da3nested_giant_large_1.1.safetensors", "notes.txt"], None),
        ([SMALLEST, MOGE], ("MoGe", MOGE)),
        ([OLD_MOGE, METRIC], ("Depth Anything 3", METRIC)),
        ([OLD_MOGE, BASE, SMALLEST], ("MoGe", OLD_MOGE)),
        ([MONO, METRIC, BASE], ("Depth Anything 3", MONO)),
        ([BASE, "._depth_anything_3_mono_large.safetensors"], ("Depth Anything 3", BASE)),
        ([SMALLEST + ".1234.part"], None),
    ],
)
def test_the_best_model_for_one_photo_is_taken(demo_depth, tmp_path, files, best):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert demo_depth.best_model([tmp_path, tmp_path / "nowhere"]) == best


@pytest.fixture
def demo(launcher, machine, monkeypatch, project):
    """Runs the demo up to the server; returns what its depth node and the nodes before it were given."""
    seen = {}

    def run_workflow(path, settings, output, change, extra=()):
        seen["prompt"] = {"5": {"class_type": "Lyra2Depth", "inputs": {
            "image": ["3", 0], "cameras": ["4", 0], "source": "room box", "source.vanishing_x": 0.5,
        }}}  # fmt: skip
        change(seen["prompt"])
        seen["extra"] = extra

    monkeypatch.setattr(launcher, "inside_environment", lambda: True)
    monkeypatch.setattr(launcher, "run_workflow", run_workflow)

    def run(*arguments: str) -> dict:
        assert launcher.main(["demo", *arguments]) == 0
        return seen

    return run


def test_without_a_model_a_photo_is_laid_out_by_its_lines(demo, project, capsys):
    (node,) = demo(str(project / "tools" / "demo" / "room.png"))["prompt"].values()
    assert node["inputs"]["source"] == "auto" and "source.vanishing_x" not in node["inputs"]
    assert node["inputs"]["image"] == ["3", 0] and node["inputs"]["cameras"] == ["4", 0]
    assert "by the photo's lines; --depth fetches" in capsys.readouterr().out


def test_the_picture_that_comes_with_the_project_keeps_its_own_room(demo):
    (node,) = demo()["prompt"].values()
    assert node["inputs"]["source"] == "room box" and node["inputs"]["source.vanishing_x"] == 0.5


def test_a_model_that_is_there_gives_the_depth(demo, machine, project, capsys):
    folder = machine / "geometry_estimation"
    folder.mkdir()
    (folder / "moge_2_vitl_normal_fp16.safetensors").touch()
    seen = demo()
    assert seen["prompt"]["depth_model"]["inputs"] == {"model_name": "moge_2_vitl_normal_fp16.safetensors"}
    assert seen["prompt"]["5"]["inputs"]["source.moge_geometry"] == ["depth_estimate", 0]
    assert 60 < seen["prompt"]["depth_estimate"]["inputs"]["fov_x_degrees"] < 75
    assert seen["extra"] in ((), ("--fp32-text-enc",))
    (folder / "depth_anything_3_mono_large.safetensors").touch()
    seen = demo()
    assert seen["prompt"]["5"]["inputs"]["source"] == "Depth Anything 3" and seen["extra"] == ()
    assert "by Depth Anything 3, depth_anything_3_mono_large.safetensors" in capsys.readouterr().out


def test_the_small_model_is_fetched_when_asked_for_and_its_licence_is_accepted(demo, machine, hub, capsys, monkeypatch):
    hub.repositories[REPOSITORY] = {SMALL: download.bytes_of(20_000)}
    monkeypatch.setattr("builtins.input", lambda *_: "no")
    with pytest.raises(SystemExit) as refused:
        demo("--depth")
    assert refused.value.code == 1 and not list(machine.rglob("*.safetensors"))
    said = capsys.readouterr()
    assert "Apache License 2.0" in said.out and "the licence was not accepted" in said.err
    seen = demo("--depth", "--accept-licence")
    assert (machine / SMALL).read_bytes() == hub.repositories[REPOSITORY][SMALL]
    assert "Apache License 2.0" in capsys.readouterr().out
    assert seen["prompt"]["depth_model"]["inputs"]["model_name"] == Path(SMALL).name


def test_the_demos_workflow_runs_by_a_depth_model(comfy_host, launcher, demo_depth, tiny_models, tmp_path, project):
    base = tmp_path / "base"
    folder = base / "models" / "geometry_estimation"
    folder.mkdir(parents=True)
    tiny_models.write_da3(folder / "depth_anything_3_mono_large.safetensors")
    change = demo_depth.source(demo_depth.best_model([folder]), 67.0)
    demo = project / "tools" / "demo"
    settings = [
        f"LoadImage.image=@{demo / 'room.png'}", "ImageScale.width=96", "ImageScale.height=64",
        f"Lyra2LoadTrajectory.file=@{demo / 'path.json'}", "Lyra2LoadTrajectory.width=96", "Lyra2LoadTrajectory.height=64",
        "Lyra2LoadTrajectory.frames=9", "Lyra2PreviewChunks.chunk_frames=8", "ImageScale.crop=center",
    ]  # fmt: skip
    with launcher.Server(base, tmp_path / "out", "--models-directory", str(base / "models")) as server:
        workflow = launcher.prompts.read_workflow(project / "workflows" / "custom_trajectory.json")
        outputs = launcher.run_on(server, workflow, settings, change)
    assert outputs and list((tmp_path / "out").rglob("*.glb"))
    worlds = list((tmp_path / "out" / "worlds").rglob("world.json"))
    assert len(worlds) == 1 and json.loads(worlds[0].read_text(encoding="utf-8"))
