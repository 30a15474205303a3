"""What the page is made of: our own modules as one, three.js and spark out of the host's frontend."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
from pathlib import Path

from aiohttp import web

from ...lyra_core.exports import web_libraries
from . import modules
from .requests import ASK_AGAIN, FOREVER, Refused, answered, compressed, unchanged, without_places
from .work import Work

JS = Path(__file__).resolve().parents[2] / "js"


class Library:
    """three.js and spark, unpacked once."""

    def __init__(self, web_root: str):
        self.web_root = web_root
        self.unpacked: dict[str, dict[str, bytes]] = {}  # version -> file -> gzip

    def source(self) -> web_libraries.Source:
        return web_libraries.find(Path(self.web_root), JS / "vendor")

    def files(self, version: str) -> dict[str, bytes]:
        if version not in self.unpacked:
            source = self.source()
            if source.version != version:
                raise Refused(404, f"there is no version {version!r} of the libraries, only {source.version}; reload the page")
            texts = web_libraries.extract(source)
            self.unpacked = {version: {name: gzip.compress(text.encode(), 6, mtime=0) for name, text in texts.items()}}
        return self.unpacked[version]


class PageRoutes:
    def __init__(self, work: Work, library: Library):
        self.work, self.library = work, library

    def add_to(self, routes: web.RouteTableDef) -> None:
        routes.get("/lyra2/page/{language}.mjs")(self.get_page)
        routes.get("/lyra2/lib")(self.get_lib)
        routes.get("/lyra2/lib/{version}/{file}")(self.get_lib_file)

    @answered
    async def get_page(self, request: web.Request) -> web.Response:
        content = await asyncio.to_thread(modules.page, JS, request.match_info["language"])
        headers = {**ASK_AGAIN, "ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"'}
        return unchanged(request, headers) or compressed(request, gzip.compress(content, 6, mtime=0), "text/javascript", headers)

    @answered
    async def get_lib(self, request: web.Request) -> web.Response:
        try:
            found = await self.work.compute(self.library.source)
        except web_libraries.LibraryError as problem:
            return web.json_response({"missing": without_places(str(problem))})
        return web.json_response({"version": found.version, "files": list(web_libraries.FILES)})

    @answered
    async def get_lib_file(self, request: web.Request) -> web.Response:
        version, file = request.match_info["version"], request.match_info["file"]
        if file not in web_libraries.FILES:
            raise Refused(404, f"there is no library {file!r}; there are {', '.join(web_libraries.FILES)}")
        content = (await self.work.compute(self.library.files, version))[file]
        return compressed(request, content, "text/javascript", FOREVER)
