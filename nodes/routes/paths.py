"""Planned paths: what the server says of one, and what it makes of presets and of camera files."""

from __future__ import annotations

import io
import tempfile
import time
import zipfile
from pathlib import Path

import torch
from aiohttp import web

from ...lyra_core.cameras import camera_files, next_path, presets
from ...lyra_core.memory import preflight
from ...lyra_core.world import opened
from ...lyra_core.world import world as worlds
from ..explorer import path_to_edit
from ..trajectory import WITHOUT_DIRECTION, SaveTrajectory, strength_of, write_cameras
from .requests import Refused, answered, body_of, json_body_of, number_of, plan_of, world_of
from .work import Work


class PathRoutes:
    def __init__(self, work: Work):
        self.work = work

    def add_to(self, routes: web.RouteTableDef) -> None:
        routes.post("/lyra2/preflight")(self.post_preflight)
        routes.get("/lyra2/presets")(self.get_presets)
        routes.post("/lyra2/preset")(self.post_preset)
        routes.post("/lyra2/path")(self.post_path)
        routes.post("/lyra2/cameras")(self.post_cameras)

    @answered
    async def post_preflight(self, request: web.Request) -> web.Response:
        asked = await json_body_of(request)
        folder, state = world_of(asked)
        plan = plan_of(asked)
        chunk_frames = number_of(asked.get("chunk_frames", worlds.CHUNK_FRAMES), int, "chunk_frames", 1, 8000)
        retrieve, client = bool(asked.get("retrieve")), str(asked.get("client") or request.remote)[:100]
        found, world, cameras = await self.work.compute_newest(
            (client, retrieve), self.settled, folder, state, plan, chunk_frames
        )
        if retrieve:
            found["retrieved"] = await self.work.compute_newest(
                (client, "retrieval"), _retrieved, world, cameras, chunk_frames, worker=self.work.slow_worker
            )
        return web.json_response(found)

    def settled(self, folder: Path, state: str, plan: next_path.NextPath, chunk_frames: int):
        """The numbers of a plan except the retrieved frames, and what those need."""
        begin, key = time.perf_counter(), opened.whole_key(folder, state)
        world = self.work.opened.world(folder, key)
        depth, cloud = self.work.opened.depth(folder, key), self.work.opened.cloud(folder, key)
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
        asked = await json_body_of(request)
        return web.json_response({"path": await self.work.compute(self.preset, *world_of(asked), asked)})

    def preset(self, folder: Path, state: str, asked: dict) -> str:
        key, name = opened.whole_key(folder, state), str(asked.get("preset"))
        stand, strength = self.work.opened.world(folder, key), strength_of(name)
        cameras = presets.preset(
            name,
            stand.last_camera,
            number_of(asked.get("frames", next_path.FRAMES), int, "frames", 2, next_path.LONGEST),
            self.work.opened.depth(folder, key),
            str(asked.get("direction", "right")),
            number_of(asked.get("strength", strength[0] if strength else 0.0), float, "strength", 0, 1000),
            torch.Generator().manual_seed(number_of(asked.get("seed", 0), int, "seed", 0, 2**63 - 1)),
        )
        return path_to_edit(stand, cameras)

    @answered
    async def post_path(self, request: web.Request) -> web.Response:
        asked = await json_body_of(request)
        name = asked.get("format")
        if name not in SaveTrajectory.FORMATS:
            raise Refused(400, f"there is no format {name!r}; choose one of {', '.join(SaveTrajectory.FORMATS)}")
        file, content = await self.work.compute(self.file_of, *world_of(asked), plan_of(asked), name)
        headers = {"Content-Disposition": f'attachment; filename="{file}"', "Cache-Control": "no-store"}
        return web.Response(body=content, content_type="application/octet-stream", headers=headers)

    def file_of(self, folder: Path, state: str, plan: next_path.NextPath, name: str) -> tuple[str, bytes]:
        stand = self.work.opened.world(folder, opened.whole_key(folder, state))
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
        content = await body_of(request)
        return web.json_response({"path": await self.work.compute(self.loaded, *world_of(request.query), request.query, content)})

    def loaded(self, folder: Path, state: str, asked, content: bytes) -> str:
        stand = self.work.opened.world(folder, opened.whole_key(folder, state))
        scale = number_of(asked.get("pose_scale", 1), float, "pose_scale", 1e-4, 1e4)
        frames = number_of(asked.get("frames", next_path.FRAMES), int, "frames", 2, next_path.LONGEST)
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

