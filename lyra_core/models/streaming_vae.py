"""The host's Wan 2.1 VAE, chunk after chunk: what came before a chunk lives in explicit caches, not in the model.

The VAE is causal in time, so a chunk can be decoded and encoded on from where the last one ended, at flat memory, with
the same result as all at once. The caches are gigabytes at 480x832 and are never saved: the network's memory is finite,
so running it over the last chunks again rebuilds them exactly.

The host's network takes the first latent alone and then two at a time (the first frame alone, then eight); every
stretch that is processed here begins and ends so.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import comfy.cli_args
import comfy.model_management
import torch
from comfy.ldm.wan.vae import CausalConv3d, Resample, RMS_norm, WanVAE, count_cache_layers
from comfy.sd import VAE
from torch import Tensor, nn
from torch.nn import functional as F

from . import kernels

FRAMES = 4  # per latent, after the first
PAIR = 2  # latents that the host's network takes at a time
SMALLEST = 1e-24  # sum of squares that a norm divides by, as the host's
PRODUCT = 8  # columns that a product of bfloat16 must have to run on the card's matrix units
WORTHWHILE = 2**24  # numbers from which on it pays to look for a faster norm
SAMPLING = 4  # a transformer's working memory, of 9 GiB at 480x832, in streams; both grow with the picture


@dataclass(eq=False)
class Stream:
    """Where a VAE has got to. Passed on from chunk to chunk: whoever continues it uses it up."""

    decoder: list = field(default_factory=list)  # features of the last frames in front of each causal layer
    encoder: list = field(default_factory=list)
    network: Callable[[], WanVAE | None] = lambda: None  # whose it is, if that still exists

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for features in (self.decoder, self.encoder) for part in features if isinstance(part, Tensor))

    def to(self, device) -> None:
        """Move the features, gigabytes at 480x832; all at once between a GPU and pinned memory."""
        for features in (self.decoder, self.encoder):
            features[:] = (_moved(part, torch.device(device)) if isinstance(part, Tensor) else part for part in features)
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def _moved(part: Tensor, device: torch.device) -> Tensor:
    if part.is_cuda and device.type == "cpu" and not comfy.cli_args.args.disable_pinned_memory:
        return torch.empty(part.shape, dtype=part.dtype, pin_memory=True).copy_(part, non_blocking=True)
    return part.to(device, non_blocking=part.is_pinned() if torch.cuda.is_available() else False)


_beside: weakref.WeakSet[Stream] = weakref.WeakSet()  # the one stream that waits on a GPU


def set_aside(stream: Stream, vae: VAE) -> None:
    """Where the stream waits for its next chunk: with the VAE if all that the host has loaded fits there too, else the CPU.

    The host knows nothing of it, so there is never more than one.
    """
    for other in _beside - {stream}:
        other.to(comfy.model_management.intermediate_device())
    _beside.clear()
    if vae.device.type == "cuda" and (1 + SAMPLING) * stream.nbytes <= _room(vae.device):
        stream.to(vae.device)
        _beside.add(stream)
    else:
        stream.to(comfy.model_management.intermediate_device())


def _room(device: torch.device) -> int:
    """Bytes of a device that are free even while all that the host has loaded lies on it as a whole."""
    management = comfy.model_management
    loaded = sum(model.model_memory() for model in management.current_loaded_models if model.device == device)
    return management.get_total_memory(device) - loaded - management.minimum_inference_memory()


def network_of(vae: VAE) -> WanVAE:
    """The causal network; ValueError for a VAE of another family."""
    network = vae.first_stage_model
    if not isinstance(network, WanVAE):
        kind = type(network)  # the class of Wan 2.2's VAE has the same name
        found = f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}"
        raise ValueError(f"Lyra 2 needs the Wan 2.1 VAE (wan_2.1_vae), found {found}")
    return network


def fresh(vae: VAE) -> Stream:
    """At the start of a video."""
    network = network_of(vae)
    layers = (count_cache_layers(part) for part in (network.decoder, network.encoder))
    return Stream(*([None] * count for count in layers), weakref.ref(network))


def decode(vae: VAE, latents: Tensor, stream: Stream) -> Iterator[Tensor]:
    """Go on decoding (16, T, h, w), as the host's VAE returns latents: (F, H, W, 3) frames in -1 .. 1, not clamped.

    Yields the frames of at most two latents at a time, on the VAE's device: 1 for the first latent of all, 4 for every other.
    """
    network = network_of(vae)
    for part in _in_groups(latents.movedim(1, 0), stream.decoder[0] is not None, PAIR, "latents"):
        with _channels_last(vae):
            z = network.conv2(_alike(part.movedim(0, 1)[None], vae))
            frames = torch.cat(network.decoder(z, feat_cache=stream.decoder, feat_idx=[0]), 2)
        yield frames[0].movedim(0, -1).float()


def encode(vae: VAE, frames: Tensor, stream: Stream) -> Iterator[Tensor]:
    """Go on encoding (F, H, W, 3) in -1 .. 1; yields latents (16, 1 or 2, h, w) as the host's VAE returns them."""
    network = network_of(vae)
    for group in _in_groups(frames, stream.encoder[0] is not None, PAIR * FRAMES, "frames"):
        for part in group.split(PAIR):
            with _channels_last(vae):
                features = network.encoder(_alike(part.movedim(-1, 0)[None], vae), feat_cache=stream.encoder, feat_idx=[0])
                latents = network.conv1(features).chunk(2, dim=1)[0][0] if features is not None else None
            if latents is not None:  # nothing before the last part of a group
                yield latents.float().cpu()


