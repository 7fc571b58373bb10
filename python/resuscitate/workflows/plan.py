"""The choices of a repair, checked before anything is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from torch import nn

from ..engine.probes import Layer, Probe
from ..errors import ModelMismatchError
from ..methods.base import AUTO, DenseAccess, Method, Schedule, make_method, option_names
from ..methods.batchnorm import EMA, Exact, make_recalibration
from ..runtime.distributed import Ranks
from ..runtime.options import RunOptions, check_choice, check_count, run_options
from ..statistics.outputs import OutputCovariances, OutputMoments

Recalibrate = Exact | EMA | Literal["auto", "exact", "ema"] | None


@dataclass(frozen=True)
class Plan:
    """The choices of a repair; see `repair`, and for `run` `RunOptions`."""

    method: Method
    recalibration: Exact | EMA | None
    schedule: Schedule
    diagnostics: bool
    gain_samples: int | None
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
        return {**named, "schedule": self.schedule, "diagnostics": self.diagnostics}

    def check_dense(self, dense: Any) -> None:
        """Raise where the method needs more of the dense network than `dense` is: ValueError, ModelMismatchError."""
        method, whole = self.method, isinstance(dense, nn.Module)
        if method.dense is DenseAccess.MODEL and not whole:
            raise ValueError(f"method {method.name!r} needs the dense network itself: pass dense as a model")
        if self.diagnostics and method.changes_layers and not (whole and self.schedule == "sequential"):
            remedy = "pass dense as a model, not its statistics, and schedule='sequential'"
            raise ValueError(f"diagnostics compares both networks image by image: {remedy}")
        if method.dense is not DenseAccess.NONE and dense is None:
            remedy = "pass dense, or use method 'bn' or dense='running'"
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
    return Plan(chosen, recalibration, schedule, diagnostics, gain_samples, run)


def check_read(method: Method, **options: Any) -> None:
    """Raise ValueError for an option that is given, not None, to a method that changes no layer and so ignores it."""
    for option, value in options.items():
        if value is not None and not method.changes_layers:
            raise ValueError(f"{option} is for methods that change layers, not {method.name!r}")
