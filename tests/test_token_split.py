"""A world on several GPUs, rehearsed: two processes on the CPU that share out the tokens say what one alone says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import conftest
import pytest
import torch

SIZE, NEW, CONFIG = (6, 10), 2, {"dim": 96}  # 99 tokens in all, so that the shares differ
# What the two are asked for, one after the other: the same, then what can't be shared out, and the same again.
ASKED = (
    ({}, {}),
    ({}, {"seed": 1}),
    ({}, {"batch": 1}),
    ({"heads": 3}, {"heads": 3}),
    ({"patched": True}, {"patched": True}),
    ({}, {}),
)

# Run as a process of its own: joins the other, says what the network makes of what it is asked for, and how many tokens it saw.
RANK = """
import json
from pathlib import Path
import sys
sys.path.append("{tests}")
import conftest, torch
import test_token_split as tests
conftest.load_tool("host").boot(Path("{folder}"))
from lyra_core.models import lyra2, token_split
seen = []
attend = token_split.attend_alone
token_split.attend_alone = lambda q, k, v, heads, options: seen.append((q.shape[1], heads)) or attend(q, k, v, heads, options)
block = lyra2.Lyra2Block.forward
lyra2.Lyra2Block.forward = lambda self, x, *args, **named: seen.append(x.shape[1]) or block(self, x, *args, **named)
assert token_split.join()
tiny_models, errors = conftest.load_tool("tiny_models"), []
for asked in tests.ASKED:
    try:
        out, error = tests.velocity(lyra2, tiny_models, **asked[{rank}]), ""
    except (ValueError, RuntimeError) as problem:
        error = str(problem)
    errors.append(error)
