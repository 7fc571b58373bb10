"""Per-channel affine map in Triton, in place on a strided (N, C, L) view, in the tiles of `triton_tiles`."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..views import ncl_parts
from .triton_launch import Launch, Plans, Repeated, on_device_of, signature
from .triton_tiles import SIZES, tiles_of

PLANS = Plans()


@triton.jit(do_not_specialize=[*SIZES, "fold", "stride_n"])
def affine_kernel(
    x_ptr,  # (N, C, L), any strides; read and written
    gain_ptr,  # (C / fold,), float32, or float64 for a float64 x
    shift_ptr,  # (C / fold,), dtype of gain
    N,
    C,  # in vectors of VEC_C
    L,  # in vectors of VEC_L
    stride_n,  # in vectors, as is the stride of C or L, whichever is not the vector's axis
    stride_c,
    stride_l,
    blocks,  # of channels
    tiles_l,  # tiles along L
    fold,  # entries of C per channel
    FOLDED: tl.constexpr,
    RELU: tl.constexpr,
    VEC_C: tl.constexpr,
    VEC_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """x <- gain * x + shift on one tile, fused in float32 (float64 for float64) and rounded once to the dtype of x.

    Programs go from the start of the tensor to its end: the moments were measured from its end, so the values at its
    start may still be in the L2 cache.
    """
    VEC: tl.constexpr = VEC_C * VEC_L
    # int64 before any product: offsets exceed 2^31. Divide before: a 64-bit division would be a function call
    i_p = tl.program_id(0)
    i_c, i_t = (i_p % blocks).to(tl.int64), i_p // blocks
    n_start, l_start = (i_t // tiles_l).to(tl.int64) * BLOCK_N, (i_t % tiles_l).to(tl.int64) * BLOCK_L

    # [BLOCK_C]
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C.to(tl.int64) * VEC_C
    if FOLDED:
        # unsigned 32 bits suffice: folding needs at least 16 images, and 16 images of 2^32 values exceed any memory
        o_g = (o_c.to(tl.uint32) // fold.to(tl.uint32)).to(tl.int64)
    else:
        o_g = o_c
    b_gain = tl.load(gain_ptr + o_g, mask=m_c, other=1.0)
    b_shift = tl.load(shift_ptr + o_g, mask=m_c, other=0.0)
    # [BLOCK_N * BLOCK_L] images and positions
    o_t = tl.arange(0, BLOCK_N * BLOCK_L)
    # compared in 32 bits: at full bandwidth there is time for a dozen instructions per value
    rest_n, rest_l = N - n_start, L.to(tl.int64) * VEC_L - l_start
    m_t = o_t % BLOCK_L < tl.where(rest_l < BLOCK_L, rest_l, BLOCK_L).to(tl.int32)
    if BLOCK_N > 1:
        m_t &= o_t // BLOCK_L < tl.where(rest_n < BLOCK_N, rest_n, BLOCK_N).to(tl.int32)
    o_n, o_l = n_start + o_t // BLOCK_L, l_start + o_t % BLOCK_L

    # [BLOCK_C, BLOCK_N * BLOCK_L]
    p_x = x_ptr + (o_c * stride_c * VEC_L)[:, None] + (o_n * stride_n * VEC + o_l * stride_l * VEC_C)[None, :]
    m = m_c[:, None] & m_t[None, :]
    b_x = tl.fma(b_gain[:, None], tl.load(p_x, mask=m, other=0.0).to(b_gain.dtype), b_shift[:, None])
    if RELU:
        # where, not maximum: maximum would turn a NaN into 0
        b_x = tl.where(b_x < 0.0, 0.0, b_x)
    tl.store(p_x, b_x.to(x_ptr.dtype.element_ty), mask=m)


def plan_affine(x: Tensor, gain: Tensor, shift: Tensor, relu: bool = False) -> Launch:
    """The launch that corrects x."""
    tiles = tiles_of(x)
    arguments: dict[str, Any] = {"x_ptr": x, "gain_ptr": gain, "shift_ptr": shift, **tiles.arguments}
    arguments |= {"fold": tiles.fold, "FOLDED": tiles.fold > 1, "RELU": relu}
    return Launch(affine_kernel, (tiles.programs,), arguments, tiles.values // 8)


def affine_(x: Tensor, gain: Tensor, shift: Tensor, channel_dim: int, relu: bool) -> None:
    """x <- gain * x + shift in place, for any strides; then ReLU with `relu`."""
    key = (channel_dim, relu, (gain.data_ptr() | shift.data_ptr()) % 16, *signature(x))
    launch = PLANS.get(key)
    with on_device_of(x):
        if launch is None:
            parts = list(ncl_parts(x.detach(), channel_dim))
            launches = [Repeated(plan_affine(part, gain, shift, relu), 3) for part in parts]
            for each, part in zip(launches, parts, strict=True):
                each(part, gain, shift)
            if len(launches) == 1:
                PLANS.add(key, launches[0])
        else:
            launch(x, gain, shift)
    # PyTorch does not see a kernel's writes: without this, autograd would treat x and its views as unchanged
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)
