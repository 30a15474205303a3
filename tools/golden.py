"""Compares the project with a folder of golden numbers: `python tools/golden.py DIR`.

DIR has any of model/, arloop/, traj/, gsrecon/. Every case, size and seed comes from its files. One line per
check, a last line with the counts, exit status 1 if any check failed. The checks are in golden_checks/.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import host
from golden_checks import Check, Golden

FOLDERS = ("model", "arloop", "traj", "gsrecon")
SUFFIXES = (".json", ".npz", ".safetensors")


def checks_of(golden: Golden) -> Iterator[Check]:
    """All checks of one file; a file that can't be read or makes the product raise is one failed check more."""
    module = f"golden_checks.{golden.folder.name}"
    if find_spec(module) is None:
        yield Check("*", skip="no check yet")
        return
    try:
        check = import_module(module).check_for(golden)
        yield from check(golden) if check else [Check("*", skip="no check yet")]
    except Exception as error:  # the rest of the files still wants to be compared
        message = " ".join(f"{type(error).__name__}: {error}".split())
        yield Check("*", f"raised[{message}]", math.inf, 0)


def main(root: Path) -> int:
    ok = failed = skipped = 0
    for folder in (root / name for name in FOLDERS if (root / name).is_dir()):
        for name in sorted({file.stem for file in folder.iterdir() if file.suffix in SUFFIXES}):
            for check in checks_of(Golden(folder, name)):
                print(f"{folder.name}/{name} {check}")
                skipped += bool(check.skip)
                ok += not check.skip and check.ok
                failed += not check.skip and not check.ok
    print(f"{ok} ok, {failed} failed, {skipped} skipped")
    return int(failed > 0)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not any((Path(sys.argv[1]) / folder).is_dir() for folder in FOLDERS):
        sys.exit(f"usage: python tools/golden.py DIR, a folder with any of {', '.join(FOLDERS)}")
    host.boot()
    sys.exit(main(Path(sys.argv[1])))
