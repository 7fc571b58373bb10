"""What both walks share: how a statistic is collected over batches, and BatchNorm inputs that follow by arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..data.batches import Batches
from ..network.runner import Network
from ..network.wiring import Wiring
from ..statistics.base import Place
from ..statistics.outputs import Calls, OutputMoments, pool_checked
from .probes import Measurement, Request


class BatchNormInputs:
    """The moments of the inputs of each BatchNorm that alone reads a measured layer.

    They follow from the layer's output moments and its correction: gain * mean + shift and gain^2 * m2. So no batch is
    measured twice.
    """

    def __init__(self, requests: Sequence[Request], wiring: Wiring) -> None:
        self.batches = {request.name: request.batches for request in requests}
        self.batchnorm_of = wiring.batchnorm_of
        self.known: dict[str, Calls] = {}  # by BatchNorm, batch by batch or pooled

    def behind(self, request: Request) -> str:
        """The BatchNorm whose inputs follow from what this request measures, if it is requested too; else ""."""
        follows = request.probe.pruned == "output" and issubclass(request.probe.statistic, OutputMoments)
        name = self.batchnorm_of.get(request.name, "") if follows else ""
        return name if name in self.batches else ""

    def note(self, request: Request, found: OutputMoments) -> None:
        """Keep the moments of the outputs of a layer for the BatchNorm behind it."""
        name = self.behind(request)
        if not name:
            return
        moments = [found.by_batch[index][0] for index in sorted(found.by_batch)]
        if self.batches[name] == len(moments) > 0:
            # all batches are pooled in the end: correct the pooled moments, not each batch's
            few = len(moments) <= request.batches
            moments = found.calls if few else pool_checked(request.name, dict(enumerate(moments)))
        self.known[name] = moments

    def correct(self, request: Request, gain: Tensor, shift: Tensor) -> None:
        """The outputs of the layer have become gain * output + shift."""
        name = self.behind(request)
        if name:
            self.known[name] = [each.affine(gain, shift) for each in self.known[name]]


class Collector:
    """Collects the statistic of one request over the batches. `measured`: how many batches of the pruned network."""

    def __init__(
        self,
        request: Request,
        inputs: BatchNormInputs,
        pruned: Network,
        dense: Network | None,
        batches: Batches,
        follows: bool = True,
    ) -> None:
        self.request, self.inputs, self.follows = request, inputs, follows
        folds = request.probe.folds
        place = Place(
            request.name, pruned.modules[request.name], None if dense is None else dense.modules.get(request.name)
        )
        if folds > 1:
            place = Place(place.name, place.module, place.dense, lambda batch, rows: batches.folds(batch, folds, rows))
        self.found = request.probe.statistic(place)
        self.known = inputs.known.pop(request.name, None)
        extra = inputs.batches[inputs.behind(request)] if follows and inputs.behind(request) else 0
        self.measured = 0 if self.known is not None else max(request.batches, extra)

    def dense_batch(self, index: int) -> bool:
        """Is this batch measured in the dense network?"""
        return self.request.probe.dense is not None and index < self.request.batches

    def calls(self, index: int) -> int:
        """At how many calls of the module this batch has been measured."""
        return len(self.found.by_batch.get(index, [])) if isinstance(self.found, OutputMoments) else 0

    def add(self, index: int, pruned: Any, dense: Any) -> None:
        """Add what one batch has in the pruned network, and in the dense one; None where the layer was not reached."""
        x, y = pruned if index < self.measured else None, dense if self.dense_batch(index) else None
        if x is not None or y is not None:
            self.found.update(index, x, y)

    def finish(self, corrected: Callable[[Tensor, Tensor], None]) -> Measurement:
        """The measurement over all batches. `corrected(gain, shift)` tells the walk of a correction."""
        request, found = self.request, self.found
        if self.known is not None and isinstance(found, OutputMoments):
            found.by_batch = {index: [each] for index, each in enumerate(self.known)}
        found.finish(request.batches)
        if self.follows and isinstance(found, OutputMoments):
            self.inputs.note(request, found)

        def correct(gain: Tensor, shift: Tensor) -> None:
            if self.follows:
                corrected(gain, shift)
                self.inputs.correct(request, gain, shift)

        return Measurement(request.name, found, correct)


def complete(measurement: Measurement, dense: Mapping[str, Calls]) -> Measurement:
    """The measurement, with the moments of the dense network that was measured apart."""
    found = measurement.found
    if isinstance(found, OutputMoments) and not found.dense_calls:
        found.dense_calls = dense.get(measurement.name, [])
    return measurement
