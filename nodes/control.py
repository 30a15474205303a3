"""A world grown by any video model: what it is shown of a chunk, and what becomes of its frames. Wan VACE, by stock samplers."""

from __future__ import annotations

import folder_paths
import torch
from comfy_api.latest import io
from comfy_execution.graph_utils import GraphBuilder
from node_helpers import conditioning_set_values

from ..lyra_core.models import generation, vace
from ..lyra_core.models.devices import geometry_device
from ..lyra_core.world import control
from ..lyra_core.world import world as worlds
from . import types
from .inputs import alignment_input, kept_settings, save_input, seed_input
from .node import Node
from .world import appended

NO_LORA = "none"
GENERATORS = FULL, DISTILLED = "Wan VACE", "Wan VACE distilled"
RULE = control.MaskRule()


def mask_inputs() -> list:
    """Widgets of the mask rule."""
    return [
        io.Int.Input(
            "dilation",
            default=RULE.dilation,
            min=0,
            max=64,
            advanced=True,
            tooltip="Pixels by which holes grow. More: fewer wrong borders, more is painted anew.",
        ),
        io.Float.Input(
            "depth_edges",
            default=RULE.bend,
            min=0.0,
            max=1.0,
            step=0.01,
            advanced=True,
            tooltip="Where disparity bends by more than this share of itself, pixels are painted anew. 0: edges are kept.",
        ),
    ]


