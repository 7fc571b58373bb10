"""The Triton kernels and a whole repair on a GPU against PyTorch: `make gpu` runs this file.

    python benchmarks/speed/kernels.py [--seconds 500] [--only kernels|inductor|repair] [--output results/gpu.json]

Kernels: median with 20th and 80th percentiles. Calls take turns with tensors that together are larger than three times
the L2 cache, so none finds its input there, and none has to wait until the cache is written back. The host queues all
calls behind a pause of the device, so the device time has no gaps; the host time is reported apart. GB/s counts each
tensor that is read and each that is written once. Just before each row a copy of the same tensor is timed: the share of
its speed does not depend on the clocks of the moment. Peers, in the same dtype: eager PyTorch, and the same formula
compiled by torch.compile (Inductor). Our result is first compared with float64; a wrong result gets no ratio.

Second moments for a refit, "refit 3x3" and "refit 1x1": layers of a ResNet-50, against the products by rows of taps
that a CPU takes, in IEEE float32. GB/s counts input and output once; the bound here is arithmetic.

Repair: sequential ASR and exact BatchNorm on a ResNet-50 of random weights, 1,024 and 4,096 images of 224x224, against
its bare forward passes and against `update_bn`.

Writes a .json after each row, then a .md and a .png (bytes against time). A run continues an unfinished .json of the
same code on the same GPU. After `--seconds` it stops and exits with 75. `--only inductor` adds Inductor to the known
rows, each in a process of its own that is stopped after a minute; a row whose process fails or is stopped keeps no
figure of Inductor, and the end of the output names it. `--dry-run` runs everything on a CPU, on tiny tensors in
Triton's interpreter, without Inductor's compiler, as a test: its figures mean nothing.
"""

from __future__ import annotations

import os
import sys

if "--dry-run" in sys.argv:  # read when Triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

import hashlib
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in (".", "python")]  # this checkout

import asr_kernels as ak
import resuscitate
from asr_kernels.backends import torch_patches
from asr_kernels.precision import full_precision
from benchmarks.common.inputs import pruned_copy
from benchmarks.common.results import RESULTS, ROOT, machine, write
from benchmarks.common.timing import candidates, medians, race
from benchmarks.networks import resnet50
from benchmarks.speed.gpu_report import draw, markdown, missed, show
from benchmarks.speed.kernel_operations import (
    DTYPES,
    LAYOUTS,
    OPERATIONS,
    TOLERANCE,
    Candidates,
    is_right,
    make_case,
    turns,
)

STAGES = [(64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7)]
SHAPES = [
    (4, 128, 1024, 1024),
    (20, 6, 65536, 1),
    *((batch, c, size, size) for batch in (256, 64) for c, size in STAGES),
]
# inputs of the 3x3 layers of a ResNet-50
PATCHES = [(64, 64, 56, 56), (64, 128, 28, 28), (64, 256, 14, 14), (64, 512, 7, 7)]
TINY = [(32, 4, 7, 7), (2, 3, 64, 1)]

REPAIRED = 1024, 4096  # images
AGAIN = 75  # exit status: the time was up, so run again to continue
INDUCTOR_SECONDS = 60  # for one row


class Clock:
    """Times calls that take turns."""

    def __init__(self, device: str, rounds: int) -> None:
        self.cuda, self.rounds = device == "cuda", rounds

    def times(self, calls: list[Callable[[], Any]]) -> tuple[list[float], float]:
        """20th percentile, median and 80th percentile of the device's milliseconds; microseconds of the host."""
        calls = [calls[i % len(calls)] for i in range(self.rounds)]
        for call in calls[:3]:
            call()
        if not self.cuda:
            times = []
            for call in calls:
                started = time.perf_counter()
                call()
                times.append(1e3 * (time.perf_counter() - started))
            host = 1e3 * min(times)
        else:
            events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in calls]
            self._pause()
            for call, (start, stop) in zip(calls, events, strict=True):
                start.record()
                call()
                stop.record()
            torch.cuda.synchronize()
            times = [start.elapsed_time(stop) for start, stop in events]
            self._pause()
            started = time.perf_counter()
            for call in calls:
                call()
            host = 1e6 * (time.perf_counter() - started) / len(calls)
            torch.cuda.synchronize()
        return [times[round(q * (len(times) - 1))] for times in [sorted(times)] for q in (0.2, 0.5, 0.8)], host

    def milliseconds(self, call: Callable[[], Any]) -> list[float]:
        """The device's milliseconds of one call, repeated."""
        return self.times([call])[0]

    def _pause(self) -> None:
        # 10 ms at 2 GHz: the host queues all calls meanwhile
        torch.cuda.synchronize()
        torch.cuda._sleep(20_000_000)


def cases_of(shapes: list[tuple[int, ...]]) -> list[tuple[tuple[int, ...], str, str]]:
    """Shape, layout and dtype of every case; batches of 64 last, NCHW first."""
    found = [(s, layout, d) for s in shapes for layout in LAYOUTS for d in DTYPES if s[3] > 1 or layout == "NCHW"]
    return sorted(found, key=lambda case: (case[0][0] == 64, case[1]))


