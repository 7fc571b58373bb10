"""The kernels on a CPU against PyTorch's operators for the same computation: `make bench`, or this file.

    python benchmarks/speed/cpu_kernels.py [--threads 1 --threads 2] [--rounds 15] [--only TEXT] [--output FILE]

Medians of pytest-benchmark; the candidates of a case run one after the other. Each call uses the same tensor: a tensor
that fits the cache is measured warm. `sum` and `mul_` are lower bounds: the time to read a tensor, and to write it in
place. Our result is first compared with float64, at means of up to 1e4 standard deviations; the errors of peers are
recorded. Writes .json and .md, and shows the ratio to `sum` and `mul_` beside the ratio in the results before.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read once, when torch loads its OpenMP runtime

import json
import sys
import tempfile
from collections.abc import Callable
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pytest
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in (".", "python")]  # this checkout

import asr_kernels as ak
from benchmarks.common.results import RESULTS, machine, markdown_table, write

SHAPES = [(64, 256, 28, 28), (64, 512, 7, 7), (128, 16, 32, 32), (64, 128, 14, 14), (64, 512, 1, 1)]
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
AXES = (0, 2, 3)
# mean/std of the input -> the largest relative error of our variance
LIMITS = {1.0: 1e-6, 1e3: 1e-6, 1e4: 1e-4}
THREADS, ROUNDS = (int(os.environ.get(f"BENCH_{name}", default)) for name, default in (("THREADS", 1), ("ROUNDS", 15)))

Case = tuple[tuple[int, ...], str, str]  # shape, layout, dtype
Candidates = dict[str, Callable[[], Any]]


class Inputs(NamedTuple):
    """Two correlated activations (N, C, H, W), and a gain and a shift (C,) whose repeated use on x stays bounded."""

    x: Tensor
    y: Tensor
    gain: Tensor
    shift: Tensor


@lru_cache(maxsize=1)
def make_inputs(case: Case, ratio: float = 1.0) -> Inputs:
    """Standard deviation 1 and mean `ratio` in every channel; from a fixed seed."""
    shape, layout, dtype = case
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, *shape, generator=generator)
    pair = (x + ratio, 0.6 * x + 0.8 * noise + ratio)
    x, y = (t.to(DTYPES[dtype], memory_format=LAYOUTS[layout]) for t in pair)
    # a gain of -1 alternates between two values; repeated calls with a smaller gain would make x constant
    return Inputs(x, y, torch.full(shape[1:2], -1.0), torch.rand(shape[1], generator=generator))


def moments(inputs: Inputs) -> Candidates:
    """Each candidate computes mean and variance, except `sum`."""
    x, running = inputs.x, torch.zeros(2, inputs.x.shape[1])
    return {
        "ours": lambda: mean_and_var(ak.channel_moments(x)),
        "sum": x.sum,
        "var_mean": lambda: torch.var_mean(x, AXES, correction=0)[::-1],
        "batch_norm_update_stats": lambda: torch.batch_norm_update_stats(x, running[0], running[1], 0.1),
    }


def paired(inputs: Inputs) -> Candidates:
    """Each candidate computes means, variances and the covariance."""
    x, y, *_ = inputs

    def ours() -> tuple[Tensor, ...]:
        pair = ak.paired_moments(x, y)
        return *mean_and_var(pair.dense), *mean_and_var(pair.pruned), pair.cov

    def eager() -> tuple[Tensor, ...]:
        (var_x, mean_x), (var_y, mean_y) = (torch.var_mean(t, AXES, correction=0, keepdim=True) for t in (x, y))
        return tuple(t.flatten() for t in (mean_x, var_x, mean_y, var_y, ((x - mean_x) * (y - mean_y)).mean(AXES)))

    return {"ours": ours, "2 var_mean + product": eager}


def affine(inputs: Inputs) -> Candidates:
    """Each candidate changes x in place. The peers need gain and shift in the dtype of x."""
    x, _, gain, shift = inputs
    g, b = (t.to(x.dtype)[:, None, None] for t in (gain, shift))
    return {
        "ours": lambda: ak.affine_(x, gain, shift),
        "mul_": lambda: x.mul_(1.0),
        "addcmul": lambda: torch.addcmul(b, x, g, out=x),
        "mul_ add_": lambda: x.mul_(g).add_(b),
    }


def mean_and_var(found: ak.ChannelMoments) -> tuple[Tensor, Tensor]:
    """Mean and variance, in this order."""
    return found.mean, found.var


OPERATIONS = {"moments": moments, "moments, mean 10 std": moments, "paired": paired, "affine": affine}
BESIDE = {"moments": "sum", "moments, mean 10 std": "sum", "affine": "mul_"}
CASES = list(product(OPERATIONS, product(SHAPES, LAYOUTS, DTYPES)))


def errors(operation: str, case: Case, candidate: str) -> dict[str, float]:
    """For each mean/std, the largest relative error of a variance against float64."""
    found = {}
    # at a mean of 1e3 standard deviations, bfloat16 cannot represent the deviations
    for ratio in LIMITS if case[2] == "fp32" else [1.0]:
        inputs = make_inputs(case, ratio)
        var = OPERATIONS[operation](inputs)[candidate]()[1].double()
        truth = inputs.x.double().var(AXES, correction=0)
        found[f"{ratio:g}"] = ((var - truth).abs() / truth).max().item()
    return found


@pytest.mark.parametrize(
    ("operation", "case", "candidate"),
    [(o, c, name) for o, c in CASES for name in OPERATIONS[o](Inputs(*[torch.zeros(1, 1)] * 2, *[torch.ones(1)] * 2))],
    ids=lambda value: value if isinstance(value, str) else " ".join(["x".join(map(str, value[0])), *value[1:]]),
)
def test_speed(benchmark: Any, operation: str, case: Case, candidate: str) -> None:
    """Time one candidate on one case."""
    torch.set_num_threads(THREADS)
    info = {"operation": operation, "shape": case[0], "layout": case[1], "dtype": case[2], "candidate": candidate}
    if operation == "moments" and candidate != "sum":
        info["error"] = errors(operation, case, candidate)
        if candidate == "ours":
            assert all(info["error"][ratio] <= LIMITS[float(ratio)] for ratio in info["error"])
    benchmark.extra_info |= {**info, "threads": THREADS}
    inputs = make_inputs(case, 10.0 if "10" in operation else 1.0)
    benchmark.pedantic(OPERATIONS[operation](inputs)[candidate], rounds=ROUNDS, warmup_rounds=2)


def collect(raw: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of pytest-benchmark as one row for each case."""
    rows: dict[str, dict[str, Any]] = {}
    for record in raw:
        info, stats = record["extra_info"], record["stats"]
        key = {name: info[name] for name in ("operation", "shape", "layout", "dtype", "threads")}
        row = rows.setdefault(json.dumps(key), {**key, "ms_q1_median_q3": {}, "error": {}})
        row["ms_q1_median_q3"][info["candidate"]] = [1e3 * stats[name] for name in ("q1", "median", "q3")]
        if "error" in info:
            row["error"][info["candidate"]] = info["error"]
    for row in rows.values():
        medians = {candidate: times[1] for candidate, times in row["ms_q1_median_q3"].items()}
        ours = medians.pop("ours")
        row["ratio"] = {candidate: median / ours for candidate, median in medians.items()}
    return list(rows.values())


