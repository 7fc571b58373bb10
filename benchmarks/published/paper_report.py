"""The report of paper_table.py: tables beside the published figures, sentences, figures."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.results import markdown_table
from resuscitate.reports.plots import COLOURS, open_figure

Row = dict[str, Any]
GAINS = ("BN only", "layer-wise", "channel-wise", "ASR")
# arXiv 2605.21426: top-1 on CIFAR-10 at b = 20; networks trained on ImageNet, last block fine-tuned
PUBLISHED_DENSE = {"resnet18": 92.77, "resnet50": 93.33, "densenet121": 92.75, "vgg16_bn": 87.35}
PUBLISHED_METHODS = ("no repair", "BN only", "layer-wise", "ASR")
_TABLE = {
    "resnet18": ((37.73, 88.53, 88.59, 88.88), (8.19, 53.70, 58.77, 63.56), (15.68, 78.50, 76.17, 76.64)),
    "resnet50": ((10.87, 88.58, 88.69, 89.25), (10.00, 28.04, 41.01, 55.59), (13.55, 82.28, 78.18, 86.74)),
    "densenet121": ((40.74, 86.28, 85.00, 85.68), (9.29, 16.09, 14.21, 17.59), (12.57, 79.91, 79.68, 80.58)),
    "vgg16_bn": ((52.15, 83.44, 81.27, 81.72), (11.90, 38.93, 26.49, 29.62), (14.72, 63.29, 50.43, 56.70)),
}
PUBLISHED = {
    (net, sparsity): dict(zip(PUBLISHED_METHODS, figures, strict=True))
    for net, rows in _TABLE.items()
    for sparsity, figures in zip(("0.7", "0.9", "2:4"), rows, strict=True)
}
# the ablation of the same paper: ResNet-50 at 90 %
PUBLISHED_ABLATION = {
    "BN only": 29.11,
    "layer-wise": 39.42,
    "channel-wise": 29.30,
    "ASR, fixed prior, no bias": 45.24,
    "ASR, median prior, no bias": 52.26,
    "ASR, mean prior, bias": 53.95,
    "ASR, median prior, bias": 55.59,
}


def percent(sparsity: str) -> str:
    """0.9 as 90%; a pattern unchanged."""
    return sparsity if ":" in sparsity else f"{float(sparsity):.0%}"


def middle(ema_batches: Iterable[int]) -> int:
    """The b in the tables: 20, as published, or the middle one."""
    counts = sorted(ema_batches)
    return 20 if 20 in counts else counts[len(counts) // 2]


class Table:
    """The rows, by network, sparsity, method, protocol and b."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.by_case: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
        for row in rows:
            self.by_case[tuple(row[key] for key in ("net", "sparsity", "method", "protocol", "b"))].append(row)
        self.cases = list(dict.fromkeys((row["net"], row["sparsity"]) for row in rows))
        self.cases.sort(key=lambda case: ([row["net"] for row in rows].index(case[0]), ":" in case[1], case[1]))

    def values(self, *case: Any, key: str = "accuracy") -> list[float]:
        """The values of all seeds. case: net, sparsity, method, protocol, b."""
        return [row[key] for row in self.by_case.get(case, [])]

    def mean(self, *case: Any) -> float | None:
        """The mean over the seeds; None if there is no row."""
        values = self.values(*case)
        return statistics.fmean(values) if values else None

    def cell(self, *case: Any, published: float | None = None) -> str:
        """Mean and standard deviation over the seeds, then the published figure in brackets."""
        values = self.values(*case)
        text = f"{statistics.fmean(values):.1f}" if values else ""
        text += f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{text} [{published:.1f}]".strip() if published is not None else text

    def dense(self, net: str) -> float:
        """The accuracy before pruning."""
        return next(row["dense"] for row in self.rows if row["net"] == net)


def accuracies(table: Table, b: int, most: int) -> list[str]:
    """A row for each network and sparsity; published figures in brackets."""
    columns = [("no repair", "none", 0), *((name, "ema", b) for name in GAINS)]
    columns += [(name, "exact", most) for name in GAINS]
    columns += [(name, "sequential", 0) for name in ("channel-wise", "ASR")]
    columns += [("refit", "refit", 0), ("compress", "compress", 0)]
    heads = ["no repair", *(f"{name}, EMA" for name in GAINS), *(f"{name}, exact" for name in GAINS)]
    heads += ["channel-wise, sequential", "ASR, sequential", "refit", "compress"]
    lines = []
    for net, sparsity in table.cases:
        cells = []
        for name, protocol, count in columns:
            known = PUBLISHED.get((net, sparsity), {}).get(name) if protocol in ("none", "ema") and b == 20 else None
            cells.append(table.cell(net, sparsity, name, protocol, count, published=known))
        dense = f"{table.dense(net):.1f}" + (f" [{PUBLISHED_DENSE[net]:.1f}]" if net in PUBLISHED_DENSE else "")
        lines.append([f"{net} ({dense}), {percent(sparsity)}", *cells])
    return markdown_table(["network (dense), sparsity", *heads], lines).splitlines()


