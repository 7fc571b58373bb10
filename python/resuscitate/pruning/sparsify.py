"""Magnitude pruning: set the smallest weights of a model to zero, in a sparsity pattern."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from ..errors import LayerError, called
from ..network.layers import effective_weight, find_layers, out_channels, rows_of, unwrap
from ..network.masks import Masks
from ..network.snapshot import Snapshot
from ..runtime.options import RunOptions, check_choice
from .allocation import ALLOCATIONS, Selection, check_method, fixed_densities, listed, prunable_layers, removal_counts
from .densities import check_measurement, choose_allocation
from .patterns import Indivisible, NofM, check_nm_sparsity, input_channels, nm_mask, parse_pattern, unit_mask
from .structured import channel_groups, channel_masks, shrink
from .units import check_floors, magnitude, units_of, units_of_channels

if TYPE_CHECKING:
    from typing_extensions import Unpack

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
    include: Selection = None,
    exclude: Selection = None,
    **options: Unpack[RunOptions],
) -> Masks:
    """Zero the smallest weights (by magnitude) of a model's convolutions and linear layers in place; return the masks.

    sparsity: float in [0, 1), the fraction of the *original* weights of the selected layers that is removed. Exactly
        round(sparsity * total) are removed, ties by position. Weights that are zero already are removed first, so 0.5
        twice is 0.5. None: only the layers named in `densities` lose weights.
    allocation: how many weights each layer loses: "global", "uniform", "erk", "lamp" or "rr"; see `allocate`, also for
        calibration (of "rr" only), densities, min_per_layer and min_per_channel.
    pattern:
        "unstructured": any weights.
        "n:m": n weights *kept* of every m consecutive input channels (of one group) at each kernel position. The
            sparsity is 1 - n/m; allocation, calibration and densities are refused.
        "filter": whole filters, ranked by their mean magnitude: all weights of an output channel, not its bias and
            BatchNorm. Removes the budget or less, short of it by less than one filter. ("rr" uses the curves of
            single weights here too.)
        "channels": whole channels, ranked by the mean magnitude of the weights of all layers that produce and consume
            them (rows and columns); channels coupled by residual sums and concatenations are one unit. `sparsity` is
            then the fraction of the *channels* that can be removed ("global", exact), or of each group of coupled
            channels ("uniform", "lamp", within one channel). Needs `example`, an image batch to trace the model with,
            and Torch-Pruning.
    indivisible: for "n:m", layers whose input channels m does not divide (a stem, a depthwise convolution): "dense"
        leaves them unchanged, "pad" pads the last group with channels of zeros, "raise" refuses. The masks note them.
    remove: for "channels": remove the channels from the model, which becomes smaller and faster and computes the same.
        The masks keep the shapes from before. A repair needs these shapes in the pruned model too: repair it first,
        then call `shrink(model, masks, example)`.
    include, exclude: globs over layer names, or module types (see `select_layers`).
    options: of the measurement for "rr", see `RunOptions`.

    A weight shared by several layers is ranked and counted once. `torch.nn.utils.prune` masks are updated. Dtype,
    memory format and requires_grad are kept. All or nothing: on an error the model is unchanged.
    Raises ValueError for an unknown choice, an option that has no effect with the allocation or pattern, an impossible
    sparsity, floor or density; TypeError for a sparsity that is not a float (1 could mean one weight or all);
    LayerError for a layer whose weights are not finite or recomputed in each forward pass.
    """
    kind, floors = parse_pattern(pattern), (min_per_layer, min_per_channel)
    check_method(allocation)
    if isinstance(kind, NofM) and allocation != "global":
        raise ValueError(f"pattern {pattern} fixes every density: leave allocation out instead of {allocation!r}")
    if calibration is not None and (kind == "channels" or isinstance(kind, NofM)):
        hint = "; the images to trace the model with are example" if kind == "channels" else ""
        raise ValueError(f"pattern {pattern} measures nothing: leave calibration out{hint}")
    check_measurement(allocation, calibration, options)
    check_choice("indivisible", indivisible, get_args(Indivisible))
    check_floors(*floors)
    if remove and kind != "channels":
        needed = f'it needs pattern="channels", not {pattern!r}'
        raise ValueError(f"remove=True removes whole channels from the model: {needed}")
    if kind == "channels" and floors != (1, 0):
        raise ValueError('min_per_layer and min_per_channel count weights; pattern "channels" has no such floor')
    if indivisible != "dense" and not isinstance(kind, NofM):
        raise ValueError(f"indivisible={indivisible!r} is for patterns n:m, not {pattern!r}")
    include, exclude = listed(include), listed(exclude)
    layers, ties = prunable_layers(model, include, exclude)
    if kind == "channels":
        if densities:
            raise ValueError('densities are for weights: leave densities out with pattern "channels"')
        return _channels(unwrap(model), sparsity, allocation, example, remove, include, exclude)
    if isinstance(kind, NofM):
        check_nm_sparsity(sparsity, kind)
        if densities:
            raise ValueError(f"pattern {pattern} fixes every density; leave densities out, and use exclude")
        chosen, notes = _n_of_m({first: layers[first] for first in ties}, kind, indivisible)
        _check_kept(chosen, layers, *floors)
    else:
        units = {first: units_of(first, layers[first], *floors, filters=kind == "filter") for first in ties}
        method = choose_allocation(allocation, model, calibration, include=include, exclude=exclude, **options)
        removed = removal_counts(units, sparsity, method, fixed_densities(layers, ties, densities))
        zeros = sum(int((each.scores == 0).sum()) for each in units.values())
        if zeros > sum(removed.values()):
            logger.warning("%d weights are zero already, more than a sparsity of %s requires", zeros, sparsity)
        chosen, notes = {first: unit_mask(each, layers[first], removed[first]) for first, each in units.items()}, {}
    placed = {first: mask.to(effective_weight(first, layers[first]).device) for first, mask in chosen.items()}
    by_name = {name: placed[first] for first, names in ties.items() for name in names}
    masks = Masks({name: by_name[name] for name in layers}, _with_dead(notes, layers, by_name))
    masks.apply_(model)
    return masks


def _with_dead(
    notes: Mapping[str, str], layers: Mapping[str, nn.Module], masks: Mapping[str, Tensor]
) -> dict[str, str]:
    """The notes, with the number of output channels of each layer that have no weight left."""
    dead = {name: int((~rows_of(layer, masks[name]).any(1)).sum()) for name, layer in layers.items()}
    counts = {name: (count, out_channels(layers[name])) for name, count in dead.items() if count}
    return {**notes, **{name: f"{count} of {total} channels dead" for name, (count, total) in counts.items()}}


def _n_of_m(
    layers: Mapping[str, nn.Module], pattern: NofM, indivisible: Indivisible
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The masks, and a note on each layer whose input channels M does not divide."""
    odd = {name: channels for name, each in layers.items() if (channels := input_channels(each)) % pattern.m}
    if len(odd) == len(layers) and indivisible != "pad":
        raise ValueError(
            f"no selected layer has input channels in whole groups of {pattern.m}, so none can be pruned; choose "
            "another pattern, or indivisible='pad'"
        )
    if odd and indivisible == "raise":
        name, channels = next(iter(odd.items()))
        fitting = next((f", or groups of {m}" for m in range(pattern.m, 1, -1) if channels % m == 0), "")
        problem = f"its {channels} input channels (of a group) do not divide into groups of {pattern.m}"
        raise LayerError(name, f"{problem}; exclude it, choose indivisible='dense' or 'pad'{fitting}")
    what = "left dense" if indivisible == "dense" else "the last group filled up"
    notes = {name: f"{what}: {channels} input channels, groups of {pattern.m}" for name, channels in odd.items()}
    for name, note in notes.items():
        logger.info("%s: %s", name, note)
    masks = {name: nm_mask(magnitude(name, layer), layer, pattern) for name, layer in layers.items()}
    if indivisible == "dense":
        masks |= {name: torch.ones_like(masks[name]) for name in odd}
    return masks, notes


