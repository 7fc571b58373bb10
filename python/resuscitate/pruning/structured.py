"""Structured pruning: masks of whole channels, and their removal from the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import LayerError, MaskError, ResuscitateError
from ..network.channels import Side, width
from ..network.comparison import (
    Example,
    compute_outputs,
    count_flops,
    describe_error,
    input_tensors,
    relative_difference,
)
from ..network.copies import trial_copy
from ..network.layers import columns_of, find_layers, rows_of, unwrap
from ..network.masks import Masks
from ..network.snapshot import Snapshot, evaluation_mode
from ..reports.base import Report
from .coupling import AGREEMENT, ChannelGroup, channel_masks, remaining_channels, remove_units, verified_groups
from .units import Units, smallest

# attributes of modules with sizes that change with the number of channels
SIZES = {"in_channels", "out_channels", "groups", "in_features", "out_features"} | {
    *("num_features", "num_channels", "num_parameters", "normalized_shape"),
}


@dataclass(frozen=True)
class Shrinkage(Report):
    """Result of `shrink`.

    `removed`: by group of coupled channels, the number of units removed. `kept` and `kept_inputs`: by layer or
    BatchNorm of which some were removed, the original output and input channels that are left, int64. `parameters` of
    the model and `flops` for one image, before and after; a multiplication and an addition count as two. `error`: the
    largest difference of the outputs, over the largest output. `notes`: masked channels that were not removed, and why.
    """

    columns: ClassVar[Sequence[str]] = ("group", "removed")
    removed: dict[str, int]
    kept: dict[str, Tensor]
    kept_inputs: dict[str, Tensor]
    parameters: tuple[int, int]
    flops: tuple[int, int]
    error: float
    notes: list[str]

    def rows(self) -> list[dict[str, Any]]:
        """One row for each group."""
        return [{"group": group, "removed": count} for group, count in self.removed.items()]


@torch.no_grad()
def units_of_channels(group: ChannelGroup, layers: Mapping[str, nn.Module], saliency: Mapping[str, Tensor]) -> Units:
    """Units of a group; score: mean saliency of the weights of its producers and consumers. The best unit is kept."""
    sums, weights = torch.zeros(group.units, dtype=torch.float64), 0
    for parts, view in ((group.producers, rows_of), (group.consumers, columns_of)):
        for name, indices in parts.items():
            by_channel = view(layers[name], saliency[name])
            sums += by_channel.sum(1, dtype=torch.float64)[indices].sum(1)
            weights += by_channel.shape[1] * indices.shape[1]
    scores = sums / max(weights, 1)
    return Units(scores, 1, (group.units,), ~smallest(scores, group.units - 1))


def shrink(model: nn.Module, masks: Mapping[str, Tensor], example: Example, *, tolerance: float = 1e-4) -> Shrinkage:
    """Remove, in place, every unit that `masks` prune in all its producers and consumers.

    masks: layer -> boolean, weight's shape, True = kept; a layer without a mask is dense. The masked weights must be
        zero in the model (`Masks.apply_`).
    example: an input batch (N, ...), or a tuple of inputs, on which the outputs before and after are compared.
    tolerance: the largest difference in output to accept, relative to the largest output.

    Modules and state-dict keys are kept. Parameters that shrink are new tensors, so create optimizers anew. A unit that
    is masked in its producers only is kept, because its output may be a constant, and so is the last unit of a group;
    the notes count both. All or nothing: on an error the model is unchanged. Raises MaskError if a mask does not fit,
    LayerError for a layer with `torch.nn.utils.prune` masks or a weight that is recomputed in each forward pass,
    ResuscitateError if the channels cannot be followed or removed, or the outputs differ.
    """
    model, inputs = unwrap(model), input_tensors(example)
    for name, layer in find_layers(model).items():
        for key in ("weight", "bias"):
            if f"{key}_mask" in layer._buffers:
                raise LayerError(name, f"its {key} is under torch.nn.utils.prune; prune.remove(layer, {key!r}) first")
    masks = Masks(masks)
    masks.check(model)
    groups, refused = verified_groups(model, inputs)
    dropped, notes = dropped_units(model, groups, masks)
    masked = {name for name in refused if _masked_channels(model, masks, name, "out").any()}
    notes += [f"channels of {name!r} are kept: {why}" for name, why in refused.items() if name in masked]
    if not dropped:
        notes.append("nothing to remove: no unit is masked in all its producers and consumers")
    dense, small, which = trial_copy(model), trial_copy(model), ", ".join(dropped)
    with evaluation_mode([dense, small], 0):
        try:
            remove_units(small, groups, dropped)
            error = relative_difference(compute_outputs(dense, inputs), compute_outputs(small, inputs))
        except Exception as cause:
            raise ResuscitateError(f"channels of {which} cannot be removed; {describe_error(cause)}") from cause
        if not error <= tolerance:
            problem = f"without the masked channels of {which} the output differs by {error:.3g} of its largest value"
            raise ResuscitateError(f"{problem}, more than tolerance={tolerance:g}; the model is as it was")
        flops = count_flops(dense, inputs), count_flops(small, inputs)
    parameters = sum(p.numel() for p in dense.parameters()), sum(p.numel() for p in small.parameters())
    kept, kept_inputs = remaining_channels(dense, groups, dropped)
    _install(model, _tensors(small), small)
    removed = {name: int(units.sum()) for name, units in dropped.items()}
    return Shrinkage(removed, kept, kept_inputs, parameters, flops, error, notes)


def restore_units(model: nn.Module, dense: nn.Module, masks: Mapping[str, Tensor], example: Example) -> bool:
    """Undo `shrink`, in place: put the removed units back, masked. Returns whether any were missing.

    masks: those given to `shrink`, in the shapes of `dense`, the network before it. A restored unit has weights of
    zero and the bias and BatchNorm of `dense`. Raises MaskError for other masks, ResuscitateError as `shrink` does.
    """
    model, dense, inputs = unwrap(model), unwrap(dense), input_tensors(example)
    layers, originals = find_layers(model), find_layers(dense)
    if all(layers[n].weight.shape == originals[n].weight.shape for n in layers if n in originals):
        return False
    groups, _ = verified_groups(dense, inputs)
    dropped, _ = dropped_units(dense, groups, Masks(masks))
    kept, _ = remaining_channels(dense, groups, dropped)
    regions = channel_masks(dense, groups, dropped)
    tensors: dict[str, Tensor] = {}
    for name, original in _tensors(dense).items():
        owner, _, key = name.rpartition(".")
        small = getattr(model.get_submodule(owner), key, None)
        if not isinstance(small, Tensor) or small.shape == original.shape:
            continue
        masked = key == "weight" and owner in regions
        full = torch.zeros_like(original) if masked else original.detach().clone()
        where = regions[owner] if masked else kept.get(owner)
        if where is None or small.numel() != full[where.to(full.device)].numel():
            problem = f"its {key} is {tuple(small.shape)}, not what these masks leave of the dense one"
            raise MaskError(owner, f"{problem}; pass the masks that shrink was given")
        full[where.to(full.device)] = small.detach().to(full).flatten()
        tensors[name] = full.to(small)
    with evaluation_mode([model], 0), Snapshot(model):
        before = compute_outputs(trial_copy(model), inputs)
        _install(model, tensors, dense)
        error = relative_difference(before, compute_outputs(trial_copy(model), inputs))
        if not error <= AGREEMENT:
            problem = f"with the removed channels restored and masked, the output differs by {error:.3g}"
            raise ResuscitateError(f"{problem} of its largest value; pass the masks that shrink was given")
    return True


def dropped_units(model: nn.Module, groups: list[ChannelGroup], masks: Masks) -> tuple[dict[str, Tensor], list[str]]:
    """Group -> boolean (units,): units masked in all producers and consumers; and notes on units masked in part."""
    dropped, notes = dict[str, Tensor](), list[str]()
    for group in groups:
        unproduced, unconsumed = (
            torch.stack([_masked_channels(model, masks, n, side)[table].all(1) for n, table in tables.items()]).all(0)
            for side, tables in group.sides
        )
        removable = unproduced & unconsumed
        if count := int((unproduced & ~unconsumed).sum()):
            reason = "because their output may be a constant"
            notes.append(f"{count} units of {group.name!r} are masked in their producers only; they are kept, {reason}")
        if removable.all():
            removable[0] = False
            notes.append(f"all units of {group.name!r} are masked; one is kept")
        if removable.any():
            dropped[group.name] = removable
    return dropped, notes


def _masked_channels(model: nn.Module, masks: Mapping[str, Tensor], name: str, side: Side) -> Tensor:
    """Boolean (channels,): output channels whose rows, or input channels whose columns, are all masked."""
    module = model.get_submodule(name)
    if name not in masks:
        return torch.zeros(width(module, side), dtype=torch.bool)
    view = rows_of if side == "out" else columns_of
    return ~view(module, masks[name].cpu()).any(1)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; a shared one under each of its names."""
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def _install(model: nn.Module, tensors: Mapping[str, Tensor], like: nn.Module) -> None:
    """Set the tensors that differ in shape, and each module's size attributes from `like`; all changes at the end."""
    changes: list[tuple[dict[str, Any], str, Any]] = []
    for name, module in model.named_modules():
        source = like.get_submodule(name)
        for slots in (module._parameters, module._buffers):
            for key, old in slots.items():
                new = tensors.get(f"{name}.{key}" if name else key)
                if old is not None and new is not None and old.shape != new.shape:
                    # in the memory format of the old tensor
                    order = [axis for _, axis in sorted((-step, axis) for axis, step in enumerate(old.stride()))]
                    new = torch.empty_permuted(new.shape, order, dtype=old.dtype, device=old.device).copy_(new)
                    value = nn.Parameter(new, old.requires_grad) if slots is module._parameters else new
                    changes.append((slots, key, value))
        changes += [(vars(module), key, vars(source)[key]) for key in SIZES if key in vars(module)]
    for slots, key, value in changes:
        slots[key] = value
