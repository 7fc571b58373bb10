"""A refit at the size of real networks, against bare forward passes: `make bench-large`, or this file.

Networks of torchvision with random weights, 80 % of the weights pruned by magnitude with Erdős-Rényi-kernel densities,
smooth random images of 224 x 224 pixels in batches of 16. Each row runs in its own process, with what a user gets by
default: PyTorch's number of threads and the system's malloc. The table has the seconds of the forward passes of both
networks and of the refit (medians of three rounds, or of one), their ratio, the part of the refit that was spent on
solving for weights, and the peak resident memory of the process. Writes large.json and large.md (the table in
docs/walk.md).
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
from torch import nn

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in (".", "python")]  # this checkout

import resuscitate
from benchmarks.common.results import RESULTS, console, machine, markdown_table, write
from benchmarks.common.timing import forwards, in_own_process, measured
from resuscitate.statistics.least_squares import Problem
from tests.outside.networks import liven, package, settle, smooth_images

BATCH, SIZE = 16, 224
# the network of torchvision, the number of images, and of rounds
ROWS = {
    "ResNet-50, 32 images": ("resnet50", 32, 3),
    "ResNet-50, 256 images": ("resnet50", 256, 1),
    "MobileNetV2, 32 images": ("mobilenet_v2", 32, 3),
    "VGG-16, 32 images": ("vgg16", 32, 1),
    "ConvNeXt-T, 32 images": ("convnext_tiny", 32, 1),
    "ViT-B/16, 32 images": ("vit_b_16", 32, 1),
}


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The function, whose calls append their seconds."""

    def call(*arguments: Any, **options: Any) -> Any:
        result, spent, _ = measured(lambda: function(*arguments, **options), torch.device("cpu"))
        seconds.append(spent)
        return result

    return call


def one(row: str) -> dict[str, Any]:
    """The numbers of one row, in this process; forward passes and refits alternate."""
    name, count, rounds = ROWS[row]
    torch.manual_seed(0)
    dense: nn.Module = getattr(package("torchvision").models, name)(weights=None).eval()
    images = smooth_images(count, SIZE)
    liven(dense)
    settle(dense, images[:BATCH])
    pruned = copy.deepcopy(dense)
    resuscitate.sparsify(pruned, 0.8, allocation="erk")
    found: dict[str, list[float]] = {"forwards": [], "refit": [], "solving": []}
    solving: list[float] = []
    Problem.solve = timed(Problem.solve, solving)
    for _ in range(rounds):
        timed(forwards, found["forwards"])(images.split(BATCH), dense, pruned)
        solving.clear()
        model = copy.deepcopy(pruned)
        report = timed(resuscitate.repair, found["refit"])(model, dense, images, batch_size=BATCH, progress=False)
        found["solving"].append(sum(solving))
    peak = measured(lambda: None, torch.device("cpu"))[2]
    about = {"row": row, "layers": len(report.layers), "peak": peak, "threads": torch.get_num_threads()}
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
            f"{100 * row['solving'] / row['refit']:.0f}",
            f"{row['peak'] / 2**30:.1f}",
        ]
        for row in rows
    ]
    return markdown_table(heads, lines)


def main(
    row: Annotated[list[str], typer.Option(help="Rows; repeatable.")] = list(ROWS),  # noqa: B006
    output: Annotated[Path, typer.Option(help="The .json; .md goes beside it.")] = RESULTS / "large.json",
    within: Annotated[bool, typer.Option("--within", hidden=True)] = False,
) -> None:
    """Time refits at the size of real networks."""
    if within:
        output.write_text(json.dumps(one(row[0])))
        return
    rows = []
    for name in row:
        rows.append(in_own_process(__file__, "--within", "--row", name))
        console.print(rows[-1])
        write(output, {**machine(), "rows": rows}, markdown(rows))


if __name__ == "__main__":
    typer.run(main)
