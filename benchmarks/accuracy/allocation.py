"""What the measured allocation of `compress` is worth: `make allocation`, or this file.

A trained keyword-spotting DS-CNN, ResNet-20 and ResNet-32 are compressed with a global ranking and with the measured
allocation. Each seed draws its own calibration images: 300 clips, 512 CIFAR-10 images. Accuracy on others, and the
relative error of the logits against the dense network on held-out calibration images. Writes allocation.json and .md,
and keeps their rows of networks that are not named.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import typer

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in (".", "python")]  # this checkout

import resuscitate
from benchmarks.common.inputs import DataFolder, Nets, case, data_folder
from benchmarks.common.results import RESULTS, markdown_table, progress, publish

ALLOCATIONS = "global", "measured"
# network -> sparsities, number of seeds
CASES = {
    "dscnn": ((0.5, 0.7, 0.8, 0.9), 3),
    "resnet20": ((0.8, 0.9, 0.95), 1),
    "resnet32": ((0.8, 0.9, 0.95), 1),
}
NETS = ",".join(CASES)


def main(data: DataFolder = None, nets: Nets = NETS, test_images: int = 2000, output: Path = RESULTS) -> None:
    """Compress with each allocation; print accuracies and errors."""
    folder, rows = data_folder(data), []
    jobs = [(net, s, seed) for net in nets.split(",") for s in CASES[net][0] for seed in range(CASES[net][1])]
    for net, sparsity, seed in progress(jobs, "compressing"):
        dense, images, score = case(net, seed, folder, test_images)
        for name in ALLOCATIONS:
            model = copy.deepcopy(dense)
            report = resuscitate.compress(model, sparsity, images, allocation=name, progress=False)
            assert report.agreement is not None
            found = {"net": net, "sparsity": sparsity, "seed": seed, "dense": score(dense), "allocation": name}
            found |= {"score": score(model), "error": report.agreement.error_after}
            rows.append({**found, "chosen": report.allocation})
    kept = json.loads((output / "allocation.json").read_text())["rows"] if (output / "allocation.json").exists() else []
    rows += [row for row in kept if row["net"] not in nets.split(",")]
    rows.sort(key=lambda row: list(CASES).index(row["net"]))
    publish(output, {"test_images": test_images, "rows": rows}, markdown(rows))


def markdown(rows: list[dict[str, Any]]) -> str:
    """A row for each network and sparsity; means over the seeds, and the standard deviation of several."""
    lines = []
    for net, sparsity in dict.fromkeys((row["net"], row["sparsity"]) for row in rows):
        cells = []
        for name in ALLOCATIONS:
            chosen = [row for row in rows if (row["net"], row["sparsity"], row["allocation"]) == (net, sparsity, name)]
            scores, errors = ([row[key] for row in chosen] for key in ("score", "error"))
            spread = f" ± {stdev(scores):.1f}" if len(scores) > 1 else ""
            cells += [f"{mean(scores):.1f}{spread}", f"{mean(errors):.2f}"]
        dense = mean(row["dense"] for row in rows if (row["net"], row["sparsity"]) == (net, sparsity))
        lines.append([f"{net} ({dense:.1f}), {sparsity:.0%}", *cells])
    heads = [f"{name}{what}" for name in ALLOCATIONS for what in ("", ", error")]
    return markdown_table(["network (dense), sparsity", *heads], lines)


if __name__ == "__main__":
    typer.run(main)
