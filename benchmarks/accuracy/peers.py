"""What else can be done with a pruned network and unlabelled images: one-shot pruning as SparseGPT's, and distillation.

The first needs no gradients, the second does: it is the upper anchor of the tables.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import resuscitate
from resuscitate.network.layers import find_layers

BATCH = 128
BLOCK, DAMPING = 128, 0.01  # SparseGPT: columns that choose their masks together, part of the mean diagonal
TEMPERATURE, RATE, PAD = 4.0, 1e-3, 4  # of the distillation


class _StopError(Exception):
    """Ends a forward pass at the layer whose inputs are wanted."""


@torch.no_grad()
def one_shot(model: nn.Module, images: Tensor, masks: resuscitate.Masks, n_of_m: tuple[int, int] | None = None) -> None:
    """Prune and refit a dense model in place as SparseGPT does (Frantar and Alistarh 2023, algorithm 1); `update_bn`.

    Layer by layer in the order of the calls, on the inputs that the layer has by then. Each layer loses as many weights
    as in `masks`, chosen by their cost among each `BLOCK` columns; with n_of_m, n stay of m consecutive input channels
    wherever `masks` removes any.
    """
    layers = {name: layer for name, layer in find_layers(model).items() if name in masks}
    for name in _order(model, layers, images[:1]):
        layer, mask = layers[name], masks[name]
        if mask.all():
            continue
        hessians = _hessians(model, layer, images)
        # input channels are the last axis, so that m consecutive columns are m channels at one kernel position
        weight = layer.weight.movedim(1, -1).flatten(1).double().unflatten(0, (len(hessians), -1))
        density = float(mask.float().mean())
        rows = torch.cat([_pruned(w, h, density, n_of_m) for w, h in zip(weight, hessians, strict=True)])
        shape = [layer.weight.shape[0], *layer.weight.shape[2:], layer.weight.shape[1]]
        layer.weight.copy_(rows.view(shape).movedim(-1, 1))
    update_bn(images.split(BATCH), model)
    model.eval()


def _order(model: nn.Module, layers: dict[str, nn.Module], image: Tensor) -> list[str]:
    """The names of the layers in the order of their calls."""
    found: list[str] = []
    handles = [layer.register_forward_pre_hook(lambda *_, n=name: found.append(n)) for name, layer in layers.items()]
    model(image)
    for handle in handles:
        handle.remove()
    return list(dict.fromkeys(found))


def _hessians(model: nn.Module, layer: nn.Module, images: Tensor) -> Tensor:
    """Sums of products of input patches of one layer, (groups, K, K), float64; K runs over positions, then channels."""
    products: list[Tensor] = []

    def add(patches: Tensor, groups: int) -> None:  # (rows, groups * K)
        by_group = patches.unflatten(1, (groups, -1)).transpose(0, 1)
        products.append((by_group.mT @ by_group).double())
        raise _StopError

    if isinstance(layer, nn.Linear):
        handle = layer.register_forward_pre_hook(lambda _, args: add(args[0].flatten(0, -2), 1))
        undo: Callable[[], None] = handle.remove
    else:

        def conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:  # x is padded by layers that pad themselves
            options = {"padding": layer.padding, "stride": layer.stride, "dilation": layer.dilation}
            patches = F.unfold(x, layer.kernel_size, **options)  # (N, channels * positions, L)
            split = patches.unflatten(1, (layer.groups, -1, weight.shape[2:].numel())).transpose(2, 3)
            add(split.flatten(1, 3).transpose(1, 2).flatten(0, 1), layer.groups)

        layer._conv_forward = conv

        def undo() -> None:
            del layer._conv_forward

    for batch in images.split(BATCH):
        with suppress(_StopError):
            model(batch)
    undo()
    return torch.stack(products).sum(0)


def _pruned(weight: Tensor, hessian: Tensor, density: float, n_of_m: tuple[int, int] | None) -> Tensor:
    """The rows (R, K), pruned from left to right, each error made good by the columns to its right."""
    weight, (rows, columns) = weight.clone(), weight.shape
    damped = hessian + DAMPING * hessian.diagonal().mean().clamp(min=1e-12) * torch.eye(columns, dtype=torch.float64)
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    for left in range(0, columns, BLOCK):
        right = min(left + BLOCK, columns)
        block = range(left, right)
        removed = torch.zeros(rows, columns, dtype=torch.bool)
        if n_of_m is None:
            count = round((1 - density) * rows * len(block))
            place = _costs(weight, inverse, left, right).flatten().argsort()[:count]
            removed[place // len(block), left + place % len(block)] = True
        errors = torch.zeros(rows, columns, dtype=torch.float64)
        for column in block:
            if n_of_m is not None and column % n_of_m[1] == 0:
                n, m = n_of_m
                cheapest = _costs(weight, inverse, column, column + m).argsort(1)[:, : m - n]
                removed[:, column : column + m].scatter_(1, cheapest, True)
            lost = torch.where(removed[:, column], weight[:, column], 0.0) / inverse[column, column]
            weight[:, column:right] -= lost[:, None] * inverse[column, column:right]
            weight[removed[:, column], column] = 0
            errors[:, column] = lost
        weight[:, right:] -= errors[:, left:right] @ inverse[left:right, right:]
    return weight


def _costs(weight: Tensor, inverse: Tensor, left: int, right: int) -> Tensor:
    """By how much the squared error rises with each weight of some columns that is removed, (R, right - left)."""
    return (weight[:, left:right] / inverse.diagonal()[left:right]).square()


def distil(
    model: nn.Module, dense: nn.Module, images: Tensor, masks: resuscitate.Masks, seconds: float, augmented: bool
) -> None:
    """Train a pruned model in place for some seconds to give the dense network's logits (Hinton et al. 2015).

    Adam with a rate of 1e-3 that falls to 0 with the time, temperature 4, batches of 128. `augmented`: with mirrored
    images, moved by up to 4 pixels. Pruned weights stay zero; BatchNorms are in training mode, and in the end have the
    mean statistics of the images.
    """
    generator, optimiser = torch.Generator().manual_seed(0), torch.optim.Adam(model.parameters(), RATE)
    model.train()
    started = time.perf_counter()  # not before: the first optimiser of a process imports much
    while (spent := time.perf_counter() - started) < seconds:
        for group in optimiser.param_groups:
            group["lr"] = RATE * (1 - spent / seconds)
        batch = images[torch.randperm(len(images), generator=generator)[:BATCH]]
        batch = _changed(batch, generator) if augmented else batch
        with torch.no_grad():
            wanted = F.softmax(dense(batch) / TEMPERATURE, 1)
        loss = F.kl_div(F.log_softmax(model(batch) / TEMPERATURE, 1), wanted, reduction="batchmean")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        masks.apply_(model)
    update_bn(images.split(BATCH), model)
    model.eval()


def _changed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the images mirrored, all moved alike by up to `PAD` pixels."""
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    top, left = torch.randint(2 * PAD + 1, (2,), generator=generator).tolist()
    return F.pad(images, [PAD] * 4)[:, :, top : top + images.shape[2], left : left + images.shape[3]]