def _alike(batch: Tensor, vae: VAE) -> Tensor:
    """Where the network is, in one memory order for all: convolutions round differently in another."""
    order = torch.channels_last_3d if _rounds(vae) else torch.contiguous_format
    return batch.to(vae.device, vae.vae_dtype).contiguous(memory_format=order)


def _rounds(vae: VAE) -> bool:
    """Whether the network computes in half precision on a GPU, whose units want channels last and turn everything else round."""
    return vae.device.type == "cuda" and vae.vae_dtype in (torch.float16, torch.bfloat16)


class _Norm(RMS_norm):
    """The host's norm along channels that lie last, with less rounding, by what is faster on this device."""

    def forward(self, x: Tensor) -> Tensor:
        last, gamma = x.movedim(1, -1), self.gamma.flatten().to(x)
        norm = in_one_pass
        if _worth_a_choice(x):
            kind = ("norm", x.device, x.dtype, last.shape[-1])
            norm = kernels.fastest(kind, (in_one_pass, by_products), last, gamma)
        return norm(last, gamma).movedim(-1, 1)


def _worth_a_choice(x: Tensor) -> bool:
    return x.is_cuda and x.dtype == torch.bfloat16 and x.numel() >= WORTHWHILE


def in_one_pass(x: Tensor, gamma: Tensor) -> Tensor:
    """(..., C) with a root mean square of gamma (C) everywhere."""
    return F.rms_norm(x, x.shape[-1:], gamma, SMALLEST / x.shape[-1])


def by_products(x: Tensor, gamma: Tensor) -> Tensor:
    """The same in more passes. torch's one pass gives every pixel a block of threads, which 96 channels leave mostly idle.

    Squares are summed by a matrix product, which takes as long as reading them. In bfloat16; the squares of float16 are too large.
    """
    sums = F.linear(x.square(), x.new_ones(PRODUCT, x.shape[-1]))[..., :1]
    return (x * ((sums.float() + SMALLEST).rsqrt() * x.shape[-1] ** 0.5).to(x)).mul_(gamma)


@contextmanager
def _channels_last(vae: VAE) -> Iterator[None]:
    """The network with norms that go along with channels last, for as long as it is called from here."""
    norms = [layer for layer in network_of(vae).modules() if type(layer) is RMS_norm] if _rounds(vae) else []
    try:
        for layer in norms:
            layer.__class__ = _Norm
        yield
    finally:
        for layer in norms:
            layer.__class__ = RMS_norm


def _in_groups(items: Tensor, started: bool, size: int, name: str) -> Iterator[Tensor]:
    """The first of all alone, then `size` at a time; ValueError for a rest that the network could not go on from."""
    first = items[: 0 if started else 1]
    items = items[len(first) :]
    if len(items) % size:
        before = "" if started else " after the first one"
        raise ValueError(
            f"{len(items)} {name}{before} can't be streamed through the Wan VAE; make it a multiple of {size}"
        )
    yield from (group for group in (*first.split(1), *items.split(size)) if len(group))


