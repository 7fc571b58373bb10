"""Which weights of one layer go: anywhere, or N kept of every M along the input channels."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .allocation import smallest


class NofM(NamedTuple):
    """N weights kept of every M."""

    n: int
    m: int

    @property
    def sparsity(self) -> float:
        """Fraction of the weights that goes, 1 - N/M."""
        return 1 - self.n / self.m


def parse_pattern(pattern: str) -> NofM | None:
    """None for "unstructured", (n, m) for "n:m" with 0 < n < m; ValueError, listing the choices, for anything else."""
    if pattern == "unstructured":
        return None
    found = re.fullmatch(r"(\d+):(\d+)", pattern) if isinstance(pattern, str) else None
    if found and 0 < int(found[1]) < int(found[2]):
        return NofM(int(found[1]), int(found[2]))
    raise ValueError(f'unknown pattern {pattern!r}; choose "unstructured", or "n:m" for n kept of m, such as "2:4"')


def check_nm_sparsity(sparsity: float | None, pattern: NofM) -> None:
    """ValueError unless the sparsity is None or the pattern's own."""
    if sparsity is not None and not math.isclose(sparsity, pattern.sparsity, rel_tol=1e-9):
        raise ValueError(
            f"pattern {pattern.n}:{pattern.m} keeps {pattern.n} of {pattern.m}, a sparsity of {pattern.sparsity:.6g}; "
            f"leave sparsity out instead of asking for {sparsity!r}"
        )


def fits(module: nn.Module, pattern: NofM) -> bool:
    """Whether the layer's input channels (per group) come in whole groups of M: not in a stem, nor depthwise."""
    return _input_channels(module) % pattern.m == 0


def unstructured_mask(magnitude: Tensor, removed: int) -> Tensor:
    """Boolean mask that drops the `removed` smallest magnitudes, the earlier position first among equals."""
    return ~smallest(magnitude, removed)


def nm_mask(magnitude: Tensor, module: nn.Module, pattern: NofM) -> Tensor:
    """Boolean mask that keeps the N largest of every M consecutive input channels, at each kernel position.

    magnitude: |w| of the layer. Among equals the later channel is kept. The layer must fit (see `fits`).
    """
    # [groups of M, M, all else]; a transposed convolution has its input channels on axis 0, group after group
    axis = 0 if isinstance(module, _ConvTransposeNd) else 1
    grouped = magnitude.movedim(axis, 0).unflatten(0, (-1, pattern.m))
    kept: Tensor = grouped.argsort(dim=1, stable=True).argsort(1) >= pattern.m - pattern.n
    return kept.flatten(0, 1).movedim(0, axis)


def _input_channels(module: nn.Module) -> int:
    """Input channels that one output channel reads."""
    if isinstance(module, _ConvNd):
        return module.in_channels // module.groups
    return int(module.in_features)  # type: ignore[arg-type]


def dense_mask(magnitude: Tensor) -> Tensor:
    """A mask that keeps everything."""
    return torch.ones_like(magnitude, dtype=torch.bool)
