"""The steps of a compression: the sparsity after each, and its pattern."""

from __future__ import annotations

from collections.abc import Sequence
from math import isclose

from ..pruning.allocation import check_sparsity
from ..pruning.sparsify import NofM, parse_pattern


def stages(sparsity: float, steps: int | Sequence[float], pattern: str) -> dict[float, str]:
    """{sparsity: pattern} of the steps, ascending; from their number, or from the sparsities themselves.

    A number of steps: the first prunes to half of the sparsity, and each later one keeps the same fraction of the
    weights. A pattern n:m has but m - n steps, (m-1):m to n:m; a smaller number of steps takes some, evenly spaced.
    Raises ValueError.
    """
    check_sparsity(sparsity)
    kind = parse_pattern(pattern)
    known = _of_n_of_m(kind) if isinstance(kind, NofM) else None
    if known is not None and not isclose(sparsity, last := list(known)[-1]):
        raise ValueError(f"pattern {pattern} keeps {pattern.replace(':', ' of ')}: give sparsity={last:.6g}")
    if isinstance(steps, int):
        if isinstance(steps, bool) or steps < 1:
            raise ValueError(f"steps={steps} must be at least 1, or the sparsities to stop at")
        return _gradual(sparsity, steps, pattern) if known is None else _some(known, steps)
    stops = [check_sparsity(stop) for stop in steps]
    if not stops or stops != sorted(set(stops)) or stops[-1] != sparsity:
        raise ValueError(f"steps={stops} must ascend to sparsity={sparsity}, the last of them")
    if known is None:
        return dict.fromkeys(stops, pattern)
    chosen = {each: known[each] for each in known if any(isclose(each, stop) for stop in stops)}
    if len(chosen) < len(stops):
        possible = ", ".join(f"{each:.6g}" for each in known)
        raise ValueError(f"steps={stops}: pattern {pattern} is reached by the sparsities {possible}, or some of them")
    return chosen


def _gradual(sparsity: float, steps: int, pattern: str) -> dict[float, str]:
    if steps == 1 or not sparsity:
        return {sparsity: pattern}
    first = sparsity / 2
    kept = (1 - sparsity) / (1 - first)
    early = (1 - (1 - first) * kept ** (index / (steps - 1)) for index in range(steps - 1))
    # the least sparsities round to more than the last one
    return dict.fromkeys([*(min(stop, sparsity) for stop in early), sparsity], pattern)


def _of_n_of_m(kind: NofM) -> dict[float, str]:
    n, m = kind
    return {1 - kept / m: f"{kept}:{m}" for kept in range(m - 1, n - 1, -1)}


def _some(known: dict[float, str], steps: int) -> dict[float, str]:
    stops, steps = list(known), min(steps, len(known))
    return {stop: known[stop] for stop in (stops[(index + 1) * len(stops) // steps - 1] for index in range(steps))}
