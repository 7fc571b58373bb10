"""Accuracy by allocation, sparsity and repair: `make map`, or `python benchmarks/accuracy/recoverability.py`.

ResNet-20 and ResNet-32 for CIFAR-10 are pruned to many sparsities by every allocation and repaired by several methods.
Accuracy on images that are not used for calibration. Writes recoverability_NET.{json,csv} (every cell), a figure for
each network, the damage of one pruning as a heat map, recoverability.{json,md} and limits.md (the tables in
docs/allocation.md).
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in (".", "python")]  # this checkout

import resuscitate
from benchmarks.common.inputs import DataFolder, ImageCount, Nets, calibration_images, data_folder, network, scorer
from benchmarks.common.results import RESULTS, machine, markdown_table, write
from benchmarks.networks import resnet50
from resuscitate import RecoverabilityMap
from resuscitate.reports.plots import draw_damage, draw_map

EMA = resuscitate.EMA(batches=20, batch_size=64)
METHODS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "bn": {"method": "bn"},
    "bn-ema": {"method": "bn", "recalibrate": EMA},
    "asr-ema": {"method": "asr", "schedule": "parallel", "recalibrate": EMA},
    "asr": {"method": "asr"},
    "channelwise": {"method": "channelwise"},
    "refit": {"method": "refit", "relu_aware": False, "ridge": 1e-2},  # without ReLU-aware refinement: half the time
}

SHOWN = (0.7, 0.8, 0.9, 0.95)  # the sparsities in the table; the files have all


def scores(maps: dict[str, RecoverabilityMap], shown: tuple[str, ...]) -> str:
    """A row for each network and sparsity, a column for each allocation; bold: the best allocation for a method."""
    allocations = next(iter(maps.values())).allocations
    lines = []
    for net, found in maps.items():
        for sparsity in SHOWN:
            if sparsity not in found.sparsities:
                continue
            best = {method: found.best(sparsity, method) for method in shown}
            cells = []
            for allocation in allocations:
                numbers = {method: f"{found.curve(allocation, method)[sparsity]:.1f}" for method in shown}
                cells.append(" / ".join(f"**{n}**" if best[m] == allocation else n for m, n in numbers.items()))
            lines.append([f"{net} ({found.dense:.1f}), {sparsity:.0%}", *cells])
    return markdown_table(["network (dense), sparsity", *allocations], lines)


def limits(maps: dict[str, RecoverabilityMap]) -> str:
    """A row for each network and allocation, a column for each method.

    A cell is the sparsity at which half of the dense network's lead over chance is lost.
    """
    methods = list(METHODS)
    lines = []
    for net, found in maps.items():
        for allocation in found.allocations:
            at = [found.limit(allocation, method) for method in methods]
            cells = ["beyond" if limit is None else f"{limit:.1%}" for limit in at]
            lines.append([f"{net}, {allocation}", *cells])
    return markdown_table(["network, allocation", *methods], lines)


def allocation_seconds() -> dict[str, float]:
    """Seconds to allocate the 25.5 million weights of a ResNet-50 to 90 %, on one thread: medians of three."""
    threads, model = torch.get_num_threads(), resnet50()
    torch.set_num_threads(1)
    found = {}
    for method in ("global", "uniform", "erk", "lamp"):
        taken = []
        for _ in range(3):
            started = time.perf_counter()
            resuscitate.allocate(model, 0.9, method)
            taken.append(time.perf_counter() - started)
        found[method] = round(statistics.median(taken), 2)
    torch.set_num_threads(threads)
    return found


def main(
    data: DataFolder = None,
    nets: Nets = "resnet20,resnet32",
    sparsities: Annotated[str, typer.Option(help="by comma")] = "0.5,0.6,0.7,0.8,0.9,0.95,0.98",
    allocations: Annotated[str, typer.Option(help="by comma")] = "global,uniform,erk,lamp,rr",
    images: ImageCount = 1280,
    test_images: int = 1500,
    workers: int = 1,
    journals: Annotated[Path | None, typer.Option(help="folder of the finished cells, to resume from")] = None,
    output: Path = RESULTS,
) -> None:
    """Compute the recoverability map of each network and write it."""
    folder = data_folder(data)
    calibration, evaluate = calibration_images(folder, images), scorer(folder, test_images)
    output.mkdir(parents=True, exist_ok=True)
    maps: dict[str, RecoverabilityMap] = {}
    for net in nets.split(","):
        dense = network(net, folder, calibration)
        found = maps[net] = resuscitate.recoverability(
            dense,
            calibration,
            evaluate,
            sparsities=[float(sparsity) for sparsity in sparsities.split(",")],
            allocations=allocations.split(","),
            methods=METHODS,
            chance=10.0,
            workers=workers,
            resume=None if journals is None else journals / f"{net}.journal",
        )
        for suffix in ("json", "csv"):
            found.save(output / f"recoverability_{net}.{suffix}")
        draw_map(found, output / f"recoverability_{net}.svg", ["asr-ema", "channelwise", "refit"])
        pruned = copy.deepcopy(dense)
        resuscitate.sparsify(pruned, 0.9)
        draw_damage(
            resuscitate.damage(pruned, dense, calibration[:512]),
            output / f"damage_{net}.png",
            f"{net}, 90 % of the weights pruned by global magnitude, no repair",
        )
    about = machine() | {"images": {"calibration": images, "test": test_images}}
    methods = {label: repr(options) for label, options in METHODS.items()}
    about |= {"allocate ResNet-50, seconds": allocation_seconds(), "methods": methods}
    best, at = scores(maps, ("bn", "channelwise", "refit")), limits(maps)
    write(output / "recoverability.json", about, best)
    (output / "limits.md").write_text(at)
    Console().print(best, at, sep="", markup=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
