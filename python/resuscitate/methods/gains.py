"""Methods that match the outputs of each layer to the dense ones by a gain and a shift for each channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import asr_kernels as ak

from ..engine.probes import Layer, Probe
from ..network.updates import Gain
from ..statistics.outputs import OutputMoments
from .base import Method, check_number, register


@dataclass(frozen=True, kw_only=True)
class _Gains(Method):
    """Formulas: `asr_kernels.repair_factors` with the rule of the same name.

    bias: match the means too. eps: added to variances that are divided by.
    """

    bias: bool = True
    eps: float = 1e-8

    rule: ClassVar[Any]

    def __post_init__(self) -> None:
        check_number("eps", self.eps, 0)

    def probe(self, layer: Layer) -> Probe:
        return Probe(OutputMoments)

    def solve(self, layer: Layer, found: OutputMoments, **more: Any) -> Gain:
        """`more`: further arguments of `repair_factors`."""
        options = {"rule": self.rule, "bias": self.bias, "eps": self.eps, **more}
        return Gain(*ak.repair_factors(found.dense, found.pruned, **options))


@register
@dataclass(frozen=True, kw_only=True)
class LayerWise(_Gains):
    """One gain for each layer, from its mean channel variance; one shift for each channel (arXiv 2605.21426)."""

    name = rule = "layerwise"


@register
@dataclass(frozen=True, kw_only=True)
class ChannelWise(_Gains):
    """One gain and one shift for each channel, which match its variance and mean (arXiv 2605.21426)."""

    name = rule = "channelwise"


@register
@dataclass(frozen=True, kw_only=True)
class ASR(_Gains):
    """Adaptive Signal Resuscitation (arXiv 2605.21426): the channel-wise gain, shrunk towards 1 in weak channels.

    prior: the pruned variance at which a gain is shrunk by half: the "median" or the "mean" over the channels of the
        layer, or a positive number.
    """

    prior: Literal["median", "mean"] | float = "median"

    name = rule = "asr"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.prior, str):
            check_number("prior", self.prior, 0, above=True)
        elif self.prior not in ("median", "mean"):
            raise ValueError(f"prior={self.prior!r} must be 'median', 'mean' or a positive variance")

    def solve(self, layer: Layer, found: OutputMoments, **more: Any) -> Gain:
        return super().solve(layer, found, prior=self.prior, **more)
