"""Are these images a fair sample? Sorted classes, samplers that pad, another normalisation: no error shows them."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DistributedSampler

import asr_kernels as ak

from ..errors import CalibrationError
from ..utils.nested import images_of

log = logging.getLogger("resuscitate")

LABEL_KEYS = ("label", "labels", "target", "targets", "cls", "y")
ENOUGH = 32  # labels in order that are no accident
NORMALISED_FROM = 64  # images to judge the normalisation from, where there are as many
ENOUGH_IMAGES = 16  # the fewest to judge it from
FEWEST = 8  # different images, by contents, to fit weights to without a warning
FAR = 0.4  # Jeffreys' divergence: a variance 3.3 times off, or a mean 0.9 standard deviations off
told: WeakSet[nn.Module] = WeakSet()  # networks about whose images a warning was given


def run_first(run: Callable[[Any], Any], batch: Any) -> Any:
    """`run(batch)`, the first forward pass on the caller's images.

    Raises CalibrationError, with shape and dtype of the batch, where the model raises a built-in error such as
    RuntimeError. MemoryError, and errors of classes of the user, of the package or of torch, come as they are.
    """
    try:
        return run(batch)
    except Exception as error:  # the network is the user's own code, which may raise anything
        if type(error).__module__ != "builtins" or isinstance(error, MemoryError):
            raise
        images = images_of(batch)
        first = images if isinstance(images, Tensor | np.ndarray) else images[0] if images else None
        shape = "" if first is None else f" of shape {tuple(first.shape)} and dtype {first.dtype}"
        remedy = "give what it was trained on, usually a normalised float tensor (N, C, H, W), or pass forward_fn="
        problem = f"the model cannot run on a {type(batch).__name__}{shape}"
        if isinstance(first, Tensor) and first.ndim == 3:
            remedy += "; if these are single images (C, H, W), give them as one tensor: torch.stack(images)"
        if isinstance(first, Tensor) and first.ndim == 1:
            taken = "the first entry of a tuple or list is taken for the images"
            remedy += f"; if these are labels: {taken}, so give (images, labels), or choose the images in forward_fn="
        raise CalibrationError(f"{problem}: {type(error).__name__}: {error}; {remedy}") from error


def warn_of_few(different: int) -> None:
    """Warn if weights are fitted to so few different images."""
    if different < FEWEST:
        few = "the only image" if different == 1 else f"only {different} different images"
        log.warning("weights are fitted to %s: the outcome says nothing of other images; give 32 or more", few)


def warn_of_class_order(labels: Sequence[np.ndarray]) -> None:
    """Warn if the labels of the batches are sorted. Call this where a limit leaves the other images unread."""
    found = np.concatenate(labels)
    if len(found) >= ENOUGH and (np.diff(found) >= 0).all():
        counts = Counter(found.tolist())
        seen = ", ".join(f"{label}: {count}" for label, count in [*counts.items()][:5])
        log.warning(
            "the images come sorted by class, and only the first %d are used (class: images: %s); shuffle them, "
            "or the statistics are those of these classes alone",
            *(len(found), seen + (", ..." if len(counts) > 5 else "")),
        )


def labels_of(batch: Any, images: int) -> np.ndarray:
    """One whole number for each image of the batch, int64; empty if it has none."""
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in LABEL_KEYS if key in batch), None)
    else:
        found = batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None
    if isinstance(found, Tensor | np.ndarray) and found.shape == (images,):
        labels = found.cpu().numpy() if isinstance(found, Tensor) else found
        if labels.dtype.kind in "iu":
            return labels.astype(np.int64)
    return np.empty(0, np.int64)


def warn_of_padding(loader: Any) -> None:
    """Warn if a DataLoader's DistributedSampler repeats images, so that all ranks have as many."""
    sampler = getattr(loader, "sampler", None)
    repeated = sampler.total_size - len(sampler.dataset) if isinstance(sampler, DistributedSampler) else 0  # type: ignore[arg-type]
    if repeated > 0:
        log.warning(
            "the loader's DistributedSampler repeats %d images to give every rank as many, and they count twice; "
            "ranks may have different numbers of images here: deal them out one by one, as "
            "resuscitate.load_images does with shard=(rank, ranks)",
            repeated,
        )


@torch.no_grad()
def warn_of_normalisation(dense: nn.Module, batches: Iterable[Any], run: Callable[[Any], Any]) -> None:
    """Warn if the inputs of the dense network's first BatchNorm have far other statistics than in training.

    `run(batch)` is a forward pass of the network. It is ended at that BatchNorm, and no batch is taken after
    `NORMALISED_FROM` images. Fewer than `ENOUGH_IMAGES`, or a BatchNorm that was never trained, give no warning. With
    the variance ratio r = sum now_var / sum var and the squared offset d2 = sum (now_mean - mean)^2 / sum var, both
    over all channels, so that near-dead channels have no weight, far is Jeffreys' divergence of two normal
    distributions, (r + 1/r - 2 + d2 (1 + 1/r)) / 4, above `FAR`.
    """
    if dense in told:
        return
    batchnorms = [m for m in dense.modules() if isinstance(m, _BatchNorm) and m.running_var is not None]
    seen: list[tuple[_BatchNorm, Tensor]] = []

    def take(module: nn.Module, args: tuple[Any, ...]) -> None:
        # the channels of a subclass may lie elsewhere
        if args and isinstance(args[0], Tensor) and args[0].shape[1:2] == module.running_mean.shape:
            seen.append((module, args[0]))  # type: ignore[arg-type]
            raise _SeenError

    first, found, images = None, list[ak.ChannelMoments](), 0
    with ExitStack() as hooks:
        for module in batchnorms:
            hooks.callback(module.register_forward_pre_hook(take).remove)
        for batch in batches:
            with suppress(_SeenError):
                run_first(run, batch)
            if not seen or first not in (None, seen[0][0]):
                return
            first, x = seen.pop()
            found.append(ak.channel_moments(x.double()))
            images += len(x)
            if images >= NORMALISED_FROM:
                break
    if first is None or images < ENOUGH_IMAGES:
        return
    moments = ak.ChannelMoments.pool(found)
    mean, var = (t.double() for t in (first.running_mean, first.running_var))  # type: ignore[union-attr]
    untrained = bool((mean == 0).all()) and bool((var == 1).all())
    if untrained or not 0 < float(var.sum()) < math.inf:
        return
    ratio = float(moments.var.sum() / var.sum())
    offset = float((moments.mean - mean).square().sum() / var.sum())
    # of NaN and infinity the walk says more
    if math.isfinite(ratio + offset) and (ratio == 0 or (ratio + 1 / ratio - 2 + offset * (1 + 1 / ratio)) / 4 > FAR):
        told.add(dense)
        log.warning(
            "the images may not be normalised as the network was trained: what its first BatchNorm reads has %.3g "
            "times the variance that it had in training, and a mean %.3g standard deviations off; look at the images' "
            "mean and standard deviation",
            *(ratio, math.sqrt(offset)),
        )


class _SeenError(BaseException):
    """Ends a forward pass. Not an Exception, so that no handler of the model takes it."""
