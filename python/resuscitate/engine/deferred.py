"""A correction of outputs that are already computed: in place, or within the BatchNorm that reads them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import asr_kernels as ak

from ..network.layers import BATCHNORMS, gain_and_shift
from ..network.runner import has_hooks

EPS = 0.5  # PyTorch 2.11 refuses 0; a variance of 1 - EPS makes the divisor 1 to the bit


def is_mergeable(module: nn.Module | None) -> TypeGuard[_BatchNorm]:
    """Is the module a plain BatchNorm in eval mode, with running statistics and without hooks?"""
    if type(module) not in BATCHNORMS or not isinstance(module, _BatchNorm):
        return False
    return module.running_mean is not None and not module.training and not has_hooks(module)


@dataclass
class DeferredCorrection:
    """gain * output + shift, both float64 (C,), with the channels on `axis`.

    `batchnorm`, which must be mergeable, is the only reader of the outputs; None: they have other readers.
    """

    gain: Tensor
    shift: Tensor
    axis: int
    batchnorm: _BatchNorm | None = None

    def apply(self, output: Tensor) -> None:
        """Correct the outputs in place."""
        ak.affine_(output, self.gain, self.shift, self.axis)

    @cached_property
    def factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean, variance, weight and bias of one BatchNorm, with eps `EPS`, for correction and BatchNorm together.

        The statistics of the BatchNorm are read when this is first used.
        """
        assert self.batchnorm is not None
        dtype = torch.promote_types(self.batchnorm.get_buffer("running_mean").dtype, torch.float32)
        scale, offset = gain_and_shift(self.batchnorm, self.shift)
        scale, offset = (self.gain * scale).to(dtype), offset.to(dtype)
        return torch.zeros_like(scale), torch.full_like(scale, 1 - EPS), scale, offset

    def through_batchnorm(self, output: Tensor) -> Tensor:
        """The output of the BatchNorm for the corrected outputs, in one pass over the uncorrected ones."""
        return F.batch_norm(output, *self.factors, training=False, eps=EPS)
