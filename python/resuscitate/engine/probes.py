"""What a walk through a network is asked for, and what it hands out: stops and visits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

import asr_kernels as ak

Calls = list[ak.ChannelMoments]
M = TypeVar("M", ak.ChannelMoments, ak.PairedMoments)


@dataclass(frozen=True)
class Stop:
    """A module to measure, over the first `batches` batches: a layer's output, or what a BatchNorm reads.

    `dense`: in the dense network too; `paired`: with the covariances of the two; `refit`: not its output but what it
    reads, with the dense output, or if it is `wide` with what the dense one reads; `gated`: let the visit `aim`, where
    a ReLU hides what is below it; `folds`: into how many parts the images are dealt. No batches: only to be passed, so
    that what is known already can be corrected.
    """

    name: str
    batches: int
    dense: bool = False
    paired: bool = False
    refit: bool = False
    wide: bool = False
    gated: bool = False
    folds: int = 1


@dataclass
class Visit:
    """A stop that was reached while every earlier one is final.

    `calls` and `dense` hold one set of moments for each call of the module in a forward pass, of the pruned and of the
    dense network; `pairs` holds both and their covariances, where the stop asked for them, and `folds` the moments of
    what the module reads and of the dense output, over all calls, for each part of the images. `correct(gain, shift)`
    must be told of any change that was made to the module's output, so that what follows sees it; where it was to be
    refitted it is yet to run. `aim(weight, bias, patches)`, where a ReLU hides some of a layer's errors, is one more
    pass over the batches: the cross products, about the means of `patches`, for outputs as good as the dense ones, the
    nearest to what the layer puts out with such weights (in its shape, and (O,)).
    """

    name: str
    calls: Calls = field(default_factory=list)
    dense: Calls = field(default_factory=list)
    pairs: list[ak.PairedMoments] = field(default_factory=list)
    folds: dict[int, ak.PatchMoments] = field(default_factory=dict)
    correct: Callable[[Tensor, Tensor], None] = lambda gain, shift: None
    aim: Callable[[Tensor, Tensor, ak.PatchMoments], ak.CrossProducts] | None = None

    def take_pairs(self) -> Visit:
        """The same visit, `calls` and `dense` filled from the pairs."""
        if self.pairs:
            self.calls, self.dense = [pair.pruned for pair in self.pairs], [pair.dense for pair in self.pairs]
        return self


def merge_folds(old: dict[int, ak.PatchMoments], new: dict[int, ak.PatchMoments]) -> dict[int, ak.PatchMoments]:
    """Fold by fold; a batch may have no image of some."""
    return old | {fold: old[fold].merge(found) if fold in old else found for fold, found in new.items()}


def merge_calls(old: list[M], new: list[M]) -> list[M]:
    """Call by call; a pass may have had fewer calls than another."""
    longer = old if len(old) > len(new) else new
    return [a.merge(b) for a, b in zip(old, new, strict=False)] + longer[min(len(old), len(new)) :]
