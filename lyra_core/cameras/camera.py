"""Pinhole cameras: where they stand, what they see, and the conventions of everyone else.

Everything in this project uses OpenCV axes (x right, y down, z forward) and *integer pixel centres*: the centre of the
top-left pixel is (0, 0). The Lyra 2 weights were trained so, and subsampling `image[::s, ::s]` is then exactly
`K[:2] / s`. Other conventions are crossed in the functions at the end of this file, and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

# What no camera can be, wherever it comes from; `check` asks for all of it.
LARGEST_PICTURE = 16384  # pixels of a side
FARTHEST = 1e9  # scene units or metres from the origin of the file's coordinates; the earth's diameter is a hundredth
WIDEST, NARROWEST = 170.0, 1.0  # degrees of field of view, across and down, of lenses that pictures are taken with
UNROUND = 1e-2  # by which R Rᵀ may differ from the identity, for rounding
LONGEST_PIXEL = 2.2  # fx over fy, or fy over fx, beyond which K can't be of this picture; anamorphic pixels reach 2
ASIDE = 0.25  # share of a side by which the principal point may lie outside of a picture
# a principal point that is the middle of a picture of another size: how far that may be off in shape, and in size
OTHER_PICTURES = ((1.06, 1.1), (1.4, 1.3))
FAR_OUT = 1000.0  # scene units from the origin beyond which single precision loses a ten-thousandth
AXES_FLIP = (1.0, -1.0, -1.0)  # OpenCV (y down, z forward) <-> OpenGL and three.js (y up, z backward)


@dataclass(frozen=True)
class Cameras:
    """F pinhole cameras of one image size."""

    w2c: Tensor  # (F, 4, 4) world-to-camera, OpenCV axes, scene units
    K: Tensor  # (F, 3, 3) pixels; the top-left pixel's centre is (0, 0)
    size: tuple[int, int]  # (height, width) in pixels
    # where the world's origin lies in the coordinates of the file they came from: maps count in millions of metres, which
    # single precision rounds to half a metre, so such cameras are moved near the origin and moved back when they are saved
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def __len__(self) -> int:
        return self.w2c.shape[0]

    def __getitem__(self, frames) -> Cameras:
        """A run (slice), a choice (list of ints) or one camera (int; still a Cameras, of length 1)."""
        if isinstance(frames, int):
            frames = [frames]
        return replace(self, w2c=self.w2c[frames], K=self.K[frames])

    @property
    def c2w(self) -> Tensor:
        """(F, 4, 4) camera-to-world, on every device the processor's, to the last bit."""
        return torch.linalg.inv(self.w2c.cpu()).to(self.w2c.device)

    @property
    def centers(self) -> Tensor:
        """(F, 3) camera centres in the world."""
        return -(self.w2c[:, :3, :3].mT @ self.w2c[:, :3, 3:]).squeeze(-1)

    @property
    def fov(self) -> Tensor:
        """(F,) vertical field of view, radians."""
        return 2 * torch.atan(0.5 * self.size[0] / self.K[:, 1, 1])

    @property
    def K_inverse(self) -> Tensor:
        """(F, 3, 3) pixels to rays, every entry rounded once: a warp tells points on an exact pixel from those beside it."""
        (fx, skew, cx), (_, fy, cy), _ = self.K.movedim(0, -1)
        none, one = torch.zeros_like(fx), torch.ones_like(fx)
        rows = (
            (1 / fx, -skew / (fx * fy), -cx / fx + skew * cy / (fx * fy)),
            (none, 1 / fy, -cy / fy),
            (none, none, one),
        )
        return torch.stack([torch.stack(row, -1) for row in rows], -2)

    def to(self, device) -> Cameras:
        return replace(self, w2c=self.w2c.to(device), K=self.K.to(device))

    def resized(self, size: tuple[int, int]) -> Cameras:
        """The same cameras for the picture stretched to `size`: what was in the picture's middle stays there."""
        scale = self.K.new_tensor([[size[1] / self.size[1]], [size[0] / self.size[0]], [1.0]])
        return replace(self, K=from_corner_origin(to_corner_origin(self.K) * scale), size=size)

    def cropped(self, size: tuple[int, int]) -> Cameras:
        """The same cameras for the picture enlarged evenly until it covers `size`, and cut to it around its middle."""
        scale = max(size[0] / self.size[0], size[1] / self.size[1])
        over = self.K.new_tensor([self.size[1] * scale - size[1], self.size[0] * scale - size[0]]) / 2
        K = to_corner_origin(self.K) * self.K.new_tensor([[scale], [scale], [1.0]])
        K[:, :2, 2] -= over
        return replace(self, K=from_corner_origin(K), size=size)

    def subsampled(self, step: int) -> Cameras:
        """The same cameras for `image[::step, ::step]`; exact with integer pixel centres."""
        K = torch.cat([self.K[:, :2] / step, self.K[:, 2:]], 1)
        return replace(self, K=K, size=(-(-self.size[0] // step), -(-self.size[1] // step)))


def rescaled_as_reference(cameras: Cameras, size: tuple[int, int]) -> Cameras:
    """For the picture stretched to `size` as the reference does it: fx, cx by width, fy, cy by height.

    With pixel centres on integers this moves the principal point by half a pixel times the factor less one; `resized`
    does not. What the networks were trained with is crossed here.
    """
    K = cameras.K.clone()
    K[:, 0, (0, 2)] *= size[1] / cameras.size[1]
    K[:, 1, (1, 2)] *= size[0] / cameras.size[0]
    return replace(cameras, K=K, size=size)


def join(first: Cameras, *others: Cameras) -> Cameras:
    """One after the other, in the world of the first; ValueError if the image sizes differ."""
    others = tuple(about(c, first.origin) for c in others)
    sizes = {c.size for c in (first, *others)}
    if len(sizes) > 1:
        raise ValueError(f"cameras of different image sizes {sorted(sizes)} can't be joined; resize them first")
    return replace(
        first,
        w2c=torch.cat([first.w2c, *(c.w2c.to(first.w2c) for c in others)]),
        K=torch.cat([first.K, *(c.K.to(first.K) for c in others)]),
    )


def pinhole(size: tuple[int, int], focal: float, frames: int = 1) -> Cameras:
    """Cameras at the world's origin looking along +z: square pixels of `focal`, principal point in the picture's middle."""
    height, width = size
    K = torch.tensor([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]], dtype=torch.float32)
    return Cameras(torch.eye(4).repeat(frames, 1, 1), K.repeat(frames, 1, 1), size)


def check(cameras: Cameras, source: str = "the cameras") -> Cameras:
    """The cameras themselves, or a ValueError that names the first frame that is no camera and why."""
    w2c, K = cameras.w2c, cameras.K
    if w2c.ndim != 3 or w2c.shape[1:] != (4, 4) or K.shape != (len(w2c), 3, 3):
        raise ValueError(
            f"{source}: expected w2c (F, 4, 4) and K (F, 3, 3), found {tuple(w2c.shape)} and {tuple(K.shape)}"
        )
    if len(w2c) == 0:
        raise ValueError(f"{source}: there is no camera in it")
    _refuse_first(
        ~torch.isfinite(w2c).flatten(1).all(1) | ~torch.isfinite(K).flatten(1).all(1),
        source,
        lambda i: "has NaN or infinite numbers",
    )
    R = w2c[:, :3, :3]
    defect = (R @ R.mT - torch.eye(3, dtype=R.dtype, device=R.device)).abs().amax((1, 2))
    _refuse_first(
        ~(defect <= UNROUND),  # NaN too
        source,
        lambda i: (
            f"has a rotation that is not orthonormal (R Rᵀ is off by {defect[i]:.3g}); w2c must be rigid, without scale"
        ),
    )
    _refuse_first(
        torch.linalg.det(R) < 0,
        source,
        lambda i: "is mirrored (its rotation has determinant -1); flip one axis, OpenCV cameras are right-handed",
    )
    middle = (-R.double().mT @ w2c[:, :3, 3:].double())[..., 0] + R.new_tensor(cameras.origin, dtype=torch.float64)
    _refuse_first(
        ~(middle.abs().amax(1) <= FARTHEST),
        source,
        lambda i: f"stands at {_spoken(middle[i])}, beyond {FARTHEST:g} from the origin; are its numbers damaged, or of another unit?",
    )
    last_row = (w2c[:, 3] - w2c.new_tensor([0, 0, 0, 1])).abs().amax(1)
    _refuse_first(
        last_row > 1e-5,
        source,
        lambda i: f"has last row {w2c[i, 3].tolist()} instead of [0, 0, 0, 1]; is the matrix transposed?",
    )
    _refuse_first(
        (K[:, 0, 0] <= 0) | (K[:, 1, 1] <= 0),
        source,
        lambda i: f"has focal lengths {K[i, 0, 0]:.4g}, {K[i, 1, 1]:.4g}; they must be positive pixels",
    )
    return check_lens(cameras, source)


def check_lens(cameras: Cameras, source: str = "the cameras") -> Cameras:
    """The cameras themselves, or a ValueError that names the first frame whose K can't be of a picture of this size."""
    (height, width), K = cameras.size, cameras.K
    if not 1 <= min(height, width) <= max(height, width) <= LARGEST_PICTURE:
        raise ValueError(f"{source}: a picture {width} wide and {height} high; both sides are 1 to {LARGEST_PICTURE} pixels")
    fx, fy, cx, cy = K[:, 0, 0], K[:, 1, 1], K[:, 0, 2], K[:, 1, 2]
    across, down = (2 * torch.atan(0.5 * side / f).rad2deg() for side, f in ((width, fx), (height, fy)))
    normalised = (fx < 10) & (fy < 10) & (cx.abs() <= 1) & (cy.abs() <= 1)
    picture = f"a picture {width} wide and {height} high"

    def field(i: int) -> str:
        looks = " these numbers look normalised: multiply row 0 by the width and row 1 by the height" * bool(normalised[i])
        return (
            f"has focal lengths {fx[i]:.4g}, {fy[i]:.4g} for {picture}, a field of view of "
            f"{across[i]:.4g} x {down[i]:.4g} degrees; expected {NARROWEST:g} to {WIDEST:g}.{looks}"
        )

    wrong = torch.maximum(across, down) > WIDEST
    _refuse_first(wrong | (torch.minimum(across, down) < NARROWEST), source, field)
    _refuse_first(
        torch.maximum(fx / fy, fy / fx) > LONGEST_PIXEL,
        source,
        lambda i: (
            f"has focal lengths {fx[i]:.4g}, {fy[i]:.4g} for {picture}, pixels {fx[i] / fy[i]:.3g} times as high as wide; "
            "is the picture stretched, or are they those of a picture of another shape?"
        ),
    )
    # the middle of the picture that this principal point would be the middle of
    wide, high = 2 * cx + 1, 2 * cy + 1
    _refuse_first(
        (cx < -ASIDE * width) | (cx > (1 + ASIDE) * width) | (cy < -ASIDE * height) | (cy > (1 + ASIDE) * height),
        source,
        lambda i: (
            f"has its principal point at {cx[i]:.4g}, {cy[i]:.4g}, far outside {picture}; "
            f"are the intrinsics those of a picture {wide[i]:.0f} wide and {high[i]:.0f} high?"
        ),
    )
    turned = ((wide - height).abs() < 2) & ((high - width).abs() < 2) & (abs(width - height) > 4)
    shape = (wide.clamp(min=1e-3) / high.clamp(min=1e-3)) * (height / width)
    times = (wide.clamp(min=0) * high.clamp(min=0) / (width * height)).sqrt()
    shape, times = torch.maximum(shape, 1 / shape), torch.maximum(times, 1 / times)
    of_another = sum((shape < alike) & (times > off) for alike, off in OTHER_PICTURES).bool()
    of_another |= (cx.abs() <= 0.5) & (cy.abs() <= 0.5) & (min(height, width) > 4)  # nobody wrote it down
    _refuse_first(
        turned | of_another,
        source,
        lambda i: (
            f"has its principal point at {cx[i]:.4g}, {cy[i]:.4g}, the middle of a picture {wide[i]:.0f} wide and "
            f"{high[i]:.0f} high, but is said to be of {picture}; say the size that the intrinsics are for"
        ),
    )
    return cameras


def _spoken(place: Tensor) -> str:
    return "(" + ", ".join(f"{number:g}" for number in place.tolist()) + ")"


def _refuse_first(bad: Tensor, source: str, why) -> None:
    if bad.any():
        frame = int(bad.nonzero()[0])
        raise ValueError(f"{source}: frame {frame} {why(frame)}")


def pixel_grid(size: tuple[int, int], device=None) -> Tensor:
    """Homogeneous pixel centres (H, W, 3): (u, v, 1) with u to the right and v down, integers."""
    v, u = torch.meshgrid(torch.arange(size[0], device=device), torch.arange(size[1], device=device), indexing="ij")
    return torch.stack([u, v, torch.ones_like(u)], -1).float()


def product(A: Tensor, B: Tensor) -> Tensor:
    """A (..., M, 3) @ B (..., 3, N), on every device rounded as on a processor: fused multiplications and additions in order.

    A warp tells points on an exact pixel from those beside it, so the last bit decides what is seen.
    """
    if A.device.type == "cpu":
        return A @ B
    total = A[..., :1] * B[..., :1, :]
    for k in (1, 2):  # a product of two floats is exact in double precision
        exact = A[..., k : k + 1].double() * B[..., k : k + 1, :].double()
        total = exact.add_(total).to(total.dtype)
    return total


def unproject(depth: Tensor, cameras: Cameras) -> Tensor:
    """World points (F, H, W, 3) seen at each pixel; depth (F, H, W) is along z."""
    rays = product(pixel_grid(cameras.size, depth.device), cameras.K_inverse.mT[:, None])
    local = rays * depth[..., None]
    c2w = cameras.c2w
    return product(local, c2w[:, None, :3, :3].mT) + c2w[:, None, None, :3, 3]


def project(points: Tensor, cameras: Cameras) -> tuple[Tensor, Tensor]:
    """Pixels (F, N, 2) and z-depth (F, N) of world points (N, 3) in every camera; z <= 0 is behind the camera."""
    local = points @ cameras.w2c[:, :3, :3].mT + cameras.w2c[:, None, :3, 3]
    homogeneous = local @ cameras.K.mT
    z = local[..., 2]
    return homogeneous[..., :2] / (z[..., None] + 1e-7), z


# ------------------------------------------------------------------------------------------------------ map coordinates


def about(cameras: Cameras, origin: tuple[float, float, float]) -> Cameras:
    """The same cameras in a world whose origin lies elsewhere in the coordinates of their file."""
    if tuple(origin) == cameras.origin:
        return cameras
    R = cameras.w2c[:, :3, :3].double()
    moved = R.new_tensor(origin) - R.new_tensor(cameras.origin)
    w2c = cameras.w2c.clone()
    w2c[:, :3, 3] = (cameras.w2c[:, :3, 3].double() + R @ moved).to(w2c)
    return replace(cameras, w2c=w2c, origin=tuple(origin))


def near_origin(c2w: Tensor) -> tuple[Tensor, tuple[float, float, float]]:
    """Camera-to-world (F, 4, 4) float64, moved to begin near the origin if it begins far out, and that origin."""
    first = c2w[0, :3, 3]
    if first.abs().max() <= FAR_OUT:
        return c2w, (0.0, 0.0, 0.0)
    origin = first.round()
    moved = c2w.clone()
    moved[:, :3, 3] -= origin
    return moved, tuple(origin.tolist())


def c2w_of_file(cameras: Cameras) -> Tensor:
    """Camera-to-world (F, 4, 4), float64, in the coordinates of the file the cameras came from; rotations exactly so."""
    c2w = torch.linalg.inv(cameras.w2c.double().cpu())
    if any(cameras.origin):
        # a rotation that is off by a rounding error moves a centre in the millions by a tenth
        c2w[:, :3, :3] = quaternion_to_rotation(rotation_to_quaternion(c2w[:, :3, :3]))
        c2w[:, :3, 3] += c2w.new_tensor(cameras.origin)
    return c2w


# ------------------------------------------------------------------------------------------- other people's conventions


def to_corner_origin(K: Tensor) -> Tensor:
    """Intrinsics for those who put the top-left pixel's centre at (0.5, 0.5): gsplat, COLMAP, nerfstudio."""
    return K + K.new_tensor([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])


def from_corner_origin(K: Tensor) -> Tensor:
    """The inverse of `to_corner_origin`."""
    return K - K.new_tensor([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])


def from_normalized(K: Tensor, size: tuple[int, int]) -> Tensor:
    """From intrinsics in units of the picture with half-pixel centres (MoGe): row 0 per width, row 1 per height."""
    scale = K.new_tensor([[size[1]], [size[0]], [1.0]])
    return from_corner_origin(K * scale)


def flip_camera_axes(c2w: Tensor) -> Tensor:
    """Camera-to-world (F, 4, 4) between OpenCV and OpenGL *camera* axes, in the same world (nerfstudio, Blender)."""
    return c2w @ torch.diag(c2w.new_tensor([*AXES_FLIP, 1.0]))


def rotation_to_quaternion(R: Tensor) -> Tensor:
    """Unit quaternions (..., 4), order w x y z, w >= 0, of rotation matrices (..., 3, 3)."""
    m = R.reshape(-1, 3, 3)
    trace = m.diagonal(dim1=1, dim2=2)
    # 4 q qᵀ, row by row; the row with the largest diagonal is the well-conditioned one
    w, x, y, z = 1 + trace.sum(1), *(1 + 2 * trace[:, i] - trace.sum(1) for i in range(3))
    outer = torch.stack(
        [
            torch.stack([w, m[:, 2, 1] - m[:, 1, 2], m[:, 0, 2] - m[:, 2, 0], m[:, 1, 0] - m[:, 0, 1]], 1),
            torch.stack([m[:, 2, 1] - m[:, 1, 2], x, m[:, 1, 0] + m[:, 0, 1], m[:, 0, 2] + m[:, 2, 0]], 1),
            torch.stack([m[:, 0, 2] - m[:, 2, 0], m[:, 1, 0] + m[:, 0, 1], y, m[:, 2, 1] + m[:, 1, 2]], 1),
            torch.stack([m[:, 1, 0] - m[:, 0, 1], m[:, 0, 2] + m[:, 2, 0], m[:, 2, 1] + m[:, 1, 2], z], 1),
        ],
        1,
    )
    best = torch.stack([w, x, y, z], 1).argmax(1)
    q = torch.nn.functional.normalize(outer[torch.arange(len(m), device=R.device), best], dim=-1)
    return torch.where(q[:, :1] < 0, -q, q).reshape(*R.shape[:-2], 4)


def quaternion_to_rotation(q: Tensor) -> Tensor:
    """Rotation matrices (..., 3, 3) of quaternions (..., 4), order w x y z, of any length but zero."""
    w, x, y, z = torch.nn.functional.normalize(q, dim=-1).unbind(-1)
    return torch.stack(
        [
            1 - 2 * (y * y + z * z),
            2 * (x * y - w * z),
            2 * (x * z + w * y),
            2 * (x * y + w * z),
            1 - 2 * (x * x + z * z),
            2 * (y * z - w * x),
            2 * (x * z - w * y),
            2 * (y * z + w * x),
            1 - 2 * (x * x + y * y),
        ],
        -1,
    ).reshape(*q.shape[:-1], 3, 3)
