"""Selection of the pruned weights or channels that are regrown, and their initial values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import LayerError, MaskError
from ..network.layers import effective_weight, find_layers, refresh_weight, stored_weight
from ..network.masks import Masks
from .allocation import check_sparsity, fixed_densities, removal_counts
from .allocation_rules import Allocation, by_magnitude, by_priority
from .coupling import channel_groups, channel_masks
from .importance import ImportanceEstimator
from .structured import dropped_units, units_of_channels
from .units import Units, first_layers, magnitude

Budget = Literal["greedy", "damage", "ssim", "proportional"]
Saliency = Literal["magnitude", "residual", "gradient"]


class RegrowableWeights:
    """Single weights of the masked layers as units; a shared weight counts once."""

    def __init__(self, dense: nn.Module, masks: Masks) -> None:
        self.layers = find_layers(dense)
        for name in masks:
            if name not in self.layers:
                raise MaskError(name, "the dense model has no convolution or linear layer of this name; drop the mask")
        self.unit_of = first_layers({name: self.layers[name] for name in masks})  # name of a layer -> of `units`
        self.names = list(dict.fromkeys(self.unit_of.values()))
        self.producers = {name: [name] for name in self.names}  # name of `units` -> layers whose damage counts

    def units(self, masks: Masks, importance: Mapping[str, Tensor]) -> dict[str, Units]:
        """Units by name: kept ones are protected, the score of the others is their importance."""
        shapes = {name: tuple(importance[name].shape) for name in self.names}
        return {n: Units(importance[n].flatten(), 1, shapes[n], masks[n].flatten().cpu()) for n in self.names}

    def counts(self, masks: Masks) -> tuple[int, int]:
        """Number of units, and number of pruned units."""
        return sum(masks[name].numel() for name in self.names), sum(int((~masks[name]).sum()) for name in self.names)

    def new_masks(self, before: Masks, pruned: Mapping[str, Tensor]) -> Masks:
        """Masks in which exactly these units, boolean by name, are pruned; weights in no unit stay as in `before`."""
        kept = {name: ~pruned[name].view(before[name].shape).to(before[name].device) for name in self.names}
        return Masks({name: kept[first] for name, first in self.unit_of.items()}, before.notes)

    @torch.no_grad()
    def initialise_weights(self, model: nn.Module, before: Masks, grown: Masks, from_dense: bool) -> None:
        """Set regrown weights of `model` to their dense value, or to zero if not `from_dense`."""
        layers = find_layers(model)
        for name, mask in grown.items():
            layer, weight = layers[name], stored_weight(name, layers[name])
            new = (mask & ~before[name].to(mask.device)).to(weight.device)
            weight.copy_(torch.where(new, effective_weight(name, self.layers[name]).to(weight) * from_dense, weight))
            if (prune_mask := layer._buffers.get("weight_mask")) is not None:  # of torch.nn.utils.prune
                prune_mask.masked_fill_(new, 1)
            refresh_weight(layer)


class RegrowableChannels(RegrowableWeights):
    """Coupled channels as units: rows of their producers, channels of norms, columns of their consumers."""

    def __init__(self, dense: nn.Module, masks: Masks, example: Any) -> None:
        self.dense, self.layers = dense, find_layers(dense)
        groups = channel_groups(dense, example)
        self.groups = [group for group in groups if set(masks) >= {*group.producers, *group.consumers}]
        if not self.groups:
            problem = "no group of channels has masks on all its producers and consumers"
            raise ValueError(f"{problem}; use those that sparsify returned")
        self.names = list(dict.fromkeys(name for group in self.groups for name in (*group.producers, *group.consumers)))
        self.producers = {group.name: list(group.producers) for group in self.groups}
        self.unit_of = {name: group for group, names in self.producers.items() for name in names}

    def units(self, masks: Masks, importance: Mapping[str, Tensor]) -> dict[str, Units]:
        units = {group.name: units_of_channels(group, self.layers, importance) for group in self.groups}
        return {name: replace(units[name], protected=~dropped) for name, dropped in self._dropped(masks).items()}

    def counts(self, masks: Masks) -> tuple[int, int]:
        pruned = self._dropped(masks).values()
        return sum(map(len, pruned)), sum(int(each.sum()) for each in pruned)

    def new_masks(self, before: Masks, pruned: Mapping[str, Tensor]) -> Masks:
        old, new = (channel_masks(self.dense, self.groups, which) for which in (self._dropped(before), pruned))
        regrown = {name: mask & ~old[name] for name, mask in new.items()}
        masks = {n: mask | regrown[n].to(mask.device) if n in regrown else mask for n, mask in before.items()}
        return Masks(masks, before.notes)

    @torch.no_grad()
    def initialise_weights(self, model: nn.Module, before: Masks, grown: Masks, from_dense: bool) -> None:
        super().initialise_weights(model, before, grown, from_dense)
        pruned_before, pruned_now = self._dropped(before), self._dropped(grown)
        for group in self.groups:
            regrown = pruned_before[group.name] & ~pruned_now[group.name]
            for name, table in {**group.producers, **group.norms}.items():
                module, dense_module = model.get_submodule(name), self.dense.get_submodule(name)
                rows = table[regrown].flatten()
                for key in ("bias",) if name in group.producers else ("weight", "bias", "running_mean", "running_var"):
                    tensor, dense_tensor = getattr(module, key, None), getattr(dense_module, key, None)
                    if tensor is not None:
                        tensor[rows] = 0 if dense_tensor is None else dense_tensor[rows].to(tensor)

    def _dropped(self, masks: Masks) -> dict[str, Tensor]:
        none = {group.name: torch.zeros(group.units, dtype=torch.bool) for group in self.groups}
        return none | dropped_units(self.dense, self.groups, masks)[0]


def sparsity_steps(total: int, pruned: int, sparsity: float, rounds: int) -> list[float]:
    """The sparsity after each round: equal steps from `pruned` of `total` units to `sparsity`, a lower one."""
    target = round(check_sparsity(sparsity) * total)
    if target > pruned:
        problem = f"sparsity={sparsity} is above the {pruned / total:.6g} of these masks"
        raise ValueError(f"{problem}, so there is nothing to regrow; sparsify removes weights")
    return [round(pruned - (pruned - target) * done / rounds) / total for done in range(1, rounds)] + [sparsity]


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
        self, model: nn.Module, masks: Masks, sparsity: float, rounds: int, resume: Path | None
    ) -> tuple[Masks, dict[str, int], dict[str, float]]:
        """Masks at this sparsity, number of units regrown in each layer (or group), and the damage if measured.

        rounds: how many are left, with this one; layers of fixed densities have them after the last.
        """
        damage, importance = dict[str, float](), dict[str, Tensor]()
        names, residual = self.space.names, self.saliency == "residual"
        if residual or self.budget == "damage":
            damage, importance = self.estimator.measure(model, names, per_weight=residual, resume=resume)
        if self.budget == "ssim":
            damage = self.estimator.dissimilarity(model, names)
        units = self.space.units(masks, importance or self._dense_importance())
        layers = {name: self.space.layers[name] for name in self.space.unit_of}
        fixed = fixed_densities(layers, self.space.unit_of, self.densities)
        removed = self._removed(units, sparsity, rounds, fixed, damage)
        pruned = {name: each.smallest(removed[name]) for name, each in units.items()}
        regrown = {name: each.removable - removed[name] for name, each in units.items()}
        return self.space.new_masks(masks, pruned), regrown, damage

    def _removed(
        self,
        units: Mapping[str, Units],
        sparsity: float,
        rounds: int,
        fixed: Mapping[str, float],
        damage: Mapping[str, float],
    ) -> dict[str, int]:
        """Number of pruned units in each layer (or group) after this round."""
        allocation = self._allocation(units, damage)
        present = {name: 1 - units[name].removable / max(units[name].count, 1) for name in fixed}
        if rounds == 1 or any(fixed[name] < kept for name, kept in present.items()):  # which is refused
            return removal_counts(units, sparsity, allocation, fixed)
        # without other pruned units the densities alone decide: they may miss the sparsity of the round by a few units
        others = any(each.removable for name, each in units.items() if name not in fixed)
        densities = {name: kept + (fixed[name] - kept) / rounds for name, kept in present.items()}
        return removal_counts(units, sparsity if others or not fixed else None, allocation, densities)

    def _allocation(self, units: Mapping[str, Units], damage: Mapping[str, float]) -> Allocation:
        if self.budget == "greedy":
            return by_magnitude
        priorities = {name: float(each.removable) for name, each in units.items()}
        if self.budget != "proportional":
            for name, layers in self.space.producers.items():
                priorities[name] *= sum(damage[layer] for layer in layers) / len(layers)
        return partial(by_priority, priorities=priorities)

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
