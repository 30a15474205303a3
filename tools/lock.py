"""Writes tools/requirements.lock again: exact versions, with hashes, of what the launcher installs beside the host's own list.

    python tools/comfy.py lock [--upgrade]

Versions that are in the file stay, unless they no longer fit or --upgrade asks for the newest; after that, `test` installs
what changed. It is of Python 3.10 to 3.13 and all systems, and names no registry: hashes are of the files themselves. What
the host's list brings on every one of them, with all that hangs on it, is left out: of that, the host says which versions it
takes.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
SYSTEMS = (("linux", "Linux", "x86_64"), ("linux", "Linux", "aarch64"), ("darwin", "Darwin", "arm64"), ("win32", "Windows", "AMD64"))
HEAD = "# Written by `python tools/comfy.py lock`; see tools/lock.py. For pip's --require-hashes.\n"


def compiled(wanted: list[str], target: Path, *options: str) -> None:
    """What these requirements come to, with all that hangs on them, on any system and Python."""
    source = target.with_suffix(".in")
    source.write_text("\n".join(wanted) + "\n")
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--universal", "--python-version", PYTHONS[0]]
    command += ["--no-python-downloads", "--no-annotate", "--no-header", "--no-emit-index-url", *options, str(source), "-o", str(target)]
    if code := subprocess.run(command).returncode:
        raise SystemExit(code)


def names(lock: str) -> list[str]:
    return sorted({match[1] for match in re.finditer(r"^([A-Za-z0-9._-]+)==", lock, re.MULTILINE)})


def everywhere(lock: str) -> list[str]:
    """The names of what is installed on every system and Python."""
    from packaging.markers import Marker

    markers: dict[str, list[str]] = {}
    for match in re.finditer(r"^([A-Za-z0-9._-]+)==[^\s;]+(?: ; (.*))?$", lock, re.MULTILINE):
        markers.setdefault(match[1], []).append(match[2] or "")
    environments = [
        {"sys_platform": short, "platform_system": system, "platform_machine": machine, "python_version": python,
         "python_full_version": f"{python}.9", "platform_python_implementation": "CPython", "implementation_name": "cpython",
         "os_name": "nt" if short == "win32" else "posix"}
        for short, system, machine in SYSTEMS
        for python in PYTHONS
    ]  # fmt: skip
    return [
        name
        for name, its in markers.items()
        if all(any(not marker or Marker(marker).evaluate(environment) for marker in its) for environment in environments)
    ]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="comfy.py lock", description=__doc__.partition("\n")[0])
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions of everything")
    options = parser.parse_args(arguments)
    import comfy as launcher  # this folder's, as this file is run by itself

    host, own = launcher.requirements(launcher.find_host())
    with tempfile.TemporaryDirectory() as folder:
        torchs, theirs, ours = (Path(folder) / f"{name}.txt" for name in ("torch", "host", "ours"))
        compiled([*launcher.TORCH], torchs)
        compiled([*host, *launcher.TORCH], theirs, "-c", str(torchs))
        if launcher.LOCK.exists():
            ours.write_text(launcher.LOCK.read_text())  # uv keeps the versions that it finds
        of_others = {*names(torchs.read_text()), *everywhere(theirs.read_text())}  # CUDA comes with torch, or does not
        left_out = [option for name in sorted(of_others) for option in ("--no-emit-package", name)]
        upgrade = ["--upgrade"] * options.upgrade
        compiled(own, ours, "--generate-hashes", "-c", str(theirs), *left_out, *upgrade)
        launcher.LOCK.write_text(HEAD + ours.read_text().removeprefix(HEAD), newline="\n")
    print(f"wrote {launcher.LOCK}: {len(names(launcher.LOCK.read_text()))} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
