"""Figures in plain SVG, and tables that can be sorted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

Axis = tuple[Callable[[float], float], list[float]]  # where a value lies, and the values to mark
LONGEST = 24  # characters of a name in a figure


def tag(kind: str, content: str = "", **attributes: Any) -> str:
    """An element: `content` is markup, attributes are escaped and numbers rounded; class_="a" is class="a"."""
    said = ""
    for key, value in attributes.items():
        shown = f"{value:.1f}" if isinstance(value, float) else escape(str(value))
        said += f' {key.rstrip("_").replace("_", "-")}="{shown}"'
    return f"<{kind}{said}>{content}</{kind}>"


def text(x: float, y: float, words: str, **attributes: Any) -> str:
    """Text in a figure."""
    return tag("text", escape(words), x=x, y=y, **attributes)


def label(x: float, y: float, name: str) -> str:
    """The name of a row of a figure; of a long one the end, and the whole as a hint."""
    shown = name if len(name) <= LONGEST else "\u2026" + name[1 - LONGEST :]
    return tag("text", tag("title", escape(name)) + escape(shown), x=x, y=y)


def line(x: tuple[float, float], y: tuple[float, float], kind: str = "axis", **attributes: Any) -> str:
    """A line in a figure, between two values of x and of y."""
    return tag("line", class_=kind, x1=x[0], x2=x[1], y1=y[0], y2=y[1], **attributes)


def slope(pairs: Iterable[tuple[float, float]]) -> float | None:
    """Slope of the least-squares line through (log x, log y); 1 is ideal, None for fewer than two values of x."""
    logs = [(math.log(x), math.log(y)) for x, y in pairs if x > 0 and y > 0]
    if len({x for x, _ in logs}) < 2:
        return None
    mx, my = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    return sum((x - mx) * (y - my) for x, y in logs) / sum((x - mx) ** 2 for x, _ in logs)


def bars(title: str, rows: Sequence[tuple[str, float, str] | tuple[str, float, str, str]], caption: str) -> str:
    """Horizontal bars: name, share of the full length, label, and the colour "before" or "after", the default."""
    parts = []
    for y, (name, share, shown, *colour) in enumerate(rows):
        width = 250.0 * max(share, 0)
        parts.append(label(0, 24 * y + 19, name))
        parts.append(tag("rect", class_=(*colour, "after")[0], x=190, y=24 * y + 6, width=width, height=16, rx=3))
        parts.append(text(196 + width, 24 * y + 19, shown))
    return figure(title, parts, 24 * len(rows) + 10, caption) if rows else ""


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Numbers are shown rounded and sorted by their full value; a column without any value is not shown."""
    heads = [head for head in (rows[0] if rows else ()) if any(row[head] is not None for row in rows)]
    kinds = {head: {"class_": "text"} for head in heads if any(isinstance(row[head], str) for row in rows)}
    top = "".join(tag("th", tag("button", escape(head)), scope="col", **kinds.get(head, {})) for head in heads)
    body = "\n".join(tag("tr", "".join(_cell(row[head]) for head in heads)) for row in rows)
    return f'<div class="wide"><table>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>\n'


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return tag("td", f"{value:.3f}", data_value=repr(value))
    kind = {"class_": "text"} if isinstance(value, str) else {}
    return tag("td", "" if value is None else escape(str(value)), **kind)


def figure(title: str, parts: Iterable[str], height: int, caption: str) -> str:
    """A titled figure; `caption` is markup."""
    drawn = tag("svg", "\n".join(parts), viewBox=f"0 0 560 {height}", role="img", aria_label=title)
    return f"<h2>{title}</h2>\n<figure>{drawn}<figcaption>{caption}</figcaption></figure>\n"


def key(kind: str) -> str:
    """The coloured mark of "before" or "after" in a caption."""
    return f'<span class="key {kind}">{kind}</span>'


def grid(ticks: Iterable[float], place: Callable[[float], float], bottom: int) -> list[str]:
    """Vertical lines with their values below."""
    parts = []
    for x, label in ((place(tick), f"{tick:g}") for tick in ticks):
        parts += [line((x, x), (4, bottom)), text(x, bottom + 16, label, class_="soft", text_anchor="middle")]
    return parts


def linear_axis(values: Sequence[float], start: float, end: float) -> Axis:
    """Where a value from 0 on lies between two coordinates, and values to mark."""
    unit = 10.0 ** math.floor(math.log10(max(values)))
    step = next(part * unit for part in (0.2, 0.5, 1.0, 2.0, 5.0) if max(values) <= 5 * part * unit * (1 + 1e-9))
    # a value may exceed five steps by 5e-9 of a step, and needs no sixth
    count = max(math.ceil(max(values) / step - 1e-8), 1)
    return lambda value: start + (end - start) * value / (count * step), [step * tick for tick in range(count + 1)]


def log_axis(values: Sequence[float], start: float, end: float) -> Axis:
    """Where a value lies between two coordinates, and powers of ten (or of two, where they are few) to mark."""
    low, high = math.log10(min(values)), math.log10(max(values))
    unit = 1.0 if high - low > 1.2 else math.log10(2)
    first, last = math.floor(low / unit + 1e-9), math.ceil(high / unit - 1e-9)
    last = max(last, first + 1)
    every = -(-(last - first) // 9)

    def place(value: float) -> float:
        return start + (end - start) * (math.log10(value) / unit - first) / (last - first)

    return place, [10 ** (unit * tick) for tick in range(first, last + 1, every)]
