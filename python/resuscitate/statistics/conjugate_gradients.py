"""Conjugate gradients for many ridge regressions with one matrix, where each has its own support.

Hestenes and Stiefel 1952. All rows take their steps together: a step is one product of (rows, K) with (K, K), in
float32 with corrections of the residual in float64, where Cholesky would factor a matrix for each row. The largest
eigenvalues of the second moments, on which the steps would spend most of their number, are in the preconditioner. A
`CoupledSystem` has the rows of a layer as one system.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from asr_kernels.precision import full_precision

from .second_moments import SecondMoments

# the most steps between two residuals in float64, and after how many the host looks whether they are enough: on a GPU
# it waits for them, but a dozen steps that are not needed take longer
STEPS, LOOK_EVERY = (120, 120, 120, 120), 2
COUPLED_STEPS = 10  # for a coupled system, from the solution of its rows alone


@dataclass(frozen=True)
class Solution:
    """Weights w (..., K), float64, and their products w xx with the second moments, on the support at least."""

    w: Tensor
    product: Tensor

    @property
    def squares(self) -> Tensor:
        """The sum of squared deviations of the outputs, (...,)."""
        return (self.product * self.w).sum(-1)


@dataclass(frozen=True)
class RidgeSystems:
    """(xx + rho I) w = right on the support of each row, for G groups of R rows of K values.

    xx: the second moments, and which of their groups; their diagonal, of all groups, and rho (G, R, 1), float64;
    support (G, R, K).
    """

    xx: SecondMoments
    groups: slice
    diagonal: Tensor
    rho: Tensor
    support: Tensor

    def solve(self, right: Tensor, start: Solution, allowed: Tensor) -> tuple[Solution, Tensor]:
        """The solution, zero outside of the supports, from right (G, R, K) and a start with the same support.

        allowed (G, R): the most by which the objective w' (xx + rho I) w - 2 w' right of a row may exceed its least
        value, estimated by the preconditioned residual. Also returns the number of rows that did not reach it, a
        tensor.
        """
        with full_precision(right.device):
            preconditioner, found, inside = self._preconditioner, start, self.support.double()
            residual = self._residual(right, found, inside)
            missed = preconditioner.energy(residual) > allowed
            for steps in STEPS:
                if all_reached(~missed):
                    break
                w = found.w + self._descend(preconditioner, residual, allowed, steps)
                found = Solution(w, self.xx.times(w, self.groups))
                residual = self._residual(right, found, inside)
                missed = ~(preconditioner.energy(residual) <= allowed)
            return found, missed.sum()

    def _residual(self, right: Tensor, found: Solution, inside: Tensor) -> Tensor:
        # float32; computed in place in float64, because new memory takes as long as the arithmetic
        return (right - found.product).addcmul_(self.rho, found.w, value=-1).mul_(inside).float()

    @cached_property
    def _preconditioner(self) -> _Preconditioner:
        return _Preconditioner(self)

    def _descend(self, preconditioner: _Preconditioner, residual: Tensor, allowed: Tensor, steps: int) -> Tensor:
        """The change of w that takes this residual to the allowed one, or near it; all in float32."""
        inside, rho, most = self.support.float(), self.rho.float(), allowed[..., None]
        product = self.xx.single(self.groups)

        def times(w: Tensor) -> Tensor:
            return product(w).addcmul_(rho, w).mul_(inside)

        def enough(step: int, energy: Tensor) -> bool:
            return step > 0 and step % LOOK_EVERY == 0 and all_reached(energy <= most)

        return _descend(times, preconditioner, residual, (-1,), steps, enough)


@dataclass(frozen=True)
class CoupledSystem:
    """G w xx + rho G_d w = G cross + rho G_d present on the support of each row: all rows of a layer in one system.

    xx: the second moments, of one group, and their diagonal (K,); curvature G (O, O), float64, with the diagonal G_d;
    rho (O, 1); support (O, K). If G is diagonal, each row has a system of its own, that of `RidgeSystems`.
    """

    xx: SecondMoments
    diagonal: Tensor
    curvature: Tensor
    rho: Tensor
    support: Tensor

    def approach(self, cross: Tensor, present: Tensor, start: Tensor) -> Tensor:
        """The weights (O, K) after `COUPLED_STEPS` steps from a start towards the solution; nothing waits for them."""
        own = self.curvature.diagonal()[:, None]
        rho, inside = self.rho * own, self.support.double()
        residual = self.curvature @ (cross - self.xx.times(start[None])[0]) + rho * (present - start)
        # the inverse of the diagonal is the preconditioner
        scale = (inside / (own * self.diagonal + rho).clamp(min=torch.finfo(torch.float32).tiny)).float()
        single, least, within = self.curvature.float(), rho.float(), inside.float()
        product = self.xx.single()

        def times(w: Tensor) -> Tensor:
            return (single @ product(w[None])[0]).addcmul_(least, w).mul_(within)

        with full_precision(start.device):
            change = _descend(times, scale.mul, (residual * inside).float(), (0, 1), COUPLED_STEPS)
        return start + change.double()


def all_reached(reached: Tensor) -> bool:
    """Are all true? The host waits for the device."""
    return bool(reached.all())


def _descend(
    times: Callable[[Tensor], Tensor],
    preconditioner: Callable[[Tensor], Tensor],
    residual: Tensor,
    axes: tuple[int, ...],
    steps: int,
    enough: Callable[[int, Tensor], bool] = lambda step, energy: False,
) -> Tensor:
    """The change of w after some steps of conjugate gradients, from the residual at w, which is overwritten.

    times: multiply by the matrix. axes: of one system; the others number the systems. enough(step, energy): end here?
    The energies are the preconditioned squares of the residuals, of size 1 along the axes.
    """

    def dot(one: Tensor, other: Tensor) -> Tensor:
        return (one * other).sum(axes, keepdim=True)

    def quotient(one: Tensor, other: Tensor) -> Tensor:
        return torch.where(other > 0, one / other, nothing)

    nothing = residual.new_zeros(())
    w, direction = torch.zeros_like(residual), preconditioner(residual)
    energy = dot(residual, direction)
    for step in range(steps):
        if enough(step, energy):
            break
        product = times(direction)
        along = dot(direction, product)
        length = quotient(energy, along)
        w.addcmul_(length, direction)
        residual.addcmul_(length, product, value=-1)
        scaled = preconditioner(residual)
        before, energy = energy, dot(residual, scaled)
        direction = torch.addcmul(scaled, quotient(energy, before), direction)
    return w


class _Preconditioner:
    """Multiplies rows (G, R, K), float32, by the inverse of B' B + D on the support of each.

    B' B: the low-rank part of the second moments; D: the diagonal of the rest and of rho I. By the Woodbury identity,

        (B' B + D)^-1 = D^-1 - D^-1 B' (I + B D^-1 B')^-1 B D^-1
    """

    def __init__(self, systems: RidgeSystems) -> None:
        self.low_rank = low_rank = systems.xx.low_rank[systems.groups]
        rest = (systems.diagonal[systems.groups] - low_rank.double().square().sum(1)).clamp(min=0)
        diagonal = rest[:, None] + systems.rho
        self.inverse = torch.where(diagonal > 0, systems.support / diagonal, 0.0).float()  # D^-1 on the supports
        pairs = (low_rank[:, :, None] * low_rank[:, None]).flatten(1, 2)  # (G, r r, K)
        rank = low_rank.shape[1]
        inner = (self.inverse @ pairs.mT).unflatten(2, (rank, rank)).double()
        inner.diagonal(dim1=2, dim2=3).add_(1)
        self.inner = torch.linalg.inv_ex(inner).inverse.float().flatten(0, 1)  # (G R, r, r)
        self.turned = low_rank.mT

    def __call__(self, rows: Tensor) -> Tensor:
        scaled = self.inverse * rows
        parts = torch.bmm(scaled, self.turned)
        parts = torch.bmm(self.inner, parts.view(len(self.inner), -1, 1)).view(parts.shape)
        return scaled.addcmul_(self.inverse, torch.bmm(parts, self.low_rank), value=-1)

    def energy(self, residual: Tensor) -> Tensor:
        """By how much the objective of each row exceeds its least value, about, (G, R)."""
        return (residual * self(residual)).sum(2)
