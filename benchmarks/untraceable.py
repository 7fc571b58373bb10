"""A repair of networks that torch.fx cannot trace against their bare forward passes: `make bench-untraceable`.

The shape of ResNet-50 as transformers has it (`pip install transformers`; left out without it), 64 images of 64x64, and
a network of 26 layers behind a `forward_fn`, 512 images of 32x32; random weights, 80 % sparsity, batches of 16 and of
128, a sequential ASR and a refit. And the forward passes alone: all cores within each operator of one pass at a time,
or one core for each of several passes, on one and on all cores, over sizes of images and batches. Threads and malloc
are as they come; the candidates of a row take turns in every round; medians. Writes untraceable.json and untraceable.md
(the tables in docs/walk.md).
"""

from __future__ import annotations

import copy
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import RESULTS, machine, pruned_copy
from repair import ratios
from rich.console import Console
from torch import Tensor, nn
from zoo import resnet50

import resuscitate
from resuscitate.models import ResNet, resnet20
from resuscitate.network import Network
from resuscitate.outputs import measure

console = Console(stderr=True)


def run_batch(model: nn.Module, batch: Any) -> Any:
    """A `forward_fn`, which hides the network's graph."""
    return model(**batch) if isinstance(batch, dict) else model(batch)


def networks() -> dict[str, tuple[nn.Module, list[Any]]]:
    """By name: a network, and its batches."""
    torch.manual_seed(0)
    found: dict[str, tuple[nn.Module, list[Any]]] = {}
    try:
        from transformers import ResNetConfig, ResNetForImageClassification

        images = torch.randn(64, 3, 64, 64)
        batches = [{"pixel_values": batch} for batch in images.split(16)]
        found["transformers ResNet-50, 64 images of 64x64"] = ResNetForImageClassification(ResNetConfig()), batches
    except ImportError:
        console.print("without transformers: its ResNet-50 is left out")
    images = torch.randn(512, 3, 32, 32)
    found["26 layers behind a forward_fn, 512 images of 32x32"] = ResNet(4), list(images.split(128))
    for model, batches in found.values():
        resuscitate.recalibrate_batchnorm(model.eval(), batches, forward_fn=run_batch, progress=False)
    return found


@torch.no_grad()
def forwards(batches: list[Any], *models: nn.Module) -> None:
    """Nothing but the forward passes."""
    for model in models:
        for batch in batches:
            run_batch(model, batch)


def timed(run: Callable[[], Any]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def medians(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of each candidate, all in turn in every round, after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(timed(run))
    return {name: statistics.median(each) for name, each in seconds.items()}


def compare(name: str, dense: nn.Module, batches: list[Any], rounds: int) -> list[dict[str, Any]]:
    """One row for each method: the repair, and the forward passes that it needs."""
    pruned, rows = pruned_copy(dense), []
    for method, turns in (("asr", rounds), ("refit", 1)):
        walks = set[str]()

        def ours(method: str = method, walks: set[str] = walks) -> None:
            options: dict[str, Any] = {"method": method, "forward_fn": run_batch, "progress": False}
            walks.add(resuscitate.repair(copy.deepcopy(pruned), dense, batches, **options).walk)

        runs = {"ours": ours, "bare forwards": partial(forwards, batches, dense, pruned)}
        seconds = medians(runs, turns)
        row = {"network": name, "method": method, "walk": walks.pop(), "seconds": seconds, "ratio": ratios(seconds)}
        rows.append(row)
        console.print({key: value for key, value in row.items() if key != "rounds"})
    return rows


def curve(rounds: int) -> list[dict[str, Any]]:
    """Forward passes of one network: cores within a pass, or passes beside one another."""
    rows, cores = [], torch.get_num_threads()
    for make, size, images, batch in (
        (resnet20, 32, 512, 32),
        (resnet20, 32, 512, 128),
        (resnet50, 64, 64, 16),
        (resnet50, 224, 16, 4),
    ):
        model = make().eval()
        net, batches = Network(model), list(torch.randn(images, 3, size, size).split(batch))
        for threads in sorted({1, cores}):
            torch.set_num_threads(threads)
            runs = {
                "one pass at a time": partial(forwards, batches, model),
                "one pass a core": partial(beside, net, batches),
            }
            found = medians(runs, rounds)
            rows.append(
                {"network": make.__name__, "size": size, "images": images, "batch": batch, "cores": threads, **found}
            )
            console.print(rows[-1])
        torch.set_num_threads(cores)
    return rows


def beside(net: Network, batches: list[Tensor]) -> None:
    """All passes, several at a time, as the walk runs them."""
    measure(net, batches, [])


def markdown(rows: list[dict[str, Any]], points: list[dict[str, Any]]) -> str:
    """The tables for the docs."""
    lines = ["| network | method | ours, s | ours / bare forwards |", "| --- | --- | --- | --- |"]
    for row in rows:
        ratio = row["ratio"]["ours / bare forwards"]
        lines.append(f"| {row['network']} | {row['method']} | {row['seconds']['ours']:.2f} | {ratio:.2f} |")
    lines += ["", "| forward passes | cores | one at a time, s | one a core, s | ratio |", "| --- " * 5 + "|"]
    for point in points:
        first, second = point["one pass at a time"], point["one pass a core"]
        what = (
            f"{point['network']}, {point['images']} images of {point['size']}x{point['size']}, batch {point['batch']}"
        )
        lines.append(f"| {what} | {point['cores']} | {first:.2f} | {second:.2f} | {second / first:.2f} |")
    return "\n".join(lines) + "\n"


def main(
    rounds: Annotated[int, typer.Option(help="Rounds.")] = 5,
    output: Annotated[Path, typer.Option(help="The .json; .md goes beside it.")] = RESULTS / "untraceable.json",
) -> None:
    """Time repairs of untraceable networks against bare forward passes."""
    rows = [row for name, (dense, batches) in networks().items() for row in compare(name, dense, batches, rounds)]
    points = curve(rounds)
    about = machine(shlex.join(["python", "benchmarks/untraceable.py", *sys.argv[1:]]))
    output.write_text(json.dumps({**about, "rows": rows, "curve": points}, indent=1) + "\n")
    output.with_suffix(".md").write_text(markdown(rows, points))


if __name__ == "__main__":
    typer.run(main)
