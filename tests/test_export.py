"""The export node: one folder whose every file others open, and which fits onto the others."""

from __future__ import annotations

import dataclasses
import json
import struct
import sys

import numpy as np
import pytest
import torch

from lyra_core.cameras import camera_files
from lyra_core.cameras.camera import pinhole, pixel_grid, project
from lyra_core.exports import surface
from lyra_core.splats import rasterize
from lyra_core.splats.gaussians import Gaussians, colors_to_sh
from lyra_core.world import preview
from lyra_core.world import world as worlds

SIZE = (48, 80)
EVERYTHING = {
    "splat.ply", "splat.spz", "splat.splat", "points.ply", "mesh.glb", "collision.glb", "world.usdz", "cameras.npz",
    "camera_path.json", "colmap", "flythrough.mp4", "README.md", "bundle.json", "ground.glb", "world.xml", "map",
}  # fmt: skip


@pytest.fixture
def node(pack):
    return pack.export.ExportWorld


@pytest.fixture
def output(comfy_host):
    return comfy_host / "output"


def room():
    """A photo of red ceiling, green floor and grey wall, its depth and its camera."""
    camera = pinhole(SIZE, 60.0)
    x, y, _ = (pixel_grid(SIZE) @ camera.K_inverse[0].mT).unbind(-1)
    reach = torch.stack([torch.full_like(y, 4.0), torch.where(y < 0, -1.0, 1.0) / y])
    depth, which = reach.where(reach > 0, torch.inf).min(0)
    image = torch.full((*SIZE, 3), 0.5)
    image[(which == 1) & (y < 0)] = torch.tensor([0.9, 0.1, 0.1])
    image[(which == 1) & (y > 0)] = torch.tensor([0.1, 0.8, 0.1])
    return image, depth, camera


def walk(frames=9):
    cameras = pinhole(SIZE, 60.0, frames)
    cameras.w2c[:, 2, 3] = -0.05 * torch.arange(frames)
    cameras.w2c[:, 0, 3] = -0.02 * torch.arange(frames)
    return cameras


@pytest.fixture(scope="module")
def world():
    return preview.explore(worlds.begin(*room()), walk(), chunk_frames=4)


@pytest.fixture
def splat(pack, world):
    return pack.splat.WorldGaussians.execute(world, 1, True).args[0]


def sheet(side=20):
    """The floor y = 1 as a mesh of 2 (side - 1)² faces, seen from above; its far half is blue."""
    x, z = torch.meshgrid(torch.linspace(-2, 2, side), torch.linspace(1, 4, side), indexing="ij")
    corner = (torch.arange(side - 1)[:, None] * side + torch.arange(side - 1)).flatten()
    faces = torch.cat(
        [
            torch.stack([corner, corner + side, corner + side + 1], 1),
            torch.stack([corner, corner + side + 1, corner + 1], 1),
        ]
    )
    vertices = torch.stack([x, torch.ones_like(x), z], -1).reshape(-1, 3)
    colors = torch.tensor([0.2, 0.5, 0.2]).repeat(len(vertices), 1)
    colors[vertices[:, 2] > 2.5] = torch.tensor([0.0, 0.0, 1.0])
    return surface.Mesh(vertices, faces, colors)


@pytest.fixture
def mesh(pack):
    return pack.mesh.to_mesh(sheet())


def export(node, folder="exports/a", **given):
    settings = {
        "usd": False,
        "colmap": False,
        "web": False,
        "video": False,
        "geometry_model": "MoGe",
        "collision_faces": 200,
        "metres_per_unit": 1.0,
        "fps": 16.0,
        "every": 4,
        "ground": {"ground": "as seen"},
    }
    return node.execute(folder=folder, **(settings | given))


def names(folder):
    return {f.name for f in folder.iterdir()}


@pytest.fixture
def whole(node, output, world, splat, mesh):
    """A bundle of everything, as it was reported."""
    pytest.importorskip("pxr", reason="writes world.usdz; pip install usd-core")
    pytest.importorskip("fast_simplification", reason="makes collision.glb; pip install fast-simplification")
    continued = {"ground": "continued", "margin": 1.0, "radius": 0.2, "height": 0.8, "step": 0.2}
    done = export(node, world=world, splat=splat, mesh=mesh, usd=True, colmap=True, web=True, video=True, ground=continued)
    return output / "exports" / "a", done


