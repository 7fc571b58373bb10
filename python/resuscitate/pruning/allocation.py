"""How much each layer keeps: one sparsity for the model, shared out over its layers."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from inspect import signature
from itertools import pairwise
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..errors import CalibrationError, LayerError, called, did_you_mean
from ..network.layer_checks import set_apart
from ..network.layers import Selector, matching, select_layers, unwrap
from ..network.masks import tied_layers
from .units import Units, check_floors, units_of

if TYPE_CHECKING:
    pass

log = logging.getLogger("resuscitate")

# the units of every layer, the number of weights to remove in all -> the number of units to remove from each
Allocation = Callable[[Mapping[str, Units], int], dict[str, int]]
Curve = list[tuple[float, float]]  # (fraction removed, residual), from (0, 0) to (1, 1)


def allocate(
    model: nn.Module,
    sparsity: float | None = None,
    method: str = "global",
    *,
    calibration: Any = None,
    densities: Mapping[str, float] | None = None,
    min_per_layer: int = 1,
    min_per_channel: int = 0,
    include: Iterable[Selector] | Selector | None = None,
    exclude: Iterable[Selector] | Selector | None = None,
    max_samples: int | None = None,
    batch_size: int = 128,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> dict[str, float]:
    """Fraction of weights that each selected layer keeps, {layer name: density}, for one sparsity over all of them.

    The densities are exact counts divided by layer sizes: round(sparsity * total) weights go, to the last one. A
    weight shared by several layers counts once and gives them one density. The model is not changed.

    sparsity: a float in [0, 1), of the original weights; None: only the layers that `densities` names lose any.
    method:
        "global": one ranking of all weights by magnitude (global L1).
        "uniform": the same density everywhere.
        "erk": density proportional to (sum of the weight's dimensions) / (their product), at most 1 (Erdos-Renyi
            kernel, arXiv 1911.11134, section 3): thin layers keep more.
        "lamp": one ranking by w^2 / (sum of the squares of all weights of its layer that are no smaller)
            (arXiv 2010.07611, equation 1).
        "rr": relative repairability, **our reading** of arXiv 2605.25508: weights go where the least of a layer's
            output is lost beyond what a gain and a shift per channel could bring back; see `Repairability`.
    calibration: for "rr": unlabelled images, as for `repair`, or a `Repairability` measured on this model before.
    densities: {glob over layer names: density in (0, 1]} for layers that are to keep just that, such as
        {"conv1": 1.0}; a later glob overrules an earlier one. The others share what is left of the budget.
    min_per_layer, min_per_channel: least number of weights that stay in each layer, and in each output channel.
    max_samples, batch_size, forward_fn, dtype, device, seed, progress: of what "rr" measures, as in `repair`.

    Raises ValueError for an unknown method, an option of "rr" where nothing is measured, a sparsity outside [0, 1), and
    floors or densities that leave no room for it, saying what would; TypeError for a sparsity that is not a float;
    LayerError for a weight that is not finite.
    """
    measuring: dict[str, Any] = {"max_samples": max_samples, "batch_size": batch_size, "forward_fn": forward_fn}
    measuring |= {"dtype": dtype, "device": device, "seed": seed, "progress": progress}
    check_measuring(method, calibration, measuring)
    check_floors(min_per_layer, min_per_channel)
    include, exclude = listed(include), listed(exclude)
    layers, ties = prunable(model, include, exclude)
    units = {first: units_of(first, layers[first], False, min_per_layer, min_per_channel) for first in ties}
    pinned = pin(layers, ties, densities)
    measuring |= {"include": include, "exclude": exclude}
    removed = removals(units, sparsity, allocator(method, model, calibration, **measuring), pinned)
    kept = {
        name: (units[first].count - removed[first]) / units[first].count
        for first, names in ties.items()
        for name in names
    }
    return {name: kept[name] for name in layers}


def removals(
    units: Mapping[str, Units], sparsity: float | None, method: Allocation, pinned: Mapping[str, float]
) -> dict[str, int]:
    """Number of units to remove from each layer: round(sparsity * total) weights in all, or less than a unit short.

    `pinned` layers keep the density given; where `sparsity` is None nothing else goes.
    """
    if sparsity is None and not pinned:
        raise ValueError('sparsity is missing: give one, such as 0.9, or densities; only "n:m" implies it')
    removed = {name: _removed_at(name, units[name], density) for name, density in pinned.items()}
    free = {name: layer for name, layer in units.items() if name not in pinned}
    if sparsity is None:
        return {name: removed.get(name, 0) for name in units}
    total = sum(layer.count * layer.size for layer in units.values())
    budget = round(check_sparsity(sparsity) * total)
    gone = sum(units[name].size * count for name, count in removed.items())
    most = gone + sum(layer.spare * layer.size for layer in free.values())
    if not gone <= budget <= most:
        least = f"at least {gone} (those of fixed density, a sparsity of {gone / total:.6g}) and " if gone else ""
        raise ValueError(
            f"sparsity={sparsity} removes {budget} of {total} weights; with what must stay in {len(units)} layers "
            f"{least}at most {most} can go, a sparsity of {math.floor(most / total * 1e6) / 1e6:.6g}"
        )
    removed |= method(free, budget - gone) if free else {}
    return {name: removed[name] for name in units}


def by_magnitude(units: Mapping[str, Units], budget: int) -> dict[str, int]:
    """One ranking by magnitude over all layers (global L1)."""
    ranked = {name: np.sort(layer.removable().numpy()) for name, layer in units.items()}
    return _by_rank(ranked, units, budget)


def by_lamp(units: Mapping[str, Units], budget: int) -> dict[str, int]:
    """One ranking by LAMP score: w^2 over the sum of squares of what is left in the layer once all before w is gone.

    What must stay counts among that. Sums run in float64 from the large end.
    """
    return _by_rank({name: lamp_scores(layer) for name, layer in units.items()}, units, budget)


def lamp_scores(layer: Units) -> np.ndarray:
    """The LAMP scores of those of a layer's units that may go, ascending; a weight of zero scores 0."""
    squares = np.sort(layer.removable().numpy()).astype(np.float64) ** 2
    stay = 0.0 if layer.stays is None else float(layer.scores[layer.stays].double().square().sum())
    left = stay + squares[::-1].cumsum()[::-1]
    return np.divide(squares, left, out=np.zeros_like(squares), where=squares > 0)


