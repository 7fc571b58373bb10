"""The walk through a network: stop at each module once all before it is final, with the moments of all the images.

`node_walk` runs node after node for all batches: one forward pass, however many stops. `prefix_walk` starts from the
images again for every stop; it serves models that torch.fx cannot trace and modules that are called more than once.
Both give the same answer for any split into batches, to rounding.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

import asr_kernels as ak

from .counting import count_images
from .errors import CalibrationError, LayerError, NonFiniteError
from .graph import Wiring, last_reads, trace
from .layers import LAYERS, channel_dim

log = logging.getLogger("resuscitate")


@dataclass
class Network:
    """A model, and how to run it on a batch."""

    model: nn.Module
    forward_fn: Callable[[nn.Module, Any], Any] | None = None
    modules: dict[str, nn.Module] = field(init=False)

    def __post_init__(self) -> None:
        self.modules = dict(self.model.named_modules())
        tensors = [*self.model.parameters(), *self.model.buffers()]
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self.dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)

    def place(self, batch: Tensor) -> Tensor:
        """A copy of the batch on the model's device and in its dtype; the caller's own is never written to."""
        return batch.detach().to(self.device, self.dtype if batch.is_floating_point() else None, copy=True)

    def run(self, batch: Any) -> Any:
        """The model's output for one batch."""
        return self.forward_fn(self.model, batch) if self.forward_fn else self.model(self.place(batch))


@dataclass(frozen=True)
class Stop:
    """A module to measure, over the first `batches` batches: a layer's output, or what a BatchNorm reads."""

    name: str
    batches: int


@dataclass
class Visit:
    """A stop that was reached while every earlier one is final.

    `calls` holds one set of moments for each call of the module in a forward pass. `correct(gain, shift)` must be
    told of any change that was made to the module's output, so that the next module sees it.
    """

    name: str
    calls: list[ak.ChannelMoments]
    correct: Callable[[Tensor, Tensor], None] = lambda gain, shift: None

    @property
    def moments(self) -> ak.ChannelMoments:
        """The moments of all calls together."""
        return pool(self.calls)


class _ReachedError(BaseException):
    """Ends a forward pass early. Not an Exception, lest a model's own handler take it."""


def pool(calls: Iterable[ak.ChannelMoments]) -> ak.ChannelMoments:
    """Merge moments, in order."""
    return reduce(lambda a, b: a.merge(b), calls)


def measure(
    net: Network, batches: Sequence[Any], names: Iterable[str], last: tuple[str, int] | None = None
) -> dict[str, list[ak.ChannelMoments]]:
    """Moments at each named module, one per call, over all batches, as the network is now: one pass per batch.

    `last=(name, calls)` ends each pass once that module has been called so often. Raises NonFiniteError.
    """
    found: dict[str, list[ak.ChannelMoments]] = {name: [] for name in names}
    for index, batch in enumerate(batches):
        turns: Counter[str] = Counter()

        def take(name: str, x: Tensor, index: int = index, turns: Counter[str] = turns) -> None:
            new, calls, turn = _moments(net, name, x, index), found[name], turns[name]
            calls[turn : turn + 1] = [calls[turn].merge(new) if turn < len(calls) else new]
            turns[name] += 1
            if last == (name, turns[name]):
                raise _ReachedError

        with _hooks(net, found, take), suppress(_ReachedError):
            net.run(batch)
    return found


def prefix_walk(net: Network, batches: Sequence[Any], stops: Sequence[Stop], wiring: Wiring) -> Iterator[Visit]:
    """Visit `stops`, in the order of their first calls, by one early-stopped pass over the images for each."""
    for stop in stops:
        last = (stop.name, wiring.calls[stop.name])
        yield Visit(stop.name, measure(net, batches[: stop.batches], [stop.name], last)[stop.name])


def node_walk(net: Network, graph: fx.Graph, batches: Sequence[Tensor], stops: Sequence[Stop]) -> Iterator[Visit]:
    """Visit `stops` by running each node of `graph` for all batches before the next node: one pass over the images.

    Every stop's module must be called once. A value is dropped after its last reader.
    """
    pending = {stop.name: stop for stop in stops}
    dying = last_reads(graph)
    values: dict[fx.Node, list[Any]] = {}
    for node in graph.nodes:
        stop = pending.pop(str(node.target), None) if node.op == "call_module" else None
        before = stop is not None and isinstance(net.modules[stop.name], _BatchNorm)
        if stop is not None and before:
            yield _visit(net, stop, values[node.args[0]])
        values[node] = [_evaluate(net, node, values, index, batch) for index, batch in enumerate(batches)]
        if stop is not None and not before:
            yield _visit(net, stop, values[node])
        for gone in dying[node]:
            values.pop(gone, None)
        if not pending:
            return