# ------------------------------------------------------------------------------------------------------- what is in a bundle


def test_a_world_with_splat_and_mesh_becomes_every_file(whole, splat):
    folder, done = whole
    assert names(folder) == EVERYTHING and names(folder.parent) == {"a"}
    name, report, splat_file, mesh_file = done.args
    missing = [line for line in report.splitlines() if line.startswith("no ")]
    assert name == "exports/a" and "9 frames, 0.562 s" in report
    assert len(missing) == 1 and missing[0].startswith("no viewer: ")  # which is the frontend's, and here is no server
    assert splat_file.is_disk_backed and splat_file.format == "ply" and mesh_file.format == "glb"
    assert done.ui["text"] == (report,) and done.ui["images"][0]["subfolder"] == "exports/a"
    text = (folder / "README.md").read_text()
    assert (
        text.startswith("# a\n")
        and f"{splat.positions.shape[1]:,} gaussians" in text
        and "geometry preview" in text.lower()
    )
    listed = json.loads((folder / "bundle.json").read_text())["files"]
    assert {part.split("/")[0] for part in listed} == EVERYTHING - {"bundle.json"}


def test_what_the_host_reads_back_looks_the_same_from_within(whole, world, splat, pack):
    from comfy_api.latest import Types
    from comfy_extras.nodes_gaussian_splat import File3DToSplat

    folder, _ = whole
    camera, seen = world.cameras[6], {}
    before = rasterize.render(pack.splat.from_splat(splat), camera).images[0]
    for name, least in (("splat.ply", 80), ("splat.spz", 40), ("splat.splat", 30)):
        read = File3DToSplat.execute(Types.File3D(str(folder / name))).result[0]
        assert read.positions.shape == splat.positions.shape
        seen[name] = rasterize.render(pack.splat.from_splat(read), camera).images[0]
        assert -10 * torch.log10((seen[name] - before).square().mean() + 1e-12) > least, name


def test_points_lie_where_the_gaussians_do(whole, splat):
    plyfile = pytest.importorskip("plyfile")
    points = plyfile.PlyData.read(str(whole[0] / "points.ply"))["vertex"]
    gaussians = plyfile.PlyData.read(str(whole[0] / "splat.ply"))["vertex"]
    assert points.count == gaussians.count == splat.positions.shape[1]
    for axis in "xyz":
        np.testing.assert_array_equal(points[axis], gaussians[axis])
    shade = (np.clip(0.5 + 0.28209479 * gaussians["f_dc_1"], 0, 1) * 255).round()
    np.testing.assert_allclose(points["green"], shade, atol=1)


# ----------------------------------------------------------------------------------------------------------------- the meshes


def attributes(file):
    """Of a .glb with one primitive: name -> array, read by the letter of the glTF specification."""
    content = file.read_bytes()
    length = struct.unpack_from("<I", content, 12)[0]
    gltf, binary = json.loads(content[20 : 20 + length]), content[28 + length :]
    found = {}
    for name, index in gltf["meshes"][0]["primitives"][0]["attributes"].items():
        accessor = gltf["accessors"][index]
        start = gltf["bufferViews"][accessor["bufferView"]]["byteOffset"]
        found[name] = np.frombuffer(binary, np.float32, 3 * accessor["count"], start).reshape(-1, 3)
    return found


def test_up_in_the_picture_is_up_in_a_glb(whole):
    trimesh = pytest.importorskip("trimesh")
    for name, count in (("mesh.glb", 722), ("collision.glb", 200)):
        scene = trimesh.load(whole[0] / name)
        (shape,) = scene.geometry.values()
        assert len(shape.faces) <= count and len(shape.faces) > 0.9 * count
        np.testing.assert_allclose(scene.bounds, [[-2, -1, -4], [2, -1, -1]], atol=1e-5)
        assert (shape.face_normals[:, 1] > 0.99).all()  # one stands on the floor


