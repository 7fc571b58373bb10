"""Zeroing the smallest weights of a model, in the pattern asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ..errors import LayerError, called
from ..network.layers import Selector, effective_weight, find_layers, out_channels, rows_of, unwrap
from ..network.masks import Masks
from ..network.snapshot import Snapshot
from .allocation import (
    ALLOCATIONS,
    Allocation,
    allocator,
    check_measuring,
    check_method,
    listed,
    pin,
    prunable,
    removals,
)
from .patterns import Indivisible, NofM, check_nm_sparsity, fits, input_channels, nm_mask, parse_pattern, unit_mask
from .structured import channel_groups, channel_masks, shrink
from .units import Units, check_floors, magnitude, units_of, units_of_channels

logger = logging.getLogger(__name__)


def sparsify(
    model: nn.Module,
    sparsity: float | None = None,
    *,
    allocation: str = "global",
    pattern: str = "unstructured",
    calibration: Any = None,
    densities: Mapping[str, float] | None = None,
    min_per_layer: int = 1,
    min_per_channel: int = 0,
    indivisible: Indivisible = "dense",
    remove: bool = False,
    example: Any = None,
    include: Iterable[Selector] | Selector | None = None,
    exclude: Iterable[Selector] | Selector | None = None,
    max_samples: int | None = None,
    batch_size: int = 128,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Masks:
    """Zero the smallest weights (by magnitude) of a model's convolutions and linear layers in place; return the masks.

    sparsity: float in [0, 1), the fraction of the *original* weights of the selected layers that goes. Exactly
        round(sparsity * total) are dropped, ties by position. Weights that are zero already are dropped first, so 0.5
        twice is 0.5. None: only the layers that `densities` names lose any.
    allocation: how that is shared out over the layers: "global", "uniform", "erk", "lamp" or "rr"; see `allocate`,
        also for calibration, densities, min_per_layer and min_per_channel.
    pattern:
        "unstructured": any weights.
        "n:m": n weights *kept* of every m consecutive input channels (of one group) at each kernel position. Its
            sparsity is 1 - n/m, allocation has no say, and densities are refused.
        "filter": whole filters, ranked by their mean magnitude: all weights of an output channel, whose bias and
            BatchNorm stay. At most the budget goes, and less than one filter's weights short of it. ("rr" goes by
            what single weights are worth here too.)
        "channels": whole channels, ranked by the mean magnitude of all that makes and reads them: rows and columns of
            every layer on either side, residual sums and concatenations taken together. `sparsity` is then the fraction
            of the *channels* that can go at all ("global", exact), or of each group of coupled ones ("uniform",
            "lamp", within one channel). Needs `example`, an image batch to trace the model with, and Torch-Pruning.
    indivisible: what becomes of a layer whose input channels m does not divide (a stem, a depthwise convolution):
        "dense" leaves it alone, "pad" fills its last group up with channels of zeros, "raise" refuses. Masks note it.
    remove: with "channels": take them out of the model for good, so that it becomes smaller and faster and computes
        the same. The masks still have the shapes from before. To repair a pruned model against the dense one, which
        has those shapes too, do that first and then call `shrink(model, masks, example)`.
    include, exclude: globs over layer names, or module types (see `select_layers`).
    max_samples, batch_size, forward_fn, dtype, device, seed, progress: of what "rr" measures, as in `repair`.

    A weight shared by several layers is ranked and counted once. `torch.nn.utils.prune` masks stay and take the new
    zeros in. Dtype, memory format and requires_grad are kept. All or nothing: on an error the model is as it was.
    Raises ValueError for an unknown choice, an impossible sparsity, floor or density, TypeError for a sparsity that is
    not a float (1 could mean one weight or all), LayerError for a layer whose weights are not finite or recomputed in
    each forward.
    """
    kind = parse_pattern(pattern)
    check_method(allocation)
    measuring: dict[str, Any] = {"max_samples": max_samples, "batch_size": batch_size, "forward_fn": forward_fn}
    measuring |= {"dtype": dtype, "device": device, "seed": seed, "progress": progress}
    check_measuring(allocation, calibration, measuring)
    if indivisible not in get_args(Indivisible):
        raise ValueError(
            f"indivisible={indivisible!r} is unknown; there are {', '.join(map(repr, get_args(Indivisible)))}"
        )
    check_floors(min_per_layer, min_per_channel)
    if remove and kind != "channels":
        raise ValueError(
            f'remove=True takes whole channels out of the model: it needs pattern="channels", not {pattern!r}'
        )
    if kind == "channels" and (min_per_layer, min_per_channel) != (1, 0):
        raise ValueError('min_per_layer and min_per_channel count weights; pattern "channels" has no such floor')
    if indivisible != "dense" and not isinstance(kind, NofM):
        raise ValueError(f"indivisible={indivisible!r} is for patterns n:m, not {pattern!r}")
    include, exclude = listed(include), listed(exclude)
    layers, ties = prunable(model, include, exclude)
    if kind == "channels":
        return _channels(model, sparsity, allocation, densities, example, remove, include, exclude)
    if isinstance(kind, NofM):
        check_nm_sparsity(sparsity, kind)
        if densities:
            raise ValueError(f"pattern {pattern} fixes every density; leave densities out, and use exclude")
        chosen, notes = _n_of_m({first: layers[first] for first in ties}, kind, indivisible)
        _check_kept(chosen, layers, min_per_layer, min_per_channel)
    else:
        floors = min_per_layer, min_per_channel
        units = {first: units_of(first, layers[first], kind == "filter", *floors) for first in ties}
        method = allocator(allocation, model, calibration, include=include, exclude=exclude, **measuring)
        chosen, notes = _by_score(units, layers, sparsity, method, pin(layers, ties, densities)), {}
    placed = {first: mask.to(effective_weight(first, layers[first]).device) for first, mask in chosen.items()}
    by_name = {name: placed[first] for first, names in ties.items() for name in names}
    masks = Masks({name: by_name[name] for name in layers}, _with_dead(notes, layers, by_name))
    masks.apply_(model)
    return masks


def _with_dead(
    notes: Mapping[str, str], layers: Mapping[str, nn.Module], masks: Mapping[str, Tensor]
) -> dict[str, str]:
    """The notes, and how many output channels of a layer have no weight left."""
    dead = {name: int((~rows_of(layer, masks[name]).any(1)).sum()) for name, layer in layers.items()}
    dead_notes = {
        name: f"{count} of {out_channels(layers[name])} channels dead" for name, count in dead.items() if count
    }
    return {**notes, **dead_notes}


def _by_score(
    units: Mapping[str, Units],
    layers: Mapping[str, nn.Module],
    sparsity: float | None,
    method: Allocation,
    pinned: Mapping[str, float],
) -> dict[str, Tensor]:
    removed = removals(units, sparsity, method, pinned)
    zeros = sum(int((layer.scores == 0).sum()) for layer in units.values())
    if zeros > sum(removed.values()):
        logger.warning("%d weights are zero already, more than sparsity %s asks for", zeros, sparsity)
    return {name: unit_mask(layer, layers[name], removed[name]) for name, layer in units.items()}


def _n_of_m(
    layers: Mapping[str, nn.Module], pattern: NofM, indivisible: Indivisible
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The masks, and a note on each layer whose input channels the pattern does not divide."""
    odd = {name: input_channels(layer) for name, layer in layers.items() if not fits(layer, pattern)}
    if len(odd) == len(layers) and indivisible != "pad":
        raise ValueError(f"no selected layer has input channels in whole groups of {pattern.m}; nothing can be pruned")
    if odd and indivisible == "raise":
        name, channels = next(iter(odd.items()))
        fitting = [m for m in range(pattern.m, 1, -1) if channels % m == 0]
        raise LayerError(
            name,
            f"its {channels} input channels (of a group) do not divide into groups of {pattern.m}; exclude it, choose "
            f"indivisible='dense' or 'pad'{f', or groups of {fitting[0]}' if fitting else ''}",
        )
    what = "left dense" if indivisible == "dense" else "the last group filled up"
    notes = {name: f"{what}: {channels} input channels, groups of {pattern.m}" for name, channels in odd.items()}
    for name, note in notes.items():
        logger.info("%s: %s", name, note)
    return {
        name: torch.ones_like(effective_weight(name, layer), dtype=torch.bool)
        if name in odd and indivisible == "dense"
        else nm_mask(magnitude(name, layer), layer, pattern)
        for name, layer in layers.items()
    }, notes


