"""CPU benchmark of `asr_kernels` against what PyTorch offers for the same job, all timed in one interleaved run.

    python benchmarks/moments_cpu.py [--quick] [--threads 1 2] [--rounds 15] [--output FILE]

Every round times each candidate once, so a disturbance falls on all of them; medians, with 20th and 80th percentiles.
The same tensor is used again and again: what fits the cache is measured warm. GB/s counts each input read once and each
output written once. Each case is held against float64 first, and no speed-up is given where ours is wrong.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read once, when torch loads its OpenMP runtime

import argparse
import json
import math
import platform
import re
import sys
import timeit
from collections.abc import Callable, Iterable
from datetime import date
from itertools import product
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import asr_kernels as ak

SHAPES = [(64, 256, 28, 28), (64, 512, 7, 7), (128, 16, 32, 32), (64, 128, 14, 14), (64, 512, 1, 1)]
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
KEYS = ("operation", "threads", "shape", "layout", "dtype")
AXES = (0, 2, 3)
LIMITS = {1.0: 1e-6, 1e3: 1e-6, 1e4: 1e-4}  # mean/std of the input: largest relative error of a statistic

Case = tuple[tuple[int, ...], str, str]  # shape, layout, dtype
Candidates = dict[str, Callable[[], tuple[Tensor, ...]]]  # ours first, then a peer that gives the truth in float64
Operation = Callable[["Inputs"], Candidates]


class Inputs(NamedTuple):
    """Two correlated activations (N, C, H, W), and a gain and a shift (C,) under which x stays bounded for ever."""

    x: Tensor
    y: Tensor
    gain: Tensor
    shift: Tensor


def make_inputs(case: Case, ratio: float = 1.0) -> Inputs:
    """Standard deviation 1 and mean `ratio` in every channel; the same numbers each time."""
    shape, layout, dtype = case
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, *shape, generator=generator)
    gain, shift = torch.rand(2, shape[1], generator=generator)
    x, y = (t.to(DTYPES[dtype], memory_format=LAYOUTS[layout]) for t in (x + ratio, 0.6 * x + 0.8 * noise + ratio))
    return Inputs(x, y, 0.4 + 0.5 * gain, 0.5 + shift)


def channel_moments(inputs: Inputs) -> Candidates:
    """Each gives (mean, variance)."""
    x, running = inputs.x, torch.zeros(2, inputs.x.shape[1])
    return {
        "ours": lambda: mean_and_var(ak.channel_moments(x)),
        "var_mean": lambda: torch.var_mean(x, AXES, correction=0)[::-1],
        "batch_norm_update_stats": lambda: torch.batch_norm_update_stats(x, running[0], running[1], 0.1),
    }


def off_centre_moments(inputs: Inputs) -> Candidates:
    """The same, timed where the mean is ten standard deviations off, so that plain sums would cancel."""
    return channel_moments(inputs)


def paired_moments(inputs: Inputs) -> Candidates:
    """Each gives (mean, variance, mean, variance, covariance)."""
    x, y, *_ = inputs

    def ours() -> tuple[Tensor, ...]:
        paired = ak.paired_moments(x, y)
        return *mean_and_var(paired.dense), *mean_and_var(paired.pruned), paired.cov

    def eager() -> tuple[Tensor, ...]:
        (var_x, mean_x), (var_y, mean_y) = (torch.var_mean(t, AXES, correction=0, keepdim=True) for t in (x, y))
        return tuple(t.flatten() for t in (mean_x, var_x, mean_y, var_y, ((x - mean_x) * (y - mean_y)).mean(AXES)))

    return {"ours": ours, "2 var_mean + product": eager}


def affine_(inputs: Inputs) -> Candidates:
    """Each corrects x in place; the peers take factors of x's own dtype, as they must."""
    x, _, gain, shift = inputs
    g, b = (t.to(x.dtype)[:, None, None] for t in (gain, shift))
    return {
        "ours": lambda: (ak.affine_(x, gain, shift),),
        "addcmul": lambda: (torch.addcmul(b, x, g, out=x),),
        "mul_ add_": lambda: (x.mul_(g).add_(b),),
    }


mean_and_var = attrgetter("mean", "var")
# tensors read and written
OPERATIONS: dict[Operation, int] = {channel_moments: 1, off_centre_moments: 1, paired_moments: 2, affine_: 2}


def worst_errors(operation: Operation, case: Case, ratios: Iterable[float]) -> dict[str, Any]:
    """Per candidate and mean/std: max |error| / max |truth| over its outputs; NaN if any value is."""
    errors: dict[str, Any] = {}
    for ratio in ratios:
        inputs = make_inputs(case, ratio)
        exact = list(operation(Inputs(*(t.double() for t in inputs))).values())[1]()
        for name in operation(inputs):
            outputs = operation(Inputs(*(t.clone() for t in inputs)))[name]()
            off = [(got - true).abs().max() / true.abs().max() for got, true in zip(outputs, exact, strict=True)]
            errors.setdefault(name, {})[ratio] = float(torch.stack(off).max())
    return errors


