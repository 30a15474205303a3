"""Every reader is given damaged and hostile files, 1,000 each: the same value, another possible one, or an error that says which file.

    LYRA2_FUZZ=colmap:417 python tools/comfy.py test -s tests/test_fuzz.py      makes one case again, and leaves its file there
    LYRA2_FUZZ_FROM=5000 python tools/comfy.py test tests/test_fuzz.py          takes other cases

A child process reads them, with 2 GB to take and 10 seconds for each; if it dies, that is said of the case and another
one goes on.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lyra_core import files
from lyra_core.cameras import camera_files, captions, load3d, next_path
from lyra_core.cameras.camera import Cameras, pinhole
from lyra_core.exports import bundle
from lyra_core.memory import depth, depth_files
from lyra_core.models import tensor_files
from lyra_core.splats import gaussians as splats
from lyra_core.splats import splat_files
from lyra_core.training import sets
from lyra_core.training import state as training
from lyra_core.training.sample import Sample
from lyra_core.world import preview, world, world_files

PROJECT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("lyra_mutations", Path(__file__).parent / "mutations.py")
mutations = sys.modules["lyra_mutations"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mutations)

CASES, FIRST = 1000, int(os.environ.get("LYRA2_FUZZ_FROM", "0"))
MOST_MEMORY, MOST_SECONDS, HUNG = 2 << 30, 10.0, 120
SIZE = (16, 24)
AGAIN = os.environ.get("LYRA2_FUZZ", "")


@dataclass(frozen=True)
class Reader:
    """How a kind of file is made, mutated, read and looked at."""

    write: Callable[[Path], list[Path]]  # good files in a folder, of which one is mutated
    read: Callable[[Path], object]  # that folder's value
    mutate: tuple  # mutations, see mutations.py
    check: Callable[[object], None]  # raises for a value that can't be one


READERS: dict[str, Reader] = {}


def reader(name: str, mutate: tuple, check: Callable = lambda value: None):
    def register(write: Callable):
        def add(read: Callable):
            READERS[name] = Reader(write, read, mutate, check)
            return read

        return add

    return register


# ----------------------------------------------------------------------------------------------------------- what is possible


def possible_cameras(found: Cameras) -> None:
    c2w, (height, width) = torch.linalg.inv(found.w2c.double()), found.size
    R, middle = c2w[:, :3, :3], c2w[:, :3, 3] + torch.tensor(found.origin).double()
    assert len(found) and torch.isfinite(found.w2c).all() and torch.isfinite(found.K).all()
    assert all(type(side) is int and 1 <= side <= 16384 for side in found.size), found.size
    assert (R @ R.mT - torch.eye(3)).abs().max() < 0.02 and (torch.linalg.det(R) > 0).all()
    assert middle.abs().max() <= 1.01e9, "far out"
    for side, focal in ((width, found.K[:, 0, 0]), (height, found.K[:, 1, 1])):
        fov = 2 * torch.atan(side / 2 / focal).rad2deg()
        assert (focal > 0).all() and fov.min() >= 0.99 and fov.max() <= 170.1, fov


def possible_gaussians(found: splats.Gaussians) -> None:
    for field in vars(found).values():
        assert torch.isfinite(field).all()
    assert (found.means.abs() <= 1e9).all(), "far out"
    assert (found.scales >= 0).all() and (found.scales <= 1e9).all(), "impossible scales"
    assert ((found.quats.norm(dim=1) - 1).abs() < 1e-3).all(), "rotations not of length 1"
    assert ((found.opacities >= 0) & (found.opacities <= 1)).all()


def possible_depth(found: depth_files.Stored) -> None:
    assert found.values.ndim == 3 and max(found.values.shape[1:]) <= 16384 and found.values.dtype == torch.float32


def possible_captions(found: dict) -> None:
    for frame, text in found.items():
        assert type(frame) is int and 0 <= frame <= 10**9, "impossible frame"
        text.encode()


def possible_plan(found: next_path.NextPath) -> None:
    if found.path is not None:
        possible_cameras(next_path.cameras_of(found, pinhole(SIZE, 20.0)))
    possible_captions(found.captions)


# -------------------------------------------------------------------------------------------------------------------- readers


def some_cameras(frames: int = 4) -> Cameras:
    cameras = pinhole(SIZE, 20.0, frames)
    cameras.w2c[:, 2, 3] = torch.linspace(0, -1, frames)
    return cameras


def named(name: str, write: Callable[[Path], None]) -> Callable[[Path], list[Path]]:
    """Writes one file of this name."""

    def to(folder: Path) -> list[Path]:
        write(folder / name)
        return [folder / name]

    return to


@reader("trajectory_npz", mutations.NPZ, possible_cameras)(
    named("t.npz", lambda file: camera_files.save_npz(file, some_cameras()))
)
def read_npz(folder):
    return camera_files.load_cameras(folder / "t.npz")


PATH = {
    "loop": False,
    "time": 0.0,
    "duration_seconds": 2.0,
    "spline_order": 3,
    "path": [
        {
            "R": [0, 0.1 * i, 0, 1],
            "T": [0, 0, 0.5 * i],
            "fov": 42.0,
            "timestamp": 0.5 * i,
            "up_dir": [0, 1, 0],
            "shift": [0, 0.01],
        }
        for i in range(3)
    ],
}


@reader("camera_path", mutations.JSON, possible_cameras)(
    named("p.json", lambda file: file.write_text(json.dumps(PATH)))
)
def read_path(folder):
    return camera_files.load_cameras(folder / "p.json", frames=5, size=SIZE)


@reader("transforms", mutations.JSON, possible_cameras)(
    named("transforms.json", lambda file: camera_files.save_transforms(file, some_cameras(2)))
)
def read_transforms(folder):
    return camera_files.load_cameras(folder / "transforms.json")


VIEWER = {
    "render_height": 16,
    "render_width": 24,
    "camera_type": "perspective",
    "fps": 24,
    "seconds": 1,
    "camera_path": [{"camera_to_world": torch.eye(4).flatten().tolist(), "fov": 50, "aspect": 1.5} for _ in range(2)],
}


@reader("viewer_path", mutations.JSON, possible_cameras)(
    named("v.json", lambda file: file.write_text(json.dumps(VIEWER)))
)
def read_viewer(folder):
    return camera_files.load_cameras(folder / "v.json")


def write_colmap(folder: Path) -> list[Path]:
    camera_files.save_colmap(folder, some_cameras())
    return [folder / "cameras.txt", folder / "images.txt"]


@reader("colmap", mutations.TEXT, possible_cameras)(write_colmap)
def read_colmap(folder):
    return camera_files.load_cameras(folder)


@reader("captions", mutations.JSON, possible_captions)(
    named("c.json", lambda file: file.write_text(json.dumps({"0": "a street", "81": "a square", "162": "Größe"})))
)
def read_captions(folder):
    return captions.load_captions(folder / "c.json")


def write_plan(file: Path) -> None:
    before = some_cameras(1)
    file.write_text(next_path.text_of(some_cameras(20), "ab12", before, captions={"0": "a street"}, seed=7))


@reader("next_path", mutations.JSON, possible_plan)(named("plan.json", write_plan))
def read_plan(folder):
    return next_path.read(files.read_text(folder / "plan.json"), str(folder / "plan.json"))


@reader("load3d", mutations.JSON[4:], possible_cameras)(
    named("camera.json", lambda file: file.write_text(json.dumps(load3d.to_load3d(some_cameras(2)))))
)
def read_load3d(folder):
    with files.reading(folder / "camera.json"):  # in ComfyUI it comes through a link and not out of a file
        return load3d.from_load3d(files.read_json(folder / "camera.json"), SIZE)


def some_gaussians(count: int = 12, bands: int = 4) -> splats.Gaussians:
    random = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=random)

    quats = torch.nn.functional.normalize(draw(count, 4) - 0.5, dim=1)
    return splats.Gaussians(
        4 * draw(count, 3) - 2, quats, 0.01 + 0.1 * draw(count, 3), 0.1 + 0.8 * draw(count), draw(count, bands, 3) - 0.5
    )


BINARY = (
    *mutations.RAW,
    mutations.numbered,
    mutations.early(mutations.numbered),
    mutations.early(mutations.renumbered, 80),
)


@reader("ply", BINARY, possible_gaussians)(named("s.ply", lambda file: splat_files.save_ply(some_gaussians(), file)))
def read_ply(folder):
    return splat_files.load_ply(folder / "s.ply")


@reader("splat", BINARY[:6], possible_gaussians)(
    named("s.splat", lambda file: splat_files.save_splat(some_gaussians(), file))
)
def read_splat(folder):
    return splat_files.load_splat(folder / "s.splat")


@reader("splat_reduced", BINARY[:6], possible_gaussians)(
    named(
        "s.splat",
        lambda file: splat_files.save_splat(
            splats.Gaussians(*(f.repeat_interleave(2, 0) for f in vars(some_gaussians(6)).values())), file
        ),
    )
)
def read_and_reduce(folder):
    return splats.voxel_reduce(splat_files.load_splat(folder / "s.splat"), 0.5)


def read_tensors(source: Path) -> dict:
    return {entry.name: entry.read(entry.dtype) for entry in tensor_files.read_entries(source) if entry.read}


def weights() -> dict[str, torch.Tensor]:
    return {
        "net.a.weight": torch.arange(24.0).reshape(4, 6),
        "net.b.bias": torch.ones(3, dtype=torch.bfloat16),
        "net.c": torch.zeros(()),
    }


@reader("safetensors", mutations.SAFETENSORS)(
    named("w.safetensors", lambda file: save_file(weights(), file, {"format": "pt", "alpha": "4"}))
)
def read_safetensors(folder):
    tensor_files.read_metadata(folder / "w.safetensors")
    return read_tensors(folder / "w.safetensors")


@reader("pth", mutations.TORCH)(named("w.pth", lambda file: torch.save({"state_dict": weights(), "epoch": 3}, file)))
def read_pth(folder):
    return read_tensors(folder / "w.pth")


def write_distributed(folder: Path) -> list[Path]:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.save(weights(), checkpoint_id=folder / "d", no_dist=True)
    return [folder / "d" / ".metadata", folder / "d" / ".metadata", *sorted((folder / "d").glob("*.distcp"))]


@reader("distributed", mutations.PICKLE)(write_distributed)
def read_distributed(folder):
    return read_tensors(folder / "d")


def depth_array(frames: int = 1) -> np.ndarray:
    return np.tile(np.linspace(0.5, 9, SIZE[1], dtype=np.float32), (frames, SIZE[0], 1))


@reader("depth_npz", mutations.NPZ, possible_depth)(
    named("d.npz", lambda file: np.savez_compressed(file, depth=depth_array(2), intrinsics=np.eye(3, dtype=np.float32)))
)
def read_depth_npz(folder):
    return depth_files.read(folder / "d.npz")


@reader("depth_npy", mutations.NPY, possible_depth)(named("d.npy", lambda file: np.save(file, depth_array())))
def read_depth_npy(folder):
    return depth_files.read(folder / "d.npy")


def write_picture(file: Path) -> None:
    array = (depth_array()[0] * 1000).astype(np.uint16) if file.suffix == ".png" else depth_array()[0]
    assert cv2.imwrite(str(file), array)


PICTURE = (*mutations.RAW, mutations.early(mutations.numbered, 64), mutations.early(mutations.flipped, 64))


@reader("depth_png", PICTURE, possible_depth)(named("d.png", write_picture))
def read_depth_png(folder):
    return depth_files.read(folder / "d.png")


@reader("depth_tiff", PICTURE, possible_depth)(named("d.tif", write_picture))
def read_depth_tiff(folder):
    return depth_files.read(folder / "d.tif")


def write_exr(file: Path) -> None:
    import OpenEXR

    OpenEXR.File(
        {"type": OpenEXR.scanlineimage, "compression": OpenEXR.ZIP_COMPRESSION}, {"Z": depth_array()[0]}
    ).write(str(file))


@reader("depth_exr", (*PICTURE, mutations.early(mutations.numbered, 330)), possible_depth)(named("d.exr", write_exr))
def read_depth_exr(folder):
    return depth_files.read(folder / "d.exr")


def write_world(folder: Path) -> list[Path]:
    size = (16, 32)
    room = depth.room_box(size, pinhole(size, 20.0).K[0], (0.5, 0.5), (0.3, 0.3, 0.7, 0.7), 4.0)
    begun = world.begin(torch.rand(*size, 3, generator=torch.Generator().manual_seed(3)), room.depth, room.camera)
    world_files.save(
        preview.explore(begun, replace(some_cameras(3), size=size, K=pinhole(size, 20.0, 3).K), chunk_frames=2),
        folder / "w",
    )
    return [folder / "w" / world_files.MANIFEST]


def look_at(found: world.World) -> None:
    for chunk in (found.first, *found.chunks):
        assert chunk.frames.shape[1:] == (*found.size, 3) and chunk.invented_bits is not None
        possible_cameras(chunk.cameras)
    assert all(keyframe.depth.shape == found.size for keyframe in found.memory.keyframes)


def resealed(mutation):
    """A manifest mutated and its seal made right again, as somebody does who forges it."""

    def mutate(content: bytes, random: Random) -> bytes:
        changed = mutation(content, random)
        try:
            manifest = json.loads(changed)
            return json.dumps({**manifest, "seal": world_files._seal(manifest)}).encode()
        except (ValueError, TypeError, RecursionError):
            return changed

    return mutate


@reader("world", (*mutations.JSON, resealed(mutations.retyped), resealed(mutations.retyped)), lambda found: None)(
    write_world
)
def read_world(folder):
    found = world_files.load(folder / "w")
    look_at(found)
    return found


def write_set(folder: Path) -> list[Path]:
    cameras = replace(some_cameras(9), size=SIZE[:1] * 2)
    cameras = replace(cameras, K=pinhole(cameras.size, 20.0, 9).K)
    frames, near = torch.zeros(9, *cameras.size, 3, dtype=torch.uint8), torch.ones(cameras.size)
    sample = Sample("walk", frames, cameras, {0: near, 8: near}, {0: "a street", 5: "a square"})
    return [sets.add(folder / "set", sample, {"scene": 1}, 8)]


@reader("training_set", mutations.JSON)(write_set)
def read_set(folder):
    (found,) = sets.read(folder / "set")
    possible_cameras(found.cameras)
    with files.reading(folder / "set"):  # depths are looked at when they are needed
        assert len(found) == len(found.cameras) and found.keyframe(8).depth.shape == found.size
    return found.captions


@reader("training_set_tensors", mutations.SAFETENSORS)(lambda folder: [write_set(folder)[0].with_suffix(".safetensors")])
def read_set_tensors(folder):
    return read_set(folder)


def write_training(folder: Path) -> list[Path]:
    weights = {"a": torch.nn.Parameter(torch.ones(3))}
    adam = torch.optim.AdamW(weights.values())
    weights["a"].grad = torch.ones(3)
    adam.step()
    training.save(training.capture(1, weights, adam, torch.Generator().get_state(), [0.5], {"rate": 1.0}), folder / "t.safetensors")
    return [folder / "t.safetensors"]


@reader("training", mutations.SAFETENSORS)(write_training)
def read_training(folder):
    weights, found = {"a": torch.nn.Parameter(torch.ones(3))}, training.load(folder / "t.safetensors")
    with files.reading(folder / "t.safetensors"):
        training.restore(found, weights, torch.optim.AdamW(weights.values()), torch.Generator())
    return found.step, found.settings


def write_chunks(folder: Path) -> list[Path]:
    write_world(folder)
    return sorted((folder / "w").glob("*.safetensors"))


@reader("world_chunk", mutations.SAFETENSORS, lambda found: None)(write_chunks)
def read_chunks(folder):
    return read_world(folder)


def write_bundle(folder: Path) -> list[Path]:
    with bundle.writing(folder / "b") as place:
        (place / "README.md").write_text("hello")
    return [folder / "b" / bundle.MANIFEST]


@reader("bundle", mutations.JSON)(write_bundle)
def read_bundle(folder):
    bundle._check_replaceable(folder / "b")


# ---- readers that need the host


TINY = {
    "rank": 4,
    "model_type": "i2v",
    "in_dim": 36,
    "out_dim": 16,
    "dim": 24,
    "ffn_dim": 32,
    "freq_dim": 8,
    "text_dim": 8,
    "num_heads": 2,
    "num_layers": 1,
}


def write_converted(folder: Path) -> list[Path]:
    """What the other tensors of a network don't tell, as JSON; it is put into a file of it each time."""
    from lyra_core.models import lyra2_host

    (folder / "config.json").write_bytes(
        bytes(
            lyra2_host.pack_config(
                {"framepack": lyra2_host.LYRA2, **TINY} | {"framepack": str(lyra2_host.LYRA2)}
            ).tolist()
        )
    )
    return [folder / "config.json"]


