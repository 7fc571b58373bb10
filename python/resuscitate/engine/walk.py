"""What both walks share: networks, images and requests, and how a statistic is collected over the batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from torch import Tensor

import asr_kernels as ak

from ..data.batches import Batches
from ..network.channels import KeptChannels
from ..network.runner import Network
from ..network.wiring import ReluConsumer, Wiring, observe
from ..runtime.activations import Store
from ..statistics.base import Place
from ..statistics.outputs import Calls, OutputMoments
from ..utils.nested import count_images
from ..utils.progress import Bar
from .measure import measure
from .probes import Measurement, Request
from .relu_targets import Seen, relu_equivalent_products, rising, usable


@dataclass
class Walk:
    """A walk of the pruned network, and of the dense one if `nets` has one, over batches of images.

    `wiring` is that of the pruned network, `example` a small batch to try the networks with. `requests` are put into
    the order of execution, without modules that a forward pass does not call. `taken` becomes "graph" or "suspended".
    `beside` is the dense network where it runs beside the pruned one. `counts` are the batches of each request.
    `kept`: the dense channels that the pruned network has, where it is smaller.
    `consumers` has for the pruned and for the dense network, by layer, the ReLU consumer of each layer to replay.
    """

    nets: Sequence[Network]
    wiring: Wiring
    store: Store
    example: Any
    batches: Batches
    requests: Sequence[Request]
    title: str = ""
    progress: bool | None = False
    kept: KeptChannels = field(default_factory=KeptChannels)
    taken: str = field(default="none", init=False)

    def __post_init__(self) -> None:
        asked = {each.name: each for each in self.requests}
        self.requests = [asked[name] for name in self.wiring.calls if name in asked]
        # how many times as many images the largest batch has as the example
        self.scale = max(self.batches.counts, default=0) / count_images(self.example)
        self.counts = {each.name: each.batches for each in self.requests}
        self.bar = Bar(self.title, list(self.counts), self.batches.images(), self.progress)
        beside = len(self.nets) > 1 and any(each.probe.side_by_side for each in self.requests)
        self.pruned, self.beside = self.nets[0], self.nets[1] if beside else None
        self.consumers = self._consumers()
        self.rising = rising(self.pruned, self.consumers[0])
        self.apart: dict[str, Calls] = {}  # moments of a dense network that does not run beside the pruned one
        self.inputs: dict[str, Calls] = {}  # moments of the inputs of BatchNorms, batch by batch or pooled

    def _consumers(self) -> list[dict[str, ReluConsumer]]:
        """Of the layers to replay that have the same kind of ReLU consumer in both networks."""
        names, dense = [each.name for each in self.requests if each.probe.replay], self.beside
        if not names or dense is None:
            return [{}, {}]
        ours, theirs = self.wiring.relu_consumers, self.dense_wiring.relu_consumers
        alike = [
            name
            for name in names
            if usable(ours, name, self.pruned) and usable(theirs, name, dense) and ours[name].adds == theirs[name].adds
        ]
        return [{name: found[name] for name in alike} for found in (ours, theirs)]

    @cached_property
    def dense_wiring(self) -> Wiring:
        """The wiring of the dense network that runs beside the pruned one."""
        dense = self.beside
        assert dense is not None
        return observe(dense.model, lambda: dense.run(self.example))

    def measure_apart(self) -> None:
        """Measure the moments of the dense network in passes of its own, unless it runs beside the pruned one."""
        if self.beside is not None or len(self.nets) == 1:
            return
        asked = {each.name: each.batches for each in self.requests if each.probe.dense and each.batches}

        def passing() -> Iterator[Any]:
            for batch in self.batches.head(max(asked.values(), default=0)):
                yield batch
                self.bar.advance("dense network", count_images(batch))

        largest = self.wiring.largest_bytes / count_images(self.example)
        self.apart = measure(self.nets[1], passing(), asked, largest, self.store.tidy)


class Collector:
    """Collects the statistic of one request over the batches.

    `measured` and `dense_measured`: how many batches of the pruned and of the dense network. `behind` is the requested
    BatchNorm that alone reads the layer. The moments of its inputs follow from those of the layer and its correction:
    gain * mean + shift and gain^2 * m2. So no batch is measured twice.
    """

    def __init__(self, request: Request, walk: Walk) -> None:
        self.request, self.walk = request, walk
        name, probe, batches = request.name, request.probe, walk.batches
        dense = None if walk.beside is None else walk.beside.modules.get(name)
        place = Place(name, walk.pruned.modules[name], dense, walk.kept)
        if probe.folds > 1:
            place = replace(place, folds=lambda batch, rows: batches.folds(batch, probe.folds, rows))
        self.found = probe.statistic(place)
        follows = probe.pruned == "output" and issubclass(probe.statistic, OutputMoments)
        behind = walk.wiring.batchnorm_of.get(name) if follows else None
        self.behind = behind if behind in walk.counts else None
        self.known = walk.inputs.pop(name, None)
        extra = 0 if self.behind is None else walk.counts[self.behind]
        self.measured = 0 if self.known is not None else max(request.batches, extra)
        self.dense_measured = request.batches if probe.dense is not None else 0

    def calls(self, index: int) -> int:
        """At how many calls of the module this batch has been measured."""
        return len(self.found.by_batch.get(index, [])) if isinstance(self.found, OutputMoments) else 0

    def add(self, index: int, pruned: Any, dense: Any = None) -> None:
        """Add what one batch has in the pruned network, and in the dense one; None where the layer was not reached."""
        x, y = pruned if index < self.measured else None, dense if index < self.dense_measured else None
        if isinstance(y, Tensor) and self.request.probe.dense == "output":
            y = self.walk.kept.of_outputs(self.request.name, y, self.walk.pruned.axis(self.request.name))
        if x is not None or y is not None:
            self.found.update(index, x, y)

    def finish(self, corrected: Callable[[Tensor, Tensor], None], seen: Callable[[], Iterable[Seen]]) -> Measurement:
        """The measurement over all batches.

        `corrected(gain, shift)` tells the walk of a correction; `seen()` gives what was measured, once more.
        """
        name, found, walk = self.request.name, self.found, self.walk
        if self.known is not None and isinstance(found, OutputMoments):
            found.by_batch = {index: [each] for index, each in enumerate(self.known)}
        found.finish(self.request.batches)
        if isinstance(found, OutputMoments):
            found.dense_calls = found.dense_calls or walk.kept.of_moments(name, walk.apart.get(name, []))
            if self.behind is not None:
                walk.inputs[self.behind] = self._inputs_of(self.behind, found)
        if walk.beside is not None and name in walk.consumers[0]:
            layer = walk.pruned, walk.beside, name, [each[name] for each in walk.consumers], walk.rising[name]
            found.replay = partial(relu_equivalent_products, *layer, walk.kept, seen)

        def correct(gain: Tensor, shift: Tensor) -> None:
            corrected(gain, shift)
            if self.behind is not None:
                walk.inputs[self.behind] = [each.affine(gain, shift) for each in walk.inputs[self.behind]]

        return Measurement(name, found, correct)

    def _inputs_of(self, batchnorm: str, found: OutputMoments) -> Calls:
        """The moments of the layer's outputs, batch by batch; pooled where the BatchNorm is to have those of all."""
        moments = [found.by_batch[index][0] for index in sorted(found.by_batch)]
        if not moments or self.walk.counts[batchnorm] != len(moments):
            return moments
        # the BatchNorm is to have the moments of all batches: a correction changes the pooled ones once
        return found.calls if len(moments) <= self.request.batches else [ak.ChannelMoments.pool(moments)]
