"""The options of `repair`: the words that there are, which methods read which option, and what contradicts what."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf
from numbers import Integral, Real
from typing import Any, Literal, get_args

from torch import nn

from ..errors import ModelMismatchError
from ..network.mean_layers import PER
from ..runtime.distributed import Ranks

Method = Literal["auto", "bn", "layerwise", "channelwise", "asr", "refit", "two-stage", "mean"]
Schedule = Literal["sequential", "parallel"]
Recalibrate = Literal["auto", "exact", "ema"]
Frozen = Literal["keep", "recalibrate"]
OnNonfinite = Literal["raise", "skip"]

GAINS = ("layerwise", "channelwise", "asr")
FITS = ("refit", "two-stage")
# the methods that read an option; what is not here all of them read
READ_BY: dict[str, tuple[str, ...]] = {
    "schedule": GAINS,
    "prior": ("asr",),
    "bias": GAINS,
    "eps": GAINS,
    "ridge": FITS,
    "relu_aware": FITS,
    "means": ("refit", "mean"),
    **dict.fromkeys(("gain_samples", "correlations"), (*GAINS, *FITS)),
    **dict.fromkeys(("include", "exclude", "masks", "skip_first", "skip_last"), (*GAINS, *FITS, "mean")),
}
# the same for the ways to re-estimate BatchNorm
READ_WHERE: dict[str, tuple[str, ...]] = {
    "recalibrate_samples": ("exact",),
    **dict.fromkeys(("ema_batches", "ema_batch_size", "ema_momentum"), ("ema",)),
    "frozen": ("exact", "ema"),
}
# what a value other than the default must be
RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "prior": (
        lambda x: x in ("median", "mean") or _is_number(x, 0, open=True),
        "'median', 'mean' or a positive variance",
    ),
    "eps": (lambda x: _is_number(x, 0), "at least 0"),
    "ridge": (lambda x: _is_number(x, 0), "at least 0"),
    "ema_batches": (lambda x: _is_number(x, 1, Integral), "a whole number of at least 1"),
    "ema_batch_size": (lambda x: _is_number(x, 1, Integral), "a whole number of at least 1"),
    "ema_momentum": (lambda x: _is_number(x, 0, open=True) and x <= 1, "above 0 and at most 1"),
}


def check_options(
    options: Mapping[str, Any], defaults: Mapping[str, Any], dense: Any, ranks: Ranks
) -> tuple[Method, Recalibrate | None]:
    """The method and the recalibration that "auto" stands for, once all options are found to be theirs and in range.

    options, defaults: of `repair`, by name; `dense` as it is given to it. Raises ValueError for an unknown word, for an
    option that is not its default and that the method does not read, and for those that contradict one another;
    ModelMismatchError where there is no dense network.
    """
    with ranks.together():
        _check_words(options)
        whole, sequential = isinstance(dense, nn.Module), options["schedule"] == "sequential"
        method, recalibrate = options["method"], options["recalibrate"]
        if method == "auto":
            method = "refit" if whole and sequential else "asr"
        if recalibrate == "auto":
            recalibrate = "exact" if method == "bn" else None
        _check_target(method, dense, options)
        _check_read(method, recalibrate, options, defaults)
        for option, (fits, what) in RANGES.items():
            if _differ(options[option], defaults[option]) and not fits(options[option]):
                raise ValueError(f"{option}={options[option]!r} must be {what}")
        _check_together(method, recalibrate, options, ranks)
        return method, recalibrate


def _check_words(options: Mapping[str, Any]) -> None:
    for option, choices in (
        ("method", get_args(Method)),
        ("schedule", get_args(Schedule)),
        ("recalibrate", (*get_args(Recalibrate), None)),
        ("frozen", get_args(Frozen)),
        ("means", (*PER, None)),
        ("on_nonfinite", get_args(OnNonfinite)),
    ):
        if options[option] not in choices:
            raise ValueError(f"{option}={options[option]!r} is unknown; there are {', '.join(map(repr, choices))}")


def _check_target(method: str, dense: Any, options: Mapping[str, Any]) -> None:
    """Raise where the method needs more of the dense network than there is, or to walk from layer to layer."""
    in_step = isinstance(dense, nn.Module) and options["schedule"] == "sequential"
    if method in FITS and not in_step:
        raise ValueError(
            f"method {method!r} follows both networks from layer to layer: pass dense as a model, schedule='sequential'"
        )
    if method == "mean" and not in_step:
        raise ValueError("method 'mean' takes the pruned weights from dense: pass it as a model, schedule='sequential'")
    if method != "bn" and options["correlations"] and not in_step:
        raise ValueError(
            "correlations compares both networks image by image: pass dense as a model, not its statistics, and "
            "schedule='sequential'"
        )
    if method != "bn" and dense is None:
        raise ModelMismatchError(
            f"method {method!r} matches the dense model's outputs: pass dense, or use method 'bn' or dense='running'"
        )


def _check_read(method: str, recalibrate: str | None, options: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise ValueError for an option that is given, and that nothing reads."""
    for option, default in defaults.items():
        value = options[option]
        said = f"{option}={value!r}" if isinstance(value, str | int | float) else option
        if not _differ(value, default):
            continue
        if method not in READ_BY.get(option, (method,)):
            chosen = ", which 'auto' stands for here" if options["method"] == "auto" else ""
            raise ValueError(f"{said} is for {_listed('method', READ_BY[option])}, not {method!r}{chosen}")
        if recalibrate not in READ_WHERE.get(option, (recalibrate,)):
            where = " or ".join(f"recalibrate={way!r}" for way in READ_WHERE[option])
            raise ValueError(f"{said} is for {where}; method {method!r} runs with recalibrate={recalibrate!r} here")


def _check_together(method: str, recalibrate: str | None, options: Mapping[str, Any], ranks: Ranks) -> None:
    """Raise ValueError for options that a method reads, but not with one another."""
    if options["means"] == "layer" and method != "mean":
        raise ValueError("means='layer' is for method 'mean'; a refit finds one for each 'filter' or 'kernel'")
    if method == "bn" and recalibrate is None:
        raise ValueError("method 'bn' with recalibrate=None does nothing; choose 'exact' or 'ema'")
    if method == "two-stage" and ranks.size > 1:
        raise ValueError("method 'two-stage' runs in one process: it takes no group")
    if recalibrate == "ema" and (options["forward_fn"] is not None or ranks.size > 1):
        raise ValueError(
            "recalibrate='ema' cuts its own batches: it takes no recalibrate_samples, no forward_fn and no group"
        )


def _differ(value: Any, default: Any) -> bool:
    return value is not default and (default is None or bool(value != default))


def _is_number(value: Any, least: float, kind: type = Real, open: bool = False) -> bool:
    """Is it a finite number of that kind, at least `least`, or above it?"""
    fits = isinstance(value, kind) and not isinstance(value, bool) and least <= value < inf  # type: ignore[operator]
    return fits and not (open and value == least)


def _listed(noun: str, names: tuple[str, ...]) -> str:
    """method 'a'; methods 'a', 'b' and 'c'."""
    *others, last = map(repr, names)
    return f"{noun}s {', '.join(others)} and {last}" if others else f"{noun} {last}"
