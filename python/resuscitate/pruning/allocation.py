"""Allocation: the number of weights to remove from each layer for one sparsity of the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from numbers import Real
from typing import Any, Unpack

from torch import nn

from ..errors import CalibrationError, called, did_you_mean
from ..network.layers import Selection, effective_weight, is_depthwise, matching, out_channels, reusable
from ..runtime.distributed import fails_on_all
from ..runtime.options import RunOptions, run_options
from .allocation_rules import ALLOCATIONS, Allocation, by_scaled_magnitude
from .layer_scales import LayerScales
from .repairability import Repairability, by_repairability
from .units import ChannelFloors, Units, channel_floors, check_floors, prunable_layers, units_of

# weights of a depthwise channel that `compress` keeps at least, and the most of all kept weights that these may be
DEPTHWISE, DEPTHWISE_PART = 2, 0.25
METHODS = (*ALLOCATIONS, "rr", "measured")


@fails_on_all
def allocate(
    model: nn.Module,
    sparsity: float | None = None,
    method: str = "global",
    *,
    calibration: Any = None,
    densities: Mapping[str, float] | None = None,
    min_per_layer: int = 1,
    min_per_channel: ChannelFloors = 0,
    include: Selection = None,
    exclude: Selection = None,
    **options: Unpack[RunOptions],
) -> dict[str, float]:
    """Density (fraction of weights kept) of each selected layer, {layer name: density}, for one sparsity over all.

    The densities are exact counts divided by layer sizes: exactly round(sparsity * total) weights are removed. A weight
    shared by several layers counts once, and these layers have one density. The model is not changed.

    sparsity: a float in [0, 1), of the original weights; None: only the layers named in `densities` lose weights.
    method:
        "global": one ranking of all weights by magnitude (global L1).
        "uniform": the same density everywhere.
        "erk": density proportional to (sum of the weight's dimensions) / (their product), at most 1 (Erdos-Renyi
            kernel, arXiv 1911.11134, section 3): small layers keep more.
        "lamp": one ranking by w^2 / (sum of the squares of all weights of its layer that are no smaller)
            (arXiv 2010.07611, equation 1).
        "rr": relative repairability, **our reading** of arXiv 2605.25508: weights are removed where they add least to
            the part of a layer's output that no gain and shift per channel can restore; see `Repairability`.
        "measured": one ranking of all weights by magnitude times a factor of their layer; see `LayerScales`.
    calibration: for "rr": calibration images, as for `repair`, or a `Repairability` measured on this model. For
        "measured": `LayerScales`. Else None.
    densities: {glob over layer names: density in (0, 1]} of layers with a fixed density, such as {"conv1": 1.0}; a
        later glob overrides an earlier one. The rest of the budget is removed from the other layers.
    min_per_layer: least number of weights kept in each layer. min_per_channel: in each output channel, of all layers or
        {glob over layer names: number}; a later glob overrides an earlier one.
    options: of the measurement for "rr", see `RunOptions`.

    Raises ValueError for an unknown method, for `calibration` or an option of a measurement if nothing is measured, for
    a sparsity outside [0, 1), and for floors or densities that do not admit it; TypeError for a sparsity that is not a
    float; LayerError for a weight that is not finite.
    """
    check_method(method)
    check_measurement(method, calibration, options)
    check_floors(min_per_layer, min_per_channel)
    include, exclude = reusable(include), reusable(exclude)
    layers, first_of = prunable_layers(model, include, exclude)
    first = {name: layers[name] for name in dict.fromkeys(first_of.values())}
    floors = channel_floors(first, min_per_channel)
    units = {name: units_of(name, layer, min_per_layer, floors[name]) for name, layer in first.items()}
    fixed = fixed_densities(layers, first_of, densities)
    allocation = choose_allocation(method, model, calibration, include=include, exclude=exclude, **options)
    removed = removal_counts(units, sparsity, allocation, fixed)
    kept = {name: (each.count - removed[name]) / each.count for name, each in units.items()}
    return {name: kept[first] for name, first in first_of.items()}


def check_measurement(method: str, calibration: Any, options: Mapping[str, Any]) -> None:
    """Raise ValueError for calibration images, or a run-time option, where nothing is measured."""
    run_options("the measurement for allocation 'rr'", options)
    if method not in ("rr", "measured") and calibration is not None:
        raise ValueError(f"allocation {method!r} measures nothing: leave calibration out, or choose allocation 'rr'")
    if options and (method != "rr" or isinstance(calibration, Repairability)):
        option, reason = next(iter(options)), "is of the measurement for allocation 'rr', and nothing is measured here"
        raise ValueError(f"{option} {reason}; leave {option} out")


def choose_allocation(method: str, model: nn.Module, calibration: Any, **measuring: Any) -> Allocation:
    """The allocation of this name. "rr" measures when called, after sparsity, floors and densities are checked."""
    if method == "measured":
        if not isinstance(calibration, LayerScales):
            remedy = "use compress, which measures them, or pass calibration=LayerScales({layer: factor})"
            raise CalibrationError(f"allocation 'measured' needs the factors of the layers: {remedy}")
        return partial(by_scaled_magnitude, scales=calibration)
    if method != "rr":
        return ALLOCATIONS[method]
    if calibration is None:
        raise CalibrationError("allocation 'rr' measures the model: pass calibration, unlabelled images as for repair")
    if isinstance(calibration, Repairability):
        return partial(by_repairability, measured=calibration)
    return lambda units, budget: by_repairability(units, budget, Repairability.measure(model, calibration, **measuring))


def removal_counts(
    units: Mapping[str, Units],
    sparsity: float | None,
    method: Allocation,
    fixed: Mapping[str, float],
    what: str = "weights",
) -> dict[str, int]:
    """Number of units to remove from each layer: round(sparsity * total) weights in all, or less than one unit below.

    fixed: densities of layers that `method` does not decide. If `sparsity` is None, all other layers are unchanged.
    what: what the units' sizes count, for the message.
    """
    if sparsity is None and not fixed:
        raise ValueError('sparsity is missing: give one, such as 0.9, or densities; only "n:m" implies it')
    removed: dict[str, int] = {}
    for name, density in fixed.items():
        layer = units[name]
        removed[name] = layer.count - round(density * layer.count)
        if removed[name] > layer.removable:
            floor = (layer.count - layer.removable) / layer.count
            raise ValueError(f"densities: {called(name)} must keep at least {floor:.6g} of its weights, not {density}")
    if sparsity is None:
        return dict.fromkeys(units, 0) | removed
    free = {name: layer for name, layer in units.items() if name not in fixed}
    total = sum(layer.count * layer.size for layer in units.values())
    budget = round(check_sparsity(sparsity) * total)
    least = sum(units[name].size * count for name, count in removed.items())
    most = least + sum(layer.removable * layer.size for layer in free.values())
    if not least <= budget <= most:
        lower = f"at least {least} (fixed densities, a sparsity of {least / total:.6g}) and " if least else ""
        upper = f"at most {most} can be removed, a sparsity of {math.floor(most / total * 1e6) / 1e6:.6g}"
        kept = f"with the {what} that must be kept in {len(units)} layers"
        raise ValueError(f"sparsity={sparsity} removes {budget} of {total} {what}; {kept} {lower}{upper}")
    return removed | (method(free, budget - least) if free else {})


def check_method(method: str) -> None:
    """Raise ValueError for an unknown allocation."""
    if method not in METHODS:
        hint = did_you_mean(str(method), METHODS)
        raise ValueError(f"unknown allocation {method!r}; choose from {', '.join(METHODS)}{hint}")


def fixed_densities(
    layers: Mapping[str, nn.Module], first_of: Mapping[str, str], densities: Mapping[str, float] | None
) -> dict[str, float]:
    """Densities by the first layer that has a weight, from densities by glob. Raises ValueError."""
    fixed: dict[str, float] = {}
    for pattern, density in (densities or {}).items():
        if not isinstance(density, float) or not 0.0 < density <= 1.0:
            raise ValueError(f"densities: {pattern!r}: {density!r} is not a float in (0, 1], the fraction that is kept")
        for name in matching(layers, pattern, "densities"):
            fixed[first_of[name]] = density
    return fixed


def depthwise_floors(
    model: nn.Module,
    sparsity: float,
    densities: Mapping[str, float] | None = None,
    include: Selection = None,
    exclude: Selection = None,
) -> dict[str, int]:
    """Weights that each channel of the depthwise layers should keep, by layer: `DEPTHWISE`, or fewer.

    A depthwise channel without weights is constant, and the weights of other layers that compute or read it are of no
    use. The floors take at most `DEPTHWISE_PART` of the weights that are kept. Layers of fixed densities have none.
    """
    layers, first_of = prunable_layers(model, include, exclude)
    fixed = fixed_densities(layers, first_of, densities)
    sizes = {name: effective_weight(name, layers[name]).numel() for name in dict.fromkeys(first_of.values())}
    kept = (1 - sparsity) * sum(sizes.values()) - sum(density * sizes[name] for name, density in fixed.items())
    channels = {name: out_channels(layers[name]) for name in sizes if is_depthwise(layers[name]) and name not in fixed}
    floor = min(DEPTHWISE, int(max(DEPTHWISE_PART * kept, 0) // max(sum(channels.values()), 1)))
    return {name: min(floor, sizes[name] // count) for name, count in channels.items()} if floor else {}


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
