"""What pruning has done to each channel: how its variance has changed, and how much of it is still the same signal."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import asr_kernels as ak

from ..data.calibration import read_batches
from ..errors import ModelMismatchError, called
from ..network.layers import find_layers, unwrap
from ..network.matching import same_layers
from ..network.runner import Network, as_dtype, check_finite
from ..network.snapshot import moved_to, undisturbed
from ..utils.arguments import IMAGES, NETWORK, check_places


@dataclass(frozen=True)
class LayerDamage:
    """Of each output channel of one layer, float64 (C,): the dense variance, the pruned over it, their correlation.

    The ratio is 1 and the correlation 1 where nothing was lost. A gain can mend the first, and only it. The ratio is
    NaN where the dense channel is constant.
    """

    variance: Tensor
    ratio: Tensor
    correlation: Tensor


@torch.no_grad()
def damage(
    model: nn.Module,
    dense: nn.Module,
    calibration: Any,
    *,
    max_samples: int | None = None,
    batch_size: int = 128,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> dict[str, LayerDamage]:
    """Compare every layer's outputs in a pruned, or repaired, model with the dense model's, in the order of execution.

    Both networks run as they are, each on its own activations, over the images; options as in `repair`. The dense
    activations of one batch are held at a time. A layer that is used several times is taken over all its uses.
    Raises ModelMismatchError, CalibrationError, LayerError, NonFiniteError.
    """
    places: dict[str, Any] = {"model": (model, NETWORK), "dense": (dense, NETWORK)}
    check_places("damage(model, dense, images)", **places, calibration=(calibration, IMAGES))
    model, dense = unwrap(model), unwrap(dense)
    same_layers(find_layers(model), dense)
    found: dict[str, ak.PairedMoments] = {}
    with ExitStack() as stack:
        stack.enter_context(moved_to(device, [model, dense]))
        stack.enter_context(undisturbed([model, dense], seed))
        pruned, original = (Network(net, forward_fn, as_dtype(dtype)) for net in (model, dense))
        names = list(find_layers(model))
        reading: dict[str, Any] = {"max_samples": max_samples, "batch_size": batch_size}
        for index, batch in enumerate(read_batches(calibration, **reading, raw=forward_fn is not None)):
            outputs: dict[str, list[Tensor]] = {}

            def keep(name: str, x: Tensor, outputs: dict[str, list[Tensor]] = outputs) -> None:
                original.check_tensor(name, x)
                outputs.setdefault(name, []).append(x.clone())

            def compare(name: str, x: Tensor, index: int = index, outputs: Any = outputs) -> None:
                pruned.check_tensor(name, x)
                if not outputs.get(name):
                    raise ModelMismatchError(f"{called(name)} runs more often in the model than in the dense one")
                pair = ak.paired_moments(outputs[name].pop(0), x, pruned.axis(name))
                check_finite(name, [(index, pair.dense), (index, pair.pruned)])
                found[name] = found[name].merge(pair) if name in found else pair

            with original.hooked(names, keep):
                original.run(batch)
            with pruned.hooked(names, compare):
                pruned.run(batch)
    return {name: _of(pair) for name, pair in found.items()}


def _of(pair: ak.PairedMoments) -> LayerDamage:
    variance, left = pair.dense.var.cpu(), pair.pruned.var.cpu()
    ratio = torch.where(variance > 0, left / variance, torch.nan)
    return LayerDamage(variance, ratio, pair.corr.cpu())
