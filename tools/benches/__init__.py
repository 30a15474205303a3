"""What every measurement is made of. One module per subject, its benches under BENCHES."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    what: str
    value: str
    bar: str = ""
    met: bool = True

    def __str__(self) -> str:
        return f"{self.what:<58} {self.value:>18}   {f'{self.bar}: ' + ('met' if self.met else 'MISSED') if self.bar else ''}"


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def peak_mib() -> float:
    """Peak memory of this process."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage tells there is inherited from the parent
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