def test_a_glb_keeps_colours_in_the_light_that_gltf_wants(whole):
    trimesh = pytest.importorskip("trimesh")
    (shape,) = trimesh.load(whole[0] / "mesh.glb").geometry.values()
    color = shape.visual.vertex_attributes["color"]
    far = shape.vertices[:, 2] < -2.5
    np.testing.assert_allclose(color[far], [[0, 0, 1]] * far.sum(), atol=1e-6)
    np.testing.assert_allclose(color[~far], [[0.0331, 0.2140, 0.0331]] * (~far).sum(), atol=1e-4)
    np.testing.assert_array_equal(attributes(whole[0] / "mesh.glb")["COLOR_0"], color)


def test_a_textured_mesh_keeps_its_texture_and_uncoloured_ones_need_no_colours(node, output, mesh, pack):
    from comfy_api.latest import Types

    trimesh = pytest.importorskip("trimesh")
    texture = torch.zeros(1, 4, 4, 3)
    texture[..., 0] = 1
    uvs = torch.rand(1, mesh.vertices.shape[1], 2)
    export(node, mesh=Types.MESH(mesh.vertices, mesh.faces, uvs=uvs, texture=texture), collision_faces=0)
    (shape,) = trimesh.load(output / "exports" / "a" / "mesh.glb").geometry.values()
    assert shape.visual.material.baseColorTexture.getpixel((0, 0))[:3] == (255, 0, 0)
    (collision,) = trimesh.load(output / "exports" / "a" / "collision.glb").geometry.values()
    assert len(collision.faces) == mesh.faces.shape[1]  # 0: all of it
    export(node, mesh=Types.MESH(mesh.vertices, mesh.faces), collision_faces=0)
    assert "COLOR_0" not in attributes(output / "exports" / "a" / "mesh.glb")


# -------------------------------------------------------------------------------------------------------- cameras and frames


def test_usd_has_gaussians_collision_and_camera_of_the_world(whole, splat, world):
    from pxr import Usd, UsdGeom

    stage = Usd.Stage.Open(str(whole[0] / "world.usdz"))
    assert len(stage.GetPrimAtPath("/World/gaussians").GetAttribute("positions").Get()) == splat.positions.shape[1]
    assert len(stage.GetPrimAtPath("/World/floor").GetAttribute("faceVertexCounts").Get()) <= 200
    bounds = UsdGeom.BBoxCache(0, ["guide"]).ComputeWorldBound(stage.GetPrimAtPath("/World/floor"))
    box = bounds.ComputeAlignedRange()
    assert [*box.GetMin(), *box.GetMax()] == pytest.approx([-2, 1, -1, 2, 4, -1], abs=1e-5)  # the floor is below
    place = UsdGeom.Camera(stage.GetPrimAtPath("/World/camera")).ComputeLocalToWorldTransform(8).ExtractTranslation()
    assert list(place) == pytest.approx([0.16, 0.4, 0], abs=1e-5) and stage.GetEndTimeCode() == 8
    assert stage.GetTimeCodesPerSecond() == 16


def test_the_cameras_are_read_again_as_they_were(whole, world):
    read = camera_files.load_cameras(whole[0] / "cameras.npz")
    assert torch.equal(read.w2c, world.cameras.w2c) and torch.equal(read.K, world.cameras.K) and read.size == SIZE
    again = camera_files.load_cameras(whole[0] / "camera_path.json", frames=9, size=SIZE)
    torch.testing.assert_close(again.centers, world.cameras.centers, atol=1e-3, rtol=0)
    archive = np.load(whole[0] / "cameras.npz")
    assert sorted(archive) == ["image_height", "image_width", "intrinsics", "units", "w2c"]


def test_colmap_sees_the_gaussians_where_the_pictures_show_them(whole, world):
    pycolmap = pytest.importorskip("pycolmap", reason="COLMAP itself reads what was written; pip install pycolmap")
    from PIL import Image

    model = pycolmap.Reconstruction(str(whole[0] / "colmap" / "sparse" / "0"))
    assert sorted(image.name for image in model.images.values()) == [f"frame_{i:05d}.png" for i in (0, 4, 8)]
    alike = total = 0
    for image in model.images.values():
        pixels = np.asarray(Image.open(whole[0] / "colmap" / "images" / image.name)).astype(int)
        np.testing.assert_array_equal(pixels, world.frame(int(image.name[6:11])))
        for point in list(model.points3D.values())[::37]:
            where = image.project_point(point.xyz)
            if where is not None and 0 < where[0] < SIZE[1] and 0 < where[1] < SIZE[0]:
                alike += np.abs(pixels[int(where[1]), int(where[0])] - point.color).max() < 30
                total += 1
    assert total > 150 and alike > 0.95 * total


