"""Layers and norms made smaller: the sizes of a network whose channels were removed, from the shapes of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..errors import called
from .channels import channels_attribute
from .layers import LAYERS, is_depthwise, out_channels
from .wiring import trace, wiring_of

OF_CHANNELS = ("weight", "bias", "running_mean", "running_var")  # tensors with a value or a filter for each channel


def smaller_shapes(tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
    """Of the shapes those that are smaller than the tensor of the same name in the numbers of channels alone."""
    found = {}
    for name in filter(shapes.__contains__, tensors):
        old, new = tensors[name].shape, shapes[name]
        both = zip(old[:2], new[:2], strict=False)
        if (
            old != new
            and len(old) == len(new)
            and old[2:] == new[2:]
            and all(after <= before for before, after in both)
        ):
            found[name] = new
    return found


def misfit(model: nn.Module) -> str:
    """A layer or norm whose tensors, or a convolution whose BatchNorm, have other numbers of channels; "" if none.

    BatchNorms are found by torch.fx, and so not in a network that it cannot trace.
    """
    modules = dict(model.named_modules())
    for name, module in modules.items():
        tensors = {**module._parameters, **module._buffers}
        counts = {key: len(each) for key in OF_CHANNELS if (each := tensors.get(key)) is not None}
        if isinstance(module, LAYERS):
            counts["weight"] = out_channels(module)
        if isinstance(module, (*LAYERS, _NormBase, nn.GroupNorm)) and len(set(counts.values())) > 1:
            found = " and ".join(f"{count} in its {key}" for key, count in counts.items())
            return f"{called(name)} has different numbers of channels: {found}"
    with suppress(Exception):  # torch.fx runs the user's own code, which may raise anything
        for name, batchnorm in wiring_of(trace(model), model).batchnorm_of.items():
            if (count := out_channels(modules[name])) != (read := modules[batchnorm].num_features):
                return f"{called(name)} has {count} channels, and {called(batchnorm, 'BatchNorm')} behind it {read}"
    return ""


@torch.no_grad()
def resize_layers(model: nn.Module, shapes: Mapping[str, torch.Size]) -> None:
    """Give these parameters and buffers their shapes, in place, and each module the sizes that follow; values are zero.

    A depthwise convolution stays one; another grouped convolution keeps its number of groups. Tied tensors stay tied.
    """
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    smaller = {id(old): old.new_zeros(shapes[name]) for name, old in tensors if name in shapes}
    smaller |= {
        id(old): nn.Parameter(smaller[id(old)], old.requires_grad)
        for _, old in model.named_parameters()
        if id(old) in smaller
    }
    for module in model.modules():
        depthwise = is_depthwise(module)
        for slots in (module._parameters, module._buffers):
            slots |= {key: smaller[id(old)] for key, old in slots.items() if id(old) in smaller}
        vars(module).update(_sizes(module, depthwise))


def _sizes(module: nn.Module, depthwise: bool) -> dict[str, Any]:
    """The attributes with the sizes of a module, by its tensors."""
    tensors = {**module._parameters, **module._buffers}
    weight = tensors.get("weight", tensors.get("weight_orig"))
    if isinstance(module, _ConvNd) and weight is not None:
        groups = len(weight) if depthwise else module.groups
        ends = (len(weight), weight.shape[1] * groups)
        inputs, outputs = ends if isinstance(module, _ConvTransposeNd) else ends[::-1]
        return {"in_channels": inputs, "out_channels": outputs, "groups": groups}
    if isinstance(module, nn.Linear) and weight is not None:
        return {"in_features": weight.shape[1], "out_features": len(weight)}
    if isinstance(module, nn.LayerNorm) and weight is not None:
        return {"normalized_shape": tuple(weight.shape)}
    per_channel, name = weight if weight is not None else tensors.get("running_mean"), channels_attribute(module)
    return {name: len(per_channel)} if name in vars(module) and per_channel is not None else {}
