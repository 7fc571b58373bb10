"""Moments agree with float64 in any layout, at any offset and for any split of the data."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import asr_kernels as ak

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# the interpreter takes about 10 ms per program of a kernel
PROPERTY = settings(
    max_examples=6 if INTERPRETED else 30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def exact(x: Tensor, channel_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations of the values of x, in float64, in two passes."""
    x = x.double().movedim(channel_dim, 0).reshape(x.shape[channel_dim], -1)
    mean = x.mean(1)
    return mean, (x - mean[:, None]).square().sum(1)


def tolerance(dtype: torch.dtype) -> float:
    """Relative error that is allowed in a variance.

    Below float64 the sums are float32 (unit roundoff 6e-8), added in trees or in short pieces, and the squares are
    rounded too: an error of a few units, and up to two bits more where the torch backend accepts plain sums at a small
    mean. The promise is 1e-6. In float64 the same steps have a roundoff of 1.1e-16; 1e-13 allows plain running sums.
    """
    return 1e-13 if dtype == torch.float64 else 1e-6


def assert_moments(moments: ak.ChannelMoments, x: Tensor, channel_dim: int = 1, rtol: float | None = None) -> None:
    """Compare with the moments of x: `rtol` relative to the variance, and for the mean relative to the deviation."""
    rtol = tolerance(x.dtype) if rtol is None else rtol
    mean, m2 = exact(x, channel_dim)
    assert moments.count == x.numel() // x.shape[channel_dim]
    assert moments.mean.dtype == moments.m2.dtype == torch.float64
    assert moments.mean.shape == moments.m2.shape == (x.shape[channel_dim],)
    assert moments.mean.device == x.device
    # for a constant channel: 4 roundings of float64
    floor = 2**-51 * mean.abs()
    assert ((moments.mean - mean).abs() <= rtol * (m2 / moments.count).sqrt() + floor).all()
    assert ((moments.m2 - m2).abs() <= rtol * m2 + moments.count * floor**2).all()
    assert (moments.m2 >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moments_agree_with_float64(backend, device, layout, dtype):
    x, _ = layout.place(dtype, device)
    assert_moments(ak.channel_moments(x, layout.channel_dim), x, layout.channel_dim)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_paired_moments_agree_with_float64(backend, device, layout, dtype):
    dense, _ = layout.place(dtype, device)
    # half the dense values plus noise: correlated, but not a copy
    noise = torch.randn(dense.shape, generator=torch.Generator().manual_seed(1)).to(device)
    pruned = layout.place(dtype, device)[0].mul_(0.5).add_(noise)
    assert_paired(ak.paired_moments(dense, pruned, layout.channel_dim), dense, pruned, layout.channel_dim)


@pytest.mark.parametrize("dense_last", [False, True], ids=["dense contiguous", "dense channels_last"])
def test_paired_tensors_may_differ_in_layout(backend, device, dense_last):
    dense = torch.randn(3, 4, 5, 6, device=device)
    pruned = torch.randn(3, 4, 5, 6, device=device) + dense
    if dense_last:
        dense = dense.contiguous(memory_format=torch.channels_last)
    else:
        pruned = pruned.contiguous(memory_format=torch.channels_last)
    assert_paired(ak.paired_moments(dense, pruned), dense, pruned)


def assert_paired(paired: ak.PairedMoments, dense: Tensor, pruned: Tensor, channel_dim: int = 1) -> None:
    assert_moments(paired.dense, dense, channel_dim)
    assert_moments(paired.pruned, pruned, channel_dim)
    count = paired.dense.count
    d, p = (x.double().movedim(channel_dim, 0).reshape(x.shape[channel_dim], -1) for x in (dense, pruned))
    cov = ((d - d.mean(1, keepdim=True)) * (p - p.mean(1, keepdim=True))).mean(1)
    # Cauchy-Schwarz: the rounding of the products is at most that of the squares
    scale = (exact(dense, channel_dim)[1] * exact(pruned, channel_dim)[1]).sqrt() / count
    assert ((paired.cov - cov).abs() <= tolerance(dense.dtype) * scale + 2**-100).all()
    assert ((paired.corr - torch.where(scale > 0, cov / scale, 0.0)).abs() <= 4 * tolerance(dense.dtype)).all()


@pytest.mark.parametrize(
    ("ratio", "rtol"),
    # at 1e4 float32 stores the deviation of a value to 2^-24 * 1e4 = 6e-4; the sums must add no error of that order
    [(1, 1e-6), (1e2, 1e-6), (1e3, 1e-6), (1e4, 1e-4), (-1e4, 1e-4)],
    ids=lambda v: f"{v:g}",
)
@pytest.mark.parametrize("std", [1e-3, 1.0], ids=lambda v: f"std={v:g}")
@pytest.mark.parametrize("last", [False, True], ids=["planes", "rows"])
def test_variance_survives_a_mean_far_above_it(backend, device, ratio, rtol, std, last):
    x = torch.randn(2, 2, 35, 41, device=device, generator=generator(device)).mul_(std).add_(ratio * std)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    assert_moments(ak.channel_moments(x), x, rtol=rtol)


@pytest.mark.parametrize("last", [False, True], ids=["planes", "rows"])
def test_outliers_at_the_start_cost_little_precision(backend, device, last):
    # a shift by the first value would put 1e4^2 into every term: an error of 1e-4 in the variance. Added to the square
    # of an outlier, the other squares of its plane, about 1 each, may vanish in float32: 35 * 41 / 1e8 of the sum
    x = torch.randn(2, 2, 35, 41, device=device, generator=generator(device))
    x[0, :, 0, 0] = 1e4
    x[1, :, 0, 0] = -1e4
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    assert_moments(ak.channel_moments(x), x, rtol=1.5e-5)


@pytest.fixture(params=["usual blocks", "small blocks"])
def blocks(request, backend):
    """The usual and small block sizes; small ones for the Triton kernels only."""
    if request.param == "small blocks":
        if backend != "triton":
            pytest.skip("the other backends have no blocks")
        request.getfixturevalue("small_blocks")()
    return request.param


@pytest.mark.parametrize("channels", [8, 72, 75])
def test_results_of_rows_stay_within_their_memory(backend, device, channels, monkeypatch):
    # with a number of channels that the blocks do not divide, the results are followed by memory of another tensor
    memory = []

    def behind(*size, **options):
        size = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        memory.append(torch.full((size.numel() + 512,), 7.0, **options))
        return memory[-1][: size.numel()].view(size)

    x = torch.randn(6, channels, device=device, generator=generator(device))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", behind)
        found = ak.channel_moments(x)
    assert_moments(found, x)
    assert all((each[-512:] == 7).all() for each in memory)


@pytest.mark.parametrize("value", [0.0, 0.1, -3e4, 1e-7], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["planes", "rows"])
def test_constant_channel_has_no_variance(backend, device, blocks, value, last):
    # counts that are no powers of two: a mean that is off by one rounding would give a variance here
    x = torch.full((3, 2, 7, 11), value, device=device)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    m = ak.channel_moments(x)
    if backend == "triton":
        assert (m.mean == x[0, 0, 0, 0]).all()
        assert (m.m2 == 0).all()
    # in other backends the mean may be off by one rounding of the working precision
    assert (m.var <= (2**-23 * value) ** 2).all()


# NumPy warns about inf - inf in the interpreter
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("where", [(0, 2, 0, 0), (1, 2, 3, 4), (2, 2, 6, 6)], ids=["first", "middle", "last"])
@pytest.mark.parametrize("last", [False, True], ids=["planes", "rows"])
def test_nonfinite_value_stays_in_its_channel(backend, device, value, where, last):
    x = torch.randn(3, 4, 7, 7, device=device, generator=generator(device))
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    y = x.clone(memory_format=torch.preserve_format)
    y[where] = value
    others = [0, 1, 3]
    for m in (ak.channel_moments(y), ak.paired_moments(x, y).pruned):
        assert not m.mean[2].isfinite()
        assert not m.var[2].isfinite()
        assert_moments(ak.ChannelMoments(m.count, m.mean[others], m.m2[others]), x[:, others])


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (0,)], ids=str)
def test_empty_tensor_is_an_error(backend, device, shape):
    x = torch.empty(shape, device=device)
    channel_dim = min(1, x.dim() - 1)
    with pytest.raises(ValueError, match="empty"):
        ak.channel_moments(x, channel_dim)
    with pytest.raises(ValueError, match="empty"):
        ak.paired_moments(x, x, channel_dim)


