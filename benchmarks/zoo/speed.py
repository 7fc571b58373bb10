"""Whole repairs of a network against bare forward passes, hooks and `update_bn`, in the same run."""

from __future__ import annotations

import copy
import resource
import statistics
import time
from collections.abc import Callable
from itertools import pairwise, product
from typing import Any

import torch
from repair import plain_hooks
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import resuscitate

JOBS = ("sequential ASR", "exact BatchNorm")


def measured(run: Callable[[], Any], device: torch.device) -> tuple[Any, float, int]:
    """What it returns, its seconds, and the peak memory: on a GPU that of the call, else that of the process so far."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
        return result, time.perf_counter() - started, torch.cuda.max_memory_allocated()
    return result, time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forwards(images: Tensor, batch_size: int, *models: nn.Module) -> None:
    """Nothing but the forward passes."""
    with torch.no_grad():
        for model, batch in product(models, images.split(batch_size)):
            model(batch)


def candidates(job: str, dense: nn.Module, batch_size: int, **options: Any) -> dict[str, Callable[..., Any]]:
    """Ours first: what to do to a pruned model with the images."""
    quiet: dict[str, Any] = {"batch_size": batch_size, "progress": False, **options}
    if job == "sequential ASR":
        return {
            "ours": lambda model, x: resuscitate.repair(model, dense, x, method="asr", **quiet),
            "bare forwards": lambda model, x: forwards(x, batch_size, dense, model),
            "hooks": lambda model, x: plain_hooks(model, dense, x, batch_size),
        }
    return {
        "ours": lambda model, x: resuscitate.recalibrate_batchnorm(model, x, **quiet),
        "bare forwards": lambda model, x: forwards(x, batch_size, model),
        "update_bn": lambda model, x: update_bn(x.split(batch_size), model),
    }


def race(
    runs: dict[str, Callable[..., Any]], sparse: nn.Module, images: Tensor, batch_size: int, rounds: int
) -> dict[str, Any]:
    """Medians of all candidates, timed in turn in every round; the hooks, which take minutes, once."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    peaks: dict[str, int] = {}
    for run in runs.values():
        run(copy.deepcopy(sparse), images[:batch_size])  # warm
    for turn, (name, run) in product(range(rounds), runs.items()):
        if name != "hooks" or not turn:
            model = copy.deepcopy(sparse)
            _, took, peaks[name] = measured(lambda run=run, model=model: run(model, images), images.device)
            seconds[name].append(took)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    rate, share = len(images) / medians["ours"], medians["bare forwards"] / medians["ours"]
    found = {"seconds": medians, "rounds": seconds, "peak_bytes": peaks}
    return {**found, "images_per_s": rate, "share_of_bare_forwards": share}


def markdown(rows: list[dict[str, Any]]) -> str:
    """Seconds of ours, images per second, and each peer's time over ours."""
    lines = []
    for job in dict.fromkeys(row["job"] for row in rows):
        mine = [row for row in rows if row["job"] == job]
        peers = [name for name in mine[0]["seconds"] if name != "ours"]
        heads = ["ours, s", "images per second", *(f"{peer}, times ours" for peer in peers), "peak memory"]
        lines += [f"| {job} | {' | '.join(heads)} |", "|" + " --- |" * (1 + len(heads))]
        for row in mine:
            ours = row["seconds"]["ours"]
            ratios = [f"{row['seconds'][peer] / ours:.2f}" if peer in row["seconds"] else "" for peer in peers]
            peak = f"{row['peak_bytes']['ours'] / 2**20:,.0f} MiB"
            cells = [f"{ours:.2f}", f"{row['images_per_s']:,.0f}", *ratios, peak]
            lines.append(f"| {row['net']}, {row['images']:,} images | {' | '.join(cells)} |")
        lines.append("")
        for net in dict.fromkeys(row["net"] for row in mine):
            sizes = sorted((row for row in mine if row["net"] == net), key=lambda row: row["images"])
            for few, many in pairwise(sizes):
                growth = many["seconds"]["ours"] / few["seconds"]["ours"]
                times = f"{many['images'] / few['images']:.0f} times {few['images']:,} images"
                lines.append(f"- {net}, {job}: {times} take {growth:.1f} times as long.")
        lines.append("")
    return "\n".join(lines)
