"""Files as people have them: texts of any editor, names in the order that people mean, litter of file managers.

Whatever is read from outside comes through here, or through `array_files` for numbers in binary, so that what a file promises
is compared with what it has before memory is taken, and every refusal is a FileError. Files are written beside their place
and then moved into it, so that a reader never meets half of one.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

LITTER = {"desktop.ini", "thumbs.db", "__macosx", "icon\r"}  # and every name that begins with a dot
PARTIAL = ".partial"  # ends the name of a file that is being written
WAIT, STALE = 30.0, 300.0  # seconds: for somebody else's lock; after which a lock of another machine counts as left behind
LARGEST_TEXT = 64 << 20  # bytes of a text that is read at once; of a list of 10,000 cameras it takes a tenth
LONGEST_LINE = 16 << 20  # bytes of a line of texts that are read line by line
DEEPEST = 64  # lists and objects inside each other in a JSON text
DIGITS = 20  # of a whole number there; 2^64 has as many
UNASKED, SWOLLEN = 1 << 30, 64  # bytes that any file may need in memory, and by how many times more than it has
NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
WIDE = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class FileError(ValueError):
    """A file that can't be read as what it should be: its name, the place in it, what was found there, and the way out."""


@contextlib.contextmanager
def reading(file: str | Path) -> Iterator[None]:
    """Every door through which a file comes: what is found to be wrong with it becomes a FileError that names it."""
    try:
        yield
    except FileError:
        raise
    except ValueError as problem:
        told = str(problem)
        raise FileError(told if str(file) in told else f"{file}: {told}") from problem


@contextlib.contextmanager
def parsing(file: str | Path, what: str) -> Iterator[None]:
    """Around a library that takes a file apart: whatever it raises over damaged bytes becomes a FileError that says `what`."""
    try:
        yield
    except (FileError, MemoryError):  # of memory there was enough, or a bound is missing
        raise
    except Exception as problem:
        raise FileError(f"{file}: {what} ({str(problem)[:200] or type(problem).__name__})") from problem


