"""Magnitude pruning: set the smallest weights of a model to zero, in a sparsity pattern."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Unpack, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..errors import LayerError, called, did_you_mean
from ..network.layers import (
    Selection,
    along_weight,
    effective_weight,
    find_layers,
    out_channels,
    reusable,
    rows_of,
    select_layers,
    unwrap,
)
from ..network.masks import Masks
from ..network.snapshot import Snapshot
from ..runtime.distributed import fails_on_all
from ..runtime.options import RunOptions, check_choice
from .allocation import check_measurement, check_method, choose_allocation, fixed_densities, removal_counts
from .allocation_rules import ALLOCATIONS
from .coupling import channel_masks, groups_and_reasons
from .structured import shrink, units_of_channels
from .units import ChannelFloors, Units, channel_floors, check_floors, magnitude, prunable_layers, units_of

logger = logging.getLogger(__name__)
NAMES = ("unstructured", "filter", "channels")
Indivisible = Literal["dense", "pad", "raise"]


class NofM(NamedTuple):
    """N weights kept of every M consecutive ones."""

    n: int
    m: int


def parse_pattern(pattern: str) -> str | NofM:
    """The pattern itself if it is in `NAMES`, (n, m) for "n:m" with 0 < n < m. Raises ValueError for anything else."""
    if pattern in NAMES:
        return pattern
    found = re.fullmatch(r"(\d+):(\d+)", pattern) if isinstance(pattern, str) else None
    if found and 0 < int(found[1]) < int(found[2]):
        return NofM(int(found[1]), int(found[2]))
    known = '"unstructured", "filter", "channels", or "n:m" for n kept of m, such as "2:4"'
    raise ValueError(f"unknown pattern {pattern!r}; choose {known}{did_you_mean(str(pattern), NAMES)}")


@fails_on_all
def sparsify(
    model: nn.Module,
    sparsity: float | None = None,
    *,
    allocation: str = "global",
    pattern: str = "unstructured",
    calibration: Any = None,
    densities: Mapping[str, float] | None = None,
    min_per_layer: int = 1,
    min_per_channel: ChannelFloors = 0,
    indivisible: Indivisible = "dense",
    remove: bool = False,
    example: Any = None,
    include: Selection = None,
    exclude: Selection = None,
    **options: Unpack[RunOptions],
) -> Masks:
    """Zero the smallest weights (by magnitude) of a model's convolutions and linear layers in place; return the masks.

    sparsity: float in [0, 1), the fraction of the *original* weights of the selected layers that is removed. Exactly
        round(sparsity * total) are removed, ties by position. Weights that are zero already are removed first, so 0.5
        twice is 0.5. None: only the layers named in `densities` lose weights.
    allocation: how many weights each layer loses: "global", "uniform", "erk", "lamp", "rr" or "measured"; see
        `allocate`, also for calibration (of the last two only), densities, min_per_layer and min_per_channel.
    pattern:
        "unstructured": any weights.
        "n:m": n weights *kept* of every m consecutive input channels (of one group) at each kernel position. The
            sparsity is 1 - n/m; allocation, calibration and densities are refused.
        "filter": whole filters, ranked by their mean magnitude: all weights of an output channel, not its bias and
            BatchNorm. Removes the budget, or less than one filter short of it. ("rr" uses the curves of single
            weights.)
        "channels": whole channels, ranked by the mean magnitude of their weights in all layers that produce and consume
            them; channels coupled by residual sums and concatenations are one unit. `sparsity` is the fraction of the
            *channels* that can be removed ("global", exact), or of each group of coupled channels ("uniform", "lamp",
            within one channel). Needs `example`, an image batch to trace the model with.
    indivisible: for "n:m", layers whose input channels m does not divide (a stem, a depthwise convolution): "dense"
        leaves them unchanged, "pad" pads the last group with channels of zeros, "raise" refuses. The masks note them.
    remove: for "channels": remove the channels from the model, which becomes smaller and faster and computes the same.
        The masks keep the shapes from before. `shrink(model, masks, example)` does the same later.
    include, exclude: globs over layer names, or module types (see `select_layers`).
    options: of the measurement for "rr", see `RunOptions`.

    A weight shared by several layers is ranked and counted once. `torch.nn.utils.prune` masks are updated. Dtype,
    memory format and requires_grad are kept. All or nothing: on an error the model is unchanged.
    Raises ValueError for an unknown choice, an option that has no effect with the allocation or pattern, an impossible
    sparsity, floor or density; TypeError for a sparsity that is not a float (1 could mean one weight or all);
    LayerError for a layer whose weights are not finite or recomputed in each forward pass.
    """
    kind = parse_pattern(pattern)
    check_method(allocation)
    if isinstance(kind, NofM) and allocation != "global":
        raise ValueError(f"pattern {pattern} fixes every density: leave allocation out instead of {allocation!r}")
    if calibration is not None and (kind == "channels" or isinstance(kind, NofM)):
        hint = "; the images to trace the model with are example" if kind == "channels" else ""
        raise ValueError(f"pattern {pattern} measures nothing: leave calibration out{hint}")
    check_measurement(allocation, calibration, options)
    check_choice("indivisible", indivisible, get_args(Indivisible))
    check_floors(min_per_layer, min_per_channel)
    if remove and kind != "channels":
        needed = f'it needs pattern="channels", not {pattern!r}'
        raise ValueError(f"remove=True removes whole channels from the model: {needed}")
    if kind == "channels" and (min_per_layer != 1 or min_per_channel):
        raise ValueError('min_per_layer and min_per_channel count weights; pattern "channels" has no such floor')
    if indivisible != "dense" and not isinstance(kind, NofM):
        raise ValueError(f"indivisible={indivisible!r} is for patterns n:m, not {pattern!r}")
    include, exclude = reusable(include), reusable(exclude)
    layers, first_of = prunable_layers(model, include, exclude)
    first = {name: layers[name] for name in dict.fromkeys(first_of.values())}  # a shared weight once
    if kind == "channels":
        if densities:
            raise ValueError('densities are for weights: leave densities out with pattern "channels"')
        return _channels(unwrap(model), sparsity, allocation, example, remove, include, exclude)
    floors = channel_floors(first, min_per_channel)
    if isinstance(kind, NofM):
        n, m = kind
        if sparsity is not None and not math.isclose(sparsity, 1 - n / m, rel_tol=1e-9):
            remedy = f"leave sparsity out instead of asking for {sparsity!r}"
            raise ValueError(f"pattern {n}:{m} keeps {n} of {m}, a sparsity of {1 - n / m:.6g}; {remedy}")
        if densities:
            raise ValueError(f"pattern {pattern} fixes every density; leave densities out, and use exclude")
        chosen, notes = _n_of_m(first, kind, indivisible)
        _check_floors_met(chosen, first, min_per_layer, floors)
    else:
        units = {
            name: units_of(name, layer, min_per_layer, floors[name], filters=kind == "filter")
            for name, layer in first.items()
        }
        method = choose_allocation(allocation, model, calibration, include=include, exclude=exclude, **options)
        removed = removal_counts(units, sparsity, method, fixed_densities(layers, first_of, densities))
        zeros = sum(int((each.scores == 0).sum()) for each in units.values())
        if zeros > sum(removed.values()):
            logger.warning("%d weights are zero already, more than a sparsity of %s requires", zeros, sparsity)
        chosen, notes = {name: _unit_mask(each, first[name], removed[name]) for name, each in units.items()}, {}
    placed = {name: mask.to(effective_weight(name, first[name]).device) for name, mask in chosen.items()}
    by_layer = {name: placed[owner] for name, owner in first_of.items()}
    masks = Masks(by_layer, notes | _notes_on_dead_channels(layers, by_layer))
    masks.apply_(model)
    return masks


def _notes_on_dead_channels(layers: Mapping[str, nn.Module], masks: Mapping[str, Tensor]) -> dict[str, str]:
    """A note for each layer with output channels that have no weight left."""
    dead = {name: int((~rows_of(layers[name], mask).any(1)).sum()) for name, mask in masks.items()}
    return {name: f"{n} of {out_channels(layers[name])} channels dead" for name, n in dead.items() if n}


def _n_of_m(
    layers: Mapping[str, nn.Module], pattern: NofM, indivisible: Indivisible
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The masks, and a note on each layer whose input channels M does not divide. Raises ValueError, LayerError."""
    odd = {name: channels for name, each in layers.items() if (channels := _input_channels(each)) % pattern.m}
    if len(odd) == len(layers) and indivisible != "pad":
        problem = f"no selected layer has input channels in whole groups of {pattern.m}, so none can be pruned"
        raise ValueError(f"{problem}; choose another pattern, or indivisible='pad'")
    if odd and indivisible == "raise":
        name, channels = next(iter(odd.items()))
        fitting = next((f", or groups of {m}" for m in range(pattern.m, 1, -1) if channels % m == 0), "")
        problem = f"its {channels} input channels (of a group) do not divide into groups of {pattern.m}"
        raise LayerError(name, f"{problem}; exclude it, choose indivisible='dense' or 'pad'{fitting}")
    what = "left dense" if indivisible == "dense" else "the last group filled up"
    notes = {name: f"{what}: {channels} input channels, groups of {pattern.m}" for name, channels in odd.items()}
    for name, note in notes.items():
        logger.info("%s: %s", name, note)
    masks = {name: _nm_mask(magnitude(name, layer), layer, pattern) for name, layer in layers.items()}
    if indivisible == "dense":
        masks |= {name: torch.ones_like(masks[name]) for name in odd}
    return masks, notes


