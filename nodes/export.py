"""A world as one folder that engines, viewers and simulators open."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import torch
from comfy_api.latest import Types, io
from comfy_execution.graph_utils import ExecutionBlocker
from comfy_extras.nodes_save_3d import get_mesh_batch_item, save_glb
from PIL import Image

from ..lyra_core.cameras import camera_files
from ..lyra_core.cameras.camera import Cameras, check
from ..lyra_core.cameras.camera_path import path_of
from ..lyra_core.exports import (
    bundle,
    ground,
    mjcf_files,
    parts,
    surface,
    usd_files,
    viewer_files,
    walkable,
    web_libraries,
)
from ..lyra_core.splats import splat_files
from ..lyra_core.splats.gaussians import Gaussians
from ..lyra_core.world.world import World, to_uint8
from . import mesh as meshes
from . import types
from .node import Node
from .splat import sound_splat
from .video import encode

VENDOR = Path(__file__).resolve().parent.parent / "js" / "vendor"  # where the libraries may lie if the frontend lacks them


@dataclass(frozen=True)
class Wanted:
    """Of the ground that nobody saw."""

    margin: float  # heights of the eyes around the path
    radius: float  # of a body, metres
    height: float
    step: float
    metres: float  # per scene unit

    @property
    def body(self) -> walkable.Body:
        return walkable.Body(self.radius / self.metres, self.height / self.metres, self.step / self.metres)


@dataclass(frozen=True)
class Sources:
    """What a bundle is made of; whatever is None is not in it."""

    gaussians: Gaussians | None
    left_out: str  # how many gaussians can't be drawn and are in no file; empty: none
    mesh: Types.MESH | None
    cameras: Cameras | None
    picture: Callable[[int], torch.Tensor] | None  # frame -> (H, W, 3) uint8
    pictures: int  # how many there are
    origin: tuple[float, float, float]  # of the files' coordinates in those of the map that the cameras came from
    collision_faces: int
    wanted: Wanted | None = None
    convex: bool = False  # whether what collides is convex parts

    @cached_property
    def walkable(self) -> walkable.Walkable | str:
        """The ground and where a body can go on it, or why there is none."""
        if self.wanted is None:
            return "`ground` was left as seen"
        if self.mesh is None or self.cameras is None:
            return "it needs a mesh, and a world or cameras"
        full = meshes.from_mesh(self.mesh)
        try:
            found = ground.ground(full, self.cameras, self.wanted.margin)
            return walkable.walkable(found, full, self.cameras, self.wanted.body)
        except (ground.NoGroundError, walkable.NowhereError) as reason:
            return str(reason)

    @cached_property
    def collision(self) -> surface.Mesh | None:
        if self.mesh is None:
            return None
        full = meshes.from_mesh(self.mesh)
        if not self.collision_faces or len(full) <= self.collision_faces:
            return full
        try:
            return surface.decimate(full, self.collision_faces)
        except ImportError as error:
            raise ImportError(f"{error}; or set `collision_faces` to 0, which takes the mesh as it is") from error


    @cached_property
    def parts(self) -> list[surface.Mesh] | None:
        """Convex parts of all of the surface that is no floor; None: the triangles themselves collide."""
        if not self.convex or self.mesh is None:
            return None
        found = self.walkable
        if isinstance(found, str):
            return parts.convex(self.collision)
        return parts.convex(self.collision.only(~found.ground.floor_of(self.collision)), found.ground.eyes)


@dataclass(frozen=True)
class Step:
    """One file of the bundle."""

    name: str
    lacking: str  # why it is not written; empty: it is
    write: Callable[[Path, Callable], str]  # (file, on_picture) -> what is in it


class ExportWorld(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lyra2ExportWorld",
            display_name="Lyra 2 Export World",
            category=types.CATEGORY,
            search_aliases=["export", "usd", "unity", "unreal", "blender", "isaac", "colmap", "save splat"],
            is_output_node=True,
            description="One folder with the world in every form that engines, viewers, VR and simulators open, and a README that says "
            "which is which. What isn't connected is left out. An export to the same folder replaces the earlier one, in one step.",
            inputs=[
                io.String.Input("folder", default="exports/my_world", tooltip="A folder in the output folder."),
                io.Splat.Input(
                    "splat", optional=True, tooltip="For splat.ply, points.ply, world.usdz and colmap's points."
                ),
                io.Mesh.Input(
                    "mesh", optional=True, tooltip="For mesh.glb, collision.glb and collision in world.usdz."
                ),
                types.World.Input(
                    "world", optional=True, tooltip="For its frames, its cameras and the licence of what made it."
                ),
                types.Cameras.Input("cameras", optional=True, tooltip="Instead of the world's."),
                io.Image.Input("images", optional=True, tooltip="Instead of the world's frames; one per camera."),
                io.Boolean.Input("usd", default=True, tooltip="world.usdz. Needs usd-core: pip install usd-core."),
                io.Boolean.Input("colmap", default=True, tooltip="Pictures and cameras for 3DGS trainers."),
                io.Boolean.Input("web", default=True, tooltip="splat.spz and splat.splat: small, plain colours."),
                io.Boolean.Input("video", default=True, tooltip="flythrough.mp4 of the frames."),
                io.Combo.Input(
                    "geometry_model",
                    options=list(bundle.MODELS),
                    tooltip="What estimated the depth or made the gaussians, for the licences in the README. What made the frames "
                    "is known from the world.",
                ),
                io.Int.Input(
                    "collision_faces",
                    default=20000,
                    min=0,
                    max=10_000_000,
                    tooltip="Faces of the collision mesh at most; more: finer and slower to collide with. 0: all of the mesh.",
                ),
                io.Float.Input(
                    "metres_per_unit",
                    default=1.0,
                    min=1e-4,
                    max=1e4,
                    step=0.001,
                    round=False,
                    tooltip="What a scene unit is worth. Written into the USD file and the README; no number is changed.",
                ),
                io.Float.Input(
                    "fps",
                    default=16.0,
                    min=1.0,
                    max=240.0,
                    step=0.001,
                    tooltip="Of the video and of the USD camera.",
                    advanced=True,
                ),
                io.Int.Input(
                    "every",
                    default=8,
                    min=1,
                    max=1000,
                    tooltip="Every how many frames colmap gets a picture.",
                    advanced=True,
                ),
                # last, so that the values of saved workflows keep their places
                io.DynamicCombo.Input(
                    "ground",
                    options=[
                        io.DynamicCombo.Option(
                            "continued",
                            [
                                io.Float.Input(
                                    "margin", default=1.0, min=0.0, max=10.0, step=0.1,
                                    tooltip="How far around the path, in heights of the eyes over the floor.",
                                ),
                                io.Float.Input(
                                    "radius", default=0.3, min=0.01, max=10.0, step=0.01,
                                    tooltip="Of the body that shall find its way, in metres.",
                                ),
                                io.Float.Input("height", default=1.0, min=0.01, max=10.0, step=0.01, tooltip="Of that body, in metres."),
                                io.Float.Input(
                                    "step", default=0.25, min=0.01, max=10.0, step=0.01,
                                    tooltip="The highest step that it takes, in metres: a person 0.25, small wheels 0.03.",
                                ),
                            ],
                        ),
                        io.DynamicCombo.Option("as seen", []),
                    ],
                    tooltip="Nobody sees the floor at his own feet. continued: the seen floor goes on under the path, marked as "
                    "invented, with a map for robots and places to begin at. Needs a mesh, and a world or cameras.",
                ),
                io.Boolean.Input(
                    "convex_parts",
                    default=False,
                    tooltip="What stands on the floor as convex parts in world.usdz and world.xml, for engines that take a mesh for "
                    "its convex hull; half a minute. Off: the triangles, and boxes in world.xml. Needs coacd: pip install coacd.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="folder"),
                io.String.Output(display_name="report"),
                io.File3DPLY.Output(display_name="splat_file", tooltip="splat.ply on disk."),
                io.File3DGLB.Output(display_name="mesh_file", tooltip="mesh.glb on disk."),
            ],
        )

    @classmethod
    def execute(
        cls, folder, usd, colmap, web, video, geometry_model, collision_faces, metres_per_unit, fps, every,
        ground=MappingProxyType({"ground": "as seen"}), convex_parts=False, splat=None, mesh=None, world=None, cameras=None, images=None,
    ) -> io.NodeOutput:  # fmt: skip
        path = types.output_folder(folder)
        wanted = _wanted(ground, metres_per_unit)
        sources = replace(_sources(splat, mesh, world, cameras, images, collision_faces), wanted=wanted, convex=convex_parts)
        steps = _steps(sources, usd, colmap, web, video, metres_per_unit, fps, every)
        terms = bundle.licences(None if world is None else _generators(world), geometry_model)
        size = None if sources.gaussians is None else bundle.spread(sources.gaussians.means)
        with bundle.writing(path) as place:
            facts, skipped = _write(place, steps)
            found = sources.walkable
            level = None if isinstance(found, str) else found.ground.level
            text = bundle.readme(place, path.name, facts, skipped, terms, metres_per_unit, size, sources.origin, level)
            (place / "README.md").write_text(text, encoding="utf-8")
        report = bundle.report(path, facts, skipped, terms)
        return io.NodeOutput(
            folder, report, _file(path / "splat.ply"), _file(path / "mesh.glb"), ui=_shown(path, folder, report)
        )


# ------------------------------------------------------------------------------------------------------------ what goes in


def _wanted(ground: dict, metres_per_unit: float) -> Wanted | None:
    if ground["ground"] == "as seen":
        return None
    return Wanted(*(ground[name] for name in ("margin", "radius", "height", "step")), metres_per_unit)


def _sources(splat, mesh, world: World | None, cameras: Cameras | None, images, collision_faces: int) -> Sources:
    if splat is None and mesh is None and world is None and cameras is None and images is None:
        raise ValueError("nothing is connected to export; connect a splat, a mesh, a world, cameras or images")
    if cameras is None and world is not None:
        cameras = world.cameras
    picture, pictures = None, 0
    if images is not None:
        images = types.colour(images)
        picture, pictures, size = lambda frame: to_uint8(images[frame]), len(images), tuple(images.shape[1:3])
    elif world is not None:
        picture, pictures, size = world.frame, len(world), world.size
    if cameras is not None:
        check(cameras)
        if picture is not None and pictures != len(cameras):
            raise ValueError(
                f"{len(cameras)} cameras but {pictures} pictures; connect the images that these cameras see, one for each"
            )
        if picture is not None and size != tuple(cameras.size):
            raise ValueError(
                f"the pictures are {size[1]}x{size[0]} and the cameras' {cameras.size[1]}x{cameras.size[0]}; resize the pictures"
            )
    gaussians, broken = (None, "") if splat is None else sound_splat(splat)
    if gaussians is not None:
        gaussians = gaussians.to("cpu")
    origin = (0.0, 0.0, 0.0) if cameras is None else cameras.origin
    # splats and meshes are near the origin, so in a folder of files that fit onto each other the cameras are too
    cameras = cameras and replace(cameras, origin=(0.0, 0.0, 0.0))
    left_out = f", {broken} left out" if broken else ""
    return Sources(gaussians, left_out, mesh, cameras, picture, pictures, origin, collision_faces)


def _generators(world: World) -> list[str]:
    """What made the chunks, each once."""
    return list(dict.fromkeys(str(chunk.settings.get("generator", "unknown")) for chunk in world.chunks))


# ------------------------------------------------------------------------------------------------------------- what comes out


def _steps(
    sources: Sources, usd: bool, colmap: bool, web: bool, video: bool, metres_per_unit: float, fps: float, every: int
) -> list[Step]:
    """Every file there could be, in the order of the README; the optional packages that they need are there."""
    gaussians, mesh, cameras = sources.gaussians, sources.mesh, sources.cameras
    no_splat = "" if gaussians is not None else "no splat was connected"
    no_mesh = "" if mesh is not None else "no mesh was connected"
    no_cameras = "" if cameras is not None else "neither cameras nor a world were connected"
    no_pictures = "" if sources.picture is not None else "neither images nor a world were connected"
    nothing = (
        "" if gaussians is not None or mesh is not None or cameras is not None else "there is nothing to put in it"
    )
    if usd and not nothing:
        _required(usd_files.require, "usd")
    if sources.convex and mesh is not None:
        _required(parts.require, "convex_parts")

    found = sources.walkable
    no_ground = found if isinstance(found, str) else ""
    invented = None if no_ground else found.ground.mesh()

    def off(wanted: bool, name: str) -> str:
        return "" if wanted else f"`{name}` was switched off"

    def write_usd(file: Path, on_picture: Callable) -> str:
        save = usd_files.save_usdz if file.suffix == ".usdz" else usd_files.save_usdc
        standing = None if no_ground else found
        save(
            file, gaussians, sources.collision, cameras, found=standing, parts=sources.parts, fps=fps, metres_per_unit=metres_per_unit
        )
        held = (gaussians, f"gaussians{sources.left_out}"), (sources.collision, "faces"), (sources.parts, "convex parts")
        held += (cameras, "cameras"), (invented, "faces of ground"), (standing and standing.places, "places to begin at")
        return "; ".join(_counted(part, name) for part, name in held if part is not None)

    def write_mjcf(file: Path, on_picture: Callable) -> str:
        return mjcf_files.save(found, sources.wanted.body, file, metres_per_unit, sources.parts)

    libraries = _libraries() if web and gaussians is not None and cameras is not None else ""
    no_page = libraries if isinstance(libraries, str) else ""

    def write_viewer(folder: Path, on_picture: Callable) -> str:
        radius = 0.0 if no_ground else sources.wanted.body.radius
        return viewer_files.save(folder, libraries, cameras, None if no_ground else found, radius, metres_per_unit)

    def write_colmap(file: Path, on_picture: Callable) -> str:
        count = bundle.save_colmap(file.parent, cameras, sources.picture, every, gaussians, on_picture)
        return f"{count:,} pictures of {cameras.size[1]}x{cameras.size[0]}"

    def write_video(file: Path, on_picture: Callable) -> str:
        return _save_video(file, (sources.picture(frame) for frame in range(sources.pictures)), fps, on_picture)

    def of_gaussians(save: Callable) -> Callable[[Path, Callable], str]:
        return lambda file, on_picture: save(gaussians, file) or _counted(gaussians, f"gaussians{sources.left_out}")

    def of_cameras(save: Callable) -> Callable[[Path, Callable], str]:
        return lambda file, on_picture: save(file) or _counted(cameras, "cameras")

    # also makes the collision mesh, so that what it lacks is said before anything is written
    fits = usd_files.size_of(gaussians, sources.collision) <= usd_files.LARGEST_PACKAGE
    return [
        Step("splat.ply", no_splat, of_gaussians(splat_files.save_ply)),
        Step("splat.spz", off(web, "web") or no_splat, of_gaussians(splat_files.save_spz)),
        Step("splat.splat", off(web, "web") or no_splat, of_gaussians(splat_files.save_splat)),
        Step("viewer", off(web, "web") or no_splat or no_cameras or no_page, write_viewer),
        Step("points.ply", no_splat, of_gaussians(lambda g, file: splat_files.save_points(g.means, g.colors, file))),
        Step("mesh.glb", no_mesh, lambda file, _: _save_mesh(file, mesh)),
        Step("collision.glb", no_mesh, lambda file, _: _save_collision(file, sources.collision)),
        Step("ground.glb", no_ground, lambda file, _: _save_collision(file, invented)),
        Step("world.xml", no_ground, write_mjcf),
        Step("map", no_ground, lambda file, _: _save_map(file, found, metres_per_unit)),
        Step("world.usdz" if fits else bundle.LAYER, off(usd, "usd") or nothing, write_usd),
        Step("cameras.npz", no_cameras, of_cameras(lambda file: camera_files.save_npz(file, cameras))),
        Step(
            "camera_path.json",
            no_cameras,
            of_cameras(lambda file: camera_files.save_camera_path(file, path_of(cameras))),
        ),
        Step("colmap", off(colmap, "colmap") or no_cameras or no_pictures, write_colmap),
        Step("flythrough.mp4", off(video, "video") or no_pictures, write_video),
    ]


def _libraries() -> dict[str, str] | str:
    """three.js and spark out of the host's own frontend, or why they are not to be had."""
    server = types.running_server()
    if server is None:
        return "its page needs three.js and spark of ComfyUI's frontend, and no server is running"
    try:
        return web_libraries.extract(web_libraries.find(Path(server.web_root), VENDOR))
    except web_libraries.LibraryError as reason:
        return str(reason)


