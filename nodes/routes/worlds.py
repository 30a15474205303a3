"""Saved worlds: which there are, what one is made of, the points and pictures of its states."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import folder_paths
from aiohttp import web
from PIL import Image

from ...lyra_core.exports import web_libraries
from ...lyra_core.memory import point_cloud
from ...lyra_core.world import opened, world_files
from .page import Library
from .requests import ASK_AGAIN, FOREVER, Refused, answered, compressed, number_of, unchanged, without_places, world_of
from .work import Work

SMALLEST_PICTURE = 16


class WorldRoutes:
    def __init__(self, work: Work, library: Library):
        self.work, self.library = work, library

    def add_to(self, routes: web.RouteTableDef) -> None:
        routes.get("/lyra2/worlds")(self.get_worlds)
        routes.get("/lyra2/world")(self.get_world)
        routes.get("/lyra2/points/{state}")(self.get_points)
        routes.get("/lyra2/frame/{state}/{n}")(self.get_frame)

    @answered
    async def get_worlds(self, request: web.Request) -> web.Response:
        return web.json_response(await self.work.compute(_saved_worlds))

    @answered
    async def get_world(self, request: web.Request) -> web.Response:
        folder, state = world_of(request.query)
        found = await self.work.compute(self.summarised, folder, state)
        body = json.dumps({"folder": request.query["folder"], **found}).encode()
        headers = {**ASK_AGAIN, "ETag": f'"{hashlib.sha256(body).hexdigest()[:32]}"'}
        return unchanged(request, headers) or web.Response(body=body, content_type="application/json", headers=headers)

    def summarised(self, folder: Path, state: str) -> dict:
        found = opened.summary(self.work.opened, folder, opened.whole_key(folder, state))
        try:
            library = self.library.source().version
        except web_libraries.LibraryError:
            library = None
        return {**found, "library": library}

    @answered
    async def get_points(self, request: web.Request) -> web.Response:
        folder, state = world_of({**request.query, "state": request.match_info["state"]})
        key = await self.work.compute(opened.whole_key, folder, state)
        headers = {**FOREVER, "ETag": f'"{key}.{point_cloud.VERSION}"'}
        if known := unchanged(request, headers):
            return known
        found = await self.work.compute(self.work.opened.points, folder, key)
        return compressed(request, found.packed, "application/octet-stream", headers)

    @answered
    async def get_frame(self, request: web.Request) -> web.Response:
        folder, state = world_of({**request.query, "state": request.match_info["state"]})
        frame = number_of(request.match_info["n"], int, "the frame", -1000, 10**7)
        width = number_of(request.query.get("width") or 10**5, int, "the width", SMALLEST_PICTURE, 10**5)
        content = await self.work.compute(self.picture, folder, state, frame, width)
        return web.Response(body=content, content_type="image/jpeg", headers=FOREVER)

    def picture(self, folder: Path, state: str, frame: int, width: int) -> bytes:
        world = self.work.opened.world(folder, opened.whole_key(folder, state))
        if frame >= len(world) or (frame < 0 and frame not in world.memory.frames):
            raise Refused(404, f"this state has no frame {frame}; it has {len(world)}")
        picture = Image.fromarray(world.frame(frame).numpy())
        if width < picture.width:
            picture = picture.resize((width, max(1, round(picture.height * width / picture.width))), Image.LANCZOS)
        content = io.BytesIO()
        picture.save(content, "JPEG", quality=90)
        return content.getvalue()


def _saved_worlds() -> list[dict]:
    base, found = Path(folder_paths.get_output_directory()), []
    for folder in opened.saved_in(base):
        entry = {"folder": folder.relative_to(base).as_posix()}
        try:
            latest, size = world_files.latest(folder)
            states = len(world_files.read_manifest(folder))
            changed = (folder / world_files.MANIFEST).stat().st_mtime
            found.append({**entry, "latest": latest, "size": list(size), "states": states, "changed": changed})
        except (ValueError, OSError) as problem:
            found.append({**entry, "error": without_places(str(problem))})
    return found
