"""Per-channel affine map in Triton, in place on a strided (N, C, L) view. Tiles as in triton_moments."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .triton_moments import Launch, walk


@triton.jit(do_not_specialize=["N", "C", "L", "stride_n"])
def affine_kernel(
    x_ptr,  # (N, C, L), any strides; read and written
    gain_ptr,  # (C,), float32, or float64 for a float64 x
    shift_ptr,  # (C,), the same
    N,
    C,  # in vectors of VEC_C
    L,  # in vectors of VEC_L
    stride_n,  # in vectors, as is the stride of whichever of C and L is not the vector's axis
    stride_c,
    stride_l,
    VEC_C: tl.constexpr,
    VEC_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """x <- gain * x + shift on one tile, fused in float32 (float64 for float64) and rounded once to the type of x."""
    # int64 before any product: offsets pass 2^31
    i_p = tl.program_id(0).to(tl.int64)
    channels = C.to(tl.int64) * VEC_C
    length = L.to(tl.int64) * VEC_L
    blocks = tl.cdiv(channels, BLOCK_C)
    tiles_l = tl.cdiv(length, BLOCK_L)
    i_c, i_t = i_p % blocks, i_p // blocks

    # [BLOCK_N * BLOCK_L]
    o_t = tl.arange(0, BLOCK_N * BLOCK_L)
    o_n = (i_t // tiles_l) * BLOCK_N + o_t // BLOCK_L
    o_l = (i_t % tiles_l) * BLOCK_L + o_t % BLOCK_L
    # [BLOCK_C]
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    b_gain = tl.load(gain_ptr + o_c, mask=m_c, other=1.0)
    b_shift = tl.load(shift_ptr + o_c, mask=m_c, other=0.0)

    # [BLOCK_C, BLOCK_N * BLOCK_L]
    m = m_c[:, None] & ((o_n < N) & (o_l < length))[None, :]
    o_x = o_n * stride_n * VEC_C * VEC_L + o_l * stride_l * VEC_C
    p_x = x_ptr + (o_c * stride_c * VEC_L)[:, None] + o_x[None, :]
    b_x = tl.load(p_x, mask=m, other=0.0).to(b_gain.dtype)
    b_x = tl.fma(b_gain[:, None], b_x, b_shift[:, None])
    tl.store(p_x, b_x.to(x_ptr.dtype.element_ty), mask=m)


def plan_affine(x: Tensor, gain: Tensor, shift: Tensor) -> Launch:
    """The one launch that corrects x."""
    steps = walk(x)
    arguments: dict[str, Any] = {"x_ptr": x, "gain_ptr": gain, "shift_ptr": shift, **steps.arguments}
    arguments |= {f"stride_{axis}": stride for axis, stride in zip("ncl", steps.strides[0], strict=True)}
    tiles_n, blocks_c, tiles_l = steps.tiles
    return Launch(affine_kernel, (tiles_n * blocks_c * tiles_l,), arguments)


def affine_(x: Tensor, gain: Tensor, shift: Tensor) -> None:
    """x <- gain * x + shift in place on an (N, C, L) view of any strides; gain and shift contiguous, (C,)."""
    plan_affine(x, gain, shift).run()
