"""The network of the reconstruction, part by part, with the weights that the files carry."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lyra_core.models import da3_files, da3_gaussians

from . import Check, Golden, relative

LIMIT = 1e-5  # of the largest value
WHERE = {"device": "cpu", "dtype": torch.float32, "operations": torch.nn}


def weights_of(arrays: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The published weights in a golden file, under the host's names."""
    stored = {prefix + key.removeprefix("sd."): weight for key, weight in arrays.items() if key.startswith("sd.")}
    weights = dict(da3_files.host_weights(stored))
    return {key.removeprefix("backbone.") if prefix else key: weight for key, weight in weights.items()}


def check_backbone(golden: Golden) -> Iterator[Check]:
    arrays = golden.arrays
    weights = weights_of(arrays, da3_files.BACKBONE)
    depth = 1 + max(int(key.split(".")[2]) for key in weights if key.startswith("encoder.layer."))
    network = da3_gaussians.backbone(
        weights["embeddings.cls_token"].shape[-1],
        depth,
        int(arrays["heads"]),
        int(arrays["alt_start"]),
        round((weights["embeddings.position_embeddings"].shape[1] - 1) ** 0.5),
        any(".weights_in." in key for key in weights),
        **WHERE,
    )
    network.requires_grad_(False).load_state_dict(weights)
    for case, token in (("nocam", None), ("cam", arrays["cam_token"])):
        found, _ = network.get_intermediate_layers_da3(arrays["images"], arrays["out_layers"].tolist(), cam_token=token)
        for i, (features, camera) in enumerate(found):
            yield Check(case, f"feat{i}", relative(features, arrays[f"{case}_feat{i}"]), LIMIT)
            yield Check(case, f"camfeat{i}", relative(camera, arrays[f"{case}_camfeat{i}"]), LIMIT)


def check_camera_encoder(golden: Golden) -> Iterator[Check]:
    arrays = golden.arrays
    weights = weights_of(arrays)
    yield Check("heads", "wrong", float(int(arrays["num_heads"]) != da3_gaussians.CAMERA_HEADS), 0)
    network = da3_gaussians.CameraEnc(len(weights["token_norm.weight"]), num_heads=da3_gaussians.CAMERA_HEADS, **WHERE)
    network.requires_grad_(False).load_state_dict(weights)
    found = network(arrays["w2c"], arrays["K"], (int(arrays["H"]), int(arrays["W"])))
    yield Check("*", "tokens", relative(found, arrays["tokens"]), LIMIT)


def check_camera_decoder(golden: Golden) -> Iterator[Check]:
    arrays = golden.arrays
    network = da3_gaussians.CameraDec(arrays["feat"].shape[-1], **WHERE)
    network.requires_grad_(False).load_state_dict(weights_of(arrays))
    told = network(arrays["feat"])
    yield Check("*", "pose", relative(told, arrays["pose_enc"]), LIMIT)
    w2c, K = da3_gaussians.decoded_cameras(told, (int(arrays["H"]), int(arrays["W"])))
    yield Check("*", "w2c", relative(w2c, arrays["w2c34"]), LIMIT)
    yield Check("*", "K", relative(K, arrays["K"]), LIMIT)


def check_gaussian_head(golden: Golden) -> Iterator[Check]:
    arrays = golden.arrays
    weights = weights_of(arrays)
    network = da3_gaussians.GaussianHead(
        weights["projects.0.weight"].shape[1],
        weights["scratch.refinenet1.out_conv.weight"].shape[0],
        tuple(weights[f"projects.{i}.weight"].shape[0] for i in range(4)),
        **WHERE,
    )
    network.requires_grad_(False).load_state_dict(weights)
    features = [arrays[f"feat{i}"][0] for i in range(4)]
    for key in (key for key in arrays if key.startswith("raw_")):
        ratio, mode = (int("".join(filter(str.isdigit, part))) for part in key.split("_")[1:])
        raw, density = network(features, arrays["images"][0], ratio, bool(mode))
        yield Check(key.removeprefix("raw_"), "raw", relative(raw, arrays[key][0]), LIMIT)
        expected = arrays[key.replace("raw", "conf")][0]
        yield Check(key.removeprefix("raw_"), "density", relative(density, expected), LIMIT)


CHECKS = {
    "backbone": check_backbone,
    "cam_enc": check_camera_encoder,
    "cam_dec": check_camera_decoder,
    "gsdpt": check_gaussian_head,
}
