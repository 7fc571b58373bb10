"""The whole repair against bare forward passes and against peers: `make bench-repair`, or this file.

Sequential ASR and exact BatchNorm recalibration, all candidates of a case timed in turn in every round; medians.
Peers: the bare forward passes that the job needs (dense and pruned, nothing else); a plain hook implementation (dense
variances once, then one early-stopped pass of the pruned network per layer, `torch.var_mean`), in batches and with all
images in one batch; `torch.optim.swa_utils.update_bn`. Then our time alone against the number of images and of layers.
Writes repair.json, repair.md (the tables in docs/walk.md) and repair.svg.

malloc is told to keep what is freed, for all candidates alike: else pages that go back to the system and come again
cost each of them up to half its time, more or less by chance.
"""

from __future__ import annotations

import os
import sys

KEEP = {"MALLOC_TRIM_THRESHOLD_": "8589934592", "MALLOC_MMAP_THRESHOLD_": "4294967296"}
if __name__ == "__main__" and not KEEP.keys() <= os.environ.keys():  # both are read before Python begins
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP})

import contextlib
import copy
import json
import shlex
import statistics
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import RESULTS, calibration_images, data_folder, machine, network, pruned_copy
from rich.console import Console
from torch import Tensor, nn

import resuscitate

BATCH = 128
LAYERS = (nn.Conv2d, nn.Linear)
console = Console(stderr=True)


class Reached(Exception):  # noqa: N818
    """Ends a forward pass at the layer that is measured."""


@torch.no_grad()
def forwards(images: Tensor, *models: nn.Module) -> None:
    """Nothing but the forward passes."""
    for model in models:
        for batch in images.split(BATCH):
            model(batch)


@torch.no_grad()
def moments(model: nn.Module, layers: list[nn.Module], batches: tuple[Tensor, ...], stop: bool) -> list[Any]:
    """Mean and variance of the layers' outputs over all batches by forward hooks; `stop`: after the (one) layer."""
    found: list[list[tuple[int, Tensor, Tensor]]] = [[] for _ in layers]

    def take(seen: list[tuple[int, Tensor, Tensor]], output: Tensor) -> None:
        axes = (0, 2, 3) if output.dim() == 4 else 0
        var, mean = torch.var_mean(output, axes, correction=0)
        seen.append((len(output), mean, var))
        if stop:
            raise Reached

    handles = [
        layer.register_forward_hook(lambda m, a, out, seen=seen: take(seen, out))
        for layer, seen in zip(layers, found, strict=True)
    ]
    for batch in batches:
        with contextlib.suppress(Reached):
            model(batch)
    for handle in handles:
        handle.remove()
    pooled = []
    for seen in found:
        total = sum(n for n, _, _ in seen)
        mean = sum(n * mean for n, mean, _ in seen) / total
        pooled.append((mean, sum(n * (var + (m - mean) ** 2) for n, m, var in seen) / total))
    return pooled


@torch.no_grad()
def plain_hooks(model: nn.Module, dense: nn.Module, images: Tensor, batch_size: int) -> None:
    """Sequential ASR as one would write it with hooks, the first convolution left alone."""
    batches = images.split(batch_size)
    layers, originals = ([m for m in net.modules() if isinstance(m, LAYERS)][1:] for net in (model, dense))
    for layer, (mean_d, var_d) in zip(layers, moments(dense, originals, batches, stop=False), strict=True):
        mean, var = moments(model, [layer], batches, stop=True)[0]
        trust = var / (var + var.median())
        gain = trust * (var_d / (var + 1e-8)).sqrt() + (1 - trust)
        gain = torch.where(var.median() == 0, 1.0, gain)
        layer.weight.mul_(gain.view(-1, *[1] * (layer.weight.dim() - 1)))
        shift = mean_d - gain * mean
        if layer.bias is None:
            layer.bias = nn.Parameter(shift)
        else:
            layer.bias.mul_(gain).add_(shift)


def candidates(dense: nn.Module) -> dict[str, dict[str, Callable[[nn.Module, Tensor], Any]]]:
    """For each job, ours first: what to do to a pruned model with the images."""
    quiet: dict[str, Any] = {"batch_size": BATCH, "progress": False}
    return {
        "sequential ASR": {
            "ours": lambda model, x: resuscitate.repair(model, dense, x, method="asr", **quiet),
            "bare forwards": lambda model, x: forwards(x, dense, model),
            "hooks": lambda model, x: plain_hooks(model, dense, x, BATCH),
            "hooks, one batch": lambda model, x: plain_hooks(model, dense, x, len(x)),
        },
        "exact BatchNorm": {
            "ours": lambda model, x: resuscitate.recalibrate_batchnorm(model, x, **quiet),
            "bare forward": lambda model, x: forwards(x, model),
            "update_bn": lambda model, x: torch.optim.swa_utils.update_bn(x.split(BATCH), model),
        },
    }


def timed(run: Callable[[nn.Module, Tensor], Any], pruned: nn.Module, images: Tensor) -> float:
    """Seconds of one call, on a copy of the pruned model."""
    model = copy.deepcopy(pruned)
    started = time.perf_counter()
    run(model, images)
    return time.perf_counter() - started


