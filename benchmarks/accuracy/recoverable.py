"""Training for pruning, and mean replacement: `make recoverable`, or `python benchmarks/accuracy/recoverable.py`.

A network is trained in four ways: as usual, with filters on the unit sphere, with the penalty at the pruning threshold,
and with both. Then it is pruned by global magnitude, without fine-tuning. The pruned weights stay at zero or are
replaced by their mean (one for each filter, or each kernel), or the other weights are refitted. By default on digits
with the demo's network; --net resnet20 trains on CIFAR-10 and needs a GPU to end soon. Writes recoverable.json and .md.
"""

from __future__ import annotations

import copy
import statistics
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in (".", "python")]  # this checkout

import resuscitate
from benchmarks.common.inputs import MEAN, STD, calibration_images, data_folder
from benchmarks.common.results import RESULTS, markdown_table, progress, publish
from resuscitate.data.images import load_images, load_labels
from resuscitate.demo import digits, train
from resuscitate.models import build
from resuscitate.network.masks import find_layers

PENALISED = {"sparsity": 0.8, "strength": 5.0}
# name -> (filters on the unit sphere, penalty)
TRAININGS = {
    "ordinary": (False, False),
    "hyperspherical": (True, False),
    "ordinary + penalty": (False, True),
    "hyperspherical + penalty": (True, True),
}
RECOVERIES = ("left at zero", "mean per filter", "mean per kernel", "refit")


def trained(training: str, net: str, images: Tensor, labels: Tensor, epochs: int) -> nn.Module:
    """A plain network in eval mode, trained in one of the ways `TRAININGS`; the classifier is never on the sphere."""
    model = build(net).to(images.device)
    sphere, penalised = TRAININGS[training]
    if sphere:
        resuscitate.to_hyperspherical(model, keep=False, exclude=nn.Linear)
    penalty = resuscitate.PruningPenalty(model, **PENALISED) if penalised else None
    train(model, images, labels, epochs, False, penalty)
    resuscitate.to_plain(model)
    return model


def recover(how: str, model: nn.Module, dense: nn.Module, images: Tensor) -> int:
    """One of `RECOVERIES`, in place; returns how many more numbers the network stores."""
    if how.startswith("mean"):
        return sum(resuscitate.replace_by_means(model, dense, per=how.split()[-1]).values())
    if how == "refit":
        resuscitate.repair(model, dense, images, ridge=1e-2, progress=False)
    return 0


def main(
    data: Annotated[Path | None, typer.Option(help="folder with CIFAR-10; not for digitnet")] = None,
    net: str = "digitnet",
    epochs: int = 15,
    seeds: int = 3,
    sparsities: Annotated[str, typer.Option(help="by comma")] = "0.5,0.7,0.8,0.9",
    train_images: Annotated[int, typer.Option(help="of CIFAR-10")] = 50_000,
    test_images: int = 5000,
    calibration: Annotated[int, typer.Option(help="unlabelled images for the refit")] = 512,
    output: Path = RESULTS,
) -> None:
    """Train, prune, recover; print mean accuracies over the seeds."""
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    jobs = [(seed, training) for seed in range(seeds) for training in TRAININGS]
    for seed, training in progress(jobs, "training"):
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
    """A row for each training and recovery, a column for each sparsity: mean and standard deviation over the seeds."""
    sparsities = list(dict.fromkeys(row["sparsity"] for row in rows))
    lines = []
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
            lines.append([f"{training} ({dense:.1f})", what, *cells])
    return markdown_table(["training (dense)", "what was pruned", *(f"{at:.0%}" for at in sparsities)], lines)


if __name__ == "__main__":
    typer.run(main)
