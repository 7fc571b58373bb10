"""`resuscitate demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from .. import demo as library
from ..reports.plots import have_matplotlib
from ..utils.files import check_ending, check_writable
from .application import app, show
from .flags import opt


@app.command()
def demo(
    seed: Annotated[int, opt("Of the split, the weights and the order of training.")] = 0,
    epochs: Annotated[int, opt("Of training.", min=1)] = 15,
    output: Annotated[Path, opt("The picture (.png, .pdf, .svg).", "--output", "-o")] = Path("demo.png"),
    plot: Annotated[bool, opt("Draw the picture.")] = True,
) -> None:
    """Train a small network on real digits, prune it until it collapses, and repair it: under a minute."""
    if plot:
        check_ending(output, ".png", ".pdf", ".svg")
        check_writable(output)
    result = library.run(seed=seed, epochs=epochs)
    show(result)
    if plot and have_matplotlib():
        library.draw_demo(result, output)
        show(f"picture: {output}")
    elif plot:
        show("picture skipped: it needs matplotlib, pip install 'resuscitate[plots]'")
