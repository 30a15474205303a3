"""Files as people have them: texts of any editor, names in the order that people mean, litter of file managers.

Whatever is read from outside comes through here, so that every refusal names the file and a way out. Files are written
beside their place and then moved into it, so that a reader never meets half of one.
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
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

LITTER = {"desktop.ini", "thumbs.db", "__macosx", "icon\r"}  # and every name that begins with a dot
PARTIAL = ".partial"  # ends the name of a file that is being written
WAIT, STALE = 30.0, 300.0  # seconds: for somebody else's lock; after which a lock of another machine counts as left behind
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
    except (ValueError, RecursionError) as error:  # also for a number of 5,000 digits
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
    """Remove what processes that were killed had begun to write."""
    for file in folder.glob(f"*{PARTIAL}"):
        match = re.search(r"\.([0-9a-f]{8})-(\d+)-(\d+)-[0-9a-f]{8}\.partial$", file.name)
        owner = match and Owner(_host(), int(match[2]), int(match[3]))
        gone = owner.is_gone() if owner and owner.label.startswith(match[1]) else None
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


def write_partial(file: Path, content: bytes) -> Path:
    """A file beside `file` with this content, flushed to the disk, that only needs to be moved there."""
    partial = partial_beside(file)
    with explained(file, len(content)):
        try:
            with open(partial, "xb") as handle:
                handle.write(content)
                handle.flush()
                os.fsync(handle.fileno())
                found = os.fstat(handle.fileno()).st_size
            if found != len(content):
                raise ValueError(f"{file}: only {found} of {len(content)} bytes got onto the disk")
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    return partial
