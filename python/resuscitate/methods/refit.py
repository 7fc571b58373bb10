"""Least squares on the weights that are left: filters are turned, not only made louder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from asr_kernels import CrossProducts, PatchMoments, Window, patch_moments

from ..network.layers import effective_weight, stored_bias
from ..network.operands import operands, product, with_batch_axis
from ..runtime.distributed import Ranks
from ..statistics.least_squares import Problem

RIDGE, MOST_GAIN = 1e-2, 3.0
# cross-validation: the ridges to choose from, the channels of a layer to judge them by, and the parts of the images, 2
# where a patch has more than `LARGE` values
RIDGES, JUDGES, FOLDS, LARGE = (0.01, 0.05, 0.25, 1.25), 16, 4, 2048
# where a ReLU hides errors: passes over the images to let go of them, each a look so many steps ahead of the last; none
# where least squares alone leave so little of the variance unexplained
PASSES, AHEAD, LITTLE = 2, 2.0, 0.01
POINTWISE = Window((1,), (1,), ((0, 0),), (1,))  # a linear layer as a convolution
WIDEST = 8192  # values of a patch: their second moments take half a GiB


def blocks(layer: Any) -> int:
    """Into how many blocks of input channels a layer is cut, so that none has patches of more than `WIDEST` values."""
    channels, values = layer.weight.shape[1], layer.weight[0].numel()
    if getattr(layer, "groups", 1) > 1:
        return 1
    return next(n for n in range(1, channels + 1) if channels % n == 0 and (values <= WIDEST * n or n == channels))


def by_block(weight: Tensor, count: int) -> Tensor:
    """(O, C, ...) as (count * O, C / count, ...): what each block of input channels adds to each output."""
    return weight.unflatten(1, (count, -1)).transpose(0, 1).flatten(0, 1)


def whole(weight: Tensor, shape: torch.Size, count: int) -> Tensor:
    """`by_block` undone: (count * O, K / count) in the shape (O, C, ...) of the layer's weight."""
    return weight.unflatten(0, (count, -1)).transpose(0, 1).reshape(shape)


def contributions(name: str, layer: nn.Module, x: Tensor, count: int) -> Tensor:
    """What each block of input channels adds to the output, (N, count * O, ...); the first adds the bias too."""
    (x, window), old = operands(name, layer, x), stored_bias(name, layer)
    weight = by_block(effective_weight(name, layer), count)
    bias = None if old is None else torch.cat([old, old.new_zeros(len(weight) - len(old))])
    if not window.kernel:
        x, weight, window = x.reshape(-1, x.shape[-1], 1), weight[:, :, None], POINTWISE
    return product(x, weight, bias, replace(window, groups=count))


def moments_of(
    name: str,
    layer: nn.Module,
    dense: nn.Module,
    x: Any,
    wanted: Any,
    deal: Callable[[int], Mapping[int, Tensor | None]],
) -> dict[int, PatchMoments]:
    """What `fit` needs of one batch: `x` is what the layer reads; `wanted` the output of the dense one.

    Where the layer is cut into blocks, `wanted` is what the dense one *reads*: each block is to add what the same block
    adds in the dense layer, which leaves what they could do for one another unused. `deal`: for so many rows, along the
    first axis of what is read, those of each fold of the images; None: all.
    """
    x, wanted = with_batch_axis(layer, x, wanted)
    (x, window), count = operands(name, layer, x), blocks(layer)
    if count > 1:
        wanted = contributions(name, dense, wanted, count)
        if not window.kernel:
            x, window = x.reshape(-1, x.shape[-1], 1), POINTWISE
        window = replace(window, groups=count)
    found = {}
    for fold, chosen in deal(len(x)).items():
        read, outputs = (each if chosen is None else each[chosen.to(each.device)] for each in (x, wanted))
        found[fold] = patch_moments(read, outputs, window)
    return found


@dataclass(frozen=True)
class Fit:
    """Weights (O, K) and biases (O,), float64, with which a layer comes nearest to the wanted outputs.

    `before` and `after` are the variance of its outputs over that of the wanted ones, and `explained` the share of that
    variance which the fit explains, or of which a ReLU hides the error, all summed over channels; None where the wanted
    outputs are constant.
    """

    weight: Tensor
    bias: Tensor
    before: float | None
    after: float | None
    explained: float | None


def fit(
    moments: PatchMoments,
    weight: Tensor,
    support: Tensor,
    *,
    ridge: float = RIDGE,
    most: float = MOST_GAIN,
    aim: Callable[[Tensor, Tensor], CrossProducts] | None = None,
    ranks: Ranks | None = None,
) -> Fit:
    """Least squares on the supports, pulled towards the present weights, with the lost variance given back.

    weight, support: (O, K), K the values of a patch of one group; support is boolean, and outside of it all is zero.

        w_S = (C_SS + rho I)^-1 (Cov(x_S, y) + rho w0_S),   rho = ridge * mean(diag C)
        w_S <- g w_S,   g = sqrt(var y / w_S' C_SS w_S), at most `most`
        b = mean(y) - w_S' mean(x_S)

    Where a layer's inputs do not vary its weights stay. Channels that share a support share a factor; the others are
    solved in padded batches. `ranks`, which all have the same moments, solve for some of the channels each.

    `aim(w, b)`, where a ReLU hides some errors (`gates`), gives the cross products, about the means of `moments`, for
    the outputs y that are as good as the wanted ones, and of these the nearest to those which w and b make. The first
    line is then solved anew for them, and again; var y and mean(y) are theirs.
    """
    problem = Problem(moments, weight, support, ridge, Ranks() if ranks is None else ranks)
    targets = problem.own_targets()
    total, w = targets.variance.sum(), problem.solve(targets)
    if aim is not None and problem.unexplained(w, targets).sum() > LITTLE * total:
        ahead = w
        for _ in range(PASSES):
            found = aim(ahead, problem.bias(ahead, targets))
            targets = problem.targets(found.xy, found.yy, found.y)
            last, w = w, problem.solve(targets)
            ahead = w + AHEAD * (w - last)
    varies = problem.variance(w)
    gain = torch.where((varies > 0) & (targets.variance > 0), (targets.variance / varies).sqrt().clamp(max=most), 1.0)
    before, after = problem.variance(problem.present).sum(), (varies * gain.square()).sum()
    shares = before, after, total - problem.unexplained(w, targets).sum()
    w = w * gain[:, None]
    bias = problem.bias(w, targets)
    # what is left of a zero is rounding; it must not become a bias where there is none
    nothing = bias.square() <= 1e-8 * targets.variance + 1e-12 * targets.mean.square()
    return Fit(w, torch.where(nothing, 0.0, bias), *(float(share / total) if total else None for share in shares))


