"""The real host: a saved world, or any video, becomes a folder for engines, from the shipped workflows' files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import servers

SIZE = (64, 96)


@pytest.fixture(scope="module")
def base(comfy_host, tiny_models, tmp_path_factory, project) -> Path:
    """A photo, a path and a video, and no model file but the reconstruction's."""
    folder = tmp_path_factory.mktemp("engine")
    (folder / "input").mkdir()
    shutil.copyfile(project / "tools" / "demo" / "room.png", folder / "input" / "photo.png")
    w2c = np.tile(np.eye(4), (81, 1, 1))
    w2c[:, 2, 3] = -np.linspace(0, 0.4, 81)
    K = np.tile(np.array([[80.0, 0, 47.5], [0, 80.0, 31.5], [0, 0, 1]]), (81, 1, 1))
    np.savez(folder / "input" / "trajectory.npz", w2c=w2c, intrinsics=K, image_height=SIZE[0], image_width=SIZE[1])
    tiny_models.write_da3_gaussians(folder / "models" / "geometry_estimation" / "lyra2_reconstruction.pt")
    return folder


@pytest.fixture(scope="module")
def server(launcher, base):
    with launcher.Server(base, base / "output", "--models-directory", str(base / "models")) as server:
        yield server


@pytest.fixture(scope="module")
def run(launcher, server, project):
    """Runs a shipped workflow with some settings; returns what it says."""

    def run(name: str, *settings: str) -> list[str]:
        workflow = json.loads((project / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
        object_info = servers.object_info(server)
        prompt = launcher.to_api_format(workflow, object_info)
        launcher.apply_settings(prompt, list(settings), server.base / "input", object_info)
        return launcher.output_texts(launcher.run_prompt(server, prompt))

    return run


@pytest.fixture(scope="module")
def world(run, base) -> str:
    """A world of one chunk of the geometry preview, saved by its own workflow; and its video as an input."""
    run(
        "custom_trajectory",
        "Lyra2LoadTrajectory.width=96",
        "Lyra2LoadTrajectory.height=64",
        "Lyra2LoadTrajectory.frames=81",
        "ImageScale.width=96",
        "ImageScale.height=64",
    )
    video = next((base / "output" / "lyra2").glob("custom_trajectory*.mp4"))
    shutil.copyfile(video, base / "input" / "video.mp4")
    (folder,) = (base / "output" / "worlds").glob("custom_trajectory_*")
    return f"worlds/{folder.name}"


SPLATS = {"splat.ply", "splat.spz", "splat.splat", "points.ply"}
EVERYTHING = {*SPLATS, "viewer", "mesh.glb", "collision.glb", "world.usdz", "colmap", "cameras.npz", "flythrough.mp4", "README.md"}


def files_of(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_a_saved_preview_world_becomes_a_folder_for_engines_without_any_weights(run, world, base):
    usdz, trimesh = pytest.importorskip("pxr.Usd"), pytest.importorskip("trimesh")
    texts = run("world_to_engine", f"Lyra2LoadWorld.folder={world}")
    folder = base / "output" / "exports" / "world"
    assert files_of(folder) >= EVERYTHING
    assert "Geometry preview: no model licence" in (folder / "README.md").read_text(encoding="utf-8")
    assert any("gaussians" in text for text in texts)
    assert len(trimesh.load(folder / "mesh.glb", force="mesh").faces) > 100
    stage = usdz.Stage.Open(str(folder / "world.usdz"))
    kinds = {prim.GetTypeName() for prim in stage.Traverse()}
    assert {"ParticleField3DGaussianSplat", "Mesh", "Camera"} <= kinds


def test_a_saved_world_is_reconstructed_from_its_own_cameras(run, world, base):
    texts = run("world_to_splat", f"Lyra2LoadWorld.folder={world}", "Lyra2Reconstruct.views=6")
    folder = base / "output" / "exports" / "world_to_splat"
    assert files_of(folder) >= EVERYTHING
    assert "NOT FOR COMMERCIAL USE" in (folder / "README.md").read_text(encoding="utf-8")
    assert any("from 6 frames" in text for text in texts)
    assert len(np.load(folder / "cameras.npz")["w2c"]) == 81


def test_any_video_is_reconstructed(run, world, base):
    texts = run("video_to_splat", "LoadVideo.file=video.mp4", "Lyra2Reconstruct.views=5")
    assert files_of(base / "output" / "exports" / "video") >= EVERYTHING
    assert list((base / "output" / "lyra2").glob("splat*.mp4"))
    assert any("from 5 frames" in text for text in texts)
