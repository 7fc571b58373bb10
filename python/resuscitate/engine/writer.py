"""Writes the update of each layer, once: into the network, the journal, the report, and the walk in progress."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import asr_kernels as ak

from ..errors import ModelMismatchError, called
from ..network.layers import memory_of, out_channels, stored_weight
from ..network.mean_layers import to_mean_layer
from ..network.runner import Network
from ..network.updates import (
    Change,
    Gain,
    Unchanged,
    Update,
    Weights,
    change_of,
    pack,
    unpack,
    write_change,
)
from ..network.wiring import Wiring
from ..reports.repair import LayerReport, RepairReport
from ..runtime.distributed import Ranks
from ..runtime.journal import Journal
from ..statistics.base import Statistic
from ..statistics.outputs import OutputMoments, explained_share
from ..utils.readout import read_numbers
from .probes import Layer, Measurement

log = logging.getLogger("resuscitate")
Solve = Callable[[Layer, Any], Update]  # the update of a layer from what was measured; it writes nothing
UNREACHED = Unchanged("these images never reach it")


@dataclass
class Writer:
    """Asks a method for the update of each layer, and writes it.

    `layers` are those that the method may change; `compares`: it compares them with the dense network.
    """

    net: Network
    wiring: Wiring
    layers: Mapping[str, Layer]
    report: RepairReport
    journal: Journal
    ranks: Ranks
    compares: bool
    _means: dict[object, Tensor] = field(default_factory=dict)  # by shared weight, the means that its layers share

    def update(self, measurement: Measurement, solve: Solve) -> None:
        """Solve for the update of one layer or BatchNorm, unless the journal has it, and write it."""
        known = measurement.name in self.journal.entries
        self.write(measurement, UNREACHED if known else self._solve(measurement, solve))

    def write(self, measurement: Measurement, update: Update) -> None:
        """Write an update, or the one that the journal has in its place."""
        name, known = measurement.name, self.journal.entries.get(measurement.name)
        if known is not None:
            update, row = unpack(known[0], self.net.device), LayerReport.from_dict(known[1])
            change = self._change(name, update)
            numbers = read_numbers(change.flags)
        else:
            update, change, numbers = self._chosen(name, update, measurement.found)
            row = self._row(name, update, measurement.found, numbers)
            if row.status == "unchanged":
                update, change = Unchanged(row.reason), Change(name, change.module)
            self.journal.add(name, pack(update), asdict(row))
        if name not in self.layers and isinstance(update, Unchanged):
            self.report.notes.append(f"{called(name, 'BatchNorm')} is unchanged: {row.reason}")
            return
        self.report.layers.append(row)
        row.shift_into = write_change(change, numbers)
        if isinstance(update, Weights) and update.means is not None:
            self._write_means(change.module, update.means)
        if isinstance(update, Gain):
            kept = torch.zeros_like(update.shift) if row.shift_into == "running_mean" else update.shift
            measurement.correct(update.gain, kept)
        measurement.note(row.summary())
        log.info("%s: %s %s", name or "the model", row.status, row.reason)

    def note_batchnorm(self, name: str) -> None:
        """Report one BatchNorm whose statistics were re-estimated otherwise."""
        self.report.layers.append(self._blank(name, "re-estimated"))

    def _solve(self, measurement: Measurement, solve: Solve) -> Update:
        name, found = measurement.name, measurement.found
        layer = self.layers.get(name)
        if layer is None:  # a BatchNorm
            layer = Layer(name, self.net.modules[name], None, torch.empty(0), False, self.ranks)
        elif isinstance(found, OutputMoments):
            calls, dense = len(found.calls), len(found.dense_calls)
            if self.compares and calls != dense:
                raise ModelMismatchError(f"{called(name)} runs {calls} times in the model, {dense} in the dense one")
            found.dead = layer.dead
        return UNREACHED if found.empty else solve(layer, found)

    def _change(self, name: str, update: Update) -> Change:
        """The new tensors of a layer or BatchNorm, and of the BatchNorm that takes the layer's shift."""
        behind = self.net.modules.get(self.wiring.batchnorm_of.get(name, ""))
        batchnorm = behind if isinstance(behind, _BatchNorm) else None
        kept = self.layers[name].in_use if name in self.layers else None
        return change_of(name, self.net.modules[name], update, kept, batchnorm)

    def _write_means(self, module: nn.Module, means: Tensor) -> None:
        shared = memory_of(stored_weight("", module))
        to_mean_layer(module, self._means.get(shared, means))
        self._means[shared] = module.get_parameter("means")

    def _chosen(self, name: str, update: Update, found: Statistic) -> tuple[Update, Change, dict[str, float]]:
        """The update, or the one in its place; its change; what both say, in one piece from the device."""
        change = self._change(name, update)
        numbers = read_numbers({**change.flags, **self._numbers(name, update, found)})
        if isinstance(update, Weights) and update.instead is not None and numbers["instead"]:
            return self._chosen(name, update.instead[1](), found)
        return update, change, numbers

    def _numbers(self, name: str, update: Update, found: Statistic) -> dict[str, Tensor]:
        """What the row needs that is still on the device."""
        numbers = {"dead": self.layers[name].dead.sum()} if name in self.layers else {}
        if isinstance(update, Weights):
            numbers |= {} if update.instead is None else {"instead": update.instead[0]}
            return numbers | {key: value for key, value in update.details.items() if isinstance(value, Tensor)}
        if isinstance(update, Gain):
            numbers |= {"least": update.gain.min(), "greatest": update.gain.max()}
            if self._is_compared(found):
                numbers |= _variances(update.gain, found)
        return numbers

    def _row(self, name: str, update: Update, found: Statistic, numbers: Mapping[str, float]) -> LayerReport:
        """The row of the report, with what the statistic says of the update."""
        row = self._blank(name, "re-estimated", int(numbers.get("dead", 0)))
        if isinstance(update, Unchanged):
            row.status, row.reason = "unchanged", update.reason
        elif isinstance(update, Weights):
            row.status, row.reason = update.status, update.reason
            for key, value in update.details.items():
                setattr(row, key, _number(numbers[key]) if isinstance(value, Tensor) else value)
        elif isinstance(update, Gain):
            row.status, row.gain = "repaired", (numbers["least"], numbers["greatest"])
            if self._is_compared(found):
                _describe_gain(row, len(found.calls), numbers)
        return row

    def _is_compared(self, found: Statistic) -> TypeGuard[OutputMoments]:
        return self.compares and isinstance(found, OutputMoments)

    def _blank(self, name: str, status: str, dead: int = 0) -> LayerReport:
        module = self.net.modules[name]
        channels = module.num_features if isinstance(module, _BatchNorm) else out_channels(module)
        return LayerReport(name, type(module).__name__, channels, status, dead=dead)


