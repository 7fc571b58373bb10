"""What the ReLU behind a layer hides: an output that it cuts off need not be right, only low enough.

Least squares on the outputs of a layer spends much of its freedom on values that the next ReLU sets to zero. Where a
layer is read by relu(batchnorm(output) + other) alone, both parts optional, the wanted outputs are a convex set: what
the ReLU makes of them is to be what it makes of the dense ones. The refit then goes back and forth between the set and
the span of the inputs (in the manner of Zhang et al. 2015, arXiv 1505.06798, for responses behind a ReLU).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, fx
from torch.nn.modules.batchnorm import _BatchNorm

from asr_kernels import CrossProducts, PatchMoments, cross_products

from ..network.layers import BATCHNORMS
from ..network.operands import operands, product, with_batch_axis
from ..network.runner import Network, has_hooks
from ..network.wiring import Gate

FURTHEST = 4.0  # standard deviations of a channel that a hidden output may be away from the mean
IMAGES = 64  # at a time: little memory beside what the walk keeps
SUMS = {"call_function": (operator.add, operator.iadd, torch.add), "call_method": ("add", "add_")}

# of one batch: what the layer reads, what is added to its output, the dense output, and what is added to that
Seen = tuple[Tensor, Tensor | None, Tensor, Tensor | None]


def usable(gate: Gate | None, net: Network) -> bool:
    """Is there a gate, whose BatchNorm does what its statistics say, and no more (a subclass may)?"""
    if gate is None or gate.batchnorm is None:
        return gate is not None
    module = net.modules[gate.batchnorm]
    plain = type(module) in BATCHNORMS and not module.training and not has_hooks(module)
    return plain and getattr(module, "running_var", None) is not None


def aim(
    net: Network,
    dense: Network,
    name: str,
    gates: tuple[Gate, Gate],
    seen: Callable[[], Iterable[Seen]],
    weight: Tensor,
    bias: Tensor,
    patches: PatchMoments,
) -> CrossProducts:
    """See `Visit.aim`; `gates` are those of the layer in the pruned and in the dense network."""
    layer = net.modules[name]
    mean = patches.target.view(-1)
    reach = FURTHEST * (patches.yy.view(-1) / patches.count).sqrt()
    vectors = *_affine(net, gates[0], mean), *_affine(dense, gates[1], mean), mean - reach, mean + reach
    dtype = torch.float64 if net.dtype == torch.float64 else torch.float32
    goal = Goal(*(vector.to(dtype).view([-1] + [1] * (-1 - net.axis(name))) for vector in vectors))
    found = CrossProducts(*(torch.zeros_like(part) for part in (patches.xy, patches.target, patches.yy)))
    for batch in seen():
        parts = with_batch_axis(layer, *batch)
        chunks = [[None] * len(batch[0]) if part is None else part.split(IMAGES) for part in parts]
        for x, own, y, theirs in zip(*chunks, strict=False):
            read, window = operands(name, layer, x)
            wanted = goal.nearest(product(read, weight, bias, window), y, own, theirs)
            found += cross_products(read, wanted, window, patches.mean, patches.target)
    return found


class Goal:
    """The outputs y that a layer may have, for a ReLU to make of them what it makes of the dense ones:

        relu(scale * y + offset + own) = relu(dense_scale * wanted + dense_offset + theirs)

    or y = wanted where the right side is positive: what is added is not made up for. All tensors here are of one dtype
    and broadcast against y; no hidden y is taken below `least` or above `greatest`.
    """

    def __init__(
        self,
        scale: Tensor,
        offset: Tensor,
        dense_scale: Tensor,
        dense_offset: Tensor,
        least: Tensor,
        greatest: Tensor,
    ) -> None:
        self.scale, self.back, self.level = scale, -1 / scale, -offset / scale
        self.dense_scale, self.dense_offset, self.least, self.greatest = dense_scale, dense_offset, least, greatest
        self.rising, self.idle = bool((scale > 0).all()), bool((scale == 0).any())

    def nearest(self, now: Tensor, wanted: Tensor, own: Tensor | None, theirs: Tensor | None) -> Tensor:
        """Of these outputs those nearest to `now`, which is overwritten. own, theirs: None where nothing is added."""
        now, wanted = now.to(self.scale.dtype), wanted.to(self.scale.dtype)
        level = self.level if own is None else torch.mul(own, self.back).add_(self.level)
        if self.rising:
            low = torch.minimum(now, level, out=now)
        else:
            low = torch.where(self.scale > 0, torch.minimum(now, level), torch.maximum(now, level))
        sums = wanted * self.dense_scale
        hidden = (sums if theirs is None else sums.add_(theirs)) <= -self.dense_offset
        if self.idle:  # where a BatchNorm's weight is zero nothing depends on the layer
            hidden &= self.scale != 0
        return torch.where(hidden, low.clamp_(self.least, self.greatest), wanted)


def _affine(net: Network, gate: Gate, like: Tensor) -> tuple[Tensor, Tensor]:
    """Gain and shift (O,) of the BatchNorm."""
    if gate.batchnorm is None:
        return torch.ones_like(like), torch.zeros_like(like)
    module = net.modules[gate.batchnorm]
    assert isinstance(module, _BatchNorm)
    assert module.running_mean is not None
    assert module.running_var is not None
    scale = (module.running_var.double() + module.eps).rsqrt() * (1.0 if module.weight is None else module.weight)
    return scale.detach(), ((0.0 if module.bias is None else module.bias) - module.running_mean * scale).detach()


def other_node(graph: fx.Graph, gate: Gate, name: str) -> fx.Node | None:
    """What is added to the output of a layer with this gate, if anything: moved before the layer in the graph.

    Raises ValueError where that does not show in the graph.
    """
    if not gate.adds:
        return None
    layer = next(node for node in graph.nodes if node.op == "call_module" and node.target == name)
    behind = next(iter(layer.users)) if gate.batchnorm is not None else layer
    for node in behind.users:
        others = [source for source in node.all_input_nodes if source is not behind]
        if node.target in SUMS.get(node.op, ()) and len(others) == 1 and others[0].op != "get_attr":
            _bring_forward(graph, others[0], layer)
            return others[0]
    raise ValueError(f"the sum behind {name} does not show in the trace")


def _bring_forward(graph: fx.Graph, wanted: fx.Node, before: fx.Node) -> None:
    """Move `wanted`, and all that it needs, before a node, which it must not need."""
    place = {node: index for index, node in enumerate(graph.nodes)}
    needed, ahead = set[fx.Node](), [wanted]
    while ahead:
        node = ahead.pop()
        if node is before:
            raise ValueError(f"{wanted} needs {before}")
        if place[node] > place[before] and node not in needed:
            needed.add(node)
            ahead += node.all_input_nodes
    for node in sorted(needed, key=place.__getitem__):
        before.prepend(node)
