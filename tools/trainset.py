#!/usr/bin/env python3
"""Adds saved worlds, scans or a video to a training set, a folder that `comfy.py train` learns from.

    python tools/comfy.py trainset SET --world WORLD...
    python tools/comfy.py trainset SET --scan PATH... --depth-model FILE [--size 832x480] [--captions TEXT|FILE.json]
    python tools/comfy.py trainset SET --video FILE --cameras FILE --depth-model FILE
    python tools/comfy.py trainset SET                  what is in it

What is there already, made from the same, is not made again.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from types import ModuleType

import host

PROJECT = host.TOOLS.parent


def pack() -> ModuleType:
    """The pack's training nodes, as the host has them."""
    import importlib
    import importlib.util

    spec = importlib.util.spec_from_file_location("lyra_pack", PROJECT / "__init__.py", submodule_search_locations=[str(PROJECT)])
    sys.modules["lyra_pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["lyra_pack"])
    importlib.import_module("lyra_pack.lyra_core.models.lyra2_host").register()
    return importlib.import_module("lyra_pack.nodes.training")


def estimator(file: Path):
    """Depth Anything 3 of a file, by the host's own loader."""
    import folder_paths
    from comfy_extras.nodes_depth_anything_3 import LoadDA3Model
    from lyra_pack.nodes.depth_estimator import Da3Estimator

    if not file.is_file():
        raise ValueError(f"{file}: there is no such depth model")
    folder_paths.add_model_folder_path("geometry_estimation", str(file.resolve().parent))
    (model,) = LoadDA3Model.execute(file.name, "default").args
    return Da3Estimator.execute(da3_model=model, resolution=0, use_cameras=True, sky="unknown").args[0]


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="comfy.py trainset", description=__doc__.partition("\n")[0])
    parser.add_argument("set", type=Path, help="the folder of the set; made if it is not there")
    parser.add_argument("--world", type=Path, nargs="+", default=[], help="folders of saved worlds")
    parser.add_argument("--scan", type=Path, nargs="+", default=[], help="transforms.json files, or folders of COLMAP text models")
    parser.add_argument("--video", type=Path, help="a video of a still place")
    parser.add_argument("--cameras", type=Path, help="of the video, one for each frame: .npz, .json or a COLMAP folder")
    parser.add_argument("--depth-model", type=Path, help="a Depth Anything 3 file, Small or Base")
    parser.add_argument("--size", default="832x480", help="width x height that scans are cropped to")
    parser.add_argument("--captions", default="", help='a text, or a JSON file such as {"0": "a street", "81": "a square"}')
    parser.add_argument("--chunk", type=int, default=80, help="frames of a chunk; 80 for Lyra 2")
    return parser


def main(words: list[str]) -> int:
    options = arguments().parse_args(words)
    try:
        add_all(options, pack())
    except (ValueError, OSError, MemoryError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    return 0


def add_all(options, training: ModuleType) -> None:
    from lyra_pack.lyra_core.cameras import camera_files
    from lyra_pack.lyra_core.world import world_files

    if not (sides := re.fullmatch(r"(\d+)x(\d+)", options.size)):
        raise ValueError(f"--size {options.size}: expected width x height, like 832x480")
    width, height = map(int, sides.groups())
    caption = options.captions
    if caption.endswith(".json"):
        caption = Path(caption).read_text(encoding="utf-8")
    depth = estimator(options.depth_model) if options.depth_model else None
    lines: list[str] = []
    for folder in options.world:
        lines += training.world_added(options.set, name_of(folder), options.chunk, world_files.load(folder))
    for path in options.scan:
        name = name_of(path.parent if path.is_file() else path)
        lines += training.scan_added(options.set, name, options.chunk, path, (height, width), caption, depth)
    if options.video:
        from comfy_api.latest import InputImpl

        if not options.cameras:
            raise ValueError("--video needs --cameras, one for each of its frames")
        cameras, video = camera_files.load_cameras(options.cameras), InputImpl.VideoFromFile(str(options.video))
        lines += training.video_added(options.set, name_of(options.video), options.chunk, video, cameras, caption, None, depth)
    print("\n".join([*lines, *training.contents(options.set)]))


def name_of(path: Path) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "_", path.resolve().stem)[:100]


if __name__ == "__main__":
    host.boot()
    sys.exit(main(sys.argv[1:]))
