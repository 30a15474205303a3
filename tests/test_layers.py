"""Who may import whom, as data. The maths runs in plain torch: nothing in it knows the host, a device or a screen."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

CORE = Path(__file__).resolve().parent.parent / "lyra_core"

# A module may import the modules of its row, and nothing else of this project. A new module gets a row here first.
MAY_IMPORT = {
    "camera": set(),
    "framepack": set(),
    "history": {"framepack"},
    "schedules": set(),
    "resampling": set(),
    "presets": {"camera"},
    "camera_path": {"camera"},
    "trajectory": {"camera", "camera_path", "presets"},
    "warp": {"camera"},
    "depth": {"camera"},
    "memory": {"camera"},
    "gaussians": {"camera"},
    "metrics": {"camera"},
    "path_picture": {"camera"},
    "tsdf": {"camera"},
    "surface": {"tsdf"},
    "splat_files": {"gaussians"},
    "usd_files": {"camera", "gaussians", "splat_files", "surface"},
    "bundle": {"camera", "camera_files", "gaussians"},
    "rasterize": {"camera", "gaussians"},
    "camera_files": {"camera", "camera_path", "trajectory"},
    "correspondence": {"camera", "warp", "framepack", "history", "memory"},
    "gaussian_adapter": {"camera", "gaussians"},
    "recon": {"camera", "depth_alignment", "gaussian_adapter", "gaussians", "trajectory"},
    "optimize": {"camera", "gaussians", "metrics"},
    "reconstruct": {"camera", "gaussian_adapter", "gaussians", "recon"},
    "world": {"camera", "memory", "framepack", "warp"},
    "world_files": {"camera", "memory", "world"},
    "caption": {"camera", "memory", "warp", "world"},
    "preview": {"camera", "depth", "warp", "memory", "world", "world_files"},
    "depth_alignment": {"camera", "depth", "memory", "warp"},
}
THIRD_PARTIES = {"torch", "numpy", "scipy", "safetensors"}
EXTRA = {"path_picture": {"PIL"}, "bundle": {"PIL"}}  # they make pictures, with what the host has anyway
OPTIONAL = {"fast_simplification", "gsplat", "pxr"}  # only inside the function that needs it


def imports(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Every imported module: its first name, and whether it is one of ours."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            # one dot stays among the siblings, two would leave the package
            yield from (("." * (node.level - 1) + name.split(".")[0], True) for name in names)
        elif isinstance(node, ast.ImportFrom):
            ours = node.module.split(".")[0] == "lyra_core"
            yield node.module.split(".")[1 if ours and "." in node.module else 0], ours


def faults(source: str, module: str) -> list[str]:
    """What a core module of this source does against the rule."""
    tree = ast.parse(source)
    in_functions = {
        id(inner) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for inner in ast.walk(node)
    }
    # a core function follows its inputs' device: it may ask which one that is, but never name one
    questions = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.Compare) for inner in ast.walk(node)}
    found = []
    for name, ours in imports(tree):
        if ours and name not in MAY_IMPORT[module]:
            found.append(f"imports {name}, but may import only {sorted(MAY_IMPORT[module])} of this project")
        if not ours and name not in THIRD_PARTIES | OPTIONAL | EXTRA.get(module, set()) | sys.stdlib_module_names:
            found.append(f"imports {name}, which a plain torch install does not have")
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)) and id(node) not in in_functions:
            found += [f"imports {name} outside of a function" for name, _ in imports(node) if name in OPTIONAL]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            found.append(f"prints, on line {node.lineno}")
        if isinstance(node, ast.Constant) and str(node.value).split(":")[0] == "cuda" and id(node) not in questions:
            found.append(f"names the device {node.value!r}, on line {node.lineno}")
    return found


MODULES = sorted(file.stem for file in CORE.glob("*.py") if file.stem != "__init__")


@pytest.mark.parametrize("module", MODULES)
def test_a_core_module_imports_only_what_lies_below_it(module):
    assert module in MAY_IMPORT, f"say in MAY_IMPORT which modules {module} may import"
    assert faults((CORE / f"{module}.py").read_text(encoding="utf-8"), module) == []


def test_the_rule_itself_has_no_circle():
    placed: set[str] = set()
    while len(placed) < len(MAY_IMPORT):
        ready = {module for module, below in MAY_IMPORT.items() if module not in placed and below <= placed}
        assert ready, f"these import each other in a circle: {sorted(MAY_IMPORT.keys() - placed)}"
        placed |= ready


def test_importing_the_package_imports_nothing():
    assert list(imports(ast.parse((CORE / "__init__.py").read_text(encoding="utf-8")))) in ([], [("__future__", False)])


@pytest.mark.parametrize(
    "source, says",
    [
        ("from .world import World", "imports world"),
        ("from . import world", "imports world"),
        ("from .models.lyra2 import Lyra2", "imports models"),
        ("from lyra_core.world import World", "imports world"),
        ("from ..nodes import types", "imports .nodes"),
        ("def f():\n    from .world import plan", "imports world"),
        ("import comfy.model_base", "imports comfy"),
        ("from folder_paths import models_dir", "imports folder_paths"),
        ("import server", "imports server"),
        ("import nodes", "imports nodes"),
        ("from einops import rearrange", "imports einops"),
        ("import gsplat", "outside of a function"),
        ("print('done')", "prints, on line 1"),
        ("x.to('cuda')", "device 'cuda'"),
        ("x.to(device='cuda:0')", "device 'cuda:0'"),
    ],
)
def test_each_breach_of_the_rule_is_found(source, says):
    assert any(says in fault for fault in faults(source, "memory"))


@pytest.mark.parametrize(
    "source",
    [
        "from .camera import Cameras",
        "from lyra_core.camera import Cameras",
        "import torch.nn.functional as F",
        "import json",
        "x.device.type == 'cuda'",
        "def f():\n    import gsplat\n    from scipy.sparse import csc_matrix",
        "'''Runs on cuda, too.'''",
    ],
)
def test_what_the_rule_allows_is_not_found(source):
    assert faults(source, "memory") == []
