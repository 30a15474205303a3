"""HTTP routes of the Explorer's page, below /lyra2 (and /api/lyra2). All of them read only; nothing else knows aiohttp.

`folder` is a folder in the output folder, as the node's input; `state` the key of a state, or its first 8 or more letters;
empty: the latest. What is wrong is answered with 400 or 404 and `{"error": text}`.

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

import asyncio
import functools
import gzip
import hashlib
import io
import json
import re
import tempfile
import time
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import folder_paths
import torch
from aiohttp import web
from PIL import Image

from ..lyra_core.cameras import camera_files, next_path, presets
from ..lyra_core.exports import web_libraries
from ..lyra_core.memory import point_cloud, preflight
from ..lyra_core.world import opened, world_files
from ..lyra_core.world import world as worlds
from . import types
from .explorer import path_to_edit
from .trajectory import WITHOUT_DIRECTION, SaveTrajectory, strength_of, write_cameras

BODY = 256 * 1024  # bytes of a request
STATE = re.compile(r"[0-9a-f]{8,64}")
FOREVER = {"Cache-Control": "private, max-age=31536000, immutable"}
SMALLEST_PICTURE = 16
VENDOR = Path(__file__).resolve().parent.parent / "js" / "vendor"


class Refused(ValueError):
    """A request that is answered with this status."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status


def register(server) -> None:
    """Add the routes to the host's server; nothing to do without one."""
    if server is not None:
        Routes(server.web_root).add_to(server.routes)


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


