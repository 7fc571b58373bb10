"""Per-channel moments in Triton: partial moments of pieces of the tensor, then one merge of them in a fixed order."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..merging import Moments
from ..views import as_ncl
from .triton_launch import Launch, Plans, Repeated, on_device_of, signature
from .triton_pieces import ROW, aligned, pieces_of

PLANS = Plans()
# pieces x channels in a tile of finish_kernel, four for each thread: for many pieces, and for few
MANY, FEW = (128, 8), (16, 32)


@triton.jit
def merge_pieces(p_s, layer, m, b_n, b_about):
    """For one tensor: the mean of each piece minus `b_about`, its M2, D and D / n. Float64 [BLOCK_S, BLOCK_C]."""
    b_shift = tl.load(p_s, mask=m, other=0.0).to(tl.float64)
    b_d = tl.load(p_s + layer, mask=m, other=0.0).to(tl.float64)
    b_rest = b_d / b_n
    b_mean = tl.where(m, (b_shift - b_about) + b_rest, 0.0)
    b_m2 = tl.load(p_s + 2 * layer, mask=m, other=0.0).to(tl.float64) - b_d * b_rest
    # rounding must not make M2 negative; where, not maximum: maximum would turn a NaN into 0
    return b_mean, tl.where(b_m2 < 0.0, 0.0, b_m2), b_d, b_rest


@triton.jit(
    do_not_specialize=["C", "splits", "rows", "count", "count_r"],
    do_not_specialize_on_alignment=["mean_r_ptr", "m2_r_ptr"],
)
def finish_kernel(
    partials_ptr,  # float32 or float64 [4 or 8, splits, rows * ROW]: n, shift, D and DD of a; then of b, and DE
    mean_r_ptr,  # float64 [C]: mean and M2 of the running moments of a, or None
    m2_r_ptr,
    moments_ptr,  # float64 [2 or 5, C]: mean and M2 of a; then mean and M2 of b, and the co-moment
    count_r: tl.int64,
    C,
    splits,
    rows,
    count: tl.int64,  # values of a channel, all pieces together
    PAIRED: tl.constexpr,
    WHOLE: tl.constexpr,  # all of the width was written, not C alone
    ROW: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Merge all pieces s of BLOCK_C channels in float64, in one pass (Chan, Golub and LeVeque 1979, for many):

    mean = about + T / n, T = sum(n_s t_s)        M2 = sum(M2_s + n_s t_s^2) - T^2 / n        t_s = mean_s - about

    and the co-moment likewise. `about` is the shift of the first piece. The difference cancels by no more than the
    number of pieces, because a first mean far from the mean makes M2 large as well.
    """
    # [BLOCK_C]
    o_c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    width = rows.to(tl.int64) * ROW
    layer = splits * width
    # a mask by the width is one for each vector
    m_w = o_c < (width if WHOLE else C)
    m_c = o_c < C
    n = count.to(tl.float64)
    b_about_a = tl.load(partials_ptr + layer + o_c, mask=m_w, other=0.0).to(tl.float64)
    b_t_a = tl.zeros([BLOCK_S, BLOCK_C], dtype=tl.float64)
    b_q_a = tl.zeros([BLOCK_S, BLOCK_C], dtype=tl.float64)
    if PAIRED:
        b_about_b = tl.load(partials_ptr + 4 * layer + o_c, mask=m_w, other=0.0).to(tl.float64)
        b_t_b = tl.zeros([BLOCK_S, BLOCK_C], dtype=tl.float64)
        b_q_b = tl.zeros([BLOCK_S, BLOCK_C], dtype=tl.float64)
        b_q_ab = tl.zeros([BLOCK_S, BLOCK_C], dtype=tl.float64)
    for i in range(0, splits, BLOCK_S):
        # [BLOCK_S, BLOCK_C]
        o_s = i + tl.arange(0, BLOCK_S)
        m = (o_s < splits)[:, None] & m_w[None, :]
        p_s = partials_ptr + o_s.to(tl.int64)[:, None] * width + o_c[None, :]
        b_n = tl.load(p_s, mask=m, other=1.0).to(tl.float64)
        b_mean_a, b_m2_a, b_d, _ = merge_pieces(p_s + layer, layer, m, b_n, b_about_a)
        b_t_a += b_n * b_mean_a
        b_q_a += b_m2_a + b_n * b_mean_a * b_mean_a
        if PAIRED:
            b_mean_b, b_m2_b, _, b_rest_b = merge_pieces(p_s + 4 * layer, layer, m, b_n, b_about_b)
            b_t_b += b_n * b_mean_b
            b_q_b += b_m2_b + b_n * b_mean_b * b_mean_b
            b_de = tl.load(p_s + 7 * layer, mask=m, other=0.0).to(tl.float64) - b_d * b_rest_b
            b_q_ab += b_de + b_n * b_mean_a * b_mean_b

    p_out = moments_ptr + o_c
    b_total_a = tl.sum(b_t_a, axis=0)
    b_mean = b_about_a + b_total_a / n
    b_m2 = tl.sum(b_q_a, axis=0) - b_total_a * (b_total_a / n)
    b_m2 = tl.where(b_m2 < 0.0, 0.0, b_m2)
    if PAIRED:
        b_total_b = tl.sum(b_t_b, axis=0)
        b_m2_b = tl.sum(b_q_b, axis=0) - b_total_b * (b_total_b / n)
        tl.store(p_out + 2 * C.to(tl.int64), b_about_b + b_total_b / n, mask=m_c)
        tl.store(p_out + 3 * C.to(tl.int64), tl.where(b_m2_b < 0.0, 0.0, b_m2_b), mask=m_c)
        tl.store(p_out + 4 * C.to(tl.int64), tl.sum(b_q_ab, axis=0) - b_total_a * (b_total_b / n), mask=m_c)
    if mean_r_ptr is not None:
        n_r = count_r.to(tl.float64)
        b_step = tl.load(mean_r_ptr + o_c, mask=m_c, other=0.0) - b_mean
        b_m2 += tl.load(m2_r_ptr + o_c, mask=m_c, other=0.0) + b_step * b_step * (n * (n_r / (n + n_r)))
        b_mean += b_step * (n_r / (n + n_r))
    tl.store(p_out, b_mean, mask=m_c)
    tl.store(p_out + C.to(tl.int64), b_m2, mask=m_c)


