"""Graphs that learn from a world, and walk with what was learned."""

from __future__ import annotations

from . import parts
from .describe import Graph, Node
from .engine import UNCHOSEN
from .lyra import explore, note
from .parts import from_left_to_right

WORLD = "training/train_on_my_world"


def train_on_my_world() -> Graph:
    name = "train_on_my_world"
    what = (
        "A LoRA is trained on a saved world as Lyra 2's makers train, on histories that it has spoilt itself; then the same path is "
        "walked again with it.\n\n**First** choose one world of your output folder in both *Lyra 2 Load World* nodes: one chunk at least, "
        "better a dozen; it is what is learned, its faults too. The second loads only its photo. Set *chunks* in *Lyra 2 Explore* to how "
        "many it has.\n\nTraining is long: the report of *Lyra 2 Train LoRA* counts memory and time first (a LoRA of the 14B takes a card "
        "of 80 GB). Stop when you like; it goes on where it ended. *Plot Loss Graph* shows whether anything is learned."
    )
    trained = {"trained": "LoRA", "trained.rank": 16, "steps": 1000, "save_to": f"{WORLD}_lora"}
    learn = {
        "model": ("models", 0),
        "clip": ("models", 1),
        "clip_vision": ("models", 2),
        "vae": ("models", 3),
        "training_set": ("set", 0),
    }
    walk = explore("set", 2, 35, False, name)
    sources = {**walk.sources, "world": ("begin", 0), "cameras": ("set", 1), "model": ("train", 1)}
    return from_left_to_right(
        (note("Train on my world", what), parts.models(parts.loaded_models())),
        parts.photo(
            {
                "world": Node("Lyra2LoadWorld", {"folder": UNCHOSEN}),
                "begin": Node("Lyra2LoadWorld", {"folder": UNCHOSEN, "chunks": 0}, title="Its photo"),
            },
            title="1 World",
        ),
        parts.path(
            {"set": Node("Lyra2TrainingSet", {"source": "a world", "folder": WORLD}, {"source.world": ("world", 0)})},
            {"train": Node("Lyra2TrainLoRA", trained, learn)},
            {
                "save lora": Node("SaveLoRA", {"prefix": f"loras/{name}"}, {"lora": ("train", 0), "steps": ("train", 3)}),
                "plot": Node("LossGraphNode", {}, {"loss": ("train", 2)}),
            },
            title="2 Training",
        ),
        parts.walk({"walk": Node(walk.kind, walk.values, sources)}),
        parts.results(parts.video("walk", name)),
    )


WORKFLOWS = (train_on_my_world,)
