"""Accuracy after every repair on trained networks: `make accuracy`, or `python benchmarks/accuracy/accuracy.py`.

ResNet-20 and ResNet-32 for CIFAR-10 are pruned by global magnitude and repaired by every method in both schedules with
each recalibration. Accuracy on images that are not used for calibration. Writes accuracy.json (everything),
accuracy.csv (a row for each repair) and accuracy.md (the table in docs/results.md).
"""

from __future__ import annotations

import copy
import csv
import sys
import time
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in (".", "python")]  # this checkout

import resuscitate
from benchmarks.common.inputs import MEAN, STD, DataFolder, Nets, data_folder, network, scorer
from benchmarks.common.results import RESULTS, markdown_table, progress, publish
from resuscitate.data.images import load_images

GAINS = ("layerwise", "channelwise", "asr")
RECALIBRATIONS: tuple[str | None, ...] = (None, "exact", "ema")
Row = dict[str, Any]


def configurations(gain_samples: int) -> list[dict[str, Any]]:
    """The options of every repair in the table."""
    runs: list[dict[str, Any]] = [{"method": "bn", "recalibrate": mode} for mode in ("exact", "ema")]
    for schedule, recalibrate, method in product(("parallel", "sequential"), RECALIBRATIONS, GAINS):
        runs.append({"method": method, "schedule": schedule, "recalibrate": recalibrate, "gain_samples": gain_samples})
    return runs


def run(net: str, sparsity: float, data: dict[str, Any], gain_samples: int) -> list[Row]:
    """Prune one network to one sparsity; measure it without a repair and after every repair."""
    dense: nn.Module = data[net]
    pruned = copy.deepcopy(dense)
    masks = resuscitate.sparsify(pruned, sparsity)
    rows: list[Row] = [{"method": "none", "accuracy": data["score"](pruned), "seconds": 0.0}]
    for options in configurations(gain_samples):
        model = copy.deepcopy(pruned)
        report = resuscitate.repair(model, dense, data["calibration"], **options, keep_worse=True, progress=False)
        masks.check(model)
        rows.append({**options, "accuracy": data["score"](model), "seconds": round(report.seconds, 2)})
    blank = {"schedule": None, "recalibrate": None}
    return [{"net": net, "sparsity": sparsity, "dense": data["dense"][net], **blank, **row} for row in rows]


def markdown(rows: list[Row]) -> str:
    """A row for each network and sparsity; three figures in a cell are layer-wise / channel-wise / ASR."""

    def cell(key: tuple[str, float], schedule: str | None, recalibrate: str | None, *methods: str) -> str:
        wanted = [(*key, schedule, recalibrate, method) for method in methods]
        found = {(r["net"], r["sparsity"], r["schedule"], r["recalibrate"], r["method"]): r["accuracy"] for r in rows}
        return " / ".join(f"{found[w]:.1f}" for w in wanted)

    heads = ["network (dense), sparsity", "no repair", "BN exact", "gains + BN exact", "BN EMA"]
    heads += ["gains, parallel + BN EMA", "gains, parallel, dense BN kept", "**gains, sequential, dense BN kept**"]
    lines = []
    for key, dense in {(r["net"], r["sparsity"]): r["dense"] for r in rows}.items():
        cells = [
            f"{key[0]} ({dense:.1f}), {key[1]:.0%}",
            cell(key, None, None, "none"),
            cell(key, None, "exact", "bn"),
            cell(key, "sequential", "exact", *GAINS),
            cell(key, None, "ema", "bn"),
            cell(key, "parallel", "ema", *GAINS),
            cell(key, "parallel", None, *GAINS),
            f"**{cell(key, 'sequential', None, *GAINS)}**",
        ]
        lines.append(cells)
    return markdown_table(heads, lines)


def main(
    data: DataFolder = None,
    nets: Nets = "resnet20,resnet32",
    sparsities: Annotated[str, typer.Option(help="by comma")] = "0.5,0.7,0.8,0.9",
    test_images: int = 2000,
    gain_samples: int = 64,
    batchnorm_images: int = 2560,
    seed: int = 0,
    output: Path = RESULTS,
) -> None:
    """Repair trained networks by every method; print accuracies."""
    folder, started = data_folder(data), time.perf_counter()
    options: dict[str, Any] = {"mean": MEAN, "std": STD}
    store: dict[str, Any] = {
        "score": scorer(folder, test_images),
        "calibration": load_images(
            folder / "cifar10_jpeg_train.npz", max_samples=batchnorm_images, seed=seed, **options
        ),
        "dense": {},
    }
    for net in nets.split(","):
        store[net] = network(net, folder, store["calibration"])
        store["dense"][net] = store["score"](store[net])
    grid = [(net, float(sparsity)) for net, sparsity in product(nets.split(","), sparsities.split(","))]
    rows = [row for net, sparsity in progress(grid, "repairing") for row in run(net, sparsity, store, gain_samples)]
    found = {
        "images": {"test": test_images, "gains": gain_samples, "batchnorm": batchnorm_images, "seed": seed},
        "seconds": round(time.perf_counter() - started),
        "pruning": "global L1 over all convolutions and the linear layer; CIFAR-10 as JPEG, top-1 in per cent",
    }
    publish(output, {**found, "rows": rows}, markdown(rows))
    with (output / "accuracy.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["net", "sparsity", "dense", "method", "schedule", "recalibrate", "gain_samples",
                                       "accuracy", "seconds"])  # fmt: skip
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    typer.run(main)
