"""Ablation of `compress`: `make ablation`, or `python benchmarks/accuracy/ablation.py`.

Trained ResNet-20 and ResNet-32 are pruned in steps and refitted after each step, as `compress` does. Accuracy is
measured at 80, 90, 95 and 98 %: once with all parts of the method, then with one part removed or replaced at a time.
Writes ablation.json and .md.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in (".", "python")]  # this checkout

import resuscitate
from benchmarks.common.inputs import DataFolder, ImageCount, Nets, calibration_images, data_folder, network, scorer
from benchmarks.common.results import RESULTS, markdown_table, progress, publish
from resuscitate.statistics import fitting

STOPS = [0.5, 0.65, 0.8, 0.85, 0.9, 0.925, 0.95, 0.965, 0.98]
SHOWN = [0.8, 0.9, 0.95, 0.98]
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "all in one step": {"alone": True},
    "only these four steps": {"stops": SHOWN},
    "without what the ReLU hides": {"relu_aware": False},
    "without the variance given back": {"most": 1.0},
    "a gain per channel in place of a refit": {"method": "channelwise"},
    "ERK": {"allocation": "erk"},
    "LAMP": {"allocation": "lamp"},
    "ridge 1e-3": {"ridge": 1e-3},
    "ridge 1e-1": {"ridge": 1e-1},
    "twice the images": {"images": 2},
}


@contextmanager
def most_gain(most: float) -> Iterator[None]:
    """Within this context, `most` is the largest gain by which a refit may restore the variance of an output."""
    defaults: Any = fitting.fit.__kwdefaults__
    before = defaults["most"]
    defaults["most"] = most
    try:
        yield
    finally:
        defaults["most"] = before


def gradual(
    dense: nn.Module,
    images: Tensor,
    score: resuscitate.Accuracy,
    stops: list[float] = STOPS,
    alone: bool = False,
    allocation: str = "global",
    most: float = fitting.MOST_GAIN,
    **options: Any,
) -> dict[str, float]:
    """Accuracy at the sparsities `SHOWN`.

    alone: prune the dense network to each of them in one step. most: see `most_gain`. options: of `repair`.
    """
    found, model = {}, copy.deepcopy(dense)
    options = options if "method" in options else {"method": "refit", "ridge": fitting.RIDGE, **options}
    with most_gain(most):
        for stop in SHOWN if alone else stops:
            model = copy.deepcopy(dense) if alone else model
            resuscitate.sparsify(model, stop, allocation=allocation)
            resuscitate.repair(model, dense, images, **options, keep_worse=True, progress=False)
            if stop in SHOWN:
                found[f"{stop:.0%}"] = score(model)
    return found


def main(
    data: DataFolder = None,
    nets: Nets = "resnet20,resnet32",
    images: ImageCount = 256,
    test_images: int = 5000,
    output: Path = RESULTS,
) -> None:
    """Remove or replace one part of the compression at a time; print the change in accuracy."""
    folder = data_folder(data)
    calibration, score = calibration_images(folder, 2 * images), scorer(folder, test_images)
    jobs = [(net, variant) for net in nets.split(",") for variant in VARIANTS]
    rows = []
    for net, variant in progress(jobs, "compressing"):
        dense, options = network(net, folder, calibration), dict(VARIANTS[variant])
        seen, started = calibration[: images * options.pop("images", 1)], time.perf_counter()
        found = gradual(dense, seen, score, **options)
        seconds = round(time.perf_counter() - started, 1)
        rows.append({"net": net, "dense": score(dense), "variant": variant, "accuracy": found, "seconds": seconds})
    found = {"images": {"calibration": images, "test": test_images}, "stops": STOPS, "rows": rows}
    publish(output, found, markdown(rows))


def markdown(rows: list[dict[str, Any]]) -> str:
    """A row for each variant, a column for each network and sparsity: accuracy, then differences from the first row."""
    nets = list(dict.fromkeys(row["net"] for row in rows))
    dense = {row["net"]: row["dense"] for row in rows}
    by = {(row["net"], row["variant"]): row["accuracy"] for row in rows}
    heads = [f"{net} ({dense[net]:.1f}), {at}" if at == "80%" else at for net in nets for at in by[net, "as it is"]]
    lines = []
    for variant in VARIANTS:
        cells = [
            f"{accuracy:.1f}" if variant == "as it is" else f"{accuracy - by[net, 'as it is'][at]:+.1f}"
            for net in nets
            for at, accuracy in by[net, variant].items()
        ]
        lines.append([variant, *cells])
    return markdown_table(["", *heads], lines)


if __name__ == "__main__":
    typer.run(main)
