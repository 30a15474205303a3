"""The public functions of the rooms, on another device: devices.py has the cases, elsewhere.py the device."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import devices
import pytest
import torch

import lyra_core

ROOMS = ("cameras", "memory", "conditioning", "world", "splats")
GEOMETRY = ("Tensor", "Cameras", "Keyframe", "SpatialMemory", "Points", "Gaussians", "Patches", "Source", "ChunkPlan")
CASES = [f"{room}.{name}" for room, cases in devices.CASES.items() for name in cases]


@pytest.fixture(scope="module")
def there() -> dict:
    paths = os.pathsep.join(str(Path(folder)) for folder in (Path(devices.__file__).parent.parent, Path(devices.__file__).parent))
    command = [sys.executable, devices.__file__]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_another_device_gives_the_same(there, case):
    assert there["found"][case]["error"] == ""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_gives_the_same():
    cases = {f"{room}.{name}": run for room, runs in devices.CASES.items() for name, run in runs.items()}
    found = {case: devices.on_a_gpu(run, devices.scene()) for case, run in cases.items()}
    assert [case for case, numbers in found.items() if numbers["off"] > 2e-3 * numbers["of"]] == []


# of a source or a keyframe, and of a view
@pytest.mark.parametrize(
    ("case", "waits"),
    [("guides", 5 * 4 + 1), ("warped views", 4), ("known depth of the keyframes", 5 * 4), ("retrieval among 11 keyframes", 11 * 8), ("invented", 80)],
)
def test_a_chunk_keeps_a_gpu_waiting_seldom(there, case, waits):
    assert there["counts"][case]["waits"] <= waits
    assert there["counts"][case]["kernels"] > 0


def test_every_public_function_of_geometry_is_a_case_or_belongs_to_the_processor():
    left = []
    for room in ROOMS:
        for file in pkgutil.iter_modules(importlib.import_module(f"lyra_core.{room}").__path__):
            module = importlib.import_module(f"lyra_core.{room}.{file.name}")
            for name, function in vars(module).items():
                own = inspect.isfunction(function) and function.__module__ == module.__name__ and name[0] != "_"
                where = f"{room}.{file.name}"
                if own and any(kind in str(inspect.signature(function)) for kind in GEOMETRY) and where not in devices.PROCESSOR:
                    left.append(f"{where}.{name}")
    known = {*CASES, *devices.PROCESSOR}
    assert lyra_core and sorted(set(left) - known) == []
    assert sorted(name for name in devices.PROCESSOR if name.count(".") == 2 and name not in left) == []
