"""What the loop's nodes decide before any network runs; the networks themselves run in test_generation_server.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lyra_core.cameras.camera import Cameras


@pytest.fixture
def nodes(pack):
    return pack.generation


class Prompt:
    """Answers as the host's dynamic prompt."""

    def __init__(self, **nodes):
        self.nodes = nodes

    def get_node(self, name: str) -> dict:
        return self.nodes[name]


def loaded(name: str = "lyra2", strength: float = 1.0) -> Prompt:
    return Prompt(
        loader={"class_type": "UNETLoader", "inputs": {"unet_name": name}},
        lora={"class_type": "LoraLoaderModelOnly", "inputs": {"model": ["loader", 0], "strength_model": strength}},
        other={"class_type": "LoadImage", "inputs": {"image": "photo.png"}},
    )


def test_what_models_were_made_with_is_told_by_every_node_before_them_and_by_no_other(nodes):
    link = ["lora", 0]
    before = nodes.upstream_hash(loaded(), link)
    assert nodes.upstream_hash(loaded(), link) == before
    assert nodes.upstream_hash(loaded(strength=0.9), link) != before
    assert nodes.upstream_hash(loaded("another"), link) != before
    changed = loaded()
    changed.nodes["other"]["inputs"]["image"] = "another.png"
    assert nodes.upstream_hash(changed, link) == before
    renamed = Prompt(**{f"x{name}": node for name, node in loaded().nodes.items()})
    renamed.nodes["xlora"]["inputs"]["model"] = ["xloader", 0]
    assert nodes.upstream_hash(renamed, ["xlora", 0]) == before  # ids of nodes mean nothing


def test_a_prompt_is_every_chunk_s_unless_it_is_captions(nodes):
    assert nodes.caption("a room", 3, 321) == "a room"
    captions = '{"0": "a room", "81": "a corridor"}'
    assert [nodes.caption(captions, chunk, 241) for chunk in range(3)] == ["a room", "a corridor", "a corridor"]
    assert nodes.caption("{day|night} street", 1, 241) == "{day|night} street"
    with pytest.raises(ValueError, match="no caption begins"):
        nodes.caption('{"500": "late"}', 0, 161)


def path(frames: int) -> Cameras:
    w2c = torch.eye(4).repeat(frames, 1, 1)
    w2c[:, 2, 3] = torch.arange(frames)
    return Cameras(w2c, torch.eye(3).repeat(frames, 1, 1), (32, 48))


def test_a_chunk_is_its_80_cameras_of_the_path(nodes):
    target = nodes._chunk_of(path(241), 2)
    assert target.w2c[:, 2, 3].tolist() == list(range(161, 241))
    with pytest.raises(ValueError, match="chunk 3 needs cameras 241 to 320, the path has 241"):
        nodes._chunk_of(path(241), 3)


def explored(nodes, chunks: int, first_chunk: int = 0, frames: int = 241) -> dict:
    """The graph that Explore becomes."""
    links = {name: ["lora", 0] for name in ("model", "clip", "clip_vision", "vae", "depth_estimator")}
    prompt = loaded()
    prompt.nodes["me"] = {"class_type": "Lyra2Explore", "inputs": {"cameras": ["path", 1]}}
    hidden = SimpleNamespace(dynprompt=prompt, unique_id="me")
    node = type("Explore", (nodes.Explore,), {"hidden": hidden})
    settings = {
        "prompt": "a room",
        "negative": "",
        "seed": 1,
        "retrieve": 5,
        "views": 1,
        "alignment": "memory",
        "save_to": "",
    }
    quality = {"quality": "full", "steps": 35, "shift": 5.0, "cfg": 5.0}
    out = node.execute(["world", 0], path(frames), chunks, first_chunk, quality, **links, **settings)
    return out.expand


def inputs_of(graph: dict, index: int) -> dict:
    return next(node["inputs"] for name, node in graph.items() if name.endswith(f"chunk{index}"))