torch.save(out, "{folder}/{rank}.pt")
print(json.dumps({{"errors": errors, "seen": seen}}))
"""


def velocity(lyra2, tiny_models, seed: int = 0, batch: int = 2, heads: int = 4, patched: bool = False) -> torch.Tensor:
    """What a network of random weights makes of random inputs, which are the same in every process."""
    import comfy.ops

    config = {**tiny_models.TINY, **CONFIG, "num_heads": heads}
    network = lyra2.Lyra2Model(**config, device="cpu", dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    shapes = {key: tuple(weight.shape) for key, weight in network.state_dict().items()}
    network.load_state_dict(dict(tiny_models.random_weights(shapes, seed=1)))

    def random(*shape: int, place: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(100 * seed + place))

    history = lyra2.HistoryMaps(
        random(batch, 36, 8, *SIZE, place=1), random(batch, 384, 8 + NEW, *SIZE, place=2), random(batch, 768, 3 + NEW, *SIZE, place=3).tanh()
    )
    options = {"patches": {"double_block": [lambda args: args]}} if patched else {}
    with torch.no_grad():
        return network(
            x=random(batch, 36, NEW, *SIZE, place=4), timestep=torch.full((batch,), 500.0), context=random(batch, 11, 64, place=5),
            clip_fea=random(batch, 5, 1280, place=6), history=history, transformer_options=options,
        )  # fmt: skip


@pytest.fixture(scope="module")
def said(launcher, tmp_path_factory) -> list[dict]:
    """What two processes say to ASKED, and the last velocity of each."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**launcher.environment_variables(launcher.find_host()), "LYRA2_RANKS": "2", "OMP_NUM_THREADS": "1"}
    environment["LYRA2_MEETING"] = f"127.0.0.1:{launcher.free_port()}"
    scripts = [RANK.format(tests=conftest.PROJECT / "tests", folder=folder, rank=rank) for rank in range(2)]
    ranks = [
        subprocess.Popen([sys.executable, "-c", script], env={**environment, "LYRA2_RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank, script in enumerate(scripts)
    ]
    try:
        answers = [json.loads(rank.communicate(timeout=120)[0].splitlines()[-1]) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [{**answer, "velocity": torch.load(folder / f"{rank}.pt", weights_only=True)} for rank, answer in enumerate(answers)]


@pytest.fixture(scope="module")
def alone(comfy_host, tiny_models):
    from lyra_core.models import lyra2

    return velocity(lyra2, tiny_models)


def test_two_processes_that_share_the_tokens_say_what_one_says(said, alone):
    for rank in said:
        assert (rank["velocity"] - alone).abs().max() <= 1e-5 * alone.abs().max()
    blocks, attentions = ([entry for entry in said[0]["seen"] if isinstance(entry, kind)] for kind in (int, list))
    assert blocks == [50] * 4 and attentions == [[99, 2]] * 4, "the work was not shared"
    assert [entry for entry in said[1]["seen"] if isinstance(entry, int)] == [49] * 4


def test_what_cannot_be_shared_is_refused_by_both(said):
    for rank in said:
        first, seed, batch, heads, patched, last = rank["errors"]
        assert first == last == "" and "not at the same step" in seed and "not at the same step" in batch
        assert "3 heads can't be shared by 2 GPUs; take one of [1, 3]" in heads
        assert "another node patches the model's blocks (double_block)" in patched


def test_every_token_is_somebody_s(comfy_host):
    from lyra_core.models import token_split

    for length in range(1, 40):
        for ranks in range(1, 9):
            sizes = token_split.shares(length, ranks)
            assert sum(sizes) == length and len(sizes) == ranks and max(sizes) - min(sizes) <= 1


def test_one_gpu_has_nothing_of_it(comfy_host):
    from lyra_core.models import lyra2, token_split

    before = lyra2.Lyra2Model.run_blocks
    assert token_split.join({}) is False and not torch.distributed.is_initialized()
    assert lyra2.Lyra2Model.run_blocks is before and lyra2.GuidedSelfAttention.attend is token_split.attend_alone
    assert "LYRA2_RANK" not in os.environ


# ------------------------------------------------------------------------------------- the servers, without any of them


@pytest.fixture(scope="module")
def gpus(launcher):
    """tools/several_gpus.py as a module."""
    return conftest.load_tool("several_gpus")


def test_servers_meet_and_share_nothing_but_what_they_must(gpus, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    servers = [gpus.server_of(rank, 2, "127.0.0.1:7", tmp_path, tmp_path / "out", tmp_path, ()) for rank in range(2)]
    assert [server.variables["CUDA_VISIBLE_DEVICES"] for server in servers] == ["4", "6"]
    assert [server.variables["LYRA2_RANK"] for server in servers] == ["0", "1"]
    assert {server.variables["LYRA2_MEETING"] for server in servers} == {"127.0.0.1:7"}
    assert servers[0].extra == () and set(servers[1].extra[1::2]) == {str(tmp_path / "user1"), str(tmp_path / "temp1")}
    assert servers[0].log_path != servers[1].log_path and servers[0].output == servers[1].output
    with pytest.raises(gpus.launcher().WorkflowError, match="--gpus 3: this machine has 2"):
        gpus.card(0, 3)


def test_the_others_run_the_same_prompt_but_write_their_files_aside(gpus, monkeypatch):
    comfy, ran = gpus.launcher(), []
    prompt = {
        "1": {"class_type": "Lyra2Explore", "inputs": {"save_to": "worlds/a", "seed": 3}},
        "2": {"class_type": "SaveVideo", "inputs": {"filename_prefix": "lyra2/a", "fps": 16}},
        "3": {"class_type": "Lyra2ExportWorld", "inputs": {"folder": "exports/a"}},
        "4": {"class_type": "Lyra2LoadWorld", "inputs": {"folder": "worlds/a"}},
    }

    def prepared(server, workflow, settings, change, name):
        change(prompt)
        return prompt, []

    monkeypatch.setattr(comfy, "prepared", prepared)
    monkeypatch.setattr(comfy, "run_prompt", lambda server, found: ran.append(found))
    gpus.follow(None, {}, [], ".gpus-x/1", "walk.json")
    assert [node["inputs"] for node in ran[0].values()] == [
        {"save_to": "worlds/a", "seed": 3}, {"filename_prefix": ".gpus-x/1/lyra2/a", "fps": 16},
        {"folder": ".gpus-x/1/exports/a"}, {"folder": "worlds/a"},
    ]  # fmt: skip


def test_the_first_that_fails_is_heard_while_the_others_still_wait(gpus):
    over = threading.Event()

    def fails():
        raise ValueError("no memory")

    with ThreadPoolExecutor(2) as threads, pytest.raises(ValueError, match="no memory"):
        try:
            gpus.all_of([threads.submit(over.wait, 60), threads.submit(fails)])
        finally:
            assert not over.is_set()
            over.set()
