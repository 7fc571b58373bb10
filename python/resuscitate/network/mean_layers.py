"""Mean replacement: what was pruned is replaced by its mean, one number for a group, and the model stays sparse.

"Pruning on the fly" (arXiv 2212.12651) replaces pruned values by their mean; of that paper only the abstract was at
hand, and which values share a mean, and how it is stored, are ours. A group whose survivors are w and whose pruned
weights are all m is stored as w - m on the survivors, zero elsewhere, and the one number m:

    y = conv(x, w - m) + m * (sum of x over the group's window)

which a gain does not bring about, so no BatchNorm cancels it. The sum over the window of a whole filter is one map for
all filters; that of each input channel is one map a channel, and then one more 1x1 convolution.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import prune

from asr_kernels import CrossProducts, PatchMoments

from ..errors import ModelMismatchError
from ..methods.refit import Fit, fit
from .layers import (
    Selector,
    effective_weight,
    find_layers,
    refresh_weight,
    refuse_means,
    select_layers,
    stored_weight,
    unwrap,
)
from .masks import tied_layers
from .matching import same_layers

log = logging.getLogger("resuscitate")
Per = Literal["layer", "filter", "kernel"]
PER = ("layer", "filter", "kernel")


class _WithMeans(nn.Module):
    """A layer whose weight is `weight + means`, the latter of shape (1 or O, 1 or I / groups, 1, ...)."""

    means: nn.Parameter
    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)
        return out + self.of_means(x)

    def of_means(self, x: Tensor) -> Tensor:
        """What the means add to the output."""
        raise NotImplementedError


class _ConvWithMeans(_WithMeans):
    def of_means(self, x: Tensor) -> Tensor:
        assert isinstance(self, _ConvNd)
        axis, groups = -1 - len(self.kernel_size), self.groups
        conv: Any = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel_size) - 1]
        window: dict[str, Any] = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            window["padding"] = 0
        by_kernel = self.means.shape[1] > 1
        if not by_kernel:
            x = x.unflatten(axis, (groups, -1)).sum(axis)  # one map for each group
        maps = x.shape[axis]
        sums = conv(x, self.means.new_ones(maps, 1, *self.kernel_size), groups=maps, **window)
        if by_kernel:
            return conv(sums, self.means, groups=groups)
        share = self.out_channels // groups
        return sums.repeat_interleave(share, axis) * self.means.view(-1, *[1] * len(self.kernel_size))


class MeanConv1d(_ConvWithMeans, nn.Conv1d):
    """`nn.Conv1d` with means of its pruned weights."""


class MeanConv2d(_ConvWithMeans, nn.Conv2d):
    """`nn.Conv2d` with means of its pruned weights."""


class MeanConv3d(_ConvWithMeans, nn.Conv3d):
    """`nn.Conv3d` with means of its pruned weights."""


class MeanLinear(_WithMeans, nn.Linear):
    """`nn.Linear` with means of its pruned weights."""

    def of_means(self, x: Tensor) -> Tensor:
        return x.sum(-1, keepdim=True) * self.means.view(-1)


KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: MeanConv1d,
    nn.Conv2d: MeanConv2d,
    nn.Conv3d: MeanConv3d,
    nn.Linear: MeanLinear,
}
PLAIN = {kind: plain for plain, kind in KINDS.items()}


def can_carry(layer: nn.Module) -> bool:
    """Is it a kind of layer that means are made for?"""
    return type(layer) in KINDS


@torch.no_grad()
def replace_by_means(
    model: nn.Module,
    dense: nn.Module,
    *,
    per: Per = "filter",
    include: Iterable[Selector] | Selector | None = None,
    exclude: Iterable[Selector] | Selector | None = None,
) -> dict[str, int]:
    """Replace every pruned weight by the mean of the dense weights that were pruned with it, in place; no images.

    per: which share a mean: all of a "layer", of a "filter", or of a "kernel": a filter's window on one input channel
        (in 1x1 convolutions and linear layers, where that is a single weight, a filter).

    Returns how many numbers each layer now has more. Its stored weight is sparse as before; its class becomes
    `MeanConv2d` or the like, with a parameter `means`, a new key of the state dict. Transposed convolutions and
    subclasses of their own stay as they are, and are not named. `densify` makes plain layers of all.
    Raises ModelMismatchError where the dense model has other layers, LayerError for a layer that has means already.
    """
    if per not in PER:
        raise ValueError(f"per={per!r} is unknown; there are {', '.join(map(repr, PER))}")
    model, dense = unwrap(model), unwrap(dense)
    if dense is model:
        raise ModelMismatchError("dense is the pruned model itself; pass a copy made before pruning")
    selected = select_layers(model, include, exclude)
    refuse_means(selected)
    layers = {name: layer for name, layer in selected.items() if can_carry(layer)}
    same_layers(layers, dense)
    originals, counts = find_layers(dense), dict[str, int]()
    for name, names in tied_layers(layers).items():
        weight = effective_weight(name, layers[name])
        gone, original = weight == 0, effective_weight(name, originals[name]).to(weight)
        if not gone.any():
            continue
        axes = _axes(weight.shape, per)
        sums = (original.double() * gone).sum(axes, keepdim=True)
        means = sums / gone.sum(axes, keepdim=True).clamp(min=1)
        attach(name, layers[name], means, weight - means.to(weight.dtype))
        for other in names[1:]:
            carry(layers[other], layers[name].get_parameter("means"))
        counts[name] = means.numel()
    return counts


def _axes(shape: torch.Size, per: str) -> tuple[int, ...]:
    """The axes of a weight of this shape over which a mean is taken."""
    if per == "kernel" and shape[2:].numel() > 1:
        return tuple(range(2, len(shape)))
    return tuple(range(1 if per != "layer" else 0, len(shape)))


@torch.no_grad()
def attach(name: str, layer: nn.Module, means: Tensor, survivors: Tensor) -> None:
    """Make the layer one with means, stored as `survivors` where it is not zero now; means broadcast against it."""
    weight, in_use = stored_weight(name, layer), effective_weight(name, layer) != 0
    weight.copy_(torch.where(in_use, survivors.to(weight.dtype), weight))
    carry(layer, means)


def carry(layer: nn.Module, means: Tensor) -> None:
    """Make the layer one with means, or with the very parameter, whatever its weight is."""
    weight = layer._parameters.get("weight", layer._parameters.get("weight_orig"))
    assert weight is not None
    layer.__class__ = KINDS[type(layer)]
    if not isinstance(means, nn.Parameter):
        means = nn.Parameter(means.to(weight).contiguous(), requires_grad=weight.requires_grad)
    layer.register_parameter("means", means)
    refresh_weight(layer)


@torch.no_grad()
def densify(model: nn.Module, *, keep_zeros: bool = False) -> list[str]:
    """Make plain layers of all that carry means, in place, the same function to rounding; returns their names.

    keep_zeros: take the means out instead: survivors get back what they were, pruned weights are zero.
    """
    layers = {name: layer for name, layer in find_layers(unwrap(model)).items() if type(layer) in PLAIN}
    for names in tied_layers(layers).values():
        for index, name in enumerate(names):
            layer = layers[name]
            if "weight_mask" in layer._buffers:
                prune.remove(layer, "weight")
            weight, means = stored_weight(name, layer), layer._parameters.pop("means")
            assert means is not None
            if index == 0:
                weight.copy_(torch.where(weight != 0, weight + means, 0.0) if keep_zeros else weight + means)
            layer.__class__ = PLAIN[type(layer)]
    return list(layers)


def fit_with_means(
    moments: PatchMoments,
    weight: Tensor,
    support: Tensor,
    shape: torch.Size,
    per: str,
    aim: Callable[[Tensor, Tensor], CrossProducts] | None = None,
    **options: Any,
) -> tuple[Fit, Tensor]:
    """`refit.fit` with a mean for each filter, or kernel, found along with the survivors; `shape` is the weight's.

    The sums over windows are inputs like any other, x' = T x with T the identity over rows of ones, and all that least
    squares needs of them follows from the moments: mean' = T mean, C' = T C T'. Returns the fit, of survivors less
    means, and the means, broadcastable against the weight.
    """
    values, kernel = weight.shape[1], shape[2:].numel()
    by_kernel = per == "kernel" and kernel > 1
    inputs = values // kernel if by_kernel else 1
    rows = torch.eye(inputs).repeat_interleave(values // inputs, 1).to(weight.device, torch.float64)
    t = torch.cat([torch.eye(values, dtype=torch.float64, device=weight.device), rows])
    wide = replace(moments, mean=moments.mean @ t.mT, xx=t @ moments.xx @ t.mT, xy=t @ moments.xy)
    extra = weight.new_zeros(len(weight), inputs)

    def aim_wide(w: Tensor, bias: Tensor) -> CrossProducts:
        assert aim is not None
        found = aim(w @ t, bias)
        return replace(found, xy=t @ found.xy)

    weights, supports = torch.cat([weight, extra], 1), torch.cat([support, torch.ones_like(extra, dtype=torch.bool)], 1)
    found = fit(wide, weights, supports, aim=None if aim is None else aim_wide, **options)
    survivors, means = found.weight.split([values, inputs], 1)
    return replace(found, weight=survivors), means.reshape(len(weight), inputs, *[1] * (len(shape) - 2))


def may_carry(means: Tensor, layer: nn.Module) -> bool:
    """Are these means, of shape (1 or O, 1 or I / groups, 1, ...), for a plain layer like this?"""
    weight = layer._parameters.get("weight")
    if not can_carry(layer) or weight is None or means.dim() != weight.dim():
        return False
    return all(means.shape[axis] in (1, weight.shape[axis]) for axis in (0, 1)) and means.shape[2:].numel() == 1
