"""The Triton kernel for products of patches agrees with float64 and reads its inputs in place, in every layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import asr_kernels as ak
from asr_kernels import patch_moments
from tests.asr_kernels.test_patches import WINDOWS, assert_near, case, reference, window
from tests.conftest import INTERPRETED

triton, tl = (pytest.importorskip(f"triton{name}") for name in ("", ".language"))
patches = pytest.importorskip("asr_kernels.backends.triton_patches")
products = pytest.importorskip("asr_kernels.backends.triton_products")
tile_of = products.tile_of
pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="kernels need a GPU, or Triton's interpreter"
)
PLAIN = window((3, 3))


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    """The Triton backend; in the interpreter, which takes as long for a small tile, one tile for all patches."""
    if INTERPRETED:
        monkeypatch.setattr(products, "TILE_M", 512)
        monkeypatch.setattr(products, "FEWEST_PATCHES", 512)
    with ak.use_backend("triton"):
        yield


@pytest.fixture
def small_tiles(monkeypatch):
    """Many tiles, many pieces of few patches, several steps in each, all of them cut."""
    for name, value in {"TILE_K": 16, "TILE_M": 32, "FEWEST_PATCHES": 8, "MOST_PATCHES": 60, "PROGRAMS": 6}.items():
        monkeypatch.setattr(products, name, value)


def outputs(x: Tensor, found: ak.Window, channels: int = 3) -> Tensor:
    """Random outputs of a layer with this window, on the device of x, of its dtype."""
    shape = (len(x), channels * found.groups, *found.output(x.shape[2:]))
    return (torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 2).to(x.device, x.dtype)


def check(x: Tensor, y: Tensor, found: ak.Window, tolerance: float = 2e-6) -> ak.PatchMoments:
    moments = patch_moments(x, y, found)
    on_host = ak.PatchMoments(moments.count, *(t.cpu() for t in list(vars(moments).values())[1:]))
    assert_near(on_host, reference(x.cpu(), y.cpu(), found), tolerance)
    # the products are; subtracting the mean in float64 rounds
    assert (moments.xx - moments.xx.mT).abs().max() <= 1e-14 * moments.xx.abs().max()
    return moments


def without_copies(monkeypatch):
    """Make copies of patches an error."""
    monkeypatch.setattr(patches.torch_patches, "_columns", None)


# the interpreter takes seconds for these
SLOW = {"7x7 stride 2", "depthwise", "3x3 dilated"} if INTERPRETED else set()


@pytest.mark.parametrize("name", [name for name in WINDOWS if name not in {"3d", *SLOW}])
def test_every_window_agrees_with_explicit_patches(name, device, monkeypatch):
    without_copies(monkeypatch)
    x, y, found = case(name)
    check(x.to(device), y.to(device), found)


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        *[("NCHW", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)],
        *[("channels_last", dtype) for dtype in (torch.float32, torch.bfloat16)],
        ("with gaps", torch.float32),
    ],
    ids=str,
)
def test_every_layout_and_dtype_is_read_in_place(layout, dtype, device, monkeypatch):
    without_copies(monkeypatch)
    # NaN around the values: no read outside them has an effect
    memory = torch.full((5, 10, 8, 11), torch.nan, dtype=dtype, device=device)
    if layout == "channels_last":
        memory = memory.contiguous(memory_format=torch.channels_last)
    x = memory[1:4, 2:8, 1:6, 2:9] if layout != "with gaps" else memory[1:4, 2:8, 1:6, 1::2]
    x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) + 1)
    found = window((2, 3), (2, 1), 1, groups=2)
    check(x, outputs(x, found), found)


def test_many_tiles_and_pieces_give_the_same_bits_every_time(small_tiles, device, monkeypatch):
    # rows of 2 taps x 10 channels: two tiles; pieces of several images, the last of fewer
    x, found = torch.randn(3, 10, 7, 6, generator=torch.Generator().manual_seed(0)).to(device), window((2, 2))
    y = outputs(x, found)
    plan, launches = patches.plan_products, []
    monkeypatch.setattr(patches, "plan_products", lambda *a: launches.append(plan(*a)) or launches[-1])
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        # torch.empty then returns memory filled with NaN
        first = check(x, y, found)
        # one image: pieces of some of its rows
        check(x[:1], x[:1, :3], window((1, 1)))
    finally:
        torch.use_deterministic_algorithms(False)
    for name in ("tiles_b", "piece_n", "pieces_h"):
        assert max(launch.arguments[name] for launch, _ in launches) > 1
    # the interpreter runs one program after the other
    second = first if INTERPRETED else patch_moments(x, y, found)
    assert torch.equal(first.xx, second.xx)
    assert torch.equal(first.xy, second.xy)


@triton.jit
def numbers_kernel(found_ptr, tiles):
    """Row and column of each tile."""
    i_a, i_b = tile_of(tl.program_id(0), tiles)
    tl.store(found_ptr + 2 * tl.program_id(0), i_a)
    tl.store(found_ptr + 2 * tl.program_id(0) + 1, i_b)


@pytest.mark.parametrize("tiles", [1, 2, 3, 4, 7])
def test_tiles_cover_the_upper_triangle_once(tiles, device):
    wanted = [[i, j] for i in range(tiles) for j in range(i, tiles)]
    found = torch.zeros(len(wanted), 2, dtype=torch.int64, device=device)
    numbers_kernel[(len(wanted),)](found, tiles)
    assert sorted(found.tolist()) == wanted


def rounded(x: np.ndarray) -> np.ndarray:
    """float32 rounded to TF32: 10 bits after the leading one."""
    bits = x.astype(np.float32).view(np.uint32)
    return np.where(np.isfinite(x), ((bits + 0x1000) & 0xFFFFE000).view(np.float32), x)


def tensor_core_dot(terms: int):
    """`tl.dot` of the interpreter with the parts that "tf32x3" multiplies (3 products), or "tf32" (1)."""

    def dot(self, a, b, total, input_precision, _):
        from triton.runtime.interpreter import TensorHandle

        big_a, big_b = rounded(a.data), rounded(b.data)
        small_a, small_b = rounded(a.data - big_a), rounded(b.data - big_b)
        found = big_a @ big_b
        if terms == 3:
            found = (small_a @ big_b + big_a @ small_b) + found
        return TensorHandle(found + total.data, total.dtype.scalar)

    return dot


@pytest.mark.skipif(not INTERPRETED, reason="emulates tensor cores in the interpreter")
def test_three_tf32_products_are_accurate_to_1e_5_and_one_is_not(monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    x, _, found = case("3x3 unpadded", count=4)
    expected = reference(x, outputs(x, found), found)
    for terms, good in ((3, True), (1, False)):
        monkeypatch.setattr(InterpreterBuilder, "create_dot", tensor_core_dot(terms))
        error = (patch_moments(x, outputs(x, found), found).xx - expected.xx).abs().max() / expected.xx.abs().max()
        assert (error < 1e-6) == (error < 1e-5) == good


@pytest.mark.parametrize("ratio", [1e2, 1e3, 1e4])
def test_a_large_mean_costs_no_precision(ratio, device):
    x = torch.randn(4, 5, 7, 6, generator=torch.Generator().manual_seed(0)) + ratio
    y = outputs(x, PLAIN) + ratio
    check(x.to(device), y.to(device), PLAIN)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of the interpreter
def test_a_nan_stays_in_the_rows_and_columns_of_its_channel(device):
    x, _, found = case("3x3")
    x[0, 2, 3, 3] = torch.nan
    y = outputs(x, found)
    y[1, 1, 2, 2] = torch.inf
    moments = patch_moments(x.to(device), y.to(device), found)
    bad_x, bad_y = torch.arange(6 * 9) // 9 == 2, torch.arange(3) == 1
    assert torch.equal(moments.xx[0].isfinite().cpu(), ~(bad_x[:, None] | bad_x))
    assert torch.equal(moments.xy[0].isfinite().cpu(), ~(bad_x[:, None] | bad_y))
    assert torch.equal(moments.mean[0].isfinite().cpu(), ~bad_x)
    assert torch.equal(moments.yy[0].isfinite().cpu(), ~bad_y)


def test_no_images_have_no_moments(device):
    x, y, found = (t.to(device) if isinstance(t, Tensor) else t for t in case("1x1"))
    none, some = patch_moments(x[:0], y[:0], found), patch_moments(x, y, found)
    assert none.count == 0
    assert none.xx.shape == some.xx.shape
    assert none.merge(some) is some


def test_a_depthwise_layer_has_one_channel_in_each_group(device):
    x, found = torch.randn(2, 2, 5, 4, generator=torch.Generator().manual_seed(0)).to(device), window((2, 2), groups=2)
    check(x, outputs(x, found, 1), found)


def test_offsets_beyond_32_bits_are_right(vast):
    found = window((3,), 1, 1)
    y = outputs(vast.contiguous(), found)
    moments, expected = patch_moments(vast, y, found), reference(vast.cpu(), y.cpu(), found)
    # the order of few values: no tolerance but that of float32
    torch.testing.assert_close(moments.xx.cpu(), expected.xx, rtol=1e-5, atol=1e-5 * expected.xx.abs().max().item())


def test_float64_and_three_axes_are_left_to_pytorch(device):
    x, y, found = case("3d")
    check(x.to(device), y.to(device), found)
    x, y, found = case("3x3", dtype=torch.float64)
    check(x.to(device), y.to(device), found, tolerance=1e-12)


def test_the_layer_of_a_linear_network_is_a_window_of_one(device):
    x = torch.randn(70, 21, generator=torch.Generator().manual_seed(0)).to(device)
    y = F.pad(x[:, :4], (0, 1))
    check(x, y, ak.Window())
