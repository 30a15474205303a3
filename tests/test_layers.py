"""Who may import whom, as data. The maths runs in plain torch: nothing in it knows the host, a device or a screen."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

CORE = Path(__file__).resolve().parent.parent / "lyra_core"

# The rooms from the top floor down: a module may import those beside it and those of the floors below. Loose modules of
# the package are floors of their own. `models`, which knows the host, lives above all of them.
FLOORS = ("models", "training", "world", "exports", "conditioning", "splats", "memory", "metrics", "cameras", "array_files", "files")
THIRD_PARTIES = {"torch", "numpy", "scipy", "safetensors"}
EXTRA = {
    "cameras/path_picture": {"PIL"},
    "exports/bundle": {"PIL"},
    "exports/walkable": {"PIL"},
    "world/consistency_picture": {"PIL"},
}  # they make pictures, with what the host has anyway
OPTIONAL = {"OpenEXR", "coacd", "cv2", "fast_simplification", "gsplat", "pxr"}  # only inside the function that needs it


def imports(tree: ast.AST, room: str) -> Iterator[tuple[str, str | None]]:
    """Every imported module: its name, and its floor if it is one of ours ("" leaves the package)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            inside, up = [room] if room else [], node.level - 1
            for name in [node.module] if node.module else [alias.name for alias in node.names]:
                path = [*inside[: len(inside) - up], *name.split(".")]
                yield path[-1], path[0] if up <= len(inside) else ""
        elif isinstance(node, ast.ImportFrom):
            first, *inner = node.module.split(".")
            for path in [inner] if inner else [[alias.name] for alias in node.names]:
                yield (path[-1], path[0]) if first == "lyra_core" else (first, None)


def faults(source: str, module: str) -> list[str]:
    """What a core module of this source, `room/name` or `name`, does against the rule."""
    tree = ast.parse(source)
    room, name = module.rpartition("/")[::2]
    allowed = FLOORS[FLOORS.index(room or name) + (not room) :]
    in_functions = {
        id(inner) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for inner in ast.walk(node)
    }
    # a core function follows its inputs' device: it may ask which one that is, but never name one
    questions = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.Compare) for inner in ast.walk(node)}
    found = []
    for name, floor in imports(tree, room):
        if floor is not None and floor not in allowed:
            found.append(f"imports {name} of {floor or 'outside'}, but may import only from {', '.join(allowed)}")
        if floor is None and name not in THIRD_PARTIES | OPTIONAL | EXTRA.get(module, set()) | sys.stdlib_module_names:
            found.append(f"imports {name}, which a plain torch install does not have")
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)) and id(node) not in in_functions:
            found += [f"imports {name} outside of a function" for name, _ in imports(node, room) if name in OPTIONAL]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            found.append(f"prints, on line {node.lineno}")
        if isinstance(node, ast.Constant) and str(node.value).split(":")[0] == "cuda" and id(node) not in questions:
            found.append(f"names the device {node.value!r}, on line {node.lineno}")
    return found


MODULES = {
    file.relative_to(CORE).with_suffix("").as_posix(): file.read_text(encoding="utf-8")
    for file in sorted([*CORE.glob("*.py"), *CORE.glob("*/*.py")])
    if file.stem != "__init__"
}
PLAIN = [module for module in MODULES if not module.startswith("models/")]


@pytest.mark.parametrize("module", PLAIN)
def test_a_core_module_imports_only_what_lies_below_it(module):
    assert faults(MODULES[module], module) == []


def test_every_room_is_a_floor():
    rooms = {module.split("/")[0] for module in MODULES}
    assert rooms == set(FLOORS)


def test_modules_of_one_room_do_not_import_each_other_in_a_circle():
    below = {
        module: {f"{floor}/{name}" for name, floor in imports(ast.parse(source), module.rpartition("/")[0]) if floor}
        for module, source in MODULES.items()
    }
    placed: set[str] = set()
    while len(placed) < len(below):
        ready = {module for module in below.keys() - placed if below[module] & below.keys() <= placed}
        assert ready, f"these import each other in a circle: {sorted(below.keys() - placed)}"
        placed |= ready


def test_importing_a_room_imports_nothing():
    for file in [CORE / "__init__.py", *CORE.glob("*/__init__.py")]:
        assert list(imports(ast.parse(file.read_text(encoding="utf-8")), "")) == [], f"{file} is more than a docstring"


@pytest.mark.parametrize(
    "source, says",
    [
        ("from ..world.world import World", "imports world of world"),
        ("from .. import world", "imports world of world"),
        ("from ..world import world_files", "imports world of world"),
        ("from ..models.lyra2 import Lyra2", "imports lyra2 of models"),
        ("from lyra_core.world.world import World", "imports world of world"),
        ("from lyra_core import world", "imports world of world"),
        ("from ...nodes import types", "imports nodes of outside"),
        ("def f():\n    from ..splats.gaussians import merge", "imports gaussians of splats"),
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
    assert any(says in fault for fault in faults(source, "memory/retrieval"))


@pytest.mark.parametrize(
    "source",
    [
        "from .warp import lift",
        "from . import warp",
        "from .. import metrics",
        "from ..cameras.camera import Cameras",
        "from lyra_core.cameras.camera import Cameras",
        "import torch.nn.functional as F",
        "import json",
        "x.device.type == 'cuda'",
        "def f():\n    import gsplat\n    from scipy.sparse import csc_matrix",
        "'''Runs on cuda, too.'''",
    ],
)
def test_what_the_rule_allows_is_not_found(source):
    assert faults(source, "memory/retrieval") == []
