"""A graph split into segments that end at the probed modules, and how a segment runs, node by node."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..network.layers import BATCHNORMS, LAYERS
from ..network.runner import Network, has_hooks
from ..runtime.activations import leaves
from .probes import Request

Values = dict[Any, Any]


@dataclass(frozen=True)
class Step:
    """A node to run, and the values that no later node reads; `over`: it may overwrite its input."""

    node: fx.Node
    gone: list[fx.Node]
    over: bool = False


@dataclass(frozen=True)
class Segment:
    """The segment before the probed module `name`.

    `source` is the node whose value is measured at the end. `reads` are values of earlier segments that it uses, `keep`
    the values that later segments use.
    """

    name: str
    source: fx.Node
    steps: list[Step]
    reads: set[fx.Node]
    keep: set[fx.Node]


def run_step(net: Network, step: Step, values: Values, batch: Callable[[], Any]) -> None:
    """Compute the node's value into `values`, and delete the values that no later node reads."""
    if step.over:
        values[step.node] = torch.relu_(values[step.node.all_input_nodes[0]])
    else:
        values[step.node] = _evaluate(net, step.node, values, batch)
    for source in step.gone:
        values.pop(source, None)


def value_of(net: Network, node: fx.Node, values: Values) -> Any:
    """The value of a node: one of `values`, or a tensor of the model, which is in none of them."""
    if node.op != "get_attr":
        return values[node]
    if "constant" in node.meta:
        return node.meta["constant"]
    # looked up at each use: a tensor of the model may be replaced meanwhile
    return operator.attrgetter(str(node.target))(net.model)


def follow(net: Network, graph: fx.Graph, batch: Any) -> tuple[Any, int]:
    """The network's output for one batch, by its graph, and the peak number of bytes of activations."""
    values: Values = {}
    peak = 0
    nodes = list(graph.nodes)
    with net.precision():
        for step in _steps(net, nodes, keep=nodes[-1:]):
            run_step(net, step, values, lambda: batch)
            storages = (leaf.untyped_storage() for leaf in leaves(values.values()) if isinstance(leaf, Tensor))
            peak = max(peak, sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()))
    return values[nodes[-1]], peak


def split(
    graph: fx.Graph, net: Network, requests: Sequence[Request], added: Mapping[str, fx.Node | None], is_dense: bool
) -> list[Segment]:
    """Split the graph at each request, before or after the module as its probe says; what lies behind is never run."""
    nodes = list(graph.nodes)
    place = {str(node.target): index for index, node in enumerate(nodes) if node.op == "call_module"}
    sources, ends = [], []
    for request in requests:
        node = nodes[place[request.name]]
        before = request.probe.side(is_dense) == "input"
        sources.append(node.all_input_nodes[0] if before else node)
        ends.append(place[request.name] + (not before))
    last = {source: index for index, node in enumerate(nodes[: ends[-1]]) for source in node.all_input_nodes}
    begins = [0, *ends[:-1]]
    for request, source, begin, end in zip(requests, sources, begins, ends, strict=True):
        # the source of a segment without nodes is a value of an earlier one
        last[source] = max(last.get(source, 0), end - 1, begin)
        if request.name in added:  # what is replayed is read again when the segment has been measured
            last[source] = max(last[source], end)
        if (other := added.get(request.name)) is not None:
            last[other] = max(last.get(other, 0), end)
    segments = []
    for request, source, begin, end in zip(requests, sources, begins, ends, strict=True):
        inside, earlier = nodes[begin:end], set(nodes[:begin])
        reads = {read for node in inside for read in node.all_input_nodes} | {source}
        keep = {node for node in nodes[:end] if last.get(node, 0) >= end}
        segments.append(Segment(request.name, source, _steps(net, inside, {*keep, source}), reads & earlier, keep))
    return segments


def _steps(net: Network, nodes: Sequence[fx.Node], keep: Collection[fx.Node]) -> list[Step]:
    """The nodes, each with the values that it is the last to read, except those to keep."""
    read = set(keep)
    steps = []
    for node in reversed(nodes):
        gone = [source for source in [*node.all_input_nodes, node] if source not in read]
        read.update(gone)
        if node.op != "get_attr":
            steps.append(Step(node, gone, over=_may_overwrite(net, node, gone)))
    return steps[::-1]


def _may_overwrite(net: Network, node: fx.Node, gone: Sequence[fx.Node]) -> bool:
    """Is this a ReLU that alone reads the output of a layer, BatchNorm or sum, in memory that no other value shares?"""
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
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: value_of(net, source, values))
    if node.op == "call_module":
        return net.model.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs) if callable(node.target) else args[0]
