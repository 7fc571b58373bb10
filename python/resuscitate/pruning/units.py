"""Units that pruning removes from a layer (weights, filters or channels): scores, and the units that must be kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import LayerError, called
from ..network.layers import columns_of, effective_weight, rows_of

if TYPE_CHECKING:
    from .coupling import ChannelGroup


@dataclass(frozen=True, eq=False)
class Units:
    """The units of one layer, in the order of its weight tensor."""

    scores: Tensor  # (units,) float32 or float64, on the CPU: |w|, or the mean |w| of a filter
    size: int  # weights per unit
    shape: tuple[int, ...]  # of the layer's weight
    protected: Tensor | None = None  # boolean (units,): units that must be kept; None: none

    @property
    def count(self) -> int:
        return len(self.scores)

    @cached_property
    def removable(self) -> int:
        """Number of units that may be removed."""
        return self.count - (0 if self.protected is None else int(self.protected.sum()))

    def removable_scores(self) -> Tensor:
        """Scores of the units that may be removed, in the order of the units."""
        return self.scores if self.protected is None else self.scores[~self.protected]

    def smallest(self, count: int) -> Tensor:
        """Boolean (units,), True at the `count` removable units of smallest score; among equals the earlier ones.

        These are the first `count` of a stable ascending sort. Selection is many times faster than sorting.
        """
        if not count:
            return torch.zeros(self.count, dtype=torch.bool)
        flat = self.scores if self.protected is None else self.scores.masked_fill(self.protected, torch.inf)
        last = float(np.partition(flat.numpy(), count - 1)[count - 1])
        chosen = flat < last
        ties = (flat == last).nonzero().flatten()
        if self.protected is not None:
            ties = ties[~self.protected[ties]]
        chosen[ties[: count - int(chosen.sum())]] = True
        return chosen


@torch.no_grad()
def units_of_channels(group: ChannelGroup, layers: Mapping[str, nn.Module], scores: Mapping[str, Tensor]) -> Units:
    """Units of a group of coupled channels; score: mean over the weights of producers and consumers. The best is kept.

    scores: layer -> non-negative, weight's shape, on the CPU.
    """
    sums, weights = torch.zeros(group.units, dtype=torch.float64), 0
    for parts, view in ((group.producers, rows_of), (group.consumers, columns_of)):
        for name, indices in parts.items():
            by_channel = view(layers[name], scores[name])
            sums += by_channel.sum(1, dtype=torch.float64)[indices].sum(1)
            weights += by_channel.shape[1] * indices.shape[1]
    units = Units(sums / max(weights, 1), 1, (group.units,))
    return replace(units, protected=~units.smallest(group.units - 1))


@torch.no_grad()
def magnitude(name: str, module: nn.Module) -> Tensor:
    """|w| of the layer's effective weight, on the CPU, float32 (float64 if the weight is).

    Raises LayerError if a weight is NaN or infinite, or recomputed in each forward pass.
    """
    weight = effective_weight(name, module)
    scores = weight.abs().to("cpu", torch.float64 if weight.dtype == torch.float64 else torch.float32)
    if not bool(scores.isfinite().all()):
        count = int((~scores.isfinite()).sum())
        raise LayerError(name, f"{count} of its weights are NaN or infinite, so they cannot be ranked")
    return scores


def check_floors(min_per_layer: int, min_per_channel: int) -> None:
    """Raise ValueError if a floor is not an int of at least 0."""
    for option, floor in (("min_per_layer", min_per_layer), ("min_per_channel", min_per_channel)):
        if isinstance(floor, bool) or not isinstance(floor, int) or floor < 0:
            raise ValueError(f"{option}={floor!r} is not a number of weights, such as 1")


@torch.no_grad()
def units_of(
    name: str, module: nn.Module, min_per_layer: int = 1, min_per_channel: int = 0, filters: bool = False
) -> Units:
    """The weights of a layer, or its filters, as units; the largest are protected, as many as the floors require.

    Raises LayerError as `magnitude` does, ValueError for a floor above the layer's number of weights.
    """
    scores = magnitude(name, module)
    rows = rows_of(module, scores)
    per_channel = "min_per_channel", min_per_channel, rows.shape[1], "each of its output channels"
    for option, floor, weights, of in (("min_per_layer", min_per_layer, scores.numel(), "it"), per_channel):
        if floor > weights > 0:
            remedy = f"lower the floor to {weights} at most, or exclude the layer"
            raise ValueError(f"{option}={floor} cannot be met in {called(name)}: {of} has {weights} weights; {remedy}")
    shape = tuple(scores.shape)
    if filters:
        if min_per_channel:
            raise ValueError("min_per_channel forbids every removal of a whole filter; leave it out with this pattern")
        units = Units(rows.mean(1, dtype=torch.float64), rows.shape[1], shape)
    else:
        units = Units(scores.flatten(), 1, shape)
    protected = ~units.smallest(max(units.count - -(-min_per_layer // max(units.size, 1)), 0))
    if min_per_channel:
        place = rows_of(module, torch.arange(units.count).view(shape))
        protected[place.gather(1, rows.argsort(dim=1, stable=True)[:, -min_per_channel:]).flatten()] = True
    return Units(units.scores, units.size, shape, protected)