def test_the_host_plays_the_video(whole, world):
    from comfy_api.latest import InputImpl

    video = InputImpl.VideoFromFile(str(whole[0] / "flythrough.mp4"))
    parts = video.get_components()
    assert parts.images.shape == (9, *SIZE, 3) and float(parts.frame_rate) == 16
    for frame, other in ((0, 8), (8, 0)):
        own, away = ((parts.images[frame] - worlds.to_float(world.frame(f))).abs().mean() for f in (frame, other))
        assert own < 0.02 and own < 0.7 * away  # half of the colours are lost in an mp4


@pytest.mark.parametrize("size", [(60, 34), (33, 47)])
def test_portrait_and_odd_pictures_are_exported(node, output, size):
    from comfy_api.latest import InputImpl

    images = torch.rand(3, *size, 4)
    export(node, images=images, cameras=pinhole(size, 40.0, 3), video=True, colmap=True, every=1, fps=23.976)
    video = InputImpl.VideoFromFile(str(output / "exports" / "a" / "flythrough.mp4"))
    assert video.get_dimensions() == (size[1] // 2 * 2, size[0] // 2 * 2)
    assert float(video.get_components().frame_rate) == pytest.approx(23.976, abs=1e-3)
    record = json.loads((output / "exports" / "a" / "colmap" / "transforms.json").read_text())
    assert (record["h"], record["w"]) == size
    assert camera_files.load_cameras(output / "exports" / "a" / "colmap").size == size


def test_images_and_cameras_stand_in_for_the_world_s(node, output, world):
    cameras = walk(3)
    cameras.w2c[:, 1, 3] = 7.0
    export(node, world=world, cameras=cameras, images=torch.full((3, *SIZE, 3), 0.2), colmap=True, every=2)
    read = camera_files.load_cameras(output / "exports" / "a" / "colmap")
    assert (
        read.w2c[:, 1, 3].tolist() == [7, 7]
        and len(camera_files.load_cameras(output / "exports" / "a" / "cameras.npz")) == 3
    )


# ------------------------------------------------------------------------------------------------------- what is left out


def test_what_is_not_connected_or_switched_off_is_left_out_and_said(node, output, splat):
    done = export(node, splat=splat, colmap=True, video=True)
    assert names(output / "exports" / "a") == {"splat.ply", "points.ply", "README.md", "bundle.json"}
    for text in (done.args[1], (output / "exports" / "a" / "README.md").read_text()):
        assert "mesh.glb`: no mesh was connected" in text or "no mesh.glb: no mesh was connected" in text
        assert "`web` was switched off" in text and "`usd` was switched off" in text
        assert "neither cameras nor a world were connected" in text and "neither images nor a world" in text
    assert "NOT FOR COMMERCIAL USE" in done.args[1]  # nobody said what made it


def test_broken_gaussians_are_in_no_file_and_counted(node, output, splat):
    from comfy_api.latest import Types

    count = splat.positions.shape[1]
    for part in (splat.positions, splat.rotations, splat.scales, splat.opacities, splat.sh):
        assert part.shape[1] == count > 100
    splat.rotations[0, 3], splat.positions[0, 5, 1], splat.sh[0, 7] = 0, float("nan"), float("inf")
    done = export(node, splat=splat, usd=True, web=True)
    folder = output / "exports" / "a"
    report = done.args[1]
    for name in ("splat.ply", "splat.spz", "splat.splat", "points.ply", "world.usdz"):
        assert f"{name}: {count - 3:,} gaussians, 3 broken left out" in report, report
    assert "3 broken left out" in (folder / "README.md").read_text()
    assert (folder / "splat.splat").stat().st_size == 32 * (count - 3)
    assert Types.File3D(str(folder / "splat.ply")).is_disk_backed


@pytest.mark.parametrize("fault", ["nan", "inf", "face"])
def test_a_mesh_that_can_not_be_one_is_refused_before_anything_is_written(node, output, mesh, fault):
    broken = dataclasses.replace(mesh) if dataclasses.is_dataclass(mesh) else mesh
    broken.vertices, broken.faces = mesh.vertices.clone(), mesh.faces.clone()
    if fault == "face":
        broken.faces[0, 4, 1] = broken.vertices.shape[1]
    else:
        broken.vertices[0, 7, 2] = float(fault)
    before = names(output / "exports" / "a") if (output / "exports" / "a").exists() else None
    with pytest.raises(ValueError, match="name vertices 0 to|1 of .* vertices of this mesh are NaN or infinite"):
        export(node, mesh=broken)
    assert (names(output / "exports" / "a") if before is not None else None) == before


def test_a_writer_that_writes_nothing_is_no_export(node, output, splat, pack, monkeypatch):
    monkeypatch.setattr(pack.export.splat_files, "save_ply", lambda gaussians, file: None)
    with pytest.raises(ValueError, match="splat.ply was not written"):
        export(node, "exports/nothing", splat=splat)
    assert not (output / "exports" / "nothing").exists()


def test_a_file_that_was_not_made_stops_whoever_wants_it(node, splat):
    from comfy_execution.graph_utils import ExecutionBlocker

    done = export(node, splat=splat)
    assert isinstance(done.args[3], ExecutionBlocker) and done.args[3].message == "the export has no mesh.glb"
    assert done.args[2].get_source().endswith("splat.ply") and "images" not in done.ui


def test_switching_off_removes_what_an_earlier_export_had(node, output, splat):
    export(node, splat=splat, web=True)
    assert "splat.spz" in names(output / "exports" / "a")
    export(node, splat=splat)
    assert "splat.spz" not in names(output / "exports" / "a")


def test_a_world_too_large_for_a_package_becomes_a_layer(node, output, splat, pack, monkeypatch):
    pytest.importorskip("pxr", reason="writes world.usdc; pip install usd-core")
    monkeypatch.setattr(pack.export.usd_files, "LARGEST_PACKAGE", 1000)
    done = export(node, splat=splat, usd=True)
    assert "world.usdc" in names(output / "exports" / "a") and "world.usdc: " in done.args[1]


def test_convex_parts_collide_instead_of_triangles(node, output, mesh):
    pytest.importorskip("coacd", reason="convex parts; pip install coacd")
    pytest.importorskip("pxr", reason="writes world.usdz; pip install usd-core")
    from pxr import Usd, UsdPhysics

    report = export(node, mesh=mesh, usd=True, convex_parts=True).args[1]
    stage = Usd.Stage.Open(str(output / "exports" / "a" / "world.usdz"))
    parts = stage.GetPrimAtPath("/World/parts").GetChildren()
    assert parts and f"{len(parts)} convex parts" in report and not stage.GetPrimAtPath("/World/collision")
    for part in parts:
        assert UsdPhysics.MeshCollisionAPI(part).GetApproximationAttr().Get() == "convexHull"


# ------------------------------------------------------------------------------------------------------------- what goes wrong


def test_usd_without_usd_core_is_refused_at_once_with_both_ways_out(node, output, splat, monkeypatch):
    monkeypatch.setitem(sys.modules, "pxr", None)
    with pytest.raises(ImportError, match="pip install usd-core; or switch `usd` off"):
        export(node, splat=splat, usd=True, folder="exports/usd")
    assert not (output / "exports" / "usd").exists()
    export(node, splat=splat, usd=False)


def test_convex_parts_without_coacd_are_refused_at_once_with_both_ways_out(node, output, mesh, monkeypatch):
    monkeypatch.setitem(sys.modules, "coacd", None)
    with pytest.raises(ImportError, match="pip install coacd; or switch `convex_parts` off"):
        export(node, mesh=mesh, convex_parts=True, folder="exports/parts")
    assert not (output / "exports" / "parts").exists()
    export(node, mesh=mesh, folder="exports/parts")


def test_collision_without_its_package_is_refused_with_both_ways_out(node, mesh, monkeypatch):
    monkeypatch.setitem(sys.modules, "fast_simplification", None)
    with pytest.raises(ImportError, match="pip install fast-simplification; or set `collision_faces` to 0"):
        export(node, mesh=mesh)
    export(node, mesh=mesh, collision_faces=0)
    export(node, mesh=mesh, collision_faces=722)  # nothing to make smaller


def many(splat, count=3):
    fields = (splat.positions, splat.scales, splat.rotations, splat.opacities, splat.sh)
    return type(splat)(*(field.repeat(count, *[1] * (field.ndim - 1)) for field in fields))


def with_nan(splat):
    """Nothing of it can be drawn."""
    positions = torch.full_like(splat.positions, torch.nan)
    return type(splat)(positions, splat.scales, splat.rotations, splat.opacities, splat.sh)


def emptied(splat):
    return type(splat)(
        splat.positions, splat.scales, splat.rotations, splat.opacities, splat.sh, torch.zeros(1, dtype=torch.long)
    )


@pytest.mark.parametrize(
    "change, says",
    [
        (many, "this splat is a batch of 3; connect one of them"),
        (with_nan, r"all [\d,]+ gaussians of this splat have NaN"),
        (emptied, "this splat is empty"),
    ],
)
def test_splats_that_are_none_are_refused_and_the_earlier_bundle_stays(node, output, splat, change, says):
    export(node, splat=splat)
    before = {f: f.read_bytes() for f in (output / "exports" / "a").iterdir()}
    with pytest.raises(ValueError, match=says):
        export(node, splat=change(splat))
    assert {f: f.read_bytes() for f in (output / "exports" / "a").iterdir()} == before
    assert names(output / "exports") >= {"a"} and not [n for n in names(output / "exports") if n.startswith(".")]


def test_pictures_and_cameras_must_belong_together(node, world):
    with pytest.raises(ValueError, match="4 cameras but 9 pictures; connect the images that these cameras see"):
        export(node, world=world, cameras=walk(4))
    with pytest.raises(ValueError, match="9 cameras but 5 pictures"):
        export(node, world=world, images=torch.zeros(5, *SIZE, 3))
    with pytest.raises(ValueError, match="pictures are 40x24 and the cameras' 80x48; resize the pictures"):
        export(node, cameras=walk(9), images=torch.zeros(9, 24, 40, 3))


def test_nothing_is_no_export_and_a_name_outside_is_no_folder(node, splat):
    with pytest.raises(ValueError, match="nothing is connected"):
        export(node)
    with pytest.raises(ValueError, match="is no path inside"):
        export(node, splat=splat, folder="../elsewhere")


def test_an_empty_mesh_is_refused(node, mesh):
    from comfy_api.latest import Types

    with pytest.raises(ValueError, match="this mesh is empty"):
        export(node, mesh=Types.MESH(mesh.vertices, mesh.faces[:, :0]))


def test_a_folder_of_someone_else_is_refused(node, output, splat, pack):
    (output / "exports" / "mine").mkdir(parents=True, exist_ok=True)
    (output / "exports" / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(pack.export.bundle.BundleError, match="holds files but no bundle, such as thesis.txt"):
        export(node, splat=splat, folder="exports/mine")
    assert names(output / "exports" / "mine") == {"thesis.txt"}


@pytest.mark.parametrize("what", ["splat", "mesh", "frames"])
def test_a_full_disk_leaves_the_earlier_bundle_whatever_was_being_written(node, output, splat, mesh, pack, what):
    resource = pytest.importorskip("resource", reason="limits the size of files, not on this system")
    export(node, splat=splat)
    before = {f: f.read_bytes() for f in (output / "exports" / "a").iterdir()}
    given = {
        "splat": {"splat": splat},
        "mesh": {"mesh": mesh, "collision_faces": 0},
        "frames": {"images": torch.rand(9, *SIZE, 3), "video": True},
    }
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3500, limits[1]))
    try:
        with pytest.raises(
            pack.export.bundle.BundleError,
            match="a can't be written: File too large; what was there before is unchanged",
        ):
            export(node, **given[what])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {f: f.read_bytes() for f in (output / "exports" / "a").iterdir()} == before
    assert not [n for n in names(output / "exports") if n.startswith(".")]