@reader("lyra2_config", mutations.JSON)(write_converted)
def read_converted(folder):
    from lyra_core.models import checkpoints, lyra2_host

    packed = torch.frombuffer(bytearray((folder / "config.json").read_bytes() or b" "), dtype=torch.uint8)
    shapes = lyra2_shapes()
    entries = [tensor_files.Entry(name, shape, torch.float32, None) for name, shape in shapes.items()]
    own = tensor_files.Entry(lyra2_host.CONFIG_KEY, tuple(packed.shape), packed.dtype, packed.to)
    with files.reading(folder / "config.json"):  # as `convert` does
        return [
            entry.name for entry in checkpoints._model(folder / "config.json", [*entries, own], torch.float32, None)
        ]


def lyra2_shapes() -> dict:
    from lyra_core.models import lyra2_host

    if not SHAPES:
        SHAPES.update(lyra2_host.weight_shapes({**TINY, "framepack": str(lyra2_host.LYRA2)}))
    return SHAPES


SHAPES: dict = {}


def write_lora(folder: Path) -> list[Path]:
    q = "base_model.model.blocks.1.self_attn.q"
    k, v = "base_model.model.blocks.1.self_attn.k", "base_model.model.blocks.1.self_attn.v"
    tensors = {f"{q}.lora_A.weight": torch.ones(3, 24), f"{q}.lora_B.weight": torch.ones(24, 3)}
    tensors |= {
        f"{k}.lokr_w1": torch.ones(2, 2),
        f"{k}.lokr_w2_a": torch.ones(12, 3),
        f"{k}.lokr_w2_b": torch.ones(3, 12),
    }
    tensors |= {f"{v}.hada_w{n}_{x}": torch.ones((24, 3) if x == "a" else (3, 24)) for n in (1, 2) for x in "ab"}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": 3,
        "lora_alpha": 12,
        "alpha_pattern": {"ffn.0": 4},
        "rank_pattern": {"ffn.0": 8},
        "use_rslora": False,
        "init_lora_weights": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return [folder / "adapter_config.json", folder / "adapter_config.json", folder / "adapter_model.safetensors"]


