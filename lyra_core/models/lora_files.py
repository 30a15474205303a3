"""LoRAs as trainers write them, brought into the one form of which the host's LoRA loaders use all.

What a module adds to its weight is strength * alpha / rank * B A (or the Kronecker or Hadamard product of LoKr and LoHa).
The host takes alpha from a tensor beside the module, and 1 for alpha / rank where there is none; trainers also write it
into adapter_config.json or the file's metadata. So it is put where the host looks. What the host would leave out, or
would do otherwise than it was trained for, is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch

from .. import files
from ..conditioning.framepack import LYRA2, PATCH
from . import lyra2_host
from .tensor_files import Entry, read_metadata

BLOCKS = 40  # of the released network
WIDTHS = {"dim": 5120, "ffn_dim": 13824, "text_dim": 4096, "num_heads": 40}
CONFIG = "adapter_config.json"

PREFIXES = re.compile(
    r"^(base_model\.model\.|model\.diffusion_model\.|diffusion_model\.|transformer\.|pipe\.dit\.|dit\.|unet\.|net\.|model\.|module\.)+"
)
FLAT = re.compile(r"^(lora_unet_+|lora_transformer_+|lycoris_+)")

ADAPTER = r"(?:\.(?!weight$)[^.]+)?"  # PEFT names its adapter, mostly "default"
ENDINGS = [
    (re.compile(r"\.lora_(?:B|up)(?:\.[^.]+)?\.bias$"), "lora_bias"),
    (re.compile(rf"\.lora_([AB]){ADAPTER}(?:\.weight)?$"), r"lora_\1.weight"),
    (re.compile(rf"\.lora_(up|down|mid){ADAPTER}\.weight$"), r"lora_\1.weight"),
    (re.compile(r"[._]lora\.(up|down)\.weight$"), r"lora_\1.weight"),
    (re.compile(r"\.lora_linear_layer\.(up|down)\.weight$"), r"lora_\1.weight"),
    (re.compile(rf"\.lora_magnitude_vector{ADAPTER}(?:\.weight)?$"), "magnitude"),
    (re.compile(rf"\.((?:lokr_w[12](?:_[ab])?|lokr_t2|hada_w[12]_[ab]|hada_t[12])){ADAPTER}(?:\.weight)?$"), r"\1"),
    (re.compile(r"\.(alpha|diff|diff_b|dora_scale|w_norm|b_norm|set_weight|reshape_weight)$"), r"\1"),
    # kinds that are known and not converted, so that they can be named
    (re.compile(r"\.(lora_embedding_[AB]|oft_blocks|oft_[RrSs]|boft_[RrSs]|ia3_l|vera_lambda_[bd]|rescale)(\..*)?$"), r"\1"),
    (re.compile(r"\.([ab][12])\.weight$"), r"glora_\1"),
]

A_OF = {"lora_B.weight": "lora_A.weight", "lora_up.weight": "lora_down.weight"}  # the host reads these pairs
ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
DIFFUSERS = {
    **{f"blocks.N.self_attn.{ours}": f"blocks.N.attn1.{theirs}" for ours, theirs in ATTENTION.items()},
    **{f"blocks.N.cross_attn.{ours}": f"blocks.N.attn2.{theirs}" for ours, theirs in ATTENTION.items()},
    "blocks.N.cross_attn.k_img": "blocks.N.attn2.add_k_proj",
    "blocks.N.cross_attn.v_img": "blocks.N.attn2.add_v_proj",
    "blocks.N.cross_attn.norm_k_img": "blocks.N.attn2.norm_added_k",
    "blocks.N.ffn.0": "blocks.N.ffn.net.0.proj",
    "blocks.N.ffn.2": "blocks.N.ffn.net.2",
    "blocks.N.norm3": "blocks.N.norm2",  # the only norm of a block that has weights, in both
    "blocks.N.modulation": "blocks.N.scale_shift_table",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}

SCALED = ("LORA", "LOHA", "LOKR")  # PEFT's kinds whose strength is alpha / r
UNSUPPORTED = {  # settings of PEFT that change what the numbers mean
    "fan_in_fan_out": "stores weights transposed",
    "use_qalora": "adds to groups of quantised inputs",
    "layer_replication": "adds to a network with repeated layers",
    "target_parameters": "adds to parameters that are no modules",
    "trainable_token_indices": "holds token embeddings",
    "alora_invocation_tokens": "is switched on by tokens",
}
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that take something out of the network


class LoraError(files.FileError):
    """A LoRA that can't be converted; the message says what was found and what to do."""


