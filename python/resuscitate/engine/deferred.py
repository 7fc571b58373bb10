"""A correction of outputs that are already computed: in place, or within the BatchNorm that reads them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import asr_kernels as ak

from ..network.layers import BATCHNORMS
from ..network.runner import has_hooks


def mergeable(module: nn.Module | None) -> _BatchNorm | None:
    """The module, if it is a plain BatchNorm in eval mode with running statistics and without hooks; else None."""
    if type(module) not in BATCHNORMS or not isinstance(module, _BatchNorm) or has_hooks(module) or module.training:
        return None
    return module if module.running_mean is not None and module.running_var is not None else None


@dataclass
class DeferredCorrection:
    """gain * output + shift, both float64 (C,), with the channels on `axis`.

    `batchnorm`, which must be `mergeable`, is the only reader of the outputs; None: they have other readers. Its
    statistics are read when the correction is first made.
    """

    gain: Tensor
    shift: Tensor
    axis: int
    batchnorm: _BatchNorm | None = None
    _factors: tuple[Tensor, Tensor, Tensor, Tensor] | None = field(default=None, init=False)

    def apply(self, output: Tensor) -> None:
        """Correct the outputs in place."""
        ak.affine_(output, self.gain, self.shift, self.axis)

    def factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean, variance, weight and bias of one BatchNorm, with an eps of 0, for correction and BatchNorm together."""
        if self._factors is None:
            module = self.batchnorm
            assert module is not None
            assert module.running_mean is not None
            assert module.running_var is not None
            scale = (module.running_var.double() + module.eps).rsqrt()
            scale = scale if module.weight is None else scale * module.weight
            offset = (self.shift - module.running_mean) * scale + (0.0 if module.bias is None else module.bias)
            dtype = torch.float64 if module.running_mean.dtype == torch.float64 else torch.float32
            scale, offset = (self.gain * scale).to(dtype), offset.to(dtype)
            self._factors = torch.zeros_like(scale), torch.ones_like(scale), scale, offset
        return self._factors

    def through_batchnorm(self, output: Tensor) -> Tensor:
        """The output of the BatchNorm for the corrected outputs, in one pass over the uncorrected ones."""
        mean, var, weight, bias = self.factors()
        return F.batch_norm(output, mean, var, weight, bias, training=False, eps=0.0)
