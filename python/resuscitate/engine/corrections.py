"""Deciding on corrections and writing them: gains into weights, shifts into a bias or a BatchNorm, statistics."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import asr_kernels as ak

from ..errors import LayerError, ModelMismatchError, called
from ..methods.refit import blocks, by_block, choose_ridge, fit, whole
from ..network.layers import (
    along_weight,
    dead_channels,
    effective_weight,
    out_channels,
    refresh_weight,
    stored_bias,
    stored_weight,
)
from ..network.mean_layers import can_carry, carry, fit_with_means
from ..network.runner import Network
from ..network.wiring import Wiring
from ..reports.repair import RE_ESTIMATED, LayerReport, RepairReport
from ..runtime.distributed import Ranks
from ..runtime.journal import Journal
from .probes import Calls, Visit

log = logging.getLogger("resuscitate")
ShiftInto = Literal["bias", "new bias", "running_mean"]


@dataclass
class Corrector:
    """Makes the corrections of one repair, by the rule in force, in the weights that are in use."""

    net: Network
    wiring: Wiring
    factors: Callable[[ak.ChannelMoments, ak.ChannelMoments], tuple[Tensor, Tensor]]
    in_use: Mapping[str, Tensor]
    report: RepairReport
    journal: Journal
    ranks: Ranks = field(default_factory=Ranks)
    means: str | None = None  # what shares one, where a refit finds means too

    def correct(self, visit: Visit, wanted: Calls) -> None:
        """Bring one layer's outputs to what is wanted, in its weights and in the walk."""
        name, layer = visit.name, self.net.modules[visit.name]
        if name in self.journal.entries:
            tensors, plain = self.journal.entries[name]
            row = LayerReport.from_dict(plain)
        else:
            row, tensors = self._decide(visit, wanted)
            self.journal.add(name, tensors, asdict(row))
        self.report.layers.append(row)
        if not tensors:
            return
        gain, shift = (tensors[factor].to(self.net.device) for factor in ("gain", "shift"))
        row.shift_into = write_correction(name, layer, gain, shift, self._behind(name))
        visit.correct(gain, torch.zeros_like(shift) if row.shift_into == "running_mean" else shift)
        log.info("%s: variance %s of the dense one, now %s", name, row.variance_before, row.variance_after)

    def refit(self, visit: Visit, ridge: float | None) -> None:
        """Give one layer the weights that bring its outputs nearest to the dense ones, on the inputs it now has.

        ridge: None has it chosen by cross-validation over the folds of the images.
        """
        name, layer = visit.name, self.net.modules[visit.name]
        if name in self.journal.entries:
            tensors, plain = self.journal.entries[name]
            row = LayerReport.from_dict(plain)
        else:
            row, tensors = LayerReport(name, type(layer).__name__, out_channels(layer), "refitted"), {}
            row.dead = int(dead_channels(name, layer).sum())
            if not visit.folds:
                row.action = "left alone: these images never reach it"
            else:
                weight, count = effective_weight(name, layer), blocks(layer)
                parts, support = (by_block(each, count).flatten(1) for each in (weight, self.in_use[name]))
                row.ridge = choose_ridge(visit.folds, parts, support, self.ranks) if ridge is None else ridge
                patches = reduce(ak.PatchMoments.merge, visit.folds.values())
                visit.folds.clear()  # they are large
                options: dict[str, Any] = {"ridge": row.ridge, "aim": self._aim(visit, patches), "ranks": self.ranks}
                means = None
                if self.means is not None and count == 1 and can_carry(layer) and not support.all():
                    found, means = fit_with_means(patches, parts, support, weight.shape, self.means, **options)
                    row.action += f" with {means.numel():,} means"
                else:
                    found = fit(patches, parts, support, **options)
                row.variance_before, row.variance_after, row.explained = found.before, found.after, found.explained
                row.action += f" in {count} blocks of inputs" if count > 1 else ""
                bias = found.bias.view(count, -1).sum(0)
                tensors = {"weight": whole(found.weight, weight.shape, count).contiguous(), "bias": bias}
                tensors |= {} if means is None else {"means": means.contiguous()}
            self.journal.add(name, tensors, asdict(row))
        self.report.layers.append(row)
        if tensors:
            weight, bias = (tensors[part].to(self.net.device) for part in ("weight", "bias"))
            row.shift_into = write_weights(name, layer, weight, bias, self.in_use[name], self._behind(name))
            if "means" in tensors:
                carry(layer, tensors["means"].to(self.net.device))
            log.info("%s: refitted, explains %s of the dense variance", name, row.explained)

    def _aim(self, visit: Visit, patches: ak.PatchMoments) -> Callable[[Tensor, Tensor], ak.CrossProducts] | None:
        """The visit's `aim` for the weights of `fit`, added up over the ranks."""
        aim, weight = visit.aim, effective_weight(visit.name, self.net.modules[visit.name])
        if aim is None:
            return None

        def aim_of_all(w: Tensor, bias: Tensor) -> ak.CrossProducts:
            found = aim(w.view(weight.shape).to(weight.dtype), bias.to(weight.dtype), patches)
            return ak.CrossProducts(*(self.ranks.add(part) for part in (found.xy, found.y, found.yy)))

        return aim_of_all

    def _behind(self, name: str) -> _BatchNorm | None:
        """The BatchNorm that alone reads a layer."""
        behind = self.net.modules.get(self.wiring.batchnorm_of.get(name, ""))
        return behind if isinstance(behind, _BatchNorm) else None

    def recalibrate(self, visit: Visit) -> None:
        """Give one BatchNorm the statistics of what reaches it."""
        name = visit.name
        if name in self.journal.entries:
            tensors, plain = self.journal.entries[name]
            moments = ak.ChannelMoments(int(str(plain["count"])), tensors["mean"], tensors["m2"])
        elif visit.calls:
            moments = ak.ChannelMoments.pool(visit.calls)
            self.journal.add(name, {"mean": moments.mean, "m2": moments.m2}, {"count": moments.count})
        else:
            self.report.notes.append(f"{called(name, 'BatchNorm')} is never reached by these images: kept")
            return
        write_statistics(name, self.net.modules[name], moments)
        self.note_batchnorm(name)

    def note_batchnorm(self, name: str) -> None:
        """Report one BatchNorm as re-estimated."""
        module = self.net.modules[name]
        assert isinstance(module, _BatchNorm)
        self.report.layers.append(LayerReport(name, type(module).__name__, module.num_features, RE_ESTIMATED))

    def _decide(self, visit: Visit, wanted: Calls) -> tuple[LayerReport, dict[str, Tensor]]:
        """The layer's row in the report, and its gain and shift; no tensors where it is left alone."""
        name, layer, uses = visit.name, self.net.modules[visit.name], len(visit.calls)
        row = LayerReport(name, type(layer).__name__, out_channels(layer), "repaired")
        if not uses and not wanted:
            row.action = "left alone: these images never reach it"
            return row, {}
        if len(wanted) != uses:
            raise ModelMismatchError(f"{called(name)} runs {uses} times in the model, {len(wanted)} in the dense one")
        dead = dead_channels(name, layer)
        dense, pruned = ak.ChannelMoments.pool(wanted), ak.ChannelMoments.pool(visit.calls)
        # what variance a dead channel has left is rounding. Not in place: the walk has the same moments in hand
        pruned = replace(pruned, m2=pruned.m2.masked_fill(dead.to(pruned.m2.device), 0.0))
        gain, shift = self.factors(dense, pruned)
        row.dead = int(dead.sum())
        varies = float(dense.m2.sum()) > 0
        row.variance_before = row.variance_after = _ratio(pruned, dense) if varies else None
        if visit.pairs and varies:
            row.explained = explained(visit.pairs)
        if uses > 1 and varies and not all(_nearer(gain, p, d) for p, d in zip(visit.calls, wanted, strict=True)):
            row.action = f"left alone: its {uses} uses disagree"
            return row, {}
        row.variance_after = _ratio(pruned, dense, gain) if varies else None
        row.gain = float(gain.min()), float(gain.max())
        return row, {"gain": gain, "shift": shift}


