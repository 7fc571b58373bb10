"""Updates of one module, and how they are written: a gain and a shift, new weights, BatchNorm statistics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import asr_kernels as ak

from ..errors import LayerError
from .layers import along_weight, refresh_weight, stored_bias, stored_weight

ShiftInto = Literal["bias", "new bias", "running_mean"]


@dataclass(frozen=True, eq=False)
class Gain:
    """Make a layer's output gain * y + shift; both (C,), float64."""

    gain: Tensor
    shift: Tensor


@dataclass(frozen=True, eq=False)
class Weights:
    """New weights of a layer, in the shape of its weight, float64; those that are pruned stay zero."""

    weight: Tensor
    bias: Tensor | None = None  # (C,), added to the output; None: the bias stays
    means: Tensor | None = None  # (O, 1 or I, 1, ...), make it a mean layer
    status: str = "refitted"  # this and `reason` are for the report
    reason: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)  # fields of its row, such as `explained`


@dataclass(frozen=True, eq=False)
class BatchNormStatistics:
    """New running statistics of a BatchNorm."""

    moments: ak.ChannelMoments


@dataclass(frozen=True)
class Unchanged:
    """The layer stays as it is; `reason` says why."""

    reason: str


Update = Gain | Weights | BatchNormStatistics | Unchanged


def pack(update: Update) -> dict[str, Tensor]:
    """The tensors of an update by name, for a journal."""
    parts = vars(update)
    if isinstance(update, BatchNormStatistics):
        parts = {**vars(update.moments), "count": torch.tensor(update.moments.count)}
    return {name: part.contiguous() for name, part in parts.items() if isinstance(part, Tensor)}


def unpack(tensors: Mapping[str, Tensor], device: torch.device) -> Update:
    """The inverse of `pack`, on a device; without the notes for the report."""
    found: dict[str, Any] = {name: tensor.to(device) for name, tensor in tensors.items()}
    if "gain" in found:
        return Gain(**found)
    if "weight" in found:
        return Weights(**found)
    if "count" in found:
        return BatchNormStatistics(ak.ChannelMoments(int(found["count"]), found["mean"], found["m2"]))
    return Unchanged("")


@torch.no_grad()
def write_gain(name: str, module: nn.Module, update: Gain, batchnorm: _BatchNorm | None) -> ShiftInto | None:
    """weight <- gain * weight, so that zeros stay zero; bias <- gain * bias + shift.

    Without a bias the shift goes into `batchnorm`, the only reader of the layer (running_mean <- running_mean - shift),
    else into a new bias. Returns what took the shift. Raises LayerError when the result overflows the weight's dtype.
    """
    weight, bias = stored_weight(name, module), stored_bias(name, module)
    weight.mul_(along_weight(module, update.gain))
    shift = update.shift if bias is None else update.gain * bias + update.shift
    return _write_bias(name, module, shift, batchnorm)


@torch.no_grad()
def write_weights(
    name: str, module: nn.Module, update: Weights, in_use: Tensor, batchnorm: _BatchNorm | None
) -> ShiftInto | None:
    """Write the new weights where they are `in_use`; returns what took the bias, and raises, as `write_gain`."""
    weight = stored_weight(name, module)
    weight.copy_(torch.where(in_use, update.weight.view(weight.shape).to(weight.dtype), weight))
    if update.bias is None:
        refresh_weight(module)
        return None
    return _write_bias(name, module, update.bias, batchnorm)


def _write_bias(name: str, module: nn.Module, shift: Tensor, batchnorm: _BatchNorm | None) -> ShiftInto | None:
    weight, bias = stored_weight(name, module), stored_bias(name, module)
    refresh_weight(module)
    took: ShiftInto | None = None
    if bias is not None:
        bias.copy_(shift)
        took = "bias"
    elif shift.any() and batchnorm is not None and batchnorm.running_mean is not None:
        batchnorm.running_mean.sub_(shift)
        took = "running_mean"
    elif shift.any():
        module.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=weight.requires_grad)
        took = "new bias"
    written = [weight, module.bias, None if batchnorm is None else batchnorm.running_mean]
    # `aminmax` gives NaN where any value is NaN
    extremes = [x.aminmax() for x in written if isinstance(x, Tensor) and x.numel()]
    if not all(least.isfinite() and greatest.isfinite() for least, greatest in extremes):
        raise LayerError(name, f"its corrected weights do not fit into {weight.dtype}; repair it in float32")
    return took


@torch.no_grad()
def write_statistics(name: str, batchnorm: nn.Module, moments: ak.ChannelMoments) -> None:
    """Set the running statistics to these moments, with the unbiased variance; `num_batches_tracked` stays.

    Raises LayerError for fewer than two values per channel, or for a variance that overflows the buffers' dtype.
    """
    mean, var = (batchnorm._buffers[buffer] for buffer in ("running_mean", "running_var"))
    if mean is None or var is None:
        raise LayerError(name, "it keeps no running statistics")
    if moments.count < 2:
        raise LayerError(name, "a variance needs at least two values per channel; give more images")
    mean.copy_(moments.mean)
    var.copy_(moments.m2 / (moments.count - 1))
    if not (mean.isfinite() & var.isfinite()).all():
        raise LayerError(name, f"its statistics do not fit into {var.dtype}; call .float() on the BatchNorm layers")
