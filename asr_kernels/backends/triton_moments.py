"""Per-channel moments in Triton: partial moments of pieces of the tensor, then one merge of them in a fixed order."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..merging import Moments
from .triton_tiles import SIZES, Launch, lanes_left, tiles_of

# most tiles per program: a lane adds 64 float32 values before the merge in float64, an error below 64 * 2^-24
MAX_TILES = 64
# pieces x channels in a tile of finish_kernel, and its channels: 64 contiguous bytes
MERGE, MERGE_CHANNELS = 1024, 8


@triton.jit(do_not_specialize=[*SIZES, "splits", "stride_an", "stride_bn"])
def partials_kernel(
    a_ptr,  # (N, C, L), any strides
    b_ptr,  # (N, C, L), any strides, or None
    counts_ptr,  # float64 [splits]
    partials_ptr,  # float32, or float64 for float64, [3 or 7, splits, C]: shift, D and DD of a; then of b, and DE
    N,
    C,  # in vectors of VEC_C
    L,  # in vectors of VEC_L
    stride_an,  # in vectors, as is the stride of C or L, whichever is not the vector's axis
    stride_ac,
    stride_al,
    stride_bn,
    stride_bc,
    stride_bl,
    blocks,  # of channels
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
    """Partial sums of one piece of BLOCK_C channels, with d = a - shift_a and e = b - shift_b:

    D = sum(d)        DD = sum(d^2)        DE = sum(d e)

    The shift is the mean of the first tile: moments about it do not cancel, whatever the mean (Chan, Golub and LeVeque,
    "Algorithms for computing the sample variance", 1983). d^2 is float32, so |d| must be in 1e-19 .. 1e19; for float64
    data d^2 is float64.
    """
    PAIRED: tl.constexpr = b_ptr is not None
    SUM: tl.constexpr = tl.float64 if a_ptr.dtype.element_ty == tl.float64 else tl.float32
    VEC: tl.constexpr = VEC_C * VEC_L
    # int64 before any product: offsets exceed 2^31. Divide before: a 64-bit division would be a function call
    i_p = tl.program_id(0)
    i_c, i_s = (i_p % blocks).to(tl.int64), i_p // blocks
    i_sn, i_sl, i_s = (i_s // splits_l).to(tl.int64), (i_s % splits_l).to(tl.int64), i_s.to(tl.int64)
    channels = C.to(tl.int64) * VEC_C
    length = L.to(tl.int64) * VEC_L

    # a range starts at a tile: only its last tiles are partly masked. The first tile, which sets the shift, is fullest
    n_start = i_sn * tiles_n * BLOCK_N
    l_start = i_sl * tiles_l * BLOCK_L
    count_n = tl.minimum(tiles_n.to(tl.int64) * BLOCK_N, N - n_start)
    count_l = tl.minimum(tiles_l.to(tl.int64) * BLOCK_L, length - l_start)
    steps_l = tl.cdiv(count_l, BLOCK_L)
    steps = tl.cdiv(count_n, BLOCK_N) * steps_l

    # [BLOCK_C]
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    # [BLOCK_N * BLOCK_L] images and positions within a tile
    o_t = tl.arange(0, BLOCK_N * BLOCK_L)
    o_n, o_l = n_start + o_t // BLOCK_L, l_start + o_t % BLOCK_L

    # [BLOCK_C, BLOCK_N * BLOCK_L]
    m = lanes_left(m_c, count_n, count_l, BLOCK_N, BLOCK_L)
    p_a = a_ptr + (o_c * stride_ac * VEC_L)[:, None] + (o_n * stride_an * VEC + o_l * stride_al * VEC_C)[None, :]
    b_a = tl.load(p_a, mask=m, other=0.0)
    first = (tl.minimum(count_n, BLOCK_N) * tl.minimum(count_l, BLOCK_L)).to(SUM)
    b_shift_a = tl.sum(b_a.to(SUM), axis=1) / first
    b_sum_a = tl.zeros([BLOCK_C, BLOCK_N * BLOCK_L], dtype=SUM)
    b_sum_aa = tl.zeros([BLOCK_C, BLOCK_N * BLOCK_L], dtype=SUM)
    if PAIRED:
        p_b = b_ptr + (o_c * stride_bc * VEC_L)[:, None] + (o_n * stride_bn * VEC + o_l * stride_bl * VEC_C)[None, :]
        b_b = tl.load(p_b, mask=m, other=0.0)
        b_shift_b = tl.sum(b_b.to(SUM), axis=1) / first
        b_sum_b = tl.zeros([BLOCK_C, BLOCK_N * BLOCK_L], dtype=SUM)
        b_sum_bb = tl.zeros([BLOCK_C, BLOCK_N * BLOCK_L], dtype=SUM)
        b_sum_ab = tl.zeros([BLOCK_C, BLOCK_N * BLOCK_L], dtype=SUM)

    # position of this tile in the piece
    i_n, i_l = steps * 0, steps * 0
    for i in range(steps):
        # load the next tile while this one is added; in the last iteration the mask is empty and nothing is read
        end_of_row = i_l + 1 == steps_l
        j_n, j_l = tl.where(end_of_row, i_n + 1, i_n), tl.where(end_of_row, 0, i_l + 1)
        rest_l = tl.where(i + 1 < steps, count_l - j_l * BLOCK_L, 0)
        m_next = lanes_left(m_c, count_n - j_n * BLOCK_N, rest_l, BLOCK_N, BLOCK_L)
        o_a = j_n * BLOCK_N * stride_an * VEC + j_l * BLOCK_L * stride_al * VEC_C
        b_next_a = tl.load(p_a + o_a, mask=m_next, other=0.0)
        if PAIRED:
            o_b = j_n * BLOCK_N * stride_bn * VEC + j_l * BLOCK_L * stride_bl * VEC_C
            b_next_b = tl.load(p_b + o_b, mask=m_next, other=0.0)

        m = lanes_left(m_c, count_n - i_n * BLOCK_N, count_l - i_l * BLOCK_L, BLOCK_N, BLOCK_L)
        # a masked lane must be 0 after the shift, not before
        b_a = tl.where(m, b_a.to(SUM) - b_shift_a[:, None], 0.0)
        b_sum_a += b_a
        b_sum_aa = tl.fma(b_a, b_a, b_sum_aa)
        if PAIRED:
            b_b = tl.where(m, b_b.to(SUM) - b_shift_b[:, None], 0.0)
            b_sum_b += b_b
            b_sum_bb = tl.fma(b_b, b_b, b_sum_bb)
            b_sum_ab = tl.fma(b_a, b_b, b_sum_ab)
            b_b = b_next_b
        b_a = b_next_a
        i_n, i_l = j_n, j_l

    tl.store(counts_ptr + i_s, (count_n * count_l).to(tl.float64), mask=i_c == 0)
    p_out = partials_ptr + i_s * channels + o_c
    rows = splits * channels
    tl.store(p_out, b_shift_a, mask=m_c)
    tl.store(p_out + rows, tl.sum(b_sum_a, axis=1), mask=m_c)
    tl.store(p_out + 2 * rows, tl.sum(b_sum_aa, axis=1), mask=m_c)
    if PAIRED:
        tl.store(p_out + 3 * rows, b_shift_b, mask=m_c)
        tl.store(p_out + 4 * rows, tl.sum(b_sum_b, axis=1), mask=m_c)
        tl.store(p_out + 5 * rows, tl.sum(b_sum_bb, axis=1), mask=m_c)
        tl.store(p_out + 6 * rows, tl.sum(b_sum_ab, axis=1), mask=m_c)


@triton.jit
def pieces_of(counts_ptr, partials_ptr, i, pieces, o_c, m_c, n_c, fold, BLOCK_S: tl.constexpr):
    """BLOCK_S pieces of channels o_c, from piece i on: their pointers, mask, counts and inverse counts."""
    o_s = i + tl.arange(0, BLOCK_S)
    m = m_c[:, None] & (o_s < pieces)[None, :]
    p_s = partials_ptr + o_c[:, None] * fold + ((o_s // fold).to(tl.int64) * n_c * fold + o_s % fold)[None, :]
    b_n = tl.load(counts_ptr + o_s // fold, mask=o_s < pieces, other=1.0)
    return p_s, m, b_n[None, :], (1.0 / b_n)[None, :]


@triton.jit
def mean_of_piece(p_s, rows, m, b_inverse):
    """shift + D / n, and D / n, float64."""
    b_rest = tl.load(p_s + rows, mask=m, other=0.0).to(tl.float64) * b_inverse
    return tl.load(p_s, mask=m, other=0.0).to(tl.float64) + b_rest, b_rest


@triton.jit
def squares_of_piece(p_s, rows, m, b_n, b_inverse, b_mean):
    """M2_s + n_s (mean_s - mean)^2 with M2_s = DD - D^2 / n_s, then mean_s - mean, and D / n_s, float64."""
    b_mean_s, b_rest = mean_of_piece(p_s, rows, m, b_inverse)
    b_step = tl.where(m, b_mean_s - b_mean[:, None], 0.0)
    b_m2 = tl.load(p_s + 2 * rows, mask=m, other=0.0).to(tl.float64) - b_n * b_rest * b_rest
    # rounding must not make M2 negative; where, not maximum: maximum would turn a NaN into 0
    return tl.where(b_m2 < 0.0, 0.0, b_m2) + b_n * b_step * b_step, b_step, b_rest


@triton.jit(do_not_specialize=["C", "splits", "fold", "count", "count_r"])
def finish_kernel(
    counts_ptr,  # float64 [splits]
    partials_ptr,  # float32 or float64 [3 or 7, splits, C, fold]: shift, D and DD of a; then of b, and DE
    mean_r_ptr,  # float64 [C]: mean and M2 of the running moments of a, or None
    m2_r_ptr,
    moments_ptr,  # float64 [2 or 5, C]: mean and M2 of a; then mean and M2 of b, and the co-moment
    C,
    splits,
    fold,
    count,  # values per channel, all pieces together
    count_r,
    PAIRED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Merge all pieces s of BLOCK_C channels, in float64 and in their order (Chan, Golub and LeVeque 1979, for many):

    mean = sum(n_s mean_s) / n        M2 = sum(M2_s + n_s (mean_s - mean)^2)        C2 likewise, with a cross product

    The running moments count as one more piece.
    """
    # [BLOCK_C]
    o_c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    n_c = C.to(tl.int64)
    pieces = splits * fold
    rows = pieces.to(tl.int64) * n_c
    n = count.to(tl.float64)
    b_sum_a = tl.zeros([BLOCK_C, BLOCK_S], dtype=tl.float64)
    if PAIRED:
        b_sum_b = tl.zeros([BLOCK_C, BLOCK_S], dtype=tl.float64)
    for i in range(0, pieces, BLOCK_S):
        # [BLOCK_C, BLOCK_S]
        p_s, m, b_n, b_inverse = pieces_of(counts_ptr, partials_ptr, i, pieces, o_c, m_c, n_c, fold, BLOCK_S)
        b_sum_a += b_n * mean_of_piece(p_s, rows, m, b_inverse)[0]
        if PAIRED:
            b_sum_b += b_n * mean_of_piece(p_s + 3 * rows, rows, m, b_inverse)[0]
    b_total_a = tl.sum(b_sum_a, axis=1)
    if mean_r_ptr is not None:
        n_r = count_r.to(tl.float64)
        b_mean_r = tl.load(mean_r_ptr + o_c, mask=m_c, other=0.0)
        b_total_a += n_r * b_mean_r
        n += n_r
    b_mean_a = b_total_a / n
    tl.store(moments_ptr + o_c, b_mean_a, mask=m_c)
    if PAIRED:
        b_mean_b = tl.sum(b_sum_b, axis=1) / n
        tl.store(moments_ptr + 2 * n_c + o_c, b_mean_b, mask=m_c)

    b_sum_aa = tl.zeros([BLOCK_C, BLOCK_S], dtype=tl.float64)
    if PAIRED:
        b_sum_bb = tl.zeros([BLOCK_C, BLOCK_S], dtype=tl.float64)
        b_sum_ab = tl.zeros([BLOCK_C, BLOCK_S], dtype=tl.float64)
    for i in range(0, pieces, BLOCK_S):
        p_s, m, b_n, b_inverse = pieces_of(counts_ptr, partials_ptr, i, pieces, o_c, m_c, n_c, fold, BLOCK_S)
        b_squares_a, b_step_a, b_rest_a = squares_of_piece(p_s, rows, m, b_n, b_inverse, b_mean_a)
        b_sum_aa += b_squares_a
        if PAIRED:
            b_squares_b, b_step_b, b_rest_b = squares_of_piece(p_s + 3 * rows, rows, m, b_n, b_inverse, b_mean_b)
            b_sum_bb += b_squares_b
            b_de = tl.load(p_s + 6 * rows, mask=m, other=0.0).to(tl.float64)
            b_sum_ab += b_de + b_n * (b_step_a * b_step_b - b_rest_a * b_rest_b)
    b_m2_a = tl.sum(b_sum_aa, axis=1)
    if mean_r_ptr is not None:
        b_m2_a += tl.load(m2_r_ptr + o_c, mask=m_c, other=0.0) + n_r * (b_mean_r - b_mean_a) * (b_mean_r - b_mean_a)
    tl.store(moments_ptr + n_c + o_c, b_m2_a, mask=m_c)
    if PAIRED:
        tl.store(moments_ptr + 3 * n_c + o_c, tl.sum(b_sum_bb, axis=1), mask=m_c)
        tl.store(moments_ptr + 4 * n_c + o_c, tl.sum(b_sum_ab, axis=1), mask=m_c)


