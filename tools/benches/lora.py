"""What training a LoRA costs on a GPU: seconds a step and peak memory, at the released size. `TINY=1` rehearses it on the processor.

Weights are random, made on the device; what is learned from is a scene of boxes, encoded by the VAE at its released size. Text and
CLIP are made up, since they only run before the first step. Each way begins only while there is time for it (LIMIT seconds, 360).
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import comfy.model_management as management
import comfy.sd
import comfy.utils
import torch
from train import films

from lyra_core.models import adapters, attention, devices, learning, lyra2_host, planner, streaming_vae
from lyra_core.models.planner import GIB
from lyra_core.training import loop, optimisation
from lyra_core.training.contracts import Encoders
from lyra_core.training.examples import prepared
from lyra_core.training.recipe import Recipe

from . import Result
from .gpu import CONFIG, CUDA, DEVICE, LIMIT, SIZE, TINY, settle, timed, tiny_models

RANK = 16
CARD = 80  # GiB that it must fit
BF16 = torch.bfloat16 if CUDA else None
# name, weights' type, GiB of a card that offloads (None: all in place), plain steps, steps that spoil a chunk first, seconds it takes
WAYS = (
    ("bf16", BF16, None, 2, 1, 0.0),
    ("bf16 offloaded, 48 GiB allowed", BF16, 48, 1, 0, 50.0),
    ("fp8", torch.float8_e4m3fn, None, 1, 0, 45.0),
)


def lora() -> Iterator[Result]:
    if not (CUDA or TINY):
        yield Result("lora", "not measured: no GPU here")
        return
    began = time.perf_counter()
    yield Result("lora: on", torch.cuda.get_device_name(0) if CUDA else "no GPU: a rehearsal")
    lyra2_host.register()
    vae, encoders, sample = learned_from()
    yield Result("lora: a film of two chunks and its latents", f"{time.perf_counter() - began:.1f} s")
    trainee = None
    for name, dtype, gib, plain, spoilt, needs in WAYS:
        left = LIMIT - (time.perf_counter() - began)
        if left < needs:
            yield Result(f"lora: {name}", f"not measured: {left:.0f} s left")
            continue
        try:
            start = time.perf_counter()
            if trainee is None or dtype is not BF16:
                trainee = None
                _release()
                trainee = adapters.with_adapters(random_model(dtype), optimisation.of_lyra2, RANK)
            else:
                management.unload_all_models()
            settle()
            took = time.perf_counter() - start
            yield Result(f"lora: {name}: weights, random", f"{trainee.patcher.model_size() / GIB:.1f} GiB, {took:.1f} s")
            yield from measured(name, trainee, gib, plain, spoilt, vae, encoders, sample)
        except Exception as problem:  # out of memory is one of them; the other ways are measured all the same
            yield Result(f"lora: {name}", f"{type(problem).__name__}: {str(problem)[:300]}", "runs", False)
    trainee = None
    _release()
    if CUDA:
        yield from attention_with_gradients()


def learned_from():
    """The VAE, everything frozen, and a film of two chunks with its latents."""
    recipe = Recipe()
    sample = films.film(0, recipe, 2, SIZE) if TINY else films.filmed([0], recipe, 2, SIZE, device=DEVICE)[0]
    with tempfile.TemporaryDirectory() as folder:
        file = tiny_models.write_vae(Path(folder) / "vae.safetensors", 8 if TINY else 96)
        vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(file)))
    streaming_vae.load(vae, tuple(side // 8 for side in SIZE))
    random = torch.Generator().manual_seed(3)
    text, picture = 0.1 * torch.randn(512, CONFIG["text_dim"], generator=random), torch.randn(257, 1280, generator=random)
    encoders = Encoders(learning.HostCodec(vae), lambda shown: picture, lambda caption: text, devices.geometry_device(SIZE))
    return vae, encoders, prepared(sample, encoders.codec, recipe)


def random_model(dtype: torch.dtype | None):
    """The transformer through the host's loader; on a GPU it never is in memory, which would take half a minute."""

    def loaded(where: torch.device):
        generator = torch.Generator(DEVICE).manual_seed(0)
        weights = {lyra2_host.CONFIG_KEY: lyra2_host.pack_config(CONFIG)}
        for key, shape in lyra2_host.weight_shapes(CONFIG).items():
            value = torch.randn(shape, device=DEVICE, dtype=BF16 or torch.float32, generator=generator)
            weights[key] = tiny_models.scaled(key, value).to(where)
        options = {"dtype": dtype} if dtype else {}
        return comfy.sd.load_diffusion_model_state_dict(weights, model_options=options, disable_dynamic=True)

    model = None
    if CUDA:
        try:
            with torch.device(DEVICE):
                model = loaded(DEVICE)
        except Exception as reason:
            print(f"the transformer is made in memory, which takes longer: {reason}", flush=True)
            _release()
    model = model or loaded(torch.device("cpu"))
    model.cached_patcher_init = (lambda disable_dynamic=True: model, ())  # nobody else uses it, so it is no copy that is trained
    return model


