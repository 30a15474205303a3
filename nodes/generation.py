"""Chunks by the transformer: what it is shown, how it is sampled, what becomes of it; and chunks in a row, by any generator."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import folder_paths
import torch
from comfy_api.latest import io, ui
from comfy_execution.graph_utils import GraphBuilder, is_link
from node_helpers import conditioning_set_values

from ..lyra_core.cameras.camera import join
from ..lyra_core.cameras.captions import caption
from ..lyra_core.conditioning.framepack import LYRA2
from ..lyra_core.conditioning.history import History
from ..lyra_core.models import generation
from ..lyra_core.models.devices import geometry_device
from ..lyra_core.models.lyra2_host import check_model, conditioning
from ..lyra_core.world import world as worlds
from ..lyra_core.world import world_files
from ..lyra_core.world.control import MaskRule
from . import types
from .control import GENERATORS as VIDEO_MODELS
from .control import vace_inputs, vace_quality_options
from .inputs import alignment_input, kept_settings, named_folder, save_input, seed_input
from .node import Node
from .sampling import full_schedule_inputs
from .world import NOTHING_PLANNED, appended, frame_bytes, where_it_begins

IN_THE_MODEL = "already in the model"


@dataclass(frozen=True)
class Packed:
    """The payload of LYRA2_HISTORY: all that is known of a chunk before it is painted."""

    history: History
    image: object  # CLIP vision output of the newest frame
    chunk: int  # how many chunks came before


# --------------------------------------------------------------------------------------------------- one chunk, by hand


class FramePack(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lyra2FramePack",
            display_name="Lyra 2 FramePack",
            category=types.CATEGORY,
            description="What the Lyra 2 transformer is shown of the past: compressed latents of the latest and of the retrieved "
            "frames, the newest frame warped into the new views, where pixels come from, where the cameras look.",
            inputs=[
                types.World.Input("world"),
                types.Plan.Input("plan", tooltip="From Lyra 2 Retrieve History, for this world and 80 new frames."),
                io.Vae.Input("vae", tooltip="wan_2.1_vae."),
                io.ClipVision.Input("clip_vision", tooltip="clip_vision_h."),
            ],
            outputs=[
                types.History.Output(display_name="history"),
                io.String.Output(display_name="report", tooltip="Slots and tokens."),
            ],
        )

    @classmethod
    def execute(cls, world, plan, vae, clip_vision) -> io.NodeOutput:
        history = generation.pack(world, plan, vae, on_step=types.progress(3))
        packed = Packed(history, generation.look(clip_vision, world), len(world.chunks))
        report = _slot_report(plan, history)
        return io.NodeOutput(packed, report, ui=ui.PreviewText(report))


def _slot_report(plan, history: History) -> str:
    layout, size = history.layout, history.size
    past = layout.history_tokens(*size)
    new = layout.new_latents * size[0] * size[1] // 4
    runs = (f"{s.slots} {s.source} (kernel {s.kernel})" for s in layout.segments)
    return (
        f"history: {', '.join(runs)}; {past} tokens\n"
        f"new: {layout.new_latents} latents, {layout.new_frames} frames; {new} tokens\n"
        f"retrieved frames, the best one last: {', '.join(map(str, plan.retrieved)) or 'none'}"
    )


class ChunkConditioning(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lyra2ChunkConditioning",
            display_name="Lyra 2 Chunk Conditioning",
            category=types.CATEGORY,
            description="Adds a chunk's history to both prompts, for any sampler with the Lyra 2 model.",
            inputs=[
                types.History.Input("history", tooltip="From Lyra 2 FramePack."),
                io.Conditioning.Input("positive", tooltip="What the chunk shows; umt5_xxl, CLIP type wan."),
                io.Conditioning.Input("negative", tooltip="What it should not look like."),
                io.Model.Input("model", optional=True, tooltip="Looked at only: refused if it is not Lyra 2."),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
                io.Latent.Output(display_name="latent", tooltip="Empty, of the chunk's size."),
            ],
        )

    @classmethod
    def execute(cls, history, positive, negative, model=None) -> io.NodeOutput:
        if model is not None:
            check_model(model)
        entries = {**conditioning(history.history), "clip_vision_output": history.image}
        both = (conditioning_set_values(prompt, entries) for prompt in (positive, negative))
        return io.NodeOutput(*both, {"samples": torch.zeros(1, *history.history.warped.shape)})


def _quality_input():
    cfg = io.Float.Input(
        "cfg", default=5.0, min=1.0, max=30.0, step=0.1, tooltip="How strictly the prompt is followed. 1: no negative."
    )
    dmd = [
        io.Combo.Input(
            "dmd_lora",
            options=[IN_THE_MODEL, *folder_paths.get_filename_list("loras")],
            tooltip="The DMD distillation LoRA, converted for ComfyUI; other LoRAs stack on it.",
        )
    ]
    return io.DynamicCombo.Input(
        "quality",
        options=[io.DynamicCombo.Option("full", [*full_schedule_inputs(), cfg]), io.DynamicCombo.Option("DMD", dmd)],
        tooltip="full: the reference's solver and schedule (needs diffusers). DMD: four steps without negative prompt.",
    )


class SampleChunk(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lyra2SampleChunk",
            display_name="Lyra 2 Sample Chunk",
            category=types.CATEGORY,
            description="Paints one chunk, as the reference samples it. It becomes Lyra 2 Chunk Conditioning, Noise and Sigmas, "
            "and ComfyUI's own LoRA loader, guider and sampler; place those by hand for anything else.",
            enable_expand=True,
            inputs=[
                io.Model.Input("model", raw_link=True, tooltip="The Lyra 2 transformer, with any LoRAs."),
                types.History.Input("history", raw_link=True, tooltip="From Lyra 2 FramePack."),
                io.Conditioning.Input("positive", raw_link=True, tooltip="What the chunk shows."),
                io.Conditioning.Input("negative", raw_link=True, tooltip="What it should not look like."),
                _quality_input(),
                seed_input(),
            ],
            outputs=[io.Latent.Output(display_name="latent")],
        )

    @classmethod
    def execute(cls, model, history, positive, negative, quality, seed) -> io.NodeOutput:
        graph = GraphBuilder()
        distilled = quality["quality"] == "DMD"
        if distilled and quality["dmd_lora"] != IN_THE_MODEL:
            loader = {"model": model, "lora_name": quality["dmd_lora"], "strength_model": 1.0}
            model = graph.node("LoraLoaderModelOnly", "lora", **loader).out(0)
        texts = {"positive": positive, "negative": negative}
        prompts = graph.node("Lyra2ChunkConditioning", "prompts", history=history, **texts, model=model)
        settings = {} if distilled else {f"schedule.{key}": quality[key] for key in ("steps", "shift")}
        sigmas = graph.node("Lyra2Sigmas", "sigmas", schedule="DMD" if distilled else "full", **settings)
        solver = graph.node(*(("KSamplerSelect", "solver") if distilled else ("Lyra2UniPC", "solver")))
        if distilled:
            solver.set_input("sampler_name", "lcm")
        guider = {"model": model, "positive": prompts.out(0), "negative": prompts.out(1)}
        sampled = graph.node(
            "SamplerCustomAdvanced",
            "sample",
            noise=graph.node("Lyra2Noise", "noise", history=history, seed=seed).out(0),
            guider=graph.node("CFGGuider", "guider", **guider, cfg=1.0 if distilled else quality["cfg"]).out(0),
            sampler=solver.out(0),
            sigmas=sigmas.out(0),
            latent_image=prompts.out(2),
        )
        return io.NodeOutput(sampled.out(0), expand=graph.finalize())


def _report_output():
    return io.String.Output(
        display_name="report", tooltip="Per chunk: whether it begins where the world stands, how its depth got its scale."
    )


class AppendChunk(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lyra2AppendChunk",
            display_name="Lyra 2 Append Chunk",
            category=types.CATEGORY,
            description="Sampled latents become the world's next frames: decoded, encoded again for the memory, given depth.",
            inputs=[
                types.World.Input("world"),
                types.Plan.Input("plan", tooltip="The one that was sampled."),
                io.Latent.Input("latent", tooltip="What was sampled."),
                io.Vae.Input("vae", tooltip="wan_2.1_vae."),
                types.DepthEstimator.Input("depth_estimator", tooltip="How far the new surfaces are."),
                alignment_input(),
                io.String.Input("prompt", default="", multiline=True, tooltip="Kept with the chunk."),
                save_input(),
                io.String.Input("settings", default="{}", advanced=True, tooltip="JSON that is kept with the chunk."),
                io.String.Input("before", default="", advanced=True, tooltip="What was reported before; its report follows."),
            ],
            outputs=[
                types.World.Output(display_name="world"),
                io.String.Output(display_name="report", tooltip="How the depth got its scale."),
            ],
        )

    @classmethod
    def execute(
        cls, world, plan, latent, vae, depth_estimator, alignment, prompt="", save_to="", settings="{}", before=""
    ) -> io.NodeOutput:
        samples = latent["samples"]
        if len(samples) != 1:
            raise ValueError(f"{len(samples)} latents were sampled; a world grows by one, choose with LatentFromBatch")
        kept = kept_settings(settings, "lyra 2")
        options = (depth_estimator, alignment, prompt, kept, types.progress())
        grown, report = generation.grow(world, plan, samples[0], vae, *options)
        return appended(grown, before, report, save_to)


# ------------------------------------------------------------------------------------------------- all chunks of a path

LYRA, PREVIEW = "Lyra 2", "geometry preview"
NEEDED = {  # of each generator
    LYRA: ("model", "clip", "clip_vision", "vae", "depth_estimator"),
    **dict.fromkeys(VIDEO_MODELS, ("model", "clip", "vae", "depth_estimator")),
    PREVIEW: (),
}
MODELS = (*NEEDED[LYRA], "low_noise_model")


def _generator_input():
    vace = [io.DynamicCombo.Option(o.key, [*o.inputs, *vace_inputs()]) for o in vace_quality_options()]
    return io.DynamicCombo.Input(
        "generator",
        options=[io.DynamicCombo.Option(LYRA, []), *vace, io.DynamicCombo.Option(PREVIEW, [])],
        tooltip="Who paints the frames. Lyra 2: 'quality' below is its. Wan VACE: any Wan 2.1 VACE, or the two experts of Wan "
        "2.2 VACE Fun. geometry preview: no weights, needs no model.",
    )


def _check_needed(generator: str, inputs: dict) -> None:
    missing = [name for name in NEEDED[generator] if inputs.get(name) is None]
    if missing:
        raise ValueError(f"{generator} needs {', '.join(NEEDED[generator])}; connect {', '.join(missing)}")


class Explore(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lyra2Explore",
            display_name="Lyra 2 Explore",
            category=types.CATEGORY,
            search_aliases=["loop", "generate world"],
            description="Walks a path chunk after chunk: retrieve, FramePack, sample, append. More chunks later run only the new "
            "ones, and after a restart too if the world is saved. Static scenes only.",
            enable_expand=True,
            is_output_node=True,
            hidden=[io.Hidden.dynprompt, io.Hidden.unique_id],
            inputs=[
                types.World.Input("world", raw_link=True),
                types.Cameras.Input(
                    "cameras",
                    tooltip="Where to go. The first camera is where the world stands; then 80 for every chunk.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    raw_link=True,
                    tooltip="The generator, with any LoRAs: the Lyra 2 transformer, or Wan VACE (of Wan 2.2 the high noise expert).",
                ),
                io.Clip.Input("clip", optional=True, raw_link=True, tooltip="umt5_xxl, type wan."),
                io.ClipVision.Input("clip_vision", optional=True, raw_link=True, tooltip="clip_vision_h; only Lyra 2 needs it."),
                io.Vae.Input("vae", optional=True, raw_link=True, tooltip="wan_2.1_vae."),
                types.DepthEstimator.Input(
                    "depth_estimator", optional=True, raw_link=True, tooltip="How far the new surfaces are."
                ),
                io.Model.Input(
                    "low_noise_model", optional=True, raw_link=True, tooltip="Of Wan 2.2 VACE Fun the low noise expert."
                ),
                _generator_input(),
                io.Int.Input(
                    "chunks", default=2, min=0, max=1000, tooltip="How many chunks of 80 frames to make. 0: the world as it is."
                ),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    tooltip="What the world shows, or captions JSON as Lyra 2 Load Trajectory gives it: "
                    '{"0": "...", "81": "..."}, by the frame from which each holds.',
                ),
                io.String.Input("negative", default="", multiline=True, tooltip="What it should not look like."),
                _quality_input(),
                seed_input(),
                io.Int.Input(
                    "first_chunk",
                    default=0,
                    min=0,
                    max=1000,
                    advanced=True,
                    tooltip="The path's chunk to begin with. To make chunk 2 again with another seed or prompt: load the world "
                    "with 2 chunks (or rewind it) and begin with 2.",
                ),
                io.Int.Input("retrieve", default=5, min=0, max=5, tooltip="Past frames that help at most."),
                io.Int.Input(
                    "views",
                    default=1,
                    min=1,
                    max=8,
                    advanced=True,
                    tooltip="For how many cameras of a chunk frames are retrieved; the reference: 1, its last.",
                ),
                alignment_input(),
                save_input(),
            ],
            outputs=[types.World.Output(display_name="world"), _report_output()],
        )

    @classmethod
    def execute(cls, world, cameras, chunks, first_chunk, quality, save_to, generator=None, **inputs) -> io.NodeOutput:
        if not chunks or len(cameras) == 1:  # nothing is planned
            return io.NodeOutput(world, NOTHING_PLANNED, expand={})
        generator = generator or {"generator": LYRA}
        _check_needed(generator["generator"], inputs)
        _chunk_of(cameras, first_chunk + chunks - 1)  # say now what could not be walked later
        if save_to.strip():
            types.output_folder(save_to)
        graph, prompt = GraphBuilder(), cls.hidden.dynprompt
        # links, not values: a child with values would be made again in every run
        inputs |= {"cameras": prompt.get_node(cls.hidden.unique_id)["inputs"]["cameras"], "save_to": save_to}
        inputs = {name: value for name, value in inputs.items() if value is not None}
        made_with = [upstream_hash(prompt, inputs[name]) for name in MODELS if name in inputs]
        settings = {**_flat("quality", quality), **_flat("generator", generator)}
        report = ""
        for index in range(first_chunk, first_chunk + chunks):
            node = graph.node(
                "Lyra2ExploreChunk",
                f"chunk{index}",
                world=world,
                **inputs,
                **settings,
                index=index,
                made_with=" ".join(made_with),
                report=report,
            )
            world, report = node.out(0), node.out(1)
        return io.NodeOutput(world, report, expand=graph.finalize())


class ExploreChunk(Node):
    """One chunk of Explore. It sees the world, so it can look whether the chunk was made before."""

    @classmethod
    def define_schema(cls):
        schema = Explore.define_schema()
        inputs = [i for i in schema.inputs if i.id not in ("world", "cameras", "chunks", "first_chunk")]
        return io.Schema(
            node_id="Lyra2ExploreChunk",
            display_name="Lyra 2 Explore Chunk",
            category=types.CATEGORY,
            description="A step of Lyra 2 Explore; not to be placed by hand.",
            is_dev_only=True,
            enable_expand=True,
            inputs=[
                types.World.Input("world"),
                types.Cameras.Input("cameras", tooltip="The whole path."),
                *inputs,
                io.Int.Input("index", default=0, min=0, max=2000, tooltip="Number of the chunk on this path."),
                io.String.Input("made_with", default="", tooltip="What tells other models from these."),
                io.String.Input("report", default="", tooltip="Of the chunks before."),
            ],
            outputs=[types.World.Output(display_name="world"), _report_output()],
        )

    @classmethod
    def execute(
        cls, world, cameras, prompt, negative, quality, seed, retrieve, views, alignment, save_to, index, made_with,
        report="", generator=None, **models,
    ) -> io.NodeOutput:  # fmt: skip
        generator = generator or {"generator": LYRA}
        name, target = generator["generator"], _chunk_of(cameras, index)
        save_to = named_folder(save_to, world)
        _check_needed(name, models)
        begins = f"chunk {index}: {where_it_begins(world, cameras[index * LYRA2.new_frames :])}"
        report = "\n".join(filter(None, [report, begins]))
        text = caption(prompt, index, len(cameras))
        graph = GraphBuilder()
        if name == PREVIEW:
            walked = {"cameras": join(world.last_camera, target), "captions": text, "save_to": save_to, "retrieve": retrieve}
            grown = graph.node("Lyra2PreviewChunks", "preview", world=world, **walked, chunk_frames=LYRA2.new_frames)
            return io.NodeOutput(grown.out(0), report, expand=graph.finalize(), ui=ui.PreviewText(report))
        asked = quality if name == LYRA else {key if key != "generator" else "quality": v for key, v in generator.items()}
        settings = {
            "generator": "lyra 2" if name == LYRA else "wan vace",
            "quality": asked,
            "seed": seed,
            "negative": negative,
            "retrieve": retrieve,
            "views": views,
            "alignment": alignment,
            "path": worlds.fingerprint(target),
            "made_with": made_with,
        }
        if save_to:
            folder = types.output_folder(save_to)
            if made := world_files.made_before(folder, world, text, settings, types.stop_if_interrupted):
                report += " It was made before, and is taken from the folder."
                return io.NodeOutput(made, report, ui=ui.PreviewText(report))
            world_files.save(world, folder, on_chunk=types.stop_if_interrupted)
        what = f"a chunk of {LYRA2.new_frames} frames of {world.size[1]}x{world.size[0]}"
        types.afford(frame_bytes(world.size, LYRA2.new_frames, 24), what)  # warped and painted, as floats
        chunk = {"world": world, "plan": worlds.plan(world, target, retrieve, views, geometry_device(world.size))}
        prompts = [
            graph.node("CLIPTextEncode", name, clip=models["clip"], text=words).out(0)
            for name, words in (("positive", text), ("negative", negative))
        ]
        kept = {"depth_estimator": models["depth_estimator"], "alignment": alignment, "prompt": text, "save_to": save_to}
        kept |= {"settings": json.dumps(settings), "before": report}
        paint = _by_lyra if name == LYRA else _by_vace
        grown = paint(graph, chunk, models, prompts, asked, seed, kept)
        return io.NodeOutput(grown.out(0), grown.out(1), expand=graph.finalize(), ui=ui.PreviewText(report))


def _by_lyra(graph: GraphBuilder, chunk: dict, models: dict, prompts: list, quality: dict, seed: int, kept: dict):
    vae, (positive, negative) = models["vae"], prompts
    history = graph.node("Lyra2FramePack", "pack", **chunk, vae=vae, clip_vision=models["clip_vision"]).out(0)
    painted = {"model": models["model"], "history": history, "positive": positive, "negative": negative, "seed": seed}
    latent = graph.node("Lyra2SampleChunk", "sample", **painted, **_flat("quality", quality)).out(0)
    return graph.node("Lyra2AppendChunk", "append", **chunk, latent=latent, vae=vae, **kept)


def _by_vace(graph: GraphBuilder, chunk: dict, models: dict, prompts: list, asked: dict, seed: int, kept: dict):
    world, plan, vae = chunk["world"], chunk["plan"], models["vae"]
    overlap = int(asked["overlap"])
    overlap = overlap if overlap <= len(world) else 1  # behind the photo there is nothing
    rule = {"dilation": asked["dilation"], "depth_edges": asked["depth_edges"]}
    views = graph.node("Lyra2ControlViews", "views", **chunk, overlap=overlap, **rule, edge_width=MaskRule().widening)
    shown = {"control_video": views.out(0), "mask": views.out(1), "pinned": overlap, "strength": asked["strength"]}
    if count := min(asked["references"], len(plan.retrieved)):
        best = {"batch_index": len(plan.retrieved) - count, "length": count}
        shown["references"] = graph.node("ImageFromBatch", "references", image=views.out(3), **best).out(0)
    texts = dict(zip(("positive", "negative"), prompts, strict=True))
    told = graph.node(
        "Lyra2VaceConditioning", "told", **texts, vae=vae, **shown, trust=asked["trusted_steps"] > 0, model=models["model"]
    )
    schedule = ("steps", "cfg", "shift", "boundary", "lora", "lora_strength")
    quality = _flat("quality", {key: asked[key] for key in ("quality", *schedule) if key in asked})
    experts = {name: models[name] for name in ("model", "low_noise_model") if models.get(name) is not None}
    sampled = graph.node(
        "Lyra2SampleVace",
        "sample",
        **experts,
        **dict(zip(("positive", "negative", "latent", "trim_latent"), map(told.out, range(4)), strict=True)),
        **quality,
        trusted_steps=asked["trusted_steps"],
        seed=seed + len(world.chunks),
    )
    images = graph.node("VAEDecode", "decode", samples=sampled.out(0), vae=vae).out(0)
    return graph.node("Lyra2AppendFrames", "append", **chunk, images=images, anchor=asked["anchor"], **kept)


def _flat(name: str, choice: dict) -> dict:
    """A DynamicCombo's value as the inputs that it is made of."""
    return {name if key == name else f"{name}.{key}": value for key, value in choice.items()}


def _chunk_of(cameras, index: int):
    first = 1 + index * LYRA2.new_frames
    target = cameras[first : first + LYRA2.new_frames]
    if len(target) != LYRA2.new_frames:
        raise ValueError(
            f"chunk {index} needs cameras {first} to {first + LYRA2.new_frames - 1}, the path has {len(cameras)}: "
            "make it longer with Lyra 2 Edit Trajectory, or ask for fewer chunks"
        )
    return target


def upstream_hash(dynprompt, link) -> str:
    """Changes with any node or widget that an input comes from; the same after a restart."""

    def described(value):
        if not is_link(value):
            return value
        node = dynprompt.get_node(value[0])
        return [
            node["class_type"],
            value[1],
            {name: described(inner) for name, inner in sorted(node["inputs"].items())},
        ]

    return hashlib.sha256(json.dumps(described(link), sort_keys=True, default=str).encode()).hexdigest()[:12]
