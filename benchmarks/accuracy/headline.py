"""The README's first table: `make headline`, or `python benchmarks/accuracy/headline.py`.

Trained ResNet-20 and ResNet-32 for CIFAR-10 are pruned to 80, 90 and 95 % by global magnitude and repaired with the
same unlabelled images by each tool: PyTorch's `update_bn`, NNCF's BatchNorm adaptation (if nncf is installed), the
published ASR with a momentum re-estimate, and this project's methods with a ridge of 1e-2. Accuracy on images that no
tool used. Writes headline.json and .md.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in (".", "python")]  # this checkout

import resuscitate
from benchmarks.common.inputs import DataFolder, ImageCount, Nets, calibration_images, data_folder, network, scorer
from benchmarks.common.results import RESULTS, accuracy_cell, markdown_table, progress, publish

Tool = Callable[[nn.Module, nn.Module, Tensor], None]  # pruned network (changed in place), dense network, images


def _update_bn(model: nn.Module, dense: nn.Module, images: Tensor) -> None:
    update_bn(images.split(128), model)
    model.eval()


def _nncf(model: nn.Module, dense: nn.Module, images: Tensor) -> None:
    import nncf

    nncf.batch_norm_adaptation(model, nncf.Dataset(list(images.split(128))))
    model.eval()


def _repair(**options: Any) -> Tool:
    def run(model: nn.Module, dense: nn.Module, images: Tensor) -> None:
        resuscitate.repair(model, dense, images, **options, keep_worse=True, progress=False)

    return run


def _compress(sparsity: float) -> Tool:
    def run(model: nn.Module, dense: nn.Module, images: Tensor) -> None:
        resuscitate.compress(model, sparsity, images, ridge=1e-2, progress=False)

    return run


def tools(images: int, sparsity: float) -> dict[str, Tool]:
    """The tools by name. Each gets the pruned network, "compress" the dense one."""
    # 20 batches, as published; the batch size follows from the number of images
    ema = resuscitate.EMA(batches=20, batch_size=images // 20)
    found: dict[str, Tool] = {"no repair": lambda model, dense, images: None, "update_bn": _update_bn}
    if find_spec("nncf") is not None:
        logging.getLogger("nncf").setLevel(logging.ERROR)
        found["NNCF adaptation"] = _nncf
    found["ASR + EMA, as published"] = _repair(method="asr", schedule="parallel", recalibrate=ema)
    found["ASR, sequential"] = _repair(method="asr")
    found["channel-wise, sequential"] = _repair(method="channelwise")
    found["refit"] = _repair(method="refit", ridge=1e-2)
    found["compress"] = _compress(sparsity)
    return found


def main(
    data: DataFolder = None,
    nets: Nets = "resnet20,resnet32",
    sparsities: Annotated[str, typer.Option(help="by comma")] = "0.8,0.9,0.95",
    images: ImageCount = 512,
    only: Annotated[str, typer.Option(help="these tools alone, by comma; the others keep their figures")] = "",
    test_images: int = 2000,
    output: Path = RESULTS,
) -> None:
    """Repair trained networks with every tool; print accuracies and seconds."""
    folder = data_folder(data)
    calibration, score = calibration_images(folder, images), scorer(folder, test_images)
    jobs = [(net, float(sparsity)) for net in nets.split(",") for sparsity in sparsities.split(",")]
    before = json.loads((output / "headline.json").read_text())["rows"] if only else []
    kept, rows = {(row["net"], row["sparsity"]): row for row in before}, []
    for net, sparsity in progress(jobs, "repairing"):
        dense = network(net, folder, calibration)
        pruned = copy.deepcopy(dense)
        resuscitate.sparsify(pruned, sparsity)
        row: dict[str, Any] = {"net": net, "sparsity": sparsity, "dense": score(dense), "accuracy": {}, "seconds": {}}
        row = kept.get((net, sparsity), row)
        for name, tool in tools(images, sparsity).items():
            if name not in (only.split(",") if only else (name,)):
                continue
            model, started = copy.deepcopy(dense if name == "compress" else pruned), time.perf_counter()
            tool(model, dense, calibration)
            row["seconds"][name] = round(time.perf_counter() - started, 2)
            row["accuracy"][name] = score(model)
        rows.append(row)
    found = {"images": {"calibration": images, "test": test_images}, "pruning": "global L1", "rows": rows}
    publish(output, found, markdown(rows))


def markdown(rows: list[dict[str, Any]]) -> str:
    """Accuracy and seconds: a row for each network and sparsity, a column for each tool, the best in bold."""
    names = list(rows[0]["accuracy"])
    lines = []
    for row in rows:
        best = max(row["accuracy"].values())
        cells = []
        for name, accuracy in row["accuracy"].items():
            figure = accuracy_cell(accuracy, best)
            cells.append(figure if name == "no repair" else f"{figure} ({row['seconds'][name]:.1f} s)")
        lines.append([f"{row['net']} ({row['dense']:.1f}), {row['sparsity']:.0%}", *cells])
    return markdown_table(["network (dense), sparsity", *names], lines)


if __name__ == "__main__":
    torch.manual_seed(0)
    typer.run(main)
