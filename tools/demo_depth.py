"""Where the depth of the demo's photo comes from: the best model that is there, else the photo's own lines.

The shipped workflow knows one photo and its room. For any other one its node Lyra2Depth is given another source here,
and the host's own nodes for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

MEDIAN = 6.0  # scene units; the demo's path is made for a room whose far wall is so far away
DA3, MOGE = "Depth Anything 3", "MoGe"
# What a file's name has in it, best for one photo first. The giant and nested ones the host's loader does not take.
KNOWN = (
    (DA3, ("depth_anything_3", "mono")),
    (DA3, ("depth_anything_3", "metric")),
    (MOGE, ("moge_2",)),
    (MOGE, ("moge",)),
    (DA3, ("depth_anything_3", "base")),
    (DA3, ("depth_anything_3", "small")),
)
ENDINGS = (".safetensors", ".sft", ".pt", ".pth", ".ckpt", ".bin")


def best_model(folders: Iterable[Path]) -> tuple[str, str] | None:
    """(kind, name as the host's loader lists it) of the best depth model in these folders; None if there is none."""
    names = [
        (Path(place) / file).relative_to(folder).as_posix() if os.sep == "/" else str((Path(place) / file).relative_to(folder))
        for folder in folders
        for place, _, files in os.walk(folder, followlinks=True)
        for file in sorted(files)
        if file.lower().endswith(ENDINGS) and not file.startswith(".")
    ]
    for kind, parts in KNOWN:
        for name in names:
            if all(part in name.lower().replace("-", "_") for part in parts):
                return kind, name
    return None


def source(model: tuple[str, str] | None, fov: float) -> Callable[[dict], None]:
    """Puts the source into a prompt: the model, or `auto`. fov: of the demo's path, degrees across."""

    def change(prompt: dict) -> None:
        (node,) = (each for each in prompt.values() if each["class_type"] == "Lyra2Depth")
        inputs = {name: value for name, value in node["inputs"].items() if name.partition(".")[0] != "source"}
        node["inputs"] = inputs | {"median": MEDIAN}
        if model is None:
            node["inputs"] |= {"source": "auto", "source.camera_height": 1.6, "source.field_of_view": fov}
            return
        kind, name = model
        image = node["inputs"]["image"]
        if kind == DA3:
            loader, run = "LoadDA3Model", "DA3Inference"
            options = {"resolution": 504, "resize_method": "upper_bound_resize", "mode": "mono"}
            socket, loading = "da3", {"model_name": name, "weight_dtype": "default"}
            node["inputs"]["source.field_of_view"] = fov
        else:
            loader, run = "LoadMoGeModel", "MoGeInference"
            options = {"resolution_level": 9, "fov_x_degrees": fov, "batch_size": 1}
            options |= {"force_projection": True, "apply_mask": True}
            socket, loading = "moge", {"model_name": name}
        prompt["depth_model"] = {"class_type": loader, "inputs": loading}
        estimate = {f"{socket}_model": ["depth_model", 0], "image": image, **options}
        prompt["depth_estimate"] = {"class_type": run, "inputs": estimate}
        node["inputs"] |= {"source": kind, f"source.{socket}_geometry": ["depth_estimate", 0]}

    return change
