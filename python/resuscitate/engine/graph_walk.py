"""The graph walk: the traced network runs in segments, each for all batches before the next one begins.

A segment ends at a probed module, for only there all batches are needed at once. Within a segment each batch runs in
one go, in the dense and in the pruned network, and is measured at the end of the segment, while its activations are in
cache. A `runtime.activations.Store` keeps what one segment leaves to the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.prune import BasePruningMethod

from ..network.layers import LAYERS
from ..network.runner import Network, has_hooks
from ..network.wiring import same_output, trace
from ..runtime.activations import Frame
from ..runtime.heap import heap
from .deferred import DeferredCorrection, is_mergeable
from .pass_memory import storages
from .probes import Measurement
from .relu_targets import Seen, added_node
from .segments import follow, run_step, split, value_of
from .walk import Collector, Walk


def graph_walk(walk: Walk, pruned: GraphPasses, dense: GraphPasses | None = None) -> Iterator[Measurement]:
    """Measure at the requests in one pass over the images; each module is called once."""
    requests, batches, store = walk.requests, walk.batches, walk.store
    needed = pruned.peak * walk.scale
    store.set_aside(int(2 * needed))
    with heap((2 if dense else 1) * needed * len(batches), store.budget):
        walk.measure_apart()
        for part, request in enumerate(requests):
            collector = Collector(request, walk)
            last = max(later.batches for later in requests[part:])
            last_dense = max((later.batches for later in requests[part:] if later.probe.dense), default=0)
            runs = any(passes is not None and passes.segments[part].steps for passes in (pruned, dense))
            order = range(last if collector.measured or runs else 0)
            # alternate the batch order between segments: the batch processed last is still in cache
            for index in order if part % 2 == 0 else reversed(order):
                y = dense.advance(part, index) if dense is not None and index < last_dense else None
                x = pruned.advance(part, index)
                walk.bar.advance(request.name, batches.counts[index])
                collector.add(index, x, y)
            yield collector.finish(partial(pruned.correct, part), partial(_again, pruned, dense, part, request.batches))


def _again(pruned: GraphPasses, dense: GraphPasses | None, part: int, batches: int) -> Iterator[Seen]:
    """What was measured at the end of a segment, batch by batch, and what is added to the layer's output."""
    assert dense is not None
    for index in range(batches):
        yield *pruned.again(part, index), *dense.again(part, index)


class GraphPasses:
    """The forward passes of one network through its graph, one for each batch, segment by segment.

    `peak` is the most bytes of activations of the example. Raises NoGraphError.
    """

    def __init__(self, walk: Walk, is_dense: bool) -> None:
        self.net, self.batches, self.store = walk.nets[is_dense], walk.batches, walk.store
        try:
            graph, self.peak, self.added = _graph(self.net, walk, is_dense)
        except NoGraphError as cause:
            raise NoGraphError(f"the dense model: {cause}" if is_dense else str(cause)) from cause
        self.segments = split(graph, self.net, walk.requests, self.added, is_dense)
        tensors = [*self.net.model.parameters(), *self.net.model.buffers()]
        self.foreign = {storage.data_ptr() for storage in storages(tensors)}
        self.frames: list[Frame] = []
        self.pending: _Pending | None = None

    def advance(self, part: int, index: int) -> Tensor:
        """Run one segment for one batch; returns the value that is measured at its end."""
        if index == len(self.frames):
            self.frames.append(Frame(self.store, self.foreign))
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
                    run_step(self.net, step, values, lambda: self.batches[index])
        result = value_of(self.net, segment.source, values)
        frame.close({node: value for node, value in values.items() if node in segment.keep}, segment.keep)
        return result

    def again(self, part: int, index: int) -> tuple[Tensor, Tensor | None]:
        """The value at the end of a segment for one batch, and the tensor added to it before the ReLU, if any."""
        frame, segment = self.frames[index], self.segments[part]
        source, added = segment.source, self.added[segment.name]
        values = frame.open([node for node in (source, added) if node in frame], segment.keep)
        found = value_of(self.net, source, values), values.get(added)
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
            if is_mergeable(module) and readers[0] in {step.node for step in self.segments[part].steps}:
                due.reader, due.correction.batchnorm = readers[0], module
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


class NoGraphError(Exception):
    """Says why a network has no correct torch.fx graph."""


def _may_change_input(module: nn.Module) -> bool:
    """Has the module a forward pre-hook? Those of `torch.nn.utils.prune` only mask weights."""
    return not all(isinstance(hook, BasePruningMethod) for hook in module._forward_pre_hooks.values())


def _graph(net: Network, walk: Walk, is_dense: bool) -> tuple[fx.Graph, int, dict[str, fx.Node | None]]:
    """The graph, the peak bytes of activations of the example in it, and by layer the node that its consumer adds.

    Raises NoGraphError where the trace does not give the model's own output for the example.
    """
    requests, calls, consumers = [each.name for each in walk.requests], walk.wiring.calls, walk.consumers[is_dense]
    if net.forward_fn is not None:
        raise NoGraphError("a forward_fn hides the network's input")
    for name in requests:
        if calls[name] > 1:
            raise NoGraphError(f"{name} is called {calls[name]} times in a forward pass")
    for name, module in net.modules.items():
        if has_hooks(module) and not isinstance(module, (*LAYERS, _BatchNorm)):
            raise NoGraphError(f"{name or 'the model'} carries a forward hook")
    for each in walk.requests:
        if each.probe.side(is_dense) == "input" and _may_change_input(net.modules[each.name]):
            raise NoGraphError(f"{each.name} is measured at its input, and carries a forward pre-hook")
    try:
        graph = trace(net.model)
        called = [str(node.target) for node in graph.nodes if node.op == "call_module"]
        added = {name: added_node(graph, consumer, name) for name, consumer in consumers.items()}
        output, peak = follow(net, graph, walk.example)
        same = same_output(output, net.run(walk.example))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise NoGraphError(f"torch.fx cannot trace it ({type(error).__name__}: {error})") from error
    for name in requests:
        if called.count(name) != 1:
            raise NoGraphError(f"{name or 'the model itself'} does not show in the trace")
    if [name for name in called if name in requests] != requests:
        raise NoGraphError("the trace runs its layers in another order")
    if not same:
        raise NoGraphError("the traced network's output differs from the model's")
    return graph, peak, added
