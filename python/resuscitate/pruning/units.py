"""Layers that can be pruned, and the units that pruning removes from them: weights, filters or channels."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import LayerError, called
from ..network.layer_checks import split_by_objections
from ..network.layers import (
    Selection,
    effective_weight,
    find_layers,
    matching,
    memory_of,
    modules_by_parameter,
    no_layers,
    rows_of,
    select_layers,
    stored_weight,
    unwrap,
)
from ..network.masks import tied_layers

log = logging.getLogger("resuscitate")
ChannelFloors = int | Mapping[str, int]  # `min_per_channel`: of all layers, or by glob over layer names


def prunable_layers(
    model: nn.Module, include: Selection, exclude: Selection
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The selected layers, and for each of them the first layer that has its weight (see `tied_layers`).

    Not returned, with a warning: layers that change their weight before use, so that a zero would not stay zero.
    Raises ValueError if no layer is selected, LayerError if all change their weight, or one is tied to another layer.
    """
    selected, every = select_layers(unwrap(model), include, exclude), find_layers(unwrap(model))
    if not every:
        raise ValueError(f"nothing to prune: {no_layers(unwrap(model))}")
    if not selected:
        raise ValueError("nothing to prune: include and exclude leave no convolution or linear layer of the model")
    layers, found = split_by_objections(selected, "pruned")
    if found:
        reasons = [f"{name!r}: {objection}" for name, objection in found.items()]
        shown = ", ".join(reasons[:3] + ["..."] * (len(reasons) > 3))
        log.warning("%d of %d layers are left dense: %s", len(found), len(selected), shown)
    owners = modules_by_parameter(unwrap(model))
    for name, layer in layers.items():
        for other in owners[memory_of(stored_weight(name, layer))]:
            if other in every and other not in layers:
                raise LayerError(name, f"shares its weight with {other!r}, which is not selected; select both")
    return layers, first_layers(layers)


def first_layers(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Layer -> the first layer that has the same weight, in the order of the layers."""
    first_of = {name: first for first, names in tied_layers(layers).items() for name in names}
    return {name: first_of[name] for name in layers}


@dataclass(frozen=True, eq=False)
class Units:
    """The units of one layer, in the order of its weight tensor."""

    scores: Tensor  # (units,) float32 or float64, finite, on the CPU: |w|, or the mean |w| of a filter
    size: int  # weights per unit
    shape: tuple[int, ...]  # of the layer's weight
    protected: Tensor  # boolean (units,): units that must be kept

    @property
    def count(self) -> int:
        return len(self.scores)

    @cached_property
    def removable(self) -> int:
        """Number of units that may be removed."""
        return self.count - int(self.protected.sum())

    def times_kept(self, densities: Iterable[float]) -> Tensor:
        """Int16 (units,): at how many of the densities each unit is kept, by magnitude."""
        found = torch.zeros(self.count, dtype=torch.int16)
        for density in densities:
            found += ~self.smallest(min(self.count - round(density * self.count), self.removable))
        return found

    def smallest(self, count: int) -> Tensor:
        """Boolean (units,), True at the `count` removable units of smallest score; among equals the earlier ones."""
        return smallest(self.scores.masked_fill(self.protected, torch.inf), count)


def smallest(scores: Tensor, count: int) -> Tensor:
    """Boolean, True where a stable sort puts the first `count` scores. Selection is many times faster than sorting."""
    if not count:
        return torch.zeros(len(scores), dtype=torch.bool)
    last = float(np.partition(scores.numpy(), count - 1)[count - 1])
    chosen = scores < last
    ties = (scores == last).nonzero().flatten()
    chosen[ties[: count - int(chosen.sum())]] = True
    return chosen


@torch.no_grad()
def magnitude(name: str, module: nn.Module) -> Tensor:
    """|w| of the layer's effective weight, on the CPU, float32 (float64 if the weight is).

    Raises LayerError if a weight is NaN or infinite, or recomputed in each forward pass.
    """
    weight = effective_weight(name, module)
    scores = weight.abs().to("cpu", torch.float64 if weight.dtype == torch.float64 else torch.float32)
    if count := int((~scores.isfinite()).sum()):
        raise LayerError(name, f"{count} of its weights are NaN or infinite, so they cannot be ranked")
    return scores


def check_floors(min_per_layer: int, min_per_channel: ChannelFloors) -> None:
    """Raise ValueError if a floor is not an int of at least 0."""
    by_channel = min_per_channel.values() if isinstance(min_per_channel, Mapping) else [min_per_channel]
    for option, floors in (("min_per_layer", [min_per_layer]), ("min_per_channel", by_channel)):
        for floor in floors:
            if isinstance(floor, bool) or not isinstance(floor, int) or floor < 0:
                raise ValueError(f"{option}={floor!r} is not a number of weights, such as 1")


def channel_floors(layers: Mapping[str, nn.Module], min_per_channel: ChannelFloors) -> dict[str, int]:
    """The floor of each layer; of globs over layer names a later one overrides an earlier one. Raises ValueError."""
    if not isinstance(min_per_channel, Mapping):
        return dict.fromkeys(layers, min_per_channel)
    floors = dict.fromkeys(layers, 0)
    for pattern, floor in min_per_channel.items():
        floors |= dict.fromkeys(matching(layers, pattern, "min_per_channel"), floor)
    return floors


@torch.no_grad()
def units_of(name: str, module: nn.Module, per_layer: int = 1, per_channel: int = 0, filters: bool = False) -> Units:
    """The weights of a layer, or its filters, as units; the largest are protected, as many as the floors require.

    Raises LayerError as `magnitude`, ValueError for a floor above the number of weights.
    """
    weights = magnitude(name, module)
    rows, shape = rows_of(module, weights), tuple(weights.shape)
    channels = "min_per_channel", per_channel, rows.shape[1], "each of its output channels"
    for option, floor, most, of in (("min_per_layer", per_layer, weights.numel(), "it"), channels):
        if floor > most > 0:
            remedy = f"lower the floor to {most} at most, or exclude the layer"
            raise ValueError(f"{option}={floor} cannot be met in {called(name)}: {of} has {most} weights; {remedy}")
    if filters and per_channel:
        raise ValueError("min_per_channel forbids every removal of a whole filter; leave it out with this pattern")
    scores, size = (rows.mean(1, dtype=torch.float64), rows.shape[1]) if filters else (weights.flatten(), 1)
    protected = ~smallest(scores, max(len(scores) - -(-per_layer // max(size, 1)), 0))
    if per_channel:
        place = rows_of(module, torch.arange(len(scores)).view(shape))
        protected[place.gather(1, rows.argsort(dim=1, stable=True)[:, -per_channel:]).flatten()] = True
    return Units(scores, size, shape, protected)