def measure(candidates: Candidates, rounds: int) -> dict[str, list[float]]:
    """20th, 50th and 80th percentile of each candidate's milliseconds; a quick call repeats to fill one."""
    repeats = {name: math.ceil(1e-3 / min(timeit.repeat(call, number=1))) for name, call in candidates.items()}
    times = [
        [timeit.timeit(call, number=repeats[name]) * 1e3 / repeats[name] for name, call in candidates.items()]
        for _ in range(rounds)
    ]
    return dict(zip(candidates, np.percentile(times, [20, 50, 80], axis=0).T.tolist(), strict=True))


def run_case(operation: Operation, threads: int, case: Case, rounds: int) -> dict[str, Any]:
    """One row of the result: errors first, then times, then ratios where ours is right."""
    torch.set_num_threads(threads)
    inputs = make_inputs(case, 10.0 if operation is off_centre_moments else 1.0)
    eps = torch.finfo(DTYPES[case[2]]).eps
    # a mean that leaves the dtype no digits for the deviations has no variance to get right
    limits = {1.0: eps} if operation is affine_ else {ratio: e for ratio, e in LIMITS.items() if ratio * eps < 0.1}
    errors = worst_errors(operation, case, limits)
    wrong = [name for name, e in errors.items() if not all(e[ratio] <= limit for ratio, limit in limits.items())]
    times = measure(operation(inputs), rounds)
    return {
        **dict(zip(KEYS, (operation.__name__, threads, *case), strict=True)),
        "error": errors,
        "wrong": wrong,
        "ms_p20_p50_p80": times,
        "gb_per_s": OPERATIONS[operation] * inputs.x.nbytes / times["ours"][1] / 1e6,
        "speedup": None if "ours" in wrong else {p: t[1] / times["ours"][1] for p, t in times.items() if p != "ours"},
    }


def render(rows: list[dict[str, Any]], title: str) -> Table:
    """One line per case, with our errors at mean/std 1, 1e3, 1e4 and each peer's speed-up."""
    headers = ("operation", "shape", "layout", "dtype", "threads", "ms (p20 - p80)", "GB/s", "speed-up over", "error")
    table = Table(*headers, title=title, caption="* a peer whose own error is beyond what is allowed to ours")
    for row in rows:
        time = "{1:.3f} ({0:.3f} - {2:.3f})".format(*row["ms_p20_p50_p80"]["ours"])
        peers = (f"{p}{'*' * (p in row['wrong'])} {ratio:.1f}x" for p, ratio in (row["speedup"] or {}).items())
        head = (row["operation"], "x".join(map(str, row["shape"])), row["layout"], row["dtype"], str(row["threads"]))
        error = " ".join(f"{e:.1g}" for e in row["error"]["ours"].values())
        table.add_row(*head, time, f"{row['gb_per_s']:.1f}", ", ".join(peers) or "[red]WRONG RESULT", error)
    return table


def markdown(rows: list[dict[str, Any]]) -> str:
    """The float32 rows of the first shape, for the README."""
    lines = ["| operation | tensor | threads | ms | GB/s | times as fast as |", "|" + " --- |" * 6]
    for row in rows:
        if row["dtype"] == "fp32" and row["shape"] == SHAPES[0]:
            peers = ", ".join(f"{peer} {ratio:.1f}" for peer, ratio in (row["speedup"] or {}).items())
            tensor = f"{'x'.join(map(str, row['shape']))} {row['layout']}"
            numbers = f"{row['threads']} | {row['ms_p20_p50_p80']['ours'][1]:.2f} | {row['gb_per_s']:.1f}"
            lines.append(f"| `{row['operation']}` | {tensor} | {numbers} | {peers or 'wrong result'} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run every case; 0 when all our results are right, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="the first two shapes only")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/cpu_moments.json")
    options = parser.parse_args()
    cases = list(product(OPERATIONS, options.threads, product(SHAPES[: 2 if options.quick else None], LAYOUTS, DTYPES)))
    rows = [run_case(*case, options.rounds) for case in track(cases, "measuring", console=Console(stderr=True))]

    cpuinfo = Path("/proc/cpuinfo")
    cpus = re.findall(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    command = f"benchmarks/moments_cpu.py --rounds {options.rounds} --threads {' '.join(map(str, options.threads))}"
    about = {
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "cpu": cpus[0] if cpus else platform.machine(),
        "threads": options.threads,
        "omp_wait_policy": os.environ["OMP_WAIT_POLICY"],
        "date": date.today().isoformat(),
        "command": f"python {command}{' --quick' if options.quick else ''}",
    }
    Console(width=None if sys.stdout.isatty() else 180).print(
        render(rows, f"{about['cpu']}, torch {torch.__version__}, {about['date']}")
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    options.output.with_suffix(".md").write_text(markdown(rows))
    return 0 if all(row["speedup"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