@torch.no_grad()
def write_correction(
    name: str, module: nn.Module, gain: Tensor, shift: Tensor, batchnorm: _BatchNorm | None
) -> ShiftInto | None:
    """Make the layer's output `gain * y + shift`; `gain` and `shift` are float64 (C,).

    weight <- gain * weight, so that zeros stay zero; bias <- gain * bias + shift. A layer without a bias leaves the
    shift to `batchnorm`, the one that alone reads it (running_mean <- running_mean - shift), else it is given a bias.
    Returns what took the shift. Raises LayerError when the result overflows the weight's dtype.
    """
    weight, bias = stored_weight(name, module), stored_bias(name, module)
    weight.mul_(along_weight(module, gain))
    return _write_bias(name, module, shift if bias is None else gain * bias + shift, batchnorm)


@torch.no_grad()
def write_weights(
    name: str, module: nn.Module, new: Tensor, bias: Tensor, in_use: Tensor, batchnorm: _BatchNorm | None
) -> ShiftInto | None:
    """Give the layer new weights where they are in use (boolean, in its shape); `new` is float64 of that shape too.

    `bias` is (O,) of what the output is to be shifted by.

    Returns what took the bias, as `write_correction` does for a shift, and raises as it does.
    """
    weight = stored_weight(name, module)
    weight.copy_(torch.where(in_use, new.view(weight.shape).to(weight.dtype), weight))
    return _write_bias(name, module, bias, batchnorm)