def test_bad_arguments_are_errors(backend, device):
    x = torch.zeros(2, 3, 4, device=device)
    with pytest.raises(TypeError, match="int64"):
        ak.channel_moments(x.long())
    with pytest.raises(ValueError, match="channel axis 3"):
        ak.channel_moments(x, channel_dim=3)
    with pytest.raises(ValueError, match="one shape, dtype and device"):
        ak.paired_moments(x, x[:1])
    with pytest.raises(ValueError, match="one shape, dtype and device"):
        ak.paired_moments(x, x.double())


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the kernels can run in this process")
def test_triton_backend_without_a_gpu_is_a_clear_error():
    pytest.importorskip("triton")
    with ak.use_backend("triton"), pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        ak.channel_moments(torch.zeros(2, 3))


def test_offsets_beyond_2_to_the_31(backend, vast):
    m = ak.channel_moments(vast)
    assert_moments(m, vast)
    assert_paired(ak.paired_moments(vast, vast), vast, vast)


def test_expanded_tensor_counts_repeated_values(backend, device):
    x = torch.randn(2, 3, 1, device=device, generator=generator(device)).expand(2, 3, 50)
    assert_moments(ak.channel_moments(x), x)
    assert_paired(ak.paired_moments(x, x.contiguous()), x, x)


