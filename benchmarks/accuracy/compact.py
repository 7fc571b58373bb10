"""Compact networks on which no default was chosen: `make compact`, or `python benchmarks/accuracy/compact.py`.

A MobileNetV1 and a MobileNetV2 for images of 32x32 are trained on CIFAR-10 for a few epochs, pruned by global
magnitude, and repaired with the same unlabelled training images by each tool of `headline.py`. Accuracy on test images.
Writes compact.json, after each network and sparsity, and compact.md. A run leaves out what it has, but trains again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in (".", "python")]  # this checkout

from benchmarks.accuracy.headline import TOOLS, Cell, measure, table
from benchmarks.common.inputs import MEAN, STD, DataFolder, ImageCount, Nets, data_folder, scorer
from benchmarks.common.results import RESULTS, machine, progress, write
from benchmarks.networks.compact import mobilenet_v1, mobilenet_v2
from resuscitate.data.images import load_images, load_labels

BUILDS = {"mobilenet_v1": mobilenet_v1, "mobilenet_v2": mobilenet_v2}
TITLES = {"mobilenet_v1": "MobileNetV1", "mobilenet_v2": "MobileNetV2"}
LEFT_OUT = "NNCF adaptation", "published ASR + EMA"
SHIFT = 3  # pixels that an image of a batch is moved by, at most


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, batch: int = 128) -> None:
    """Train in place, on mirrored and moved images, by SGD with a one-cycle rate; ends in eval mode."""
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=steps, pct_start=0.2)
    model.train().to(memory_format=torch.channels_last)  # in which a CPU needs 0.6 times as long
    for chosen in progress([part for _ in range(epochs) for part in _batches(len(images), batch)], "training"):
        x = images[chosen]
        x = x.flip(3) if torch.rand(()) < 0.5 else x
        x = x.roll(tuple(torch.randint(-SHIFT, SHIFT + 1, (2,)).tolist()), (2, 3))
        optimizer.zero_grad()
        logits = model(x.contiguous(memory_format=torch.channels_last))
        F.cross_entropy(logits, labels[chosen], label_smoothing=0.1).backward()
        optimizer.step()
        schedule.step()
    model.eval().to(memory_format=torch.contiguous_format)


def _batches(images: int, size: int) -> tuple[Tensor, ...]:
    """The numbers of all images in another order, in whole batches."""
    return torch.randperm(images)[: images // size * size].split(size)


def main(
    data: DataFolder = None,
    nets: Nets = "mobilenet_v1,mobilenet_v2",
    targets: str = "50%,70%,80%,90%,95%",
    draws: int = 1,
    epochs: int = 8,
    images: ImageCount = 512,
    train_images: int = 50_000,
    test_images: int = 10_000,
    output: Path = RESULTS,
) -> None:
    """Train compact networks, prune them, repair them with every tool."""
    folder, file = data_folder(data), output / "compact.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    done = {(row["net"], row["target"], row["draw"]) for row in rows}
    options = {"max_samples": train_images, "seed": None}
    pool = load_images(folder / "cifar10_jpeg_train.npz", mean=MEAN, std=STD, **options)
    labels, score = load_labels(folder / "cifar10_jpeg_train.npz", **options), scorer(folder, test_images)
    tools = [name for name in TOOLS if name not in LEFT_OUT]
    for net in nets.split(","):
        jobs = [(net, target, draw) for draw in range(draws) for target in targets.split(",")]
        if not (jobs := [job for job in jobs if job not in done]):
            continue
        torch.manual_seed(0)
        dense = BUILDS[net]()
        train(dense, pool, labels, epochs)
        for _, target, draw in progress(jobs, f"repairing {net}"):
            chosen = torch.randperm(len(pool), generator=torch.Generator().manual_seed(draw))[:images]
            accuracy, seconds = measure(Cell(dense, target, pool[chosen], True), score, tools)
            row = {"net": net, "target": target, "draw": draw, "dense": score(dense)}
            rows.append({**row, "accuracy": accuracy, "seconds": seconds})
            counts = {"training": train_images, "epochs": epochs, "calibration": images, "test": test_images}
            write(file, {**machine(), "images": counts, "rows": rows}, table(rows, titles=TITLES))


if __name__ == "__main__":
    typer.run(main)
