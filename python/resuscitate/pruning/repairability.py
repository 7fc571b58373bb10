"""Relative repairability: what a layer loses at each density that no gain and shift per channel can bring back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import asr_kernels as ak

from ..data.batches import count_images, read_share
from ..engine.corrections import explained
from ..errors import CalibrationError, ModelMismatchError, called
from ..network.layers import Selector, effective_weight, unwrap, with_weight
from ..network.runner import Network, as_dtype, check_finite
from ..network.snapshot import moved_to, undisturbed
from ..runtime.distributed import Ranks
from ..utils.arguments import IMAGES, NETWORK, check_places
from ..utils.progress import Bar
from .units import units_of

DENSITIES = (0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08, 0.05, 0.03, 0.02, 0.01)


@dataclass(frozen=True)
class Repairability:
    """For each layer, the residual at some densities: {layer: {density: residual}}, and how many images it is from.

    The residual is 1 - corr^2 between the outputs of the layer and of its pruned self, both on the dense model's own
    inputs, averaged over channels by dense variance: the share of the output that is left unexplained by the best gain
    and shift for each channel. It is 0 for the whole layer and 1 for none of it.

    This is **this project's reading** of the relative repairability of arXiv 2605.25508, whose formula was not at hand.
    """

    residuals: Mapping[str, Mapping[float, float]]
    images: int

    @classmethod
    def measure(
        cls,
        model: nn.Module,
        calibration: Any,
        *,
        densities: Iterable[float] = DENSITIES,
        max_samples: int | None = None,
        batch_size: int = 128,
        include: Iterable[Selector] | Selector | None = None,
        exclude: Iterable[Selector] | Selector | None = None,
        forward_fn: Callable[[nn.Module, Any], Any] | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        seed: int = 0,
        progress: bool | None = None,
    ) -> Repairability:
        """Measure the selected layers of a dense model in one pass over unlabelled images; options as in `repair`.

        Each batch runs every layer once more for each density, at which the layer keeps its largest weights. Raises
        CalibrationError, LayerError, NonFiniteError; ValueError for a density outside (0, 1).
        """
        from .allocation import prunable

        call = "Repairability.measure(model, images)"
        check_places(call, model=(model, NETWORK), calibration=(calibration, IMAGES))
        grid = sorted(set(densities), reverse=True)
        if not grid or not all(0 < density < 1 for density in grid):
            raise ValueError(f"densities={grid} must lie between 0 and 1")
        model = unwrap(model)
        layers, _ = prunable(model, include, exclude)
        seen = 0
        with ExitStack() as stack:
            stack.enter_context(moved_to(device, [model]))
            stack.enter_context(undisturbed([model], seed))
            bar = stack.enter_context(Bar("repairability", ["all layers"], max_samples or 0, progress))
            comparison = _Comparison(Network(model, forward_fn, as_dtype(dtype)))
            for name, layer in layers.items():
                compare = partial(comparison.compare, name, _survivals(name, layer, grid))
                stack.callback(layer.register_forward_hook(compare).remove)
            options: dict[str, Any] = {"max_samples": max_samples, "max_batches": None, "batch_size": batch_size}
            for batch in read_share(calibration, Ranks(), **options, raw=forward_fn is not None):
                comparison.net.run(batch)
                comparison.batch += 1
                seen += count_images(batch)
                bar.advance("all layers", count_images(batch))
        if not seen:
            raise CalibrationError("there are no images to measure repairability on")
        return cls({**{name: {} for name in layers}, **comparison.residuals(grid)}, seen)

    def curve(self, name: str) -> list[tuple[float, float]]:
        """(fraction removed, residual) from (0, 0) to (1, 1); a straight line for a layer never reached or constant.

        Raises ModelMismatchError for a layer that was not measured.
        """
        if name not in self.residuals:
            raise ModelMismatchError(f"{called(name)} is not among those whose repairability was measured")
        between = [(1 - density, residual) for density, residual in self.residuals[name].items()]
        return [(0.0, 0.0), *sorted(between), (1.0, 1.0)]


@torch.no_grad()
def _survivals(name: str, layer: nn.Module, grid: list[float]) -> Tensor:
    """int8, of the shape of the layer's weight: at how many of the densities, which descend, each weight survives."""
    units = units_of(name, layer, filters=False, min_per_layer=1, min_per_channel=0)
    survivals = torch.zeros(units.count, dtype=torch.int8)
    for density in grid:
        survivals += ~units.smallest(min(units.count - round(density * units.count), units.spare))
    return survivals.view(units.shape).to(effective_weight(name, layer).device)


@dataclass
class _Comparison:
    """Hooks that pair each layer's output with what it would be at each density, and merge that over the batches."""

    net: Network
    batch: int = 0
    pairs: dict[str, list[ak.PairedMoments]] = field(default_factory=dict)

    def compare(self, name: str, survivals: Tensor, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.net.check_tensor(name, output)
        weight, found = effective_weight(name, layer), []
        for index in range(int(survivals.max())):
            pruned = with_weight(layer, weight * (survivals > index))(*args)
            found.append(ak.paired_moments(output, pruned, self.net.axis(name)))
        check_finite(name, ((self.batch, moments) for pair in found for moments in (pair.dense, pair.pruned)))
        before = self.pairs.get(name)
        self.pairs[name] = found if before is None else [a.merge(b) for a, b in zip(before, found, strict=True)]

    def residuals(self, grid: list[float]) -> dict[str, dict[float, float]]:
        return {
            name: {density: 1 - explained([pair]) for density, pair in zip(grid, pairs, strict=True)}
            for name, pairs in self.pairs.items()
            if pairs and pairs[0].dense.m2.any()  # of what is constant nothing can be lost
        }