def either(binary: tuple, text: tuple) -> tuple:
    """Mutations that look at what they are given."""

    def mutate(content: bytes, random: Random) -> bytes:
        return random.choice(text if content[:1] == b"{" else binary)(content, random)

    return (mutate,)


@reader("lora", either(mutations.SAFETENSORS, mutations.JSON))(write_lora)
def read_lora(folder):
    from lyra_core.models import lora_files

    source = folder / "adapter_model.safetensors"
    with files.reading(source):  # as `convert` does
        return [
            entry.read(entry.dtype) for entry in lora_files.converted(source, tensor_files.read_entries(source)).entries
        ]


@reader("workflow", mutations.JSON)(named("w.json", lambda file: file.write_text(json.dumps(GRAPH))))
def read_workflow(folder):
    prompts = sys.modules["lyra_prompts"]
    workflow = prompts.read_workflow(folder / "w.json")
    with prompts.about(folder / "w.json"):
        prompt = prompts.to_api_format(workflow, INFO)
        prompts.apply_settings(prompt, ["EmptyImage.width=32"], folder, INFO)
        prompts.check(prompt, INFO)
        return prompts.muted_outputs(workflow, INFO)


INFO = {
    "EmptyImage": {
        "input": {
            "required": {
                "width": ["INT", {"min": 1}],
                "height": ["INT", {}],
                "batch_size": ["INT", {}],
                "color": ["INT", {}],
            }
        },
        "input_order": {"required": ["width", "height", "batch_size", "color"]},
        "output": ["IMAGE"],
        "output_name": ["IMAGE"],
        "output_node": False,
        "python_module": "nodes",
        "name": "EmptyImage",
    },
    "PreviewImage": {
        "input": {"required": {"images": ["IMAGE"]}},
        "input_order": {"required": ["images"]},
        "output": [],
        "output_node": True,
        "python_module": "nodes",
        "name": "PreviewImage",
    },
}
GRAPH = {
    "nodes": [
        {
            "id": 1,
            "type": "EmptyImage",
            "inputs": [],
            "mode": 0,
            "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": [1]}],
            "widgets_values": [64, 64, 1, 0],
        },
        {
            "id": 2,
            "type": "PreviewImage",
            "inputs": [{"name": "images", "type": "IMAGE", "link": 1}],
            "mode": 0,
            "outputs": [],
            "widgets_values": [],
        },
    ],
    "links": [[1, 1, 0, 2, 0, "IMAGE"]],
    "version": 0.4,
    "definitions": {
        "subgraphs": [{"id": "7e", "name": "sub", "nodes": [{"id": 1, "type": "PreviewImage", "mode": 2}], "links": []}]
    },
}
WITH_HOST = {"lyra2_config", "lora"}


