"""Training for pruning, and means of what was pruned: `make recoverable`, or `python benchmarks/recoverable.py`.

A network is trained four times alike: as usual, with filters on the unit sphere, with the penalty at the pruning
threshold, and with both. Then global magnitude takes its weights, without fine-tuning, and what went is left at zero,
replaced by its mean (a number for each filter, or each kernel), or the rest is refitted. By default digits and the
demo's network; with --net resnet20 CIFAR-10, for which one wants a GPU. Writes recoverable.json and .md.
"""

from __future__ import annotations

import copy
import statistics
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import MEAN, RESULTS, STD, calibration_images, data_folder, publish
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import resuscitate
from resuscitate.data.images import load_images, load_labels
from resuscitate.demo import digits, train
from resuscitate.models import build
from resuscitate.network.masks import find_layers

PENALISED = {"sparsity": 0.8, "strength": 5.0}
# name -> (filters on the sphere, penalty)
TRAININGS = {
    "ordinary": (False, False),
    "hyperspherical": (True, False),
    "ordinary + penalty": (False, True),
    "hyperspherical + penalty": (True, True),
}
RECOVERIES = ("left at zero", "mean per filter", "mean per kernel", "refit")


def trained(training: str, net: str, images: Tensor, labels: Tensor, epochs: int) -> nn.Module:
    """A plain network in eval mode after such a training; the classifier is never on the sphere."""
    model = build(net).to(images.device)
    sphere, penalised = TRAININGS[training]
    if sphere:
        resuscitate.to_hyperspherical(model, keep=False, exclude=nn.Linear)
    penalty = resuscitate.PruningPenalty(model, **PENALISED) if penalised else None
    train(model, images, labels, epochs, False, penalty)
    resuscitate.to_plain(model)
    return model


def recover(how: str, model: nn.Module, dense: nn.Module, images: Tensor) -> int:
    """One of `RECOVERIES`, in place; returns how many numbers more are stored."""
    if how.startswith("mean"):
        return sum(resuscitate.replace_by_means(model, dense, per=how.split()[-1]).values())
    if how == "refit":
        resuscitate.repair(model, dense, images, ridge=1e-2, progress=False)
    return 0


def main(
    data: Annotated[Path | None, typer.Option(help="folder with CIFAR-10, for other nets than digitnet")] = None,
    net: str = "digitnet",
    epochs: int = 15,
    seeds: int = 3,
    sparsities: Annotated[str, typer.Option(help="by comma")] = "0.5,0.7,0.8,0.9",
    train_images: Annotated[int, typer.Option(help="of CIFAR-10")] = 50_000,
    test_images: int = 5000,
    calibration: Annotated[int, typer.Option(help="unlabelled images for the refit")] = 512,
    output: Path = RESULTS,
) -> None:
    """Train, prune, recover; print accuracies as means over the seeds."""
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    console, rows = Console(stderr=True), list[dict[str, Any]]()
    jobs = [(seed, training) for seed in range(seeds) for training in TRAININGS]
    for seed, training in track(jobs, "training", console=console, disable=not console.is_terminal):
        torch.manual_seed(seed)
        if net == "digitnet":
            images, labels = digits()
            order = torch.randperm(len(images))
            held_out, held_out_labels = images[order[1280:]], labels[order[1280:]]
            images, labels = images[order[:1280]], labels[order[:1280]]
        else:
            folder = data_folder(data)
            images, test = calibration_images(folder, train_images), folder / "cifar10_jpeg_test.npz"
            labels = load_labels(folder / "cifar10_jpeg_train.npz", max_samples=train_images)
            held_out = load_images(test, mean=MEAN, std=STD, max_samples=test_images)
            held_out_labels = load_labels(test, max_samples=test_images)
        images, labels = images.to(device), labels.to(device)
        dense = trained(training, net, images, labels, epochs)
        score = resuscitate.Accuracy(held_out, held_out_labels)
        for sparsity in map(float, sparsities.split(",")):
            pruned = copy.deepcopy(dense)
            resuscitate.sparsify(pruned, sparsity)
            for how in RECOVERIES:
                model = copy.deepcopy(pruned)
                more = recover(how, model, dense, images[:calibration])
                share = more / sum(layer.weight.numel() for layer in find_layers(dense).values())
                row = {"seed": seed, "training": training, "sparsity": sparsity, "recovery": how, "stored": share}
                rows.append({**row, "dense": score(dense), "accuracy": score(model)})
    found = {"net": net, "epochs": epochs, "penalty": PENALISED, "device": device, "rows": rows}
    publish(output, found, markdown(rows))


def markdown(rows: list[dict[str, Any]]) -> str:
    """A row for each training and recovery, a column for each sparsity; mean over the seeds, and their spread."""
    sparsities = list(dict.fromkeys(row["sparsity"] for row in rows))
    lines = ["| training (dense) | what was pruned | " + " | ".join(f"{at:.0%}" for at in sparsities) + " |"]
    lines.append("|" + " --- |" * (2 + len(sparsities)))
    for training in TRAININGS:
        for how in RECOVERIES:
            mine = [row for row in rows if (row["training"], row["recovery"]) == (training, how)]
            dense = statistics.mean(row["dense"] for row in mine)
            cells = []
            for at in sparsities:
                found = [row["accuracy"] for row in mine if row["sparsity"] == at]
                cells.append(f"{statistics.mean(found):.1f} ± {statistics.pstdev(found):.1f}")
            more = max(row["stored"] for row in mine)
            what = f"{how} (+{more:.1%})" if more else how
            lines.append(f"| {training} ({dense:.1f}) | {what} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
