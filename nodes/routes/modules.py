"""The modules of js/ as the text of one, with the style sheet and the texts in one language.

A page that asked for each file would wait for as many answers, and its browser might keep an old one beside a new one:
the host says of no `.mjs` how long it may be kept.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

FIRST = "explorer"
IMPORT = re.compile(r'^import (?:\* as (\w+)|\{[\w,\s]*\}) from "\./(\w+)\.mjs";\n', re.MULTILINE)
EXPORT = re.compile(r"^export (?=(?:async )?(?:function|class|const) (\w+))", re.MULTILINE)
NAME = re.compile(r"^(?:export )?(?:async )?(?:function|class|const|let) (\w+)", re.MULTILINE)
UNLINKED = re.compile(r"^(?:import|export)\b.*", re.MULTILINE)
# whole lines, and what stands two spaces behind code: nothing inside a text looks like that
COMMENT = re.compile(r"^[ \t]*(?://[^\n]*|/\*(?:(?!\*/).)*\*/[ \t]*)\n|[ \t]{2,}// [^\n]*", re.MULTILINE | re.DOTALL)
INDENT = re.compile(r"^\s+", re.MULTILINE)


def page(js: Path, language: str) -> bytes:
    """A module that exports what js/explorer.mjs does, `texts` and `sheet`. English where there are no such texts."""
    texts = {file.stem: file for file in (js / "texts").glob("*.json")}
    said = json.loads(texts.get(language, texts["en"]).read_text(encoding="utf-8"))
    sheet = _without_comments((js / "style.css").read_text(encoding="utf-8"))
    own = f"export const texts = {json.dumps(said, ensure_ascii=False)};\nexport const sheet = {json.dumps(sheet)};\n"
    return (linked(js) + own).encode()


def linked(js: Path) -> str:
    """All that js/explorer.mjs needs in one scope, each module behind those that it imports; ValueError if that can't be."""
    modules: dict[str, str] = {}

    def add(name: str, above: tuple[str, ...] = ()) -> None:
        if name in above:
            raise ValueError(f"modules of js/ import each other in a circle: {' -> '.join([*above, name])}")
        if name not in modules:
            text = (js / f"{name}.mjs").read_text(encoding="utf-8")
            for _, needed in IMPORT.findall(text):
                add(needed, (*above, name))
            modules[name] = text

    add(FIRST)
    _check_names(modules)
    spaces = {(module, name) for text in modules.values() for name, module in IMPORT.findall(text) if name}
    parts = []
    for module, text in modules.items():
        parts.append(_in_one_scope(module, text))
        parts += [f"const {name} = {_exports(text)};\n" for wanted, name in sorted(spaces) if wanted == module]
    return "".join([*parts, f"export {_exports(modules[FIRST])};\n"])


def _exports(text: str) -> str:
    return f"{{ {', '.join(EXPORT.findall(text))} }}"


def _check_names(modules: dict[str, str]) -> None:
    where: dict[str, str] = {}
    for module, text in modules.items():
        for name in NAME.findall(text):
            if where.setdefault(name, module) != module:
                raise ValueError(f"js/{where[name]}.mjs and js/{module}.mjs share a scope and both have a {name}; rename one")


def _in_one_scope(module: str, text: str) -> str:
    body = EXPORT.sub("", IMPORT.sub("", _without_comments(text)))
    if left := UNLINKED.search(body):
        raise ValueError(f"js/{module}.mjs: {left[0]!r} can't be linked; write `import {{ x }} from`, or `export` before what it names")
    return body


def _without_comments(text: str) -> str:
    return INDENT.sub("", COMMENT.sub("", text))
