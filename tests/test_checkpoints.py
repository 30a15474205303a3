"""Conversion of released checkpoints: whatever the source's format, the same tensors arrive, or nothing does."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lyra_core.conditioning.framepack import LYRA2

CONFIG = {
    "rank": 4,
    "model_type": "i2v",
    "in_dim": 36,
    "out_dim": 16,
    "dim": 24,
    "ffn_dim": 32,
    "freq_dim": 8,
    "text_dim": 8,
    "num_heads": 2,
    "num_layers": 2,
}
STORED = {"num_heads": 2}
COUNTERS = ("accum_video_sample_counter", "accum_image_sample_counter", "accum_iteration", "accum_train_in_hours")


@pytest.fixture(scope="session")
def checkpoints(comfy_host):
    from lyra_core.models import checkpoints

    return checkpoints


@pytest.fixture(scope="session")
def host(checkpoints):
    return checkpoints.lyra2_host


@pytest.fixture(scope="session")
def layout() -> str:
    return str(LYRA2)


@pytest.fixture(scope="session")
def weights(host, layout) -> dict[str, torch.Tensor]:
    """A tiny network's, float32, under bare names."""
    generator = torch.Generator().manual_seed(1)
    shapes = host.weight_shapes({**CONFIG, "framepack": layout})
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def convert(checkpoints):
    """convert(), told what a tiny network's shapes don't say."""

    def with_config(source: Path, target: Path, *args, **kwargs):
        return checkpoints.convert(source, target, *args, **{"stored": STORED, **kwargs})

    return with_config


@pytest.fixture(scope="session")
def loaded(checkpoints, weights, tmp_path_factory):
    """The model that the host's stock loader makes of a converted file."""
    import comfy.sd

    folder = tmp_path_factory.mktemp("loaded")
    checkpoints.convert(as_safetensors(folder / "source", prefixed(weights)), folder / "t.safetensors", stored=STORED)
    return comfy.sd.load_diffusion_model(str(folder / "t.safetensors"), {"dtype": torch.bfloat16}).model


@pytest.fixture
def source(tmp_path, weights) -> Path:
    """The tiny network as a .safetensors file."""
    return as_safetensors(tmp_path / "source", prefixed(weights))


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "models" / "converted.safetensors"


def part_of(target: Path) -> Path:
    return target.with_name(target.name + ".part")


def prefixed(weights: dict, prefix: str = "net.") -> dict:
    return {prefix + name: tensor for name, tensor in weights.items()}


def as_safetensors(place: Path, tensors: dict) -> Path:
    save_file(tensors, place.with_suffix(".safetensors"))
    return place.with_suffix(".safetensors")


def as_pth(place: Path, tensors: dict) -> Path:
    torch.save(tensors, place.with_suffix(".pth"))
    return place.with_suffix(".pth")


def as_nested_pt(place: Path, tensors: dict) -> Path:
    torch.save({"epoch": 3, "state_dict": tensors}, place.with_suffix(".pt"))
    return place.with_suffix(".pt")


