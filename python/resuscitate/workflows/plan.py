"""The choices of a repair, checked before anything is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from torch import nn

from ..engine.probes import Layer, Probe, Request
from ..errors import ModelMismatchError
from ..methods.base import AUTO, DenseAccess, Method, Schedule, make_method, option_names
from ..methods.batchnorm import EMA, Exact, make_recalibration
from ..runtime.distributed import Ranks
from ..runtime.options import RunOptions, check_choice, check_count, run_options
from ..statistics.base import Statistic
from ..statistics.outputs import OutputCovariances, OutputMoments

Recalibrate = Exact | EMA | Literal["auto", "exact", "ema"] | None


@dataclass(frozen=True)
class Plan:
    """The method, the recalibration of BatchNorm and the run-time options of a repair.

    `diagnostics`: measure the covariance of both networks' outputs too. `gain_samples`: images for the layers.
    """

    method: Method
    recalibration: Exact | EMA | None
    schedule: Schedule
    diagnostics: bool
    gain_samples: int | None
    run: RunOptions

    @property
    def beside(self) -> bool:
        """Do both networks run side by side?"""
        return self.diagnostics or (self.method.dense is DenseAccess.MODEL and self.method.measures_layers)

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
        """What the method measures at each layer that it changes."""
        found = {name: self.method.probe(layer) for name, layer in layers.items()}
        other = [name for name, probe in found.items() if probe is not None and probe.statistic is not OutputMoments]
        if self.schedule == "parallel" and other:
            raise ValueError(
                f"schedule='parallel' measures OutputMoments only, and {other[0]!r} needs more of the walk"
            )
        return {name: self._adapted(probe, layers[name]) for name, probe in found.items() if probe is not None}

    def _adapted(self, probe: Probe, layer: Layer) -> Probe:
        """The probe, with diagnostics where they are wanted, and without the dense network where that is not there."""
        if layer.dense is None:
            return replace(probe, dense=None)
        if self.diagnostics and probe.statistic is OutputMoments and probe.dense == "output":
            return replace(probe, statistic=OutputCovariances)
        return probe

    def requests(
        self, probes: Mapping[str, Probe], batchnorms: Mapping[str, Any], gains: int, exact: int
    ) -> list[Request]:
        """What to measure: the inputs of BatchNorms over `exact` batches, and layers over `gains` batches."""
        found = [Request(name, self.exact.probe(), exact) for name in batchnorms] if self.exact else []
        return found + [
            Request(name, probe, gains) for name, probe in probes.items() if probe.statistic is not Statistic
        ]

    def identity(self) -> dict[str, object]:
        """The choices that change the result, as plain values, for a journal."""
        recalibration = self.recalibration and {"name": self.recalibration.name, **asdict(self.recalibration)}
        return {
            "method": {"name": self.method.name, **asdict(self.method)},
            "recalibrate": recalibration,
            "schedule": self.schedule,
            "diagnostics": self.diagnostics,
        }

    def check_dense(self, dense: Any) -> None:
        """Raise where the method needs more of the dense network than `dense` is: ValueError, ModelMismatchError."""
        method, whole = self.method, isinstance(dense, nn.Module)
        if method.dense is DenseAccess.MODEL and not whole:
            raise ValueError(f"method {method.name!r} needs the dense network itself: pass dense as a model")
        if self.diagnostics and method.changes_layers and not (whole and self.schedule == "sequential"):
            raise ValueError(
                "diagnostics compares both networks image by image: pass dense as a model, not its statistics, and "
                "schedule='sequential'"
            )
        if method.dense is not DenseAccess.NONE and dense is None:
            raise ModelMismatchError(
                f"method {method.name!r} matches the dense model's outputs: pass dense, or use method 'bn' or "
                "dense='running'"
            )


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

    "auto" is "refit" where `dense` is a model and the schedule is sequential, else "asr". Raises TypeError for an
    option that there is not, or that the method lacks; ValueError for a value out of range, or a contradiction.
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
