"""A USD file says of gaussians, mesh and cameras exactly what they are, in words that OpenUSD's own schemas know."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from lyra_core.cameras.camera import Cameras, project, quaternion_to_rotation, rotation_to_quaternion
from lyra_core.exports import usd_files
from lyra_core.exports.surface import Mesh
from lyra_core.splats import rasterize
from lyra_core.splats.gaussians import Gaussians

pxr = pytest.importorskip("pxr", reason="usd-core reads what was written; pip install usd-core")
from pxr import Gf, Sdf, Usd, UsdGeom, UsdPhysics, UsdVol  # noqa: E402

if not hasattr(UsdVol, "ParticleField3DGaussianSplat"):
    pytest.skip("usd-core knows gaussians since 26.3; pip install -U usd-core", allow_module_level=True)


def scene(count=60, bands=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Gaussians(
        torch.randn(count, 3, generator=generator) * torch.tensor([1.0, 2.0, 3.0]) + torch.tensor([4.0, 0.0, -5.0]),
        torch.nn.functional.normalize(torch.randn(count, 4, generator=generator), dim=1),
        0.05 + torch.rand(count, 3, generator=generator),
        torch.rand(count, generator=generator),
        torch.randn(count, bands, 3, generator=generator),
    )


def path(frames=5, size=(48, 80)):
    """Cameras that turn, move and zoom, with pixels that aren't square and a lens off the middle."""
    generator = torch.Generator().manual_seed(1)
    w2c = torch.eye(4).repeat(frames, 1, 1)
    w2c[:, :3, :3] = quaternion_to_rotation(torch.tensor([4.0, 0, 0, 0]) + torch.randn(frames, 4, generator=generator))
    w2c[:, :3, 3] = torch.randn(frames, 3, generator=generator)
    K = torch.tensor([[70.0, 0, 33.0], [0, 55.0, 27.5], [0, 0, 1]]).repeat(frames, 1, 1)
    K[:, 0, 0] += torch.arange(frames)
    return Cameras(w2c, K, size)


def floor():
    """Two triangles in the floor y = 1, seen from above, which is where y is smaller."""
    vertices = torch.tensor([[-1.0, 1, 0], [1, 1, 0], [1, 1, 3], [-1, 1, 3]])
    return Mesh(vertices, torch.tensor([[0, 1, 2], [0, 2, 3]]), torch.full((4, 3), 0.5))


def written(tmp_path, name="a.usdz", **what):
    save = usd_files.save_usdz if name.endswith("z") else usd_files.save_usdc
    save(tmp_path / name, **what)
    return Usd.Stage.Open(str(tmp_path / name))


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    folder = tmp_path_factory.mktemp("usd")
    return written(folder, gaussians=scene(), mesh=floor(), cameras=path(), fps=16.0, metres_per_unit=0.5)


def to_stage(stage, points, prim="/World/gaussians"):
    """Points of the world (N, 3) where USD says they are, in double."""
    matrix = UsdGeom.Xformable(stage.GetPrimAtPath(prim)).ComputeLocalToWorldTransform(Usd.TimeCode.Default())
    return torch.tensor([list(matrix.Transform(Gf.Vec3d(*point))) for point in points.tolist()])


# --------------------------------------------------------------------------------------------------------- what is in it


def test_the_stage_is_z_up_and_says_what_a_unit_is_worth(stage):
    assert UsdGeom.GetStageUpAxis(stage) == "Z" and UsdGeom.GetStageMetersPerUnit(stage) == 0.5
    assert stage.GetDefaultPrim().GetPath() == "/World"
    kinds = {str(prim.GetPath()): prim.GetTypeName() for prim in stage.Traverse()}
    assert kinds == {
        "/World": "Xform",
        "/World/gaussians": "ParticleField3DGaussianSplat",
        "/World/collision": "Mesh",
        "/World/camera": "Camera",
        "/World/light": "DistantLight",
        "/World/material": "Material",
        "/physicsScene": "PhysicsScene",
    }


def test_up_in_the_picture_is_up_in_usd_and_nothing_is_mirrored(stage):
    x, y, z = to_stage(stage, torch.eye(3)) - to_stage(stage, torch.zeros(1, 3))
    assert x.tolist() == [1, 0, 0] and y.tolist() == [0, 0, -1] and z.tolist() == [0, 1, 0]
    assert torch.linalg.det(torch.stack([x, y, z])) == 1


def test_every_attribute_is_one_that_the_schemas_know_with_its_type(stage):
    for prim in stage.Traverse():
        known = prim.GetPrimDefinition()
        for attribute in prim.GetAuthoredAttributes():
            name = attribute.GetName()
            if name.startswith("xformOp:"):
                assert name in prim.GetAttribute("xformOpOrder").Get()
                continue
            definition = known.GetAttributeDefinition(name)
            assert definition, f"{prim.GetTypeName()} has no {name}"
            assert attribute.GetTypeName() == definition.GetTypeName(), name
            if definition.GetMetadata("allowedTokens"):
                assert attribute.Get() in definition.GetMetadata("allowedTokens"), name


