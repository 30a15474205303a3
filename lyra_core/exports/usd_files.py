"""USD: gaussians, the surface that stops a body, and the camera's way in one file, for simulators and film tools.

    /World              turns the world's axes (OpenCV) to z up, x right, y into the picture, and level if the photo was aslant
    /World/gaussians    ParticleField3DGaussianSplat, activated values, all of its harmonics
    /World/collision    the surface, a mesh with UsdPhysics collision, of purpose guide: there, and not drawn
    /World/parts        instead of it, where convex parts are asked for: what stands on the floor, each its own convex hull
    /World/floor        where the ground is known: the floor that was seen, which then is not in the collision mesh
    /World/ground       ground that nobody saw, continued under the path; collides too, in a colour of its own
    /World/spawn        places where a body can stand: z up, x where it looks
    /World/camera       the cameras one after the other, one frame each
    /World/light, /World/material, /physicsScene    a light from above; friction; gravity along -z

Below /World all numbers are those of the world, in scene units; `metersPerUnit` says what such a unit is worth. The extent
of the gaussians is the true one, their farthest included, because renderers leave out what lies beyond it. What collides is
labelled (UsdSemantics) for Isaac Sim: `class` says ground or obstacle, or surface where that is not known; `source` says seen
or invented.

usd-core is imported where it is used; nothing else needs it.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from ..cameras.camera import Cameras, flip_camera_axes, to_corner_origin
from ..splats.gaussians import Gaussians
from ..splats.splat_files import BLOCK, LEAST_SCALE, check
from .surface import Mesh
from .walkable import Place, Walkable

LARGEST_PACKAGE = 2**32 - 2**20  # bytes; a .usdz is a zip file of the 32-bit kind
TO_Z_UP = ((1, 0, 0, 0), (0, 0, -1, 0), (0, 1, 0, 0), (0, 0, 0, 1))  # rows: where x, y and z of the world go
# tenths of a scene unit, which is how USD measures a film's width; the usual 36 mm if a unit is a centimetre
FILM = 36.0
REACH = 3.0  # standard deviations of a gaussian that its extent takes in
NEAR, FAR = 0.01, 1e5  # scene units; USD's own nearest is 1, which would cut a room open

GRAVITY = 9.81  # metres per second squared
FRICTION = 0.8
LOOKING_DOWN = (1, 0, 0, 0, 0, 0, 1, 0, 0, -1, 0, 0, 0, 0, 0, 1)  # a light's -z is the world's y, down

NEEDED = "needs usd-core 26.3 or newer"


class UsdFileError(ValueError):
    """A USD file that can't be written; the message names it and what to do."""


def require() -> SimpleNamespace:
    """The modules of usd-core; ImportError with the pip command if it is missing or too old."""
    try:
        from pxr import Gf, Sdf, Tf, Usd, UsdGeom, UsdLux, UsdPhysics, UsdSemantics, UsdShade, UsdVol, Vt
    except ImportError as error:
        raise ImportError(f"USD {NEEDED}: pip install usd-core") from error
    if not hasattr(UsdVol, "ParticleField3DGaussianSplat"):
        found = ".".join(map(str, Usd.GetVersion()))
        raise ImportError(f"USD {NEEDED}, which knows gaussians, found {found}: pip install -U usd-core")
    return SimpleNamespace(
        Gf=Gf, Sdf=Sdf, Tf=Tf, Usd=Usd, UsdGeom=UsdGeom, UsdLux=UsdLux, UsdPhysics=UsdPhysics, UsdSemantics=UsdSemantics,
        UsdShade=UsdShade, UsdVol=UsdVol, Vt=Vt,
    )  # fmt: skip


def size_of(gaussians: Gaussians | None, mesh: Mesh | None = None) -> int:
    """About how many bytes the file will have."""
    size = 1 << 16
    if gaussians is not None:
        size += len(gaussians) * 4 * (3 + 4 + 3 + 1 + 3 * gaussians.sh.shape[1])
    return size if mesh is None else size + 12 * len(mesh.vertices) + 16 * len(mesh)


