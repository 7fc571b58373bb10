"""Channels out of real networks at 1.5 to 3 times fewer FLOPs: `make structured`, or `python benchmarks/structured.py`.

Trained ResNet-20 and ResNet-32 for CIFAR-10 (only the channels within a block can go: the shortcuts pad with zeros),
each group of channels pruned alike, repaired from the same unlabelled images by nothing, exact BatchNorm, the first of
two stages alone, a refit alone, and both. Accuracy on images that none of them saw. Writes structured.json and .md.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated, Any

import typer
from common import RESULTS, calibration_images, data_folder, network, publish, scorer
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import resuscitate
from resuscitate.methods.aggregate import aggregate
from resuscitate.network.runner import Network

REPAIRS = ("no repair", "BN exact", "aggregate", "refit", "two-stage")


def prune(dense: nn.Module, sparsity: float, example: Tensor) -> tuple[nn.Module, resuscitate.Masks, float]:
    """A copy without that share of its channels, as masks; the masks; and how many times fewer FLOPs it needs."""
    model = copy.deepcopy(dense)
    masks = resuscitate.sparsify(model, sparsity, pattern="channels", allocation="uniform", example=example)
    before, after = resuscitate.shrink(copy.deepcopy(model), masks, example).flops
    return model, masks, before / after


def at_ratio(dense: nn.Module, ratio: float, example: Tensor) -> tuple[nn.Module, resuscitate.Masks, float]:
    """The least share of channels that makes the network at least `ratio` times cheaper."""
    low, high = 0.0, 0.9
    for _ in range(6):
        middle = (low + high) / 2
        low, high = (low, middle) if prune(dense, middle, example)[2] >= ratio else (middle, high)
    return prune(dense, high, example)


def repair(name: str, model: nn.Module, dense: nn.Module, images: Tensor) -> None:
    """One of `REPAIRS`, in place."""
    if name == "BN exact":
        resuscitate.repair(model, calibration=images, method="bn", progress=False)
    elif name == "aggregate":
        aggregate(model, Network(dense), images.split(128))
    elif name != "no repair":
        # least squares alone, at half the time, and a fixed ridge
        resuscitate.repair(model, dense, images, method=name, relu_aware=False, ridge=1e-2, progress=False)


def main(
    data: Annotated[Path | None, typer.Option(help="folder with networks and images; else RESUSCITATE_DATA")] = None,
    nets: Annotated[str, typer.Option(help="which networks, by comma")] = "resnet20,resnet32",
    ratios: Annotated[str, typer.Option(help="by comma")] = "1.5,1.73,2,3",
    images: Annotated[int, typer.Option(help="for calibration")] = 512,
    test_images: int = 2000,
    output: Path = RESULTS,
) -> None:
    """Take channels out of real networks, repair, and print what came back."""
    folder = data_folder(data)
    calibration, score = calibration_images(folder, images), scorer(folder, test_images)
    console = Console(stderr=True)
    jobs = [(net, float(ratio)) for net in nets.split(",") for ratio in ratios.split(",")]
    rows = []
    for net, ratio in track(jobs, "repairing", console=console, disable=not console.is_terminal):
        dense = network(net, folder, calibration)
        pruned, masks, reached = at_ratio(dense, ratio, calibration[:2])
        row: dict[str, Any] = {"net": net, "dense": score(dense), "ratio": round(reached, 2), "accuracy": {}}
        for name in REPAIRS:
            model = copy.deepcopy(pruned)
            repair(name, model, dense, calibration)
            resuscitate.shrink(model, masks, calibration[:2])
            row["accuracy"][name] = score(model)
        rows.append(row)
    lines = [f"| network (dense), FLOPs | {' | '.join(REPAIRS)} |", "|" + " --- |" * (1 + len(REPAIRS))]
    for row in rows:
        best = max(row["accuracy"].values())
        cells = [f"**{a:.1f}**" if a == best else f"{a:.1f}" for a in row["accuracy"].values()]
        lines.append(f"| {row['net']} ({row['dense']:.1f}), {row['ratio']:.2f}x fewer | {' | '.join(cells)} |")
    publish(output, {"images": {"calibration": images, "test": test_images}, "rows": rows}, "\n".join(lines) + "\n")


if __name__ == "__main__":
    typer.run(main)