def check_size(file: str | Path, needed: int, found: int, what: str) -> None:
    """FileError if what a file of `found` bytes promises would take more memory than any such file is worth."""
    if needed > max(UNASKED, SWOLLEN * found):
        raise FileError(
            f"{file}: {what} would take {needed:,} bytes, from a file of {found:,}; it is damaged or was made to fill the "
            "memory: save it again, in parts if it really is that large"
        )


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, without a byte order mark; FileError that names the file and its encoding otherwise."""
    with open(path, "rb") as handle:
        raw = handle.read(LARGEST_TEXT + 1)
    if len(raw) > LARGEST_TEXT:
        raise FileError(f"{path}: is larger than {LARGEST_TEXT >> 20} MB, too long for such a text; give a part of it")
    return _decoded(raw, path, 1)


def read_lines(path: str | Path) -> Iterator[str]:
    """The lines of a UTF-8 file of any length, one after the other; FileError as `read_text`."""
    with open(path, "rb") as handle:
        for number, raw in enumerate(iter(lambda: handle.readline(LONGEST_LINE), b""), 1):
            if len(raw) == LONGEST_LINE:
                raise FileError(f"{path}: line {number} is longer than {LONGEST_LINE >> 20} MB; it is no text of this kind")
            yield from _decoded(raw, path, number).splitlines()


def _decoded(raw: bytes, path: str | Path, line: int) -> str:
    if raw.startswith(WIDE) or b"\0" in raw[:200]:
        raise FileError(f"{path}: is UTF-16 or binary, not UTF-8 text; save it as UTF-8")
    try:
        return raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        where = line + raw[: error.start].count(b"\n")
        raise FileError(
            f"{path}: line {where} has the byte 0x{raw[error.start]:02x}, which is not UTF-8 (Latin-1 or "
            "Windows-1252, perhaps); save it as UTF-8"
        ) from None


def parse_json(text: str, name: str | Path) -> object:
    """The value of a JSON text; FileError that names `name` and the place.

    Not deeper than DEEPEST, whole numbers of DIGITS at most, and no half characters, which no file can hold.
    """
    try:
        raw = text.removeprefix("\ufeff").encode()
        if (depth := _depth(raw)) > DEEPEST:
            raise ValueError(f"{depth} lists and objects lie inside each other, {DEEPEST} may")
        value = json.loads(raw, parse_int=_whole)
        if b"\\ud" in raw or b"\\uD" in raw:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise FileError(f"{name}: not valid JSON (half of a character, {error.object[error.start]!r}, in a text)") from None
    except ValueError as error:
        raise FileError(f"{name}: not valid JSON ({error})") from None
    return value


def _depth(raw: bytes) -> int:
    """How many lists and objects lie inside each other, before anything follows them there."""
    outside = b"".join(raw.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])
    brackets = outside.translate(None, delete=NO_BRACKETS)
    return max(accumulate(1 if bracket in b"[{" else -1 for bracket in brackets), default=0)


def _whole(digits: str) -> int:
    if len(digits) > DIGITS + digits.startswith("-"):
        raise ValueError(f"a whole number of {len(digits)} digits, {digits[:24]}...")
    return int(digits)


def read_json(path: str | Path) -> object:
    """The value in a JSON file; FileError that names the file and the place."""
    return parse_json(read_text(path), path)


def natural(name: str) -> tuple:
    """A key that sorts names as people count: frame_2 before frame_10."""
    parts = ((part, part.lstrip("0")) for part in re.split(r"(\d+)", name))
    return tuple((len(digits), digits) if part.isdecimal() else (-1, part.casefold()) for part, digits in parts)


def stays_inside(name: str) -> bool:
    """Whether a file of this name, with / between its parts, lies inside of a folder, on whatever system."""
    return name.isprintable() and not set(name) & set("\\:") and all(part.strip(". ") for part in name.split("/"))


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


def check_part(part: Path) -> None:
    """FileError if what stands where an unfinished file is gone on with leads elsewhere, or is no file of its own."""
    try:
        found = part.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        what = "is a link" if stat.S_ISLNK(found.st_mode) or found.st_nlink > 1 else "is no file"
        raise FileError(f"{part}: {what}, so writing on there would change something else; remove it and try again")


def write_text(path: str | Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


# --------------------------------------------------------------------------------------- several who write to one folder


@dataclass(frozen=True)
class Owner:
    """A process that writes; `started` tells it from a later one with the same number."""

    host: str
    pid: int
    started: int  # in the system's own ticks; 0 where they are not known

    @classmethod
    def me(cls) -> Owner:
        return cls(_host(), os.getpid(), _stat(os.getpid())[1])

    @cached_property
    def label(self) -> str:
        """For names of files."""
        return f"{hashlib.sha256(self.host.encode()).hexdigest()[:8]}-{self.pid}-{self.started}"

    def is_gone(self) -> bool | None:
        """Whether the process has ended; None where that can't be known from here, as of another machine's."""
        if self.host != _host() or os.name == "nt":  # there, asking by a signal would end it
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:  # it runs, as somebody else
            pass
        state, started = _stat(self.pid)
        return state in ("Z", "X") or bool(self.started and started and started != self.started)  # Z: ended, not yet buried


def _host() -> str:
    """This machine, and which of its process tables (containers have their own) a number belongs to."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _stat(pid: int) -> tuple[str, int]:
    """State of a process and when it started; nothing and 0 where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except (OSError, ValueError, IndexError):
        return "", 0


def partial_beside(path: Path) -> Path:
    """A name that nobody else writes to, and that says who does."""
    return path.with_name(f"{path.name}.{Owner.me().label}-{uuid.uuid4().hex[:8]}{PARTIAL}")


def sweep(folder: Path) -> None:
    """Remove what processes that were killed had begun to write; files of anybody else's kind stay."""
    for file in folder.glob(f"*{PARTIAL}"):
        match = re.search(r"\.([0-9a-f]{8})-(\d+)-(\d+)-[0-9a-f]{8}\.partial$", file.name)
        if match is None:
            continue
        owner = Owner(_host(), int(match[2]), int(match[3]))
        gone = owner.is_gone() if owner.label.startswith(match[1]) else None
        if gone or (gone is None and _age(file) > 12 * STALE):  # somebody else's may take an hour
            file.unlink(missing_ok=True)


def _age(file: Path) -> float:
    """Seconds since a file was written; 0 if it is gone, or from the future."""
    try:
        return max(0.0, time.time() - file.stat().st_mtime)
    except OSError:
        return 0.0


@contextlib.contextmanager
def locked(file: Path, wait: float = WAIT, stale: float = STALE) -> Iterator[Callable[[], bool]]:
    """Hold a lock file while its folder's list is read, merged and written; TimeoutError that says who holds it.

    A lock is left behind if its process has ended, or, where that can't be known, if it is older than `stale` seconds:
    nobody holds one for longer than it takes to write a list. What is given tells whether it is still held: to be asked
    before the list is moved to its place, by a process that may have stood still.
    """
    deadline, mine = time.monotonic() + wait, json.dumps({**asdict(Owner.me()), "token": uuid.uuid4().hex})
    while not _claim(file, mine):
        held = _text(file)
        if held is not None and _is_left(file, held, stale):
            _take_away(file, held)
        elif time.monotonic() > deadline:
            raise TimeoutError(
                f"{file.parent} is being written to by {_who(held)}, since {_age(file):.0f} s; wait until it is done, or remove "
                f"{file.name} there if you know that it is not"
            )
        else:
            time.sleep(0.02)
    try:
        yield lambda: _text(file) == mine
    finally:
        if _text(file) == mine:
            file.unlink(missing_ok=True)