# --------------------------------------------------------------------------------------------------------------- one case


class TooSlow(BaseException):
    pass


def mutated(name: str, number: int, good: dict[Path, bytes]) -> tuple[Path, bytes]:
    """The file of a case, and what it holds; the same ones whenever it is asked for."""
    random = Random(f"{name} {number}")
    file = random.choice(list(good))
    content = random.choice(READERS[name].mutate)(good[file], random)
    if random.random() < 0.15 and content:
        content = random.choice(mutations.RAW)(content, random)
    return file, content


def fault(name: str, number: int, folder: Path, good: dict[Path, bytes]) -> str:
    """What is wrong with how a case ended; empty if nothing is."""
    file, content = mutated(name, number, good)
    file.write_bytes(content)
    try:
        found = READERS[name].read(folder)
        try:
            READERS[name].check(found)
        except Exception as problem:
            return f"accepted: {type(problem).__name__} {problem}"
    except clear_errors(name) as problem:
        told = str(problem)
        if "alloc" in told.lower() or "not enough memory" in told:
            return f"memory: {told}"
        if folder.name not in told and file.name not in told:
            return f"without its file: {type(problem).__name__}: {told}"
    except TooSlow:
        return f"took more than {MOST_SECONDS:g} seconds"
    except MemoryError:
        return "memory: MemoryError"
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"
    finally:
        file.write_bytes(good[file])
    return ""


