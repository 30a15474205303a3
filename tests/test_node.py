"""Nothing reaches a node that its schema does not allow: every input of every node, found by looking at the schemas."""

from __future__ import annotations

import asyncio
import math
import os
import re
import shutil
import sys
import time
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch

NAN, INF = float("nan"), float("inf")


class Unspeakable:
    def __repr__(self):
        raise RuntimeError("no")


NO_NUMBERS = (None, True, False, "7", b"7", [5], {}, Unspeakable(), torch.ones(99), "\ud800" * 500, [[0] * 10**6], 1j)
HUGE = (10**8, 10**9, 10**30, 10**400, 10**5000, -1, -(10**9), -(10**30), 0, 1e300)


@pytest.fixture(scope="module")
def nodes(pack) -> list:
    return asyncio.run(pack.LyraExtension().get_node_list())


@pytest.fixture(scope="module")
def io(pack):
    return pack.node.io


def flat(io, inputs: list, around: tuple = ()):
    """Every input with the choices that bring it along: (chosen, input)."""
    for known in inputs:
        yield around, known
        if isinstance(known, io.DynamicCombo.Input):
            for option in known.options:
                yield from flat(io, option.inputs, (*around, (known.id, option.key)))


def test_no_first_choice_brings_sockets_alone(io, nodes):
    """The frontend can't make a node of such a class: it looks for the choice's own socket before that is there."""
    for node in nodes:
        for known in node.define_schema().inputs:
            if isinstance(known, io.DynamicCombo.Input) and known.options[0].inputs:
                widgets = [each.id for each in known.options[0].inputs if isinstance(each, io.WidgetInput)]
                assert widgets, f"{node.define_schema().node_id}: {known.id} begins with {known.options[0].key!r}"


def test_a_seed_says_that_the_frontend_gives_it_a_second_widget(io, nodes):
    """It does so by the name alone; saved values would stand one place too far otherwise."""
    seeds = [(node, known) for node, _, known in numbers(io, nodes, io.Int.Input) if known.id in ("seed", "noise_seed")]
    assert len(seeds) > 5 and [node.__name__ for node, known in seeds if not known.control_after_generate] == []


def given(around: tuple, name: str, value) -> dict:
    """What `execute` is given if one input, within its choices, is this."""
    for combo, key in reversed(around):
        name, value = combo, {combo: key, name: value}
    return {name: value}


def numbers(io, nodes, *kinds):
    for node in nodes:
        for around, known in flat(io, node.define_schema().inputs):
            if isinstance(known, kinds):
                yield node, around, known


def wrong(io, known) -> list:
    values = [*NO_NUMBERS, NAN, INF, -INF]
    values += [known.min - 1, known.max + 1, *(v for v in HUGE if not known.min <= v <= known.max)]
    return [*values, 2.5, Fraction(5, 2)] if isinstance(known, io.Int.Input) else values


def refusal(node, around, known, value) -> str:
    """What is said when a node is given such a value."""
    is_list = node.define_schema().is_input_list
    with pytest.raises(ValueError) as refused:
        node.execute(**given(around, known.id, [value] if is_list else value))
        pytest.fail(f"{node.__name__} took {value!r} for {known.id}")
    return str(refused.value)


def test_every_node_is_one_that_checks_its_inputs(pack, nodes):
    assert [node.__name__ for node in nodes if not issubclass(node, pack.node.Node)] == [], "derive it from nodes.node.Node"


def test_every_number_of_every_node_has_bounds(io, nodes):
    found = list(numbers(io, nodes, io.Int.Input, io.Float.Input))
    assert len(found) > 120
    for node, _, known in found:
        assert known.min is not None and known.max is not None, f"{node.__name__}.{known.id}"
        assert math.isfinite(known.min) and math.isfinite(known.max) and known.min < known.max


def test_no_number_of_any_node_takes_what_its_schema_does_not_allow(io, nodes):
    tried = 0
    for node, around, known in numbers(io, nodes, io.Int.Input, io.Float.Input):
        name = re.escape(".".join([*(combo for combo, _ in around), known.id]))
        for value in wrong(io, known):
            if value is None and known.optional:
                continue
            said = refusal(node, around, known, value)
            pattern = rf"^{re.escape(node.define_schema().display_name)}: input '{name}' is .+; allowed: a (whole|finite) number from"
            assert re.match(pattern, said) and len(said) < 400, said
            tried += 1
    assert tried > 2000


