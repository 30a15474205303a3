"""Depth of one view: from the host's estimators, from a picture, or laid out by hand without any weights.

Depth is along z in scene units; 0 means unknown. Sky, invalid and non-finite pixels are unknown, whatever they came from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cameras.camera import Cameras, from_normalized, pinhole, pixel_grid


@dataclass(frozen=True)
class DepthMap:
    """How far the surfaces in one picture are."""

    depth: Tensor  # (H, W) along z, scene units, 0 = unknown
    K: Tensor  # (3, 3) pixels of this map, integer centres
    source: str  # where it came from, for people

    @property
    def size(self) -> tuple[int, int]:
        return tuple(self.depth.shape)

    @property
    def camera(self) -> Cameras:
        """The camera of this view, standing at the world's origin."""
        return Cameras(torch.eye(4)[None], self.K[None].float().cpu(), self.size)


def depth_map(depth: Tensor, K: Tensor, source: str) -> DepthMap:
    """A DepthMap from raw numbers (H, W): whatever is not a positive finite depth becomes unknown.

    ValueError if nothing is left, or if K is not a usable (3, 3).
    """
    if depth.ndim != 2 or min(depth.shape) < 2:
        raise ValueError(
            f"{source}: a depth map must be (height, width) with at least 2 pixels a side, found {tuple(depth.shape)}"
        )
    if K.shape != (3, 3) or not torch.isfinite(K).all() or K[0, 0] <= 0 or K[1, 1] <= 0:
        raise ValueError(f"{source}: unusable intrinsics {K.tolist()}; focal lengths must be positive")
    depth = depth.detach().float().cpu()
    depth = torch.where(torch.isfinite(depth) & (depth > 0), depth, 0.0)
    if not (depth > 0).any():
        raise ValueError(f"{source}: no pixel has a positive finite depth")
    return DepthMap(depth, K.detach().float().cpu(), source)


def resized(depth: DepthMap, size: tuple[int, int]) -> DepthMap:
    """The map stretched to `size`; nearest neighbour, so that nothing floats between foreground and background."""
    if depth.size == size:
        return depth
    K = depth.camera.resized(size).K[0]
    return DepthMap(F.interpolate(depth.depth[None, None], size, mode="nearest-exact")[0, 0], K, depth.source)


def sharpened(depth: Tensor, jump: float = 0.05) -> Tensor:
    """(H, W) without the pixels that float between foreground and background: each joins the nearer of its two sides.

    Depth estimators blur silhouettes. A pixel counts as floating where disparity bends by more than `jump` of itself (a
    slanted plane has straight disparity, however steep) and the 5x5 window spans more than that.
    """
    known = depth > 0
    disparity = torch.where(known, 1 / depth.clamp_min(1e-12), 0.0)
    # at the border there is no other side to compare with, so nothing bends there
    across, down = (disparity.diff(n=2, dim=dim).abs() for dim in (1, 0))
    bend = torch.maximum(F.pad(across, (1, 1)), F.pad(down, (0, 0, 1, 1)))
    floating = known & (F.max_pool2d((bend > jump * disparity).float()[None, None], 3, 1, 1)[0, 0] > 0)
    near = F.max_pool2d(disparity[None, None], 5, 1, 2)[0, 0]
    far = -F.max_pool2d(-torch.where(known, disparity, float("inf"))[None, None], 5, 1, 2)[0, 0]
    floating &= near - far > jump * near
    side = torch.where(near - disparity < disparity - far, near, far)
    return torch.where(floating, 1 / side.clamp_min(1e-12), depth)


# ---------------------------------------------------------------------------------------------------- without weights


def focal_from_fov(size: tuple[int, int], horizontal_fov: float) -> float:
    """Focal length in pixels of a picture `size` wide by `horizontal_fov` degrees."""
    if not 1 <= horizontal_fov <= 170:
        raise ValueError(f"a horizontal field of view of {horizontal_fov} degrees can't be; use 1 to 170")
    return 0.5 * size[1] / float(torch.tan(torch.deg2rad(torch.tensor(horizontal_fov / 2))))


def _rays(size: tuple[int, int], K: Tensor) -> Tensor:
    return pixel_grid(size) @ torch.linalg.inv(K).T  # (H, W, 3), z = 1


def plane(size: tuple[int, int], K: Tensor, distance: float) -> DepthMap:
    """One wall facing the camera, `distance` scene units away."""
    return depth_map(torch.full(size, float(distance)), K, f"plane at {distance:g}")


def ground(size: tuple[int, int], K: Tensor, horizon: float, camera_height: float, distance: float) -> DepthMap:
    """A ground plane that meets a vertical backdrop.

    horizon: its height in the picture, 0 top to 1 bottom; camera_height above the ground and distance of the backdrop in
    scene units.
    """
    rays = _rays(size, K)
    _, level = _axes_through(K, (K[0, 2].item(), horizon * (size[0] - 1)))
    down, ahead = rays @ level[1], rays @ level[2]
    scale = torch.where(down > 0, camera_height / down.clamp_min(1e-9), float("inf"))
    scale = torch.minimum(scale, distance / ahead.clamp_min(1e-3))
    return depth_map(scale, K, f"ground, horizon at {horizon:g}")


