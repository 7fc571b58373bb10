"""Holding a pruned model against its dense one: the same layers, the same BatchNorm statistics."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Literal

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..engine.reference import DenseStatistics
from ..errors import ModelMismatchError, ResuscitateError, called
from ..reports.repair import LayerReport, RepairReport
from .layer_checks import set_apart
from .layers import (
    LAYERS,
    Selector,
    effective_weight,
    find_batchnorms,
    out_channels,
    select_layers,
    stored_bias,
)
from .wiring import Wiring

log = logging.getLogger("resuscitate")


def matching_layers(
    model: nn.Module,
    dense: nn.Module | DenseStatistics | Literal["running"] | None,
    include: Iterable[Selector] | Selector | None,
    exclude: Iterable[Selector] | Selector | None,
    report: RepairReport,
) -> dict[str, nn.Module]:
    """The selected layers, each checked against its dense counterpart as far as one is there.

    Left out, with a row in the report: layers that do not compute with their weight as it is.
    """
    if dense is model:
        raise ModelMismatchError("dense is the pruned model itself; pass a copy made before pruning")
    layers = select_layers(model, include, exclude)
    if not layers:
        raise ResuscitateError("the model has no convolution or linear layer to repair")
    selected = layers
    layers, found = set_apart(selected, "repaired")
    for name, objection in found.items():
        kind, channels = type(selected[name]).__name__, out_channels(selected[name])
        report.layers.append(LayerReport(name, kind, channels, f"left alone: {objection}"))
    for name, layer in layers.items():
        effective_weight(name, layer), stored_bias(name, layer)
    if isinstance(dense, nn.Module):
        if same_layers(layers, dense):
            report.notes.append("the two models' weights are equal: nothing was pruned")
            log.warning(report.notes[-1])
    elif isinstance(dense, DenseStatistics):
        for name, layer in layers.items():
            if name not in dense.layers:
                raise ModelMismatchError(f"{dense.path}: nothing is known of {called(name)}; measure its dense model")
            for moments in dense.layers[name]:
                if moments.channels != out_channels(layer):
                    raise ModelMismatchError(
                        f"{dense.path}: {called(name)} had {moments.channels} channels, the model has "
                        f"{out_channels(layer)}; measure the dense model of this very network"
                    )
    return layers


def same_layers(layers: Mapping[str, nn.Module], dense: nn.Module) -> bool:
    """Check that the dense model has these layers, in memory of its own; returns whether all weights are equal.

    Raises ModelMismatchError.
    """
    originals, same = dict(dense.named_modules()), True
    for name, layer in layers.items():
        if name not in originals:
            raise ModelMismatchError(f"the dense model has no layer {name!r}; both models need the same layers")
        kind, dense_kind = (type(each).__name__.removeprefix("Mean") for each in (layer, originals[name]))
        if not isinstance(originals[name], LAYERS) or kind != dense_kind:
            raise ModelMismatchError(f"{called(name)} is {kind} in the pruned model and {dense_kind} in the dense one")
        weight, original = effective_weight(name, layer), effective_weight(name, originals[name])
        if weight.shape != original.shape:
            shapes = f"{tuple(weight.shape)} in the pruned model and {tuple(original.shape)} in the dense one"
            raise ModelMismatchError(f"the weight of {called(name)} is {shapes}")
        if weight.data_ptr() == original.data_ptr():
            raise ModelMismatchError(f"{called(name)} shares its weight with the dense model; pass a deep copy")
        same = same and torch.equal(weight, original.to(weight.device))
    return same


def layers_to_repair(
    layers: dict[str, nn.Module],
    wiring: Wiring,
    report: RepairReport,
    skip_first: bool,
    skip_last: bool,
    need_batchnorm: bool,
) -> dict[str, nn.Module]:
    """The layers to repair that a forward pass comes by, in its order; what is left out goes into the report."""
    run = [name for name in wiring.calls if name in wiring.layers]
    first = next((name for name in run if issubclass(wiring.layers[name], _ConvNd)), None)
    unreached = "left alone: no forward pass reaches it"
    borrowed = "left alone: its weight is used, but not by a call of the layer"
    left_out = {n: borrowed if n in wiring.borrowed else unreached for n in layers if n not in run}
    if need_batchnorm:
        left_out |= {
            name: "left alone: no BatchNorm alone reads it, to say what its output was"
            for name in layers
            if name in run and name not in wiring.batchnorm_of
        }
    if skip_last and run and run[-1] not in wiring.batchnorm_of:
        left_out[run[-1]] = "skipped: the last layer, whose inputs are not matched"
    if skip_first and first is not None:
        left_out[first] = "skipped: its input is the image"
    for name, layer in layers.items():
        if name in left_out:
            report.layers.append(LayerReport(name, type(layer).__name__, out_channels(layer), left_out[name]))
    chosen = {name: layers[name] for name in run if name in layers and name not in left_out}
    if layers and not chosen and not skip_last and not need_batchnorm:
        raise ResuscitateError("no layer is left to repair: the first convolution needs skip_first=False")
    return chosen


def copy_statistics(
    model: nn.Module, dense: nn.Module | DenseStatistics, kept: Collection[str], report: RepairReport
) -> None:
    """Take over the dense model's BatchNorm statistics where they differ: the corrected outputs match its outputs.

    `kept`: BatchNorms behind layers that were not selected. They may hold the shift of an earlier repair.
    """
    if isinstance(dense, nn.Module):
        originals = {name: (module.running_mean, module.running_var) for name, module in find_batchnorms(dense).items()}
    else:
        originals = dict(dense.batchnorms)
    copied = 0
    for name, batchnorm in find_batchnorms(model).items():
        if name in kept:
            continue
        theirs = originals.get(name, (None, None))
        if theirs[0] is None or len(theirs[0]) != batchnorm.num_features:
            raise ModelMismatchError(
                f"the dense model has no BatchNorm {name!r} with {batchnorm.num_features} channels"
            )
        differ = False
        for mine, original in zip((batchnorm.running_mean, batchnorm.running_var), theirs, strict=True):
            assert mine is not None
            assert original is not None
            if not torch.equal(mine, original.to(mine)):
                mine.copy_(original)
                differ = True
        copied += differ
    if copied:
        report.notes.append(f"{copied} BatchNorms had other statistics than the dense model: copied from it")
