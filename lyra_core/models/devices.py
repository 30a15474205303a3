"""Where geometry is computed: beside the transformer while there is room, else on the processor. Worlds stay there."""

from __future__ import annotations

import comfy.model_management
import torch

from .kernels import milliseconds
from .planner import GIB, Card

PROCESSOR = torch.device("cpu")
BYTES_A_PIXEL = 6000  # of one view: 16 views warped together and the guides of a chunk; counted, not measured


def geometry_device(size: tuple[int, int], make_room: bool = True) -> torch.device:
    """The host's device, if views of (height, width) pixels fit there; other devices than CUDA's and ROCm's lack operations.

    make_room: networks that the host keeps there may go for it, which must not be while one of them is sampling.
    """
    device, needed = comfy.model_management.get_torch_device(), BYTES_A_PIXEL * size[0] * size[1]
    if device.type != "cuda":
        return PROCESSOR
    if make_room:
        comfy.model_management.free_memory(needed, device)
    return device if comfy.model_management.get_free_memory(device) >= needed else PROCESSOR


def this_card() -> Card | None:
    """The GPU that the host computes on, with what a product of matrices reaches there now; None without one of CUDA's."""
    device = comfy.model_management.get_torch_device()
    if device.type != "cuda":
        return None
    properties, side = torch.cuda.get_device_properties(device), 8192
    matrix = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    speed = 2 * side**3 / milliseconds(lambda: matrix @ matrix) / 1e9
    return Card(properties.name, properties.total_memory / GIB, speed)