def measure_kernels(
    device: str, shapes: list[tuple[int, ...]], clock: Clock, known: set[tuple[Any, ...]]
) -> Iterator[dict[str, Any]]:
    """One row for each operation and case that is not known yet."""
    for shape, layout, dtype in cases_of(shapes):
        if all((operation, shape, layout, dtype) in known for operation in OPERATIONS):
            continue
        cases = turns(make_case(shape, layout, dtype, device))
        x = cases[0].x
        target = torch.empty_like(x)
        for operation, (build, tensors) in OPERATIONS.items():
            if (operation, shape, layout, dtype) in known:
                continue
            right = is_right(operation, cases[0])
            copied = clock.times([partial(target.copy_, case.x) for case in cases])[0][1]
            built = [build(case)[0] for case in cases]
            found = {name: clock.times([each[name] for each in built]) for name in built[0]}
            row = {"operation": operation, "shape": shape, "layout": layout, "dtype": dtype, "right": right}
            row |= {"bytes": tensors * x.nbytes, "copy_gb_per_s": 2 * x.nbytes / copied / 1e6}
            row |= {"ms_p20_p50_p80": {name: times for name, (times, _) in found.items()}}
            yield {**row, "host_us": {name: host for name, (_, host) in found.items()}}


def measure_inductor(device: str, row: dict[str, Any], rounds: int) -> tuple[list[float], float]:
    """The times of a row's formula, compiled by Inductor; on a CPU only traced."""
    cases = turns(make_case(tuple(row["shape"]), row["layout"], row["dtype"], device))
    formula = OPERATIONS[row["operation"]][0](cases[0])[1]
    compiled = torch.compile(formula, backend="inductor" if device == "cuda" else "eager")
    arguments = [OPERATIONS[row["operation"]][0](case)[2] for case in cases]
    return Clock(device, rounds).times([lambda a=each: compiled(*a) for each in arguments])


def send_inductor(there: Connection, device: str, row: dict[str, Any], rounds: int) -> None:
    """Send the times of `measure_inductor`."""
    there.send(measure_inductor(device, row, rounds))


def measure_inductor_apart(device: str, row: dict[str, Any], rounds: int) -> tuple[list[float], float] | None:
    """`measure_inductor` in a process of its own; None where it fails, or is stopped after INDUCTOR_SECONDS."""
    # the processes are forks of one that has imported this module and has not touched the GPU
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.speed.kernels"])
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=send_inductor, args=(there, device, row, rounds), daemon=True)
    process.start()
    there.close()
    found = None
    if here.poll(INDUCTOR_SECONDS):
        with suppress(EOFError):  # the process failed, and its error is in the log
            found = here.recv()
    process.kill()
    process.join()
    return found


def with_ratios(row: dict[str, Any]) -> dict[str, Any]:
    """The row with what follows from its times: GB/s, and how many times as fast as each peer; None if wrong."""
    ours = row["ms_p20_p50_p80"]["ours"][1]
    ratios = {name: times[1] / ours for name, times in row["ms_p20_p50_p80"].items() if name != "ours"}
    return {**row, "gb_per_s": row["bytes"] / ours / 1e6, "speedup": ratios if row["right"] else None}