def _claim(file: Path, mine: str) -> bool:
    with explained(file, len(mine)):
        try:
            handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        except PermissionError:
            if os.name == "nt" and file.exists():  # just being removed
                return False
            raise
        try:
            os.write(handle, mine.encode())
        except OSError:
            file.unlink(missing_ok=True)
            raise
        finally:
            os.close(handle)
        return True


def _text(file: Path) -> str | None:
    try:
        return file.read_bytes()[:4096].decode(errors="replace")
    except OSError:
        return None


def _owner(held: str | None) -> Owner | None:
    try:
        said = json.loads(held or "")
        host, pid, started = said["host"], said["pid"], said["started"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    known = isinstance(host, str) and type(pid) is int and type(started) is int and 0 < pid < 1 << 31
    return Owner(host, pid, started) if known else None


def _who(held: str | None) -> str:
    owner = _owner(held)
    return f"process {owner.pid} on {owner.host.split(' ')[0]}" if owner else "somebody"


def _is_left(file: Path, held: str, stale: float) -> bool:
    owner = _owner(held)
    if owner is None:  # killed between making and writing it
        return _age(file) > min(stale, 5.0)
    gone = owner.is_gone()
    return _age(file) > stale if gone is None else gone


def _take_away(file: Path, held: str) -> None:
    """Remove a lock that was left behind, and no other that somebody made in the meantime."""
    aside = partial_beside(file)
    try:
        os.rename(file, aside)
        if _text(aside) != held:
            os.rename(aside, file)
    except OSError:  # somebody else was faster
        pass
    aside.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------- errors of the system


@contextlib.contextmanager
def explained(file: Path, needed: int = 0) -> Iterator[None]:
    """Errors of the system while a file is written, told with folder, file, bytes and a way out; their type stays."""
    try:
        yield
    except OSError as problem:
        if problem.errno is None or isinstance(problem, TimeoutError) or getattr(problem, "explained", False):
            raise
        told = OSError(problem.errno, _explanation(file, needed, problem))
        told.explained = True
        raise told from problem


def _explanation(file: Path, needed: int, problem: OSError) -> str:
    folder, reason = file.parent, problem.strerror
    if problem.errno in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)):
        try:
            free = f"{shutil.disk_usage(folder).free:,} are free there"
        except OSError:
            free = "it is not known how many are free there"
        return (
            f"{reason}: {file.name} needs {needed:,} bytes in {folder}, {free}. Free some space, raise the limit of file sizes "
            "or choose another folder; what was saved there before is still whole"
        )
    if problem.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return (
            f"{reason}: {file.name} can't be written in {folder}. Allow writing to that folder, or choose another one; what was "
            "saved there before is still whole"
        )
    if problem.errno == errno.ENAMETOOLONG:
        return f"{reason}: {file}; choose a shorter name"
    return f"{reason}: {file.name} can't be written in {folder}; what was saved there before is still whole"


def flush(folder: Path) -> None:
    """Make the names in a folder last through a power cut, where the system can."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as problem:
        if problem.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # network folders that have no such thing
            raise
    finally:
        os.close(handle)


def write_bytes(file: Path, *pieces: bytes | memoryview) -> None:
    """Make a file of these pieces of content, whole or not at all, and folders above it; OSError that says what is needed.

    What a process that was killed left of writing beside it goes away.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    sweep(file.parent)
    partial = write_partial(file, *pieces)
    with explained(file):
        try:
            os.replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)
        flush(file.parent)


def write_partial(file: Path, *pieces: bytes | memoryview) -> Path:
    """A file beside `file` of these pieces of content, flushed to the disk, that only needs to be moved there."""
    partial, size = partial_beside(file), sum(map(len, pieces))
    with explained(file, size):
        try:
            with open(partial, "xb") as handle:
                handle.writelines(pieces)
                handle.flush()
                os.fsync(handle.fileno())
                found = os.fstat(handle.fileno()).st_size
            if found != size:
                raise ValueError(f"{file}: only {found} of {size} bytes got onto the disk")
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    return partial