def save_usdz(
    file: Path | str,
    gaussians: Gaussians | None = None,
    mesh: Mesh | None = None,
    cameras: Cameras | None = None,
    *,
    found: Walkable | None = None,
    parts: Sequence[Mesh] | None = None,
    fps: float = 24.0,
    metres_per_unit: float = 1.0,
) -> None:
    """Write a .usdz of what is given; the file is there complete or not at all.

    `mesh` is the collision surface, faces counter-clockwise seen from where one may be; `found` the ground on it and where a
    body can begin; `parts` convex ones of what of the surface is no floor, None: its triangles. ValueError for gaussians that
    can't be drawn, for a skewed camera and beyond LARGEST_PACKAGE (then `save_usdc`); UsdFileError if it can't be written.
    """
    if size_of(gaussians, mesh) > LARGEST_PACKAGE:
        raise ValueError(
            f"{file} would have {size_of(gaussians, mesh) / 1e9:.1f} GB and a .usdz at most "
            f"{LARGEST_PACKAGE / 1e9:.1f}; save it as .usdc, or prune the gaussians"
        )
    usd = require()
    with _complete(Path(file), usd) as partial:
        layer = partial / "world.usdc"
        _write_layer(usd, layer, gaussians, mesh, cameras, found, parts, fps, metres_per_unit)
        with usd.Sdf.ZipFileWriter.CreateNew(str(partial / "done")) as package:
            package.AddFile(str(layer), layer.name)
        _check_package(partial / "done")


def save_usdc(
    file: Path | str,
    gaussians: Gaussians | None = None,
    mesh: Mesh | None = None,
    cameras: Cameras | None = None,
    *,
    found: Walkable | None = None,
    parts: Sequence[Mesh] | None = None,
    fps: float = 24.0,
    metres_per_unit: float = 1.0,
) -> None:
    """As `save_usdz`, but the bare layer, of any size."""
    usd = require()
    with _complete(Path(file), usd) as partial:
        _write_layer(usd, partial / "world.usdc", gaussians, mesh, cameras, found, parts, fps, metres_per_unit)
        os.replace(partial / "world.usdc", partial / "done")


