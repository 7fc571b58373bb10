"""Compares the outputs of a network with those of the dense one, without labels."""

from __future__ import annotations

from math import isfinite, isnan
from typing import Any

import torch
from torch import Tensor

from ..data.batches import Batches, take
from ..engine.session import Session
from ..network.runner import check_finite
from ..network.wiring import output_leaves
from ..reports.agreement import Nearness
from ..utils.nested import count_images

MOST, FEWEST, PART = 32, 8, 4  # images to compare on where none are held out: one of so many, but no more and no fewer
KEPT_BYTES = 64 << 20  # of dense outputs that are kept for the next look


class Judge:
    """Compares the outputs of a session's first network with those of the dense one.

    On the images that are held out. Where there are none, or with `fitted`: on a quarter of all images, but 8 to 32,
    chosen by their contents, so that ranks choose as one process does. With a `forward_fn`, which takes batches as they
    came: on the first batches with as many.
    """

    def __init__(self, session: Session, batches: Batches, fitted: bool = False) -> None:
        self.session, self.batches = session, batches
        (self.held_out,) = session.ranks.total(batches.held_out)  # batches over all ranks: a rank may have none
        self.chosen = dict[int, Tensor | None].fromkeys(range(len(batches) - batches.held_out, len(batches)))
        if fitted or not self.held_out:
            (total,) = session.ranks.total(batches.images())
            count = min(max(total // PART, FEWEST), MOST)
            if session.run["forward_fn"] is None:
                self.chosen = {**batches.sample(count, session.ranks)}
            else:
                self.chosen = dict.fromkeys(range(batches.batches_for(session.ranks.share(count))))
        self._dense: dict[int, list[Tensor]] = {}

    def look(self) -> Nearness | None:
        """How near the outputs are now; None where they cannot be compared, and without a dense network."""
        session = self.session
        if session.dense is None:
            return None
        sums, powers = torch.zeros(5, dtype=torch.float64, device=session.net.device), list[tuple[int, Tensor]]()
        for index, rows in self.chosen.items():
            batch = self.batches[index] if rows is None else take(self.batches[index], rows)
            theirs = self._dense[index] if index in self._dense else comparable(session.dense.run(batch))
            if sum(each.nbytes for each in theirs) * len(self.chosen) <= KEPT_BYTES:
                self._dense[index] = theirs
            found = _compared(comparable(session.net.run(batch)), theirs, count_images(batch), sums)
            sums += found
            powers.append((index, found[3]))
        same, logits, difference, power, images = session.ranks.add(sums).tolist()
        if isnan(logits) or not power:
            return None
        # of images that are not held out the walk will name the layer
        if self.held_out and not isfinite(power) and session.run["on_nonfinite"] == "raise":
            check_finite("", powers)
        error = (difference / power) ** 0.5
        held_out = self.held_out > 0
        return Nearness(same / logits if logits else None, error if isfinite(error) else None, int(images), held_out)


def comparable(output: Any) -> list[Tensor]:
    """The floating tensors of an output; of these the first alone if it is a tensor of logits (N, K), K at least 2."""
    found = [leaf for leaf in output_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return found[:1] if are_logits(found[:1]) else found


def are_logits(outputs: list[Tensor]) -> bool:
    """Is this one tensor of logits, (N, K) with K at least 2?"""
    return len(outputs) == 1 and outputs[0].ndim == 2 and outputs[0].shape[1] > 1


def _compared(ours: list[Tensor], theirs: list[Tensor], images: int, sums: Tensor) -> Tensor:
    """Images with the same largest logit, images with logits, squares of differences, and of the dense outputs; images.

    Tensors without an axis of images are left out. All NaN where no others are left, such as for lists of boxes, or
    where their shapes differ. Infinite values that are equal, such as those of a mask, count as no difference.
    """
    found = torch.zeros_like(sums)
    ours, theirs = ([each for each in outputs if _has_images(each, images)] for outputs in (ours, theirs))
    if not theirs or [each.shape for each in ours] != [each.shape for each in theirs]:
        return found.fill_(torch.nan)
    found[4] = images
    if are_logits(theirs):
        found[0], found[1] = (ours[0].argmax(1) == theirs[0].argmax(1)).sum(), len(theirs[0])
    for mine, other in zip(ours, theirs, strict=True):
        differences = (mine.double() - other.double()).masked_fill(mine == other, 0)
        found[2] += differences.square().sum()
        found[3] += other.double().masked_fill(other.isinf(), 0).square().sum()
    return found


def _has_images(x: Tensor, images: int) -> bool:
    """Has the first axis as many entries as there are images, or the second one, as in sequences (T, N, K)?"""
    return x.shape[:1] == (images,) or (x.ndim == 3 and x.shape[1] == images)