def screen(nets: Sequence[Network], batches: Sequence[Any]) -> tuple[list[Any], int]:
    """The batches without the images that give a NaN or infinite activation in any network; how many those were.

    The networks are taken as they are. An opaque batch (not a tensor) goes whole.
    """
    kept, skipped = [], 0
    for batch in batches:
        images = count_images(batch)
        good = torch.ones(images, dtype=torch.bool)

        def take(name: str, x: Tensor, good: Tensor = good) -> None:
            finite = x.isfinite().flatten(1).all(1).cpu() if x.dim() > 1 else x.isfinite().all().cpu()
            good &= finite if finite.shape == good.shape else finite.all()

        for net in nets:
            with _hooks(net, [n for n, m in net.modules.items() if isinstance(m, (*LAYERS, _BatchNorm))], take):
                net.run(batch)
        if not isinstance(batch, Tensor):
            good &= good.all()
        skipped += images - int(good.sum())
        if good.all():
            kept.append(batch)
        elif good.any():
            kept.append(batch[good.to(batch.device)])
    if not kept:
        raise CalibrationError(f"all {skipped} images give NaN or infinite activations")
    return kept, skipped


def traceable(net: Network, batch: Any, wiring: Wiring, stops: Sequence[Stop]) -> fx.Graph | None:
    """The graph for `node_walk`, or None, with the cause logged, where only `prefix_walk` is right.

    The traced network must give the model's own output on the first batch.
    """
    cause = None
    if net.forward_fn is not None:
        cause = "a forward_fn hides the network's input"
    elif repeated := [stop.name for stop in stops if wiring.calls[stop.name] > 1]:
        cause = f"{repeated[0]} is called {wiring.calls[repeated[0]]} times in a forward pass"
    elif hooked := [n for n, m in net.modules.items() if _has_hooks(m) and not isinstance(m, (*LAYERS, _BatchNorm))]:
        cause = f"{hooked[0] or 'the model'} carries a forward hook"
    else:
        try:
            graph = trace(net.model)
            called = [str(node.target) for node in graph.nodes if node.op == "call_module"]
            if hidden := [stop.name for stop in stops if called.count(stop.name) != 1]:
                cause = f"{hidden[0] or 'the model itself'} does not show in the trace"
            elif _same_output(fx.GraphModule(net.model, graph)(net.place(batch)), net.run(batch)):
                return graph
            else:
                cause = "the traced network's output differs from the model's"
        except Exception as error:
            cause = f"torch.fx cannot trace it ({type(error).__name__}: {error})"
    log.warning("walking by prefixes, one pass over the images per layer: %s", cause)
    return None


def _visit(net: Network, stop: Stop, values: list[Tensor]) -> Visit:
    def correct(gain: Tensor, shift: Tensor) -> None:
        for value in values:
            ak.affine_(value, gain, shift, channel_dim(net.modules[stop.name]))

    moments = pool(_moments(net, stop.name, value, index) for index, value in enumerate(values[: stop.batches]))
    return Visit(stop.name, [moments], correct)


def _evaluate(net: Network, node: fx.Node, values: dict[fx.Node, list[Any]], index: int, batch: Tensor) -> Any:
    if node.op == "placeholder":
        return net.place(batch) if node.prev.op == "root" else node.args[0]
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: values[source][index])
    if node.op == "call_module":
        return net.model.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "get_attr":
        return reduce(getattr, str(node.target).split("."), net.model)
    return node.target(*args, **kwargs) if callable(node.target) else args[0]


def _moments(net: Network, name: str, x: Any, index: int) -> ak.ChannelMoments:
    module = net.modules[name]
    if not isinstance(x, Tensor):
        raise LayerError(name, f"its output is a {type(x).__name__}, not a tensor; exclude it")
    moments = ak.channel_moments(x, 1 if isinstance(module, _BatchNorm) else channel_dim(module))
    if not (moments.mean.isfinite() & moments.m2.isfinite()).all():
        raise NonFiniteError(
            name,
            index,
            f"{int((~x.isfinite()).sum())} activations are NaN or infinite, or their squares overflow; look at the "
            "images, try a wider dtype, or leave such images out with on_nonfinite='skip'",
        )
    return moments


@contextmanager
def _hooks(net: Network, names: Iterable[str], take: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Hand what each named BatchNorm reads, and what each named layer puts out, to `take`."""
    handles = []
    for name in names:
        module = net.modules[name]
        if isinstance(module, _BatchNorm):
            handles.append(module.register_forward_pre_hook(lambda m, args, name=name: take(name, args[0])))
        else:
            handles.append(module.register_forward_hook(lambda m, args, out, name=name: take(name, out)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _same_output(a: Any, b: Any) -> bool:
    pairs = list(zip(tree_leaves(a), tree_leaves(b), strict=False))
    return len(tree_leaves(a)) == len(tree_leaves(b)) and all(
        torch.allclose(x, y, rtol=1e-4, atol=1e-6, equal_nan=True) if isinstance(x, Tensor) else x == y
        for x, y in pairs
    )
