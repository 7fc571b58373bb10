"""Relative repairability: the part of a layer's output, at each density, that no gain and shift can restore."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Unpack

from torch import Tensor, nn

import asr_kernels as ak

from ..engine.session import Session
from ..errors import CalibrationError, ModelMismatchError, called
from ..network.layers import Selection, effective_weight, unwrap, with_weight
from ..network.runner import check_finite, paired_moments_at
from ..runtime.distributed import fails_on_all
from ..runtime.options import RunOptions, run_options
from ..statistics.base import merge_calls
from ..statistics.outputs import OutputCovariances, explained
from ..utils.arguments import IMAGES, NETWORK, check_places
from ..utils.nested import count_images
from ..utils.progress import Bar
from .curves import Curve, by_curves
from .units import Units, prunable_layers, units_of

DENSITIES = (0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08, 0.05, 0.03, 0.02, 0.01)


@dataclass(frozen=True)
class Repairability:
    """Residuals {layer: {density: residual}}, and the number of images that they were measured on.

    The residual is 1 - corr^2 between the outputs of the dense and the pruned layer, both on the dense model's inputs,
    averaged over channels with the dense variance as weight: the fraction of the output's variance that the best gain
    and shift per channel do not explain. It is 0 at density 1 and 1 at density 0.

    This is **this project's reading** of the relative repairability of arXiv 2605.25508, whose formula was not at hand.
    """

    residuals: Mapping[str, Mapping[float, float]]
    images: int

    @classmethod
    @fails_on_all
    def measure(
        cls,
        model: nn.Module,
        calibration: Any,
        *,
        densities: Iterable[float] = DENSITIES,
        include: Selection = None,
        exclude: Selection = None,
        **options: Unpack[RunOptions],
    ) -> Repairability:
        """Measure the selected layers of a dense model in one pass over unlabelled images. See `RunOptions`.

        For each batch, each layer runs once more per density, with its largest weights only. Raises CalibrationError,
        LayerError, NonFiniteError; ValueError for a density outside (0, 1).
        """
        check_places("Repairability.measure(model, images)", model=(model, NETWORK), calibration=(calibration, IMAGES))
        grid = sorted(set(densities), reverse=True)
        if not grid or not all(0 < density < 1 for density in grid):
            raise ValueError(f"densities={grid} must lie between 0 and 1")
        model, run = unwrap(model), run_options("Repairability.measure()", options)
        layers, _ = prunable_layers(model, include, exclude)
        seen = 0
        with Session([model], run) as session:
            bar = Bar("repairability", ["all layers"], run["max_samples"] or 0, session.show)
            session.stack.enter_context(bar)
            found = {name: OutputCovariances(session.place(name)) for name in layers}
            images = session.stream(calibration)
            times_kept = {name: _times_kept(name, layer, grid) for name, layer in layers.items()}
            for index, batch in enumerate(images):
                with ExitStack() as hooks:
                    for name, times in times_kept.items():
                        hook = partial(_compare, found[name], times, index)
                        hooks.enter_context(session.net.modules[name].register_forward_hook(hook, with_kwargs=True))
                    session.net.run(batch)
                seen += count_images(batch)
                bar.advance("all layers", count_images(batch))
            (seen,) = session.ranks.total(seen)
            residuals = {name: _residuals(session.merged(each).pairs, grid) for name, each in found.items()}
        if not seen:
            raise CalibrationError("there are no images to measure repairability on")
        return cls(residuals, seen)

    def curve(self, name: str) -> Curve:
        """[(fraction removed, residual)] from (0, 0) to (1, 1); a straight line for a layer not run or constant.

        Raises ModelMismatchError for a layer that was not measured.
        """
        if name not in self.residuals:
            raise ModelMismatchError(f"{called(name)} is not among the layers measured; measure it, or exclude it")
        between = [(1 - density, residual) for density, residual in self.residuals[name].items()]
        return [(0.0, 0.0), *sorted(between), (1.0, 1.0)]


def by_repairability(units: Mapping[str, Units], budget: int, measured: Repairability) -> dict[str, int]:
    """An allocation: the least sum of residuals for this budget."""
    return by_curves(units, budget, {name: measured.curve(name) for name in units})


def _times_kept(name: str, layer: nn.Module, grid: list[float]) -> Tensor:
    """Int16, in the weight's shape and on its device: at how many densities each weight is kept."""
    units = units_of(name, layer)
    return units.times_kept(grid).view(units.shape).to(effective_weight(name, layer).device)


def _compare(
    found: OutputCovariances, times: Tensor, batch: int, layer: nn.Module, args: Any, kwargs: Any, out: Any
) -> None:
    """A forward hook that compares a layer's output with its output at each density; `pairs` has one for each."""
    name, weight, pairs = found.place.name, effective_weight(found.place.name, layer), []
    for index in range(int(times.max())):
        pruned = with_weight(layer, weight * (times > index))(*args, **kwargs)
        pairs.append(paired_moments_at(name, layer, out, pruned))
    moments = [each for pair in pairs for each in (pair.dense, pair.pruned)]
    check_finite(name, ((batch, x) for each in moments for x in (each.mean, each.m2)))
    found.pairs = merge_calls(found.pairs, pairs)


def _residuals(pairs: list[ak.PairedMoments], grid: list[float]) -> dict[float, float]:
    """By density, the part of the output's variance that is lost; empty for a layer not run, or a constant one."""
    if not pairs:
        return {}
    shares = [(density, explained([pair])) for density, pair in zip(grid, pairs, strict=True)]
    return {density: 1 - share for density, share in shares if share is not None}
