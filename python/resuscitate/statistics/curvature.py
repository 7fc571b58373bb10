"""Curvature: how much the outputs of the network change with those of a layer.

The second factor of the Kronecker-factored curvature (Martens and Grosse 2015), for the squared error of the outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 0.01  # the part of the identity in a curvature: no direction is without weight


def curvature_from(halves: Tensor) -> Tensor | None:
    """The curvature (O, O), float64, of a layer of O channels, its mean diagonal 1; None if nothing depends on it.

    halves: (2, O, O), float64, sums of g g' over the positions and images of either half, g (O,) the gradient of a
    random projection of the network's outputs z at a position of the layer's outputs. Their expected value is the sum
    of J' J, J the derivative of z: an error e of the layer's outputs changes z by about |J e|^2 in all.

    The mean M of both halves, each scaled to a mean diagonal of 1, is shrunk towards the identity,

        a M + (1 - a) I,   a = <A, B> / |M - I|^2,   A, B the halves less I,

    which has the least expected distance from the true curvature, because the errors of the halves are independent.
    """
    unit = torch.eye(halves.shape[1], dtype=torch.float64, device=halves.device)
    scales = halves.diagonal(dim1=1, dim2=2).mean(1)
    if not bool((scales > 0).all() & halves.isfinite().all()):
        return None
    one, other = halves / scales[:, None, None] - unit
    mean = (one + other) / 2
    power = mean.square().sum()
    part = torch.where(power > 0, (one * other).sum() / power, 0.0).clamp(0, 1)
    return unit + part / (1 + FLOOR) * mean
