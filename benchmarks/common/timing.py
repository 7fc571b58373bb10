"""Times of whole repairs and of their peers: bare forward passes, plain hooks, `update_bn`."""

from __future__ import annotations

import copy
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import resuscitate
from benchmarks.common.plain_hooks import plain_hooks

JOBS = ("sequential ASR", "exact BatchNorm")
# names of variables that set threads or malloc begin with these
SETS = ("OMP_", "GOMP_", "KMP_", "MKL_", "MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
Run = Callable[[nn.Module, Tensor], Any]  # changes a pruned network in place, with the images


def run_batch(model: nn.Module, batch: Any) -> Any:
    """A `forward_fn`. With a `forward_fn` a network is walked by suspended passes, not by its graph."""
    return model(**batch) if isinstance(batch, dict) else model(batch)


@torch.no_grad()
def forwards(batches: Iterable[Any], *models: nn.Module) -> None:
    """The forward passes of each network over all batches, and nothing else."""
    for model, batch in product(models, batches):
        run_batch(model, batch)


def candidates(dense: nn.Module, batch_size: int, **options: Any) -> dict[str, dict[str, Run]]:
    """For each of `JOBS`, its candidates by name, ours first. options: of our repairs."""
    quiet: dict[str, Any] = {"batch_size": batch_size, "progress": False, **options}
    return {
        "sequential ASR": {
            "ours": lambda model, x: resuscitate.repair(model, dense, x, method="asr", **quiet),
            "bare forwards": lambda model, x: forwards(x.split(batch_size), dense, model),
            "hooks": lambda model, x: plain_hooks(model, dense, x, batch_size),
        },
        "exact BatchNorm": {
            "ours": lambda model, x: resuscitate.recalibrate_batchnorm(model, x, **quiet),
            "bare forwards": lambda model, x: forwards(x.split(batch_size), model),
            "update_bn": lambda model, x: update_bn(x.split(batch_size), model),
        },
    }


def in_own_process(script: str, *options: Any, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What a script writes as JSON to its --output, from a process whose threads and malloc only `environment` sets."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(SETS)}
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        line = [sys.executable, script, *map(str, options), "--output", str(found)]
        subprocess.run(line, env=kept | dict(environment or {}), check=True)
        return json.loads(found.read_text())


def measured(run: Callable[[], Any], device: torch.device) -> tuple[Any, float, int]:
    """The result of a call, its seconds, and the peak memory in bytes: on a GPU of the call, else of the process."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
        return result, time.perf_counter() - started, torch.cuda.max_memory_allocated()
    return result, time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def race(
    runs: dict[str, Run], pruned: nn.Module, images: Tensor, rounds: int, *, warm_up: int, slow_rounds: int
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of each candidate in each round, and its peak memory in bytes; the candidates alternate.

    Each call gets its own copy of the pruned network, made outside the clock. Before the first round each candidate is
    called once on the first `warm_up` images. Candidates with "hooks" in their name take minutes: they are timed in the
    first `slow_rounds` rounds only, and left out if there are none.
    """
    runs = {name: run for name, run in runs.items() if slow_rounds or "hooks" not in name}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    peaks: dict[str, int] = {}
    for run in runs.values():
        run(copy.deepcopy(pruned), images[:warm_up])
    for turn, (name, run) in product(range(rounds), runs.items()):
        if turn < slow_rounds or "hooks" not in name:
            model = copy.deepcopy(pruned)
            _, took, peaks[name] = measured(lambda run=run, model=model: run(model, images), images.device)
            seconds[name].append(took)
    return seconds, peaks


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    """The median of each candidate."""
    return {name: statistics.median(found) for name, found in seconds.items()}


def ratios(seconds: dict[str, float]) -> dict[str, float]:
    """Our seconds over those of the bare forward passes; the seconds of each other peer over ours."""
    bare = {k: v for k, v in seconds.items() if k.startswith("bare")}
    found = {f"ours / {peer}": seconds["ours"] / value for peer, value in bare.items()}
    return found | {f"{k} / ours": v / seconds["ours"] for k, v in seconds.items() if k not in ("ours", *bare)}
