"""What of a pruned network may come back, single weights or whole channels, and which of it does."""

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
from .allocation import Allocation, by_magnitude, check_sparsity, pin, removals
from .importance import Needs, Surveyor
from .structured import channel_groups, channel_masks, dropped_units
from .units import Units, magnitude, units_of_channels

Budget = Literal["greedy", "damage", "ssim", "proportional"]
Saliency = Literal["magnitude", "residual", "gradient"]


class Weights:
    """Single weights of the masked layers; a shared one counts once."""

    def __init__(self, dense: nn.Module, masks: Masks) -> None:
        layers = find_layers(dense)
        missing = [name for name in masks if name not in layers]
        if missing:
            raise MaskError(missing[0], "the dense model has no convolution or linear layer of this name")
        self.ties = tied_layers({name: layers[name] for name in masks})
        self.layers, self.names = layers, list(self.ties)

    def units(self, masks: Mapping[str, Tensor], worth: Mapping[str, Tensor]) -> dict[str, Units]:
        """By name, for `removals`: what is kept is bound to stay, and the rest goes by its worth."""
        return {
            name: Units(worth[name].flatten(), 1, tuple(worth[name].shape), masks[name].flatten().cpu())
            for name in self.names
        }

    def counts(self, masks: Mapping[str, Tensor]) -> tuple[int, int]:
        """How many units there are, and how many of them are gone."""
        return sum(masks[name].numel() for name in self.names), sum(int((~masks[name]).sum()) for name in self.names)

    def lost(self, damage: Mapping[str, float]) -> dict[str, float]:
        """The damage, by the same names."""
        return dict(damage)

    def grown(self, before: Masks, gone: Mapping[str, Tensor]) -> Masks:
        """The masks that prune just these units, boolean (units,) by name, and what is pruned for another reason."""
        kept = {name: ~gone[name].view(before[name].shape).to(before[name].device) for name in self.names}
        by_name = {name: kept[first] for first, names in self.ties.items() for name in names}
        return Masks({name: by_name[name] for name in before}, before.notes)

    @torch.no_grad()
    def plant(self, model: nn.Module, dense: nn.Module, before: Masks, grown: Masks, as_dense: bool) -> None:
        """Give the weights that have come back their first value."""
        layers, originals = find_layers(model), find_layers(dense)
        for name, mask in grown.items():
            layer, weight = layers[name], stored_weight(name, layers[name])
            new = (mask & ~before[name].to(mask.device)).to(weight.device)
            weight.copy_(torch.where(new, effective_weight(name, originals[name]).to(weight) * as_dense, weight))
            held = layer._buffers.get("weight_mask")
            if held is not None:
                held.masked_fill_(new, 1)
            refresh_weight(layer)


