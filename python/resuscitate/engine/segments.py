"""A graph cut into the stretches between two stops of a walk, and how one of them runs, node by node."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..network.layers import BATCHNORMS, LAYERS
from ..network.runner import Network, has_hooks
from ..runtime.activations import leaves
from .probes import Stop

Values = dict[Any, Any]


@dataclass(frozen=True)
class Step:
    """A node to run, and the values that nothing reads after it; `over`: into the memory of what it reads."""

    node: fx.Node
    gone: list[fx.Node]
    over: bool = False


@dataclass(frozen=True)
class Stretch:
    """The stretch before the stop `name`.

    `reads` are the values that it takes from before, `keep` those that must outlive it; `source` is measured at the
    end.
    """

    name: str
    source: fx.Node
    steps: list[Step]
    reads: set[fx.Node]
    keep: set[fx.Node]


def run_step(net: Network, step: Step, values: Values, batch: Callable[[], Any]) -> None:
    """Put the node's value among `values`, and drop those that are read no more."""
    if step.over:
        values[step.node] = torch.relu_(values[step.node.all_input_nodes[0]])
    else:
        values[step.node] = _evaluate(net, step.node, values, batch)
    for source in step.gone:
        values.pop(source, None)


def follow(net: Network, graph: fx.Graph, batch: Any) -> tuple[Any, int]:
    """The network's output for one batch, by its graph, and the most bytes of activations that were held at once."""
    values: Values = {}
    peak = 0
    nodes = list(graph.nodes)
    with net.precision():
        for step in _steps(net, nodes, keep=nodes[-1:]):
            run_step(net, step, values, lambda: batch)
            peak = max(peak, _bytes(values))
    return values[nodes[-1]], peak


def cut(
    graph: fx.Graph, net: Network, stops: Sequence[Stop], others: Mapping[str, fx.Node | None], is_dense: bool
) -> list[Stretch]:
    """Cut the graph after each layer, and before each BatchNorm, where the walk stops; the rest is never run.

    A layer that is to be refitted is cut before, in the pruned network: it runs when it has its new weights. One that
    is wide is cut before in the dense network too.
    """
    nodes = list(graph.nodes)
    place = {str(node.target): index for index, node in enumerate(nodes) if node.op == "call_module"}
    sources, ends = [], []
    for stop in stops:
        node = nodes[place[stop.name]]
        before = isinstance(net.modules[stop.name], _BatchNorm) or (stop.wide if is_dense else stop.refit)
        sources.append(node.all_input_nodes[0] if before else node)
        ends.append(place[stop.name] + (not before))
    last = {source: index for index, node in enumerate(nodes[: ends[-1]]) for source in node.all_input_nodes}
    for source, end in zip(sources, ends, strict=True):
        last[source] = max(last.get(source, 0), end - 1)
    for stop, source, end in zip(stops, sources, ends, strict=True):
        for node in (source, others[stop.name]) if stop.name in others else ():
            if node is not None:  # looked at again when the part is done
                last[node] = max(last.get(node, 0), end)
    parts = []
    for stop, source, begin, end in zip(stops, sources, [0, *ends], ends, strict=False):
        inside, earlier = nodes[begin:end], set(nodes[:begin])
        reads = {read for node in inside for read in node.all_input_nodes} | {source}
        keep = {node for node in nodes[:end] if last.get(node, 0) >= end}
        parts.append(Stretch(stop.name, source, _steps(net, inside, {*keep, source}), reads & earlier, keep))
    return parts


def _steps(net: Network, nodes: Sequence[fx.Node], keep: Collection[fx.Node]) -> list[Step]:
    """The nodes, each with the values of which it is the last reader, but for those to keep."""
    read = set(keep)
    steps = []
    for node in reversed(nodes):
        gone = [source for source in [*node.all_input_nodes, node] if source not in read]
        read.update(gone)
        if node.op != "get_attr":
            steps.append(Step(node, gone, over=_may_overwrite(net, node, gone)))
    return steps[::-1]


def _may_overwrite(net: Network, node: fx.Node, gone: Sequence[fx.Node]) -> bool:
    """Is this a ReLU of what a layer, a BatchNorm or a sum made for it alone, in memory that nothing shares?"""
    module = net.modules.get(str(node.target)) if node.op == "call_module" else None
    if not (type(module) is nn.ReLU or node.target in (nn.functional.relu, torch.relu)) or has_hooks(module):
        return False
    source = node.all_input_nodes[0]
    if source not in gone or len(source.users) != 1 or len(node.all_input_nodes) != 1:
        return False
    maker = net.modules.get(str(source.target)) if source.op == "call_module" else None
    return source.target in (operator.add, torch.add) or (
        isinstance(maker, LAYERS + BATCHNORMS) and not has_hooks(maker)
    )


def _evaluate(net: Network, node: fx.Node, values: Values, batch: Callable[[], Any]) -> Any:
    if node.op == "placeholder":
        return net.place(batch())
    if node.op == "get_attr":  # looked up where it is read: the model's own tensors are not ours to keep
        return reduce(getattr, str(node.target).split("."), net.model)

    def value(source: fx.Node) -> Any:
        return _evaluate(net, source, values, batch) if source.op == "get_attr" else values[source]

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
    if node.op == "call_module":
        return net.model.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs) if callable(node.target) else args[0]


def _bytes(values: Values) -> int:
    storages = [leaf.untyped_storage() for leaf in leaves(values.values()) if isinstance(leaf, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
