"""What every measurement is made of. One module per subject, its benches under BENCHES."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


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
