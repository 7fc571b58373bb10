"""The operations as torch.compile sees them: opaque, so that a graph holds each as one node and does not break.

Eager code calls plain functions instead: the dispatcher would cost a small layer more than its kernel does.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("asr_kernels::channel_moments", mutates_args=())
def channel_moments(x: Tensor, channel_dim: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """mean and m2, float64 (C,)."""
    from .ops import channel_moments

    moments = channel_moments(x, channel_dim, tolerance=tolerance)
    # results of an operator must not share memory
    return moments.mean.clone(), moments.m2.clone()


@torch.library.custom_op("asr_kernels::paired_moments", mutates_args=())
def paired_moments(dense: Tensor, pruned: Tensor, channel_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """mean and m2 of each, and their co-moment, float64 (C,)."""
    from .ops import paired_moments

    pair = paired_moments(dense, pruned, channel_dim)
    found = (pair.dense.mean, pair.dense.m2, pair.pruned.mean, pair.pruned.m2, pair.comoment)
    mean_d, m2_d, mean_p, m2_p, comoment = (t.clone() for t in found)
    return mean_d, m2_d, mean_p, m2_p, comoment


@torch.library.custom_op("asr_kernels::affine_", mutates_args=("x",))
def affine_(x: Tensor, gain: Tensor, shift: Tensor, channel_dim: int, relu: bool) -> None:
    """x <- gain * x + shift."""
    from .ops import affine_

    affine_(x, gain, shift, channel_dim, relu=relu)


def _per_channel(x: Tensor, channel_dim: int) -> Tensor:
    return x.new_empty(x.shape[channel_dim], dtype=torch.float64)


@channel_moments.register_fake
def _(x: Tensor, channel_dim: int, tolerance: float) -> tuple[Tensor, Tensor]:
    return _per_channel(x, channel_dim), _per_channel(x, channel_dim)


@paired_moments.register_fake
def _(dense: Tensor, pruned: Tensor, channel_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    a, b, c, d, e = (_per_channel(dense, channel_dim) for _ in range(5))
    return a, b, c, d, e
