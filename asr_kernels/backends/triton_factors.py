"""Gain and shift of a layer's channels from its moments in Triton: one launch, float64, formulas of `factors`."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import factors
from ..factors import Prior, Rule
from ..merging import Moments
from .triton_launch import Launch, Plans, Repeated, on_device_of

PLANS = Plans()
# rules that the kernel computes; for any other rule, and for more channels, the PyTorch formula is used
RULES = ("layerwise", "channelwise", "asr")
# most channels of the only program, which keeps them in registers: eight or 32 for each of 256 threads
BLOCKS = (2048, 8192)
ROUNDING = tl.constexpr(factors.ROUNDING)


@triton.jit
def finite_mean(b_v, m):
    """Mean of the values where m, 0 if there are none."""
    return tl.sum(tl.where(m, b_v, 0.0), axis=0) / tl.maximum(tl.sum(m.to(tl.float64), axis=0), 1.0)


@triton.jit
def lower_median(b_v, m):
    """Lower median of the values b_v >= 0 where m, 0 if there are none.

    Non-negative floats are ordered as their bit patterns. The median is between `low` and `high`, values that occur;
    their middle decides which of the two moves to the nearest value. 2048 random variances take 12 to 15 turns, and no
    values take more than 63. A sorting network of this size takes seconds to compile.
    """
    b_bits = b_v.to(tl.int64, bitcast=True)
    most = tl.full((), 0x7FF0000000000000, dtype=tl.int64)
    finite = tl.sum(m.to(tl.int32), axis=0)
    low = tl.min(tl.where(m, b_bits, most), axis=0)
    high = tl.max(tl.where(m, b_bits, 0), axis=0)
    while low < high:
        middle = low + (high - low) // 2
        m_low = m & (b_bits <= middle)
        # the median has rank (finite - 1) // 2
        below = 2 * tl.sum(m_low.to(tl.int32), axis=0) >= finite
        high = tl.where(below, tl.max(tl.where(m_low, b_bits, 0), axis=0), high)
        low = tl.where(below, low, tl.min(tl.where(m & (b_bits > middle), b_bits, most), axis=0))
    return tl.where(finite > 0, low, 0).to(tl.float64, bitcast=True)


@triton.jit(
    do_not_specialize=["C", "count_d", "count_p"],
    do_not_specialize_on_alignment=["mean_d_ptr", "m2_d_ptr", "mean_p_ptr", "m2_p_ptr"],
)
def factors_kernel(
    mean_d_ptr,  # float64 (C,), as are the next three
    m2_d_ptr,
    mean_p_ptr,
    m2_p_ptr,
    found_ptr,  # float64 (2, C): gain and shift
    rounded_ptr,  # float32 (2, C): the same
    count_d: tl.int64,  # values per channel
    count_p: tl.int64,
    C,
    RULE: tl.constexpr,
    PRIOR: tl.constexpr,
    EPS: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The formulas of factors.repair_factors for one layer, in one program that keeps all channels in registers."""
    # [BLOCK]
    o_c = tl.arange(0, BLOCK)
    m_c = o_c < C
    b_mean_p = tl.load(mean_p_ptr + o_c, mask=m_c, other=0.0)
    b_vd = tl.load(m2_d_ptr + o_c, mask=m_c, other=float("nan")) / count_d.to(tl.float64)
    b_vp = tl.load(m2_p_ptr + o_c, mask=m_c, other=float("nan")) / count_p.to(tl.float64)
    # a constant channel has variance 0; what is left is float32 rounding
    b_noise = ROUNDING * b_mean_p
    b_vp = tl.where(b_vp <= b_noise * b_noise, 0.0, b_vp)
    # false for NaN too
    m_p = b_vp < float("inf")
    b_raw = tl.where(b_vp == 0.0, 1.0, tl.sqrt(b_vd / (b_vp + EPS)))
    if RULE == "layerwise":
        mean_vp = finite_mean(b_vp, m_p)
        gain = tl.sqrt(finite_mean(b_vd, b_vd < float("inf")) / (mean_vp + EPS))
        b_gain = tl.zeros([BLOCK], dtype=tl.float64) + tl.where(mean_vp == 0.0, 1.0, gain)
    elif RULE == "asr":
        if PRIOR == "median":
            prior = lower_median(b_vp, m_p)
        elif PRIOR == "mean":
            prior = finite_mean(b_vp, m_p)
        else:
            prior = count_p.to(tl.float64) * 0.0 + PRIOR
        b_trust = b_vp / (b_vp + prior)
        b_gain = tl.where(prior == 0.0, 1.0, b_trust * b_raw + (1.0 - b_trust))
    else:
        tl.static_assert(RULE == "channelwise", "the kernel computes no other rule")
        b_gain = b_raw
    b_shift = tl.zeros([BLOCK], dtype=tl.float64)
    if BIAS:
        b_shift = tl.load(mean_d_ptr + o_c, mask=m_c, other=0.0) - b_gain * b_mean_p
    tl.store(found_ptr + o_c, b_gain, mask=m_c)
    tl.store(found_ptr + C + o_c, b_shift, mask=m_c)
    tl.store(rounded_ptr + o_c, b_gain.to(tl.float32), mask=m_c)
    tl.store(rounded_ptr + C + o_c, b_shift.to(tl.float32), mask=m_c)


def plan_factors(
    dense: Moments, pruned: Moments, rule: Rule, prior: Prior, bias: bool, eps: float
) -> tuple[Launch, Tensor]:
    """The launch that computes gain and shift, and the float64 (2, C) tensor that it fills with them."""
    channels = pruned.channels
    found = torch.empty((2, channels), dtype=torch.float64, device=pruned.mean.device)
    block = next(block for block in BLOCKS if channels <= block)
    arguments: dict[str, Any] = {
        "mean_d_ptr": dense.mean,
        "m2_d_ptr": dense.m2,
        "mean_p_ptr": pruned.mean,
        "m2_p_ptr": pruned.m2,
    }
    arguments |= {"found_ptr": found, "rounded_ptr": found.float(), "C": channels, "BLOCK": block}
    arguments |= {"count_d": dense.count, "count_p": pruned.count}
    arguments |= {"RULE": rule, "PRIOR": prior, "EPS": eps, "BIAS": bias}
    return Launch(factors_kernel, (1,), arguments, 256), found


def repair_factors(
    dense: Moments, pruned: Moments, rule: Rule, prior: Prior, bias: bool, eps: float
) -> tuple[Tensor, ...]:
    """Gain and shift, float64 (C,), then both in float32; all moments on one device."""
    channels, device = pruned.channels, pruned.mean.device
    if rule not in RULES or channels > BLOCKS[-1]:
        return factors.repair_factors(dense, pruned, rule, prior, bias, eps)
    key = (channels, device, rule, prior, bias, eps)
    launch = PLANS.get(key)
    if launch is None:
        launch = PLANS.add(key, Repeated(plan_factors(dense, pruned, rule, prior, bias, eps)[0], 8))
    found = torch.empty((2, channels), dtype=torch.float64, device=device)
    rounded = torch.empty((2, channels), dtype=torch.float32, device=device)
    moments = (dense.mean, dense.m2, pruned.mean, pruned.m2)
    with on_device_of(found):
        launch(*(each.contiguous() for each in moments), found, rounded, dense.count, pruned.count)
    return *found.unbind(), *rounded.unbind()
