"""Mean replacement: pruned weights are replaced by their mean, without images."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..engine.probes import Layer, Probe
from ..network.layers import refuse_means
from ..network.mean_layers import can_have_means, means_of_pruned
from ..network.updates import Unchanged, Weights
from ..runtime.options import check_choice
from ..statistics.base import Statistic
from .base import DenseAccess, Method, Recalibration, Schedule, register


@register
@dataclass(frozen=True, kw_only=True)
class MeanReplacement(Method):
    """Replace the pruned weights of a layer by the mean of their dense values (after arXiv 2212.12651).

    See `network.mean_layers`. `resuscitate.replace_by_means` does the same without BatchNorm recalibration and images.

    means: the weights that share a mean: those of a "layer", of a "filter", or of a "kernel", a filter's window on one
        input channel.
    """

    means: Literal["layer", "filter", "kernel"] = "filter"

    name = "mean"
    dense = DenseAccess.MODEL
    schedules: ClassVar[Collection[str]] = ("sequential",)
    skips_first = False
    measures_layers = False

    def __post_init__(self) -> None:
        check_choice("means", self.means, ("layer", "filter", "kernel"))

    def skips_last(self, schedule: Schedule, recalibration: Recalibration | None) -> bool:
        return False  # nothing is measured, so that no input has to match

    def prepare(self, layers: Mapping[str, Layer]) -> None:
        refuse_means({name: layer.module for name, layer in layers.items()})

    def probe(self, layer: Layer) -> Probe:
        return Probe(Statistic, dense=None)

    def solve(self, layer: Layer, found: Statistic) -> Weights | Unchanged:
        pruned, weight = ~layer.in_use, layer.weight
        if layer.dense is None or not can_have_means(layer.module) or not pruned.any():
            return Unchanged("nothing to replace")
        means = means_of_pruned(layer.dense_weight.to(weight), pruned, self.means)
        survivors = weight - means.to(weight.dtype)
        return Weights(survivors, means=means, status="replaced", reason=f"{means.numel():,} means of pruned weights")
