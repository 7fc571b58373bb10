"""The node-major walk: one forward pass, stopping at each module once all before it is final, for all the images.

Between two stops nothing needs all the images at once, so each batch runs through that stretch in one go, dense and
pruned in lockstep, and is measured where the stretch ends, while its activations are still warm. Only then does the
next stretch begin, again with the first batch. What one stretch leaves to the next is kept in a `storage.Store`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

import asr_kernels as ak

from .batches import Batches
from .gates import Seen, cross
from .graph import Gate, Wiring
from .layers import LAYERS
from .network import Network, check_finite, has_hooks
from .progress import Bar
from .stops import Calls, Stop, Visit, merge_patches
from .storage import Frame, Store, leaves

Values = dict[Any, Any]
BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def node_walk(
    pruned: Track,
    dense: Track | None,
    batches: Batches,
    stops: Sequence[Stop],
    wiring: Wiring,
    bar: Bar,
    gates: Mapping[str, tuple[Gate, Gate]] = MappingProxyType({}),
) -> Iterator[Visit]:
    """Visit `stops`, in the order of execution, in one pass over the images; each module must be called once.

    The moments of what a BatchNorm reads follow by arithmetic where it alone reads a layer that was just measured and
    corrected. Raises NonFiniteError.
    """
    behind: dict[str, Calls] = {}  # by BatchNorm: the moments of what reaches it, batch by batch
    batches_of = {stop.name: stop.batches for stop in stops}
    for part, stop in enumerate(stops):
        follower = "" if stop.refit else wiring.batchnorm_of.get(stop.name, "")
        known = stop.name in behind
        measured = 0 if known or stop.refit else max(stop.batches, batches_of.get(follower, 0))
        last = max(later.batches for later in stops[part:])
        last_dense = max((later.batches for later in stops[part:] if later.dense), default=0) if dense else 0
        visit, found = Visit(stop.name), dict(enumerate(behind.pop(stop.name, [])))
        originals: dict[int, ak.ChannelMoments] = {}
        pairs: dict[int, ak.PairedMoments] = {}
        order = range(last if measured or pruned.parts[part].steps else 0)
        # there and back again: what one stretch wrote last is still in the cache when the next one reads it first
        for index in order if part % 2 == 0 else reversed(order):
            y = dense.advance(part, index, batches) if dense is not None and index < last_dense else None
            x = pruned.advance(part, index, batches)
            bar.advance(stop.name, batches.counts[index])
            if index < stop.batches and stop.refit and dense is not None:
                visit.patches = merge_patches(visit.patches, pruned.net.patches(stop.name, index, x, dense.net, y))
            elif index < stop.batches and stop.paired and y is not None:
                pruned.net.check_tensor(stop.name, x)
                pairs[index] = ak.paired_moments(y, x, pruned.net.axis(stop.name))
                originals[index] = pairs[index].dense
            elif index < stop.batches and stop.dense and y is not None:
                originals[index] = pruned.net.moments(stop.name, y)
            if index < measured:
                # not of the pair: a run that resumes between a layer and its BatchNorm has none, and must find the same
                found[index] = pruned.net.moments(stop.name, x)
        moments = [found[index] for index in sorted(found)]
        visit.calls = _pooled(stop.name, moments[: stop.batches])
        visit.dense = _pooled(stop.name, [originals[index] for index in sorted(originals)])
        visit.pairs = [reduce(lambda a, b: a.merge(b), [pairs[index] for index in sorted(pairs)])] if pairs else []
        if follower in batches_of:
            behind[follower] = moments
            if batches_of[follower] == len(moments) > 0:
                # to be pooled anyway: correct the sum of them, not each
                behind[follower] = visit.calls if len(moments) <= stop.batches else _pooled(stop.name, moments)

        def correct(gain: Tensor, shift: Tensor, part: int = part, follower: str = follower) -> None:
            pruned.correct(part, gain, shift)
            if follower in behind:
                behind[follower] = [each.affine(gain, shift) for each in behind[follower]]

        visit.correct = correct
        if dense is not None and stop.name in gates:
            seen = partial(_again, pruned, dense, part, stop.batches)
            visit.aim = partial(cross, pruned.net, dense.net, stop.name, gates[stop.name], seen)
        yield visit


def _again(pruned: Track, dense: Track, part: int, batches: int) -> Iterator[Seen]:
    """What was measured at the end of a part, batch by batch, and what is added to the layer's output."""
    for index in range(batches):
        yield *pruned.again(part, index), *dense.again(part, index)


