"""What a method sees of a layer, what it may ask to be measured there, and the answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from ..network.channels import KeptChannels
from ..network.layers import dead_channels, effective_weight, out_channels
from ..runtime.distributed import Ranks
from ..statistics.base import Statistic
from ..statistics.outputs import OutputMoments

Side = Literal["input", "output"]


@dataclass(frozen=True)
class Probe:
    """What to measure at a layer: a statistic of its input or output in the pruned and in the dense network.

    `statistic=Statistic` measures nothing, for an update that follows from the weights alone. `pruned="input"` measures
    before the layer runs, so that an update of its weights is in effect when it runs.
    `dense=None`: the dense network is not measured. `replay`: where a ReLU alone reads the layer, let the method run
    through the batches once more (`Statistic.replay`). `folds`: the number of parts that the images are divided into.
    """

    statistic: type[Statistic] = OutputMoments
    pruned: Side = "output"
    dense: Side | None = "output"
    replay: bool = False
    folds: int = 1

    def side(self, is_dense: bool) -> Side:
        """Which side is measured in one of the networks; in the dense one, `pruned` where `dense` is None."""
        return (self.dense if is_dense else None) or self.pruned

    @property
    def side_by_side(self) -> bool:
        """Must the dense network run beside the pruned one, batch by batch? Plain moments can be measured apart."""
        return self.dense is not None and self.statistic is not OutputMoments


@dataclass(frozen=True)
class Request:
    """A probe at a layer or BatchNorm over the first `batches` batches.

    0 batches: nothing is measured, but the walk comes to the layer, so that a known update is written.
    """

    name: str
    probe: Probe
    batches: int


@dataclass
class Measurement:
    """The statistic at one layer, measured when all earlier layers had their final weights.

    `correct(gain, shift)` must be called when the output of a layer that was probed at its output has become
    gain * output + shift, so that later layers see it. `note(text)` shows beside the progress what was done.
    """

    name: str
    found: Statistic
    correct: Callable[[Tensor, Tensor], None] = field(default=lambda gain, shift: None)
    note: Callable[[str], None] = field(default=lambda text: None)


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer as a method sees it. A method must not write to it.

    `dense` is the same layer of the dense network, if that is there. `in_use`, boolean in the shape of the weight, is
    False where a weight is pruned. `is_product`: the output is the weight times patches of one input, and a bias.
    `ranks` are the processes over which a method may divide its work. `kept`: the dense channels that the network has,
    where it is smaller than the dense one. `curvature`: of the layer's C outputs in the dense network, float32 (C, C),
    if that was measured; see `statistics.curvature`.
    """

    name: str
    module: nn.Module
    dense: nn.Module | None
    in_use: Tensor
    is_product: bool
    ranks: Ranks
    kept: KeptChannels = field(default_factory=KeptChannels)
    curvature: Tensor | None = None

    @property
    def channels(self) -> int:
        """The number of output channels, C."""
        return out_channels(self.module)

    @property
    def weight(self) -> Tensor:
        """The weight that a forward pass uses."""
        return effective_weight(self.name, self.module)

    @property
    def dense_weight(self) -> Tensor:
        """The weight of the dense layer; of a larger one the part between the channels that this layer has.

        Raises ModelMismatchError where its input channels are not known, ValueError without a dense network.
        """
        if self.dense is None:
            raise ValueError(f"{self.name}: there is no dense network")
        return self.kept.of_weight(self.name, self.module, self.dense)

    @property
    def dead(self) -> Tensor:
        """Boolean (C,): channels whose weights are all zero."""
        return dead_channels(self.name, self.module)
