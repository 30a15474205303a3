"""three.js and spark for a browser page: out of the source map of the host's own frontend, where they lie unmangled.

Nothing is downloaded and nothing is shipped. Where a frontend comes without its source map, the same five files may lie
in a folder, as npm packs them (see `VENDOR_HELP`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..files import read_json, read_text

MAPS = "assets/vendor-three-*.js.map"
FILES = {  # name -> how its path ends in the packages
    "three.core.js": "three/build/three.core.js",
    "three.module.js": "three/build/three.module.js",
    "TransformControls.js": "three/examples/jsm/controls/TransformControls.js",
    "Pass.js": "three/examples/jsm/postprocessing/Pass.js",
    "spark.module.js": "@sparkjsdev/spark/dist/spark.module.js",
}
# how the packages name each other, and where that is beside them here
SPECIFIERS = {"three": "./three.module.js", "three/addons/postprocessing/Pass.js": "./Pass.js"}
VENDOR_HELP = (
    "put three.core.js, three.module.js, TransformControls.js, Pass.js (npm pack three) and spark.module.js "
    "(npm pack @sparkjsdev/spark) into js/vendor of this pack, or install comfyui-frontend-package"
)
# the specifier of an import or export statement, or of its last line; those in comments are indented or starred
_FROM = re.compile(r"""^((?:import|export|\})[^;\n]*?\bfrom\s*|import\s*)(["'])([^"'\n]+)\2""", re.MULTILINE)


class LibraryError(ValueError):
    """The libraries are not to be had; the message says where they were looked for and what to do."""


@dataclass(frozen=True)
class Source:
    """Where the five files are."""

    source_map: Path | None  # None: they lie in `folder`
    folder: Path
    version: str  # changes with any of them


def find(web_root: Path, vendor: Path) -> Source:
    """The libraries of a frontend's web root, or else of a folder; LibraryError if neither has them. Reads no content."""
    maps = sorted(Path(web_root).glob(MAPS))
    if maps:
        return Source(maps[-1], Path(vendor), _version(maps[-1:]))
    files = [Path(vendor) / name for name in FILES]
    if missing := [file.name for file in files if not file.is_file()]:
        raise LibraryError(f"this frontend has no {MAPS}, and js/vendor lacks {', '.join(missing)}; {VENDOR_HELP}")
    return Source(None, Path(vendor), _version(files))


def _version(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        found = file.stat()
        digest.update(f"{file.name} {found.st_size} {found.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def extract(source: Source) -> dict[str, str]:
    """The five texts by name, importing each other by relative paths; LibraryError if one is missing or imports more."""
    return {name: _relinked(text, name) for name, text in _texts(source).items()}


def _texts(source: Source) -> dict[str, str]:
    file = source.source_map
    if file is None:
        return {name: read_text(source.folder / name) for name in FILES}
    record = read_json(file)
    names, contents = (record.get(key) if isinstance(record, Mapping) else None for key in ("sources", "sourcesContent"))
    if not isinstance(names, list) or not isinstance(contents, list) or len(names) != len(contents):
        raise LibraryError(f"{file.name} is no source map with contents; {VENDOR_HELP}")
    found = {}
    for name, end in FILES.items():
        texts = [text for path, text in zip(names, contents, strict=True) if text and str(path).endswith("/" + end)]
        if len(texts) != 1:
            raise LibraryError(f"{file.name} has {len(texts)} texts of {end}; {VENDOR_HELP}")
        found[name] = texts[0]
    return found


def _relinked(text: str, name: str) -> str:
    def relative(found: re.Match) -> str:
        keyword, quote, specifier = found.groups()
        target = SPECIFIERS.get(specifier, specifier)
        if target.removeprefix("./") not in FILES:
            raise LibraryError(f"{name} imports {specifier!r}, which is none of {', '.join(FILES)}; {VENDOR_HELP}")
        return f"{keyword}{quote}{target}{quote}"

    return _FROM.sub(relative, text)
