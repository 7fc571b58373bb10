"""Whole channels, out of the masks and out of the network for good."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LayerError, MaskError, ResuscitateError
from ..network.copies import Example, count_flops, difference, inputs_of, make_twin, outputs, said
from ..network.layers import columns_of, find_layers, rows_of, unwrap
from ..network.masks import Masks
from ..network.snapshot import Snapshot, undisturbed
from .coupling import (
    AGREEMENT,
    WIDTHS,
    ChannelGroup,
    channel_groups,
    remove_units,
    survey,
    torch_pruning,
    width_of,
    without,
)

__all__ = ["ChannelGroup", "Shrinkage", "channel_groups", "channel_masks", "shrink"]

SIZES = {*itertools.chain(*WIDTHS.values()), "groups", "num_parameters"}


@dataclass(frozen=True)
class Shrinkage:
    """What `shrink` did."""

    removed: dict[str, int]  # group -> units removed
    kept: dict[str, Tensor]  # layer or BatchNorm -> int64, the original output channels that remain, where some went
    kept_inputs: dict[str, Tensor]  # layer -> int64, likewise for its input channels
    parameters: tuple[int, int]  # of the whole model, before and after
    flops: tuple[int, int]  # for one image, before and after
    error: float  # largest difference between the outputs before and after, relative to the largest output
    notes: list[str]  # what is masked and stays, and why


def channel_masks(model: nn.Module, groups: Iterable[ChannelGroup], dropped: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks without the rows and the columns of dropped units: layer -> boolean of its weight's shape, True = kept.

    dropped: group name -> boolean (units,); a group that is missing drops nothing.
    There is a mask for every layer that makes or reads channels of some group. Raises ValueError for a name that is
    not among `groups`, and for a tensor that is not boolean (units,).
    """
    layers, by_name = find_layers(unwrap(model)), {group.name: group for group in groups}
    for name, gone in dropped.items():
        if name not in by_name:
            raise ValueError(f"dropped names {name!r}; the groups are {', '.join(by_name) or 'none'}")
        count = by_name[name].units
        if gone.dtype != torch.bool or gone.shape != (count,):
            raise ValueError(f"dropped[{name!r}] is {gone.dtype} {tuple(gone.shape)}, not boolean ({count},)")
    masks: dict[str, Tensor] = {}
    for group in by_name.values():
        gone = dropped.get(group.name, torch.zeros(group.units, dtype=torch.bool)).cpu()
        for role, tables in (("makers", group.makers), ("readers", group.readers)):
            for layer, table in tables.items():
                mask = without(layer, layers[layer], role, table[gone])
                masks[layer] = masks[layer] & mask if layer in masks else mask
    return {name: masks[name] for name in layers if name in masks}


def shrink(model: nn.Module, masks: Mapping[str, Tensor], example: Example, *, tolerance: float = 1e-4) -> Shrinkage:
    """Take out, in place, every unit of channels that `masks` leave neither made nor read; say what went.

    masks: layer -> boolean of its weight's shape, True = kept; a layer without one is dense. Their zeros must be in
        the model already (`Masks.apply_`).
    example: a batch (N, ...), or a tuple of inputs, on which the small network must agree with the masked one.
    tolerance: the largest difference in output to accept, relative to the largest output.

    Modules and state-dict keys stay as they are; parameters that shrink are new tensors, so make optimizers anew. A
    unit whose rows are masked but that is still read stays, for it may emit a constant, and so does a group's last
    unit; the notes count them. All or nothing: on an error the model is as it was.
    Raises MaskError where a mask does not fit, LayerError for a layer under `torch.nn.utils.prune` or recomputed in
    each forward, ResuscitateError where torch-pruning is missing or fails, or where the outputs differ.
    """
    tp, model, inputs = torch_pruning(), unwrap(model), inputs_of(example)
    for name, layer in find_layers(model).items():
        for key in ("weight", "bias"):
            if f"{key}_mask" in layer._buffers:
                raise LayerError(name, f"its {key} is under torch.nn.utils.prune; prune.remove(layer, {key!r}) first")
    masks = Masks(masks)
    masks.check(model)
    groups, stay = survey(tp, model, inputs)
    dropped, notes = _droppable(model, groups, masks)
    notes += [f"channels of {n!r} stay: {why}" for n, why in stay.items() if _masked(model, masks, n, "makers").any()]
    if not dropped:
        notes.append("nothing to remove: no unit is masked in all layers that make it and all that read it")
    dense, small, which = make_twin(model), make_twin(model), ", ".join(dropped)
    with undisturbed([dense, small], 0):
        try:
            remove_units(tp, small, inputs, groups, dropped)
            error = difference(outputs(dense, inputs), outputs(small, inputs))
        except Exception as problem:
            raise ResuscitateError(f"channels of {which} cannot be removed; {said(problem)}") from problem
        if not error <= tolerance:
            raise ResuscitateError(
                f"without the masked channels of {which} the output differs by {error:.3g} of its largest value, more "
                f"than tolerance={tolerance:g}; the model is as it was"
            )
        flops = count_flops(dense, inputs), count_flops(small, inputs)
    parameters = sum(p.numel() for p in dense.parameters()), sum(p.numel() for p in small.parameters())
    kept, kept_inputs = _survivors(dense, groups, dropped)
    _adopt(model, _tensors(small), small)
    removed = {name: int(gone.sum()) for name, gone in dropped.items()}
    return Shrinkage(removed, kept, kept_inputs, parameters, flops, error, notes)


