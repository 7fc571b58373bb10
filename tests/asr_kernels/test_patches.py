"""Patch moments agree with patches computed explicitly in float64, for every window, chunk size and merge."""

import math
from functools import reduce

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import asr_kernels.patches
from asr_kernels import PatchMoments, PatchSums, Window, cross_products, patch_moments
from asr_kernels.backends import torch_patches, whole_patches

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def window(kernel, stride=1, padding=0, dilation=1, groups=1, mode="constant"):
    spread = [value if isinstance(value, tuple) else (value,) * len(kernel) for value in (stride, padding, dilation)]
    return Window(kernel, spread[0], tuple((p, p) for p in spread[1]), spread[2], groups, mode)


def patches(x, found):
    """(G, K, patches) in float64, by a convolution with one filter per value of a patch."""
    if not found.kernel:
        return x.double().reshape(1, -1, x.shape[-1]).mT
    C, dims = x.shape[1] // found.groups, len(found.kernel)
    K = C * math.prod(found.kernel)
    filters = torch.eye(K, dtype=torch.float64).view(K, C, *found.kernel).repeat(found.groups, *[1] * (dims + 1))
    padded = F.pad(x.double(), [p for pair in reversed(found.padding) for p in pair], found.mode)
    y = CONV[dims](padded, filters, stride=found.stride, dilation=found.dilation, groups=found.groups)
    return y.transpose(0, 1).reshape(found.groups, K, -1)


def reference(x, y, found):
    u = patches(x, found)
    wanted = y.double().reshape(-1, y.shape[-1]).mT if not found.kernel else y.double().transpose(0, 1).flatten(1)
    v = wanted.reshape(found.groups, -1, u.shape[-1])
    a, b = (t - t.mean(-1, keepdim=True) for t in (u, v))
    return PatchMoments(u.shape[-1], u.mean(-1), v.mean(-1), a @ a.mT, a @ b.mT, b.square().sum(-1))


def assert_near(found, expected, tolerance=2e-6):
    """Compare to `tolerance` relative to the deviations (means) or to products of deviations (second moments)."""
    x, y = (expected.xx.diagonal(dim1=1, dim2=2).clamp(min=1e-30).sqrt(), expected.yy.clamp(min=1e-30).sqrt())
    assert found.count == expected.count
    spread = math.sqrt(max(expected.count, 1))
    for a, b, scale in (
        (found.mean, expected.mean, x.amax(1, keepdim=True) / spread),
        (found.target, expected.target, y.amax(1, keepdim=True) / spread),
        (found.xx, expected.xx, x.amax() ** 2),
        (found.xy, expected.xy, x.amax() * y.amax()),
        (found.yy, expected.yy, y.amax() ** 2),
    ):
        assert a.dtype == torch.float64
        assert ((a - b).abs() <= tolerance * scale).all()


WINDOWS = {
    "3x3": ((9, 7), window((3, 3), 1, 1)),
    "3x3 unpadded": ((9, 7), window((3, 3))),
    "3x3 stride 2": ((9, 8), window((3, 3), 2, 1)),
    "3x3 stride 3": ((11, 8), window((3, 3), 3, 1)),
    "3x3 dilated": ((11, 9), window((3, 3), 1, 2, 2)),
    "3x3 dilated by its stride": ((13, 9), window((3, 3), 2, 2, 2)),
    "5x3 stride (2, 1)": ((12, 7), window((5, 3), (2, 1), (2, 0))),
    "7x7 stride 2": ((15, 14), window((7, 7), 2, 3)),
    "1x1": ((5, 7), window((1, 1))),
    "1x1 stride 2": ((5, 7), window((1, 1), 2)),
    "grouped": ((7, 7), window((3, 3), 1, 1, groups=2)),
    "depthwise": ((7, 7), window((3, 3), 1, 1, groups=6)),
    "uneven padding": ((6, 6), Window((2, 2), (1, 1), ((0, 1), (1, 0)), (1, 1))),
    "reflected": ((7, 7), window((3, 3), 1, 1, mode="reflect")),
    "one row": ((1, 7), window((3, 3), 1, 1)),
    "one pixel": ((1, 1), window((3, 3), 1, 1)),
    "1d": ((23,), window((5,), 2, 2)),
    "3d": ((6, 5, 7), window((3, 2, 3), (1, 1, 2), (1, 0, 1))),
    "linear": ((), Window()),
}