def measure_patches(
    device: str, shapes: list[tuple[int, ...]], clock: Clock, known: set[tuple[Any, ...]]
) -> Iterator[dict[str, Any]]:
    """One row for each layer and case: `patch_moments` against the products by rows of a CPU; few on a CPU."""
    dtypes = DTYPES if device == "cuda" else ["fp32"]
    layouts = LAYOUTS if device == "cuda" else ["NCHW"]
    for shape, layout, dtype, size in product(shapes, layouts, dtypes, (3, 1)):
        if (f"refit {size}x{size}", shape, layout, dtype) in known:
            continue
        x, y, *_ = make_case(shape, layout, dtype, device)
        window = ak.Window((size, size), (1, 1), ((size // 2, size // 2),) * 2, (1, 1))

        def ours(x: Tensor = x, y: Tensor = y, window: ak.Window = window) -> ak.PatchMoments:
            return ak.patch_moments(x, y, window)

        def by_rows(x: Tensor = x, y: Tensor = y, window: ak.Window = window) -> ak.PatchMoments:
            with full_precision(x.device):
                sums = torch_patches.Sums(x, y, window)
                sums.add(x, y, {0: None}, budget=1 << 40)  # all images at a time
                return ak.PatchMoments(*sums.moments(0))

        found = ours()
        with ak.use_backend("reference"):
            truth = ours()
        scale = truth.xx.abs().max()
        right = all(
            bool(((a - b).abs() <= TOLERANCE * scale).all()) for a, b in ((found.xx, truth.xx), (found.xy, truth.xy))
        )
        del found, truth
        calls: Candidates = {"ours": ours, "by rows": by_rows}
        times = {name: clock.milliseconds(call) for name, call in calls.items()}
        copied = clock.milliseconds(lambda x=x, y=y: y.copy_(x))[1]
        row = {"operation": f"refit {size}x{size}", "shape": shape, "layout": layout, "dtype": dtype, "right": right}
        row |= {"bytes": x.nbytes + y.nbytes, "copy_gb_per_s": 2 * x.nbytes / copied / 1e6, "host_us": {}}
        yield {**row, "ms_p20_p50_p80": times}


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


def of_this_code(gpu: str | None, *more: Path) -> str:
    """A digest of the kernels, this benchmark, `more` files, GPU and PyTorch: results of others are not continued."""
    files = [*sorted((ROOT / "asr_kernels").rglob("*.py")), *sorted(Path(__file__).parent.glob("kernel*.py")), *more]
    return hashlib.sha256(
        b"".join([f"{gpu} {torch.__version__}".encode(), *(f.read_bytes() for f in files)])
    ).hexdigest()


class Found:
    """The results so far, written after each row."""

    def __init__(self, output: Path, about: dict[str, Any]) -> None:
        self.output, self.about = output, about | {"code": of_this_code(about["gpu"])}
        before = json.loads(output.read_text()) if output.exists() else {}
        same = before.get("code") == self.about["code"]
        self.rows: list[dict[str, Any]] = before["rows"] if same else []
        self.repairs: list[dict[str, Any]] = before["repairs"] if same else []

    @property
    def known(self) -> set[tuple[Any, ...]]:
        """Operation, shape, layout and dtype of each row."""
        return {(row["operation"], tuple(row["shape"]), row["layout"], row["dtype"]) for row in self.rows}

    def save(self) -> None:
        """Write the .json and the .md."""
        rows = [with_ratios(row) for row in self.rows]
        lacking = missed(rows, self.repairs) if self.about["gpu"] else []
        found = {**self.about, "rows": rows, "repairs": self.repairs, "missed": lacking}
        write(self.output, found, markdown(rows, self.repairs))


def measure_all(found: Found, only: str, dry_run: bool, rounds: int, deadline: float) -> bool:
    """Measure what is not known yet; False where the time was up before."""
    device = "cpu" if dry_run else "cuda"
    clock = Clock(device, 2 if dry_run else rounds)
    if only in ("all", "kernels"):
        shapes, layers = (TINY, [(1, 2, 3, 3)]) if dry_run else (SHAPES, PATCHES)
        for part in (
            measure_kernels(device, shapes, clock, found.known),
            measure_patches(device, layers, clock, found.known),
        ):
            for row in part:
                found.rows.append(row)
                found.save()
                print(*(row[key] for key in ("operation", "shape", "layout", "dtype")), file=sys.stderr, flush=True)
                if time.monotonic() > deadline:
                    return False
    if only in ("all", "repair"):
        known = {row["images"] for row in found.repairs}
        for count in [count for count in ((2,) if dry_run else REPAIRED) if count not in known]:
            found.repairs += measure_repair(device, count, *((32, 1, 2) if dry_run else (224, 64, 64)))
            found.save()
    if only == "inductor":
        for row in found.rows:
            if row["operation"] not in OPERATIONS or "inductor_tried" in row:
                continue
            times = measure_inductor_apart(device, row, clock.rounds)
            row["inductor_tried"] = True
            if times:
                row["ms_p20_p50_p80"]["inductor"], row["host_us"]["inductor"] = times
            found.save()
            if time.monotonic() > deadline:
                return False
    return True


def main(
    seconds: Annotated[float, typer.Option(help="After so many seconds no further row is measured.")] = float("inf"),
    rounds: Annotated[int, typer.Option(help="Calls of each candidate.")] = 30,
    only: Annotated[str, typer.Option(help="kernels, repair, inductor, or all but the last.")] = "all",
    dry_run: Annotated[bool, typer.Option(help="Test this file on a CPU, in the interpreter.")] = False,
    output: Annotated[Path, typer.Option(help="The .json; .md and .png go beside it.")] = RESULTS / "gpu.json",
) -> None:
    """Measure on this machine's GPU."""
    deadline = time.monotonic() + seconds
    # Inductor compiles in its own process, which leaves no others behind when it is stopped
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    if not dry_run and not torch.cuda.is_available():
        sys.exit("no GPU that PyTorch can use; --dry-run tests this file without one")
    found = Found(output, machine() | ({"gpu": None} if dry_run else {}))
    with ak.use_backend("triton"):
        finished = measure_all(found, only, dry_run, rounds, deadline)
    rows = [with_ratios(row) for row in found.rows]
    show(rows, found.repairs, f"{found.about['gpu'] or 'a dry run: these figures mean nothing'}, {found.about['date']}")
    for line in [] if dry_run else missed(rows, found.repairs):
        print("missed:", line)
    for row in rows:
        if "inductor_tried" in row and "inductor" not in row["host_us"]:
            print("no figure of Inductor:", *(row[key] for key in ("operation", "shape", "layout", "dtype")))
    with suppress(ImportError):
        if rows:
            draw(rows, output.with_suffix(".png"))
    if any(not row["right"] for row in rows):
        sys.exit("a kernel is wrong; the figures above are worth nothing")
    if not finished:
        print("the time is up; run again to continue")
        sys.exit(AGAIN)


if __name__ == "__main__":
    typer.run(main)
