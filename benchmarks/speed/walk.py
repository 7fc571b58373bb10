"""The cost of the walk in cases that `repair.py` does not time: `make bench-walk`, or this file.

Networks that torch.fx cannot trace, against their bare forward passes: the ResNet-50 of transformers (left out without
transformers), 64 images of 64x64, and 26 layers behind a `forward_fn`, 512 images of 32x32; random weights, 80 %
sparsity, a sequential ASR.

Both walks on networks that torch.fx can trace: ResNet-20 and ResNet-56, 512 images of 32x32, and ResNet-50, 64 images
of 64x64; random weights, a sequential ASR.

Forward passes alone, over sizes of images and batches, on one and on all cores: one pass at a time with all cores in
each operator, or several passes at a time with one core each.

Page faults: a sequential ASR of ResNet-50, random weights, 64 images of 224x224, with malloc as the walk sets it and
with malloc's defaults (the walk does not set malloc if a variable MALLOC_* is set), each in its own process.

Threads and malloc have their defaults; the candidates of a row alternate in every round; medians. Writes walk.json and
walk.md (the tables in docs/walk.md).
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in (".", "python")]  # this checkout

import resuscitate
from benchmarks.common.inputs import pruned_copy
from benchmarks.common.results import RESULTS, console, machine, markdown_table, write
from benchmarks.common.timing import forwards, medians, ratios, run_batch
from benchmarks.networks import resnet50
from resuscitate.engine.measure import measure
from resuscitate.models import ResNet, resnet20, resnet56
from resuscitate.network.runner import Network
from tests.outside.networks import package


def networks() -> dict[str, tuple[nn.Module, list[Any]]]:
    """Networks that torch.fx cannot trace, by name, with their batches."""
    torch.manual_seed(0)
    found: dict[str, tuple[nn.Module, list[Any]]] = {}
    try:
        with contextlib.suppress(ImportError):
            package("torchvision")  # before transformers, which imports torchvision if it is installed
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


def seconds_of(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each candidate; the candidates alternate in every round, after a call that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _, (name, run) in product(range(rounds), runs.items()):
        started = time.perf_counter()
        run()
        seconds[name].append(time.perf_counter() - started)
    return medians(seconds)


def compare(name: str, dense: nn.Module, batches: list[Any], rounds: int) -> dict[str, Any]:
    """Seconds of a repair and of the bare forward passes of both networks."""
    pruned, walks = pruned_copy(dense), set[str]()

    def ours() -> None:
        options: dict[str, Any] = {"method": "asr", "forward_fn": run_batch, "progress": False}
        walks.add(resuscitate.repair(copy.deepcopy(pruned), dense, batches, **options).walk)

    runs = {"ours": ours, "bare forwards": partial(forwards, batches, dense, pruned)}
    seconds = seconds_of(runs, rounds)
    row = {"network": name, "walk": walks.pop(), "seconds": seconds, "ratio": ratios(seconds)}
    console.print(row)
    return row


def both(rounds: int) -> list[dict[str, Any]]:
    """Seconds of a sequential ASR by the graph walk, by the suspended walk, and of the bare forward passes."""
    rows = []
    for make, count, size, batch in ((resnet20, 512, 32, 128), (resnet56, 512, 32, 128), (resnet50, 64, 64, 16)):
        dense, batches = make().eval(), list(torch.randn(count, 3, size, size).split(batch))
        resuscitate.recalibrate_batchnorm(dense, batches, progress=False)

        def ours(forward_fn: Any, dense: nn.Module, pruned: nn.Module, batches: list[Tensor]) -> None:
            options: dict[str, Any] = {"method": "asr", "forward_fn": forward_fn, "progress": False}
            resuscitate.repair(copy.deepcopy(pruned), dense, batches, **options)

        pruned = pruned_copy(dense)
        models = {"dense": dense, "pruned": pruned, "batches": batches}
        runs = {
            "bare forwards": partial(forwards, batches, dense, pruned),
            "by the graph": partial(ours, None, **models),
            "by suspended passes": partial(ours, run_batch, **models),
        }
        name = f"{make.__name__}, {count} images of {size}x{size}, batches of {batch}"
        rows.append({"network": name, **seconds_of(runs, rounds)})
        console.print(rows[-1])
    return rows


def curve(rounds: int) -> list[dict[str, Any]]:
    """Seconds of the forward passes of one network, one pass at a time or one pass per core."""
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
            found = seconds_of(runs, rounds)
            rows.append(
                {"network": make.__name__, "size": size, "images": images, "batch": batch, "cores": threads, **found}
            )
            console.print(rows[-1])
        torch.set_num_threads(cores)
    return rows


def beside(net: Network, batches: list[Tensor]) -> None:
    """All forward passes, several at a time, as the walk runs them."""
    measure(net, batches, [])


def page_faults() -> dict[str, float]:
    """Seconds, system seconds and page faults of the second repair in this process, on large images."""
    torch.manual_seed(0)
    dense, images = resnet50().eval(), torch.randn(64, 3, 224, 224)
    pruned, found = pruned_copy(dense), dict[str, float]()
    for _ in range(2):
        before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        resuscitate.repair(copy.deepcopy(pruned), dense, images, method="asr", batch_size=32, progress=False)
        after, seconds = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter() - started
        system, faults = after.ru_stime - before.ru_stime, after.ru_minflt - before.ru_minflt
        found = {"seconds": seconds, "system seconds": system, "page faults": faults}
    return found


def heaps(rounds: int) -> dict[str, dict[str, float]]:
    """Medians of `page_faults`, with malloc as the walk sets it and with malloc's defaults."""
    settings = {"as the walk sets it": {}, "as it comes": {"MALLOC_ARENA_TEST": "8"}}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in settings}
    for _ in range(rounds):
        for name, setting in settings.items():
            command = [sys.executable, __file__, "--faults"]
            ended = subprocess.run(command, env=os.environ | setting, check=True, capture_output=True, text=True)
            found[name].append(json.loads(ended.stdout))
    console.print(found)
    return {n: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for n, runs in found.items()}