class Routes:
    """The handlers, the one thread that computes for them, and another for retrieval, which takes longest."""

    def __init__(self, web_root: str):
        self.web_root = web_root
        self.opened = opened.OpenWorlds()
        self.worker = ThreadPoolExecutor(1, "lyra2-routes")
        self.slow_worker = ThreadPoolExecutor(1, "lyra2-retrieval")
        self.newest: dict[tuple, Future] = {}  # preflight of each client
        self.library: dict[str, dict[str, bytes]] = {}  # version -> file -> gzip

    def add_to(self, routes: web.RouteTableDef) -> None:
        for path, handler in {
            "/lyra2/lib": self.get_lib,
            "/lyra2/lib/{version}/{file}": self.get_lib_file,
            "/lyra2/worlds": self.get_worlds,
            "/lyra2/world": self.get_world,
            "/lyra2/points/{state}": self.get_points,
            "/lyra2/frame/{state}/{n}": self.get_frame,
            "/lyra2/presets": self.get_presets,
        }.items():
            routes.get(path)(handler)
        for path, handler in {
            "/lyra2/preflight": self.post_preflight,
            "/lyra2/preset": self.post_preset,
            "/lyra2/path": self.post_path,
            "/lyra2/cameras": self.post_cameras,
        }.items():
            routes.post(path)(handler)

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

    # ------------------------------------------------------------------------------------------------------- libraries

    @answered
    async def get_lib(self, request: web.Request) -> web.Response:
        try:
            found = await self.compute(self.find_library)
        except web_libraries.LibraryError as problem:
            return web.json_response({"missing": without_places(str(problem))})
        return web.json_response({"version": found.version, "files": list(web_libraries.FILES)})

    @answered
    async def get_lib_file(self, request: web.Request) -> web.Response:
        version, file = request.match_info["version"], request.match_info["file"]
        if file not in web_libraries.FILES:
            raise Refused(404, f"there is no library {file!r}; there are {', '.join(web_libraries.FILES)}")
        content = (await self.compute(self.unpacked_library, version))[file]
        return _compressed(request, content, "text/javascript", FOREVER)

    def find_library(self) -> web_libraries.Source:
        return web_libraries.find(Path(self.web_root), VENDOR)

    def unpacked_library(self, version: str) -> dict[str, bytes]:
        if version not in self.library:
            source = self.find_library()
            if source.version != version:
                raise Refused(404, f"there is no version {version!r} of the libraries, only {source.version}; reload the page")
            texts = web_libraries.extract(source)
            self.library = {version: {name: gzip.compress(text.encode(), 6, mtime=0) for name, text in texts.items()}}
        return self.library[version]

    # ---------------------------------------------------------------------------------------------------------- worlds

    @answered
    async def get_worlds(self, request: web.Request) -> web.Response:
        return web.json_response(await self.compute(_saved_worlds))

    @answered
    async def get_world(self, request: web.Request) -> web.Response:
        folder, state = _world_of(request.query)
        found = await self.compute(self.summarised, folder, state)
        body = json.dumps({"folder": request.query["folder"], **found}).encode()
        tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        return _tagged(request, tag, {"Cache-Control": "no-cache"}) or web.Response(
            body=body, content_type="application/json", headers={"Cache-Control": "no-cache", "ETag": tag}
        )

    def summarised(self, folder: Path, state: str) -> dict:
        found = opened.summary(self.opened, folder, opened.whole_key(folder, state))
        try:
            library = self.find_library().version
        except web_libraries.LibraryError:
            library = None
        return {**found, "library": library}

    @answered
    async def get_points(self, request: web.Request) -> web.Response:
        folder, state = _world_of({**request.query, "state": request.match_info["state"]})
        key = await self.compute(opened.whole_key, folder, state)
        headers = {**FOREVER, "ETag": f'"{key}.{point_cloud.VERSION}"'}
        if unchanged := _tagged(request, headers["ETag"], FOREVER):
            return unchanged
        found = await self.compute(self.opened.points, folder, key)
        return _compressed(request, found.packed, "application/octet-stream", headers)

    @answered
    async def get_frame(self, request: web.Request) -> web.Response:
        folder, state = _world_of({**request.query, "state": request.match_info["state"]})
        frame = _number(request.match_info["n"], int, "the frame", -1000, 10**7)
        width = _number(request.query.get("width") or 10**5, int, "the width", SMALLEST_PICTURE, 10**5)
        content = await self.compute(self.picture, folder, state, frame, width)
        return web.Response(body=content, content_type="image/jpeg", headers=FOREVER)

    def picture(self, folder: Path, state: str, frame: int, width: int) -> bytes:
        world = self.opened.world(folder, opened.whole_key(folder, state))
        if frame >= len(world) or (frame < 0 and frame not in world.memory.frames):
            raise Refused(404, f"this state has no frame {frame}; it has {len(world)}")
        picture = Image.fromarray(world.frame(frame).numpy())
        if width < picture.width:
            picture = picture.resize((width, max(1, round(picture.height * width / picture.width))), Image.LANCZOS)
        content = io.BytesIO()
        picture.save(content, "JPEG", quality=90)
        return content.getvalue()

    # ----------------------------------------------------------------------------------------------------------- paths

    @answered
    async def post_preflight(self, request: web.Request) -> web.Response:
        asked = await _json_body(request)
        folder, state = _world_of(asked)
        plan = _plan_of(asked)
        chunk_frames = _number(asked.get("chunk_frames", worlds.CHUNK_FRAMES), int, "chunk_frames", 1, 8000)
        retrieve, client = bool(asked.get("retrieve")), str(asked.get("client") or request.remote)[:100]
        found, world, cameras = await self.compute_newest(
            (client, retrieve), self.settled, folder, state, plan, chunk_frames
        )
        if retrieve:
            found["retrieved"] = await self.compute_newest(
                (client, "retrieval"), _retrieved, world, cameras, chunk_frames, worker=self.slow_worker
            )
        return web.json_response(found)

    def settled(self, folder: Path, state: str, plan: next_path.NextPath, chunk_frames: int):
        """The numbers of a plan except the retrieved frames, and what those need."""
        begin, key = time.perf_counter(), opened.whole_key(folder, state)
        world = self.opened.world(folder, key)
        depth, cloud = self.opened.depth(folder, key), self.opened.cloud(folder, key)
        cameras = next_path.cameras_of(plan, world.last_camera)
        found = preflight.preflight(cameras, cloud, depth, chunk_frames)
        rows = zip(found.views, found.coverage, found.clearance, strict=True)
        known = len(cloud) > 0
        answer = {
            "frames": len(cameras),
            "depth": depth,
            "grid": list(preflight.grid_of(cameras.size)),
            "views": [{"frame": f, "coverage": c, "clearance": g if known else None} for f, c, g in rows],
            "nearest": {"distance": found.nearest if known else None, "frame": found.nearest_frame},
            "effort": list(found.effort),
            "ms": round(1000 * (time.perf_counter() - begin)),
        }
        return answer, world, cameras

    @answered
    async def get_presets(self, request: web.Request) -> web.Response:
        return web.json_response([_described(name) for name in sorted(presets.PRESETS)])

    @answered
    async def post_preset(self, request: web.Request) -> web.Response:
        asked = await _json_body(request)
        return web.json_response({"path": await self.compute(self.preset, *_world_of(asked), asked)})

    def preset(self, folder: Path, state: str, asked: dict) -> str:
        key, name = opened.whole_key(folder, state), str(asked.get("preset"))
        stand, strength = self.opened.world(folder, key), strength_of(name)
        cameras = presets.preset(
            name,
            stand.last_camera,
            _number(asked.get("frames", next_path.FRAMES), int, "frames", 2, next_path.LONGEST),
            self.opened.depth(folder, key),
            str(asked.get("direction", "right")),
            _number(asked.get("strength", strength[0] if strength else 0.0), float, "strength", 0, 1000),
            torch.Generator().manual_seed(_number(asked.get("seed", 0), int, "seed", 0, 2**63 - 1)),
        )
        return path_to_edit(stand, cameras)

    @answered
    async def post_path(self, request: web.Request) -> web.Response:
        asked = await _json_body(request)
        name = asked.get("format")
        if name not in SaveTrajectory.FORMATS:
            raise Refused(400, f"there is no format {name!r}; choose one of {', '.join(SaveTrajectory.FORMATS)}")
        file, content = await self.compute(self.file_of, *_world_of(asked), _plan_of(asked), name)
        headers = {"Content-Disposition": f'attachment; filename="{file}"', "Cache-Control": "no-store"}
        return web.Response(body=content, content_type="application/octet-stream", headers=headers)

    def file_of(self, folder: Path, state: str, plan: next_path.NextPath, name: str) -> tuple[str, bytes]:
        stand = self.opened.world(folder, opened.whole_key(folder, state))
        with tempfile.TemporaryDirectory() as place:
            file = Path(place) / f"lyra2_path{SaveTrajectory.FORMATS[name]}"
            write_cameras(file, next_path.cameras_of(plan, stand.last_camera), name)
            if file.is_file():
                return file.name, file.read_bytes()
            content = io.BytesIO()
            with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
                for part in sorted(file.iterdir()):
                    archive.write(part, part.name)
            return f"{file.name}.zip", content.getvalue()

    @answered
    async def post_cameras(self, request: web.Request) -> web.Response:
        content = await _body(request)
        return web.json_response({"path": await self.compute(self.loaded, *_world_of(request.query), request.query, content)})

    def loaded(self, folder: Path, state: str, asked, content: bytes) -> str:
        stand = self.opened.world(folder, opened.whole_key(folder, state))
        scale = _number(asked.get("pose_scale", 1), float, "pose_scale", 1e-4, 1e4)
        frames = _number(asked.get("frames", next_path.FRAMES), int, "frames", 2, next_path.LONGEST)
        suffix = Path(asked.get("name", "")).suffix.lower()
        with tempfile.TemporaryDirectory() as place:
            file = Path(place) / f"cameras{suffix if suffix in ('.npz', '.json') else ''}"
            file.write_bytes(content)
            try:
                curve = suffix == ".json" and b'"path"' in content
                cameras = camera_files.load_cameras(file, frames if curve else None, scale, stand.size, stand.size)
            except ValueError as problem:
                raise Refused(400, str(problem).replace(str(file), asked.get("name") or "the file")) from None
        return path_to_edit(stand, cameras)