def compare(
    name: str, images: Tensor, folder: Path, threads: int, rounds: int, slow_rounds: int
) -> list[dict[str, Any]]:
    """One row for each job, the seconds of every candidate in it."""
    torch.set_num_threads(threads)
    dense = network(name, folder, images)
    rows: list[dict[str, Any]] = []
    pruned = pruned_copy(dense)
    for job, runs in candidates(dense).items():
        seconds: dict[str, list[float]] = {candidate: [] for candidate in runs}
        for run in runs.values():
            timed(run, pruned, images[:BATCH])  # warm
        for turn in range(rounds):
            for candidate, run in runs.items():
                if turn < slow_rounds or "hooks" not in candidate:
                    seconds[candidate].append(timed(run, pruned, images))
        medians = {candidate: statistics.median(found) for candidate, found in seconds.items()}
        console.print(name, len(images), threads, job, {k: round(v, 2) for k, v in medians.items()})
        row = {"network": name, "images": len(images), "threads": threads, "job": job}
        row |= {"seconds": medians, "rounds": seconds}
        rows.append({**row, "ratio": {k: v / medians["ours"] for k, v in medians.items() if k != "ours"}})
    return rows


def scaling(folder: Path, images: Tensor, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Our seconds for sequential ASR against images (ResNet-20) and against layers (512 images)."""

    def ours(name: str, count: int) -> dict[str, Any]:
        dense = network(name, folder, images)
        pruned = pruned_copy(dense)
        runs = [candidates(dense)["sequential ASR"][which] for which in ("ours", "bare forwards")]
        found = [[timed(run, pruned, images[:count]) for run in runs] for _ in range(rounds)]
        seconds, bare = (statistics.median(column) for column in zip(*found, strict=True))
        layers = sum(isinstance(m, LAYERS) for m in dense.modules())
        return {"network": name, "layers": layers, "images": count, "seconds": seconds, "bare forwards": bare}

    return {
        "images": [ours("resnet20", count) for count in (256, 512, 1024, 2048, 4096) if count <= len(images)],
        "layers": [ours(name, 512) for name in ("resnet20", "resnet32", "resnet44", "resnet56")],
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """The tables for the docs."""
    lines = []
    for job in dict.fromkeys(row["job"] for row in rows):
        mine = [row for row in rows if row["job"] == job]
        peers = list(mine[0]["ratio"])
        lines += [f"| {job} | ours, s | {' | '.join(f'{peer}, times ours' for peer in peers)} |"]
        lines += [f"| --- |{' --- |' * (len(peers) + 1)}"]
        for row in mine:
            cells = " | ".join(f"{row['ratio'][peer]:.2f}" for peer in peers)
            case = f"{row['network']}, {row['images']:,} images, {row['threads']} thread{'s' * (row['threads'] > 1)}"
            lines.append(f"| {case} | {row['seconds']['ours']:.2f} | {cells} |")
        lines.append("")
    return "\n".join(lines)


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Time against images and against layers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for axis, (variable, points) in zip(axes, found.items(), strict=True):
        for key, style in (("seconds", "o-"), ("bare forwards", "s--")):
            label = "sequential ASR" if key == "seconds" else "bare forwards, dense + pruned"
            axis.plot([point[variable] for point in points], [point[key] for point in points], style, label=label)
        axis.set(xlabel=f"{variable}", ylabel="seconds", xlim=0, ylim=0)
    axes[0].set_title("ResNet-20")
    axes[1].set_title("512 images, ResNet-20 to ResNet-56")
    axes[0].legend(frameon=False)
    figure.savefig(path)


def main(
    data: Annotated[Path | None, typer.Option(help="Folder of networks and images.")] = None,
    images: Annotated[list[int], typer.Option(help="Numbers of images; repeatable.")] = [512, 4096],  # noqa: B006
    networks: Annotated[list[str], typer.Option(help="Networks; repeatable.")] = ["resnet20", "resnet56"],  # noqa: B006
    threads: Annotated[list[int], typer.Option(help="Numbers of threads; repeatable.")] = [1],  # noqa: B006
    rounds: Annotated[int, typer.Option(help="Rounds for what takes seconds.")] = 3,
    slow_rounds: Annotated[int, typer.Option(help="Rounds for the hook implementations.")] = 1,
    scale: Annotated[bool, typer.Option(help="Measure growth with images and layers too.")] = True,
    output: Annotated[Path, typer.Option(help="The .json; .md and .svg go beside it.")] = RESULTS / "repair.json",
) -> None:
    """Time the whole repair against its peers."""
    folder = data_folder(data)
    pool = calibration_images(folder, max(images))
    rows = [
        row
        for name, count, used in product(networks, images, threads)
        for row in compare(name, pool[:count], folder, used, rounds, slow_rounds)
    ]
    grown = scaling(folder, pool, rounds) if scale else {}
    about = machine(shlex.join(["python", "benchmarks/repair.py", *sys.argv[1:]]))
    output.write_text(json.dumps({**about, "rows": rows, "scaling": grown}, indent=1) + "\n")
    output.with_suffix(".md").write_text(markdown(rows))
    if grown:
        draw(grown, output.with_suffix(".svg"))


if __name__ == "__main__":
    typer.run(main)