class Track:
    """One network on its way through its graph, from stop to stop, for every batch."""

    def __init__(
        self,
        net: Network,
        graph: fx.Graph,
        stops: Sequence[Stop],
        store: Store,
        others: Mapping[str, fx.Node | None],
        is_dense: bool = False,
    ) -> None:
        self.net, self.store, self.others = net, store, others
        self.parts = _parts(graph, net, stops, others, is_dense)
        self.frames: list[Frame] = []
        self.pending: _Correction | None = None

    def advance(self, part: int, index: int, batches: Batches) -> Tensor:
        """Run the part before one stop for one batch; returns what is measured there."""
        if index == len(self.frames):
            self.frames.append(Frame(self.store))
        frame, stretch, correction = self.frames[index], self.parts[part], self._due(part)
        wanted = stretch.reads if correction is None else {*stretch.reads, correction.source}
        values = frame.open([source for source in wanted if source in frame], stretch.keep)
        merged = None if correction is None else correction.batchnorm
        if correction is not None and merged is None and correction.source in values:
            ak.affine_(values[correction.source], correction.gain, correction.shift, correction.axis)
        with self.net.precision():
            for step in stretch.steps:
                if correction is not None and step.node is merged:
                    values[merged] = correction.through_batchnorm(values.pop(correction.source))
                else:
                    run_step(self.net, step, values, lambda: batches[index])
        result = values[stretch.source]
        frame.close({node: value for node, value in values.items() if node in stretch.keep}, stretch.keep)
        return result

    def again(self, part: int, index: int) -> tuple[Tensor, Tensor | None]:
        """What was measured at the end of a part for one batch, and what its gate adds to it, if anything."""
        frame, stretch = self.frames[index], self.parts[part]
        other = self.others[stretch.name]
        values = frame.open({stretch.source, other} - {None}, stretch.keep)
        found = values[stretch.source], values.get(other)
        frame.close({}, stretch.keep)
        return found

    def correct(self, part: int, gain: Tensor, shift: Tensor) -> None:
        """Have the output that this part ends with become gain * output + shift, when each batch is next in hand."""
        stopped_at = self.parts[part]
        self.pending = _Correction(self.net, stopped_at.source, gain, shift, self.net.axis(stopped_at.name))

    def _due(self, part: int) -> _Correction | None:
        """The correction to make in this part: the pending one, in the first part that runs after it."""
        if self.pending is not None and self.pending.part is None:
            self.pending.begin(part, self.parts[part])
        return self.pending if self.pending is not None and self.pending.part == part else None


@dataclass
class _Correction:
    """A correction of stored outputs that is yet to be made: in place or, where a BatchNorm alone reads them, in it."""

    net: Network
    source: fx.Node
    gain: Tensor
    shift: Tensor
    axis: int
    part: int | None = None
    batchnorm: fx.Node | None = None

    def begin(self, part: int, stretch: _Part) -> None:
        """It is to be made in this part: see how. What the BatchNorm does then is one gain and one shift in all."""
        self.part = part
        readers = list(self.source.users)
        module = self.net.modules.get(str(readers[0].target)) if len(readers) == 1 else None
        if type(module) not in BATCHNORMS or not isinstance(module, _BatchNorm) or has_hooks(module):
            return
        if module.running_mean is None or module.running_var is None:
            return
        if readers[0] not in {step.node for step in stretch.steps}:
            return
        self.batchnorm = readers[0]
        scale = (module.running_var.double() + module.eps).rsqrt() * (1.0 if module.weight is None else module.weight)
        shift = (self.shift - module.running_mean) * scale + (0.0 if module.bias is None else module.bias)
        dtype = torch.float64 if module.running_mean.dtype == torch.float64 else torch.float32
        self.scale, self.offset = (x.to(dtype) for x in (self.gain * scale, shift))
        self.zero, self.one = torch.zeros_like(self.scale), torch.ones_like(self.scale)

    def through_batchnorm(self, x: Tensor) -> Tensor:
        """What the BatchNorm makes of the corrected outputs, in one pass over the uncorrected ones."""
        return nn.functional.batch_norm(x, self.zero, self.one, self.scale, self.offset, training=False, eps=0.0)


@dataclass(frozen=True)
class Step:
    """A node to run, and the values that nothing reads after it; `over`: into the memory of what it reads."""

    node: fx.Node
    gone: list[fx.Node]
    over: bool = False


@dataclass(frozen=True)
class _Part:
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


def _parts(
    graph: fx.Graph, net: Network, stops: Sequence[Stop], others: Mapping[str, fx.Node | None], is_dense: bool
) -> list[_Part]:
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
        parts.append(_Part(stop.name, source, _steps(net, inside, {*keep, source}), reads & earlier, keep))
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
        return net.place(batch()) if node.prev.op == "root" else node.args[0]
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


def _pooled(name: str, moments: Calls) -> Calls:
    """One set of moments for all batches, as a list of one; of none, none."""
    if not moments:
        return []
    pooled = ak.ChannelMoments.pool(moments)
    if not (pooled.mean.isfinite() & pooled.m2.isfinite()).all():
        check_finite(name, enumerate(moments))
    return [pooled]


def _bytes(values: Values) -> int:
    storages = [leaf.untyped_storage() for leaf in leaves(values.values()) if isinstance(leaf, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
