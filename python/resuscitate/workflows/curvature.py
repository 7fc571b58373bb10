"""Measures the curvature of each layer of the dense network: one forward and a few backward passes over some images."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from asr_kernels.precision import full_precision

from ..data.batches import Batches, take
from ..engine.session import Session
from ..errors import ResuscitateError
from ..network.comparison import describe_error
from ..network.layers import LAYERS, out_channels
from ..network.runner import Network
from ..statistics.curvature import curvature_from
from .agreement import comparable

log = logging.getLogger("resuscitate")
IMAGES, PROJECTIONS = 256, 2  # the most images; random projections of the outputs for each
MOST_CHANNELS = 2048
VALUES = 1 << 20  # of the images of one forward pass, whose activations are all in memory


def measure_curvatures(session: Session, batches: Batches) -> dict[str, Tensor]:
    """The curvature (O, O) of each layer of the session's network, see `curvature_from`.

    The result does not depend on batches or ranks, but for rounding. Left out are layers without effect on the outputs,
    with several groups, or with more than `MOST_CHANNELS` channels. Nothing is returned for a network that has no
    backward pass, whose outputs are not one tensor, or several, with a row for each image, or whose input is not one
    floating tensor.
    """
    net, ranks = session.net, session.ranks
    if net.forward_fn is not None:
        return {}
    layers = {name: module for name, module in net.modules.items() if isinstance(module, LAYERS)}
    channels = {name: out_channels(each) for name, each in layers.items() if getattr(each, "groups", 1) == 1}
    # in float64: in float32 the order of the sums, which is another one on several ranks, shows in the fits
    zeros = partial(torch.zeros, dtype=torch.float64, device=net.device)
    sums = {name: zeros(2, count, count) for name, count in channels.items() if count <= MOST_CHANNELS}
    failure, numbered = None, batches.numbers(ranks)
    try:
        for half, numbers, images in _parts(batches, numbered):
            _add_gradients(net, images, numbers, {name: each[half] for name, each in sums.items()})
    except (RuntimeError, _NoGradientsError) as error:  # of autograd, or of memory
        failure = error
    (failed,) = ranks.total(failure is not None)
    if failed:
        cause = "another rank could not" if failure is None else describe_error(failure)
        log.warning("the network's curvature is not measured, and each channel is fitted alone: %s", cause)
        return {}
    found = {name: curvature_from(ranks.add(sums.pop(name))) for name in list(sums)}
    return {name: each.float() for name, each in found.items() if each is not None}


class _NoGradientsError(ResuscitateError):
    """The outputs do not depend on the images through operations that have gradients."""


def _parts(batches: Batches, numbered: Mapping[int, tuple[Tensor, Tensor]]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Images by the half that they belong to, with their numbers, as many at a time as `VALUES` allow."""
    for index, (places, numbers) in numbered.items():
        batch = batches[index]
        if not isinstance(batch, Tensor) or not batch.is_floating_point():
            raise _NoGradientsError("the images are not one floating tensor")
        most = max(VALUES // max(batch[:1].numel(), 1), 1)
        for half in (0, 1):
            chosen = ((numbers < IMAGES) & (numbers % 2 == half)).nonzero().flatten()
            for rows in chosen.split(most) if len(chosen) else ():
                yield half, numbers[rows], take(batch, places[rows])


def _add_gradients(net: Network, images: Tensor, numbers: Tensor, sums: dict[str, Tensor]) -> None:
    """Add the products of the gradients at all layers for these images and all projections."""

    def add(name: str, gradient: Tensor) -> None:
        # a copy: PyTorch warns where the first work of autograd's thread on a GPU is a product of matrices
        rows = gradient.movedim(net.axis(name), 0).flatten(1).float().contiguous()
        sums[name] += rows @ rows.mT

    def watch(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(partial(add, name))

    with torch.enable_grad(), net.hooked(sums, watch), full_precision(net.device):
        read = net.place(images).requires_grad_()
        with net.precision():
            found = comparable(net.model(read.clone()))  # a network may write to its input
        if not found or not all(each.requires_grad and each.shape[:1] == images.shape[:1] for each in found):
            raise _NoGradientsError("its outputs have no row with gradients for each image")
        for projection in range(PROJECTIONS):
            seeds = [int(number) * PROJECTIONS + projection for number in numbers]
            towards = [torch.stack([_random(each[0], seed) for seed in seeds]).to(each) for each in found]
            torch.autograd.grad(found, read, towards, retain_graph=projection < PROJECTIONS - 1)


def _random(like: Tensor, seed: int) -> Tensor:
    """Standard normal values in the shape of a tensor, the same on each device."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))
