"""Flipped bits, swapped files, changed lists, two writers, full disks: an error that says what and where, or no loss at all."""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import killed
import pytest
import torch

from lyra_core import files
from lyra_core.cameras.camera import Cameras, pinhole
from lyra_core.memory import depth
from lyra_core.world import chunk_files, preview, world, world_files
from lyra_core.world.world_files import WorldFileError

SEED, SIZE = 7, (32, 48)
CASE = Path(__file__).parent / "cases" / "world-folder-lost-a-file"


def photo_world() -> world.World:
    generator = torch.Generator().manual_seed(3)
    room = depth.room_box(SIZE, pinhole(SIZE, 40.0).K[0], (0.5, 0.5), (0.3, 0.3, 0.7, 0.7), 4.0)
    return world.begin(torch.rand(*SIZE, 3, generator=generator), room.depth, room.camera)


def path(frames: int, sideways: float = 0.0) -> Cameras:
    cameras = pinhole(SIZE, 40.0, frames)
    cameras.w2c[:, 2, 3] = -torch.linspace(0, 0.6, frames)
    cameras.w2c[:, 0, 3] = torch.linspace(0, sideways, frames)
    return cameras


@pytest.fixture(scope="module")
def walked() -> world.World:
    """A world of two chunks that has all that a file can hold."""
    grown = preview.explore(photo_world(), path(17), chunk_frames=8)
    generator = torch.Generator().manual_seed(1)

    def some(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    chunks = tuple(
        replace(chunk, newest=some(32, 48, 3), latents=world.Latents(some(16, 2, 4, 6), some(16, 2, 4, 6)))
        for chunk in grown.chunks
    )
    keyframes = tuple(replace(k, latent=some(16, 4, 6)) for k in grown.memory.keyframes)
    return world.World(grown.first, chunks, replace(grown.memory, keyframes=keyframes))


@pytest.fixture(scope="module")
def original(walked, tmp_path_factory) -> Path:
    """The world on disk. To be copied only."""
    folder = tmp_path_factory.mktemp("original") / "w"
    world_files.save(walked, folder)
    return folder


@pytest.fixture
def folder(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "w"))


def everything(found: world.World) -> list:
    """All that a world can be asked for."""
    chunks = (found.first, *found.chunks)
    parts = [t for c in chunks for t in (c.frames, c.invented_bits, c.cameras.w2c, c.cameras.K, c.newest, *(c.latents or ()))]
    parts += [t for k in found.memory.keyframes for t in (k.depth, k.camera.w2c, k.camera.K, k.image, k.latent)]
    pictures = [part for i in range(len(found)) for part in (found.frame(i), found.exact(i), found.invented(i))]
    return [*parts, *pictures, *((c.prompt, dict(c.settings)) for c in chunks), found.keys]


def alike(a: list, b: list) -> bool:
    same_parts = (torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b, strict=True))
    return all(same_parts)


