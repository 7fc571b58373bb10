"""The Triton kernels and a whole repair on a GPU against PyTorch: `make gpu` runs this file.

    python benchmarks/speed/kernels.py [--seconds 100] [--only kernels|repair] [--output results/gpu.json]

Kernels: with a cold L2 (a gigabyte is written before every call), median with 20th and 80th percentiles. GB/s counts
each tensor that is read and each that is written once; the table also has the share of the speed of a device-to-device
copy. Peers, in the same dtype: eager PyTorch, and the same formula compiled by torch.compile (Inductor) for as many
cases as `--seconds` allow. Our result is first compared with float64; a wrong result gets no ratio.

Second moments for a refit, "refit 3x3" and "refit 1x1": layers of a ResNet-50, against the same function in PyTorch,
which copies patches and multiplies in IEEE float32. GB/s counts input and output once; the bound here is arithmetic.

Repair: sequential ASR and exact BatchNorm on a ResNet-50 of random weights, 4,096 images of 224x224, against its bare
forward passes and against `update_bn`.

Writes a .json, a .md and a .png (bytes against time). `--dry-run` runs everything on a CPU, on tiny tensors in Triton's
interpreter, as a test: its figures mean nothing.
"""

from __future__ import annotations

import os
import sys

if "--dry-run" in sys.argv:  # read when Triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in (".", "python")]  # this checkout

import asr_kernels as ak
import resuscitate
from benchmarks.common.inputs import pruned_copy
from benchmarks.common.results import RESULTS, machine, write
from benchmarks.common.timing import candidates, medians, race
from benchmarks.networks import resnet50
from benchmarks.speed.gpu_report import draw, markdown, missed, show

STAGES = [(64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7)]
SHAPES = [
    (4, 128, 1024, 1024),
    (20, 6, 65536, 1),
    *((batch, c, size, size) for batch in (256, 64) for c, size in STAGES),
]
# inputs of the 3x3 layers of a ResNet-50
PATCHES = [(64, 64, 56, 56), (64, 128, 28, 28), (64, 256, 14, 14), (64, 512, 7, 7)]
TINY = [(32, 4, 7, 7), (2, 3, 64, 1)]
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
AXES = (0, 2, 3)
TOLERANCE = 1e-5  # of a statistic, at a standard deviation of 1

Candidates = dict[str, Callable[[], Any]]


class Case(NamedTuple):
    """Two correlated activations (N, C, H, W), and a gain and a shift (C,) whose repeated use on x stays bounded."""

    x: Tensor
    y: Tensor
    gain: Tensor
    shift: Tensor


def make_case(shape: tuple[int, ...], layout: str, dtype: str, device: str) -> Case:
    """Standard deviation 1 and mean 1; from a fixed seed."""
    torch.manual_seed(0)
    x, noise = (torch.randn(shape, device=device) for _ in range(2))
    gain, shift = torch.rand(2, shape[1], device=device)
    pair = (x + 1, 0.6 * x + 0.8 * noise + 1)
    x, y = (t.to(DTYPES[dtype], memory_format=LAYOUTS[layout]) for t in pair)
    return Case(x, y, 0.4 + 0.5 * gain, 0.5 + shift)


def var_mean(x: Tensor) -> tuple[Tensor, ...]:
    """Mean and variance of each channel."""
    return torch.var_mean(x, AXES, correction=0)[::-1]


