"""Conjugate gradients for many ridge regressions with one matrix, where each has its own support.

Preconditioned by the diagonal (Hestenes and Stiefel 1952). All rows take their steps together: a step is one product of
(rows, K) with (K, K), in float32 with a correction of the residual in float64, where Cholesky would factor a matrix for
each row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CORRECTIONS, STEPS, LOOK_EVERY = 4, 120, 4  # the most residuals in float64, steps for each, steps between two looks


@dataclass(frozen=True)
class RidgeSystems:
    """(c + rho I) w = right on the support of each row: c (K, K), rho a scalar tensor, float64; support (O, K)."""

    c: Tensor
    rho: Tensor
    support: Tensor

    def solve(self, right: Tensor, start: Tensor, allowed: Tensor) -> Tensor | None:
        """The solution w (O, K) float64, zero outside of the supports, from right (O, K) and a start (O, K).

        allowed (O,): the most by which the objective w' (c + rho I) w - 2 w' right of a row may exceed its least value,
        estimated by the residual r' D^-1 r, D the diagonal of c + rho I. None: not reached within `STEPS`.
        """
        inside = self.support.double()
        inverse = inside / (self.c.diagonal() + self.rho)
        single = self.c.float(), self.rho.float(), inside.float(), inverse.float(), allowed.float()
        w = start * inside
        for _ in range(CORRECTIONS):
            residual = (right - w @ self.c - self.rho * w) * inside
            if bool(((residual.square() * inverse).sum(1) <= allowed).all()):
                return w
            w = w + _descend(*single, residual.float()).double()
        return None


def _descend(c: Tensor, rho: Tensor, inside: Tensor, inverse: Tensor, allowed: Tensor, residual: Tensor) -> Tensor:
    """The change of w that takes this residual to the allowed one, or near it."""
    w, direction = torch.zeros_like(residual), inverse * residual
    energy = (residual * direction).sum(1)
    for step in range(STEPS):
        if step % LOOK_EVERY == 0 and bool((energy <= allowed).all()):
            break
        product = torch.addmm(rho * direction, direction, c) * inside
        curvature = (direction * product).sum(1)
        length = torch.where(curvature > 0, energy / curvature, 0.0)[:, None]
        w.addcmul_(length, direction)
        residual = torch.addcmul(residual, length, product, value=-1)
        scaled = inverse * residual
        before, energy = energy, (residual * scaled).sum(1)
        direction = torch.addcmul(scaled, torch.where(before > 0, energy / before, 0.0)[:, None], direction)
    return w
