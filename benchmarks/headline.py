"""The README's first table: `make headline`, or `python benchmarks/headline.py`.

Trained ResNet-20 and ResNet-32 for CIFAR-10, pruned to 80, 90 and 95 % by global magnitude, and what each tool makes of
them from the same unlabelled images: PyTorch's `update_bn`, NNCF's BatchNorm adaptation (where nncf is installed), the
published ASR with a momentum re-estimate, and this project's methods, the ridge held at 1e-2. Tested on images that
none of them saw.
"""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import RESULTS, calibration_images, data_folder, network, publish, scorer
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import resuscitate

Tool = Callable[[nn.Module, nn.Module, Tensor], None]  # in place: the pruned model, the dense one, images


def _update_bn(model: nn.Module, dense: nn.Module, images: Tensor) -> None:
    update_bn(images.split(128), model)
    model.eval()


def _nncf(model: nn.Module, dense: nn.Module, images: Tensor) -> None:
    import nncf

    nncf.batch_norm_adaptation(model, nncf.Dataset(list(images.split(128))))
    model.eval()


def _repair(**options: Any) -> Tool:
    def run(model: nn.Module, dense: nn.Module, images: Tensor) -> None:
        resuscitate.repair(model, dense, images, **options, progress=False)

    return run


def _compress(sparsity: float) -> Tool:
    def run(model: nn.Module, dense: nn.Module, images: Tensor) -> None:
        resuscitate.compress(model, sparsity, images, ridge=1e-2, progress=False)

    return run


def tools(images: int, sparsity: float) -> dict[str, Tool]:
    """By name, what to do with a pruned model; with a dense one, of "compress"."""
    # twenty batches, as published, of as many images as there are for them
    ema = {"schedule": "parallel", "recalibrate": "ema", "ema_batches": 20, "ema_batch_size": images // 20}
    found: dict[str, Tool] = {"no repair": lambda model, dense, images: None, "update_bn": _update_bn}
    if find_spec("nncf") is not None:
        logging.getLogger("nncf").setLevel(logging.ERROR)
        found["NNCF adaptation"] = _nncf
    found["ASR + EMA, as published"] = _repair(method="asr", **ema)
    found["ASR, sequential"] = _repair(method="asr")
    found["channel-wise, sequential"] = _repair(method="channelwise")
    found["refit"] = _repair(method="refit", ridge=1e-2)
    found["compress"] = _compress(sparsity)
    return found


def main(
    data: Annotated[Path | None, typer.Option(help="folder with networks and images; else RESUSCITATE_DATA")] = None,
    nets: Annotated[str, typer.Option(help="which networks, by comma")] = "resnet20,resnet32",
    sparsities: Annotated[str, typer.Option(help="by comma")] = "0.8,0.9,0.95",
    images: Annotated[int, typer.Option(help="for calibration")] = 512,
    only: Annotated[str, typer.Option(help="these tools, by comma; the figures of the others stay")] = "",
    test_images: int = 2000,
    output: Path = RESULTS,
) -> None:
    """Repair real networks by every tool and print what came back, and how long it took."""
    folder = data_folder(data)
    calibration, score = calibration_images(folder, images), scorer(folder, test_images)
    console = Console(stderr=True)
    jobs = [(net, float(sparsity)) for net in nets.split(",") for sparsity in sparsities.split(",")]
    before = json.loads((output / "headline.json").read_text())["rows"] if only else []
    kept, rows = {(row["net"], row["sparsity"]): row for row in before}, []
    for net, sparsity in track(jobs, "repairing", console=console, disable=not console.is_terminal):
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
    """A row for each network and sparsity, a column for each tool: accuracy and seconds."""
    names = list(rows[0]["accuracy"])
    lines = [f"| network (dense), sparsity | {' | '.join(names)} |", "|" + " --- |" * (1 + len(names))]
    for row in rows:
        best = max(row["accuracy"].values())
        cells = []
        for name, accuracy in row["accuracy"].items():
            figure = f"**{accuracy:.1f}**" if accuracy == best else f"{accuracy:.1f}"
            cells.append(figure if name == "no repair" else f"{figure} ({row['seconds'][name]:.1f} s)")
        lines.append(f"| {row['net']} ({row['dense']:.1f}), {row['sparsity']:.0%} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    torch.manual_seed(0)
    typer.run(main)
