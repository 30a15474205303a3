"""How the host meets Lyra 2: the stock loaders recognise its files, the stock samplers feed its network.

A file is recognised by a key that only Lyra 2 has. Its patch embedding is stored as the reference's matrix, not as
the convolution that it becomes here: a host without this pack finds no model for such a file and says so, where it
would silently load the other form as plain Wan.

The data of a chunk travels in CONDITIONING as one History. What its steps share is computed once per sampling run,
when the host asks for extra_conds, and goes to the network as a keyword argument: values in transformer_options
would be frozen into the first trace by torch.compile.
"""

from __future__ import annotations

import json
import logging
import re
import weakref
from collections.abc import Callable, Mapping
from functools import cache, partial
from math import prod

import comfy.conds
import comfy.model_base
import comfy.model_management
import comfy.supported_models
import torch
from torch import Tensor

from ..conditioning.framepack import LYRA2, PATCH, FramePackLayout
from ..conditioning.history import RAY_CHANNELS, History
from ..files import FileError, parse_json
from . import words
from .devices import PROCESSOR, geometry_device
from .lyra2 import TEXT_TOKENS, HistoryMaps, HistoryTokens, Lyra2Model

MARKER = "clean_patch_embeddings.0.weight"  # a key of every Lyra 2 transformer and of nothing else
CONFIG_KEY = (
    "lyra2_config"  # uint8 JSON of what the other weights don't tell; the host stores quantisation the same way
)
CONDITIONING_KEY = "lyra2_history"
IMAGE_TOKENS, IMAGE_WIDTH = 257, 1280  # CLIP ViT-H, penultimate layer
HEAD_CHANNELS = 128  # of every released Wan
LARGEST_CONFIG = 1 << 16  # bytes

log = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------ what a file says of itself


