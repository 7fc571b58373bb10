"""Selection of the pruned weights or channels that are regrown, and their initial values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import LayerError, MaskError
from ..network.layers import effective_weight, find_layers, refresh_weight, stored_weight
from ..network.masks import Masks, tied_layers
from .allocation import Allocation, by_magnitude, check_sparsity, fixed_densities, removal_counts
from .importance import Importance, ImportanceEstimator
from .structured import channel_groups, channel_masks, dropped_units
from .units import Units, magnitude, units_of_channels

Budget = Literal["greedy", "damage", "ssim", "proportional"]
Saliency = Literal["magnitude", "residual", "gradient"]


class RegrowableWeights:
    """Single weights of the masked layers as units; a shared weight counts once."""

    def __init__(self, dense: nn.Module, masks: Masks) -> None:
        layers = find_layers(dense)
        for name in masks:
            if name not in layers:
                raise MaskError(name, "the dense model has no convolution or linear layer of this name; drop the mask")
        self.ties = tied_layers({name: layers[name] for name in masks})
        self.layers, self.names = layers, list(self.ties)

    def units(self, masks: Mapping[str, Tensor], importance: Mapping[str, Tensor]) -> dict[str, Units]:
        """Units by name: kept ones are protected, the score of the others is their importance."""
        scores = {name: importance[name] for name in self.names}
        return {n: Units(x.flatten(), 1, tuple(x.shape), masks[n].flatten().cpu()) for n, x in scores.items()}

    def counts(self, masks: Mapping[str, Tensor]) -> tuple[int, int]:
        """Number of units, and number of pruned units."""
        return sum(masks[name].numel() for name in self.names), sum(int((~masks[name]).sum()) for name in self.names)

    def unit_damage(self, damage: Mapping[str, float]) -> dict[str, float]:
        """Damage by layer -> damage by the names of `units`."""
        return dict(damage)

    def new_masks(self, before: Masks, pruned: Mapping[str, Tensor]) -> Masks:
        """Masks in which exactly these units are pruned; weights in no unit stay as in `before`.

        pruned: boolean (units,) by name.
        """
        kept = {name: ~pruned[name].view(before[name].shape).to(before[name].device) for name in self.names}
        by_name = {name: kept[first] for first, names in self.ties.items() for name in names}
        return Masks({name: by_name[name] for name in before}, before.notes)

    @torch.no_grad()
    def initialise_weights(
        self, model: nn.Module, dense: nn.Module, before: Masks, grown: Masks, from_dense: bool
    ) -> None:
        """Set regrown weights of `model` to their dense value, or to zero if not `from_dense`."""
        layers, dense_layers = find_layers(model), find_layers(dense)
        for name, mask in grown.items():
            layer, weight = layers[name], stored_weight(name, layers[name])
            new = (mask & ~before[name].to(mask.device)).to(weight.device)
            weight.copy_(torch.where(new, effective_weight(name, dense_layers[name]).to(weight) * from_dense, weight))
            prune_mask = layer._buffers.get("weight_mask")  # of torch.nn.utils.prune
            if prune_mask is not None:
                prune_mask.masked_fill_(new, 1)
            refresh_weight(layer)


class RegrowableChannels(RegrowableWeights):
    """Coupled channels as units: rows of their producers, BatchNorm channels, columns of their consumers."""

    def __init__(self, dense: nn.Module, masks: Masks, example: Any) -> None:
        self.dense, self.layers = dense, find_layers(dense)
        groups = channel_groups(dense, example)
        self.groups = [group for group in groups if set(masks) >= {*group.producers, *group.consumers}]
        if not self.groups:
            problem = "no group of channels has masks on all its producers and consumers"
            raise ValueError(f"{problem}; use those that sparsify returned")
        self.names = list(dict.fromkeys(name for group in self.groups for name in (*group.producers, *group.consumers)))

    def units(self, masks: Mapping[str, Tensor], importance: Mapping[str, Tensor]) -> dict[str, Units]:
        units = {group.name: units_of_channels(group, self.layers, importance) for group in self.groups}
        return {name: replace(units[name], protected=~dropped) for name, dropped in self._dropped(masks).items()}

    def counts(self, masks: Mapping[str, Tensor]) -> tuple[int, int]:
        pruned = self._dropped(masks).values()
        return sum(map(len, pruned)), sum(int(each.sum()) for each in pruned)

    def unit_damage(self, damage: Mapping[str, float]) -> dict[str, float]:
        """Damage of each group: the mean over its producers."""
        return {each.name: sum(damage[n] for n in each.producers) / len(each.producers) for each in self.groups}

    def new_masks(self, before: Masks, pruned: Mapping[str, Tensor]) -> Masks:
        old, new = (channel_masks(self.dense, self.groups, which) for which in (self._dropped(before), pruned))
        regrown = {name: mask & ~old[name] for name, mask in new.items()}
        masks = {n: mask | regrown[n].to(mask.device) if n in regrown else mask for n, mask in before.items()}
        return Masks(masks, before.notes)

    @torch.no_grad()
    def initialise_weights(
        self, model: nn.Module, dense: nn.Module, before: Masks, grown: Masks, from_dense: bool
    ) -> None:
        super().initialise_weights(model, dense, before, grown, from_dense)
        pruned_before, pruned_now = self._dropped(before), self._dropped(grown)
        for group in self.groups:
            regrown = pruned_before[group.name] & ~pruned_now[group.name]
            for name, table in {**group.producers, **group.norms}.items():
                module, dense_module = model.get_submodule(name), dense.get_submodule(name)
                rows = table[regrown].flatten()
                for key in ("bias",) if name in group.producers else ("weight", "bias", "running_mean", "running_var"):
                    tensor, dense_tensor = getattr(module, key), getattr(dense_module, key)
                    if tensor is not None:
                        tensor[rows] = 0 if dense_tensor is None else dense_tensor[rows].to(tensor)

    def _dropped(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        none = {group.name: torch.zeros(group.units, dtype=torch.bool) for group in self.groups}
        return {**none, **dropped_units(self.dense, self.groups, masks)}


def sparsity_steps(total: int, pruned: int, sparsity: float, rounds: int) -> list[float]:
    """The sparsity after each round: equal steps from `pruned` of `total` units to `sparsity`.

    Raises ValueError if the sparsity is above pruned / total.
    """
    target = round(check_sparsity(sparsity) * total)
    if target > pruned:
        raise ValueError(
            f"sparsity={sparsity} is above the {pruned / total:.6g} of these masks, so there is nothing to regrow; "
            "sparsify removes weights"
        )
    counts = [round(pruned - (pruned - target) * done / rounds) for done in range(1, rounds)]
    return [count / total for count in counts] + [sparsity]


def by_priority(units: Mapping[str, Units], budget: int, priorities: Mapping[str, float]) -> dict[str, int]:
    """An allocation: regrow units in each layer in proportion to its priority, at most all pruned ones.

    Layers of priority 0 come last: they share the rest in proportion to their number of pruned units. Units of one
    weight each. The budget is exact; fractions are rounded by largest remainder.
    """
    room = np.array([layer.removable for layer in units.values()], np.float64)
    priority = np.array([max(priorities[name], 0.0) for name in units])
    regrown = room.sum() - budget
    positive = priority > 0
    share = _fill(min(regrown, room[positive].sum()), room, priority)
    share += _fill(regrown - share.sum(), np.where(positive, 0.0, room), room)
    whole = np.floor(share)
    more = np.argsort(whole - share, kind="stable")[: round(regrown - whole.sum())]
    whole[more] += 1
    return {name: layer.removable - int(count) for (name, layer), count in zip(units.items(), whole, strict=True)}


def _fill(amount: float, room: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """min(scale * slope, room) per entry, with the scale at which the sum is `amount`."""
    rising = (slope > 0) & (room > 0)
    full = np.divide(room, slope, out=np.zeros_like(room), where=rising)
    ends = np.unique(np.append(full, 0.0))
    given = np.array([np.minimum(scale * slope, room).sum() for scale in ends])
    return np.where(rising, np.minimum(np.interp(amount, given, ends) * slope, room), 0.0)


@dataclass
class RegrowthSelector:
    """Selects the units to regrow: how many per layer (budget), and which (saliency). See `regrow`."""

    space: RegrowableWeights
    estimator: ImportanceEstimator
    budget: Budget
    saliency: Saliency | Mapping[str, Any]
    densities: Mapping[str, float] | None
    importance: dict[str, Tensor] = field(default_factory=dict)  # of each weight, if it is the same in all rounds

    def select(
        self, model: nn.Module, masks: Masks, sparsity: float, resume: Path | None
    ) -> tuple[Masks, dict[str, int], dict[str, float]]:
        """Masks at this sparsity, number of units regrown in each layer (or group), and the damage if measured."""
        measured, names = Importance(), self.space.names
        residual = self.saliency == "residual"
        if residual or self.budget == "damage":
            measured = self.estimator.measure(model, names, per_weight=residual, resume=resume)
        if self.budget == "ssim":
            measured.damage = self.estimator.dissimilarity(model, names)
        units = self.space.units(masks, measured.weight_importance or self._dense_importance())
        fixed = fixed_densities(self.space.layers, {name: [name] for name in units}, self.densities)
        removed = removal_counts(units, sparsity, self._allocation(units, measured.damage), fixed)
        pruned = {name: each.smallest(removed[name]) for name, each in units.items()}
        regrown = {name: each.removable - removed[name] for name, each in units.items()}
        return self.space.new_masks(masks, pruned), regrown, measured.damage

    def _allocation(self, units: Mapping[str, Units], damage: Mapping[str, float]) -> Allocation:
        if self.budget == "greedy":
            return by_magnitude
        by_damage = self.budget in ("damage", "ssim")
        factor = self.space.unit_damage(damage) if by_damage else dict.fromkeys(units, 1.0)
        return partial(by_priority, priorities={name: factor[name] * each.removable for name, each in units.items()})

    def _dense_importance(self) -> dict[str, Tensor]:
        """Importance that does not depend on the round: gradients, or magnitudes after the weights of denser masks."""
        if not self.importance:
            layers = self.space.layers
            self.importance = {name: magnitude(name, layers[name]) for name in self.space.names}
            if isinstance(self.saliency, Mapping):
                denser = Masks(self.saliency)
                for name, importance in self.importance.items():
                    if name not in denser or denser[name].shape != importance.shape:
                        raise MaskError(name, "the denser masks given as saliency have no mask of its shape; add one")
                    importance += (1 + importance.max()) * denser[name].cpu()
        for name, importance in self.importance.items():
            if not importance.isfinite().all():
                raise LayerError(name, "its saliency is NaN or infinite; check the labelled images and the loss")
        return self.importance