def plan_moments(a: Tensor, b: Tensor | None = None, running: Moments | None = None) -> tuple[list[Launch], Tensor]:
    """The two launches that measure a, or a and b together, and the float64 (2 or 5, C) that the second launch fills.

    The moments of a are merged with `running`.
    """
    views = [a] if b is None else [a, b]
    bases, starts = zip(*map(aligned, views), strict=True)
    pieces = pieces_of(tuple(a.shape), tuple(x.stride() for x in views), starts, a.itemsize)
    tensors = list(bases) if pieces.arguments.get("start_a") else views
    channels, paired = a.shape[1], b is not None
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    partials = torch.empty((8 if paired else 4, pieces.splits, pieces.width), dtype=dtype, device=a.device)
    moments = torch.empty((5 if paired else 2, channels), dtype=torch.float64, device=a.device)
    block_s, block_c = FEW if pieces.splits <= FEW[0] else MANY
    finish: dict[str, Any] = {"partials_ptr": partials, "moments_ptr": moments, "C": channels}
    finish |= {"mean_r_ptr": running and running.mean.contiguous(), "m2_r_ptr": running and running.m2.contiguous()}
    finish |= {"splits": pieces.splits, "rows": pieces.width // ROW, "count": a.shape[0] * a.shape[2]}
    finish |= {
        "count_r": running.count if running else 0,
        "PAIRED": paired,
        "WHOLE": channels % ROW == 0 or "WIDTH" in pieces.arguments,
        "ROW": ROW,
    }
    finish |= {"BLOCK_S": block_s, "BLOCK_C": block_c}
    grid = (triton.cdiv(channels, block_c),)
    return [pieces.launch(tensors, partials), Launch(finish_kernel, grid, finish, block_s * block_c // 4)], moments


class Plan(NamedTuple):
    """The two launches that measure tensors of one signature, and what they fill."""

    measure: Repeated
    finish: Repeated
    partials: tuple[int, ...]
    moments: tuple[int, ...]
    dtype: torch.dtype  # of the partial moments
    values: int  # of a channel
    shifted: bool  # the first kernel takes the aligned address before a tensor


def plan_for(tensors: tuple[Tensor, ...], channel_dim: int, running: Moments | None) -> Plan | None:
    """The plan for tensors of any shape; None where their strides forbid (N, C, L) views."""
    key = (channel_dim, running is None, *map(signature, tensors))
    if plan := PLANS.get(key):
        return plan
    if not (views := as_ncl(*tensors, channel_dim=channel_dim)):
        return None
    (measure, finish), moments = plan_moments(views[0], views[1] if len(views) > 1 else None, running)
    partials = measure.arguments["partials_ptr"]
    plan = Plan(
        *(Repeated(measure, 3), Repeated(finish, 5), partials.shape, moments.shape, partials.dtype),
        *(views[0].shape[0] * views[0].shape[2], bool(measure.arguments.get("start_a"))),
    )
    return PLANS.add(key, plan)


def measured(tensors: tuple[Tensor, ...], channel_dim: int, running: Moments | None) -> tuple[int, tuple[Tensor, ...]]:
    """The number of values, and the float64 (C,) rows that `finish_kernel` computes."""
    plan = plan_for(tensors, channel_dim, running)
    if plan is None:
        return measured(tuple(x.contiguous() for x in tensors), channel_dim, running)
    x = tensors[0]
    partials = torch.empty(plan.partials, dtype=plan.dtype, device=x.device)
    moments = torch.empty(plan.moments, dtype=torch.float64, device=x.device)
    a, b = (*tensors, None)[:2]
    if plan.shifted:
        a, b = (x if x is None else aligned(x)[0] for x in (a, b))
    with on_device_of(x):
        plan.measure(a, b, partials)
        if running is None:
            plan.finish(partials, None, None, moments, 0)
        else:
            plan.finish(partials, running.mean.contiguous(), running.m2.contiguous(), moments, running.count)
    return plan.values, moments.unbind()


def channel_moments(x: Tensor, channel_dim: int, tolerance: float, running: Moments | None) -> Moments:
    """Moments of each channel of x, merged with `running`; sums are shifted for any tolerance."""
    count, (mean, m2) = measured((x,), channel_dim, running)
    return Moments(count + (running.count if running else 0), mean, m2)


def paired_moments(a: Tensor, b: Tensor, channel_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """mean and m2 of a, of b, and their co-moment, float64 (C,), in one pass over both."""
    mean_a, m2_a, mean_b, m2_b, comoment = measured((a, b), channel_dim, None)[1]
    return mean_a, m2_a, mean_b, m2_b, comoment
