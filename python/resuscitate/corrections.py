"""Writing a correction into a model: gains into weights, shifts into a bias or the BatchNorm behind, statistics."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import asr_kernels as ak

from .errors import LayerError
from .layers import along_weight, refresh_weight, stored_bias, stored_weight

ShiftInto = Literal["bias", "new bias", "running_mean"]


@torch.no_grad()
def write_correction(
    name: str, module: nn.Module, gain: Tensor, shift: Tensor, batchnorm: _BatchNorm | None
) -> ShiftInto | None:
    """Make the layer's output `gain * y + shift`; `gain` and `shift` are float64 (C,).

    weight <- gain * weight, so that zeros stay zero; bias <- gain * bias + shift. A layer without a bias leaves the
    shift to `batchnorm`, the one that alone reads it (running_mean <- running_mean - shift), else it is given a bias.
    Returns what took the shift. Raises LayerError when the result overflows the weight's dtype.
    """
    weight, bias = stored_weight(name, module), stored_bias(name, module)
    weight.mul_(along_weight(module, gain))
    refresh_weight(module)
    took: ShiftInto | None = None
    if bias is not None:
        bias.copy_(gain * bias + shift)
        took = "bias"
    elif shift.any() and batchnorm is not None and batchnorm.running_mean is not None:
        batchnorm.running_mean.sub_(shift)
        took = "running_mean"
    elif shift.any():
        module.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=weight.requires_grad)
        took = "new bias"
    written = [weight, module.bias, None if batchnorm is None else batchnorm.running_mean]
    if not all(tensor.isfinite().all() for tensor in written if isinstance(tensor, Tensor)):
        raise LayerError(name, f"its corrected weights do not fit into {weight.dtype}; repair it in float32")
    return took


@torch.no_grad()
def write_statistics(name: str, batchnorm: nn.Module, moments: ak.ChannelMoments) -> None:
    """Set the running statistics to these moments; running_var is the unbiased variance, as torch's own.

    `num_batches_tracked` stays: it counts the batches of a training that this is not. Raises LayerError for fewer
    than two values per channel, or for a variance that overflows the buffers' dtype.
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
