"""Which kernel computes self-attention. No GPU here: whether cuDNN is faster is told, not measured."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.testing import assert_close


@pytest.fixture(scope="module")
def attention(comfy_host):
    return importlib.import_module("lyra_core.models.attention")


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = property(lambda self: True)


@pytest.fixture
def free(attention, monkeypatch):
    """A host that leaves the kernel to torch, and queries on a GPU that are worth a measurement."""
    monkeypatch.setattr(attention.host, "optimized_attention", attention.host.attention_pytorch)
    monkeypatch.setattr(attention, "WORTHWHILE", 16)
    return torch.randn(1, 8, 24, dtype=torch.bfloat16).as_subclass(OnGpu)


def test_any_kernel_of_torch_gives_the_hosts_numbers(attention):
    q, k, v = torch.randn(3, 2, 40, 24)
    ours = attention.by_cudnn(q, k, v, 3, SDPBackend.MATH)
    assert_close(ours, attention.host.attention_pytorch(q, k, v, heads=3), atol=1e-6, rtol=0)


def test_a_kernel_is_chosen_where_nobody_else_chose(attention, free, monkeypatch):
    assert attention._free_to_choose(free, {})
    assert not attention._free_to_choose(free, {"optimized_attention_override": print})
    assert not attention._free_to_choose(free.float(), {})
    assert not attention._free_to_choose(torch.randn(1, 8, 24, dtype=torch.bfloat16), {})  # on the processor
    assert not attention._free_to_choose(free[:, :3], {})  # too small to matter
    for chosen in ("attention_sage", "attention_flash", "attention_sub_quad"):
        monkeypatch.setattr(attention.host, "optimized_attention", getattr(attention.host, chosen))
        assert not attention._free_to_choose(free, {})


def test_what_is_being_trained_keeps_the_hosts_attention(attention, free):
    with torch.enable_grad():
        assert not attention._free_to_choose(free.float().requires_grad_().bfloat16(), {})
    assert attention._free_to_choose(free, {})


@pytest.mark.parametrize("faster", [True, False])
def test_cudnn_is_used_only_where_it_was_faster(attention, free, monkeypatch, faster):
    used = []
    monkeypatch.setattr(attention, "_cudnn_is_faster", lambda *asked: faster)
    monkeypatch.setattr(attention, "by_cudnn", lambda *given: used.append("cudnn"))
    monkeypatch.setattr(attention, "_free_to_choose", lambda *asked: True)
    monkeypatch.setattr(attention.host, "optimized_attention", lambda *given, **options: used.append("host"))
    attention.self_attention(free, free, free, 3, {})
    assert used == ["cudnn" if faster else "host"]


@pytest.mark.parametrize("ours, theirs, faster", [(52.0, 83.0, True), (90.0, 83.0, False), (None, 83.0, False)])
def test_a_card_is_measured_once_and_one_without_the_kernel_never_fails(attention, monkeypatch, ours, theirs, faster):
    asked = []

    def milliseconds(run):
        asked.append(run)
        if len(asked) == 1:
            return theirs
        if ours is None:
            raise RuntimeError("No available kernel. Aborting execution.")
        return ours

    monkeypatch.setattr(attention, "milliseconds", milliseconds)
    monkeypatch.setattr(attention, "_faster", {})
    q = torch.randn(1, 8, 24)
    assert attention._cudnn_is_faster(q, q, q, 3) is attention._cudnn_is_faster(q, q, q, 3) is faster
    assert len(asked) == 2
