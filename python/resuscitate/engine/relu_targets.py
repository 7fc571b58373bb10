"""ReLU-equivalent targets: outputs of a layer that the ReLU behind it maps to the values of the dense network.

Least squares on the outputs of a layer spends much of its freedom on values that the next ReLU sets to zero. Where
relu(batchnorm(output) + other) alone reads a layer (both parts optional), all outputs that this ReLU maps to the dense
values are as good as the dense outputs. They are a convex set. The refit alternates between the nearest point of this
set and the span of the inputs (as Zhang et al. 2015, arXiv 1505.06798, do for responses before a ReLU).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, fx
from torch.nn.modules.batchnorm import _BatchNorm

from asr_kernels import CrossProducts, PatchMoments, cross_products

from ..network.channels import KeptChannels
from ..network.layers import gain_and_shift
from ..network.operands import operands, product, with_batch_axis
from ..network.runner import Network
from ..network.wiring import ReluConsumer
from ..utils.readout import read_numbers
from .deferred import is_mergeable

# standard deviations of a channel, from its mean: the bound on a target that the ReLU hides, so that none is infinite.
# At most one dense output in 10,000 lies beyond it (Chebyshev's inequality). A closer bound would move dense outputs
# that lie far out and have the largest weight in the fit
FURTHEST = 100.0
IMAGES = 64  # at a time, which takes little memory beside the activations of the walk
SUMS = {"call_function": (operator.add, operator.iadd, torch.add), "call_method": ("add", "add_")}

# of one batch: the layer's input, the tensor added to its output, the dense output, the tensor added to that
Seen = tuple[Tensor, Tensor | None, Tensor, Tensor | None]


def usable(consumers: Mapping[str, ReluConsumer], name: str, net: Network) -> bool:
    """Has the layer a ReLU consumer, whose BatchNorm is a plain one in eval mode (a subclass may compute otherwise)?"""
    consumer = consumers.get(name)
    return consumer is not None and (consumer.batchnorm is None or is_mergeable(net.modules[consumer.batchnorm]))


def rising(net: Network, consumers: Mapping[str, ReluConsumer]) -> dict[str, bool]:
    """By layer: has its BatchNorm no channel with a negative or zero weight? One wait for all layers."""
    batchnorms = {name: net.modules[each.batchnorm] for name, each in consumers.items() if each.batchnorm is not None}
    weights = {name: batchnorm._parameters["weight"] for name, batchnorm in batchnorms.items()}
    signs = read_numbers({name: (weight > 0).all() for name, weight in weights.items() if weight is not None})
    return {name: bool(signs.get(name, True)) for name in consumers}


def relu_equivalent_products(
    net: Network,
    dense: Network,
    name: str,
    consumers: Sequence[ReluConsumer],
    rises: bool,
    kept: KeptChannels,
    seen: Callable[[], Iterable[Seen]],
    weight: Tensor,
    bias: Tensor,
    patches: PatchMoments,
) -> CrossProducts:
    """The cross products of a layer's inputs with the ReLU-equivalent targets that are nearest to its outputs.

    weight, bias: those that make the outputs, in the layer's shape and (O,). `consumers`: those of the layer in the
    pruned and in the dense network; `rises`: the layer's value in `rising`; `kept`: the dense channels that it has.
    About the means of `patches`, the moments of the same inputs and the dense outputs.
    """
    layer = net.modules[name]
    mean = patches.target.view(-1)
    reach = FURTHEST * (patches.yy.view(-1) / patches.count).sqrt()
    affine = *_affine(net, consumers[0], mean), *_affine(dense, consumers[1], mean, partial(kept.of_outputs, name))
    vectors = *affine, mean - reach, mean + reach
    dtype = torch.float64 if net.dtype == torch.float64 else torch.float32
    shaped = (vector.to(dtype).view([-1] + [1] * (-1 - net.axis(name))) for vector in vectors)
    targets = ReluEquivalentTargets(*shaped, rising=rises)
    found = CrossProducts(*(torch.zeros_like(part) for part in (patches.xy, patches.target, patches.yy)))
    for batch in seen():
        wanted = [each if each is None else kept.of_outputs(name, each, net.axis(name)) for each in batch[2:]]
        parts = with_batch_axis(layer, *batch[:2], *wanted)
        chunks = [[None] * len(batch[0]) if part is None else part.split(IMAGES) for part in parts]
        for x, own, y, theirs in zip(*chunks, strict=False):
            read, window = operands(name, layer, x)
            nearest = targets.nearest(product(read, weight, bias, window), y, own, theirs)
            found += cross_products(read, nearest, window, patches.mean, patches.target)
    return found


class ReluEquivalentTargets:
    """The outputs y of a layer for which the ReLU gives the dense values:

        relu(scale * y + offset + own) = relu(dense_scale * wanted + dense_offset + theirs)

    Where the right side is positive y = wanted: errors of the added tensor are not compensated. All tensors are of one
    dtype and broadcast against y. A y that the ReLU sets to zero stays between `least` and `greatest`. `rising` says
    that every scale is positive, which saves time.
    """

    def __init__(
        self,
        scale: Tensor,
        offset: Tensor,
        dense_scale: Tensor,
        dense_offset: Tensor,
        least: Tensor,
        greatest: Tensor,
        *,
        rising: bool = False,
    ) -> None:
        self.scale, self.back, self.level = scale, -1 / scale, -offset / scale
        self.dense_scale, self.least, self.greatest, self.rising = dense_scale, least, greatest, rising
        # where a BatchNorm's weight is zero nothing depends on the layer, and no output is hidden
        self.bound = torch.where(scale == 0, -torch.inf, -dense_offset)

    def nearest(self, now: Tensor, wanted: Tensor, own: Tensor | None, theirs: Tensor | None) -> Tensor:
        """The targets nearest to `now`, which is overwritten. own, theirs: None where nothing is added."""
        now, wanted = now.to(self.scale.dtype), wanted.to(self.scale.dtype)
        level = self.level if own is None else torch.mul(own, self.back).add_(self.level)
        if self.rising:
            low = torch.minimum(now, level, out=now)
        else:
            low = torch.where(self.scale > 0, torch.minimum(now, level), torch.maximum(now, level))
        sums = wanted * self.dense_scale
        hidden = (sums if theirs is None else sums.add_(theirs)) <= self.bound
        return torch.where(hidden, low.clamp_(self.least, self.greatest), wanted)


def _affine(
    net: Network,
    consumer: ReluConsumer,
    like: Tensor,
    pick: Callable[[Tensor, int], Tensor] = lambda vector, axis: vector,
) -> tuple[Tensor, Tensor]:
    """Gain and shift (O,) of the BatchNorm; 1 and 0 without one. pick: the channels of the dense one to take."""
    if consumer.batchnorm is None:
        return torch.ones_like(like), torch.zeros_like(like)
    module = net.modules[consumer.batchnorm]
    assert isinstance(module, _BatchNorm)
    gain, shift = gain_and_shift(module)
    return pick(gain, 0), pick(shift, 0)


def added_node(graph: fx.Graph, consumer: ReluConsumer, name: str) -> fx.Node | None:
    """The node that is added to the output of a layer, if any; the graph is changed so that it runs before the layer.

    Raises ValueError where the graph does not show it.
    """
    if not consumer.adds:
        return None
    layer = next(node for node in graph.nodes if node.op == "call_module" and node.target == name)
    behind = next(iter(layer.users)) if consumer.batchnorm is not None else layer
    for node in behind.users:
        others = [source for source in node.all_input_nodes if source is not behind]
        if node.target in SUMS.get(node.op, ()) and len(others) == 1 and others[0].op != "get_attr":
            _bring_forward(graph, others[0], layer)
            return others[0]
    raise ValueError(f"the sum behind {name} does not show in the trace")


def _bring_forward(graph: fx.Graph, wanted: fx.Node, before: fx.Node) -> None:
    """Move `wanted`, and all nodes that it needs, before a node that it must not need."""
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
