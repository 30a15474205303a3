"""What a vision language model is shown and asked, so that it describes the part of a world that comes next.

The pictures are the reference captioner's: the photo, the newest frame, and what the memory already knows of some views
ahead. The wording says what the reference asks for in words of our own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cameras.camera import Cameras
from ..memory.retrieval import retrieve
from ..memory.warp import lift, merge, splat
from .world import World

PROJECTIONS = 4  # views ahead that are shown
SOURCES = 3  # past frames that are warped there, the newest among them

INSTRUCTION = (
    "Write one English prompt of 80 to 100 words for a video model that continues this walk through a still scene. "
    "Describe what is visible and how it is arranged, in concrete words. Where something new comes into view, invent what "
    "fits: the same architecture, materials, light, colours and mood as in the first picture. Say how the camera moves, as "
    "the projections show it. The scene itself does not move. Do not mention pictures, projections, black areas or doubt. "
    "Answer with the prompt alone."
)
HINT = "What comes newly into view must contain this, as a natural part of the scene: {hint}"
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


def caption_pictures(world: World, target: Cameras, projections: int = PROJECTIONS, sources: int = SOURCES) -> Tensor:
    """(2 + n, H, W, 3) in 0 .. 1: the photo, the newest frame, and n views along `target`, black where nothing is known.

    Looked up on the target's device; the result is on the CPU.
    """
    ahead = torch.linspace(0, len(target) - 1, projections + 1).long()[1:].unique().tolist()
    newest = len(world) - 1
    known = [newest, *retrieve(world.memory, target[ahead[-1:]], sources - 1)]
    device = target.w2c.device
    lifted = []
    for frame in dict.fromkeys(known):
        keyframe, picture = world.memory[frame], world.exact(frame) * 0.5 + 0.5
        lifted.append(lift(keyframe.depth.to(device), keyframe.camera.to(device), picture.to(device)))
    views = splat(merge(*lifted), target[ahead])
    seen = [world.exact(frame) * 0.5 + 0.5 for frame in (0, newest)]
    return torch.cat([torch.stack(seen), views.features.cpu()]).clamp(0, 1)


def caption_prompt(pictures: int, hint: str = "") -> str:
    """One turn of Qwen3-VL's chat that refers to that many pictures in their order."""
    labels = ["The photo that the scene began with:", "The newest frame:"]
    labels += [f"View {i} ahead, black where unknown:" for i in range(1, pictures - 1)]
    asked = "\n".join([INSTRUCTION, *([HINT.format(hint=hint.strip())] if hint.strip() else [])])
    shown = "\n".join(f"{label} {PICTURE}" for label in labels)
    return f"<|im_start|>user\n{asked}\n{shown}<|im_end|>\n<|im_start|>assistant\n"
