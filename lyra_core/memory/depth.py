"""Depth of one view: from the host's estimators, from a picture, or laid out by hand without any weights.

Depth is along z in scene units; 0 means unknown. Sky, invalid and non-finite pixels are unknown, whatever they came from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cameras.camera import Cameras, check, check_lens, from_normalized, pinhole, pixel_grid
from .resampling import PATCH, whole_patches

METRIC_FOCAL = 300.0  # pixels, of the camera that Depth Anything 3 Metric gives its depth for
STRETCH = 0.05  # by how much two pictures of one thing may differ in shape: sides are rounded to patches and sixteens
CLIPPED = 0.02  # share of a metric picture's pixels at exactly 1 from which on they count as cut off
FEW = 12  # different values of a metric picture below which it can't be one


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

    ValueError if nothing is left, or if K is no (3, 3) or that of no picture of this size.
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
    found = DepthMap(depth, K.detach().float().cpu(), source)
    check_lens(found.camera, source)
    return found


def onto(values: Tensor, size: tuple[int, int]) -> Tensor:
    """(H, W) or (H, W, C) of the whole picture at its pixels `size`, whatever shape it was squeezed to.

    Nearest neighbour, so that nothing floats between foreground and background.
    """
    if tuple(values.shape[:2]) == size:
        return values
    planes = values.reshape(*values.shape[:2], -1).movedim(-1, 0)[None]
    return F.interpolate(planes, size, mode="nearest-exact")[0].movedim(0, -1).reshape(*size, *values.shape[2:])


def same_shape(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether pictures of these sizes show the same without one of them being stretched or cropped."""
    ratio = a[0] * b[1] / (a[1] * b[0])
    return max(ratio, 1 / ratio) <= 1 + STRETCH


def lens(cameras: Cameras, size: tuple[int, int]) -> Tensor:
    """K (3, 3) of the first camera for a photo of `size`; ValueError if that has another shape than the camera's picture."""
    if not same_shape(cameras.size, size):
        raise ValueError(
            f"the cameras are those of pictures {cameras.size[1]} wide and {cameras.size[0]} high, the photo is "
            f"{size[1]} x {size[0]}: another shape. Load the cameras at the photo's size, or crop the photo to theirs"
        )
    return check_lens(cameras[0].resized(size), "the cameras").K[0]


def assumed_lens(size: tuple[int, int], horizontal_fov: float) -> Tensor:
    """K (3, 3) of a photo `size` of square pixels, `horizontal_fov` degrees wide, with its middle in the middle."""
    return pinhole(size, focal_from_fov(size, horizontal_fov)).K[0]


def with_median(maps: tuple[DepthMap, ...], median: float) -> tuple[DepthMap, ...]:
    """The maps, all by one factor nearer or farther, so that half of what is known is beyond `median` scene units."""
    known = torch.cat([found.depth[found.depth > 0] for found in maps])
    factor = median / float(known.median())
    return tuple(DepthMap(m.depth * factor, m.K, f"{m.source}; times {factor:.4g}") for m in maps)


def resized(depth: DepthMap, size: tuple[int, int]) -> DepthMap:
    """The map stretched to `size` with its lens; nearest neighbour as `onto`."""
    if depth.size == size:
        return depth
    return DepthMap(onto(depth.depth, size), depth.camera.resized(size).K[0], depth.source)


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


def rays(size: tuple[int, int], K: Tensor) -> Tensor:
    """Directions (H, W, 3) through the pixels, with z = 1."""
    return pixel_grid(size, K.device) @ torch.linalg.inv(K).T


def plane(size: tuple[int, int], K: Tensor, distance: float) -> DepthMap:
    """One wall facing the camera, `distance` scene units away."""
    return depth_map(torch.full(size, float(distance)), K, f"plane at {distance:g}")


