"""Updates of one module, and how they are written: a gain and a shift, new weights, BatchNorm statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    """New weights of a layer, in the shape of its weight, float64; those that are pruned stay zero.

    bias: (C,), added to the output; None: the bias stays. means: (O, 1 or I, 1, ...), make it a mean layer. status,
    reason: for the report. details: fields of its row, such as `explained`; a tensor of one element is read together
    with others, and NaN is None. instead: a flag on the device, which is read together with others, and what gives the
    weights in place of these if it is set, or raises.
    """

    weight: Tensor
    bias: Tensor | None = None
    means: Tensor | None = None
    status: str = "refitted"
    reason: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)
    instead: tuple[Tensor, Callable[[], Weights]] | None = None


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


@dataclass(eq=False)
class Change:
    """The new values of a module's tensors, computed from an update but not written.

    values: tensors and their new values, in their dtypes. shifted: the tensor that takes the shift of the output, or
    None for a new bias, and its new value; written only if there is a shift. flags, on the device: are all new values
    finite ("fits"), and is there a shift ("shifts")? unfit: the error where they are not finite.
    """

    name: str
    module: nn.Module
    values: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    shift_into: ShiftInto | None = None
    shifted: tuple[Tensor | None, Tensor] | None = None
    flags: dict[str, Tensor] = field(default_factory=dict)
    unfit: str = ""


@torch.no_grad()
def change_of(
    name: str, module: nn.Module, update: Update, in_use: Tensor | None = None, batchnorm: _BatchNorm | None = None
) -> Change:
    """What an update changes. New weights are written where they are `in_use`.

    A gain: weight <- gain * weight, so that zeros stay zero; bias <- gain * bias + shift. Without a bias the shift goes
    into `batchnorm`, the only reader of the layer (running_mean <- running_mean - shift), else into a new bias.
    """
    if isinstance(update, Unchanged):
        return Change(name, module)
    if isinstance(update, BatchNormStatistics):
        return _new_statistics(name, module, update.moments)
    weight, bias = stored_weight(name, module), stored_bias(name, module)
    shift: Tensor | None
    if isinstance(update, Gain):
        new = weight * along_weight(module, update.gain)
        shift = update.shift if bias is None else update.gain * bias + update.shift
    else:
        new, shift = update.weight.view(weight.shape).to(weight.dtype), update.bias
        new = new if in_use is None else torch.where(in_use, new, weight)
    change = Change(name, module, [(weight, new.to(weight.dtype))])
    change.unfit = f"its corrected weights do not fit into {weight.dtype}; repair it in float32"
    mean = None if batchnorm is None else batchnorm.running_mean
    if shift is not None and bias is not None:
        change.values.append((bias, shift.to(bias.dtype)))
        change.shift_into = "bias"
    elif shift is not None:
        change.flags["shifts"] = shift.any()
        change.shift_into = "new bias" if mean is None else "running_mean"
        change.shifted = mean, shift.to(weight.dtype) if mean is None else (mean - shift).to(mean.dtype)
    written = [value for _, value in change.values] + ([] if change.shifted is None else [change.shifted[1]])
    change.flags["fits"] = _all_finite(*written, *([] if mean is None else [mean]))
    return change


def _new_statistics(name: str, batchnorm: nn.Module, moments: ak.ChannelMoments) -> Change:
    """Running statistics that are these moments, with the unbiased variance; `num_batches_tracked` stays.

    Raises LayerError for fewer than two values per channel.
    """
    mean, var = (batchnorm._buffers[buffer] for buffer in ("running_mean", "running_var"))
    if mean is None or var is None:
        raise LayerError(name, "it keeps no running statistics")
    if moments.count < 2:
        raise LayerError(name, "a variance needs at least two values per channel; give more images")
    values = [(mean, moments.mean.to(mean.dtype)), (var, (moments.m2 / (moments.count - 1)).to(var.dtype))]
    unfit = f"its statistics do not fit into {var.dtype}; call .float() on the BatchNorm layers"
    return Change(name, batchnorm, values, flags={"fits": _all_finite(*(new for _, new in values))}, unfit=unfit)


def _all_finite(*tensors: Tensor) -> Tensor:
    return torch.stack([x.isfinite().all() for x in tensors]).all()


@torch.no_grad()
def write_change(change: Change, flags: Mapping[str, float]) -> ShiftInto | None:
    """Write a change, for which `flags` are the values of its flags; returns what took the shift.

    Raises LayerError, and writes nothing, where a new value overflows its dtype.
    """
    if "fits" in change.flags and not flags["fits"]:
        raise LayerError(change.name, change.unfit)
    for tensor, new in change.values:
        tensor.copy_(new)
    refresh_weight(change.module)
    if change.shifted is None:
        return change.shift_into
    if not flags["shifts"]:
        return None
    taker, shifted = change.shifted
    if taker is None:
        weight = stored_weight(change.name, change.module)
        change.module.bias = nn.Parameter(shifted, requires_grad=weight.requires_grad)
    else:
        taker.copy_(shifted)
    return change.shift_into
