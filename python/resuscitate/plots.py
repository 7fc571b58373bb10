"""Pictures, with matplotlib's object interface: no window, no global state."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoints import atomic
from .errors import ResuscitateError

if TYPE_CHECKING:
    from .demo import Demo

# Okabe and Ito's colours, which colour-blind readers can tell apart; black is for the dense network
COLOURS = {
    "grey": "#B0B0B0",
    "orange": "#E69F00",
    "vermilion": "#D55E00",
    "sky": "#56B4E9",
    "green": "#009E73",
    "blue": "#0072B2",
}


def have_matplotlib() -> bool:
    """Whether pictures can be drawn here."""
    return find_spec("matplotlib") is not None


def draw_demo(result: Demo, path: str | Path) -> None:
    """Accuracy by method and sparsity, and one layer's per-channel variance (log scale): dense, pruned, repaired.

    A channel that has no variance left has no mark. Raises ResuscitateError where matplotlib is missing, ValueError
    for a format (the path's suffix) that it does not know, OSError where nothing can be written.
    """
    if not have_matplotlib():
        raise ResuscitateError("a picture needs matplotlib: pip install 'resuscitate[plots]'")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(4, 3))
    _accuracy_bars(left, result)
    _variance_dots(right, result)
    with atomic(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix.lstrip(".") or "png")


def _accuracy_bars(axes: Any, result: Demo) -> None:
    columns = list(next(iter(result.accuracy.values())))
    width = 0.88 / len(columns)
    axes.axhline(result.dense, color="black", linestyle="--", linewidth=1, label=f"dense, {result.dense:.1f}")
    for place, (column, colour) in enumerate(zip(columns, COLOURS.values(), strict=True)):
        heights = [row[column] for row in result.accuracy.values()]
        offsets = [group + (place - (len(columns) - 1) / 2) * width for group in range(len(heights))]
        bars = axes.bar(offsets, heights, width * 0.94, color=colour, label=column)
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 1.2}  # the dense line must not strike a number out
        axes.bar_label(bars, fmt="%.0f", fontsize=8.5, padding=2, bbox=paper)
    axes.set_xticks(range(len(result.accuracy)), [f"{sparsity:.0%} sparsity" for sparsity in result.accuracy])
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(0, 109)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel(f"right, of {result.tested} held-out digits (%)")
    axes.set_title("Accuracy after pruning, by repair", loc="left", fontweight="bold")
    _finish(axes, legend_columns=4)


def _variance_dots(axes: Any, result: Demo) -> None:
    from .demo import SHOWN_LAYER, SHOWN_METHOD, SHOWN_SPARSITY

    order = sorted(range(len(result.variances["dense"])), key=lambda channel: -result.variances["dense"][channel])
    dense, pruned, repaired = (
        [result.variances[name][channel] for channel in order] for name in ("dense", "pruned", "repaired")
    )
    axes.set_yscale("log", nonpositive="mask")
    axes.vlines(range(len(order)), pruned, repaired, color="#D9D9D9", linewidth=0.8)
    axes.plot(dense, color="black", linewidth=1.8, label="dense")
    axes.plot(repaired, "D", color=COLOURS["blue"], markersize=3.4, label=f"repaired ({SHOWN_METHOD})")
    axes.plot(pruned, "o", color=COLOURS["vermilion"], markersize=3.4, label="pruned")
    axes.set_xlabel("channel, in the order of its dense variance")
    axes.set_ylabel("variance of the channel's output")
    axes.set_title(f"Signal in {SHOWN_LAYER}, {SHOWN_SPARSITY:.0%} sparsity", loc="left", fontweight="bold")
    axes.margins(x=0.02)
    _finish(axes, legend_columns=3)


def _finish(axes: Any, legend_columns: int) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E4E4E4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=legend_columns, frameon=False, fontsize=9)
