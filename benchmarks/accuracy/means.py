"""Mean replacement on trained networks: `make means`, or `python benchmarks/accuracy/means.py`.

Trained ResNet-20 and ResNet-32 are pruned by global magnitude. The pruned weights stay at zero or are replaced by their
mean, with the dense or with exact BatchNorm statistics; or the other weights are refitted with a ridge of 1e-2, without
means or together with means. A mean for each kernel stores one more number for every nine weights of a 3x3 convolution:
the last row has no means and stores as many numbers in all. Writes means.json and .md.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import typer
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in (".", "python")]  # this checkout

import resuscitate
from benchmarks.common.inputs import DataFolder, ImageCount, Nets, calibration_images, data_folder, network, scorer
from benchmarks.common.results import RESULTS, markdown_table, progress, publish
from resuscitate.network.masks import find_layers

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
ROWS: dict[str, dict[str, Any] | None] = {
    "left at zero": None,
    "mean per filter": {"method": "mean"},
    "mean per kernel": {"method": "mean", "means": "kernel"},
    "exact BatchNorm": {"method": "bn"},
    "mean per filter, exact BatchNorm": {"method": "mean", "recalibrate": "exact"},
    "mean per kernel, exact BatchNorm": {"method": "mean", "means": "kernel", "recalibrate": "exact"},
    "refit": {"method": "refit", "ridge": 1e-2},
    "refit with a mean per filter": {"method": "refit", "ridge": 1e-2, "means": "filter"},
    "refit with a mean per kernel": {"method": "refit", "ridge": 1e-2, "means": "kernel"},
    "refit, as many numbers as with a mean per kernel": {"method": "refit", "ridge": 1e-2},
}


def numbers(model: nn.Module) -> int:
    """How many numbers the convolutions and linear layers store: weights that are not zero, and means."""
    layers = find_layers(model).values()
    means = [layer.means.numel() for layer in layers if isinstance(getattr(layer, "means", None), Tensor)]
    return sum(int(layer.weight.count_nonzero()) for layer in layers) + sum(means)  # type: ignore[operator]


def main(
    data: DataFolder = None,
    nets: Nets = "resnet20,resnet32",
    images: ImageCount = 256,
    test_images: int = 5000,
    output: Path = RESULTS,
) -> None:
    """Prune, replace or refit; print accuracies and the share of numbers that is stored."""
    folder = data_folder(data)
    calibration, score = calibration_images(folder, images), scorer(folder, test_images)
    rows = list[dict[str, Any]]()
    jobs = [(net, sparsity, row) for net in nets.split(",") for sparsity in SPARSITIES for row in ROWS]
    for net, sparsity, row in progress(jobs, "means"):
        dense, options = network(net, folder, calibration), ROWS[row]
        model, total = copy.deepcopy(dense), numbers(dense)
        resuscitate.sparsify(model, 1 - rows[-1]["stored"] if "as many" in row else sparsity)
        if options is not None:
            resuscitate.repair(model, dense, calibration, **options, keep_worse=True, progress=False)
        found = {"stored": numbers(model) / total, "accuracy": score(model)}
        rows.append({"net": net, "dense": score(dense), "sparsity": sparsity, "row": row, **found})
    publish(output, {"images": {"calibration": images, "test": test_images}, "rows": rows}, markdown(rows))


def markdown(rows: list[dict[str, Any]]) -> str:
    """A row for each way, a column for each network and sparsity: accuracy, and the share stored if it differs."""
    columns = list(dict.fromkeys((row["net"], row["sparsity"]) for row in rows))
    by = {(row["net"], row["sparsity"], row["row"]): row for row in rows}
    heads = [
        f"{net} ({by[net, at, 'refit']['dense']:.1f}), {at:.0%}" if at == SPARSITIES[0] else f"{at:.0%}"
        for net, at in columns
    ]
    lines = []
    for name in ROWS:
        cells = []
        for net, at in columns:
            row = by[net, at, name]
            more = row["stored"] - by[net, at, "left at zero"]["stored"] > 0.01
            cells.append(f"{row['accuracy']:.1f}" + (f" ({row['stored']:.0%})" if more else ""))
        lines.append([name, *cells])
    return markdown_table(["", *heads], lines)


if __name__ == "__main__":
    typer.run(main)
