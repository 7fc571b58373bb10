"""What a repair is to do: its choices, checked before anything is read, and the layers that it changes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..data.augment import Augment, check_augment
from ..data.batches import Batches
from ..engine.probes import Layer, Probe
from ..engine.reference import DenseStatistics, Target
from ..errors import ModelMismatchError, ResuscitateError, called, listed
from ..methods.base import AUTO, DenseAccess, Method, Schedule, make_method, option_names
from ..methods.batchnorm import EMA, Exact, make_recalibration
from ..network.layer_checks import (
    check_no_further,
    check_origin,
    different_elsewhere,
    same_layers,
    split_by_objections,
)
from ..network.layers import (
    Selection,
    effective_weight,
    find_layers,
    no_layers,
    out_channels,
    select_layers,
    stored_bias,
)
from ..network.wiring import Wiring
from ..reports.repair import LayerReport, RepairReport
from ..runtime.distributed import Ranks
from ..runtime.options import RunOptions, check_choice, check_count, run_options
from ..statistics.outputs import OutputCovariances, OutputMoments
from ..utils.digest import fingerprint

log = logging.getLogger("resuscitate")
Recalibrate = Exact | EMA | Literal["auto", "exact", "ema"] | None


@dataclass(frozen=True)
class Plan:
    """The choices of a repair; see `repair`, and for `run` `RunOptions`."""

    method: Method
    recalibration: Exact | EMA | None
    schedule: Schedule
    diagnostics: bool
    gain_samples: int | None
    augment: Augment | None
    draws: int
    run: RunOptions

    @property
    def image_counts(self) -> list[int | None]:
        """How many images each step needs; None: all."""
        counts = [self.gain_samples] if self.method.changes_layers else []
        return counts + ([self.recalibration.images] if self.recalibration else [])

    @property
    def exact(self) -> Exact | None:
        """The recalibration, if it is done within the walk."""
        return self.recalibration if isinstance(self.recalibration, Exact) else None

    @property
    def holds_out(self) -> bool:
        """Are some images left out of the fit? A gain and a shift for each channel are not fitted to single images.

        The batches of a `forward_fn` cannot be split.
        """
        changes = self.method.changes_layers and self.method.finds_weights
        return changes and self.run["forward_fn"] is None

    @property
    def follows_dense(self) -> bool:
        """Is the aim that the outputs are those of the dense network? A repair that fails in this is undone.

        Not where BatchNorm follows the images, nor on the schedule that is there for comparison.
        """
        return self.recalibration is None and self.schedule == "sequential"

    def probes(self, layers: Mapping[str, Layer]) -> dict[str, Probe]:
        """What to measure at each layer that the method changes: its probe, with diagnostics where they are wanted."""
        found = {}
        for name, layer in layers.items():
            if (probe := self.method.probe(layer)) is None:
                continue
            if self.schedule == "parallel" and probe.statistic is not OutputMoments:
                problem = f"measures OutputMoments only, and {name!r} needs more of the walk"
                raise ValueError(f"schedule='parallel' {problem}")
            if layer.dense is None:
                probe = replace(probe, dense=None)
            elif self.diagnostics and probe.statistic is OutputMoments and probe.dense == "output":
                probe = replace(probe, statistic=OutputCovariances)
            found[name] = probe
        return found

    def identity(self) -> dict[str, object]:
        """The choices that change the result, as plain values, for a journal."""
        ways = {"method": self.method, "recalibrate": self.recalibration}
        named = {key: way and {"name": way.name, **asdict(way)} for key, way in ways.items()}
        copies = {} if self.augment is None else {"augment": fingerprint(self.augment), "draws": self.draws}
        return {**named, "schedule": self.schedule, "diagnostics": self.diagnostics, **copies}

    def prepare(self, batches: Batches, ranks: Ranks) -> None:
        """Hold out and augment the batches that were read."""
        if self.holds_out:
            batches.hold_out(ranks)
        if self.augment is not None:
            batches.augment(self.augment, self.draws)

    def check_dense(self, dense: Any) -> None:
        """Raise where the method needs more of the dense network than `dense` is: ValueError, ModelMismatchError."""
        method, whole = self.method, isinstance(dense, nn.Module)
        if method.dense is DenseAccess.MODEL and not whole:
            raise ValueError(f"method {method.name!r} needs the dense network itself: pass dense as a model")
        if self.diagnostics and method.changes_layers and not (whole and self.schedule == "sequential"):
            remedy = "pass dense as a model, not its statistics, and schedule='sequential'"
            raise ValueError(f"diagnostics compares both networks image by image: {remedy}")
        if method.dense is not DenseAccess.NONE and dense is None:
            remedy = "pass dense, or dense='running', or call recalibrate_batchnorm(model, images)"
            raise ModelMismatchError(f"method {method.name!r} matches the dense model's outputs: {remedy}")


def make_plan(
    call: str,
    dense: Any,
    *,
    method: Method | str = AUTO,
    schedule: Schedule = "sequential",
    recalibrate: Recalibrate = "auto",
    diagnostics: bool = False,
    gain_samples: int | None = None,
    augment: Augment | None = None,
    draws: int = 1,
    **options: Any,
) -> Plan:
    """The plan of a repair with these options; the fields of the method may be among them, with its name.

    Raises TypeError for an option that there is not, or that the method lacks; ValueError for a value out of range, or
    a contradiction.
    """
    check_choice("schedule", schedule, get_args(Schedule))
    check_count("gain_samples", gain_samples)
    own = {name: options.pop(name) for name in option_names() & options.keys()}
    run = run_options(call, options)
    auto = "refit" if isinstance(dense, nn.Module) and schedule == "sequential" else "asr"
    chosen = make_method(method, own, auto)
    if chosen.changes_layers and schedule not in chosen.schedules:
        allowed = " or ".join(f"schedule={each!r}" for each in chosen.schedules)
        raise ValueError(f"method {chosen.name!r} runs with {allowed} only")
    check_read(chosen, schedule=None if schedule == "sequential" else schedule)
    if not chosen.measures_layers and (gain_samples is not None or diagnostics):
        option = "diagnostics" if diagnostics else "gain_samples"
        raise ValueError(f"{option} is for methods that measure layers, not {chosen.name!r}")
    recalibration = make_recalibration(recalibrate, chosen)
    several = run["group"] is not None and Ranks(run["group"]).size > 1
    if isinstance(recalibration, EMA) and (several or run["forward_fn"] is not None):
        raise ValueError("recalibrate='ema' cuts its own batches: it takes no forward_fn and no group of several ranks")
    if isinstance(recalibration, EMA) and augment is not None:
        raise ValueError("recalibrate='ema' cuts its own batches, without copies: leave augment out, or choose 'exact'")
    check_augment(augment, draws, run["forward_fn"] is not None)
    return Plan(chosen, recalibration, schedule, diagnostics, gain_samples, augment, draws, run)


def check_read(method: Method, **options: Any) -> None:
    """Raise ValueError for an option that is given, not None, to a method that changes no layer and so ignores it."""
    for option, value in options.items():
        if value is not None and not method.changes_layers:
            raise ValueError(f"{option} is for methods that change layers, not {method.name!r}")


def matching_layers(
    model: nn.Module, dense: Target, include: Selection, exclude: Selection, report: RepairReport
) -> dict[str, nn.Module]:
    """The selected layers, each checked against the dense network or its statistics.

    Layers that do not compute with their weight as it is are left out, with a row in the report.
    """
    if dense is model:
        raise ModelMismatchError("dense is the pruned model itself; pass a copy made before pruning")
    selected = select_layers(model, include, exclude)
    if not find_layers(model):
        raise ResuscitateError(no_layers(model))
    if not selected:
        raise ResuscitateError("include and exclude leave no convolution or linear layer of the model to repair")
    layers, found = split_by_objections(selected, "repaired")
    report.layers += [left_out(name, selected[name], "unchanged", objection) for name, objection in found.items()]
    for name, layer in layers.items():
        effective_weight(name, layer), stored_bias(name, layer)
    if isinstance(dense, nn.Module):
        if same_layers(layers, dense, smaller=True):
            report.notes.append("the weights of the two models' layers are equal: no layer was pruned")
            log.warning(report.notes[-1])
        check_no_further(model, dense)
        check_origin(layers, dense)
        if elsewhere := different_elsewhere(model, dense):
            kinds = "only convolutions, linear layers and BatchNorm are repaired"
            report.notes.append(f"unchanged, but not as in the dense network: {listed(elsewhere)}; {kinds}")
            log.warning(report.notes[-1])
    elif isinstance(dense, DenseStatistics):
        for name, layer in layers.items():
            if name not in dense.layers:
                raise ModelMismatchError(f"{dense.path}: nothing is known of {called(name)}; measure its dense model")
            has = out_channels(layer)
            for had in (moments.channels for moments in dense.layers[name]):
                if had != has:
                    problem = f"{called(name)} had {had} channels, the model has {has}"
                    remedy = (
                        "measure the dense model of this very network, or pass that model where channels are removed"
                    )
                    raise ModelMismatchError(f"{dense.path}: {problem}; {remedy}")
    return layers


def layers_to_repair(
    layers: dict[str, nn.Module],
    wiring: Wiring,
    report: RepairReport,
    skip_first: bool,
    skip_last: bool,
    running: bool,
    sharing: Mapping[str, str],
) -> dict[str, nn.Module]:
    """The layers to repair that a forward pass calls, in its order; the report has a row for each other layer.

    running: the reference is the running statistics of the BatchNorm behind the layer. sharing: layers that share a
    parameter with another module, which is named.
    """
    run = [name for name in wiring.calls if name in wiring.layers]
    first = next((name for name in run if issubclass(wiring.layers[name], _ConvNd)), None)
    reasons = dict[str, tuple[str, str]]()
    for name in layers:
        inner = next((other for other in run if other.startswith(f"{name}." if name else "") and other != name), None)
        if name not in run and name in wiring.read_elsewhere:
            reasons[name] = "unchanged", "its weight is used, but not by a call of the layer"
        elif name not in run:
            reasons[name] = "unchanged", "no forward pass of the first images reaches it"
        elif name in wiring.read_elsewhere:
            reasons[name] = "unchanged", "a function reads its weight too"
        elif inner is not None:
            reasons[name] = "unchanged", f"it contains another layer, {inner!r}"
        elif name in sharing:
            reasons[name] = "unchanged", f"it shares a parameter with {sharing[name]!r}, which has other inputs"
        elif running and name not in wiring.batchnorm_of:
            reasons[name] = "unchanged", "no BatchNorm alone reads it, whose running statistics its output could match"
    if skip_last and run and run[-1] not in wiring.batchnorm_of:
        reasons[run[-1]] = "skipped", "the last layer, whose inputs are not matched"
    if skip_first and first is not None:
        reasons[first] = "skipped", "its input is the image"
    report.layers += [left_out(name, layer, *reasons[name]) for name, layer in layers.items() if name in reasons]
    return {name: layers[name] for name in run if name in layers and name not in reasons}


def left_out(name: str, layer: nn.Module, status: str, reason: str) -> LayerReport:
    """The row of a layer that is not repaired."""
    return LayerReport(name, type(layer).__name__, out_channels(layer), status, reason)
