"""Which weights of one layer may go together: any, N kept of every M input channels, whole filters, whole channels."""

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
    """N weights kept of every M."""

    n: int
    m: int

    @property
    def sparsity(self) -> float:
        """Fraction of the weights that goes, 1 - N/M."""
        return 1 - self.n / self.m


def parse_pattern(pattern: str) -> str | NofM:
    """The pattern itself if it is one of `NAMES`, (n, m) for "n:m" with 0 < n < m; ValueError for anything else."""
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
    """ValueError unless the sparsity is None or the pattern's own."""
    if sparsity is not None and not math.isclose(sparsity, pattern.sparsity, rel_tol=1e-9):
        raise ValueError(
            f"pattern {pattern.n}:{pattern.m} keeps {pattern.n} of {pattern.m}, a sparsity of {pattern.sparsity:.6g}; "
            f"leave sparsity out instead of asking for {sparsity!r}"
        )


def fits(module: nn.Module, pattern: NofM) -> bool:
    """Whether the layer's input channels (per group) come in whole groups of M: not in a stem, nor depthwise."""
    return input_channels(module) % pattern.m == 0


def unit_mask(units: Units, module: nn.Module, removed: int) -> Tensor:
    """Boolean mask of the weight's shape that drops the `removed` units of least score, the earlier among equals."""
    kept = ~units.smallest(removed)
    if units.count == math.prod(units.shape):
        return kept.view(units.shape)
    return along_weight(module, kept).expand(units.shape).contiguous()


def nm_mask(magnitude: Tensor, module: nn.Module, pattern: NofM) -> Tensor:
    """Boolean mask that keeps the N largest of every M consecutive input channels, at each kernel position.

    magnitude: |w| of the layer. Among equals the later channel is kept. Where the channels do not divide, the last
    group is filled up with channels of weight zero, of which the mask says nothing: it keeps N of the rest, or all.
    """
    # [groups of M, M, all else]; a transposed convolution has its input channels on axis 0, group after group
    axis = 0 if isinstance(module, _ConvTransposeNd) else 1
    channels, groups = input_channels(module), module.groups if isinstance(module, _ConvTransposeNd) else 1
    by_group = magnitude.movedim(axis, 0).unflatten(0, (groups, channels))
    missing = -channels % pattern.m
    # smaller than any weight, so that no place is lost to what is not there
    padding = by_group.new_full((groups, missing, *by_group.shape[2:]), -1.0)
    grouped = torch.cat([by_group, padding], 1).unflatten(1, (-1, pattern.m))
    kept: Tensor = grouped.argsort(dim=2, stable=True).argsort(2) >= pattern.m - pattern.n
    return kept.flatten(1, 2)[:, :channels].flatten(0, 1).movedim(0, axis).contiguous()


def input_channels(module: nn.Module) -> int:
    """Input channels that one output channel reads."""
    if isinstance(module, _ConvNd):
        return module.in_channels // module.groups
    return int(module.in_features)  # type: ignore[arg-type]
