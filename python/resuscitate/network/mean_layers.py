"""Mean replacement: the pruned weights of a group are replaced by their mean; the stored weight stays sparse.

"Pruning on the fly" (arXiv 2212.12651) replaces pruned values by their mean. Only the abstract of that paper was
available: which weights form a group, and how the mean is stored, is this project's choice. A group with survivors w
and mean m of its pruned weights is stored as w - m on the survivors, zero elsewhere, and the number m:

    y = conv(x, w - m) + m * (sum of x over the group's window)

A gain cannot produce the second term, so no BatchNorm cancels it. With one mean per filter, the sum over the window is
one map for all filters. With one mean per kernel, it is one map per input channel, followed by a 1x1 convolution.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import prune

from ..errors import ModelMismatchError
from ..runtime.options import check_choice
from .layer_checks import same_layers
from .layers import (
    Selection,
    check_writable,
    effective_weight,
    refresh_weight,
    refuse_means,
    select_layers,
    stored_weight,
    unwrap,
)
from .masks import tied_layers

Per = Literal["layer", "filter", "kernel"]
PER = get_args(Per)


class _WithMeans(nn.Module):
    """A layer with the weight `weight + means`, where means has the shape (1 or O, 1 or I / groups, 1, ...)."""

    means: nn.Parameter
    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.mean_term(x)

    def mean_term(self, x: Tensor) -> Tensor:
        """The part of the output that the means contribute."""
        if not isinstance(self, _ConvNd):
            return x.sum(-1, keepdim=True) * self.means.view(-1)
        axis, groups = -1 - len(self.kernel_size), self.groups
        conv: Any = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel_size) - 1]
        window: dict[str, Any] = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            window["padding"] = 0
        if not (by_kernel := self.means.shape[1] > 1):
            x = x.unflatten(axis, (groups, -1)).sum(axis)  # one map per group
        maps = x.shape[axis]
        sums = conv(x, self.means.new_ones(maps, 1, *self.kernel_size), groups=maps, **window)
        if by_kernel:
            return conv(sums, self.means, groups=groups)
        means = self.means.view(-1, *[1] * len(self.kernel_size))
        return sums.repeat_interleave(self.out_channels // groups, axis) * means


class MeanConv1d(_WithMeans, nn.Conv1d):
    """`nn.Conv1d` with means of its pruned weights."""


class MeanConv2d(_WithMeans, nn.Conv2d):
    """`nn.Conv2d` with means of its pruned weights."""


class MeanConv3d(_WithMeans, nn.Conv3d):
    """`nn.Conv3d` with means of its pruned weights."""


class MeanLinear(_WithMeans, nn.Linear):
    """`nn.Linear` with means of its pruned weights."""


KINDS: dict[type[nn.Module], type[nn.Module]]
KINDS = {nn.Conv1d: MeanConv1d, nn.Conv2d: MeanConv2d, nn.Conv3d: MeanConv3d, nn.Linear: MeanLinear}
PLAIN = {kind: plain for plain, kind in KINDS.items()}


def can_have_means(layer: nn.Module) -> bool:
    """Is there a mean layer for the type of this layer?"""
    return type(layer) in KINDS


@torch.no_grad()
def replace_by_means(
    model: nn.Module, dense: nn.Module, *, per: Per = "filter", include: Selection = None, exclude: Selection = None
) -> dict[str, int]:
    """Replace every pruned weight by the mean of the pruned weights' dense values, in place; needs no images.

    per: the weights that share a mean: those of a "layer", of a "filter", or of a "kernel", a filter's window on one
        input channel (in 1x1 convolutions and linear layers, where a window is a single weight, of a filter).

    Returns the number of means by layer. The stored weight stays sparse; the layer's class becomes `MeanConv2d` or the
    like, with a parameter `means`, a new key of the state dict. Transposed convolutions and subclasses of the layer
    types are unchanged and not in the result. `densify` turns mean layers into plain ones.
    Raises ModelMismatchError where the dense model has other layers, LayerError for a layer that has means already.
    """
    check_choice("per", per, PER)
    model, dense = unwrap(model), unwrap(dense)
    if dense is model:
        raise ModelMismatchError("dense is the pruned model itself; pass a copy made before pruning")
    check_writable(model)
    selected = select_layers(model, include, exclude)
    refuse_means(selected)
    layers = {name: layer for name, layer in selected.items() if can_have_means(layer)}
    same_layers(layers, dense)
    counts = dict[str, int]()
    for name, names in tied_layers(layers).items():
        weight, stored = effective_weight(name, layers[name]), stored_weight(name, layers[name])
        pruned = weight == 0
        if not pruned.any():
            continue
        means = means_of_pruned(effective_weight(name, dense.get_submodule(name)).to(weight), pruned, per)
        stored.copy_(torch.where(pruned, stored, weight - means.to(weight.dtype)))
        counts[name] = means.numel()
        for each in names:  # the layers share one Parameter
            to_mean_layer(layers[each], means)
            means = layers[each].get_parameter("means")
    return counts


def means_of_pruned(dense: Tensor, pruned: Tensor, per: str) -> Tensor:
    """The mean dense weight over the pruned weights of each group, float64, broadcastable against the weight."""
    first = {"layer": 0, "filter": 1, "kernel": 2 if dense.shape[2:].numel() > 1 else 1}[per]
    axes = tuple(range(first, dense.dim()))
    sums = (dense.double() * pruned).sum(axes, keepdim=True)
    return sums / pruned.sum(axes, keepdim=True).clamp(min=1)


def to_mean_layer(layer: nn.Module, means: Tensor) -> None:
    """Make the layer a mean layer, in place, with its weight unchanged; layers can share means that are a Parameter."""
    weight = stored_weight("", layer)
    layer.__class__ = KINDS[type(layer)]
    if not isinstance(means, nn.Parameter):
        means = nn.Parameter(means.to(weight).contiguous(), requires_grad=weight.requires_grad)
    layer.register_parameter("means", means)
    refresh_weight(layer)


@torch.no_grad()
def densify(model: nn.Module, *, keep_zeros: bool = False) -> list[str]:
    """Turn mean layers into plain layers, in place, with the same outputs up to rounding; returns their names.

    A function of the model that reads the weight of a mean layer itself, as a tied decoder does, then reads another.
    keep_zeros: remove the means instead: survivors get back their values, pruned weights are zero.
    """
    layers = {name: layer for name, layer in unwrap(model).named_modules() if type(layer) in PLAIN}
    for first, names in tied_layers(layers).items():
        for name in names:
            layer = layers[name]
            if "weight_mask" in layer._buffers:
                prune.remove(layer, "weight")
            weight, means = stored_weight(name, layer), layer.get_parameter("means")
            if name == first:
                weight.copy_(torch.where(weight != 0, weight + means, 0.0) if keep_zeros else weight + means)
            del layer._parameters["means"]
            layer.__class__ = PLAIN[type(layer)]
    return list(layers)


def means_fit(means: Tensor, layer: nn.Module) -> bool:
    """Do these means have the shape (1 or O, 1 or I / groups, 1, ...) for this plain layer?"""
    weight = layer._parameters.get("weight")
    if not can_have_means(layer) or weight is None or means.dim() != weight.dim():
        return False
    return all(means.shape[axis] in (1, weight.shape[axis]) for axis in (0, 1)) and means.shape[2:].numel() == 1
