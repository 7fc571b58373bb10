"""What each tool brings back on real networks: `make headline`, or `python benchmarks/accuracy/headline.py`.

Trained ResNet-20 and ResNet-32 for CIFAR-10 and a DS-CNN for keywords are pruned by global magnitude, or to n weights
of m, and repaired with the same unlabelled images by each tool: PyTorch's `update_bn`, NNCF's BatchNorm adaptation
(where nncf is installed), the published ASR with a momentum re-estimate, one-shot pruning as SparseGPT's, and this
project's methods by their defaults. With gradients: distillation for as long as `compress` takes, alone and after it.
Each draw has its own calibration images. Accuracy on images that no tool used. `make compact` trains two compact
networks for CIFAR-10, on which no default was chosen, and adds their rows.

headline.json is written after each network, target and draw. A run leaves out what it has: it goes on where it was
stopped. headline.md is the README's table, headline_all.md that of docs/results.md.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median, stdev
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in (".", "python")]  # this checkout

import resuscitate
from benchmarks.accuracy.peers import distil, one_shot
from benchmarks.common.inputs import DataFolder, Nets, case, data_folder
from benchmarks.common.results import RESULTS, accuracy_cell, machine, markdown_table, progress, write
from resuscitate.pruning.sparsify import NofM, parse_pattern

NETS = {
    "resnet20": "ResNet-20",
    "resnet32": "ResNet-32",
    "dscnn": "DS-CNN",
    "mobilenet_v1": "MobileNetV1",
    "mobilenet_v2": "MobileNetV2",
}
TARGETS = "50%", "70%", "80%", "90%", "95%", "98%", "2:4", "1:4"
SHOWN = {name: ("50%", "70%", "80%") if name == "dscnn" else ("80%", "90%", "95%") for name in NETS}  # in the README
HIDDEN = "NNCF adaptation", "published ASR + EMA"  # in docs/results.md only


@dataclass(frozen=True)
class Cell:
    """A network and what it is pruned to; the images of one draw, which may be mirrored and moved or not."""

    dense: nn.Module
    target: str
    images: Tensor
    augmented: bool

    @property
    def kind(self) -> str | NofM:
        return parse_pattern(self.pattern)

    @property
    def pattern(self) -> str:
        return self.target if ":" in self.target else "unstructured"

    @property
    def sparsity(self) -> float:
        return 1 - self.kind.n / self.kind.m if isinstance(self.kind, NofM) else float(self.target.rstrip("%")) / 100

    def pruned(self) -> tuple[nn.Module, resuscitate.Masks]:
        """A pruned copy of the network, not repaired."""
        model = copy.deepcopy(self.dense)
        return model, resuscitate.sparsify(model, self.sparsity, pattern=self.pattern)

    @cached_property
    def compressed(self) -> tuple[nn.Module, resuscitate.Masks, float]:
        """What `compress` makes of a copy, and its seconds."""
        model, started = copy.deepcopy(self.dense), time.perf_counter()
        report = resuscitate.compress(model, self.sparsity, self.images, pattern=self.pattern, progress=False)
        return model, report.masks, time.perf_counter() - started


Tool = Callable[[Cell], nn.Module]


def _update_bn(cell: Cell) -> nn.Module:
    model, _ = cell.pruned()
    update_bn(cell.images.split(128), model)
    return model.eval()


def _nncf(cell: Cell) -> nn.Module:
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)
    model, _ = cell.pruned()
    nncf.batch_norm_adaptation(model, nncf.Dataset(list(cell.images.split(128))))
    return model.eval()


def _repair(**options: Any) -> Tool:
    def run(cell: Cell) -> nn.Module:
        model, _ = cell.pruned()
        resuscitate.repair(model, cell.dense, cell.images, **options, keep_worse=True, progress=False)
        return model

    return run


def _asr_as_published(cell: Cell) -> nn.Module:
    # 20 batches, as published; the batch size follows from the number of images
    ema = resuscitate.EMA(batches=20, batch_size=len(cell.images) // 20)
    return _repair(method="asr", schedule="parallel", recalibrate=ema)(cell)


def _one_shot(cell: Cell) -> nn.Module:
    model = copy.deepcopy(cell.dense)
    one_shot(model, cell.images, cell.pruned()[1], cell.kind if isinstance(cell.kind, NofM) else None)
    return model


def _distillation(cell: Cell) -> nn.Module:
    model, masks = cell.pruned()
    distil(model, cell.dense, cell.images, masks, cell.compressed[2], cell.augmented)
    return model


def _compress(cell: Cell) -> nn.Module:
    return cell.compressed[0]


def _after_compress(cell: Cell) -> nn.Module:
    model, masks, seconds = cell.compressed
    model = copy.deepcopy(model)
    distil(model, cell.dense, cell.images, masks, seconds, cell.augmented)
    return model


TOOLS: dict[str, Tool] = {
    "no repair": lambda cell: cell.pruned()[0],
    "update_bn": _update_bn,
    "NNCF adaptation": _nncf,
    "published ASR + EMA": _asr_as_published,
    "ASR": _repair(method="asr"),
    "one-shot, SparseGPT": _one_shot,
    "refit": _repair(method="refit"),
    "compress": _compress,
    "distillation": _distillation,
    "compress + distillation": _after_compress,
}


def measure(cell: Cell, score: resuscitate.Accuracy, tools: Iterable[str]) -> tuple[dict[str, float], dict[str, float]]:
    """The accuracy and the seconds of each tool."""
    accuracy, seconds = {}, {}
    for name in tools:
        if "distillation" in name:
            _ = cell.compressed  # its time is not that of the distillation
        started = time.perf_counter()
        model = TOOLS[name](cell)
        seconds[name] = round(cell.compressed[2] if name == "compress" else time.perf_counter() - started, 2)
        accuracy[name] = score(model)
    return accuracy, seconds


def main(
    data: DataFolder = None,
    nets: Nets = "resnet20,resnet32,dscnn",
    targets: Annotated[str, typer.Option(help="sparsities and patterns, by comma")] = "50%,70%,80%,90%,95%,98%,2:4,1:4",
    draws: Annotated[int, typer.Option(help="of the calibration images")] = 5,
    only: Annotated[str, typer.Option(help="measure these tools again, by comma; the others keep their figures")] = "",
    timed: Annotated[bool, typer.Option(help="record seconds; not beside other work")] = True,
    test_images: int = 10_000,
    output: Path = RESULTS,
) -> None:
    """Repair trained networks with every tool; write accuracies and seconds."""
    folder, file = data_folder(data), output / "headline.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    known = {(row["net"], row["target"], row["draw"]): row for row in rows}
    jobs = [(net, target, draw) for draw in range(draws) for net in nets.split(",") for target in targets.split(",")]
    jobs = [job for job in jobs if only or job not in known]
    tools = only.split(",") if only else [name for name in TOOLS if name != "NNCF adaptation" or find_spec("nncf")]
    load = lru_cache(maxsize=1)(case)  # it decodes thousands of images
    for net, target, draw in progress(jobs, "repairing"):
        dense, images, score = load(net, draw, folder, test_images)
        accuracy, seconds = measure(Cell(dense, target, images, net != "dscnn"), score, tools)
        row = known.setdefault(
            (net, target, draw),
            {"net": net, "target": target, "draw": draw, "dense": score(dense), "accuracy": {}, "seconds": {}},
        )
        row["accuracy"].update(accuracy)
        row["seconds"].update(seconds if timed else {})
        publish(file, list(known.values()), test_images)


def publish(file: Path, rows: list[dict[str, Any]], test_images: int) -> None:
    """Write the rows and both tables."""
    order = [(net, target) for net in NETS for target in TARGETS]
    rows.sort(key=lambda row: (order.index((row["net"], row["target"])), row["draw"]))
    found = {**machine(), "images": {"test": test_images}, "rows": rows}
    write(file, found, table([row for row in rows if row["target"] in SHOWN[row["net"]]], HIDDEN))
    file.with_name("headline_all.md").write_text(table(rows))


def table(rows: list[dict[str, Any]], hidden: Iterable[str] = ()) -> str:
    """A row for each network and target; for each tool mean accuracy, its spread over draws, and median seconds.

    A tool that a draw does not have was not at hand then. Draws without seconds count in the accuracy only.
    """
    names = [name for name in TOOLS if any(name in row["accuracy"] for row in rows) and name not in hidden]
    lines = []
    for net, target in dict.fromkeys((row["net"], row["target"]) for row in rows):
        chosen = [row for row in rows if (row["net"], row["target"]) == (net, target)]
        found = {name: [row["accuracy"][name] for row in chosen if name in row["accuracy"]] for name in names}
        best, cells = max(mean(each) for each in found.values() if each), []
        for name, accuracies in found.items():
            spread = f" ± {stdev(accuracies):.1f}" if len(accuracies) > 1 else ""
            seconds = [row["seconds"][name] for row in chosen if name in row["seconds"] and name != "no repair"]
            spent = f" ({median(seconds):.1f} s)" if seconds else ""
            cells.append(f"{accuracy_cell(mean(accuracies), best)}{spread}{spent}" if accuracies else "")
        dense = mean(row["dense"] for row in chosen)
        lines.append([f"{NETS[net]} ({dense:.1f}), {target}", *cells])
    return markdown_table(["network (dense), sparsity", *names], lines)


if __name__ == "__main__":
    torch.manual_seed(0)
    typer.run(main)
