"""Which kernel computes attention. No GPU here: which is faster is told, not measured."""

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


def cpu_sums(q, k, v):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)


def test_any_kernel_of_torch_gives_the_hosts_numbers(attention):
    q, k, v = torch.randn(3, 2, 40, 24)
    ours = attention.by_cudnn(q, k, v, 3, SDPBackend.MATH)
    assert_close(ours, attention.host.attention_pytorch(q, k, v, heads=3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("loud", [0.1, 1.0, 10.0])  # even, as random, and nearly one key alone
@pytest.mark.parametrize("keys", [129, 300, 511])
def test_whole_tiles_and_the_rest_are_the_whole(attention, loud, keys):
    q, k, v = torch.randn(2, 40, 24), torch.randn(2, keys, 24), torch.randn(2, keys, 24)
    ours = attention.in_tiles(loud * q, k, v, 3, cpu_sums)
    assert_close(ours, attention.host.attention_pytorch(loud * q, k, v, heads=3), atol=1e-5, rtol=0)


def test_a_kernel_is_chosen_where_nobody_else_chose(attention, free, monkeypatch):
    assert attention.free_to_choose({"a": 1}, free) == {"a": 1, attention.OVERRIDE: attention.fastest}
    for options, tokens in (({attention.OVERRIDE: print}, free), ({"a": 1}, torch.randn(1, 8, 24))):
        assert attention.free_to_choose(options, tokens) is options
    for chosen in ("attention_sage", "attention_flash", "attention_sub_quad"):
        monkeypatch.setattr(attention.host, "optimized_attention", getattr(attention.host, chosen))
        assert attention.free_to_choose({}, free) == {}


def test_only_what_is_worth_a_choice_is_measured(attention, free):
    assert attention._worth_a_choice(free, free)
    assert not attention._worth_a_choice(free.float(), free)
    assert not attention._worth_a_choice(free[:, :3], free[:, :3])  # too small to matter
    with torch.enable_grad():  # what is being trained keeps the host's attention
        assert not attention._worth_a_choice(free.float().requires_grad_().bfloat16(), free)


@pytest.mark.parametrize("faster", [True, False])
def test_the_host_calls_our_choice_and_masks_keep_its_own(attention, free, monkeypatch, faster):
    used = []
    monkeypatch.setattr(attention, "_chosen", lambda *asked: lambda *given: used.append("ours"))
    monkeypatch.setattr(attention, "_worth_a_choice", lambda *asked: faster)
    options, q = {attention.OVERRIDE: attention.fastest}, torch.randn(1, 8, 24)
    for mask in (None, torch.ones(8, 8, dtype=torch.bool)):
        found = attention.host.attention_pytorch(q, q, q, heads=3, mask=mask, transformer_options=options)
        assert (found is None) == (faster and mask is None)
    assert used == ["ours"] * faster


@pytest.mark.parametrize(
    ("cudnn", "tiles", "fastest"),
    [(52.0, 47.0, "in_tiles"), (52.0, 55.0, "by_cudnn"), (90.0, 91.0, "by_host"), (None, None, "by_host"), (52.0, None, "by_cudnn")],
)
def test_a_card_is_measured_once_and_one_without_the_kernel_never_fails(attention, monkeypatch, cudnn, tiles, fastest):
    asked = []

    def milliseconds(run):
        asked.append(run)
        found = (83.0, cudnn, tiles)[len(asked) - 1]
        if found is None:
            raise RuntimeError("No available kernel. Aborting execution.")
        return found

    monkeypatch.setattr(attention.kernels, "milliseconds", milliseconds)
    monkeypatch.setattr(attention.kernels, "_fastest", {})
    q, k = torch.randn(1, 8, 24), torch.randn(1, 200, 24)
    assert attention._chosen(q, k, k, 3) is attention._chosen(q, k, k, 3) is getattr(attention, fastest)
    assert len(asked) == 3


def test_keys_that_fill_their_tiles_are_not_taken_apart(attention, monkeypatch):
    asked = []
    monkeypatch.setattr(attention.kernels, "milliseconds", lambda run: asked.append(run) or float(len(asked)))
    monkeypatch.setattr(attention.kernels, "_fastest", {})
    for length in (256, 100):
        k = torch.randn(1, length, 24)
        attention._chosen(k[:, :8], k, k, 3)
    assert len(asked) == 4