def room_box(
    size: tuple[int, int],
    K: Tensor,
    vanishing_point: tuple[float, float],
    back_wall: tuple[float, float, float, float],
    distance: float,
) -> DepthMap:
    """The inside of a box: floor, ceiling, two side walls and a back wall.

    vanishing_point: (x, y) where the room's long edges meet; back_wall: (left, top, right, bottom) of the far wall; all in
    fractions of the picture. distance of the back wall in scene units. ValueError if the wall does not contain the point.
    """
    (vx, vy), (left, top, right, bottom) = vanishing_point, back_wall
    if not (left < vx < right and top < vy < bottom):
        raise ValueError(
            f"the vanishing point ({vx:g}, {vy:g}) must lie inside the back wall, which spans x {left:g} to "
            f"{right:g} and y {top:g} to {bottom:g}"
        )
    height, width = size
    _, axes = _axes_through(K, (vx * (width - 1), vy * (height - 1)))
    inverse = torch.linalg.inv(K)

    def offset(x: float, y: float, axis: int) -> Tensor:
        ray = axes @ (inverse @ torch.tensor([x * (width - 1), y * (height - 1), 1.0]))
        return distance * ray[axis] / ray[2]

    rays = _rays(size, K) @ axes.T
    x, y, z = rays.unbind(-1)
    walls = [distance / z.clamp_min(1e-6)]
    for axis, component, (low, high) in ((0, x, ((left, vy), (right, vy))), (1, y, ((vx, top), (vx, bottom)))):
        reach = torch.where(component > 0, offset(*high, axis), offset(*low, axis))
        walls.append(torch.where(component.abs() > 1e-9, reach / component, float("inf")))
    nearest = torch.stack(walls).amin(0)
    return depth_map(nearest, K, f"room box, back wall at {distance:g}")


def _axes_through(K: Tensor, pixel: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Direction (3,) through a pixel, and axes (3, 3; rows right, down, ahead) of a level frame that looks along it."""
    ahead = F.normalize(torch.linalg.inv(K) @ torch.tensor([*pixel, 1.0]), dim=0)
    right = F.normalize(torch.linalg.cross(torch.tensor([0.0, 1.0, 0.0]), ahead), dim=0)
    return ahead, torch.stack([right, torch.linalg.cross(ahead, right), ahead])


def from_picture(picture: Tensor, K: Tensor, kind: str, near: float, far: float) -> DepthMap:
    """A depth picture (H, W) or (H, W, C) with values 0..1.

    kind 'disparity': white is `near`, black is `far`, 1/depth in between (Depth Anything, MiDaS, ControlNet pictures);
    'linear': black is `near`, white is `far`; 'metric': the value is the depth in units of `far`, black is unknown.
    """
    value = picture.float() if picture.ndim == 2 else picture[..., :3].float().mean(-1)
    if kind not in ("disparity", "linear", "metric"):
        raise ValueError(f"kind {kind!r}: expected 'disparity', 'linear' or 'metric'")
    if not 0 < near < far:
        raise ValueError(f"near {near:g} and far {far:g}: expected 0 < near < far, in scene units")
    depth = {
        "disparity": 1 / (1 / far + value.clamp(0, 1) * (1 / near - 1 / far)),
        "linear": near + value.clamp(0, 1) * (far - near),
        "metric": value * far,
    }[kind]
    return depth_map(depth, K, f"{kind} picture")


# ------------------------------------------------------------------------------------------- the host's own estimators


def from_moge(geometry: dict, index: int = 0) -> DepthMap:
    """From the host's MOGE_GEOMETRY: depth (B, H, W), intrinsics (B, 3, 3) in units of the picture, mask (B, H, W)."""
    if "intrinsics" not in geometry:
        raise ValueError(
            "this MOGE_GEOMETRY has no intrinsics (a panorama?); use MoGeInference, which gives a perspective view"
        )
    depth = _pick(geometry, "depth", index, "MOGE_GEOMETRY")
    if "mask" in geometry:
        depth = torch.where(_pick(geometry, "mask", index, "MOGE_GEOMETRY").bool(), depth, 0.0)
    K = from_normalized(_pick(geometry, "intrinsics", index, "MOGE_GEOMETRY").float().cpu(), tuple(depth.shape))
    return depth_map(depth, K, "MoGe")


def from_da3(geometry: dict, index: int = 0, horizontal_fov: float = 60.0) -> DepthMap:
    """From the host's DA3_GEOMETRY: depth (B, H, W), sky probability (B, H, W), intrinsics (1, B, 3, 3) in pixels.

    Its monocular models give no intrinsics; then `horizontal_fov` degrees is assumed.
    """
    depth = _pick(geometry, "depth", index, "DA3_GEOMETRY")
    if "sky" in geometry:
        depth = torch.where(_pick(geometry, "sky", index, "DA3_GEOMETRY") < 0.5, depth, 0.0)
    if "intrinsics" in geometry:
        return depth_map(depth, geometry["intrinsics"][0, index].float().cpu(), "Depth Anything 3")
    size = tuple(depth.shape)
    return depth_map(
        depth,
        pinhole(size, focal_from_fov(size, horizontal_fov)).K[0],
        f"Depth Anything 3, field of view of {horizontal_fov:g} degrees assumed",
    )


def _pick(geometry: dict, key: str, index: int, kind: str) -> Tensor:
    if key not in geometry:
        raise ValueError(f"this {kind} has no {key!r}, only {sorted(geometry)}")
    if not 0 <= index < len(geometry[key]):
        raise ValueError(f"this {kind} holds {len(geometry[key])} views; there is no view {index}")
    return geometry[key][index]