def _check_package(file: Path) -> None:
    """OSError unless all of it can be read: USD says nothing of a disk that was full before its end."""
    try:
        with zipfile.ZipFile(file) as package:
            broken = package.testzip()
    except zipfile.BadZipFile:
        broken = file.name
    if broken:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def _complete(file: Path, usd: SimpleNamespace) -> Iterator[Path]:
    """A folder to work in; its file `done` takes the place of `file`, and the folder vanishes."""
    partial = file.with_name(file.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        with open(partial / "done", "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(partial / "done", file)
    except (OSError, usd.Tf.ErrorException) as error:
        cause = error
        if not isinstance(error, OSError):
            cause = OSError(errno.EIO, "USD got only a part of it onto the disk")
            cause.__cause__ = error
        raise UsdFileError(
            f"{file} can't be written: {cause.strerror}; it needs a folder that exists and twice its own size"
        ) from cause
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_layer(
    usd: SimpleNamespace,
    file: Path,
    gaussians: Gaussians | None,
    mesh: Mesh | None,
    cameras: Cameras | None,
    found: Walkable | None,
    parts: Sequence[Mesh] | None,
    fps: float,
    metres_per_unit: float,
) -> None:
    stage = usd.Usd.Stage.CreateNew(str(file))
    usd.UsdGeom.SetStageUpAxis(stage, usd.UsdGeom.Tokens.z)
    usd.UsdGeom.SetStageMetersPerUnit(stage, metres_per_unit)
    world = usd.UsdGeom.Xform.Define(stage, "/World")
    level = torch.eye(3) if found is None else found.ground.level
    world.AddTransformOp().Set(usd.Gf.Matrix4d(_rows(level)) * usd.Gf.Matrix4d(TO_Z_UP))
    stage.SetDefaultPrim(world.GetPrim())
    if gaussians is not None:
        _define_gaussians(usd, stage, gaussians)
    bodies = _bodies(mesh, found, parts)
    for path, (body, approximation, labels) in bodies.items():
        prim = _define_collision(usd, stage, path, body, approximation)
        for taxonomy, label in labels.items():
            usd.UsdSemantics.LabelsAPI.Apply(prim.GetPrim(), taxonomy).CreateLabelsAttr([label])
        if labels["source"] == "invented":
            prim.CreateDisplayColorAttr([tuple(body.colors[0].tolist())])
            prim.GetPrim().SetCustomDataByKey("lyra2:invented", True)
    if bodies:
        _define_physics(usd, stage, list(bodies), metres_per_unit)
    if found is not None:
        spawn = usd.UsdGeom.Xform.Define(stage, "/World/spawn")
        spawn.AddTransformOp().Set(usd.Gf.Matrix4d(_rows(level.T)))  # from level axes, which the places are in
        for number, place in enumerate(found.places):
            _define_place(usd, stage, number, place)
    if cameras is not None:
        _define_camera(usd, stage, cameras, fps)
    stage.GetRootLayer().Save()


def _rows(rotation: Tensor) -> list[list[float]]:
    """A rotation (3, 3) as USD has it, which multiplies rows, as exactly a rotation as doubles allow."""
    u, _, v = torch.linalg.svd(rotation.double())
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:3, :3] = (u @ v).T
    return matrix.tolist()


def _bodies(mesh: Mesh | None, found: Walkable | None, parts: Sequence[Mesh] | None) -> dict[str, tuple[Mesh, str, dict[str, str]]]:
    """What collides, by its path: how (an approximation of UsdPhysics), and its labels by taxonomy."""
    seen, made = {"class": "surface", "source": "seen"}, {}
    if found is not None and mesh is not None:
        floor = found.ground.floor_of(mesh)
        made["/World/floor"] = (mesh.only(floor), "none", {"class": "ground", "source": "seen"})
        mesh, seen = mesh.only(~floor), seen | {"class": "obstacle"}
    if parts is not None:
        made |= {f"/World/parts/part_{i:03d}": (part, "convexHull", seen) for i, part in enumerate(parts)}
    elif mesh is not None:
        made["/World/collision"] = (mesh, "none", seen)  # the triangles themselves
    if found is not None:
        made["/World/ground"] = (found.ground.mesh(), "none", {"class": "ground", "source": "invented"})
    return {path: body for path, body in made.items() if len(body[0])}


def _define_gaussians(usd: SimpleNamespace, stage, gaussians: Gaussians) -> None:
    check(gaussians)
    Vt, bands = usd.Vt, gaussians.sh.shape[1]
    prim = usd.UsdVol.ParticleField3DGaussianSplat.Define(stage, "/World/gaussians")
    prim.CreatePositionsAttr(Vt.Vec3fArray.FromNumpy(_array(gaussians.means)))
    units = gaussians.quats / gaussians.quats.norm(dim=1, keepdim=True)
    prim.CreateOrientationsAttr(Vt.QuatfArray.FromNumpy(_array(units[:, (1, 2, 3, 0)])))  # it takes w last
    prim.CreateScalesAttr(Vt.Vec3fArray.FromNumpy(_array(gaussians.scales.clamp_min(LEAST_SCALE))))
    prim.CreateOpacitiesAttr(Vt.FloatArray.FromNumpy(_array(gaussians.opacities.clamp(0, 1))))
    prim.CreateRadianceSphericalHarmonicsDegreeAttr(round(bands**0.5) - 1)
    harmonics = prim.CreateRadianceSphericalHarmonicsCoefficientsAttr(
        Vt.Vec3fArray.FromNumpy(_array(gaussians.sh.reshape(-1, 3)))
    )
    harmonics.SetMetadata("elementSize", bands)
    prim.CreateProjectionModeHintAttr("perspective")
    prim.CreateSortingModeHintAttr("cameraDistance")
    prim.CreateExtentAttr(Vt.Vec3fArray.FromNumpy(_array(_extent(gaussians))))


def _array(values: Tensor) -> np.ndarray:
    return np.ascontiguousarray(values.detach().float().cpu().numpy())


def _extent(gaussians: Gaussians) -> Tensor:
    """Lowest and highest corner (2, 3) of all gaussians."""
    if not len(gaussians):
        return torch.zeros(2, 3)
    corners = []
    for start in range(0, len(gaussians), BLOCK):
        means = gaussians.means[start : start + BLOCK]
        reach = REACH * gaussians.scales[start : start + BLOCK].amax(1, keepdim=True)
        corners.append(torch.stack([(means - reach).amin(0), (means + reach).amax(0)]))
    lowest, highest = torch.stack(corners, 1)
    return torch.stack([lowest.amin(0), highest.amax(0)])


def _define_collision(usd: SimpleNamespace, stage, path: str, mesh: Mesh, approximation: str):
    Vt, prim = usd.Vt, usd.UsdGeom.Mesh.Define(stage, path)
    vertices = _array(mesh.vertices)
    faces = np.ascontiguousarray(mesh.faces.cpu().numpy().astype(np.int32))
    prim.CreatePointsAttr(Vt.Vec3fArray.FromNumpy(vertices))
    prim.CreateFaceVertexCountsAttr(Vt.IntArray.FromNumpy(np.full(len(faces), 3, np.int32)))
    prim.CreateFaceVertexIndicesAttr(Vt.IntArray.FromNumpy(faces.reshape(-1)))
    prim.CreateSubdivisionSchemeAttr("none")
    prim.CreatePurposeAttr("guide")
    if len(vertices):
        prim.CreateExtentAttr(Vt.Vec3fArray.FromNumpy(np.stack([vertices.min(0), vertices.max(0)])))
    usd.UsdPhysics.CollisionAPI.Apply(prim.GetPrim())
    usd.UsdPhysics.MeshCollisionAPI.Apply(prim.GetPrim()).CreateApproximationAttr(approximation)
    return prim


def _define_physics(usd: SimpleNamespace, stage, paths: Sequence[str], metres_per_unit: float) -> None:
    """Gravity, a material with friction for what collides, and a light."""
    scene = usd.UsdPhysics.Scene.Define(stage, "/physicsScene")
    scene.CreateGravityDirectionAttr(usd.Gf.Vec3f(0, 0, -1))
    scene.CreateGravityMagnitudeAttr(GRAVITY / metres_per_unit)
    material = usd.UsdShade.Material.Define(stage, "/World/material")
    surface = usd.UsdPhysics.MaterialAPI.Apply(material.GetPrim())
    surface.CreateStaticFrictionAttr(FRICTION)
    surface.CreateDynamicFrictionAttr(FRICTION)
    surface.CreateRestitutionAttr(0.0)
    for path in paths:
        binding = usd.UsdShade.MaterialBindingAPI.Apply(stage.GetPrimAtPath(path))
        binding.Bind(material, usd.UsdShade.Tokens.weakerThanDescendants, "physics")
    light = usd.UsdLux.DistantLight.Define(stage, "/World/light")
    light.CreateIntensityAttr(1000.0)
    light.AddTransformOp().Set(usd.Gf.Matrix4d(*LOOKING_DOWN))


def _define_place(usd: SimpleNamespace, stage, number: int, place: Place) -> None:
    sine, cosine = math.sin(place.heading), math.cos(place.heading)
    prim = usd.UsdGeom.Xform.Define(stage, f"/World/spawn/place_{number:02d}")
    # rows: where its x (ahead), y (left) and z (up) go in the level axes
    rows = ((sine, 0, cosine, 0), (-cosine, 0, sine, 0), (0, -1, 0, 0), (*place.position, 1))
    prim.AddTransformOp().Set(usd.Gf.Matrix4d(rows))
    clearance = prim.GetPrim().CreateAttribute("lyra2:clearance", usd.Sdf.ValueTypeNames.Float, custom=True)
    clearance.Set(place.clearance)


def _define_camera(usd: SimpleNamespace, stage, cameras: Cameras, fps: float) -> None:
    """One frame per camera from frame 0 on; what all of them share is written once."""
    stage.SetTimeCodesPerSecond(fps)
    stage.SetFramesPerSecond(fps)
    stage.SetStartTimeCode(0)
    stage.SetEndTimeCode(len(cameras) - 1)
    prim = usd.UsdGeom.Camera.Define(stage, "/World/camera")
    prim.CreateClippingRangeAttr(usd.Gf.Vec2f(NEAR, FAR))
    prim.CreateHorizontalApertureAttr(FILM)
    for name, values in _lens(cameras).items():
        shared = bool((values == values[0]).all())
        for frame, value in enumerate(values[:1].tolist() if shared else values.tolist()):
            time = usd.Usd.TimeCode.Default() if shared else frame
            prim.GetPrim().GetAttribute(name).Set(value, time)
    c2w = flip_camera_axes(torch.linalg.inv(cameras.w2c.double().cpu()))
    place = prim.AddTransformOp()
    for frame, matrix in enumerate(c2w.mT.tolist()):  # USD multiplies rows
        place.Set(usd.Gf.Matrix4d(matrix), usd.Usd.TimeCode.Default() if len(cameras) == 1 else frame)


def _lens(cameras: Cameras) -> dict[str, Tensor]:
    """Each attribute of USD's film and lens (F,): a film FILM wide behind a lens that need not be in its middle."""
    height, width = cameras.size
    K = to_corner_origin(cameras.K.double().cpu())
    if (K[:, 0, 1].abs() > 1e-6 * K[:, 0, 0]).any():
        raise ValueError(f"USD has no place for a skew of {float(K[:, 0, 1].abs().max()):.4g}; make the pixels upright")
    focal = K[:, 0, 0] * FILM / width
    tall = focal * height / K[:, 1, 1]
    return {
        "focalLength": focal,
        "verticalAperture": tall,
        "horizontalApertureOffset": FILM * (0.5 - K[:, 0, 2] / width),
        "verticalApertureOffset": tall * (K[:, 1, 2] / height - 0.5),
    }
