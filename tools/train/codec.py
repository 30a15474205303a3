"""The codec of the small Lyra 2: the host's own Wan 2.1 VAE, narrow, trained from nothing on the scenes.

The host's network works frame by frame with caches. For training the same sums run over a whole video at once, which is
several times faster; a test holds the two together.
"""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from comfy.latent_formats import Wan21
from comfy.ldm.wan.vae import Resample, ResidualBlock, RMS_norm, WanVAE
from safetensors.torch import load_file
from torch import Tensor, nn

from lyra_core.array_files import write_safetensors
from lyra_core.models.streaming_vae import FRAMES, decoder_reach, encoder_reach

from . import going_on, recording, scenes
from .films import SIZE

CHANNELS, PIXELS = 16, 8  # of a latent; of a picture beside each other that become one latent
WIDTH = 12  # of the first layer; the released VAE's is 96
NOISE = 0.05  # on latents while training, of their spread, so that near latents stand for near pictures
RATE = 8e-4
WALK = 161  # frames of a scene, of which some are learned from
SCENES, RENEWED = 24, 150  # that are filmed at a time, and for how many steps
CUT = (48, 64)  # height and width of what a step sees of a frame
PICTURES, SHORT, LONG = (10, 1), (2, 5), (1, 9)  # how many clips a step sees, and how many frames of each
ALONE = 0.3  # of all steps, the first, see pictures alone: ten different ones teach more than as many alike
REPORTED, SAVED = 25, 20.0  # steps between two reports; seconds between two checkpoints


class Norm(RMS_norm):
    """The host's norm in sums that run along memory: the same numbers in a fifth of the time."""

    def forward(self, x: Tensor) -> Tensor:
        length = x.float().square().sum(1, keepdim=True).clamp_min(1e-24).rsqrt() * self.scale
        return x * length.to(x.dtype) * self.gamma.to(x.dtype)


def new(seed: int, width: int = WIDTH) -> WanVAE:
    """The network with weights to begin from.

    Every residual branch begins as nothing, and what is left lets coarse colours through: averages on the way down, smooth
    enlargement on the way up, channels turned at random. From random kernels it would first have to find that.
    """
    torch.manual_seed(seed)
    network = WanVAE(width, CHANNELS, temperal_downsample=[False, True, True])
    inside = {id(layer) for block in network.modules() if isinstance(block, ResidualBlock) for layer in block.residual}
    for layer in network.modules():
        if not isinstance(layer, (nn.Conv2d, nn.Conv3d)):
            continue
        nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
        nn.init.zeros_(layer.bias)
        if id(layer) not in inside:
            lets_through(layer)
            nn.init.normal_(layer.bias, std=0.2)
    for layer in network.modules():
        if isinstance(layer, ResidualBlock):
            nn.init.zeros_(layer.residual[-1].weight)
        if type(layer) is RMS_norm:
            layer.__class__ = Norm
    for part in (network.encoder, network.decoder):
        nn.init.zeros_(part.middle[1].proj.weight)
        nn.init.zeros_(part.middle[1].proj.bias)
    return network.requires_grad_(True)