def test_an_interrupt_among_the_frames_leaves_the_earlier_bundle(node, output, world, monkeypatch, pack):
    import comfy.model_management as management

    export(node, world=world)
    before = names(output / "exports" / "a")
    shown = []

    def seen(total):
        def on_step(done, total, picture=None):
            shown.append(picture)
            if sum(p is not None for p in shown) == 3:
                raise management.InterruptProcessingException

        return on_step

    monkeypatch.setattr(pack.types, "progress", seen)
    with pytest.raises(management.InterruptProcessingException):
        export(node, world=world, video=True)
    assert names(output / "exports" / "a") == before and names(output / "exports") >= {"a"}
    assert not [n for n in names(output / "exports") if n.startswith(".")]


# -------------------------------------------------------------------------------------------------------------- licences, size


def test_what_made_the_chunks_is_told_by_the_world(node, world):
    assert len(world.chunks) == 2 and export(node, world=world).args[1].count("Geometry preview: no model licence") == 1
    of_lyra = dataclasses.replace(world.chunks[0], settings={"generator": "lyra 2"})
    report = export(node, world=dataclasses.replace(world, chunks=(of_lyra, *world.chunks[1:]))).args[1]
    assert report.count("Lyra 2 weights made frames") == report.count("Geometry preview: no model licence") == 1


