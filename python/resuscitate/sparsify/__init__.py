"""Pruning by magnitude: which weights of a model go, at an exact budget."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from ..layers import Selector
from ..masks import Masks
from .allocation import ALLOCATIONS, allocate, magnitude, prunable, removals
from .patterns import NofM, check_nm_sparsity, dense_mask, fits, nm_mask, parse_pattern, unstructured_mask

__all__ = ["allocate", "sparsify"]

logger = logging.getLogger(__name__)


def sparsify(
    model: nn.Module,
    sparsity: float | None = None,
    *,
    allocation: str = "global",
    pattern: str = "unstructured",
    include: Iterable[Selector] | Selector | None = None,
    exclude: Iterable[Selector] | Selector | None = None,
) -> Masks:
    """Zero the smallest weights (by magnitude) of a model's convolutions and linear layers in place; return the masks.

    sparsity: float in [0, 1), the fraction of the *original* weights of the selected layers that goes. Exactly
        round(sparsity * total) are dropped, ties by position. Weights that are zero already are dropped first, so 0.5
        twice is 0.5. At least one weight stays in every layer; its place is taken by the next smallest of the others.
    allocation: "global" (one ranking over all layers) or "uniform" (the same fraction of each layer).
    pattern: "unstructured", or "n:m": n weights *kept* of every m consecutive input channels (of one group) at each
        kernel position. Its sparsity is 1 - n/m and `allocation` has no say. A layer whose input channels per group m
        does not divide (a stem, a depthwise convolution) is left dense, logged, and all True in the masks.
    include, exclude: globs over layer names, or module types (see `select_layers`).

    A weight shared by several layers is ranked and counted once. `torch.nn.utils.prune` masks stay and take the new
    zeros in. Dtype, memory format and requires_grad are kept. All or nothing: on an error the model is as it was.
    Raises ValueError for an unknown choice or an impossible sparsity, TypeError for one that is not a float (1 could
    mean one weight or all), LayerError for a layer whose weights are not finite or recomputed in each forward.
    """
    n_of_m = parse_pattern(pattern)
    if allocation not in ALLOCATIONS:
        raise ValueError(f"unknown allocation {allocation!r}; choose from {', '.join(ALLOCATIONS)}")
    layers, ties = prunable(model, include, exclude)
    magnitudes = {first: magnitude(first, layers[first]) for first in ties}
    if n_of_m is None:
        chosen = _unstructured(magnitudes, sparsity, allocation)
    else:
        check_nm_sparsity(sparsity, n_of_m)
        chosen = _n_of_m(magnitudes, layers, n_of_m)
    by_name = {name: chosen[first] for first, names in ties.items() for name in names}
    masks = Masks({name: by_name[name] for name in layers})
    masks.apply_(model)
    return masks


def _unstructured(magnitudes: Mapping[str, Tensor], sparsity: float | None, allocation: str) -> dict[str, Tensor]:
    if sparsity is None:
        raise ValueError('sparsity is missing: the unstructured pattern needs one, such as 0.9; only "n:m" implies it')
    removed = removals(magnitudes, sparsity, allocation)
    zeros = sum(int((scores == 0).sum()) for scores in magnitudes.values())
    if zeros > sum(removed.values()):
        logger.warning("%d weights are zero already, more than sparsity %g asks for", zeros, sparsity)
    return {name: unstructured_mask(scores, removed[name]) for name, scores in magnitudes.items()}


def _n_of_m(magnitudes: Mapping[str, Tensor], layers: Mapping[str, nn.Module], pattern: NofM) -> dict[str, Tensor]:
    dense = [name for name in magnitudes if not fits(layers[name], pattern)]
    if len(dense) == len(magnitudes):
        raise ValueError(f"no selected layer has input channels in whole groups of {pattern.m}; nothing can be pruned")
    if dense:
        logger.info("left dense, input channels not divisible by %d: %s", pattern.m, ", ".join(dense))
    return {
        name: dense_mask(scores) if name in dense else nm_mask(scores, layers[name], pattern)
        for name, scores in magnitudes.items()
    }
