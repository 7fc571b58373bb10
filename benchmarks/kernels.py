"""The Triton kernels on a GPU, and a whole repair on it, against what PyTorch offers: `make gpu` runs this file.

    python benchmarks/kernels.py [--seconds 100] [--only kernels|repair] [--output results/gpu.json]

Kernels: with a cold L2 (a gigabyte is written before every call), median with 20th and 80th percentiles; GB/s counts
each tensor read once and each written once; beside it the share of a device-to-device copy measured in the same run.
Peers, in the same dtype: eager PyTorch, and the same formula through torch.compile (Inductor), for as many cases as
`--seconds` allow. Ours is held against float64 first, and no ratio is given where it is wrong.

Repair: sequential ASR and exact BatchNorm on a ResNet-50 of random weights, 4,096 images of 224x224, against its bare
forward passes and against `update_bn`.

Writes a .json, a .md and a .png (bytes against time). `--dry-run` does all of it on a CPU, on tiny tensors in Triton's
interpreter, to see that it works: its figures mean nothing.
"""

from __future__ import annotations

import os
import sys

if "--dry-run" in sys.argv:  # read when Triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

import copy
import json
import shlex
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import triton
import typer
from common import RESULTS, machine
from gpu_report import draw, markdown, missed, show
from torch import Tensor, nn
from zoo import resnet50

import asr_kernels as ak
import resuscitate

STAGES = [(64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7)]
SHAPES = [
    (4, 128, 1024, 1024),
    (20, 6, 65536, 1),
    *((batch, c, size, size) for batch in (256, 64) for c, size in STAGES),
]
TINY = [(32, 4, 7, 7), (2, 3, 64, 1)]
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
AXES = (0, 2, 3)
TOLERANCE = 1e-5  # of a statistic, the deviation being 1

Candidates = dict[str, Callable[[], Any]]


class Case(NamedTuple):
    """Two correlated activations and a correction of the first under which it stays bounded."""

    x: Tensor
    y: Tensor
    gain: Tensor
    shift: Tensor


def make_case(shape: tuple[int, ...], layout: str, dtype: str, device: str) -> Case:
    """The same numbers each time; a mean of one standard deviation."""
    torch.manual_seed(0)
    x, noise = (torch.randn(shape, device=device) for _ in range(2))
    gain, shift = torch.rand(2, shape[1], device=device)
    pair = (x + 1, 0.6 * x + 0.8 * noise + 1)
    x, y = (t.to(DTYPES[dtype], memory_format=LAYOUTS[layout]) for t in pair)
    return Case(x, y, 0.4 + 0.5 * gain, 0.5 + shift)


def var_mean(x: Tensor) -> tuple[Tensor, ...]:
    """Mean and variance."""
    return torch.var_mean(x, AXES, correction=0)[::-1]


