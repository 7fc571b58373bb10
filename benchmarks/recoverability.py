"""Where sparsity may go and which repair holds it: `make map`, or `python benchmarks/recoverability.py`.

ResNet-20 and ResNet-32 for CIFAR-10, pruned to many sparsities by every allocation, repaired by several methods, tested
on images that calibration never saw. Writes recoverability_NET.{json,csv} (every cell), a figure for each network, the
damage of one pruning as a heat map, and recoverability.{json,md} (what is in docs/allocation.md).
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import RESULTS, calibration_images, data_folder, machine, network, scorer
from rich.console import Console
from zoo.resnet import resnet50

import resuscitate
from resuscitate import RecoverabilityMap
from resuscitate.reports.plots import draw_damage, draw_map

EMA = {"recalibrate": "ema", "ema_batches": 20, "ema_batch_size": 64}
METHODS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "bn": {"method": "bn"},
    "bn-ema": {"method": "bn", **EMA},
    "asr-ema": {"method": "asr", "schedule": "parallel", **EMA},
    "asr": {"method": "asr"},
    "channelwise": {"method": "channelwise"},
    "refit": {"method": "refit", "relu_aware": False, "ridge": 1e-2},  # least squares alone, at half the time
}

SHOWN = (0.7, 0.8, 0.9, 0.95)  # in the docs; every cell is in the files


def scores(maps: dict[str, RecoverabilityMap], shown: tuple[str, ...]) -> str:
    """A row for each network and sparsity, a column for each allocation; the best of a row and method in bold."""
    allocations = next(iter(maps.values())).allocations
    lines = [f"| network (dense), sparsity | {' | '.join(allocations)} |", "|" + " --- |" * (1 + len(allocations))]
    for net, found in maps.items():
        for sparsity in SHOWN:
            if sparsity not in found.sparsities:
                continue
            best = {method: found.best(sparsity, method) for method in shown}
            cells = []
            for allocation in allocations:
                numbers = {method: f"{found.curve(allocation, method)[sparsity]:.1f}" for method in shown}
                cells.append(" / ".join(f"**{n}**" if best[m] == allocation else n for m, n in numbers.items()))
            lines.append(f"| {net} ({found.dense:.1f}), {sparsity:.0%} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def limits(maps: dict[str, RecoverabilityMap]) -> str:
    """A row for each network and allocation, a column for each method: the sparsity at which half the lead is lost."""
    methods = list(METHODS)
    lines = [f"| network, allocation | {' | '.join(methods)} |", "|" + " --- |" * (1 + len(methods))]
    for net, found in maps.items():
        for allocation in found.allocations:
            at = [found.limit(allocation, method) for method in methods]
            cells = ["beyond" if limit is None else f"{limit:.1%}" for limit in at]
            lines.append(f"| {net}, {allocation} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def allocation_seconds() -> dict[str, float]:
    """Seconds to allocate a ResNet-50's 25.5 million weights to 90 %, on one thread: medians of three."""
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
    data: Annotated[Path | None, typer.Option(help="folder with networks and images; else RESUSCITATE_DATA")] = None,
    nets: Annotated[str, typer.Option(help="which networks, by comma")] = "resnet20,resnet32",
    sparsities: Annotated[str, typer.Option(help="by comma")] = "0.5,0.6,0.7,0.8,0.9,0.95,0.98",
    allocations: Annotated[str, typer.Option(help="by comma")] = "global,uniform,erk,lamp,rr",
    images: Annotated[int, typer.Option(help="for calibration")] = 1280,
    test_images: int = 1500,
    workers: int = 1,
    journals: Annotated[Path | None, typer.Option(help="folder to keep finished cells in, and go on from")] = None,
    output: Path = RESULTS,
) -> None:
    """Fill the recoverability map of each network and write it."""
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
    given = f"--nets {nets} --sparsities {sparsities} --allocations {allocations} --images {images}"
    about = machine(f"python benchmarks/recoverability.py {given} --test-images {test_images}")
    about |= {"images": {"calibration": images, "test": test_images}}
    about |= {"allocate ResNet-50, seconds": allocation_seconds(), "methods": METHODS}
    (output / "recoverability.json").write_text(json.dumps(about, indent=1) + "\n")
    for name, table in (("recoverability", scores(maps, ("bn", "channelwise", "refit"))), ("limits", limits(maps))):
        (output / f"{name}.md").write_text(table)
        Console().print(table, markup=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
