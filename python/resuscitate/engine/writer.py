"""Writes the update of each layer, once: into the network, the journal, the report, and the walk in progress."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

import asr_kernels as ak

from ..errors import ModelMismatchError, called
from ..network.layers import out_channels
from ..network.mean_layers import to_mean_layer
from ..network.runner import Network
from ..network.updates import (
    BatchNormStatistics,
    Gain,
    Unchanged,
    Update,
    Weights,
    pack,
    unpack,
    write_gain,
    write_statistics,
    write_weights,
)
from ..network.wiring import Wiring
from ..reports.repair import LayerReport, RepairReport
from ..runtime.distributed import Ranks
from ..runtime.journal import Journal
from ..statistics.base import Statistic
from ..statistics.outputs import OutputMoments
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
    _means: dict[int, Tensor] = field(default_factory=dict)  # by shared weight, the means that its layers share

    def update(self, measurement: Measurement, solve: Solve) -> None:
        """Solve for the update of one layer or BatchNorm, unless the journal has it, and write it."""
        known = measurement.name in self.journal.entries
        self.write(measurement, UNREACHED if known else self._solve(measurement, solve))

    def write(self, measurement: Measurement, update: Update) -> None:
        """Write an update, or the one that the journal has in its place."""
        name = measurement.name
        if name in self.journal.entries:
            tensors, plain = self.journal.entries[name]
            update, row = unpack(tensors, self.net.device), LayerReport.from_dict(plain)
        else:
            row = self._row(name, update, measurement.found)
            if row.status == "unchanged":
                update = Unchanged(row.reason)
            self.journal.add(name, pack(update), asdict(row))
        if name not in self.layers and isinstance(update, Unchanged):
            self.report.notes.append(f"{called(name, 'BatchNorm')} is unchanged: {row.reason}")
            return
        self.report.layers.append(row)
        row.shift_into = self._write(name, update)
        if isinstance(update, Gain):
            kept = torch.zeros_like(update.shift) if row.shift_into == "running_mean" else update.shift
            measurement.correct(update.gain, kept)
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

    def _row(self, name: str, update: Update, found: Statistic) -> LayerReport:
        """The row of the report, with what the statistic says of the update."""
        if isinstance(update, BatchNormStatistics):
            return self._blank(name, "re-estimated")
        if isinstance(update, Weights):
            row = self._blank(name, update.status, update.reason)
            for key, value in update.details.items():
                setattr(row, key, value)
            return row
        if isinstance(update, Unchanged):
            return self._blank(name, "unchanged", update.reason)
        row = self._blank(name, "repaired")
        row.gain = float(update.gain.min()), float(update.gain.max())
        if self.compares and isinstance(found, OutputMoments):
            _describe_gain(row, update.gain, found)
        return row

    def _blank(self, name: str, status: str, reason: str = "") -> LayerReport:
        module = self.net.modules[name]
        channels = module.num_features if isinstance(module, _BatchNorm) else out_channels(module)
        dead = int(self.layers[name].dead.sum()) if name in self.layers else 0
        return LayerReport(name, type(module).__name__, channels, status, reason, dead)

    def _write(self, name: str, update: Update) -> str | None:
        """Write the update into the network; returns what took the shift."""
        module = self.net.modules[name]
        behind = self.net.modules.get(self.wiring.batchnorm_of.get(name, ""))
        batchnorm = behind if isinstance(behind, _BatchNorm) else None
        if isinstance(update, BatchNormStatistics):
            write_statistics(name, module, update.moments)
        elif isinstance(update, Gain):
            return write_gain(name, module, update, batchnorm)
        elif isinstance(update, Weights):
            took = write_weights(name, module, update, self.layers[name].in_use, batchnorm)
            if update.means is not None:
                shared = id(module._parameters.get("weight", module._parameters.get("weight_orig")))
                to_mean_layer(module, self._means.get(shared, update.means))
                self._means[shared] = module.get_parameter("means")
            return took
        return None


def _describe_gain(row: LayerReport, gain: Tensor, found: OutputMoments) -> None:
    """Note the variances before and after a gain, and refuse it where several calls of the layer disagree about it."""
    dense, pruned = found.dense, found.pruned
    if not float(dense.m2.sum()) > 0:
        return
    row.variance_before = row.variance_after = variance_ratio(pruned, dense)
    row.explained = found.explained
    calls = list(zip(found.calls, found.dense_calls, strict=True))
    if len(calls) > 1 and not all(_nearer(gain, p, d) for p, d in calls):
        row.status, row.reason, row.gain = "unchanged", f"called {len(calls)} times with incompatible statistics", None
    else:
        row.variance_after = variance_ratio(pruned, dense, gain)


def variance_ratio(pruned: ak.ChannelMoments, dense: ak.ChannelMoments, gain: Tensor | float = 1.0) -> float:
    """The pruned variance over the dense one, both summed over channels."""
    return float((pruned.var * gain**2).sum() / dense.var.sum())


def _nearer(gain: Tensor, pruned: ak.ChannelMoments, dense: ak.ChannelMoments) -> bool:
    """Does the gain bring the variance of this call no further from the dense variance than it was?"""
    before, after = (abs(math.log(max(variance_ratio(pruned, dense, g), 1e-30))) for g in (1.0, gain))
    return after <= before + 1e-9
