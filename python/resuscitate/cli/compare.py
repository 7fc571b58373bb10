"""Accuracy and per-channel variance of a network before and after a repair, for the report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..network.snapshot import moved_to
from ..workflows.damage import damage


@dataclass
class Comparison:
    """Scores and variances by channel, of the dense network and of another one at each `add`.

    score: a function of a model, or None. dense: the dense network, if any, which is scored at once. images: those to
    measure the variances on, or None for no variances. running: run-time options, among them `device`.
    """

    score: Callable[[nn.Module], float] | None
    dense: nn.Module | None
    images: Tensor | None
    running: dict[str, Any]
    scores: dict[str, float] = field(default_factory=dict)
    channels: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dense is not None:
            self._score("dense", self.dense)

    def add(self, when: str, network: nn.Module) -> None:
        """Measure the network as it is now."""
        self._score(when, network)
        if self.dense is not None and self.images is not None and len(self.images):
            for name, found in damage(network, self.dense, self.images, **self.running).items():
                layer = self.channels.setdefault(name, {"dense": found.variance.tolist()})
                layer[when] = (found.variance * found.ratio.nan_to_num()).tolist()

    def found(self) -> dict[str, Any]:
        """Scores and channels, each if measured."""
        return {key: value for key, value in (("scores", self.scores), ("channels", self.channels)) if value}

    def _score(self, when: str, network: nn.Module) -> None:
        if self.score is not None:
            with moved_to(self.running["device"], [network]):
                self.scores[when] = self.score(network)
