"""The surface of a world as a mesh: for collisions, for other programs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from comfy.model_management import get_torch_device, intermediate_device
from comfy_api.latest import Types, io

from ..lyra_core.cameras.camera import AXES_FLIP, Cameras
from ..lyra_core.exports import mesh_views, surface, tsdf
from ..lyra_core.memory import depth as depths
from ..lyra_core.world.world import World
from . import types
from .node import Node
from .splat import on_device, world_views


def to_mesh(mesh: surface.Mesh) -> Types.MESH:
    """The host's MESH: a batch of one in glTF axes (y up, z towards the viewer); unlit, as the colours are of photos.

    The change of axes is half a turn, so faces keep their side. Colours are in linear light there, as glTF wants them.
    """
    return Types.MESH(
        mesh.vertices[None] * mesh.vertices.new_tensor(AXES_FLIP),
        mesh.faces[None],
        vertex_colors=_linear(mesh.colors)[None],
        unlit=True,
    )


def from_mesh(mesh: Types.MESH) -> surface.Mesh:
    """The host's MESH, which may hold only one item, in OpenCV axes and without padding; grey where it has no colours."""
    if len(mesh.vertices) != 1:
        raise ValueError(f"this mesh is a batch of {len(mesh.vertices)}; connect one of them")
    vertices, faces = mesh.vertices[0].float(), mesh.faces[0].long()
    if mesh.vertex_counts is not None:
        vertices, faces = vertices[: int(mesh.vertex_counts[0])], faces[: int(mesh.face_counts[0])]
    if not len(vertices) or not len(faces):
        raise ValueError("this mesh is empty; it has no faces")
    if broken := int((~torch.isfinite(vertices).all(1)).sum()):
        raise ValueError(f"{broken:,} of {len(vertices):,} vertices of this mesh are NaN or infinite; make or load it again")
    if int(faces.min()) < 0 or int(faces.max()) >= len(vertices):
        raise ValueError(
            f"faces of this mesh name vertices {int(faces.min())} to {int(faces.max())}, and it has {len(vertices):,}; load it again"
        )
    colors = torch.full_like(vertices, 0.5)
    if mesh.vertex_colors is not None:
        colors = _displayed(mesh.vertex_colors[0, : len(vertices), :3].float().clamp(0, 1))
    return surface.Mesh(vertices * vertices.new_tensor(AXES_FLIP), faces, colors)


def texture_of(mesh: Types.MESH) -> mesh_views.Texture | None:
    """What is painted on the host's MESH, if anything is; its colours of vertices don't count then."""
    if mesh.texture is None or mesh.uvs is None:
        return None
    return mesh_views.Texture(mesh.texture[0, ..., :3].float(), mesh.uvs[0].float())


def _linear(colors: torch.Tensor) -> torch.Tensor:
    """Linear light of sRGB colours in 0..1."""
    return torch.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)


def _displayed(light: torch.Tensor) -> torch.Tensor:
    """sRGB colours of linear light in 0..1."""
    return torch.where(light <= 0.0031308, 12.92 * light, 1.055 * light.clamp_min(1e-9) ** (1 / 2.4) - 0.055)


class WorldMesh(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lyra2WorldMesh",
            display_name="Lyra 2 World Mesh",
            category=types.CATEGORY,
            description="The surface of a world as a coloured mesh, fused from the depths of all its keyframes. Connect a world, or "
            "pictures with their cameras and depth. Save it with Save 3D Model.",
            inputs=[
                types.World.Input("world", optional=True),
                io.Image.Input("images", optional=True, tooltip="Instead of a world, together with cameras and depth."),
                types.Cameras.Input("cameras", optional=True, tooltip="Where each of the pictures was taken."),
                types.Depth.Input("depth", optional=True, tooltip="One per picture, all of one scale."),
                io.Float.Input(
                    "voxel",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.001,
                    round=False,
                    tooltip="Size of the smallest detail in scene units. Larger is coarser and faster. 0: automatic, two pixels of "
                    "the photo, more where that would take too much memory.",
                ),
                io.Boolean.Input(
                    "invented", default=True, tooltip="Also what the preview made up. Off: only what the photo shows."
                ),
                io.Float.Input(
                    "farthest",
                    default=tsdf.FARTHEST,
                    min=1.0,
                    max=1000.0,
                    step=0.5,
                    advanced=True,
                    tooltip="What lies farther than this many times the middle depth of its picture is left out: sky and far "
                    "hills, of which one photo tells little.",
                ),
                io.Int.Input(
                    "smallest",
                    default=surface.SMALLEST,
                    min=0,
                    max=10_000_000,
                    advanced=True,
                    tooltip="Loose pieces of fewer faces than this are left out.",
                ),
            ],
            outputs=[io.Mesh.Output(display_name="mesh"), io.String.Output(display_name="report")],
        )

    @classmethod
    def execute(
        cls,
        voxel=0.0,
        invented=True,
        farthest=tsdf.FARTHEST,
        smallest=surface.SMALLEST,
        world=None,
        images=None,
        cameras=None,
        depth=None,
    ) -> io.NodeOutput:
        views = _views_of(world, images, cameras, depth, invented)
        volume = tsdf.fuse(on_device(views, get_torch_device()), voxel or None, farthest=farthest)
        mesh = surface.extract(volume, smallest, types.progress()).to(intermediate_device())
        return io.NodeOutput(to_mesh(mesh), _report(mesh, volume))


def _views_of(
    world: World | None, images: torch.Tensor | None, cameras: Cameras | None, depth: tuple | None, invented: bool
) -> Iterator[tuple]:
    """Views of the one source that is connected; ValueError for none, both, or an incomplete one."""
    parts = {"images": images, "cameras": cameras, "depth": depth}
    given = [name for name, part in parts.items() if part is not None]
    if world is not None and not given:
        return world_views(world, invented)
    if world is None and len(given) == len(parts):
        return _posed_views(types.colour(images), cameras, depth)
    if world is not None:
        raise ValueError(f"a world and {', '.join(given)} are connected; a mesh is made of one or the other")
    raise ValueError(
        f"connect a world, or images, cameras and depth together; found {', '.join(given) or 'nothing connected'}"
    )


def _posed_views(images: torch.Tensor, cameras: Cameras, depth: tuple) -> Iterator[tuple]:
    """One view per picture; its camera says where it was taken, in the picture's own pixels."""
    if not len(images) == len(cameras) == len(depth):
        raise ValueError(
            f"{len(images)} pictures, {len(cameras)} cameras and {len(depth)} depths are not one view each; make the depth "
            "from the same pictures and give the cameras they were taken from, or connect the world that they are frames of"
        )

    def views() -> Iterator[tuple]:
        size, on_step = tuple(images.shape[1:3]), types.progress(len(images))
        for index, image in enumerate(images):
            yield image, depths.resized(depth[index], size).depth, cameras[index].resized(size)
            on_step(index + 1, len(images), (image.clamp(0, 1) * 255).to(torch.uint8))

    return views()


def _report(mesh: surface.Mesh, volume: tsdf.Volume) -> str:
    across, down, along = mesh.extent.tolist()
    return (
        f"{len(mesh)} faces, {len(mesh.vertices)} vertices, voxels of {volume.voxel:.4g} in {len(volume)} blocks; "
        f"{across:.4g} wide, {down:.4g} high, {along:.4g} deep (scene units)"
    )