def folds_of_layer(layer: Any) -> int:
    """Into how many parts the images are dealt for `choose_ridge`: fewer where the moments of each are large."""
    values = layer.weight[0].numel() // blocks(layer)
    return FOLDS if values <= LARGE else 2


def choose_ridge(folds: Mapping[int, PatchMoments], weight: Tensor, support: Tensor, ranks: Ranks) -> float:
    """The ridge whose least squares predict best the outputs for images that they have not seen.

    folds: moments of parts of the images; weight, support: as in `fit`. Each part in turn is left out, and the others
    give the weights w. What these leave unexplained on the parts that were left out follows from the moments,

        sum over channels of  var y (1 - r^2),   r = w Cov(x, y) / sqrt(w C w' var y),

    variances and covariances being sums over the parts; a correlation r below 0 counts as 0. It is a correlation, not a
    squared error, for `fit` gives the variance back that a regression loses. `JUDGES` of the channels are looked at.
    `RIDGES` are tried from the weakest on, until one is no better than the one before. `RIDGE` if there is one part.
    """
    if len(folds) < 2:
        return RIDGE

    def unexplained(ridge: float) -> float:
        covariance = varies = total = torch.zeros((), dtype=torch.float64)
        for fold in folds:
            others = reduce(PatchMoments.merge, (found for other, found in folds.items() if other != fold))
            # made anew for each ridge: second moments are large
            parts = (_some_channels(moments, weight, support) for moments in (others, folds[fold]))
            seen, left_out = (Problem(*part, ridge, ranks) for part in parts)
            w = seen.solve(seen.own_targets())
            wanted = left_out.own_targets()
            covariance = covariance + left_out.count * (w * wanted.cross).sum(1)
            varies = varies + left_out.count * left_out.variance(w)
            total = total + left_out.count * wanted.variance
        explained = torch.where((covariance > 0) & (varies > 0), covariance.square() / varies, 0.0)
        # the same on all ranks, whose machines may differ
        return float(ranks.gather((total - explained).sum()[None])[0])

    best, least = RIDGES[0], unexplained(RIDGES[0])
    for ridge in RIDGES[1:]:
        if not (found := unexplained(ridge)) < least:
            break
        best, least = ridge, found
    return best


def _some_channels(moments: PatchMoments, weight: Tensor, support: Tensor) -> tuple[PatchMoments, Tensor, Tensor]:
    """The same of a layer that has `JUDGES` of the channels, in as many groups, those first that have weights."""
    G = len(moments.xx)
    by_group = [each.view(G, -1, each.shape[1]) for each in (weight, support)]
    groups = torch.linspace(0, G - 1, min(G, JUDGES), device=weight.device).round().long()[:, None]
    kept = by_group[1].any(2).to(torch.int8)[groups[:, 0]]
    rows = kept.argsort(dim=1, descending=True, stable=True)[:, : max(JUDGES // len(groups), 1)]
    one, y, yy = groups[:, 0], moments.target[groups, rows], moments.yy[groups, rows]
    xy = moments.xy.mT[groups, rows].mT
    xx = moments.xx if len(one) == G else moments.xx[one]
    some = PatchMoments(moments.count, moments.mean[one], y, xx, xy, yy)
    chosen_weight, chosen_support = (each[groups, rows].flatten(0, 1) for each in by_group)
    return some, chosen_weight, chosen_support


def drops(moments: PatchMoments, weight: Tensor, *, ridge: float = RIDGE) -> tuple[Tensor, float | None]:
    """What each weight alone, moved to where it is best, takes off the error; and how large the error is.

    weight: (O, K). Returns float64 (O, K), shares of the variance of the wanted outputs summed over channels,

        drop = (Cov(x, y) - C w)^2 / (diag C + rho),   over sum var y,

    and the share of that variance that no gain and shift per channel could bring back, 1 - corr^2 weighted by variance
    (None where the wanted outputs are constant).
    """
    problem = Problem(moments, weight, torch.ones_like(weight, dtype=torch.bool), ridge, Ranks())
    targets = problem.own_targets()
    total, varies = targets.variance.sum(), problem.variance(problem.present)
    if not total:
        return torch.zeros_like(problem.present), None
    slope = targets.cross - (problem.present.view(len(problem.c), -1, weight.shape[1]) @ problem.c).view(weight.shape)
    curvature = (problem.c.diagonal(dim1=1, dim2=2) + problem.rho[:, None])[problem.group]
    drop = torch.where(curvature > 0, slope.square() / curvature, 0.0)
    covariance = (problem.present * targets.cross).sum(1)
    kept = torch.where(varies > 0, covariance.square() / varies, 0.0)
    return drop / total, float(1 - kept.sum() / total)