def test_texts_switches_and_choices_are_checked_too(io, nodes):
    for node, around, known in numbers(io, nodes, io.String.Input, io.Boolean.Input, io.Combo.Input, io.DynamicCombo.Input):
        values = {
            io.String.Input: (7, None, ["a"], b"a"),
            io.Boolean.Input: (1, "true", None, NAN, torch.tensor(True)),
            io.DynamicCombo.Input: ({}, "none of these", {known.id: "none of these"}, 3, [1]),
        }.get(type(known), ("none of these", 99, True, None, NAN, ["a"], torch.ones(3)))
        for value in values:
            if value is None and known.optional:
                continue
            said = refusal(node, around, known, value)
            assert said.startswith(f"{node.define_schema().display_name}: input '") and "; allowed: " in said, said
            assert known.id in said and len(said) < 700


def test_the_ends_and_the_default_of_every_range_are_taken_as_plain_numbers(io, nodes, pack):
    for node, _, known in numbers(io, nodes, io.Int.Input, io.Float.Input):
        plain = int if isinstance(known, io.Int.Input) else float
        for value in (known.min, known.max, known.default):
            found = pack.node.admit(known, value)
            assert found == value and type(found) is plain, f"{node.__name__}.{known.id}"
    number = io.Int.Input("n", min=0, max=9)
    assert [type(pack.node.admit(number, v)) for v in (np.int64(3), np.uint8(3))] == [int, int]
    assert type(pack.node.admit(io.Float.Input("x", min=0, max=9), np.float32(0.5))) is float


def test_the_copies_that_the_host_runs_are_checked_as_well(nodes):
    from comfy_api.internal import make_locked_method_func

    for node in nodes:
        copy = node.PREPARE_CLASS_CLONE(None)
        run = make_locked_method_func(node, node.FUNCTION, copy)
        for known in node.define_schema().inputs:
            if known.get_io_type() == "INT":
                with pytest.raises(ValueError, match=f"input '{known.id}' is nan"):
                    run(**{known.id: [NAN] if node.define_schema().is_input_list else NAN})


def test_links_that_a_node_passes_on_are_left_as_they_are(pack, io, nodes):
    for node, around, known in numbers(io, nodes, io.Int.Input):
        if getattr(known, "rawLink", False):
            schema = node.define_schema()
            assert pack.node._admitted(known, ["12", 0], schema, known.id) == ["12", 0] and not around
            break
    else:
        pytest.fail("no node passes on a number any more: this test and `raw_link` in nodes/node.py can go")


def test_checking_costs_next_to_nothing(nodes):
    start = time.perf_counter()
    for node in nodes:
        node.define_schema()
    assert time.perf_counter() - start < 2


# ------------------------------------------------------------------------------------------- what may take long or much


SIZE = (32, 48)


@pytest.fixture(scope="module")
def here(pack):
    """A world of 16 frames, a path on from it, what is planned of it, its splat."""
    from lyra_pack.lyra_core.cameras.camera import pinhole
    from lyra_pack.lyra_core.memory.depth import room_box
    from lyra_pack.lyra_core.world import preview, world

    def path(frames: int, begin: float = 0.0):
        cameras = pinhole(SIZE, 40.0, frames)
        cameras.w2c[:, 2, 3] = -torch.linspace(begin, begin + 0.4, frames)
        return cameras

    room = room_box(SIZE, pinhole(SIZE, 40.0).K[0], (0.5, 0.5), (0.3, 0.3, 0.7, 0.7), 4.0)
    photo = world.begin(torch.rand(*SIZE, 3, generator=torch.Generator().manual_seed(3)), room.depth, room.camera)
    there = preview.explore(photo, path(9), chunk_frames=8)
    begun = preview.explore(there, path(9, 0.4)[list(range(8, -1, -1))], chunk_frames=8)
    return SimpleNamespace(
        world=begun, path=path(9, 0.0), plan=world.plan(begun, path(8)), splat=pack.splat.WorldGaussians.execute(begun, 1, True).args[0]
    )


