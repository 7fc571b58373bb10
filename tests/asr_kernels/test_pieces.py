"""How tensors are divided among the programs of the moments kernels: enough programs, small partials, wide offsets."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")

import asr_kernels as ak
from asr_kernels.backends.triton_affine import plan_affine
from asr_kernels.backends.triton_factors import plan_factors
from asr_kernels.backends.triton_moments import plan_moments
from asr_kernels.backends.triton_pieces import _reciprocal, pieces_of
from asr_kernels.views import as_ncl

SHAPES = [(64, 64, 12544), (64, 256, 3136), (64, 512, 784), (64, 1024, 196), (64, 2048, 49), (32, 2048, 49)]
SHAPES += [(256, c, l) for _, c, l in SHAPES[:5]] + [(20, 6, 65536), (4, 128, 1 << 20)]


def view(shape: tuple[int, int, int], last: bool, dtype: torch.dtype) -> torch.Tensor:
    """An (N, C, L) view on the meta device, as `views.as_ncl` makes it: (1, C, N * L) in channels_last."""
    n, c, l = shape
    if last:
        return torch.empty_strided((1, c, n * l), (n * c * l, 1, c), dtype=dtype, device="meta")
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("last", [False, True], ids=["planes", "rows"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_partial_moments_are_small_and_programs_fill_the_device(shape, last, dtype):
    x = view(shape, last, dtype)
    for views in ([x], [x, x]):
        launch = plan_moments(*views)[0][0]
        total = sum(each.nbytes for each in views)
        assert launch.arguments["partials_ptr"].nbytes <= total / 20
        # 24 KB for each of 132 multiprocessors, or all of a tensor that is smaller than twelve times that
        assert launch.grid[0] * launch.threads * 64 >= min(132 * 24 * 1024, total / 12)


@pytest.mark.parametrize("length", [2, 3, 5, 7, 98, 99, 1567, 1568, 2**16, 2**16 + 1, 2**30 - 1, 2**31 - 1])
def test_multiplication_by_the_reciprocal_is_the_division(length):
    magic, bits = _reciprocal(length)
    assert 2**31 <= magic < 2**32
    for multiple in {1, 2, 3, (2**31 - 1) // length // 2, (2**31 - 1) // length}:
        for v in (multiple * length - 1, multiple * length, multiple * length + 1):
            if 0 <= v < 2**31:
                assert (v * magic >> 32) >> bits == v // length


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((5, 5, 5), (2**29 + 1, 5, 1)),
        ((5, 5, 5), (5, 1, 2**29 + 1)),
        ((2, 3, 2**31), (3 * 2**32, 2**32, 2)),
    ],
    ids=["images", "rows", "positions"],
)
def test_offsets_have_64_bits_where_32_do_not_suffice(shape, strides):
    assert pieces_of(shape, (strides,), (0,), 2).arguments["INDEX"].name == "int64"
    near = tuple(min(stride, 1000) for stride in strides)
    assert pieces_of((5, 5, 5), (near,), (0,), 2).arguments["INDEX"].name == "int32"


def test_planes_that_start_in_different_lanes_are_read_value_by_value():
    contiguous, shifted = (3 * 49, 49, 1), (3 * 50, 49, 1)
    assert pieces_of((8, 8, 49), ((8 * 49, 49, 1),), (3,), 2).arguments["EDGES"]
    for strides, starts in (
        ((contiguous,), (0,)),  # by image
        (((8 * 49, 49, 1), (8 * 49, 49, 1)), (0, 1)),  # in two tensors
        (((8 * 49, 49, 1),), (-1,)),  # no aligned address
        ((shifted,), (0,)),
    ):
        arguments = pieces_of((8, 8 if len(starts) > 1 or starts[0] else 3, 49), strides, starts, 2).arguments
        assert (arguments["EDGES"], arguments["VEC"]) == (False, 1)


RESNET50 = [(64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28), (256, 28), (256, 14), (1024, 14)]
RESNET50 += [(512, 14), (512, 7), (2048, 7)]


def variant(launch):
    """What Triton compiles a kernel for."""
    found = [launch.kernel, launch.threads, launch.registers]
    for parameter in launch.kernel.params:
        value, special = launch.arguments[parameter.name], not parameter.do_not_specialize
        if isinstance(value, torch.Tensor):
            found.append(value.dtype)
        elif parameter.is_constexpr or value is None or (special and value == 1):
            found.append(str(value))
        else:
            found.append((parameter.annotation_type or value < 2**31, special and value % 16 == 0))
    return tuple(found)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton's interpreter compiles no kernels")
@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("images", [64, 37])
def test_a_walk_through_a_resnet50_compiles_at_most_ten_kernels(images, dtype, last):
    found = set()
    for channels, size in RESNET50:
        x = torch.empty(images, channels, size, size, dtype=dtype, device="meta")
        x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        (x,) = as_ncl(x, channel_dim=1)
        moments, factor = ak.ChannelMoments.empty(channels, "meta"), torch.empty(channels, device="meta")
        launches = [*plan_moments(x)[0], *plan_moments(x, running=moments)[0], plan_affine(x, factor, factor)]
        launches.append(plan_factors(moments, moments, "asr", "median", True, 1e-8)[0])
        found |= {variant(launch) for launch in launches}
    assert len(found) <= 10
