"""A peer in the timings: sequential ASR with forward hooks alone, one early-stopped pass of the network per layer."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

LAYERS = (nn.Conv2d, nn.Linear)


class Reached(Exception):  # noqa: N818
    """Ends a forward pass at the layer that is measured."""


@torch.no_grad()
def output_moments(model: nn.Module, layers: list[nn.Module], batches: tuple[Tensor, ...], stop: bool) -> list[Any]:
    """Mean and variance of the layers' outputs over all batches, by `torch.var_mean` in forward hooks.

    stop: end each forward pass after the layer, of which there must be one.
    """
    found: list[list[tuple[int, Tensor, Tensor]]] = [[] for _ in layers]

    def take(seen: list[tuple[int, Tensor, Tensor]], output: Tensor) -> None:
        axes = (0, 2, 3) if output.dim() == 4 else 0
        var, mean = torch.var_mean(output, axes, correction=0)
        seen.append((len(output), mean, var))
        if stop:
            raise Reached

    handles = [
        layer.register_forward_hook(lambda m, a, out, seen=seen: take(seen, out))
        for layer, seen in zip(layers, found, strict=True)
    ]
    for batch in batches:
        with contextlib.suppress(Reached):
            model(batch)
    for handle in handles:
        handle.remove()
    pooled = []
    for seen in found:
        total = sum(n for n, _, _ in seen)
        mean = sum(n * mean for n, mean, _ in seen) / total
        pooled.append((mean, sum(n * (var + (m - mean) ** 2) for n, m, var in seen) / total))
    return pooled


@torch.no_grad()
def plain_hooks(model: nn.Module, dense: nn.Module, images: Tensor, batch_size: int) -> None:
    """Sequential ASR in place, without the first convolution: dense moments once, then the layers one by one."""
    batches = images.split(batch_size)
    layers, originals = ([m for m in net.modules() if isinstance(m, LAYERS)][1:] for net in (model, dense))
    for layer, (mean_d, var_d) in zip(layers, output_moments(dense, originals, batches, stop=False), strict=True):
        mean, var = output_moments(model, [layer], batches, stop=True)[0]
        trust = var / (var + var.median())
        gain = trust * (var_d / (var + 1e-8)).sqrt() + (1 - trust)
        gain = torch.where(var.median() == 0, 1.0, gain)
        layer.weight.mul_(gain.view(-1, *[1] * (layer.weight.dim() - 1)))
        shift = mean_d - gain * mean
        if layer.bias is None:
            layer.bias = nn.Parameter(shift)
        else:
            layer.bias.mul_(gain).add_(shift)
