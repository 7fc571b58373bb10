"""Allocation: the number of weights to remove from each layer for one sparsity of the model."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from numbers import Real

import numpy as np
from torch import nn

from ..errors import LayerError, called, did_you_mean
from ..network.layer_checks import split_by_objections
from ..network.layers import Selection as Selection
from ..network.layers import Selector, matching, select_layers, unwrap
from ..network.masks import tied_layers
from .units import Units

log = logging.getLogger("resuscitate")

# (units of each layer, number of weights to remove in all) -> number of units to remove from each layer
Allocation = Callable[[Mapping[str, Units], int], dict[str, int]]
Curve = list[tuple[float, float]]  # (fraction removed, residual), from (0, 0) to (1, 1)


def removal_counts(
    units: Mapping[str, Units], sparsity: float | None, method: Allocation, fixed: Mapping[str, float]
) -> dict[str, int]:
    """Number of units to remove from each layer: round(sparsity * total) weights in all, or less than one unit below.

    fixed: densities of layers that `method` does not decide. If `sparsity` is None, all other layers are unchanged.
    """
    if sparsity is None and not fixed:
        raise ValueError('sparsity is missing: give one, such as 0.9, or densities; only "n:m" implies it')
    removed = {name: _removed_at(name, units[name], density) for name, density in fixed.items()}
    free = {name: layer for name, layer in units.items() if name not in fixed}
    if sparsity is None:
        return {name: removed.get(name, 0) for name in units}
    total = sum(layer.count * layer.size for layer in units.values())
    budget = round(check_sparsity(sparsity) * total)
    least = sum(units[name].size * count for name, count in removed.items())
    most = least + sum(layer.removable * layer.size for layer in free.values())
    if not least <= budget <= most:
        lower = f"at least {least} (fixed densities, a sparsity of {least / total:.6g}) and " if least else ""
        upper = f"at most {most} can be removed, a sparsity of {math.floor(most / total * 1e6) / 1e6:.6g}"
        kept = f"with the weights that must be kept in {len(units)} layers"
        raise ValueError(f"sparsity={sparsity} removes {budget} of {total} weights; {kept} {lower}{upper}")
    removed |= method(free, budget - least) if free else {}
    return {name: removed[name] for name in units}


def by_magnitude(units: Mapping[str, Units], budget: int) -> dict[str, int]:
    """One ranking by magnitude over all layers (global L1)."""
    ranked = {name: np.sort(layer.removable_scores().numpy()) for name, layer in units.items()}
    return _by_rank(ranked, units, budget)


def by_lamp(units: Mapping[str, Units], budget: int) -> dict[str, int]:
    """One ranking by LAMP score: w^2 over the sum of squares of all weights of the layer that are no smaller.

    Protected weights are in the sum. Sums are float64, from the largest weight down.
    """
    return _by_rank({name: lamp_scores(layer) for name, layer in units.items()}, units, budget)


def lamp_scores(layer: Units) -> np.ndarray:
    """LAMP scores of a layer's removable units, ascending; the score of a zero weight is 0."""
    squares = np.sort(layer.removable_scores().numpy()).astype(np.float64) ** 2
    protected = 0.0 if layer.protected is None else float(layer.scores[layer.protected].double().square().sum())
    left = protected + squares[::-1].cumsum()[::-1]
    return np.divide(squares, left, out=np.zeros_like(squares), where=squares > 0)


def by_size(units: Mapping[str, Units], budget: int) -> dict[str, int]:
    """The same density in every layer."""
    return _by_density(dict.fromkeys(units, 1.0), units, budget)


def by_erk(units: Mapping[str, Units], budget: int) -> dict[str, int]:
    """Density proportional to (sum of the weight's dimensions) / (their product), at most 1."""
    raw = {name: sum(layer.shape) / max(math.prod(layer.shape), 1) for name, layer in units.items()}
    return _by_density(raw, units, budget)


