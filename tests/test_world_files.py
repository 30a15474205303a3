"""A saved world survives crashes, refuses damage, and gives back the very same bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load

from lyra_core import array_files
from lyra_core.cameras import camera_files
from lyra_core.cameras.camera import Cameras, pinhole
from lyra_core.memory import depth
from lyra_core.world import chunk_files, opened, preview, world, world_check, world_files

SIZE = (32, 48)


def photo_world() -> world.World:
    generator = torch.Generator().manual_seed(3)
    image = torch.nn.functional.interpolate(torch.rand(1, 3, 8, 12, generator=generator), SIZE, mode="bilinear")[
        0
    ].permute(1, 2, 0)
    room = depth.room_box(SIZE, pinhole(SIZE, 40.0).K[0], (0.5, 0.5), (0.3, 0.3, 0.7, 0.7), 4.0)
    return world.begin(image, room.depth, room.camera)


def path(frames: int, sideways: float = 0.0) -> Cameras:
    cameras = pinhole(SIZE, 40.0, frames)
    cameras.w2c[:, 2, 3] = -torch.linspace(0, 0.6, frames)
    cameras.w2c[:, 0, 3] = torch.linspace(0, sideways, frames)
    return cameras


def same(a: world.World, b: world.World) -> bool:
    return a.keys == b.keys and all(
        torch.equal(x.depth, y.depth) and x.frame == y.frame and torch.equal(x.camera.w2c, y.camera.w2c)
        for x, y in zip(a.memory.keyframes, b.memory.keyframes, strict=True)
    )


@pytest.fixture(scope="module")
def walked() -> world.World:
    return preview.explore(photo_world(), path(17), chunk_frames=8)


def test_a_reopened_world_is_the_one_that_was_saved(walked, tmp_path):
    world_files.save(walked, tmp_path / "w")
    reopened = world_files.load(tmp_path / "w")
    assert same(walked, reopened) and torch.equal(walked.chunks[1].invented, reopened.chunks[1].invented)
    rehashed = world.World(
        replace(reopened.first), tuple(replace(chunk) for chunk in reopened.chunks), reopened.memory
    )
    assert rehashed.keys == walked.keys  # the names still match what the files contain


def test_a_world_on_a_map_still_knows_where_when_it_is_reopened(tmp_path):
    here = (448251.0, 5411932.0, 121.0)
    begun = photo_world()
    memory = replace(begun.memory, keyframes=tuple(
        replace(k, camera=replace(k.camera, origin=here)) for k in begun.memory.keyframes))  # fmt: skip
    begun = replace(begun, first=replace(begun.first, cameras=replace(begun.first.cameras, origin=here)), memory=memory)
    grown = preview.explore(begun, replace(path(9), origin=here), chunk_frames=8)
    world_files.save(grown, tmp_path / "w")
    reopened = world_files.load(tmp_path / "w")
    assert reopened.cameras.origin == reopened.last_camera.origin == here and same(grown, reopened)
    assert {k.camera.origin for k in reopened.memory.keyframes} == {here}


def test_continuing_a_reopened_world_gives_what_never_stopping_gives(tmp_path):
    never = preview.explore(photo_world(), path(25), chunk_frames=8)
    preview.explore(photo_world(), path(25)[:17], chunk_frames=8, folder=tmp_path / "w")
    again = preview.explore(world_files.load(tmp_path / "w"), path(25)[16:], chunk_frames=8)
    assert [c.frames.equal(d.frames) for c, d in zip(never.chunks, again.chunks, strict=True)] == [True] * 3


def test_views_besides_the_photo_are_saved_too(tmp_path):
    one = photo_world()
    camera = one.first.cameras
    more = world.begin(
        world.to_float(one.frame(0)),
        one.memory[0].depth,
        camera,
        [(torch.rand(*SIZE, 3), torch.full(SIZE, 2.0), camera)],
    )
    world_files.save(more, tmp_path / "w")
    reopened = world_files.load(tmp_path / "w")
    assert reopened.memory.frames == (0, -1) and torch.equal(reopened.frame(-1), more.frame(-1))


def test_saving_again_writes_only_what_is_new(walked, tmp_path):
    first = world_files.save(world.rewind(walked, 1), tmp_path / "w")
    second = world_files.save(walked, tmp_path / "w")
    assert (len(first), len(second)) == (3, 2)


@pytest.mark.parametrize("kind", array_files.DTYPES)
def test_the_library_reads_what_is_written_without_a_copy(tmp_path, kind):
    dtype = array_files.DTYPES[kind]
    whole, table = (torch.randint(0, 2, shape).to(dtype) for shape in ((3, 5), (4, 3)))
    tensors = {"whole": whole, "again": whole, "row": table[1], "turned": table.T, "none": whole[:0], "one": whole[2, 4]}
    tensors |= {"wide": torch.rand(3, dtype=torch.float64), "byte": torch.ones(1, dtype=torch.uint8)}
    content = array_files.as_safetensors(tensors, {"told": "é\n"})
    found = load(b"".join(content))
    assert found.keys() == tensors.keys() and all(found[name].dtype == tensor.dtype for name, tensor in tensors.items())
    assert all(torch.equal(bits(found[name]), bits(tensor)) for name, tensor in tensors.items())
    (tmp_path / "a").write_bytes(b"".join(content))
    header = array_files.read_header(tmp_path / "a")
    assert header.raw == content[0] and header.metadata == {"told": "é\n"}
    assert all(place.begin % tensors[name].element_size() == 0 for name, place in header.places.items())
    begins = {np.frombuffer(piece, np.uint8).ctypes.data for piece in content[1:] if len(piece)}
    assert {tensor.data_ptr() for tensor in (whole, table[1], whole[2, 4])} <= begins and table.data_ptr() not in begins


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def test_what_is_hashed_already_is_not_hashed_again(walked, tmp_path, monkeypatch):
    """The same file, whether the sums of its frames were known before it was written or are told by another file."""
    hashed, hashes = [], world.hashes
    for module in (world, chunk_files):
        monkeypatch.setattr(module, "hashes", lambda given: (hashed.append(given := [*given]), hashes(given))[1])
    fresh = replace(walked, first=replace(walked.first), chunks=tuple(replace(chunk) for chunk in walked.chunks))
    world_files.save(fresh, tmp_path / "fresh")
    assert sum(tensor.shape == (*SIZE, 3) and tensor.dtype == torch.uint8 for given in hashed for tensor in given) == 17
    hashed.clear()
    world_files.save(fresh, tmp_path / "known")
    world_files.save(world_files.load(tmp_path / "known"), tmp_path / "told")
    assert hashed and not any(tensor.dtype == torch.uint8 for given in hashed for tensor in given)
    contents = [{f.name: f.read_bytes() for f in (tmp_path / name).glob("*.safetensors")} for name in ("fresh", "known", "told")]
    assert contents[0] == contents[1] == contents[2] and len(contents[0]) == 3


def test_worlds_of_other_sizes_share_a_folder(walked, tmp_path):
    """A second photo, or a draft at half the size, under a name that somebody gave once."""
    world_files.save(walked, tmp_path / "w")
    small = (16, 32)
    room = depth.room_box(small, pinhole(small, 30.0).K[0], (0.5, 0.5), (0.3, 0.3, 0.7, 0.7), 4.0)
    other = world.begin(torch.rand(*small, 3), room.depth, room.camera)
    grown = preview.explore(other, pinhole(small, 30.0, 9), chunk_frames=8, folder=tmp_path / "w")
    assert world_files.latest(tmp_path / "w") == (grown.key, small)
    for found in (walked, grown):
        assert same(world_files.load(tmp_path / "w", branch=found.key), found)
    world_files.save(world.rewind(walked, 1), tmp_path / "w", keep_latest=True)
    assert world_files.latest(tmp_path / "w") == (grown.key, small)
    assert same(preview.explore(photo_world(), path(17), chunk_frames=8, folder=tmp_path / "w"), walked)
    assert world_check.check(tmp_path / "w").is_whole
    (tmp_path / "w" / "world.json").unlink()
    world_check.repair(tmp_path / "w")
    assert same(world_files.load(tmp_path / "w", branch=walked.key), walked)
    assert same(world_files.load(tmp_path / "w", branch=grown.key), grown)
    opener = opened.OpenWorlds()
    sizes = [opened.summary(opener, tmp_path / "w", key)["size"] for key in (walked.key, grown.key)]
    assert sizes == [[32, 48], [16, 32]]


def test_a_branch_leaves_the_other_one_in_the_folder(walked, tmp_path):
    world_files.save(walked, tmp_path / "w")
    branch = preview.explore(world.rewind(walked, 1), path(9, 0.5), chunk_frames=8, folder=tmp_path / "w")
    assert world_files.load(tmp_path / "w").key == branch.key
    assert world_files.load(tmp_path / "w", branch=walked.key[:10]).key == walked.key
    assert world_files.load(tmp_path / "w", chunks=0).key == walked.keys[0]


def test_finished_chunks_are_not_made_again(tmp_path, monkeypatch):
    preview.explore(photo_world(), path(17), chunk_frames=8, folder=tmp_path / "w")
    made = []
    generate = preview.generate
    monkeypatch.setattr(preview, "generate", lambda *a: made.append(1) or generate(*a))
    preview.explore(photo_world(), path(25)[:17], chunk_frames=8, folder=tmp_path / "w")
    assert len(made) == 2, "another path must not reuse chunks"
    made.clear()
    preview.explore(photo_world(), path(17), chunk_frames=8, folder=tmp_path / "w")
    assert not made


@pytest.mark.parametrize("killed_at", range(6))
def test_a_kill_in_the_middle_of_a_save_loses_at_most_the_chunk_in_progress(walked, tmp_path, killed_at):
    """kill -9 in each of the six flushes of a two-chunk walk: photo and list, chunk 1 and list, chunk 2 and list."""
    script = textwrap.dedent(f"""
        import os, signal, stat, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import conftest, test_world_files as t
        flushes = iter(range(100))
        flush = os.fsync
        def die(handle):
            if stat.S_ISREG(os.fstat(handle).st_mode) and next(flushes) == {killed_at}:  # folders are flushed too
                os.kill(os.getpid(), signal.SIGKILL)
            flush(handle)
        t.world_files.os.fsync = die
        begun = t.photo_world()
        t.world_files.save(begun, t.Path({str(tmp_path / "w")!r}))
        t.preview.explore(begun, t.path(17), chunk_frames=8, folder=t.Path({str(tmp_path / "w")!r}))
    """)
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL
    if killed_at >= 2:
        assert len(world_files.load(tmp_path / "w").chunks) == (killed_at - 2) // 2
    resumed = preview.explore(photo_world(), path(17), chunk_frames=8, folder=tmp_path / "w")
    assert same(resumed, walked) and same(world_files.load(tmp_path / "w"), walked)


def test_a_full_disk_changes_nothing(walked, tmp_path, monkeypatch):
    world_files.save(world.rewind(walked, 1), tmp_path / "w")
    before = sorted(f.name for f in (tmp_path / "w").iterdir())

    def full(_handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(world_files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        world_files.save(walked, tmp_path / "w")
    assert sorted(f.name for f in (tmp_path / "w").iterdir()) == before
    assert len(world_files.load(tmp_path / "w").chunks) == 1


def edit(folder: Path, change) -> None:
    manifest = json.loads((folder / "world.json").read_text())
    change(manifest)
    (folder / "world.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "world.json").unlink(), "holds no world.json"),
        (lambda f: (f / "world.json").write_text("{"), "is damaged"),
        (lambda f: (f / "world.json").write_text("[1]"), "is damaged"),
        (lambda f: edit(f, lambda m: m.update(version=99)), "version 99"),
        (
            lambda f: edit(f, lambda m: m["chunks"][1].update(file="../outside.safetensors")),
            "not a plain file of this folder",
        ),
        (lambda f: edit(f, lambda m: m["chunks"][1].update(file="/etc/passwd")), "not a plain file of this folder"),
        (lambda f: edit(f, lambda m: m["chunks"].pop(1)), "predecessor is not listed"),
        (lambda f: edit(f, lambda m: m["chunks"][1].pop("size")), "'size' is missing"),
        (lambda f: edit(f, lambda m: m["chunks"][1].update(content="0")), "do not belong together"),
        (lambda f: next(iter(f.glob("*.safetensors"))).unlink(), r"1 of 3 files .* can.t be read:\n.* is missing"),
        (lambda f: [os.truncate(x, x.stat().st_size // 2) for x in f.glob("*.safetensors")], "bytes instead of"),
        (lambda f: [x.write_bytes(b"\xff" * x.stat().st_size) for x in f.glob("*.safetensors")], "is damaged"),
    ],
)
def test_damage_is_named(walked, tmp_path, damage, words):
    folder = tmp_path / "w"
    world_files.save(walked, folder)
    damage(folder)
    with pytest.raises(world_files.WorldFileError, match=words):
        world_files.load(folder)


def test_a_link_out_of_the_folder_is_not_followed(walked, tmp_path):
    world_files.save(walked, tmp_path / "w")
    file = next((tmp_path / "w").glob("*.safetensors"))
    file.rename(tmp_path / "elsewhere.safetensors")
    file.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(world_files.WorldFileError, match="not a plain file"):
        world_files.load(tmp_path / "w")


def test_a_folder_with_other_files_is_left_alone(walked, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(world_files.WorldFileError, match="choose an empty folder"):
        world_files.save(walked, tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["notes.txt"]


def test_unknown_chunks_and_branches_are_named(walked, tmp_path):
    world_files.save(walked, tmp_path / "w")
    with pytest.raises(world_files.WorldFileError, match="has 2 chunks; there is no state after 7"):
        world_files.load(tmp_path / "w", chunks=7)
    with pytest.raises(world_files.WorldFileError, match="0 states"):
        world_files.load(tmp_path / "w", branch="zzz")


# ------------------------------------------------------------------------------------------------ files lost on the way

CASE = Path(__file__).parent / "cases" / "world-folder-lost-a-file"


def copied(tmp_path: Path, name: str) -> Path:
    shutil.copytree(CASE / name, tmp_path / name)
    return tmp_path / name


def test_saving_a_world_writes_what_its_folder_has_lost(tmp_path):
    whole, damaged = copied(tmp_path, "whole"), copied(tmp_path, "damaged")
    with pytest.raises(world_files.WorldFileError, match=r"(?s)1bbe8111.* is missing .chunk 1.*save it.*load `chunks` 0"):
        world_files.load(damaged)
    written = world_files.save(world_files.load(whole), damaged)
    assert [f.name for f in written] == ["1bbe8111cb42daff93b87609.safetensors", "world.json"]
    assert len(world_files.load(damaged)) == 9 and same(world_files.load(damaged), world_files.load(whole))


def test_walking_again_makes_what_was_lost_again(tmp_path):
    whole, damaged = tmp_path / "walked", tmp_path / "lost"
    cameras = camera_files.load_cameras(CASE / "path.npz")
    begun = world_files.load(copied(tmp_path, "whole"), chunks=0)
    preview.explore(begun, cameras, chunk_frames=4, folder=whole)
    shutil.copytree(whole, damaged)
    max(damaged.glob("*.safetensors"), key=lambda file: file.stat().st_mtime).unlink()
    grown = preview.explore(begun, cameras, chunk_frames=4, folder=damaged)
    assert len(grown) == 9 and world_files.load(damaged).keys == world_files.load(whole).keys
    for found, expected in zip(world_files.load(damaged).memory.keyframes, world_files.load(whole).memory.keyframes, strict=True):
        torch.testing.assert_close(found.depth, expected.depth)  # another machine's, to the last bit but one


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def swapped(file: Path) -> None:
    """As large, readable, and of another chunk."""
    other = next(f for f in sorted(file.parent.glob("*.safetensors")) if f.stat().st_size == file.stat().st_size and f != file)
    shutil.copyfile(other, file)


DAMAGES = {
    "lost": lambda file: file.unlink(),
    "cut off": cut,
    "emptied": lambda file: file.write_bytes(b""),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"0"),
    "nonsense": lambda file: file.write_bytes(b"\xff" * file.stat().st_size),
}


def of_state(folder: Path, index: int) -> Path:
    return folder / list(world_files.read_manifest(folder).values())[index].file


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_happened_to_a_file_saving_and_walking_make_it_whole(walked, tmp_path, damage, index):
    for heal in ("save", "walk"):
        folder = tmp_path / heal
        world_files.save(walked, folder)
        branch = preview.explore(world.rewind(walked, 1), path(9, 0.5), chunk_frames=8, folder=folder)
        file = of_state(folder, index)
        before = {f.name: f.read_bytes() for f in folder.glob("*.safetensors")}
        DAMAGES[damage](file)
        with pytest.raises(world_files.WorldFileError, match=file.name):
            world_files.load(folder, branch=walked.key)
        if heal == "save":
            assert world_files.save(walked, folder) == [file, folder / "world.json"]
        else:
            assert same(preview.explore(photo_world(), path(17), chunk_frames=8, folder=folder), walked)
        assert same(world_files.load(folder, branch=walked.key), walked)
        assert same(world_files.load(folder, branch=branch.key), branch)
        assert {f.name: f.read_bytes() for f in folder.glob("*.safetensors")} == before


def test_a_file_that_is_another_chunk_s_is_noticed_and_replaced(tmp_path):
    walked = preview.explore(photo_world(), path(25), chunk_frames=8)
    folder = tmp_path / "w"
    world_files.save(walked, folder)
    file = of_state(folder, 3)
    before = file.read_bytes()
    swapped(file)
    with pytest.raises(world_files.WorldFileError, match=f"{file.name} holds the frames from .* swapped"):
        world_files.load(folder)
    assert world_files.save(walked, folder) == [file, folder / "world.json"]
    swapped(file)
    assert same(preview.explore(photo_world(), path(25), chunk_frames=8, folder=folder), walked)
    assert file.read_bytes() == before and same(world_files.load(folder), walked)


def test_everything_that_is_missing_is_named_at_once(walked, tmp_path):
    world_files.save(walked, tmp_path)
    files = [of_state(tmp_path, index) for index in (0, 2)]
    for file in files:
        file.unlink()
    with pytest.raises(world_files.WorldFileError) as refused:
        world_files.load(tmp_path)
    assert all(file.name in str(refused.value) for file in files) and "2 of 3 files" in str(refused.value)
    assert "(the photo)" in str(refused.value) and "load `chunks`" not in str(refused.value)


def test_a_walk_that_finds_its_chunk_heals_the_earlier_ones_and_leaves_the_latest_state(walked, tmp_path):
    world_files.save(walked, tmp_path)
    entry = list(world_files.read_manifest(tmp_path).values())[2]
    branch = preview.explore(world.rewind(walked, 1), path(9, 0.5), chunk_frames=8, folder=tmp_path)
    of_state(tmp_path, 0).unlink()
    found = world_files.made_before(tmp_path, world.rewind(walked, 1), entry.prompt, entry.settings)
    assert same(found, walked) and world_files.load(tmp_path).key == branch.key


def test_a_damaged_list_is_not_written_over_but_the_way_out_is_named(walked, tmp_path):
    world_files.save(walked, tmp_path)
    cut(tmp_path / "world.json")
    with pytest.raises(world_files.WorldFileError, match="or remove world.json and save again"):
        world_files.save(walked, tmp_path)
    (tmp_path / "world.json").unlink()
    world_files.save(walked, tmp_path)
    assert same(world_files.load(tmp_path), walked)


def test_a_file_that_is_there_is_looked_through_once(walked, tmp_path, monkeypatch):
    """Saves of a growing world would else read all of it again each time; what this process has written it need not read."""
    world_files.save(walked, tmp_path)
    read, check = [], chunk_files.ChunkFile.check
    monkeypatch.setattr(chunk_files.ChunkFile, "check", lambda file: read.append(file.path) or check(file))
    assert world_files.save(walked, tmp_path) == [tmp_path / "world.json"] and not read
    monkeypatch.setattr(world_files, "_whole", set())  # as another process
    assert world_files.save(walked, tmp_path) == [tmp_path / "world.json"]
    assert sorted(read) == sorted(tmp_path.glob("*.safetensors"))
    world_files.save(walked, tmp_path)
    assert len(read) == 3


def test_a_disk_that_takes_less_than_it_was_given_is_noticed(walked, tmp_path, monkeypatch):
    def lying(handle):
        os.ftruncate(handle if isinstance(handle, int) else handle.fileno(), 10)

    monkeypatch.setattr(world_files.os, "fsync", lying)
    with pytest.raises(world_files.WorldFileError, match="only 10 of"):
        world_files.save(walked, tmp_path / "w")
    assert not list((tmp_path / "w").iterdir())
