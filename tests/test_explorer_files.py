"""What the Explorer's page is made of: sizes, versions, texts in three languages, help that names every key."""

from __future__ import annotations

import gzip
import importlib
import json
import re
from pathlib import Path

import pytest

FIRST_FILE, ALL_CODE, ON_THE_WIRE = 12_000, 150_000, 60_000  # bytes: loaded at start; of all our JavaScript; as it comes
LANGUAGES = ("en", "zh", "ja")


@pytest.fixture(scope="module")
def js(project) -> Path:
    return project / "js"


@pytest.fixture(scope="module")
def modules(pack):
    """What makes one module of those of js/."""
    return importlib.import_module("lyra_pack.nodes.routes.modules")


def own_files(js: Path) -> list[Path]:
    kinds = (".js", ".mjs", ".json", ".css")
    return sorted(f for f in js.rglob("*") if f.is_file() and f.suffix in kinds and "vendor" not in f.parts)


def commands(js: Path) -> dict[str, str]:
    """Keys of every command by its id, out of the table."""
    return dict(re.findall(r'\{ id: "(\w+)", group: "\w+", codes: \[[^]]*\], keys: "([^"]+)"', (js / "commands.mjs").read_text()))


def test_only_one_small_file_is_loaded_at_start_and_all_of_them_are_small(js, modules):
    assert [f.name for f in js.rglob("*.js") if "vendor" not in f.parts] == ["lyra2.js"], "the host loads every .js at start"
    first = (js / "lyra2.js").stat().st_size
    assert first <= FIRST_FILE
    assert first + len(modules.linked(js).encode()) <= ALL_CODE
    sizes = {language: len(gzip.compress(modules.page(js, language), 6)) for language in LANGUAGES}
    assert max(sizes.values()) <= ON_THE_WIRE, sizes


def small(folder: Path, **texts: str) -> Path:
    for name, text in texts.items():
        (folder / f"{name}.mjs").write_text(text, encoding="utf-8")
    return folder


def test_modules_come_into_one_scope_each_behind_those_it_imports(modules, tmp_path):
    first = '''/** Says. */

import * as maths from "./maths.mjs";
import { a,
    b } from "./maths.mjs";

export const open = () => {
    // aloud
    const way = "a // b";       // kept
    return maths.a + b + way;
};
'''
    other = "export function a() {}\n/* two\n   lines */\nexport class b {}\nexport async function d() {}\nconst own = 1;\n"
    assert modules.linked(small(tmp_path, explorer=first, maths=other)).splitlines() == [
        "function a() {}", "class b {}", "async function d() {}", "const own = 1;", "const maths = { a, b, d };",
        "const open = () => {", 'const way = "a // b";', "return maths.a + b + way;", "};",
        "export { open };",
    ]  # fmt: skip


def test_no_module_is_left_out(js, modules):
    text = modules.linked(js)
    assert not re.search(r"^\s*(//|/\*|import|export [^{])", text, re.MULTILINE)
    for file in js.glob("*.mjs"):
        for name in re.findall(r"^export (?:async )?(?:function|class|const) (\w+)", file.read_text(encoding="utf-8"), re.MULTILINE):
            assert re.search(rf"^(async )?(function|class|const) {name}\b", text, re.MULTILINE), f"{name} of {file.name}"


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        ({"explorer": 'import x from "./other.mjs";\n'}, r"js/explorer.mjs: 'import x from"),
        ({"explorer": "export { x };\n"}, "can't be linked"),
        ({"explorer": 'import { x } from "./a.mjs";\n', "a": 'import { open } from "./explorer.mjs";\n'}, "explorer -> a -> explorer"),
        ({"explorer": 'import { x } from "./a.mjs";\nconst y = 1;\n', "a": "export const x = 1;\nlet y;\n"}, "both have a y"),
    ],
)
def test_what_cannot_be_linked_is_said(modules, tmp_path, texts, says):
    with pytest.raises(ValueError, match=says):
        modules.linked(small(tmp_path, **texts))


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
