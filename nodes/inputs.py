"""Widgets that several nodes have."""

from __future__ import annotations

from comfy_api.latest import io

from ..lyra_core import files
from ..lyra_core.memory.depth_alignment import ALIGNMENTS
from ..lyra_core.world.world import World

PHOTO = "%photo%"  # in the name of a folder: stands for the photo, so that another one has a folder of its own


def seed_input(
    most: int = 2**32 - 100_001, tooltip: str = "Chunk number c of a world uses seed + c. The same seed gives the same world.", **more
):
    """The frontend gives an input of this name a second widget, so every one says that it has it."""
    return io.Int.Input("seed", **{"default": 1, "min": 0, "max": most, "control_after_generate": True, "tooltip": tooltip} | more)


def alignment_input():
    return io.Combo.Input(
        "alignment",
        options=list(ALIGNMENTS),
        default="memory",
        tooltip="Where the scale of the new depth comes from. memory: what the world knows already, safe for any camera move. "
        "cameras: the reference's way, which needs a moving camera and an estimator that says where it stood. none.",
    )


def save_input():
    return io.String.Input(
        "save_to",
        default="",
        tooltip="A folder in the output folder. The world is saved there after every chunk, and what was made there in the "
        f"same way is taken from it instead of made again. {PHOTO} in it becomes a name of the photo's own. Empty: not saved.",
    )


def kept_settings(text: str, generator: str) -> dict:
    """What is kept with a chunk: the JSON object of a `settings` input, with the generator if it names none."""
    found = files.parse_json(text, "settings")
    if not isinstance(found, dict):
        raise ValueError(f"settings is {text.strip()[:80]}, which is no JSON object; write {{}} or {{\"name\": value, ...}}")
    return {"generator": generator, **found}


def named_folder(name: str, world: World) -> str:
    """The name of the folder that a world is saved to; blank if it is not to be saved."""
    return name.strip() and name.replace(PHOTO, world.photo)
