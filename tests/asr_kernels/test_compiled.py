"""The operations inside torch.compile: one graph, the same results."""

from __future__ import annotations

import pytest
import torch

import asr_kernels as ak
from tests.asr_kernels.expected import generator


def compiled(function):
    """Traced, functionalised and run without code generation; a graph break is an error."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def test_repair_is_one_graph(backend, device):
    dense, x = (torch.randn(4, 3, 5, 5, device=device, generator=generator(device, seed)) for seed in (0, 1))
    target, y = ak.channel_moments(dense), x.clone()

    def repair(x):
        gain, shift, before = ak.repair_(x, target, rule="channelwise", relu=True)
        return x.sin(), gain, shift, before.var, before.merge(target).mean

    before = x._version
    found, wanted = compiled(repair)(x), repair(y)
    assert torch.equal(x, y)
    assert x._version > before
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_moments_are_one_graph(backend, device):
    x, y = (torch.randn(4, 3, 5, 5, device=device, generator=generator(device, seed)) for seed in (0, 1))

    def measure(x, y):
        pair = ak.paired_moments(x, y)
        running = ak.channel_moments(x.relu()).update_(y)
        return pair.corr, pair.dense.var, running.mean, running.m2

    for a, b in zip(compiled(measure)(x, y), measure(x, y), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_other_batch_sizes_cause_no_graph_break(backend, device):
    measure = compiled(lambda x: ak.channel_moments(x).var)
    for n in (2, 3, 5):
        x = torch.randn(n, 3, 4, 4, device=device)
        assert torch.equal(measure(x), ak.channel_moments(x).var)


@pytest.mark.parametrize("operator", ["channel_moments", "paired_moments", "affine_"])
def test_operators_pass_opcheck(operator, device):
    x, factor = torch.randn(4, 3, 5, device=device), torch.rand(3, device=device)
    arguments = {
        "channel_moments": (x, 1, 1e-6),
        "paired_moments": (x, x + 1, 1),
        "affine_": (x, factor, factor, 1, True),
    }
    torch.library.opcheck(getattr(torch.ops.asr_kernels, operator).default, arguments[operator])
