"""Sharper gaussians: fitted to the frames they were made of, and kept only if frames that had no say get better too.

What a feed-forward network or a fusion gives is nearly right, so the steps are small. Generated frames do not agree with
each other perfectly: the pixels that fit worst count less, every frame may be a little brighter or bluer than the scene,
and cameras may move a hair. Every eighth frame is held out; the state with the best PSNR on those wins, the first one
included. Rates and weights are gsplat's usual ones, smaller where the start is good.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..cameras.camera import Cameras
from ..metrics.pictures import ssim_map
from .gaussians import Gaussians

# gaussians and one camera to colour (H, W, 3), alpha (H, W) and depth (H, W), with gradients
Render = Callable[[Gaussians, Cameras], tuple[Tensor, Tensor, Tensor]]

HELD_OUT = 8  # every which frame has no say
RATES = {"means": 3.2e-5, "scales": 1e-3, "quats": 1e-3, "opacities": 1e-2, "colors": 2.5e-3}  # means: of the scene's size
MEANS_END = 0.01  # of their first rate at the last step
CAMERA_RATE, CAMERA_DECAY = 1e-5, 1e-6
EXPOSURE_RATE, EXPOSURE_HOLD = 1e-3, 0.1  # hold: what a gain of 2 or an offset of 1 costs
DISSIMILARITY = 0.2  # share of 1 - SSIM in the loss, the rest is L1
WORST, DISTRUST = 0.1, 0.1  # share of a frame's pixels that fit worst, and how much these count
OPACITY_COST, SCALE_COST, DEPTH_COST = 0.01, 0.01, 0.01
CLEAN_EVERY, FAINTEST, LARGEST = 200, 0.005, 0.1  # steps; opacity; of the scene's size
LOOKS = 10  # at the held-out frames on the way
SURE = 1e-4  # opacities start at least that far from 0 and 1, where they could not move


@dataclass(frozen=True)
class Optimized:
    """The best state found."""

    gaussians: Gaussians
    cameras: Cameras
    before: float  # dB on the held-out frames
    after: float  # dB, of the state that was kept
    best_step: int  # 0: nothing was better than the start
    held_out: tuple[int, ...]

    @property
    def report(self) -> str:
        frames = f"{len(self.held_out)} frames that had no say"
        if not self.best_step:
            return f"no step made {frames} better than {self.before:.2f} dB: the splat is as it was"
        return f"{self.before:.2f} dB to {self.after:.2f} dB on {frames}, best after {self.best_step} steps"


class _State:
    """What is fitted: logarithms of scales, logits of opacities, plain colours; and each frame's exposure and camera."""

    def __init__(self, gaussians: Gaussians, frames: int, refine_cameras: bool, exposure: bool):
        sure = gaussians.opacities.clamp(SURE, 1 - SURE)
        self.rest = gaussians.sh[:, 1:].clone()
        values = {
            "means": gaussians.means,
            "scales": gaussians.scales.clamp_min(1e-9).log(),
            "quats": torch.nn.functional.normalize(gaussians.quats, dim=1),
            "opacities": sure.logit(),
            "colors": gaussians.sh[:, 0],
        }
        self.splats = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
        like = gaussians.means
        self.moves = like.new_zeros(frames, 6).requires_grad_(refine_cameras)
        self.exposures = like.new_zeros(frames, 2, 3).requires_grad_(exposure)  # logarithm of a gain, offset
        self.size = 1.0  # of the scene, in scene units

    def gaussians(self) -> Gaussians:
        values = self.splats
        sh = torch.cat([values["colors"][:, None], self.rest], 1)
        quats = torch.nn.functional.normalize(values["quats"], dim=1)
        return Gaussians(values["means"], quats, values["scales"].exp(), values["opacities"].sigmoid(), sh)

    def camera(self, cameras: Cameras, frame: int) -> Cameras:
        """The frame's camera where it is now; the first one holds the world in place."""
        camera = cameras[frame]
        return camera if frame == 0 else replace(camera, w2c=_moved(self.moves[frame], self.size) @ camera.w2c)

    def exposed(self, picture: Tensor, frame: int) -> Tensor:
        gain, offset = self.exposures[frame]
        return picture * gain.exp() + offset

    def optimizer(self, scene_size: float) -> torch.optim.Adam:
        self.size = scene_size
        groups = [
            {"params": [value], "lr": RATES[name], "name": name}  # that of the means is set at every step
            for name, value in self.splats.items()
        ]
        groups.append({"params": [self.moves], "lr": CAMERA_RATE, "weight_decay": CAMERA_DECAY, "name": "moves"})
        groups.append({"params": [self.exposures], "lr": EXPOSURE_RATE, "name": "exposures"})
        return torch.optim.Adam(groups, eps=1e-15)

    def keep(self, mask: Tensor, optimizer: torch.optim.Adam) -> None:
        """Only the gaussians where the mask (N,) holds; what Adam knows of them stays."""
        self.rest = self.rest[mask]
        for group in optimizer.param_groups:
            name = group["name"]
            if name not in self.splats:
                continue
            old = self.splats[name]
            state = optimizer.state.pop(old, {})
            kept = old.detach()[mask].requires_grad_()
            optimizer.state[kept] = {k: v[mask] if v.shape == old.shape else v for k, v in state.items()}
            group["params"], self.splats[name] = [kept], kept


