"""The errors that this package raises. Each message names the layer (or the batch) and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

MODEL = "the model itself"  # in messages, for the module with the empty name in `model.named_modules()`


class ResuscitateError(Exception):
    """Base class of the package's errors; when one is raised, the model is unchanged."""


class CalibrationError(ResuscitateError, ValueError):
    """The images cannot be used: none, too few, of an unknown type, or not readable a second time."""


class CheckpointError(ResuscitateError, ValueError):
    """A checkpoint cannot be read, or does not fit the model."""


def called(name: str, kind: str = "layer") -> str:
    """How a message names a layer, or another kind of module: by its name, or `MODEL` if the name is empty."""
    return f"{kind} {name!r}" if name else MODEL


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first of some names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class LayerError(ResuscitateError, ValueError):
    """A layer cannot be repaired, pruned or folded; `layer` is its name in `model.named_modules()`."""

    def __init__(self, layer: str, problem: str) -> None:
        super().__init__(f"{called(layer)}: {problem}")
        self.layer = layer


class NonFiniteError(LayerError):
    """A NaN or an infinity among the activations of `layer`, in batch number `batch` (from 0)."""

    def __init__(self, layer: str, batch: int, problem: str) -> None:
        super().__init__(layer, f"batch {batch}: {problem}")
        self.batch = batch


class MaskError(LayerError):
    """A pruned weight is no longer zero, or a mask does not fit its layer."""


class ModelMismatchError(ResuscitateError, ValueError):
    """The pruned and the dense model have different layers, or are the same object."""


class DistributedError(ResuscitateError, RuntimeError):
    """Another rank failed, does not answer, or has other arguments; every rank's model is unchanged."""


class JournalError(ResuscitateError, ValueError):
    """A journal cannot be read, or was written for another model, other data or another method."""


def did_you_mean(given: str, choices: Iterable[str], most: int = 1) -> str:
    """The end of a message, "; did you mean ...?", with the closest choices; empty if no choice is close."""
    close = difflib.get_close_matches(given, list(choices), n=most)
    return f"; did you mean {', '.join(close)}?" if close else ""