def ablation(table: Table, b: int) -> list[str]:
    """The ablation of ASR under the published protocol, if there are rows of it."""
    cases = [(row["net"], row["sparsity"]) for row in table.rows if row["method"].endswith("bias")]
    if not cases:
        return []
    net, sparsity = cases[0]
    names = [row["method"] for row in table.rows if (row["net"], row["sparsity"], row["b"]) == (*cases[0], b)]
    note = (
        "Bias: convolutions without one are given one, which takes the shift. Else the BatchNorm behind takes it, and "
        "the reset of its statistics takes it away."
    )
    lines = []
    for name in sorted(set(names), key=names.index):
        known = PUBLISHED_ABLATION.get(name)
        known_text = "" if known is None else f"{known:.1f}"
        lines.append([name, table.cell(net, sparsity, name, "ema", b), known_text])
    heads = [f"{net}, {percent(sparsity)}, EMA, b = {b}", "top-1", "published, resnet50, 90%"]
    return [note, "", *markdown_table(heads, lines).splitlines(), ""]


def costs(table: Table, b: int, most: int) -> list[str]:
    """Images, seconds (medians over all sparsities and seeds) and the highest peak memory of each method."""
    shown = [("BN only, EMA", "BN only", "ema", b), ("ASR, EMA", "ASR", "ema", b)]
    shown += [("BN only, exact", "BN only", "exact", most), ("ASR, exact", "ASR", "exact", most)]
    shown += [(f"{name}, sequential", name, "sequential", 0) for name in ("channel-wise", "ASR")]
    shown += [("refit", "refit", "refit", 0), ("compress", "compress", "compress", 0)]
    lines = []
    for net in dict.fromkeys(row["net"] for row in table.rows):
        for label, *kind in shown:
            mine = [r for r in table.rows if r["net"] == net and [r["method"], r["protocol"], r["b"]] == kind]
            if mine:
                seconds = statistics.median(row["seconds"] for row in mine)
                rate = statistics.median(row["images_per_s"] for row in mine)
                peak = max(row["peak_bytes"] for row in mine) / 2**20
                cells = f"{mine[0]['images']:,}", f"{seconds:.2f}", f"{rate:,.0f}", f"{peak:,.0f} MiB"
                lines.append([net, label, *cells])
    heads = ["network", "method", "images", "seconds", "images per second", "peak memory"]
    return [
        *markdown_table(heads, lines).splitlines(),
        "",
        "Peak memory: on a GPU of the call, on a CPU of the process so far.",
    ]


def orderings(table: Table, b: int) -> list[str]:
    """Does the published order of the methods appear under the published protocol? A sentence for each case."""
    lines = []
    for net, sparsity in table.cases:
        found = {name: table.mean(net, sparsity, name, "ema", b) for name in ("ASR", "layer-wise", "BN only")}
        if None in found.values():
            continue
        measured: dict[str, float] = {name: value for name, value in found.items() if value is not None}
        published = PUBLISHED.get((net, sparsity))
        wanted = sorted(measured, key=lambda name: -published[name]) if published else list(measured)
        seen = sorted(measured, key=lambda name: -measured[name])
        spreads = {name: _spread(table.values(net, sparsity, name, "ema", b)) for name in seen}
        close = [
            f"{one} and {other}"
            for one, other in pairwise(seen)
            if measured[one] - measured[other] <= spreads[one] + spreads[other]
        ]
        strict = all(measured[one] > measured[other] for one, other in pairwise(wanted))
        verdict = "appears" if strict else "does not appear"
        order = ", ".join(f"{name} {measured[name]:.1f}" for name in seen)
        source = "published" if published else "published (for ResNets)"
        text = f"- {net}, {percent(sparsity)}, EMA, b = {b}: the {source} order {' > '.join(wanted)} {verdict}: {order}"
        lines.append(f"{text}{'; within the spread: ' + ', '.join(close) if close else ''}.")
    return lines


def cancellation(table: Table, b: int, most: int) -> list[str]:
    """The effect of gains followed by an exact recalibration, and the latter alone against the published protocol."""
    apart = [
        (abs(row["accuracy"] - other["accuracy"]), row)
        for (net, sparsity, method, protocol, count), rows in table.by_case.items()
        if protocol == "exact" and method != "BN only"
        for row in rows
        for other in table.by_case.get((net, sparsity, "BN only", "exact", count), [])
        if other["seed"] == row["seed"]
    ]
    if not apart:
        return []
    largest, row = max(apart, key=lambda item: item[0])
    lines = [
        f"- Exact recalibration: the largest difference between BN only and any gains, over {len(apart)} pairs of "
        f"runs, is {largest:.2f} points ({row['method']}, {row['net']}, {percent(row['sparsity'])})."
    ]
    both = [
        (exact, asr)
        for case in table.cases
        if (exact := table.mean(*case, "BN only", "exact", most)) is not None
        and (asr := table.mean(*case, "ASR", "ema", b)) is not None
    ]
    if both:
        better = sum(exact > asr for exact, asr in both)
        lines.append(f"- BN only, exact, is above ASR with EMA, b = {b}, in {better} of {len(both)} cases.")
    return lines


