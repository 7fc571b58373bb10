"""Ablation of `compress`: `make ablation`, or `python benchmarks/accuracy/ablation.py`.

Trained ResNet-20 and ResNet-32 for CIFAR-10 and a DS-CNN for keywords are compressed: once by the defaults, then with
one part left out or replaced at a time. Each draw has its own calibration images; accuracy on others. Writes
ablation.json, after each compression, and ablation.md. A run leaves out what it has: it goes on where it was stopped.
"""

from __future__ import annotations

import copy
import json
import sys
from functools import lru_cache
from pathlib import Path
from statistics import mean
from typing import Annotated, Any
from unittest.mock import patch

import typer

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in (".", "python")]  # this checkout

import resuscitate
from benchmarks.common.inputs import DataFolder, Nets, case, data_folder
from benchmarks.common.results import RESULTS, machine, markdown_table, progress, write
from resuscitate.statistics import fitting

SPARSITIES = {"resnet20": (0.9, 0.95), "resnet32": (0.9, 0.95), "dscnn": (0.7, 0.8)}
NETS = ",".join(SPARSITIES)
DRAWS = {"resnet20": 1, "resnet32": 1, "dscnn": 3}  # times the draws that are asked for: it has fewer clips to test on
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "all in one step": {"steps": 1},
    "three steps": {"steps": 3},
    "every step measures": {"walks": 7},
    "a global ranking": {"allocation": "global"},
    "no floor in depthwise layers": {"min_per_channel": 0},
    "each channel fitted alone": {"curvature": False},
    "without what the ReLU hides": {"relu_aware": False},
    "without the variance given back": {"most": 1.0},  # the largest gain of a fit
    "a gain per channel in place of a refit": {"method": "channelwise"},
    "ridge 1e-2": {"ridge": 1e-2},
    "flips of the images too": {"augment": "flip"},
    "half of the images": {"images": 0.5},
}


def main(
    data: DataFolder = None,
    nets: Nets = NETS,
    draws: Annotated[int, typer.Option(help="of the calibration images")] = 1,
    test_images: int = 10_000,
    output: Path = RESULTS,
) -> None:
    """Leave out or replace one part of the compression at a time; write the change in accuracy."""
    folder, file = data_folder(data), output / "ablation.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    known = {(row["net"], row["sparsity"], row["draw"], row["variant"]) for row in rows}
    jobs = [
        (net, sparsity, draw, variant)
        for net in nets.split(",")
        for draw in range(draws * DRAWS[net])
        for sparsity in SPARSITIES[net]
        for variant in VARIANTS
        if (net, sparsity, draw, variant) not in known
    ]
    load = lru_cache(maxsize=1)(case)  # it decodes thousands of images
    for net, sparsity, draw, variant in progress(jobs, "compressing"):
        (dense, images, score), options = load(net, draw, folder, test_images), dict(VARIANTS[variant])
        images = images[: int(len(images) * options.pop("images", 1))]
        model = copy.deepcopy(dense)
        with patch.dict(fitting.attempt.__kwdefaults__, most=options.pop("most", fitting.MOST_GAIN)):
            report = resuscitate.compress(model, sparsity, images, **options, keep_worse=True, progress=False)
        assert report.agreement is not None
        row = {"net": net, "sparsity": sparsity, "draw": draw, "variant": variant, "dense": score(dense)}
        rows.append({**row, "accuracy": score(model), "error": report.agreement.error_after})
        write(file, {**machine(), "images": {"test": test_images}, "rows": rows}, markdown(rows))


def markdown(rows: list[dict[str, Any]]) -> str:
    """A row for each variant; a column for each network and sparsity with all variants: accuracy, then differences."""
    found: dict[tuple[str, float], dict[str, list[float]]] = {}
    for row in rows:
        found.setdefault((row["net"], row["sparsity"]), {}).setdefault(row["variant"], []).append(row["accuracy"])
    dense = {row["net"]: mean(each["dense"] for each in rows if each["net"] == row["net"]) for row in rows}
    columns = [
        (f"{net} ({dense[net]:.1f}), {sparsity:.0%}", {variant: mean(each) for variant, each in by.items()})
        for (net, sparsity), by in sorted(found.items(), key=lambda item: (NETS.index(item[0][0]), item[0][1]))
        if by.keys() == VARIANTS.keys()
    ]
    first, *others = VARIANTS
    lines = [[first, *(f"{by[first]:.1f}" for _, by in columns)]]
    lines += [[variant, *(f"{by[variant] - by[first]:+.1f}" for _, by in columns)] for variant in others]
    return markdown_table(["", *(head for head, _ in columns)], lines)


if __name__ == "__main__":
    typer.run(main)
