"""Chooses the walk: the graph walk where torch.fx traces the network correctly, else the suspended walk."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn.modules.batchnorm import _BatchNorm

from ..data.batches import Batches
from ..network.layers import LAYERS
from ..network.runner import Network, has_hooks
from ..network.wiring import ReluConsumer, Wiring, observe, same_output, trace
from ..runtime.activations import Store
from ..runtime.heap import heap
from ..utils.nested import count_images
from ..utils.progress import Bar
from .collect import complete
from .graph_walk import GraphPasses, graph_walk
from .measure import measure_apart
from .probes import Measurement, Request
from .relu_targets import added_node, usable
from .segments import follow
from .suspended_walk import peak_memory, suspended_walk

log = logging.getLogger("resuscitate")


class _NoGraphError(Exception):
    """Says why a network has no correct torch.fx graph."""


@dataclass
class Walker:
    """Walks a pruned network, and the dense one if there is one, over batches of images.

    `example`: a small batch to check a trace on. `taken` becomes "graph" or "suspended"; the log says why.
    """

    pruned: Network
    dense: Network | None
    wiring: Wiring
    store: Store
    example: Any
    taken: str = "none"

    def walk(
        self, batches: Batches, requests: Sequence[Request], title: str = "", progress: bool | None = False
    ) -> Generator[Measurement]:
        """Measure at each requested module that a forward pass calls, in the order of execution.

        A measurement is made after the updates of all earlier modules. Close the generator to end the walk early.
        """
        order = {name: place for place, name in enumerate(self.wiring.calls)}
        requests = sorted((each for each in requests if each.name in order), key=lambda each: order[each.name])
        if not requests:
            return
        consumers = self._consumers([each.name for each in requests if each.probe.replay])
        with Bar(title, [each.name for each in requests], batches.images(), progress) as bar:
            try:
                found = self._by_graph(batches, requests, consumers, bar)
                self.taken = "graph"
            except _NoGraphError as cause:
                log.info("taking the suspended walk, not the graph walk: %s", cause)
                nets = self.pruned, self.dense
                found = suspended_walk(*nets, batches, requests, self.wiring, consumers, self.store, self.example, bar)
                self.taken = "suspended"
            yield from found

    def _consumers(self, names: Sequence[str]) -> dict[str, tuple[ReluConsumer, ReluConsumer]]:
        """Of the layers that have the same kind of ReLU consumer in both networks: the two consumers."""
        if not names or self.dense is None:
            return {}
        dense = self.dense
        pairs = observe(dense.model, lambda: dense.run(self.example)).relu_consumers
        return {
            name: (self.wiring.relu_consumers[name], pairs[name])
            for name in names
            if usable(self.wiring.relu_consumers.get(name), self.pruned)
            and usable(pairs.get(name), dense)
            and pairs[name].adds == self.wiring.relu_consumers[name].adds
        }

    def _by_graph(
        self,
        batches: Batches,
        requests: Sequence[Request],
        consumers: Mapping[str, tuple[ReluConsumer, ReluConsumer]],
        bar: Bar,
    ) -> Iterator[Measurement]:
        of_pruned, of_dense = ({name: pair[side] for name, pair in consumers.items()} for side in (0, 1))
        graph, peak, added = _graph(self.pruned, self.example, requests, self.wiring, of_pruned)
        beside = any(each.probe.side_by_side for each in requests)
        largest = max(batches.counts, default=0) / count_images(self.example)
        self.store.set_aside(int(2 * peak * largest))
        within = heap((2 if beside else 1) * peak * largest * len(batches), self.store.budget)
        pruned = GraphPasses(self.pruned, graph, requests, self.store, added)
        if self.dense is None or not any(each.probe.dense for each in requests):
            return _within(within, graph_walk(pruned, None, batches, requests, self.wiring, {}, bar))
        if not beside:
            return _within(within, self._with_dense_apart(pruned, batches, requests, bar))
        try:
            original, _, added = _graph(self.dense, self.example, requests, self.wiring, of_dense)
        except _NoGraphError as cause:
            raise _NoGraphError(f"the dense model: {cause}") from None
        dense = GraphPasses(self.dense, original, requests, self.store, added, is_dense=True)
        return _within(within, graph_walk(pruned, dense, batches, requests, self.wiring, consumers, bar))

    def _with_dense_apart(
        self, pruned: GraphPasses, batches: Batches, requests: Sequence[Request], bar: Bar
    ) -> Iterator[Measurement]:
        assert self.dense is not None
        largest = self.wiring.largest_bytes / count_images(self.example)
        found = measure_apart(self.dense, batches, requests, self.store, bar, largest)
        for measurement in graph_walk(pruned, None, batches, requests, self.wiring, {}, bar):
            yield complete(measurement, found)


def _within(context: AbstractContextManager[None], found: Iterator[Measurement]) -> Iterator[Measurement]:
    """The measurements, made in this context."""
    with context:
        yield from found


def most_waiting(net: Network, batch: Any) -> int:
    """The most bytes of activations that a walk keeps of a batch; 0 where the model raises an error."""
    with suppress(Exception):  # the walk will raise it
        if net.forward_fn is None:
            with suppress(Exception):
                return follow(net, trace(net.model), batch)[1]
        return peak_memory(net, batch)
    return 0


def _graph(
    net: Network, batch: Any, requests: Sequence[Request], wiring: Wiring, consumers: Mapping[str, ReluConsumer]
) -> tuple[fx.Graph, int, dict[str, fx.Node | None]]:
    """The graph for `graph_walk`, the peak bytes of activations of `batch` in it, and by layer what its consumer adds.

    Raises _NoGraphError where the trace does not give the model's own output on `batch`.
    """
    if net.forward_fn is not None:
        raise _NoGraphError("a forward_fn hides the network's input")
    for each in requests:
        if wiring.calls[each.name] > 1:
            raise _NoGraphError(f"{each.name} is called {wiring.calls[each.name]} times in a forward pass")
    for name, module in net.modules.items():
        if has_hooks(module) and not isinstance(module, (*LAYERS, _BatchNorm)):
            raise _NoGraphError(f"{name or 'the model'} carries a forward hook")
    try:
        graph = trace(net.model)
        called = [str(node.target) for node in graph.nodes if node.op == "call_module"]
        added = {name: added_node(graph, consumer, name) for name, consumer in consumers.items()}
        output, peak = follow(net, graph, batch)
        same = same_output(output, net.run(batch))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise _NoGraphError(f"torch.fx cannot trace it ({type(error).__name__}: {error})") from error
    for each in requests:
        if called.count(each.name) != 1:
            raise _NoGraphError(f"{each.name or 'the model itself'} does not show in the trace")
    names = {each.name for each in requests}
    if [name for name in called if name in names] != [each.name for each in requests]:
        raise _NoGraphError("the trace runs its layers in another order")
    if not same:
        raise _NoGraphError("the traced network's output differs from the model's")
    return graph, peak, added
