"""Which channels of a dense network a structurally smaller copy of it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

import asr_kernels as ak

from ..errors import ModelMismatchError, called
from .layers import LAYERS, effective_weight, out_channels

Side = Literal["out", "in"]  # the output or the input channels of a module


@dataclass(frozen=True)
class KeptChannels:
    """By module, int64 (C,): channel i of the small module is channel kept[i] of the dense one; none: all, in order.

    `outputs` of layers and norms, `inputs` of layers (those of all groups of a convolution, in order).
    """

    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    def notes(self, small: nn.Module, dense: nn.Module) -> list[str]:
        """One line on what was found, for a report; none where both networks have the same channels."""
        fewer = [name for name in self.outputs if isinstance(small.get_submodule(name), LAYERS)]
        if not fewer:
            return []
        kept, whole = (sum(width(net.get_submodule(name), "out") for name in fewer) for net in (small, dense))
        return [f"{len(fewer)} layers have {kept:,} of the {whole:,} channels of the dense network"]

    def of_outputs(self, name: str, x: Tensor, axis: int) -> Tensor:
        """The kept part of a tensor that has the output channels of a dense module on an axis."""
        kept = self.outputs.get(name)
        return x if kept is None else x.index_select(axis, kept.to(x.device))

    def of_moments(self, name: str, calls: list[ak.ChannelMoments]) -> list[ak.ChannelMoments]:
        """The kept part of moments of the outputs of a dense module."""
        return [
            ak.ChannelMoments(each.count, *(self.of_outputs(name, part, 0) for part in (each.mean, each.m2)))
            for each in calls
        ]

    def of_weight(self, name: str, small: nn.Module, dense: nn.Module) -> Tensor:
        """The dense weights between kept channels, in the shape of the small layer's weight.

        Raises ModelMismatchError where the input channels of the layer are not known.
        """
        weight, shape = effective_weight(name, dense), effective_weight(name, small).shape
        if name not in self.outputs and name not in self.inputs and weight.shape == shape:
            return weight
        full = self.of_outputs(name, full_weight(dense, weight), 0)
        full = full if name not in self.inputs else full.index_select(1, self.inputs[name].to(full.device))
        if full.shape[1] != width(small, "in"):
            raise ModelMismatchError(f"which of the dense input channels {called(name)} reads is not clear; exclude it")
        return by_group(small, full).reshape(shape)

    def blocks_of_inputs(self, name: str, dense: nn.Module, count: int) -> list[Any]:
        """The input channels of a dense layer in blocks, each with as many kept ones, in order, and some others."""
        kept, channels = self.inputs.get(name), width(dense, "in")
        if kept is None:
            size = channels // count
            return [slice(start, start + size) for start in range(0, channels, size)]
        every = torch.arange(channels, device=kept.device)
        others = every[~torch.isin(every, kept)].tensor_split(count)
        return [torch.cat(pair) for pair in zip(kept.chunk(count), others, strict=True)]


def width(module: nn.Module, side: Side) -> int:
    """The number of output or input channels of a layer, or of channels of a norm or a PReLU."""
    if isinstance(module, LAYERS):
        inputs = module.in_channels if isinstance(module, _ConvNd) else module.in_features
        return out_channels(module) if side == "out" else int(inputs)
    if isinstance(module, nn.LayerNorm):
        return int(module.normalized_shape[0])
    return int(getattr(module, channels_attribute(module)))


def channels_attribute(module: nn.Module) -> str:
    """The name of the attribute of a norm or a PReLU that is its number of channels."""
    if isinstance(module, nn.PReLU):
        return "num_parameters"
    return "num_channels" if isinstance(module, nn.GroupNorm) else "num_features"


def full_weight(layer: nn.Module, weight: Tensor) -> Tensor:
    """The weight of a layer as (outputs, inputs, kernel), with zeros between the groups of a convolution."""
    if not isinstance(layer, _ConvNd):
        return weight[:, :, None]
    groups, flat = layer.groups, weight.flatten(2)
    if isinstance(layer, _ConvTransposeNd):
        blocks = flat.unflatten(0, (groups, -1)).transpose(1, 2)
    else:
        blocks = flat.unflatten(0, (groups, -1))
    if groups == 1:
        return blocks[0]
    _, rows, columns, kernel = blocks.shape
    full = weight.new_zeros(groups, rows, groups, columns, kernel)
    full.diagonal(0, 0, 2).copy_(blocks.permute(1, 2, 3, 0))
    return full.flatten(2, 3).flatten(0, 1)


def by_group(layer: nn.Module, full: Tensor) -> Tensor:
    """The inverse of `full_weight`, but for the shape of the kernel."""
    if not isinstance(layer, _ConvNd):
        return full[:, :, 0]
    groups = layer.groups
    blocks = full.unflatten(1, (groups, -1)).unflatten(0, (groups, -1)).diagonal(0, 0, 2).permute(3, 0, 1, 2)
    if isinstance(layer, _ConvTransposeNd):
        blocks = blocks.transpose(1, 2)
    return blocks.flatten(0, 1)
