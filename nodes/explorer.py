"""The world in the browser: where it stands, and the next path."""

from __future__ import annotations

import json
import time

from comfy_api.latest import io

from ..lyra_core.cameras import next_path
from ..lyra_core.cameras.camera import Cameras
from ..lyra_core.world import world as worlds
from ..lyra_core.world import world_files
from . import types
from .node import Node
from .world import state_message


class Explorer(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lyra2Explorer",
            display_name="Lyra 2 Explorer",
            category=types.CATEGORY,
            search_aliases=["viewer", "path editor", "walk", "grow"],
            is_output_node=True,
            description="Stand in the world, look around, lay the next path, press Grow. Everything that was made stays in the folder, "
            "and any state in it can be stood at again.",
            inputs=[
                types.World.Input(
                    "world",
                    optional=True,
                    lazy=True,
                    tooltip="Where it begins. Looked at only while the folder does not hold the state to stand at.",
                ),
                types.Cameras.Input(
                    "cameras",
                    optional=True,
                    lazy=True,
                    tooltip="Offered as a path to edit while none is planned; moved as a whole to where the world stands.",
                ),
                io.String.Input(
                    "folder",
                    default="worlds/my_world",
                    tooltip="A folder in the output folder. The begun world is saved there, and growing saves to it.",
                ),
                io.String.Input(
                    "path",
                    default="",
                    multiline=True,
                    socketless=True,
                    tooltip="The next path, as the view writes it: camera-path JSON with the state it begins at. Empty: the photo, "
                    "nothing planned.",
                ),
            ],
            outputs=[
                types.World.Output(display_name="world", tooltip="The state it stands at."),
                types.Cameras.Output(display_name="cameras", tooltip="The planned path; one camera if none is planned."),
                io.String.Output(
                    display_name="captions",
                    tooltip="As JSON, by frame of the path. Without any: what the state it stands at was made with.",
                ),
                io.Int.Output(display_name="chunks", tooltip="Of 80 frames that the path takes; 0 if none is planned."),
                io.Int.Output(display_name="seed"),
                io.String.Output(display_name="folder", tooltip="For save_to of what grows the world."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, folder, path, **_) -> int:
        # a folder that vanished is begun again, whatever the host remembers of the last run
        return 0 if _is_there(folder, next_path.read(path)) else time.time_ns()

    @classmethod
    def check_lazy_status(cls, folder, path, **connected) -> list[str]:
        plan = next_path.read(path)
        wanted = {"world": not (plan.state and _is_there(folder, plan)), "cameras": plan.path is None}
        return [name for name, value in connected.items() if wanted[name] and value is None]

    @classmethod
    def execute(cls, folder, path, world=None, cameras=None) -> io.NodeOutput:
        plan = next_path.read(path)
        stand = _standing(plan, folder, world)
        planned = next_path.cameras_of(plan, stand.last_camera)
        shown = {"lyra2_world": [state_message(stand, folder)]}
        if cameras is not None and plan.path is None:
            shown["lyra2_path"] = [path_to_edit(stand, cameras)]
        return io.NodeOutput(stand, planned, _captions(plan, stand), plan.chunks, plan.seed, folder, ui=shown)


def _is_there(folder: str, plan: next_path.NextPath) -> bool:
    """Whether the folder holds the state that a plan begins at; of a plan that names none, whether it holds a world."""
    path = types.output_folder(folder)
    return world_files.holds(path, plan.state) if plan.state else (path / world_files.MANIFEST).is_file()


def _standing(plan: next_path.NextPath, folder: str, begun: worlds.World | None) -> worlds.World:
    """The state that a plan begins at, which its folder holds from now on."""
    path = types.output_folder(folder)
    if begun is None:
        return world_files.load(path, branch=plan.state) if plan.state else _photo_of(folder)
    if plan.state and _is_there(folder, plan):
        return world_files.load(path, branch=plan.state)
    if plan.state:
        found = [index for index, key in enumerate(begun.keys) if key.startswith(plan.state)]
        if not found and plan.path is not None:
            raise ValueError(
                f"the path begins at state {plan.state[:8]}, which is neither whole in {folder} nor in the connected world; "
                "choose the folder it was planned in, or clear the path to begin anew"
            )
        begun = worlds.rewind(begun, found[0]) if found else begun
    world_files.save(begun, path, keep_latest=True, on_chunk=types.stop_if_interrupted)
    return begun


def _photo_of(folder: str) -> worlds.World:
    """The one photo of a folder, for an Explorer without a world connected."""
    path = types.output_folder(folder)
    entries = world_files.read_manifest(path) if (path / world_files.MANIFEST).is_file() else {}
    photos = [entry.key for entry in entries.values() if entry.parent is None]
    if len(photos) != 1:
        raise ValueError(
            f"{folder} holds {len(photos)} photos to begin at, and no world is connected; connect Lyra 2 Begin World, "
            "or choose a state in the view"
        )
    return world_files.load(path, branch=photos[0])


def _captions(plan: next_path.NextPath, stand: worlds.World) -> str:
    """What the new chunks show, as JSON; empty if nobody ever said."""
    texts = plan.captions
    if not texts and (before := (stand.chunks[-1] if stand.chunks else stand.first).prompt):
        texts = {0: before}
    return json.dumps({str(frame): text for frame, text in texts.items()}, ensure_ascii=False) if texts else ""


def path_to_edit(stand: worlds.World, cameras: Cameras) -> str:
    """Cameras as the text of a plan that begins where the world stands; they are moved there as a whole."""
    if cameras.size != stand.size:
        cameras = cameras.resized(stand.size)
    before = stand.cameras[-1 - next_path.BEFORE] if len(stand) > next_path.BEFORE else None
    return next_path.text_of(next_path.moved_to(cameras, stand.last_camera), stand.key, before)