def _required(require: Callable, option: str) -> None:
    try:
        require()
    except ImportError as error:
        raise ImportError(f"{error}; or switch `{option}` off") from error


def _write(place: Path, steps: list[Step]) -> tuple[dict[str, str], dict[str, str]]:
    """What is in each file that was written, and why each other one was not."""
    wanted = [step for step in steps if not step.lacking]
    on_step, facts = types.progress(len(wanted)), {}
    for done, step in enumerate(wanted):
        on_step(done, len(wanted))
        facts[step.name] = step.write(place / step.name, lambda picture, done=done: on_step(done, len(wanted), picture))
        if not (place / step.name).exists() or not (place / step.name).stat().st_size:
            raise ValueError(f"{step.name} was not written, and nothing said why; what was there before is unchanged")
    on_step(len(wanted), len(wanted))
    return facts, {step.name: step.lacking for step in steps if step.lacking}


def _counted(things, name: str) -> str:
    return f"{len(things):,} {name}"


def _save_mesh(file: Path, mesh: Types.MESH) -> str:
    """The host's mesh as it is, with all that it carries."""
    vertices, faces, colors, uvs = get_mesh_batch_item(mesh, 0)
    texture = None if mesh.texture is None else Image.fromarray(to_uint8(mesh.texture[0].cpu()).numpy())
    save_glb(vertices, faces, str(file), None, uvs, colors, texture, mesh.unlit)
    return f"{_counted(vertices, 'vertices')}, {_counted(faces, 'faces')}"