def as_shards(place: Path, tensors: dict) -> Path:
    """Two files and an index."""
    place.mkdir()
    names = list(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, half in halves.items():
        save_file({name: tensors[name] for name in half}, place / file)
    index = {"weight_map": {name: file for file, half in halves.items() for name in half}}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    return place


def as_distributed(place: Path, tensors: dict) -> Path:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.save(tensors, checkpoint_id=place / "model", no_dist=True)
    return place


def as_distributed_by_two_ranks(place: Path, tensors: dict) -> Path:
    """What two ranks save that hold halves of every tensor: rows, or columns where there is a single row."""
    from torch.distributed.checkpoint import metadata as m
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    place.mkdir()
    stored, places = {}, {}
    files = [(place / f"__{rank}_0.distcp").open("wb") for rank in range(2)]
    for name, tensor in tensors.items():
        axis = next((axis for axis, length in enumerate(tensor.shape) if length > 1), None)
        halves = [tensor] if axis is None else tensor.chunk(2, axis)
        chunks, start = [], [0] * tensor.ndim
        for half, file in zip(halves, files, strict=False):
            offset = file.tell()
            torch.save(half.clone(), file)
            chunks.append(m.ChunkStorageMetadata(torch.Size(start), half.shape))
            places[m.MetadataIndex(name, start)] = _StorageInfo(Path(file.name).name, offset, file.tell() - offset)
            if axis is not None:
                start[axis] += half.shape[axis]
        stored[name] = m.TensorStorageMetadata(m.TensorProperties(tensor.dtype), tensor.shape, chunks)
    for file in files:
        file.close()
    backwards = dict(reversed(places.items()))
    (place / ".metadata").write_bytes(pickle.dumps(m.Metadata(stored, None, backwards)))
    return place


FORMATS = [as_safetensors, as_shards, as_pth, as_nested_pt, as_distributed, as_distributed_by_two_ranks]
BREAKABLE = [as_safetensors, as_pth, as_distributed]


def assert_holds(file: Path, weights: dict, dtype: torch.dtype) -> None:
    """Exactly these weights in this dtype, and the configuration."""
    found = load_file(file)
    assert json.loads(bytes(found.pop("lyra2_config").tolist()))["num_heads"] == 2
    assert found.keys() == weights.keys()
    for name, tensor in found.items():
        assert tensor.dtype == dtype and torch.equal(tensor, weights[name].to(dtype)), name


def test_the_hosts_stock_loader_takes_a_converted_file(loaded, host, weights):
    assert isinstance(loaded, host.Lyra2Base)
    found = loaded.diffusion_model.state_dict()
    assert found.keys() == weights.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor.flatten().bfloat16(), weights[name].flatten().bfloat16()), name


# ------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("write", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_format_brings_the_same_tensors(write, dtype, weights, convert, tmp_path, target):
    report = convert(write(tmp_path / "source", prefixed(weights)), target, dtype)
    assert_holds(target, weights, dtype)
    assert (report.kind, report.tensors, report.bytes) == ("model", len(weights) + 1, target.stat().st_size)
    assert not part_of(target).exists() and not report.dropped and not report.unknown


@pytest.mark.parametrize("write", FORMATS)
def test_bfloat16_arrives_bit_by_bit(write, weights, convert, tmp_path, target):
    narrow = {name: tensor.bfloat16() for name, tensor in weights.items()}
    convert(write(tmp_path / "source", prefixed(narrow)), target)
    assert_holds(target, narrow, torch.bfloat16)


@pytest.mark.parametrize("prefix", ["", "net.", "model.diffusion_model.", "diffusion_model."])
def test_prefixes_are_stripped(prefix, weights, convert, tmp_path, target):
    convert(as_safetensors(tmp_path / "source", prefixed(weights, prefix)), target)
    assert_holds(target, weights, torch.bfloat16)


def test_conversion_works_in_inference_mode_like_a_node_of_the_host(weights, convert, tmp_path):
    with torch.inference_mode():
        for write in BREAKABLE:
            target = tmp_path / f"{write.__name__}.safetensors"
            convert(write(tmp_path / f"source_{write.__name__}", prefixed(weights)), target)
            assert_holds(target, weights, torch.bfloat16)


