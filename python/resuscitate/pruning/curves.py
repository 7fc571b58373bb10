"""Allocation by curves: the loss of each layer by the fraction of its weights that is removed."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from .units import Units

Curve = list[tuple[float, float]]  # (fraction removed, loss), from (0, 0) on, both ascending


def by_curves(units: Mapping[str, Units], budget: int, curves: Mapping[str, Curve]) -> dict[str, int]:
    """An allocation: the least sum of losses for this budget. Greedy on the lower convex hull of each curve."""
    steps = []
    for name, layer in units.items():
        weights = max(layer.count * layer.size, 1)
        for (r0, e0), (r1, e1) in pairwise(_lower_hull(curves[name])):
            steps.append(((e1 - e0) / ((r1 - r0) * weights), name, round(r1 * layer.count)))
    removed = dict.fromkeys(units, 0)
    for _, name, upto in sorted(steps, key=lambda step: step[0]):
        size = units[name].size
        more = min(max(min(upto, units[name].removable) - removed[name], 0), budget // max(size, 1))
        removed[name] += more
        budget -= more * size
    return removed


def _lower_hull(curve: Curve) -> Curve:
    """The lower convex hull of a curve, left to right (Andrew's monotone chain)."""
    hull: Curve = []
    for x, y in sorted(curve):
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append((x, y))
    return hull
