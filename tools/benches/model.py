"""What the transformer costs: one forward pass beside the host's own Wan 2.1, and what is computed once per chunk.

Counts hold on any machine: they are taken on the meta device at the released size. Times are of random weights, on
a GPU at the released size, otherwise of a small model.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import comfy.ldm.modules.attention as attention
import comfy.ops
import torch
from comfy.ldm.wan.model import WanModel
from host import TOOLS, load
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lyra_core.conditioning.framepack import FramePackLayout
from lyra_core.conditioning.history import RAY_CHANNELS, SLOT_CHANNELS
from lyra_core.models.lyra2 import PATCH, HistoryMaps, HistoryTokens, Lyra2Model

from . import Result

tiny_models = load("tiny_models", TOOLS / "tiny_models.py")

LATENTS = (60, 104)  # 480x832
SMALL = {
    **tiny_models.LYRA2_14B,
    "rank": 64,
    "dim": 384,
    "ffn_dim": 1024,
    "num_heads": 3,
    "num_layers": 4,
    "text_dim": 64,
}
SMALL_LATENTS = (12, 20)
# dense, of matrices in bfloat16, as the makers state it; utilisation is not printed for other devices
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


@dataclass(frozen=True)
class Inputs:
    """All that one forward pass takes."""

    x: Tensor  # (1, 36, T, h, w)
    timestep: Tensor  # (1,)
    context: Tensor  # (1, 512, text_dim)
    image: Tensor  # (1, 257, 1280)
    maps: HistoryMaps

    def run(self, network: Callable, history: HistoryMaps | HistoryTokens, override=None) -> Tensor:
        return network(self.x, **self._common(override), history=history)

    def run_wan(self, network: Callable, tokens: int, override=None) -> Tensor:
        """One row of patches: as many tokens as asked, on the host's own path from end to end."""
        return network(self.x.new_zeros(1, self.x.shape[1], 1, PATCH, PATCH * tokens), **self._common(override))

    def _common(self, override) -> dict:
        options = {"optimized_attention_override": override} if override else {}
        return {
            "timestep": self.timestep,
            "context": self.context,
            "clip_fea": self.image,
            "transformer_options": options,
        }


def inputs(config: dict, size: tuple[int, int], device, dtype) -> Inputs:
    layout = FramePackLayout.parse(config["framepack"])
    slots, spatial, new = layout.slots(), layout.slots("spatial"), layout.new_latents

    def made(*shape: int) -> Tensor:
        return torch.randn(1, *shape, device=device, dtype=dtype)

    maps = HistoryMaps(
        made(config["in_dim"], slots, *size),
        made(RAY_CHANNELS, slots + new, *size),
        made(SLOT_CHANNELS * spatial, spatial + new, *size).clamp(-1, 1),
    )
    timestep = torch.full((1,), 500.0, device=device)
    return Inputs(made(config["in_dim"], new, *size), timestep, made(512, config["text_dim"]), made(257, 1280), maps)


def token_count(config: dict, size: tuple[int, int]) -> int:
    layout = FramePackLayout.parse(config["framepack"])
    return layout.history_tokens(*size) + layout.new_latents * prod(size) // PATCH**2


def built(kind: type, config: dict, device, dtype, weights=None, operations=comfy.ops.manual_cast):
    """A network with random weights, which are made where they stay."""
    network = kind(**config, device=device, dtype=weights or dtype, operations=operations).requires_grad_(False).eval()
    for name, weight in network.named_parameters():
        if weight.device.type != "meta":
            spread = prod(weight.shape[1:]) ** -0.5 if weight.ndim > 1 else 0.1
            values = torch.randn(weight.shape, device=weight.device, dtype=torch.bfloat16) * spread
            weight.copy_(values + 1 if "norm" in name and name.endswith("weight") else values)
    return network


def wan_config(config: dict) -> dict:
    """The host's image-to-video Wan of the same size."""
    return {key: value for key, value in config.items() if key not in ("framepack", "rank")}


# ----------------------------------------------------------------------------------------------------------- counts


