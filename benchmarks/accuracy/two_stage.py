"""A peer for the removal of channels: ridge aggregation, the first stage of a published two-stage recipe."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

RIDGE = 1e-3


@torch.no_grad()
def aggregate(model: nn.Module, dense: nn.Module, batches: Iterable[Tensor], ridge: float = RIDGE) -> list[str]:
    """Change the layers that lost input channels: the kept inputs predict the removed ones, by ridge regression.

    With G the second moments of the *dense* layer's input channels, H all of them and P those that the pruned layer
    still reads:

        B = (G_PP + rho I)^-1 (G_PH + rho E),   W_P <- W_H B'     for every position of the kernel

    (ridge aggregation as in arXiv 2602.23795; the first of two stages in ESWA 296, 128930.) rho is `ridge` times the
    mean of diag G_PP. The ridge pulls B towards E, which leaves the kept weights unchanged (in the paper it pulls
    towards zero, so that inputs without variation are lost). W is the dense weight. A zero weight of the pruned network
    stays zero. Returns the names of the changed layers. Grouped and transposed convolutions are unchanged.
    """
    layers = {name: layer for name, layer in model.named_modules() if _reads_all_channels(layer)}
    read = {name: _channels_read(layer) for name, layer in layers.items()}
    lost = {name: _channels_read(dense.get_submodule(name)) & ~kept for name, kept in read.items()}
    missing = [name for name, kept in read.items() if kept.any() and lost[name].any()]
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(missing, 0)

    def take(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].double()
        x = x.transpose(0, 1).flatten(1) if isinstance(layer, nn.Conv2d) else x.flatten(0, -2).T  # (C, samples)
        sums[name] = sums.get(name, 0) + x @ x.T
        counts[name] += x.shape[1]

    handles = [dense.get_submodule(name).register_forward_pre_hook(partial(take, name)) for name in missing]
    try:
        for batch in batches:
            dense(batch)
    finally:
        for handle in handles:
            handle.remove()
    for name in missing:
        kept, weight, whole = read[name], layers[name].weight, dense.get_submodule(name).weight.double()
        second = sums[name] / counts[name]
        among, onto = second[kept][:, kept], second[kept].clone()
        rho = ridge * among.diagonal().mean()
        among.diagonal().add_(rho)
        onto[torch.arange(len(onto), device=onto.device), kept.nonzero().flatten()] += rho
        new = torch.zeros_like(whole)
        new[:, kept] = torch.einsum("oh...,ph->op...", whole, torch.linalg.solve(among, onto))
        weight.copy_(torch.where(weight != 0, new.to(weight.dtype), weight))
    return missing


def _reads_all_channels(layer: Any) -> bool:
    """Does every output of the layer read every input channel, along axis 1 of the weight?"""
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)


def _channels_read(layer: Any) -> Tensor:
    """Boolean (C,): the input channels with a weight that is not zero."""
    return (layer.weight != 0).transpose(0, 1).flatten(1).any(1)
