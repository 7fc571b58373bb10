"""Folding: each BatchNorm into the one layer that it alone reads, checked on an example."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils import prune
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from ..errors import LayerError, called
from ..network.layers import find_layers, refresh_weight
from ..network.wiring import observe, output_leaves, trace, wiring_of

log = logging.getLogger("resuscitate")
FOLDABLE_BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
FOLDABLE_LAYERS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    nn.Linear,
)


@dataclass
class FoldReport:
    """What became of each BatchNorm: the layer that took it in, or why it was left.

    `error` is the largest difference of the outputs on the example, relative to the largest output; None without one.
    """

    folded: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    error: float | None = None


@torch.no_grad()
def fold_batchnorm(model: nn.Module, example: Any = None, *, strict: bool = False) -> nn.Module:
    """A copy of the model, in eval mode, with each BatchNorm folded into the one layer that it alone reads.

    Folded BatchNorms become `nn.Identity`; layers without a bias get one; masks of `torch.nn.utils.prune` are baked in;
    class and attributes stay. Left alone, with the reason logged (LayerError when `strict`): a BatchNorm behind a
    layer that is called twice or read elsewhere, without running statistics, or of a class of its own. `example` (an
    input for the model) finds the pairs by one real forward, which works for any control flow, and checks the
    outputs: LayerError where they differ by more than 1e-3 of their scale. Without it the pairs come from torch.fx,
    which knows no shapes: linear layers then keep their BatchNorm; ValueError where it fails.

    What was folded, what was not and why, and the largest difference, is in the copy's attribute `fold_report`.
    """
    folded, report = plain_copy(model), FoldReport()
    modules = dict(folded.named_modules())
    if example is None:
        try:
            wiring = wiring_of(trace(folded), folded)
        except Exception as error:
            raise ValueError(f"torch.fx cannot trace this model ({error}); pass example=, an input for it") from error
    else:
        before = folded(example)
        wiring = observe(folded, lambda: folded(example))
    layer_of = {batchnorm: layer for layer, batchnorm in wiring.batchnorm_of.items()}
    for name, batchnorm in modules.items():
        if not isinstance(batchnorm, _BatchNorm):
            continue
        layer = layer_of.get(name)
        reason = "no layer is read by it alone" if layer is None else _unfoldable(modules[layer], batchnorm)
        if reason and strict:
            raise LayerError(name, f"cannot be folded: {reason}")
        if reason:
            report.left[name] = reason
            log.warning("%s is not folded: %s", called(name, "BatchNorm"), reason)
        elif layer is not None:
            _fold(modules[layer], batchnorm)
            folded.set_submodule(name, nn.Identity())
            report.folded[name] = layer
    if example is not None:
        report.error = _compare(before, folded(example))
    folded.fold_report = report  # type: ignore[assignment]
    return folded


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode, the masks of `torch.nn.utils.prune` baked into its weights."""
    for module in find_layers(model).values():
        refresh_weight(module)  # what was computed with gradients cannot be copied
    twin = copy.deepcopy(model).eval()
    for module in find_layers(twin).values():
        for key in ("weight", "bias"):
            if f"{key}_mask" in module._buffers:
                prune.remove(module, key)
    return twin


def _unfoldable(layer: nn.Module, batchnorm: _BatchNorm) -> str | None:
    if type(batchnorm) not in FOLDABLE_BATCHNORMS:
        return f"{type(batchnorm).__name__} may do more than normalise"
    if type(layer) not in FOLDABLE_LAYERS or "weight" not in layer._parameters:
        return f"{type(layer).__name__} may compute its weight"
    if batchnorm.running_mean is None:
        return "it keeps no running statistics"
    return None


def _fold(layer: nn.Module, batchnorm: _BatchNorm) -> None:
    """Fold in float64. A transposed convolution's groups go one by one: torch's helper knows of one only."""
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    assert weight is not None
    transposed = isinstance(layer, _ConvTransposeNd)
    groups = layer.groups if isinstance(layer, _ConvTransposeNd) else 1
    vectors = [bias, batchnorm.running_mean, batchnorm.running_var, batchnorm.weight, batchnorm.bias]
    folded = []
    for group in zip(weight.double().chunk(groups), *(_chunks(vector, groups) for vector in vectors), strict=True):
        w, b, mean, var, scale, offset = group
        if isinstance(layer, nn.Linear):
            folded.append(fuse_linear_bn_weights(w, b, mean, var, batchnorm.eps, scale, offset))
        else:
            folded.append(fuse_conv_bn_weights(w, b, mean, var, batchnorm.eps, scale, offset, transposed))
    new_weight, new_bias = (torch.cat(parts) for parts in zip(*folded, strict=True))
    weight.copy_(new_weight)
    if bias is None:
        layer.bias = nn.Parameter(new_bias.to(weight.dtype), requires_grad=weight.requires_grad)
    else:
        bias.copy_(new_bias)


def _chunks(vector: Any, groups: int) -> Sequence[Any]:
    return [None] * groups if vector is None else vector.double().chunk(groups)


def _compare(before: Any, after: Any) -> float:
    """The largest difference, relative to the scale of each output; LayerError where it is too large."""
    worst = 0.0
    for x, y in zip(output_leaves(before), output_leaves(after), strict=True):
        if isinstance(x, Tensor) and x.is_floating_point():
            scale, error = float(x.abs().max()), float((x - y).abs().max())
            if not error <= 1e-3 * max(scale, 1e-6):
                raise LayerError("", f"folding changed its output by {error:.3g} on a scale of {scale:.3g}")
            worst = max(worst, error / max(scale, 1e-6))
    return worst
