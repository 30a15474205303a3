"""What `check` says of a world's folder, and that `--repair` keeps all that is whole and deletes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from lyra_core.cameras.camera import pinhole
from lyra_core.world import world, world_check, world_files
from lyra_core.world.world_files import WorldFileError

SIZE = (16, 32)


def grown(begun: world.World, seeds: str) -> world.World:
    for seed in seeds:
        plan = world.plan(begun, pinhole(SIZE, 20.0, 4), 0)
        frames = torch.full((4, *SIZE, 3), ord(seed), dtype=torch.uint8)
        depths = {frame: torch.full(SIZE, 2.0) for frame in world.keyframe_ids(plan)}
        begun = world.append(begun, plan, frames, torch.zeros(4, *SIZE, dtype=torch.bool), depths, seed, {"seed": seed})
    return begun


@pytest.fixture
def main() -> world.World:
    """Three chunks, a, b and c."""
    return grown(world.begin(torch.full((*SIZE, 3), 0.5), torch.full(SIZE, 3.0), pinhole(SIZE, 20.0)), "abc")


@pytest.fixture
def branch(main) -> world.World:
    """Another way on after a: d, e."""
    return grown(world.rewind(main, 1), "de")


@pytest.fixture
def folder(main, branch, tmp_path) -> Path:
    world_files.save(branch, tmp_path / "w")
    world_files.save(main, tmp_path / "w")
    return tmp_path / "w"


def of(folder: Path, key: str) -> Path:
    return folder / f"{key[:24]}.safetensors"


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def contents(folder: Path) -> set[bytes]:
    return {file.read_bytes() for file in folder.iterdir()}


def rehashed(found: world.World) -> tuple[str, ...]:
    """Its keys by all that can be read of it."""
    chunks = [world.Chunk(c.frames, c.invented_bits, c.cameras, c.prompt, c.settings, c.newest, c.latents)
              for c in (found.first, *found.chunks)]  # fmt: skip
    for keyframe in found.memory.keyframes:
        assert keyframe.depth.min() > 0
    return world.World(chunks[0], tuple(chunks[1:]), found.memory).keys


def test_a_whole_world_is_called_whole_and_left_alone(folder, launcher, capsys):
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    assert launcher.check_world(folder, True) == 0
    said = capsys.readouterr().out
    assert "world.json: whole" in said and said.count(": whole\n") == 7 and "6 of 6 states are whole" in said
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before


def test_a_damaged_branch_is_set_aside_and_the_rest_kept(folder, main, branch, launcher, capsys):
    """d is damaged: d and e are lost, e's file stays; a, b and c go on."""
    flip(of(folder, branch.keys[2]), -1)
    before = contents(folder)
    assert launcher.check_world(folder, False) == 1
    said = capsys.readouterr().out
    assert f"{of(folder, branch.keys[2]).name} (state {branch.keys[2][:8]}): is damaged: its " in said
    assert "whole, but a state before it is not" in said and "4 of 6 states are whole" in said
    assert contents(folder) == before
    assert launcher.check_world(folder, True) == 0
    assert before <= contents(folder)
    assert set(world_files.read_manifest(folder)) == set(main.keys)
    assert rehashed(world_files.load(folder)) == main.keys
    assert of(folder, branch.key).exists() and (folder / f"{of(folder, branch.keys[2]).name}.damaged").exists()
    world_files.save(branch, folder)
    assert rehashed(world_files.load(folder)) == branch.keys and set(world_files.read_manifest(folder)) == {*main.keys, *branch.keys}


def test_the_latest_state_goes_back_to_what_is_whole(folder, main, branch):
    flip(of(folder, main.keys[3]), -1)
    world_check.repair(folder)
    assert world_files.latest(folder)[0] == main.keys[2]
    assert rehashed(world_files.load(folder, branch=branch.key)) == branch.keys


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.unlink(),
        lambda file: file.write_text("{"),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(b"\xff\0" * 500),
        lambda file: file.write_text(file.read_text().replace('"prompt": "b"', '"prompt": "x"')),
        lambda file: file.write_text(file.read_text().replace('"version": 3', '"version": 0')),
        lambda file: file.write_text(json.dumps({**json.loads(file.read_text()), "chunks": [], "latest": 3})),
    ],
)
def test_a_damaged_or_lost_list_is_made_again_from_the_files(folder, main, branch, damage):
    damage(folder / "world.json")
    before = contents(folder)
    with pytest.raises(WorldFileError):
        world_files.load(folder)
    assert not world_check.check(folder).is_whole
    world_check.repair(folder)
    assert world_check.check(folder).is_whole and before <= contents(folder)
    for one in (main, branch):
        found = world_files.load(folder, branch=one.key)
        assert rehashed(found) == one.keys and [c.prompt for c in found.chunks] == [c.prompt for c in one.chunks]


def test_a_file_is_not_believed_what_its_keys_do_not_say(folder, main):
    """A header that says another prompt: the list is lost, so only the keys can tell."""
    (folder / "world.json").unlink()
    file = of(folder, main.keys[3])
    file.write_bytes(file.read_bytes().replace(rb"\"prompt\": \"c\"", rb"\"prompt\": \"x\""))
    world_check.repair(folder)
    assert main.keys[3] not in world_files.read_manifest(folder) and main.keys[2] in world_files.read_manifest(folder)
    assert (folder / f"{file.name}.damaged").exists()


def test_nothing_whole_and_worlds_of_later_versions_are_left_as_they_are(folder, main, launcher, capsys):
    listed = json.loads((folder / "world.json").read_text())
    (folder / "world.json").write_text(json.dumps({**listed, "version": 4}))
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    assert launcher.check_world(folder, True) == 1 and "version 4; this pack reads" in capsys.readouterr().err
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before
    (folder / "world.json").write_text(json.dumps(listed))
    of(folder, main.keys[0]).write_bytes(b"")
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    assert launcher.check_world(folder, True) == 1 and "not even the photo" in capsys.readouterr().err
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before


def test_what_is_no_world_is_not_touched(tmp_path, launcher, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert launcher.check_world(tmp_path, True) == 1 and "not a saved world" in capsys.readouterr().err
    assert launcher.check_world(tmp_path / "none", True) == 1 and "is no folder" in capsys.readouterr().err
    assert [f.name for f in tmp_path.iterdir()] == ["notes.txt"]


def test_worlds_without_sums_are_checked_and_repaired_too(tmp_path):
    case = Path(__file__).parent / "cases" / "world-folder-lost-a-file"
    whole, damaged = (Path(shutil.copytree(case / name, tmp_path / name)) for name in ("whole", "damaged"))
    assert world_check.check(whole).is_whole and not world_check.check(damaged).is_whole
    world_check.repair(damaged)
    assert len(world_files.load(damaged)) == 1 and len(list(damaged.glob("*.safetensors"))) == 2
    world_files.save(world_files.load(whole), damaged)
    assert len(world_files.load(damaged)) == 9
