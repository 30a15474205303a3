"""Work that a process is killed at, as by the system or a user who has waited long enough."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

LIMIT = 4096  # bytes of a file, at which the system ends the process that writes on
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system with fork")


def in_the_middle_of_a_file(work: Callable[[], object]) -> bool:
    """Do it in a copy of this process, which ends on the spot with the first file that grows longer; whether it ended so."""
    import resource

    process = os.fork()
    if process == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
        try:
            work()
        finally:
            os._exit(0)
    status = os.waitpid(process, 0)[1]
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXFSZ
