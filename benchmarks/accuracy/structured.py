"""Removal of channels, 1.5 to 3 times fewer FLOPs: `make structured`, or `python benchmarks/accuracy/structured.py`.

Channels are removed from trained ResNet-20 and ResNet-32 for CIFAR-10, the same share from each group of channels. Only
channels within a block can be removed, because the shortcuts pad with zeros. The repairs use the same unlabelled
images. Accuracy on images that no repair used. Writes structured.json and .md, two tables:

1. Masked, repaired, then removed by `shrink`: no repair, exact BatchNorm, ridge aggregation alone (`two_stage.py`), a
   refit alone, and two-stage, which is aggregation and then a refit; last `compress`, in seven steps to the same share.
   All of ours by their defaults.
2. Removed by Torch-Pruning, then repaired: no repair, exact BatchNorm, channel-wise gains, and the default, a refit.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch_pruning  # type: ignore[import-untyped]
import typer
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in (".", "python")]  # this checkout

import resuscitate
from benchmarks.accuracy.two_stage import aggregate
from benchmarks.common.inputs import DataFolder, ImageCount, Nets, calibration_images, data_folder, network, scorer
from benchmarks.common.results import RESULTS, accuracy_cell, markdown_table, progress, publish
from resuscitate.network.comparison import count_flops

REPAIRS = ("no repair", "BN exact", "aggregate", "refit", "two-stage")
COMPRESS = "compress"
OF_SMALLER = ("no repair", "BN exact", "channelwise", "refit")


def prune(dense: nn.Module, sparsity: float, example: Tensor) -> tuple[nn.Module, resuscitate.Masks, float]:
    """A copy with that share of its channels at zero, the masks, and the FLOPs before over after removal."""
    model = copy.deepcopy(dense)
    masks = resuscitate.sparsify(model, sparsity, pattern="channels", allocation="uniform", example=example)
    before, after = resuscitate.shrink(copy.deepcopy(model), masks, example).flops
    return model, masks, before / after


def prune_by_torch_pruning(dense: nn.Module, sparsity: float, example: Tensor) -> tuple[nn.Module, float]:
    """A smaller copy by Torch-Pruning's magnitude pruner, and the FLOPs before over after."""
    model = copy.deepcopy(dense)
    kept = [module for name, module in model.named_modules() if name in ("conv1", "linear") or name.endswith("conv2")]
    importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
    options = {"importance": importance, "pruning_ratio": sparsity, "ignored_layers": kept}
    torch_pruning.pruner.BasePruner(model, example, **options).step()
    return model, count_flops(dense, [example]) / count_flops(model, [example])


def at_ratio(
    prune: Callable[..., tuple[Any, ...]], dense: nn.Module, ratio: float, example: Tensor
) -> tuple[float, tuple[Any, ...]]:
    """The smallest share of channels, by bisection, with at least `ratio` times fewer FLOPs, and what `prune` gives."""
    low, high = 0.0, 0.9
    for _ in range(6):
        middle = (low + high) / 2
        low, high = (low, middle) if prune(dense, middle, example)[-1] >= ratio else (middle, high)
    return high, prune(dense, high, example)


def repair(name: str, model: nn.Module, dense: nn.Module, images: Tensor) -> None:
    """One of `REPAIRS`, in place."""
    if name == "BN exact":
        resuscitate.repair(model, calibration=images, method="bn", progress=False)
    if name in ("aggregate", "two-stage"):
        aggregate(model, dense, images.split(128))
    if name in ("refit", "two-stage"):
        resuscitate.repair(model, dense, images, keep_worse=True, progress=False)


def repair_smaller(name: str, model: nn.Module, dense: nn.Module, images: Tensor) -> None:
    """One of `OF_SMALLER`, in place."""
    if name == "BN exact":
        resuscitate.repair(model, calibration=images, method="bn", progress=False)
    elif name != "no repair":
        resuscitate.repair(model, dense, images, method=name, keep_worse=True, progress=False)


def main(
    data: DataFolder = None,
    nets: Nets = "resnet20,resnet32",
    ratios: Annotated[str, typer.Option(help="by comma")] = "1.5,1.73,2,3",
    images: ImageCount = 512,
    test_images: int = 2000,
    output: Path = RESULTS,
) -> None:
    """Remove channels from trained networks, repair, print accuracies."""
    folder = data_folder(data)
    calibration, score = calibration_images(folder, images), scorer(folder, test_images)
    jobs = [(net, float(ratio)) for net in nets.split(",") for ratio in ratios.split(",")]
    rows, smaller = list[dict[str, Any]](), list[dict[str, Any]]()
    for net, ratio in progress(jobs, "repairing"):
        dense = network(net, folder, calibration)
        share, (pruned, masks, reached) = at_ratio(prune, dense, ratio, calibration[:2])
        row: dict[str, Any] = {"net": net, "dense": score(dense), "ratio": round(reached, 2), "accuracy": {}}
        for name in REPAIRS:
            model = copy.deepcopy(pruned)
            repair(name, model, dense, calibration)
            resuscitate.shrink(model, masks, calibration[:2])
            row["accuracy"][name] = score(model)
        model = copy.deepcopy(dense)
        resuscitate.compress(model, share, calibration, pattern="channels", keep_worse=True, progress=False)
        row["accuracy"][COMPRESS] = score(model)
        rows.append(row)
        _, (small, reached) = at_ratio(prune_by_torch_pruning, dense, ratio, calibration[:2])
        row = {"net": net, "dense": row["dense"], "ratio": round(reached, 2), "accuracy": {}}
        for name in OF_SMALLER:
            model = copy.deepcopy(small)
            repair_smaller(name, model, dense, calibration)
            row["accuracy"][name] = score(model)
        smaller.append(row)
    found = {"images": {"calibration": images, "test": test_images}, "rows": rows, "smaller": smaller}
    publish(output, found, f"{markdown(rows, (*REPAIRS, COMPRESS))}\n{markdown(smaller, OF_SMALLER)}")


def markdown(rows: list[dict[str, Any]], repairs: Sequence[str]) -> str:
    """A row for each network and ratio of FLOPs, a column for each repair: accuracy, the best of a row in bold."""
    lines = []
    for row in rows:
        best = max(row["accuracy"].values())
        cells = [accuracy_cell(accuracy, best) for accuracy in row["accuracy"].values()]
        lines.append([f"{row['net']} ({row['dense']:.1f}), {row['ratio']:.2f}x fewer", *cells])
    return markdown_table(["network (dense), FLOPs", *repairs], lines)


if __name__ == "__main__":
    typer.run(main)