def test_a_file_says_its_format_and_its_configuration(source, layout, convert, target):
    convert(source, target)
    with safe_open(target, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert json.loads(bytes(file.get_tensor("lyra2_config").tolist())) == {"framepack": layout, "num_heads": 2}


def test_every_tensor_lies_at_a_multiple_of_its_items_size(convert, tmp_path, target):
    mixed = {"head.head.lora_A.weight": torch.zeros(1, 3).half(), "head.head.lora_B.weight": torch.zeros(5, 1)}
    mixed["head.head.alpha"] = torch.tensor(1.0)
    convert(as_pth(tmp_path / "source", mixed), target)
    raw = target.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0
    assert header["diffusion_model.head.head.alpha"]["data_offsets"][0] % 4 == 0
    assert header["diffusion_model.head.head.lora_A.weight"]["data_offsets"][0] % 2 == 0


def test_a_converted_file_converts_again_without_being_told_its_configuration(source, weights, convert, target):
    convert(source, target, torch.float32)
    again = target.with_name("again.safetensors")
    convert(target, again, stored=None)
    assert_holds(again, weights, torch.bfloat16)


def test_a_convolutions_patch_embedding_becomes_the_references_matrix(weights, convert, tmp_path, target):
    conv = {**weights, "patch_embedding.weight": weights["patch_embedding.weight"].unflatten(1, (36, 1, 2, 2))}
    convert(as_safetensors(tmp_path / "source", conv), target)
    assert_holds(target, weights, torch.bfloat16)


def test_integers_stay_integers(weights, convert, tmp_path, target):
    name = "blocks.0.ffn.0.bias"
    convert(as_safetensors(tmp_path / "source", {**weights, name: torch.full((32,), 1_000_001)}), target)
    assert load_file(target)[name].tolist() == [1_000_001] * 32


def test_views_of_a_shared_storage_are_read_where_they_lie(weights, convert, tmp_path, target):
    q, k = "blocks.0.self_attn.q.weight", "blocks.0.self_attn.k.weight"
    both = torch.cat([weights[q], weights[k].mT])
    views = {q: both[: len(weights[q])], k: both[len(weights[q]) :].mT}
    convert(as_pth(tmp_path / "source", {**weights, q: views[q], k: views[k]}), target, torch.float32)
    assert_holds(target, weights, torch.float32)


def test_an_expanded_tensor_and_a_parameter_are_read_in_full(weights, convert, tmp_path, target):
    bias, scale = "blocks.0.self_attn.q.bias", "blocks.1.norm3.weight"
    expanded = torch.full((1,), 0.5).expand(weights[bias].shape)
    source = {**weights, bias: expanded, scale: torch.nn.Parameter(weights[scale])}
    convert(as_pth(tmp_path / "source", source), target)
    assert_holds(target, {**weights, bias: expanded}, torch.bfloat16)


def test_a_pth_from_another_device_is_read(weights, convert, tmp_path, target, monkeypatch):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    source = as_pth(tmp_path / "source", prefixed(weights))
    monkeypatch.undo()
    convert(source, target)
    assert_holds(target, weights, torch.bfloat16)


# ----------------------------------------------------------------------------------------------- what may be in a file


@pytest.mark.parametrize("write", [as_pth, as_distributed])
def test_what_only_training_needs_is_dropped(write, weights, convert, tmp_path, target):
    training = {f"net.blocks.{i}.self_attn.attn_op._extra_state": io.BytesIO(b"state") for i in range(2)}
    training |= {f"net.{counter}": torch.tensor(7) for counter in COUNTERS[:3]} | {f"net.{COUNTERS[3]}": 1.5}
    report = convert(write(tmp_path / "source", {**prefixed(weights), **training}), target)
    assert_holds(target, weights, torch.bfloat16)
    assert sorted(report.dropped) == sorted(training)
    assert "6 entries" in str(report)


def test_missing_extra_and_misshapen_weights_are_listed_before_anything_is_written(weights, convert, tmp_path, target):
    wrong = dict(weights)
    del wrong["blocks.1.cam_encoder.weight"]
    wrong |= {"blocks.0.surplus.weight": torch.zeros(2), "blocks.0.ffn.2.bias": torch.zeros(3)}
    with pytest.raises(ValueError) as error:
        convert(as_safetensors(tmp_path / "source", wrong), target)
    for told in ("source.safetensors", "blocks.1.cam_encoder.weight", "blocks.0.surplus.weight", "blocks.0.ffn.2.bias"):
        assert told in str(error.value)
    assert not target.exists() and not part_of(target).exists()


def test_a_long_list_of_wrong_weights_is_cut(weights, convert, tmp_path, target):
    surplus = {f"surplus.{i}": torch.zeros(1) for i in range(50)}
    with pytest.raises(ValueError, match="and 30 more") as error:
        convert(as_safetensors(tmp_path / "source", {**weights, **surplus}), target)
    assert str(error.value).count("surplus.") == 20


def test_plain_wan_is_refused_as_such(weights, convert, tmp_path, target):
    plain = {name: tensor for name, tensor in weights.items() if "clean_patch" not in name}
    with pytest.raises(ValueError, match="source.safetensors.*plain Wan"):
        convert(as_safetensors(tmp_path / "source", plain), target)


def test_another_model_is_refused_with_what_was_found(convert, tmp_path, target):
    with pytest.raises(ValueError, match="(?s)something else.*decoder.conv1.weight"):
        convert(as_pth(tmp_path / "source", {"decoder.conv1.weight": torch.zeros(3)}), target)


def test_a_network_whose_shapes_dont_tell_its_heads_needs_a_configuration(source, convert, target):
    with pytest.raises(ValueError, match="source.safetensors.*num_heads"):
        convert(source, target, stored=None)


@pytest.mark.parametrize("write", [as_pth, as_distributed])
def test_an_entry_that_is_no_tensor_is_refused_by_name(write, weights, convert, tmp_path, target):
    with pytest.raises(ValueError, match="net.note"):
        convert(write(tmp_path / "source", {**prefixed(weights), "net.note": "hello"}), target)


def test_a_sparse_tensor_is_refused_by_name(weights, convert, tmp_path, target):
    sparse = {**weights, "blocks.0.ffn.0.weight": weights["blocks.0.ffn.0.weight"].to_sparse()}
    with pytest.raises(ValueError, match="no plain tensor.*\nblocks.0.ffn.0.weight"):
        convert(as_pth(tmp_path / "source", sparse), target)


def test_two_sources_of_one_key_are_refused(weights, convert, tmp_path, target):
    with pytest.raises(ValueError, match="(?s)several tensors.*net.head.modulation"):
        twice = {**prefixed(weights), "head.modulation": weights["head.modulation"].clone()}
        convert(as_safetensors(tmp_path / "source", twice), target)


# ------------------------------------------------------------------------------------------- files that are not to be used


class Intruder:
    """Creates a file when it is unpickled by a careless reader."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return (open, (str(self.trace), "w"))


def test_a_program_in_a_pth_is_refused_and_does_not_run(weights, convert, tmp_path, target):
    source = as_pth(tmp_path / "source", {**weights, "intruder": Intruder(tmp_path / "trace")})
    with pytest.raises(ValueError, match="source.pth.*nothing else in it will be run"):
        convert(source, target)
    assert not (tmp_path / "trace").exists()


def test_a_program_in_dcp_metadata_is_refused_and_does_not_run(weights, convert, tmp_path, target):
    source = as_distributed(tmp_path / "source", prefixed(weights))
    file = source / "model" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    metadata.planner_data = Intruder(tmp_path / "trace")
    file.write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"\.metadata.*io\.open"):
        convert(source, target)
    assert not (tmp_path / "trace").exists()


def test_a_program_in_a_dcp_shard_is_refused_and_does_not_run(weights, convert, tmp_path, target):
    source = as_distributed_by_two_ranks(tmp_path / "source", prefixed(weights))
    file = source / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    index, place = next(iter(metadata.storage_data.items()))
    with open(source / place.relative_path, "ab") as shard:
        offset = shard.tell()
        torch.save(Intruder(tmp_path / "trace"), shard)
        place.offset, place.length = offset, shard.tell() - offset
    file.write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=f"source: {index.fqn} is damaged"):
        convert(source, target)
    assert not (tmp_path / "trace").exists()


def test_dcp_metadata_from_another_system_is_read(weights, convert, tmp_path, target):
    """A PosixPath can't be made on Windows, nor a WindowsPath elsewhere."""
    source = as_distributed(tmp_path / "source", prefixed(weights))
    file = source / "model" / ".metadata"
    raw = file.read_bytes()
    assert raw.count(b"\x94\x8c\x09PosixPath") == 1
    shorter = raw.replace(b"\x94\x8c\x09PosixPath", b"\x94\x8c\x0bWindowsPath")
    metadata = len(shorter) - 11  # one frame holds it all
    file.write_bytes(shorter[:3] + metadata.to_bytes(8, "little") + shorter[11:])
    convert(source, target)
    assert_holds(target, weights, torch.bfloat16)


def test_incomplete_dcp_tensors_are_refused(weights, convert, tmp_path, target):
    source = as_distributed_by_two_ranks(tmp_path / "source", prefixed(weights))
    file = source / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    metadata.state_dict_metadata["net.blocks.0.ffn.0.weight"].chunks.pop()
    file.write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="only parts of net.blocks.0.ffn.0.weight"):
        convert(source, target)


