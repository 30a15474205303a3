"""Texts as editors save them, names in people's order, and JSON that says where it is wrong."""

from __future__ import annotations

import os

import killed
import pytest

from lyra_core import files


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_utf_8_is_read_with_and_without_its_mark(tmp_path, encoding):
    file = tmp_path / "a.json"
    file.write_text('{"größe": 1}', encoding=encoding)
    assert files.read_json(file) == {"größe": 1}
    assert files.parse_json("\ufeff[1]", "it") == [1]


@pytest.mark.parametrize(
    "raw, says",
    [
        ('{"a": 1}'.encode("utf-16"), "UTF-16 or binary"),
        ('{"a": 1}'.encode("utf-16-be"), "UTF-16 or binary"),
        ('{"a": 1}'.encode("utf-32"), "UTF-16 or binary"),
        ('{"a":\n"é"}'.encode("latin-1"), r"line 2 has the byte 0xe9.*Latin-1"),
        (b'{"a": }', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_what_is_no_utf_8_json_is_refused_with_its_name(tmp_path, raw, says):
    file = tmp_path / "cameras.json"
    file.write_bytes(raw)
    with pytest.raises(ValueError, match=rf"(?s)cameras\.json.*{says}"):
        files.read_json(file)


@killed.needs_fork
def test_what_a_process_was_writing_when_it_ended_goes_away_and_nothing_else(tmp_path):
    file, theirs = tmp_path / "a" / "lora.safetensors", tmp_path / "a" / "model.safetensors.partial"
    files.write_bytes(file, b"before")
    theirs.write_bytes(b"half of a download")
    os.utime(theirs, (0, 0))
    assert killed.in_the_middle_of_a_file(lambda: files.write_bytes(file, b"x" * 10_000))
    assert file.read_bytes() == b"before" and len(list(file.parent.iterdir())) == 3
    files.write_bytes(file, b"af", memoryview(b"ter"))
    assert file.read_bytes() == b"after" and sorted(file.parent.iterdir()) == [file, theirs]


def test_what_can_not_be_moved_to_its_place_leaves_nothing(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError, match="a can't be written in"):
        files.write_bytes(tmp_path / "a", b"x")
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_names_sort_as_people_count():
    names = ["frame_10.png", "frame_2.png", "Frame_1.png", "b/1.png", "a/20.png", "a/3.png"]
    assert sorted(names, key=files.natural) == [
        "a/3.png", "a/20.png", "b/1.png", "Frame_1.png", "frame_2.png", "frame_10.png",
    ]  # fmt: skip


def test_litter_of_file_managers_is_known():
    assert all(map(files.is_litter, (".DS_Store", "Thumbs.db", "desktop.ini", "._photo.png", "__MACOSX")))
    assert not any(map(files.is_litter, ("photo.png", "thumbs.db.png")))


def test_a_walk_follows_links_once_and_leaves_litter_alone(tmp_path):
    (tmp_path / "b" / "__MACOSX").mkdir(parents=True)
    for name in ("b/2.npz", "b/10.npz", "b/.DS_Store", "b/__MACOSX/x.npz", "desktop.ini", "a.json"):
        (tmp_path / name).write_text("x")
    elsewhere = tmp_path.parent / f"{tmp_path.name}_elsewhere"
    elsewhere.mkdir()
    (elsewhere / "far.npz").write_text("x")
    (tmp_path / "c").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(tmp_path)  # never ends for who follows it
    (tmp_path / "d.npz").symlink_to(elsewhere / "far.npz")
    (tmp_path / "lost.npz").symlink_to(tmp_path / "nowhere")
    assert [f.relative_to(tmp_path).as_posix() for f in files.walk(tmp_path)] == [
        "a.json", "b/2.npz", "b/10.npz", "c/far.npz", "d.npz",
    ]  # fmt: skip


def test_a_file_is_found_in_other_letters_but_its_own_come_first(tmp_path):
    (tmp_path / "IMAGES.TXT").write_text("capitals")
    assert files.find(tmp_path, "images.txt").read_text() == "capitals"
    (tmp_path / "images.txt").write_text("small")
    assert files.find(tmp_path, "images.txt").read_text() == "small"
    assert files.find(tmp_path, "cameras.txt") is None and files.find(tmp_path / "none", "x") is None
