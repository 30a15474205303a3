"""Where the routes compute: one thread, and another for retrieval, which takes longest."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from ...lyra_core.world import opened
from .requests import Refused


class Work:
    """The worlds that are open, and the threads that compute with them."""

    def __init__(self):
        self.opened = opened.OpenWorlds()
        self.worker = ThreadPoolExecutor(1, "lyra2-routes")
        self.slow_worker = ThreadPoolExecutor(1, "lyra2-retrieval")
        self.newest: dict[tuple, Future] = {}  # preflight of each client

    async def compute(self, job, *arguments, worker: ThreadPoolExecutor | None = None):
        """The job's result, from the worker thread."""
        return await asyncio.wrap_future((worker or self.worker).submit(_inferring, job, *arguments))

    async def compute_newest(self, client: tuple, job, *arguments, worker: ThreadPoolExecutor | None = None):
        """The same, unless a newer request of the client comes before the job has begun."""
        if client in self.newest:
            self.newest[client].cancel()
        mine = self.newest[client] = (worker or self.worker).submit(_inferring, job, *arguments)
        try:
            return await asyncio.wrap_future(mine)
        except asyncio.CancelledError:
            if self.newest.get(client) is mine:  # not overtaken: the page has gone
                raise
            raise Refused(409, "a newer request took this one's place") from None
        finally:
            if self.newest.get(client) is mine:
                del self.newest[client]


def _inferring(job, *arguments):
    with torch.inference_mode():
        return job(*arguments)