def _check_floors_met(
    masks: Mapping[str, Tensor], layers: Mapping[str, nn.Module], per_layer: int, per_channel: Mapping[str, int]
) -> None:
    """Raise ValueError where masks keep fewer weights than a floor requires."""
    for name, mask in masks.items():
        if mask.numel():
            rows = rows_of(layers[name], mask).sum(1)
            found = ("min_per_layer", per_layer, rows.sum()), ("min_per_channel", per_channel[name], rows.min())
            for option, floor, kept in found:
                if kept < floor:
                    problem = f"this pattern keeps {kept} in {called(name)}; lower it, or exclude"
                    raise ValueError(f"{option}={floor}: {problem}")


def _unit_mask(units: Units, module: nn.Module, removed: int) -> Tensor:
    """Boolean mask, weight's shape: False at the `removed` units of smallest score, among equals the earlier ones."""
    kept = ~units.smallest(removed)
    if units.count == math.prod(units.shape):
        return kept.view(units.shape)
    return along_weight(module, kept).expand(units.shape).contiguous()


def _nm_mask(scores: Tensor, module: nn.Module, pattern: NofM) -> Tensor:
    """Boolean mask that keeps the N largest scores of every M consecutive input channels, at each kernel position.

    Among equals the later channel is kept. In a last group of fewer than M channels N are kept, or all.
    """
    # a transposed convolution has its input channels on axis 0, group after group
    axis, groups = (0, module.groups) if isinstance(module, _ConvTransposeNd) else (1, 1)
    channels = _input_channels(module)
    by_group = scores.movedim(axis, 0).unflatten(0, (groups, channels))
    # smaller than any |w|, so that padding is never kept in place of a weight
    padding = by_group.new_full((groups, -channels % pattern.m, *by_group.shape[2:]), -1.0)
    grouped = torch.cat([by_group, padding], 1).unflatten(1, (-1, pattern.m))
    kept: Tensor = grouped.argsort(dim=2, stable=True).argsort(2) >= pattern.m - pattern.n
    return kept.flatten(1, 2)[:, :channels].flatten(0, 1).movedim(0, axis).contiguous()