@pytest.mark.parametrize("bands, degree", [(1, 0), (4, 1), (9, 2), (16, 3)])
def test_gaussians_are_activated_and_have_all_of_their_harmonics(tmp_path, bands, degree):
    gaussians = scene(bands=bands)
    stage = written(tmp_path, gaussians=gaussians)  # kept: a prim does not keep its stage
    field = UsdVol.ParticleField3DGaussianSplat(stage.GetPrimAtPath("/World/gaussians"))
    assert torch.equal(torch.tensor(field.GetPositionsAttr().Get()), gaussians.means)
    assert torch.equal(torch.tensor(field.GetScalesAttr().Get()), gaussians.scales)
    assert torch.equal(torch.tensor(field.GetOpacitiesAttr().Get()), gaussians.opacities)
    assert field.GetRadianceSphericalHarmonicsDegreeAttr().Get() == degree
    harmonics = field.GetRadianceSphericalHarmonicsCoefficientsAttr()
    assert harmonics.GetMetadata("elementSize") == bands
    assert torch.equal(torch.tensor(harmonics.Get()), gaussians.sh.reshape(-1, 3))
    turns = torch.tensor([[*Gf.Matrix3d(Gf.Quatd(q))] for q in field.GetOrientationsAttr().Get()])
    # Gf turns rows
    torch.testing.assert_close(turns.mT.float(), quaternion_to_rotation(gaussians.quats), atol=1e-5, rtol=0)


def test_values_that_no_renderer_takes_are_brought_in_order(tmp_path):
    gaussians = scene()
    gaussians.scales[0], gaussians.opacities[:2] = 0, torch.tensor([-0.5, 1.5])
    gaussians.quats[0] *= 7
    stage = written(tmp_path, gaussians=gaussians)  # kept: a prim does not keep its stage
    field = UsdVol.ParticleField3DGaussianSplat(stage.GetPrimAtPath("/World/gaussians"))
    assert min(field.GetScalesAttr().Get()[0]) > 0 and list(field.GetOpacitiesAttr().Get()[:2]) == [0, 1]
    assert field.GetOrientationsAttr().Get()[0].GetLength() == pytest.approx(1)


def test_the_extent_takes_in_every_gaussian_however_far(tmp_path, monkeypatch):
    monkeypatch.setattr(usd_files, "BLOCK", 7)
    gaussians = scene()
    gaussians.means[44] = torch.tensor([0, 3000.0, 0])
    gaussians.scales[44] = torch.tensor([1.0, 2.0, 0.5])
    stage = written(tmp_path, gaussians=gaussians)
    low, high = torch.tensor(stage.GetPrimAtPath("/World/gaussians").GetAttribute("extent").Get())
    assert (low < gaussians.means).all() and (high > gaussians.means).all()
    assert high[1] == 3006 and low[2] > -30
    bounds = UsdGeom.BBoxCache(Usd.TimeCode.Default(), ["default"]).ComputeWorldBound(stage.GetPseudoRoot())
    assert bounds.ComputeAlignedRange().GetMin()[2] == -3006  # down


def test_the_collision_mesh_collides_and_is_not_drawn(stage):
    prim = stage.GetPrimAtPath("/World/collision")
    mesh = UsdGeom.Mesh(prim)
    assert torch.equal(torch.tensor(mesh.GetPointsAttr().Get()), floor().vertices)
    assert list(mesh.GetFaceVertexIndicesAttr().Get()) == floor().faces.flatten().tolist()
    assert list(mesh.GetFaceVertexCountsAttr().Get()) == [3, 3]
    assert prim.HasAPI(UsdPhysics.CollisionAPI) and UsdPhysics.CollisionAPI(prim).GetCollisionEnabledAttr().Get()
    assert UsdPhysics.MeshCollisionAPI(prim).GetApproximationAttr().Get() == "none"
    assert mesh.GetPurposeAttr().Get() == "guide" and mesh.GetSubdivisionSchemeAttr().Get() == "none"
    assert mesh.GetOrientationAttr().Get() == "rightHanded"
    a, b, c = to_stage(stage, floor().vertices[floor().faces[0]], "/World/collision")
    assert torch.linalg.cross(b - a, c - a)[2] > 0  # its upper side is the one that holds


# ---------------------------------------------------------------------------------------------------------------- cameras


