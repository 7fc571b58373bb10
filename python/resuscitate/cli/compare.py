"""A network before and after, on labelled images and channel by channel, for the report."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

IMAGES = 512  # at most, for the channels' variances


class Comparison:
    """Scores and variances by channel, of the dense network and of another at each `add`.

    score: a function of a model, or None; channels: the dense network to compare with, or None.
    """

    def __init__(
        self,
        score: Callable[[nn.Module], float] | None,
        dense: nn.Module | None,
        detail: bool,
        images: Tensor,
        device: str | None,
        dtype: str | None,
        batch_size: int,
    ) -> None:
        self.score, self.dense, self.images, self.device = score, dense if detail else None, images[:IMAGES], device
        self.running: dict[str, Any] = {"device": device, "dtype": dtype, "batch_size": batch_size}
        self.scores: dict[str, float] = {}
        self.channels: dict[str, dict[str, Any]] = {}
        if score is not None and dense is not None:
            self.scores["dense"] = self._score(dense)

    def add(self, when: str, network: nn.Module) -> None:
        """Note what the network does now."""
        from ..workflows.damage import damage

        if self.score is not None:
            self.scores[when] = self._score(network)
        if self.dense is not None:
            for name, found in damage(network, self.dense, self.images, **self.running).items():
                layer = self.channels.setdefault(name, {"dense": found.variance.tolist()})
                layer[when] = (found.variance * found.ratio.nan_to_num()).tolist()

    def found(self) -> dict[str, Any]:
        """For the report: what was asked for."""
        return {key: value for key, value in (("scores", self.scores), ("channels", self.channels)) if value}

    def _score(self, network: nn.Module) -> float:
        from ..network.snapshot import moved_to

        assert self.score is not None
        with moved_to(self.device, [network]):
            return self.score(network)