def case(name, count=5, dtype=torch.float32, offset=0.0, seed=0):
    sizes, found = WINDOWS[name]
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.5, 3, 6).view(1, 6, *[1] * len(sizes))
    x = ((torch.randn(count, 6, *sizes, generator=generator) + 1 + offset) * scale).to(dtype)
    out = found.output(sizes) if found.kernel else ()
    return x, torch.randn(count, 4 * found.groups, *out, generator=generator).to(dtype) + 2, found


@pytest.fixture(params=[torch_patches, whole_patches], ids=["by rows", "whole"])
def products(request, monkeypatch):
    """How the products are computed: as on a CPU, or as on a GPU, in pieces of few patches."""
    monkeypatch.setattr(asr_kernels.patches, "backend_for", lambda x, part: request.param)
    monkeypatch.setattr(whole_patches, "PIECE", 50)
    return request.param


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", WINDOWS)
def test_every_window_agrees_with_explicit_patches(name, dtype):
    x, y, found = case(name, dtype=dtype)
    assert_near(patch_moments(x, y, found), reference(x, y, found))


@pytest.mark.parametrize("name", ["3x3", "3x3 stride 2", "1x1", "grouped", "linear"])
def test_the_products_of_many_rows_are_computed_by_blocks_and_once(name, monkeypatch):
    x, y, found = case(name)
    monkeypatch.setattr(torch_patches, "BLOCK", 4)
    by_blocks = patch_moments(x, y, found)
    assert_near(by_blocks, reference(x, y, found))
    if math.prod(found.kernel) == 1:
        xx = by_blocks.xx[0]
        assert torch.equal(xx[4:, :4], xx[:4, 4:].mT)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("name", ["3x3", "3x3 stride 2", "linear"])
def test_a_mean_of_a_thousand_deviations_costs_no_precision(name):
    x, y, found = case(name, offset=1000.0)
    # no padding: its zeros would make the deviations as large as the mean
    found = window(found.kernel, found.stride) if found.kernel else found
    y = y[:, :, : found.output(x.shape[2:])[0], : found.output(x.shape[2:])[1]] if found.kernel else y
    assert_near(patch_moments(x, y, found), reference(x, y, found), tolerance=1e-4)


@pytest.mark.usefixtures("products")
def test_channels_last_gives_the_same():
    x, y, found = case("3x3")
    last = [t.to(memory_format=torch.channels_last) for t in (x, y)]
    assert_near(patch_moments(*last, found), reference(x, y, found))


@given(name=st.sampled_from(sorted(WINDOWS)), cuts=st.lists(st.integers(1, 6), max_size=3), budget=st.integers(1, 9000))
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_split_into_batches_chunks_and_folds_gives_the_same(name, cuts, budget, products):
    x, y, found = case(name, count=7)
    at = sorted(set(cuts))
    sums, start = PatchSums(found, budget=budget), 0
    for a, b in zip(x.tensor_split(at), y.tensor_split(at), strict=True):
        numbers = torch.arange(start, start + len(a)) % 3
        sums.add(a, b, {fold: (numbers == fold).nonzero().flatten() for fold in numbers.unique().tolist()} or {0: None})
        start += len(a)
    by_fold = sums.moments()
    for fold, moments in by_fold.items():
        assert_near(moments, reference(x[fold::3], y[fold::3], found))
    assert_near(reduce(PatchMoments.merge, by_fold.values()), reference(x, y, found))


@pytest.mark.parametrize("name", ["3x3", "grouped", "linear"])
def test_without_some_patches_are_the_others(name):
    x, y, found = case(name, count=7, offset=3.0)
    first, rest = (patch_moments(x[part], y[part], found) for part in (slice(3), slice(3, None)))
    assert_near(first.merge(rest).without(rest), first, tolerance=1e-9)
    nothing = rest.without(rest)
    assert nothing.count == 0
    assert not nothing.xx.any()
    assert not nothing.xy.any()
    assert not nothing.yy.any()
    assert first.merge(nothing) is first
    assert first.without(nothing) is first


