"""What is trained of a model of the host: its weight adapters (LoRA), or the weights themselves.

Both are copies of the model, so that the one that others hold stays as it was, and both end as what the stock LoRA loader, hooks
and save nodes take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter import adapter_maps
from comfy.weight_adapter.bypass import BypassInjectionManager
from torch import Tensor, nn

from ..training.contracts import Model
from ..training.optimisation import Filter, trained
from .learning import as_model
from .lyra2_host import check_model

PREFIX = "diffusion_model."  # of the network's weights, as the host's LoRA files name them


@dataclass(frozen=True)
class Trainee:
    """A copy of a model, and what is trained of it."""

    patcher: ModelPatcher
    weights: Mapping[str, nn.Parameter]
    adapters: Mapping[str, nn.Module]  # by the name of the module that they change; none where the weights are trained themselves
    begun: Mapping[str, Tensor]  # the weights before, where they are trained themselves

    @property
    def network(self) -> nn.Module:
        return self.patcher.model.diffusion_model

    def lora(self) -> dict[str, Tensor]:
        """What was learned, as the host's LoRA files have it: adapters, or differences of weights."""
        found = {
            f"{PREFIX}{module}.{name}": weight
            for module, adapter in self.adapters.items()
            for name, weight in adapter.named_parameters()
        }
        for name, before in self.begun.items():
            module, _, kind = name.rpartition(".")
            known = {"weight": f"{module}.diff", "bias": f"{module}.diff_b"}
            found[PREFIX + known.get(kind, f"{name}.diff")] = self.weights[name].detach().cpu() - before
        return {name: weight.detach().to("cpu", copy=True).contiguous() for name, weight in found.items()}


def with_adapters(model: ModelPatcher, chosen: Filter, rank: int, seed: int = 0) -> Trainee:
    """A copy of a Lyra 2 model with a LoRA on every matrix of these names; its own weights are frozen.

    ValueError for a rank below 1, another model, or names that no matrix has.
    """
    if rank < 1:
        raise ValueError(f"a LoRA has a rank of 1 at least, found {rank}; 16 is usual")
    copy = _copied(model)
    copy.model.requires_grad_(False)
    modules = {
        name: module
        for name, module in copy.model.diffusion_model.named_modules()
        if hasattr(module, "weight_function") and module.weight is not None and module.weight.ndim > 1 and chosen(f"{name}.weight")
    }
    if not modules:
        raise ValueError("no matrix of the network has such a name; nothing would be learned")
    adapters = {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, module in modules.items():
            empty = torch.empty(module.weight.shape, device="meta")
            adapter = adapter_maps["LoRA"].create_train(torch.empty_like(empty, device="cpu"), rank=rank, alpha=float(rank))
            adapters[name] = adapter.float().train()
            adapter.h = _in_the_type_of_its_input(adapter.h)
    weights = {
        f"{module}.{name}": weight.requires_grad_(True)
        for module, adapter in adapters.items()
        for name, weight in adapter.named_parameters()
        if name != "alpha"
    }
    return Trainee(copy, weights, adapters, {})


def _in_the_type_of_its_input(h: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Adapters are float32 for the sake of small steps; their products are of the network's type."""

    def mixed(x: Tensor, base_out: Tensor) -> Tensor:
        half = x.dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(x.device.type, x.dtype if half else torch.bfloat16, enabled=half):
            return h(x, base_out).to(base_out.dtype)

    return mixed


def of_all_weights(model: ModelPatcher, chosen: Filter) -> Trainee:
    """A float32 copy of a Lyra 2 model of which the weights of these names are trained; for small models. ValueError as above."""
    if model.patches:
        raise ValueError("a model with LoRAs can't have its own weights trained; save it with ModelSave first, or train a LoRA on top")
    copy = _copied(model)
    copy.model.diffusion_model.to(torch.float32)
    copy.set_model_compute_dtype(torch.float32)
    weights = trained(copy.model.diffusion_model, chosen)
    return Trainee(copy, weights, {}, {name: weight.detach().to("cpu", copy=True) for name, weight in weights.items()})


def _copied(model: ModelPatcher) -> ModelPatcher:
    check_model(model)
    if model.cached_patcher_init is None:
        raise ValueError("the host can't load this model anew, which training needs; load it from one file, with UNETLoader")
    return model.clone(force_deepcopy=True)


@contextmanager
def in_place(
    trainee: Trainee,
    beside: list[ModelPatcher],
    needed: float = 0,
    offload: bool = False,
    checkpointed: bool = True,
    half: bool = False,
    pause: Callable[[], None] = lambda: None,
) -> Iterator[Model]:
    """The model on its device, with its adapters, while it is trained; `beside` it those of what else a step needs.

    needed: bytes that a step takes; offload: weights that don't fit come from memory, unless they are trained themselves; half:
    products in bfloat16, of weights in float32; pause: see `as_model`.
    """
    management, patcher = comfy.model_management, trainee.patcher
    management.load_models_gpu([*beside, patcher], memory_required=needed, force_full_load=not (offload and trainee.adapters))
    for weight in trainee.weights.values():
        weight.data = weight.data.to(patcher.load_device)
    manager = BypassInjectionManager()
    for name, adapter in trainee.adapters.items():
        manager.add_adapter(f"{name}.weight", adapter)
    injections = manager.create_injections(trainee.network)
    dtype = patcher.model.get_dtype_inference() if trainee.adapters else torch.float32
    call = as_model(trainee.network, patcher.load_device, dtype, checkpointed, pause)

    def velocity(noisy, timesteps, condition):
        with torch.autocast(patcher.load_device.type, torch.bfloat16, enabled=half):
            return call(noisy, timesteps, condition)

    for injection in injections:
        injection.inject(patcher)
    try:
        yield velocity
    finally:
        for injection in injections:
            injection.eject(patcher)
