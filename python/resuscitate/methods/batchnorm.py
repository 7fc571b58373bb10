"""BatchNorm: statistics re-estimated exactly or by momentum."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import called
from ..utils.arguments import IMAGES, NETWORK, check_places

if TYPE_CHECKING:
    from ..network.runner import Network
    from ..reports.repair import RepairReport

log = logging.getLogger("resuscitate")


def recalibrate_batchnorm(
    model: nn.Module, calibration: Any = None, *, mode: Literal["exact", "ema"] = "exact", **options: Any
) -> RepairReport:
    """Re-estimate every BatchNorm's running statistics from images, in place: `repair` with method "bn".

    "exact": each BatchNorm gets the mean and unbiased variance, pooled over all images, of what reaches it once the
    ones before it are final; any split into batches gives the same. (`torch.optim.swa_utils.update_bn` averages the
    batches' variances and counts a short last batch in full.) "ema": reset, then `ema_batches` training-mode batches of
    `ema_batch_size` at `ema_momentum`, the protocol of arXiv 2605.21426. The other options are those of `repair`.
    """
    from ..workflows.repair import repair

    call = "recalibrate_batchnorm(model, images)"
    check_places(call, model=(model, NETWORK), calibration=(calibration, IMAGES))
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
            report.notes.append(f"{called(name, 'BatchNorm')} keeps no running statistics: nothing to re-estimate")
        elif keep_frozen and model.training and not module.training:
            report.notes.append(f"{called(name, 'BatchNorm')} is frozen (in eval mode while the model trains): kept")
        else:
            chosen[name] = module
    return chosen
