"""The operations inside torch.compile: each is one opaque node of the graph, without a graph break.

Code outside torch.compile calls `eager` directly: for a small layer, PyTorch's dispatcher takes longer than the kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import eager


@torch.library.custom_op("asr_kernels::channel_moments", mutates_args=())
def channel_moments(x: Tensor, channel_dim: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """mean and m2, float64 (C,)."""
    found = eager.channel_moments(x, channel_dim, tolerance)
    # results of an operator must not share memory
    return found.mean.clone(), found.m2.clone()


@torch.library.custom_op("asr_kernels::paired_moments", mutates_args=())
def paired_moments(dense: Tensor, pruned: Tensor, channel_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """mean and m2 of dense, of pruned, and their co-moment: float64 (C,)."""
    mean_d, m2_d, mean_p, m2_p, comoment = (t.clone() for t in eager.paired_moments(dense, pruned, channel_dim))
    return mean_d, m2_d, mean_p, m2_p, comoment


@torch.library.custom_op("asr_kernels::affine_", mutates_args=("x",))
def affine_(x: Tensor, gain: Tensor, shift: Tensor, channel_dim: int, relu: bool) -> None:
    """x <- gain * x + shift, then ReLU with `relu`."""
    eager.affine_(x, gain, shift, channel_dim, relu)


def _per_channel(x: Tensor, channel_dim: int) -> Tensor:
    return x.new_empty(x.shape[channel_dim], dtype=torch.float64)


@channel_moments.register_fake
def _(x: Tensor, channel_dim: int, tolerance: float) -> tuple[Tensor, Tensor]:
    return _per_channel(x, channel_dim), _per_channel(x, channel_dim)


@paired_moments.register_fake
def _(dense: Tensor, pruned: Tensor, channel_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    a, b, c, d, e = (_per_channel(dense, channel_dim) for _ in range(5))
    return a, b, c, d, e
