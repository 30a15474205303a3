"""What is written is what others read, what others write is read, and no scene is ever in memory twice."""

from __future__ import annotations

import errno
import gzip
import math
import os
import tracemalloc
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lyra_core.splats import splat_files
from lyra_core.splats.gaussians import Gaussians
from lyra_core.splats.splat_files import (
    LEAST_OPACITY,
    LEAST_SCALE,
    SplatFileError,
    load_ply,
    load_splat,
    save_ply,
    save_points,
    save_splat,
    save_spz,
)

BROKEN = (
    ("means", math.nan),
    ("means", math.inf),
    ("scales", math.nan),
    ("opacities", math.nan),
    ("opacities", math.inf),
)


def scene(count=50, bands=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Gaussians(
        torch.randn(count, 3, generator=generator),
        torch.nn.functional.normalize(torch.randn(count, 4, generator=generator), dim=1),
        0.05 + torch.rand(count, 3, generator=generator),
        0.01 + 0.98 * torch.rand(count, generator=generator),
        torch.randn(count, bands, 3, generator=generator),
    )


def save_cloud(gaussians, file):
    save_points(gaussians.means, gaussians.colors, file)


def assert_alike(found, expected, **limits):
    for field in fields(Gaussians):
        torch.testing.assert_close(getattr(found, field.name), getattr(expected, field.name), **limits)


def columns(gaussians):
    """Every property of a 3DGS PLY by name, one gaussian and one number at a time."""
    stored = {}
    for axis, name in enumerate("xyz"):
        stored[name] = [float(mean[axis]) for mean in gaussians.means]
    for channel in range(3):
        stored[f"f_dc_{channel}"] = [float(sh[0, channel]) for sh in gaussians.sh]
    higher = gaussians.sh.shape[1] - 1
    for i in range(3 * higher):
        stored[f"f_rest_{i}"] = [float(sh[1 + i % higher, i // higher]) for sh in gaussians.sh]
    stored["opacity"] = [math.log(float(o) / (1 - float(o))) for o in gaussians.opacities]
    for axis in range(3):
        stored[f"scale_{axis}"] = [math.log(float(scale[axis])) for scale in gaussians.scales]
    for i in range(4):
        stored[f"rot_{i}"] = [float(quat[i]) for quat in gaussians.quats]
    return stored


def write_with_plyfile(stored, file, number="f4", before=(), text=False, order="<"):
    plyfile = pytest.importorskip("plyfile")
    rows = np.empty(len(next(iter(stored.values()))), [(name, number) for name in stored])
    for name, values in stored.items():
        rows[name] = values
    plyfile.PlyData([*before, plyfile.PlyElement.describe(rows, "vertex")], text=text, byte_order=order).write(
        str(file)
    )


# -------------------------------------------------------------------------------------------------------------------- PLY


@pytest.mark.parametrize("bands", [1, 4, 9, 16])
def test_plyfile_reads_every_number_that_was_written(tmp_path, bands):
    plyfile = pytest.importorskip("plyfile")
    gaussians = scene(bands=bands)
    save_ply(gaussians, tmp_path / "a.ply", block=7)
    found = plyfile.PlyData.read(str(tmp_path / "a.ply"))
    vertices, expected = found["vertex"], columns(gaussians)
    names = list(expected)
    assert (found.text, found.byte_order) == (False, "<")
    assert [p.name for p in vertices.properties] == [*names[:3], "nx", "ny", "nz", *names[3:]]
    assert all(p.val_dtype == "f4" for p in vertices.properties) and vertices.count == len(gaussians)
    for name, values in expected.items():
        np.testing.assert_allclose(vertices[name], values, rtol=1e-5, atol=1e-5, err_msg=name)
    assert not any(vertices[name].any() for name in ("nx", "ny", "nz"))


@pytest.mark.parametrize("bands", [1, 4, 9, 16])
@pytest.mark.parametrize("number, order", [("f4", "<"), ("f8", "<"), ("f4", ">")])
def test_a_file_with_shuffled_and_further_properties_is_read(tmp_path, bands, number, order):
    gaussians = scene(bands=bands)
    stored = columns(gaussians) | {"confidence": [7.0] * len(gaussians), "f_extra_0": [8.0] * len(gaussians)}
    names = np.random.default_rng(bands).permutation(list(stored))
    write_with_plyfile({name: stored[name] for name in names}, tmp_path / "a.ply", number, order=order)
    assert_alike(load_ply(tmp_path / "a.ply"), gaussians, atol=1e-5, rtol=1e-5)


def test_elements_around_the_gaussians_are_stepped_over(tmp_path):
    plyfile = pytest.importorskip("plyfile")
    gaussians, other = scene(), plyfile.PlyElement.describe(np.ones(3, [("a", "u1"), ("b", "f8")]), "camera")
    write_with_plyfile(columns(gaussians), tmp_path / "a.ply", before=[other])
    with open(tmp_path / "a.ply", "ab") as handle:
        handle.write(b"something behind")
    assert_alike(load_ply(tmp_path / "a.ply"), gaussians, atol=1e-5, rtol=1e-5)


def test_a_header_may_have_comments_and_lines_of_another_system(tmp_path):
    save_ply(scene(), tmp_path / "a.ply")
    header, end, rows = (tmp_path / "a.ply").read_bytes().partition(b"end_header\n")
    header = header.replace(b"\nelement", b"\ncomment element vertex 7\n\nobj_info made up\nelement")
    (tmp_path / "b.ply").write_bytes((header + end).replace(b"\n", b"\r\n") + rows)
    assert_alike(load_ply(tmp_path / "b.ply"), load_ply(tmp_path / "a.ply"), atol=0, rtol=0)


@pytest.mark.parametrize("bands", [1, 4, 9, 16])
def test_a_round_trip_gives_the_same_gaussians_whatever_the_block(tmp_path, monkeypatch, bands):
    gaussians = scene(bands=bands)
    for block in (1, 7, 50, 1000):
        save_ply(gaussians, tmp_path / f"{block}.ply", block=block)
    assert len({(tmp_path / f"{block}.ply").read_bytes() for block in (1, 7, 50, 1000)}) == 1
    for block in (9, 50, 1 << 16):
        monkeypatch.setattr(splat_files, "BLOCK", block)
        assert_alike(load_ply(tmp_path / "7.ply"), gaussians, atol=1e-5, rtol=1e-5)


def test_the_file_has_the_size_that_its_rows_need(tmp_path):
    save_ply(scene(100), tmp_path / "a.ply")
    header = (tmp_path / "a.ply").read_bytes().partition(b"end_header\n")[0]
    assert (tmp_path / "a.ply").stat().st_size == len(header) + 11 + 100 * 68


@pytest.mark.parametrize("bands", [1, 4, 9])
def test_the_host_reads_what_was_written(comfy_host, tmp_path, bands):
    from comfy_api.latest import Types
    from comfy_extras.nodes_gaussian_splat import File3DToSplat

    gaussians = scene(bands=bands)
    save_ply(gaussians, tmp_path / "a.ply")
    splat = File3DToSplat.execute(Types.File3D(str(tmp_path / "a.ply"))).result[0]
    parts = splat.positions, splat.rotations, splat.scales, splat.opacities[..., 0], splat.sh
    assert_alike(Gaussians(*(part[0] for part in parts)), gaussians, atol=1e-5, rtol=1e-5)


def test_what_the_host_writes_is_read(comfy_host, tmp_path):
    from comfy_api.latest import Types
    from comfy_extras.nodes_gaussian_splat import SplatToFile3D

    gaussians = scene(bands=4)
    splat = Types.SPLAT(
        gaussians.means[None],
        gaussians.scales[None],
        gaussians.quats[None],
        gaussians.opacities[None, :, None],
        gaussians.sh[None],
    )
    (tmp_path / "a.ply").write_bytes(SplatToFile3D.execute(splat, "ply").result[0].get_bytes())
    assert_alike(load_ply(tmp_path / "a.ply"), gaussians, atol=1e-5, rtol=1e-5)


def test_no_gaussians_are_a_file_too(tmp_path):
    for bands in (1, 9):
        save_ply(scene(0, bands), tmp_path / "a.ply")
        assert_alike(load_ply(tmp_path / "a.ply"), scene(0, bands))
    save_splat(scene(0), tmp_path / "a.splat")
    assert_alike(load_splat(tmp_path / "a.splat"), scene(0))


def test_opacities_of_0_and_1_and_scales_of_0_stay_finite(tmp_path):
    gaussians = scene(4)
    gaussians.opacities[:3] = torch.tensor([0.0, 1.0, 1 + 1e-6])
    gaussians.scales[:2] = torch.tensor([[0.0, 1.0, 0.0], [1e-30, 2.0, 3.0]])
    save_ply(gaussians, tmp_path / "a.ply")
    rows = (tmp_path / "a.ply").read_bytes().partition(b"end_header\n")[2]
    assert np.isfinite(np.frombuffer(rows, "<f4")).all()
    found = load_ply(tmp_path / "a.ply")
    limits = torch.tensor([LEAST_OPACITY, 1 - LEAST_OPACITY, 1 - LEAST_OPACITY])
    torch.testing.assert_close(found.opacities[:3], limits, atol=1e-7, rtol=0)
    torch.testing.assert_close(found.scales[:2], gaussians.scales[:2].clamp_min(LEAST_SCALE))
    save_splat(gaussians, tmp_path / "a.splat")
    assert sorted(load_splat(tmp_path / "a.splat").scales[:, 0].tolist()) == sorted(gaussians.scales[:, 0].tolist())


def test_infinite_logits_and_logarithms_of_others_are_0_and_1_again(tmp_path):
    stored = columns(scene(3))
    stored["opacity"][:2], stored["scale_0"][2] = [-math.inf, math.inf], -math.inf
    write_with_plyfile(stored, tmp_path / "a.ply")
    found = load_ply(tmp_path / "a.ply")
    assert found.opacities[:2].tolist() == [0, 1] and found.scales[2, 0] == 0


def test_rotations_are_written_as_they_are_and_read_as_units(tmp_path):
    gaussians = replace(scene(), quats=3 * scene().quats)
    save_ply(gaussians, tmp_path / "a.ply")
    rows = (tmp_path / "a.ply").read_bytes().partition(b"end_header\n")[2]
    np.testing.assert_array_equal(np.frombuffer(rows, "<f4").reshape(-1, 17)[:, 13:], gaussians.quats)
    torch.testing.assert_close(load_ply(tmp_path / "a.ply").quats, scene().quats)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_numbers_and_parameters_in_training_are_written_and_left_alone(tmp_path, dtype):
    gaussians = Gaussians(*(getattr(scene(), f.name).to(dtype).requires_grad_() for f in fields(Gaussians)))
    before = Gaussians(*(getattr(gaussians, f.name).detach().float().clone() for f in fields(Gaussians)))
    save_ply(gaussians, tmp_path / "a.ply")
    save_splat(gaussians, tmp_path / "a.splat")
    found = load_ply(tmp_path / "a.ply")
    torch.testing.assert_close(found.opacities, before.opacities, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.scales, before.scales, atol=1e-5, rtol=1e-5)
    assert len(load_splat(tmp_path / "a.splat")) == len(before)
    assert_alike(Gaussians(*(getattr(gaussians, f.name).detach().float() for f in fields(Gaussians))), before)


# ----------------------------------------------------------------------------------------------------------------- .splat


def plain_splat(gaussians):
    """The rows of a .splat one number at a time."""
    weights = [math.prod(map(float, (o, *s))) for o, s in zip(gaussians.opacities, gaussians.scales, strict=True)]
    content = []
    for i in sorted(range(len(gaussians)), key=lambda i: -weights[i]):
        colour = [min(max(float(c), 0), 1) for c in (*gaussians.colors[i], gaussians.opacities[i])]
        turn = gaussians.quats[i] / gaussians.quats[i].norm()
        content.append(np.array([*gaussians.means[i], *gaussians.scales[i]], "<f4").tobytes())
        content.append(bytes(round(255 * c) for c in colour))
        content.append(bytes(min(255, max(0, round(128 * float(q) + 128))) for q in turn))
    return b"".join(content)


def test_a_splat_file_has_these_32_bytes_of_each_gaussian_the_important_first(tmp_path, monkeypatch):
    monkeypatch.setattr(splat_files, "BLOCK", 16)
    for bands in (1, 4):
        gaussians = scene(bands=bands)
        gaussians.quats[0] = torch.tensor([2.0, 0, 0, 0])
        save_splat(gaussians, tmp_path / "a.splat")
        assert (tmp_path / "a.splat").read_bytes() == plain_splat(gaussians)


def test_tiny_gaussians_are_ordered_too_and_equals_keep_their_order(tmp_path):
    gaussians = replace(scene(200), opacities=torch.full((200,), 0.5), scales=torch.full((200, 3), 1e-16))
    gaussians.scales[100] = 2e-16
    save_splat(gaussians, tmp_path / "a.splat")
    order = [100, *range(100), *range(101, 200)]
    assert torch.equal(load_splat(tmp_path / "a.splat").means, gaussians.means[order])


def test_a_splat_file_gives_back_what_8_bits_hold(tmp_path, monkeypatch):
    gaussians = replace(scene(100), sh=scene(100).sh / 2)
    save_splat(gaussians, tmp_path / "a.splat")
    expected = gaussians.select((gaussians.opacities * gaussians.scales.prod(1)).argsort(descending=True))
    for block in (13, 100):
        monkeypatch.setattr(splat_files, "BLOCK", block)
        found = load_splat(tmp_path / "a.splat")
        assert torch.equal(found.means, expected.means) and torch.equal(found.scales, expected.scales)
        torch.testing.assert_close(found.colors, expected.colors.clamp(0, 1), atol=0.51 / 255, rtol=0)
        torch.testing.assert_close(found.opacities, expected.opacities, atol=0.51 / 255, rtol=0)
        torch.testing.assert_close(found.quats.norm(dim=1), torch.ones(100))
        assert (found.quats * expected.quats).sum(1).min() > 0.9998


def test_the_host_reads_the_same_of_a_splat_file(comfy_host, tmp_path):
    from comfy_api.latest import Types
    from comfy_extras.nodes_gaussian_splat import File3DToSplat

    save_splat(scene(), tmp_path / "a.splat")
    splat = File3DToSplat.execute(Types.File3D(str(tmp_path / "a.splat"))).result[0]
    parts = splat.positions, splat.rotations, splat.scales, splat.opacities[..., 0], splat.sh
    assert_alike(load_splat(tmp_path / "a.splat"), Gaussians(*(part[0] for part in parts)))


# ------------------------------------------------------------------------------------------------------------------- .spz


def read_by_the_host(file):
    from comfy_api.latest import Types
    from comfy_extras.nodes_gaussian_splat import File3DToSplat

    splat = File3DToSplat.execute(Types.File3D(str(file))).result[0]
    parts = splat.positions, splat.rotations, splat.scales, splat.opacities[..., 0], splat.sh
    return Gaussians(*(part[0] for part in parts))


def assert_within_the_steps_of_an_spz(found, expected, bits=12):
    """Every number is at most half a step of its kind away."""
    sign = torch.where((found.quats * expected.quats).sum(1) < 0, -1.0, 1.0)[:, None]
    assert found.means.sub(expected.means).abs().max() <= 0.51 / 2**bits
    # what is lost of x y z is lost of w too, the more the smaller w is
    assert (found.quats * sign)[:, 1:].sub(expected.quats[:, 1:]).abs().max() < 0.02
    assert (found.quats * expected.quats).sum(1).abs().min() > 0.98
    assert found.scales.log().sub(expected.scales.log()).abs().max() <= 0.51 / 16
    assert found.opacities.sub(expected.opacities).abs().max() <= 0.51 / 255
    shade = expected.sh[:, :1].clamp(-0.5 / 0.15, 0.5 / 0.15)
    assert found.sh.shape == shade.shape and found.sh.sub(shade).abs().max() <= 0.52 / 255 / 0.15


@pytest.mark.parametrize("bands", [1, 4])
def test_the_host_reads_an_spz_to_half_a_step(comfy_host, tmp_path, monkeypatch, bands):
    monkeypatch.setattr(splat_files, "BLOCK", 17)
    gaussians = scene(200, bands)
    save_spz(gaussians, tmp_path / "a.spz")
    assert_within_the_steps_of_an_spz(read_by_the_host(tmp_path / "a.spz"), gaussians)


def test_an_spz_says_what_the_host_s_own_would(comfy_host, tmp_path):
    from comfy_api.latest import Types
    from comfy_extras.nodes_gaussian_splat import SplatToFile3D

    gaussians = scene(200)
    fields = gaussians.means, gaussians.scales, gaussians.quats, gaussians.opacities[:, None], gaussians.sh
    SplatToFile3D.execute(Types.SPLAT(*(field[None] for field in fields)), "spz").result[0].save_to(
        str(tmp_path / "theirs.spz")
    )
    save_spz(gaussians, tmp_path / "ours.spz")
    ours, theirs = (gzip.decompress((tmp_path / f"{whose}.spz").read_bytes()) for whose in ("ours", "theirs"))
    assert ours[:16] == theirs[:16] and len(ours) == len(theirs) == 16 + 19 * 200
    steps = np.frombuffer(ours, np.uint8).astype(int) - np.frombuffer(theirs, np.uint8)
    assert np.abs(steps[16 + 9 * 200 :]).max() <= 1 and (steps != 0).mean() < 0.001  # a half may be rounded either way


@pytest.mark.parametrize("farthest, bits", [(1.0, 12), (2047.0, 12), (2049.0, 11), (1e6, 3), (8e6, 0)])
def test_positions_in_an_spz_are_as_fine_as_the_farthest_allows(comfy_host, tmp_path, farthest, bits):
    gaussians = scene()
    gaussians.means[3] = torch.tensor([-farthest, farthest, 0.3])
    save_spz(gaussians, tmp_path / "a.spz")
    found = read_by_the_host(tmp_path / "a.spz").means
    assert found.sub(gaussians.means).abs().max() <= 0.51 / 2**bits


def test_what_is_too_far_for_an_spz_is_refused(tmp_path):
    gaussians = scene()
    gaussians.means[3, 1] = 1e7
    with pytest.raises(ValueError, match="1e.07 scene units out, too far for an .spz; `prune`"):
        save_spz(gaussians, tmp_path / "a.spz")
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------------- points


def test_points_are_read_by_others_with_their_colours(tmp_path, monkeypatch):
    plyfile, trimesh = pytest.importorskip("plyfile"), pytest.importorskip("trimesh")
    monkeypatch.setattr(splat_files, "BLOCK", 9)
    points, colors = torch.randn(50, 3), torch.rand(50, 3) * 1.4 - 0.2
    save_points(points, colors, tmp_path / "a.ply")
    vertices = plyfile.PlyData.read(str(tmp_path / "a.ply"))["vertex"]
    assert [(p.name, p.val_dtype) for p in vertices.properties] == [
        *((name, "f4") for name in "xyz"),
        *((name, "u1") for name in ("red", "green", "blue")),
    ]
    shades = (colors.clamp(0, 1) * 255).round().numpy()
    for axis, (place, shade) in enumerate(zip("xyz", ("red", "green", "blue"), strict=True)):
        np.testing.assert_array_equal(vertices[place], points[:, axis])
        np.testing.assert_array_equal(vertices[shade], shades[:, axis])
    cloud = trimesh.load(tmp_path / "a.ply")
    np.testing.assert_allclose(cloud.vertices, points)
    np.testing.assert_array_equal(np.asarray(cloud.colors)[:, :3], shades)


def test_points_that_cannot_be_shown_are_refused(tmp_path):
    points, colors = torch.zeros(5, 3), torch.zeros(5, 3)
    points[1, 2], points[4, 0], colors[1, 0] = math.nan, math.inf, math.nan
    with pytest.raises(ValueError, match="2 of 5 points have NaN"):
        save_points(points, colors, tmp_path / "a.ply")
    with pytest.raises(ValueError, match=r"points \(5, 3\) and colours \(4, 3\)"):
        save_points(points, colors[:4], tmp_path / "a.ply")
    assert not list(tmp_path.iterdir())
    save_points(points[:0], colors[:0], tmp_path / "a.ply")
    assert b"element vertex 0\n" in (tmp_path / "a.ply").read_bytes()


# ----------------------------------------------------------------------------------------------------------------- memory


class Largest(TorchDispatchMode):
    """While entered, the bytes of the largest storage that an operation made."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in known:
            self.bytes = max(self.bytes, out.untyped_storage().nbytes())
        return out


def largest(work):
    """Bytes of the largest tensor that the work makes, and of all that numpy and Python hold at once meanwhile."""
    with Largest():
        work()  # what is only imported or cached the first time isn't the work's
    tracemalloc.start()
    try:
        with Largest() as seen:
            work()
        return seen.bytes, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("bands", [1, 16])
def test_saving_holds_one_block_of_rows_and_never_all(tmp_path, monkeypatch, bands):
    monkeypatch.setattr(splat_files, "BLOCK", 500)
    gaussians, row = scene(20_000, bands), 4 * (14 + 3 * bands)
    made, held = largest(lambda: save_ply(gaussians, tmp_path / "a.ply", block=500))
    assert made == 500 * row
    assert held < 300_000 < gaussians.means.nbytes + gaussians.quats.nbytes


def test_saving_and_reading_a_splat_holds_nothing_longer_than_its_order(tmp_path, monkeypatch):
    monkeypatch.setattr(splat_files, "BLOCK", 500)
    gaussians = scene(20_000)
    made, held = largest(lambda: save_splat(gaussians, tmp_path / "a.splat"))
    assert made <= 8 * 20_000 and held < 300_000
    assert largest(lambda: load_splat(tmp_path / "a.splat"))[1] < 300_000


def test_saving_an_spz_or_points_holds_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(splat_files, "BLOCK", 500)
    gaussians, colors = scene(60_000), torch.rand(60_000, 3)
    made, held = largest(lambda: save_spz(gaussians, tmp_path / "a.spz"))
    assert made <= 8 * 9 * 500 and held < 500_000 < gaussians.means.nbytes  # zlib itself takes most of it
    exact = gaussians.means.double()
    made, held = largest(lambda: save_points(exact, colors, tmp_path / "a.ply"))
    assert made <= 8 * 6 * 500
    assert held < 300_000


def test_reading_makes_the_gaussians_and_nothing_as_large(tmp_path, monkeypatch):
    monkeypatch.setattr(splat_files, "BLOCK", 500)
    gaussians = scene(20_000, 9)
    save_ply(gaussians, tmp_path / "a.ply")
    made, held = largest(lambda: load_ply(tmp_path / "a.ply"))
    assert made == gaussians.sh.nbytes and held < 300_000


# --------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("save", [save_ply, save_splat, save_spz])
@pytest.mark.parametrize("field, value", [*BROKEN, ("quats", 0.0), ("sh", -math.inf)])
def test_broken_gaussians_are_counted_and_not_written(tmp_path, monkeypatch, save, field, value):
    monkeypatch.setattr(splat_files, "BLOCK", 10)
    gaussians = scene()
    getattr(gaussians, field)[[3, 4, 44]] = value
    with pytest.raises(ValueError, match="3 of 50 gaussians have NaN or infinite"):
        save(gaussians, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_what_is_far_is_written_and_what_is_beyond_any_scene_is_not(tmp_path):
    gaussians = scene()
    gaussians.means[:, 0] = 9e8
    save_ply(gaussians, tmp_path / "a.ply")
    assert torch.equal(load_ply(tmp_path / "a.ply").means, gaussians.means)
    far = torch.zeros(50, 3, dtype=torch.float64)
    far[:2] = torch.tensor([1e300, 3e38], dtype=torch.float64)[:, None]
    with pytest.raises(ValueError, match="2 of 50"):
        save_ply(replace(gaussians, means=far), tmp_path / "b.ply")


def test_broken_gaussians_in_a_file_are_counted(tmp_path):
    stored = columns(scene())
    stored["scale_1"][3], stored["x"][5] = 1000.0, math.nan
    for i in range(4):
        stored[f"rot_{i}"][7] = 0.0
    write_with_plyfile(stored, tmp_path / "a.ply")
    with pytest.raises(SplatFileError, match=r"a\.ply: 3 of 50 gaussians"):
        load_ply(tmp_path / "a.ply")
    content = bytearray(plain_splat(scene()))
    content[28:32] = bytes([128] * 4)
    (tmp_path / "a.splat").write_bytes(content)
    with pytest.raises(SplatFileError, match=r"a\.splat: 1 of 50 gaussians"):
        load_splat(tmp_path / "a.splat")


def test_fields_that_do_not_belong_together_are_refused(tmp_path):
    for changed, words in (
        ({"opacities": torch.ones(1)}, r"opacities of 50 gaussians have shape \(1,\), not \(50,\)"),
        ({"scales": torch.ones(50, 1)}, r"scales of 50 .* \(50, 1\), not \(50, 3\)"),
        ({"sh": torch.ones(50, 3)}, r"sh of 50 .* \(50, 3\)"),
        ({"sh": torch.ones(50, 5, 3)}, "5 spherical harmonics"),
        ({"sh": torch.ones(50, 0, 3)}, "0 spherical harmonics"),
    ):
        with pytest.raises(ValueError, match=words):
            save_ply(replace(scene(), **changed), tmp_path / "a.ply")
    with pytest.raises(ValueError, match="block of 0"):
        save_ply(scene(), tmp_path / "a.ply", block=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dropped", ["x", "f_dc_1", "opacity", "scale_2", "rot_3"])
def test_a_missing_property_is_named(tmp_path, dropped):
    stored = columns(scene())
    del stored[dropped]
    write_with_plyfile(stored, tmp_path / "a.ply")
    with pytest.raises(SplatFileError, match=rf"a\.ply .*lacks {dropped}$"):
        load_ply(tmp_path / "a.ply")


def test_missing_normals_are_not_missed_and_missing_harmonics_are(tmp_path):
    stored = columns(scene(bands=4))
    write_with_plyfile(stored, tmp_path / "a.ply")
    assert load_ply(tmp_path / "a.ply").sh.shape == (50, 4, 3)
    for name, words in (
        ("f_rest_8", "8 properties f_rest"),
        ("f_rest_7", "7 properties"),
        ("f_rest_6", "6 properties"),
    ):
        del stored[name]
        write_with_plyfile(stored, tmp_path / "a.ply")
        with pytest.raises(SplatFileError, match=words):
            load_ply(tmp_path / "a.ply")
    write_with_plyfile(columns(scene(bands=4)) | {"f_rest_17": [0.0] * 50}, tmp_path / "a.ply")
    with pytest.raises(SplatFileError, match="10 properties"):
        load_ply(tmp_path / "a.ply")
    stored = columns(scene(bands=4))
    stored["f_rest_17"] = stored.pop("f_rest_4")
    write_with_plyfile(stored, tmp_path / "a.ply")
    with pytest.raises(SplatFileError, match="lacks f_rest_4$"):
        load_ply(tmp_path / "a.ply")


def test_a_file_that_is_cut_off_is_refused_with_both_sizes(tmp_path):
    save_ply(scene(), tmp_path / "a.ply")
    content = (tmp_path / "a.ply").read_bytes()
    (tmp_path / "b.ply").write_bytes(content[:-1])
    with pytest.raises(SplatFileError, match=rf"b\.ply .*{len(content) - 1} bytes of {len(content)}"):
        load_ply(tmp_path / "b.ply")
    (tmp_path / "b.ply").write_bytes(content[:100])
    with pytest.raises(SplatFileError, match="no end_header"):
        load_ply(tmp_path / "b.ply")
    (tmp_path / "b.splat").write_bytes(bytes(70))
    with pytest.raises(SplatFileError, match=r"b\.splat has 70 bytes, 6 more than 2"):
        load_splat(tmp_path / "b.splat")


@pytest.mark.parametrize(
    "old, new, words",
    [
        (b"ply\n", b"plain\n", "is not a PLY"),
        (b"format binary_little_endian", b"format ascii", "format ascii; save it again as binary"),
        (b"format binary_little_endian 1.0\n", b"", "format unknown"),
        (b"element vertex", b"element face", "no element vertex"),
        (b"element vertex 50", b"element vertex many", "'element vertex many'"),
        (b"element vertex 50", b"element vertex -5", "negative count"),
        (b"element vertex 50\n", b"", "'property float x'"),
        (b"property float x", b"property quad x", "'property quad x'"),
        (b"property float nx", b"property list uchar int nx", "element vertex has lists"),
        (b"element vertex", b"element face 1\nproperty list uchar int nx\nelement vertex", "element face has lists"),
        (b"property float nx", b"property float x", "vertex is ambiguous"),
    ],
)
def test_a_header_that_cannot_be_meant_is_refused_with_words(tmp_path, old, new, words):
    save_ply(scene(), tmp_path / "a.ply")
    content = (tmp_path / "a.ply").read_bytes()
    assert old in content
    (tmp_path / "a.ply").write_bytes(content.replace(old, new, 1))
    with pytest.raises(SplatFileError, match=words) as refused:
        load_ply(tmp_path / "a.ply")
    assert "a.ply" in str(refused.value)


def test_an_ascii_file_is_refused_with_words(tmp_path):
    write_with_plyfile(columns(scene()), tmp_path / "a.ply", text=True)
    with pytest.raises(SplatFileError, match="format ascii; save it again as binary_little_endian"):
        load_ply(tmp_path / "a.ply")


@pytest.mark.parametrize("save", [save_ply, save_splat, save_spz, save_cloud])
def test_a_full_disk_leaves_what_was_there_before(tmp_path, monkeypatch, save):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(splat_files, "BLOCK", 100)
    file = tmp_path / "a"
    file.write_bytes(b"before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(SplatFileError, match=r"a can't be written: File too large; .* 0\.\d MB"):
            save(scene(5000), file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [f.name for f in tmp_path.iterdir()] == ["a"] and file.read_bytes() == b"before"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_the_file_takes_its_place_only_once_it_is_on_the_disk(tmp_path, monkeypatch, error):
    def fail(_descriptor):
        raise error

    monkeypatch.setattr(splat_files.os, "fsync", fail)
    with pytest.raises(SplatFileError if isinstance(error, OSError) else KeyboardInterrupt):
        save_ply(scene(), tmp_path / "a.ply")
    assert not list(tmp_path.iterdir())


def test_everything_is_flushed_before_it_is_moved(tmp_path, monkeypatch):
    sizes, fsync = [], os.fsync

    def measured(descriptor):
        sizes.append(os.fstat(descriptor).st_size)
        fsync(descriptor)

    monkeypatch.setattr(splat_files.os, "fsync", measured)
    save_ply(scene(5), tmp_path / "a.ply")
    assert sizes == [(tmp_path / "a.ply").stat().st_size]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"")
    for place in (tmp_path / "nowhere" / "a.ply", tmp_path / "folder", tmp_path / "file" / "a.ply"):
        with pytest.raises(SplatFileError, match=f"{place.name} can't be written"):
            save_ply(scene(), place)
    assert sorted(f.name for f in tmp_path.rglob("*")) == ["file", "folder"]
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_ply(tmp_path / "nothing.ply")
