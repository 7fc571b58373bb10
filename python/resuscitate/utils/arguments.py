"""What stands where in a call: an argument that belongs in another place is refused with the call to write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from torch import nn

from ..errors import CalibrationError

Kind = tuple[Callable[[Any], bool], str]
NETWORK: Kind = (lambda value: isinstance(value, nn.Module), "a torch.nn.Module")
NUMBER: Kind = (lambda value: isinstance(value, Real), "a number")
MASKS: Kind = (lambda value: isinstance(value, Mapping), "masks by layer")
FUNCTION: Kind = (lambda value: callable(value) and not isinstance(value, nn.Module), "a function")
IMAGES: Kind = (lambda value: not isinstance(value, nn.Module | Real), "images, as a tensor or any iterable of batches")


def check_places(call: str, **given: tuple[Any, Kind]) -> None:
    """Raise TypeError, naming the argument and saying what to write, for one that is not of its kind.

    call: what to write. given: each argument and its kind. Raises CalibrationError where the images are missing, None.
    """
    for name, (value, kind) in given.items():
        fits, what = kind
        if kind is IMAGES and value is None:
            raise CalibrationError(f"{name} is missing: pass {what}; write {call}")
        if not fits(value):
            raise TypeError(f"{name} must be {what}, not {type(value).__name__}; write {call}")
