"""One shot, in steps, or past the target and back: `make regrow`, or `python benchmarks/regrow.py`.

Trained ResNet-20 and ResNet-32 are brought to 90 and 95 % in three ways: by global magnitude at once; by `compress`;
and past it, to 97 and 99 %, then given weights back by `regrow`, with each budget and saliency. All are refitted from
the same unlabelled images and tested on others. Writes regrow.json and .md.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from common import RESULTS, calibration_images, data_folder, network, publish, scorer
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import resuscitate
from resuscitate.data.images import load_labels

PAST = {0.9: 0.97, 0.95: 0.99}
ROUNDS = 4
# how it comes back: options of `regrow`; LABELS stands for the images with their labels
LABELS = "labels"
REGROWN: dict[str, dict[str, Any]] = {
    "greedy, magnitude": {},
    f"greedy, magnitude, {ROUNDS} rounds": {"rounds": ROUNDS},
    "by damage, magnitude": {"budget": "damage"},
    "by SSIM, magnitude": {"budget": "ssim"},
    "proportional, magnitude": {"budget": "proportional"},
    "greedy, residual": {"saliency": "residual"},
    f"greedy, residual, {ROUNDS} rounds": {"saliency": "residual", "rounds": ROUNDS},
    "greedy, gradient (labels)": {"saliency": "gradient", "labelled": LABELS},
    "by SSIM, gradient (labels), as published": {"budget": "ssim", "saliency": "gradient", "labelled": LABELS},
}
ROWS = (
    "one shot",
    "compress",
    *REGROWN,
    "compress past it, then greedy, magnitude",
    "one shot, uniform",
    "uniform past it, then greedy, magnitude",
)


def sparse(
    row: str, dense: nn.Module, sparsity: float, images: Tensor, labelled: list[tuple[Tensor, Tensor]]
) -> nn.Module:
    """A copy at that sparsity, by one of `ROWS`."""
    model = copy.deepcopy(dense)
    quiet = {"progress": False}
    allocation = "uniform" if "uniform" in row else "global"
    if row.startswith("one shot"):
        resuscitate.sparsify(model, sparsity, allocation=allocation)
        resuscitate.repair(model, dense, images, **quiet)
    elif row == "compress":
        resuscitate.compress(model, sparsity, images, **quiet)
    elif row in REGROWN:
        options = {**REGROWN[row], **quiet}
        options |= {"labelled": labelled} if "labelled" in options else {}
        masks = resuscitate.sparsify(model, PAST[sparsity])
        resuscitate.regrow(model, dense, masks, sparsity, images, **options)
    elif allocation == "uniform":
        masks = resuscitate.sparsify(model, PAST[sparsity], allocation=allocation)
        resuscitate.regrow(model, dense, masks, sparsity, images, **quiet)
    else:
        masks = resuscitate.compress(model, PAST[sparsity], images, **quiet).masks
        resuscitate.regrow(model, dense, masks, sparsity, images, **quiet)
    return model


def main(
    data: Annotated[Path | None, typer.Option(help="folder with networks and images; else RESUSCITATE_DATA")] = None,
    nets: Annotated[str, typer.Option(help="which networks, by comma")] = "resnet20,resnet32",
    images: Annotated[int, typer.Option(help="for calibration")] = 256,
    test_images: int = 5000,
    output: Path = RESULTS,
) -> None:
    """Bring the networks to each sparsity in every way and print the accuracies."""
    folder = data_folder(data)
    calibration, score = calibration_images(folder, images), scorer(folder, test_images)
    labels = load_labels(folder / "cifar10_jpeg_train.npz", max_samples=images)
    labelled = list(zip(calibration.split(64), labels.split(64), strict=True))
    console, rows = Console(stderr=True), list[dict[str, Any]]()
    jobs = [(net, sparsity, row) for net in nets.split(",") for sparsity in PAST for row in ROWS]
    for net, sparsity, row in track(jobs, "regrowing", console=console, disable=not console.is_terminal):
        dense, started = network(net, folder, calibration), time.perf_counter()
        model = sparse(row, dense, sparsity, calibration, labelled)
        seconds = round(time.perf_counter() - started, 1)
        found = {"zeros": resuscitate.Masks.from_zeros(model).sparsity, "accuracy": score(model), "seconds": seconds}
        rows.append({"net": net, "dense": score(dense), "sparsity": sparsity, "row": row, **found})
    publish(output, {"images": {"calibration": images, "test": test_images}, "rows": rows}, markdown(rows))


def markdown(rows: list[dict[str, Any]]) -> str:
    """A row for each way, a column for each network and sparsity, with seconds; the best of each column in bold."""
    columns = list(dict.fromkeys((row["net"], row["sparsity"]) for row in rows))
    by = {(row["net"], row["sparsity"], row["row"]): row for row in rows}
    heads = [f"{net} ({by[net, at, 'one shot']['dense']:.1f}), {PAST[at]:.0%} to {at:.0%}" for net, at in columns]
    lines = [f"| | {' | '.join(heads)} |", "|" + " --- |" * (1 + len(heads))]
    for name in ROWS:
        cells = []
        for net, at in columns:
            best = max(by[net, at, other]["accuracy"] for other in ROWS)
            text = f"{by[net, at, name]['accuracy']:.1f}"
            text = f"**{text}**" if by[net, at, name]["accuracy"] == best else text
            cells.append(f"{text} ({by[net, at, name]['seconds']:.0f} s)")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