def by_repairability(units: Mapping[str, Units], budget: int, curves: Mapping[str, Curve]) -> dict[str, int]:
    """Remove weights greedily where they add least to the residual of their layer; see `Repairability`.

    Greedy on the lower convex hull of each curve: the least sum of residuals for this budget.
    """
    steps = []
    for name, layer in units.items():
        weights = max(layer.count * layer.size, 1)
        for (r0, e0), (r1, e1) in pairwise(_lower_hull(curves[name])):
            steps.append(((e1 - e0) / ((r1 - r0) * weights), name, round(r1 * layer.count)))
    removed = dict.fromkeys(units, 0)
    for _, name, upto in sorted(steps, key=lambda step: step[0]):
        size = units[name].size
        more = min(max(min(upto, units[name].removable) - removed[name], 0), budget // max(size, 1))
        removed[name] += more
        budget -= more * size
    return removed


ALLOCATIONS: dict[str, Allocation] = {"global": by_magnitude, "uniform": by_size, "erk": by_erk, "lamp": by_lamp}
METHODS = (*ALLOCATIONS, "rr")


def check_method(method: str) -> None:
    """Raise ValueError for an unknown allocation."""
    if method not in METHODS:
        hint = did_you_mean(str(method), METHODS)
        raise ValueError(f"unknown allocation {method!r}; choose from {', '.join(METHODS)}{hint}")


def listed(selectors: Selection) -> list[Selector] | Selector | None:
    """Selectors that can be iterated more than once."""
    return selectors if selectors is None or isinstance(selectors, str | type) else list(selectors)


def fixed_densities(
    layers: Mapping[str, nn.Module], ties: Mapping[str, list[str]], densities: Mapping[str, float] | None
) -> dict[str, float]:
    """Densities by layer, from densities by glob; of layers that share a weight the first. Raises ValueError.

    layers: by name. ties: first layer with a weight -> all layers that share the weight.
    """
    fixed: dict[str, float] = {}
    first_of = {name: first for first, names in ties.items() for name in names}
    for pattern, density in (densities or {}).items():
        if not isinstance(density, float) or not 0.0 < density <= 1.0:
            raise ValueError(f"densities: {pattern!r}: {density!r} is not a float in (0, 1], the fraction that is kept")
        for name in matching(layers, pattern, "densities"):
            fixed[first_of[name]] = density
    return fixed


def prunable_layers(
    model: nn.Module, include: Selection, exclude: Selection
) -> tuple[dict[str, nn.Module], dict[str, list[str]]]:
    """The selected layers, and which of them share a weight (see `tied_layers`).

    Not returned, with a warning: layers that change their weight before use, so that a zero would not stay zero.
    Raises ValueError if no layer is selected, LayerError if all selected layers change their weight, or if a selected
    layer shares its weight with a layer that is not selected.
    """
    model = unwrap(model)
    layers = select_layers(model, include, exclude)
    if not layers:
        raise ValueError("nothing to prune: include and exclude leave no convolution or linear layer of the model")
    selected = len(layers)
    layers, found = split_by_objections(layers, "pruned")
    if found:
        reasons = [f"{name!r}: {objection}" for name, objection in found.items()]
        shown = ", ".join([*reasons[:3], *["..."] * (len(reasons) > 3)])
        log.warning("%d of %d layers are left dense: %s", len(found), selected, shown)
    owners = {id(parameter): name for name, module in layers.items() for parameter in module.parameters(recurse=False)}
    for name, module in select_layers(model).items():
        weight = module._parameters.get("weight", module._parameters.get("weight_orig"))
        if name not in layers and id(weight) in owners:
            raise LayerError(owners[id(weight)], f"shares its weight with {name!r}, which is not selected; select both")
    return layers, tied_layers(layers)


def check_sparsity(sparsity: float) -> float:
    """The sparsity itself if it is a float in [0, 1). Raises TypeError or ValueError otherwise."""
    meaning = "the fraction of the original weights that is removed"
    if not isinstance(sparsity, float):
        shown = f"sparsity={sparsity!r}" if isinstance(sparsity, Real) else "sparsity"
        kind = type(sparsity).__name__
        raise TypeError(f"{shown} is of type {kind}; give a float in [0, 1), {meaning} (0.9 keeps every tenth)")
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity={sparsity} is not in [0, 1), {meaning}")
    return sparsity


def _removed_at(name: str, layer: Units, density: float) -> int:
    removed = layer.count - round(density * layer.count)
    if removed > layer.removable:
        least = (layer.count - layer.removable) / layer.count
        raise ValueError(f"densities: {called(name)} must keep at least {least:.6g} of its weights, not {density}")
    return removed


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

    The number of weights kept is piecewise linear in the scale, so the scale is found by interpolation between
    breakpoints. This is the fixed point of capping densities above 1 and solving again for the rest. Fractions of units
    are rounded by largest remainder.
    """
    layers = {name: layer for name, layer in units.items() if layer.count}
    if not layers:
        return dict.fromkeys(units, 0)
    n = np.array([layer.count * layer.size for layer in layers.values()], np.float64)
    floor = n - [layer.removable * layer.size for layer in layers.values()]
    slope = n * [raw[name] for name in layers]
    ends = np.unique(np.concatenate([[0.0], floor / slope, n / slope]))
    kept = np.array([np.clip(scale * slope, floor, n).sum() for scale in ends])
    scale = np.interp(n.sum() - budget, kept, ends)
    share = (n - np.clip(scale * slope, floor, n)) / [layer.size for layer in layers.values()]
    whole = np.floor(share)
    removed, names = dict.fromkeys(units, 0), list(layers)
    removed |= {name: min(int(count), units[name].removable) for name, count in zip(names, whole, strict=True)}
    order = [names[index] for index in np.argsort(whole - share, kind="stable")]
    left = budget - sum(units[name].size * count for name, count in removed.items())
    while fits := [name for name in order if removed[name] < units[name].removable and units[name].size <= left]:
        for name in fits:
            if units[name].size <= left:
                removed[name] += 1
                left -= units[name].size
    return removed


def _lower_hull(curve: Curve) -> Curve:
    """The lower convex hull of a curve, left to right (Andrew's monotone chain)."""
    hull: Curve = []
    for x, y in sorted(curve):
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append((x, y))
    return hull
