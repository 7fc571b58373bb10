"""A refit at the size of real networks, against bare forward passes: `make bench-large`, or this file.

Networks of torchvision with random weights, 80 % of the weights pruned by magnitude with Erdős-Rényi-kernel densities,
smooth random images of 224 x 224 pixels in batches of 16. Each row runs in its own process, with what a user gets by
default: PyTorch's number of threads and the system's malloc. The table has the seconds of the forward passes of both
networks and of the refit (medians of three rounds, or of one), their ratio, the part of the refit that was spent on
solving for weights, and the peak resident memory of the process. Writes large.json and large.md (the table in
docs/walk.md). With `--device cuda` the memory is that of the GPU, one row is a whole `compress`, and the results are
large_gpu.json and large_gpu.md.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in (".", "python")]  # this checkout

import resuscitate
from benchmarks.common.results import RESULTS, console, machine, markdown_table, write
from benchmarks.common.timing import forwards, in_own_process, measured
from resuscitate.statistics.least_squares import Problem
from tests.outside.networks import liven, package, settle, smooth_images

SIZE = 224
# by device the images of a batch, and the rows: the network of torchvision, the number of images, of rounds, the job
BATCH = {"cpu": 16, "cuda": 64}
ROWS = {
    "cpu": {
        "ResNet-50, 32 images": ("resnet50", 32, 3, "refit"),
        "ResNet-50, 256 images": ("resnet50", 256, 1, "refit"),
        "MobileNetV2, 32 images": ("mobilenet_v2", 32, 3, "refit"),
        "VGG-16, 32 images": ("vgg16", 32, 1, "refit"),
        "ConvNeXt-T, 32 images": ("convnext_tiny", 32, 1, "refit"),
        "ViT-B/16, 32 images": ("vit_b_16", 32, 1, "refit"),
    },
    "cuda": {
        "ResNet-50, 1,024 images": ("resnet50", 1024, 3, "refit"),
        "MobileNetV2, 1,024 images": ("mobilenet_v2", 1024, 3, "refit"),
        "ViT-B/16, 1,024 images": ("vit_b_16", 1024, 3, "refit"),
        "ResNet-50, 1,024 images, compress": ("resnet50", 1024, 1, "compress"),
    },
}


def timed(function: Callable[..., Any], device: str, seconds: list[float]) -> Callable[..., Any]:
    """The function, whose calls append their seconds."""

    def call(*arguments: Any, **options: Any) -> Any:
        result, spent, _ = measured(lambda: function(*arguments, **options), torch.device(device))
        seconds.append(spent)
        return result

    return call


def one(row: str, device: str) -> dict[str, Any]:
    """The numbers of one row, in this process; forward passes and refits alternate."""
    (name, count, rounds, job), batch = ROWS[device][row], BATCH[device]
    torch.manual_seed(0)
    dense: nn.Module = getattr(package("torchvision").models, name)(weights=None).eval()
    images = smooth_images(count, SIZE).to(device)
    liven(dense)
    settle(dense.to(device), images[:batch])
    pruned = copy.deepcopy(dense)
    resuscitate.sparsify(pruned, 0.8, allocation="erk")
    options: dict[str, Any] = {"batch_size": batch, "progress": False}

    def run(read: Tensor) -> Any:
        if job == "compress":
            return resuscitate.compress(copy.deepcopy(dense), 0.8, read, **options)
        return resuscitate.repair(copy.deepcopy(pruned), dense, read, **options)

    found: dict[str, list[float]] = {"forwards": [], "refit": [], "solving": []}
    solving: list[float] = []
    if device == "cpu":  # on a GPU the clock would wait for each solution
        Problem.solve = timed(Problem.solve, device, solving)
    else:  # what is compiled and loaded once
        run(images[: 4 * batch])
    for _ in range(rounds):
        timed(forwards, device, found["forwards"])(images.split(batch), dense, pruned)
        solving.clear()
        report = timed(run, device, found["refit"])(images)
        found["solving"].append(sum(solving))
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else measured(lambda: None, torch.device("cpu"))[2]
    about = {"row": row, "peak": peak, "threads": torch.get_num_threads(), "agreement": vars(report.agreement)}
    return about | {key: median(values) for key, values in found.items()} | {"rounds": found}


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table in the docs."""
    heads = ["80 % sparse, two networks", "forwards, s", "refit, s", "ratio", "solving, %", "peak memory, GiB"]
    lines = [
        [
            row["row"],
            f"{row['forwards']:.1f}",
            f"{row['refit']:.0f}",
            f"{row['refit'] / row['forwards']:.1f}",
            f"{100 * row['solving'] / row['refit']:.0f}" if row["solving"] else "",
            f"{row['peak'] / 2**30:.1f}",
        ]
        for row in rows
    ]
    return markdown_table(heads, lines)


def main(
    row: Annotated[list[str] | None, typer.Option(help="Rows; repeatable. All by default.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    output: Annotated[Path | None, typer.Option(help="The .json; .md goes beside it.")] = None,
    within: Annotated[bool, typer.Option("--within", hidden=True)] = False,
) -> None:
    """Time refits at the size of real networks."""
    chosen = row or list(ROWS[device])
    path = output or RESULTS / ("large.json" if device == "cpu" else "large_gpu.json")
    if within:
        path.write_text(json.dumps(one(chosen[0], device)))
        return
    rows = []
    for name in chosen:
        rows.append(in_own_process(__file__, "--within", "--device", device, "--row", name))
        console.print(rows[-1])
        write(path, {**machine(), "rows": rows}, markdown(rows))


if __name__ == "__main__":
    typer.run(main)
