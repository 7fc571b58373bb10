"""The formulas of the repair rules: gain and shift of each channel from its dense and pruned moments. Float64."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .merging import Moments

# a channel is constant where its deviation is at most this fraction of its mean: the rounding of float32
ROUNDING = 2.0**-21

Rule = Literal["layerwise", "channelwise", "asr"]
Prior = Literal["median", "mean"] | float


@torch.no_grad()
def repair_factors(
    dense: Moments, pruned: Moments, rule: Rule, prior: Prior, bias: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """Gain and shift, float64 (C,), by the formulas in the docstring of `asr_kernels.repair_factors`.

    Raises ValueError for a rule that has no formula here.
    """
    vd, vp = dense.var, pruned.var
    # a constant channel has variance 0; what is left is float32 rounding
    vp = torch.where(vp <= (ROUNDING * pruned.mean).square(), 0.0, vp)
    if rule == "layerwise":
        raw = (_finite_mean(vd) / (_finite_mean(vp) + eps)).sqrt().expand_as(vp)
        gain = torch.where(_finite_mean(vp) == 0, 1.0, raw)
    elif rule in ("channelwise", "asr"):
        gain = torch.where(vp == 0, 1.0, (vd / (vp + eps)).sqrt())
    else:
        raise ValueError(f"there is no formula for the rule {rule!r}")
    if rule == "asr":
        lam = _prior_variance(vp, prior)
        trust = vp / (vp + lam)
        gain = torch.where(lam == 0, 1.0, trust * gain + (1 - trust))
    return gain, dense.mean - gain * pruned.mean if bias else torch.zeros_like(gain)


def _finite_mean(values: Tensor) -> Tensor:
    finite = values.isfinite()
    return torch.where(finite, values, 0.0).sum() / finite.sum().clamp(min=1)


def _prior_variance(vp: Tensor, prior: Prior) -> Tensor:
    if prior == "median":
        # nanmedian ignores NaN and takes the lower of two middle values; if all are NaN, the prior is 0
        return torch.where(vp.isfinite(), vp, torch.nan).nanmedian().nan_to_num(0.0)
    return _finite_mean(vp) if prior == "mean" else vp.new_full((), prior)