class Channels(Weights):
    """Units of coupled channels: rows of what makes them, their BatchNorm, columns of what reads them."""

    def __init__(self, dense: nn.Module, masks: Masks, example: Any) -> None:
        self.dense, self.layers = dense, find_layers(dense)
        groups = channel_groups(dense, example)
        self.groups = [group for group in groups if set(masks) >= {*group.makers, *group.readers}]
        if not self.groups:
            raise ValueError("no group of channels has masks on all that makes and reads it; use those of sparsify")
        self.names = list(dict.fromkeys(name for group in self.groups for name in (*group.makers, *group.readers)))

    def units(self, masks: Mapping[str, Tensor], worth: Mapping[str, Tensor]) -> dict[str, Units]:
        dropped = self._dropped(masks)
        return {
            group.name: replace(units_of_channels(group, self.layers, worth), stays=~dropped[group.name])
            for group in self.groups
        }

    def counts(self, masks: Mapping[str, Tensor]) -> tuple[int, int]:
        gone = self._dropped(masks).values()
        return sum(map(len, gone)), sum(int(each.sum()) for each in gone)

    def lost(self, damage: Mapping[str, float]) -> dict[str, float]:
        """Of a group, the mean over the layers that make it."""
        return {group.name: sum(damage[name] for name in group.makers) / len(group.makers) for group in self.groups}

    def grown(self, before: Masks, gone: Mapping[str, Tensor]) -> Masks:
        old, new = (channel_masks(self.dense, self.groups, which) for which in (self._dropped(before), gone))
        return Masks(
            {n: mask | (new[n] & ~old[n]).to(mask.device) if n in new else mask for n, mask in before.items()},
            before.notes,
        )

    @torch.no_grad()
    def plant(self, model: nn.Module, dense: nn.Module, before: Masks, grown: Masks, as_dense: bool) -> None:
        super().plant(model, dense, before, grown, as_dense)
        was, now = self._dropped(before), self._dropped(grown)
        for group in self.groups:
            back = was[group.name] & ~now[group.name]
            for name, table in {**group.makers, **group.norms}.items():
                module, original, rows = model.get_submodule(name), dense.get_submodule(name), table[back].flatten()
                for key in ("bias",) if name in group.makers else ("weight", "bias", "running_mean", "running_var"):
                    mine, theirs = getattr(module, key), getattr(original, key)
                    if mine is not None:
                        mine[rows] = 0 if theirs is None else theirs[rows].to(mine)

    def _dropped(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        none = {group.name: torch.zeros(group.units, dtype=torch.bool) for group in self.groups}
        return {**none, **dropped_units(self.dense, self.groups, masks)}


def stops(total: int, gone: int, sparsity: float, rounds: int) -> list[float]:
    """The sparsity after each of so many rounds, in equal steps from what is gone now.

    Raises ValueError where less is gone than the sparsity asks for.
    """
    goal = round(check_sparsity(sparsity) * total)
    if goal > gone:
        raise ValueError(
            f"sparsity={sparsity} is above the {gone / total:.6g} of these masks, so there is nothing to give back; "
            "sparsify removes weights"
        )
    left = [round(gone - (gone - goal) * done / rounds) for done in range(1, rounds)]
    return [count / total for count in left] + [sparsity]


def by_need(units: Mapping[str, Units], budget: int, needs: Mapping[str, float]) -> dict[str, int]:
    """What is not removed goes to each layer in proportion to its need, until it has no more to take.

    Layers without a need share, in proportion to their size, what is left when all others are full. Units of one
    weight each; exact, by the largest remainder.
    """
    room = np.array([layer.spare for layer in units.values()], np.float64)
    need = np.array([max(needs[name], 0.0) for name in units])
    back = room.sum() - budget
    needy = need > 0
    share = _fill(min(back, room[needy].sum()), room, need)
    share += _fill(back - share.sum(), np.where(needy, 0.0, room), room)
    whole = np.floor(share)
    more = np.argsort(whole - share, kind="stable")[: round(back - whole.sum())]
    whole[more] += 1
    return {name: layer.spare - int(given) for (name, layer), given in zip(units.items(), whole, strict=True)}


def _fill(amount: float, room: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """An amount in proportion to `slope`, no more to each than its room: min(scale * slope, room), the scale solved."""
    rising = (slope > 0) & (room > 0)
    full = np.divide(room, slope, out=np.zeros_like(room), where=rising)
    ends = np.unique(np.append(full, 0.0))
    given = np.array([np.minimum(scale * slope, room).sum() for scale in ends])
    return np.where(rising, np.minimum(np.interp(amount, given, ends) * slope, room), 0.0)


@dataclass
class Chooser:
    """Chooses what comes back: the layers' budgets, and the saliency within them. See `regrow`."""

    space: Weights
    surveyor: Surveyor
    budget: Budget
    saliency: Saliency | Mapping[str, Any]
    densities: Mapping[str, float] | None
    worth: dict[str, Tensor] = field(default_factory=dict)

    def choose(
        self, model: nn.Module, masks: Masks, sparsity: float, resume: Path | None
    ) -> tuple[Masks, dict[str, int], dict[str, float]]:
        """The masks at that sparsity, how much each layer (or group) is given back, and the damage if measured."""
        needs, names = Needs(), self.space.names
        residual = self.saliency == "residual"
        if residual or self.budget == "damage":
            needs = self.surveyor.survey(model, names, worth=residual, resume=resume, progress=False)
        if self.budget == "ssim":
            needs.damage = self.surveyor.dissimilarity(model, names)
        units = self.space.units(masks, needs.worth or self._fixed_worth())
        pinned = pin(self.space.layers, {name: [name] for name in units}, self.densities)
        removed = removals(units, sparsity, self._allocation(units, needs), pinned)
        gone = {name: each.smallest(removed[name]) for name, each in units.items()}
        regrown = {name: each.spare - removed[name] for name, each in units.items()}
        return self.space.grown(masks, gone), regrown, needs.damage

    def _allocation(self, units: Mapping[str, Units], needs: Needs) -> Allocation:
        if self.budget == "greedy":
            return by_magnitude
        measured = self.budget in ("damage", "ssim")
        lost = self.space.lost(needs.damage) if measured else dict.fromkeys(units, 1.0)
        return partial(by_need, needs={name: lost[name] * each.spare for name, each in units.items()})

    def _fixed_worth(self) -> dict[str, Tensor]:
        """What the dense weights alone say, measured once."""
        if not self.worth:
            layers = self.space.layers
            self.worth = {name: magnitude(name, layers[name]) for name in self.space.names}
            reference = Masks(self.saliency) if isinstance(self.saliency, Mapping) else None
            for name in self.worth if reference is not None else ():
                kept = reference.get(name) if reference is not None else None
                if kept is None or kept.shape != self.worth[name].shape:
                    raise MaskError(name, "the denser masks have none for it, or one of another shape")
                self.worth[name] += (1 + self.worth[name].max()) * kept.cpu()
        for name, worth in self.worth.items():
            if not worth.isfinite().all():
                raise LayerError(name, "its saliency is NaN or infinite; look at the labelled images and the loss")
        return self.worth