def _save_collision(file: Path, mesh: surface.Mesh) -> str:
    vertices, faces, *_ = get_mesh_batch_item(meshes.to_mesh(mesh), 0)
    save_glb(vertices, faces, str(file))
    return _counted(faces, "faces")


def _save_map(folder: Path, found: walkable.Walkable, metres_per_unit: float) -> str:
    folder.mkdir()
    walkable.save(found, folder, metres_per_unit)
    rows, columns = found.state.shape
    return f"{columns}x{rows} cells of {metres_per_unit * found.ground.cell:.3g} m, {found.reachable.mean():.0%} of them within reach"


def _save_video(file: Path, pictures, fps: float, on_picture: Callable) -> str:
    rate = Fraction(fps).limit_denominator(1000)
    return f"{(count := encode(str(file), pictures, rate, crf=18, on_frame=on_picture)):,} frames, {count / fps:.3g} s"


def _file(path: Path) -> Types.File3D | ExecutionBlocker:
    """A file on disk, not read; where there is none, whoever wants it is told so."""
    return Types.File3D(str(path)) if path.is_file() else ExecutionBlocker(f"the export has no {path.name}")


def _shown(path: Path, folder: str, report: str) -> dict:
    shown = {"text": (report,)}
    if (path / "flythrough.mp4").is_file():
        video = {"filename": "flythrough.mp4", "subfolder": folder, "type": "output"}
        shown |= {"images": [video], "animated": (True,)}
    return shown
