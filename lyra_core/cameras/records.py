"""What camera files hold, whoever wrote them: numbers, sizes, matrices and lenses, understood or refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .camera import FARTHEST, LARGEST_PICTURE, NARROWEST, WIDEST, Cameras, check, from_corner_origin

Note = Callable[[str], None]  # told in one line what was done that the file doesn't say
SCENE_UNITS = "scene units"  # what our own files say their distances are in, so that nobody scales them again
UNSEEN = 0.01  # pixels by which a distortion may move a point of the picture and still be none

PINHOLES = {"PINHOLE", "SIMPLE_PINHOLE", "PERSPECTIVE", "PERSP"}
BENT_PINHOLES = {"OPENCV", "FULL_OPENCV", "SIMPLE_RADIAL", "RADIAL", "FOV", "BROWN"}  # pinholes if their terms are zero
MODEL_KEYS = ("camera_model", "camera_type", "lens_model", "projection", "model")
OTHER_LENS = re.compile("fisheye|equirect|panoram|spherical|ortho|latlong|360|omnidirectional", re.IGNORECASE)
# powers of the distance from the middle, in focal lengths, by which a term moves a point; the highest in use for others
TERMS = {"k0": 3, "k1": 3, "k2": 5, "k3": 7, "k4": 9, "k5": 11, "p0": 2, "p1": 2, "p2": 2, "b1": 1, "b2": 1}
TERM = re.compile(r"(k\d|p\d|s\d|sx\d|sy\d|b\d|omega|tau_?[xy]|ftheta_\w+)")
TERMS_LIST = re.compile(r"(ftheta|dist(ortion)?(_?(coeffs?|coefficients|params|parameters|model))?)", re.IGNORECASE)


def silent(note: str) -> None:
    """Who wants no notes."""


@dataclass(frozen=True)
class PosedPictures:
    """What a file says of F pictures, each of its own size."""

    w2c: Tensor  # (F, 4, 4) float64, OpenCV axes, in the file's coordinates
    K: Tensor  # (F, 3, 3) float64, integer pixel centres
    sizes: tuple[tuple[int, int], ...]  # (height, width) of each
    units: str = ""  # of distances, if the file says
    names: tuple[str, ...] = ()  # of their files, as the file says; empty ones if it doesn't

    def first(self, frames: int | None) -> PosedPictures:
        return replace(self, w2c=self.w2c[:frames], K=self.K[:frames], sizes=self.sizes[:frames], names=self.names[:frames])

    def in_one_size(self) -> Iterator[tuple[list[int], Cameras]]:
        """The numbers of the pictures of each size, and their cameras."""
        for size in dict.fromkeys(self.sizes):
            chosen = [i for i, its in enumerate(self.sizes) if its == size]
            yield chosen, Cameras(self.w2c[chosen], self.K[chosen], size)

    def checked(self, path: str | Path) -> PosedPictures:
        """The pictures themselves, or a ValueError that names the first that has no camera, and its size if there are several."""
        several = len(set(self.sizes)) > 1
        for _, cameras in self.in_one_size():
            height, width = cameras.size
            check(cameras, f"{path}: pictures of {width}x{height}" if several else str(path))
        return self


def posed(
    c2w: Tensor,
    K: list[np.ndarray],
    sizes: list[tuple[int, int]],
    path: str | Path,
    units: object = "",
    names: Sequence[str] = (),
) -> PosedPictures:
    """Pictures of OpenCV camera-to-world (F, 4, 4) float64 and corner-origin K (3, 3) of each."""
    inner = from_corner_origin(torch.from_numpy(np.stack(K)))
    pictures = PosedPictures(c2w, inner, tuple(sizes), str(units), tuple(names)).checked(path)  # what is no rotation has no inverse
    return replace(pictures, w2c=torch.linalg.inv(c2w))


# --------------------------------------------------------------------------------------------------------------- values


def given(record: Mapping) -> dict:
    """What a JSON object says; null says nothing."""
    return {key: value for key, value in record.items() if value is not None}


def numbers(value: object, shape: tuple[int, ...], what: str) -> np.ndarray:
    """float64 array of this shape, of numbers or of texts of numbers, or a ValueError that begins with `what`."""
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{what}: expected numbers of shape {shape}, found {str(value)[:80]!r}") from error
    if array.size == 1 and np.prod(shape) == 1:
        array = array.reshape(shape)
    if array.shape != shape or not np.isfinite(array).all():
        raise ValueError(f"{what}: expected finite numbers of shape {shape}, found {array.shape}: {str(value)[:80]}")
    return array


def number(value: object, what: str) -> float:
    """One number, which may be a text or an array of one."""
    return float(numbers(value, (), what))


def picture_size(height: object, width: object, what: str) -> tuple[int, int]:
    sides = [number(side, f"{what}: picture height and width") for side in (height, width)]
    if any(side != round(side) or not 1 <= side <= LARGEST_PICTURE for side in sides):
        raise ValueError(
            f"{what}: a picture {sides[0]:g} high and {sides[1]:g} wide; both must be whole positive pixels, "
            f"{LARGEST_PICTURE} at most"
        )
    return int(sides[0]), int(sides[1])


def field_of_view(value: object, what: str) -> float:
    """Degrees that a lens can see."""
    fov = number(value, what)
    if not NARROWEST <= fov <= WIDEST:
        raise ValueError(f"{what} must be between {NARROWEST:g} and {WIDEST:g} degrees; found {fov:g}")
    return fov


def position(value: object, what: str) -> Tensor:
    """x, y and z (3,), float64, of a place where a camera can stand."""
    found = numbers(value, (3,), what)
    if np.abs(found).max() > FARTHEST:
        raise ValueError(f"{what}: {str(value)[:80]} is beyond {FARTHEST:g}; are its numbers damaged, or of another unit?")
    return torch.from_numpy(found)


def pose_matrix(value: object, what: str) -> np.ndarray:
    """(4, 4) of a matrix (4, 4) or (3, 4), or of its rows one after the other."""
    try:
        found = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        found = np.empty(0)
    if found.shape in ((3, 4), (12,), (16,)):
        rows = found.reshape(-1, 4)
        value = rows if len(rows) == 4 else np.concatenate([rows, [[0, 0, 0, 1]]])
    return numbers(value, (4, 4), what)


def intrinsics(fx: float, fy: float, cx: float, cy: float) -> np.ndarray:
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=np.float64)


# --------------------------------------------------------------------------------------------------------------- lenses


def refuse_other_lenses(
    lens: Mapping, K: np.ndarray, size: tuple[int, int], what: str, undistorted: bool = False, on_note: Note = silent
) -> None:
    """ValueError that names what makes a lens no pinhole: its model, a flag, a term that moves points of this picture.

    lens: what the file says of it; K (3, 3) with the principal point in pixels. With `undistorted` terms and fisheyes
    are left out instead, and noted: right for a path alone, not for the pictures. Panoramas have no K at all.
    """
    model = next((str(lens[key]) for key in MODEL_KEYS if isinstance(lens.get(key), str)), "PINHOLE")
    flags = [key for key, value in lens.items() if OTHER_LENS.search(key) and _is_set(value)]
    plain = re.sub(r"[^A-Z0-9]+", "_", model.upper())
    terms = {**dict(_bending(lens, K, size))}
    found = [] if plain in PINHOLES | BENT_PINHOLES else [f"the lens model {model!r}"]
    found += [f"{flag} {lens[flag]!r}" for flag in flags]
    fisheyes = not found or all("FISHEYE" in text.upper() for text in found)
    found += ["the lens distortion " + ", ".join(f"{key} {value:.4g}" for key, value in terms.items())] if terms else []
    if not found:
        return
    says = f"{what}: has {' and '.join(found)}"
    if not fisheyes:
        raise ValueError(f"{says}; cameras here are pinholes, so cut the pictures into pinhole views first")
    if not undistorted:
        raise ValueError(
            f"{says}; cameras here are pinholes, so undistort the pictures first (for COLMAP with `colmap "
            "image_undistorter`), or for a path without its pictures take the lens without its distortion"
        )
    on_note(f"{says}, which was left out")


def _is_set(value: object) -> bool:
    if isinstance(value, str):
        return value.strip().casefold() not in ("", "0", "false", "no", "none")
    return bool(np.any(value)) if isinstance(value, (bool, int, float, np.ndarray, np.generic)) else False


def _bending(lens: Mapping, K: np.ndarray, size: tuple[int, int]) -> Iterator[tuple[str, float]]:
    """The terms of distortion that can be seen in a picture of this size."""
    terms = [
        term
        for key, value in lens.items()
        if TERM.fullmatch(key) or TERMS_LIST.fullmatch(key)
        for term in _numbers_in(key, value)
    ]
    if not any(value for _, value in terms):
        return
    x, y = (np.abs([0 - K[i, 2], size[1 - i] - K[i, 2]]).max() / K[i, i] for i in (0, 1))
    reach, focal = np.hypot(x, y), max(K[0, 0], K[1, 1])
    for name, value in terms:
        if not abs(value) * reach ** TERMS.get(name, 13 if reach > 1 else 1) * focal < UNSEEN:
            yield name, value


def _numbers_in(key: str, value: object) -> Iterator[tuple[str, float]]:
    try:
        flat = np.asarray(value, dtype=np.float64).reshape(-1)
    except (TypeError, ValueError, OverflowError):
        return  # a text such as "distortion": "none" is no term
    for i, term in enumerate(flat):
        yield (key if len(flat) == 1 else f"{key}[{i}]"), float(term)
