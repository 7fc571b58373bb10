"""Peak memory of a repair under a budget: `make bench-memory`, or this file.

ResNet-20 and 20,000 images from a loader that makes each batch anew, so that the repair has to keep them: 0.25 GB of
images, and up to 2.6 GB of activations at a time. Each budget runs in a process of its own; the peak is what the
process's resident memory grew by during the repair (Linux), beside the same repair without a budget to speak of.
Checks that the budget changes no bit of the result. Writes memory.json and memory.md (the table in docs/walk.md).
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read once, when torch loads its OpenMP runtime

import hashlib
import json
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import RESULTS, machine, pruned_copy
from rich.console import Console
from torch import Tensor, nn

import resuscitate
from resuscitate.models import resnet20
from resuscitate.runtime.activations import parse_memory
from resuscitate.runtime.heap import resident_memory

BATCH = 128


def images(count: int) -> Iterator[Tensor]:
    """Batches of noise, made when they are asked for."""
    generator = torch.Generator().manual_seed(0)
    for begin in range(0, count, BATCH):
        yield torch.randn(min(BATCH, count - begin), 3, 32, 32, generator=generator)


def run_batch(model: nn.Module, batch: Tensor) -> Tensor:
    """A `forward_fn`, which hides the network's graph."""
    return model(batch)


def one(memory: str, count: int, forward_fn: bool) -> dict[str, Any]:
    """Repair under one budget; how far memory grew. forward_fn: by suspended passes, not by a graph."""
    options: dict[str, Any] = {"forward_fn": run_batch} if forward_fn else {}
    torch.manual_seed(0)
    dense = resnet20().eval()
    resuscitate.recalibrate_batchnorm(dense, list(images(512)))
    pruned = pruned_copy(dense)
    # what torch sets up once
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
        "scratch": report.scratch,
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
        Console(stderr=True).print({k: v for k, v in rows[-1].items() if k != "result"})
    same = len({(row["walk"], row["result"]) for row in rows}) == len({row["walk"] for row in rows})
    header = "| walk | memory= | grew by | of the budget | through scratch | seconds |"
    lines = [header, "| --- " * 6 + "|"]
    for row in rows:
        grew, share = f"{row['grew_by'] / 2**20:,.0f} MiB", f"{row['grew_by'] / row['budget']:.0%}"
        cells = [row["walk"], row["memory"], grew, share, f"{row['scratch'] / 2**30:.1f} GiB", f"{row['seconds']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    about = machine(shlex.join(["python", "benchmarks/memory.py", *sys.argv[1:]]))
    output.write_text(json.dumps({**about, "images": count, "same bits": same, "rows": rows}, indent=1) + "\n")
    output.with_suffix(".md").write_text("\n".join(lines) + "\n")
    sys.exit(0 if same else "the results differ")


if __name__ == "__main__":
    typer.run(main)