def _moved(move: Tensor, size: float) -> Tensor:
    """(4, 4) of a small turn (radians) and shift (of the scene's size), move (6,)."""
    x, y, z = move[:3]
    zero = torch.zeros_like(x)
    skew = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero]).view(3, 3)
    top = torch.cat([torch.linalg.matrix_exp(skew), size * move[3:, None]], 1)
    return torch.cat([top, move.new_tensor([[0, 0, 0, 1]])])


def optimize(
    render: Render,
    gaussians: Gaussians,
    images: Sequence[Tensor],
    cameras: Cameras,
    depths: Sequence[Tensor | None] | None = None,
    steps: int = 3000,
    refine_cameras: bool = True,
    exposure: bool = True,
    seed: int = 0,
    on_step: Callable[[int, int, Tensor | None], None] = lambda done, total, picture: None,
) -> Optimized:
    """Gaussians that show the images (F, H, W, 3) in 0..1 better, from their cameras (F).

    depths: F of (H, W) z-depth in scene units, 0 where unknown, or None. on_step: done, total, and now and then a picture
    (H, W, 3) uint8; it may raise to stop. Everything lies where the gaussians lie. ValueError for what doesn't fit.
    """
    _check(gaussians, images, cameras, depths, steps)
    held = tuple(range(min(HELD_OUT, len(images)) - 1, len(images), HELD_OUT))
    said = [frame for frame in range(len(images)) if frame not in held]
    like, scene_size = gaussians.means, _scene_size(gaussians, cameras)
    state = _State(gaussians, len(images), refine_cameras, exposure)
    optimizer = state.optimizer(scene_size)
    random = torch.Generator().manual_seed(seed)

    def quality() -> float:
        with torch.no_grad():
            now = state.gaussians()
            errors = [(render(now, cameras[f])[0].clamp(0, 1) - images[f].to(like)).square().mean() for f in held]
            return float(-10 * torch.stack(errors).mean().clamp_min(1e-12).log10())

    before = quality()
    best = Optimized(gaussians, cameras, before, before, 0, held)
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = RATES["means"] * scene_size * MEANS_END ** (step / steps)
        frame = said[int(torch.randint(len(said), (1,), generator=random))]
        depth = None if depths is None else depths[frame]
        loss, picture = _loss(render, state, cameras, frame, images[frame].to(like), depth)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % CLEAN_EVERY == 0:
            _clean(state, optimizer, scene_size)
        looked = step % max(steps // LOOKS, 1) == 0 or step == steps
        if looked and (after := quality()) > best.after:
            best = Optimized(_settled(state), _refined(state, cameras), before, after, step, held)
        on_step(step, steps, (picture.detach().clamp(0, 1) * 255).to(torch.uint8) if looked else None)
    return best


def _check(gaussians: Gaussians, images: Sequence[Tensor], cameras: Cameras, depths, steps: int) -> None:
    if not len(gaussians):
        raise ValueError("this splat is empty; there is nothing to fit")
    if not all(torch.isfinite(field).all() for field in vars(gaussians).values()):
        raise ValueError("some of these gaussians are not finite; Lyra2PruneSplat takes them out")
    if len(images) != len(cameras) or (depths is not None and len(depths) != len(cameras)):
        counts = f"{len(images)} images, {len(cameras)} cameras" + ("" if depths is None else f", {len(depths)} depths")
        raise ValueError(f"{counts}: one of each for every frame is needed")
    if len(images) < 2:
        raise ValueError("one image leaves none to hold out; give 2 or more, better 30")
    if tuple(images[0].shape[:2]) != cameras.size:
        raise ValueError(f"the images are {tuple(images[0].shape[:2])}, the cameras for {cameras.size}; scale the images")
    if depths is not None and any(depth is not None and tuple(depth.shape) != cameras.size for depth in depths):
        raise ValueError(f"depths must be {cameras.size} as the images are; resize them")
    if steps < 1:
        raise ValueError(f"{steps} steps change nothing; give 1 or more")


def _scene_size(gaussians: Gaussians, cameras: Cameras) -> float:
    """Median distance of the gaussians from the middle of the path, scene units."""
    return float((gaussians.means - cameras.centers.to(gaussians.means).mean(0)).norm(dim=1).median())


def _loss(
    render: Render, state: _State, cameras: Cameras, frame: int, image: Tensor, depth: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The number to lower, and the picture (H, W, 3) as it is now."""
    now = state.gaussians()
    picture, alpha, found = render(now, state.camera(cameras, frame))
    shown = state.exposed(picture, frame)
    apart = (shown - image).abs().mean(2)
    limit = apart.detach().flatten().kthvalue(max(1, int((1 - WORST) * apart.numel()))).values
    trust = torch.where(apart.detach() > limit, DISTRUST, 1.0)
    alike = ssim_map((trust[..., None] * shown + (1 - trust[..., None]) * image), image).mean()
    loss = (1 - DISSIMILARITY) * (trust * apart).mean() + DISSIMILARITY * (1 - alike)
    loss = loss + OPACITY_COST * now.opacities.mean() + SCALE_COST * (now.scales / state.size).mean()
    loss = loss + EXPOSURE_HOLD * state.exposures[frame].square().mean()
    if depth is not None:
        depth = depth.to(found)
        known = (depth > 0) & (found > 0) & (alpha > 0.5)
        if known.any():
            # relative to the scene, so that it weighs the same in centimetres and miles
            loss = loss + DEPTH_COST * state.size * (1 / found[known] - 1 / depth[known]).abs().mean()
    return loss, picture


@torch.no_grad()
def _clean(state: _State, optimizer: torch.optim.Adam, scene_size: float) -> None:
    """Without what has become invisible or fog."""
    now = state.gaussians()
    mask = (now.opacities >= FAINTEST) & (now.scales.amax(1) <= LARGEST * scene_size)
    if not mask.all() and mask.any():
        state.keep(mask, optimizer)


@torch.no_grad()
def _settled(state: _State) -> Gaussians:
    now = state.gaussians()
    return Gaussians(*(getattr(now, name).clone() for name in ("means", "quats", "scales", "opacities", "sh")))


@torch.no_grad()
def _refined(state: _State, cameras: Cameras) -> Cameras:
    return replace(cameras, w2c=torch.cat([state.camera(cameras, frame).w2c for frame in range(len(cameras))]))
