"""Worlds: begun, planned, grown by the preview, looked at, saved, reopened."""

from __future__ import annotations

import logging
from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io, ui

from ..lyra_core.cameras.camera import Cameras
from ..lyra_core.cameras.captions import caption
from ..lyra_core.memory.depth import DepthMap
from ..lyra_core.models.devices import geometry_device
from ..lyra_core.world import preview, world_files
from ..lyra_core.world import world as worlds
from . import types
from .inputs import PHOTO, named_folder, save_input
from .node import Node

log = logging.getLogger(__name__)
NOTHING_PLANNED = "Nothing is planned: the path is the one camera where the world stands."


class BeginWorld(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lyra2BeginWorld",
            display_name="Lyra 2 Begin World",
            category=types.CATEGORY,
            description="A world of one photo. With several pictures, depths and cameras the first is the photo and the others, which "
            "must be posed in the same scene, only help to remember. Static scenes only.",
            inputs=[
                io.Image.Input("image", tooltip="Both sides multiples of 16; 832x480 is what Lyra 2 was trained with."),
                types.Depth.Input("depth"),
                types.Cameras.Input(
                    "cameras",
                    optional=True,
                    tooltip="Where the photo was taken from (the first of these); without it, the world's origin.",
                ),
                io.String.Input("prompt", default="", multiline=True, optional=True, tooltip="Kept with the photo."),
            ],
            outputs=[types.World.Output(display_name="world")],
        )

    @classmethod
    def execute(cls, image, depth, cameras=None, prompt="") -> io.NodeOutput:
        views = _views(types.colour(image), depth, cameras)
        return io.NodeOutput(worlds.begin(*views[0], views[1:], prompt))


def _views(images: torch.Tensor, depths: tuple[DepthMap, ...], cameras: Cameras | None):
    if len(depths) != len(images):
        raise ValueError(f"{len(images)} pictures but {len(depths)} depths; make the depth from the same pictures")
    if len(images) > 1 and (cameras is None or len(cameras) < len(images)):
        raise ValueError(
            f"{len(images)} pictures need {len(images)} cameras, found {0 if cameras is None else len(cameras)}; "
            "connect the cameras they were taken from, or give one picture"
        )
    return [
        (image, d.depth, d.camera if cameras is None else cameras[i])
        for i, (image, d) in enumerate(zip(images, depths, strict=True))
    ]


def frame_bytes(size: tuple[int, int], count: int, per_pixel: int) -> int:
    """Bytes of so many frames of a size (height, width)."""
    return count * size[0] * size[1] * per_pixel


def _trajectory_input():
    return types.Cameras.Input(
        "cameras", tooltip="Where to go. The first camera is where the world stands and is not made again."
    )


def _count_input():
    return io.Int.Input(
        "retrieve",
        default=5,
        min=0,
        max=16,
        tooltip="Past frames that help at most. 0: only the newest one, so the world forgets what it showed before.",
    )


def where_it_begins(world, cameras) -> str:
    """Whether the first of the cameras is where the world stands, in a sentence; what differs is logged too."""
    gap = worlds.continuation(world, cameras)[1]
    if gap.differences:
        log.warning("%s", gap)
    return str(gap)


def _report_output():
    return io.String.Output(display_name="report", tooltip="Whether the path begins where the world stands.")


class RetrieveHistory(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lyra2RetrieveHistory",
            display_name="Lyra 2 Retrieve History",
            category=types.CATEGORY,
            description="Plans the next chunk: which past frames see most of it, and how the newest frame looks from there.",
            inputs=[
                types.World.Input("world"),
                _trajectory_input(),
                _count_input(),
                io.Int.Input(
                    "views",
                    default=1,
                    min=1,
                    max=8,
                    tooltip="For how many cameras of the chunk frames are retrieved; the "
                    "reference: 1, its last. More also finds what is only seen on the way.",
                ),
                io.Int.Input(
                    "chunk_frames", default=worlds.CHUNK_FRAMES, min=1, max=8000, tooltip="New frames; 80 for Lyra 2."
                ),
            ],
            outputs=[
                types.Plan.Output(display_name="plan"),
                io.Image.Output(display_name="retrieved", tooltip="The past frames, the best one last."),
                io.Image.Output(
                    display_name="warped",
                    tooltip="The newest frame seen from the new cameras, black where nothing is known.",
                ),
                io.Mask.Output(display_name="holes", tooltip="1 where the newest frame shows nothing."),
                _report_output(),
            ],
        )

    @classmethod
    def execute(cls, world, cameras, retrieve, views, chunk_frames) -> io.NodeOutput:
        report = where_it_begins(world, cameras)
        target = worlds.continuation(world, cameras)[0][:chunk_frames]
        device = geometry_device(world.size)
        plan = worlds.plan(world, target, retrieve, views, device)
        types.afford(frame_bytes(world.size, len(target), 17), f"seeing {len(target)} views of {world.size[1]}x{world.size[0]}")
        shown = [worlds.to_float(world.frame(f)) for f in plan.retrieved or (len(world) - 1,)]
        warped, seen = worlds.warped_views(world, target.to(device), types.progress(len(target)))
        return io.NodeOutput(
            plan, torch.stack(shown), warped.cpu(), (~seen).float().cpu(), report, ui=ui.PreviewText(report)
        )


