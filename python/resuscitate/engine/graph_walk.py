"""The graph walk: the traced network runs in segments, each for all batches before the next one begins.

A segment ends at a probed module, for only there all batches are needed at once. Within a segment each batch runs in
one go, in the dense and in the pruned network, and is measured at the end of the segment, while its activations are in
cache. A `runtime.activations.Store` keeps what one segment leaves to the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, fx

from ..data.batches import Batches
from ..network.runner import Network
from ..network.wiring import ReluConsumer, Wiring
from ..runtime.activations import Frame, Store
from ..utils.progress import Bar
from .collect import BatchNormInputs, Collector
from .deferred import DeferredCorrection, mergeable
from .probes import Measurement, Request
from .relu_targets import Seen, relu_equivalent_products
from .segments import run_step, split


def graph_walk(
    pruned: GraphPasses,
    dense: GraphPasses | None,
    batches: Batches,
    requests: Sequence[Request],
    wiring: Wiring,
    consumers: Mapping[str, tuple[ReluConsumer, ReluConsumer]],
    bar: Bar,
) -> Iterator[Measurement]:
    """Measure at the requests, in the order of execution, in one pass over the images; each module is called once.

    The inputs of a BatchNorm that alone reads a layer follow from the layer's moments by arithmetic. Raises
    NonFiniteError, LayerError.
    """
    inputs = BatchNormInputs(requests, wiring)
    nets = pruned.net, None if dense is None else dense.net
    for part, request in enumerate(requests):
        collector = Collector(request, inputs, *nets, batches)
        last = max(later.batches for later in requests[part:])
        last_dense = max((later.batches for later in requests[part:] if later.probe.dense), default=0)
        order = range(last if collector.measured or pruned.segments[part].steps else 0)
        # alternate the batch order between segments: the batch processed last is still in cache
        for index in order if part % 2 == 0 else reversed(order):
            y = dense.advance(part, index, batches) if dense is not None and index < last_dense else None
            x = pruned.advance(part, index, batches)
            bar.advance(request.name, batches.counts[index])
            collector.add(index, x, y)
        measurement = collector.finish(partial(pruned.correct, part))
        if dense is not None and request.name in consumers:
            seen = partial(_again, pruned, dense, part, request.batches)
            both = pruned.net, dense.net, request.name, consumers[request.name]
            measurement.found.replay = partial(relu_equivalent_products, *both, seen)
        yield measurement


def _again(pruned: GraphPasses, dense: GraphPasses, part: int, batches: int) -> Iterator[Seen]:
    """What was measured at the end of a segment, batch by batch, and what is added to the layer's output."""
    for index in range(batches):
        yield *pruned.again(part, index), *dense.again(part, index)


class GraphPasses:
    """The forward passes of one network through its graph, one for each batch, segment by segment.

    `added` has, by layer, the node that is added to its output before the ReLU (None: no node).
    """

    def __init__(
        self,
        net: Network,
        graph: fx.Graph,
        requests: Sequence[Request],
        store: Store,
        added: Mapping[str, fx.Node | None],
        is_dense: bool = False,
    ) -> None:
        self.net, self.store, self.added = net, store, added
        self.segments = split(graph, net, requests, added, is_dense)
        self.frames: list[Frame] = []
        self.pending: _Pending | None = None

    def advance(self, part: int, index: int, batches: Batches) -> Tensor:
        """Run one segment for one batch; returns the value that is measured at its end."""
        if index == len(self.frames):
            self.frames.append(Frame(self.store))
        frame, segment, due = self.frames[index], self.segments[part], self._due(part)
        wanted = segment.reads if due is None else {*segment.reads, due.source}
        values = frame.open([source for source in wanted if source in frame], segment.keep)
        if due is not None and due.reader is None and due.source in values:
            due.correction.apply(values[due.source])
        with self.net.precision():
            for step in segment.steps:
                if due is not None and step.node is due.reader:
                    values[step.node] = due.correction.through_batchnorm(values.pop(due.source))
                else:
                    run_step(self.net, step, values, lambda: batches[index])
        result = values[segment.source]
        frame.close({node: value for node, value in values.items() if node in segment.keep}, segment.keep)
        return result

    def again(self, part: int, index: int) -> tuple[Tensor, Tensor | None]:
        """The value at the end of a segment for one batch, and the tensor added to it before the ReLU, if any."""
        frame, segment = self.frames[index], self.segments[part]
        added = self.added[segment.name]
        values = frame.open({segment.source, added} - {None}, segment.keep)
        found = values[segment.source], values.get(added)
        frame.close({}, segment.keep)
        return found

    def correct(self, part: int, gain: Tensor, shift: Tensor) -> None:
        """Make the output at the end of a segment gain * output + shift, when each batch is next in memory."""
        segment = self.segments[part]
        self.pending = _Pending(segment.source, DeferredCorrection(gain, shift, self.net.axis(segment.name)))

    def _due(self, part: int) -> _Pending | None:
        """The correction to make in this segment: the pending one, in the first segment that runs after it."""
        due = self.pending
        if due is not None and due.part is None:
            due.part = part
            readers = list(due.source.users)
            module = self.net.modules.get(str(readers[0].target)) if len(readers) == 1 else None
            if mergeable(module) is not None and readers[0] in {step.node for step in self.segments[part].steps}:
                due.reader, due.correction.batchnorm = readers[0], mergeable(module)
        return due if due is not None and due.part == part else None


@dataclass
class _Pending:
    """A correction of stored outputs, to be made in place or, where a BatchNorm alone reads them, within it.

    `part`: the segment in which it is made. `reader`: the node of that BatchNorm.
    """

    source: fx.Node
    correction: DeferredCorrection
    part: int | None = None
    reader: fx.Node | None = None