@pytest.fixture
def runs(pack, here, comfy_host, tmp_path) -> dict:
    """Nodes that work for long or take much, ready to go."""
    folder = f"worlds/{tmp_path.name}"
    estimator = pack.depth_estimator.MemoryEstimator.execute().args[0]
    painted = torch.rand(8, *SIZE, 3)
    guard = {"edit": "guard against collisions", "world": here.world, "clearance": 0.1, "how": "shorten"}
    return {
        "RetrieveHistory": lambda: pack.world.RetrieveHistory.execute(here.world, here.path, 5, 1, 8),
        "PreviewChunks": lambda: pack.world.PreviewChunks.execute(here.world, here.path, 5, 8, ""),
        "WorldFrames": lambda: pack.world.WorldFrames.execute(here.world, 0, 0, False),
        "Consistency": lambda: pack.consistency.Consistency.execute(here.world),
        "SaveWorld": lambda: pack.world.SaveWorld.execute(here.world, folder),
        "EditTrajectory": lambda: pack.trajectory.EditTrajectory.execute(here.path, guard),
        "DrawTrajectory": lambda: pack.trajectory.DrawTrajectory.execute(here.path, here.world),
        "RenderSplat": lambda: pack.splat.RenderSplat.execute(here.splat, here.path, "#000000", "torch"),
        "PruneSplat": lambda: pack.splat.PruneSplat.execute(here.splat, at_most=50),
        "WorldGaussians": lambda: pack.splat.WorldGaussians.execute(here.world, 1, True),
        "WorldMesh": lambda: pack.mesh.WorldMesh.execute(world=here.world),
        "ControlViews": lambda: pack.control.ControlViews.execute(here.world, here.plan, 1, 2, 0.05, 2),
        "AppendFrames": lambda: pack.control.AppendFrames.execute(here.world, here.plan, painted, estimator, "memory", False),
        "WorldVideo": lambda: pack.video.WorldVideo.execute(here.world, 0, 0, False, 16.0).args[0].get_components(),
        "ExportWorld": lambda: pack.export.ExportWorld.execute(
            f"exports/{tmp_path.name}", False, False, False, True, "none", 0, 1.0, 16.0, 8, world=here.world),
    }  # fmt: skip


QUICK = {"DrawTrajectory", "WorldVideo"}  # no loop of theirs takes longer than a step of the others


def test_an_interrupt_ends_whatever_takes_long_at_its_next_step(runs, pack, comfy_host, tmp_path):
    import comfy.model_management as host

    for name in runs.keys() - QUICK:
        runs[name]()  # it works when nobody interrupts
    done = sorted(p for p in comfy_host.rglob("*"))
    for name in runs.keys() - QUICK:
        host.interrupt_current_processing(True)
        try:
            with pytest.raises(host.InterruptProcessingException):
                runs[name]()
                pytest.fail(f"{name} went on to its end")
        finally:
            host.interrupt_current_processing(False)
    assert sorted(p for p in comfy_host.rglob("*")) == done


def test_an_interrupt_ends_looking_through_the_files_of_a_long_world(pack, here, comfy_host, tmp_path, monkeypatch):
    """A world of 40 chunks is 4.6 GB; whoever walks on in a new process looks through all of it."""
    import comfy.model_management as host

    path, name = here.path[list(range(8, -1, -1))], f"worlds/{tmp_path.name}"
    pack.world.PreviewChunks.execute(here.world, path, 0, 4, name)
    looked = []
    known = pack.world.world_files.damage
    monkeypatch.setattr(pack.world.world_files, "damage", lambda folder, entry: looked.append(entry.key) or known(folder, entry))
    pack.world.PreviewChunks.execute(here.world, path, 0, 4, name)
    assert len(looked) > 8
    looked.clear()
    host.interrupt_current_processing(True)
    try:
        with pytest.raises(host.InterruptProcessingException):
            pack.world.PreviewChunks.execute(here.world, path, 0, 4, name)
    finally:
        host.interrupt_current_processing(False)
    assert len(looked) == 2, "the chunk, and the first of those before it"


TAKES_MEMORY = (
    "RetrieveHistory", "PreviewChunks", "WorldFrames", "Consistency", "DrawTrajectory", "RenderSplat", "ControlViews", "WorldVideo",
)  # fmt: skip


