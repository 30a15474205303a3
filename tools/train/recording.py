"""A step of learning on CUDA: recorded once for tensors of some sizes, and played from then on, in a fraction of the time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Recording:
    """`learn` takes tensors of the same sizes each time, makes a step of the optimiser and gives the loss, without asking the device."""

    def __init__(self, learn: Callable[..., Tensor], weights: Sequence[Tensor], optimiser: torch.optim.Optimizer):
        self.learn, self.weights, self.optimiser = learn, weights, optimiser
        self.recordable = weights[0].is_cuda
        self.played: dict[tuple, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]] = {}

    def __call__(self, *given: Tensor) -> Tensor:
        """A step, and its loss, a scalar on the device."""
        if not self.ready(*given):
            return self.learn(*given)
        graph, inputs, loss = self.played[_sizes(given)]
        for place, value in zip(inputs, given, strict=True):
            place.copy_(value)
        graph.replay()
        return loss.clone()

    def ready(self, *given: Tensor) -> bool:
        """Whether a step on tensors of these sizes is recorded; tried until it fails once. Without, steps are the same and take longer."""
        if _sizes(given) not in self.played and self.recordable:
            try:
                self.played[_sizes(given)] = self._record(given)
            except RuntimeError as reason:
                self.recordable = False
                print(f"steps are not recorded, which makes them slower: {reason}", flush=True)
        return _sizes(given) in self.played

    def _record(self, given: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]:
        """Weights and moments are afterwards as they were."""
        inputs = tuple(value.clone() for value in given)
        before = [weight.detach().clone() for weight in self.weights]
        moments = {weight: {name: value.clone() for name, value in self.optimiser.state[weight].items()} for weight in self.optimiser.state}
        try:
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                for _ in range(3):
                    self.learn(*inputs)
            torch.cuda.current_stream().wait_stream(beside)
            self.optimiser.zero_grad()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                loss = self.learn(*inputs)
        finally:
            # where a recording that failed has not gone back to
            torch.cuda.set_stream(torch.cuda.default_stream(self.weights[0].device))
            torch.cuda.synchronize()
            with torch.no_grad():
                for weight, value in zip(self.weights, before, strict=True):
                    weight.copy_(value)
                    for name, moment in self.optimiser.state[weight].items():
                        moment.copy_(moments[weight][name]) if weight in moments else moment.zero_()
        return graph, inputs, loss


def optimiser(weights: Sequence[Tensor], rate: float, **options) -> torch.optim.AdamW:
    """AdamW whose steps can be recorded on CUDA."""
    cuda = weights[0].is_cuda
    rate = torch.tensor(rate, device=weights[0].device) if cuda else rate
    return torch.optim.AdamW(weights, lr=rate, fused=cuda or None, capturable=cuda, **options)


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Also of steps that are recorded."""
    for group in optimiser.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _sizes(given: Sequence[Tensor]) -> tuple:
    return tuple(tuple(value.shape) for value in given)
