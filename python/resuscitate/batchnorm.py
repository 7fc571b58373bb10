"""BatchNorm: statistics re-estimated exactly or by momentum, and folding into the layer before."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils import prune
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights
from torch.utils._pytree import tree_leaves

from .errors import LayerError
from .graph import observe, trace, wiring_of
from .layers import find_layers, refresh_weight

if TYPE_CHECKING:
    from .network import Network
    from .report import RepairReport

log = logging.getLogger("resuscitate")
FOLDABLE_BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
FOLDABLE_LAYERS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    nn.Linear,
)


def recalibrate_batchnorm(
    model: nn.Module, calibration: Any, *, mode: Literal["exact", "ema"] = "exact", **options: Any
) -> RepairReport:
    """Re-estimate every BatchNorm's running statistics from images, in place: `repair` with method "bn".

    "exact": each BatchNorm gets the mean and unbiased variance, pooled over all images, of what reaches it once the
    ones before it are final; any split into batches gives the same. (`torch.optim.swa_utils.update_bn` averages the
    batches' variances and counts a short last batch in full.) "ema": reset, then `ema_batches` training-mode batches of
    `ema_batch_size` at `ema_momentum`, the protocol of arXiv 2605.21426. The other options are those of `repair`.
    """
    from .repair import repair

    return repair(model, None, calibration, method="bn", recalibrate=mode, **options)


def estimate_by_momentum(
    net: Network, batchnorms: Mapping[str, _BatchNorm], batches: Iterable[Tensor], momentum: float
) -> None:
    """Reset the given BatchNorms and run the batches with those alone in training mode, as PyTorch itself updates them.

    After b batches a share (1 - momentum)^b of the initial mean 0 and variance 1 is left.
    """
    found = {name: batchnorm.momentum for name, batchnorm in batchnorms.items()}
    try:
        for batchnorm in batchnorms.values():
            batchnorm.reset_running_stats()
            batchnorm.momentum = momentum
            batchnorm.train()
        for batch in batches:
            net.run(batch)
    finally:
        for name, batchnorm in batchnorms.items():
            batchnorm.momentum = found[name]
            batchnorm.eval()


def batchnorms_to_estimate(model: nn.Module, keep_frozen: bool, report: RepairReport) -> dict[str, _BatchNorm]:
    """The BatchNorms whose statistics may be re-estimated, by name; what is kept goes into the report's notes.

    Kept: those without running statistics and, with `keep_frozen`, those in eval mode while the model trains.
    """
    chosen = {}
    for name, module in model.named_modules():
        if not isinstance(module, _BatchNorm):
            continue
        if module.running_mean is None:
            report.notes.append(f"BatchNorm {name!r} keeps no running statistics: nothing to re-estimate")
        elif keep_frozen and model.training and not module.training:
            report.notes.append(f"BatchNorm {name!r} is frozen (in eval mode while the model trains): kept")
        else:
            chosen[name] = module
    return chosen


@torch.no_grad()
def fold_batchnorm(model: nn.Module, example: Any = None, *, strict: bool = False) -> nn.Module:
    """A copy of the model, in eval mode, with each BatchNorm folded into the one layer that it alone reads.

    Folded BatchNorms become `nn.Identity`; layers without a bias get one; masks of `torch.nn.utils.prune` are baked in;
    class and attributes stay. Left alone, with the reason logged (LayerError when `strict`): a BatchNorm behind a
    layer that is called twice or read elsewhere, without running statistics, or of a class of its own. `example` (an
    input for the model) finds the pairs by one real forward, which works for any control flow, and checks the
    outputs: LayerError where they differ by more than 1e-3 of their scale. Without it the pairs come from torch.fx,
    which knows no shapes: linear layers then keep their BatchNorm; ValueError where it fails.
    """
    for module in find_layers(model).values():
        refresh_weight(module)
    folded = copy.deepcopy(model).eval()
    modules = dict(folded.named_modules())
    for module in find_layers(folded).values():
        if "weight_mask" in module._buffers:
            prune.remove(module, "weight")
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
            log.warning("BatchNorm %r is not folded: %s", name, reason)
        elif layer is not None:
            _fold(modules[layer], batchnorm)
            folded.set_submodule(name, nn.Identity())
    if example is not None:
        _compare(before, folded(example))
    return folded


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


def _compare(before: Any, after: Any) -> None:
    for x, y in zip(tree_leaves(before), tree_leaves(after), strict=True):
        if isinstance(x, Tensor) and x.is_floating_point():
            scale, error = float(x.abs().max()), float((x - y).abs().max())
            if not error <= 1e-3 * max(scale, 1e-6):
                raise LayerError("", f"folding changed the output by {error:.3g} on a scale of {scale:.3g}")
