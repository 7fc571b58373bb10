"""A statistic: what is measured at a layer, over all batches and ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, TypeVar

from torch import Tensor, nn

import asr_kernels as ak

from ..network.channels import KeptChannels

M = TypeVar("M", ak.ChannelMoments, ak.PairedMoments)


@dataclass(frozen=True)
class Place:
    """The layer, or BatchNorm, at which a statistic is measured."""

    name: str
    module: nn.Module
    dense: nn.Module | None = None  # the same module of the dense network, if that is there
    kept: KeptChannels = field(default_factory=KeptChannels)  # the dense channels of a smaller network
    # (batch, rows) -> by fold of the images that the batch has, which of so many rows belong to it, int64; None: all
    folds: Callable[[int, int], Mapping[int, Tensor | None]] = lambda batch, rows: {0: None}


class Statistic:
    """What is measured at one place. A subclass says how values are added; this one measures nothing.

    `measured`: the attributes that are sent to other ranks and merged: moments by call in a list, or by key in a dict,
    or sums. A subclass with other contents overrides `merge`, `state` and `of_state`. The walk sets `replay` where the
    probe asks for it and a ReLU alone reads the layer.
    """

    large: ClassVar[bool] = False  # `update` multiplies large matrices on all cores: for one batch at a time
    measured: ClassVar[tuple[str, ...]] = ()

    def __init__(self, place: Place) -> None:
        self.place = place
        self.replay: Callable[..., Any] | None = None

    def update(self, batch: int, pruned: Any, dense: Any) -> None:
        """Add the values of one batch, by its number: the tensor in the pruned and in the dense network, or None.

        A layer that a forward pass calls several times is updated several times. Batches may come in any order and from
        several threads, each from one: keep what is added by batch, and add it up in `finish`. Raises LayerError.
        To read a value from the device here would empty its queue for each batch: leave that to `finish`.
        """

    def finish(self, batches: int) -> None:
        """All batches are added; only the first `batches` count. Raises NonFiniteError."""

    def merge(self, other: Self) -> Self:
        """The statistic of both sets of images, as a new object."""
        theirs = other.state()
        return self.of_state(self.place, {name: _merged(each, theirs[name]) for name, each in self.state().items()})

    def state(self) -> Any:
        """All that is sent to other ranks. Raises TypeError for a statistic that does not say what that is."""
        if not self.measured and type(self).update is not Statistic.update:
            raise TypeError(f"{type(self).__name__} has no `measured`: name the attributes that ranks exchange")
        return {name: getattr(self, name) for name in self.measured}

    @classmethod
    def of_state(cls, place: Place, state: Any) -> Self:
        """The inverse of `state`."""
        found = cls(place)
        vars(found).update(state)
        return found

    @property
    def empty(self) -> bool:
        """Was nothing measured, because no image reaches the layer?"""
        return False


def _merged(ours: Any, theirs: Any) -> Any:
    if isinstance(ours, dict):
        return {**ours, **theirs, **{key: ours[key].merge(theirs[key]) for key in ours.keys() & theirs.keys()}}
    return merge_calls(ours, theirs) if isinstance(ours, list) else ours + theirs


def merge_calls(old: list[M], new: list[M]) -> list[M]:
    """Call by call; one pass may have fewer calls than another."""
    longer = old if len(old) > len(new) else new
    return [a.merge(b) for a, b in zip(old, new, strict=False)] + longer[min(len(old), len(new)) :]
