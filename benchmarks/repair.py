"""The whole repair against bare forward passes and against peers: `make bench-repair`, or this file.

Sequential ASR and exact BatchNorm recalibration, all candidates of a case timed in turn in every round; medians.
Peers: the bare forward passes that the job needs (dense and pruned, nothing else); a plain hook implementation (dense
variances once, then one early-stopped pass of the pruned network per layer, `torch.var_mean`), in batches and with all
images in one batch; `torch.optim.swa_utils.update_bn`. Then our time alone against the number of images and of layers.
Writes repair.json, repair.md (the tables in docs/walk.md) and repair.svg.

Each of `SETTINGS` is a process of its own, for threads and malloc are set before it begins. "default" is what a user
has who sets nothing: torch's own number of threads, and malloc as it comes, whose pages go back to the system and come
again. "tuned" is one thread, and malloc told to keep what is freed, for all candidates alike; fewest images only.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
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
KEEP = {"MALLOC_TRIM_THRESHOLD_": "8589934592", "MALLOC_MMAP_THRESHOLD_": "4294967296"}
SETTINGS = {"default": {}, "tuned": {"OMP_NUM_THREADS": "1", **KEEP}}
SETS = ("OMP_", "GOMP_", "KMP_", "MKL_", "MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")  # threads or malloc
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
    name: str, images: Tensor, folder: Path, setting: str, rounds: int, slow_rounds: int
) -> list[dict[str, Any]]:
    """One row for each job, the seconds of every candidate in it."""
    threads = torch.get_num_threads()
    dense = network(name, folder, images)
    rows: list[dict[str, Any]] = []
    pruned = pruned_copy(dense)
    for job, found in candidates(dense).items():
        runs = {candidate: run for candidate, run in found.items() if slow_rounds or "hooks" not in candidate}
        seconds: dict[str, list[float]] = {candidate: [] for candidate in runs}
        for run in runs.values():
            timed(run, pruned, images[:BATCH])  # warm
        for turn in range(rounds):
            for candidate, run in runs.items():
                if turn < slow_rounds or "hooks" not in candidate:
                    seconds[candidate].append(timed(run, pruned, images))
        medians = {candidate: statistics.median(each) for candidate, each in seconds.items()}
        console.print(name, len(images), threads, setting, job, {k: round(v, 2) for k, v in medians.items()})
        row = {"network": name, "images": len(images), "threads": threads, "malloc": setting, "job": job}
        rows.append({**row, "seconds": medians, "rounds": seconds, "ratio": ratios(medians)})
    return rows


def ratios(seconds: dict[str, float]) -> dict[str, float]:
    """Ours over the bare forward passes; all others over ours."""
    bare = {k: v for k, v in seconds.items() if k.startswith("bare")}
    found = {f"ours / {peer}": seconds["ours"] / value for peer, value in bare.items()}
    return found | {f"{k} / ours": v / seconds["ours"] for k, v in seconds.items() if k not in ("ours", *bare)}


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
    """The tables for the docs: one for each setting and job."""
    lines = []
    for setting, job in dict.fromkeys((row["malloc"], row["job"]) for row in rows):
        mine = [row for row in rows if (row["malloc"], row["job"]) == (setting, job)]
        ratio, threads = list(mine[0]["ratio"]), mine[0]["threads"]
        lines += [f"| {job}, {threads} thread{'s' * (threads > 1)}, {setting} malloc | ours, s | {' | '.join(ratio)} |"]
        lines += [f"| --- |{' --- |' * (len(ratio) + 1)}"]
        for row in mine:
            cells = " | ".join(f"{row['ratio'][column]:.2f}" for column in ratio)
            lines.append(f"| {row['network']}, {row['images']:,} images | {row['seconds']['ours']:.2f} | {cells} |")
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


def measure(setting: str, *options: Any) -> dict[str, Any]:
    """What a process of this setting finds, with these options of the command line."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(SETS)}
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        line = [sys.executable, __file__, "--within", setting, "--output", found, *options]
        subprocess.run(list(map(str, line)), env=kept | SETTINGS[setting], check=True)
        return json.loads(found.read_text())


def main(
    data: Annotated[Path | None, typer.Option(help="Folder of networks and images.")] = None,
    images: Annotated[list[int], typer.Option(help="Numbers of images; repeatable.")] = [512, 4096],  # noqa: B006
    networks: Annotated[list[str], typer.Option(help="Networks; repeatable.")] = ["resnet20", "resnet56"],  # noqa: B006
    rounds: Annotated[int, typer.Option(help="Rounds for what takes seconds.")] = 5,
    slow_rounds: Annotated[int, typer.Option(help="Rounds for the hook implementations; 0: without.")] = 1,
    scale: Annotated[bool, typer.Option(help="Measure growth with images and layers too.")] = True,
    output: Annotated[Path, typer.Option(help="The .json; .md and .svg go beside it.")] = RESULTS / "repair.json",
    within: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Time the whole repair against its peers."""
    folder = data_folder(data)
    if within is not None:
        pool = calibration_images(folder, max(images))
        rows = [
            row
            for name, count in product(networks, images)
            for row in compare(name, pool[:count], folder, within, rounds, slow_rounds)
        ]
        output.write_text(json.dumps({"rows": rows, "scaling": scaling(folder, pool, rounds) if scale else {}}))
        return
    shared: list[Any] = ["--data", folder, "--rounds", rounds, "--slow-rounds", slow_rounds]
    shared += [word for name in networks for word in ("--networks", name)]
    counts = [word for count in images for word in ("--images", count)]
    first = measure("default", *shared, *counts, "--scale" if scale else "--no-scale")
    second = measure("tuned", *shared, "--images", min(images), "--no-scale")
    rows = first["rows"] + second["rows"]
    about = machine(shlex.join(["python", "benchmarks/repair.py", *sys.argv[1:]]))
    del about["threads"], about["omp_wait_policy"]  # of this process; each row has its own
    output.write_text(json.dumps({**about, "rows": rows, "scaling": first["scaling"]}, indent=1) + "\n")
    output.with_suffix(".md").write_text(markdown(rows))
    if scale:
        draw(first["scaling"], output.with_suffix(".svg"))


if __name__ == "__main__":
    typer.run(main)
