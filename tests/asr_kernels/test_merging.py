"""Merged and running moments are those of all values together, in any order and on any device."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import asr_kernels as ak
from tests.asr_kernels.expected import DTYPES, PROPERTY, assert_moments, assert_paired, generator


@PROPERTY
@given(
    cuts=st.lists(st.integers(1, 8), max_size=3, unique=True),
    offset=st.sampled_from([0.0, 1.0, 1e3]),
    seed=st.integers(0, 99),
)
def test_merging_any_split_equals_the_whole(backend, device, cuts, offset, seed):
    x = torch.randn(9, 2, 5, 3, device=device, generator=generator(device, seed)).add_(offset)
    merged, running = ak.ChannelMoments.empty(2, device), ak.ChannelMoments.empty(2, device)
    paired, parts = None, []
    for part in x.tensor_split(sorted(cuts)):
        parts.append(ak.channel_moments(part))
        merged = merged.merge(parts[-1])
        assert running.update_(part) is running
        piece = ak.paired_moments(part, part)
        paired = piece if paired is None else paired.merge(piece)
    assert_moments(merged, x)
    assert_moments(running, x)
    assert_moments(ak.ChannelMoments.pool(parts), x)
    assert_paired(paired, x, x)


@PROPERTY
@given(data=st.data(), offset=st.sampled_from([0.0, 1e3]), seed=st.integers(0, 99))
def test_any_order_of_merging_equals_the_whole(backend, device, data, offset, seed):
    x = torch.randn(6, 2, 3, 5, device=device, generator=generator(device, seed)).add_(offset)
    y = x + torch.randn(x.shape, device=device, generator=generator(device, seed + 1))
    parts = [(ak.channel_moments(a), ak.paired_moments(a, b)) for a, b in zip(x.split(1), y.split(1), strict=True)]
    # merge two of the remaining parts, until one remains
    while len(parts) > 1:
        a = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
        b = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
        parts.append(tuple(one.merge(other) for one, other in zip(a, b, strict=True)))
    assert_moments(parts[0][0], x)
    assert_paired(parts[0][1], x, y)


def test_running_moments_of_other_channels_are_an_error(backend, device):
    with pytest.raises(ValueError, match="4 and of 3 channels"):
        ak.channel_moments(torch.zeros(2, 3, device=device), running=ak.ChannelMoments.empty(4, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_running_moments_of_any_dtype_are_converted_to_float64(backend, device, dtype):
    x = torch.randn(4, 3, 5, device=device, generator=generator(device))
    mean, m2 = torch.tensor([1.0, -2.0, 0.5], device=device), torch.tensor([4.0, 0.0, 3.0], device=device)
    wanted = ak.channel_moments(x, running=ak.ChannelMoments(7, mean.double(), m2.double()))
    found = ak.channel_moments(x, running=ak.ChannelMoments(7, mean.to(dtype), m2.to(dtype)))
    assert found.mean.dtype == found.m2.dtype == torch.float64
    assert torch.equal(found.mean, wanted.mean)
    assert torch.equal(found.m2, wanted.m2)


def test_running_and_merged_moments_are_moved_to_the_first_device():
    # "meta" acts as another device, without values
    here, there = ak.channel_moments(torch.randn(4, 3, 5)), torch.randn(4, 3, 5, device="meta")
    with ak.use_backend("reference"):
        found = [ak.channel_moments(there, running=here), ak.ChannelMoments.empty(3).update_(there)]
        found.append(found[0].merge(here))
        found += [ak.ChannelMoments.pool([found[0], here]), ak.ChannelMoments.empty(3, "meta").merge(here)]
        pair = ak.paired_moments(there, there)
    nearby = ak.paired_moments(*torch.randn(2, 4, 3, 5))
    nothing = ak.PairedMoments(*(ak.ChannelMoments.empty(3, "meta") for _ in range(2)), pair.comoment)
    for merged in (pair.merge(nearby), nothing.merge(nearby)):
        found += [merged.dense, merged.pruned]
        assert merged.comoment.device.type == "meta"
    for moments in found:
        assert moments.mean.device.type == moments.m2.device.type == "meta"
    assert here.mean.device.type == "cpu"


def test_merging_with_empty_moments_changes_nothing():
    m = ak.channel_moments(torch.randn(4, 3))
    nothing = ak.ChannelMoments.empty(3)
    for merged in (m.merge(nothing), nothing.merge(m)):
        assert merged.count == m.count
        assert torch.equal(merged.mean, m.mean)
        assert torch.equal(merged.m2, m.m2)
    for pooled in (ak.ChannelMoments.pool([m, nothing]), ak.ChannelMoments.pool([m])):
        assert pooled.count == m.count
        assert torch.equal(pooled.mean, m.mean)
        assert torch.equal(pooled.m2, m.m2)
    with pytest.raises(ValueError, match=r"\[3, 2\]"):
        ak.ChannelMoments.pool([m, ak.ChannelMoments.empty(2)])
    with pytest.raises(ValueError, match="cannot pool"):
        ak.ChannelMoments.pool([])
    assert nothing.merge(nothing).count == 0
    assert nothing.var.isnan().all()
    with pytest.raises(ValueError, match="3 and of 2 channels"):
        m.merge(ak.ChannelMoments.empty(2))
