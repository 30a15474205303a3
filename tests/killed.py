"""Work that a process is killed at, as by the system or a user who has waited long enough."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

LIMIT = 4096  # bytes of a file, at which the system ends the process that writes on
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system with fork")


def by(number: int, work: Callable[[], object]) -> bool:
    """Whether a process that goes on from here with this work is ended in it by this signal. It shares no memory with this one."""
    process = os.fork()
    if process == 0:
        try:
            work()
        finally:
            os._exit(1)
    status = os.waitpid(process, 0)[1]
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == number


def in_the_middle_of_a_file(work: Callable[[], object]) -> bool:
    """Whether such a process, which ends on the spot with the first file that grows longer than LIMIT, ends so."""
    import resource

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
        work()

    return by(signal.SIGXFSZ, limited)
