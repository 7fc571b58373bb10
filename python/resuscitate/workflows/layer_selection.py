"""Which layers a repair changes, and why the others stay as they are."""

from __future__ import annotations

import logging
from collections.abc import Collection

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..engine.reference import DenseStatistics, Target
from ..errors import ModelMismatchError, ResuscitateError, called
from ..network.layer_checks import split_by_objections
from ..network.layers import effective_weight, out_channels, running_statistics, select_layers, stored_bias
from ..network.matching import same_layers
from ..network.wiring import Wiring
from ..pruning.allocation import Selection
from ..reports.repair import LayerReport, RepairReport

log = logging.getLogger("resuscitate")


def matching_layers(
    model: nn.Module, dense: Target, include: Selection, exclude: Selection, report: RepairReport
) -> dict[str, nn.Module]:
    """The selected layers, each checked against the dense network or its statistics.

    Layers that do not compute with their weight as it is are left out, with a row in the report.
    """
    if dense is model:
        raise ModelMismatchError("dense is the pruned model itself; pass a copy made before pruning")
    selected = select_layers(model, include, exclude)
    if not selected:
        raise ResuscitateError("the model has no convolution or linear layer to repair")
    layers, found = split_by_objections(selected, "repaired")
    report.layers += [left_out(name, selected[name], "unchanged", objection) for name, objection in found.items()]
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
            for had in (moments.channels for moments in dense.layers[name]):
                if had != (has := out_channels(layer)):
                    problem = f"{called(name)} had {had} channels, the model has {has}"
                    raise ModelMismatchError(f"{dense.path}: {problem}; measure the dense model of this very network")
    return layers


def layers_to_repair(
    layers: dict[str, nn.Module], wiring: Wiring, report: RepairReport, skip_first: bool, skip_last: bool, running: bool
) -> dict[str, nn.Module]:
    """The layers to repair that a forward pass calls, in its order; the report has a row for each other layer.

    running: the reference is the running statistics of the BatchNorm behind the layer.
    """
    run = [name for name in wiring.calls if name in wiring.layers]
    first = next((name for name in run if issubclass(wiring.layers[name], _ConvNd)), None)
    reasons = dict[str, tuple[str, str]]()
    for name in layers:
        if name not in run and name in wiring.read_elsewhere:
            reasons[name] = "unchanged", "its weight is used, but not by a call of the layer"
        elif name not in run:
            reasons[name] = "unchanged", "no forward pass reaches it"
        elif running and name not in wiring.batchnorm_of:
            reasons[name] = "unchanged", "no BatchNorm alone reads it, whose running statistics its output could match"
    if skip_last and run and run[-1] not in wiring.batchnorm_of:
        reasons[run[-1]] = "skipped", "the last layer, whose inputs are not matched"
    if skip_first and first is not None:
        reasons[first] = "skipped", "its input is the image"
    report.layers += [left_out(name, layer, *reasons[name]) for name, layer in layers.items() if name in reasons]
    chosen = {name: layers[name] for name in run if name in layers and name not in reasons}
    if layers and not chosen and not skip_last and not running:
        raise ResuscitateError("no layer is left to repair: the first convolution needs skip_first=False")
    return chosen


def left_out(name: str, layer: nn.Module, status: str, reason: str) -> LayerReport:
    """The row of a layer that is not repaired."""
    return LayerReport(name, type(layer).__name__, out_channels(layer), status, reason)


def copy_statistics(
    model: nn.Module, dense: nn.Module | DenseStatistics, kept: Collection[str], report: RepairReport
) -> None:
    """Copy the dense network's BatchNorm statistics where they differ: the corrected outputs match its outputs.

    kept: BatchNorms behind layers that were not selected, which may hold the shift of an earlier repair.
    """
    originals = dense.batchnorms if isinstance(dense, DenseStatistics) else running_statistics(dense)
    copied = 0
    for name, mine in running_statistics(model).items():
        if name in kept:
            continue
        theirs, channels = originals.get(name), len(mine[0])
        if theirs is None or len(theirs[0]) != channels:
            raise ModelMismatchError(f"the dense model has no BatchNorm {name!r} with {channels} channels")
        stale = [(m, original) for m, original in zip(mine, theirs, strict=True) if not torch.equal(m, original.to(m))]
        for m, original in stale:
            m.copy_(original)
        copied += bool(stale)
    if copied:
        report.notes.append(f"{copied} BatchNorms had other statistics than the dense model: copied from it")
