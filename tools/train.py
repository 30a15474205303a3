#!/usr/bin/env python3
"""Trains a LoRA, or all weights of a small model, on a training set that `comfy.py trainset` has made.

    python tools/comfy.py train SET LORA.safetensors [--steps N] [--rank N] [--rate X]
                                [--model FILE --text-encoder FILE --clip-vision FILE --vae FILE]

Goes on where it ended: after Ctrl-C, a crash or a kill the same command loses at most --minutes. LORA.safetensors is for
models/loras. Every --preview steps LORA_STEP.png shows the last frame of the first chunk, as it is and as it is painted now.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import host

FILES = {
    "model": ("diffusion_models", "lyra2.safetensors"),
    "text_encoder": ("text_encoders", "umt5_xxl_fp8_e4m3fn_scaled.safetensors"),
    "clip_vision": ("clip_vision", "clip_vision_h.safetensors"),
    "vae": ("vae", "wan_2.1_vae.safetensors"),
}
EVERY = 5.0  # seconds from one line to the next


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="comfy.py train", description=__doc__.partition("\n")[0])
    parser.add_argument("set", type=Path, help="the folder of a training set")
    parser.add_argument("lora", type=Path, help="what is written; the training itself lies beside it")
    for name, (folder, file) in FILES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=Path, help=f"default: {file} of the host's models/{folder}")
    parser.add_argument("--clip-type", default="wan", help="of the text encoder (default wan)")
    parser.add_argument("--steps", type=int, default=1000, help="all steps, those of earlier runs included")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA")
    parser.add_argument("--full", action="store_true", help="train the weights themselves; for small models")
    parser.add_argument("--weights", default="", help="parts of the names of what is trained (default: what the reference trains)")
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--self-augmentation", type=float, default=1.0, help="share of every second step (default 1)")
    parser.add_argument("--bf16", action="store_true", help="products in bfloat16 also where weights are float32")
    parser.add_argument("--offload", action="store_true", help="weights that don't fit the card stay in memory")
    parser.add_argument("--minutes", type=float, default=5.0, help="from one save to the next")
    parser.add_argument("--preview", type=int, default=0, metavar="STEPS", help="paint a chunk every so many steps")
    return parser


def find(name: str, given: Path | None) -> Path:
    """A model file: the one that was named, or the host's."""
    folder, file = FILES[name]
    places = [given] if given else [place / file for place in host.load("lyra_models", host.TOOLS / "models.py").search_folders(folder)]
    for place in places:
        if place.is_file():
            return place
    raise ValueError(f"{places[0]}: there is no such file; name it with --{name.replace('_', '-')}, or see `comfy.py models`")


def networks(options):
    import comfy.clip_vision
    import comfy.sd
    from comfy.utils import load_torch_file

    from lyra_core.models import lessons

    kind = getattr(comfy.sd.CLIPType, options.clip_type.upper(), None)
    if kind is None:
        raise ValueError(f"--clip-type {options.clip_type}: the host knows no such text encoder")
    paths = {name: str(find(name, getattr(options, name))) for name in FILES}
    return lessons.Networks(
        comfy.sd.load_diffusion_model(paths["model"]),
        comfy.sd.load_clip([paths["text_encoder"]], clip_type=kind),
        comfy.clip_vision.load(paths["clip_vision"]),
        comfy.sd.VAE(sd=load_torch_file(paths["vae"])),
    )


def train(options) -> None:
    from PIL import Image

    from lyra_core.array_files import write_safetensors
    from lyra_core.models import lessons, lyra2_host
    from lyra_core.training import optimisation
    from lyra_core.training.loop import Course

    lyra2_host.register()
    chosen = optimisation.matching(options.weights) if options.weights else optimisation.of_lyra2
    course = Course(options.steps, options.rate, batch=options.batch, seed=options.seed, save_every=60 * options.minutes)
    lesson = lessons.Lesson(chosen, None if options.full else options.rank, options.offload, True, options.bf16, options.preview)
    said, begun = 0.0, time.monotonic()

    def on_step(step):
        nonlocal said
        if step.number == options.steps or time.monotonic() - said > EVERY:
            said = time.monotonic()
            took = (said - begun) / 60
            print(f"step {step.number} of {options.steps}: loss {step.loss:.4f}, gradient {step.norm:.3f}, {took:.1f} min", flush=True)

    def on_picture(number, picture):
        options.lora.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.numpy()).save(options.lora.with_name(f"{options.lora.stem}_{number}.png"))

    held = networks(options)
    recipe = lessons.recipe_for(held.model, self_augmented=options.self_augmentation)
    learned = lessons.teach(
        options.set, held, recipe, course, lesson, options.lora.with_suffix(".training.safetensors"), on_step, on_picture, print
    )
    write_safetensors(options.lora, learned.lora, {"format": "pt"})
    print(f"{lessons.summary(learned.state)}\nwrote {options.lora}")


def main(words: list[str]) -> int:
    options = arguments().parse_args(words)
    try:
        train(options)
    except (ValueError, OSError, MemoryError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from {options.lora.with_suffix('.training.safetensors')}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    host.boot()
    sys.exit(main(sys.argv[1:]))