# ------------------------------------------------------------------------------------------------- names


def split(name: str) -> tuple[str, str] | None:
    """A LoRA's key as its module, prefixes and all, and which part of it this is; None for a key of no LoRA."""
    for ending, part in ENDINGS:
        if match := ending.search(name):
            return name[: match.start()], match.expand(part)
    return None


@cache
def _weights() -> dict[str, tuple[int, ...]]:
    """Every parameter of the released network and its shape, blocks as N."""
    shapes = lyra2_host.weight_shapes(
        {"framepack": str(LYRA2), "rank": 256, "model_type": "i2v", "num_layers": 1, **WIDTHS}
    )
    return {name.replace("blocks.0.", "blocks.N."): shape for name, shape in shapes.items()}


@cache
def _modules() -> dict[str, str]:
    """Names with underscores, the network's own and those of diffusers, to the network's modules and bare parameters."""
    own = {name.removesuffix(".weight").removesuffix(".bias") for name in _weights()}
    names = {name: name for name in own} | {theirs: ours for ours, theirs in DIFFUSERS.items() if ours in own}
    return {name.replace(".", "_"): module for name, module in names.items()}


def module_of(raw: str) -> str | None:
    """The network's name of a module, however it is written; None if the network has no such module."""
    bare = FLAT.sub("", raw) if FLAT.match(raw) else PREFIXES.sub("", raw)
    flat = bare.replace(".processor.", ".").replace(".", "_")
    number = re.match(r"blocks_(\d+)_", flat)
    if number and int(number[1]) >= BLOCKS:
        return None
    generic = re.sub(r"^blocks_\d+_", "blocks_N_", flat)
    found = _modules().get(generic) or _modules().get(re.sub(r"to_out$", "to_out_0", generic))
    return found and (found.replace("N", number[1], 1) if number else found)


def _expected(module: str) -> tuple[int, ...] | None:
    generic = re.sub(r"^blocks\.\d+\.", "blocks.N.", module)
    return _weights().get(f"{generic}.weight", _weights().get(generic))


def _has_bias(module: str) -> bool:
    return re.sub(r"^blocks\.\d+\.", "blocks.N.", module) + ".bias" in _weights()


# ------------------------------------------------------------------------------------------------- what is told beside it


@dataclass(frozen=True)
class Told:
    """Alpha and rank as told beside the tensors."""

    where: str
    alpha: float
    rank: float | None = None  # None: that of each module
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)  # regular expression of a module's end -> alpha
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    rank_stabilised: bool = False

    def scale(self, raw: str, rank: int | None) -> float:
        """What B A is multiplied with; LoraError if the module (named as in the file) has another rank than told.

        rank None: the module has none, two whole factors of LoKr.
        """
        alpha = _of_pattern(self.alpha_pattern, raw, self.alpha)
        told = _of_pattern(self.rank_pattern, raw, self.rank)
        if told and rank and int(told) != rank:
            raise LoraError(f"{self.where} says rank {told:g} of {raw}, and its tensors have rank {rank}; they don't belong together")
        divisor = told or rank or 1
        return alpha / (math.sqrt(divisor) if self.rank_stabilised else divisor)


def _of_pattern(patterns: Mapping[str, float], raw: str, default: float | None) -> float | None:
    """As PEFT: the first pattern that the module's name ends in."""
    names = (raw, PREFIXES.sub("", raw))
    for pattern, value in patterns.items():
        if any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
            return value
    return default


def told_of(source: Path) -> Told | None:
    """What adapter_config.json beside the tensors says, else their metadata; None if neither speaks of alpha."""
    folder = source if source.is_dir() else source.parent
    if (folder / CONFIG).is_file() and (source.is_dir() or source.stem.startswith("adapter_model")):
        config = files.read_json(folder / CONFIG)
        if not isinstance(config, dict):
            raise LoraError(f"{folder / CONFIG}: expected an object with r and lora_alpha, found {type(config).__name__}")
        return _told(config, str(folder / CONFIG))
    for key, config in _records(read_metadata(source)):
        if told := _told(config, f"the metadata of {source.name} ({key})" if key else f"the metadata of {source.name}"):
            return told
    return None


def _records(metadata: Mapping[str, str]) -> Iterator[tuple[str, dict]]:
    """Dictionaries in a file's metadata that may tell alpha, that of plain keys last."""
    for key, text in metadata.items():
        try:
            value = files.parse_json(text, key)
        except files.FileError:
            continue
        if isinstance(value, dict):
            yield key, {PREFIXES.sub("", name): entry for name, entry in value.items()}
    plain = {name.removeprefix("ss_").replace("network_dim", "r"): text for name, text in metadata.items()}
    yield "", plain


