"""affine_ works in place, is accurate to one rounding in any layout, and writes no memory outside the view."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import asr_kernels as ak
from tests.asr_kernels.expected import DTYPES, INTERPRETED, PROPERTY

BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


def along(factor: Tensor, x: Tensor, channel_dim: int = 1) -> Tensor:
    """The (C,) factor in float64, reshaped to broadcast over x."""
    shape = [1] * x.dim()
    shape[channel_dim] = -1
    return factor.double().view(shape)


def assert_affine(after: Tensor, before: Tensor, gain: Tensor, shift: Tensor, channel_dim: int, backend: str) -> None:
    """after = gain * before + shift, computed in float32 or float64 and rounded once to the dtype.

    The final rounding adds an error of half a unit in the last place. Where product and sum are not fused, each adds
    half a unit of the working precision. Triton's interpreter truncates float32 to bfloat16 (a GPU rounds): a whole
    unit.
    """
    product = along(gain, before, channel_dim) * before.double()
    expected = product + along(shift, before, channel_dim)
    working = torch.float64 if before.dtype == torch.float64 else torch.float32
    rounding = 1.0 if backend == "triton" and INTERPRETED and before.dtype == torch.bfloat16 else 0.5
    allowed = rounding * torch.finfo(before.dtype).eps * expected.abs()
    allowed += torch.finfo(working).eps * (product.abs() + expected.abs())
    assert ((after.double() - expected).abs() <= allowed + torch.finfo(before.dtype).smallest_normal).all()


def factors(channels: int, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Gains and shifts of both signs that half precision cannot represent."""
    gain = torch.linspace(-1.7, 3.3, channels, dtype=torch.float64, device=device)
    shift = torch.linspace(2.1, -0.3, channels, dtype=torch.float64, device=device)
    return gain.to(dtype), shift.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_affine_is_accurate_to_one_rounding_and_writes_nothing_else(backend, device, layout, dtype):
    x, memory = layout.place(dtype, device)
    before, memory_before = x.clone(), memory.clone()
    # factors are used in float64 for a float64 tensor, in float32 for any other
    working = torch.float64 if dtype == torch.float64 else torch.float32
    gain, shift = factors(x.shape[layout.channel_dim], device, working)
    assert ak.affine_(x, gain, shift, layout.channel_dim) is x
    assert_affine(x, before, gain, shift, layout.channel_dim, backend)
    # after restoring the view, all memory is as before to the bit, including the NaN around the view
    x.copy_(before)
    assert torch.equal(memory.view(BITS[dtype]), memory_before.view(BITS[dtype]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_identity_changes_no_bit(backend, device, dtype):
    x = torch.randn(3, 4, 7, 7, device=device).to(dtype)
    before = x.clone()
    ak.affine_(x, torch.ones(4), torch.zeros(4))
    assert torch.equal(x, before)


def test_gain_and_shift_of_any_dtype_and_layout(backend, device):
    x = torch.randn(3, 4, 5, device=device)
    before = x.clone()
    gain, shift = factors(4, device, torch.float64)
    ak.affine_(x, gain.repeat_interleave(2)[::2], shift.to("cpu", torch.float16).requires_grad_())
    assert_affine(x, before, gain, shift.half().double(), 1, backend)


def test_leaf_that_requires_grad_is_corrected(backend, device):
    x = torch.ones(2, 3, device=device, requires_grad=True)
    ak.affine_(x, torch.full((3,), 2.0), torch.ones(3))
    assert torch.equal(x, torch.full_like(x, 3.0))
    assert x.requires_grad


@pytest.mark.parametrize("relu", [False, True], ids=["affine", "relu"])
def test_version_increases_for_the_tensor_and_all_views_of_its_memory(backend, device, layout, relu):
    x, memory = layout.place(torch.float32, device)
    other = memory[:1]
    assert len({x._version, memory._version, other._version}) == 1
    before = x._version
    ak.affine_(x, *factors(x.shape[layout.channel_dim], device), layout.channel_dim, relu=relu)
    assert x._version > before
    assert x._version == memory._version == other._version


def test_version_increases_with_repair(backend, device):
    x = torch.randn(4, 3, 6, 6, device=device)
    target, before = ak.channel_moments(2 * x), x._version
    ak.repair_(x, target)
    assert x._version > before


def test_version_increases_in_inference_mode_if_the_tensor_has_one(backend, device):
    x = torch.ones(2, 3, device=device)
    with torch.inference_mode():
        ak.affine_(x, torch.full((3,), 2.0), torch.ones(3))
        unversioned = torch.ones(2, 3, device=device)
        ak.affine_(unversioned, torch.full((3,), 2.0), torch.ones(3))
    assert x._version == 1
    assert (x == 3).all()
    assert (unversioned == 3).all()


def test_backward_through_a_corrected_saved_value_is_an_error(backend, device):
    weight = torch.ones(2, 3, device=device, requires_grad=True)
    y = 2 * weight
    loss = y.sin().sum()  # autograd saves y, for cos(y)
    ak.affine_(y, torch.full((3,), 2.0), torch.ones(3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_relu_is_applied_after_the_correction(backend, device, layout, dtype):
    x, _ = layout.place(dtype, device)
    y = x.clone(memory_format=torch.preserve_format)
    gain, shift = factors(x.shape[layout.channel_dim], device)
    ak.affine_(x, gain, shift, layout.channel_dim, relu=True)
    ak.affine_(y, gain, shift, layout.channel_dim)
    assert torch.equal(x, y.relu())


def test_relu_keeps_a_nan(backend, device):
    x = torch.tensor([[torch.nan, -1.0, 2.0]], device=device)
    ak.affine_(x, torch.ones(3), torch.tensor([0.0, 0.0, torch.inf]), relu=True)
    assert x[0].isnan().tolist() == [True, False, False]
    assert x[0, 1:].tolist() == [0.0, torch.inf]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["planes", "rows"])
def test_nonfinite_value_stays_in_its_channel(backend, device, value, last):
    x = torch.randn(2, 5, 3, 3, device=device)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    x[1, 2] = value
    # gains of 0 and NaN, a shift of infinity
    gain = torch.tensor([1.5, torch.nan, 0.0, 2.0, 0.5], device=device)
    shift = torch.tensor([0.0, 1.0, 1.0, torch.inf, 1.0], device=device)
    before = x.clone()
    ak.affine_(x, gain, shift)
    assert x[:, 1].isnan().all()
    assert x[1, 2].isnan().all()
    assert (x[0, 2] == 1).all()
    assert (x[:, 3] == torch.inf).all()
    for c in (0, 4):
        assert_affine(x[:, c : c + 1], before[:, c : c + 1], gain[c : c + 1], shift[c : c + 1], 1, backend)


def test_memory_that_overlaps_itself_is_an_error(backend, device):
    x = torch.ones(2, 3, 1, device=device)
    for expanded in (x.expand(2, 3, 4), x[:1].expand(2, 3, 1), x[:, :1].expand(2, 3, 1)):
        with pytest.raises(ValueError, match="overlaps itself"):
            ak.affine_(expanded, torch.ones(3), torch.ones(3))
    assert (x == 1).all()


def test_bad_arguments_are_errors(backend, device):
    x = torch.ones(2, 3, 4, device=device)
    good = torch.ones(3)
    with pytest.raises(ValueError, match="gain has shape"):
        ak.affine_(x, torch.ones(4), good)
    with pytest.raises(ValueError, match="shift has shape"):
        ak.affine_(x, good, torch.ones(3, 1))
    with pytest.raises(ValueError, match="channel axis 3"):
        ak.affine_(x, good, good, channel_dim=3)
    with pytest.raises(TypeError, match="int64"):
        ak.affine_(x.long(), good, good)
    assert (x == 1).all()


def test_empty_tensor_is_unchanged(backend, device):
    x = torch.empty(0, 3, 4, device=device)
    assert ak.affine_(x, torch.ones(3), torch.ones(3)) is x
    assert x._version == 0


def test_offsets_beyond_2_to_the_31(backend, vast):
    before = vast.clone()
    gain, shift = factors(5, vast.device)
    ak.affine_(vast, gain, shift)
    assert_affine(vast, before, gain, shift, 1, backend)


@PROPERTY
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    order=st.permutations(range(4)),
    dtype=st.sampled_from(DTYPES),
)
def test_result_is_bit_identical_in_any_layout(backend, device, shape, order, dtype):
    x = torch.randn(shape, device=device, generator=torch.Generator(device).manual_seed(0)).to(dtype)
    y = x.permute(order).contiguous().permute([order.index(d) for d in range(4)])
    gain, shift = factors(shape[1], device)
    ak.affine_(x, gain, shift)
    ak.affine_(y, gain, shift)
    assert torch.equal(x, y)


@pytest.mark.parametrize("last", [False, True], ids=["planes", "rows"])
def test_repair_restores_the_dense_moments(backend, device, last):
    dense = torch.randn(4, 3, 6, 6, device=device).mul_(2).add_(5)
    x = torch.randn(4, 3, 6, 6, device=device)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    before, target = x.clone(), ak.channel_moments(dense)
    gain, shift, pruned = ak.repair_(x, target, rule="channelwise")
    assert_affine(x, before, gain, shift, 1, backend)
    assert torch.equal(pruned.m2, ak.channel_moments(before).m2)
    after = ak.channel_moments(x)
    # gain, shift and results are rounded to float32, a few times: an error of 2^-24 of values up to about 12. Relative
    # to the deviation of 2 each rounding is 4e-7, and twice that in the variance. The rule's eps adds 1e-8
    torch.testing.assert_close(after.mean, target.mean, rtol=0, atol=5e-6)
    torch.testing.assert_close(after.var, target.var, rtol=5e-6, atol=0)


def test_repair_that_fails_leaves_the_tensor_unchanged(backend, device):
    x = torch.randn(4, 3, 6, 6, device=device)
    before, target = x.clone(), ak.channel_moments(x)
    with pytest.raises(ValueError, match="unknown rule"):
        ak.repair_(x, target, rule="louder")
    with pytest.raises(ValueError, match="channels"):
        ak.repair_(x, ak.channel_moments(x[:, :2]))
    assert torch.equal(x, before)
