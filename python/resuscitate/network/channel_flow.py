"""Which channels of a network are coupled: those that reach one another without a layer that mixes them.

They are found for any control flow from derivatives. In one forward pass the output of each layer and of each norm is
replaced by a variable. Where the derivative of input channel j of a later layer with respect to output channel k is not
zero, and no other input channel of that layer depends on k at this position, the two are one channel. So they are where
each of several pieces of the input has one such channel at most: it is a concatenation with copies.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .channels import Side, width
from .copies import trial_copy
from .layers import LAYERS, channel_dim, is_depthwise
from .runner import Network

EXACT = 1e-5  # bound on the relative error of derivatives in float32
PIECES = (1, 2, 4, 8)  # numbers of pieces of a layer's input to look at one by one
NONE, SEVERAL = -1, -2


class Axis(NamedTuple):
    """The output or the input channels of a module. A channelwise module has output channels only."""

    module: str
    side: Side


Source = tuple[Axis, int, Tensor]  # a variable, with the axis of the channels in the tensor
Signature = tuple[tuple[Axis, int], ...]
Tables = dict[Axis, Tensor]  # int64 (units, k): row u holds the channels on this axis that belong to unit u


def is_norm(module: nn.Module) -> bool:
    """Is this a norm or a PReLU with parameters for each channel, of a kind whose channel axis is known?"""
    if isinstance(module, nn.LayerNorm):
        return type(module) is nn.LayerNorm and len(module.normalized_shape) == 1
    return isinstance(module, (_NormBase, nn.GroupNorm)) or (isinstance(module, nn.PReLU) and module.num_parameters > 1)


def channelwise_modules(model: nn.Module) -> set[str]:
    """Norms, and depthwise convolutions: output channel k of such a module is coupled with input channel k."""
    return {name for name, module in model.named_modules() if is_norm(module) or is_depthwise(module)}


def channel_labels(
    model: nn.Module, channelwise: Collection[str], batch: Any, forward_fn: Callable[[nn.Module, Any], Any] | None
) -> dict[Axis, Tensor]:
    """For each axis that two forward passes reach, int64 (channels,): coupled channels have the same label.

    channelwise: the modules to treat as channelwise. The model must be in eval mode, and is unchanged. Raises what its
    forward passes raise.
    """
    net = Network(model, forward_fn)
    if torch.promote_types(net.dtype, torch.float32) != net.dtype:
        net = Network(trial_copy(model), forward_fn)
    flow = _Flow(net, channelwise)
    with torch.enable_grad(), ExitStack() as hooks:
        for name, module in net.modules.items():
            if isinstance(module, LAYERS) or name in channelwise:
                hooks.enter_context(module.register_forward_pre_hook(partial(flow.read, name), with_kwargs=True))
                hooks.enter_context(module.register_forward_hook(partial(flow.write, name)))
        for flow.sign in (1, -1):  # relu(x) and relu(-x)
            net.run(batch)
            flow.variables.clear()
    return flow.labels()


def join_channels(labels: Mapping[Axis, Tensor], pairs: Iterable[tuple[Axis, Axis, Tensor]]) -> dict[Axis, Tensor]:
    """The labels after pairs of channels (2, P), on two axes, are coupled too: the least of those coupled."""
    edges = [torch.stack([labels[a][one], labels[b][other]]) for a, b, (one, other) in pairs]
    one, other = torch.cat([torch.empty(2, 0, dtype=torch.int64), *edges], 1)
    least, before = torch.arange(1 + max((int(found.max()) for found in labels.values()), default=0)), None
    while before is None or not torch.equal(least, before):
        before, both = least, torch.minimum(least[one], least[other])
        least = least.scatter_reduce(0, one, both, "amin").scatter_reduce(0, other, both, "amin")
        least = least[least]
    return {axis: least[found] for axis, found in labels.items()}


def coupled_units(labels: Mapping[Axis, Tensor]) -> dict[Signature, Tables]:
    """Units of coupled channels. Those with the same number of channels on the same axes are in one table."""
    members: dict[int, dict[Axis, list[int]]] = defaultdict(dict)
    for axis, found in labels.items():
        for channel, label in enumerate(found.tolist()):
            members[label].setdefault(axis, []).append(channel)
    alike: dict[Signature, list[dict[Axis, list[int]]]] = defaultdict(list)
    for unit in members.values():
        alike[tuple((axis, len(channels)) for axis, channels in unit.items())].append(unit)
    return {
        signature: {axis: torch.tensor([unit[axis] for unit in units]) for axis, _ in signature}
        for signature, units in alike.items()
    }


class _Flow:
    """Replaces outputs by variables, and collects pairs of coupled channels."""

    def __init__(self, net: Network, channelwise: Collection[str]) -> None:
        self.net, self.channelwise = net, channelwise
        self.variables: list[Source] = []
        self.pairs: list[tuple[Axis, Axis, Tensor]] = []
        self.axes: dict[Axis, int] = {}  # the number of channels
        self.sign = 1
        self.generator = torch.Generator().manual_seed(0)

    def read(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        axis = Axis(name, "out" if name in self.channelwise else "in")
        x, dim = next(iter((*args, *kwargs.values())), None), _channel_dim(module)
        # a norm without parameters takes any number of channels, whatever its `num_features`
        self.axes.setdefault(axis, x.shape[dim] if isinstance(x, Tensor) else width(module, axis.side))
        if not isinstance(x, Tensor) or not x.requires_grad or not self.variables:
            return
        sources = self.variables
        for pieces in PIECES:
            if sources and x.shape[dim] >= pieces * (pieces // 2):  # a layer with few channels may mix all of them
                sources = self._follow(axis, x, dim % x.dim(), sources, pieces)

    def _follow(self, axis: Axis, x: Tensor, dim: int, sources: list[Source], pieces: int) -> list[Source]:
        """Collect pairs of channels of the sources and of x, and return the sources with more places than are found.

        A channel that becomes several channels of x, by a concatenation with itself, is alone in each piece of x.
        """
        count, variables = x.shape[dim], [variable for _, _, variable in sources]
        noise = torch.rand(count, generator=torch.Generator().manual_seed(0)) + 0.5
        places: list[list[Tensor]] = [[] for _ in sources]
        for piece in range(pieces):
            inside = torch.arange(count) * pieces // count == piece
            sums = []
            for weights in (torch.ones(count), torch.arange(1.0, count + 1), noise):
                along = (weights * inside).to(x).view([-1 if d == dim else 1 for d in range(x.dim())]).expand_as(x)
                sums.append(torch.autograd.grad(x, variables, along, retain_graph=True, allow_unused=True))
            for found, one, by_index, by_noise in zip(places, *sums, strict=True):
                if one is not None and by_index is not None and by_noise is not None:
                    found.append(_places(one, by_index, by_noise, noise.to(one)))
        unknown = []
        for source, found in zip(sources, places, strict=True):
            if found:
                several = torch.stack(found).eq(SEVERAL).any(0)
                unknown += [source] if bool(several.any()) else []
                for place in found:
                    pairs = _pairs(place.masked_fill_(several, NONE).movedim(source[1], 0).flatten(1), count)
                    self.pairs.append((source[0], axis, pairs.cpu()))
        return unknown

    def write(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        self.axes.setdefault(Axis(name, "out"), output.shape[_channel_dim(module)])
        # values for which no usual activation function has a derivative of zero
        values = self.sign * (0.2 + 0.6 * torch.rand(output.shape, generator=self.generator))
        variable = values.to(output).requires_grad_()
        self.variables.append((Axis(name, "out"), _channel_dim(module), variable))
        return variable * 1  # no leaf, so that an operator may overwrite it

    def labels(self) -> dict[Axis, Tensor]:
        every = torch.arange(sum(self.axes.values())).split([*self.axes.values()])
        return join_channels(dict(zip(self.axes, every, strict=True)), self.pairs)


def _places(one: Tensor, by_index: Tensor, by_noise: Tensor, noise: Tensor) -> Tensor:
    """The input channel that each element of a variable becomes, or NONE, or SEVERAL; int64.

    The derivatives of sums over all input channels j with the weights 1, j + 1 and noise[j].
    """
    place = (by_index / one).round()
    alone = (one != 0) & (place >= 1) & (place <= len(noise))
    place = place.where(alone, 1.0).long() - 1
    for found, expected in ((by_index, (place + 1) * one), (by_noise, noise[place] * one)):
        alone &= (found - expected).abs() <= EXACT * expected.abs()
    reaches = (one != 0) | (by_index != 0) | (by_noise != 0)
    return place.where(alone, NONE).masked_fill_(reaches & ~alone, SEVERAL)


def _pairs(place: Tensor, count: int) -> Tensor:
    """Pairs (2, P) of output channel and input channel, from the input channels, or NONE, of each output channel."""
    first, last = place.where(place >= 0, count).amin(1), place.amax(1)
    channels = torch.arange(len(place), device=place.device)
    if bool(((first == last) | (last < 0)).all()):
        return torch.stack([channels, last])[:, last >= 0]
    pairs = (channels[:, None] * count + place)[place >= 0].unique()
    return torch.stack([pairs // count, pairs % count])


def _channel_dim(module: nn.Module) -> int:
    """The axis of the channels in a module's input and output."""
    return 1 if isinstance(module, (_NormBase, nn.GroupNorm, nn.PReLU)) else channel_dim(module)