def _told(config: Mapping, where: str) -> Told | None:
    kind = str(config.get("peft_type") or "LORA").upper().rpartition(".")[2]
    if kind not in SCALED:
        raise LoraError(f"{where} says peft_type {kind}; only {', '.join(SCALED)} become files for the LoRA loaders")
    for name, meaning in UNSUPPORTED.items():
        if config.get(name) not in (None, False, [], {}, "None", "False", "false"):
            raise LoraError(f"{where} says {name} {config[name]!r}: it {meaning}, which the LoRA loaders can't; merge it instead")
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(CHANGES_BASE):
        raise LoraError(
            f"{where} says init_lora_weights {start!r}, which also changes the network; save it again with PEFT's "
            "path_initial_model_for_weight_conversion, as a plain LoRA"
        )
    alpha = next((config[k] for k in ("lora_alpha", "alpha", "network_alpha") if config.get(k) not in (None, "", "None")), None)
    if alpha is None:
        return None
    rank = next((config[k] for k in ("r", "rank", "lora_rank", "network_rank") if config.get(k) not in (None, "", "None")), None)
    try:
        numbers = float(alpha), None if rank is None else float(rank)
    except (TypeError, ValueError, OverflowError):
        raise LoraError(f"{where} says alpha {alpha!r} and rank {rank!r}; both must be numbers") from None
    if not math.isfinite(numbers[0]) or (numbers[1] is not None and not 0 < numbers[1] < math.inf):
        raise LoraError(f"{where} says alpha {alpha!r} and rank {rank!r}; alpha must be finite and the rank positive")
    stabilised = str(config.get("use_rslora") or False).lower() == "true"
    patterns = (_patterns(config.get(name) or {}, f"{where}: {name}") for name in ("alpha_pattern", "rank_pattern"))
    return Told(where, *numbers, *patterns, stabilised)


def _patterns(patterns: object, where: str) -> Mapping[str, float]:
    """Regular expressions of modules' names and a number for each; LoraError for others, and for those that could take for ever."""
    if not isinstance(patterns, dict):
        raise LoraError(f"{where} is {str(patterns)[:80]}, expected names of modules with a number each")
    for pattern, value in patterns.items():
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise LoraError(f"{where} says {str(value)[:80]} of {pattern[:80]!r}; expected a positive number")
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError):
            raise LoraError(f"{where} has {pattern[:80]!r}, which is no regular expression") from None
        # a repeated group, or many repetitions, can take as long as it likes over a name
        if len(pattern) > 500 or re.search(r"\)[*+?{]|\\\d", pattern) or len(re.findall(r"[*+{]", pattern)) > 3:
            raise LoraError(f"{where} has {pattern[:80]!r}, too involved for the name of a module; write it plainly")
    return patterns


# ------------------------------------------------------------------------------------------------- what is written


@dataclass(frozen=True)
class Converted:
    """What the host gets."""

    entries: list[Entry]
    unknown: tuple[str, ...]  # modules that Lyra 2 does not have, block numbers replaced by N; left out
    notes: tuple[str, ...]  # a line each on what the strength was taken from, and on widths


def converted(source: Path, entries: list[Entry]) -> Converted:
    """A LoRA's entries under the host's names, with the alpha that was told beside them.

    ValueError that names what the host could not use: tensors that are no LoRA's, halves of a pair, two kinds for one
    module, DoRA whose norm the host takes otherwise, Tucker cores, or a file of which nothing fits.
    """
    modules, unknown = _grouped(source, entries)
    if not modules:
        raise ValueError(f"{source} fits Lyra 2 nowhere; it adds to:\n{lyra2_host.listed(sorted(unknown), 8)}")
    told, written, told_of_file, own, plain = told_of(source), [], 0, 0, 0
    for module, (raw, parts) in modules.items():
        try:
            made, alpha_from = _converted(module, raw, parts, told)
        except LoraError as problem:
            raise ValueError(f"{source}: {raw}: {problem}") from None
        written += made
        own, told_of_file, plain = (n + (alpha_from == k) for n, k in ((own, "own"), (told_of_file, "told"), (plain, "none")))
    notes = []
    if told_of_file:
        notes.append(f"alpha of {told_of_file} modules from {told.where}")
    if plain:
        notes.append(f"nothing tells the alpha of {plain} modules: taken to be their rank, as the loaders do")
    return Converted(written, tuple(sorted(unknown)), (*notes, *_widths(written)))


