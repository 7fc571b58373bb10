"""Before channels go: what the removed ones carry is read off the kept ones by the layers that read both."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

import asr_kernels as ak

from ..network.layers import columns_of, effective_weight, find_layers, refresh_weight, stored_weight
from ..network.runner import Network

RIDGE = 1e-3


@torch.no_grad()
def aggregate(
    model: nn.Module,
    dense: Network,
    batches: Iterable[Any],
    ridge: float = RIDGE,
    names: Collection[str] | None = None,
) -> list[str]:
    """Have each layer that no longer reads some channels read what they carried from those that it still reads.

    names: the layers that may be changed; None: all.

    With G the second moments of the *dense* layer's input channels, H all of them and P those that are still read:

        B = (G_PP + rho I)^-1 (G_PH + rho E),   W_P <- W_H B'     for every position of the kernel

    (ridge aggregation as in arXiv 2602.23795; the first of two stages in ESWA 296, 128930.) rho is `ridge` times the
    mean of diag G_PP; it pulls towards E, which leaves what is kept as it is (theirs pulls towards zero, and so forgets
    what never varied). W is the dense weight; what is zero in the model stays zero. Returns the names of the layers
    that were changed. Convolutions in groups and transposed ones are left alone.
    """
    chosen = {name: layer for name, layer in find_layers(model).items() if names is None or name in names}
    layers = {name: layer for name, layer in chosen.items() if _is_whole(layer)}
    read = {name: _read(name, layer) for name, layer in layers.items()}
    original = {name: _read(name, dense.modules[name]) for name in read}
    missing = {name for name, kept in read.items() if kept.any() and (original[name] & ~kept).any()}
    found: dict[str, ak.PatchMoments] = {}

    def take(name: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].reshape(-1, args[0].shape[-1], 1) if isinstance(layer, nn.Linear) else args[0].flatten(2)
        moments = ak.patch_moments(x, x[:, :1], ak.Window((1,), (1,), ((0, 0),), (1,)))
        found[name] = found[name].merge(moments) if name in found else moments

    handles = [dense.modules[name].register_forward_pre_hook(partial(take, name)) for name in missing]
    try:
        for batch in batches:
            dense.run(batch)
    finally:
        for handle in handles:
            handle.remove()
    for name, moments in found.items():
        layer, kept = layers[name], read[name]
        second = moments.xx[0] / moments.count + moments.mean[0][:, None] * moments.mean[0]
        among, onto = second[kept][:, kept], second[kept].clone()
        rho = ridge * among.diagonal().mean()
        among.diagonal().add_(rho)
        onto[torch.arange(len(onto), device=onto.device), kept.nonzero().flatten()] += rho
        from_kept = torch.linalg.solve(among, onto)
        weight = stored_weight(name, layer)
        whole = effective_weight(name, dense.modules[name]).double()
        new = torch.zeros_like(whole)
        new[:, kept] = torch.einsum("oh...,ph->op...", whole, from_kept)
        weight.copy_(torch.where(effective_weight(name, layer) != 0, new.to(weight.dtype), weight))
        refresh_weight(layer)
    return list(found)


def _read(name: str, layer: nn.Module) -> Tensor:
    """Boolean: the input channels that the layer reads at all."""
    return (columns_of(layer, effective_weight(name, layer)) != 0).any(1)


def _is_whole(layer: nn.Module) -> bool:
    """Does every output of the layer read every input channel, along axis 1 of its weight?"""
    return not isinstance(layer, _ConvTransposeNd) and getattr(layer, "groups", 1) == 1
