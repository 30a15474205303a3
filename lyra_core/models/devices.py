"""Where geometry is computed: beside the transformer while there is room, else on the processor. Worlds stay there."""

from __future__ import annotations

import comfy.model_management
import torch

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
