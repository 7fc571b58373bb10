"""Conjugate gradients for many ridge regressions with one matrix, where each has its own support.

Preconditioned by the diagonal (Hestenes and Stiefel 1952). All rows take their steps together: a step is one product of
(rows, K) with (K, K), in float32 with corrections of the residual in float64, where Cholesky would factor a matrix for
each row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from asr_kernels.precision import full_precision

from .second_moments import Matrices, Rows

# the most steps between two residuals in float64, with a look at the residual after each few steps and without one
STEPS, STEPS_WITHOUT_LOOK, LOOK_EVERY = (120, 120, 120, 120), (60, 30), 4


@dataclass(frozen=True)
class RidgeSystems:
    """(xx + rho I) w = right on the support of each row, for G groups of R rows of K values.

    xx: the second moments, and which of their groups; their diagonal, of all groups, and rho (G, R, 1), float64;
    support (G, R, K).
    """

    xx: Matrices | Rows
    groups: slice
    diagonal: Tensor
    rho: Tensor
    support: Tensor

    def solve(self, right: Tensor, start: Tensor, allowed: Tensor, look: bool) -> tuple[Tensor, Tensor]:
        """The solution w (G, R, K) float64, zero outside of the supports, from right and a start of the same shape.

        allowed (G, R): the most by which the objective w' (xx + rho I) w - 2 w' right of a row may exceed its least
        value, estimated by the residual r' D^-1 r, D the diagonal of xx + rho I. Also returns the number of rows that
        did not reach it, a tensor. look: end as soon as all have; otherwise take a fixed number of steps.
        """
        inside, diagonal = self.support.double(), self.diagonal[self.groups, None] + self.rho
        inverse = torch.where(diagonal > 0, inside / diagonal, 0.0)
        times = partial(self.xx.times, groups=self.groups)
        single = (times, self.rho.float(), inside.float(), inverse.float(), allowed.float())
        w = start * inside

        def missed() -> tuple[Tensor, Tensor]:
            residual = (right - self.xx.times(w, self.groups) - self.rho * w) * inside
            return residual, (~((residual.square() * inverse).sum(2) <= allowed)).sum()

        residual, count = missed()
        for steps in STEPS if look else STEPS_WITHOUT_LOOK:
            if look and not count:
                break
            with full_precision(right.device):
                w = w + _descend(*single, residual.float(), steps, look).double()
            residual, count = missed()
        return w, count


def _descend(
    times: Callable[[Tensor], Tensor],
    rho: Tensor,
    inside: Tensor,
    inverse: Tensor,
    allowed: Tensor,
    residual: Tensor,
    steps: int,
    look: bool,
) -> Tensor:
    """The change of w that takes this residual to the allowed one, or near it."""
    w, direction = torch.zeros_like(residual), inverse * residual
    energy = (residual * direction).sum(2)
    for step in range(steps):
        if look and step % LOOK_EVERY == 0 and bool((energy <= allowed).all()):
            break
        product = torch.addcmul(times(direction), rho, direction) * inside
        curvature = (direction * product).sum(2)
        length = torch.where(curvature > 0, energy / curvature, 0.0)[..., None]
        w.addcmul_(length, direction)
        residual = torch.addcmul(residual, length, product, value=-1)
        scaled = inverse * residual
        before, energy = energy, (residual * scaled).sum(2)
        direction = torch.addcmul(scaled, torch.where(before > 0, energy / before, 0.0)[..., None], direction)
    return w