def by_size(units: Mapping[str, Units], budget: int) -> dict[str, int]:
    """The same density for every layer."""
    return _by_density(dict.fromkeys(units, 1.0), units, budget)


def by_erk(units: Mapping[str, Units], budget: int) -> dict[str, int]:
    """Density proportional to (sum of the weight's dimensions) / (their product), the proportion solved for."""
    thin = {name: sum(layer.shape) / max(math.prod(layer.shape), 1) for name, layer in units.items()}
    return _by_density(thin, units, budget)


def by_repairability(units: Mapping[str, Units], budget: int, curves: Mapping[str, Curve]) -> dict[str, int]:
    """Greedily where the next weights add least to the residual of their layer; see `Repairability`.

    Greedy on the lower convex hull of each curve, which makes it the least sum of residuals at this budget.
    """
    steps = []
    for name, layer in units.items():
        hull = _lower_hull(curves[name])
        for (r0, e0), (r1, e1) in pairwise(hull):
            weights = layer.count * layer.size
            steps.append(((e1 - e0) / ((r1 - r0) * max(weights, 1)), name, round(r1 * layer.count)))
    removed = dict.fromkeys(units, 0)
    for _, name, upto in sorted(steps, key=lambda step: step[0]):
        size = units[name].size
        more = min(max(min(upto, units[name].spare) - removed[name], 0), budget // max(size, 1))
        removed[name] += more
        budget -= more * size
    return removed


ALLOCATIONS: dict[str, Allocation] = {"global": by_magnitude, "uniform": by_size, "erk": by_erk, "lamp": by_lamp}
METHODS = (*ALLOCATIONS, "rr")


def check_method(method: str) -> None:
    """ValueError for an allocation that there is not."""
    if method not in METHODS:
        hint = did_you_mean(str(method), METHODS)
        raise ValueError(f"unknown allocation {method!r}; choose from {', '.join(METHODS)}{hint}")


def check_measuring(method: str, calibration: Any, measuring: Mapping[str, Any]) -> None:
    """ValueError for an option of what "rr" measures that is not its default where nothing is measured."""
    from .repairability import Repairability

    if method == "rr" and not isinstance(calibration, Repairability):
        return
    defaults = signature(allocate).parameters
    for option, value in measuring.items():
        if value != defaults[option].default:
            raise ValueError(f"{option} is of what allocation 'rr' measures from images, and here nothing is measured")


def listed(selectors: Iterable[Selector] | Selector | None) -> list[Selector] | Selector | None:
    """Selectors that can be gone through more than once."""
    return selectors if selectors is None or isinstance(selectors, str | type) else list(selectors)


def allocator(method: str, model: nn.Module, calibration: Any, **measuring: Any) -> Allocation:
    """The allocation of that name; "rr" measures the images once it is asked, by `Repairability.measure`."""
    check_method(method)
    if method != "rr":
        return ALLOCATIONS[method]
    from .repairability import Repairability

    if calibration is None:
        raise CalibrationError("allocation 'rr' measures the model: pass calibration, unlabelled images as for repair")

    def measured(units: Mapping[str, Units], budget: int) -> dict[str, int]:
        found = calibration
        if not isinstance(found, Repairability):
            found = Repairability.measure(model, calibration, **measuring)
        return by_repairability(units, budget, {name: found.curve(name) for name in units})

    return measured


def pin(
    layers: Mapping[str, nn.Module], ties: Mapping[str, list[str]], densities: Mapping[str, float] | None
) -> dict[str, float]:
    """The layers (the first of those that share a weight) whose density is given, by glob; ValueError if it is none."""
    pinned: dict[str, float] = {}
    first_of = {name: first for first, names in ties.items() for name in names}
    for pattern, density in (densities or {}).items():
        if not isinstance(density, float) or not 0.0 < density <= 1.0:
            raise ValueError(f"densities: {pattern!r}: {density!r} is not a float in (0, 1], the fraction that stays")
        for name in matching(layers, pattern, "densities"):
            pinned[first_of[name]] = density
    return pinned


def prunable(
    model: nn.Module,
    include: Iterable[Selector] | Selector | None,
    exclude: Iterable[Selector] | Selector | None,
) -> tuple[dict[str, nn.Module], dict[str, list[str]]]:
    """The selected layers, and which of them share a weight (see `tied_layers`).

    Left out, with a warning: layers that do not compute with their weight as it is, in which a zero would not be one.
    Raises ValueError when none is selected, LayerError when all are such layers, and when a selected layer shares its
    weight with one that is not.
    """
    model = unwrap(model)
    layers = select_layers(model, include, exclude)
    if not layers:
        raise ValueError("nothing to prune: include and exclude leave no convolution or linear layer of the model")
    selected = len(layers)
    layers, found = set_apart(layers, "pruned")
    if found:
        reasons = [f"{name!r}: {objection}" for name, objection in found.items()]
        more = ", ..." if len(reasons) > 3 else ""
        log.warning("%d of %d layers are left dense: %s%s", len(found), selected, ", ".join(reasons[:3]), more)
    owners = {id(parameter): name for name, module in layers.items() for parameter in module.parameters(recurse=False)}
    for name, module in select_layers(model).items():
        weight = module._parameters.get("weight", module._parameters.get("weight_orig"))
        if name not in layers and id(weight) in owners:
            raise LayerError(owners[id(weight)], f"shares its weight with {name!r}, which is not selected; select both")
    return layers, tied_layers(layers)


def check_sparsity(sparsity: float) -> float:
    """The sparsity itself if it is a float in [0, 1); TypeError or ValueError otherwise, saying why."""
    if not isinstance(sparsity, float):
        shown = f"sparsity={sparsity!r}" if isinstance(sparsity, Real) else "sparsity"
        raise TypeError(
            f"{shown} is of type {type(sparsity).__name__}; give a float in [0, 1), the fraction of the original "
            "weights that goes (0.9 keeps every tenth)"
        )
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity={sparsity} is not in [0, 1), the fraction of the original weights that goes")
    return sparsity


def _removed_at(name: str, layer: Units, density: float) -> int:
    removed = layer.count - round(density * layer.count)
    if removed > layer.spare:
        least = (layer.count - layer.spare) / layer.count
        raise ValueError(f"densities: {called(name)} must keep at least {least:.6g} of its weights, not {density}")
    return removed


def _by_rank(ranked: Mapping[str, np.ndarray], units: Mapping[str, Units], budget: int) -> dict[str, int]:
    """Remove the units of least score over all layers, as many as the budget holds; `ranked` scores ascend.

    The threshold is found by bisection over the bits of a float. Units that tie with it go in the order of the layers.
    """
    common = np.result_type(*ranked.values())
    ranked = {name: scores.astype(common, copy=False) for name, scores in ranked.items()}
    bits = np.dtype(f"i{common.itemsize}")

    def below(pattern: int) -> dict[str, int]:
        # floats that are not negative stand in the order of their bits
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
    """Keep scale * raw of every layer, between its floor and all, at the scale that meets the budget.

    What is kept grows with the scale in straight pieces, so the scale is found between two of their ends: the fixed
    point of capping the layers that exceed 1 and solving again for the rest. Units by the largest remainder.
    """
    layers = {name: layer for name, layer in units.items() if layer.count}
    if not layers:
        return dict.fromkeys(units, 0)
    n = np.array([layer.count * layer.size for layer in layers.values()], np.float64)
    floor = n - [layer.spare * layer.size for layer in layers.values()]
    slope = n * [raw[name] for name in layers]
    ends = np.unique(np.concatenate([[0.0], floor / slope, n / slope]))
    kept = np.array([np.clip(scale * slope, floor, n).sum() for scale in ends])
    scale = np.interp(n.sum() - budget, kept, ends)
    wanted = n - np.clip(scale * slope, floor, n)
    share = wanted / [layer.size for layer in layers.values()]
    whole = np.floor(share)
    removed = dict.fromkeys(units, 0) | {
        name: min(int(count), layer.spare) for (name, layer), count in zip(layers.items(), whole, strict=True)
    }
    names = list(layers)
    order = [names[index] for index in np.argsort(whole - share, kind="stable")]
    left = budget - sum(units[name].size * count for name, count in removed.items())
    while fits := [name for name in order if removed[name] < units[name].spare and units[name].size <= left]:
        for name in fits:
            if units[name].size <= left:
                removed[name] += 1
                left -= units[name].size
    return removed


def _lower_hull(curve: Curve) -> Curve:
    """The lower convex hull of a curve, left to right (Andrew's monotone chain)."""
    hull: Curve = []
    for x, y in sorted(curve):
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (y - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((x, y))
    return hull