@pytest.mark.parametrize("name", TAKES_MEMORY)
def test_what_there_is_no_memory_for_is_refused_with_numbers_before_any_is_taken(runs, pack, name, monkeypatch):
    monkeypatch.setattr(pack.types, "get_free_memory", lambda device: 1000 if device.type == "cpu" else 10**12)
    with pytest.raises(MemoryError, match=r"takes [\d.,]+ GiB of memory at least, and 0.0 GiB are free; take fewer frames"):
        runs[name]()


def test_a_chunk_that_there_is_no_memory_for_is_not_begun(pack, here, monkeypatch):
    links = {name: [name, 0] for name in ("model", "clip", "clip_vision", "vae", "depth_estimator")}
    quality = {"quality": "DMD", "dmd_lora": pack.generation.IN_THE_MODEL}
    settings = dict(prompt="", negative="", quality=quality, seed=1, retrieve=5, views=1, alignment="memory", save_to="", index=0)
    monkeypatch.setattr(pack.types, "get_free_memory", lambda device: 1000)
    with pytest.raises(MemoryError, match="a chunk of 80 frames of 48x32 takes"):
        pack.generation.ExploreChunk.execute(here.world, here.path[[0] * 81], **links, **settings, made_with="")


def test_a_world_of_a_whole_path_is_estimated_and_what_is_there_already_is_not(pack):
    from lyra_pack.lyra_core.world import preview

    size = (480, 832)
    once, twice = (preview.memory_needed(size, frames, 80) for frames in (8000, 16000))
    assert 11e9 < once < 12e9 and 1.9 < twice / once < 2
    assert preview.memory_needed(size, 8000, 8000) > once + 8e9, "a long chunk is looked up as a whole"


def test_paths_do_not_grow_for_ever(pack, here):
    path, edit = here.path, {"edit": "there and back"}
    with pytest.raises(ValueError, match=r"a path has 1,000,000 at most"):
        for _ in range(40):
            path = pack.trajectory.EditTrajectory.execute(path, edit).args[0]
    assert len(path) < 1_000_000


# ------------------------------------------------------------------------------------------------- names and settings

ODD_NAME = os.fsdecode(b"caf\xe9")  # Latin-1, as old archives unpack it


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="file names are always text there")
def test_a_name_that_is_no_text_is_offered_by_no_node_and_refused_in_words(pack, nodes, io, comfy_host):
    """The host's queue ended where it had to say such a name."""
    places = [comfy_host / "input" / f"{ODD_NAME}{ending}" for ending in (".npz", ".json", ".npy")]
    for file in places:
        file.write_bytes(b"damaged")
    for folder, names in (("input", ("cameras.txt", "images.txt")), ("output", ("world.json",))):
        places.append(comfy_host / folder / ODD_NAME)
        places[-1].mkdir()
        for name in names:
            (places[-1] / name).write_text("{}")
    try:
        for node in nodes:
            for _, known in flat(io, node.define_schema().inputs):
                if isinstance(known, io.Combo.Input):
                    "".join(map(str, known.options)).encode()
        for node, name in ((pack.trajectory.LoadTrajectory, "file"), (pack.world.LoadWorld, "folder"), (pack.depth.LoadDepth, "file")):
            with pytest.raises(ValueError, match=r"is 'caf\\+udce9") as refused:
                node.execute(**{name: ODD_NAME})
            str(refused.value).encode()
        assert pack.types.fingerprint(comfy_host / "input" / ODD_NAME)
    finally:
        for place in places:
            shutil.rmtree(place) if place.is_dir() else place.unlink()


