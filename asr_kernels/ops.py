"""The public operations that repair: gain and shift from moments, and their application in place."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from . import compiled, eager, factors
from .factors import Prior, Rule
from .moments import ChannelMoments, channel_moments


def repair_factors(
    dense: ChannelMoments,
    pruned: ChannelMoments,
    *,
    rule: Rule = "asr",
    prior: Prior = "median",
    bias: bool = True,
    eps: float = 1e-8,
) -> tuple[Tensor, Tensor]:
    """Gain and shift, float64 (C,), such that `y <- gain * y + shift` repairs the pruned outputs y.

    With vd and vp the dense and pruned variance of a channel (arXiv 2605.21426, "Adaptive Signal Resuscitation"):

    - `layerwise`: one gain, sqrt(mean(vd) / (mean(vp) + eps)), for all channels;
    - `channelwise`: raw = sqrt(vd / (vp + eps));
    - `asr`: s * raw + (1 - s) with s = vp / (vp + prior), so always between 1 and raw. `prior` is the layer's median
      of vp (the lower of two middle values), its mean, or a positive number.

    The shift is mean_d - gain * mean_p, or 0 without `bias`. The gain is 1 for a dead channel (vp = 0, or at most the
    float32 rounding of a constant), and for the whole layer where the prior is 0 (half the channels dead). Statistics
    over channels use finite values only; a NaN or an infinity stays in its own channel. Dense moments are moved to the
    device of the pruned moments; otherwise the host never waits for the device.

    Raises ValueError for moments of no values, a different C, an unknown rule or prior, a negative eps.
    """
    return _factors(dense, pruned, rule, prior, bias, eps)[:2]


def _factors(
    dense: ChannelMoments, pruned: ChannelMoments, rule: Rule, prior: Prior, bias: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gain and shift, checked; then both again, in float32 where that costs nothing."""
    if dense.channels != pruned.channels:
        raise ValueError(f"{dense.channels} dense channels cannot repair {pruned.channels} pruned ones")
    if not dense.count or not pruned.count:
        raise ValueError("cannot repair from moments of no values; call update_ or channel_moments first")
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, not {eps}")
    if rule not in get_args(Rule):
        raise ValueError(f"unknown rule {rule!r}; there are {', '.join(get_args(Rule))}")
    if prior not in ("median", "mean") and (isinstance(prior, str) or not 0 < prior < float("inf")):
        raise ValueError(f"prior must be 'median', 'mean' or a positive variance, not {prior!r}")
    dense = dense.to(pruned.mean.device)
    if torch.compiler.is_compiling():
        gain, shift = factors.repair_factors(dense, pruned, rule, prior, bias, eps)
        return gain, shift, gain, shift
    return eager.repair_factors(dense, pruned, rule, prior, bias, eps)


def affine_(x: Tensor, gain: Tensor, shift: Tensor, channel_dim: int = 1, *, relu: bool = False) -> Tensor:
    """x <- gain * x + shift per channel, in place; returns x. With `relu`, negative results then become 0.

    `x` as in `channel_moments`. A view with gaps is allowed: only the memory of its own values is written. `gain` and
    `shift`: shape (C,), any floating dtype and device. Computed in float32 (float64 for float64) and rounded once to
    the dtype of x. The version counter of x increases, as for any in-place operation, so autograd refuses a backward
    pass that needs a saved earlier value of x. An empty tensor is unchanged.

    Raises ValueError for other shapes or for memory that overlaps itself (expanded tensors), TypeError for another
    dtype.
    """
    eager.check(x, channel_dim, empty=True)
    channels = x.shape[channel_dim]
    for name, factor in (("gain", gain), ("shift", shift)):
        if factor.shape != (channels,):
            raise ValueError(
                f"{name} has shape {tuple(factor.shape)}, but x has {channels} channels on axis {channel_dim}"
            )
    apply = compiled.affine_ if torch.compiler.is_compiling() else eager.affine_
    apply(x, gain, shift, channel_dim, relu)
    return x


def repair_(
    x: Tensor,
    dense_moments: ChannelMoments,
    rule: Rule = "asr",
    *,
    prior: Prior = "median",
    bias: bool = True,
    eps: float = 1e-8,
    channel_dim: int = 1,
    relu: bool = False,
) -> tuple[Tensor, Tensor, ChannelMoments]:
    """Measure the pruned outputs `x`, compute their correction with `repair_factors`, and apply it in place.

    Returns the applied gain and shift, float64 (C,), and the moments of `x` before the correction. On a GPU this takes
    four launches, without waiting for the host, so a CUDA graph can capture it. Dense moments from another device are
    moved first. Raises the errors of `channel_moments`, `repair_factors` and `affine_`; after one `x` is unchanged.
    """
    pruned = channel_moments(x, channel_dim)
    gain, shift, gain_32, shift_32 = _factors(dense_moments, pruned, rule, prior, bias, eps)
    double = x.dtype == torch.float64
    affine_(x, gain if double else gain_32, shift if double else shift_32, channel_dim, relu=relu)
    return gain, shift, pruned
