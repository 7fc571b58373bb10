"""The ridge of a refit, fixed or chosen by cross-validation: `make ridge`, or `python benchmarks/ridge.py`.

Trained ResNet-20, ResNet-32 and a keyword-spotting DS-CNN, global magnitude, by how many images there are; and a wide
pooled classifier, which keeps as many inputs as there are images. The calibration images are drawn anew for each seed,
and the accuracies are means over the draws. Writes ridge.json and .md, where networks that are not named stay.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import torch
import typer
from common import RESULTS, calibration_images, data_folder, network, publish, scorer
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from zoo.dscnn import load_dscnn

import resuscitate

RIDGES: dict[str, float | None] = {"1e-2": 1e-2, "1.0": 1.0, "cross-validated": None}
CASES: dict[str, tuple[tuple[float, ...], tuple[int, ...]]] = {
    "resnet20": ((0.9,), (64, 256, 1024)),
    "resnet32": ((0.9,), (64, 256, 1024)),
    "dscnn": ((0.5, 0.7), (64, 256)),
    "wide classifier": ((0.7,), (64, 128, 256, 512)),
}
Case = tuple[nn.Module, nn.Module, Callable[[int], Tensor], Callable[[nn.Module], float]]


def case(net: str, sparsity: float, seed: int, folder: Path, test_images: int) -> Case:
    """A dense network, its pruned copy, so many calibration images by this draw, and a score in per cent."""
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
    """Random features, pooled, and a linear layer with 384 inputs; scored by the variance of its outputs explained."""
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
    data: Annotated[Path | None, typer.Option(help="folder with networks and images; else RESUSCITATE_DATA")] = None,
    nets: Annotated[str, typer.Option(help="which networks, by comma")] = ",".join(CASES),
    seeds: int = 2,
    test_images: int = 2000,
    output: Path = RESULTS,
) -> None:
    """Refit with each ridge, print accuracies."""
    folder, console, rows = data_folder(data), Console(stderr=True), list[dict[str, Any]]()
    jobs = [(net, sparsity, seed) for net in nets.split(",") for sparsity in CASES[net][0] for seed in range(seeds)]
    for net, sparsity, seed in track(jobs, "ridge", console=console, disable=not console.is_terminal):
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
    """A row for each network, sparsity and number of images, a column for each ridge: mean and spread over draws."""
    scores: dict[tuple[str, float, int], dict[str, list[float]]] = {}
    for row in rows:
        key = row["net"], row["sparsity"], row["images"]
        scores.setdefault(key, {}).setdefault(row["ridge"], []).append(row["score"])
    dense = {row["net"]: row["dense"] for row in rows}
    lines = [f"| network (dense), sparsity, images | {' | '.join(RIDGES)} |", "|" + " --- |" * (1 + len(RIDGES))]
    for (net, sparsity, images), found in scores.items():
        cells = [f"{mean(each):.1f} ± {stdev(each) if len(each) > 1 else 0:.1f}" for each in found.values()]
        lines.append(f"| {net} ({dense[net]:.1f}), {sparsity:.0%}, {images} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
