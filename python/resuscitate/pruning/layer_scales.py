"""Allocation by measured loss: magnitudes are ranked over all layers, each layer's times a factor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

import numpy as np

from .curves import Curve, by_curves
from .units import Units

POINTS = 120  # of a curve between the densities that were measured
LEAST_LOST, MOST_LOST = 1e-6, 0.999  # of the variance; the logarithms need these bounds


@dataclass(frozen=True)
class LayerScales:
    """A factor of the magnitudes of each layer, 1 for a layer that is not named: for allocation "measured".

    Larger factors keep more. `compress` measures them.
    """

    factors: Mapping[str, float]

    @classmethod
    def of_losses(
        cls,
        units: Mapping[str, Units],
        sparsity: float,
        lost: Mapping[str, Mapping[float, float]],
        cost: Mapping[str, float],
    ) -> LayerScales:
        """The factors with which one ranking reaches a sparsity at the least sum of losses.

        lost: {layer: {density: part of the variance of its outputs that is lost}}. cost: for each layer, by how much
        the loss at the network's output rises with that part e. The loss of a layer is -cost log(1 - e), which is cost
        times e while e is small, and has no bound where nothing of the outputs is left. A layer that was not measured
        gets the median factor.
        """
        known = {name: each for name, each in units.items() if name in cost}
        budget = round(sparsity * sum(each.count * each.size for each in known.values()))
        removed = by_curves(known, budget, {name: _curve(lost[name], cost[name]) for name in known})
        factors = {name: 1 / max(_threshold(each, removed[name]), 1e-12) for name, each in known.items() if each.count}
        usual = median(factors.values()) if factors else 1.0
        return cls({name: factors.get(name, usual) / usual for name in units})

    def power(self, exponent: float) -> LayerScales:
        """The factors to a power: 0 is a global ranking."""
        return LayerScales({name: factor**exponent for name, factor in self.factors.items()})


def _threshold(units: Units, removed: int) -> float:
    """The least score that stays; one in fifty units is taken to go, lest the factor have no bound."""
    scores = np.sort(units.scores.numpy())
    return float(scores[min(max(removed, units.count // 50), units.count - 1)])


def _curve(lost: Mapping[float, float], cost: float) -> Curve:
    """The loss by the fraction removed, from parts lost by density: linear between in their logarithms."""
    densities = np.array([1.0, *sorted(lost, reverse=True)])
    parts = np.clip([0.0, *(lost[density] for density in densities[1:])], LEAST_LOST, MOST_LOST)
    at = np.geomspace(1.0, densities[-1] / 4, POINTS)
    found = np.exp(np.interp(-np.log(at), -np.log(densities), np.log(np.maximum.accumulate(parts))))
    below = at < densities[-1]
    found[below] = parts[-1] + (MOST_LOST - parts[-1]) * (1 - at[below] / densities[-1])
    losses = -cost * np.log1p(-found)
    return [(0.0, 0.0), *zip((1 - at[1:]).tolist(), losses[1:].tolist(), strict=True)]
