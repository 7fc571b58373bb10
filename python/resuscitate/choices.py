"""The options of `repair` that are one of a few words, and which of them go together."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import nn

from .distributed import Ranks
from .errors import ModelMismatchError
from .means import PER

Method = Literal["auto", "bn", "layerwise", "channelwise", "asr", "refit", "two-stage", "mean"]
Schedule = Literal["sequential", "parallel"]
Recalibrate = Literal["auto", "exact", "ema"]
Frozen = Literal["keep", "recalibrate"]
OnNonfinite = Literal["raise", "skip"]


def check_options(
    method: str, schedule: str, recalibrate: str | None, frozen: str, on_nonfinite: str, means: str | None
) -> None:
    """Raise ValueError for a word that is none of the choices, and for those that contradict one another."""
    for option, value, choices in (
        ("method", method, get_args(Method)),
        ("schedule", schedule, get_args(Schedule)),
        ("recalibrate", recalibrate, (*get_args(Recalibrate), None)),
        ("frozen", frozen, get_args(Frozen)),
        ("means", means, (*PER, None)),
        ("on_nonfinite", on_nonfinite, get_args(OnNonfinite)),
    ):
        if value not in choices:
            raise ValueError(f"{option}={value!r} is unknown; there are {', '.join(map(repr, choices))}")
    if means is not None and method not in ("auto", "refit", "mean"):
        raise ValueError(f"means={means!r} is for methods 'refit' and 'mean', not {method!r}")
    if means == "layer" and method != "mean":
        raise ValueError("means='layer' is for method 'mean'; a refit finds one for each 'filter' or 'kernel'")
    if method == "bn" and recalibrate is None:
        raise ValueError("method 'bn' with recalibrate=None does nothing; choose 'exact' or 'ema'")


def check_target(method: str, target: Any, schedule: str, correlations: bool) -> None:
    """Raise ValueError or ModelMismatchError where a method needs more of the dense network than there is."""
    whole = isinstance(target, nn.Module)
    if method == "mean" and (not whole or schedule == "parallel" or correlations):
        raise ValueError("method 'mean' takes the pruned weights from dense: pass it as a model, schedule='sequential'")
    if correlations and not whole:
        raise ValueError(
            "correlations compares both networks image by image: pass dense as a model, not its statistics"
        )
    if method != "bn" and target is None:
        raise ModelMismatchError(
            f"method {method!r} matches the dense model's outputs: pass dense, or use method 'bn' or dense='running'"
        )


def check_refit(method: str, target: Any, schedule: str, bias: bool, ridge: float | None, ranks: Ranks) -> None:
    """Raise ValueError for what a refit cannot do."""
    if not isinstance(target, nn.Module) or schedule != "sequential":
        raise ValueError(
            f"method {method!r} follows both networks from layer to layer: pass dense as a model, schedule='sequential'"
        )
    if not bias:
        raise ValueError(f"method {method!r} always fits the bias")
    if ridge is not None and not ridge >= 0:
        raise ValueError(f"ridge={ridge} must be at least 0")
    if method == "two-stage" and ranks.size > 1:
        raise ValueError("method 'two-stage' runs in one process: it takes no group")
