"""Re-estimation of BatchNorm statistics alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ..methods.batchnorm import EMA, Exact
from ..reports.repair import RepairReport
from ..runtime.options import RunOptions
from ..utils.arguments import IMAGES, NETWORK, check_places
from .repair import repair

if TYPE_CHECKING:
    from typing_extensions import Unpack


def recalibrate_batchnorm(
    model: nn.Module, calibration: Any = None, *, mode: Exact | EMA | str = "exact", **options: Unpack[RunOptions]
) -> RepairReport:
    """Re-estimate every BatchNorm's running statistics from images, in place: `repair` with method "bn".

    mode: "exact" or `Exact(...)`: each BatchNorm gets the mean and unbiased variance, pooled over all images, of its
        inputs once the earlier ones are final; any split into batches gives the same. (`update_bn` of
        `torch.optim.swa_utils` averages the batches' variances and counts a short last batch in full.) "ema" or
        `EMA(...)`: the protocol of arXiv 2605.21426.
    options: see `RunOptions`. Raises what `repair` raises.
    """
    call = "recalibrate_batchnorm(model, images)"
    check_places(call, model=(model, NETWORK), calibration=(calibration, IMAGES))
    return repair(model, None, calibration, method="bn", recalibrate=mode, **options)  # type: ignore[arg-type]