def _check_kept(
    masks: Mapping[str, Tensor], layers: Mapping[str, nn.Module], min_per_layer: int, min_per_channel: int
) -> None:
    """Raise ValueError if an n:m pattern keeps fewer weights than the floors require."""
    for name, mask in masks.items():
        if not mask.numel():
            continue
        rows = rows_of(layers[name], mask).sum(1)
        kept_of = {"min_per_layer": int(rows.sum()), "min_per_channel": int(rows.min())}
        for (option, kept), floor in zip(kept_of.items(), (min_per_layer, min_per_channel), strict=True):
            if kept < floor:
                raise ValueError(f"{option}={floor}: this pattern keeps {kept} in {called(name)}; lower it, or exclude")


def _channels(
    model: nn.Module,
    sparsity: float | None,
    allocation: str,
    example: Any,
    remove: bool,
    *selectors: Selection,
) -> Masks:
    """Pattern "channels": prune whole channels in the layers that produce and consume them."""
    if sparsity is None:
        raise ValueError("sparsity is missing: give the fraction of the channels to remove, such as 0.5")
    if example is None:
        raise ValueError('pattern "channels" traces the model: pass example, a batch of one or two images')
    if allocation not in ("global", "uniform", "lamp"):
        raise ValueError(f"allocation {allocation!r} is for weights; for whole channels choose global, uniform or lamp")
    groups = channel_groups(model, example, *selectors)
    if not groups:
        raise ValueError("no channels can be removed from the selected layers; the log says why, at level INFO")
    layers = find_layers(model)
    scores = {name: magnitude(name, layers[name]) for group in groups for name in (*group.producers, *group.consumers)}
    units = {group.name: units_of_channels(group, layers, scores) for group in groups}
    removed = removal_counts(units, sparsity, ALLOCATIONS[allocation], {})
    dropped = {name: each.smallest(removed[name]) for name, each in units.items()}
    chosen = channel_masks(model, groups, dropped)
    masks = Masks(chosen, _with_dead({}, {name: layers[name] for name in chosen}, chosen))
    with Snapshot(model) as snapshot, snapshot.defer_interrupts():
        masks.apply_(model)
        if remove:
            shrink(model, masks, example)
        return masks