@pytest.mark.parametrize("last", [False, True], ids=["planes", "rows"])
@pytest.mark.parametrize("shape", [(7, 2, 3, 5), (2, 3, 11, 13), (1, 2, 1, 131), (2, 2, 19, 27)], ids=str)
def test_many_pieces_of_many_tiles(backend, device, blocks, shape, last):
    x = torch.randn(shape, device=device, generator=generator(device)).add_(100)
    y = x + torch.randn(shape, device=device, generator=generator(device, 1))
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    assert_moments(ak.channel_moments(x), x)
    assert_paired(ak.paired_moments(x, y), x, y)


@pytest.mark.parametrize("last", [False, True], ids=["planes", "rows"])
def test_rerun_is_bit_identical(backend, device, blocks, last):
    x = torch.randn(3, 2, 7, 11, device=device, generator=generator(device))
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    first, second = (ak.paired_moments(x, x) for _ in range(2))
    assert torch.equal(first.dense.mean, second.dense.mean)
    assert torch.equal(first.dense.m2, second.dense.m2)
    assert torch.equal(first.comoment, second.comoment)
    assert torch.equal(ak.channel_moments(x).m2, ak.channel_moments(x).m2)


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


@PROPERTY
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    order=st.permutations(range(4)),
    seed=st.integers(0, 99),
)
def test_moments_agree_in_any_order_of_axes_in_memory(backend, device, shape, order, seed):
    x = torch.randn(shape, device=device, generator=generator(device, seed))
    # the same values, with the axes in another order in memory
    y = x.permute(order).contiguous().permute([order.index(d) for d in range(4)])
    assert torch.equal(x, y)
    assert_moments(ak.channel_moments(y), x)
    assert_paired(ak.paired_moments(x, y), x, y)


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


def generator(device: str, seed: int = 0) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)
