"""What can go from a layer and what must stay: its units (single weights or whole filters), scores and floors."""

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
    """The units of one layer, in the order of its weight.

    `scores` (units,) float32 or float64, on the CPU: |w|, or of a filter the mean of it. `size` counts the weights of
    a unit, `shape` is that of the layer's weight. `stays` (units,), or None where nothing is bound to stay.
    """

    scores: Tensor
    size: int
    shape: tuple[int, ...]
    stays: Tensor | None = None

    @property
    def count(self) -> int:
        """Number of units."""
        return len(self.scores)

    @cached_property
    def spare(self) -> int:
        """Number of units that may go."""
        return self.count - (0 if self.stays is None else int(self.stays.sum()))

    def removable(self) -> Tensor:
        """The scores of those that may go, in no order to rely on beyond the layer's own."""
        return self.scores if self.stays is None else self.scores[~self.stays]

    def smallest(self, count: int) -> Tensor:
        """Boolean (units,), True at exactly `count` of the least of those that may go; the earlier first among equals.

        The set that a stable ascending sort puts first, found by selection: many times faster than sorting.
        """
        chosen = torch.zeros(self.count, dtype=torch.bool)
        if not count:
            return chosen
        flat = self.scores if self.stays is None else self.scores.masked_fill(self.stays, torch.inf)
        last = float(np.partition(flat.numpy(), count - 1)[count - 1])
        torch.lt(flat, last, out=chosen)
        ties = (flat == last).nonzero().flatten()
        if self.stays is not None:
            ties = ties[~self.stays[ties]]
        chosen[ties[: count - int(chosen.sum())]] = True
        return chosen


@torch.no_grad()
def units_of_channels(group: ChannelGroup, layers: Mapping[str, nn.Module], scores: Mapping[str, Tensor]) -> Units:
    """The units of a group of coupled channels, by the mean score of all that makes and reads each; one stays.

    scores: layer -> not negative, of the shape of its weight, on the CPU.
    """
    sums, weights = torch.zeros(group.units, dtype=torch.float64), 0
    for parts, view in ((group.makers, rows_of), (group.readers, columns_of)):
        for name, indices in parts.items():
            by_channel = view(layers[name], scores[name])
            sums += by_channel.sum(1, dtype=torch.float64)[indices].sum(1)
            weights += by_channel.shape[1] * indices.shape[1]
    units = Units(sums / max(weights, 1), 1, (group.units,))
    return replace(units, stays=~units.smallest(group.units - 1))


@torch.no_grad()
def magnitude(name: str, module: nn.Module) -> Tensor:
    """|w| of the weight the layer uses, on the CPU, float32 (float64 if the weight is).

    Raises LayerError if one is NaN or infinite, or the weight is recomputed in each forward.
    """
    weight = effective_weight(name, module)
    scores = weight.abs().to("cpu", torch.float64 if weight.dtype == torch.float64 else torch.float32)
    if not bool(scores.isfinite().all()):
        count = int((~scores.isfinite()).sum())
        raise LayerError(name, f"{count} of its weights are NaN or infinite, so they cannot be ranked")
    return scores


def check_floors(min_per_layer: int, min_per_channel: int) -> None:
    """ValueError for a floor that is not a number of weights."""
    for option, floor in (("min_per_layer", min_per_layer), ("min_per_channel", min_per_channel)):
        if isinstance(floor, bool) or not isinstance(floor, int) or floor < 0:
            raise ValueError(f"{option}={floor!r} is not a number of weights, such as 1")


@torch.no_grad()
def units_of(name: str, module: nn.Module, filters: bool, min_per_layer: int, min_per_channel: int) -> Units:
    """The weights of a layer as units, or its filters; the largest of them stay, as many as the floors ask for.

    Raises LayerError as `magnitude` does, ValueError for a floor that the layer cannot hold.
    """
    scores = magnitude(name, module)
    rows = rows_of(module, scores)
    for option, floor, weights, of in (
        ("min_per_layer", min_per_layer, scores.numel(), "it"),
        ("min_per_channel", min_per_channel, rows.shape[1], "each of its output channels"),
    ):
        if floor > weights > 0:
            raise ValueError(
                f"{option}={floor} cannot be met in {called(name)}: {of} has {weights} weights; lower the floor to "
                f"{weights} at most, or exclude the layer"
            )
    shape = tuple(scores.shape)
    if filters:
        if min_per_channel:
            raise ValueError("min_per_channel forbids every removal of a whole filter; leave it out with this pattern")
        units = Units(rows.mean(1, dtype=torch.float64), rows.shape[1], shape)
    else:
        units = Units(scores.flatten(), 1, shape)
    stays = ~units.smallest(max(units.count - -(-min_per_layer // max(units.size, 1)), 0))
    if min_per_channel:
        place = rows_of(module, torch.arange(units.count).view(shape))
        stays[place.gather(1, rows.argsort(dim=1, stable=True)[:, -min_per_channel:]).flatten()] = True
    return Units(units.scores, units.size, shape, stays)