def ground(size: tuple[int, int], K: Tensor, horizon: float, camera_height: float, distance: float) -> DepthMap:
    """A ground plane that meets a vertical backdrop.

    horizon: its height in the picture, 0 top to 1 bottom; camera_height above the ground and distance of the backdrop in
    scene units.
    """
    seen = rays(size, K)
    _, level = axes_through(K, (K[0, 2].item(), horizon * (size[0] - 1)))
    down, ahead = seen @ level[1], seen @ level[2]
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
    _, axes = axes_through(K, (vx * (width - 1), vy * (height - 1)))
    inverse = torch.linalg.inv(K)

    def offset(x: float, y: float, axis: int) -> float:
        ray = axes @ (inverse @ torch.tensor([x * (width - 1), y * (height - 1), 1.0]))
        return float(distance * ray[axis] / ray[2])

    planes = (offset(left, vy, 0), offset(right, vy, 0), offset(vx, top, 1), offset(vx, bottom, 1))
    return box(size, K, axes, planes, distance, f"room box, back wall at {distance:g}")


def box(
    size: tuple[int, int], K: Tensor, axes: Tensor, planes: tuple[float, float, float, float], distance: float, source: str
) -> DepthMap:
    """The inside of a box along `axes` (3, 3; rows right, down, ahead), which ends `distance` ahead.

    planes: where the left wall, right wall, ceiling and floor are, scene units right and down; infinite where it is open.
    """
    x, y, z = (rays(size, K) @ axes.T).unbind(-1)
    walls = [distance / z.clamp_min(1e-6)]
    for component, low, high in ((x, *planes[:2]), (y, *planes[2:])):
        reach = torch.where(component > 0, high, low)
        walls.append(torch.where(component.abs() > 1e-9, reach / component, float("inf")))
    return depth_map(torch.stack(walls).amin(0), K, source)


