"""HTTP routes of the Explorer's page, below /lyra2 (and /api/lyra2). All of them read only; nothing else knows aiohttp.

`folder` is a folder in the output folder, as the node's input; `state` the key of a state, or its first 8 or more letters;
empty: the latest. What is wrong is answered with 400 or 404 and `{"error": text}`.

    GET  /lyra2/page/{language}.mjs        the modules of js/ as one, with texts in the language, else English (`modules.py`)
    GET  /lyra2/lib                        {version, files} or {missing: text}; files at /lyra2/lib/{version}/{file}
    GET  /lyra2/lib/{version}/{file}       three.core.js, three.module.js, TransformControls.js, Pass.js, spark.module.js
    GET  /lyra2/worlds                     [{folder, latest, size: [H, W], states, changed (seconds since 1970)}], or
                                           {folder, error} for one that can't be read
    GET  /lyra2/world?folder=&state=       {folder, latest, state, size: [H, W], depth, frames, chain: [state...],
                                           tree: [{state, parent, prompt, generator, seed, frames}], library: version|null}
    GET  /lyra2/points/{state}?folder=     the block of `lyra_core.memory.point_cloud` that the state's last chunk adds
    GET  /lyra2/frame/{state}/{n}?folder=&width=    JPEG of frame n; negative: further photos
    POST /lyra2/preflight                  {folder, state, path, retrieve, client?, chunk_frames? (80)} ->
                                           {frames, depth, grid: [rows, columns], views: [{frame, coverage, clearance}],
                                           nearest: {distance, frame}, effort: [per chunk], ms, retrieved?: [[ids] per chunk]}
    GET  /lyra2/presets                    [{name, directions: [...]|null, strength: {default, unit}|null, note}]
    POST /lyra2/preset                     {folder, state, preset, direction?, strength?, frames?, seed?} -> {path: text}
    POST /lyra2/path                       {folder, state, path, format} -> the file as a download; format as in
                                           Lyra 2 Save Trajectory (colmap text comes as a zip)
    POST /lyra2/cameras?folder=&state=&name=cameras.npz&pose_scale=1&frames=81
                                           a camera file (npz, transforms.json, camera path) as the body -> {path: text}

Beyond the contract (shared/spec/explorer.md, section 6): `clearance` is in depths of the scene (`depth`, scene units) and
`distance` in scene units, both null where nothing is known; `path` may be the JSON text or the object itself; a preflight
that a newer one of the same client (`client`, else the address; with and without `retrieve` count apart) overtook before
it had begun is answered with 409. A grid belongs to points `stride` pixels apart: rows = round(H / (4 stride)), columns =
round(W / (4 stride)); at 832x480 that is 30x52 for stride 4 (settled: levels 0 to 2) and 15x26 for stride 8 (live: levels
0 and 1). The stride of level 0 is 8 f with f = 2 ** max(0, round(log2(W / 416))), so level 2 has 2 f and level 1 has 4 f.

What the node tells the page, beside `lyra2_world`: `lyra2_path`: [text], the cameras that are connected to it as a path to
edit, while nothing is planned, to take the place of `path` if the person likes it. As that of /lyra2/preset it begins at
the state's camera and has `lyra2.from`, `frames` and `before` (absent or null where there is none). Of `before` only the
direction bends the first tangent (`camera_path._came_from`), and "uniform motion" weighs no trembling
(`camera_path.TREMBLE`): the page's maths does the same. During a run `Lyra2PreviewChunks` sends `executed` after every
chunk with `{"lyra2_world": [...]}` alone.
"""

from __future__ import annotations

from aiohttp import web

from .page import Library, PageRoutes
from .paths import PathRoutes
from .work import Work
from .worlds import WorldRoutes


def register(server) -> None:
    """Add the routes to the host's server; nothing to do without one."""
    if server is not None:
        Routes(server.web_root).add_to(server.routes)


class Routes:
    """All of them; what they compute, they compute in the same thread."""

    def __init__(self, web_root: str):
        self.work, library = Work(), Library(web_root)
        self.parts = PageRoutes(self.work, library), WorldRoutes(self.work, library), PathRoutes(self.work)

    def add_to(self, routes: web.RouteTableDef) -> None:
        for part in self.parts:
            part.add_to(routes)
