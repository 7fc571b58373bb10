"""Moments agree with float64 in any layout and at any offset."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import asr_kernels as ak
from tests.asr_kernels.expected import DTYPES, INTERPRETED, PROPERTY, assert_moments, assert_paired, generator


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


def test_a_storage_is_not_read_like_a_view_at_the_same_unaligned_address(backend, device):
    if device != "cpu":
        pytest.skip("PyTorch gives each storage on a GPU an aligned address")
    memory = np.arange(2 * 3 * 64 + 1, dtype=np.float32)
    view = torch.from_numpy(memory)[1:].view(2, 3, 64)
    whole = torch.from_numpy(memory[1:]).view(2, 3, 64)
    assert view.data_ptr() == whole.data_ptr()
    for x in (view, whole):
        torch.testing.assert_close(ak.channel_moments(x).mean, x.double().mean((0, 2)))


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
