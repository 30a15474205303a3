"""Texture by example: holes of a picture filled with what looks like the rest of it.

Every small patch that reaches into a hole shall be like some patch of the picture (Wexler et al. 2007): find the most alike
one for each, let them vote what the pixels are, and again, from coarse to fine. On coarse levels all patches are compared;
on fine ones each starts where its coarse one was found, and looks around and at what its neighbours found (PatchMatch,
Barnes et al. 2009). Patches are compared by their principal components.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt
from torch import Tensor

PATCH = 7  # pixels a side
COMPONENTS = 24  # numbers that a patch is told by
SAMPLES = 20_000  # patches that these are found from
THIN = 4.0  # pixels: how far into a hole the coarsest level may reach
SMALLEST = 3 * PATCH  # pixels a side of the coarsest level
EXACT = 6e7  # pairs of patches up to which all are compared
DETAILS = 2  # finest levels, on which what is begun is made anew
ROUNDS = (6, 4, 3, 2)  # of searching and voting: on the coarsest level, the next, ...; the last for all that follow
SEARCHES = 2  # of PatchMatch in a round
FIT = 0.08  # difference of colours from which on details do not fit what was begun
OUTWARDS, MIDDLE = 1.3, 0.05  # how much less a patch's vote counts per pixel away from what is known; from its own middle
NEAR, KIND = 0.5, 0.5  # a whole picture's distance, and opposite kinds, count as much as colours that differ by this


@dataclass(frozen=True)
class _Level:
    image: Tensor  # (H, W, 3)
    hole: Tensor  # (H, W) bool: what is filled on this level
    open: Tensor  # (H, W) bool: that of it for which the level before is the only guess
    example: Tensor  # (H, W) bool
    kinds: Tensor  # (H, W, 2) what belongs together is near each other


def synthesised(
    image: Tensor,
    hole: Tensor,
    example: Tensor,
    seed: int = 0,
    begun: Tensor | None = None,
    kind: Tensor | None = None,
) -> Tensor:
    """The picture (H, W, 3) in 0..1 with the hole (H, W) filled by example of the pixels (H, W) that may be.

    What the hole shows before is where the coarsest level starts: something smooth; where it is begun (H, W) already, only
    its details are made anew. Same seed, same pixels; as it is where no patch is an example.
    """
    if not hole.any() or not example.any():
        return image
    kind = hole.long() * 0 if kind is None else kind
    # a place on a circle for each kind, so that all are about as far apart
    turn = 2 * torch.pi * kind / (int(kind.max() - kind.min()) + 1)
    kinds = torch.stack([turn.cos(), turn.sin()], -1).to(image)
    levels = _pyramid(image, hole, example, torch.zeros_like(hole) if begun is None else begun, kinds)
    generator = torch.Generator().manual_seed(seed)
    found = filled = None
    for number, level in reversed(list(enumerate(levels))):
        start = level.image
        if filled is not None:
            start = torch.where(level.open[..., None], _enlarged(filled, level.open.shape), start)
        search = _Search(level, generator, 1 if number > 1 else 2)
        if not len(search.targets) or not len(search.sources):
            filled, found = start, None
            continue
        rounds = ROUNDS[min(len(levels) - 1 - number, len(ROUNDS) - 1)]
        filled, found = search.run(start, found, rounds, last=number == 0)
    return torch.where(hole[..., None], filled, image)


def _pyramid(image: Tensor, hole: Tensor, example: Tensor, begun: Tensor, kinds: Tensor) -> list[_Level]:
    """From fine to coarse, by halves."""
    whole, levels = ~hole, []
    known = whole | begun
    while True:
        fill = ~known if len(levels) >= DETAILS else ~whole
        levels.append(_Level(image, fill, ~known, example, kinds))
        deep = distance_transform_edt(F.pad(~known, (1, 1, 1, 1), value=not known.any()).cpu().numpy()).max()
        if (deep <= THIN and len(levels) > DETAILS) or min(known.shape) < 2 * SMALLEST:
            return levels
        planes, share = image.permute(2, 0, 1)[None], _halved(known[None, None].float())
        colours = _halved(planes * known) / share.clamp_min(1e-6)
        image = torch.where(share > 0.25, colours, _halved(planes))[0].permute(1, 2, 0)
        known, whole = (share[0, 0] > 0.25), (_halved(whole[None, None].float())[0, 0] > 0.25)
        example = _halved(example[None, None].float())[0, 0] == 1
        kinds = _halved(kinds.permute(2, 0, 1)[None])[0].permute(1, 2, 0)


def _halved(planes: Tensor) -> Tensor:
    return F.avg_pool2d(planes, 2, ceil_mode=True, count_include_pad=False)


def _enlarged(image: Tensor, size: tuple[int, int]) -> Tensor:
    large = F.interpolate(image.permute(2, 0, 1)[None], scale_factor=2, mode="bilinear", align_corners=False)[0]
    return large.permute(1, 2, 0)[: size[0], : size[1]]


class _Search:
    """One level: which patches are looked for, and among which."""

    def __init__(self, level: _Level, generator: torch.Generator, stride: int):
        self.level, self.generator = level, generator
        height, width = level.hole.shape
        self.rows, self.columns = height - PATCH + 1, width - PATCH + 1  # a patch is known by its first pixel
        whole = F.max_pool2d((~level.example)[None].float(), PATCH, 1)[0] == 0
        touched = F.max_pool2d(level.hole[None].float(), PATCH, 1)[0] > 0
        keep = torch.zeros_like(touched)
        keep[::stride, ::stride] = True
        keep[-1, ::stride] = keep[::stride, -1] = keep[-1, -1] = True
        self.allowed = whole
        self.sources = whole.view(-1).nonzero()[:, 0]
        self.targets = (touched & keep).view(-1).nonzero()[:, 0]
        self.stride = stride
        self.place = torch.full((self.rows * self.columns,), -1)
        self.place[self.targets] = torch.arange(len(self.targets))
        away = torch.from_numpy(distance_transform_edt(level.hole.cpu().numpy())).to(level.image)
        width = level.hole.shape[1]
        self.inner = [(i, j, i * width + j) for i in range(PATCH) for j in range(PATCH)]  # pixels of a patch, from its first
        middle = self._first(self.targets) + PATCH // 2 * (width + 1)
        self.trust = OUTWARDS ** -away.view(-1)[middle].clamp_max(30.0)

    def _first(self, patch: Tensor) -> Tensor:
        """The first pixel of each patch; both are counted row by row."""
        return patch + patch // self.columns * (PATCH - 1)

    def run(self, image: Tensor, found: tuple | None, rounds: int, last: bool) -> tuple[Tensor, tuple]:
        basis, beside = self._basis(image), torch.cat([self._where(), self._kinds()], 1)
        for number in range(rounds):
            described = F.conv2d(image.permute(2, 0, 1)[None], basis)[0].flatten(1).T.contiguous()
            described = torch.cat([described, beside], 1)
            if len(self.targets) * len(self.sources) <= EXACT:
                chosen, apart = self._compare_all(described)
            else:
                chosen, apart = self._match(described, self._from(found) if number == 0 else chosen)
            image = self._vote(image, chosen, apart, sharp=last and number == rounds - 1)
        return image, (chosen, self)

    def _basis(self, image: Tensor) -> Tensor:
        """Principal components of the examples, (C, 3, P, P)."""
        some = self.sources[:: max(1, len(self.sources) // SAMPLES)]
        flat = image.reshape(-1, 3)
        first = self._first(some)
        patches = torch.stack([flat[first + offset] for *_, offset in self.inner], -1)  # (N, 3, P*P)
        patches = patches.flatten(1) - patches.flatten(1).mean(0)
        spread = (patches.T @ patches / len(patches)).double()
        # of plain colours nearly all components are nothing, and no solver tells equal ones apart
        spread += torch.linspace(0, 1e-7, len(spread), dtype=torch.float64).diag()
        vectors = torch.linalg.eigh(spread)[1][:, -COMPONENTS:].to(image)
        return vectors.T.reshape(-1, 3, PATCH, PATCH).contiguous()

    def _where(self) -> Tensor:
        """(N, 2) places of patches, as far apart as colours."""
        v, u = torch.meshgrid(torch.arange(self.rows), torch.arange(self.columns), indexing="ij")
        scale = NEAR * PATCH * 3**0.5 / max(self.level.hole.shape)
        return torch.stack([v, u], -1).view(-1, 2).float() * scale

    def _kinds(self) -> Tensor:
        """(N, 2) of what kind the pixels of patches are, as far apart as colours."""
        mean = F.avg_pool2d(self.level.kinds.permute(2, 0, 1)[None], PATCH, 1)[0].flatten(1).T
        return mean * (KIND * PATCH * 3**0.5 / 2)

    def _compare_all(self, described: Tensor) -> tuple[Tensor, Tensor]:
        sources, chosen, apart = described[self.sources], [], []
        norms = sources.square().sum(1)
        for some in self.targets.split(max(1, int(2e7) // len(self.sources))):
            asked = described[some]
            best = torch.addmm(norms, asked, sources.T, alpha=-2).min(1)
            chosen.append(self.sources[best.indices])
            apart.append(best.values + asked.square().sum(1))
        return torch.cat(chosen), torch.cat(apart).clamp_min(0)

    def _from(self, found: tuple | None) -> Tensor:
        """What was found on the coarser level, here; anything at all where that is none."""
        anything = self.sources[torch.randint(len(self.sources), (len(self.targets),), generator=self.generator)]
        if found is None:
            return anything
        chosen, coarse = found
        row, column = self.targets // self.columns, self.targets % self.columns
        r, c = ((part // 2).clamp_max(most - 1) for part, most in ((row, coarse.rows), (column, coarse.columns)))
        known = coarse.place[r * coarse.columns + c]
        source = chosen[known.clamp_min(0)]
        moved = row + 2 * (source // coarse.columns - r), column + 2 * (source % coarse.columns - c)
        return torch.where(known >= 0, self._or(*moved, anything), anything)

    def _or(self, row: Tensor, column: Tensor, otherwise: Tensor) -> Tensor:
        """The patches at these places where they are examples, else others."""
        inside = (row >= 0) & (row < self.rows) & (column >= 0) & (column < self.columns)
        patch = torch.where(inside, row * self.columns + column, 0)
        return torch.where(inside & self.allowed.view(-1)[patch], patch, otherwise)

    def _match(self, described: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        asked = described[self.targets]
        row, column = self.targets // self.columns, self.targets % self.columns

        def distance(patch: Tensor) -> Tensor:
            return (described[patch] - asked).square_().sum(1)

        apart = distance(chosen)

        def offer(r: Tensor, c: Tensor) -> None:
            nonlocal chosen, apart
            offered = self._or(r, c, chosen)
            its = distance(offered)
            better = its < apart
            chosen, apart = torch.where(better, offered, chosen), torch.where(better, its, apart)

        step = self.stride
        for _ in range(SEARCHES):
            for down, right in ((0, step), (step, 0), (0, -step), (-step, 0)):
                r, c = row + down, column + right
                inside = (r >= 0) & (r < self.rows) & (c >= 0) & (c < self.columns)
                beside = self.place[torch.where(inside, r * self.columns + c, 0)]
                known = inside & (beside >= 0)
                its = chosen[beside.clamp_min(0)]
                offer(torch.where(known, its // self.columns - down, -1), its % self.columns - right)
            reach = max(self.rows, self.columns) // 4
            while reach >= 1:
                moved = torch.randint(-reach, reach + 1, (2, len(chosen)), generator=self.generator)
                offer(chosen // self.columns + moved[0], chosen % self.columns + moved[1])
                reach //= 3
        return chosen, apart

    def _vote(self, image: Tensor, chosen: Tensor, apart: Tensor, sharp: bool) -> Tensor:
        spread = apart.quantile(0.75) if len(apart) < 2**24 else apart.median()
        weight = self.trust * torch.exp(-apart / (2 * spread.clamp_min(1e-9)))
        flat, total, weights = image.reshape(-1, 3), torch.zeros_like(image).view(-1, 3), image.new_zeros(image.shape[:2].numel())
        misfit = torch.zeros_like(weights)[:, None]
        to, source = self._first(self.targets), self._first(chosen)
        for i, j, offset in self.inner:
            # at the end the middle of a patch decides: a mean of many patches is a blur
            w = weight * MIDDLE ** max(abs(i - PATCH // 2), abs(j - PATCH // 2)) if sharp else weight
            total.index_add_(0, to + offset, flat[source + offset] * w[:, None])
            weights.index_add_(0, to + offset, w)
            misfit.index_add_(0, to + offset, (apart * w)[:, None])
        seen, weights = (weights > 0).view(image.shape[:2]) & self.level.hole, weights.clamp_min(1e-30)[:, None]
        voted, off = ((part / weights).view(*image.shape[:2], -1) for part in (total, misfit))
        # what was begun stays where nothing in the picture has such details
        share = torch.where(self.level.open[..., None], 1.0, torch.exp(-off / (2 * FIT**2 * PATCH**2 * 3)))
        return torch.where(seen[..., None], image + share * (voted - image), image)
