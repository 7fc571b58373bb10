"""Sparsity patterns of a layer: unstructured, N of M input channels, whole filters, whole channels."""

from __future__ import annotations

import math
import re
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..errors import did_you_mean
from ..network.layers import along_weight
from .units import Units

NAMES = ("unstructured", "filter", "channels")
Indivisible = Literal["dense", "pad", "raise"]


class NofM(NamedTuple):
    """N weights kept of every M consecutive ones."""

    n: int
    m: int


def parse_pattern(pattern: str) -> str | NofM:
    """The pattern itself if it is in `NAMES`, (n, m) for "n:m" with 0 < n < m. Raises ValueError for anything else."""
    if pattern in NAMES:
        return pattern
    found = re.fullmatch(r"(\d+):(\d+)", pattern) if isinstance(pattern, str) else None
    if found and 0 < int(found[1]) < int(found[2]):
        return NofM(int(found[1]), int(found[2]))
    raise ValueError(
        f'unknown pattern {pattern!r}; choose "unstructured", "filter", "channels", or "n:m" for n kept of m, such as '
        f'"2:4"{did_you_mean(str(pattern), NAMES)}'
    )


def check_nm_sparsity(sparsity: float | None, pattern: NofM) -> None:
    """Raise ValueError unless the sparsity is None or that of the pattern."""
    n, m = pattern
    if sparsity is not None and not math.isclose(sparsity, 1 - n / m, rel_tol=1e-9):
        remedy = f"leave sparsity out instead of asking for {sparsity!r}"
        raise ValueError(f"pattern {n}:{m} keeps {n} of {m}, a sparsity of {1 - n / m:.6g}; {remedy}")


def unit_mask(units: Units, module: nn.Module, removed: int) -> Tensor:
    """Boolean mask, weight's shape: False at the `removed` units of smallest score, among equals the earlier ones."""
    kept = ~units.smallest(removed)
    if units.count == math.prod(units.shape):
        return kept.view(units.shape)
    return along_weight(module, kept).expand(units.shape).contiguous()


def nm_mask(magnitude: Tensor, module: nn.Module, pattern: NofM) -> Tensor:
    """Boolean mask that keeps the N largest of every M consecutive input channels, at each kernel position.

    magnitude: |w| of the layer. Among equals the later channel is kept. If M does not divide the channels, the last
    group is padded with channels of weight zero, which the mask does not contain: N of its own channels are kept, or
    all.
    """
    # a transposed convolution has its input channels on axis 0, group after group
    axis = 0 if isinstance(module, _ConvTransposeNd) else 1
    channels, groups = input_channels(module), module.groups if isinstance(module, _ConvTransposeNd) else 1
    by_group = magnitude.movedim(axis, 0).unflatten(0, (groups, channels))
    missing = -channels % pattern.m
    # smaller than any |w|, so that padding is never kept in place of a weight
    padding = by_group.new_full((groups, missing, *by_group.shape[2:]), -1.0)
    grouped = torch.cat([by_group, padding], 1).unflatten(1, (-1, pattern.m))
    kept: Tensor = grouped.argsort(dim=2, stable=True).argsort(2) >= pattern.m - pattern.n
    return kept.flatten(1, 2)[:, :channels].flatten(0, 1).movedim(0, axis).contiguous()


def input_channels(module: nn.Module) -> int:
    """Number of input channels per output channel."""
    if isinstance(module, _ConvNd):
        return module.in_channels // module.groups
    return int(module.in_features)  # type: ignore[arg-type]