def test_one_chunk_more_leaves_the_nodes_of_the_others_as_they_were(nodes):
    two, three = explored(nodes, 2), explored(nodes, 3)
    for index in range(2):
        ours, theirs = inputs_of(two, index), inputs_of(three, index)
        same = ours.keys() - {"world", "report"}  # links to the chunk before, whose name begins with a number of the run
        assert {k: ours[k] for k in same} == {k: theirs[k] for k in same}
    values = [value for node in three.values() for value in node["inputs"].values()]
    assert all(isinstance(value, (str, int, float, list)) for value in values)  # what the host can compare
    assert inputs_of(three, 0)["world"] == ["world", 0] and inputs_of(three, 0)["cameras"] == ["path", 1]
    assert inputs_of(three, 2)["quality.steps"] == 35 and inputs_of(three, 2)["index"] == 2


def test_a_walk_may_begin_at_any_chunk_of_its_path(nodes):
    graph = explored(nodes, 1, first_chunk=2)
    assert len(graph) == 1 and inputs_of(graph, 2)["world"] == ["world", 0]


def test_too_short_a_path_is_refused_before_the_first_chunk(nodes):
    with pytest.raises(ValueError, match="chunk 2 needs cameras 161 to 240, the path has 161"):
        explored(nodes, 3, frames=161)


def test_the_noise_of_a_chunk_is_its_own_and_the_same_everywhere(pack):
    def noise(seed: int, chunk: int):
        return pack.sampling.Noise.execute(SimpleNamespace(chunk=chunk), seed).args[0]

    latent = {"samples": torch.zeros(1, 16, 20, 4, 6)}
    first = noise(1, 0).generate_noise(latent)
    assert first.shape == (1, 16, 20, 4, 6) and first.flatten()[:3].tolist() == pytest.approx(
        [1.6243454, -0.6117564, -0.5281718]
    )
    assert torch.equal(noise(1, 1).generate_noise(latent), noise(2, 0).generate_noise(latent))
    assert noise(1, 1).seed == 2 and not torch.equal(noise(1, 1).generate_noise(latent), first)


@pytest.mark.parametrize("quality", [{"quality": "full", "steps": 20, "shift": 3.0, "cfg": 4.0}, {"quality": "DMD"}])
def test_a_sampled_chunk_is_the_host_s_own_sampling(nodes, quality, monkeypatch):
    monkeypatch.setattr(nodes.folder_paths, "get_filename_list", lambda _: ["dmd.safetensors"])
    if quality["quality"] == "DMD":
        quality["dmd_lora"] = "dmd.safetensors"
    links = [[name, 0] for name in ("model", "history", "positive", "negative")]
    graph = nodes.SampleChunk.execute(*links, quality, 7).expand
    by_kind = {node["class_type"]: node["inputs"] for node in graph.values()}
    distilled = quality["quality"] == "DMD"
    assert ("LoraLoaderModelOnly" in by_kind) is distilled and ("Lyra2UniPC" in by_kind) is not distilled
    assert by_kind["CFGGuider"]["cfg"] == (1.0 if distilled else 4.0)
    assert by_kind["Lyra2Noise"] == {"history": ["history", 0], "seed": 7}
    if distilled:
        assert by_kind["KSamplerSelect"] == {"sampler_name": "lcm"}
        assert by_kind["LoraLoaderModelOnly"]["strength_model"] == 1.0
    else:
        assert by_kind["Lyra2Sigmas"] == {"schedule": "full", "schedule.steps": 20, "schedule.shift": 3.0}


def test_who_paints_is_the_first_choice_and_a_graph_saved_when_it_was_the_last_is_refused(nodes):
    """Saved graphs list widgets by place: what was first then, a count, must be no generator now."""
    first = next(known for known in nodes.Explore.define_schema().inputs if known.get_io_type() in ("COMFY_DYNAMICCOMBO_V3", "INT", "STRING"))
    assert first.id == "generator"
    assert not any(option.key.isdigit() for option in first.options)
    with pytest.raises(ValueError, match="input 'generator'"):
        nodes.Explore.execute(None, [0, 1], chunks="A quiet room", first_chunk=0, quality={"quality": "full"}, save_to="", generator=2)