def pixels_of(stage, frame, point, size):
    """Where USD's own camera sees a point of the stage, in pixels whose top-left one has its centre at (0, 0)."""
    frustum = UsdGeom.Camera(stage.GetPrimAtPath("/World/camera")).GetCamera(frame).frustum
    x, y, z = (frustum.ComputeViewMatrix() * frustum.ComputeProjectionMatrix()).Transform(Gf.Vec3d(*point.tolist()))
    return (0.5 + 0.5 * x) * size[1] - 0.5, (0.5 - 0.5 * y) * size[0] - 0.5


def test_usd_s_camera_sees_every_point_at_our_pixel(stage):
    cameras, points = path(), torch.randn(40, 3, generator=torch.Generator().manual_seed(2)) * 4
    pixels, z = project(points, cameras)
    seen = 0
    for frame in range(len(cameras)):
        for point, pixel, depth in zip(to_stage(stage, points), pixels[frame], z[frame], strict=True):
            if depth > 0.1:
                assert pixels_of(stage, frame, point, cameras.size) == pytest.approx(pixel.tolist(), abs=0.01)
                seen += 1
    assert seen > 50


def test_gaussians_seen_through_usd_s_own_matrices_look_as_they_do_here(stage):
    """Positions, rotations, harmonics and lens together: read from the file, turned as USD says, drawn, compared."""
    field = UsdVol.ParticleField3DGaussianSplat(stage.GetPrimAtPath("/World/gaussians"))
    matrix = torch.tensor(UsdGeom.Xformable(field.GetPrim()).ComputeLocalToWorldTransform(0)).float()
    quats = torch.tensor([[q.GetReal(), *q.GetImaginary()] for q in field.GetOrientationsAttr().Get()])
    read = Gaussians(
        torch.tensor(field.GetPositionsAttr().Get()) @ matrix[:3, :3] + matrix[3, :3],
        rotation_to_quaternion(matrix[:3, :3].T @ quaternion_to_rotation(quats)),
        torch.tensor(field.GetScalesAttr().Get()),
        torch.tensor(field.GetOpacitiesAttr().Get()),
        torch.tensor(field.GetRadianceSphericalHarmonicsCoefficientsAttr().Get()).reshape(60, 4, 3)[:, :1],
    )
    ours = replace(scene(), sh=scene().sh[:, :1])
    drawn = 0.0
    for frame in range(5):
        view = UsdGeom.Camera(stage.GetPrimAtPath("/World/camera")).GetCamera(frame).frustum.ComputeViewMatrix()
        w2c = torch.diag(torch.tensor([1.0, -1, -1, 1])) @ torch.tensor(view).float().T
        camera = replace(path()[frame], w2c=w2c[None])
        theirs, expected = rasterize.render(read, camera), rasterize.render(ours, path()[frame])
        torch.testing.assert_close(theirs.images, expected.images, atol=2e-3, rtol=0)
        drawn = max(drawn, float(expected.alpha.mean()))
    assert drawn > 0.05


def test_the_camera_moves_one_frame_per_time_code(stage):
    assert (stage.GetStartTimeCode(), stage.GetEndTimeCode()) == (0, 4)
    assert stage.GetTimeCodesPerSecond() == stage.GetFramesPerSecond() == 16
    assert stage.GetRootLayer().HasTimeCodesPerSecond()  # USD would fall back to frames per second, others to 24
    camera = UsdGeom.Camera(stage.GetPrimAtPath("/World/camera"))
    assert camera.GetFocalLengthAttr().GetTimeSamples() == [0, 1, 2, 3, 4]  # the zoom
    assert camera.GetHorizontalApertureOffsetAttr().GetTimeSamples() == []  # the lens stays where it is
    centers = to_stage(stage, path().centers)
    for frame, center in enumerate(centers):
        place = camera.ComputeLocalToWorldTransform(frame).ExtractTranslation()
        assert list(place) == pytest.approx(center.tolist(), abs=1e-5)
    assert camera.GetClippingRangeAttr().Get()[0] <= 0.01


def test_one_camera_stands_still(tmp_path):
    stage = written(tmp_path, cameras=path(1))
    camera = stage.GetPrimAtPath("/World/camera")
    assert not any(a.GetNumTimeSamples() for a in camera.GetAttributes()) and not stage.GetPrimAtPath(
        "/World/gaussians"
    )
    assert camera.GetAttribute("focalLength").Get() == pytest.approx(70 / 80 * 36)


def test_a_skewed_camera_is_refused(tmp_path):
    cameras = path()
    cameras.K[2, 0, 1] = 3.0
    with pytest.raises(ValueError, match="no place for a skew of 3"):
        usd_files.save_usdz(tmp_path / "a.usdz", cameras=cameras)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------------- the file


def test_a_package_is_one_layer_as_usdz_wants_it(tmp_path):
    written(tmp_path, gaussians=scene(), mesh=floor(), cameras=path())
    inside = Sdf.ZipFile.Open(str(tmp_path / "a.usdz"))
    assert inside.GetFileNames() == ["world.usdc"]
    entry = inside.GetFileInfo("world.usdc")
    assert entry.dataOffset % 64 == 0 and entry.compressionMethod == 0


