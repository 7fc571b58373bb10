"""The main job: repair a pruned model from unlabelled images, in place, all or nothing."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

import asr_kernels as ak
from asr_kernels.factors import Prior

from .batchnorm import batchnorms_to_estimate, estimate_by_momentum
from .calibration import read_batches, rebatch
from .corrections import write_correction, write_statistics
from .counting import batches_for, count_images, cut, first_images, most_images
from .errors import CalibrationError, ModelMismatchError, ResuscitateError
from .graph import Wiring, observe
from .layers import LAYERS, Selector, dead_channels, effective_weight, out_channels, unwrap
from .masks import Masks
from .matching import copy_statistics, matching_layers
from .progress import track
from .report import LayerReport, RepairReport
from .state import Snapshot, moved_to, undisturbed
from .sweep import Network, Stop, Visit, measure, node_walk, pool, prefix_walk, screen, traceable

log = logging.getLogger("resuscitate")

Method = Literal["bn", "layerwise", "channelwise", "asr"]
Schedule = Literal["sequential", "parallel"]
Recalibrate = Literal["auto", "exact", "ema"]
Frozen = Literal["keep", "recalibrate"]
OnNonfinite = Literal["raise", "skip"]


def repair(
    model: nn.Module,
    dense: nn.Module | None = None,
    calibration: Any = None,
    *,
    method: Method = "asr",
    schedule: Schedule = "sequential",
    recalibrate: Recalibrate | None = "auto",
    max_samples: int | None = None,
    max_batches: int | None = None,
    gain_samples: int | None = None,
    recalibrate_samples: int | None = None,
    batch_size: int = 128,
    prior: Prior = "median",
    bias: bool = True,
    eps: float = 1e-8,
    include: Iterable[Selector] | Selector | None = None,
    exclude: Iterable[Selector] | Selector | None = None,
    skip_first: bool = True,
    skip_last: bool | None = None,
    ema_batches: int = 20,
    ema_batch_size: int = 128,
    ema_momentum: float = 0.1,
    frozen: Frozen = "keep",
    on_nonfinite: OnNonfinite = "raise",
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> RepairReport:
    """Repair `model`, a pruned copy of `dense`, from unlabelled images, in place; returns what was done.

    All or nothing: when an error is raised, every tensor is as it was. Zeros stay zero; train/eval flags,
    requires_grad, device, dtype, memory format and random state stay as found. `report.undo()` takes the repair back.

    Args:
        dense: the network before pruning, with the same layers. Only method "bn" does without.
        calibration: images: a tensor (N, ...), or any iterable of tensors, tuples or dicts that hold one, or a
            function that returns such an iterable. Read once and kept in memory. No labels are used.
        method: "asr", "channelwise" and "layerwise" (arXiv 2605.21426; formulas at `asr_kernels.repair_factors`)
            match each layer's outputs to the dense ones by a gain and a shift; "bn" re-estimates BatchNorm alone.
        schedule: "sequential" measures each layer once all before it are corrected; "parallel", as published, measures
            them all on the unrepaired network.
        recalibrate: None keeps the dense model's BatchNorm statistics (copied where the pruned model's differ), which
            the corrected outputs match. "exact" pools them over all images and thereby **cancels** the gain and the
            shift of every layer that is read through a BatchNorm alone. "ema" is the published protocol: reset, then
            `ema_batches` batches of `ema_batch_size` at `ema_momentum`. "auto": "exact" for "bn", else None.
        max_samples, max_batches: read no more than this.
        gain_samples, recalibrate_samples: images for the gains, and for an exact recalibration; None: all that are
            read.
        batch_size: how a lone tensor is cut. It never changes the result beyond rounding.
        prior, bias, eps: see `asr_kernels.repair_factors`.
        include, exclude: layers to repair, as globs over their names or as module types.
        skip_first: leave the first convolution alone, as published: its input is the image.
        skip_last: leave the last layer alone where no BatchNorm reads it (the classifier). None: in the "parallel"
            schedule and where BatchNorm is re-estimated, for there its inputs are not the dense ones, and matching
            the dense logits costs accuracy; where they were matched too it gains some.
        frozen: "keep" leaves a BatchNorm alone that is in eval mode while the model trains.
        on_nonfinite: "raise", or "skip" the images (with `forward_fn`: batches) that give NaN or infinite activations.
        forward_fn: `forward_fn(model, batch)` runs one batch as it came, for models that take more than one tensor.
        device: where to run; the models are moved there and back.
        seed: of the random numbers drawn meanwhile, such as a loader's shuffling.
        progress: show a progress bar; None: where standard error is a terminal.

    Raises:
        CalibrationError: no images, too few, or of an unknown kind.
        ModelMismatchError: the two models' layers differ, or they are one and the same.
        LayerError, NonFiniteError: a layer cannot be repaired; the message names it, and the batch.
        ValueError: an option is unknown or contradicts another.
    """
    started = time.perf_counter()
    model, dense = _as_model(model), None if dense is None else _as_model(dense)
    recalibrate = ("exact" if method == "bn" else None) if recalibrate == "auto" else recalibrate
    _check_options(method, schedule, recalibrate, frozen, on_nonfinite)
    if recalibrate == "ema" and (recalibrate_samples is not None or forward_fn is not None):
        raise ValueError("recalibrate='ema' cuts its own batches: it takes no recalibrate_samples and no forward_fn")
    for option, count in (("gain_samples", gain_samples), ("recalibrate_samples", recalibrate_samples)):
        if count is not None and count < 1:
            raise ValueError(f"{option} must be a whole number of at least 1, not {count!r}")
    if calibration is None:
        raise CalibrationError("calibration is missing: pass images, as a tensor or any iterable of batches")
    report = RepairReport(method, schedule, recalibrate)
    layers = {} if method == "bn" else matching_layers(model, dense, include, exclude, report)
    batchnorms = {} if recalibrate is None else batchnorms_to_estimate(model, frozen == "keep", report)
    if method == "bn" and not batchnorms:
        raise ResuscitateError("there is no BatchNorm to re-estimate; use a method that matches the dense outputs")

    models = [model] if dense is None else [model, dense]
    with moved_to(device, models), undisturbed(models, seed):
        net, *others = (Network(m, forward_fn) for m in models)
        wanted = [gain_samples] if layers else []
        if recalibrate is not None:
            wanted.append(recalibrate_samples if recalibrate == "exact" else ema_batches * ema_batch_size)
        limit, raw = most_images(wanted, max_samples), forward_fn is not None
        batches = read_batches(calibration, max_samples=limit, max_batches=max_batches, batch_size=batch_size, raw=raw)
        if on_nonfinite == "skip":
            batches, report.skipped = screen([net, *others], batches)
        batches = cut(cut(batches, gain_samples), recalibrate_samples)
        for_gains = batches[: batches_for(batches, gain_samples)] if layers else []
        for_batchnorm = batches[: batches_for(batches, recalibrate_samples)] if batchnorms else []
        if recalibrate == "ema":
            for_batchnorm = rebatch(batches, ema_batch_size, ema_batches)
        report.images, report.batchnorm_images = (sum(map(count_images, b)) for b in (for_gains, for_batchnorm))

        wiring = observe(model, lambda: net.run(first_images(batches[0])))
        if layers:
            report.notes += [f"{n} calls of functional {name} run unrepaired" for name, n in wiring.functional.items()]
        rule = "asr" if method == "bn" else method
        work = _Repair(net, wiring, partial(ak.repair_factors, rule=rule, prior=prior, bias=bias, eps=eps), report)
        unmatched = bool(batchnorms) or schedule == "parallel"
        layers = work.reached(layers, skip_first, unmatched if skip_last is None else skip_last)
        zeros = Masks({name: effective_weight(name, layer) != 0 for name, layer in layers.items()})
        snapshot = Snapshot(model)
        try:
            if dense is not None and layers:
                copy_statistics(model, dense, report)
            targets = measure(others[0], for_gains, layers) if layers else {}
            if schedule == "parallel":
                for name, calls in measure(net, for_gains, layers).items():
                    work.correct(Visit(name, calls), targets[name])
            stops = [Stop(name, len(for_gains)) for name in layers if schedule == "sequential"]
            stops += [Stop(name, len(for_batchnorm)) for name in batchnorms if recalibrate == "exact"]
            visits = work.walk(batches, stops)
            for visit in track(visits, f"repair ({method})", len(stops), progress):
                if visit.name in targets:
                    work.correct(visit, targets[visit.name])
                else:
                    work.recalibrate(visit)
            if recalibrate == "ema":
                estimate_by_momentum(net, batchnorms, for_batchnorm, ema_momentum)
                for name in batchnorms:
                    work.note_batchnorm(name)
            zeros.check(model)
        except BaseException:
            snapshot.restore()
            raise
        snapshot.forget_unchanged()
    report._undo = snapshot.restore
    report.seconds = time.perf_counter() - started
    return report


@dataclass
class _Repair:
    """One repair under way: what to run, how it is wired, the rule in force, and the report so far."""

    net: Network
    wiring: Wiring
    factors: Callable[[ak.ChannelMoments, ak.ChannelMoments], tuple[Tensor, Tensor]]
    report: RepairReport

    def reached(self, layers: dict[str, nn.Module], skip_first: bool, skip_last: bool) -> dict[str, nn.Module]:
        """The layers to repair that a forward pass comes by, in its order; what is left out is reported."""
        run = [name for name in self.wiring.calls if isinstance(self.net.modules[name], LAYERS)]
        convolutions = [name for name in run if isinstance(self.net.modules[name], _ConvNd)]
        left_out = {name: "left alone: no forward pass reaches it" for name in layers if name not in run}
        if skip_last and run and run[-1] not in self.wiring.batchnorm_of:
            left_out[run[-1]] = "skipped: the last layer, whose inputs are not matched"
        if skip_first and convolutions:
            left_out[convolutions[0]] = "skipped: its input is the image"
        for name, layer in layers.items():
            if name in left_out:
                row = LayerReport(name, type(layer).__name__, out_channels(layer), left_out[name])
                self.report.layers.append(row)
        chosen = {name: layers[name] for name in run if name in layers and name not in left_out}
        if layers and not chosen and not skip_last:
            raise ResuscitateError("no layer is left to repair: the first convolution needs skip_first=False")
        return chosen

    def walk(self, batches: Sequence[Any], stops: list[Stop]) -> Iterator[Visit]:
        """Visit the stops in the order of execution, in one pass over the images where the model allows it."""
        order = {name: place for place, name in enumerate(self.wiring.calls)}
        stops = sorted((stop for stop in stops if stop.name in order), key=lambda stop: order[stop.name])
        if not stops:
            return iter(())
        batches = batches[: max(stop.batches for stop in stops)]
        graph = traceable(self.net, first_images(batches[0]), self.wiring, stops)
        self.report.walk = "prefix" if graph is None else "node"
        if graph is None:
            return prefix_walk(self.net, batches, stops, self.wiring)
        return node_walk(self.net, graph, batches, stops)

    def correct(self, visit: Visit, dense_calls: Sequence[ak.ChannelMoments]) -> None:
        """Bring one layer's outputs to the dense ones, in its weights and in the walk."""
        name, layer = visit.name, self.net.modules[visit.name]
        uses = len(visit.calls)
        if not uses and not dense_calls:
            row = LayerReport(
                name, type(layer).__name__, out_channels(layer), "left alone: these images never reach it"
            )
            self.report.layers.append(row)
            return
        if len(dense_calls) != uses:
            raise ModelMismatchError(
                f"layer {name!r} runs {uses} times in the model, {len(dense_calls)} in the dense one"
            )
        dead = dead_channels(name, layer)
        dense, pruned = pool(dense_calls), visit.moments
        pruned.m2[dead] = 0.0  # what variance a dead channel has left is rounding
        gain, shift = self.factors(dense, pruned)
        row = LayerReport(name, type(layer).__name__, out_channels(layer), "repaired", dead=int(dead.sum()))
        self.report.layers.append(row)
        varies = float(dense.m2.sum()) > 0
        row.variance_before = row.variance_after = _ratio(pruned, dense) if varies else None
        if uses > 1 and varies and not all(_nearer(gain, p, d) for p, d in zip(visit.calls, dense_calls, strict=True)):
            row.action = f"left alone: its {uses} uses disagree"
            return
        row.variance_after = _ratio(pruned, dense, gain) if varies else None
        row.gain = float(gain.min()), float(gain.max())
        behind = self.net.modules.get(self.wiring.batchnorm_of.get(name, ""))
        row.shift_into = write_correction(name, layer, gain, shift, behind if isinstance(behind, _BatchNorm) else None)
        visit.correct(gain, torch.zeros_like(shift) if row.shift_into == "running_mean" else shift)
        log.info("%s: variance %s of the dense one, now %s", name, row.variance_before, row.variance_after)

    def recalibrate(self, visit: Visit) -> None:
        """Give one BatchNorm the statistics of what reaches it."""
        if not visit.calls:
            self.report.notes.append(f"BatchNorm {visit.name!r} is never reached by these images: kept")
            return
        write_statistics(visit.name, self.net.modules[visit.name], visit.moments)
        self.note_batchnorm(visit.name)

    def note_batchnorm(self, name: str) -> None:
        """Report one BatchNorm as re-estimated."""
        module = self.net.modules[name]
        assert isinstance(module, _BatchNorm)
        self.report.layers.append(LayerReport(name, type(module).__name__, module.num_features, "re-estimated"))