class PreviewChunks(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lyra2PreviewChunks",
            display_name="Lyra 2 Preview Chunks",
            category=types.CATEGORY,
            search_aliases=["walk", "explore"],
            is_output_node=True,
            description="Walks through the world by its geometry alone, without any weights: what was seen is looked up, what was not is "
            "continued by example and marked as invented. Any machine; a draft of what Lyra 2 will paint.",
            inputs=[
                types.World.Input("world"),
                _trajectory_input(),
                _count_input(),
                io.Int.Input(
                    "chunk_frames",
                    default=worlds.CHUNK_FRAMES,
                    min=1,
                    max=8000,
                    tooltip="Frames per chunk. The path must fill whole chunks: cameras = 1 + a multiple of this.",
                ),
                save_input(),
                io.String.Input(
                    "captions",
                    default="",
                    optional=True,
                    force_input=True,
                    tooltip="JSON from Lyra 2 Load Trajectory, or one text for all; kept with each chunk.",
                ),
            ],
            outputs=[types.World.Output(display_name="world"), _report_output()],
        )

    @classmethod
    def execute(cls, world, cameras, retrieve, chunk_frames, save_to, captions="") -> io.NodeOutput:
        if len(cameras) == 1:  # nothing is planned
            return io.NodeOutput(world, NOTHING_PLANNED)
        report, save_to = where_it_begins(world, cameras), named_folder(save_to, world)
        grown = preview.explore(
            world,
            cameras,
            chunk_frames=chunk_frames,
            count=retrieve,
            prompts=lambda chunk: caption(captions, chunk, len(cameras), chunk_frames),
            folder=types.output_folder(save_to) if save_to else None,
            device=geometry_device(world.size),
            on_frame=types.progress(len(cameras) - 1),
            afford=types.afford,
            on_file=types.stop_if_interrupted,
            on_chunk=lambda state: save_to and types.show({"lyra2_world": [state_message(state, save_to)]}),
        )
        shown = ui.PreviewText(report).as_dict()
        if save_to:
            shown |= {**_saved(save_to), "lyra2_world": [state_message(grown, save_to)]}
        return io.NodeOutput(grown, report, ui=shown)


class SaveWorld(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lyra2SaveWorld",
            display_name="Lyra 2 Save World",
            category=types.CATEGORY,
            is_output_node=True,
            description="Saves a world to one folder. Only chunks that are not there yet are written; other branches in the folder stay.",
            inputs=[
                types.World.Input("world"),
                io.String.Input(
                    "folder",
                    default="worlds/my_world",
                    tooltip=f"A folder in the output folder. {PHOTO} in it becomes a name of the photo's own.",
                ),
            ],
            outputs=[io.String.Output(display_name="folder")],
        )

    @classmethod
    def execute(cls, world, folder) -> io.NodeOutput:
        folder = named_folder(folder, world)
        path = types.output_folder(folder)
        world_files.save(world, path, on_chunk=types.progress(len(world.keys)))
        return io.NodeOutput(folder, ui=_saved(folder))


def appended(world, before: str, report: str, save_to: str) -> io.NodeOutput:
    """What a node gives whose chunk has just become part of a world: saved, if it shall be, and told to the browser."""
    report = "\n".join(filter(None, [before, report]))
    shown = ui.PreviewText(report).as_dict()
    if save_to := named_folder(save_to, world):
        world_files.save(world, types.output_folder(save_to), on_chunk=types.stop_if_interrupted)
        shown["lyra2_world"] = [state_message(world, save_to)]
    return io.NodeOutput(world, report, ui=shown)


