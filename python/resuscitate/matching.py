"""Holding a pruned model against its dense one: the same layers, the same BatchNorm statistics."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import nn

from .errors import ModelMismatchError, ResuscitateError
from .layers import LAYERS, Selector, effective_weight, find_batchnorms, select_layers, stored_bias
from .report import RepairReport

log = logging.getLogger("resuscitate")


def matching_layers(
    model: nn.Module,
    dense: nn.Module | None,
    include: Iterable[Selector] | Selector | None,
    exclude: Iterable[Selector] | Selector | None,
    report: RepairReport,
) -> dict[str, nn.Module]:
    """The selected layers, each checked against its dense counterpart."""
    if dense is None:
        raise ModelMismatchError(
            f"method {report.method!r} matches the dense model's outputs: pass dense, or use method 'bn'"
        )
    if dense is model:
        raise ModelMismatchError("dense is the pruned model itself; pass a copy made before pruning")
    layers, originals = select_layers(model, include, exclude), dict(dense.named_modules())
    if not layers:
        raise ResuscitateError("the model has no convolution or linear layer to repair")
    same = True
    for name, layer in layers.items():
        weight, _ = effective_weight(name, layer), stored_bias(name, layer)
        if name not in originals:
            raise ModelMismatchError(f"the dense model has no layer {name!r}; both models need the same layers")
        kind, dense_kind = type(layer).__name__, type(originals[name]).__name__
        if not isinstance(originals[name], LAYERS) or kind != dense_kind:
            raise ModelMismatchError(f"layer {name!r} is {kind} in the pruned model and {dense_kind} in the dense one")
        original = effective_weight(name, originals[name])
        if weight.shape != original.shape:
            shapes = f"{tuple(weight.shape)} in the pruned model and {tuple(original.shape)} in the dense one"
            raise ModelMismatchError(f"the weight of layer {name!r} is {shapes}")
        if weight.data_ptr() == original.data_ptr():
            raise ModelMismatchError(f"layer {name!r} shares its weight with the dense model; pass a deep copy")
        same = same and torch.equal(weight, original.to(weight.device))
    if same:
        report.notes.append("the two models' weights are equal: nothing was pruned")
        log.warning(report.notes[-1])
    return layers


def copy_statistics(model: nn.Module, dense: nn.Module, report: RepairReport) -> None:
    """Take over the dense model's BatchNorm statistics where they differ: the corrected outputs match its outputs."""
    originals = find_batchnorms(dense)
    copied = []
    for name, batchnorm in find_batchnorms(model).items():
        if name not in originals or originals[name].num_features != batchnorm.num_features:
            raise ModelMismatchError(
                f"the dense model has no BatchNorm {name!r} with {batchnorm.num_features} channels"
            )
        for buffer in ("running_mean", "running_var"):
            mine, theirs = getattr(batchnorm, buffer), getattr(originals[name], buffer)
            if not torch.equal(mine, theirs.to(mine)):
                mine.copy_(theirs)
                copied.append(name)
    if copied:
        report.notes.append(f"{len(set(copied))} BatchNorms had other statistics than the dense model: copied from it")
