"""Gain and shift of a layer's channels from its moments in Triton: one launch, float64, formulas of `factors`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import factors
from ..factors import Prior, Rule
from ..merging import Moments
from .triton_tiles import Launch

# rules that the kernel computes; for any other rule the PyTorch formula is used
RULES = ("layerwise", "channelwise", "asr")
# channels per iteration
BLOCK = 2048
ROUNDING = tl.constexpr(factors.ROUNDING)


@triton.jit
def squares(mean_ptr, m2_ptr, i, C, count, BLOCK: tl.constexpr):
    """M2 of channels i .. i + BLOCK, float64, and which are finite. If means are given, M2 is 0 for constant channels.

    A channel is constant if its deviation is at most float32's rounding of its mean, as in factors.repair_factors.
    """
    o_c = i + tl.arange(0, BLOCK)
    b_m2 = tl.load(m2_ptr + o_c, mask=o_c < C, other=float("nan"))
    if mean_ptr is not None:
        b_noise = ROUNDING * tl.load(mean_ptr + o_c, mask=o_c < C, other=0.0)
        b_m2 = tl.where(b_m2 <= count * (b_noise * b_noise), 0.0, b_m2)
    # false for NaN too
    return b_m2, b_m2 < float("inf")


@triton.jit
def finite_mean(mean_ptr, m2_ptr, C, count, BLOCK: tl.constexpr):
    """Mean of the finite variances, 0 if there is none."""
    b_sum = tl.zeros([BLOCK], dtype=tl.float64)
    b_finite = tl.zeros([BLOCK], dtype=tl.float64)
    for i in range(0, C, BLOCK):
        b_m2, m = squares(mean_ptr, m2_ptr, i, C, count, BLOCK)
        b_sum += tl.where(m, b_m2 / count, 0.0)
        b_finite += m.to(tl.float64)
    return tl.sum(b_sum, axis=0) / tl.maximum(tl.sum(b_finite, axis=0), 1.0)


@triton.jit
def lower_median(mean_ptr, m2_ptr, C, count, BLOCK: tl.constexpr):
    """Lower median of the finite variances, 0 if there is none.

    Found bit by bit: non-negative floats are ordered as their bit patterns, and the number of rank k is the largest
    with at most k numbers below it. This takes 63 counts. A sorting network of this size takes seconds to compile.
    """
    b_finite = tl.zeros([BLOCK], dtype=tl.int32)
    for i in range(0, C, BLOCK):
        b_finite += squares(mean_ptr, m2_ptr, i, C, count, BLOCK)[1].to(tl.int32)
    finite = tl.sum(b_finite, axis=0)
    rank = (finite - 1) // 2
    found = tl.zeros((), dtype=tl.int64)
    bit = tl.full((), 1 << 62, dtype=tl.int64)
    for _ in range(63):
        b_below = tl.zeros([BLOCK], dtype=tl.int32)
        for i in range(0, C, BLOCK):
            b_m2, m = squares(mean_ptr, m2_ptr, i, C, count, BLOCK)
            b_below += (m & (b_m2.to(tl.int64, bitcast=True) < (found | bit))).to(tl.int32)
        found = tl.where(tl.sum(b_below, axis=0) <= rank, found | bit, found)
        bit = bit >> 1
    return tl.where(finite > 0, found.to(tl.float64, bitcast=True) / count, 0.0)


@triton.jit(do_not_specialize=["C", "count_d", "count_p"])
def factors_kernel(
    mean_d_ptr,  # float64 (C,), as are all pointers below
    m2_d_ptr,
    mean_p_ptr,
    m2_p_ptr,
    gain_ptr,
    shift_ptr,
    C,
    count_d,  # values per channel
    count_p,
    RULE: tl.constexpr,
    PRIOR: tl.constexpr,
    EPS: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The formulas of factors.repair_factors for one layer, in one program."""
    n_d, n_p = count_d.to(tl.float64), count_p.to(tl.float64)
    if RULE == "layerwise":
        mean_vd = finite_mean(None, m2_d_ptr, C, n_d, BLOCK)
        mean_vp = finite_mean(mean_p_ptr, m2_p_ptr, C, n_p, BLOCK)
        gain = tl.where(mean_vp == 0.0, 1.0, tl.sqrt(mean_vd / (mean_vp + EPS)))
    elif RULE == "asr":
        if PRIOR == "median":
            prior = lower_median(mean_p_ptr, m2_p_ptr, C, n_p, BLOCK)
        elif PRIOR == "mean":
            prior = finite_mean(mean_p_ptr, m2_p_ptr, C, n_p, BLOCK)
        else:
            prior = n_p * 0.0 + PRIOR
    for i in range(0, C, BLOCK):
        # [BLOCK]
        o_c = i + tl.arange(0, BLOCK)
        m_c = o_c < C
        b_vd = squares(None, m2_d_ptr, i, C, n_d, BLOCK)[0] / n_d
        b_vp = squares(mean_p_ptr, m2_p_ptr, i, C, n_p, BLOCK)[0] / n_p
        b_raw = tl.where(b_vp == 0.0, 1.0, tl.sqrt(b_vd / (b_vp + EPS)))
        if RULE == "layerwise":
            b_gain = tl.zeros([BLOCK], dtype=tl.float64) + gain
        elif RULE == "asr":
            b_trust = b_vp / (b_vp + prior)
            b_gain = tl.where(prior == 0.0, 1.0, b_trust * b_raw + (1.0 - b_trust))
        else:
            tl.static_assert(RULE == "channelwise", "the kernel computes no other rule")
            b_gain = b_raw
        b_shift = tl.zeros([BLOCK], dtype=tl.float64)
        if BIAS:
            b_mean_d = tl.load(mean_d_ptr + o_c, mask=m_c, other=0.0)
            b_shift = b_mean_d - b_gain * tl.load(mean_p_ptr + o_c, mask=m_c, other=0.0)
        tl.store(gain_ptr + o_c, b_gain, mask=m_c)
        tl.store(shift_ptr + o_c, b_shift, mask=m_c)


def plan_factors(
    dense: Moments, pruned: Moments, rule: Rule, prior: Prior, bias: bool, eps: float
) -> tuple[Launch, Tensor]:
    """The launch that computes gain and shift, and the float64 (2, C) tensor that it fills with them."""
    channels = pruned.channels
    found = torch.empty((2, channels), dtype=torch.float64, device=pruned.mean.device)
    block = min(triton.next_power_of_2(channels), BLOCK)
    arguments = {
        "mean_d_ptr": dense.mean.contiguous(),
        "m2_d_ptr": dense.m2.contiguous(),
        "mean_p_ptr": pruned.mean.contiguous(),
        "m2_p_ptr": pruned.m2.contiguous(),
        "gain_ptr": found[0],
        "shift_ptr": found[1],
        "C": channels,
        "count_d": dense.count,
        "count_p": pruned.count,
        "RULE": rule,
        "PRIOR": prior,
        "EPS": eps,
        "BIAS": bias,
        "BLOCK": block,
    }
    return Launch(factors_kernel, (1,), arguments, block), found


def repair_factors(
    dense: Moments, pruned: Moments, rule: Rule, prior: Prior, bias: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """Gain and shift, float64 (C,); all moments on one device."""
    if rule not in RULES:
        return factors.repair_factors(dense, pruned, rule, prior, bias, eps)
    launch, found = plan_factors(dense, pruned, rule, prior, bias, eps)
    launch.run()
    return found[0], found[1]