@pytest.mark.parametrize("keep", [0.999, 0.5, 0.0])
@pytest.mark.parametrize("write", [*BREAKABLE, as_distributed_by_two_ranks])
def test_a_file_that_is_cut_off_is_refused_by_name(write, keep, weights, convert, tmp_path, target):
    source = write(tmp_path / "source", prefixed(weights))
    file = next(source.rglob("*.distcp")) if source.is_dir() else source
    os.truncate(file, int(keep * file.stat().st_size))
    with pytest.raises(ValueError, match=f"{file.name}.*download it again|{file.name} is no zip"):
        convert(source, target)
    assert not part_of(target).exists()


def test_cut_off_dcp_metadata_is_refused_by_name(weights, convert, tmp_path, target):
    source = as_distributed(tmp_path / "source", prefixed(weights))
    os.truncate(source / "model" / ".metadata", 1000)
    with pytest.raises(ValueError, match=r"\.metadata: is not read"):
        convert(source, target)


def test_a_safetensors_header_whose_sizes_contradict_its_shapes_is_refused(source, convert, target):
    raw = source.read_bytes()
    assert raw.count(b'"shape":[1,2,24]') == 1
    source.write_bytes(raw.replace(b'"shape":[1,2,24]', b'"shape":[1,2,23]'))
    with pytest.raises(ValueError, match="head.modulation' has 192 bytes"):
        convert(source, target)