def markdown(
    rows: list[dict[str, Any]],
    walks: list[dict[str, Any]],
    points: list[dict[str, Any]],
    faults: dict[str, dict[str, float]],
) -> str:
    """The tables in the docs."""
    untraced = [
        [row["network"], f"{row['seconds']['ours']:.2f}", f"{row['ratio']['ours / bare forwards']:.2f}"] for row in rows
    ]
    traced = []
    for row in walks:
        bare, graph, passes = (row[key] for key in ("bare forwards", "by the graph", "by suspended passes"))
        traced.append([row["network"], f"{bare:.2f}", f"{graph / bare:.2f}", f"{passes / bare:.2f}"])
    alone = []
    for point in points:
        first, second, size = point["one pass at a time"], point["one pass a core"], point["size"]
        name = f"{point['network']}, {point['images']} images of {size}x{size}, batch {point['batch']}"
        alone.append([name, str(point["cores"]), f"{first:.2f}", f"{second:.2f}", f"{second / first:.2f}"])
    heaps = [
        [name, f"{each['seconds']:.1f}", f"{each['system seconds']:.1f}", f"{each['page faults']:,.0f}"]
        for name, each in faults.items()
    ]
    tables = [
        markdown_table(["network", "ours, s", "ours / bare forwards"], untraced),
        markdown_table(["network", "bare forwards, s", "graph / bare", "suspended / bare"], traced),
        markdown_table(["forward passes", "cores", "one at a time, s", "one a core, s", "ratio"], alone),
        markdown_table(["malloc", "seconds", "system seconds", "page faults"], heaps),
    ]
    return "\n".join(tables)


def main(
    rounds: Annotated[int, typer.Option(help="Rounds.")] = 5,
    output: Annotated[Path, typer.Option(help="The .json; .md goes beside it.")] = RESULTS / "walk.json",
    faults: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Time both walks and bare forward passes."""
    if faults:
        print(json.dumps(page_faults()))
        return
    rows = [compare(name, dense, batches, rounds) for name, (dense, batches) in networks().items()]
    walks, points, by_heap = both(rounds), curve(rounds), heaps(max(rounds // 2, 1))
    found = {**machine(), "rows": rows, "walks": walks, "curve": points, "malloc": by_heap}
    write(output, found, markdown(rows, walks, points, by_heap))


if __name__ == "__main__":
    typer.run(main)
