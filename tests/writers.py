"""Servers that grow one world at the same time, and whether all that they said they saved is there."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

from lyra_core.cameras.camera import pinhole
from lyra_core.memory import depth
from lyra_core.world import world, world_files

FRAMES = 8  # of a chunk


def photo(size: tuple[int, int] = (64, 96)) -> world.World:
    """A world of one picture of a room."""
    import torch

    room = depth.room_box(size, pinhole(size, 80.0).K[0], (0.5, 0.5), (0.3, 0.3, 0.7, 0.7), 4.0)
    return world.begin(torch.rand(*size, 3, generator=torch.Generator().manual_seed(1)), room.depth, room.camera)


def one_walk(folder: str, state: str, chunks: int, strength: float) -> dict:
    """The prompt of a walk from a state of the folder, which is saved there."""
    move = {"preset": "horizontal_simple", "preset.direction": "right", "preset.strength": strength, "frames": 1 + chunks * FRAMES}
    graph = {
        "load": ("Lyra2LoadWorld", {"folder": folder, "chunks": -1, "branch": state}),
        "frames": ("Lyra2WorldFrames", {"world": ["load", 0], "first": 0, "count": 1, "backwards": False}),
        "path": ("Lyra2PresetTrajectory", {"depth": ["frames", 3], **move, "seed": 0}),
        "walk": (
            "Lyra2PreviewChunks",
            {"world": ["load", 0], "cameras": ["path", 0], "retrieve": 0, "chunk_frames": FRAMES, "save_to": folder},
        ),
    }
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in graph.items()}


def grow_together(launcher, servers: list, folder: str, seconds: float, seed: int = 1) -> list[list[str]]:
    """Each server grows the world of `folder` from states that it or another made; the states that each said it saved."""
    world_files.save(photo(), servers[0].output / folder)
    first = photo().key
    said: list[list[str]] = [[] for _ in servers]
    wrong: list[BaseException] = []
    until = time.monotonic() + seconds

    def work(number: int) -> None:
        draw = random.Random(seed + number)
        try:
            while time.monotonic() < until:
                begun = draw.choice([first, *(state for some in said for state in some[-3:])])
                outputs = launcher.run_prompt(servers[number], one_walk(folder, begun[:16], draw.choice([1, 2]), draw.uniform(0.05, 0.5)))
                said[number].append(outputs["walk"]["lyra2_world"][0]["state"])
        except BaseException as problem:  # the other one shall end too, and the caller shall see it
            wrong.append(problem)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(servers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong:
        raise wrong[0]
    return said


def lost(folder: Path, said: list[list[str]]) -> list[str]:
    """Which of the states that somebody said he saved are not listed, or don't load to the last byte, and why."""
    listed = world_files.read_manifest(folder)
    missing = [f"{state} is not listed" for some in said for state in some if state not in listed]
    faults = [(entry.file, world_files.damage(folder, entry)) for entry in listed.values()]
    missing += [f"{file} {fault}" for file, fault in faults if fault]
    for state in {state for some in said for state in some} & set(listed):
        if world_files.load(folder, branch=state).key != state:
            missing.append(f"{state} loads as another")
    return missing