def test_far_gaussians_and_units_are_told_and_kept(node, output):
    pytest.importorskip("pxr", reason="writes world.usdz; pip install usd-core")
    from comfy_api.latest import Types
    from pxr import Usd, UsdGeom

    count = 300
    means = torch.linspace(0, 1, count)[None, :, None].repeat(1, 1, 3)
    means[0, 0] = torch.tensor([0, 0, 1e5])
    quats = torch.zeros(1, count, 4)
    quats[..., 0] = 1
    sh = colors_to_sh(torch.rand(count, 3))[None]
    splat = Types.SPLAT(means, torch.full((1, count, 3), 0.01), quats, torch.ones(1, count, 1), sh)
    export(node, splat=splat, usd=True, web=True, metres_per_unit=0.5)
    text = (output / "exports" / "a" / "README.md").read_text()
    assert (
        "A scene unit is 0.5 metres" in text
        and "98 % of the gaussians lie within 0.98 (width) x 0.98 (height) x 0.98 (depth)" in text
    )
    stage = Usd.Stage.Open(str(output / "exports" / "a" / "world.usdz"))
    assert UsdGeom.GetStageMetersPerUnit(stage) == 0.5
    assert stage.GetPrimAtPath("/World/gaussians").GetAttribute("extent").Get()[1][2] > 1e5