def test_a_pickle_of_an_old_torch_is_refused_with_the_way_out(weights, convert, tmp_path, target):
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="old.pth is no zip.*torch.save"):
        convert(tmp_path / "old.pth", target)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("count", [1, 2])
def test_a_pth_that_another_program_packed_is_refused_or_right(count, compression, convert, tmp_path, target):
    tensors = {f"blocks.{i}.norm3.diff": torch.full((100,), 1.0 + i) for i in range(count)}
    source, packed = as_pth(tmp_path / "source", tensors), tmp_path / "packed.pth"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(packed, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    if (count, compression) == (1, zipfile.ZIP_STORED):
        convert(packed, target)
        assert load_file(target)["diffusion_model.blocks.0.norm3.diff"].eq(1).all()
        return
    with pytest.raises(ValueError, match="packed.pth was packed by another program"):
        convert(packed, target)


def test_a_whole_module_is_refused(convert, tmp_path, target):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(ValueError, match="module.pt.*state_dict"):
        convert(tmp_path / "module.pt", target)


def test_a_list_of_tensors_is_refused(convert, tmp_path, target):
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="list.pt holds a list"):
        convert(tmp_path / "list.pt", target)


def test_a_source_that_is_none_is_refused(convert, tmp_path, target):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    for name, told in [("empty", "neither .metadata"), ("notes.txt", "no .safetensors, .pth"), ("absent", "not exist")]:
        with pytest.raises(ValueError, match=f"{name}.*{told}"):
            convert(tmp_path / name, target)


def test_an_existing_target_is_refused_and_untouched(source, convert, target):
    target.parent.mkdir()
    target.write_text("precious")
    with pytest.raises(ValueError, match="converted.safetensors exists"):
        convert(source, target)
    assert target.read_text() == "precious"


def test_a_target_of_another_kind_is_refused(source, convert, tmp_path):
    with pytest.raises(ValueError, match="model.pth must end in .safetensors"):
        convert(source, tmp_path / "model.pth")


def test_a_full_disk_is_noticed_before_anything_is_written(source, convert, target, monkeypatch):
    usage = type(shutil.disk_usage("."))
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10**9, 10**9 - 5000, 5000))
    with pytest.raises(ValueError, match="converted.safetensors needs .* GB"):
        convert(source, target)
    assert not part_of(target).exists()


# --------------------------------------------------------------------------------------------- interruption and damage


