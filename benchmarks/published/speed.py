"""Times of whole repairs in the published comparison: the figures of a row, and the tables."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from benchmarks.common.results import markdown_table
from benchmarks.common.timing import Run, medians, race


def timings(runs: dict[str, Run], pruned: nn.Module, images: Tensor, batch_size: int, rounds: int) -> dict[str, Any]:
    """Times and peak memory of all candidates, and our speed; the hooks, which take minutes, are timed once."""
    seconds, peaks = race(runs, pruned, images, rounds, warm_up=batch_size, slow_rounds=1)
    middle = medians(seconds)
    rate, share = len(images) / middle["ours"], middle["bare forwards"] / middle["ours"]
    found = {"seconds": middle, "rounds": seconds, "peak_bytes": peaks}
    return {**found, "images_per_s": rate, "share_of_bare_forwards": share}


def markdown(rows: list[dict[str, Any]]) -> str:
    """For each job a table of our seconds, our images per second and each peer's time over ours; then the growth."""
    lines = []
    for job in dict.fromkeys(row["job"] for row in rows):
        mine = [row for row in rows if row["job"] == job]
        peers = [name for name in mine[0]["seconds"] if name != "ours"]
        heads = ["ours, s", "images per second", *(f"{peer}, times ours" for peer in peers), "peak memory"]
        table = []
        for row in mine:
            ours = row["seconds"]["ours"]
            ratios = [f"{row['seconds'][peer] / ours:.2f}" if peer in row["seconds"] else "" for peer in peers]
            peak = f"{row['peak_bytes']['ours'] / 2**20:,.0f} MiB"
            cells = [f"{ours:.2f}", f"{row['images_per_s']:,.0f}", *ratios, peak]
            table.append([f"{row['net']}, {row['images']:,} images", *cells])
        lines.append(markdown_table([job, *heads], table))
        for net in dict.fromkeys(row["net"] for row in mine):
            sizes = sorted((row for row in mine if row["net"] == net), key=lambda row: row["images"])
            for few, many in pairwise(sizes):
                growth = many["seconds"]["ours"] / few["seconds"]["ours"]
                times = f"{many['images'] / few['images']:.0f} times {few['images']:,} images"
                lines.append(f"- {net}, {job}: {times} take {growth:.1f} times as long.")
        lines.append("")
    return "\n".join(lines)
