"""What each method recovers on real networks and real images: `make accuracy`, or `python benchmarks/accuracy.py`.

ResNet-20 and ResNet-32 for CIFAR-10, pruned by global magnitude, repaired by every method in both schedules with each
recalibration, tested on images that calibration never saw. Writes accuracy.json (everything), accuracy.csv (a row per
run) and accuracy.md (the table in docs/results.md).
"""

from __future__ import annotations

import copy
import csv
import json
import platform
import shlex
import sys
import time
from datetime import date
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import MEAN, STD, data_folder, scorer
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file
from torch import nn

import resuscitate
from resuscitate.data.images import load_images
from resuscitate.models import build

GAINS = ("layerwise", "channelwise", "asr")
RECALIBRATIONS: tuple[str | None, ...] = (None, "exact", "ema")
Row = dict[str, Any]


def configurations(gain_samples: int) -> list[dict[str, Any]]:
    """The keyword arguments of every repair in the table."""
    runs: list[dict[str, Any]] = [{"method": "bn", "recalibrate": mode} for mode in ("exact", "ema")]
    for schedule, recalibrate, method in product(("parallel", "sequential"), RECALIBRATIONS, GAINS):
        runs.append({"method": method, "schedule": schedule, "recalibrate": recalibrate, "gain_samples": gain_samples})
    return runs


def run(net: str, sparsity: float, data: dict[str, Any], gain_samples: int) -> list[Row]:
    """Prune one network to one sparsity, and measure it unrepaired and after every repair."""
    dense: nn.Module = data[net]
    pruned = copy.deepcopy(dense)
    masks = resuscitate.sparsify(pruned, sparsity)
    rows: list[Row] = [{"method": "none", "accuracy": data["score"](pruned), "seconds": 0.0}]
    for options in configurations(gain_samples):
        model = copy.deepcopy(pruned)
        report = resuscitate.repair(model, dense, data["calibration"], **options, progress=False)
        masks.check(model)
        rows.append({**options, "accuracy": data["score"](model), "seconds": round(report.seconds, 2)})
    blank = {"schedule": None, "recalibrate": None}
    return [{"net": net, "sparsity": sparsity, "dense": data["dense"][net], **blank, **row} for row in rows]


def markdown(rows: list[Row]) -> str:
    """One line per network and sparsity; three figures in a cell are layer-wise / channel-wise / ASR."""

    def cell(key: tuple[str, float], schedule: str | None, recalibrate: str | None, *methods: str) -> str:
        wanted = [(*key, schedule, recalibrate, method) for method in methods]
        found = {(r["net"], r["sparsity"], r["schedule"], r["recalibrate"], r["method"]): r["accuracy"] for r in rows}
        return " / ".join(f"{found[w]:.1f}" for w in wanted)

    lines = [
        "| network (dense), sparsity | no repair | BN exact | gains + BN exact | BN EMA | gains, parallel + BN EMA "
        "| gains, parallel, dense BN kept | **gains, sequential, dense BN kept** |",
        "|" + " --- |" * 8,
    ]
    for key, dense in {(r["net"], r["sparsity"]): r["dense"] for r in rows}.items():
        cells = [
            f"{key[0]} ({dense:.1f}), {key[1]:.0%}",
            cell(key, None, None, "none"),
            cell(key, None, "exact", "bn"),
            cell(key, "sequential", "exact", *GAINS),
            cell(key, None, "ema", "bn"),
            cell(key, "parallel", "ema", *GAINS),
            cell(key, "parallel", None, *GAINS),
            f"**{cell(key, 'sequential', None, *GAINS)}**",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(
    data: Annotated[Path | None, typer.Option(help="folder with networks and images; else RESUSCITATE_DATA")] = None,
    nets: Annotated[str, typer.Option(help="which networks, by comma")] = "resnet20,resnet32",
    sparsities: Annotated[str, typer.Option(help="by comma")] = "0.5,0.7,0.8,0.9",
    test_images: int = 2000,
    gain_samples: int = 64,
    batchnorm_images: int = 2560,
    seed: int = 0,
    output: Path = Path(__file__).parent / "results",
) -> None:
    """Repair real networks by every method and print what came back."""
    folder, started = data_folder(data), time.perf_counter()
    options: dict[str, Any] = {"mean": MEAN, "std": STD}
    store: dict[str, Any] = {
        "score": scorer(folder, test_images),
        "calibration": load_images(
            folder / "cifar10_jpeg_train.npz", max_samples=batchnorm_images, seed=seed, **options
        ),
        "dense": {},
    }
    for net in nets.split(","):
        store[net] = build(net).eval()
        store[net].load_state_dict(load_file(folder / f"cifar10_{net}.safetensors"))
        store["dense"][net] = store["score"](store[net])
    console = Console(stderr=True)
    grid = [(net, float(sparsity)) for net, sparsity in product(nets.split(","), sparsities.split(","))]
    rows = [
        row
        for net, sparsity in track(grid, "repairing", console=console, disable=not console.is_terminal)
        for row in run(net, sparsity, store, gain_samples)
    ]
    output.mkdir(parents=True, exist_ok=True)
    about = {
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "benchmarks/accuracy.py", *sys.argv[1:]]),
        "versions": {
            "resuscitate": resuscitate.__version__,
            "torch": torch.__version__,
            "python": sys.version.split()[0],
        },
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, no GPU",
        "images": {"test": test_images, "gains": gain_samples, "batchnorm": batchnorm_images, "seed": seed},
        "seconds": round(time.perf_counter() - started),
        "pruning": "global L1 over all convolutions and the linear layer; CIFAR-10 as JPEG, top-1 in per cent",
    }
    (output / "accuracy.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    with (output / "accuracy.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["net", "sparsity", "dense", "method", "schedule", "recalibrate", "gain_samples",
                                       "accuracy", "seconds"])  # fmt: skip
        writer.writeheader()
        writer.writerows(rows)
    (output / "accuracy.md").write_text(markdown(rows))
    Console().print(markdown(rows), markup=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
