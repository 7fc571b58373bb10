"""Peak memory of a repair under a budget: `make bench-memory`, or this file.

ResNet-20 and 20,000 images from a loader that makes each batch when it is asked for, so that the repair has to store
the images: 0.25 GB of images, and up to 2.6 GB of activations at a time. Each budget runs in its own process. The table
has the growth of the process's resident memory during the repair (Linux), also for a budget larger than the repair
needs. The script checks that the budget changes no bit of the result. Writes memory.json and memory.md (the table in
docs/walk.md).
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read once, when torch loads its OpenMP runtime

import hashlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in (".", "python")]  # this checkout

import resuscitate
from benchmarks.common.inputs import pruned_copy
from benchmarks.common.results import RESULTS, console, machine, markdown_table, write
from benchmarks.common.timing import run_batch
from resuscitate.models import resnet20
from resuscitate.runtime.activations import parse_memory
from resuscitate.runtime.heap import resident_memory

BATCH = 128


def images(count: int) -> Iterator[Tensor]:
    """Batches of noise, each made when it is asked for."""
    generator = torch.Generator().manual_seed(0)
    for begin in range(0, count, BATCH):
        yield torch.randn(min(BATCH, count - begin), 3, 32, 32, generator=generator)


def one(memory: str, count: int, forward_fn: bool) -> dict[str, Any]:
    """Repair under one budget; growth of memory in bytes. forward_fn: use the suspended walk, not the graph walk."""
    options: dict[str, Any] = {"forward_fn": run_batch} if forward_fn else {}
    torch.manual_seed(0)
    dense = resnet20().eval()
    resuscitate.recalibrate_batchnorm(dense, list(images(512)))
    pruned = pruned_copy(dense)
    # a first repair, so that memory which PyTorch allocates once is not counted
    resuscitate.repair(pruned_copy(dense), dense, list(images(2 * BATCH)), method="asr", **options)
    before, started = resident_memory(), time.perf_counter()
    report = resuscitate.repair(pruned, dense, images(count), method="asr", memory=memory, **options)
    seconds, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in pruned.state_dict().values())).hexdigest()
    return {
        "memory": memory,
        "walk": report.walk,
        "budget": parse_memory(memory, torch.device("cpu")),
        "grew_by": peak - before,
        "process": peak,
        "scratch": report.bytes_spilled,
        "seconds": seconds,
        "result": digest,
    }


def main(
    budgets: Annotated[list[str], typer.Option("--memory", help="Budgets; repeatable.")] = ["1GiB", "512MiB", "16GiB"],  # noqa: B006
    count: Annotated[int, typer.Option("--images", help="How many images.")] = 20_000,
    output: Annotated[Path, typer.Option(help="The .json; .md goes beside it.")] = RESULTS / "memory.json",
    child: Annotated[str | None, typer.Option(hidden=True)] = None,
    forward_fn: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Measure the peak memory of a repair under budgets."""
    if child is not None:
        print(json.dumps(one(child, count, forward_fn)))
        return
    rows = []
    for way, budget in product(("--no-forward-fn", "--forward-fn"), budgets):
        command = [sys.executable, __file__, "--child", budget, "--images", str(count), way]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        console.print({k: v for k, v in rows[-1].items() if k != "result"})
    same = len({(row["walk"], row["result"]) for row in rows}) == len({row["walk"] for row in rows})
    write(output, {**machine(), "images": count, "same bits": same, "rows": rows}, markdown(rows))
    sys.exit(0 if same else "the results differ")


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table in the docs: a row for each walk and budget."""
    lines = []
    for row in rows:
        grew, share = f"{row['grew_by'] / 2**20:,.0f} MiB", f"{row['grew_by'] / row['budget']:.0%}"
        spilled, seconds = f"{row['scratch'] / 2**30:.1f} GiB", f"{row['seconds']:.0f}"
        lines.append([row["walk"], row["memory"], grew, share, spilled, seconds])
    return markdown_table(["walk", "memory=", "grew by", "of the budget", "through scratch", "seconds"], lines)


if __name__ == "__main__":
    typer.run(main)
