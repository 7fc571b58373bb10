"""What tests of kernels share: dtypes, settings of property tests, moments in float64 and the errors allowed."""

from __future__ import annotations

import os

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

import asr_kernels as ak

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# the interpreter takes about 10 ms per program of a kernel
PROPERTY = settings(
    max_examples=6 if INTERPRETED else 30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def exact(x: Tensor, channel_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations of the values of x, in float64, in two passes."""
    x = x.double().movedim(channel_dim, 0).reshape(x.shape[channel_dim], -1)
    mean = x.mean(1)
    return mean, (x - mean[:, None]).square().sum(1)


def tolerance(dtype: torch.dtype) -> float:
    """Relative error that is allowed in a variance.

    Below float64 the sums are float32 (unit roundoff 6e-8), added in trees or in short pieces, and the squares are
    rounded too: an error of a few units, and up to two bits more where the torch backend accepts plain sums at a small
    mean. The promise is 1e-6. In float64 the same steps have a roundoff of 1.1e-16; 1e-13 allows plain running sums.
    """
    return 1e-13 if dtype == torch.float64 else 1e-6


def assert_moments(moments: ak.ChannelMoments, x: Tensor, channel_dim: int = 1, rtol: float | None = None) -> None:
    """Compare with the moments of x: `rtol` relative to the variance, and for the mean relative to the deviation."""
    rtol = tolerance(x.dtype) if rtol is None else rtol
    mean, m2 = exact(x, channel_dim)
    assert moments.count == x.numel() // x.shape[channel_dim]
    assert moments.mean.dtype == moments.m2.dtype == torch.float64
    assert moments.mean.shape == moments.m2.shape == (x.shape[channel_dim],)
    assert moments.mean.device == x.device
    # for a constant channel: 4 roundings of float64
    floor = 2**-51 * mean.abs()
    assert ((moments.mean - mean).abs() <= rtol * (m2 / moments.count).sqrt() + floor).all()
    assert ((moments.m2 - m2).abs() <= rtol * m2 + moments.count * floor**2).all()
    assert (moments.m2 >= 0).all()


def assert_paired(paired: ak.PairedMoments, dense: Tensor, pruned: Tensor, channel_dim: int = 1) -> None:
    assert_moments(paired.dense, dense, channel_dim)
    assert_moments(paired.pruned, pruned, channel_dim)
    count = paired.dense.count
    d, p = (x.double().movedim(channel_dim, 0).reshape(x.shape[channel_dim], -1) for x in (dense, pruned))
    cov = ((d - d.mean(1, keepdim=True)) * (p - p.mean(1, keepdim=True))).mean(1)
    # Cauchy-Schwarz: the rounding of the products is at most that of the squares
    scale = (exact(dense, channel_dim)[1] * exact(pruned, channel_dim)[1]).sqrt() / count
    assert ((paired.cov - cov).abs() <= tolerance(dense.dtype) * scale + 2**-100).all()
    assert ((paired.corr - torch.where(scale > 0, cov / scale, 0.0)).abs() <= 4 * tolerance(dense.dtype)).all()


def generator(device: str, seed: int = 0) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)
