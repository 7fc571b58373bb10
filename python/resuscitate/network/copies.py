"""Copies of networks, also of those that hold tensors computed from others."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode

from .runner import Network

M = TypeVar("M", bound=nn.Module)


class _Detached(TorchFunctionMode):
    """Copies a tensor that is not a graph leaf, which `copy.deepcopy` refuses, without its graph."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            return args[0].detach().clone()
        return func(*args, **(kwargs or {}))


class _Shared(TorchFunctionMode):
    """Copies no tensor: the copy holds the tensor itself."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is Tensor.__deepcopy__ else func(*args, **(kwargs or {}))


def deep_copy(model: M) -> M:
    """A deep copy. Tensors with a graph, such as weights that `torch.nn.utils.prune` masks, are copied without it.

    Its tensors can be changed, and have gradients, also where it is made under `torch.inference_mode()`.
    """
    with torch.inference_mode(False), _Detached():
        return copy.deepcopy(model)


def copy_sharing_tensors(model: M) -> M:
    """A deep copy of all but the tensors, which are those of the model."""
    with _Shared():  # a parameter does not ask it
        return copy.deepcopy(model, {id(x): x for x in [*model.parameters(), *model.buffers()]})


def plain_copy(model: nn.Module) -> nn.Module:
    """A deep copy in eval mode, with the masks of `torch.nn.utils.prune` made permanent."""
    copied = deep_copy(model).eval()
    for module in copied.modules():
        for key in ("weight", "bias"):
            if f"{key}_mask" in module._buffers:
                prune.remove(module, key)
    return copied


def trial_copy(model: nn.Module) -> nn.Module:
    """A `plain_copy` with gradients, in float32 or wider."""
    copied = plain_copy(model)
    copied.to(torch.promote_types(Network(copied).dtype, torch.float32))
    for parameter in copied.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return copied
