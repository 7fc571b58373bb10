"""The operations outside torch.compile: choose a backend and run.

Arguments are those of the public functions, checked by them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import backend_for
from .factors import Prior, Rule
from .merging import Moments
from .views import overlaps

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
    return backend_for(x, "moments").channel_moments(x, channel_dim, tolerance, running)


def paired_moments(dense: Tensor, pruned: Tensor, channel_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """mean and m2 of dense, of pruned, and their co-moment: float64 (C,)."""
    return backend_for(dense, "moments").paired_moments(dense, pruned, channel_dim)


def repair_factors(
    dense: Moments, pruned: Moments, rule: Rule, prior: Prior, bias: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gain and shift, float64 (C,), from moments on one device; then both again, in float32 if the backend has them."""
    gain, shift, *rounded = backend_for(pruned.mean, "factors").repair_factors(dense, pruned, rule, prior, bias, eps)
    return gain, shift, *(rounded or (gain, shift))


def affine_(x: Tensor, gain: Tensor, shift: Tensor, channel_dim: int, relu: bool) -> None:
    """x <- gain * x + shift, then ReLU with `relu`. Raises ValueError where x overlaps itself in memory."""
    if overlaps(x):
        raise ValueError("x overlaps itself in memory, or may (an expanded tensor?); clone it first")
    if x.numel() == 0:
        return
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    gain, shift = (factor.detach().to(x.device, dtype).contiguous() for factor in (gain, shift))
    backend_for(x, "affine").affine_(x, gain, shift, channel_dim, relu)