# ------------------------------------------------------------------------------------------------------------- requests


def _inferring(job, *arguments):
    with torch.inference_mode():
        return job(*arguments)


def _world_of(asked) -> tuple[Path, str]:
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


async def _body(request: web.Request) -> bytes:
    """At most BODY bytes, whatever the request says of its length."""
    content = b""
    async for piece in request.content.iter_chunked(2**16):
        content += piece
        if len(content) > BODY:
            raise Refused(400, f"more than {BODY // 1024} kB; that is no path")
    return content


async def _json_body(request: web.Request) -> dict:
    try:
        asked = json.loads(await _body(request))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise Refused(400, "the body is not JSON") from None
    if not isinstance(asked, dict):
        raise Refused(400, f"the body should be a JSON object; found a {type(asked).__name__}")
    return asked


def _plan_of(asked: dict) -> next_path.NextPath:
    path = asked.get("path") or ""
    return next_path.read(path if isinstance(path, str) else json.dumps(path))


def _number(value, kind: type, what: str, low: float, high: float):
    try:
        number = kind(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or not low <= number <= high:
        raise Refused(400, f"{what} should be a number from {low:g} to {high:g}; found {str(value)[:80]!r}")
    return number


def _tagged(request: web.Request, tag: str, headers: dict) -> web.Response | None:
    """"Not modified", if the page has this very content already."""
    known = request.headers.get("If-None-Match", "")
    return web.Response(status=304, headers={**headers, "ETag": tag}) if tag in known else None


def _compressed(request: web.Request, content: bytes, kind: str, headers: dict) -> web.Response:
    """Gzipped content, unpacked for the rare client that can't."""
    headers = {**headers, "Vary": "Accept-Encoding"}
    if "gzip" in request.headers.get("Accept-Encoding", ""):
        return web.Response(body=content, content_type=kind, headers={**headers, "Content-Encoding": "gzip"})
    return web.Response(body=gzip.decompress(content), content_type=kind, headers=headers)


# -------------------------------------------------------------------------------------------------------------- answers


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


def _retrieved(world: worlds.World, cameras, chunk_frames: int) -> list[list[int]]:
    """The past frames that would help with each chunk, as far as the world knows today."""
    starts = range(1, len(cameras), chunk_frames)
    return [list(worlds.plan(world, cameras[start : start + chunk_frames]).retrieved) for start in starts]


def _described(name: str) -> dict:
    strength = strength_of(name)
    return {
        "name": name,
        "directions": None if name in WITHOUT_DIRECTION else list(presets.DIRECTIONS),
        "strength": None if strength is None else {"default": strength[0], "unit": strength[1]},
        "note": presets.PRESET_NOTES.get(name, ""),
    }