def _input_channels(module: nn.Module) -> int:
    """Number of input channels per output channel."""
    channels: Any = module.in_channels // module.groups if isinstance(module, _ConvNd) else module.in_features
    return int(channels)


def _why_none(kept: Mapping[str, str], selected: Mapping[str, nn.Module]) -> str:
    """The message where no channels can be removed, with the reason for the first selected layer that has one."""
    first = next((name for name in (*selected, *kept) if name in kept), None)
    reason = "" if first is None else f": {called(first)}: {kept[first]}"
    more = "; the log gives the other reasons at level INFO" if len(kept) > 1 else ""
    return f"no channels can be removed from the selected layers{reason}{more}"


def _channels(
    model: nn.Module, sparsity: float | None, allocation: str, example: Any, remove: bool, *selectors: Selection
) -> Masks:
    """Pattern "channels": prune whole channels in the layers that produce and consume them."""
    if sparsity is None:
        raise ValueError("sparsity is missing: give the fraction of the channels to remove, such as 0.5")
    if example is None:
        raise ValueError('pattern "channels" traces the model: pass example, a batch of one or two images')
    if allocation not in ("global", "uniform", "lamp"):
        raise ValueError(f"allocation {allocation!r} is for weights; for whole channels choose global, uniform or lamp")
    groups, kept = groups_and_reasons(model, example, *selectors)
    if not groups:
        raise ValueError(_why_none(kept, select_layers(model, *selectors)))
    layers = find_layers(model)
    scores = {name: magnitude(name, layers[name]) for group in groups for name in (*group.producers, *group.consumers)}
    units = {group.name: units_of_channels(group, layers, scores) for group in groups}
    removed = removal_counts(units, sparsity, ALLOCATIONS[allocation], {}, "channels")
    dropped = {name: each.smallest(removed[name]) for name, each in units.items()}
    chosen = channel_masks(model, groups, dropped)
    masks = Masks(chosen, _notes_on_dead_channels(layers, chosen))
    with Snapshot(model) as snapshot, snapshot.defer_interrupts_at_end():
        masks.apply_(model)
        if remove:
            shrink(model, masks, example)
        return masks