def measured(name: str, trainee, gib: float | None, plain: int, spoilt: int, vae, encoders: Encoders, sample) -> Iterator[Result]:
    before, total = management.EXTRA_RESERVED_VRAM, torch.cuda.get_device_properties(0).total_memory / GIB if CUDA else 0
    counted = planner.teaching(
        trainee.network, SIZE, 2, sum(w.numel() for w in trainee.weights.values()), trainee.patcher.model_size()
    )
    if CUDA and gib:
        management.EXTRA_RESERVED_VRAM = int((total - gib) * GIB) + before
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib / total))
    try:
        with adapters.in_place(trainee, [vae.patcher], counted.working * GIB, offload=bool(gib)) as model:
            if CUDA:
                gc.collect()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                yield Result(f"lora: {name}: on the card before the first step", f"{torch.cuda.memory_allocated() / GIB:.1f} GiB")
            for kind, count, share in (("plain", plain, 0.0), ("spoilt", spoilt, 1.0)):
                if count:
                    recipe = Recipe(self_augmented=share, photo_only=0.0)
                    yield from _steps(f"lora: {name}: {kind} step", sample, model, encoders, recipe, trainee, loop.Course(count))
                if CUDA:
                    peak, held = (ask() / GIB for ask in (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved))
                    fits = (f"at most {CARD} GiB", held <= CARD) if not gib else ()
                    told = f"{peak:.1f}; {held:.1f}; {counted.needed:.1f} GiB"
                    yield Result(f"lora: {name}: peak so far; held by torch; counted", told, *fits)
    finally:
        if CUDA:
            torch.cuda.set_per_process_memory_fraction(1.0)
        management.EXTRA_RESERVED_VRAM = before


def _steps(name: str, sample, model, encoders: Encoders, recipe: Recipe, trainee, course) -> Iterator[Result]:
    """Each as soon as it is made, since the clock may end all."""
    took, start = [], time.perf_counter()

    def on_step(step: loop.Step) -> None:
        nonlocal start
        settle()
        took.append(time.perf_counter() - start)
        print(f"{name} {step.number}: {took[-1]:.2f} s, loss {step.loss:.3f}, gradient {step.norm:.3f}", flush=True)
        start = time.perf_counter()

    with torch.inference_mode(False):
        loop.train([sample], model, encoders, recipe, trainee.weights, course, on_step=on_step)
    yield Result(name, f"{', '.join(f'{seconds:.2f}' for seconds in took)} s")


def attention_with_gradients() -> Iterator[Result]:
    """Of one block, there and back, by each of torch's kernels: the host's first choice is the first."""
    heads, width = CONFIG["num_heads"], CONFIG["dim"] // CONFIG["num_heads"]
    q = torch.randn(1, planner.tokens(SIZE), heads * width, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    for backend in (attention.SDPBackend.FLASH_ATTENTION, attention.SDPBackend.CUDNN_ATTENTION):
        name = f"lora: self-attention with gradients, {backend.name.removesuffix('_ATTENTION')}"
        try:
            took = min(timed(lambda b=backend: attention.by_cudnn(q, q, q, heads, b).sum().backward()) for _ in range(3))
            yield Result(name, f"{1000 * took:.1f} ms")
        except RuntimeError as reason:
            yield Result(name, f"none: {str(reason)[:100]}")


def _release() -> None:
    gc.collect()
    management.unload_all_models()
    if CUDA:
        torch.cuda.empty_cache()


BENCHES = {"lora": lora}
