"""The files of gaussians: what the reference wrote byte by byte, and what it read back."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lyra_core.splats.gaussians import Gaussians, faintest, prune
from lyra_core.splats.reconstruct import inside_border
from lyra_core.splats.splat_files import load_ply, save_ply

from . import Check, Golden, furthest

VALUE_LIMIT = 1e-5  # absolute; logarithms and logits as stored, and every value read back
END = b"end_header\n"


def check_ply(golden: Golden) -> Iterator[Check]:
    """ply: the writer and the pruning before it. ply_readback: the first gaussians of ply_a, read."""
    yield from check_readback(golden) if golden.name == "ply_readback" else check_writer(golden)


def check_writer(golden: Golden) -> Iterator[Check]:
    arrays = numpy_arrays(golden)
    whole, border = gaussians_of(arrays), torch.from_numpy(arrays["grid_mask_border"])
    plain = Gaussians(whole.means, whole.quats, whole.scales, whole.opacities, whole.sh[:, :1])
    expected = arrays["ply_a"].tobytes()
    found = written(plain.select(border))
    for case, header, ours in (
        ("a", arrays["header_a"], found),
        ("c", arrays["header_c"], written(whole.select(slice(int(arrays["count_c"]))))),
    ):
        yield Check(case, "wrong_header", float(ours.partition(END)[0] != str(header).encode()), 0)
    yield Check("a", "wrong_size", float(abs(len(found) - len(expected))), 0)
    yield Check("a", "rows", furthest(rows_of(found), rows_of(expected)), VALUE_LIMIT)
    masks = [torch.from_numpy(arrays[f"grid_mask_{name}"]) for name in ("op20", "both")]
    every = torch.ones_like(border)
    # the 30 isn't in the file, but no other whole percentage leaves as many as its mask has
    for case, among, percent, mask in (("op20", every, 20, masks[0]), ("both", border, 30, masks[1])):
        kept = prune(whole.select(among), min_opacity=faintest(whole.opacities[among], percent / 100))
        missed = furthest(kept.means, whole.means[mask]) if len(kept) == int(mask.sum()) else math.inf
        yield Check(case, "wrong_gaussians", missed, 0)
        if case == "op20":
            yield Check("b", "wrong_count", float(abs(len(kept) - int(arrays["count_b"]))), 0)
    views, height, width = arrays["depth"].shape
    coarser = round((views * height * width / len(border)) ** 0.5)  # pixels of depth along a gaussian
    trimmed = inside_border((height // coarser, width // coarser)).flatten().repeat(views)
    yield Check("border", "wrong_gaussians", furthest(trimmed.float(), border.float()), 0)
    yield Check("sha_b", skip="a hash of logarithms, whose last digits differ between libraries; the rows of a compare")
    yield Check("sha_c", skip="the file doesn't say which gaussians it kept, and a hash of logarithms like sha_b")


def check_readback(golden: Golden) -> Iterator[Check]:
    expected = gaussians_of(numpy_arrays(golden))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "reference.ply"
        file.write_bytes(numpy_arrays(golden.beside("ply"))["ply_a"].tobytes())
        found = load_ply(file).select(slice(len(expected)))
    for field, values in vars(expected).items():
        yield Check("*", field, furthest(getattr(found, field), values), VALUE_LIMIT)


def numpy_arrays(golden: Golden) -> dict[str, np.ndarray]:
    """Everything in the npz; texts too, which no tensor holds."""
    with np.load(golden.folder / f"{golden.name}.npz", allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def gaussians_of(arrays: dict[str, np.ndarray]) -> Gaussians:
    """The only item of the reference's batch; its harmonics come with the channel first."""
    fields = ("means", "rotations", "scales", "opacities", "harmonics")
    means, quats, scales, opacities, harmonics = (torch.from_numpy(arrays[field])[0] for field in fields)
    return Gaussians(means, quats, scales, opacities, harmonics.mT)


def written(gaussians: Gaussians) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ours.ply"
        save_ply(gaussians, file)
        return file.read_bytes()


def rows_of(content: bytes) -> Tensor:
    """(N, P) of a PLY that has float32 properties only."""
    header, _, rows = content.partition(END)
    return torch.from_numpy(np.frombuffer(rows, "<f4").reshape(-1, header.count(b"property float")).copy())
