"""What the benchmark of the kernels times: each operation, its peers in PyTorch, and whether its result is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import asr_kernels as ak

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
AXES = (0, 2, 3)
TOLERANCE = 1e-5  # of a statistic, at a standard deviation of 1

Candidates = dict[str, Callable[[], Any]]


class Case(NamedTuple):
    """Two correlated activations (N, C, H, W), and a gain and a shift (C,) whose repeated use on x stays bounded."""

    x: Tensor
    y: Tensor
    gain: Tensor
    shift: Tensor


def make_case(shape: tuple[int, ...], layout: str, dtype: str, device: str) -> Case:
    """Standard deviation 1 and mean 1; from a fixed seed."""
    torch.manual_seed(0)
    x, noise = (torch.randn(shape, device=device) for _ in range(2))
    gain, shift = torch.rand(2, shape[1], device=device)
    pair = (x + 1, 0.6 * x + 0.8 * noise + 1)
    x, y = (t.to(DTYPES[dtype], memory_format=LAYOUTS[layout]) for t in pair)
    return Case(x, y, 0.4 + 0.5 * gain, 0.5 + shift)


def turns(case: Case) -> list[Case]:
    """The case and copies of it, all inputs together larger than three times the L2 cache."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size if case.x.is_cuda else 0
    copies = max(3 * cache // case.x.nbytes, 1)
    return [case, *(Case(case.x.clone(), case.y.clone(), case.gain, case.shift) for _ in range(copies))]


def var_mean(x: Tensor) -> tuple[Tensor, ...]:
    """Mean and variance of each channel."""
    return torch.var_mean(x, AXES, correction=0)[::-1]


def pair_eager(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Means, variances and the covariance of each channel."""
    (var_x, mean_x), (var_y, mean_y) = (torch.var_mean(t, AXES, correction=0, keepdim=True) for t in (x, y))
    return tuple(t.flatten() for t in (mean_x, var_x, mean_y, var_y, ((x - mean_x) * (y - mean_y)).mean(AXES)))


def affine_eager(x: Tensor, gain: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
    """In place, with gain and shift in the dtype of x."""
    return (x.mul_(gain).add_(shift),)


def moments(case: Case) -> tuple[Candidates, Callable[..., Any], tuple[Tensor, ...]]:
    """Moments: our kernel and the eager peers, the formula for Inductor, the arguments of the formula."""
    x = case.x

    def ours() -> tuple[Tensor, ...]:
        found = ak.channel_moments(x)
        return found.mean, found.m2

    peers: Candidates = {"ours": ours, "eager": lambda: var_mean(x)}
    if x.is_cuda:
        peers["batch_norm_stats"] = lambda: torch.batch_norm_stats(x, 0.0)
    return peers, var_mean, (x,)


def paired(case: Case) -> tuple[Candidates, Callable[..., Any], tuple[Tensor, ...]]:
    """Paired moments: as `moments`."""
    x, y = case.x, case.y

    def ours() -> tuple[Tensor, ...]:
        pair = ak.paired_moments(x, y)
        return pair.dense.mean, pair.dense.m2, pair.pruned.mean, pair.pruned.m2, pair.comoment

    return {"ours": ours, "eager": lambda: pair_eager(x, y)}, pair_eager, (x, y)


def affine(case: Case) -> tuple[Candidates, Callable[..., Any], tuple[Tensor, ...]]:
    """Gain and shift in place: as `moments`."""
    x = case.x
    g, b = (t.to(x.dtype)[:, None, None] for t in (case.gain, case.shift))
    peers: Candidates = {
        "ours": lambda: (ak.affine_(x, case.gain, case.shift),),
        "eager": lambda: affine_eager(x, g, b),
        "addcmul": lambda: (torch.addcmul(b, x, g, out=x),),
    }
    return peers, affine_eager, (x, g, b)


# with the number of tensors that are read or written
OPERATIONS = {"moments": (moments, 1), "paired": (paired, 2), "affine": (affine, 2)}


def is_right(operation: str, case: Case) -> bool:
    """Does our kernel agree with float64?"""
    before = case.x.clone(memory_format=torch.preserve_format)
    found = OPERATIONS[operation][0](case)[0]["ours"]()
    if operation == "affine":
        truth = affine_eager(before.double(), *(t.double()[:, None, None] for t in (case.gain, case.shift)))
        tolerance = torch.finfo(before.dtype).eps
    else:
        truth = pair_eager(before.double(), case.y.double()) if operation == "paired" else var_mean(before.double())
        # ours are means and sums of products; the others are variances and a covariance
        count = before.numel() // before.shape[1]
        found = tuple(each / count if i in (1, 3, 4) else each for i, each in enumerate(found))
        tolerance = TOLERANCE
    return all(bool(((a - b).abs() <= tolerance * (1 + b.abs())).all()) for a, b in zip(found, truth, strict=True))