def pair_eager(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Means, variances and the covariance."""
    (var_x, mean_x), (var_y, mean_y) = (torch.var_mean(t, AXES, correction=0, keepdim=True) for t in (x, y))
    return tuple(t.flatten() for t in (mean_x, var_x, mean_y, var_y, ((x - mean_x) * (y - mean_y)).mean(AXES)))


def affine_eager(x: Tensor, gain: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
    """In place, factors of x's own dtype."""
    return (x.mul_(gain).add_(shift),)


def moments(case: Case) -> tuple[Candidates, Callable[..., Any], tuple[Tensor, ...]]:
    """Ours and eager peers, the formula for Inductor and its arguments."""
    x = case.x

    def ours() -> tuple[Tensor, ...]:
        found = ak.channel_moments(x)
        return found.mean, found.m2 / found.count

    peers: Candidates = {"ours": ours, "eager": lambda: var_mean(x)}
    if x.is_cuda:
        peers["batch_norm_stats"] = lambda: torch.batch_norm_stats(x, 0.0)
    return peers, var_mean, (x,)


def paired(case: Case) -> tuple[Candidates, Callable[..., Any], tuple[Tensor, ...]]:
    """The same for pairs."""
    x, y = case.x, case.y

    def ours() -> tuple[Tensor, ...]:
        pair = ak.paired_moments(x, y)
        return pair.dense.mean, pair.dense.var, pair.pruned.mean, pair.pruned.var, pair.cov

    return {"ours": ours, "eager": lambda: pair_eager(x, y)}, pair_eager, (x, y)


def affine(case: Case) -> tuple[Candidates, Callable[..., Any], tuple[Tensor, ...]]:
    """The same for the correction in place."""
    x = case.x
    g, b = (t.to(x.dtype)[:, None, None] for t in (case.gain, case.shift))
    peers: Candidates = {
        "ours": lambda: (ak.affine_(x, case.gain, case.shift),),
        "eager": lambda: affine_eager(x, g, b),
        "addcmul": lambda: (torch.addcmul(b, x, g, out=x),),
    }
    return peers, affine_eager, (x, g, b)


OPERATIONS = {"moments": (moments, 1), "paired": (paired, 2), "affine": (affine, 2)}  # tensors moved


def is_right(operation: str, case: Case) -> bool:
    """Ours against float64."""
    before = case.x.clone(memory_format=torch.preserve_format)
    found = OPERATIONS[operation][0](case)[0]["ours"]()
    if operation == "affine":
        truth = affine_eager(before.double(), *(t.double()[:, None, None] for t in (case.gain, case.shift)))
        tolerance = torch.finfo(before.dtype).eps
    else:
        truth = pair_eager(before.double(), case.y.double()) if operation == "paired" else var_mean(before.double())
        tolerance = TOLERANCE
    return all(bool(((a - b).abs() <= tolerance * (1 + b.abs())).all()) for a, b in zip(found, truth, strict=True))


class Clock:
    """Times calls with a cold L2; on a CPU, just times them."""

    def __init__(self, device: str, rounds: int) -> None:
        self.cuda, self.rounds = device == "cuda", rounds
        # long enough to write that the launches that follow are in the queue when it ends
        self.flush = torch.empty((1 << 30) // 4 if self.cuda else 1, dtype=torch.int32, device=device)

    def milliseconds(self, call: Callable[[], Any]) -> list[float]:
        """20th percentile, median, 80th percentile."""
        for _ in range(3):
            call()
        if not self.cuda:
            times = []
            for _ in range(self.rounds):
                started = time.perf_counter()
                call()
                times.append(1e3 * (time.perf_counter() - started))
        else:
            events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self.rounds)]
            for start, stop in events:
                self.flush.zero_()
                start.record()
                call()
                stop.record()
            torch.cuda.synchronize()
            times = [start.elapsed_time(stop) for start, stop in events]
        return [times[round(q * (len(times) - 1))] for times in [sorted(times)] for q in (0.2, 0.5, 0.8)]


def measure_kernels(
    device: str, shapes: list[tuple[int, ...]], clock: Clock, seconds: float
) -> Iterator[dict[str, Any]]:
    """One row for each operation and case; Inductor while there is time."""
    deadline = time.monotonic() + seconds
    cases = [(s, layout, d) for s in shapes for layout in LAYOUTS for d in DTYPES if s[3] > 1 or layout == "NCHW"]
    for shape, layout, dtype in sorted(cases, key=lambda case: case[1]):
        case = make_case(shape, layout, dtype, device)
        for operation, (build, tensors) in OPERATIONS.items():
            right = is_right(operation, case)
            candidates, formula, arguments = build(case)
            if device == "cuda" and time.monotonic() < deadline:
                torch._dynamo.reset()
                compiled = torch.compile(formula)
                candidates["inductor"] = lambda f=compiled, a=arguments: f(*a)
            times = {name: clock.milliseconds(call) for name, call in candidates.items()}
            moved = tensors * case.x.numel() * case.x.element_size()
            ours = times["ours"][1]
            row = {"operation": operation, "shape": shape, "layout": layout, "dtype": dtype, "right": right}
            row |= {"bytes": moved, "ms_p20_p50_p80": times, "gb_per_s": moved / ours / 1e6}
            ratios = {name: t[1] / ours for name, t in times.items() if name != "ours"}
            yield {**row, "speedup": ratios if right else None}


