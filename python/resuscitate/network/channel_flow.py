"""Which channels of a network are coupled: those that reach one another without a layer that mixes them.

They are found for any control flow from derivatives. In one forward pass the output of each layer and of each norm is
replaced by a variable. Where the derivative of input channel j of a later layer with respect to output channel k is not
zero, and no other input channel of that layer depends on k at this position, the two are one channel.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from .channels import width
from .comparison import trial_copy
from .layers import LAYERS, channel_dim
from .runner import Network

EXACT = 1e-5  # bound on the relative error of derivatives in float32


class Axis(NamedTuple):
    """The output or the input channels of a module. A channelwise module has output channels only."""

    module: str
    side: Literal["out", "in"]


Signature = tuple[tuple[Axis, int], ...]
Tables = dict[Axis, Tensor]  # int64 (units, k): row u holds the channels on this axis that belong to unit u


def is_norm(module: nn.Module) -> bool:
    """Is this a norm with parameters for each channel, of a kind whose channel axis is known?"""
    if isinstance(module, nn.LayerNorm):
        return type(module) is nn.LayerNorm and len(module.normalized_shape) == 1
    return isinstance(module, (_NormBase, nn.GroupNorm))


def channelwise_modules(model: nn.Module) -> set[str]:
    """Norms, and depthwise convolutions: output channel k of such a module is coupled with input channel k."""
    return {name for name, module in model.named_modules() if is_norm(module) or _is_depthwise(module)}


def channel_labels(
    model: nn.Module, channelwise: Collection[str], batch: Any, forward_fn: Callable[[nn.Module, Any], Any] | None
) -> dict[Axis, Tensor]:
    """For each axis that a forward pass reaches, int64 (channels,): coupled channels have the same label.

    channelwise: the modules to treat as channelwise. The model must be in eval mode, and is unchanged. Raises what its
    forward pass raises.
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
        net.run(batch)
    return flow.labels()


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
        self.variables: list[tuple[Axis, int, Tensor]] = []  # with the axis of the channels in the tensor
        self.pairs: list[tuple[Axis, Axis, Tensor]] = []
        self.axes: dict[Axis, int] = {}  # the number of channels
        self.generator = torch.Generator().manual_seed(0)

    def read(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        axis = Axis(name, "out" if name in self.channelwise else "in")
        self.axes.setdefault(axis, width(module, axis.side))
        x, dim = next(iter((*args, *kwargs.values())), None), _channel_dim(module)
        if not isinstance(x, Tensor) or not x.requires_grad or not self.variables:
            return
        count = x.shape[dim]
        ones, index = torch.ones(count), torch.arange(1.0, count + 1)
        noise = torch.rand(count, generator=torch.Generator().manual_seed(0)) + 0.5
        variables = [variable for _, _, variable in self.variables]
        found = []
        for weights in (ones, index, noise):
            along = weights.to(x).view([-1 if d == dim % x.dim() else 1 for d in range(x.dim())]).expand_as(x)
            found.append(torch.autograd.grad(x, variables, along, retain_graph=True, allow_unused=True))
        for (source, source_dim, _), one, by_index, by_noise in zip(self.variables, *found, strict=True):
            if one is not None and by_index is not None and by_noise is not None:
                pairs = _arrivals(source_dim, one, by_index, by_noise, noise.to(one))
                self.pairs.append((source, axis, pairs))

    def write(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        self.axes.setdefault(Axis(name, "out"), width(module, "out"))
        # values for which no usual activation function has a derivative of zero
        variable = (0.2 + 0.6 * torch.rand(output.shape, generator=self.generator)).to(output).requires_grad_()
        self.variables.append((Axis(name, "out"), _channel_dim(module), variable))
        return variable * 1  # no leaf, so that an operator may overwrite it

    def labels(self) -> dict[Axis, Tensor]:
        """The smallest number of a channel, over all axes, that each channel is coupled with."""
        starts, total = {}, 0
        for axis, count in self.axes.items():
            starts[axis], total = total, total + count
        edges = [torch.stack([starts[a] + pairs[0], starts[b] + pairs[1]]).cpu() for a, b, pairs in self.pairs]
        one, other = torch.cat([torch.empty(2, 0, dtype=torch.int64), *edges], 1)
        labels, before = torch.arange(total), None
        while before is None or not torch.equal(labels, before):
            before, least = labels, torch.minimum(labels[one], labels[other])
            labels = labels.scatter_reduce(0, one, least, "amin").scatter_reduce(0, other, least, "amin")
            labels = labels[labels]
        return {axis: labels[start : start + self.axes[axis]] for axis, start in starts.items()}


def _arrivals(dim: int, one: Tensor, by_index: Tensor, by_noise: Tensor, noise: Tensor) -> Tensor:
    """Pairs (2, P) of output channel, on axis `dim` of the variable, and the input channel that it alone becomes.

    The derivatives of sums over all input channels j with the weights 1, j + 1 and noise[j].
    """
    place = (by_index / one).round()
    alone = (one != 0) & (place >= 1) & (place <= len(noise))
    place = place.where(alone, 1.0).long() - 1
    for found, expected in ((by_index, (place + 1) * one), (by_noise, noise[place] * one)):
        alone &= (found - expected).abs() <= EXACT * expected.abs()
    place, alone = (each.movedim(dim, 0).flatten(1) for each in (place, alone))
    first, last = place.where(alone, len(noise)).amin(1), place.where(alone, -1).amax(1)
    channels = torch.arange(len(place), device=place.device)
    if bool(((first == last) | (last < 0)).all()):
        arrives = last >= 0
        return torch.stack([channels[arrives], last[arrives]])
    pairs = (channels[:, None] * len(noise) + place)[alone].unique()
    return torch.stack([pairs // len(noise), pairs % len(noise)])


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd) and 1 < module.groups == module.in_channels == module.out_channels


def _channel_dim(module: nn.Module) -> int:
    """The axis of the channels in a module's input and output."""
    return 1 if isinstance(module, (_NormBase, nn.GroupNorm)) else channel_dim(module)
