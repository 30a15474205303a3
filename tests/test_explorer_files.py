"""What the Explorer's page is made of: sizes, versions, texts in three languages, help that names every key."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from pathlib import Path

import pytest

FIRST_FILE, ALL_FILES = 12_000, 75_000  # bytes: of the one loaded at start; of all, compressed
LANGUAGES = ("en", "zh", "ja")


@pytest.fixture(scope="module")
def js(project) -> Path:
    return project / "js"


def own_files(js: Path) -> list[Path]:
    return sorted(f for f in js.rglob("*") if f.is_file() and f.suffix in (".js", ".mjs", ".json") and "vendor" not in f.parts)


def commands(js: Path) -> dict[str, str]:
    """Keys of every command by its id, out of the table."""
    return dict(re.findall(r'\{ id: "(\w+)", group: "\w+", codes: \[[^]]*\], keys: "([^"]+)"', (js / "commands.mjs").read_text()))


def test_only_one_small_file_is_loaded_at_start_and_all_of_them_are_small(js):
    assert [f.name for f in js.rglob("*.js") if "vendor" not in f.parts] == ["lyra2.js"], "the host loads every .js at start"
    assert (js / "lyra2.js").stat().st_size <= FIRST_FILE
    sizes = {f.name: len(gzip.compress(f.read_bytes())) for f in own_files(js) if f.suffix != ".json"}
    assert sum(sizes.values()) <= ALL_FILES, sizes


def test_the_version_is_that_of_the_files_so_that_no_old_module_meets_a_new_one(js):
    digest = hashlib.sha256()
    for file in own_files(js):
        text = re.sub(r'const VERSION = "[^"]*"', "", file.read_text(encoding="utf-8"))
        digest.update(f"{file.relative_to(js).as_posix()}\n{text}\n".encode())
    version = re.search(r'VERSION = "([^"]*)"', (js / "lyra2.js").read_text())[1]
    assert version == digest.hexdigest()[:12], f'js/ has changed: set VERSION = "{digest.hexdigest()[:12]}" in js/lyra2.js'


def test_every_text_is_there_in_every_language_with_the_same_values(js):
    texts = {name: json.loads((js / "texts" / f"{name}.json").read_text(encoding="utf-8")) for name in LANGUAGES}
    english = texts["en"]
    for name, found in texts.items():
        assert set(found) == set(english), f"{name} differs by {set(found) ^ set(english)}"
        for key, text in found.items():
            assert sorted(re.findall(r"\{\w+\}", text)) == sorted(re.findall(r"\{\w+\}", english[key])), f"{key} in {name}"
    for key in commands(js):
        assert {key, f"{key}.tip"} <= set(english), f"the command {key} has no text or no tooltip"
    used = {key for f in js.glob("*.mjs") for key in re.findall(r'\bt\("([\w.]+)"', f.read_text())}
    assert used <= set(english), f"texts that are nowhere: {used - set(english)}"


def test_the_help_page_names_every_key(js):
    page = (js / "docs" / "Lyra2Explorer.md").read_text(encoding="utf-8")
    table = commands(js)
    assert len(table) > 30
    english = json.loads((js / "texts" / "en.json").read_text())
    for key, keys in table.items():
        assert f"| {keys} | {english[key]}" in page, f"docs/Lyra2Explorer.md has no line | {keys} | {english[key]} ..."


def test_nothing_of_a_world_is_read_as_html_and_nothing_comes_from_elsewhere(js):
    for file in own_files(js):
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text), file.name
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), f"{file.name} names another server"