def measure_repair(device: str, count: int, size: int, width: int, batch: int) -> list[dict[str, Any]]:
    """Seconds for whole jobs and for the forward passes that they need."""
    torch.manual_seed(0)
    dense = resnet50(width=width).to(device).eval()
    images = torch.randn(count, 3, size, size, device=device)
    resuscitate.recalibrate_batchnorm(dense, images[:batch], progress=False)
    pruned = copy.deepcopy(dense)
    resuscitate.sparsify(pruned, 0.8)
    quiet: dict[str, Any] = {"batch_size": batch, "progress": False}

    @torch.no_grad()
    def forwards(model: nn.Module, *models: nn.Module) -> None:
        for net in (model, *models):
            for part in images.split(batch):
                net(part)

    jobs: dict[str, dict[str, Callable[[nn.Module], Any]]] = {
        "sequential ASR": {
            "ours": lambda model: resuscitate.repair(model, dense, images, method="asr", **quiet),
            "bare forwards": lambda model: forwards(model, dense),
        },
        "exact BatchNorm": {
            "ours": lambda model: resuscitate.recalibrate_batchnorm(model, images, **quiet),
            "bare forwards": forwards,
            "update_bn": lambda model: torch.optim.swa_utils.update_bn(images.split(batch), model),
        },
    }
    rows = []
    for job, runs in jobs.items():
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        peaks: dict[str, int] = {}
        for turn in range(3):
            for name, run in runs.items():
                model = copy.deepcopy(pruned)
                if device == "cuda":
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                started = time.perf_counter()
                run(model)
                if device == "cuda":
                    torch.cuda.synchronize()
                    peaks[name] = torch.cuda.max_memory_allocated()
                if turn:  # the first compiles and warms
                    seconds[name].append(time.perf_counter() - started)
        medians = {name: statistics.median(found) for name, found in seconds.items()}
        rows.append({"job": job, "images": count, "size": size, "seconds": medians, "peak_bytes": peaks})
    return rows


def copy_speed(clock: Clock, device: str) -> float:
    """GB/s of a device-to-device copy, bytes read and written."""
    source = torch.empty(1 << (30 if device == "cuda" else 20), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / clock.milliseconds(lambda: target.copy_(source))[1] / 1e6


def main(
    seconds: Annotated[float, typer.Option(help="How long new cases may be compiled by Inductor.")] = 100,
    rounds: Annotated[int, typer.Option(help="Calls of each candidate.")] = 30,
    only: Annotated[str, typer.Option(help="kernels, repair, or both.")] = "both",
    dry_run: Annotated[bool, typer.Option(help="On a CPU, tiny, in the interpreter: does it run?")] = False,
    output: Annotated[Path, typer.Option(help="The .json; .md and .png go beside it.")] = RESULTS / "gpu.json",
) -> None:
    """Measure on this machine's GPU."""
    if not dry_run and not torch.cuda.is_available():
        sys.exit("no GPU that PyTorch can use; --dry-run tries this file out without one")
    device = "cpu" if dry_run else "cuda"
    clock = Clock(device, 2 if dry_run else rounds)
    copied = copy_speed(clock, device)
    rows: list[dict[str, Any]] = []
    repairs: list[dict[str, Any]] = []
    with ak.use_backend("triton"):
        if only != "repair":
            for row in measure_kernels(device, TINY if dry_run else SHAPES, clock, seconds):
                rows.append(row)
                print(*(row[key] for key in ("operation", "shape", "layout", "dtype")), file=sys.stderr, flush=True)
    if only != "kernels":
        repairs = measure_repair(device, *((4, 32, 4, 2) if dry_run else (4096, 224, 64, 64)))
    about = machine(shlex.join(["python", "benchmarks/kernels.py", *sys.argv[1:]]))
    about["versions"] |= {"triton": triton.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}
    about |= {"gpu": torch.cuda.get_device_name() if device == "cuda" else None, "copy_gb_per_s": copied}
    title = f"{about['gpu'] or 'a dry run: these figures mean nothing'}, a copy at {copied:.0f} GB/s, {about['date']}"
    show(rows, repairs, copied, title)
    lacking = [] if dry_run else missed(rows, repairs, copied)
    for line in lacking:
        print("missed:", line)
    output.write_text(json.dumps({**about, "rows": rows, "repairs": repairs, "missed": lacking}, indent=1) + "\n")
    output.with_suffix(".md").write_text(markdown(rows, repairs, copied))
    with suppress(ImportError):
        if rows:
            draw(rows, copied, output.with_suffix(".png"))
    if any(not row["right"] for row in rows):
        sys.exit("a kernel is wrong; the figures above are worth nothing")


if __name__ == "__main__":
    typer.run(main)
