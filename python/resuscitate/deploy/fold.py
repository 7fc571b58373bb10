"""Fold each BatchNorm into the layer that it alone reads, and compare the outputs on an example."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import LayerError, called
from ..network.comparison import output_tensors, relative_difference
from ..network.copies import plain_copy
from ..network.layer_checks import CONVOLUTIONS
from ..network.layers import gain_and_shift, sharing_layers
from ..network.snapshot import evaluation_mode
from ..network.updates import Gain, change_of, write_change
from ..network.wiring import observe, trace, wiring_of
from ..reports.base import Report
from ..utils.nested import copied
from ..utils.readout import read_numbers

log = logging.getLogger("resuscitate")
FOLDABLE_BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
FOLDABLE_LAYERS = (*CONVOLUTIONS, nn.Linear)


@dataclass
class FoldReport(Report):
    """`folded` maps each folded BatchNorm to its layer; `unchanged` maps each other BatchNorm to the reason.

    `error` is the largest difference of the outputs on the example, relative to the largest; None without an example.
    """

    columns: ClassVar[Sequence[str]] = ("name", "status", "layer", "reason")

    folded: dict[str, str] = field(default_factory=dict)
    unchanged: dict[str, str] = field(default_factory=dict)
    error: float | None = None

    def rows(self) -> list[dict[str, Any]]:
        """One row for each BatchNorm, with the status "folded" or "unchanged"."""
        folded = [{"name": name, "status": "folded", "layer": layer} for name, layer in self.folded.items()]
        return folded + [{"name": n, "status": "unchanged", "reason": reason} for n, reason in self.unchanged.items()]


@torch.no_grad()
def fold_batchnorm(model: nn.Module, example: Any = None, *, strict: bool = False) -> nn.Module:
    """A copy of the model, in eval mode, with each BatchNorm folded into the one layer that it alone reads.

    Folded BatchNorms become `nn.Identity`; a layer without a bias gets one if the shift is not zero; masks of
    `torch.nn.utils.prune` are made permanent; class and attributes of the model stay. A BatchNorm is unchanged, and the
    reason logged (LayerError when `strict`), if its layer is called twice or read elsewhere, if it has no running
    statistics, or if it is of another class.

    example: an input for the model. One forward pass then finds the pairs, for any control flow, and the outputs are
        compared: LayerError where they differ by more than 1e-3 of the largest value. Without an example, torch.fx
        finds the pairs, without shapes: BatchNorms after linear layers are then unchanged; ValueError where it fails.

    The copy's attribute `fold_report` is the FoldReport.
    """
    folded, report = plain_copy(model), FoldReport()
    modules = dict(folded.named_modules())

    def run() -> Any:
        with evaluation_mode([folded], 0):
            return folded(copied(example))  # a network may write to its input

    def outputs() -> list[Tensor]:
        return [x for x in output_tensors(run()) if x.is_floating_point()]

    if example is None:
        try:
            wiring = wiring_of(trace(folded), folded)
        except Exception as error:
            raise ValueError(f"torch.fx cannot trace this model ({error}); pass example=, an input for it") from error
    else:
        before = outputs()
        wiring = observe(folded, run)
    layer_of = {batchnorm: layer for layer, batchnorm in wiring.batchnorm_of.items()}
    sharing = sharing_layers(folded)
    for name, batchnorm in modules.items():
        if not isinstance(batchnorm, _BatchNorm):
            continue
        layer = layer_of.get(name)
        if layer is None:
            reason = "no layer is read by it alone"
        elif layer in sharing:
            reason = f"{layer!r} shares a parameter with {sharing[layer]!r}"
        else:
            reason = _obstacle(modules[layer], batchnorm)
        if layer is None or reason:
            if strict:
                raise LayerError(name, f"cannot be folded: {reason}")
            report.unchanged[name] = reason
            log.warning("%s is not folded: %s", called(name, "BatchNorm"), reason)
        else:
            _fold(layer, modules[layer], batchnorm)
            folded.set_submodule(name, nn.Identity())
            report.folded[name] = layer
    if example is not None:
        report.error = relative_difference(before, outputs())
        if not report.error <= 1e-3:
            raise LayerError("", f"folding changed its output by {report.error:.3g} of the largest value")
    folded.fold_report = report  # type: ignore[assignment]
    return folded


def _obstacle(layer: nn.Module, batchnorm: _BatchNorm) -> str:
    """The reason why this BatchNorm cannot be folded into this layer; empty if there is none."""
    if type(batchnorm) not in FOLDABLE_BATCHNORMS:
        return f"{type(batchnorm).__name__} may do more than normalise"
    if type(layer) not in FOLDABLE_LAYERS or "weight" not in layer._parameters:
        return f"{type(layer).__name__} may compute its weight"
    return "it keeps no running statistics" if batchnorm.running_mean is None else ""


def _fold(name: str, layer: nn.Module, batchnorm: _BatchNorm) -> None:
    """Write the BatchNorm, which is a gain and a shift in float64, into the layer."""
    change = change_of(name, layer, Gain(*gain_and_shift(batchnorm)))
    write_change(change, read_numbers(change.flags))
