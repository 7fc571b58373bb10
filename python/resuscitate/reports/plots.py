"""Pictures, with matplotlib's object interface: no window, no global state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from ..errors import ResuscitateError
from ..utils.files import atomic
from .damage import LayerDamage
from .recoverability import RecoverabilityMap

# Okabe and Ito's colours, which colour-blind readers can tell apart; black is for the dense network
COLOURS = {
    "grey": "#B0B0B0",
    "orange": "#E69F00",
    "vermilion": "#D55E00",
    "sky": "#56B4E9",
    "green": "#009E73",
    "blue": "#0072B2",
    "purple": "#CC79A7",
}


def have_matplotlib() -> bool:
    """Whether pictures can be drawn here."""
    return find_spec("matplotlib") is not None


def finish(axes: Any, legend_columns: int = 0) -> None:
    """Horizontal grid lines, no frame above and on the right; a legend below the axes if it has columns."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E4E4E4", linewidth=0.7)
    axes.set_axisbelow(True)
    if legend_columns:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=legend_columns, frameon=False, fontsize=9)


def draw_map(found: RecoverabilityMap, path: str | Path, methods: Sequence[str] | None = None) -> None:
    """Score against sparsity, a line for each allocation; a panel for each method (None: all but the baseline "bn").

    Thin lines are the baseline's, exact BatchNorm statistics alone. Shaded is the transition regime (see
    `RecoverabilityMap.transition`) of the allocation in which the method holds longest. Raises as `open_figure` does,
    ValueError for a method that is not in the map.
    """
    baseline = "bn" if "bn" in found.methods else None
    shown = list(methods or [method for method in found.methods if method not in ("none", baseline)] or found.methods)
    rows, columns = -(-len(shown) // 3), min(len(shown), 3)
    with open_figure(path, 4.6 * columns, 4.2 * rows) as figure:
        panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
        for axes in panels[len(shown) :]:
            axes.set_axis_off()
        for axes, method in zip(panels, shown, strict=False):
            _map_panel(axes, found, method, baseline)
        panels[0].set_ylabel("score")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)


def draw_damage(layers: Mapping[str, LayerDamage], path: str | Path, title: str = "") -> None:
    """Two heat maps, a row for each layer: its channels in the order of their dense variance, stretched to the width.

    Left the variance against the dense one, right the correlation with it; constant channels are blank. Raises as
    `open_figure` does.
    """
    width = max(len(layer.variance) for layer in layers.values())
    ratios, correlations = [], []
    for layer in layers.values():
        order = layer.variance.argsort(descending=True)
        places = order[torch.arange(width) * len(order) // width]
        ratios.append(layer.ratio[places].clamp(min=2.0**-20).log2())
        correlations.append(layer.correlation[places])
    with open_figure(path, 11, 1.6 + 0.2 * len(layers)) as figure:
        panels = figure.subplots(1, 2, sharey=True)
        left = ratios, "variance, pruned / dense (powers of 2)", "RdBu_r", -4, 4
        right = correlations, "correlation with dense", "viridis", 0, 1
        for axes, (values, name, colours, low, high) in zip(panels, (left, right), strict=True):
            picture = axes.imshow(torch.stack(values).numpy(), cmap=colours, vmin=low, vmax=high, aspect="auto")
            axes.set_title(name, loc="left", fontsize=10)
            axes.set_xticks([0, width - 1], ["largest", "smallest"])
            axes.set_xlabel("channels, by dense variance")
            figure.colorbar(picture, ax=axes, extend="both" if low else "min")
        panels[0].set_yticks(range(len(layers)), list(layers), fontsize=8)
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")


def _map_panel(axes: Any, found: RecoverabilityMap, method: str, baseline: str | None) -> None:
    half = found.chance + (found.dense - found.chance) / 2
    axes.axhline(found.dense, color="black", linestyle="--", linewidth=1)
    axes.axhline(half, color="black", linestyle=":", linewidth=1)
    colours = [COLOURS[name] for name in ("blue", "orange", "green", "vermilion", "sky", "grey")]
    regimes = {}
    for allocation, colour in zip(found.allocations, cycle(colours)):
        curve = found.curve(allocation, method)
        axes.plot(list(curve), list(curve.values()), "o-", color=colour, markersize=3.5, label=allocation)
        if baseline is not None and baseline != method:
            thin = found.curve(allocation, baseline)
            axes.plot(list(thin), list(thin.values()), color=colour, linewidth=0.7, alpha=0.7)
            if (regime := found.transition(allocation, method, baseline)) is not None:
                regimes[allocation] = regime
    if regimes:
        name, (start, end, _) = max(regimes.items(), key=lambda item: item[1].end)
        axes.axvspan(start, end, color="#F3E5AB", alpha=0.6, linewidth=0, zorder=0)
        axes.text((start + end) / 2, 0.01, name, ha="center", fontsize=8, transform=axes.get_xaxis_transform())
    axes.set_title(method, loc="left", fontweight="bold")
    axes.set_xlabel("sparsity")
    finish(axes)


@contextmanager
def open_figure(path: str | Path, width: float, height: float) -> Iterator[Any]:
    """A new figure, saved when the block ends.

    Raises ResuscitateError without matplotlib, ValueError for an unknown format (the path's suffix), OSError.
    """
    if not have_matplotlib():
        raise ResuscitateError("a picture needs matplotlib: pip install 'resuscitate[plots]'")
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    yield figure
    with atomic(path) as temporary, rc_context({"svg.hashsalt": "resuscitate"}):
        # no date, and the same names for the same shapes: a picture of the same data is the same file
        suffix = Path(path).suffix.lstrip(".") or "png"
        figure.savefig(temporary, format=suffix, metadata={"Date": None} if suffix == "svg" else None)
