"""(N, C, L) views of tensors of any shape, without a copy where the strides allow it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


def as_ncl(*tensors: Tensor, channel_dim: int) -> list[Tensor]:
    """(N, C, L) views of tensors of one shape, with axes folded alike; an empty list where strides forbid them.

    One tensor is read in the order of its memory, because the order of its values does not matter. Two tensors keep
    their axis order, because their values are paired.
    """
    first = tensors[0]
    channel = channel_dim % first.dim()
    dims = [d for d in range(first.dim()) if d != channel and first.shape[d] > 1]
    if len(tensors) == 1:
        dims.sort(key=first.stride, reverse=True)
    folds: list[tuple[int, tuple[int, ...]]] = []
    for d in dims:
        size, strides = first.shape[d], tuple(x.stride(d) for x in tensors)
        if folds and all(outer == inner * size for outer, inner in zip(folds[-1][1], strides, strict=True)):
            folds[-1] = (folds[-1][0] * size, strides)
        else:
            folds.append((size, strides))
    if len(folds) > 2:
        return []
    while len(folds) < 2:
        folds.insert(0, (1, (0,) * len(tensors)))
    (n, n_strides), (length, l_strides) = folds
    return [
        x.as_strided((n, x.shape[channel], length), (ns, x.stride(channel), ls), x.storage_offset())
        for x, ns, ls in zip(tensors, n_strides, l_strides, strict=True)
    ]


def contiguous_ncl(*tensors: Tensor, channel_dim: int) -> list[Tensor]:
    """As `as_ncl`, of copies where strides forbid views."""
    views = as_ncl(*tensors, channel_dim=channel_dim)
    return views or as_ncl(*(x.contiguous() for x in tensors), channel_dim=channel_dim)


def ncl_parts(x: Tensor, channel_dim: int) -> Iterator[Tensor]:
    """(N, C, L) views that together cover x: one view where the strides allow it."""
    if view := as_ncl(x, channel_dim=channel_dim):
        yield from view
        return
    channel = channel_dim % x.dim()
    _, split = min((x.shape[d], d) for d in range(x.dim()) if d != channel and x.shape[d] > 1)
    for part in x.unbind(split):
        yield from ncl_parts(part, channel - (split < channel))


def overlaps(x: Tensor) -> bool:
    """Whether two indices may share an address: False only if each stride exceeds the reach of all smaller strides."""
    if x.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted((x.stride(d), x.shape[d]) for d in range(x.dim()) if x.shape[d] > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False
