"""Makes `import lyra_core` and the host work in tests, from any folder and however pytest is started."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads on a busy machine can be ten times slower than one
import pytest  # noqa: E402
import torch  # noqa: E402

PROJECT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)


def load_package(name: str, folder: Path):
    """Import a folder as package `name` without putting its parent on sys.path, where our nodes/ would hide the host's."""
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != PROJECT]
sys.path.append(str(PROJECT / "tests"))  # what tests share
load_package("lyra_core", PROJECT / "lyra_core")
import servers  # noqa: E402

# Files that take longest, so that workers that share the suite begin with them and end together. Files that draw pages, which
# takes every core, stand where one of two workers is likely to draw at a time.
LONGEST = (
    "test_explorer_page", "test_generation_server", "test_server", "test_explorer_life", "test_lyra2_host", "test_generation",
    "test_browser", "test_fleet", "test_vace_server", "test_begin_server", "test_viewer", "test_engine_server", "test_devices",
    "test_fuzz", "test_learning", "test_ground",
)  # fmt: skip


def pytest_collection_modifyitems(config, items: list) -> None:
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def project() -> Path:
    return PROJECT


def load_tool(name: str):
    """A file of tools/ as a module `lyra_<name>`."""
    spec = importlib.util.spec_from_file_location(f"lyra_{name}", PROJECT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[f"lyra_{name}"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def launcher():
    """tools/comfy.py as a module, whose servers are forks where they can be."""
    module = load_tool("comfy")
    if servers.is_possible():
        module.start_process = servers.start_process
    return module


@pytest.fixture(scope="session")
def graphs():
    """tools/graphs as a package, with its modules."""
    package = load_package("lyra_graphs", PROJECT / "tools" / "graphs")
    for module in ("browser", "describe", "frontend", "layout", "parts"):
        importlib.import_module(f"lyra_graphs.{module}")
    return package


@pytest.fixture(scope="session")
def scenes():
    """tools/benches/scenes.py as a module: rooms of which everything is known."""
    load_package("lyra_benches", PROJECT / "tools" / "benches")
    return importlib.import_module("lyra_benches.scenes")


@pytest.fixture(scope="session")
def toy_scenes():
    """tools/train/scenes.py as a module: a seeded world of boxes."""
    load_package("lyra_train", PROJECT / "tools" / "train")
    return importlib.import_module("lyra_train.scenes")


@pytest.fixture(scope="session")
def train(comfy_host, toy_scenes):
    """tools/train as a package, with its modules."""
    for module in ("codec", "films", "gates", "marks", "painter", "pool", "recording", "release", "scoring", "sights"):
        importlib.import_module(f"lyra_train.{module}")
    return sys.modules["lyra_train"]


@pytest.fixture(scope="session")
def engines():
    """tools/benches/engines.py as a module: physics engines on an export."""
    load_package("lyra_benches", PROJECT / "tools" / "benches")
    return importlib.import_module("lyra_benches.engines")


@pytest.fixture(scope="session")
def tiny_models():
    """tools/tiny_models.py as a module."""
    return load_tool("tiny_models")


@pytest.fixture(scope="session")
def comfy_host(tmp_path_factory) -> Path:
    """The host as a library, with the Lyra 2 model registered; returns its base folder of models, input and output."""
    base = tmp_path_factory.mktemp("host")
    for folder in ("input", "output", "temp", "models/diffusion_models", "models/loras"):
        (base / folder).mkdir(parents=True)
    load_tool("host").boot(base)
    from lyra_core.models import da3_gaussians, lyra2_host

    lyra2_host.register()
    da3_gaussians.register()
    return base


@pytest.fixture(scope="session")
def pack(comfy_host):
    """The pack's nodes as the host imports them, without its server."""
    return load_package("lyra_pack", PROJECT) and importlib.import_module("lyra_pack.nodes")
