"""The pack inside the real ComfyUI: started as a server, driven over HTTP, killed and started again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
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
    "Lyra2Depth",
    "Lyra2LoadDepth",
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
}
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
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("host")


@pytest.fixture(scope="module")
def server(launcher, folder):
    with launcher.Server(folder / "base", folder / "output") as running:
        yield running


@pytest.fixture
def prompt_of(launcher, server, project):
    """The API prompt of a shipped workflow with some widgets set."""

    def build(name: str, *settings: str) -> dict:
        prompt = launcher.to_api_format(
            json.loads((project / "workflows" / name).read_text()), server.get("/object_info")
        )
        launcher.apply_settings(prompt, list(settings), server.base / "input")
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


def test_the_zoom_workflow_runs_from_the_command_line(project, folder):
    done = run_command(
        project,
        folder,
        "zoom.json",
        *SMALL,
        f"LoadImage.image=@{picture(folder / 'grey.png', mode='L')}",
        "Path in.frames=9",
        "Path out.frames=17",
        "Walk in.chunk_frames=8",
        "Walk out.chunk_frames=8",
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert frames_of(next((folder / "command" / "lyra2").glob("zoom_0*.mp4"))) == 17 + 9 - 1, (
        "the photo must appear once"
    )


def test_a_failing_node_ends_the_command_with_its_message(project, folder):
    done = run_command(
        project,
        folder,
        "custom_trajectory.json",
        f"LoadImage.image=@{picture(folder / 'photo.png')}",
        f"Lyra2LoadTrajectory.file=@{trajectory(folder / 'short.npz', 5)}",
    )
    assert done.returncode == 1 and "Lyra2LoadTrajectory" in done.stderr and "5" in done.stderr and "161" in done.stderr
    done = run_command(project, folder, "custom_trajectory.json", "LoadImage.picture=x")
    assert done.returncode == 1 and "no input 'picture'" in done.stderr


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["ImageScale.width=95"], "multiples of 16"),
        (["ImageScale.width=112"], "resize"),
        (["Lyra2PreviewChunks.chunk_frames=7"], "does not fill whole chunks"),
        (["Lyra2PreviewChunks.save_to=../outside"], "no path inside"),
        (["Lyra2LoadTrajectory.captions=@{captions}"], "is not a frame number"),
        (["Lyra2LoadTrajectory.file=@{pickled}"], "pickle"),
    ],
)
def test_bad_input_is_an_error_with_a_way_out(launcher, server, custom, folder, settings, words):
    (folder / "bad.json").write_text('{"first": "x"}')
    np.savez(folder / "bad.npz", w2c=np.array([{"a": 1}], dtype=object), intrinsics=np.eye(3)[None])
    before = sorted(server.output.rglob("*"))
    settings = [s.format(captions=folder / "bad.json", pickled=folder / "bad.npz") for s in settings]
    with pytest.raises(launcher.WorkflowError, match=words):
        launcher.run_prompt(server, custom("Lyra2PreviewChunks.save_to=worlds/bad", *settings))
    assert sorted(server.output.rglob("*")) == before


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


def test_a_server_killed_in_a_walk_goes_on_after_a_restart(launcher, custom, folder):
    prompt = custom("Lyra2PreviewChunks.save_to=worlds/killed")
    world_folder = folder / "killed_output" / "worlds" / "killed"
    with launcher.Server(folder / "base", folder / "killed_output") as doomed:

        def kill_in_the_second_chunk(node, done, total):
            if node.get("class_type") == "Lyra2PreviewChunks" and done >= 10:
                doomed.process.kill()

        with pytest.raises(launcher.WorkflowError, match="went away"):
            launcher.run_prompt(doomed, prompt, kill_in_the_second_chunk)
    finished = {f.name: f.stat().st_mtime_ns for f in world_folder.glob("*.safetensors")}
    assert 2 <= len(finished) < 4
    with launcher.Server(folder / "base", folder / "killed_output") as restarted:
        launcher.run_prompt(restarted, prompt)
    assert len(world_files.load(world_folder).chunks) == 3
    assert {n: (world_folder / n).stat().st_mtime_ns for n in finished} == finished, (
        "finished chunks must not be written again"
    )