def _check_kept(
    masks: Mapping[str, Tensor], layers: Mapping[str, nn.Module], min_per_layer: int, min_per_channel: int
) -> None:
    """ValueError where a pattern that leaves no choice keeps less than the floors ask for."""
    for name, mask in masks.items():
        if not mask.numel():
            continue
        rows = rows_of(layers[name], mask).sum(1)
        for option, floor, kept in (
            ("min_per_layer", min_per_layer, int(rows.sum())),
            ("min_per_channel", min_per_channel, int(rows.min())),
        ):
            if kept < floor:
                raise ValueError(f"{option}={floor}: this pattern keeps {kept} in {called(name)}; lower it, or exclude")


def _channels(
    model: nn.Module,
    sparsity: float | None,
    allocation: str,
    densities: Mapping[str, float] | None,
    example: Any,
    remove: bool,
    include: Iterable[Selector] | Selector | None,
    exclude: Iterable[Selector] | Selector | None,
) -> Masks:
    """Whole channels, and what makes and reads them."""
    if sparsity is None:
        raise ValueError("sparsity is missing: the fraction of the channels that goes, such as 0.5")
    if example is None:
        raise ValueError('pattern "channels" traces the model: pass example, a batch of one or two images')
    if allocation not in ("global", "uniform", "lamp") or densities:
        raise ValueError(
            f"allocation {allocation!r} is for weights; whole channels are allocated by global, uniform or lamp, "
            "without densities"
        )
    model = unwrap(model)
    groups = channel_groups(model, example, include, exclude)
    if not groups:
        raise ValueError("no channels can be removed from the selected layers; the log says why, at level INFO")
    layers = find_layers(model)
    scores = {name: magnitude(name, layers[name]) for group in groups for name in (*group.makers, *group.readers)}
    units = {group.name: units_of_channels(group, layers, scores) for group in groups}
    removed = removals(units, sparsity, ALLOCATIONS[allocation], {})
    dropped = {name: each.smallest(removed[name]) for name, each in units.items()}
    chosen = channel_masks(model, groups, dropped)
    masks = Masks(chosen, _with_dead({}, {name: find_layers(model)[name] for name in chosen}, chosen))
    with Snapshot(model) as snapshot, snapshot.settling():
        masks.apply_(model)
        if remove:
            shrink(model, masks, example)
        return masks