def _ratio(pruned: ak.ChannelMoments, dense: ak.ChannelMoments, gain: Tensor | float = 1.0) -> float:
    """The pruned variance over the dense one, both summed over channels."""
    return float((pruned.var * gain**2).sum() / dense.var.sum())


def _nearer(gain: Tensor, pruned: ak.ChannelMoments, dense: ak.ChannelMoments) -> bool:
    """Does the gain bring this use of a layer nearer to its dense variance, or leave it where it is?"""
    before, after = (abs(math.log(max(_ratio(pruned, dense, g), 1e-30))) for g in (1.0, gain))
    return after <= before + 1e-9


def _as_model(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, not {type(model).__name__}")
    return unwrap(model)


def _check_options(method: str, schedule: str, recalibrate: str | None, frozen: str, on_nonfinite: str) -> None:
    for option, value, choices in (
        ("method", method, get_args(Method)),
        ("schedule", schedule, get_args(Schedule)),
        ("recalibrate", recalibrate, (*get_args(Recalibrate), None)),
        ("frozen", frozen, get_args(Frozen)),
        ("on_nonfinite", on_nonfinite, get_args(OnNonfinite)),
    ):
        if value not in choices:
            raise ValueError(f"{option}={value!r} is unknown; there are {', '.join(map(repr, choices))}")
    if method == "bn" and recalibrate is None:
        raise ValueError("method 'bn' with recalibrate=None does nothing; choose 'exact' or 'ema'")
