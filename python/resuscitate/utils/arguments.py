"""Type checks of arguments that are easily swapped; the error shows the correct call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from torch import nn

from ..errors import CalibrationError

Kind = tuple[Callable[[Any], bool], str]
NETWORK: Kind = (lambda value: isinstance(value, nn.Module), "a torch.nn.Module")
NUMBER: Kind = (lambda value: isinstance(value, Real), "a number")
MASKS: Kind = (lambda value: isinstance(value, Mapping), "{layer: mask}, such as sparsify returns")
FUNCTION: Kind = (lambda value: callable(value) and not isinstance(value, nn.Module), "a function")
IMAGES: Kind = (lambda value: not isinstance(value, nn.Module | Real), "images, as a tensor or any iterable of batches")


def check_places(call: str, **given: tuple[Any, Kind]) -> None:
    """Raise TypeError, with the name of the argument and the correct call, if an argument is not of its kind.

    call: the correct call. given: for each argument its value and its kind. Raises CalibrationError if images are None.
    """
    for name, (value, kind) in given.items():
        fits, what = kind
        if kind is IMAGES and value is None:
            raise CalibrationError(f"{name} is missing: pass {what}; write {call}")
        if not fits(value):
            raise TypeError(f"{name} must be {what}, not {type(value).__name__}; write {call}")