def _grouped(source: Path, entries: list[Entry]) -> tuple[dict[str, tuple[str, dict[str, Entry]]], set[str]]:
    """Parts by the network's module, with the module's name in the file; and modules that the network lacks."""
    modules, unknown, whole, twice = {}, set(), [], []
    for entry in entries:
        found = split(entry.name)
        if found is None:
            whole.append(entry.name)
            continue
        raw, part = found
        module = module_of(raw)
        if module is None or (part in ("diff_b", "b_norm", "lora_bias") and not _has_bias(module)):
            bare = FLAT.sub("", raw) if FLAT.match(raw) else PREFIXES.sub("", raw)
            unknown.add(re.sub(r"blocks([._])\d+", r"blocks\1N", bare) + (".bias" if module else ""))
            continue
        parts = modules.setdefault(module, (raw, {}))[1]
        if part in parts:
            twice += [parts[part].name, entry.name]
        parts[part] = entry
    if whole:
        raise ValueError(
            f"{source} holds whole weights beside a LoRA, which the loaders would not use; train without modules_to_save "
            f"and bias, or merge it:\n{lyra2_host.listed(whole, 5)}"
        )
    if twice:
        raise ValueError(f"{source} holds several tensors for one key; keep one of each in a file:\n{lyra2_host.listed(twice)}")
    return modules, unknown