class ControlViews(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lyra2ControlViews",
            display_name="Lyra 2 Control Views",
            category=types.CATEGORY,
            search_aliases=["VACE", "control video", "inpaint"],
            description="What the world knows of a planned chunk, for any model that takes a video and a mask: known frames first, then "
            "the views as they are remembered, exactly mid-grey where nothing is. Lyra 2 Append Frames takes the result.",
            inputs=[
                types.World.Input("world"),
                types.Plan.Input("plan", tooltip="From Lyra 2 Retrieve History, for this world."),
                io.Int.Input(
                    "overlap",
                    default=1,
                    min=1,
                    max=13,
                    step=4,
                    tooltip="Newest known frames in front of the new ones. 1: 81 frames for a chunk of 80. 5: motion goes on "
                    "more smoothly, 85 frames. A world that has fewer gives all.",
                ),
                *mask_inputs(),
                io.Int.Input(
                    "edge_width",
                    default=RULE.widening,
                    min=0,
                    max=64,
                    advanced=True,
                    tooltip="Pixels by which such edges grow.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="control_video", tooltip="0.5 where the mask is 1."),
                io.Mask.Output(display_name="mask", tooltip="1 = paint, 0 = keep; one per frame."),
                io.Image.Output(display_name="depth_video", tooltip="Disparity of each frame: white is its nearest point."),
                io.Image.Output(display_name="retrieved", tooltip="The past frames, the best one last."),
                io.Int.Output(display_name="length", tooltip="Frames of the video: overlap and chunk."),
            ],
        )

    @classmethod
    def execute(cls, world, plan, overlap, dilation, depth_edges, edge_width) -> io.NodeOutput:
        rule, count = control.MaskRule(dilation, depth_edges, edge_width), overlap + len(plan.target)
        height, width = world.size
        types.afford(count * height * width * 21, f"showing {count} views of {width}x{height}")
        views = control.control_views(world, plan, overlap, rule, geometry_device(world.size), types.progress())
        retrieved = [worlds.to_float(world.frame(f)) for f in plan.retrieved or (len(world) - 1,)]
        depth = views.disparity[..., None].expand(*views.video.shape)
        return io.NodeOutput(views.video, views.generate.float(), depth, torch.stack(retrieved), len(views.video))


def anchor_input():
    return io.Boolean.Input(
        "anchor",
        default=True,
        tooltip="Bring colours back to what the memory shows, which is the photo's wherever that is still seen. Video models "
        "drift in colour and contrast from chunk to chunk.",
    )


class AppendFrames(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lyra2AppendFrames",
            display_name="Lyra 2 Append Frames",
            category=types.CATEGORY,
            description="Frames that any model painted for a plan become the world's next chunk: known ones in front are dropped, "
            "colours anchored, depth estimated, all of it remembered.",
            inputs=[
                types.World.Input("world"),
                types.Plan.Input("plan", tooltip="The one that was painted."),
                io.Image.Input("images", tooltip="The plan's frames, of the world's size, known ones in front or not."),
                types.DepthEstimator.Input("depth_estimator", tooltip="How far the new surfaces are."),
                alignment_input(),
                anchor_input(),
                io.String.Input("prompt", default="", multiline=True, tooltip="Kept with the chunk."),
                save_input(),
                io.String.Input("settings", default="{}", advanced=True, tooltip="JSON that is kept with the chunk."),
                io.String.Input("before", default="", advanced=True, tooltip="What was reported before; its report follows."),
            ],
            outputs=[
                types.World.Output(display_name="world"),
                io.String.Output(display_name="report", tooltip="How colours and depth were brought to the world's."),
            ],
        )

    @classmethod
    def execute(
        cls, world, plan, images, depth_estimator, alignment, anchor, prompt="", save_to="", settings="{}", before=""
    ) -> io.NodeOutput:
        kept = kept_settings(settings, "another model")
        options = (depth_estimator, alignment, prompt, kept, anchor, types.progress())
        grown, report = generation.append_frames(world, plan, types.colour(images), *options)
        return appended(grown, before, report, save_to)


# ----------------------------------------------------------------------------------------------------------- Wan VACE


class VaceConditioning(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lyra2VaceConditioning",
            display_name="Lyra 2 VACE Conditioning",
            category=types.CATEGORY,
            description="Adds a control video to both prompts, for any sampler with Wan VACE. As the host's WanVaceToVideo, but a latent "
            "is painted if any of its four frames shall be, there may be several references, and known frames stay exact.",
            inputs=[
                io.Conditioning.Input("positive", tooltip="What the chunk shows; umt5_xxl, CLIP type wan."),
                io.Conditioning.Input("negative", tooltip="What it should not look like."),
                io.Vae.Input("vae", tooltip="wan_2.1_vae."),
                io.Image.Input("control_video", tooltip="From Lyra 2 Control Views."),
                io.Mask.Input("mask", tooltip="1 = paint; one per frame."),
                io.Int.Input(
                    "pinned",
                    default=1,
                    min=0,
                    max=1001,
                    tooltip="Frames at the beginning that stay exactly as they are: 0, 1, 5, 9, ... Set it to the overlap.",
                ),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=10.0, step=0.01, tooltip="How much the control counts; 0: not at all."
                ),
                io.Boolean.Input(
                    "trust",
                    default=False,
                    advanced=True,
                    tooltip="Mark what is known, for Lyra 2 Trust Known to keep it in the first steps.",
                ),
                io.Image.Input(
                    "references",
                    optional=True,
                    tooltip="Pictures of what shall appear, as subjects. What must not change belongs into the control video.",
                ),
                io.Model.Input("model", optional=True, tooltip="Looked at only: refused if it is not Wan VACE."),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
                io.Latent.Output(display_name="latent", tooltip="With the known frames at its beginning."),
                io.Int.Output(display_name="trim_latent", tooltip="Latents to cut off the front of what was sampled."),
            ],
        )

    @classmethod
    def execute(
        cls, positive, negative, vae, control_video, mask, pinned, strength, trust, references=None, model=None
    ) -> io.NodeOutput:
        if model is not None:
            vace.check_model(model)
        told = vace.control(vae, control_video, mask > 0.5, pinned, references, trust)
        both = (conditioning_set_values(prompt, told.entries(strength), append=True) for prompt in (positive, negative))
        latent = {"samples": told.latent, "noise_mask": told.noise_mask}
        return io.NodeOutput(*both, latent, told.references)


