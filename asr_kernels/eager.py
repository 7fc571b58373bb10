"""The operations outside torch.compile: view a tensor as (N, C, L), choose a backend and a device, run.

Arguments are those of the public functions, checked by them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .backends import backend_for
from .factors import Prior, Rule
from .merging import Moments

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check(x: Tensor, channel_dim: int, empty: bool = False) -> None:
    """Raise TypeError for another type or dtype, ValueError for a missing axis or, unless `empty`, for no values."""
    if not isinstance(x, Tensor):
        raise TypeError(f"expected a tensor, not {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"expected float16, bfloat16, float32 or float64, not {x.dtype}; convert it first")
    if not -x.dim() <= channel_dim < x.dim():
        raise ValueError(f"a tensor of shape {tuple(x.shape)} has no channel axis {channel_dim}")
    if x.numel() == 0 and not empty:
        raise ValueError(f"an empty tensor (shape {tuple(x.shape)}) has no moments")


def channel_moments(x: Tensor, channel_dim: int, tolerance: float, running: Moments | None = None) -> Moments:
    """Moments of each channel of x, merged with `running`, which is on the device of x."""
    with torch.no_grad(), _device_guard(x):
        view = as_ncl(x, channel_dim=channel_dim) or as_ncl(x.contiguous(), channel_dim=channel_dim)
        return backend_for(x, "moments").channel_moments(*view, tolerance, running)


def paired_moments(dense: Tensor, pruned: Tensor, channel_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """mean and m2 of dense, of pruned, and their co-moment: float64 (C,)."""
    with torch.no_grad(), _device_guard(dense):
        views = as_ncl(dense, pruned, channel_dim=channel_dim)
        views = views or as_ncl(dense.contiguous(), pruned.contiguous(), channel_dim=channel_dim)
        return backend_for(dense, "moments").paired_moments(*views)


def repair_factors(
    dense: Moments, pruned: Moments, rule: Rule, prior: Prior, bias: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """Gain and shift, float64 (C,), from moments on one device."""
    with torch.no_grad(), _device_guard(pruned.mean):
        return backend_for(pruned.mean, "factors").repair_factors(dense, pruned, rule, prior, bias, eps)


def affine_(x: Tensor, gain: Tensor, shift: Tensor, channel_dim: int, relu: bool) -> None:
    """x <- gain * x + shift, then ReLU with `relu`. Raises ValueError where x overlaps itself in memory."""
    if _overlaps(x):
        raise ValueError("x overlaps itself in memory, or may (an expanded tensor?); clone it first")
    if x.numel() == 0:
        return
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    gain, shift = (factor.detach().to(x.device, dtype).contiguous() for factor in (gain, shift))
    with torch.no_grad(), _device_guard(x):
        backend = backend_for(x, "affine")
        for view in _ncl_parts(x, channel_dim):
            backend.affine_(view, gain, shift, relu)


def as_ncl(*tensors: Tensor, channel_dim: int) -> list[Tensor]:
    """(N, C, L) views of tensors of one shape, with axes folded alike; an empty list where strides forbid them.

    One tensor is read in the order of its memory, because the order of its values does not matter. Two tensors keep
    their axis order, because their values are paired.
    """
    first = tensors[0]
    channel = channel_dim % first.dim()
    dims = [d for d in range(first.dim()) if d != channel and first.shape[d] > 1]
    if len(tensors) == 1:
        dims.sort(key=first.stride, reverse=True)
    folds: list[tuple[int, tuple[int, ...]]] = []
    for d in dims:
        size, strides = first.shape[d], tuple(x.stride(d) for x in tensors)
        if folds and all(outer == inner * size for outer, inner in zip(folds[-1][1], strides, strict=True)):
            folds[-1] = (folds[-1][0] * size, strides)
        else:
            folds.append((size, strides))
    if len(folds) > 2:
        return []
    while len(folds) < 2:
        folds.insert(0, (1, (0,) * len(tensors)))
    (n, n_strides), (length, l_strides) = folds
    return [
        x.as_strided((n, x.shape[channel], length), (ns, x.stride(channel), ls), x.storage_offset())
        for x, ns, ls in zip(tensors, n_strides, l_strides, strict=True)
    ]


def _ncl_parts(x: Tensor, channel_dim: int) -> Iterator[Tensor]:
    """(N, C, L) views that together cover x: one view where the strides allow it."""
    if view := as_ncl(x, channel_dim=channel_dim):
        yield from view
        return
    channel = channel_dim % x.dim()
    _, split = min((x.shape[d], d) for d in range(x.dim()) if d != channel and x.shape[d] > 1)
    for part in x.unbind(split):
        yield from _ncl_parts(part, channel - (split < channel))


def _overlaps(x: Tensor) -> bool:
    """Whether two indices may share an address: False only if each stride exceeds the reach of all smaller strides."""
    reach = 0
    for stride, size in sorted((x.stride(d), x.shape[d]) for d in range(x.dim()) if x.shape[d] > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _device_guard(x: Tensor) -> Any:
    return torch.cuda.device_of(x) if x.is_cuda else nullcontext()