class Interrupt(Exception):
    pass


class Progress:
    """Records what is done, and raises once `limit` reports were made."""

    def __init__(self, limit: int | None = None):
        self.limit, self.done, self.total = limit, [], None

    def __call__(self, done: int, total: int) -> None:
        self.done.append(done)
        self.total = total
        if self.limit is not None and len(self.done) > self.limit:
            raise Interrupt


def test_progress_counts_the_bytes_of_writing_and_of_verifying(source, convert, target):
    progress = Progress()
    convert(source, target, on_progress=progress)
    assert progress.done == sorted(progress.done)
    assert progress.done[-1] == progress.total == 2 * target.stat().st_size
    assert target.stat().st_size in progress.done


@pytest.mark.parametrize("after", [0, 1, 20, 60, 80, 130])
def test_an_interrupted_conversion_continues_where_it_was(after, source, convert, target):
    whole = target.with_name("whole.safetensors")
    convert(source, whole)
    first, second = Progress(after), Progress()
    with pytest.raises(Interrupt):
        convert(source, target, on_progress=first)
    assert not target.exists() and part_of(target).exists()
    convert(source, target, on_progress=second)
    assert second.done[0] == min(first.done[-1], whole.stat().st_size)
    assert target.read_bytes() == whole.read_bytes()
    assert not part_of(target).exists()


