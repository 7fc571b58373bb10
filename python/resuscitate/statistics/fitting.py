"""Weights from second moments: ridge regression of a layer's surviving weights on its current inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from asr_kernels import CrossProducts, PatchMoments

from ..runtime.distributed import Ranks
from .least_squares import Problem

Replay = Callable[[Tensor, Tensor], CrossProducts]
RIDGE, MOST_GAIN = 1e-2, 3.0
# cross-validation: ridges to choose from, number of channels that judge them, and the excess of their solutions
RIDGES, JUDGES, JUDGED_EXCESS = (0.01, 0.05, 0.25, 1.25), 16, 1e-6
# ReLU-aware refinement: number of passes, extrapolation factor, minimum unexplained part of the variance
PASSES, EXTRAPOLATION, LEAST_UNEXPLAINED = 2, 2.0, 0.01


@dataclass(frozen=True)
class Fit:
    """Weights (O, K) and biases (O,), float64: the solution of a refit.

    The others are variances over that of the targets, summed over channels, and None where the targets are constant.
    """

    weight: Tensor
    bias: Tensor
    before: float | None  # the variance of the layer's outputs before the refit
    after: float | None  # and after it
    explained: float | None  # the part of the targets' variance that the weights explain


def fit(
    moments: PatchMoments,
    weight: Tensor,
    support: Tensor,
    *,
    ridge: float = RIDGE,
    most: float = MOST_GAIN,
    replay: Replay | None = None,
    ranks: Ranks | None = None,
) -> Fit:
    """Ridge regression on the supports, shrunk towards the present weights; then a gain that restores the variance.

    weight, support: (O, K), K the values of a patch of one group; support is boolean, and weights outside it are zero.

        w_S = (C_SS + rho I)^-1 (Cov(x_S, y) + rho w0_S),   rho = ridge * mean(diag C)
        w_S <- g w_S,   g = sqrt(var y / w_S' C_SS w_S), at most `most`
        b = mean(y) - w_S' mean(x_S)

    Where a layer's inputs do not vary its weights stay. `ranks`, which all have the same moments, solve for some of the
    channels each.

    `replay(w, b)`, where a ReLU alone reads the layer, gives the cross products, about the means of `moments`, with the
    ReLU-equivalent targets nearest to the outputs of w and b. The first line is then solved again for these targets,
    `PASSES` times; var y and mean(y) are theirs.
    """
    problem = Problem(moments, weight, support, ridge, Ranks() if ranks is None else ranks)
    targets = problem.own_targets()
    total, w = targets.variance.sum(), problem.solve(targets)
    if replay is not None and problem.unexplained(w, targets).sum() > LEAST_UNEXPLAINED * total:
        ahead = w
        for _ in range(PASSES):
            found = replay(ahead, problem.bias(ahead, targets))
            targets = problem.targets(found.xy, found.yy, found.y)
            last, w = w, problem.solve(targets, w)
            ahead = w + EXTRAPOLATION * (w - last)
    varies = problem.variance(w)
    gain = torch.where((varies > 0) & (targets.variance > 0), (targets.variance / varies).sqrt().clamp(max=most), 1.0)
    before, after = problem.present_variance.sum(), (varies * gain.square()).sum()
    shares = before, after, total - problem.unexplained(w, targets).sum()
    w = w * gain[:, None]
    bias = problem.bias(w, targets)
    # a bias of rounding size is zero: it must not add a bias to a layer without one
    nothing = bias.square() <= 1e-8 * targets.variance + 1e-12 * targets.mean.square()
    return Fit(w, torch.where(nothing, 0.0, bias), *(float(share / total) if total else None for share in shares))


def choose_ridge(folds: Mapping[int, PatchMoments], weight: Tensor, support: Tensor, ranks: Ranks) -> float:
    """The ridge with the least cross-validation error over folds of the images.

    folds: moments of each fold; weight, support: as in `fit`. Each fold in turn is left out, and the others give the
    weights w. The unexplained variance on the left-out folds follows from their moments,

        sum over channels of  var y (1 - r^2),   r = w Cov(x, y) / sqrt(w C w' var y),

    with variances and covariances summed over the folds; a correlation r below 0 counts as 0. The criterion is a
    correlation and not a squared error, because `fit` restores the variance that a regression loses. `JUDGES` channels
    are used. `RIDGES` are tried from the weakest on, until one is no better than the one before. One fold: `RIDGE`.
    """
    if len(folds) < 2:
        return RIDGE

    solutions = dict[int, Tensor]()  # with the ridge tried last

    def unexplained(ridge: float) -> float:
        covariance = varies = total = torch.zeros((), dtype=torch.float64)
        for fold in folds:
            others = reduce(PatchMoments.merge, (found for other, found in folds.items() if other != fold))
            # computed again for each ridge: second moments are large
            parts = (_some_channels(moments, weight, support) for moments in (others, folds[fold]))
            seen, left_out = (Problem(*part, ridge, ranks) for part in parts)
            w = solutions[fold] = seen.solve(seen.own_targets(), solutions.get(fold), JUDGED_EXCESS)
            wanted = left_out.own_targets()
            covariance = covariance + left_out.count * (w * wanted.cross).sum(1)
            varies = varies + left_out.count * left_out.variance(w)
            total = total + left_out.count * wanted.variance
        explained = torch.where((covariance > 0) & (varies > 0), covariance.square() / varies, 0.0)
        # rank 0's value on all ranks, whose machines may round differently
        return float(ranks.gather((total - explained).sum()[None])[0])

    best, least = RIDGES[0], unexplained(RIDGES[0])
    for ridge in RIDGES[1:]:
        if not (found := unexplained(ridge)) < least:
            break
        best, least = ridge, found
    return best


def _some_channels(moments: PatchMoments, weight: Tensor, support: Tensor) -> tuple[PatchMoments, Tensor, Tensor]:
    """The moments, weights and supports of `JUDGES` channels, in as many groups; channels with weights first."""
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


def fit_with_means(
    moments: PatchMoments,
    weight: Tensor,
    support: Tensor,
    shape: torch.Size,
    per: str,
    replay: Replay | None = None,
    **options: Any,
) -> tuple[Fit, Tensor]:
    """`fit` with one more weight for each filter, or kernel: the mean of its pruned weights. `shape` is the weight's.

    The sums over windows are further inputs, x' = T x with T the identity over rows of ones: mean' = T mean,
    C' = T C T'. Returns the fit, of surviving weights less means, and the means, broadcastable against the weight.
    """
    values, kernel = weight.shape[1], shape[2:].numel()
    inputs = values // kernel if per == "kernel" and kernel > 1 else 1
    rows = torch.eye(inputs).repeat_interleave(values // inputs, 1).to(weight.device, torch.float64)
    t = torch.cat([torch.eye(values, dtype=torch.float64, device=weight.device), rows])
    wide = replace(moments, mean=moments.mean @ t.mT, xx=t @ moments.xx @ t.mT, xy=t @ moments.xy)
    extra = weight.new_zeros(len(weight), inputs)

    def replay_wide(w: Tensor, bias: Tensor) -> CrossProducts:
        assert replay is not None
        found = replay(w @ t, bias)
        return replace(found, xy=t @ found.xy)

    weights, supports = torch.cat([weight, extra], 1), torch.cat([support, torch.ones_like(extra, dtype=torch.bool)], 1)
    found = fit(wide, weights, supports, replay=None if replay is None else replay_wide, **options)
    survivors, means = found.weight.split([values, inputs], 1)
    return replace(found, weight=survivors), means.reshape(len(weight), inputs, *[1] * (len(shape) - 2))


def single_weight_error_reduction(moments: PatchMoments, weight: Tensor, ridge: float) -> tuple[Tensor, float | None]:
    """By how much each weight, if it alone is set to its best value, reduces the squared error; and the error itself.

    weight: (O, K). Returns float64 (O, K), as parts of the targets' variance summed over channels,

        drop = (Cov(x, y) - C w)^2 / (diag C + rho),   over sum var y,

    and the part of that variance that no gain and shift for each channel can restore, 1 - corr^2 weighted by variance
    (None where the targets are constant).
    """
    problem = Problem(moments, weight, torch.ones_like(weight, dtype=torch.bool), ridge, Ranks())
    targets = problem.own_targets()
    total, varies = targets.variance.sum(), problem.present_variance
    if not total:
        return torch.zeros_like(problem.present), None
    slope = targets.cross - (problem.present.view(len(problem.c), -1, weight.shape[1]) @ problem.c).view(weight.shape)
    curvature = (problem.c.diagonal(dim1=1, dim2=2) + problem.rho[:, None])[problem.group]
    drop = torch.where(curvature > 0, slope.square() / curvature, 0.0)
    kept = torch.where(varies > 0, (problem.present * targets.cross).sum(1).square() / varies, 0.0)
    return drop / total, float(1 - kept.sum() / total)