def axes_through(K: Tensor, pixel: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Direction (3,) through a pixel, and axes (3, 3; rows right, down, ahead) of a level frame that looks along it."""
    ahead = F.normalize(torch.linalg.inv(K) @ torch.tensor([*pixel, 1.0]), dim=0)
    right = F.normalize(torch.linalg.cross(torch.tensor([0.0, 1.0, 0.0]), ahead), dim=0)
    return ahead, torch.stack([right, torch.linalg.cross(ahead, right), ahead])


def from_picture(picture: Tensor, K: Tensor, kind: str, near: float, far: float) -> DepthMap:
    """A depth picture (H, W) or (H, W, C) with values 0..1; see `read_picture`."""
    return depth_map(read_picture(picture, kind, near, far), K, f"{kind} picture")


def read_picture(picture: Tensor, kind: str, near: float, far: float) -> Tensor:
    """Depth (H, W), or what else a picture (H, W) or (H, W, C) with values 0..1 measures, 0 = unknown.

    kind 'disparity': white is `near`, black is `far`, 1/depth in between (Depth Anything, MiDaS, ControlNet pictures);
    'linear': black is `near`, white is `far`; 'metric': the value is the depth in units of `far`, black is unknown.
    """
    value = _grey(picture)
    if kind not in ("disparity", "linear", "metric"):
        raise ValueError(f"kind {kind!r}: expected 'disparity', 'linear' or 'metric'")
    if not 0 < near < far:
        raise ValueError(f"near {near:g} and far {far:g}: expected 0 < near < far, in scene units")
    return {
        "disparity": 1 / (1 / far + value.clamp(0, 1) * (1 / near - 1 / far)),
        "linear": near + value.clamp(0, 1) * (far - near),
        "metric": value * far,
    }[kind]


def doubts(picture: Tensor, kind: str) -> list[str]:
    """What speaks against a picture (H, W) or (H, W, C) being the depth picture of this kind that it is taken for."""
    found = []
    if picture.ndim == 3 and picture.shape[-1] >= 3:
        colour = picture[..., :3].float()
        if ((colour.amax(-1) - colour.amin(-1)) > 0.1).float().mean() > 0.02:
            found.append("it is coloured: a colour map or a photo, whose grey is no depth; save the depth in grey")
    if kind != "metric":
        return found
    value = _grey(picture)
    known = value[torch.isfinite(value) & (value > 0)]
    clipped = (known == 1).float().mean() if len(known) and known.max() == 1 else torch.tensor(0.0)
    if clipped > CLIPPED and (known < 1).any():
        found.append(f"{100 * clipped:.0f} % of it is exactly 1, as if everything farther had been cut off")
    count = len(known.unique())
    if count < FEW:
        found.append(f"it has only {count} different values")
    elif ((255 * known).round() - 255 * known).abs().max() < 1e-3:
        found.append("it has 8 bits a pixel: depth in 255 steps")
    if found:
        found.append("Lyra 2 Load Depth reads EXR, TIFF, 16-bit PNG and NumPy files as they are")
    return found


def _grey(picture: Tensor) -> Tensor:
    return picture.float() if picture.ndim == 2 else picture[..., :3].float().mean(-1)


# ------------------------------------------------------------------------------------------- the host's own estimators


def from_moge(geometry: dict, index: int = 0, size: tuple[int, int] | None = None, K: Tensor | None = None) -> DepthMap:
    """From the host's MOGE_GEOMETRY: depth (B, H, W), intrinsics (B, 3, 3) in units of the picture, mask (B, H, W).

    size: of the photo, if that has other pixels than the geometry; K: its lens, if that is known better.
    """
    if K is None and "intrinsics" not in geometry:
        raise ValueError(
            "this MOGE_GEOMETRY has no intrinsics (a panorama?); use MoGeInference, which gives a perspective view"
        )
    depth = _pick(geometry, "depth", index, "MOGE_GEOMETRY")
    if "mask" in geometry:
        depth = torch.where(_pick(geometry, "mask", index, "MOGE_GEOMETRY").bool(), depth, 0.0)
    normalised = None if K is not None else _pick(geometry, "intrinsics", index, "MOGE_GEOMETRY").float().cpu()
    return _fitted(depth, normalised, size, K, "MoGe")


def from_da3(
    geometry: dict,
    index: int = 0,
    horizontal_fov: float = 60.0,
    size: tuple[int, int] | None = None,
    K: Tensor | None = None,
) -> DepthMap:
    """From the host's DA3_GEOMETRY: depth (B, H, W), sky probability (B, H, W), intrinsics (1, B, 3, 3).

    size: of the photo, if that has other pixels than the geometry; K: its lens, if that is known better. Where the network
    found no camera, `horizontal_fov` degrees of the photo are assumed.
    """
    depth = _pick(geometry, "depth", index, "DA3_GEOMETRY")
    if "sky" in geometry:
        depth = torch.where(_pick(geometry, "sky", index, "DA3_GEOMETRY") < 0.5, depth, 0.0)
    normalised = None if K is not None else _da3_lens(geometry, index)
    if K is None and normalised is None:
        K = assumed_lens(size or tuple(depth.shape), horizontal_fov)
        return _fitted(depth, None, size, K, f"Depth Anything 3, field of view of {horizontal_fov:g} degrees assumed")
    return _fitted(depth, normalised, size, K, "Depth Anything 3")


def distance_from_moge(geometry: dict) -> Tensor:
    """Distances (H, W) along the rays of a panorama, 0 = unknown, from the host's MOGE_GEOMETRY of one."""
    if "intrinsics" in geometry:
        raise ValueError("this MOGE_GEOMETRY is of a perspective view; run MoGe Panorama Inference on the panorama")
    distance = _pick(geometry, "depth", 0, "MOGE_GEOMETRY").float().cpu()
    # what it sees nothing in is put far away there
    return torch.where(_pick(geometry, "mask", 0, "MOGE_GEOMETRY").bool().cpu(), distance, 0.0)


def _fitted(
    depth: Tensor, normalised: Tensor | None, size: tuple[int, int] | None, K: Tensor | None, source: str
) -> DepthMap:
    """Depth (H, W) at the photo's `size` with its lens K (3, 3), or else with the geometry's own, in units of the picture."""
    own = tuple(depth.shape)
    size = size or own
    if K is None and not same_shape(own, size):
        raise ValueError(
            f"{source}: its picture is {own[1]} x {own[0]}, the photo is {size[1]} x {size[0]}, another shape; estimate "
            "from the photo as it begins the world, after scaling and cropping, or connect cameras"
        )
    return depth_map(onto(depth, size), from_normalized(normalised, size) if K is None else K, source)


def _da3_lens(geometry: dict, index: int) -> Tensor | None:
    """Intrinsics (3, 3) in units of the picture, or None if the network found no camera.

    The host resamples the depth to the photo but leaves the intrinsics in pixels of what the network saw, and it puts
    the identity where there is no camera.
    """
    if "intrinsics" not in geometry:
        return None
    stored = geometry["intrinsics"].float().cpu()
    if stored.ndim not in (3, 4) or stored.shape[-2:] != (3, 3) or index >= stored.shape[-3]:
        raise ValueError(f"this DA3_GEOMETRY has intrinsics {tuple(stored.shape)} for {len(geometry['depth'])} views")
    K = stored.reshape(-1, *stored.shape[-3:])[0]
    found = torch.isfinite(K).flatten(1).all(1) & (K - torch.eye(3)).flatten(1).any(1)
    if not found[index]:
        return None
    height, width = _da3_grid(K[found], tuple(geometry["depth"].shape[1:]))
    return K[index] / torch.tensor([[width], [height], [1.0]])


def da3_cameras(geometry: dict, size: tuple[int, int]) -> Cameras:
    """Where the views of a multi-view DA3_GEOMETRY were taken, for pictures of `size`, seen from the first; scale of its depth.

    ValueError if the network gave no cameras, or nonsense.
    """
    views = len(geometry["depth"])
    if "extrinsics" not in geometry:
        raise ValueError("this DA3_GEOMETRY has no cameras; run Depth Anything 3 with mode multiview, and Small or Base")
    stored = geometry["extrinsics"].float().cpu()
    lenses = [_da3_lens(geometry, index) for index in range(views)]
    if stored.shape[-3] != views or any(K is None for K in lenses):
        raise ValueError(f"this DA3_GEOMETRY has no camera for each of its {views} views; take a model with a camera decoder")
    w2c = torch.eye(4, dtype=torch.float64).repeat(views, 1, 1)
    w2c[:, :3] = stored.reshape(-1, *stored.shape[-3:])[0][:, :3].double()
    if not torch.isfinite(w2c).all():
        raise ValueError("Depth Anything 3 found no cameras for these photos; place them by what they show alike")
    K = from_normalized(torch.stack(lenses), size)
    return check(Cameras((w2c @ torch.linalg.inv(w2c[0])).float(), K, size), "Depth Anything 3")


def _da3_grid(K: Tensor, size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the pixels that K (F, 3, 3) is for, of photos of `size`: that whose middle is nearest.

    The camera decoder puts the principal point into the middle, the rays near it. It is the photo's own size, or the
    longest side (or shortest; the host knows both ways) is whole patches and the other rounded to such.
    """
    seen = 2 * K[:, :2, 2].median(0).values
    fits = {size}
    for side in range(PATCH, int(2 * max(seen.max(), PATCH)) + PATCH, PATCH):
        for whole in (max(size), min(size)):
            fits.add(tuple(whole_patches(round(s * side / whole)) for s in size))
    return min(fits, key=lambda fit: float((seen / torch.tensor(fit[::-1])).log().abs().amax()))


def refuse_other_than_metric(geometry: dict) -> None:
    """ValueError if this DA3_GEOMETRY can't be the metric model's, which sees sky and no cameras."""
    if "sky" not in geometry:
        raise ValueError("this DA3_GEOMETRY has no sky, so it is not from Depth Anything 3 Metric and knows no metres")


def in_metres(found: DepthMap, resolution: int) -> DepthMap:
    """Depth of Depth Anything 3 Metric in metres; what it gives is for a camera of METRIC_FOCAL pixels.

    resolution: pixels of the longest side at which the network looked at the picture.
    """
    focal = float(found.K[0, 0] + found.K[1, 1]) / 2 * resolution / max(found.size)
    return DepthMap(found.depth * focal / METRIC_FOCAL, found.K, f"{found.source}, in metres by a focal length of {focal:.0f}")


def _pick(geometry: dict, key: str, index: int, kind: str) -> Tensor:
    if key not in geometry:
        raise ValueError(f"this {kind} has no {key!r}, only {sorted(geometry)}")
    if not 0 <= index < len(geometry[key]):
        raise ValueError(f"this {kind} holds {len(geometry[key])} views; there is no view {index}")
    return geometry[key][index]
