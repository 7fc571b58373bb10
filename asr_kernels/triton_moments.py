"""Per-channel moments in Triton: partial moments of pieces, then one merge of the pieces in a fixed order.

A tensor is a strided (N, C, L) view. A tile holds BLOCK_N images x BLOCK_L positions of BLOCK_C channels: of one where
the positions lie side by side (NCHW), of up to 64 where the channels do (channels_last, linear layers). Tiles and
pieces are functions of shape, strides and dtype alone, so a rerun is bit-identical.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# values per tile: 128 threads hold 16 each, two 16-byte loads of half precision. Half as many in float64, and half as
# many of each of a pair, whose five sums would fill the registers
TILE = 2048
# channels in a tile of rows: 128 bytes of half precision side by side
TILE_CHANNELS = 64
# programs to aim for, several for each multiprocessor of a large GPU, however few channels there are
PROGRAMS = 2048
# tiles per program at most: a lane adds 64 float32 values before float64 takes over, an error below 64 * 2^-24
MAX_TILES = 64
# pieces x channels in a tile of the finish, and its channels: 64 bytes side by side
MERGE, MERGE_CHANNELS = 1024, 8
# what is fused is written as tl.fma: the default of this option changes between Triton 3.9 and 3.10
OPTIONS = {"enable_fp_fusion": False}


# left unspecialised: the vectors (see walk) say what the compiler needs to know, and each value is no new kernel
@triton.jit(do_not_specialize=["N", "C", "L", "stride_an", "stride_bn", "splits", "splits_l", "tiles_n", "tiles_l"])
def partials_kernel(
    a_ptr,  # (N, C, L), any strides
    b_ptr,  # (N, C, L), any strides, or None
    partials_ptr,  # float64 [3 or 6, splits, C]: count, mean and M2 of a; then mean and M2 of b, and the co-moment
    N,
    C,  # in vectors of VEC_C
    L,  # in vectors of VEC_L
    stride_an,  # in vectors, as are the strides of whichever of C and L is not the vector's axis
    stride_ac,
    stride_al,
    stride_bn,
    stride_bc,
    stride_bl,
    splits,  # pieces per channel, each a range of images x a range of positions
    splits_l,  # ranges of positions
    tiles_n,  # tiles per range
    tiles_l,
    VEC_C: tl.constexpr,
    VEC_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """For one piece of BLOCK_C channels, with n values, d = a - shift_a and e = b - shift_b:

    mean = shift + sum(d) / n        M2 = sum(d^2) - sum(d)^2 / n        C2 = sum(d e) - sum(d) sum(e) / n

    true for any shift, and free of cancellation when it is the mean of the first tile (Chan, Golub and LeVeque,
    "Algorithms for computing the sample variance", 1983). But for float64 data d^2 is float32: |d| in 1e-19 .. 1e19.
    """
    PAIRED: tl.constexpr = b_ptr is not None
    SUM: tl.constexpr = tl.float64 if a_ptr.dtype.element_ty == tl.float64 else tl.float32
    # int64 before any product: offsets pass 2^31
    i_p = tl.program_id(0).to(tl.int64)
    channels = C.to(tl.int64) * VEC_C
    length = L.to(tl.int64) * VEC_L
    blocks = tl.cdiv(channels, BLOCK_C)
    i_c, i_s = i_p % blocks, i_p // blocks

    # ranges are whole tiles long, so only their last tiles are cut, and the first, which sets the shift, is the fullest
    n_start = (i_s // splits_l) * tiles_n * BLOCK_N
    l_start = (i_s % splits_l) * tiles_l * BLOCK_L
    n_stop = tl.minimum(n_start + tiles_n.to(tl.int64) * BLOCK_N, N)
    l_stop = tl.minimum(l_start + tiles_l.to(tl.int64) * BLOCK_L, length)
    first = tl.minimum(n_stop - n_start, BLOCK_N) * tl.minimum(l_stop - l_start, BLOCK_L)
    count = (n_stop - n_start) * (l_stop - l_start)

    # [BLOCK_N * BLOCK_L] images and positions within a tile
    o_t = tl.arange(0, BLOCK_N * BLOCK_L)
    o_n, o_l = (o_t // BLOCK_L).to(tl.int64), (o_t % BLOCK_L).to(tl.int64)
    # [BLOCK_C]
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels

    # [BLOCK_C, BLOCK_N * BLOCK_L]
    m = m_c[:, None] & ((n_start + o_n < N) & (l_start + o_l < length))[None, :]
    p_a = a_ptr + o_c * stride_ac * VEC_L
    o_a = (n_start + o_n) * stride_an * VEC_C * VEC_L + (l_start + o_l) * stride_al * VEC_C
    b_a = tl.load(p_a[:, None] + o_a[None, :], mask=m, other=0.0).to(SUM)
    b_shift_a = tl.sum(b_a, axis=1) / first.to(SUM)
    b_sum_a = tl.zeros([BLOCK_C, BLOCK_N * BLOCK_L], dtype=SUM)
    b_sum_aa = tl.zeros([BLOCK_C, BLOCK_N * BLOCK_L], dtype=SUM)
    if PAIRED:
        p_b = b_ptr + o_c * stride_bc * VEC_L
        o_b = (n_start + o_n) * stride_bn * VEC_C * VEC_L + (l_start + o_l) * stride_bl * VEC_C
        b_b = tl.load(p_b[:, None] + o_b[None, :], mask=m, other=0.0).to(SUM)
        b_shift_b = tl.sum(b_b, axis=1) / first.to(SUM)
        b_sum_b = tl.zeros([BLOCK_C, BLOCK_N * BLOCK_L], dtype=SUM)
        b_sum_bb = tl.zeros([BLOCK_C, BLOCK_N * BLOCK_L], dtype=SUM)
        b_sum_ab = tl.zeros([BLOCK_C, BLOCK_N * BLOCK_L], dtype=SUM)

    for i_n in range(n_start, n_stop, BLOCK_N):
        for i_l in range(l_start, l_stop, BLOCK_L):
            m = m_c[:, None] & ((i_n + o_n < N) & (i_l + o_l < length))[None, :]
            o_a = (i_n + o_n) * stride_an * VEC_C * VEC_L + (i_l + o_l) * stride_al * VEC_C
            b_a = tl.load(p_a[:, None] + o_a[None, :], mask=m, other=0.0).to(SUM)
            # a masked lane must be 0 after the shift, not before
            b_a = tl.where(m, b_a - b_shift_a[:, None], 0.0)
            b_sum_a += b_a
            b_sum_aa = tl.fma(b_a, b_a, b_sum_aa)
            if PAIRED:
                o_b = (i_n + o_n) * stride_bn * VEC_C * VEC_L + (i_l + o_l) * stride_bl * VEC_C
                b_b = tl.load(p_b[:, None] + o_b[None, :], mask=m, other=0.0).to(SUM)
                b_b = tl.where(m, b_b - b_shift_b[:, None], 0.0)
                b_sum_b += b_b
                b_sum_bb = tl.fma(b_b, b_b, b_sum_bb)
                b_sum_ab = tl.fma(b_a, b_b, b_sum_ab)

    n = count.to(tl.float64)
    p_out = partials_ptr + i_s * channels + o_c
    rows = splits * channels
    d_a = tl.sum(b_sum_a, axis=1).to(tl.float64)
    m2_a = tl.sum(b_sum_aa, axis=1).to(tl.float64) - d_a * d_a / n
    tl.store(p_out, tl.zeros([BLOCK_C], dtype=tl.float64) + n, mask=m_c)
    tl.store(p_out + rows, b_shift_a.to(tl.float64) + d_a / n, mask=m_c)
    # where, not maximum: that would turn a NaN into 0
    tl.store(p_out + 2 * rows, tl.where(m2_a < 0.0, 0.0, m2_a), mask=m_c)
    if PAIRED:
        d_b = tl.sum(b_sum_b, axis=1).to(tl.float64)
        m2_b = tl.sum(b_sum_bb, axis=1).to(tl.float64) - d_b * d_b / n
        c2 = tl.sum(b_sum_ab, axis=1).to(tl.float64) - d_a * d_b / n
        tl.store(p_out + 3 * rows, b_shift_b.to(tl.float64) + d_b / n, mask=m_c)
        tl.store(p_out + 4 * rows, tl.where(m2_b < 0.0, 0.0, m2_b), mask=m_c)
        tl.store(p_out + 5 * rows, c2, mask=m_c)


@triton.jit(do_not_specialize=["C", "splits", "count"])
def finish_kernel(
    partials_ptr,  # float64 [3 or 6, splits, C]
    moments_ptr,  # float64 [2 or 5, C]: mean and M2 of a; then mean and M2 of b, and the co-moment
    C,
    splits,
    count,  # values per channel, all pieces together
    PAIRED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """All pieces s of BLOCK_C channels merged, in float64 and in their order (Chan, Golub and LeVeque 1979, for many):

    mean = sum(n_s mean_s) / n        M2 = sum(M2_s + n_s (mean_s - mean)^2)        C2 likewise, with a cross product
    """
    # [BLOCK_C]
    o_c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    n_c = C.to(tl.int64)
    rows = splits.to(tl.int64) * n_c
    n = count.to(tl.float64)
    b_sum_a = tl.zeros([BLOCK_C, BLOCK_S], dtype=tl.float64)
    if PAIRED:
        b_sum_b = tl.zeros([BLOCK_C, BLOCK_S], dtype=tl.float64)
    for i_s in range(0, splits, BLOCK_S):
        # [BLOCK_C, BLOCK_S]
        o_s = (i_s + tl.arange(0, BLOCK_S)).to(tl.int64)
        m = m_c[:, None] & (o_s < splits)[None, :]
        p_s = partials_ptr + o_c[:, None] + o_s[None, :] * C
        b_n = tl.load(p_s, mask=m, other=0.0)
        b_sum_a += b_n * tl.load(p_s + rows, mask=m, other=0.0)
        if PAIRED:
            b_sum_b += b_n * tl.load(p_s + 3 * rows, mask=m, other=0.0)
    b_mean_a = tl.sum(b_sum_a, axis=1) / n
    tl.store(moments_ptr + o_c, b_mean_a, mask=m_c)
    if PAIRED:
        b_mean_b = tl.sum(b_sum_b, axis=1) / n
        tl.store(moments_ptr + 2 * n_c + o_c, b_mean_b, mask=m_c)

    b_m2_a = tl.zeros([BLOCK_C, BLOCK_S], dtype=tl.float64)
    if PAIRED:
        b_m2_b = tl.zeros([BLOCK_C, BLOCK_S], dtype=tl.float64)
        b_c2 = tl.zeros([BLOCK_C, BLOCK_S], dtype=tl.float64)
    for i_s in range(0, splits, BLOCK_S):
        o_s = (i_s + tl.arange(0, BLOCK_S)).to(tl.int64)
        m = m_c[:, None] & (o_s < splits)[None, :]
        p_s = partials_ptr + o_c[:, None] + o_s[None, :] * C
        b_n = tl.load(p_s, mask=m, other=0.0)
        b_a = tl.where(m, tl.load(p_s + rows, mask=m, other=0.0) - b_mean_a[:, None], 0.0)
        b_m2_a += tl.load(p_s + 2 * rows, mask=m, other=0.0) + b_n * b_a * b_a
        if PAIRED:
            b_b = tl.where(m, tl.load(p_s + 3 * rows, mask=m, other=0.0) - b_mean_b[:, None], 0.0)
            b_m2_b += tl.load(p_s + 4 * rows, mask=m, other=0.0) + b_n * b_b * b_b
            b_c2 += tl.load(p_s + 5 * rows, mask=m, other=0.0) + b_n * b_a * b_b
    tl.store(moments_ptr + n_c + o_c, tl.sum(b_m2_a, axis=1), mask=m_c)
    if PAIRED:
        tl.store(moments_ptr + 3 * n_c + o_c, tl.sum(b_m2_b, axis=1), mask=m_c)
        tl.store(moments_ptr + 4 * n_c + o_c, tl.sum(b_c2, axis=1), mask=m_c)


class Launch(NamedTuple):
    """A kernel, its grid and every argument by name: what `run` launches is what the ahead-of-time tests compile."""

    kernel: Any
    grid: tuple[int]
    arguments: dict[str, Any]

    def run(self) -> None:
        self.kernel[self.grid](**self.arguments, **OPTIONS)


class Walk(NamedTuple):
    """How to walk over (N, C, L) views of one shape: tiles along each axis, and the rest as the kernels take it."""

    tiles: tuple[int, int, int]
    arguments: dict[str, int]
    strides: list[tuple[int, ...]]


def walk(*views: Tensor) -> Walk:
    """Choose the vector's axis from the strides of the first view, the blocks from the shape.

    Sizes and strides that the vector depends on are divided by VEC, their common power of two up to 16, and multiplied
    back in the kernel: so the compiler knows that 14 x 14 planes are made of 4-element vectors.
    """
    n, c, l = views[0].shape
    strides: list[tuple[int, ...]] = [x.stride() for x in views]
    if l == 1:
        n, l, strides = 1, n, [(0, s_c, s_n) for s_n, s_c, _ in strides]
    by_rows = c > 1 and (l == 1 or strides[0][1] < strides[0][2])
    tile = TILE // len(views) // (2 if views[0].dtype == torch.float64 else 1)
    block_c = min(triton.next_power_of_2(c), TILE_CHANNELS) if by_rows else 1
    block_l = min(triton.next_power_of_2(l), tile // block_c)
    block_n = min(triton.next_power_of_2(n), tile // (block_c * block_l))
    outer = [s for s_n, s_c, s_l in strides for s in (s_n, s_l if by_rows else s_c)]
    vec = math.gcd(16, c if by_rows else l, *outer)
    vec_c, vec_l = (vec, 1) if by_rows else (1, vec)
    arguments = {"N": n, "C": c // vec_c, "L": l // vec_l, "VEC_C": vec_c, "VEC_L": vec_l}
    arguments |= {"BLOCK_N": block_n, "BLOCK_C": block_c, "BLOCK_L": block_l}
    strides = [(s_n // vec, s_c // vec_l, s_l // vec_c) for s_n, s_c, s_l in strides]
    tiles = (triton.cdiv(n, block_n), triton.cdiv(c, block_c), triton.cdiv(l, block_l))
    return Walk(tiles, arguments, strides)


def plan_moments(a: Tensor, b: Tensor | None = None) -> tuple[list[Launch], Tensor]:
    """The two launches that measure a, or a and b together, and the float64 (2 or 5, C) that the second one fills."""
    views = [a] if b is None else [a, b]
    steps = walk(*views)
    tiles_n, blocks_c, tiles_l = steps.tiles
    # pieces: enough programs for the device, none of them above MAX_TILES, rows of tiles kept whole where they fit
    share = min(max(tiles_n * tiles_l * blocks_c // PROGRAMS, 1), MAX_TILES)
    share_l = min(share, tiles_l)
    share_n = min(share // share_l, tiles_n)
    splits_l = triton.cdiv(tiles_l, share_l)
    splits = triton.cdiv(tiles_n, share_n) * splits_l

    channels, paired = a.shape[1], b is not None
    partials = torch.empty((6 if paired else 3, splits, channels), dtype=torch.float64, device=a.device)
    moments = torch.empty((5 if paired else 2, channels), dtype=torch.float64, device=a.device)
    arguments: dict[str, Any] = {"a_ptr": a, "b_ptr": b, "partials_ptr": partials, **steps.arguments}
    for name, strides in zip("ab", [*steps.strides, (0, 0, 0)], strict=False):
        arguments |= {f"stride_{name}{axis}": stride for axis, stride in zip("ncl", strides, strict=True)}
    arguments |= {"splits": splits, "splits_l": splits_l, "tiles_n": share_n, "tiles_l": share_l}
    block_c = min(triton.next_power_of_2(channels), MERGE_CHANNELS)
    merge = {"partials_ptr": partials, "moments_ptr": moments, "C": channels, "splits": splits}
    merge |= {"count": a.shape[0] * a.shape[2], "PAIRED": paired, "BLOCK_C": block_c}
    merge["BLOCK_S"] = min(triton.next_power_of_2(splits), MERGE // block_c)
    return [
        Launch(partials_kernel, (splits * blocks_c,), arguments),
        Launch(finish_kernel, (triton.cdiv(channels, block_c),), merge),
    ], moments


def channel_moments(x: Tensor, tolerance: float = 0.0) -> tuple[Tensor, Tensor]:
    """mean and m2 of each channel of an (N, C, L) view, float64 (C,); always shifted, whatever the tolerance."""
    launches, moments = plan_moments(x)
    for launch in launches:
        launch.run()
    return moments[0], moments[1]


def paired_moments(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """mean and m2 of a, of b, and their co-moment, float64 (C,), of two (N, C, L) views, in one pass over the two."""
    launches, moments = plan_moments(a, b)
    for launch in launches:
        launch.run()
    return moments[0], moments[1], moments[2], moments[3], moments[4]
