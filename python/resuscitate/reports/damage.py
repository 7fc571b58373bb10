"""The damage of pruning to each channel of a layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LayerDamage:
    """For each output channel of one layer, float64 (C,): dense variance, pruned over dense variance, correlation.

    Ratio and correlation are 1 where nothing was lost. A gain can restore the variance, not the correlation. The ratio
    is NaN where the dense channel is constant.
    """

    variance: Tensor
    ratio: Tensor
    correlation: Tensor