def clear_errors(name: str) -> type[Exception]:
    return sys.modules["lyra_prompts"].WorkflowError if name == "workflow" else files.FileError


def prepared(name: str, folder: Path) -> dict[Path, bytes]:
    """Good files, and what they hold; they are read once."""
    mutables = READERS[name].write(folder)
    READERS[name].check(READERS[name].read(folder))
    return {file: file.read_bytes() for file in mutables}


# ------------------------------------------------------------------------------------------------------- a child for many


def work(name: str, numbers: range, folder: Path, good: dict, now, told) -> None:
    """Look at cases, tell of each that it has begun, and how those ended that did not end well."""
    warnings.simplefilter("ignore")
    faulthandler.disable()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries that complain

    def stop(*_):
        raise TooSlow

    signal.signal(signal.SIGPROF, stop)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MOST_MEMORY,) * 2)
    for number in numbers:
        now.value = number
        signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)  # of the processor's time, whatever else runs
        wrong = fault(name, number, folder, good)
        signal.setitimer(signal.ITIMER_PROF, 0)
        if wrong:
            told.send((number, wrong[:300]))
    told.send(None)
    os._exit(0)


def faults(name: str, folder: Path, good: dict[Path, bytes]) -> list[tuple[int, str]]:
    """How cases ended that did not end well: number and what happened."""
    context, numbers, wrong = multiprocessing.get_context("fork"), range(FIRST, FIRST + CASES), []
    while numbers:
        now, (told, end) = context.RawValue("q", numbers[0]), context.Pipe(duplex=False)
        child = context.Process(target=work, args=(name, numbers, folder, good, now, end), daemon=True)
        child.start()
        end.close()
        last, since = None, time.monotonic()
        while True:
            if now.value != last:
                last, since = now.value, time.monotonic()
            if told.poll(0.5):
                try:
                    item = told.recv()
                except EOFError:
                    child.join()
                    item = (now.value, f"the process died ({child.exitcode})")
                    numbers = range(now.value + 1, numbers.stop)
            elif time.monotonic() - since > HUNG:
                child.kill()
                child.join()
                continue  # and its end is read
            else:
                continue
            if item is None:
                numbers = range(0)
                break
            wrong.append(item)
            if not child.is_alive() and item[1].startswith("the process died"):
                break
        child.join()
    for file, content in good.items():
        file.write_bytes(content)
    return wrong


