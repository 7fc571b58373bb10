"""The rules of allocation: how many units each layer loses, from the units of all layers and a number of weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from .layer_scales import LayerScales
from .units import Units

# (units of each layer, number of weights to remove in all) -> number of units to remove from each layer
Allocation = Callable[[Mapping[str, Units], int], dict[str, int]]


def by_magnitude(units: Mapping[str, Units], budget: int) -> dict[str, int]:
    """One ranking by magnitude over all layers (global L1)."""
    ranked = {name: np.sort(layer.scores[~layer.protected].numpy()) for name, layer in units.items()}
    return _by_rank(ranked, units, budget)


def by_scaled_magnitude(units: Mapping[str, Units], budget: int, scales: LayerScales) -> dict[str, int]:
    """One ranking over all layers by magnitude times the factor of the layer."""
    factors = scales.factors
    scaled = {name: replace(layer, scores=layer.scores * factors.get(name, 1.0)) for name, layer in units.items()}
    return by_magnitude(scaled, budget)


def by_lamp(units: Mapping[str, Units], budget: int) -> dict[str, int]:
    """One ranking by LAMP score: w^2 over the sum of squares of all weights of the layer that are no smaller.

    Protected weights are in the sum. Sums are float64, from the largest weight down.
    """
    return _by_rank({name: lamp_scores(layer) for name, layer in units.items()}, units, budget)


def lamp_scores(layer: Units) -> np.ndarray:
    """LAMP scores of a layer's removable units, ascending; the score of a zero weight is 0."""
    squares = np.sort(layer.scores[~layer.protected].numpy()).astype(np.float64) ** 2
    protected = float(layer.scores[layer.protected].double().square().sum())
    left = protected + squares[::-1].cumsum()[::-1]
    return np.divide(squares, left, out=np.zeros_like(squares), where=squares > 0)


def by_size(units: Mapping[str, Units], budget: int) -> dict[str, int]:
    """The same density in every layer."""
    return _by_density(dict.fromkeys(units, 1.0), units, budget)


def by_erk(units: Mapping[str, Units], budget: int) -> dict[str, int]:
    """Density proportional to (sum of the weight's dimensions) / (their product), at most 1."""
    raw = {name: sum(layer.shape) / max(math.prod(layer.shape), 1) for name, layer in units.items()}
    return _by_density(raw, units, budget)


ALLOCATIONS: dict[str, Allocation] = {"global": by_magnitude, "uniform": by_size, "erk": by_erk, "lamp": by_lamp}


def _by_rank(ranked: Mapping[str, np.ndarray], units: Mapping[str, Units], budget: int) -> dict[str, int]:
    """Remove the units of smallest score over all layers, as many as the budget allows; scores in `ranked` ascend.

    The threshold is found by bisection over the bits of a float. Units equal to it are removed in the order of layers.
    """
    common = np.result_type(*ranked.values())
    ranked = {name: scores.astype(common, copy=False) for name, scores in ranked.items()}
    bits = np.dtype(f"i{common.itemsize}")

    def below(pattern: int) -> dict[str, int]:
        # non-negative floats are ordered as their bits are
        value = np.array(pattern, bits).view(common)
        return {name: int(np.searchsorted(scores, value)) for name, scores in ranked.items()}

    def left(counts: Mapping[str, int]) -> int:
        return budget - sum(units[name].size * count for name, count in counts.items())

    least, most = 0, int(np.array(np.inf, common).view(bits))
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if left(below(middle)) >= 0 else (least, middle - 1)
    removed, with_ties = below(least), below(least + 1)
    for name, layer in units.items():
        removed[name] += min(with_ties[name] - removed[name], left(removed) // max(layer.size, 1))
    return removed


def _by_density(raw: Mapping[str, float], units: Mapping[str, Units], budget: int) -> dict[str, int]:
    """Density scale * raw in each layer, between its floor and 1, with the scale that meets the budget.

    This is the fixed point of capping densities above 1 and solving again for the rest.
    """
    layers = {name: layer for name, layer in units.items() if layer.count}
    n = np.array([layer.count * layer.size for layer in layers.values()], np.float64)
    floor = n - [layer.removable * layer.size for layer in layers.values()]
    kept = _fill(n.sum() - budget, floor, n, n * [raw[name] for name in layers])
    share = (n - kept) / [layer.size for layer in layers.values()]
    return dict.fromkeys(units, 0) | _whole_units(share, layers, budget)


def by_priority(units: Mapping[str, Units], budget: int, priorities: Mapping[str, float]) -> dict[str, int]:
    """An allocation for regrowth: restore units of one weight in each layer in proportion to its priority.

    At most all pruned ones are restored, and the budget is met exactly. Layers of priority 0 come last: they share the
    rest in proportion to their number of pruned units.
    """
    pruned = np.array([layer.removable for layer in units.values()], np.float64)
    priority = np.array([max(priorities[name], 0.0) for name in units])
    positive, none, regrown = priority > 0, np.zeros_like(pruned), pruned.sum() - budget
    share = _fill(min(regrown, pruned[positive].sum()), none, pruned, priority)
    share += _fill(regrown - share.sum(), none, np.where(positive, 0.0, pruned), pruned)
    return {name: units[name].removable - count for name, count in _whole_units(share, units, regrown).items()}


def _fill(total: float, least: np.ndarray, most: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """Entries scale * slope, each between its least and its most, with the scale at which their sum is `total`.

    The sum is piecewise linear in the scale, so the scale is found by interpolation between breakpoints.
    """
    bounds = [np.divide(bound, slope, out=np.zeros_like(slope), where=slope > 0) for bound in (least, most)]
    ends = np.unique(np.concatenate([[0.0], *bounds]))
    sums = np.array([np.clip(scale * slope, least, most).sum() for scale in ends])
    return np.clip(np.interp(total, sums, ends) * slope, least, most)


def _whole_units(share: np.ndarray, units: Mapping[str, Units], budget: float) -> dict[str, int]:
    """Shares of a budget of weights in whole units, by largest remainder, at most the removable ones of each layer."""
    whole = np.floor(share)
    counts = {n: min(int(count), units[n].removable) for n, count in zip(units, whole, strict=True)}
    names = list(units)
    order = [names[index] for index in np.argsort(whole - share, kind="stable")]
    left = budget - sum(units[name].size * count for name, count in counts.items())
    while fits := [name for name in order if counts[name] < units[name].removable and units[name].size <= left]:
        for name in fits:
            if units[name].size <= left:
                counts[name] += 1
                left -= units[name].size
    return counts
