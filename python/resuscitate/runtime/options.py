"""How a measurement runs: the options that every function which measures takes, defined here alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict, cast, get_args

import torch
from torch import nn

from ..errors import CalibrationError, did_you_mean

OnNonfinite = Literal["raise", "skip"]


class RunOptions(TypedDict, total=False):
    """Options of every function that measures; none of them changes the result but by the images that it takes.

    max_samples, max_batches: read no more images, or batches, than this. Under ranks `max_samples` counts those of all
        ranks together, `max_batches` those of each.
    batch_size: how one tensor of images is split. It changes the result by rounding only.
    forward_fn: `forward_fn(model, batch)` runs a copy of one batch as it came, for models that take more than one
        tensor. Its images are counted along its first tensor (N, ...), or in its first list of images (C, H, W).
    dtype: run under autocast to "bf16" or "fp16"; moments stay float32 sums in float64. None: as the model is. The
        caller's own autocast is off meanwhile.
    device: where to run; the models are moved there and back.
    memory: bytes for images and activations on the device, as a number or such as "4GiB"; None: half of what is free.
        More is spilled to a scratch file (CPU) or to pinned host memory (GPU); results do not change. A loader is read
        until its images and their activations would take more than half of `memory` and half of the free scratch
        space; a warning then says how many images are used.
    scratch: folder for the scratch file, which has no name and so cannot remain. None: TMPDIR, or /var/tmp.
    group: a `torch.distributed` process group whose ranks all make this call with the same model and options, and each
        with its own images (image i on rank i modulo the ranks gives the result of one process).
    on_nonfinite: "raise" an error for images with NaN or infinite activations, or "skip" those images (with
        `forward_fn`: batches).
    seed: of the random numbers drawn meanwhile, such as those that shuffle a loader.
    progress: show a progress bar; None: where standard error is a terminal.
    """

    max_samples: int | None
    max_batches: int | None
    batch_size: int
    forward_fn: Callable[[nn.Module, Any], Any] | None
    dtype: torch.dtype | str | None
    device: torch.device | str | None
    memory: int | str | None
    scratch: str | Path | None
    group: Any
    on_nonfinite: OnNonfinite
    seed: int
    progress: bool | None


DEFAULTS = RunOptions(
    max_samples=None,
    max_batches=None,
    batch_size=128,
    forward_fn=None,
    dtype=None,
    device=None,
    memory=None,
    scratch=None,
    group=None,
    on_nonfinite="raise",
    seed=0,
    progress=None,
)


def run_options(call: str, given: Mapping[str, Any]) -> RunOptions:
    """All run-time options, checked: those given, and the defaults of the others.

    Raises TypeError, naming `call`, for one that there is not; ValueError or CalibrationError for a value out of range.
    """
    for name in given:
        if name not in DEFAULTS:
            raise TypeError(f"{call} has no option {name!r}{did_you_mean(name, DEFAULTS)}")
    options = cast(RunOptions, {**DEFAULTS, **given})
    check_count("max_samples", options["max_samples"])
    check_count("max_batches", options["max_batches"])
    check_count("batch_size", options["batch_size"], required=True)
    check_choice("on_nonfinite", options["on_nonfinite"], get_args(OnNonfinite))
    as_dtype(options["dtype"])
    check_device(options["device"])
    return options


def identity_of(run: RunOptions) -> dict[str, object]:
    """The options, but for `forward_fn`, that change more than rounding for the same images: for a journal."""
    return {"dtype": str(as_dtype(run["dtype"])), "seed": run["seed"], "on_nonfinite": run["on_nonfinite"]}


def check_count(option: str, limit: int | None, required: bool = False) -> None:
    """Raise CalibrationError for a limit that is neither None (if that is allowed) nor a whole number of at least 1."""
    if limit is None and not required:
        return
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise CalibrationError(f"{option} must be a whole number of at least 1, not {limit!r}")


def check_device(device: torch.device | str | None) -> None:
    """Raise ValueError, with torch's reason, for a device on which torch makes no tensor."""
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # an AssertionError where torch was built without the backend
        reason = str(error).partition("\n")[0].rstrip(".")
        remedy = "name another, such as 'cpu', or leave device out"
        raise ValueError(f"device={str(device)!r} cannot be used: {reason}; {remedy}") from error


def check_choice(option: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise ValueError, listing the choices, for a value that is none of them."""
    if value not in choices:
        raise ValueError(f"{option}={value!r} is unknown; there are {', '.join(map(repr, choices))}")


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The precision for autocast. Raises ValueError for other than bfloat16 and float16, by any of their names."""
    names = {"bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp16": torch.float16, "float16": torch.float16}
    found = names.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in names.values():
        raise ValueError(f"dtype={dtype!r} is unknown; there are 'bf16', 'fp16' and None, the model's own")
    return found
