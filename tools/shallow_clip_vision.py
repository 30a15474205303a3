"""A custom node of the servers that tests start: CLIP ViT-H as deep as tiny_models writes it.

The host knows one depth, 32 layers, whose looks at the newest frames took half of the processor time of the tests that walk
by tiny transformers. Its loader, its class and the width that Wan reads stay as they are.
"""

from __future__ import annotations

import json
from pathlib import Path

import comfy.clip_vision

NODE_CLASS_MAPPINGS = {}
LAYERS = 2


class ShallowClipVision(comfy.clip_vision.ClipVisionModel):
    def __init__(self, config):
        config = json.loads(Path(config).read_text())
        assert config["num_hidden_layers"] == 32, f"expected ViT-H, found {config}"
        super().__init__({**config, "num_hidden_layers": LAYERS})


comfy.clip_vision.ClipVisionModel = ShallowClipVision