def _converted(module: str, raw: str, parts: dict[str, Entry], told: Told | None) -> tuple[list[Entry], str]:
    """The host's entries of one module, and whose alpha it is: its own, told beside it, none, or "" where none is needed."""
    parts = {{"w_norm": "diff", "b_norm": "diff_b"}.get(part, part): entry for part, entry in parts.items()}
    rank, kind = _checked(parts)
    scale, alpha_from = 1.0, ""
    if kind in ("lora", "lokr", "hada"):
        if "alpha" in parts:
            alpha, alpha_from = _number(parts["alpha"]), "own"
            scale = alpha / rank if rank else 1.0
        elif told:
            scale, alpha_from = told.scale(raw, rank), "told"
            if rank:
                parts["alpha"] = _scalar(scale * rank)
            else:  # LoKr of two whole factors, of which the host asks no alpha
                name = "lokr_w1"
                parts[name] = _scaled(parts[name], scale)
        else:
            alpha_from = "none"
    elif "alpha" in parts:
        del parts["alpha"]  # a diff has no rank
    if "lora_bias" in parts:
        if "diff_b" in parts:
            raise LoraError("has the bias of a LoRA and diff_b, and the loaders use one of them")
        parts["diff_b"] = _scaled(parts.pop("lora_bias"), scale)
    for part in {"diff", "set_weight"} & parts.keys():
        if module == "patch_embedding" and len(parts[part].shape) == 2:  # a matrix in files, a convolution when loaded
            out, into = parts[part].shape
            parts[part] = replace(parts[part], shape=(out, into // PATCH**2, 1, PATCH, PATCH))
    return [replace(entry, name=f"diffusion_model.{module}.{part}") for part, entry in parts.items()], alpha_from


def _checked(parts: Mapping[str, Entry]) -> tuple[int | None, str]:
    """Rank and kind of a module whose parts the host uses all; LoraError otherwise."""
    shapes = {part: entry.shape for part, entry in parts.items()}
    for part in parts:
        if part in ("lora_mid.weight", "lokr_t2", "hada_t1", "hada_t2"):
            raise LoraError(f"has {part}, the core of a convolution, and Lyra 2's layers are matrices")
        if part.startswith(("oft_", "boft_", "ia3_", "vera_", "glora_", "lora_embedding", "rescale", "reshape_weight")):
            raise LoraError(f"has {part}; only LoRA, LoHa, LoKr and differences are converted")
        if part.startswith(("hada_", "lokr_")) and len(shapes[part]) < 2:
            raise LoraError(f"has a {part} of shape {shapes[part]}, and factors are matrices; download or save it again")
    kinds = {
        "lora": any(part.startswith("lora_") and part != "lora_bias" for part in parts),
        "lokr": any(part.startswith("lokr_") for part in parts),
        "hada": any(part.startswith("hada_") for part in parts),
        "diff": "diff" in parts,
        "set_weight": "set_weight" in parts,
    }
    present = [kind for kind, there in kinds.items() if there]
    if len(present) > 1:
        raise LoraError(f"has {' and '.join(present)} for one weight, of which the loaders use the last only; merge them")
    if not present:
        if "diff_b" in parts:
            return None, "diff"
        raise LoraError(f"has only {', '.join(parts)}, which adds nothing; the file is incomplete: download or save it again")
    kind = present[0]
    if kind in ("diff", "set_weight"):
        rank, out = None, shapes[kind][0] if shapes[kind] else 0
    else:
        rank, out = {"lora": _lora_rank, "hada": _hada_rank, "lokr": _lokr_rank}[kind](shapes)
    magnitudes = shapes.get("magnitude", shapes.get("dora_scale"))
    # the host's norm for a magnitude per output is that of the weight before the LoRA, every trainer's the one with it
    if "magnitude" in shapes or (magnitudes and magnitudes[0] == out):
        raise LoraError(
            "is a DoRA with a magnitude per output; the loaders divide by the norm of the unchanged weight, which is not what it "
            "was trained for: merge it into the network, or train a plain LoRA"
        )
    return rank, kind


def _need(shapes: Mapping[str, tuple], *names: str) -> None:
    if missing := [name for name in names if name not in shapes]:
        raise LoraError(f"lacks {' and '.join(missing)} beside {', '.join(shapes)}; the file is incomplete: download or save it again")


def _lora_rank(shapes: Mapping[str, tuple]) -> tuple[int, int]:
    up = next((part for part in A_OF if part in shapes), None) or (
        "lora_B.weight" if "lora_A.weight" in shapes else "lora_up.weight"
    )
    _need(shapes, A_OF[up], up)
    if extra := [part for part in shapes if part.startswith("lora_") and part not in (up, A_OF[up], "lora_bias")]:
        raise LoraError(f"has {', '.join(extra)} beside {up}, and the loaders use one pair; keep one")
    A, B = shapes[A_OF[up]], shapes[up]
    if len(A) < 2 or len(B) < 2 or A[0] != math.prod(B[1:]):
        raise LoraError(f"A is {A} and B is {B}, which have no rank in common")
    return A[0], B[0]


def _hada_rank(shapes: Mapping[str, tuple]) -> tuple[int, int]:
    _need(shapes, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    (out, rank), (inner, _) = shapes["hada_w1_a"], shapes["hada_w1_b"]
    sizes = [(shapes[f"hada_w{n}_a"][0], shapes[f"hada_w{n}_b"][1]) for n in (1, 2)]
    if rank != inner or shapes["hada_w2_a"][1] != shapes["hada_w2_b"][0] or sizes[0] != sizes[1]:
        raise LoraError(f"its factors {shapes} don't multiply")
    return rank, out


def _lokr_rank(shapes: Mapping[str, tuple]) -> tuple[int | None, int]:
    """The rank of the last factor that is a product, which is the host's; None if both are whole."""
    rank, out = None, 1
    for name in ("lokr_w1", "lokr_w2"):
        if name in shapes:
            if f"{name}_a" in shapes or f"{name}_b" in shapes:
                raise LoraError(f"has {name} whole and as a product, and the loaders use one; keep one")
            out *= shapes[name][0]
            continue
        _need(shapes, f"{name}_a", f"{name}_b")
        if shapes[f"{name}_a"][1] != shapes[f"{name}_b"][0]:
            raise LoraError(f"its factors {shapes} don't multiply")
        rank, out = shapes[f"{name}_b"][0], out * shapes[f"{name}_a"][0]
    return rank, out


def _number(entry: Entry) -> float:
    value = float(entry.read(torch.float32)) if math.prod(entry.shape) == 1 else math.nan
    if not math.isfinite(value):
        raise LoraError(f"its alpha, of shape {entry.shape}, is no finite number")
    return value


def _scalar(value: float) -> Entry:
    return Entry("alpha", (), torch.float32, torch.tensor(value).to)


def _scaled(entry: Entry, scale: float) -> Entry:
    return replace(entry, read=lambda dtype: (entry.read(torch.float32) * scale).to(dtype))


def _widths(entries: list[Entry]) -> list[str]:
    """A line if no module is as wide as the released network's."""
    sizes = {}
    for entry in entries:
        module, part = split(entry.name)
        module = module.removeprefix("diffusion_model.")
        expected = _expected(module)
        if part in ("lora_A.weight", "lora_down.weight") and expected and len(expected) == 2:
            sizes[module] = math.prod(entry.shape[1:]), expected[1]
    if sizes and all(found != right for found, right in sizes.values()):
        module, (found, right) = next(iter(sizes.items()))
        return [
            f"it was trained for another network: {module} takes {found} numbers and the released Lyra 2's {right}; "
            "the loaders can't use it there"
        ]
    return []
