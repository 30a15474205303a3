"""Estimators for the depth of generated frames."""

from __future__ import annotations

from comfy_api.latest import io

from ..lyra_core.models import depth_estimators as estimators
from . import types
from .node import Node

Da3Model = io.Custom("DA3_MODEL")  # of the host's LoadDA3Model
MogeModel = io.Custom("MOGE_MODEL")  # of the host's LoadMoGeModel


def _schema(name: str, display: str, description: str, inputs: list) -> io.Schema:
    return io.Schema(
        node_id=f"Lyra2{name}Estimator",
        display_name=f"Lyra 2 {display}",
        category=types.CATEGORY,
        description=description,
        inputs=inputs,
        outputs=[types.DepthEstimator.Output(display_name="depth_estimator")],
    )


class Da3Estimator(Node):
    @classmethod
    def define_schema(cls):
        return _schema(
            "DA3",
            "Depth by Depth Anything 3",
            "How far the surfaces in generated frames are, by the model that the reference uses. Small and Base look at all "
            "frames together and agree best with each other; Mono and Metric look at each alone.",
            [
                Da3Model.Input("da3_model", tooltip="From Load Depth Anything 3."),
                io.Int.Input(
                    "resolution",
                    default=0,
                    min=0,
                    max=2520,
                    step=14,
                    tooltip="Longest side in pixels at which the model looks at the frames. 0: that of the frames, as the "
                    "reference. Higher: more detail, more memory and time.",
                ),
                io.Boolean.Input(
                    "use_cameras",
                    default=True,
                    tooltip="Tell the model where the frames were taken, as the reference does. Off: it finds out itself. "
                    "Only for models with a camera encoder (Small, Base); others don't listen.",
                ),
                io.Combo.Input(
                    "sky",
                    options=list(estimators.SKIES),
                    default="unknown",
                    tooltip="What becomes of sky, which only Mono and Metric recognise. unknown: it is not remembered. "
                    "far: it stands behind the farthest surfaces, as in the reference, and moves with the camera.",
                ),
            ],
        )

    @classmethod
    def execute(cls, da3_model, resolution=0, use_cameras=True, sky="unknown") -> io.NodeOutput:
        return io.NodeOutput(estimators.Da3Estimator(da3_model, resolution, use_cameras, sky))


class MogeEstimator(Node):
    @classmethod
    def define_schema(cls):
        return _schema(
            "MoGe",
            "Depth by MoGe",
            "How far the surfaces in generated frames are, each frame looked at alone and brought to the scale of what the "
            "world remembers of it.",
            [
                MogeModel.Input("moge_model", tooltip="From Load MoGe Model."),
                io.Int.Input(
                    "detail", default=9, min=0, max=9, tooltip="How finely MoGe looks: 0 is fastest, 9 is finest."
                ),
            ],
        )

    @classmethod
    def execute(cls, moge_model, detail=9) -> io.NodeOutput:
        return io.NodeOutput(estimators.MogeEstimator(moge_model, detail))


class MemoryEstimator(Node):
    @classmethod
    def define_schema(cls):
        return _schema(
            "Memory",
            "Depth from Memory",
            "Depth of generated frames without any weights: what the world remembers, with its holes filled from around "
            "them. New objects stay flat against what was behind them.",
            [],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(estimators.MemoryEstimator())


NODES = [Da3Estimator, MogeEstimator, MemoryEstimator]