def plan_moments(a: Tensor, b: Tensor | None = None, running: Moments | None = None) -> tuple[list[Launch], Tensor]:
    """The two launches that measure a, or a and b together, and the float64 (2 or 5, C) that the second launch fills.

    The moments of a are merged with `running`.
    """
    tiles = tiles_of(*([a] if b is None else [a, b]), most=MAX_TILES)
    channels, paired = a.shape[1], b is not None
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    counts = torch.empty(tiles.splits, dtype=torch.float64, device=a.device)
    partials = torch.empty((7 if paired else 3, tiles.splits, tiles.channels), dtype=dtype, device=a.device)
    moments = torch.empty((5 if paired else 2, channels), dtype=torch.float64, device=a.device)
    measure: dict[str, Any] = {
        "a_ptr": a,
        "b_ptr": b,
        "counts_ptr": counts,
        "partials_ptr": partials,
    }
    measure |= {"stride_bn": 0, "stride_bc": 0, "stride_bl": 0, "splits": tiles.splits, **tiles.arguments}

    block_c = min(triton.next_power_of_2(channels), MERGE_CHANNELS)
    block_s = min(triton.next_power_of_2(tiles.splits * tiles.fold), MERGE // block_c)
    finish: dict[str, Any] = {"counts_ptr": counts, "partials_ptr": partials, "moments_ptr": moments, "C": channels}
    finish |= {"mean_r_ptr": running and running.mean.contiguous(), "m2_r_ptr": running and running.m2.contiguous()}
    finish |= {"splits": tiles.splits, "fold": tiles.fold, "count": a.shape[0] * a.shape[2]}
    finish |= {"count_r": running.count if running else 0, "PAIRED": paired, "BLOCK_S": block_s, "BLOCK_C": block_c}
    return [
        Launch(partials_kernel, (tiles.programs,), measure, tiles.values),
        Launch(finish_kernel, (triton.cdiv(channels, block_c),), finish, block_s * block_c),
    ], moments


def channel_moments(x: Tensor, tolerance: float, running: Moments | None) -> Moments:
    """Moments of each channel of an (N, C, L) view, merged with `running`; sums are shifted for any tolerance."""
    launches, moments = plan_moments(x, running=running)
    for launch in launches:
        launch.run()
    return Moments(x.shape[0] * x.shape[2] + (running.count if running else 0), moments[0], moments[1])


def paired_moments(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """mean and m2 of a, of b, and their co-moment, float64 (C,), of two (N, C, L) views, in one pass over both."""
    launches, moments = plan_moments(a, b)
    for launch in launches:
        launch.run()
    return moments[0], moments[1], moments[2], moments[3], moments[4]
