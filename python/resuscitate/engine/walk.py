"""Which walk to take: by the graph where torch.fx gives a true picture of the network, else by suspended passes."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn.modules.batchnorm import _BatchNorm

from ..data.batches import Batches, count_images
from ..network.layers import LAYERS
from ..network.runner import Network, has_hooks
from ..network.wiring import Gate, Wiring, observe, same_output, trace
from ..runtime.activations import Store
from ..runtime.heap import heap
from ..utils.progress import Bar
from .graph_walk import Track, node_walk
from .measure import measure_apart
from .probes import Stop, Visit
from .relu_targets import other_node, usable
from .segments import follow
from .suspended_walk import peak_memory, suspended_walk

log = logging.getLogger("resuscitate")


class _NoGraphError(Exception):
    """Why torch.fx gives no true picture of a network."""


@dataclass
class Walker:
    """Walks a pruned network, and beside it the dense one if there is one, over batches of images.

    `example`: a small batch, to check a trace on. `taken` becomes "node", or "suspended", and the log says why.
    """

    pruned: Network
    dense: Network | None
    wiring: Wiring
    store: Store
    example: Any
    taken: str = "none"

    def walk(
        self, batches: Batches, stops: Sequence[Stop], title: str = "", progress: bool | None = False
    ) -> Generator[Visit]:
        """Visit the stops that the network comes by, in the order of execution, each once all before it are final."""
        order = {name: place for place, name in enumerate(self.wiring.calls)}
        stops = sorted((stop for stop in stops if stop.name in order), key=lambda stop: order[stop.name])
        if not stops:
            return
        gates = self._gates([stop.name for stop in stops if stop.gated])
        with Bar(title, [stop.name for stop in stops], batches.images(), progress) as bar:
            try:
                visits = self._by_nodes(batches, stops, gates, bar)
                self.taken = "node"
            except _NoGraphError as cause:
                log.info("walking by suspended passes, not by a graph: %s", cause)
                nets = self.pruned, self.dense
                visits = suspended_walk(*nets, batches, stops, self.wiring, gates, self.store, self.example, bar)
                self.taken = "suspended"
            yield from visits

    def _gates(self, names: Sequence[str]) -> dict[str, tuple[Gate, Gate]]:
        """The gates, in the pruned and in the dense network, of those of the layers that have a like one in both."""
        if not names or self.dense is None:
            return {}
        dense = self.dense
        pairs = observe(dense.model, lambda: dense.run(self.example)).gates
        return {
            name: (self.wiring.gates[name], pairs[name])
            for name in names
            if usable(self.wiring.gates.get(name), self.pruned)
            and usable(pairs.get(name), dense)
            and pairs[name].adds == self.wiring.gates[name].adds
        }

    def _by_nodes(
        self, batches: Batches, stops: Sequence[Stop], gates: Mapping[str, tuple[Gate, Gate]], bar: Bar
    ) -> Iterator[Visit]:
        of_pruned, of_dense = ({name: pair[side] for name, pair in gates.items()} for side in (0, 1))
        graph, peak, others = _graph(self.pruned, self.example, stops, self.wiring, of_pruned)
        paired = any(stop.paired or stop.refit for stop in stops)
        largest = max(batches.counts, default=0) / count_images(self.example)
        self.store.set_aside(int(2 * peak * largest))
        within = heap((2 if paired else 1) * peak * largest * len(batches), self.store.budget)
        pruned = Track(self.pruned, graph, stops, self.store, others)
        if self.dense is None or not any(stop.dense for stop in stops):
            return _within(within, node_walk(pruned, None, batches, stops, self.wiring, {}, bar))
        if not paired:
            return _within(within, self._with_dense_apart(pruned, batches, stops, bar))
        try:
            original, _, others = _graph(self.dense, self.example, stops, self.wiring, of_dense)
        except _NoGraphError as cause:
            raise _NoGraphError(f"the dense model: {cause}") from None
        dense = Track(self.dense, original, stops, self.store, others, is_dense=True)
        return _within(within, node_walk(pruned, dense, batches, stops, self.wiring, gates, bar))

    def _with_dense_apart(self, pruned: Track, batches: Batches, stops: Sequence[Stop], bar: Bar) -> Iterator[Visit]:
        assert self.dense is not None
        largest = self.wiring.largest / count_images(self.example)
        wanted = measure_apart(self.dense, batches, stops, self.store, bar, largest)
        for visit in node_walk(pruned, None, batches, stops, self.wiring, {}, bar):
            visit.dense = wanted.get(visit.name, [])
            yield visit


def _within(context: AbstractContextManager[None], visits: Iterator[Visit]) -> Iterator[Visit]:
    """The visits, made in this context."""
    with context:
        yield from visits


def most_waiting(net: Network, batch: Any) -> int:
    """The bytes of activations that a walk may keep of a batch, at most; none where the model raises an error."""
    with suppress(Exception):  # the walk meets it again
        if net.forward_fn is None:
            with suppress(Exception):
                return follow(net, trace(net.model), batch)[1]
        return peak_memory(net, batch)
    return 0


def _graph(
    net: Network, batch: Any, stops: Sequence[Stop], wiring: Wiring, gates: Mapping[str, Gate]
) -> tuple[fx.Graph, int, dict[str, fx.Node | None]]:
    """The graph for `node_walk`, the bytes of activations that `batch` needs at once in it, and what the gates add.

    Raises _NoGraphError where only `suspended_walk` is right: the trace must give the model's own output on `batch`.
    """
    if net.forward_fn is not None:
        raise _NoGraphError("a forward_fn hides the network's input")
    for stop in stops:
        if wiring.calls[stop.name] > 1:
            raise _NoGraphError(f"{stop.name} is called {wiring.calls[stop.name]} times in a forward pass")
    for name, module in net.modules.items():
        if has_hooks(module) and not isinstance(module, (*LAYERS, _BatchNorm)):
            raise _NoGraphError(f"{name or 'the model'} carries a forward hook")
    try:
        graph = trace(net.model)
        called = [str(node.target) for node in graph.nodes if node.op == "call_module"]
        others = {name: other_node(graph, gate, name) for name, gate in gates.items()}
        output, peak = follow(net, graph, batch)
        same = same_output(output, net.run(batch))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise _NoGraphError(f"torch.fx cannot trace it ({type(error).__name__}: {error})") from error
    for stop in stops:
        if called.count(stop.name) != 1:
            raise _NoGraphError(f"{stop.name or 'the model itself'} does not show in the trace")
    names = {stop.name for stop in stops}
    if [name for name in called if name in names] != [stop.name for stop in stops]:
        raise _NoGraphError("the trace runs its layers in another order")
    if not same:
        raise _NoGraphError("the traced network's output differs from the model's")
    return graph, peak, others
