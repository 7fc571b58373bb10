"""Pruning in one shot, in steps, or with regrowth: `make regrow`, or `python benchmarks/accuracy/regrow.py`.

Trained ResNet-20 and ResNet-32 are pruned to 90 and 95 % in three ways: by global magnitude in one shot; by `compress`;
and to 97 and 99 % followed by `regrow`, with each budget and saliency. All are refitted with the same unlabelled
images. Accuracy on other images. Writes regrow.json and .md.
"""

from __future__ import annotations

import copy
import sys
import time
from pathlib import Path
from typing import Any

import typer
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in (".", "python")]  # this checkout

import resuscitate
from benchmarks.common.inputs import DataFolder, ImageCount, Nets, calibration_images, data_folder, network, scorer
from benchmarks.common.results import RESULTS, accuracy_cell, markdown_table, progress, publish
from resuscitate.data.images import load_labels

PAST = {0.9: 0.97, 0.95: 0.99}  # final sparsity -> sparsity before regrowth
ROUNDS = 4
LABELS = "labels"  # replaced by the images with their labels
# options of `regrow`
REGROWN: dict[str, dict[str, Any]] = {
    "greedy, magnitude": {},
    f"greedy, magnitude, {ROUNDS} rounds": {"rounds": ROUNDS},
    "by damage, magnitude": {"budget": "damage"},
    "by SSIM, magnitude": {"budget": "ssim"},
    "proportional, magnitude": {"budget": "proportional"},
    "greedy, residual": {"saliency": "residual"},
    f"greedy, residual, {ROUNDS} rounds": {"saliency": "residual", "rounds": ROUNDS},
    "greedy, gradient (labels)": {"saliency": "gradient", "labelled": LABELS},
    "by SSIM, gradient (labels), as published": {"budget": "ssim", "saliency": "gradient", "labelled": LABELS},
}
ROWS = (
    "one shot",
    "compress",
    *REGROWN,
    "compress past it, then greedy, magnitude",
    "one shot, uniform",
    "uniform past it, then greedy, magnitude",
)


def sparse(
    row: str, dense: nn.Module, sparsity: float, images: Tensor, labelled: list[tuple[Tensor, Tensor]]
) -> nn.Module:
    """A copy of the network, pruned to that sparsity and repaired in one of the ways `ROWS`."""
    model = copy.deepcopy(dense)
    quiet = {"progress": False}
    allocation = "uniform" if "uniform" in row else "global"
    if row.startswith("one shot"):
        resuscitate.sparsify(model, sparsity, allocation=allocation)
        resuscitate.repair(model, dense, images, **quiet)
    elif row == "compress":
        resuscitate.compress(model, sparsity, images, allocation="global", **quiet)
    elif row in REGROWN:
        options = {**REGROWN[row], **quiet}
        options |= {"labelled": labelled} if "labelled" in options else {}
        masks = resuscitate.sparsify(model, PAST[sparsity])
        resuscitate.regrow(model, dense, masks, sparsity, images, **options)
    elif allocation == "uniform":
        masks = resuscitate.sparsify(model, PAST[sparsity], allocation=allocation)
        resuscitate.regrow(model, dense, masks, sparsity, images, **quiet)
    else:
        masks = resuscitate.compress(model, PAST[sparsity], images, allocation="global", **quiet).masks
        resuscitate.regrow(model, dense, masks, sparsity, images, **quiet)
    return model


def main(
    data: DataFolder = None,
    nets: Nets = "resnet20,resnet32",
    images: ImageCount = 256,
    test_images: int = 5000,
    output: Path = RESULTS,
) -> None:
    """Prune the networks to each sparsity in every way; print accuracies and seconds."""
    folder = data_folder(data)
    calibration, score = calibration_images(folder, images), scorer(folder, test_images)
    labels = load_labels(folder / "cifar10_jpeg_train.npz", max_samples=images)
    labelled = list(zip(calibration.split(64), labels.split(64), strict=True))
    rows = []
    jobs = [(net, sparsity, row) for net in nets.split(",") for sparsity in PAST for row in ROWS]
    for net, sparsity, row in progress(jobs, "regrowing"):
        dense, started = network(net, folder, calibration), time.perf_counter()
        model = sparse(row, dense, sparsity, calibration, labelled)
        seconds = round(time.perf_counter() - started, 1)
        found = {"zeros": resuscitate.Masks.from_zeros(model).sparsity, "accuracy": score(model), "seconds": seconds}
        rows.append({"net": net, "dense": score(dense), "sparsity": sparsity, "row": row, **found})
    publish(output, {"images": {"calibration": images, "test": test_images}, "rows": rows}, markdown(rows))


def markdown(rows: list[dict[str, Any]]) -> str:
    """Accuracy and seconds: a row for each way, a column for each network and sparsity, its best in bold."""
    columns = list(dict.fromkeys((row["net"], row["sparsity"]) for row in rows))
    by = {(row["net"], row["sparsity"], row["row"]): row for row in rows}
    heads = [f"{net} ({by[net, at, 'one shot']['dense']:.1f}), {PAST[at]:.0%} to {at:.0%}" for net, at in columns]
    lines = []
    for name in ROWS:
        cells = []
        for net, at in columns:
            row, best = by[net, at, name], max(by[net, at, other]["accuracy"] for other in ROWS)
            cells.append(f"{accuracy_cell(row['accuracy'], best)} ({row['seconds']:.0f} s)")
        lines.append([name, *cells])
    return markdown_table(["", *heads], lines)


if __name__ == "__main__":
    typer.run(main)