def name_of(row: dict[str, Any]) -> str:
    """Shape, layout and dtype of a row."""
    return f"{'x'.join(map(str, row['shape']))} {row['layout']} {row['dtype']}"


def show(rows: list[dict[str, Any]], before: list[dict[str, Any]]) -> None:
    """Print a line for each case, with the ratio to `sum` or `mul_` in the results before, if there are any."""
    old = {(row["operation"], name_of(row), row["threads"]): row["ratio"] for row in before}
    table = Table("operation", "tensor", "threads", "ms", "times as fast as", "before")
    for row in rows:
        ratios = ", ".join(f"{peer} {ratio:.2f}" for peer, ratio in row["ratio"].items())
        beside = BESIDE.get(row["operation"], "")
        was = old.get((row["operation"], name_of(row), row["threads"]), {}).get(beside)
        ms = f"{row['ms_q1_median_q3']['ours'][1]:.3f}"
        line = (row["operation"], name_of(row), str(row["threads"]), ms, ratios)
        table.add_row(*line, f"{beside} {was:.2f}" if was else "")
    Console(width=None if sys.stdout.isatty() else 180).print(table)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table in the docs: two tensors on one thread, and the first of them on more threads."""
    lines = []
    for row in rows:
        first, second = (tuple(row["shape"]) == shape for shape in SHAPES[:2])
        alone, plain = row["threads"] == 1, row["dtype"] == "fp32"
        usual = row["operation"] in ("moments", "affine")
        if (first and (plain or alone) and (usual or (plain and alone))) or (second and usual and alone):
            peers = ", ".join(f"{peer} {ratio:.2f}" for peer, ratio in row["ratio"].items())
            ms = f"{row['ms_q1_median_q3']['ours'][1]:.2f}"
            lines.append([row["operation"], name_of(row), str(row["threads"]), ms, peers])
    return markdown_table(["operation", "tensor", "threads", "ms", "times as fast as"], lines)


def main(
    threads: Annotated[list[int], typer.Option(help="Numbers of threads; repeatable.")] = [1, 2],  # noqa: B006
    rounds: Annotated[int, typer.Option(help="Calls of each candidate.")] = 15,
    only: Annotated[str, typer.Option(help="As pytest's -k.")] = "",
    output: Annotated[Path, typer.Option(help="The .json; the .md goes beside it.")] = RESULTS / "cpu_kernels.json",
) -> None:
    """Time the kernels on this CPU; write and compare."""
    rows: list[dict[str, Any]] = []
    for count in threads:
        with tempfile.TemporaryDirectory() as folder:
            raw = Path(folder) / "raw.json"
            os.environ |= {"BENCH_THREADS": str(count), "BENCH_ROUNDS": str(rounds)}
            command = [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider", "-k", only]
            command += [f"--benchmark-json={raw}", "--benchmark-quiet", "--benchmark-disable-gc"]
            if os.spawnv(os.P_WAIT, sys.executable, command):
                sys.exit("a result is wrong, or a candidate failed; nothing was written")
            rows += collect(json.loads(raw.read_text())["benchmarks"])
    show(rows, json.loads(output.read_text())["rows"] if output.exists() else [])
    write(output, {**machine(), "threads": threads, "rows": rows}, markdown(rows))


if __name__ == "__main__":
    typer.run(main)
