"""What a request of the page asks, checked, and what answers have in common."""

from __future__ import annotations

import functools
import gzip
import json
import re
from pathlib import Path

import folder_paths
from aiohttp import web

from ...lyra_core.cameras import next_path
from ...lyra_core.world import opened, world_files
from .. import types

BODY = 256 * 1024  # bytes of a request
STATE = re.compile(r"[0-9a-f]{8,64}")
FOREVER = {"Cache-Control": "private, max-age=31536000, immutable"}
ASK_AGAIN = {"Cache-Control": "no-cache"}  # kept, but asked for by its tag each time


class Refused(ValueError):
    """A request that is answered with this status."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status


def answered(handler):
    """A handler whose refusals are JSON, without the places where things are on this machine."""

    @functools.wraps(handler)
    async def safe(self, request: web.Request) -> web.StreamResponse:
        try:
            return await handler(self, request)
        except (ValueError, OSError) as problem:
            missing = isinstance(problem, (opened.MissingState, OSError))
            status = getattr(problem, "status", 404 if missing else 400)
            text = "this can't be read at the moment" if isinstance(problem, OSError) else str(problem)
            return web.json_response({"error": without_places(text)}, status=status)

    return safe


def without_places(text: str) -> str:
    output = Path(folder_paths.get_output_directory())
    for place in sorted({str(output), str(output.resolve())}, key=len, reverse=True):
        text = text.replace(place, "output")
    return text


def world_of(asked) -> tuple[Path, str]:
    """The folder and state that a request names, checked."""
    name, state = asked.get("folder"), asked.get("state") or ""
    if not isinstance(state, str) or (state and not STATE.fullmatch(state)):
        raise Refused(404, f"{str(state)[:80]!r} is no key of a state")
    try:
        if not isinstance(name, str):
            raise ValueError
        folder = types.output_folder(name)
    except (ValueError, OSError):
        raise Refused(404, f"{str(name)[:200]!r} is no folder in the output folder") from None
    manifest = folder / world_files.MANIFEST
    if not manifest.is_file() or manifest.is_symlink():
        raise Refused(404, f"{name} holds no saved world")
    return folder, state


async def body_of(request: web.Request) -> bytes:
    """At most BODY bytes, whatever the request says of its length."""
    content = b""
    async for piece in request.content.iter_chunked(2**16):
        content += piece
        if len(content) > BODY:
            raise Refused(400, f"more than {BODY // 1024} kB; that is no path")
    return content


async def json_body_of(request: web.Request) -> dict:
    try:
        asked = json.loads(await body_of(request))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise Refused(400, "the body is not JSON") from None
    if not isinstance(asked, dict):
        raise Refused(400, f"the body should be a JSON object; found a {type(asked).__name__}")
    return asked


def plan_of(asked: dict) -> next_path.NextPath:
    path = asked.get("path") or ""
    return next_path.read(path if isinstance(path, str) else json.dumps(path))


def number_of(value, kind: type, what: str, low: float, high: float):
    try:
        number = kind(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or not low <= number <= high:
        raise Refused(400, f"{what} should be a number from {low:g} to {high:g}; found {str(value)[:80]!r}")
    return number


def unchanged(request: web.Request, headers: dict) -> web.Response | None:
    """"Not modified", if the page has the very content of this ETag already."""
    return web.Response(status=304, headers=headers) if headers["ETag"] in request.headers.get("If-None-Match", "") else None


def compressed(request: web.Request, content: bytes, kind: str, headers: dict) -> web.Response:
    """Gzipped content, unpacked for the rare client that can't."""
    headers = {**headers, "Vary": "Accept-Encoding"}
    if "gzip" in request.headers.get("Accept-Encoding", ""):
        return web.Response(body=content, content_type=kind, headers={**headers, "Content-Encoding": "gzip"})
    return web.Response(body=gzip.decompress(content), content_type=kind, headers=headers)