def _write_bias(name: str, module: nn.Module, shift: Tensor, batchnorm: _BatchNorm | None) -> ShiftInto | None:
    weight, bias = stored_weight(name, module), stored_bias(name, module)
    refresh_weight(module)
    took: ShiftInto | None = None
    if bias is not None:
        bias.copy_(shift)
        took = "bias"
    elif shift.any() and batchnorm is not None and batchnorm.running_mean is not None:
        batchnorm.running_mean.sub_(shift)
        took = "running_mean"
    elif shift.any():
        module.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=weight.requires_grad)
        took = "new bias"
    written = [weight, module.bias, None if batchnorm is None else batchnorm.running_mean]
    if not all(_is_finite(tensor) for tensor in written if isinstance(tensor, Tensor)):
        raise LayerError(name, f"its corrected weights do not fit into {weight.dtype}; repair it in float32")
    return took


def _is_finite(x: Tensor) -> bool:
    """Is each value finite? A NaN is the smallest and the largest value of a tensor that has one."""
    return not x.numel() or all(bool(end.isfinite()) for end in x.aminmax())


@torch.no_grad()
def write_statistics(name: str, batchnorm: nn.Module, moments: ak.ChannelMoments) -> None:
    """Set the running statistics to these moments; running_var is the unbiased variance, as torch's own.

    `num_batches_tracked` stays: it counts the batches of a training that this is not. Raises LayerError for fewer
    than two values per channel, or for a variance that overflows the buffers' dtype.
    """
    mean, var = (batchnorm._buffers[buffer] for buffer in ("running_mean", "running_var"))
    if mean is None or var is None:
        raise LayerError(name, "it keeps no running statistics")
    if moments.count < 2:
        raise LayerError(name, "a variance needs at least two values per channel; give more images")
    mean.copy_(moments.mean)
    var.copy_(moments.m2 / (moments.count - 1))
    if not (mean.isfinite() & var.isfinite()).all():
        raise LayerError(name, f"its statistics do not fit into {var.dtype}; call .float() on the BatchNorm layers")


def _ratio(pruned: ak.ChannelMoments, dense: ak.ChannelMoments, gain: Tensor | float = 1.0) -> float:
    """The pruned variance over the dense one, both summed over channels."""
    return float((pruned.var * gain**2).sum() / dense.var.sum())


def explained(pairs: list[ak.PairedMoments]) -> float:
    """The share of the dense variance that the best affine map of each channel's pruned output explains: corr^2."""
    variances = [pair.dense.m2 for pair in pairs]
    shares = [pair.corr.square() * m2 for pair, m2 in zip(pairs, variances, strict=True)]
    return float(torch.stack(shares).sum() / torch.stack(variances).sum())


def _nearer(gain: Tensor, pruned: ak.ChannelMoments, dense: ak.ChannelMoments) -> bool:
    """Does the gain bring this use of a layer nearer to its dense variance, or leave it where it is?"""
    before, after = (abs(math.log(max(_ratio(pruned, dense, g), 1e-30))) for g in (1.0, gain))
    return after <= before + 1e-9
