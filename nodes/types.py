"""The sockets of this pack, and small crossings between them and the host's types."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import folder_paths
import torch
from comfy.model_management import get_free_memory, throw_exception_if_processing_interrupted
from comfy.utils import ProgressBar
from comfy_api.latest import io
from comfy_execution.utils import get_executing_context
from PIL import Image

from ..lyra_core import files

CATEGORY = "Lyra 2"
PICTURES_PER_SECOND = 4
LONGEST_NAME, LONGEST_PATH = 255, 2048  # bytes

World = io.Custom("LYRA2_WORLD")  # lyra_core.world.world.World
Cameras = io.Custom("LYRA2_CAMERAS")  # lyra_core.cameras.camera.Cameras
Depth = io.Custom("LYRA2_DEPTH")  # tuple of lyra_core.memory.depth.DepthMap, one per picture
Plan = io.Custom("LYRA2_PLAN")  # lyra_core.world.world.ChunkPlan
History = io.Custom("LYRA2_HISTORY")  # nodes.generation.Packed
DepthEstimator = io.Custom("LYRA2_DEPTH_ESTIMATOR")  # lyra_core.memory.depth_alignment.DepthEstimator
MogeGeometry = io.Custom("MOGE_GEOMETRY")
Da3Geometry = io.Custom("DA3_GEOMETRY")


def colour(image: torch.Tensor) -> torch.Tensor:
    """An IMAGE batch (B, H, W, C) as three channels: grey is repeated, alpha is dropped as the reference does."""
    if image.ndim != 4 or image.shape[-1] not in (1, 3, 4) or not len(image):
        raise ValueError(f"expected pictures (batch, height, width, 1, 3 or 4 channels), found {tuple(image.shape)}")
    return image.expand(*image.shape[:3], 3) if image.shape[-1] == 1 else image[..., :3]


def progress(total: int = 1, size: int = 512) -> Callable[[int, int, torch.Tensor | None], None]:
    """A callback (done, total, uint8 picture or None) that moves the node's bar, shows the picture and obeys an interrupt.

    Its total may be 0: then it is the one given here. At most PICTURES_PER_SECOND are shown, and always the last: a slow
    link or page would fall behind otherwise.
    """
    bar, whole, next_picture = ProgressBar(total), total, 0.0

    def on_step(done: int, total: int = 0, picture: torch.Tensor | None = None) -> None:
        nonlocal next_picture
        throw_exception_if_processing_interrupted()
        preview, total = None, total or whole
        if picture is not None and (done >= total or time.monotonic() >= next_picture):
            preview = ("JPEG", Image.fromarray(picture.cpu().numpy()), size)
            next_picture = time.monotonic() + 1 / PICTURES_PER_SECOND
        bar.update_absolute(done, total, preview)

    return on_step


def stop_if_interrupted(*_done) -> None:
    """What loops call that have nothing to show."""
    throw_exception_if_processing_interrupted()


def afford(needed: int, what: str) -> None:
    """MemoryError with both numbers if `what` takes more bytes than this machine has free."""
    free = get_free_memory(torch.device("cpu"))
    if needed > free:
        raise MemoryError(
            f"{what} takes {needed / 2**30:,.1f} GiB of memory at least, and {free / 2**30:,.1f} GiB are free; take fewer frames or "
            "smaller pictures, or close other programs"
        )


def running_server():
    """The host's server; None where nodes run without one. Its module is not imported for this: it takes seconds."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def show(shown: dict) -> None:
    """Tell the browser what a running node has to show before it is done; without a server or a page nobody hears it."""
    node, server = get_executing_context(), running_server()
    if node is None or server is None or server.client_id is None:
        return
    message = {"node": node.node_id, "display_node": node.node_id, "output": shown, "prompt_id": node.prompt_id}
    server.send_sync("executed", message, server.client_id)


def input_files(*suffixes: str) -> list[str]:
    """Files of the input folder and its subfolders with one of these endings, in capitals or not, as names relative to it."""
    base = Path(folder_paths.get_input_directory())
    wanted = tuple(s.casefold() for s in suffixes)
    found = (f.relative_to(base).as_posix() for f in files.walk(base) if f.name.casefold().endswith(wanted))
    return list(filter(is_text, found))


def input_folders(*names: str) -> list[str]:
    """Folders in the input folder that hold files of all these names, in capitals or not."""
    base, found = Path(folder_paths.get_input_directory()), {}
    for file in files.walk(base):
        found.setdefault(file.parent, set()).add(file.name.casefold())
    folders = (folder.relative_to(base).as_posix() for folder, has in found.items() if has.issuperset(names))
    return list(filter(is_text, folders))


def is_text(name: str) -> bool:
    """Whether a name can be written and sent; on Linux files may have others, which stop the host where it says them."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def input_path(name: str) -> Path:
    """The path of a file or folder in the input folder, or of a link there; ValueError for names that lead out of it."""
    base = Path(folder_paths.get_input_directory()).resolve()
    _check_name(name)
    path = Path(os.path.abspath(base / name))  # links are followed later: who may put one there may open what it leads to
    if path != base and base not in path.parents:
        raise ValueError(f"{name!r} is no path inside the input folder; use a name from the list")
    return path


def fingerprint(*paths: Path) -> str:
    """Changes exactly when the content of one of the files does, or of any file in one of the folders."""
    digest = hashlib.sha256()
    for path in paths:
        read = files.walk(path) if path.is_dir() else [path] if path.is_file() else []
        for file in read:
            digest.update(f"{file.relative_to(path)}:{file.stat().st_size}\n".encode("utf-8", "surrogateescape"))
            with open(file, "rb") as opened:
                while block := opened.read(1 << 20):
                    digest.update(block)
        digest.update(b"\0")
    return digest.hexdigest()


def _check_name(name: str) -> None:
    """ValueError for what no system takes for a path: no text, null bytes, halves of letters, names too long."""
    shown = str(name)[:80].encode("ascii", "backslashreplace").decode()
    if not isinstance(name, str):
        raise ValueError(f"{shown} is no name; use a text")
    try:
        longest = max(len(part.encode()) for part in name.replace("\\", "/").split("/"))
    except UnicodeEncodeError:
        raise ValueError(f"{shown!r} has half a letter (a surrogate) in it; use a plain name") from None
    if "\0" in name:
        raise ValueError(f"{shown!r} has a null byte in it; use a plain name")
    if longest > LONGEST_NAME or len(name.encode()) > LONGEST_PATH:
        raise ValueError(f"{shown!r}... is {len(name)} letters long; use a shorter name, of at most {LONGEST_NAME} bytes")


def inside(base: Path, name: str) -> Path:
    """base/NAME; ValueError for names that lead out of the folder or are none."""
    _check_name(name)
    path = (base.resolve() / name).resolve()
    if not name.strip() or base.resolve() not in path.parents:
        raise ValueError(f"{name!r} is no path inside {base}; use a plain name")
    return path


def output_folder(name: str) -> Path:
    """output/NAME, such as worlds/my_world; ValueError for names that lead out of the output folder."""
    return inside(Path(folder_paths.get_output_directory()), name)