class TrustKnown(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lyra2TrustKnown",
            display_name="Lyra 2 Trust Known",
            category=types.CATEGORY,
            description="Keeps what the control video knows in the first steps, so that shapes settle where they are remembered, and frees "
            "it afterwards, so that what was warped badly is painted over. Needs the latent of Lyra 2 VACE Conditioning with trust.",
            inputs=[
                io.Model.Input("model", tooltip="Wan VACE."),
                io.Sigmas.Input("sigmas", tooltip="Of all steps."),
                io.Int.Input("steps", default=5, min=0, max=1000, tooltip="In how many of them what is known is kept."),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, sigmas, steps) -> io.NodeOutput:
        return io.NodeOutput(vace.trusting(model, sigmas, steps))


class ExpertSigmas(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lyra2ExpertSigmas",
            display_name="Lyra 2 Expert Sigmas",
            category=types.CATEGORY,
            description="Splits noise levels between two experts, as those of Wan 2.2.",
            inputs=[io.Sigmas.Input("sigmas", tooltip="Of all steps."), _boundary_input()],
            outputs=[io.Sigmas.Output(display_name="high_sigmas"), io.Sigmas.Output(display_name="low_sigmas")],
        )

    @classmethod
    def execute(cls, sigmas, boundary) -> io.NodeOutput:
        return io.NodeOutput(*vace.split(sigmas, boundary))


def _boundary_input():
    return io.Float.Input(
        "boundary",
        default=0.875,
        min=0.0,
        max=1.0,
        step=0.005,
        advanced=True,
        tooltip="The noise level below which the low noise expert paints; Wan 2.2 text to video: 0.875.",
    )


class LeftoverNoise(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lyra2LeftoverNoise",
            display_name="Lyra 2 Leftover Noise",
            category=types.CATEGORY,
            description="The noise that another Wan model left, for a second one to go on with from the first one's latent: known frames in "
            "it stay exact, which they do not if what is left is itself the latent.",
            inputs=[
                io.Latent.Input("left", tooltip="What the first sampler put out."),
                io.Sigmas.Input("sigmas", tooltip="Of the second sampler."),
            ],
            outputs=[io.Noise.Output()],
        )

    @classmethod
    def execute(cls, left, sigmas) -> io.NodeOutput:
        return io.NodeOutput(vace.Leftover(left["samples"], float(sigmas[0])))


SAMPLERS = {"steps": 20, "cfg": 6.0, "shift": 8.0}, {"steps": 6, "cfg": 1.0, "shift": 5.0}


def vace_quality_options() -> list:
    """Choices of how VACE is sampled: as the host's templates, or in few steps with a distilled LoRA."""
    lora = [
        io.Combo.Input(
            "lora",
            options=[NO_LORA, *folder_paths.get_filename_list("loras")],
            tooltip="A step-distillation LoRA (lightx2v), for both experts; none: it is in the model already.",
        ),
        io.Float.Input("lora_strength", default=1.0, min=0.0, max=2.0, step=0.05, tooltip="lightx2v: 0.8 to 1; CausVid: 0.3."),
    ]
    full, distilled = (_schedule_inputs(**numbers) for numbers in SAMPLERS)
    return [
        io.DynamicCombo.Option(FULL, [*full, _boundary_input()]),
        io.DynamicCombo.Option(DISTILLED, [*lora, *distilled, _boundary_input()]),
    ]


def _schedule_inputs(steps: int, cfg: float, shift: float) -> list:
    return [
        io.Int.Input("steps", default=steps, min=1, max=1000, tooltip="More steps, finer details, more time."),
        io.Float.Input("cfg", default=cfg, min=1.0, max=30.0, step=0.1, tooltip="How strictly the prompt is followed. 1: no negative."),
        io.Float.Input("shift", default=shift, min=0.01, max=100.0, step=0.1, tooltip="Higher spends more steps on the composition."),
    ]


def vace_inputs() -> list:
    """Widgets of a chunk by VACE, besides its sampling."""
    return [
        io.Combo.Input("overlap", options=["1", "5"], tooltip="Known frames that lead over to the new ones."),
        *mask_inputs(),
        io.Int.Input("references", default=0, min=0, max=5, advanced=True, tooltip="How many retrieved frames are shown as subjects."),
        io.Float.Input("strength", default=1.0, min=0.0, max=10.0, step=0.01, advanced=True, tooltip="How much the control counts."),
        io.Int.Input(
            "trusted_steps", default=0, min=0, max=1000, advanced=True, tooltip="First steps in which what is known is kept; 0: none."
        ),
        anchor_input(),
    ]


class SampleVace(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lyra2SampleVace",
            display_name="Lyra 2 Sample VACE",
            category=types.CATEGORY,
            description="Paints one chunk with Wan VACE, one model or the two experts of Wan 2.2. It becomes ComfyUI's own LoRA loader, "
            "shift, scheduler, guider and sampler; place those by hand for anything else.",
            enable_expand=True,
            inputs=[
                io.Model.Input("model", raw_link=True, tooltip="Wan VACE; of Wan 2.2 the high noise expert."),
                io.Conditioning.Input("positive", raw_link=True, tooltip="From Lyra 2 VACE Conditioning."),
                io.Conditioning.Input("negative", raw_link=True, tooltip="From there, too; without effect at CFG 1."),
                io.Latent.Input("latent", raw_link=True, tooltip="From there, too."),
                io.Int.Input(
                    "trim_latent",
                    raw_link=True,
                    force_input=True,
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="From there, too: the references, which are cut off the front again.",
                ),
                io.DynamicCombo.Input("quality", options=vace_quality_options(), tooltip="How it is sampled."),
                io.Int.Input("trusted_steps", default=0, min=0, max=1000, tooltip="See Lyra 2 Trust Known; 0: not at all."),
                seed_input(2**32 - 1),  # the world's and the number of its chunk
                io.Model.Input("low_noise_model", optional=True, raw_link=True, tooltip="The low noise expert of Wan 2.2."),
            ],
            outputs=[io.Latent.Output(display_name="latent")],
        )

    @classmethod
    def execute(
        cls, model, positive, negative, latent, trim_latent, quality, trusted_steps, seed, low_noise_model=None
    ) -> io.NodeOutput:
        graph = GraphBuilder()
        distilled = quality["quality"] == DISTILLED
        models = [_shifted(graph, name, m, quality) for name, m in (("high", model), ("low", low_noise_model)) if m is not None]
        schedule = graph.node("BasicScheduler", "sigmas", model=models[0], scheduler="simple", steps=quality["steps"], denoise=1.0)
        sigmas = [schedule.out(0)]
        if trusted_steps:
            keeping = {"sigmas": sigmas[0], "steps": trusted_steps}
            models = [graph.node("Lyra2TrustKnown", f"trust{i}", model=m, **keeping).out(0) for i, m in enumerate(models)]
        if len(models) == 2:
            parts = graph.node("Lyra2ExpertSigmas", "experts", sigmas=sigmas[0], boundary=quality["boundary"])
            sigmas = [parts.out(0), parts.out(1)]
        solver = graph.node("KSamplerSelect", "solver", sampler_name="euler" if distilled else "uni_pc").out(0)
        noise = graph.node("RandomNoise", "noise", noise_seed=seed).out(0)
        sampled = None
        for i, (painter, levels) in enumerate(zip(models, sigmas, strict=True)):
            if sampled is not None:
                noise = graph.node("Lyra2LeftoverNoise", "leftover", left=sampled, sigmas=levels).out(0)
            texts = {"positive": positive, "negative": negative, "cfg": quality["cfg"]}
            guider = graph.node("CFGGuider", f"guider{i}", model=painter, **texts).out(0)
            sampling = {"noise": noise, "guider": guider, "sampler": solver, "sigmas": levels, "latent_image": latent}
            sampled = graph.node("SamplerCustomAdvanced", f"sample{i}", **sampling).out(0)
        trimmed = graph.node("TrimVideoLatent", "trim", samples=sampled, trim_amount=trim_latent)
        return io.NodeOutput(trimmed.out(0), expand=graph.finalize())


def _shifted(graph: GraphBuilder, name: str, model, quality: dict):
    if quality.get("lora", NO_LORA) != NO_LORA:
        loader = {"lora_name": quality["lora"], "strength_model": quality["lora_strength"]}
        model = graph.node("LoraLoaderModelOnly", f"lora_{name}", model=model, **loader).out(0)
    return graph.node("ModelSamplingSD3", f"shift_{name}", model=model, shift=quality["shift"]).out(0)


NODES = [ControlViews, AppendFrames, VaceConditioning, TrustKnown, ExpertSigmas, LeftoverNoise, SampleVace]
