"""ComfyUI as a library, for the tools and tests that need no server."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

TOOLS = Path(__file__).resolve().parent


def load(name: str, file: Path) -> ModuleType:
    """Import one file under a name of its own, whatever sys.path says."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def boot(base: Path | None = None) -> Path:
    """Make `comfy`, `nodes` and the rest of the host importable; returns its folder.

    `base` holds its models, input and output folders. Runs on the CPU where there is no GPU.
    """
    host = load("lyra_comfy", TOOLS / "comfy.py").find_host()
    if not any(type(finder).__name__ == "_BeforeFirstImport" for finder in sys.meta_path):
        load("lyra_host_shim", TOOLS / "host_shim" / "sitecustomize.py")
    # tools/comfy.py would hide the host's comfy, and our nodes/ its nodes.py
    others = [entry for entry in sys.path if Path(entry or ".").resolve() not in (TOOLS, TOOLS.parent, host)]
    sys.path[:] = [str(host), *others, str(TOOLS.parent)]
    import torch
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    if base is not None:
        args.base_directory = str(base)
    return host
