"""From moments to corrections: which gain and shift bring a pruned channel back to its dense one. Float64."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from .moments import ChannelMoments

Rule = Literal["layerwise", "channelwise", "asr"]
Prior = Literal["median", "mean"] | float


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
      of vp (the lower of two middles), its mean, or a positive number.

    The shift is mean_d - gain * mean_p, or 0 without `bias`. The gain is 1 for a dead channel (vp = 0), and for the
    whole layer where the prior is 0 (half the channels dead). Statistics over channels take the finite ones; a NaN or
    an infinity stays in its own channel. Raises ValueError for moments of nothing, unlike C, an unknown rule or prior.
    """
    if dense.channels != pruned.channels:
        raise ValueError(f"{dense.channels} dense channels cannot repair {pruned.channels} pruned ones")
    if not dense.count or not pruned.count:
        raise ValueError("cannot repair from moments of no values; call update_ or channel_moments first")
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, not {eps}")
    vd, vp = dense.var, pruned.var
    if rule == "layerwise":
        raw = (_finite_mean(vd) / (_finite_mean(vp) + eps)).sqrt().expand_as(vp)
        gain = torch.where(_finite_mean(vp) == 0, 1.0, raw)
    elif rule == "channelwise":
        gain = torch.where(vp == 0, 1.0, (vd / (vp + eps)).sqrt())
    elif rule == "asr":
        lam = _prior_variance(vp, prior)
        raw = torch.where(vp == 0, 1.0, (vd / (vp + eps)).sqrt())
        trust = vp / (vp + lam)
        gain = torch.where(lam == 0, 1.0, trust * raw + (1 - trust))
    else:
        raise ValueError(f"unknown rule {rule!r}; there are {', '.join(get_args(Rule))}")
    return gain, dense.mean - gain * pruned.mean if bias else torch.zeros_like(gain)


def _finite_mean(values: Tensor) -> Tensor:
    finite = values.isfinite()
    return torch.where(finite, values, 0.0).sum() / finite.sum().clamp(min=1)


def _prior_variance(vp: Tensor, prior: Prior) -> Tensor:
    if prior == "median":
        # nanmedian takes the lower of two middles and passes over NaN; all NaN leaves nothing to trust
        return torch.where(vp.isfinite(), vp, torch.nan).nanmedian().nan_to_num(0.0)
    if prior == "mean":
        return _finite_mean(vp)
    if isinstance(prior, str) or not 0 < prior < float("inf"):
        raise ValueError(f"prior must be 'median', 'mean' or a positive variance, not {prior!r}")
    return vp.new_tensor(prior)
