"""Learning from worlds and videos: a set of them on disk, and a LoRA, or all weights, trained on it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import comfy.sd
import torch
from comfy_api.latest import io, ui
from PIL import Image, ImageDraw

from ..lyra_core.cameras import camera_files
from ..lyra_core.cameras.camera import Cameras
from ..lyra_core.cameras.captions import captions_in
from ..lyra_core.conditioning.framepack import LYRA2
from ..lyra_core.models import lessons
from ..lyra_core.training import optimisation, sets, videos
from ..lyra_core.training.loop import Course, Step
from ..lyra_core.training.recipe import Recipe
from ..lyra_core.training.sample import Sample, there_and_back
from ..lyra_core.world.world import World, fingerprint, to_uint8
from . import types
from .inputs import seed_input
from .node import Node
from .photos import cropped
from .video import frame_count, frames_of

Set = io.Custom("LYRA2_TRAINING_SET")  # pathlib.Path of its folder
Lora, Losses = io.Custom("LORA_MODEL"), io.Custom("LOSS_MAP")  # of the host's training nodes
WORLD, SCAN, VIDEO, NOTHING = "a world", "a scan", "a video", "nothing more"
REFERENCE, ALL = "what the reference trains", "all of it"
LORA, WEIGHTS = "LoRA", "the weights themselves"


# ------------------------------------------------------------------------------------------------------------------ the set


class TrainingSet(Node):
    @classmethod
    def define_schema(cls):
        captures = [*types.input_files(".json"), *types.input_folders("cameras.txt", "images.txt")]
        caption = io.String.Input(
            "caption", default="", multiline=True, tooltip='What is seen; or JSON such as {"0": "a street", "81": "a square"}, by frames.'
        )
        estimator = types.DepthEstimator.Input(
            "depth_estimator",
            optional=True,
            tooltip="For every 8th frame. The first frames get their scale from the cameras, so it must say where it believes them to "
            "be: Depth Anything 3 Small or Base.",
        )
        sides = [
            io.Int.Input(name, default=default, min=16, max=2048, step=16, tooltip="Pixels; pictures are cropped to it.")
            for name, default in (("width", 832), ("height", 480))
        ]
        ways = [
            io.DynamicCombo.Option(NOTHING, []),  # first, because the frontend makes no node whose first choice brings sockets alone
            io.DynamicCombo.Option(WORLD, [types.World.Input("world", tooltip="It has cameras, depth and prompts of its own.")]),
            io.DynamicCombo.Option(
                SCAN,
                [
                    io.Combo.Input("file", options=captures, tooltip="A transforms.json or the folder of a COLMAP text model; pictures in order."),
                    *sides,
                    caption,
                    estimator,
                ],
            ),
            io.DynamicCombo.Option(
                VIDEO,
                [
                    io.Video.Input("video", tooltip="A still place; nothing moves but the camera. Both sides multiples of 16."),
                    types.Cameras.Input("cameras", tooltip="One for each frame of the video."),
                    caption,
                    types.Depth.Input("depth", optional=True, tooltip="One for each frame, in the units of the cameras; else the estimator."),
                    estimator,
                ],
            ),
        ]
        return io.Schema(
            node_id="Lyra2TrainingSet",
            display_name="Lyra 2 Training Set",
            category=types.CATEGORY,
            search_aliases=["dataset", "training data"],
            description="Adds a world, a scan or a video to a training set: a folder with two files for each. What is there already, made "
            "from the same, is not made again. Several of these nodes in a row make a set of several walks.",
            inputs=[
                io.DynamicCombo.Input("source", options=ways, tooltip="What is added. *nothing more* is the set as it is."),
                io.String.Input("folder", default="training/my_place", tooltip="The set, in the output folder."),
                io.String.Input("name", default="walk", tooltip="Of what is added; another one of this name is replaced."),
                io.Int.Input(
                    "chunk_frames", default=LYRA2.new_frames, min=4, max=8000, step=4, advanced=True, tooltip="New frames of a chunk; 80 for Lyra 2."
                ),
                Set.Input("after", optional=True, tooltip="A set node that runs before this one; the set is its set."),
            ],
            outputs=[
                Set.Output(display_name="training_set"),
                types.Cameras.Output(display_name="cameras", tooltip="Of the walk of this name, to walk it again; else of the first one."),
                io.String.Output(display_name="report", tooltip="What is in the set, and what to know of it."),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, source=None, folder="", **_) -> str:
        place = types.output_folder(folder)
        found = sorted(place.iterdir()) if place.is_dir() else []
        return " ".join(f"{file.name}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in found)  # too much to be read

    @classmethod
    def execute(cls, source, folder, name, chunk_frames=LYRA2.new_frames, after=None) -> io.NodeOutput:
        place = types.output_folder(folder) if after is None else after
        report = "\n".join([*_added(place, source, name, chunk_frames), *contents(place)])
        walks = sets.read(place)
        walk = next((sample for sample in walks if sample.name == name), walks[0])
        return io.NodeOutput(place, walk.cameras, report, ui=ui.PreviewText(report))


def _added(place: Path, source: dict, name: str, chunk: int) -> list[str]:
    """Add what the node was given to a set; what there is to say of it."""
    kind, estimator = source["source"], source.get("depth_estimator")
    if kind == WORLD:
        return world_added(place, name, chunk, source["world"])
    if kind == SCAN:
        size = source["height"], source["width"]
        return scan_added(place, name, chunk, types.input_path(source["file"]), size, source["caption"], estimator)
    if kind == VIDEO:
        return video_added(place, name, chunk, source["video"], source["cameras"], source["caption"], source.get("depth"), estimator)
    return []


Made = Callable[[], tuple[Sample, list[str]]]


def added(place: Path, name: str, chunk: int, origin: dict, made: Made) -> list[str]:
    """Add what `made` gives to a set, if nothing made from this origin is there; what there is to say of it."""
    origin = {**origin, "chunk": chunk}
    if sets.holds(place, name, origin):
        return [f"{name} is there already"]
    sample, notes = made()
    sets.add(place, sample, origin, chunk)
    return notes


def world_added(place: Path, name: str, chunk: int, world: World) -> list[str]:
    return added(place, name, chunk, {"world": world.key}, lambda: (sets.of_world(world, name), sets.remarks(world, name)))


def scan_added(place: Path, name: str, chunk: int, path: Path, size: tuple[int, int], caption: str, estimator) -> list[str]:
    """A transforms.json or COLMAP text model, its pictures cropped to (height, width)."""
    pictures = camera_files.pictures_of(path)

    def made():
        notes: list[str] = []
        cameras = camera_files.load_cameras(path, size=size, fit="crop", on_note=notes.append)
        types.afford(len(pictures) * size[0] * size[1] * 3, f"{len(pictures)} pictures of {size[1]}x{size[0]}")
        frames = torch.stack([to_uint8(cropped(picture, size)) for picture in pictures])
        sample, remarks = _posed(name, chunk, frames, cameras, caption, None, estimator)
        return sample, notes + remarks

    told = types.fingerprint(*camera_files.files_read(path), *pictures)
    return added(place, name, chunk, {"scan": told, "size": list(size), "caption": caption}, made)


def video_added(place: Path, name: str, chunk: int, video, cameras: Cameras, caption: str, depth, estimator) -> list[str]:
    """A VIDEO with a camera for each frame, and a DepthMap for each, or an estimator."""
    count, (width, height) = frame_count(video), video.get_dimensions()
    if len(cameras) != count or (depth is not None and len(depth) != count):
        found = f"{len(cameras)} cameras" + (f" and {len(depth)} depths" if depth is not None else "")
        raise ValueError(f"{name}: the video has {count} frames, but there are {found}; each frame needs its own")

    def made():
        types.afford(count * width * height * 3, f"{count} frames of {width}x{height}")
        frames = torch.stack(list(frames_of(video)))
        return _posed(name, chunk, frames, cameras.resized((height, width)), caption, depth, estimator)

    digest = hashlib.sha256()
    for frame in frames_of(video):
        digest.update(frame.numpy().tobytes())
    origin = {"video": digest.hexdigest(), "cameras": fingerprint(cameras), "caption": caption, "depth": depth is not None}
    return added(place, name, chunk, origin, made)


def _posed(
    name: str, chunk: int, frames: torch.Tensor, cameras: Cameras, caption: str, depth, estimator
) -> tuple[Sample, list[str]]:
    """The sample, and what to know of it. Fewer frames than a chunk takes are walked there and back."""
    if len(frames) < 2:
        raise ValueError(f"{name}: {len(frames)} picture is no walk; give a video, or a scan of several pictures in order")
    notes = []
    if len(frames) <= chunk:
        notes = [f"{name}: {len(frames)} frames are fewer than a chunk of {chunk} after the first one, so walked there and back"]
        ids = there_and_back(len(frames), 1 + chunk)
        frames, cameras, depth = frames[ids], cameras[ids], depth and [depth[frame] for frame in ids]
    wanted = videos.remembered(len(frames), chunk, Recipe.stride)
    if depth is not None:
        depths = {frame: depth[frame].depth for frame in wanted}
    elif estimator is not None:
        depths = videos.estimated(frames, cameras, wanted, estimator, types.progress(len(wanted)))
    else:
        raise ValueError(f"{name}: no depth is known; connect a depth estimator, or the depth of all frames")
    captions = captions_in(caption)
    return videos.of_frames(name, frames, cameras, depths, {0: caption} if captions is None else captions, chunk), notes


def contents(place: Path) -> list[str]:
    samples = sets.read(place)
    total = sum(len(sample) for sample in samples)
    size = f"{samples[0].size[1]}x{samples[0].size[0]}"
    return [
        f"{place.name}: {len(samples)} walks, {total} frames of {size}",
        *(f"{sample.name}: {len(sample)} frames, depth of {len(sample.depths)}" for sample in samples),
    ]


# ------------------------------------------------------------------------------------------------------------- the training


class TrainLoRA(Node):
    @classmethod
    def define_schema(cls):
        what = io.DynamicCombo.Input(
            "trained",
            options=[
                io.DynamicCombo.Option(
                    LORA,
                    [
                        io.Int.Input("rank", default=16, min=1, max=1024, tooltip="Of the LoRA. Higher: it can learn more, and is larger."),
                        _weights_input(),
                    ],
                ),
                io.DynamicCombo.Option(WEIGHTS, [_weights_input()]),
            ],
            tooltip="LoRA: small matrices beside the network's. The weights themselves: for small models only; the result is what they "
            "differ by, which loads like a LoRA.",
        )
        return io.Schema(
            node_id="Lyra2TrainLoRA",
            display_name="Lyra 2 Train LoRA",
            category=types.CATEGORY,
            search_aliases=["finetune", "fine-tuning", "self-augmentation"],
            is_experimental=True,
            is_output_node=True,
            description="Trains Lyra 2 on your own places, as its makers did: on histories that it has spoilt itself, so that it corrects "
            "drift. Goes on where it ended after a stop, a crash or a kill. For SaveLoRA, LoraModelLoader and Plot Loss Graph.",
            inputs=[
                io.Model.Input("model", tooltip="The Lyra 2 transformer, with any LoRAs that it shall have while it learns."),
                io.Clip.Input("clip", tooltip="umt5_xxl, type wan."),
                io.ClipVision.Input("clip_vision", optional=True, tooltip="clip_vision_h; only a model without image embedding does without."),
                io.Vae.Input("vae", tooltip="wan_2.1_vae."),
                Set.Input("training_set", tooltip="From Lyra 2 Training Set."),
                what,
                io.Int.Input("steps", default=1000, min=1, max=1_000_000, tooltip="All steps, those of an earlier run included."),
                io.Float.Input(
                    "learning_rate",
                    default=1e-4,
                    min=1e-8,
                    max=1.0,
                    step=1e-6,
                    round=False,
                    tooltip="After 100 steps, over which it rises. The reference trains all weights with 0.00003; a LoRA takes more.",
                ),
                io.Float.Input(
                    "self_augmentation",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Share of every second step that learns from a spoilt history or from the photo alone. 0: drift is not corrected.",
                ),
                io.Float.Input(
                    "text_drop", default=0.2, min=0.0, max=1.0, step=0.05, tooltip="How often the caption is left out, for CFG."
                ),
                io.Int.Input("batch", default=1, min=1, max=1024, advanced=True, tooltip="Windows a step, one after the other."),
                io.Combo.Input(
                    "precision",
                    options=["as the model", "bf16"],
                    advanced=True,
                    tooltip="Of products. bf16: also where the weights are float32. What is trained is float32 always.",
                ),
                io.Boolean.Input(
                    "checkpointing",
                    default=True,
                    advanced=True,
                    tooltip="Blocks are computed again for their gradients: less memory, a third more time.",
                ),
                io.Boolean.Input("offload", default=False, advanced=True, tooltip="Weights that don't fit the card stay in memory: slower."),
                seed_input(2**32 - 1, "The same seed gives the same training."),
                io.Int.Input(
                    "preview_every", default=100, min=0, max=100_000, tooltip="Steps until the first chunk is painted to be looked at; 0: never."
                ),
                io.Float.Input("save_every", default=5.0, min=0.0, max=600.0, step=0.5, tooltip="Minutes; a kill loses so much at most."),
                io.String.Input("save_to", default="training/my_place_lora", tooltip="Where the training is kept, in the output folder."),
            ],
            outputs=[
                Lora.Output(display_name="lora"),
                io.Model.Output(display_name="model", tooltip="With what was learned."),
                Losses.Output(display_name="loss_map"),
                io.Int.Output(display_name="steps"),
                io.String.Output(display_name="report"),
            ],
        )

    @classmethod
    def execute(
        cls, model, clip, vae, training_set, trained, steps, learning_rate, clip_vision=None, self_augmentation=1.0, text_drop=0.2,
        batch=1, precision="as the model", checkpointing=True, offload=False, seed=1, preview_every=100, save_every=5.0, save_to="",
    ) -> io.NodeOutput:  # fmt: skip
        recipe = lessons.recipe_for(model, self_augmented=self_augmentation, text_drop=text_drop)
        course = Course(steps, learning_rate, batch=batch, seed=seed, save_every=60 * save_every)
        rank = trained["rank"] if trained["trained"] == LORA else None
        lesson = lessons.Lesson(weights_named(trained["weights"]), rank, offload, checkpointing, precision == "bf16", preview_every)
        file = types.output_folder(save_to) / lessons.FILE if save_to.strip() else None
        notes, shown = [], _Shown(steps)

        def note(text: str) -> None:
            notes.append(text)
            types.show(ui.PreviewText(text).as_dict())  # before anything is learned, which may take a day

        networks = lessons.Networks(model, clip, clip_vision, vae)
        learned = lessons.teach(
            training_set, networks, recipe, course, lesson, file, shown.step, shown.picture, note, types.stop_if_interrupted
        )
        losses = list(learned.state.losses)
        report = "\n".join([*notes, lessons.summary(learned.state)])
        with_lora = comfy.sd.load_lora_for_models(model, None, learned.lora, 1.0, 0)[0]
        return io.NodeOutput(learned.lora, with_lora, {"loss": losses}, learned.state.step, report, ui=ui.PreviewText(report))


def _weights_input():
    return io.String.Input(
        "weights",
        default=REFERENCE,
        tooltip=f"Parts of the names of what is trained, such as self_attn, cam_encoder; or: {REFERENCE}; or: {ALL}.",
    )


def weights_named(text: str) -> optimisation.Filter:
    """What an input for the names of weights says."""
    known = {REFERENCE: optimisation.of_lyra2, ALL: optimisation.everything}
    return known.get(text.strip()) or optimisation.matching(text)


class _Shown:
    """Progress of a training in the browser: how far it is, its loss, and the last painted preview under it."""

    def __init__(self, steps: int):
        self.on_step, self.steps, self.last = types.progress(steps), steps, None

    def picture(self, _step: int, picture: torch.Tensor) -> None:
        self.last = picture

    def step(self, step: Step) -> None:
        self.on_step(step.number, self.steps, _labelled(f"step {step.number}  loss {step.loss:.4f}", self.last))


def _labelled(text: str, picture: torch.Tensor | None) -> torch.Tensor:
    """(H, W, 3) uint8: a line of text over a picture, or alone."""
    width = 320 if picture is None else picture.shape[1]
    line = Image.new("RGB", (width, 20), "black")
    ImageDraw.Draw(line).text((4, 4), text, fill="white")
    drawn = torch.frombuffer(bytearray(line.tobytes()), dtype=torch.uint8).view(20, width, 3)
    return drawn if picture is None else torch.cat([picture, drawn])


NODES = [TrainingSet, TrainLoRA]
