"""Figures in plain SVG, and tables that can be sorted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any


def slope(pairs: Iterable[tuple[float, float]]) -> float | None:
    """Of the straight line through (log x, log y) by least squares; 1 is ideal, None for fewer than two values of x."""
    logs = [(math.log(x), math.log(y)) for x, y in pairs if x > 0 and y > 0]
    if len({x for x, _ in logs}) < 2:
        return None
    mx, my = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    return sum((x - mx) * (y - my) for x, y in logs) / sum((x - mx) ** 2 for x, _ in logs)


def bars(title: str, values: Mapping[str, float], unit: str, caption: str, most: float | None = None) -> str:
    """Horizontal bars."""
    if not values:
        return ""
    most = most or max(values.values()) or 1.0
    parts = []
    for index, (name, value) in enumerate(values.items()):
        y, width = 6 + 26 * index, 330 * max(value, 0) / most
        parts.append(f'<text x="0" y="{y + 14}">{escape(name)}</text>')
        parts.append(f'<rect class="after" x="160" y="{y}" width="{width:.1f}" height="18" rx="3"/>')
        parts.append(f'<text x="{166 + width:.1f}" y="{y + 14}">{value:.1f}{unit}</text>')
    return figure(title, parts, 26 * len(values) + 10, caption)


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Numbers are shown short and sorted whole; a column without any value is left out."""
    rows = list(rows)
    wanted = [at for at in range(len(heads)) if any(row[at] is not None for row in rows)]
    kinds = [' class="text"' if any(isinstance(row[at], str) for row in rows) else "" for at in wanted]
    top = "".join(
        f'<th scope="col"{kind}><button>{escape(heads[at])}</button></th>'
        for at, kind in zip(wanted, kinds, strict=True)
    )
    lines = []
    for row in rows:
        cells = []
        for at in wanted:
            value = row[at]
            if isinstance(value, float):
                cells.append(f'<td data-value="{value!r}">{value:.3f}</td>')
            else:
                kind = ' class="text"' if isinstance(value, str) else ""
                cells.append(f"<td{kind}>{'' if value is None else escape(str(value))}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    body = "\n".join(lines)
    return f'<div class="wide"><table>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>\n'


def figure(title: str, parts: Iterable[str], height: float, caption: str) -> str:
    drawn = "\n".join(parts)
    return (
        f'<h2>{title}</h2>\n<figure><svg viewBox="0 0 560 {height:.0f}" role="img" aria-label="{title}">'
        f"\n{drawn}\n</svg>"
        f"<figcaption>{caption}</figcaption></figure>\n"
    )


def key(kind: str) -> str:
    return f'<span class="key {kind}">{kind}</span>'


def grid(ticks: Iterable[float], place: Callable[[float], float], bottom: float) -> list[str]:
    """Vertical lines with their values below."""
    return [
        f'<line class="axis" x1="{place(tick):.1f}" x2="{place(tick):.1f}" y1="4" y2="{bottom:.0f}"/>'
        f'<text class="soft" x="{place(tick):.1f}" y="{bottom + 16:.0f}" text-anchor="middle">{tick:g}</text>'
        for tick in ticks
    ]


def log_axis(values: Sequence[float], start: float, end: float) -> tuple[Callable[[float], float], list[float]]:
    """Where a value lies between two coordinates, and powers of ten (or of two, where they are few) to mark."""
    low, high = math.log10(min(values)), math.log10(max(values))
    unit = 1.0 if high - low > 1.2 else math.log10(2)
    first, last = math.floor(low / unit + 1e-9), math.ceil(high / unit - 1e-9)
    last = max(last, first + 1)
    every = -(-(last - first) // 9)

    def place(value: float) -> float:
        return start + (end - start) * (math.log10(value) / unit - first) / (last - first)

    return place, [10 ** (unit * tick) for tick in range(first, last + 1, every)]
