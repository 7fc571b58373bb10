"""The refit: new values for all surviving weights, by ridge regression on the inputs that the layer now has."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

from torch import Tensor

from asr_kernels import CrossProducts, PatchMoments

from ..engine.probes import Layer, Probe
from ..network.mean_layers import can_have_means
from ..network.updates import Gain, Weights
from ..runtime.distributed import Ranks
from ..runtime.options import check_choice
from ..statistics.fitting import Fit, attempt, choose_ridge, fit_with_means
from ..statistics.least_squares import LEAST_RIDGE
from ..statistics.outputs import OutputMoments
from ..statistics.patches import WIDEST, UncheckedPatchCovariances, input_blocks, merge_input_blocks, split_input_blocks
from ..statistics.second_moments import Moments, merged, without_noise
from .base import DenseAccess, Method, Recalibration, Schedule, check_number, register
from .gains import ChannelWise


@register
@dataclass(frozen=True, kw_only=True)
class Refit(Method):
    """Ridge regression of each layer's surviving weights on its current inputs, with the dense outputs as targets.

    See `statistics.fitting.attempt`. A layer whose output is not its weight times patches of one input, such as a
    transposed convolution, gets its channel-wise gain.

    ridge: the strength of the shrinkage towards the present weights, in units of the inputs' mean variance. None: by
        cross-validation over images, for each layer (`choose_ridge`).
    relu_aware: where a ReLU alone reads a layer, directly or behind a BatchNorm and a sum, refine the targets: an
        output that the ReLU sets to zero need only stay below zero (see `engine.relu_targets`). Doubles the time.
    means: find one mean of the pruned weights for each "filter" or "kernel" too, which makes mean layers; None: none.
    """

    ridge: float | None = None
    relu_aware: bool = True
    means: Literal["filter", "kernel"] | None = None

    name = "refit"
    dense = DenseAccess.MODEL
    schedules: ClassVar[Collection[str]] = ("sequential",)
    skips_first = False
    finds_weights = True
    uses_curvature = True

    def __post_init__(self) -> None:
        if self.ridge is not None:
            check_number("ridge", self.ridge, 0)
        check_choice("means", self.means, ("filter", "kernel", None))

    def skips_last(self, schedule: Schedule, recalibration: Recalibration | None) -> bool:
        # an EMA changes the inputs of the classifier after it was fitted to them; within the walk they are final
        return recalibration is not None and not recalibration.in_walk

    def probe(self, layer: Layer) -> Probe:
        if not layer.is_product:
            return ChannelWise().probe(layer)
        count = input_blocks(layer.module)
        large = layer.in_use[0].numel() // count > 2048  # so are the moments of each fold
        folds = 1 if self.ridge is not None else 2 if large else 4
        if count > 1:
            return Probe(UncheckedPatchCovariances, pruned="input", dense="input", folds=folds)
        replay = self.relu_aware and layer.in_use[0].numel() <= WIDEST
        return Probe(UncheckedPatchCovariances, pruned="input", replay=replay, folds=folds)

    def solve(self, layer: Layer, found: UncheckedPatchCovariances | OutputMoments) -> Weights | Gain:
        if isinstance(found, OutputMoments):
            return ChannelWise().solve(layer, found)
        weight, count = layer.weight, input_blocks(layer.module)
        if weight.device.type == "cpu" or (self.ridge is not None and self.ridge < LEAST_RIDGE):
            found.check()  # costs no wait here
        rows, support = (split_input_blocks(each, count).flatten(1) for each in (weight, layer.in_use))
        moments, infinite = without_noise(merged(found.folds.values()), weight[0, 0].numel()), ~found.finite
        ridge = choose_ridge(found.folds, moments, rows, support, layer.ranks) if self.ridge is None else self.ridge
        found.folds.clear()  # they are large
        replay = None if found.replay is None else partial(_replay, layer.ranks, weight, moments, found.replay)
        options: dict[str, Any] = {"ridge": ridge, "replay": replay, "ranks": layer.ranks}
        options["curvature"] = layer.curvature if count == 1 else None
        fitted, weights = self._fitted(layer, moments, rows, support, options)

        def exact() -> Weights:
            found.check()
            return self._fitted(layer, moments, rows, support, options | {"direct": True})[1]

        return replace(weights, instead=(infinite | (fitted.missed > 0), exact))

    def _fitted(
        self, layer: Layer, moments: Moments, rows: Tensor, support: Tensor, options: dict[str, Any]
    ) -> tuple[Fit, Weights]:
        """The fit for weights, as rows of one block of inputs each, on a support; and what it makes of the layer."""
        shape, count, means = layer.weight.shape, input_blocks(layer.module), None
        notes = [f"{count} blocks of inputs"] if count > 1 else []
        if self.means is not None and count == 1 and can_have_means(layer.module) and not support.all():
            moments = moments if isinstance(moments, PatchMoments) else moments.matrices()
            fitted, means = fit_with_means(moments, rows, support, shape, self.means, **options)
            notes.append(f"{means.numel():,} means")
        else:
            fitted = attempt(moments, rows, support, **options)
        new, bias = merge_input_blocks(fitted.weight, shape, count), fitted.bias.view(count, -1).sum(0)
        details = {"variance_before": fitted.before, "variance_after": fitted.after, "explained": fitted.explained}
        details |= {"error_before": fitted.error_before, "error_after": fitted.error_after, "ridge": fitted.ridge}
        return fitted, Weights(new, bias, means, reason=", ".join(notes), details=details)


def _replay(ranks: Ranks, weight: Tensor, moments: Moments, replay: Any, w: Tensor, bias: Tensor) -> CrossProducts:
    """The walk's `replay` for weights w (O, K), in the shape and dtype of `weight`; summed over ranks."""
    products = replay(w.view(weight.shape).to(weight.dtype), bias.to(weight.dtype), moments)
    return CrossProducts(*(ranks.add(part) for part in (products.xy, products.y, products.yy)))
