"""The vectorised PyTorch backend. On a CPU, an order of magnitude faster than `torch.var_mean` over (0, 2, 3).

`var_mean` over several dimensions runs one scalar Welford recurrence per channel. Here the layout decides the method:

- Channels contiguous (channels_last, linear layers) and half-precision planes: `batch_norm_update_stats`, which PyTorch
  vectorises for these layouts, on pieces short enough for its float32 sums.
- Planes of float32 and float64: sums of x and x^2, because PyTorch does not vectorise `batch_norm_update_stats` there.

Pieces are merged in float64. Both methods cancel in channels whose mean is large compared with their deviation; such
channels are measured a second time, shifted by that mean.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..factors import repair_factors as repair_factors
from ..merging import Moments, merge
from ..views import contiguous_ncl, ncl_parts

# values per float32 sum: for values of similar size its rounding error stays below 3e-7; pieces are added in float64
PIECE = 1024
# values per chunk where a scratch copy is needed: the copy stays in cache, and the threads rarely synchronise
CHUNK = 1 << 20
# rows per call of batch_norm_update_stats, summed one after the other per column; columns to reach by joining rows
ROWS, LANES = 512, 2048
# half-precision planes: values per channel and call of batch_norm_update_stats; longest plane, fewest values per call
PLANES, LARGEST_PLANE, WORTH_A_CALL = 1024, 1 << 14, 1 << 16
# a result is accepted where mean^2 / variance <= factor * allowed error. PLAIN is for sums of x and x^2, accurate to
# 3e-7 there; PIECEWISE for centred squares, where only the rounding of the means adds to the error
PLAIN, PIECEWISE = 2e6, 1e7
TOLERANCE = 1e-6

Tensors = tuple[list[Tensor], list[Tensor]]


@torch.no_grad()
def channel_moments(x: Tensor, channel_dim: int, tolerance: float, running: Moments | None) -> Moments:
    """Moments of each channel of x, merged with `running`."""
    (x,) = contiguous_ncl(x, channel_dim=channel_dim)
    (mean,), (m2,) = _moments((x,), tolerance)
    found = Moments(x.shape[0] * x.shape[2], mean, m2)
    return found if running is None else merge(running, found)[0]


@torch.no_grad()
def paired_moments(a: Tensor, b: Tensor, channel_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """mean and m2 of a, of b, and their co-moment, float64 (C,)."""
    a, b = contiguous_ncl(a, b, channel_dim=channel_dim)
    (mean_a, mean_b), (m2_a, m2_b, comoment) = _moments((a, b), TOLERANCE)
    return mean_a, m2_a, mean_b, m2_b, comoment


@torch.no_grad()
def affine_(x: Tensor, gain: Tensor, shift: Tensor, channel_dim: int, relu: bool) -> None:
    """x <- gain * x + shift in place, for any strides; then ReLU with `relu`."""
    for view in ncl_parts(x, channel_dim):
        _affine(view, gain, shift, relu)


def _affine(x: Tensor, gain: Tensor, shift: Tensor, relu: bool) -> None:
    """x <- gain * x + shift in place on an (N, C, L) view; then ReLU with `relu`.

    Computed as a BatchNorm of mean 0 and variance 1 that overwrites its input: the only PyTorch operator that applies
    one factor per channel, vectorised, in half precision too, in one pass. It would turn an infinite gain into NaN.
    """
    if not gain.isfinite().all():
        for part in _chunks(x):
            part.copy_(part.to(gain.dtype).mul_(gain[:, None]).add_(shift[:, None]))
        if relu:
            x.relu_()
        return
    zeros, ones = torch.zeros_like(gain), torch.ones_like(gain)
    # two tensors: on a GPU they are written to
    unused, unused_too = gain.new_empty(0), gain.new_empty(0)
    for part in [x] if _is_dense(x) else _chunks(x):
        y = (part if _is_dense(part) else part.contiguous())[..., None]
        torch.ops.aten.native_batch_norm.out(
            y, gain, shift, zeros, ones, False, 0.0, 0.0, out=y, save_mean=unused, save_invstd=unused_too
        )
        if y.data_ptr() != part.data_ptr():
            part.copy_(y[..., 0])
    if relu:
        x.relu_()


def _moments(tensors: tuple[Tensor, ...], tolerance: float) -> Tensors:
    """Means, and sums of products of deviations: (x, x) for one tensor; (a, a), (b, b), (a, b) for two."""
    count = tensors[0].shape[0] * tensors[0].shape[2]
    plain = _by_plane(tensors) and not (len(tensors) == 1 and _is_short_half(tensors[0]))
    means, products = _plain_moments(tensors) if plain else _piecewise_moments(tensors)
    limit = (PLAIN if plain else PIECEWISE) * tolerance / count
    off = torch.stack([~(mean.square() <= limit * m2) for mean, m2 in zip(means, products, strict=False)])
    again = off.any(0).nonzero().flatten()
    if not again.numel():
        return means, products
    if 2 * again.numel() < off.shape[1]:
        tensors = tuple(x.index_select(1, again) for x in tensors)
    else:
        again = torch.arange(off.shape[1], device=again.device)
    shifts = [mean[again].to(_working_dtype(x)) for mean, x in zip(means, tensors, strict=True)]
    rest, centred = (_plain_moments if _by_plane(tensors) else _piecewise_moments)(tensors, shifts)
    for mean, shift, r in zip(means, shifts, rest, strict=True):
        mean[again] = shift.double() + r
    for whole, part in zip(products, centred, strict=True):
        whole[again] = part
    return means, products


def _plain_moments(tensors: tuple[Tensor, ...], shifts: list[Tensor] | None = None) -> Tensors:
    """Moments from the sums of each tensor minus its shift, and of their products, over contiguous planes."""
    in_place = len(tensors) == 1 and shifts is None and tensors[0].dtype == _working_dtype(tensors[0])
    totals: list[Tensor] = []
    scratch = _Scratch()
    for parts in [tensors] if in_place else zip(*(_chunks(x) for x in tensors), strict=True):
        sums = _plane_sums(scratch.shifted(parts, shifts), scratch)
        totals = sums if not totals else [total.add_(s) for total, s in zip(totals, sums, strict=True)]
    count = tensors[0].shape[0] * tensors[0].shape[2]
    means = [total / count for total in totals[: len(tensors)]]
    products = totals[len(tensors) :]
    # rounding must not make a square negative
    centred = [(q - count * mean.square()).clamp_(min=0) for mean, q in zip(means, products, strict=False)]
    return means, centred if len(means) == 1 else [*centred, products[2] - count * means[0] * means[1]]


def _plane_sums(parts: tuple[Tensor, ...], scratch: _Scratch) -> list[Tensor]:
    """Sums and sums of products of (n, C, L) parts with contiguous planes, one piece of a plane at a time."""
    length = parts[0].shape[2]
    if length > PIECE:
        whole = length - length % PIECE
        pieces = tuple(x[..., :whole].unflatten(2, (-1, PIECE)).movedim(2, 0).flatten(0, 1) for x in parts)
        sums = _plane_sums(pieces, scratch)
        if whole == length:
            return sums
        rest = _plane_sums(tuple(x[..., whole:] for x in parts), scratch)
        return [s.add_(r) for s, r in zip(sums, rest, strict=True)]
    sums = [x.sum(2) for x in parts] + [torch.linalg.vector_norm(x, dim=2).square_() for x in parts]
    if len(parts) == 2:
        sums.append(torch.mul(*parts, out=scratch.like(parts[0], "product")).sum(2))
    return [s.sum(0, dtype=torch.float64) for s in sums]


def _piecewise_moments(tensors: tuple[Tensor, ...], shifts: list[Tensor] | None = None) -> Tensors:
    """Moments from PyTorch's BatchNorm statistics of pieces, merged in float64 (Chan, Golub and LeVeque 1979)."""
    channels = tensors[0].shape[1]
    counts: list[int] = []
    found: list[list[Tensor]] = []
    for pieces in _planes(tensors[0]) if _by_plane(tensors) else _rows(tensors, shifts):
        statistics = [_batch_statistics(piece) for piece in pieces]
        moments = [mean for mean, _ in statistics] + [variance for _, variance in statistics]
        if len(pieces) == 2:
            a, b = (piece.to(mean.dtype) - mean for piece, (mean, _) in zip(pieces, statistics, strict=True))
            moments.append(a.mul_(b).mean(0))
        counts += [pieces[0].numel() // moments[0].numel()] * (moments[0].numel() // channels)
        found.append([m.view(-1, channels) for m in moments])
    columns = [torch.cat(column).double() for column in zip(*found, strict=True)]
    means, products = columns[: len(tensors)], columns[len(tensors) :]
    if len(counts) == 1:
        return [mean[0] for mean in means], [counts[0] * product[0] for product in products]
    n = torch.tensor(counts, dtype=torch.float64, device=tensors[0].device)[:, None]
    whole = [(n * mean).sum(0) / n.sum() for mean in means]
    steps = [mean - mean_of_all for mean, mean_of_all in zip(means, whole, strict=True)]
    between = [step.square() for step in steps] + ([steps[0] * steps[1]] if len(steps) == 2 else [])
    return whole, [(n * (within + b)).sum(0) for within, b in zip(products, between, strict=True)]


def _batch_statistics(piece: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance over all axes but the second; float32 for half precision."""
    # running statistics that PyTorch writes; their dtype sets the precision of the returned statistics
    unused = torch.empty(piece.shape[1], dtype=_working_dtype(piece), device=piece.device)
    piece = piece.view(*piece.shape, *[1] * (4 - piece.dim()))
    return torch.batch_norm_update_stats(piece, unused, unused, 0.0)


def _planes(x: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Groups of images, each of about PLANES values per channel."""
    yield from ((part,) for part in x.split(max(1, PLANES // x.shape[2])))


def _rows(tensors: tuple[Tensor, ...], shifts: list[Tensor] | None) -> Iterator[tuple[Tensor, ...]]:
    """Contiguous rows of all channels, at most ROWS at a time; several rows are joined where channels are few."""
    channels, scratch = tensors[0].shape[1], _Scratch()
    for parts in zip(*(_chunks(x) for x in tensors), strict=True):
        if shifts is not None:
            parts = scratch.shifted(parts, shifts)
        rows = [part.movedim(1, 2).reshape(-1, channels) for part in parts]
        times = max(1, min(LANES // channels, len(rows[0])))
        whole = len(rows[0]) - len(rows[0]) % times
        yield from zip(*(r[:whole].reshape(-1, times * channels).split(ROWS) for r in rows), strict=True)
        if whole < len(rows[0]):
            yield tuple(r[whole:] for r in rows)


class _Scratch:
    """Memory that all chunks reuse: page faults of new memory would cost more than the arithmetic."""

    def __init__(self) -> None:
        self._held: dict[tuple[object, torch.Size], Tensor] = {}

    def like(self, x: Tensor, use: object) -> Tensor:
        """Memory with the shape and layout of x, in its working precision; the same memory for the same `use`."""
        key = (use, x.shape)
        if key not in self._held:
            self._held[key] = torch.empty_like(x, dtype=_working_dtype(x))
        return self._held[key]

    def shifted(self, parts: tuple[Tensor, ...], shifts: list[Tensor] | None) -> tuple[Tensor, ...]:
        """The parts in the working precision, each minus its shift, if there are shifts."""
        found = []
        for i, x in enumerate(parts):
            if shifts is not None:
                found.append(torch.sub(x, shifts[i][:, None], out=self.like(x, i)))
            else:
                found.append(x if x.dtype == _working_dtype(x) else self.like(x, i).copy_(x))
        return tuple(found)


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    """Pieces of at most about CHUNK values, split along the images or, if there is one image, the positions."""
    dim = 0 if x.shape[0] > 1 else 2
    return x.split(max(1, CHUNK * x.shape[dim] // x.numel()), dim)


def _by_plane(tensors: tuple[Tensor, ...]) -> bool:
    return all(x.stride(2) == 1 and x.shape[2] > 1 for x in tensors)


def _is_short_half(x: Tensor) -> bool:
    if x.dtype == _working_dtype(x) or not x.is_contiguous():
        return False
    values = min(x.numel(), max(PLANES, x.shape[2]) * x.shape[1])
    return x.shape[2] <= LARGEST_PLANE and values >= WORTH_A_CALL


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.movedim(1, 2).is_contiguous()


def _working_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