def kind(told: str) -> str:
    """A fault without the numbers and names of one case."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|[-+.\d]+|/\S+", "_", told)[:90]


@pytest.mark.skipif(sys.platform != "linux", reason="children with limits of memory are made on Linux only")
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused_by_name(name, tmp_path, request, launcher):
    if name in WITH_HOST:
        request.getfixturevalue("comfy_host")
    sys.modules["lyra_prompts"] = launcher.prompts
    folder = tmp_path / f"{name}-files"
    folder.mkdir()
    good = prepared(name, folder)
    asked, _, number = AGAIN.partition(":")
    if AGAIN:
        if asked != name:
            pytest.skip("another case was asked for")
        file, content = mutated(name, int(number), good)
        kept = Path(shutil.copytree(folder, Path(f"{name}-{number}"), dirs_exist_ok=True))
        (kept / file.relative_to(folder)).write_bytes(content)
        print(f"the case is in {kept.resolve()}")
        return READERS[name].check(READERS[name].read(kept))
    wrong = faults(name, folder, good)
    kinds = defaultdict(list)
    for number, told in wrong:
        kinds[kind(told)].append((number, told))
    lines = [
        f"{len(cases)} x {cases[0][1]}   (cases {', '.join(str(number) for number, _ in cases[:4])})"
        for cases in sorted(kinds.values(), key=len, reverse=True)
    ]
    if wrong:
        again = f"LYRA2_FUZZ={name}:{wrong[0][0]} python tools/comfy.py test -s {Path(__file__).relative_to(PROJECT)}"
        pytest.fail(
            f"{name}: {len(wrong)} of {CASES} ended badly:\n"
            + "\n".join([*lines[:12], f"Make one again with {again}"]),
            pytrace=False,
        )


def spin(folder: Path) -> None:
    while True:
        pass


def refuse(folder: Path) -> None:
    raise files.FileError("something is wrong")


def crash(folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


@pytest.mark.skipif(sys.platform != "linux", reason="children with limits of memory are made on Linux only")
@pytest.mark.parametrize(
    ("read", "check", "says"),
    [
        (lambda folder: {}["a"], None, "KeyError"),
        (lambda folder: bytearray(3 << 30), None, "memory"),
        (lambda folder: None, lambda value: 1 / 0, "accepted: ZeroDivisionError"),
        (refuse, None, "without its file"),
        (spin, None, "took more than"),
        (crash, None, "the process died (-11)"),
    ],
)
def test_every_bad_end_of_a_case_is_noticed(monkeypatch, tmp_path, read, check, says):
    module = sys.modules[__name__]
    monkeypatch.setattr(module, "CASES", 2)
    monkeypatch.setattr(module, "MOST_SECONDS", 0.2)
    monkeypatch.setitem(READERS, "bad", Reader(lambda folder: [], read, mutations.RAW, check or (lambda value: None)))
    (tmp_path / "file").write_bytes(b"content")
    found = faults("bad", tmp_path, {tmp_path / "file": b"content"})
    assert [number for number, _ in found] == [FIRST, FIRST + 1] and all(told.startswith(says) for _, told in found)
