"""Compression without labels: pruning in steps, with a repair after each step."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any, ClassVar, Unpack

from torch import nn

from ..data.augment import Augment
from ..engine.kept import KeptStatistics
from ..engine.session import Session
from ..methods.base import Method, check_number
from ..network.copies import deep_copy
from ..network.layers import Selection, reusable, unwrap
from ..network.masks import Masks
from ..pruning.allocation import check_method, depthwise_floors, fixed_densities
from ..pruning.sparsify import sparsify
from ..pruning.structured import Shrinkage, shrink
from ..pruning.units import ChannelFloors, check_floors, prunable_layers
from ..reports.agreement import Agreement
from ..reports.base import plain
from ..reports.repair import COLUMNS, LayerReport, RepairReport
from ..runtime.distributed import fails_on_all
from ..runtime.options import RunOptions
from ..utils.arguments import IMAGES, NETWORK, NUMBER, check_places
from ..utils.progress import track
from .latency import latency
from .measured import measure_scales
from .stages import stages
from .steps import Steps, StepsReport, check_means, plan_of_steps

log = logging.getLogger("resuscitate")
WALKS = 2  # number of steps, the last ones, that measure the pruned network
# exponents of the measured factors of the layers. A global ranking follows the refitted weights over more steps than a
# draft has: another one is chosen if the error of its draft is less than this part of that of the global ranking
EXPONENTS, CLEARLY = (0.0, 0.5, 1.0), 0.95


@dataclass(kw_only=True)
class CompressReport(StepsReport):
    """The result of `compress`: the sparsity after each step, and the report of the repair that followed it.

    `allocation`: its "name"; for "measured" the "exponent" of the factors, 0 for a global ranking, and the "errors" of
    the drafts' outputs, by exponent. For pattern "channels": `removal`, with FLOPs and parameters before and after, and
    the `latency` before and after, in seconds, of a forward pass of up to 32 images.
    """

    sparsities: list[float]
    steps: list[RepairReport]
    allocation: dict[str, Any] = field(default_factory=dict)
    removal: Shrinkage | None = None
    latency: tuple[float, float] | None = None

    work: ClassVar[str] = "compression"
    step: ClassVar[str] = "step"
    titles: ClassVar[tuple[str, ...]] = "explained by the refit", "images", "seconds"
    columns: ClassVar[Sequence[str]] = "step", "sparsity", *COLUMNS

    @property
    def layers(self) -> list[LayerReport]:
        """The rows of the last repair."""
        return self.steps[-1].layers

    def to_dict(self) -> dict[str, Any]:
        """As `StepsReport.to_dict`, and the allocation; for pattern "channels" also the removal and the latency."""
        smaller = {} if self.removal is None else {"removal": plain(self.removal), "latency": plain(self.latency)}
        return {**super().to_dict(), "allocation": plain(self.allocation), **smaller}

    def outcome(self) -> list[str]:
        """As `UndoableReport.outcome`, and what the removal of channels brought."""
        if self.removal is None or self.latency is None:
            return super().outcome()
        counts = {"FLOPs": self.removal.flops, "parameters": self.removal.parameters}
        words = [f"{name} {before:,} -> {after:,}" for name, (before, after) in counts.items()]
        before, after = (f"{1e3 * seconds:.3g} ms" for seconds in self.latency)
        return [*super().outcome(), f"{', '.join(words)}, a forward pass {before} -> {after}"]

    def each_step(self) -> Iterator[tuple[dict[str, Any], Iterable[dict[str, Any]], tuple[str, ...]]]:
        for sparsity, report in zip(self.sparsities, self.steps, strict=True):
            shares = [layer.explained for layer in report.layers if layer.explained is not None]
            cells = f"{sum(shares) / len(shares):.3f}" if shares else "", str(report.images), f"{report.seconds:.2f}"
            yield {"sparsity": sparsity, **report.to_dict()}, report.rows(), cells


@fails_on_all
def compress(
    model: nn.Module,
    sparsity: float,
    calibration: Any,
    *,
    allocation: str = "measured",
    pattern: str = "unstructured",
    steps: int | Sequence[float] = 7,
    walks: int = WALKS,
    curvature: bool = True,
    densities: Mapping[str, float] | None = None,
    min_per_layer: int = 1,
    min_per_channel: ChannelFloors | None = None,
    include: Selection = None,
    exclude: Selection = None,
    method: Method | str = "refit",
    augment: Augment | None = None,
    draws: int = 1,
    resume: str | Path | None = None,
    keep_worse: bool = False,
    **options: Unpack[RunOptions],
) -> CompressReport:
    """Prune `model` to a sparsity in steps, in place, and repair it after each step.

    The model as given is the dense network. No labels, no training. All or nothing: on an error every tensor is
    unchanged.

    Args:
        sparsity, pattern, densities, min_per_layer, include, exclude: see `sparsify`. With pattern "channels" they are
            removed from the model at the end (`shrink`), which is then smaller and faster. Layers in `densities` have
            them after the last step; before, they have lost a part of their weights in proportion to the sparsity.
        min_per_channel: as in `sparsify`. None: for the pattern of single weights two in each channel of the depthwise
            layers, or fewer at a very high sparsity, because without weights such a channel is constant; else none.
        allocation: as in `sparsify`. "rr" is measured anew in each step. "measured": a global ranking of magnitudes
            times a factor for each layer, from the error that the layer's pruning causes at the outputs of the network.
            The factors to the powers 0 (no factors), 0.5 and 1 are tried in drafts with every third step. The one whose
            outputs come nearest to the dense network's is taken, if by 5 %; else no factors. For patterns of single
            weights; else "uniform" for channels, and "global", as also where the method measures no inputs.
        calibration: as in `repair`. The images are read once and held in host memory: of a loader no more than fit in
            `memory` if the model runs on the host, else in half of the host's memory.
        steps: the number of steps, or the sparsity after each step, ascending to `sparsity`. With a number, the first
            step prunes to half of `sparsity`, and each later step keeps the same fraction of the remaining weights.
            Pattern "n:m" goes by m-1:m, m-2:m, ... to n:m, all of them or as many as this number.
        walks: number of steps, the last ones, that measure the pruned network. Earlier steps use what was measured once
            with the dense network's inputs, which saves time, if the method measures inputs, as a refit does.
        curvature: measure, in a forward and two backward passes through the dense network over at most 256 images, how
            its outputs depend on those of each layer. A refit then fits the channels of a layer together. With a
            `forward_fn`, and where there is no backward pass, which a warning says, each channel is fitted alone.
        method: of the repair after each step, see `repair`; its options may follow its name as keywords. One that gives
            means to pruned weights is for steps=1.
        augment, draws: as in `repair`.
        resume: a folder of journals, which refuses another run. A killed run continues from them. Delete the folder
            once the result is saved.
        keep_worse: keep repairs that take the outputs further from the dense network's, as in `repair`, than its
            weights with these masks. By default the model is then left with those.
        options: see `RunOptions`.

    Raises what `sparsify` and `repair` raise; ValueError for steps that do not ascend to `sparsity`.
    """
    started = time.perf_counter()
    places: dict[str, Any] = {"model": (model, NETWORK), "sparsity": (sparsity, NUMBER)}
    check_places("compress(model, sparsity, images)", **places, calibration=(calibration, IMAGES))
    model, patterns = unwrap(model), stages(sparsity, steps, pattern)
    stops = list(patterns)
    check_method(allocation)
    other = "uniform" if pattern == "channels" else "global"
    used = allocation if pattern == "unstructured" or allocation != "measured" else other
    include, exclude = reusable(include), reusable(exclude)
    if min_per_channel is None:
        layers = densities, include, exclude
        min_per_channel = depthwise_floors(model, sparsity, *layers) if pattern == "unstructured" else {}
    check_floors(min_per_layer, min_per_channel)
    fixed_densities(*prunable_layers(model, include, exclude), densities)
    check_number("walks", walks, 1, whole=True)
    dense = deep_copy(model)
    plan = plan_of_steps("compress()", dense, method, options, augment=augment, draws=draws)
    check_means(plan.method, "steps", len(stops))
    if pattern == "channels" and plan.run["forward_fn"] is not None:
        raise ValueError("pattern 'channels' traces the model on plain images: it takes no forward_fn")
    pruning: dict[str, Any] = {"allocation": used, "densities": densities, "include": include, "exclude": exclude}
    pruning |= {"min_per_layer": min_per_layer, "min_per_channel": min_per_channel}
    with Session([model], plan.run, writes=True, measures=False) as session:
        choices = {**pruning, "allocation": allocation, "pattern": pattern, "sparsity": sparsity}
        choices |= {"steps": stops, "walks": walks, "curvature": curvature}
        each = Steps(session, plan, calibration, resume, choices)
        example = each.example() if pattern == "channels" else None
        pruning |= {} if example is None else {"example": example}
        if curvature:
            each.measure_curvatures(dense)
        masks, reports, about = _in_steps(each, session, model, dense, patterns, walks, pruning)
        before = deep_copy(dense)
        masks.apply_(before)
        agreement = Agreement.of(each.nearness(before, dense), each.nearness(model, dense))
        guarded = plan.follows_dense and not keep_worse
        worse = guarded and agreement is not None and agreement.fell
        if worse:
            session.snapshot.restore()
            masks.apply_(model)
        removal = speeds = None
        if example is not None:
            removal = shrink(model, masks, example)
            speeds = latency(dense, example, each.run, each.ranks), latency(model, example, each.run, each.ranks)
        session.snapshot.forget_unchanged()
        seconds, undo = time.perf_counter() - started, session.snapshot.undo
        report = CompressReport(
            masks=masks,
            seconds=seconds,
            agreement=agreement,
            _undo=undo,
            sparsities=stops,
            steps=reports,
            allocation=about,
            removal=removal,
            latency=speeds,
        )
        if worse:
            report.note_undone()
        elif guarded:
            report.warn_if_worse()
        return report


def _in_steps(
    each: Steps,
    session: Session,
    model: nn.Module,
    dense: nn.Module,
    patterns: Mapping[float, str],
    walks: int,
    pruning: dict[str, Any],
) -> tuple[Masks, list[RepairReport], dict[str, Any]]:
    """Prune and repair in turn; returns the last masks, the reports, and what the report says of the allocation."""
    stops, used, reports = list(patterns), pruning["allocation"], list[RepairReport]()
    measuring: dict[str, Any] = {"calibration": each.batches, **each.run} if used == "rr" else {}
    measured, first_walk, about = None, max(len(stops) - walks, 0), {"name": used}
    with ExitStack() as stack:
        if first_walk or used == "measured":
            measured = stack.enter_context(each.dense_statistics(dense))
        if used == "measured":
            factors, about = _measured(each, dense, measured, stops, pruning)
            pruning = pruning | factors
        for index, stop in enumerate(track(stops, "compress", len(stops), session.show)):
            if index == first_walk:
                stack.close()
                measured = None
            masks = _pruned(model, stop, stops[-1], {**pruning, **measuring, "pattern": patterns[stop]})
            reports.append(each.repair("compress", f"step-{index + 1}", model, dense, measured=measured))
            log.info("step %d of %d: sparsity %.4f", index + 1, len(stops), masks.sparsity)
    return masks, reports, about


def _pruned(model: nn.Module, stop: float, last: float, options: Mapping[str, Any]) -> Masks:
    """Prune to the sparsity of a step. Layers of fixed densities lose weights in proportion to it."""
    densities: Mapping[str, float] = options["densities"] or {}
    if stop == last or not densities:
        return sparsify(model, stop, **options)
    layers, first_of = prunable_layers(model, options["include"], options["exclude"])
    others = set(first_of.values()) - set(fixed_densities(layers, first_of, densities))
    scaled = {glob: 1 - (1 - density) * stop / last for glob, density in densities.items()}
    # without other layers the densities alone decide: their whole weights may miss the sparsity of the step by a few
    return sparsify(model, stop if others else None, **{**options, "densities": scaled})


def _measured(
    each: Steps, dense: nn.Module, kept: KeptStatistics | None, stops: list[float], pruning: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of `sparsify` for allocation "measured", and what the report says of it."""
    given = {name: option for name, option in pruning.items() if name != "allocation"}
    scales = None if kept is None else measure_scales(each, dense, kept, stops[-1], **given)
    if scales is None:
        return {"allocation": "global"}, {"name": "global"}
    errors = dict[float, float]()
    for exponent in EXPONENTS:
        options, draft = {**pruning, "calibration": scales.power(exponent)}, deep_copy(dense)
        for index, stop in enumerate(stops[::-3][::-1], 1):
            _pruned(draft, stop, stops[-1], options)
            each.repair("compress", f"draft-{exponent:g}-{index}", draft, dense, measured=kept)
        seen = each.nearness(draft, dense, fitted=True)
        errors[exponent] = inf if seen is None or seen.error is None else seen.error
    best = min(errors, key=errors.__getitem__)
    best = best if errors[best] < CLEARLY * errors[0.0] else 0.0
    log.info("factors to the power %s: errors of the outputs %s", best, errors)
    return {"calibration": scales.power(best)}, {"name": "measured", "exponent": best, "errors": errors}
