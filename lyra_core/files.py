"""Files as people have them: texts of any editor, names in the order that people mean, litter of file managers.

Whatever is read from outside comes through here, so that every refusal names the file and a way out. Files are written
beside their place and then moved into it, so that a reader never meets half of one.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

LITTER = {"desktop.ini", "thumbs.db", "__macosx", "icon\r"}  # and every name that begins with a dot
WIDE = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, without a byte order mark; ValueError that names the file and its encoding otherwise."""
    raw = Path(path).read_bytes()
    if raw.startswith(WIDE) or b"\0" in raw[:200]:
        raise ValueError(f"{path}: is UTF-16 or binary, not UTF-8 text; save it as UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = raw[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}: line {where} has the byte 0x{raw[error.start]:02x}, which is not UTF-8 (Latin-1 or "
            "Windows-1252, perhaps); save it as UTF-8"
        ) from None


def parse_json(text: str, name: str | Path) -> object:
    """The value of a JSON text; ValueError that names `name` and the place."""
    try:
        return json.loads(text.removeprefix("\ufeff"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{name}: not valid JSON ({error})") from None


def read_json(path: str | Path) -> object:
    """The value in a JSON file; ValueError that names the file and the place."""
    return parse_json(read_text(path), path)


def natural(name: str) -> tuple:
    """A key that sorts names as people count: frame_2 before frame_10."""
    return tuple((int(part), "") if part.isdecimal() else (-1, part.casefold()) for part in re.split(r"(\d+)", name))


def find(folder: Path, name: str) -> Path | None:
    """The file or folder of this name in a folder, as it is or in other letters (IMAGES.TXT); links count as what they lead to."""
    if (folder / name).exists():
        return folder / name
    if not folder.is_dir():
        return None
    others = sorted(child for child in folder.iterdir() if child.name.casefold() == name.casefold())
    return next((child for child in others if child.exists()), None)


def walk(folder: Path) -> Iterator[Path]:
    """Every file below a folder, through links to files and folders, each folder once, without litter; in natural order."""
    entered: set[Path] = set()

    def inside(folder: Path) -> Iterator[Path]:
        place = folder.resolve()
        if place in entered:  # a link back up would never end
            return
        entered.add(place)
        for child in sorted(folder.iterdir(), key=lambda child: natural(child.name)):
            if is_litter(child.name):
                continue
            if child.is_dir():
                yield from inside(child)
            elif child.is_file():
                yield child

    yield from inside(folder)


def is_litter(name: str) -> bool:
    """Whether a file or folder of this name was left by a file manager and is nobody's data."""
    return name.startswith(".") or name.casefold() in LITTER


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path to write to; its file takes the place of `path` when all has gone well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")