def test_a_half_written_tensor_is_written_again(source, convert, target):
    whole = target.with_name("whole.safetensors")
    convert(source, whole)
    content, progress = whole.read_bytes(), Progress()
    part_of(target).write_bytes(content[: len(content) // 2] + b"\0" * 3)
    convert(source, target, on_progress=progress)
    assert 0.2 * len(content) < progress.done[0] <= 0.5 * len(content) + 3
    assert target.read_bytes() == content


def test_what_is_behind_the_last_tensor_goes(source, convert, target):
    whole = target.with_name("whole.safetensors")
    convert(source, whole)
    part_of(target).write_bytes(whole.read_bytes() + b"surplus")
    convert(source, target)
    assert target.read_bytes() == whole.read_bytes()


def test_a_file_is_on_the_disk_and_verified_before_it_gets_its_name(source, convert, target, monkeypatch):
    events = []
    fsync, move = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (events.append("sync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append("name"), move(old, new)))
    convert(source, target, on_progress=lambda done, total: events.append("all") if done == total else None)
    assert events == ["sync", "all", "name"]


def test_what_was_complete_is_not_written_again_but_verified(source, convert, target):
    with pytest.raises(Interrupt):
        convert(source, target, on_progress=Progress(40))
    content = bytearray(part_of(target).read_bytes())
    content[-1] ^= 1
    part_of(target).write_bytes(content)
    with pytest.raises(ValueError, match="part does not hold.*differs"):
        convert(source, target)
    assert not part_of(target).exists() and not target.exists()
    convert(source, target)


@pytest.mark.parametrize("where", [-1, 0])
def test_damage_after_writing_is_noticed(where, source, convert, target):
    damaged = []

    def damage(done: int, total: int) -> None:
        if 2 * done == total and not damaged:
            content = bytearray(part_of(target).read_bytes())
            start = 8 + int.from_bytes(content[:8], "little")
            content[start if where == 0 else -1] ^= 1
            part_of(target).write_bytes(content)
            damaged.append(done)

    with pytest.raises(ValueError, match="does not hold"):
        convert(source, target, on_progress=damage)
    assert damaged and not part_of(target).exists() and not target.exists()


def test_what_was_begun_for_another_dtype_starts_again(source, weights, convert, target):
    with pytest.raises(Interrupt):
        convert(source, target, torch.float16, Progress(40))
    progress = Progress()
    convert(source, target, on_progress=progress)
    assert_holds(target, weights, torch.bfloat16)
    length = int.from_bytes(target.read_bytes()[:8], "little")
    assert progress.done[0] == 8 + length


# ----------------------------------------------------------------------------------------------------------- memory

CHILD = """
import sys
from pathlib import Path
sys.path.append(sys.argv[1])
import host
host.boot()
import torch
torch.set_num_threads(1)
import torch.distributed.checkpoint
from lyra_core.models import checkpoints

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

for source in map(Path, sys.argv[2:]):
    before, target = peak(), source.with_name(source.name + "_target.safetensors")
    checkpoints.convert(source, target, stored={"num_heads": 2})
    print(peak() - before, target.stat().st_size)
    target.unlink()
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_holds_a_few_tensors_and_never_the_file(host, layout, tmp_path, project):
    config = {**CONFIG, "framepack": layout, "dim": 256, "ffn_dim": 4096, "num_layers": 9}
    shapes = host.weight_shapes(config)
    largest = 4 * max(torch.Size(shape).numel() for shape in shapes.values())
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
    sources = [str(write(tmp_path / write.__name__, tensors)) for write in BREAKABLE]  # 120 MB each
    try:
        command = [sys.executable, "-c", CHILD, str(project / "tools"), *sources]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        for grown, size in (map(int, line.split()) for line in done.stdout.splitlines()[-3:]):
            assert size > 60e6
            assert grown < 2 * largest + 15e6 < 40e6
    finally:
        shutil.rmtree(tmp_path)


# ------------------------------------------------------------------------------------------------------------- LoRAs


def lora(module: str, a: str = "lora_A.weight", b: str = "lora_B.weight") -> dict[str, torch.Tensor]:
    return {f"{module}.{a}": torch.randn(2, 24).half(), f"{module}.{b}": torch.randn(24, 2)}


@pytest.mark.parametrize("write", [as_safetensors, as_pth, as_distributed])
def test_a_lora_keeps_its_tensors_and_their_dtypes(write, checkpoints, tmp_path, target):
    tensors = lora("net.blocks.0.self_attn.q") | {"net.blocks.0.self_attn.q.alpha": torch.tensor(16.0)}
    report = checkpoints.convert(write(tmp_path / "source", tensors), target)
    found = load_file(target)
    assert (report.kind, report.tensors, report.unknown) == ("LoRA", 3, ())
    assert found.keys() == {name.replace("net.", "diffusion_model.") for name in tensors}
    for name, tensor in tensors.items():
        arrived = found[name.replace("net.", "diffusion_model.")]
        assert arrived.dtype == tensor.dtype and torch.equal(arrived, tensor)


# -------------------------------------------------------------------------------------------------------- the node


def test_the_node_converts_inside_the_models_folder_and_names_the_file(comfy_host, pack, tiny_models, monkeypatch):
    import folder_paths

    node = pack.checkpoint.ConvertCheckpoint
    monkeypatch.setattr(folder_paths, "models_dir", str(comfy_host / "models"))
    source = tiny_models.write_lyra2(comfy_host / "models" / "lyra2" / "released.safetensors")
    report = node.execute("lyra2/released.safetensors", "converted").args[0]
    target = comfy_host / "models" / "diffusion_models" / "converted.safetensors"
    assert str(target) in report and load_file(target)["head.head.weight"].dtype == torch.bfloat16
    pair = {"net.blocks.0.cam_encoder.lora_A.weight": (2, 1536), "net.blocks.0.cam_encoder.lora_B.weight": (5120, 2)}
    save_file({name: torch.ones(shape) for name, shape in pair.items()}, source.with_name("dmd.safetensors"))
    # the host adds output/loras and such behind the folders of models
    paths, endings = folder_paths.folder_names_and_paths["loras"]
    elsewhere = ([*paths, str(comfy_host / "output" / "loras")], endings)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", elsewhere)
    report = node.execute("lyra2/dmd.safetensors", "dmd.safetensors").args[0]
    target = comfy_host / "models" / "loras" / "dmd.safetensors"
    assert f"wrote {target}" in report and not (comfy_host / "output" / "loras").exists()
    assert load_file(target).keys() == {name.replace("net.", "diffusion_model.") for name in pair}
    for outside in ("../elsewhere.safetensors", "/etc/passwd"):
        with pytest.raises(ValueError, match="no path inside"):
            node.execute(outside, "x")
        with pytest.raises(ValueError, match="no path inside"):
            node.execute("lyra2/released.safetensors", outside)