def _variances(gain: Tensor, found: OutputMoments) -> dict[str, Tensor]:
    """The variances before and after a gain, over all calls and at each of several calls; what `found` explains."""
    pairs = {"": (found.pruned, found.dense)}
    if len(found.calls) > 1:
        by_call = enumerate(zip(found.calls, found.dense_calls, strict=True))
        pairs |= {f" {call}": pair for call, pair in by_call if all(each.count for each in pair)}
    numbers = {"dense": found.dense.m2.sum()} | ({"explained": explained_share(found.pairs)} if found.pairs else {})
    for call, (pruned, dense) in pairs.items():
        numbers |= {f"before{call}": _ratio(pruned, dense), f"after{call}": _ratio(pruned, dense, gain)}
    return numbers


def _describe_gain(row: LayerReport, calls: int, numbers: Mapping[str, float]) -> None:
    """Note the variances before and after a gain, and refuse it where several calls of the layer disagree about it."""
    if not numbers["dense"] > 0:
        return
    row.variance_before = row.variance_after = numbers["before"]
    row.explained = _number(numbers.get("explained", math.nan))
    compared = [call for call in range(calls) if f"before {call}" in numbers]
    if not all(_nearer(numbers[f"before {call}"], numbers[f"after {call}"]) for call in compared):
        row.status, row.reason, row.gain = "unchanged", f"called {calls} times with incompatible statistics", None
    else:
        row.variance_after = numbers["after"]


def _number(value: float) -> float | None:
    """None for NaN, which stands for a share of nothing."""
    return None if math.isnan(value) else value


def _ratio(pruned: ak.ChannelMoments, dense: ak.ChannelMoments, gain: Tensor | float = 1.0) -> Tensor:
    """The pruned variance over the dense one, both summed over channels."""
    return (pruned.var * gain**2).sum() / dense.var.sum()


def _nearer(before: float, after: float) -> bool:
    """Does a gain with which this variance ratio changes so bring it no further from 1 than it was?"""
    far_before, far_after = (abs(math.log(max(ratio, 1e-30))) for ratio in (before, after))
    return far_after <= far_before + 1e-9
