"""The damage of pruning to each channel: the change of its variance, and the correlation that is left."""

from __future__ import annotations

from functools import reduce
from typing import Any, Unpack

import torch
from torch import nn

import asr_kernels as ak

from ..engine.session import Session
from ..network.layer_checks import check_no_further, same_layers
from ..network.layers import find_layers, unwrap
from ..reports.damage import LayerDamage
from ..runtime.distributed import fails_on_all
from ..runtime.options import RunOptions, run_options
from ..statistics.outputs import OutputCovariances
from ..utils.arguments import IMAGES, NETWORK, check_places


@fails_on_all
def damage(
    model: nn.Module, dense: nn.Module, calibration: Any, **options: Unpack[RunOptions]
) -> dict[str, LayerDamage]:
    """Compare the outputs of each layer in a pruned, or repaired, network with those in the dense one.

    Each network runs as it is, on its own activations; the dense activations of one batch are held at a time. The
    result is by layer, over all calls of a layer. options: see `RunOptions`. Raises ModelMismatchError,
    CalibrationError, LayerError, NonFiniteError.
    """
    places: dict[str, Any] = {"model": (model, NETWORK), "dense": (dense, NETWORK)}
    check_places("damage(model, dense, images)", **places, calibration=(calibration, IMAGES))
    run = run_options("damage()", options)
    model, dense = unwrap(model), unwrap(dense)
    same_layers(find_layers(model), dense)
    check_no_further(model, dense)
    with Session([model, dense], run) as session, torch.no_grad():
        found = session.compare(session.stream(calibration), find_layers(model), OutputCovariances)
    layers = {}
    for name, statistic in found.items():
        pair = reduce(ak.PairedMoments.merge, statistic.pairs)
        dense_var, ratio = pair.dense.var.cpu(), pair.pruned.var.cpu() / pair.dense.var.cpu()
        layers[name] = LayerDamage(dense_var, torch.where(dense_var > 0, ratio, torch.nan), pair.corr.cpu())
    return layers