@torch.no_grad()
def lets_through(layer: nn.Conv2d | nn.Conv3d) -> None:
    """Begin as a smoothing kernel times a rotation of the channels, and a little of what was there."""
    kernel = torch.zeros(layer.kernel_size)
    if layer.kernel_size == (3, 3):
        kernel[:2, :2] = 0.25  # of the four pixels that become one
        if layer.stride == (1, 1):
            kernel = torch.tensor([1.0, 2.0, 1.0]).outer(torch.tensor([0.25, 0.5, 0.25])) / 4
    elif len(kernel) == 3:
        kernel[(2, *(side // 2 for side in kernel.shape[1:]))] = 1.0  # causal: the newest frame is the last
    else:
        kernel.fill_(1.0)
    turned = torch.empty(layer.weight.shape[:2])
    for part in turned.split(layer.weight.shape[1]) if len(turned) == 2 * turned.shape[1] else [turned]:
        nn.init.orthogonal_(part)
    if layer.kernel_size == (3, 1, 1):  # over time: no turn, so that a frame stays as the one that is passed by
        turned = torch.eye(turned.shape[1]).repeat(turned.shape[0] // turned.shape[1], 1)
    layer.weight.mul_(0.2).add_(turned[(...,) + (None,) * kernel.ndim] * kernel)


def encode(network: WanVAE, video: Tensor) -> Tensor:
    """Latents (B, 16, T, h, w) of videos (B, 3, 1 + 4n, H, W) in -1 .. 1, as `network.encode` has them."""
    encoder = network.encoder
    x = encoder.conv1(video)
    for layer in encoder.downsamples:
        x = _downsampled(layer, x) if isinstance(layer, Resample) else layer(x)
    for layer in (*encoder.middle, *encoder.head):
        x = layer(x)
    return network.conv1(x).chunk(2, dim=1)[0]


def _downsampled(layer: Resample, x: Tensor) -> Tensor:
    x = _each_frame(layer.resample, x)
    return torch.cat([x[:, :, :1], layer.time_conv(x)], 2) if layer.mode == "downsample3d" and x.shape[2] > 1 else x


def decode(network: WanVAE, latents: Tensor) -> Tensor:
    """Videos (B, 3, 1 + 4n, H, W), not clamped, of latents (B, 16, 1 + n, h, w), as `network.decode` has them."""
    decoder = network.decoder
    x = decoder.conv1(network.conv2(latents))
    for layer in (*decoder.middle, *decoder.upsamples):
        x = _upsampled(layer, x) if isinstance(layer, Resample) else layer(x)
    for layer in decoder.head:
        x = layer(x)
    return x


def _upsampled(layer: Resample, x: Tensor) -> Tensor:
    if layer.mode == "upsample3d" and x.shape[2] > 1:
        twice = layer.time_conv(x[:, :, 1:]).unflatten(1, (2, -1))  # (B, 2, C, T, H, W): each frame becomes two
        x = torch.cat([x[:, :, :1], twice.movedim(1, 3).flatten(2, 3)], 2)
    return _each_frame(layer.resample, x)


def _each_frame(layer: nn.Module, x: Tensor) -> Tensor:
    frames = x.shape[2]
    return layer(x.movedim(2, 1).flatten(0, 1)).unflatten(0, (-1, frames)).movedim(1, 2)


# ---------------------------------------------------------------------------------------------------------- training


def train(
    path: Path,
    steps: int,
    seed: int = 0,
    width: int = WIDTH,
    device="cpu",
    say: Callable[[str], None] = print,
    minutes: float | None = None,
) -> WanVAE:
    """A codec after so many steps, on `device`; goes on from the checkpoint at `path` if there is one.

    What a step sees follows from its number. With `minutes` the clock ends the training, and rate and kinds of steps go by it.
    """
    network = new(seed, width).to(device)
    weights = list(network.parameters())
    optimiser = recording.optimiser(weights, RATE, betas=(0.9, 0.97), weight_decay=1e-4)
    learn = recording.Recording(partial(_learn, network, weights, optimiser), weights, optimiser)
    settings = {"width": width, "seed": seed, **({"minutes": minutes} if minutes else {"steps": steps})}
    step, done = going_on.resume(path, network, optimiser, settings)
    progress, first = going_on.Progress(steps, minutes, done), step
    clips, errors, saved = Tensor(), [], time.monotonic()
    with torch.backends.cudnn.flags(benchmark=True):
        while done < 1:
            if step == first or step % RENEWED == 0:
                clips = films(seed + 1 + step // RENEWED, SCENES, device=device)
            recording.set_rate(optimiser, RATE * min(1.0, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))))
            kind = PICTURES if done < ALONE else (PICTURES, SHORT, LONG, SHORT)[step % 4]
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
            errors.append(learn(*_drawn(clips, kind, generator)))
            step += 1
            done = progress(step)
            if step % REPORTED and done < 1:
                continue
            error, errors = float(torch.stack(errors).mean()), []  # the only place where the device is waited for
            say(f"codec {step}: {-10 * math.log10(error / 4):.2f} dB, {100 * done:.0f} %")
            if done >= 1 or time.monotonic() - saved >= SAVED:
                going_on.keep(path, network, optimiser, step, settings, done)
                saved = time.monotonic()
    return network


def _learn(network: WanVAE, weights: Sequence[Tensor], optimiser: torch.optim.Optimizer, video: Tensor, noise: Tensor) -> Tensor:
    """One step on videos (B, 3, F, H, W) in -1 .. 1, and noise of the size of their latents; their mean squared error."""
    with torch.autocast(video.device.type, torch.bfloat16):
        latents = encode(network, video).float()
        spread = latents.detach().std((0, 2, 3, 4), keepdim=True)
        error = decode(network, latents + NOISE * spread * noise.to(latents)).float() - video
    squared = error.square().mean()
    optimiser.zero_grad()
    (squared + 0.05 * error.abs().mean()).backward()
    nn.utils.clip_grad_norm_(weights, 1.0)
    optimiser.step()
    return squared.detach()


def films(seed: int, count: int, frames: int = 33, size: tuple[int, int] = SIZE, device=None) -> Tensor:
    """(count, 3, frames, H, W) videos in -1 .. 1 of as many scenes."""
    made = [scenes.scene(seed * 10_007 + i) for i in range(count)]
    walks = [scenes.walk(scene, seed * 10_007 + i, WALK, size, False)[20 : 20 + frames] for i, scene in enumerate(made)]
    return scenes.render(made, walks, device=device)[0].movedim(-1, 1) * 2 - 1


def _drawn(clips: Tensor, kind: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """So many cuts (count, 3, frames, *CUT) of clips, some mirrored, some backwards or still at first; and noise for their latents."""

    def below(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    (count, frames), (height, width) = kind, CUT
    still = 3 * (frames > 1)
    cuts = []
    for _ in range(count):
        clip, start = clips[below(len(clips))], below(clips.shape[2] - frames + 1 + still) - still
        top, left = below(clip.shape[2] - height + 1), below(clip.shape[3] - width + 1)
        cut = clip[:, [max(0, start + frame) for frame in range(frames)], top : top + height, left : left + width]
        cuts.append(cut.flip([axis for axis in (1, 3) if torch.rand((), generator=generator) < 0.5]))
    shape = (count, CHANNELS, 1 + (frames - 1) // FRAMES, height // PIXELS, width // PIXELS)
    return torch.stack(cuts), torch.randn(shape, generator=generator).to(clips.device)


# ------------------------------------------------------------------------------------------------------ as the host's


@torch.no_grad()
def in_format(network: WanVAE, videos: Tensor) -> WanVAE:
    """The same codec whose latents of these videos have mean and spread of the host's Wan 2.1 format, channel by channel."""
    network = copy.deepcopy(network)
    latents, host = encode(network, videos.to(network.conv1.weight)), Wan21()
    mean, spread = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    wanted, wide = (values.flatten().to(mean) for values in (host.latents_mean, host.latents_std))
    outwards, inwards = wide / spread, spread / wide
    first, last = network.conv1, network.conv2
    first.weight[:CHANNELS] *= outwards.view(-1, 1, 1, 1, 1)
    first.bias[:CHANNELS] = (first.bias[:CHANNELS] - mean) * outwards + wanted
    last.bias += last.weight[..., 0, 0, 0] @ (mean - wanted * inwards)
    last.weight *= inwards.view(1, -1, 1, 1, 1)
    return network


def write(network: WanVAE, path: Path) -> None:
    """For the host's VAELoader."""
    write_safetensors(path, network.state_dict(), {"format": "pt"})


def read(path: Path) -> WanVAE:
    """What `write` wrote."""
    weights = load_file(path)
    network = new(0, weights["decoder.head.0.gamma"].shape[0])
    network.load_state_dict(weights)
    return network


def fingerprint(network: WanVAE) -> str:
    """A name for what is kept of films: another codec, another name."""
    digest = hashlib.sha256()
    for weight in network.state_dict().values():
        digest.update(weight.detach().cpu().contiguous().numpy().tobytes())
    return f"tiny-{digest.hexdigest()[:12]}"


@dataclass(frozen=True)
class TrainingCodec:
    """What training calls a codec: the same sums as the host's, over whole videos, in bfloat16. Latents are in the network's scale."""

    network: WanVAE  # in the host's format
    name: str = "tiny"

    @torch.no_grad()
    def encode(self, frames: Tensor, before: Tensor | None = None) -> Tensor:
        """(16, T, h, w) of frames (F, H, W, 3) in -1 .. 1."""
        reach = -(-encoder_reach(self.network) // FRAMES) * FRAMES
        context = frames[:0] if before is None else before[-(1 + reach) :]
        video = torch.cat([context.to(frames), frames]).movedim(-1, 0)[None].to(self.network.conv1.weight)
        with torch.autocast(video.device.type, torch.bfloat16):
            latents = Wan21().process_in(encode(self.network, video).float())[0].to(frames.device)
        return latents[:, -(len(frames) // FRAMES) :] if len(context) else latents

    @torch.no_grad()
    def encode_each(self, videos: Tensor) -> Tensor:
        """(B, 16, T, h, w) of videos (B, F, H, W, 3) of their own."""
        whole = videos.movedim(-1, 1).to(self.network.conv1.weight)
        with torch.autocast(whole.device.type, torch.bfloat16):
            return Wan21().process_in(encode(self.network, whole).float()).to(videos.device)

    @torch.no_grad()
    def decode(self, latents: Tensor, before: Tensor | None = None) -> Tensor:
        """(F, H, W, 3), not clamped, of latents (16, T, h, w)."""
        context = latents[:, :0] if before is None else before[:, -(1 + decoder_reach(self.network)) :]
        whole = Wan21().process_out(torch.cat([context.to(latents), latents], 1)[None]).to(self.network.conv1.weight)
        with torch.autocast(whole.device.type, torch.bfloat16):
            frames = decode(self.network, whole)[0].float().movedim(0, -1).to(latents.device)
        return frames[-FRAMES * latents.shape[1] :] if context.shape[1] else frames
