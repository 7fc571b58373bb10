"""Density of each layer for one sparsity of the model: the choice of an allocation and, for "rr", its measurement."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import CalibrationError
from ..runtime.options import RunOptions, run_options
from .allocation import (
    ALLOCATIONS,
    Allocation,
    Selection,
    by_repairability,
    check_method,
    fixed_densities,
    listed,
    prunable_layers,
    removal_counts,
)
from .repairability import Repairability
from .units import Units, check_floors, units_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


def allocate(
    model: nn.Module,
    sparsity: float | None = None,
    method: str = "global",
    *,
    calibration: Any = None,
    densities: Mapping[str, float] | None = None,
    min_per_layer: int = 1,
    min_per_channel: int = 0,
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
    calibration: for "rr" only: calibration images, as for `repair`, or a `Repairability` measured on this model.
    densities: {glob over layer names: density in (0, 1]} of layers with a fixed density, such as {"conv1": 1.0}; a
        later glob overrides an earlier one. The rest of the budget is removed from the other layers.
    min_per_layer, min_per_channel: least number of weights kept in each layer and in each output channel.
    options: of the measurement for "rr", see `RunOptions`.

    Raises ValueError for an unknown method, for `calibration` or an option of a measurement if nothing is measured, for
    a sparsity outside [0, 1), and for floors or densities that do not admit it; TypeError for a sparsity that is not a
    float; LayerError for a weight that is not finite.
    """
    check_method(method)
    check_measurement(method, calibration, options)
    check_floors(min_per_layer, min_per_channel)
    include, exclude = listed(include), listed(exclude)
    layers, ties = prunable_layers(model, include, exclude)
    units = {first: units_of(first, layers[first], min_per_layer, min_per_channel) for first in ties}
    fixed = fixed_densities(layers, ties, densities)
    allocation = choose_allocation(method, model, calibration, include=include, exclude=exclude, **options)
    removed = removal_counts(units, sparsity, allocation, fixed)
    kept = {first: (each.count - removed[first]) / each.count for first, each in units.items()}
    by_name = {name: kept[first] for first, names in ties.items() for name in names}
    return {name: by_name[name] for name in layers}


def check_measurement(method: str, calibration: Any, options: Mapping[str, Any]) -> None:
    """Raise ValueError for calibration images, or a run-time option, where nothing is measured."""
    run_options("the measurement for allocation 'rr'", options)
    if method != "rr" and calibration is not None:
        raise ValueError(f"allocation {method!r} measures nothing: leave calibration out, or choose allocation 'rr'")
    if method == "rr" and not isinstance(calibration, Repairability):
        return
    for option in options:
        reason = "is of the measurement for allocation 'rr', and nothing is measured here"
        raise ValueError(f"{option} {reason}; leave {option} out")


def choose_allocation(method: str, model: nn.Module, calibration: Any, **measuring: Any) -> Allocation:
    """The allocation of this name. "rr" measures when called, after sparsity, floors and densities are checked."""
    if method != "rr":
        return ALLOCATIONS[method]
    if calibration is None:
        raise CalibrationError("allocation 'rr' measures the model: pass calibration, unlabelled images as for repair")

    def by_measured_curves(units: Mapping[str, Units], budget: int) -> dict[str, int]:
        measured = calibration
        if not isinstance(measured, Repairability):
            measured = Repairability.measure(model, calibration, **measuring)
        return by_repairability(units, budget, {name: measured.curve(name) for name in units})

    return by_measured_curves
