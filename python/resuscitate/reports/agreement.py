"""How near the outputs of a network are to those of the dense one, before and after a change."""

from __future__ import annotations

from dataclasses import dataclass

FEWEST = 32  # images that are enough to say that the outputs are worse
ROUNDING = 1e-4  # of the norm of the dense outputs: a smaller rise of the error says nothing


@dataclass(frozen=True)
class Nearness:
    """How near the outputs are to the dense network's, on `images` images, to which no weight was fitted if `held_out`.

    top1: the part of the images for which both have the same largest logit; None for outputs that are not logits.
    error: ||outputs - dense outputs|| / ||dense outputs||; None where it is not finite.
    """

    top1: float | None
    error: float | None
    images: int
    held_out: bool


@dataclass(frozen=True)
class Agreement:
    """Agreement with the dense network on `images` images; `held_out` says that no weight was fitted to these.

    before, after: the part of the images for which both networks have the same largest logit; None where the outputs
    are not logits, that is, do not begin with a tensor (N, K), K at least 2. error_before, error_after: the norm of the
    difference of the outputs over that of the dense outputs; None where it is not finite.
    """

    before: float | None
    after: float | None
    error_before: float | None
    error_after: float | None
    images: int
    held_out: bool

    @classmethod
    def of(cls, before: Nearness | None, after: Nearness | None) -> Agreement | None:
        """From both; None where the outputs could not be compared."""
        if before is None or after is None:
            return None
        return cls(before.top1, after.top1, before.error, after.error, after.images, after.held_out)

    @property
    def fell(self) -> bool:
        """Are the outputs `worse` on 32 images or more?"""
        return self.worse and self.images >= FEWEST

    @property
    def worse(self) -> bool:
        """Has the error risen by more than rounding, and the number of equal largest logits not?

        Both: to restore the variance of outputs that have lost it raises their error, and finds more of the classes.
        """
        if self.error_before is None:
            return self.error_after is None and (self.after or 0.0) < (self.before or 0.0)
        if self.error_after is None:
            return True
        return self.error_after > self.error_before + ROUNDING and not (self.after or 0.0) > (self.before or 0.0)

    def __str__(self) -> str:
        pairs = (("same class", self.before, self.after), ("error", self.error_before, self.error_after))
        parts = [f"{name} {_text(was)} -> {_text(now)}" for name, was, now in pairs if (was, now) != (None, None)]
        which = "held-out images" if self.held_out else "of the images that it used"
        return f"{', '.join(parts)} on {self.images} {which}"


def _text(number: float | None) -> str:
    return "not finite" if number is None else f"{number:.3f}"
