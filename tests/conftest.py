"""Makes `import lyra_core` and the host work in tests, from any folder and however pytest is started."""

from __future__ import annotations

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
load_package("lyra_core", PROJECT / "lyra_core")


@pytest.fixture(scope="session")
def project() -> Path:
    return PROJECT


@pytest.fixture(scope="session")
def launcher():
    """tools/comfy.py as a module."""
    spec = importlib.util.spec_from_file_location("lyra_launcher", PROJECT / "tools" / "comfy.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["lyra_launcher"] = module
    spec.loader.exec_module(module)
    return module
