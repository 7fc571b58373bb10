"""The ridge of a refit, fixed or chosen by cross-validation: `make ridge`, or `python benchmarks/accuracy/ridge.py`.

Trained ResNet-20, ResNet-32 and a keyword-spotting DS-CNN, pruned by global magnitude, and a wide pooled classifier,
which keeps as many inputs as there are images; each with several numbers of calibration images. Each seed draws its own
calibration images, and the accuracies are means over the seeds. Writes ridge.json and .md, and keeps their rows of
networks that are not named.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import typer
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in (".", "python")]  # this checkout

import resuscitate
from benchmarks.common.inputs import DataFolder, Nets, calibration_images, data_folder, network, scorer
from benchmarks.common.results import RESULTS, markdown_table, progress, publish
from benchmarks.networks.dscnn import load_dscnn

RIDGES: dict[str, float | None] = {"1e-2": 1e-2, "1.0": 1.0, "cross-validated": None}
# network -> (sparsities, numbers of calibration images)
CASES: dict[str, tuple[tuple[float, ...], tuple[int, ...]]] = {
    "resnet20": ((0.9,), (64, 256, 1024)),
    "resnet32": ((0.9,), (64, 256, 1024)),
    "dscnn": ((0.5, 0.7), (64, 256)),
    "wide classifier": ((0.7,), (64, 128, 256, 512)),
}
NETS = ",".join(CASES)
Case = tuple[nn.Module, nn.Module, Callable[[int], Tensor], Callable[[nn.Module], float]]


def case(net: str, sparsity: float, seed: int, folder: Path, test_images: int) -> Case:
    """A dense network, its pruned copy, a function from a count to calibration images, and a score in per cent."""
    generator = torch.Generator().manual_seed(seed)
    allocation = "global"
    if net == "dscnn":
        dense, clips, labels = load_dscnn(folder)
        order = torch.randperm(len(clips), generator=generator)
        images, score = clips[order[:256]], resuscitate.Accuracy(clips[order[256:]], labels[order[256:]])
    elif net == "wide classifier":
        dense, images, score = wide_classifier(generator)
        allocation = "uniform"
    else:
        pool = calibration_images(folder, 5120)
        dense, score = network(net, folder, pool), scorer(folder, test_images)
        images = pool[torch.randperm(len(pool), generator=generator)]
    pruned = copy.deepcopy(dense)
    resuscitate.sparsify(pruned, sparsity, allocation=allocation)
    return dense, pruned, lambda count: images[:count], score


def wide_classifier(generator: torch.Generator) -> tuple[nn.Module, Tensor, Callable[[nn.Module], float]]:
    """A network of random weights: convolutions, pooling, a linear layer with 384 inputs. The score is its explained
    variance of the dense outputs, in per cent.
    """
    layers = [nn.Conv2d(32, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 384, 1), nn.ReLU()]
    dense = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(384, 40)).eval()
    for parameter in dense.parameters():
        nn.init.normal_(parameter, 0, max(parameter[0].numel(), 2) ** -0.5, generator=generator)
    draws = (torch.randn(1024, 32, size, size, generator=generator) for size in (3, 1))
    images = sum(draws, torch.zeros(()))
    with torch.no_grad():
        wanted = dense(images[512:])

    def score(model: nn.Module) -> float:
        with torch.no_grad():
            error = (model(images[512:]) - wanted).square().sum()
        return float(100 * (1 - error / (wanted - wanted.mean(0)).square().sum()))

    return dense, images[:512], score


def main(
    data: DataFolder = None,
    nets: Nets = NETS,
    seeds: int = 2,
    test_images: int = 2000,
    output: Path = RESULTS,
) -> None:
    """Refit with each ridge; print accuracies."""
    folder, rows = data_folder(data), []
    jobs = [(net, sparsity, seed) for net in nets.split(",") for sparsity in CASES[net][0] for seed in range(seeds)]
    for net, sparsity, seed in progress(jobs, "ridge"):
        dense, pruned, images, score = case(net, sparsity, seed, folder, test_images)
        about = {"net": net, "sparsity": sparsity, "seed": seed, "dense": score(dense), "pruned": score(pruned)}
        for count in CASES[net][1]:
            for name, ridge in RIDGES.items():
                model = copy.deepcopy(pruned)
                report = resuscitate.repair(model, dense, images(count), method="refit", ridge=ridge, progress=False)
                found = {"images": count, "ridge": name, "score": score(model), "seconds": round(report.seconds, 2)}
                chosen = [layer.ridge for layer in report.layers if layer.ridge is not None]
                rows.append({**about, **found, "chosen": chosen})
    kept = json.loads((output / "ridge.json").read_text())["rows"] if (output / "ridge.json").exists() else []
    rows = sorted(
        [row for row in kept if row["net"] not in nets.split(",")] + rows, key=lambda row: list(CASES).index(row["net"])
    )
    publish(output, {"seeds": seeds, "test_images": test_images, "rows": rows}, markdown(rows))


def markdown(rows: list[dict[str, Any]]) -> str:
    """A row for each network, sparsity and number of images, a column for each ridge: mean and deviation over seeds."""
    scores: dict[tuple[str, float, int], dict[str, list[float]]] = {}
    for row in rows:
        key = row["net"], row["sparsity"], row["images"]
        scores.setdefault(key, {}).setdefault(row["ridge"], []).append(row["score"])
    dense = {row["net"]: row["dense"] for row in rows}
    lines = []
    for (net, sparsity, images), found in scores.items():
        cells = [f"{mean(each):.1f} ± {stdev(each) if len(each) > 1 else 0:.1f}" for each in found.values()]
        lines.append([f"{net} ({dense[net]:.1f}), {sparsity:.0%}, {images}", *cells])
    return markdown_table(["network (dense), sparsity, images", *RIDGES], lines)


if __name__ == "__main__":
    typer.run(main)
