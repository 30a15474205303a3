"""Makes the small Lyra 2 from nothing: `python tools/comfy.py train-tiny [FOLDER]`, resumable at any time.

Codec, then films of scenes and their latents, then transformer, then the gates; what is done is not done again. The checkpoint
is written to FOLDER/lyra_tiny.safetensors, for the host's CheckpointLoaderSimple, with gates.json beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from importlib import import_module
from pathlib import Path

import host
import train  # noqa: F401  a folder that host.boot() takes off the path


def minutes(text: str) -> float:
    """A time; ArgumentTypeError for one that has no beginning."""
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} minutes; give a number above 0, or none to count steps")
    return found


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="comfy.py train-tiny", description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("output/lyra_tiny"), help="where all of it goes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--codec-steps", type=int, default=6000)
    parser.add_argument("--codec-minutes", type=minutes, help="for the codec: the clock ends its training, with fewer steps or more")
    parser.add_argument("--films", type=int, default=96, help="scenes that are learned from")
    parser.add_argument("--steps", type=int, default=20000, help="of the transformer")
    parser.add_argument("--minutes", type=minutes, help="for the transformer: the clock ends its training, with fewer steps or more")
    parser.add_argument("--examples", type=int, default=48, help="that are kept at hand")
    parser.add_argument("--begin", type=int, default=48, help="of them before the first step")
    parser.add_argument("--processes", type=int, default=0, help="that make the geometry of examples ahead")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--codec", type=Path, help="a codec.safetensors to take, instead of training one")
    parser.add_argument("--held-out", type=int, default=16, help="scenes that the gates look at")
    parser.add_argument("--size", default="96x64", help="width x height of the films, multiples of 16")
    parser.add_argument("--device", help="cuda where there is one, else cpu")
    parser.add_argument("--until", choices=("codec", "films", "transformer", "gates"), default="gates", help="stop after this")
    return parser


def main(arguments: list[str]) -> int:
    began, options = time.monotonic(), parser().parse_args(arguments)
    host.boot()
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    codec, films, gates, painter, release, sights, contracts = (
        import_module(name)
        for name in ("train.codec", "train.films", "train.gates", "train.painter", "train.release", "train.sights", "lyra_core.training.contracts")
    )
    recipe = painter.RECIPE
    width, height = map(int, options.size.split("x"))

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {text}", flush=True)

    folder = options.folder
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder.mkdir(parents=True, exist_ok=True)
    if options.codec:
        network = codec.read(options.codec).to(device)
    else:
        file = folder / "codec.training.safetensors"
        learned = codec.train(file, options.codec_steps, options.seed, device=device, say=say, minutes=options.codec_minutes)
        network = codec.in_format(learned, codec.films(options.seed, 8))
    codec.write(network, folder / "codec.safetensors")
    if options.until == "codec":
        say(str(gates.codec(network, recipe, options.held_out, (height, width))))
        return 0
    coder = codec.TrainingCodec(network, codec.fingerprint(network))
    encoders = contracts.Encoders(coder, lambda picture: torch.zeros(1, 1), release.padded)
    made = {"seed": options.seed, "films": options.films, "batch": options.batch, "examples": options.examples}
    made |= {"size": [height, width], "codec_steps": None if options.codec or options.codec_minutes else options.codec_steps, "transformer_steps": 0}
    made |= {"codec_minutes": options.codec_minutes, "minutes": options.minutes, "rate": options.rate, "parent": "fresh weights"}

    def record(steps: int) -> None:
        told = {"transformer_steps": steps, "parent": f"a transformer of {steps} steps"} if steps else {}
        (folder / "made.json").write_text(json.dumps(made | told, indent=1))

    training = folder / "transformer.training.safetensors"
    record(painter.reached(training))
    processes = 0 if options.until == "films" else options.processes
    names = [films.name(number) for number in films.learned(options.films, options.seed)]
    place, ordered = folder / "sights", options.minutes is None
    with sights.Makers(folder / "films", names, recipe, options.seed, 0, processes, place, ordered) as makers:
        samples = films.training_set(folder / "films", options.films, recipe, coder, options.seed, (height, width), say, device)
        if options.until == "films":
            return 0
        course = painter.Course(
            options.steps, options.batch, options.examples, options.begin, options.minutes, options.rate, options.seed
        )
        file = folder / "lyra_tiny.safetensors"

        def kept(averaged, step: int) -> None:
            release.write(file, averaged, network)
            record(step)

        transformer = painter.train(
            training,
            painter.new(options.seed).to(device),
            makers,
            samples,
            encoders,
            course,
            say=say,
            kept=kept,
        )
    release.write(file, transformer, network)
    say(f"{file}: {file.stat().st_size / 1e6:.1f} MB")
    if options.until == "transformer":
        return 0
    found = [gates.codec(network, recipe, options.held_out, (height, width))]
    say(str(found[0]))
    for gate in gates.painter(painter.spoken(transformer), encoders, recipe, options.held_out, (height, width)):
        found.append(gate)
        say(str(gate))
    (folder / "gates.json").write_text(json.dumps([vars(gate) for gate in found], indent=2))
    return 0 if all(gate.met for gate in found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