def test_openusd_s_own_validators_find_nothing_wrong(stage):
    validation = pytest.importorskip("pxr.UsdValidation", reason="this usd-core has no validators")
    validators = validation.ValidationRegistry().GetOrLoadAllValidators()
    found = validation.ValidationContext(validators).Validate(stage)
    assert len(validators) > 10 and [error.GetMessage() for error in found] == []


def test_a_bare_layer_says_the_same(tmp_path):
    stages = [written(tmp_path, name, gaussians=scene(), mesh=floor(), cameras=path()) for name in ("a.usdz", "a.usdc")]
    package, layer = (stage.GetRootLayer().ExportToString() for stage in stages)
    assert package == layer and [f.name for f in sorted(tmp_path.iterdir())] == ["a.usdc", "a.usdz"]


def test_what_no_package_can_hold_is_refused_beforehand(tmp_path, monkeypatch):
    size = usd_files.size_of(scene(5000), floor())
    usd_files.save_usdz(tmp_path / "a.usdz", scene(5000), floor())
    assert 0.8 * size < (tmp_path / "a.usdz").stat().st_size < size
    monkeypatch.setattr(usd_files, "LARGEST_PACKAGE", size - 1)
    with pytest.raises(ValueError, match="a .usdz at most .*; save it as .usdc"):
        usd_files.save_usdz(tmp_path / "b.usdz", scene(5000), floor())
    assert [f.name for f in tmp_path.iterdir()] == ["a.usdz"]


def test_broken_gaussians_are_counted_and_leave_what_was_there(tmp_path):
    (tmp_path / "a.usdz").write_bytes(b"before")
    gaussians = scene()
    gaussians.means[5:8] = float("nan")
    with pytest.raises(ValueError, match="3 of 60 gaussians have NaN"):
        usd_files.save_usdz(tmp_path / "a.usdz", gaussians)
    assert [f.read_bytes() for f in tmp_path.iterdir()] == [b"before"]


@pytest.mark.parametrize("save", [usd_files.save_usdz, usd_files.save_usdc])
def test_a_full_disk_leaves_what_was_there(tmp_path, save):
    resource = pytest.importorskip("resource", reason="limits the size of files, not on this system")
    (tmp_path / "a.usd").write_bytes(b"before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(usd_files.UsdFileError, match="a.usd can't be written"):
            save(tmp_path / "a.usd", scene(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [f.read_bytes() for f in tmp_path.iterdir()] == [b"before"]


@pytest.mark.parametrize("left", [0, 1000, -30])
def test_a_package_that_usd_could_not_finish_is_noticed(tmp_path, monkeypatch, left):
    """A full disk cuts a package off, and USD's writer says nothing of it."""
    checked = usd_files._check_package

    def cut_off(file):
        os.truncate(file, left if left >= 0 else file.stat().st_size + left)
        checked(file)

    monkeypatch.setattr(usd_files, "_check_package", cut_off)
    with pytest.raises(usd_files.UsdFileError, match="a.usdz can't be written: No space left"):
        usd_files.save_usdz(tmp_path / "a.usdz", scene())
    assert not list(tmp_path.iterdir())


def test_a_package_with_a_hole_is_noticed(tmp_path):
    usd_files.save_usdz(tmp_path / "a.usdz", scene(5000))
    usd_files._check_package(tmp_path / "a.usdz")
    with open(tmp_path / "a.usdz", "r+b") as handle:
        handle.seek(50_000)
        handle.write(bytes(4096))
    with pytest.raises(OSError, match="No space left"):
        usd_files._check_package(tmp_path / "a.usdz")


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(usd_files.UsdFileError, match="a.usdz can't be written: No such file"):
        usd_files.save_usdz(tmp_path / "nowhere" / "a.usdz", scene())


def test_no_gaussians_are_a_file_too(tmp_path):
    stage = written(tmp_path, gaussians=scene().select(slice(0, 0)))
    assert len(stage.GetPrimAtPath("/World/gaussians").GetAttribute("positions").Get()) == 0


def test_whoever_lacks_usd_core_is_told_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pxr", None)
    with pytest.raises(ImportError, match="needs usd-core 26.3 or newer: pip install usd-core"):
        usd_files.require()


def test_a_usd_core_without_gaussians_is_told_apart(monkeypatch):
    monkeypatch.delattr(UsdVol, "ParticleField3DGaussianSplat")
    with pytest.raises(ImportError, match=r"which knows gaussians, found \d+\.\d+\.\d+: pip install -U usd-core"):
        usd_files.require()


def test_importing_it_does_not_import_usd(project):
    code = (
        f"import sys; sys.path.insert(0, {str(project)!r}); import lyra_core.exports.usd_files; sys.exit('pxr' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0