def pair_eager(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Means, variances and the covariance of each channel."""
    (var_x, mean_x), (var_y, mean_y) = (torch.var_mean(t, AXES, correction=0, keepdim=True) for t in (x, y))
    return tuple(t.flatten() for t in (mean_x, var_x, mean_y, var_y, ((x - mean_x) * (y - mean_y)).mean(AXES)))


def affine_eager(x: Tensor, gain: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
    """In place, with gain and shift in the dtype of x."""
    return (x.mul_(gain).add_(shift),)


def moments(case: Case) -> tuple[Candidates, Callable[..., Any], tuple[Tensor, ...]]:
    """Moments: our kernel and the eager peers, the formula for Inductor, the arguments of the formula."""
    x = case.x

    def ours() -> tuple[Tensor, ...]:
        found = ak.channel_moments(x)
        return found.mean, found.m2 / found.count

    peers: Candidates = {"ours": ours, "eager": lambda: var_mean(x)}
    if x.is_cuda:
        peers["batch_norm_stats"] = lambda: torch.batch_norm_stats(x, 0.0)
    return peers, var_mean, (x,)


def paired(case: Case) -> tuple[Candidates, Callable[..., Any], tuple[Tensor, ...]]:
    """Paired moments: as `moments`."""
    x, y = case.x, case.y

    def ours() -> tuple[Tensor, ...]:
        pair = ak.paired_moments(x, y)
        return pair.dense.mean, pair.dense.var, pair.pruned.mean, pair.pruned.var, pair.cov

    return {"ours": ours, "eager": lambda: pair_eager(x, y)}, pair_eager, (x, y)


def affine(case: Case) -> tuple[Candidates, Callable[..., Any], tuple[Tensor, ...]]:
    """Gain and shift in place: as `moments`."""
    x = case.x
    g, b = (t.to(x.dtype)[:, None, None] for t in (case.gain, case.shift))
    peers: Candidates = {
        "ours": lambda: (ak.affine_(x, case.gain, case.shift),),
        "eager": lambda: affine_eager(x, g, b),
        "addcmul": lambda: (torch.addcmul(b, x, g, out=x),),
    }
    return peers, affine_eager, (x, g, b)


# with the number of tensors that are read or written
OPERATIONS = {"moments": (moments, 1), "paired": (paired, 2), "affine": (affine, 2)}


def is_right(operation: str, case: Case) -> bool:
    """Does our kernel agree with float64?"""
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
    """Times calls, on a GPU with a cold L2."""

    def __init__(self, device: str, rounds: int) -> None:
        self.cuda, self.rounds = device == "cuda", rounds
        # writing it takes so long that the next launches are queued before it ends
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
    """One row for each operation and case; cases are compiled by Inductor until `seconds` have passed."""
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


def measure_patches(device: str, shapes: list[tuple[int, ...]], clock: Clock) -> Iterator[dict[str, Any]]:
    """One row for each layer and case: `patch_moments` in Triton against PyTorch's products; few on a CPU."""
    dtypes = DTYPES if device == "cuda" else ["fp32"]
    layouts = LAYOUTS if device == "cuda" else ["NCHW"]
    for shape, layout, dtype, size in product(shapes, layouts, dtypes, (3, 1)):
        x, y, *_ = make_case(shape, layout, dtype, device)
        window = ak.Window((size, size), (1, 1), ((size // 2, size // 2),) * 2, (1, 1))

        def on(backend: ak.backends.Backend, x: Tensor = x, y: Tensor = y, window: ak.Window = window) -> Any:
            with ak.use_backend(backend):
                return ak.patch_moments(x, y, window)

        found, truth = on("triton"), on("reference")
        scale = truth.xx.abs().max()
        right = all(
            bool(((a - b).abs() <= TOLERANCE * scale).all()) for a, b in ((found.xx, truth.xx), (found.xy, truth.xy))
        )
        del found, truth
        calls: Candidates = {"ours": lambda call=on: call("triton"), "eager": lambda call=on: call("torch")}
        times = {name: clock.milliseconds(call) for name, call in calls.items()}
        moved, ours = x.nbytes + y.nbytes, times["ours"][1]
        row = {"operation": f"refit {size}x{size}", "shape": shape, "layout": layout, "dtype": dtype, "right": right}
        row |= {"bytes": moved, "ms_p20_p50_p80": times, "gb_per_s": moved / ours / 1e6}
        yield {**row, "speedup": {"eager": times["eager"][1] / ours} if right else None}


def measure_repair(device: str, count: int, size: int, width: int, batch: int) -> list[dict[str, Any]]:
    """Seconds and peak memory of whole repairs, of bare forward passes and of `update_bn`; medians of two rounds."""
    torch.manual_seed(0)
    dense = resnet50(width=width).to(device).eval()
    images = torch.randn(count, 3, size, size, device=device)
    resuscitate.recalibrate_batchnorm(dense, images[:batch], progress=False)
    pruned, rows = pruned_copy(dense), []
    for job, runs in candidates(dense, batch).items():
        seconds, peaks = race(runs, pruned, images, 2, warm_up=count, slow_rounds=0)
        row = {"job": job, "images": count, "size": size}
        rows.append({**row, "seconds": medians(seconds), "peak_bytes": peaks})
    return rows


def copy_speed(clock: Clock, device: str) -> float:
    """GB/s of a device-to-device copy; bytes read and bytes written both count."""
    source = torch.empty(1 << (30 if device == "cuda" else 20), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / clock.milliseconds(lambda: target.copy_(source))[1] / 1e6


def main(
    seconds: Annotated[float, typer.Option(help="How long new cases may be compiled by Inductor.")] = 100,
    rounds: Annotated[int, typer.Option(help="Calls of each candidate.")] = 30,
    only: Annotated[str, typer.Option(help="kernels, repair, or both.")] = "both",
    dry_run: Annotated[bool, typer.Option(help="Test this file on a CPU, in the interpreter.")] = False,
    output: Annotated[Path, typer.Option(help="The .json; .md and .png go beside it.")] = RESULTS / "gpu.json",
) -> None:
    """Measure on this machine's GPU."""
    if not dry_run and not torch.cuda.is_available():
        sys.exit("no GPU that PyTorch can use; --dry-run tests this file without one")
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
            rows += measure_patches(device, [(1, 2, 3, 3)] if dry_run else PATCHES, clock)
    if only != "kernels":
        repairs = measure_repair(device, *((4, 32, 4, 2) if dry_run else (4096, 224, 64, 64)))
    about = machine() | {"copy_gb_per_s": copied}
    about |= {"gpu": None} if dry_run else {}
    title = f"{about['gpu'] or 'a dry run: these figures mean nothing'}, a copy at {copied:.0f} GB/s, {about['date']}"
    show(rows, repairs, copied, title)
    lacking = [] if dry_run else missed(rows, repairs, copied)
    for line in lacking:
        print("missed:", line)
    found = {**about, "rows": rows, "repairs": repairs, "missed": lacking}
    write(output, found, markdown(rows, repairs, copied))
    with suppress(ImportError):
        if rows:
            draw(rows, copied, output.with_suffix(".png"))
    if any(not row["right"] for row in rows):
        sys.exit("a kernel is wrong; the figures above are worth nothing")


if __name__ == "__main__":
    typer.run(main)