OUTSIDE = [
    "..", ".", "", " ", "../x", "worlds/../../x", "/etc/cron.d/x", "/", "worlds/leads_out/x", "worlds/leads_out", "a\0b", "~/x/../../..",
    "worlds/" + "../" * 30 + "tmp/x",
]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_folder_input_of_any_node_leads_out_of_the_output_folder(pack, here, comfy_host, tmp_path, name):
    link = comfy_host / "output" / "worlds" / "leads_out"
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(tmp_path)
    estimator = pack.depth_estimator.MemoryEstimator.execute().args[0]
    painted = torch.rand(8, *SIZE, 3)
    before = sorted(comfy_host.rglob("*"))
    runs = {
        "SaveWorld": lambda: pack.world.SaveWorld.execute(here.world, name),
        "ExportWorld": lambda: pack.export.ExportWorld.execute(
            name, False, False, False, False, "none", 0, 1.0, 16.0, 8, world=here.world),
        "Explorer": lambda: pack.explorer.Explorer.execute(name, "", here.world),
        "LoadWorld": lambda: pack.world.LoadWorld.execute(name, -1, ""),
    }  # fmt: skip
    if name.strip():  # blank: not saved
        runs["PreviewChunks"] = lambda: pack.world.PreviewChunks.execute(here.world, here.path, 0, 8, name)
        runs["AppendFrames"] = lambda: pack.control.AppendFrames.execute(
            here.world, here.plan, painted, estimator, "memory", False, "", name
        )
    try:
        for node, run in runs.items():
            with pytest.raises(ValueError):
                run()
                pytest.fail(f"{node} took {name!r}")
        assert sorted(comfy_host.rglob("*")) == before and not list(tmp_path.iterdir())
    finally:
        link.unlink()


@pytest.mark.parametrize("text", ["[]", "7", "null", '"a"', "{", "", "[" * 50_000, '{"a": ' + "9" * 5000 + "}"])
def test_settings_that_are_no_json_object_are_refused_in_words(pack, here, text):
    from lyra_pack.nodes.inputs import kept_settings

    estimator = pack.depth_estimator.MemoryEstimator.execute().args[0]
    latent = {"samples": torch.zeros(1, 16, 2, 4, 6)}
    for run in (
        lambda: pack.control.AppendFrames.execute(here.world, here.plan, torch.rand(8, *SIZE, 3), estimator, "memory", settings=text, anchor=False),
        lambda: pack.generation.AppendChunk.execute(here.world, here.plan, latent, None, estimator, "memory", settings=text),
    ):
        with pytest.raises(ValueError, match="^settings.*(no JSON object|not valid JSON)"):
            run()
    assert kept_settings('{"seed": 3}', "a") == {"generator": "a", "seed": 3}


def test_many_files_beside_the_inputs_cost_next_to_nothing(pack, comfy_host):
    crowd = comfy_host / "input" / "crowd"
    crowd.mkdir()
    for number in range(3000):
        (crowd / f"frame_{number:05}.png").touch()
    try:
        start = time.process_time()
        pack.trajectory.LoadTrajectory.define_schema()
        assert time.process_time() - start < 2
    finally:
        shutil.rmtree(crowd)


def test_what_explore_becomes_is_within_the_bounds_of_what_it_becomes_it_of(pack, io, nodes, here):
    """At the ends of all its own numbers: the host does not look at nodes that a node becomes, but they do themselves."""
    by_id = {node.define_schema().node_id: node for node in nodes}
    links = {name: [name, 0] for name in ("model", "clip", "clip_vision", "vae", "depth_estimator")}
    for end in ("min", "max"):
        for option in pack.control.GENERATORS:
            known = {i.id: i for _, i in flat(io, pack.generation.ExploreChunk.define_schema().inputs)}
            generator = pack.generation._generator_input()
            inputs = next(o.inputs for o in generator.options if o.key == option)
            asked = {i.id: getattr(i, end, None) if hasattr(i, "max") else i.default for i in inputs if i.id != "overlap"}
            asked |= {"generator": option, "overlap": "5" if end == "max" else "1"}
            asked |= {i.id: i.options[0] for i in inputs if isinstance(i, io.Combo.Input) and i.id != "overlap"}
            quality = {"quality": "DMD", "dmd_lora": pack.generation.IN_THE_MODEL}
            seed, retrieve, views = (getattr(known[name], end) for name in ("seed", "retrieve", "views"))
            out = pack.generation.ExploreChunk.execute(
                here.world, here.path[[0] * 81], "", "", quality, seed, retrieve, views, "memory", "", 0, "", "", asked, **links
            )
            for made in out.expand.values():
                for name, value in made["inputs"].items():
                    declared = by_id.get(made["class_type"])
                    inner = declared and {i.id: i for i in declared.define_schema().inputs}.get(name)
                    if inner is not None and isinstance(value, (int, float)) and not isinstance(value, bool):
                        assert pack.node.admit(inner, value) == value, (made["class_type"], name)