@pytest.mark.usefixtures("products")
def test_a_nan_stays_in_the_rows_and_columns_of_its_channel():
    x, y, found = case("3x3")
    x[0, 2, 3, 3] = torch.nan
    y[1, 1, 2, 2] = torch.inf
    moments = patch_moments(x, y, found)
    bad_x, bad_y = torch.arange(6 * 9) // 9 == 2, torch.arange(4) == 1
    assert torch.equal(moments.xx[0].isfinite(), ~(bad_x[:, None] | bad_x))
    assert torch.equal(moments.xy[0].isfinite(), ~(bad_x[:, None] | bad_y))
    assert torch.equal(moments.mean[0].isfinite(), ~bad_x)
    assert torch.equal(moments.yy[0].isfinite(), ~bad_y)


class TensorCores(TorchFunctionMode):
    """Rounds the float32 factors of each product of matrices to TF32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.matmul, torch.Tensor.baddbmm_) and args[-1].dtype == torch.float32:
            args = *args[:-2], *(whole_patches.tf32_parts(each.contiguous())[0] for each in args[-2:])
        return func(*args, **(kwargs or {}))


def test_three_products_of_tf32_parts_are_accurate_to_1e_5_and_one_is_not(monkeypatch):
    x, y, found = case("3x3 unpadded", count=4)
    expected = reference(x, y, found)
    for module, good in ((whole_patches, True), (torch_patches, False)):
        monkeypatch.setattr(asr_kernels.patches, "backend_for", lambda x, part, module=module: module)
        with TensorCores():
            moments = patch_moments(x, y, found)
        for name in ("xx", "xy"):
            one, other = getattr(moments, name), getattr(expected, name)
            error = (one - other).abs().max() / expected.xx.abs().max()
            assert (error < 1e-6) == (error < 1e-5) == good


def test_the_parts_of_a_value_are_in_tf32_and_add_up_to_it():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-20, 20).repeat(25)
    high, low = whole_patches.tf32_parts(x)
    assert not (high.view(torch.int32) & whole_patches.LOW_BITS).any()
    assert torch.equal(high + low, x)
    assert (low.abs() <= 2.0**-11 * high.abs()).all()
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])
    high, low = whole_patches.tf32_parts(odd)
    assert torch.equal(high[:2], odd[:2])
    assert not low[:3].isfinite().any()
    assert high[3] == low[3] == 0


def test_inputs_and_outputs_of_other_shapes_are_errors():
    x, y, found = case("3x3 stride 2")
    with pytest.raises(ValueError, match="do not belong together"):
        patch_moments(x, y[:, :, 1:], found)
    with pytest.raises(ValueError, match="do not belong together"):
        patch_moments(x[1:], y, found)


def test_no_copy_of_the_input_is_larger_than_the_budget(monkeypatch):
    x, y, found = case("3x3", count=40)
    sizes, original = [], F.pad
    monkeypatch.setattr(F, "pad", lambda t, *rest: (sizes.append(3 * original(t, *rest).nbytes), original(t, *rest))[1])
    patch_moments(x, y, found, budget=20_000)
    assert len(sizes) > 1
    assert max(sizes) <= 20_000


def test_squares_of_nearly_constant_outputs_are_not_negative():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(256, generator=generator)
    y = values.view(1, -1, 1, 1) + 1e-9 * torch.randn(105, 256, 9, 9, generator=generator)
    x = torch.randn(105, 1, 9, 9, generator=generator)
    found = patch_moments(x, y, Window((1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1)))
    assert (found.yy >= 0).all()


@pytest.mark.parametrize("sums", ["torch_patches", "whole_patches"])
def test_a_fold_without_images_adds_nothing(sums, monkeypatch):
    monkeypatch.setattr(asr_kernels.patches, "backend_for", lambda *_: globals()[sums])
    x, y = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    found = PatchSums(Window())
    found.add(x, y, {0: torch.arange(6), 1: torch.empty(0, dtype=torch.int64)})
    moments = found.moments()
    assert (moments[0].count, moments[1].count) == (6, 0)
    assert_near(moments[0].merge(moments[1]), reference(x, y, Window()))


def test_cross_products_take_outputs_in_any_layout_and_refuse_other_shapes():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(4, 7, 5, generator=generator), torch.randn(4, 3, 7, generator=generator).mT
    mean, target = torch.zeros(1, 5, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)
    found = cross_products(x, y, Window(), mean, target)
    expected = x.double().flatten(0, 1).mT @ y.double().flatten(0, 1)
    torch.testing.assert_close(found.xy[0], expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="do not belong together"):
        cross_products(x, y[:3], Window(), mean, target)