def load(vae: VAE, size: tuple[int, int]) -> None:
    """Have the host put the VAE on its device, with room for a stream of latents of (h, w): as much as for any video."""
    memory = vae.memory_used_decode((1, 16, 1 + 2 * PAIR, *size), vae.vae_dtype)
    comfy.model_management.load_models_gpu([vae.patcher], memory_required=memory, force_full_load=vae.disable_offload)


def encode_alone(vae: VAE, frames: Tensor) -> Tensor:
    """(N, 16, h, w) latents of frames (N, H, W, 3) in -1 .. 1, each encoded as a picture of its own."""
    network, latents = network_of(vae), []
    for some in frames.split(PAIR * FRAMES if _rounds(vae) else 1):
        with _channels_last(vae):
            features = network.encoder(_alike(some.movedim(-1, 1)[:, :, None], vae), feat_cache=fresh(vae).encoder, feat_idx=[0])
            latents.append(network.conv1(features).chunk(2, dim=1)[0][:, :, 0].float().cpu())
    return torch.cat(latents)


def prime(vae: VAE, photo: Tensor, latents: int) -> tuple[Tensor, Stream]:
    """The history (16, latents, h, w) of a world in which nothing has moved yet, and the stream after it.

    photo (H, W, 3) in -1 .. 1, repeated; `latents` is odd.
    """
    stream = fresh(vae)
    still = photo.expand(1 + FRAMES * (latents - 1), *photo.shape)
    history = torch.cat(list(encode(vae, still, stream)), 1)
    for _frames in decode(vae, history, stream):
        pass  # only for the caches
    set_aside(stream, vae)
    return history, stream


def advance(
    vae: VAE, latents: Tensor, stream: Stream, on_frames: Callable[[Tensor], None] = lambda frames: None
) -> Tensor:
    """Decode the latents (16, T, h, w) of a chunk and encode what comes out: the latents that the next one remembers.

    `on_frames` gets the frames (8, H, W, 3) in -1 .. 1, not clamped, as they come, on the VAE's device.
    """
    remembered = []
    stream.to(vae.device)
    for frames in decode(vae, latents, stream):
        on_frames(frames)
        remembered += encode(vae, frames, stream)
    set_aside(stream, vae)
    return torch.cat(remembered, 1)


def rebuild(vae: VAE, photo: Tensor, primed: int, count: int, latents: Callable[[int], Tensor]) -> Stream:
    """The stream of a world of `count` latents, the `primed` ones of its photo included, as if it had never ended.

    latents(start) are those from `start` on, as sampled. Only as many are run again as the network remembers.
    """
    network = network_of(vae)
    groups = -(-encoder_reach(network) // (PAIR * FRAMES))
    start = count - PAIR * groups - 1 - decoder_reach(network)
    start -= (count - start + 1) % PAIR  # the first alone, then pairs
    if start <= primed:
        _history, stream = prime(vae, photo, primed)
        if count > primed:
            advance(vae, latents(primed), stream)
        return stream
    stream = fresh(vae)
    parts = list(_in_groups(latents(start).movedim(1, 0), False, PAIR, "latents"))
    before, last = parts[:-groups], parts[-groups:]
    for part in before:
        *_earlier, frames = decode(vae, part.movedim(0, 1), stream)
    list(encode(vae, frames[-1:], stream))
    advance(vae, torch.cat(last).movedim(0, 1), stream)
    return stream


def decoder_reach(network: WanVAE) -> int:
    """How many latents back the decoder's features depend on."""
    decoder = network.decoder
    return _reach([decoder.conv1, *decoder.middle, *decoder.upsamples, *decoder.head])


def encoder_reach(network: WanVAE) -> int:
    """How many frames back the encoder's features depend on."""
    encoder = network.encoder
    return _reach([encoder.conv1, *encoder.downsamples, *encoder.middle, *encoder.head])


def _reach(layers: list[nn.Module]) -> int:
    reach, step = 0.0, 1.0  # both in units of the input
    for layer in layers:
        convolutions = (part for part in layer.modules() if isinstance(part, CausalConv3d))
        reach += step * sum(part.kernel_size[0] - 1 for part in convolutions)
        mode = layer.mode if isinstance(layer, Resample) else None
        step *= {"upsample3d": 0.5, "downsample3d": 2.0}.get(mode, 1.0)
    return int(-(-reach // 1))