def flip(file: Path, place: int, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1 << bit
    file.write_bytes(content)


# ---------------------------------------------------------------------------------------------------------- flipped bits

FIELDS = ["frames", "invented", "newest", "w2c", "K", "latents.sampled", "latents.history", "depth.16", "latent.16", "first_frame"]


@pytest.mark.parametrize("field", FIELDS)
def test_a_bit_flipped_in_any_field_names_file_and_field(folder, field):
    file = chunk_files.open_chunk(next(f for f in folder.glob("*.safetensors") if "depth.16" in chunk_files.open_chunk(f)))
    place = file.places[field]
    flip(file.path, (place.begin + place.end) // 2, 3)
    with pytest.raises(WorldFileError, match=rf"(?s){file.path.name}.* {field}.*check .* --repair"):
        everything(world_files.load(folder))


def test_what_a_damaged_field_has_nothing_to_do_with_is_still_shown(folder, walked):
    file = chunk_files.open_chunk(folder / f"{walked.keys[1][:24]}.safetensors")
    flip(file.path, file.places["frames"].end - 1)
    found = world_files.load(folder)
    assert torch.equal(found.frame(7), walked.frame(7)) and torch.equal(found.frame(9), walked.frame(9))
    with pytest.raises(WorldFileError, match=rf"{file.path.name} .*frames\[7\]"):
        found.frame(8)


def test_no_bit_of_any_file_can_change_unnoticed(folder, walked, original):
    """150 of them, everywhere; whatever opens is what was saved."""
    draw, whole, refused = random.Random(SEED), everything(walked), 0
    names = sorted(file.name for file in folder.iterdir())
    for number in range(150):
        file = folder / names[number % len(names)]
        place, bit = draw.randrange(file.stat().st_size), draw.randrange(8)
        flip(file, place, bit)
        try:
            assert alike(everything(world_files.load(folder)), whole), f"{file.name}: bit {bit} of byte {place}"
        except WorldFileError as problem:
            refused += 1
            assert str(folder) in str(problem)
        shutil.copyfile(original / file.name, file)
    assert refused > 135  # a line break of world.json may be another blank


@pytest.mark.parametrize("damage", ["flip", "zeros"])
def test_saving_heals_what_only_the_sums_tell(folder, walked, damage):
    file = chunk_files.open_chunk(folder / f"{walked.keys[2][:24]}.safetensors")
    before, place = file.path.read_bytes(), file.places["frames"]
    if damage == "flip":
        flip(file.path, (place.begin + place.end) // 2)
    else:
        content = bytearray(before)
        content[place.begin + 5000 : place.begin + 9000] = bytes(4000)
        file.path.write_bytes(content)
    assert world_files.save(walked, folder) == [file.path, folder / "world.json"]
    assert file.path.read_bytes() == before and alike(everything(world_files.load(folder)), everything(walked))


def test_a_world_without_sums_is_looked_through_when_it_is_opened(tmp_path):
    """Version 2 knew no sums; its content keys cover frames, masks, cameras, latents, prompts and settings."""
    folder = Path(shutil.copytree(CASE / "whole", tmp_path / "w"))
    whole = everything(world_files.load(folder))
    for file in sorted(folder.glob("*.safetensors")):
        found = chunk_files.open_chunk(file)
        for field in ("frames", "invented", "w2c"):
            before = file.read_bytes()
            flip(file, (found.places[field].begin + found.places[field].end) // 2)
            with pytest.raises(WorldFileError, match=file.name):
                world_files.load(folder)
            file.write_bytes(before)
    assert alike(everything(world_files.load(folder)), whole)
    listed = json.loads((folder / "world.json").read_text())
    listed["chunks"][1]["prompt"] = "another"
    (folder / "world.json").write_text(json.dumps(listed))
    with pytest.raises(WorldFileError, match="its prompt or its settings do not fit"):
        world_files.load(folder)


# -------------------------------------------------------------------------------------------------- swapped and changed


def test_swapped_files_and_files_of_another_world_are_named(folder, walked, tmp_path):
    one, two = (folder / f"{key[:24]}.safetensors" for key in walked.keys[1:])
    contents = one.read_bytes(), two.read_bytes()
    one.write_bytes(contents[1])
    two.write_bytes(contents[0])
    with pytest.raises(WorldFileError, match=f"(?s){one.name}.*{two.name}"):
        world_files.load(folder)
    one.write_bytes(contents[0])
    chunks = (walked.chunks[0], replace(walked.chunks[1], frames=255 - walked.chunks[1].frames))
    other = world.World(walked.first, chunks, walked.memory)
    world_files.save(other, tmp_path / "other")
    shutil.copyfile(tmp_path / "other" / f"{other.keys[2][:24]}.safetensors", two)
    with pytest.raises(WorldFileError, match=rf"{two.name} holds the frames from 9 on of another state: it was swapped"):
        world_files.load(folder)


VALUES = [0, -1, True, None, "", "x", 1e300, 10**30, [], {}, [[1]], "../x", "a\0b", "\ud800", "9" * 300]


def mutations(listed: dict, draw: random.Random) -> dict:
    """One change of anything in a list: a value, a name, a line lost, doubled or exchanged."""
    changed = json.loads(json.dumps(listed))
    target = draw.choice([changed, *changed["chunks"], *(c["settings"] for c in changed["chunks"])])
    name, kind = draw.choice(list(target)), draw.randrange(5)
    if kind == 0:
        del target[name]
    elif kind == 1:
        chunks = changed["chunks"]
        draw.choice([chunks.pop, lambda i: chunks.append(chunks[i]), lambda i: chunks.insert(0, chunks.pop(i))])(
            draw.randrange(len(chunks))
        )
    elif kind == 2 and isinstance(target[name], str) and target[name]:
        at = draw.randrange(len(target[name]))
        target[name] = target[name][:at] + draw.choice("0f~") + target[name][at + 1 :]
    elif kind == 3:
        target[name] = copy.deepcopy(draw.choice([c[n] for c in changed["chunks"] for n in c]))
    else:
        target[name] = draw.choice(VALUES)
    return changed


def test_a_changed_list_is_refused(folder):
    """250 changes, none of which opens."""
    listed, draw = json.loads((folder / "world.json").read_text()), random.Random(SEED)
    changes = [text for _ in range(250) if (text := json.dumps(mutations(listed, draw))) != json.dumps(listed)]
    assert len(changes) > 200
    for text in changes:
        (folder / "world.json").write_text(text)
        with pytest.raises(WorldFileError):
            world_files.load(folder)
            pytest.fail(text)


@pytest.mark.parametrize(("field", "value"), [("prompt", "another"), ("settings", {"seed": 1})])
def test_a_changed_prompt_or_setting_is_named(folder, field, value):
    listed = json.loads((folder / "world.json").read_text())
    listed["chunks"][1][field] = value
    (folder / "world.json").write_text(json.dumps(listed))
    file = listed["chunks"][1]["file"]
    with pytest.raises(WorldFileError, match=rf"world.json is not what was saved: the {field} of {file};.*check .*--repair"):
        world_files.read_manifest(folder)


@pytest.mark.parametrize("version", [0, -1, True, 4, 2.5, "3", None])
def test_versions_that_never_were_are_refused(folder, version):
    listed = json.loads((folder / "world.json").read_text())
    listed["version"] = version
    (folder / "world.json").write_text(json.dumps(listed))
    before = (folder / "world.json").read_bytes()
    for verb in (world_files.load, world_files.read_manifest, lambda f: world_files.save(photo_world(), f)):
        with pytest.raises(WorldFileError, match=f"version {version!r}; this pack reads"):
            verb(folder)
    assert (folder / "world.json").read_bytes() == before


# ------------------------------------------------------------------------------------------------------- an open world


def test_a_file_that_shrinks_under_an_open_world_is_an_error_and_no_dead_process(folder, walked):
    script = textwrap.dedent(f"""
        import os, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import conftest, test_world_faults as t
        world = t.world_files.load(t.Path({str(folder)!r}))
        held = [(c.frames, c.invented_bits) for c in world.chunks]
        plan = t.world.plan(world, t.path(8))
        for file in t.Path({str(folder)!r}).glob("*.safetensors"):
            os.truncate(file, 4096)
        print(sum(int(t.sum()) for pair in held for t in pair) > 0)
        asked = [lambda: world.frame(9), lambda: world.chunks[0].frames, lambda: world.chunks[1].latents, lambda: world.exact(16),
                 lambda: world.memory.keyframes[2].latent, lambda: world.invented(3), lambda: world.chunks[1].invented]
        for ask in asked:
            try:
                ask()
            except t.WorldFileError as problem:
                print("shrank" if "shrank to 4096 bytes" in str(problem) and ".safetensors" in str(problem) else problem)
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", *["shrank"] * 7]


def test_a_file_removed_under_an_open_world_is_named(folder):
    found = world_files.load(folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(WorldFileError, match=r"[0-9a-f]{24}.safetensors is missing"):
        found.frame(5)


# ---------------------------------------------------------------------------------------------------------- two writers

WRITER = """
import random, sys, time
sys.path.insert(0, {tests!r})
import conftest, test_world_faults as t
folder, number, until = t.Path(sys.argv[1]), int(sys.argv[2]), time.time() + float(sys.argv[3])
world = t.photo_world()
while time.time() < until:
    plan = t.world.plan(world, t.path(8, 0.1 * number), 0)
    frames = t.torch.full((8, 32, 48, 3), random.randrange(256), dtype=t.torch.uint8)
    depths = {{i: t.torch.full((32, 48), 2.0 + random.random()) for i in t.world.keyframe_ids(plan)}}
    settings = {{"n": random.random(), "writer": number}}
    world = t.world.append(world, plan, frames, t.torch.zeros(8, 32, 48, dtype=t.torch.bool), depths, "", settings)
    t.world_files.save(world, folder)
    print(world.key, flush=True)
    if len(world.chunks) == 6:
        world = t.world.rewind(world, random.randrange(3))
"""


def writers(folder: Path, seconds: float, count: int = 2) -> list[subprocess.Popen]:
    script = WRITER.format(tests=str(Path(__file__).parent))
    return [
        subprocess.Popen(
            [sys.executable, "-c", script, str(folder), str(number), str(seconds)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]


def test_two_processes_that_save_to_one_folder_lose_nothing(tmp_path):
    ended = [(p, *p.communicate()) for p in writers(tmp_path / "w", 6)]
    assert [p.returncode for p, _, _ in ended] == [0, 0], [error for _, _, error in ended]
    reported = [key for _, out, _ in ended for key in out.split()]
    listed = world_files.read_manifest(tmp_path / "w")
    assert min(len(out.split()) for _, out, _ in ended) > 3 and set(reported) <= set(listed)
    for key in reported:
        assert everything(world_files.load(tmp_path / "w", branch=key))[-1][-1] == key
    assert {f.name for f in (tmp_path / "w").iterdir()} == {"world.json", *(e.file for e in listed.values())}


@contextlib.contextmanager
def forked_writer(folder: Path, number: int, seconds: float):
    """The id of a process that does what WRITER says, and what it says; a copy of this one, which is there at once."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        os.dup2(writing, 1)
        sys.stdout = os.fdopen(1, "w")
        sys.argv = ["", str(folder), str(number), str(seconds)]
        try:
            exec(compile(WRITER.format(tests=str(Path(__file__).parent)), "writer", "exec"), {})  # ours
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as said:
        yield process, said


@killed.needs_fork
def test_ten_kills_at_any_moment_of_saving_hold_up_nobody_and_lose_nothing(tmp_path, walked):
    """Each writer is killed so soon after its first report that it is in the middle of a later save, wherever that is."""
    folder, draw, reported = tmp_path / "w", random.Random(SEED), []
    for number in range(10):
        with forked_writer(folder, number, 60) as (process, said):
            reported.append(said.readline().strip())
            time.sleep(0.2 * draw.random())
            os.kill(process, signal.SIGKILL)
            assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL, "it was killed, it did not end"
            reported += said.read().split("\n")
        listed = world_files.read_manifest(folder)
        assert {key for key in reported if len(key) == 64} <= set(listed), f"after kill {number}, seed {SEED}"
    world_files.save(walked, folder)
    listed = world_files.read_manifest(folder)
    assert walked.key in listed and len({key for key in reported if len(key) == 64}) >= 10
    for key in listed:
        assert everything(world_files.load(folder, branch=key))[-1][-1] == key
    unlisted = {f.name for f in folder.iterdir()} - {"world.json", *(e.file for e in listed.values())}
    assert all(name.endswith(".safetensors") for name in unlisted)  # moved there, killed before the list


@killed.needs_fork
def test_copies_made_while_a_world_is_saved_open_or_say_what_they_lack(tmp_path):
    """File by file, in any order, as backups and cloud drives copy; nothing is locked for them."""
    folder, draw, opened, refused = tmp_path / "w", random.Random(SEED), 0, 0
    with forked_writer(folder, 0, 3) as (process, said):
        said.readline()
        for number in range(1000):
            copy_ = tmp_path / "copy"
            copy_.mkdir()
            names = [file.name for file in folder.iterdir()]
            draw.shuffle(names)
            late = number % 2 == 1  # the list some time after what it lists: it names what came in between
            for name in sorted(names, key=lambda name: late and name == "world.json"):
                time.sleep(0.3 if late and name == "world.json" else 0)
                with contextlib.suppress(FileNotFoundError):  # what was just written has its place now
                    shutil.copyfile(folder / name, copy_ / name)
            try:
                assert everything(world_files.load(copy_))
                opened += 1
            except WorldFileError as problem:
                refused += 1
                assert str(copy_) in str(problem), f"copy {number}"
            shutil.rmtree(copy_)
            if os.waitpid(process, os.WNOHANG) != (0, 0):
                break
    assert opened > 1 and refused


def test_who_holds_the_lock_is_said(folder, walked, monkeypatch):
    monkeypatch.setattr(files, "WAIT", 0.3)
    monkeypatch.setattr(files.locked.__wrapped__, "__defaults__", (0.3, 300.0))
    with files.locked(folder / "world.lock"):
        start = time.monotonic()
        with pytest.raises(TimeoutError, match=rf"is being written to by process {os.getpid()} on \S+, since .*world.lock"):
            world_files.save(walked, folder)
        assert time.monotonic() - start < 20
    world_files.save(walked, folder)
    assert not list(folder.glob("world.lock*")) and not list(folder.glob("*.partial"))


def left(host: str, pid: int, started: int) -> str:
    return json.dumps({"host": host, "pid": pid, "started": started, "token": "x"})


def test_locks_that_were_left_behind_are_recognised(tmp_path):
    me, lock = files.Owner.me(), tmp_path / "world.lock"
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    old = time.time() - 1000
    for text, age in (
        (left(me.host, child.pid, 1), 0),  # ended
        (left(me.host, me.pid, me.started + 5), 0),  # its number has gone to another process
        (left("elsewhere", 1, 1), old),
        ("", old),
        ("{" * 2000, old),
    ):
        lock.write_text(text)
        if age:
            os.utime(lock, (age, age))
        with files.locked(lock, 0.5, 300.0) as is_held:
            assert is_held() and json.loads(lock.read_text())["pid"] == me.pid
        assert not lock.exists()
    for text in (left("elsewhere", 1, 1), left(me.host, me.pid, me.started), left(me.host, os.getppid(), 0)):
        lock.write_text(text)
        with pytest.raises(TimeoutError), files.locked(lock, 0.1, 300.0):
            pass
        assert lock.read_text() == text


def test_one_that_lost_its_lock_while_it_stood_still_does_not_write_the_list(folder, walked, monkeypatch):
    before = (folder / "world.json").read_bytes()
    sweep = files.sweep
    monkeypatch.setattr(files, "sweep", lambda f: sweep(f) or (f / "world.lock").write_text(left("elsewhere", 1, 1)))
    with pytest.raises(TimeoutError, match="save again"):
        world_files.save(world.rewind(walked, 1), folder)
    assert (folder / "world.json").read_bytes() == before and "elsewhere" in (folder / "world.lock").read_text()


@pytest.mark.skipif(os.name == "nt", reason="folders can't be flushed there")
def test_the_list_reaches_the_disk_after_what_it_lists_and_the_folder_last(walked, tmp_path, monkeypatch):
    world_files.save(world.rewind(walked, 1), tmp_path / "w")
    done, flush, replace_ = [], os.fsync, os.replace
    kind = {True: "folder", False: "file"}
    monkeypatch.setattr(os, "fsync", lambda h: done.append(kind[stat.S_ISDIR(os.fstat(h).st_mode)]) or flush(h))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append(Path(b).suffix) or replace_(a, b))
    world_files.save(walked, tmp_path / "w")
    assert done == ["file", ".safetensors", "folder", "file", ".json", "folder"]


# ------------------------------------------------------------------------------------------------- disk, size and rights


def test_a_limit_of_size_names_folder_file_and_bytes(folder, walked):
    grown = preview.explore(walked, path(9, 0.2), chunk_frames=8)
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError) as refused:
            world_files.save(grown, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert refused.value.errno == errno.EFBIG
    for words in (str(folder), f"{grown.key[:24]}.safetensors needs ", " bytes in ", " are free there", "still whole"):
        assert words in str(refused.value)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before


def as_nobody(work) -> str:
    """What happens in a process without rights."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            if os.getuid() == 0:
                os.setuid(65534)
            work()
            said = "nothing"
        except BaseException as problem:
            said = f"{type(problem).__name__}: {problem}"
        os.write(writing, said.encode())
        os._exit(0)
    os.waitpid(process, 0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        return pipe.read()


@killed.needs_fork
def test_a_folder_that_may_not_be_written_to_is_named(original, walked):
    with tempfile.TemporaryDirectory() as base:
        os.chmod(base, 0o755)
        folder = Path(shutil.copytree(original, Path(base) / "w"))
        for file in folder.iterdir():
            file.chmod(0o444)
        folder.chmod(0o555)
        said = as_nobody(lambda: world_files.save(preview.explore(walked, path(9, 0.2), chunk_frames=8), folder))
        inside = as_nobody(lambda: world_files.save(walked, folder / "new"))
        folder.chmod(0o755)
    for text in (said, inside):
        assert text.startswith("PermissionError") and str(folder) in text, text
        assert "Allow writing to that folder, or choose another one" in text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("worlds/" + "a" * 300, "300|307.*use a shorter name"),
        ("ä" * 200, "use a shorter name"),
        ("a/" * 2000, "use a shorter name"),
        ("worlds/\ud800", "surrogate"),
        ("worlds/a\0b", "null byte"),
        (7, "is no name"),
        ("", "is no path"),
        ("../a", "is no path"),
    ],
)
def test_names_that_no_system_takes_are_refused_in_words(pack, name, words):
    for verb in (pack.types.output_folder, pack.types.input_path)[: 1 if name == "" else 2]:
        with pytest.raises(ValueError, match=words) as refused:
            verb(name)
        assert type(refused.value) is ValueError
        str(refused.value).encode()
