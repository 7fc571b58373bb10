"""Weights from second moments: ridge regression of a layer's surviving weights on its current inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from asr_kernels import CrossProducts, PatchMoments, RowMoments

from ..runtime.distributed import Ranks
from .conjugate_gradients import Solution
from .least_squares import EXCESS, LEAST_RIDGE, ROWS, Problem
from .second_moments import Moments, as_groups

Replay = Callable[[Tensor, Tensor], CrossProducts]
RIDGE, MOST_GAIN = 1e-2, 3.0
ROUGH_EXCESS = 1e-5  # of solutions that only lead to others, see `EXCESS`
RIDGES, JUDGES = (0.01, 0.05, 0.25, 1.25), 16  # cross-validation: ridges to choose from, channels that judge them
# devices on which all folds are solved at once: it takes memory, but the time on a GPU is that of many small operations
AT_ONCE = ("cuda",)
PART_BYTES = 64 << 20  # of the float64 weights of a layer with few samples that are solved for at a time
# ReLU-aware refinement: number of passes, extrapolation factor, minimum unexplained part of the variance
PASSES, EXTRAPOLATION, LEAST_UNEXPLAINED = 2, 2.0, 0.01


@dataclass(frozen=True)
class Fit:
    """Weights (O, K) and biases (O,), float64: the solution of a refit.

    All else is a tensor (), float64. ridge: its strength. missed: how many channels have no solution to the stated
    tolerance. What follows is over the variance of the targets, summed over channels, and NaN where the targets are
    constant. The errors are the standard deviation of the layer's outputs less the targets, over that of the targets.
    """

    weight: Tensor
    bias: Tensor
    ridge: Tensor
    missed: Tensor
    before: Tensor  # the variance of the layer's outputs before the refit
    after: Tensor  # and after it
    explained: Tensor  # the part of the targets' variance that the weights explain
    error_before: Tensor  # of the present weights
    error_after: Tensor  # and of the new ones


def fit(moments: Moments, weight: Tensor, support: Tensor, **options: Any) -> Fit:
    """`attempt`, and again with factors of all matrices where conjugate gradients took too many steps."""
    found = attempt(moments, weight, support, **options)
    return attempt(moments, weight, support, **options, direct=True) if found.missed else found


def attempt(
    moments: Moments,
    weight: Tensor,
    support: Tensor,
    *,
    ridge: float | Tensor = RIDGE,
    most: float = MOST_GAIN,
    replay: Replay | None = None,
    curvature: Tensor | None = None,
    ranks: Ranks | None = None,
    direct: bool = False,
) -> Fit:
    """Ridge regression on the supports, shrunk towards the present weights; then a gain that restores the variance.

    weight, support: (O, K), K the values of a patch of one group; support is boolean, and weights outside it are zero.

        w_S = (C_SS + rho I)^-1 (Cov(x_S, y) + rho w0_S),   rho = ridge * mean(diag C)
        w_S <- g w_S,   g = sqrt(var y / w_S' C_SS w_S), at most `most`
        b = mean(y) - w_S' mean(x_S)

    Where a layer's inputs do not vary its weights stay. ridge: a number or a tensor (), or (O,) where
    the moments are matrices. `ranks`, which all have the same moments, solve for some of the channels each. direct:
    factor all matrices, so that no channel is missed.

    `replay(w, b)`, where a ReLU alone reads the layer, gives the cross products, about the means of `moments`, with the
    ReLU-equivalent targets nearest to the outputs of w and b. The first line is then solved again for these targets,
    `PASSES` times; var y and mean(y) are theirs.

    `curvature` (O, O): see `Problem.solve`.
    """
    ranks = Ranks() if ranks is None else ranks
    w = torch.empty_like(weight, dtype=torch.float64)
    bias = w.new_empty(len(w))
    sums = w.new_zeros(7)
    direct = direct or _is_weak(ridge)
    for rows, part in [(slice(None), moments)] if replay is not None else _parts(moments, len(w)):
        problem = Problem(part, weight[rows], support[rows], ridge, ranks, direct, curvature)
        w[rows], bias[rows], found = _fit(problem, most, replay)
        sums += torch.cat([found, ranks.add(problem.missed[None])])
    total, missed = sums[0], sums[6]
    shares = sums[1:6] / total
    shares[3:] = shares[3:].clamp(min=0).sqrt()
    return Fit(w, bias, problem.ridge[0], missed, *torch.where(total > 0, shares, torch.nan).unbind())


def _is_weak(ridge: float | Tensor) -> bool:
    """Is a stated ridge so weak that conjugate gradients would take too many steps?"""
    return not isinstance(ridge, Tensor) and ridge < LEAST_RIDGE


def _parts(moments: Moments, channels: int) -> Iterator[tuple[slice, Moments]]:
    """The channels to solve for at a time, and their moments; a layer with a matrix is not split.

    A solution takes about ten tensors of the size of the weights, which `PART_BYTES` bounds where their number is
    large. With a matrix it is not, and factors are shared between channels.
    """
    if not isinstance(moments, RowMoments):
        yield slice(None), moments
        return
    size = max(PART_BYTES // (8 * moments.x.shape[1]) // ROWS, 1) * ROWS
    for start in range(0, channels, size):
        rows = torch.arange(start, min(start + size, channels), device=moments.x.device)[None]
        yield slice(start, start + size), moments.of_channels(torch.zeros_like(rows[:, :1]), rows)


def _fit(problem: Problem, most: float, replay: Replay | None) -> tuple[Tensor, Tensor, Tensor]:
    """Weights and biases of `attempt`; sums over channels (6,): of var y, then of the last five numbers of `Fit`."""
    targets, excess = problem.own_targets(), EXCESS if replay is None else ROUGH_EXCESS
    total, found = targets.squares.sum(), problem.solve(targets, excess=excess)
    much = problem.unexplained(found, targets).sum() > LEAST_UNEXPLAINED * total
    # rank 0 decides: a replay has collectives, and ranks on other hardware may differ in rounding
    if replay is not None and problem.ranks.first(much):
        ahead = found.w
        for excess in (*[ROUGH_EXCESS] * (PASSES - 1), EXCESS):
            seen = replay(ahead, problem.bias(ahead, targets))
            targets = problem.targets(seen.xy, seen.yy, seen.y)
            last, found = found, problem.solve(targets, found, excess)
            ahead = found.w + EXTRAPOLATION * (found.w - last.w)
    elif replay is not None:
        found = problem.solve(targets, found)
    w, varies = found.w, found.squares
    # a variance of rounding size is zero: it must not get a gain
    varied = varies > 1e-12 * problem.rho * w.square().sum(1)
    gain = torch.where(varied & (targets.squares > 0), (targets.squares / varies).sqrt().clamp(max=most), 1.0)
    w = w * gain[:, None]
    new = Solution(w, found.product * gain[:, None])
    before, after = problem.present.squares.sum(), new.squares.sum()
    explained = total - problem.unexplained(found, targets).sum()
    missed = [problem.unexplained(each, targets).sum() for each in (problem.present, new)]
    bias = problem.bias(w, targets)
    # a bias of rounding size is zero: it must not add a bias to a layer without one
    count = max(problem.moments.count, 1)
    nothing = bias.square() <= 1e-8 * targets.squares / count + 1e-12 * targets.mean.square()
    return w, torch.where(nothing, 0.0, bias), torch.stack([total, before, after, explained, *missed])


def choose_ridge(
    folds: Mapping[int, Moments], merged: Moments, weight: Tensor, support: Tensor, ranks: Ranks
) -> Tensor | float:
    """The ridge with the least cross-validation error over folds of the images.

    folds: moments of each fold; merged: of all; weight, support: as in `fit`. Each fold in turn is left out, and the
    others give the weights w. The unexplained variance on the left-out folds follows from their moments,

        sum over channels of  var y (1 - r^2),   r = w Cov(x, y) / sqrt(w C w' var y),

    with variances and covariances summed over the folds; a correlation r below 0 counts as 0. The criterion is a
    correlation and not a squared error, because `fit` restores the variance that a regression loses. `JUDGES` channels
    are used. Of `RIDGES`, from the weakest on, it is the first whose successor is no better, as a tensor (). One fold:
    `RIDGE`.
    """
    if len(folds) < 2:
        return RIDGE
    covariance = varies = total = torch.zeros((), dtype=torch.float64)
    parts = list(folds.values())
    at_once = weight.device.type in AT_ONCE and all(isinstance(fold, PatchMoments) for fold in parts)
    for chosen in [parts] if at_once else [[fold] for fold in parts]:
        others = [_others(fold, parts, merged) for fold in chosen]
        seen, left_out = (_judges(moments, weight, support, ranks) for moments in (others, chosen))
        w, wanted = seen.solve(seen.own_targets(), excess=ROUGH_EXCESS).w, left_out.own_targets()
        covariance, varies, total = (
            before + each.view(len(chosen), -1).sum(0)
            for before, each in (
                (covariance, (w * wanted.cross).sum(1)),
                (varies, left_out.with_weights(w).squares),
                (total, wanted.squares),
            )
        )
    explained = torch.where((covariance > 0) & (varies > 0), covariance.square() / varies, 0.0)
    errors = (total - explained).view(min(len(merged.mean), JUDGES), len(RIDGES), -1).sum((0, 2))
    errors = ranks.first(errors)
    last = torch.cat([~(errors[1:] < errors[:-1]), torch.ones_like(errors[:1], dtype=torch.bool)])
    return _ridges(weight.device).gather(0, last.int().argmax()[None])[0]


def _others(fold: Moments, parts: Sequence[Moments], merged: Moments) -> Moments:
    """The moments of all parts but this fold; merged: of all."""
    if len(parts) == 2:
        return parts[0] if fold is parts[1] else parts[1]
    return merged.without(fold)  # type: ignore[arg-type]


def _ridges(device: torch.device) -> Tensor:
    """`RIDGES` on a device, without a copy from the host, which would wait."""
    return torch.stack([torch.full((), ridge, dtype=torch.float64, device=device) for ridge in RIDGES])


def lost_variance(moments: Moments, weight: Tensor, kept_in: Tensor, count: int, ranks: Ranks) -> Tensor:
    """The part of the targets' variance that a regression on each of some supports leaves unexplained.

    Each support is within the one before. weight (O, K); kept_in (O, K), integers: in how many of the `count` supports,
    from the first on, each weight is. On twice `JUDGES` channels. Returns float64 (count,); 0 where the targets are
    constant.
    """
    groups, rows = _judging_rows(moments, kept_in > 0, 2 * JUDGES)
    kept_in = kept_in.unflatten(0, (len(moments.mean), -1))[groups, rows]
    supports = torch.arange(count, device=weight.device)[:, None, None]
    support = (kept_in[:, None] > supports).flatten(0, 2)  # by group, then support, then channel
    several = rows.repeat(1, count)
    present = weight.unflatten(0, (len(moments.mean), -1))[groups, several].flatten(0, 1) * support
    problem = Problem(moments.of_channels(groups, several), present, support, RIDGE, ranks)
    targets = problem.own_targets()
    left = problem.unexplained(problem.solve(targets, excess=ROUGH_EXCESS), targets)
    left, total = (each.view(len(groups), count, -1).sum((0, 2)) for each in (left, targets.squares))
    return torch.where(total > 0, left / total, 0.0)


def _judging_rows(moments: Moments, support: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """About `count` channels: groups (S, 1) and channels of each (S, R); those with weights first."""
    G = len(moments.mean)
    groups = torch.linspace(0, G - 1, min(G, count), device=support.device).round().long()[:, None]
    kept = support.view(G, -1, support.shape[1]).any(2).to(torch.int8)[groups[:, 0]]
    return groups, kept.argsort(dim=1, descending=True, stable=True)[:, : max(count // len(groups), 1)]


def _judges(moments: Sequence[Moments], weight: Tensor, support: Tensor, ranks: Ranks) -> Problem:
    """The problem of `JUDGES` channels with each of the `RIDGES`, in as many groups; channels with weights first.

    Several moments have the same problem each, as further groups. The rows run over moments, groups, ridges, channels.
    """
    groups, rows = _judging_rows(moments[0], support, JUDGES)
    by_group = [each.unflatten(0, (len(moments[0].mean), -1)) for each in (weight, support)]
    ridges = _ridges(weight.device).repeat_interleave(rows.shape[1]).repeat(len(groups) * len(moments))
    rows = rows.repeat(1, len(RIDGES))
    weight, support = (each[groups, rows].flatten(0, 1).repeat(len(moments), 1) for each in by_group)
    return Problem(as_groups([each.of_channels(groups, rows) for each in moments]), weight, support, ridges, ranks)


def fit_with_means(
    moments: PatchMoments,
    weight: Tensor,
    support: Tensor,
    shape: torch.Size,
    per: str,
    ridge: float | Tensor = RIDGE,
    replay: Replay | None = None,
    direct: bool = False,
    **options: Any,
) -> tuple[Fit, Tensor]:
    """`attempt` with one more weight per filter, or kernel: the mean of its pruned weights. `shape` is the weight's.

    The sums over windows are further inputs, x' = T x with T the identity over rows of ones: mean' = T mean,
    C' = T C T'. rho is that of `attempt`, from C and not from C', whose sums vary more. Returns the fit, of surviving
    weights less means, and the means, broadcastable against the weight.
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
    share = (moments.diagonal.mean(1) / wide.diagonal.mean(1)).nan_to_num(1.0)
    by_channel = ridge * share.repeat_interleave(len(weight) // len(share))
    stated = ridge if isinstance(ridge, Tensor) else torch.full_like(share[0], ridge)
    options = {"ridge": by_channel, "direct": direct or _is_weak(ridge), **options}
    found = attempt(wide, weights, supports, replay=None if replay is None else replay_wide, **options)
    survivors, means = found.weight.split([values, inputs], 1)
    return replace(found, weight=survivors, ridge=stated), means.reshape(len(weight), inputs, *[1] * (len(shape) - 2))


def single_weight_error_reduction(moments: Moments, weight: Tensor, ridge: float) -> tuple[Tensor, float | None]:
    """By how much each weight, if it alone is set to its best value, reduces the squared error; and the error itself.

    weight: (O, K). Returns float64 (O, K), as parts of the targets' variance summed over channels,

        drop = (Cov(x, y) - C w)^2 / (diag C + rho),   over sum var y,

    and the part of that variance that no gain and shift for each channel can restore, 1 - corr^2 weighted by variance
    (None where the targets are constant).
    """
    problem = Problem(moments, weight, torch.ones_like(weight, dtype=torch.bool), ridge, Ranks())
    targets = problem.own_targets()
    total, present = targets.squares.sum(), problem.present
    if not total:
        return torch.zeros_like(present.w), None
    slope, varies = targets.cross - present.product, present.squares
    curvature = problem.diagonal[problem.group] + problem.rho[:, None]
    drop = torch.where(curvature > 0, slope.square() / curvature, 0.0)
    kept = torch.where(varies > 0, (present.w * targets.cross).sum(1).square() / varies, 0.0)
    return drop / total, float(1 - kept.sum() / total)