def state_message(world, folder: str) -> dict:
    """What the browser is told of a state that a folder holds; it fetches what is new in it."""
    parent = world.keys[-2] if world.chunks else None
    return {"folder": folder, "state": world.key, "parent": parent, "chunks": len(world.chunks), "frames": len(world)}


def _saved(folder: str) -> dict:
    return {"files": [{"filename": world_files.MANIFEST, "subfolder": folder, "type": "output"}]}


class LoadWorld(Node):
    @classmethod
    def define_schema(cls):
        base = Path(folder_paths.get_output_directory())
        saved = sorted(filter(types.is_text, (f.parent.relative_to(base).as_posix() for f in base.rglob(world_files.MANIFEST))))
        return io.Schema(
            node_id="Lyra2LoadWorld",
            display_name="Lyra 2 Load World",
            category=types.CATEGORY,
            description="Reopens a saved world, to go on from its end or from any earlier chunk.",
            inputs=[
                io.Combo.Input("folder", options=saved, tooltip="A world in the output folder."),
                io.Int.Input("chunks", default=-1, min=-1, max=100000, tooltip="How many chunks to load; -1: all."),
                io.String.Input(
                    "branch",
                    default="",
                    advanced=True,
                    tooltip="The first letters of a state's key in world.json; empty: the latest.",
                ),
            ],
            outputs=[types.World.Output(display_name="world")],
        )

    @classmethod
    def fingerprint_inputs(cls, folder, **_) -> str:
        return types.fingerprint(types.output_folder(folder) / world_files.MANIFEST)

    @classmethod
    def execute(cls, folder, chunks, branch) -> io.NodeOutput:
        return io.NodeOutput(
            world_files.load(types.output_folder(folder), None if chunks < 0 else chunks, branch.strip())
        )


class RewindWorld(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lyra2RewindWorld",
            display_name="Lyra 2 Rewind World",
            category=types.CATEGORY,
            description="The world as it was some chunks ago. The later one stays usable: this makes a branch.",
            inputs=[
                types.World.Input("world"),
                io.Int.Input("back", default=1, min=0, max=100000, tooltip="Chunks to step back."),
            ],
            outputs=[types.World.Output(display_name="world")],
        )

    @classmethod
    def execute(cls, world, back) -> io.NodeOutput:
        return io.NodeOutput(worlds.rewind(world, len(world.chunks) - back))


class WorldFrames(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lyra2WorldFrames",
            display_name="Lyra 2 World Frames",
            category=types.CATEGORY,
            description="The frames of a world as pictures, with their cameras and what was invented in them.",
            inputs=[
                types.World.Input("world"),
                io.Int.Input("first", default=0, min=0, max=1000000, tooltip="First frame; 0 is the photo."),
                io.Int.Input("count", default=0, min=0, max=1000000, tooltip="How many frames; 0: all that follow."),
                io.Boolean.Input("backwards", default=False, tooltip="In reverse order."),
            ],
            outputs=[
                io.Image.Output(display_name="frames"),
                types.Cameras.Output(display_name="cameras"),
                io.Mask.Output(display_name="invented", tooltip="1 where the photo does not reach."),
                types.Depth.Output(display_name="depth", tooltip="Of the keyframes among them."),
            ],
        )

    @classmethod
    def execute(cls, world, first, count, backwards) -> io.NodeOutput:
        ids = list(worlds.frame_ids(world, first, count, backwards))
        types.afford(frame_bytes(world.size, len(ids), 16), f"{len(ids)} frames of {world.size[1]}x{world.size[0]} as pictures")
        on_step = types.progress(len(ids))
        frames = torch.empty(len(ids), *world.size, 3)
        invented = torch.empty(len(ids), *world.size)
        for row, frame in enumerate(ids):
            frames[row], invented[row] = worlds.to_float(world.frame(frame)), world.invented(frame)
            on_step(row + 1)
        depths = tuple(
            DepthMap(k.depth, k.camera.K[0], f"frame {k.frame}") for k in world.memory.keyframes if k.frame in set(ids)
        )
        return io.NodeOutput(frames, world.cameras[ids], invented, depths)
