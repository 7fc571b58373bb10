"""The report of kernels.py: a table for the terminal, a table for the docs, a plot, the targets missed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common.results import markdown_table
from benchmarks.speed.kernel_operations import DTYPES, LAYOUTS, OPERATIONS

# moments, affine: least share of a copy's speed, for at least LARGE bytes. eager, inductor: least speed-up;
# hard: few channels, or 7x7. repair: largest time of a repair over that of the bare forward passes
LARGE = 50_000_000
TARGETS = {"moments": 0.92, "affine": 0.92, "eager": 1.5, "inductor": 1.0, "inductor, hard": 1.3, "repair": 1.10}

console = Console(width=None if sys.stdout.isatty() else 170)


def missed(rows: list[dict[str, Any]], repairs: list[dict[str, Any]]) -> list[str]:
    """The targets that were not reached, one line for each case."""
    found = []
    for row in rows:
        name = f"{row['operation']} {'x'.join(map(str, row['shape']))} {row['layout']} {row['dtype']}"
        if not row["right"]:
            found.append(f"{name}: wrong result")
            continue
        share, least = row["gb_per_s"] / row["copy_gb_per_s"], TARGETS.get(row["operation"], 0.0)
        if row["bytes"] >= LARGE and share < least:
            found.append(f"{name}: {share:.0%} of a copy, not {least:.0%}")
        hard = row["shape"][1] < 16 or row["shape"][3] == 7
        for peer, target in (("eager", "eager"), ("inductor", "inductor, hard" if hard else "inductor")):
            ratio = row["speedup"].get(peer, float("inf"))
            if ratio < TARGETS[target]:
                found += [f"{name}: {ratio:.2f}x {peer}, not {TARGETS[target]:.1f}x"]
    for row in repairs:
        ratio = row["seconds"]["ours"] / row["seconds"]["bare forwards"]
        if ratio > TARGETS["repair"]:
            found.append(f"{row['job']}: {ratio:.2f}x bare forwards, not {TARGETS['repair']:.2f}x")
    return found


def show(rows: list[dict[str, Any]], repairs: list[dict[str, Any]], title: str) -> None:
    """Print the table for the terminal."""
    columns = ("operation", "tensor", "us (p20 - p80)", "host us", "GB/s", "of a copy", "times as fast as")
    table = Table(*columns, title=title)
    for row in rows:
        low, median, high = (1e3 * t for t in row["ms_p20_p50_p80"]["ours"])
        peers = ", ".join(f"{peer} {ratio:.2f}" for peer, ratio in (row["speedup"] or {}).items())
        tensor = f"{'x'.join(map(str, row['shape']))} {row['layout']} {row['dtype']}"
        share = f"{row['gb_per_s'] / row['copy_gb_per_s']:.0%}"
        table.add_row(
            *(row["operation"], tensor, f"{median:.1f} ({low:.1f} - {high:.1f})", host_time(row)),
            *(f"{row['gb_per_s']:.0f}", share),
            peers or "[red]WRONG RESULT",
        )
    for row in repairs:
        ours = row["seconds"]["ours"]
        peers = ", ".join(f"{name} {t / ours:.2f}" for name, t in row["seconds"].items() if name != "ours")
        table.add_row(row["job"], f"{row['images']} images", f"{1e6 * ours:.0f}", "", "", "", peers)
    console.print(table)


def host_time(row: dict[str, Any]) -> str:
    """Microseconds of the host for one call of ours, where they were measured."""
    return f"{row['host_us']['ours']:.0f}" if "ours" in row["host_us"] else ""


def shares(rows: list[dict[str, Any]]) -> str:
    """By tensor and operation, the speed as a part of a copy's: NCHW in bf16 and fp32, then channels_last."""
    found = {(r["operation"], tuple(r["shape"]), r["layout"], r["dtype"]): r for r in rows}
    operations = [name for name in OPERATIONS if any(key[0] == name for key in found)]
    lines = []
    for shape in dict.fromkeys(key[1] for key in found if key[0] in operations):
        cells = [
            ", ".join(
                " / ".join(f"{r['gb_per_s'] / r['copy_gb_per_s']:.0%}" for r in mine)
                for layout in LAYOUTS
                if (mine := [found[key] for d in DTYPES if (key := (operation, shape, layout, d)) in found])
            )
            for operation in operations
        ]
        lines.append(["x".join(map(str, shape)), *cells])
    return markdown_table(["of a copy: NCHW bf16 / fp32, channels_last bf16 / fp32", *operations], lines)


def markdown(rows: list[dict[str, Any]], repairs: list[dict[str, Any]]) -> str:
    """The tables in the docs: shares of a copy; whole repairs."""
    lines = []
    for row in repairs:
        ours = row["seconds"]["ours"]
        peers = ", ".join(f"{name} {t / ours:.2f}" for name, t in row["seconds"].items() if name != "ours")
        lines.append([row["job"], f"{row['images']:,} of {row['size']}x{row['size']}", f"{ours:.2f}", peers])
    tables = [shares(rows), *[markdown_table(["ResNet-50", "images", "ours, s", "times ours"], lines)] * bool(repairs)]
    return "\n".join(tables)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw time against bytes for each candidate, and the line of a copy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    operations = list(dict.fromkeys(row["operation"] for row in rows))
    measured = {name for row in rows for name in row["ms_p20_p50_p80"]}
    figure, axes = plt.subplots(1, len(operations), figsize=(12, 4), layout="constrained", sharex=True, sharey=True)
    for axis, operation in zip(axes, operations, strict=True):
        mine = [row for row in rows if row["operation"] == operation]
        for name, marker in (("ours", "o"), ("eager", "+"), ("by rows", "+"), ("inductor", "x")):
            if name not in measured:
                continue
            points = [(row["bytes"], row["ms_p20_p50_p80"][name][1]) for row in mine if name in row["ms_p20_p50_p80"]]
            axis.plot(*zip(*points, strict=True) if points else ([], []), marker, label=name)
        reach = [min(row["bytes"] for row in rows), max(row["bytes"] for row in rows)]
        copied = max(row["copy_gb_per_s"] for row in rows)
        axis.plot(reach, [b / copied / 1e6 for b in reach], "--", color="gray", label="copy")
        axis.set(title=operation, xlabel="bytes", xscale="log", yscale="log")
    axes[0].set(ylabel="milliseconds")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=120)