def restore_units(model: nn.Module, dense: nn.Module, masks: Mapping[str, Tensor], example: Example) -> bool:
    """Undo `shrink`, in place: the units it took out are there again, masked; returns whether any were missing.

    masks: as `shrink` was given them, in the shapes of `dense`, the network before it. What was taken out comes back
    without weights, and with the dense bias and BatchNorm; the model computes what it did.
    Raises MaskError where a layer has another size than the masks leave it, ResuscitateError as `shrink` does.
    """
    tp, model, inputs = torch_pruning(), unwrap(model), inputs_of(example)
    layers, originals = find_layers(model), find_layers(unwrap(dense))
    if all(layers[n].weight.shape == originals[n].weight.shape for n in layers if n in originals):
        return False
    groups, _ = survey(tp, unwrap(dense), inputs)
    dropped, _ = _droppable(unwrap(dense), groups, Masks(masks))
    kept, _ = _survivors(unwrap(dense), groups, dropped)
    regions = channel_masks(dense, groups, dropped)
    tensors: dict[str, Tensor] = {}
    for name, original in _tensors(unwrap(dense)).items():
        owner, _, key = name.rpartition(".")
        small = getattr(model.get_submodule(owner), key, None)
        if not isinstance(small, Tensor) or small.shape == original.shape:
            continue
        where = regions[owner] if key == "weight" and owner in regions else kept.get(owner)
        room = None if where is None else (int(where.sum()) if where.dtype == torch.bool else len(where))
        if where is None or small.numel() != room:
            raise MaskError(
                owner, f"its {key} is {tuple(small.shape)}, which is not what these masks leave of the dense"
            )
        full = torch.zeros_like(original) if where.dtype == torch.bool else original.detach().clone()
        full[where.to(full.device)] = small.detach().to(full).flatten()
        tensors[name] = full.to(small)
    with undisturbed([], 0), Snapshot(model):
        before = outputs(make_twin(model), inputs)
        _adopt(model, tensors, unwrap(dense))
        error = difference(before, outputs(make_twin(model), inputs))
        if not error <= AGREEMENT:
            raise ResuscitateError(
                f"with its channels back, and masked, the output differs by {error:.3g} of its largest value: these "
                "are not the masks that the channels went by"
            )
    return True


def dropped_units(model: nn.Module, groups: Iterable[ChannelGroup], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Group -> boolean (units,): those that are neither made nor read by these masks."""
    return _droppable(model, groups, masks)[0]


def _droppable(
    model: nn.Module, groups: Iterable[ChannelGroup], masks: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Group -> boolean (units,): those masked in all layers that make them and all that read them; notes on others."""
    dropped: dict[str, Tensor] = {}
    notes: list[str] = []
    for group in groups:
        unmade, unread = (
            torch.stack([_masked(model, masks, name, role)[table].all(1) for name, table in tables.items()]).all(0)
            for role, tables in (("makers", group.makers), ("readers", group.readers))
        )
        gone = unmade & unread
        if read := int((unmade & ~unread).sum()):
            notes.append(f"{read} units of {group.name!r} are masked but still read; they may emit a constant and stay")
        if gone.all():
            gone[0] = False
            notes.append(f"all units of {group.name!r} are masked; one stays")
        if gone.any():
            dropped[group.name] = gone
    return dropped, notes


def _masked(model: nn.Module, masks: Mapping[str, Tensor], name: str, role: str) -> Tensor:
    """Boolean (channels,): those that the layer's mask leaves no weight to make, or to read."""
    module = model.get_submodule(name)
    if name not in masks:
        return torch.zeros(width_of(module, role), dtype=torch.bool)
    view = rows_of if role == "makers" else columns_of
    return ~view(module, masks[name].cpu()).any(1)


def _survivors(
    model: nn.Module, groups: Iterable[ChannelGroup], dropped: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The output channels, and the input channels, that remain of the model's modules where some went."""
    kept: dict[str, Tensor] = {}
    kept_inputs: dict[str, Tensor] = {}
    for group in groups:
        if group.name in dropped:
            sides = (
                ("makers", group.makers, kept),
                ("norms", group.norms, kept),
                ("readers", group.readers, kept_inputs),
            )
            for role, tables, remaining in sides:
                for name, table in tables.items():
                    before = remaining.get(name, torch.arange(width_of(model.get_submodule(name), role)))
                    remaining[name] = before[~torch.isin(before, table[dropped[group.name]])]
    return kept, kept_inputs


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name, shared ones under each of theirs."""
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def _adopt(model: nn.Module, tensors: Mapping[str, Tensor], like: nn.Module) -> None:
    """Give each module those of the tensors that differ in shape, and the sizes of its twin in `like`, all at once."""
    changes: list[tuple[dict[str, Any], str, Any]] = []
    for name, module in model.named_modules():
        twin = like.get_submodule(name)
        for slots in (module._parameters, module._buffers):
            for key, old in slots.items():
                new = tensors.get(f"{name}.{key}" if name else key)
                if old is not None and new is not None and old.shape != new.shape:
                    # in the memory format of the old one
                    order = [axis for _, axis in sorted((-step, axis) for axis, step in enumerate(old.stride()))]
                    new = torch.empty_permuted(new.shape, order, dtype=old.dtype, device=old.device).copy_(new)
                    changes.append(
                        (slots, key, nn.Parameter(new, old.requires_grad) if slots is module._parameters else new)
                    )
        changes += [(vars(module), key, vars(twin)[key]) for key in SIZES if key in vars(module)]
    for slots, key, value in changes:
        slots[key] = value