def plain_attention(_host, q, k, v, heads, **_options) -> Tensor:
    """The host's contract in one call that the meta device and the FLOP counter know."""
    q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def flops(work: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


class WidestRows(TorchDispatchMode):
    """Watches every operation for tensors with this last axis; `bytes` is the largest of them."""

    def __init__(self, width: int):
        super().__init__()
        self.width, self.bytes = width, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.shape[-1:] == (self.width,):
            self.bytes = max(self.bytes, out.numel() * out.element_size())
        return out


def count_released_size() -> Iterator[Result]:
    """FLOPs and sizes of the 14B at 480x832, on the meta device."""
    config, dtype = tiny_models.LYRA2_14B, torch.bfloat16
    with torch.device("meta"):
        network = built(Lyra2Model, config, "meta", dtype, operations=comfy.ops.disable_weight_init)
        given = inputs(config, LATENTS, "meta", dtype)
        tokens = network.encode(given.maps)
        step = flops(lambda: given.run(network, tokens, plain_attention))
        parts = {
            "history embedding": flops(lambda: network.embed_history(given.maps.latents)),
            "correspondence encoding": flops(
                lambda: network.encode_correspondences(given.maps.correspondences, "meta", dtype)
            ),
        }
        width = network.blocks[0].buffer_encoder[0].in_features
        with WidestRows(width) as watch:
            network.encode(given.maps)
        wan = built(WanModel, wan_config(config), "meta", dtype, operations=comfy.ops.disable_weight_init)
        length = token_count(config, LATENTS)
        plain = flops(lambda: given.run_wan(wan, length, plain_attention))
    yield Result("model: weights of the released size", f"{sum(w.numel() for w in network.parameters()) / 1e9:.2f} B")
    yield Result("model: tokens at 480x832", f"{length}")
    yield Result("model: one forward pass", f"{step / 1e15:.2f} PFLOP")
    yield Result("model: over that of Wan 2.1 I2V 14B with as many tokens", f"{step / plain:.3f}")
    for name, count in parts.items():
        yield Result(f"model: {name}, once per chunk instead of per step", f"{count / 1e12:.1f} TFLOP")
    kept = sum(part.numel() * part.element_size() for part in tokens)
    yield Result("model: kept over a chunk", f"{kept / 2**20:.0f} MiB")
    wide = length * width * dtype.itemsize
    yield Result(
        "model: sines and cosines at a time, of all that are encoded",
        f"{watch.bytes / 2**20:.0f} of {wide / 2**20:.0f} MiB",
        "<= 1/20",
        watch.bytes <= wide / 20,
    )


# ------------------------------------------------------------------------------------------------------------ times


def timed(work: Callable[[], object], device, repeats: int) -> float:
    """Median seconds, after one run that doesn't count."""
    taken = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return sorted(taken[1:])[repeats // 2]


def beside_wan(config, size, device, dtype, weights=None, override=None, compiled=False, repeats=5) -> Iterator[Result]:
    """One forward pass, and the host's Wan at the same number of tokens."""
    how = [str(weights or dtype).removeprefix("torch."), override.__name__ if override else "default attention"]
    name = "model: " + ", ".join(how + ["compiled"] * compiled)
    given, length = inputs(config, size, device, dtype), token_count(config, size)
    on_gpu = torch.device(device).type == "cuda"
    operations = comfy.ops.manual_cast if weights else comfy.ops.disable_weight_init  # as the host chooses them

    def lyra() -> tuple[float, float, list[Result]]:
        network = built(Lyra2Model, config, device, dtype, weights, operations)
        history, run = network.encode(given.maps), torch.compile(network) if compiled else network
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        step = timed(lambda: given.run(run, history, override), device, repeats)
        peak = torch.cuda.max_memory_allocated(device) if on_gpu else 0
        first = not (compiled or override or weights)
        return step, peak, list(savings(network, given, step, device, repeats)) if first else []

    def wan() -> float:
        network = built(WanModel, wan_config(config), device, dtype, weights, operations)
        run = torch.compile(network) if compiled else network
        return timed(lambda: given.run_wan(run, length, override), device, repeats)

    step, peak, saved = lyra()
    free(on_gpu)
    plain = wan()
    free(on_gpu)
    yield from saved
    yield Result(f"{name}: step over that of Wan 2.1, {length} tokens", f"{step / plain:.2f}")
    if on_gpu:
        where = torch.cuda.get_device_name(device)
        yield Result(f"{name}: step on {where}", f"{step:.2f} s")
        yield Result(f"{name}: peak memory", f"{peak / 2**30:.1f} GiB")
        top = next((value for key, value in PEAK_FLOPS.items() if key in where), None)
        if top:
            yield Result(f"{name}: FLOP utilisation", f"{100 * step_flops(config, size) / step / top:.0f} %")


def free(on_gpu: bool) -> None:
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()


def step_flops(config: dict, size: tuple[int, int]) -> float:
    with torch.device("meta"):
        network = built(Lyra2Model, config, "meta", torch.bfloat16, operations=comfy.ops.disable_weight_init)
        given = inputs(config, size, "meta", torch.bfloat16)
        history = network.encode(given.maps)
        return flops(lambda: given.run(network, history, plain_attention))


def savings(network: Lyra2Model, given: Inputs, step: float, device, repeats: int) -> Iterator[Result]:
    """What each part that a chunk's steps share would add to every step."""
    size, dtype = (*given.x.shape[-2:], given.x.shape[2]), given.x.dtype
    parts = {
        "history embedding": lambda: network.embed_history(given.maps.latents),
        "positions and rotations": lambda: network.rope(network.positions(*size, device)),
        "ray tokens": lambda: network.ray_tokens(given.maps.rays),
        "correspondence encoding": lambda: network.encode_correspondences(given.maps.correspondences, device, dtype),
    }
    for name, work in parts.items():
        share = timed(work, device, repeats) / step
        yield Result(f"model: {name}, share of a step that it would add", f"{100 * share:.1f} %")


@torch.inference_mode()
def bench_model() -> Iterator[Result]:
    yield from count_released_size()
    if not torch.cuda.is_available():
        yield from beside_wan(SMALL, SMALL_LATENTS, "cpu", torch.float32)
        yield Result("model: the released size on a GPU", "not measured: no GPU here")
        return
    for weights in (None, torch.float8_e4m3fn):
        for override in (None, sage_attention) if attention.SAGE_ATTENTION_IS_AVAILABLE else (None,):
            for compiled in (False, True):
                yield from beside_wan(
                    tiny_models.LYRA2_14B, LATENTS, "cuda", torch.bfloat16, weights, override, compiled, 2
                )
    if not attention.SAGE_ATTENTION_IS_AVAILABLE:
        yield Result("model: sage attention", "not measured: sageattention is not installed")


def sage_attention(_host, *args, **kwargs) -> Tensor:
    return attention.attention_sage(*args, **kwargs)


BENCHES = {"model": bench_model}