def complete_config(shapes: Mapping[str, tuple[int, ...]], stored: Mapping | None = None) -> dict:
    """Lyra2Model's arguments from the shapes of its weights, and what the file stores besides (num_heads, framepack).

    ValueError if shapes are missing or contradict each other, or if they don't tell enough and nothing is stored.
    """

    def shape(key: str) -> tuple[int, ...]:
        if key not in shapes:
            raise ValueError(f"{key} is missing: this is no complete Lyra 2 transformer")
        return tuple(shapes[key])

    stored = dict(stored or {})
    dim = shape("head.modulation")[-1]
    layout = FramePackLayout.parse(stored.get("framepack", str(LYRA2)))
    blocks = {key.split(".")[1] for key in shapes if key.startswith("blocks.")}
    if odd := sorted(number for number in blocks if not re.fullmatch(r"\d{1,4}", number, re.ASCII)):
        raise ValueError(f"blocks.{odd[0]} is no block of a Lyra 2 transformer; they are counted from blocks.0")
    channels = prod(shape("patch_embedding.weight")[1:]) // PATCH**2
    embeddings = [key for key in shapes if key.startswith("clean_patch_embeddings.") and key.endswith(".weight")]
    found = [shape(f"clean_patch_embeddings.{i}.weight")[1] for i in range(len(embeddings))]
    if found != [channels * prod(segment.patch) for segment in layout.segments]:
        raise ValueError(
            f"the history's patch embeddings take {found} values, which is not layout {layout}; "
            f"a file of another layout must name it in {CONFIG_KEY}"
        )
    if dim % HEAD_CHANNELS and "num_heads" not in stored:
        raise ValueError(f"width {dim} is no multiple of {HEAD_CHANNELS}: name num_heads in {CONFIG_KEY}")
    heads = stored.get("num_heads", dim // HEAD_CHANNELS)
    if type(heads) is not int or not 0 < heads <= dim or dim % (2 * heads):  # half of a head's channels turn
        raise ValueError(f"num_heads in {CONFIG_KEY} is {str(heads)[:40]}; a width of {dim} needs a whole number that divides its half")
    return {
        "framepack": str(layout),
        "rank": shape("blocks.0.buffer_encoder.0.weight")[0],
        "model_type": "i2v" if any(key.startswith("img_emb.") or ".k_img." in key for key in shapes) else "t2v",
        "in_dim": channels,
        "out_dim": shape("head.head.weight")[0] // PATCH**2,
        "dim": dim,
        "ffn_dim": shape("blocks.0.ffn.0.weight")[0],
        "freq_dim": shape("time_embedding.0.weight")[1],
        "text_dim": shape("text_embedding.0.weight")[1],
        "num_heads": heads,
        "num_layers": len(blocks),
    }


def stored_config(config: Mapping) -> dict:
    """What shapes don't tell of complete_config's result."""
    return {key: config[key] for key in ("framepack", "num_heads")}


def weight_shapes(config: Mapping) -> dict[str, tuple[int, ...]]:
    """Every key of a file and its shape, the patch embedding as a matrix."""
    with torch.device("meta"):
        network = Lyra2Model(**config, device="meta", operations=torch.nn)
    shapes = {key: tuple(weight.shape) for key, weight in network.state_dict().items()}
    matrix = shapes["patch_embedding.weight"]
    return {**shapes, "patch_embedding.weight": (matrix[0], prod(matrix[1:]))}


def faults(shapes: Mapping[str, tuple[int, ...]], config: Mapping, missing_only: bool = False) -> list[str]:
    """What is wrong with a file's keys and shapes, a line each."""
    expected = weight_shapes(config)
    found = [f"missing: {key}" for key in expected if key not in shapes]
    if missing_only:
        return found
    found += [f"not of this network: {key}" for key in shapes if key not in expected]
    for key in expected:
        if key in shapes and tuple(shapes[key]) != expected[key]:
            found.append(f"{key} is {tuple(shapes[key])}, not {expected[key]}")
    return found


def listed(lines: list[str], limit: int = 20) -> str:
    """The first lines, and how many more there are."""
    return "\n".join([*lines[:limit], *([f"and {len(lines) - limit} more"] if len(lines) > limit else [])])


def pack_config(config: Mapping) -> Tensor:
    return torch.tensor(list(json.dumps(stored_config(config)).encode()), dtype=torch.uint8)


def unpack_config(tensor: Tensor) -> dict:
    """What `pack_config` packed; FileError for anything else."""
    if tensor.dtype != torch.uint8 or tensor.numel() > LARGEST_CONFIG:
        raise FileError(f"{CONFIG_KEY} is {tuple(tensor.shape)} {tensor.dtype}, no JSON text; convert the file again")
    try:
        found = parse_json(bytes(tensor.flatten().tolist()).decode(), CONFIG_KEY)
    except UnicodeDecodeError:
        raise FileError(f"{CONFIG_KEY} is no UTF-8 text; convert the file again") from None
    if not isinstance(found, dict) or not isinstance(found.get("framepack", ""), str):
        raise FileError(f"{CONFIG_KEY} is {str(found)[:80]}, not framepack and num_heads; convert the file again")
    return found


# ----------------------------------------------------------------------------------------------------- the model


class CONDHistory(comfy.conds.CONDRegular):
    """A chunk's history as the host hands it to the network: shared, not copied, by samples and by CFG's two sides.

    `cond` is HistoryTokens, or HistoryMaps where they must be encoded in every step.
    """

    def __init__(
        self, source: History, maps: Callable[[], HistoryMaps], cond: HistoryMaps | HistoryTokens, cost: int, part=()
    ):
        super().__init__(cond)
        self.source = source
        self.maps = maps  # of the whole chunk
        self.cost = cost  # latent pixels that would need as much memory
        self.part = part  # which new latents and which area, if not all

    def _partly(self, cond: HistoryMaps | HistoryTokens, *part: int) -> CONDHistory:
        return CONDHistory(self.source, self.maps, cond, self.cost, part)

    def process_cond(self, batch_size: int, area=None, **kwargs) -> CONDHistory:
        """Itself, or cut down to an area of the latents: their number, rows, columns, then where each starts."""
        if area is None:
            return self
        if any(length % PATCH for length in (*area[1:3], *area[4:6])):
            raise ValueError(f"a conditioning's area is {area[1:3]} latents at {area[4:6]}: use multiples of 16 pixels")
        rows, columns = (slice(area[3 + axis], area[3 + axis] + area[axis]) for axis in (1, 2))
        frames = list(self.part or range(self.source.layout.new_latents))[area[3] : area[3] + area[0]]
        like = self.cond[0]
        return self._partly(self.maps().at(frames, rows, columns).to(like.device, like.dtype), *frames, *area)

    def windowed(self, frames: list[int]) -> CONDHistory:
        """For some of the new latents."""
        whole = () if isinstance(self.cond, HistoryTokens) else (slice(None), slice(None))
        return self._partly(self.cond.at(frames, *whole), *frames)

    def can_concat(self, other) -> bool:
        same_kind = isinstance(other, CONDHistory) and type(self.cond) is type(other.cond)
        return same_kind and self.source is other.source and self.part == other.part

    def concat(self, others) -> HistoryMaps | HistoryTokens:
        return self.cond

    def size(self) -> list[int]:
        return [1, 1, self.cost]


class Lyra2Base(comfy.model_base.WAN21):
    """The host's model around the network: sampling, latent scale, and conditioning become its inputs."""

    def __init__(self, model_config, device=None):
        flow = comfy.model_base.ModelType.FLOW
        super(comfy.model_base.WAN21, self).__init__(model_config, flow, device=device, unet_model=Lyra2Model)
        self.image_to_video = True
        self.memory_usage_factor_conds = ("history",)
        self._running = (lambda: None, None)  # weakly: the CONDHistory of the run that is going on, and what it is for

    def process_timestep(self, timestep: Tensor, integer_timesteps: bool = False, **kwargs) -> Tensor:
        """0 .. 1000; the reference's UniPC tells the network integers."""
        return timestep.floor() if integer_timesteps else timestep

    def concat_cond(self, noise: Tensor, device, **kwargs) -> Tensor:
        """(1, 20, T, h, w): 4 channels of ones, for everything is known of a warped view, and its latents."""
        warped = self.process_latent_in(kwargs[CONDITIONING_KEY].warped[None].to(device))
        return torch.cat([torch.ones_like(warped[:, :4]), warped], 1)

    def extra_conds(self, **kwargs) -> dict:
        history = self._checked_history(**kwargs)
        out = super().extra_conds(**{**kwargs, "cross_attn": self._text(kwargs.get("cross_attn"))})
        image = out.get("clip_fea")
        if self.diffusion_model.img_emb is None:
            out.pop("clip_fea", None)
        elif image is None or image.cond.shape[1:] != (IMAGE_TOKENS, IMAGE_WIDTH):
            found = "none" if image is None else f"{tuple(image.cond.shape[1:])}"
            raise ValueError(
                f"Lyra 2 needs the CLIP vision output of the newest frame, ({IMAGE_TOKENS}, {IMAGE_WIDTH}); found {found}. "
                "Use CLIPVisionEncode with clip_vision_h"
            )
        # a LoRA on one prompt only, or training, changes weights between steps
        changing = bool(kwargs.get("hooks")) or (torch.is_grad_enabled() and not torch.is_inference_mode_enabled())
        out["history"] = self._history(history, kwargs["device"], changing)
        return out

    def _checked_history(self, noise: Tensor, **kwargs) -> History:
        history = kwargs.get(CONDITIONING_KEY)
        if not isinstance(history, History):
            raise ValueError(
                f"this is a Lyra 2 model, but a conditioning has no {CONDITIONING_KEY}: "
                "use Lyra2ChunkConditioning for both the positive and the negative one"
            )
        layout = self.diffusion_model.layout
        if history.layout != layout:
            raise ValueError(
                f"the conditioning was made for layout {history.layout}, the model has {layout}: "
                "make it with the layout of the model that samples"
            )
        expected = (layout.new_latents, *history.size)
        if noise.ndim != 5 or tuple(noise.shape[2:]) != expected:
            raise ValueError(
                f"the latent to sample is {tuple(noise.shape[2:])}, the conditioning is for {expected} "
                "(latents, height / 8, width / 8): use the latent that comes with the conditioning"
            )
        return history

    def _text(self, text: Tensor | None) -> Tensor:
        """(B, 512, width): longer prompts are cut, shorter ones end in zeros, as the reference feeds them."""
        width = self.diffusion_model.text_dim
        if text is None or text.shape[-1] != width:
            found = "no text" if text is None else f"a text of width {text.shape[-1]}"
            raise ValueError(
                f"Lyra 2 needs text of width {width}, found {found}: use CLIPLoader with umt5_xxl, type wan"
            )
        if text.shape[1] > TEXT_TOKENS:
            log.warning("the prompt has %d tokens, Lyra 2 reads the first %d", text.shape[1], TEXT_TOKENS)
        missing = max(0, TEXT_TOKENS - text.shape[1])
        return torch.nn.functional.pad(text[:, :TEXT_TOKENS], (0, 0, 0, missing))

    def _history(self, source: History, device, changing: bool) -> CONDHistory:
        """Encoded once for the run, although the host asks for every conditioning apart."""
        dtype, cost = self.get_dtype_inference(), self._cost(source)
        made_for = (id(source), device, dtype, self.current_weight_patches_uuid)
        running = self._running[0]()
        if running is not None and made_for == self._running[1] and not changing:
            return running
        latents = self.process_latent_in(source.latents[None].to(device))
        stacked = torch.cat([latents, torch.ones_like(latents[:, :4]), latents], 1)

        def maps(where: torch.device) -> HistoryMaps:
            return HistoryMaps(stacked, *(guide[None] for guide in source.guides(where)))

        where = geometry_device(tuple(8 * side for side in source.size), make_room=False)
        made = maps(where)
        # a gigabyte that only conditionings of an area ask for again
        kept = (lambda: made) if where == PROCESSOR else cache(partial(maps, PROCESSOR))
        if changing:
            # copies, because autograd can't keep tensors that were made in inference mode
            return CONDHistory(source, kept, made.to(device, dtype, copy=True), cost)
        cond = CONDHistory(source, kept, self.diffusion_model.encode(made, device, dtype), cost)
        self._running = (weakref.ref(cond), made_for)
        return cond

    def _cost(self, history: History) -> int:
        """What a history adds to memory, in the host's unit: the latent pixels that would need as much."""
        network, size = self.diffusion_model, comfy.model_management.dtype_size(self.get_dtype_inference())
        tokens = network.layout.history_tokens(*history.size)
        every = tokens + network.layout.new_latents * prod(history.size) // PATCH**2
        per_token = network.num_layers * network.rank + RAY_CHANNELS * PATCH**2
        kept = size * (tokens * network.dim + every * per_token)
        per_pixel = size * 0.01 * self.memory_usage_factor * 1024**2
        return tokens * PATCH**2 + int(kept / per_pixel)

    def extra_conds_shapes(self, **kwargs) -> dict:
        history = kwargs.get(CONDITIONING_KEY)
        # without one, extra_conds says what is wrong before any step
        return {"history": [1, 1, self._cost(history)]} if isinstance(history, History) else {}

    def resize_cond_for_context_window(self, cond_key, cond_value, window, x_in, device, retain_index_list=()):
        if cond_key != "history":
            return super().resize_cond_for_context_window(cond_key, cond_value, window, x_in, device, retain_index_list)
        every = torch.arange(x_in.shape[window.dim])
        return cond_value.windowed(window.get_tensor(every, dim=0, retain_index_list=list(retain_index_list)).tolist())


class Lyra2(comfy.supported_models.WAN21_I2V):
    """The entry in the host's list of models."""

    unet_config = {"image_model": "wan2.1"}
    sampling_settings = {"shift": 5.0}
    supported_inference_dtypes = [torch.bfloat16, torch.float16, torch.float32]

    def clip_target(self, state_dict={}):  # noqa: B006  the host's signature
        """A checkpoint's own table of words, if it has one; else the usual text encoder of Wan."""
        return words.target(state_dict, self.text_encoder_key_prefix[0]) or super().clip_target(state_dict)

    @classmethod
    def matches(cls, unet_config, state_dict=None, unet_key_prefix=""):
        wan = unet_config.get("image_model") == cls.unet_config["image_model"]
        return wan and state_dict is not None and f"{unet_key_prefix}{MARKER}" in state_dict

    def get_model(self, state_dict, prefix="", device=None):
        bare = {key[len(prefix) :]: weight for key, weight in state_dict.items() if key.startswith(prefix)}
        stored = unpack_config(bare.pop(CONFIG_KEY)) if CONFIG_KEY in bare else None
        config = complete_config({key: tuple(weight.shape) for key, weight in bare.items()}, stored)
        # shapes of quantised weights are their own business, and loading checks the others
        if wrong := faults(bare, config, missing_only=True):
            raise ValueError(f"this Lyra 2 file is not complete, convert or download it again:\n{listed(wrong)}")
        self.unet_config = {**config, "dtype": self.unet_config["dtype"]}
        return Lyra2Base(self, device=device)

    def process_unet_state_dict(self, state_dict):
        """The reference's keys as the network's: a view of the patch embedding, without counters and extra state."""
        state_dict = {
            key: weight
            for key, weight in state_dict.items()
            if key != CONFIG_KEY and not key.startswith("accum_") and not key.endswith("_extra_state")
        }
        embedding = state_dict["patch_embedding.weight"]
        if embedding.ndim == 2:
            state_dict["patch_embedding.weight"] = embedding.unflatten(1, (-1, 1, PATCH, PATCH))
        return state_dict

    def process_unet_state_dict_for_saving(self, state_dict):
        embedding = state_dict["patch_embedding.weight"]
        stored = {CONFIG_KEY: pack_config(self.unet_config), "patch_embedding.weight": embedding.flatten(1)}
        return super().process_unet_state_dict_for_saving({**state_dict, **stored})


def put_first(entry: type) -> None:
    """Put an entry in front of the host's models, once; one of the same name, of an earlier import, makes room for it."""
    models = comfy.supported_models.models
    if entry not in models:
        models[:] = [entry, *(model for model in models if model.__name__ != entry.__name__)]


def check_model(model: comfy.model_patcher.ModelPatcher) -> None:
    """ValueError for a model that is not this one: it would ignore all that it is shown of the past."""
    if not isinstance(model.model, Lyra2Base):
        hint = "; that is for the generator 'Wan VACE'" * isinstance(model.model, comfy.model_base.WAN21_Vace)
        raise ValueError(
            f"this is a {type(model.model).__name__} model, not the Lyra 2 transformer{hint}. Load its converted file, or choose "
            "another generator"
        )


def register() -> None:
    """Make the host know Lyra 2: a plain Wan file goes on to be plain Wan."""
    put_first(Lyra2)


# ------------------------------------------------------------------------------------------------ what nodes hand over


class OnlyForLyra2:
    """Stands where a plain Wan model looks for its start image, so that it refuses the chunk instead of ignoring it."""

    def to(self, *args, **kwargs):
        raise ValueError(
            "this conditioning is for a Lyra 2 model, but the model that samples is another one (a plain Wan 2.1?): "
            "load the Lyra 2 transformer with UNETLoader"
        )


def conditioning(history: History) -> dict:
    """The entries that a CONDITIONING needs, besides text and clip_vision_output, to be about this chunk."""
    return {CONDITIONING_KEY: history, "concat_latent_image": OnlyForLyra2()}
