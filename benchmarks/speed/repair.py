"""The whole repair against bare forward passes and other peers: `make bench-repair`, or this file.

Sequential ASR and exact BatchNorm recalibration; the candidates of a case alternate in every round; medians. Peers:
bare forward passes of the same networks; a plain hook implementation (`common/plain_hooks.py`), in batches and with all
images in one batch; `torch.optim.swa_utils.update_bn`. Then our time against the number of images and of layers. Writes
repair.json, repair.md (the tables in docs/walk.md) and repair.svg.

Each of `SETTINGS` runs in its own process, because threads and malloc are set before a process starts. "default" is a
user's process without settings: PyTorch's number of threads, and a malloc that returns freed pages to the system.
"tuned" is one thread and a malloc that keeps freed pages, for all candidates; with the fewest images only.
"""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in (".", "python")]  # this checkout

from benchmarks.common.inputs import calibration_images, data_folder, network, pruned_copy
from benchmarks.common.plain_hooks import LAYERS, plain_hooks
from benchmarks.common.results import RESULTS, console, machine, markdown_table, write
from benchmarks.common.timing import Run, candidates, in_own_process, medians, race, ratios

BATCH = 128
KEEP = {"MALLOC_TRIM_THRESHOLD_": "8589934592", "MALLOC_MMAP_THRESHOLD_": "4294967296"}
SETTINGS = {"default": {}, "tuned": {"OMP_NUM_THREADS": "1", **KEEP}}


def jobs(dense: nn.Module) -> dict[str, dict[str, Run]]:
    """For each job, its candidates by name, ours first."""
    found = candidates(dense, BATCH)
    found["sequential ASR"]["hooks, one batch"] = lambda model, x: plain_hooks(model, dense, x, len(x))
    exact = found["exact BatchNorm"]
    exact["bare forward"] = exact.pop("bare forwards")  # one network, not two
    return found


def compare(
    name: str, images: Tensor, folder: Path, setting: str, rounds: int, slow_rounds: int
) -> list[dict[str, Any]]:
    """One row for each job, with the seconds of every candidate."""
    threads = torch.get_num_threads()
    dense = network(name, folder, images)
    rows: list[dict[str, Any]] = []
    pruned = pruned_copy(dense)
    for job, runs in jobs(dense).items():
        seconds, _ = race(runs, pruned, images, rounds, warm_up=BATCH, slow_rounds=slow_rounds)
        middle = medians(seconds)
        console.print(name, len(images), threads, setting, job, {k: round(v, 2) for k, v in middle.items()})
        row = {"network": name, "images": len(images), "threads": threads, "malloc": setting, "job": job}
        rows.append({**row, "seconds": middle, "rounds": seconds, "ratio": ratios(middle)})
    return rows


def scaling(folder: Path, images: Tensor, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Seconds of sequential ASR, by the number of images (ResNet-20) and by the number of layers (512 images)."""

    def ours(name: str, count: int) -> dict[str, Any]:
        dense = network(name, folder, images)
        pruned = pruned_copy(dense)
        runs = candidates(dense, BATCH)["sequential ASR"]
        middle = medians(race(runs, pruned, images[:count], rounds, warm_up=BATCH, slow_rounds=0)[0])
        layers = sum(isinstance(m, LAYERS) for m in dense.modules())
        found = {"seconds": middle["ours"], "bare forwards": middle["bare forwards"]}
        return {"network": name, "layers": layers, "images": count, **found}

    return {
        "images": [ours("resnet20", count) for count in (256, 512, 1024, 2048, 4096) if count <= len(images)],
        "layers": [ours(name, 512) for name in ("resnet20", "resnet32", "resnet44", "resnet56")],
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """The tables in the docs: one for each setting and job."""
    tables = []
    for setting, job in dict.fromkeys((row["malloc"], row["job"]) for row in rows):
        mine = [row for row in rows if (row["malloc"], row["job"]) == (setting, job)]
        ratio, threads = list(mine[0]["ratio"]), mine[0]["threads"]
        heads = [f"{job}, {threads} thread{'s' * (threads > 1)}, {setting} malloc", "ours, s", *ratio]
        lines = [
            [f"{row['network']}, {row['images']:,} images", f"{row['seconds']['ours']:.2f}"]
            + [f"{row['ratio'][column]:.2f}" for column in ratio]
            for row in mine
        ]
        tables.append(markdown_table(heads, lines))
    return "\n".join(tables)


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw seconds against images and against layers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for axis, (variable, points) in zip(axes, found.items(), strict=True):
        for key, style in (("seconds", "o-"), ("bare forwards", "s--")):
            label = "sequential ASR" if key == "seconds" else "bare forwards, dense + pruned"
            axis.plot([point[variable] for point in points], [point[key] for point in points], style, label=label)
        axis.set(xlabel=f"{variable}", ylabel="seconds", xlim=0, ylim=0)
    axes[0].set_title("ResNet-20")
    axes[1].set_title("512 images, ResNet-20 to ResNet-56")
    axes[0].legend(frameon=False)
    figure.savefig(path)


def measure(setting: str, *options: Any) -> dict[str, Any]:
    """The result of this script in a process with this setting, with these options of the command line."""
    return in_own_process(__file__, "--within", setting, *options, environment=SETTINGS[setting])


def main(
    data: Annotated[Path | None, typer.Option(help="Folder of networks and images.")] = None,
    images: Annotated[list[int], typer.Option(help="Numbers of images; repeatable.")] = [512, 4096],  # noqa: B006
    networks: Annotated[list[str], typer.Option(help="Networks; repeatable.")] = ["resnet20", "resnet56"],  # noqa: B006
    rounds: Annotated[int, typer.Option(help="Rounds of all but the hook implementations.")] = 5,
    slow_rounds: Annotated[int, typer.Option(help="Rounds of the hook implementations; 0: without them.")] = 1,
    scale: Annotated[bool, typer.Option(help="Also time several numbers of images and layers.")] = True,
    output: Annotated[Path, typer.Option(help="The .json; .md and .svg go beside it.")] = RESULTS / "repair.json",
    within: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Time the whole repair and its peers."""
    folder = data_folder(data)
    if within is not None:
        pool = calibration_images(folder, max(images))
        rows = [
            row
            for name, count in product(networks, images)
            for row in compare(name, pool[:count], folder, within, rounds, slow_rounds)
        ]
        output.write_text(json.dumps({"rows": rows, "scaling": scaling(folder, pool, rounds) if scale else {}}))
        return
    shared: list[Any] = ["--data", folder, "--rounds", rounds, "--slow-rounds", slow_rounds]
    shared += [word for name in networks for word in ("--networks", name)]
    counts = [word for count in images for word in ("--images", count)]
    first = measure("default", *shared, *counts, "--scale" if scale else "--no-scale")
    second = measure("tuned", *shared, "--images", min(images), "--no-scale")
    rows = first["rows"] + second["rows"]
    about = machine()
    del about["threads"], about["omp_wait_policy"]  # those of this process; each row has its own
    write(output, {**about, "rows": rows, "scaling": first["scaling"]}, markdown(rows))
    if scale:
        draw(first["scaling"], output.with_suffix(".svg"))


if __name__ == "__main__":
    typer.run(main)
