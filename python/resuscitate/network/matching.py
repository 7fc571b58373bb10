"""Checks that two networks have the same layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..errors import ModelMismatchError, called
from .layers import LAYERS, effective_weight


def same_layers(layers: Mapping[str, nn.Module], dense: nn.Module) -> bool:
    """Check that the dense model has these layers, in memory of its own; returns whether all weights are equal.

    Raises ModelMismatchError.
    """
    originals, same = dict(dense.named_modules()), True
    for name, layer in layers.items():
        if name not in originals:
            raise ModelMismatchError(f"the dense model has no layer {name!r}; both models need the same layers")
        kind, dense_kind = (type(each).__name__.removeprefix("Mean") for each in (layer, originals[name]))
        if not isinstance(originals[name], LAYERS) or kind != dense_kind:
            raise ModelMismatchError(f"{called(name)} is {kind} in the pruned model and {dense_kind} in the dense one")
        weight, original = effective_weight(name, layer), effective_weight(name, originals[name])
        if weight.shape != original.shape:
            shapes = f"{tuple(weight.shape)} in the pruned model and {tuple(original.shape)} in the dense one"
            raise ModelMismatchError(f"the weight of {called(name)} is {shapes}")
        if weight.data_ptr() == original.data_ptr():
            raise ModelMismatchError(f"{called(name)} shares its weight with the dense model; pass a deep copy")
        same = same and torch.equal(weight, original.to(weight.device))
    return same