def test_nothing_as_large_as_the_splat_is_made_on_the_way(node, world, pack, monkeypatch):
    """11 million gaussians are 600 MB; the writers take a block at a time, so no field may be copied whole."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in known:
                self.bytes = max(self.bytes, out.untyped_storage().nbytes())
            return out

    count = 300_000
    fields = (
        torch.rand(count, 3),
        torch.rand(count, 3),
        torch.ones(count, 4),
        torch.rand(count),
        torch.rand(count, 4, 3),
    )
    means, scales, quats, opacities, sh = fields
    splat = pack.splat.to_splat(Gaussians(means, quats, scales, opacities, sh))
    with Largest() as seen:
        export(node, splat=splat)
    assert seen.bytes < sh.nbytes / 2


def test_the_folder_s_pixels_agree_with_the_cameras(world):
    """The room that all of the above is about: what the photo shows is where its camera says."""
    points = torch.tensor([[0.0, 1.0, 3.0]])
    pixels, _ = project(points, world.cameras[0])
    u, v = pixels[0, 0].round().long().tolist()
    assert world.frame(0)[v, u, 1] > world.frame(0)[v, u, 0]  # the floor is green


def test_cameras_of_a_map_are_exported_beside_what_they_see(pack):
    here = (448251.0, 5411932.0, 121.0)
    cameras = dataclasses.replace(pinhole(SIZE, 40.0, 3), origin=here)
    sources = pack.export._sources(None, None, None, cameras, None, 100)
    assert sources.origin == here and sources.cameras.origin == (0, 0, 0)
    assert torch.equal(sources.cameras.w2c, cameras.w2c)
