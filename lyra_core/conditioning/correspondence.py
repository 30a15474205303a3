"""What guides the transformer, as maps on the latent grid.

Correspondences: which pixel of a retrieved frame lands where in the new views. Rays: where each pixel looks from and
to, seen from the newest frame.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cameras.camera import Cameras, join, pixel_grid
from ..memory.retrieval import Keyframe
from ..memory.warp import lift, splat_views
from .framepack import LATENT_FRAMES, FramePackLayout
from .history import SLOT_CHANNELS, Guides

LATENT_PIXELS = 8  # a latent stands for 8x8 pixels


def canonical_coordinates(size: tuple[int, int], slot: int, slots: int = 5, device=None) -> Tensor:
    """The map (H, W, 3) that identifies the pixels of the frame in history slot `slot`: x, y and slot, each in [-1, 1]."""
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, size[0], device=device), torch.linspace(-1, 1, size[1], device=device), indexing="ij"
    )
    return torch.stack([x, y, torch.full_like(x, float(torch.linspace(-1, 1, slots)[slot]))], -1)


def ray_maps(cameras: Cameras, reference: Cameras) -> Tensor:
    """(6, F, H, W) ray origins and unit directions of every pixel, in the frame of the one camera `reference`.

    Origins in scene units; not a moment in Pluecker's sense, although the reference calls it so. Its rays pass half a
    pixel right of and below the point that its warps take for a pixel's centre, and the weights know them so.
    """
    return _ray_maps(cameras, reference.w2c @ cameras.c2w)


def _ray_maps(cameras: Cameras, c2w: Tensor) -> Tensor:
    pixels = pixel_grid(cameras.size, cameras.K.device)
    pixels = pixels + pixels.new_tensor([0.5, 0.5, 0.0])
    local = pixels.to(cameras.K) @ cameras.K_inverse.mT[:, None]
    directions = F.normalize(local, dim=-1) @ c2w[:, None, :3, :3].mT
    origins = c2w[:, None, None, :3, 3].expand_as(directions)
    return torch.cat([origins, directions], -1).movedim(-1, 0)


def on_latents(maps: Tensor) -> Tensor:
    """(C, F, H, W) -> (64 C, F, H / 8, W / 8): the 8x8 pixels of a latent become its channels, rows before columns."""
    return F.pixel_unshuffle(maps.movedim(1, 0), LATENT_PIXELS).movedim(0, 1)


def guides(layout: FramePackLayout, retrieved: Sequence[Keyframe], history: Cameras, target: Cameras) -> Guides:
    """What guides one chunk.

    `retrieved` keyframes, the best one last; `history`: the cameras of all slots' frames in their order, the newest
    frame's last; `target`: the cameras of the new frames, of which every latent shows its last. On the target's device.
    """
    history = history.to(target.w2c.device)
    cameras = join(history, target[LATENT_FRAMES - 1 :: LATENT_FRAMES])
    c2w = cameras.c2w  # all at once: a GPU waits for it
    rays = torch.cat([on_latents(_ray_maps(cameras[i], history[-1].w2c @ c2w[i : i + 1])) for i in range(len(cameras))], 1)
    seen = [canonical_history(layout, target.size, target.w2c.device), warped_correspondences(layout, retrieved, target)]
    return Guides(rays, torch.cat(seen, 1))


def canonical_history(layout: FramePackLayout, size: tuple[int, int], device=None) -> Tensor:
    """(SLOT_CHANNELS per spatial slot, spatial slots, h, w): each spatial slot's own pixels, as near as can be.

    The block of the best correspondence says -1 for depth, the others +1; all repeat the slot's own coordinates.
    """
    slots = layout.slots("spatial")
    return torch.cat(
        [
            torch.cat(
                [
                    on_latents(_with_depth(canonical_coordinates(size, slot, slots, device), depth))
                    for depth in (-1.0, *[1.0] * (slots - 1))
                ]
            )
            for slot in range(slots)
        ],
        1,
    )


def _with_depth(coordinates: Tensor, depth: float) -> Tensor:
    """(4, 1, H, W) maps of coordinates (H, W, 3) and one depth."""
    return torch.cat([coordinates, torch.full_like(coordinates[..., :1], depth)], -1).movedim(-1, 0)[:, None]


def warped_correspondences(layout: FramePackLayout, retrieved: Sequence[Keyframe], target: Cameras) -> Tensor:
    """(SLOT_CHANNELS per spatial slot, new latents, h, w): where the retrieved frames' pixels land in the new views.

    Each frame's canonical coordinates and depth are warped there; the best frame's block comes first. Holes are -1, and so
    is the depth nearest to the camera; the farthest that any frame has in any view is +1. Missing frames are far holes.
    """
    slots, size = layout.slots("spatial"), target.size
    height, width = (side // LATENT_PIXELS for side in size)
    maps = torch.full((slots, SLOT_CHANNELS, layout.new_latents, height, width), -1.0, device=target.w2c.device)
    depths = SLOT_CHANNELS * 3 // 4  # the channels after the coordinates'
    extremes: list[Tensor] = []
    for block, keyframe in enumerate(reversed(retrieved)):
        coordinates = canonical_coordinates(size, slots - 1 - block, slots, target.w2c.device)
        depth = keyframe.depth.to(target.w2c.device)
        points = lift(depth, keyframe.camera.to(target.w2c.device), coordinates)
        for frame, view in enumerate(splat_views(points, target, features_of=_ends_a_latent)):
            extremes.append(torch.stack(view.depth.aminmax()))
            if _ends_a_latent(frame):
                seen = torch.where(view.seen[..., None], view.features.clamp(-1, 1), -1.0)
                both = torch.cat([seen, view.depth[..., None]], -1).movedim(-1, 0)
                maps[block, :, frame // LATENT_FRAMES] = on_latents(both)[:, 0]
    if extremes:
        near, far = torch.stack(extremes)[:, 0].min(), torch.stack(extremes)[:, 1].max().clamp_min(0)
        known = maps[: len(retrieved), depths:]
        known.copy_(2 * (known - near) / (far - near).clamp_min(1e-6) - 1)
    maps[len(retrieved) :, depths:] = 1.0
    return maps.flatten(0, 1)


def _ends_a_latent(frame: int) -> bool:
    return (frame + 1) % LATENT_FRAMES == 0