def markdown(rows: list[Row], settings: dict[str, Any], slopes: dict[str, Any]) -> str:
    """All tables and sentences."""
    table, counts = Table(rows), settings["ema_batches"]
    b, most = middle(counts), max(counts)
    size, gain, images = settings["batch_size"], settings["gain_samples"], settings["images"]
    about = [
        f"Top-1 in per cent on {settings['test_images']:,} images, mean ± standard deviation over "
        f"{len({row['seed'] for row in rows})} seeds, each with calibration images of its own. Global L1, or 2:4.",
        f"EMA: gains from {gain} images, all layers at once; BatchNorm reset, then b = {b} batches of {size} at "
        f"momentum 0.1. Exact: the same gains; BatchNorm statistics pooled over {most * size:,} images. Sequential, "
        f"refit and compress: {images} images, the dense BatchNorm kept.",
        "In brackets: published (arXiv 2605.21426, b = 20): other weights, other images.",
    ]
    lines = [*about, "", *accuracies(table, b, most), "", *ablation(table, b), *costs(table, b, most), ""]
    lines += orderings(table, b) + cancellation(table, b, most)
    if slopes:
        net, sparsity = slopes["of"]
        fitted = ", ".join(f"{name} {slope:.2f}" for name, slope in slopes["fitted"].items())
        lines.append(
            f"- Slope of log variance on dense log variance, {net}, {percent(sparsity)}, all channels: {fitted}."
        )
    return "\n".join(lines) + "\n"


def draw_batches(rows: list[Row], path: Path) -> None:
    """Draw accuracy against b, a row of panels for each network; dashed: BN only, exact."""
    table = Table(rows)
    nets = list(dict.fromkeys(net for net, _ in table.cases))
    wanted = [s for s in ("0.7", "0.9", "2:4") if (nets[0], s) in table.cases] or [s for _, s in table.cases][:3]
    counts = sorted({row["b"] for row in rows if row["protocol"] == "ema"})
    with open_figure(path, 3.4 * len(wanted), 2.6 * len(nets) + 0.4) as figure:
        panels = figure.subplots(len(nets), len(wanted), squeeze=False, sharex=True)
        for net, line in zip(nets, panels, strict=True):
            for sparsity, axes in zip(wanted, line, strict=True):
                for name, colour in zip(GAINS, ("orange", "sky", "green", "blue"), strict=True):
                    found = [(b, values) for b in counts if (values := table.values(net, sparsity, name, "ema", b))]
                    means, spreads = ([f(v) for _, v in found] for f in (statistics.fmean, _spread))
                    options = {"color": COLOURS[colour], "fmt": "o-", "markersize": 3.5, "capsize": 2, "label": name}
                    axes.errorbar([b for b, _ in found], means, spreads, **options)
                exact = [r["accuracy"] for r in rows if _is_exact(r, net, sparsity)]
                if exact:
                    label = "BN only, exact"
                    axes.axhline(statistics.fmean(exact), color="black", linestyle="--", linewidth=1, label=label)
                axes.set_title(f"{net}, {percent(sparsity)}", loc="left", fontsize=10)
                axes.spines[["top", "right"]].set_visible(False)
            line[0].set_ylabel("top-1 (%)")
        for axes in panels[-1]:
            axes.set_xlabel("b, batches of the momentum re-estimate")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2 * len(wanted), frameon=False, fontsize=9)


def slope_of(dense: Tensor, pruned: Tensor) -> float:
    """Slope of log pruned on log dense variance, by least squares over the channels with variance in both."""
    alive = (dense > 0) & (pruned > 0)
    x, y = dense[alive].log(), pruned[alive].log()
    return float(((x - x.mean()) * (y - y.mean())).mean() / x.var(correction=0))


def draw_variances(found: dict[str, tuple[Tensor, Tensor]], path: Path, title: str) -> None:
    """Draw the variance of each channel against its dense variance, a panel for each method, with the fitted line."""
    with open_figure(path, 2.7 * len(found), 3.2) as figure:
        panels = figure.subplots(1, len(found), sharex=True, sharey=True, squeeze=False)[0]
        for axes, (name, (dense, pruned)) in zip(panels, found.items(), strict=True):
            alive, slope = (dense > 0) & (pruned > 0), slope_of(dense, pruned)
            x, y = dense[alive], pruned[alive]
            ends = torch.stack([x.min(), x.max()])
            fitted = (y.log().mean() + slope * (ends.log() - x.log().mean())).exp()
            axes.plot(x, y, ".", color=COLOURS["sky"], markersize=2, alpha=0.4, rasterized=True)
            axes.plot(ends, ends, color="black", linestyle="--", linewidth=1)
            axes.plot(ends, fitted, color=COLOURS["vermilion"])
            axes.set(xscale="log", yscale="log", xlabel="dense variance")
            axes.set_title(f"{name}: slope {slope:.2f}", loc="left", fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel("variance after pruning and repair")
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")


def _spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _is_exact(row: Row, net: str, sparsity: str) -> bool:
    return (row["net"], row["sparsity"], row["method"], row["protocol"]) == (net, sparsity, "BN only", "exact")
