"""Correlations of all output channels of a layer in two networks, which may have different numbers of channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..network.layers import channel_dim, out_channels
from ..network.runner import check_tensors
from .base import Place, Statistic


class OutputCorrelations(Statistic):
    """`products`, float64: the sum of z z', z = (1, outputs in the one network, outputs in the other network)."""

    measured = ("products",)

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        assert place.dense is not None
        size = 1 + out_channels(place.module) + out_channels(place.dense)
        self.products = torch.zeros(size, size, dtype=torch.float64, device=next(place.module.parameters()).device)

    def update(self, batch: int, pruned: Any, dense: Any) -> None:
        check_tensors(self.place.name, pruned, dense)
        outputs = [x.movedim(channel_dim(self.place.module), 0).flatten(1).double() for x in (pruned, dense)]
        z = torch.cat([torch.ones_like(outputs[0][:1]), *outputs])
        self.products += z @ z.T

    @property
    def correlations(self) -> Tensor:
        """float32 (channels, dense channels); 0 for a channel that is constant."""
        count, own = self.products[0, 0], out_channels(self.place.module)
        mean = self.products[0, 1:] / count
        covariance = self.products[1:, 1:] / count - torch.outer(mean, mean)
        variance = covariance.diagonal().clamp(min=0)
        constant = variance <= 1e-12 * mean.square()
        deviation = variance.sqrt().masked_fill(constant, torch.inf)
        found = covariance / torch.outer(deviation, deviation)
        return found[:own, own:].float()

    @property
    def empty(self) -> bool:
        return not bool(self.products[0, 0])
