"""The comparison of arXiv 2605.21426 on networks of the same size, beside the published figures: `make paper`.

    python benchmarks/published/train.py --output FOLDER      # first: the networks
    python benchmarks/published/paper_table.py --checkpoints FOLDER [--budget-seconds 500]
    python benchmarks/published/paper_table.py --checkpoints FOLDER --speed

Networks for CIFAR-10 are pruned by global L1 and to 2:4 and repaired in three ways: under the published protocol (64
images for the gains, all layers at once, then BatchNorm reset and re-estimated by momentum over b batches of 128); with
an exact re-estimate of BatchNorm instead; and by the methods of this project. Each repair is run with several draws of
images. Writes paper_table.json (a row for each run), .md and .svg, and paper_table_variance.svg. `--speed` times whole
repairs on all images against hooks and `update_bn` and writes paper_table_speed.json and .md.

The same command continues a run that was stopped: rows that are in the .json are not computed again.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in (".", "python")]  # this checkout

import resuscitate
from benchmarks.common.inputs import data_folder
from benchmarks.common.results import RESULTS, machine, write
from benchmarks.common.timing import JOBS, candidates, measured
from benchmarks.networks import NETS
from benchmarks.networks.checkpoints import is_trained
from benchmarks.published import paper_report as report
from benchmarks.published import speed as speed_report
from benchmarks.published.budget import Budget
from benchmarks.published.paper_report import GAINS, PUBLISHED, middle, percent
from benchmarks.published.rows import Row, extended, kept
from benchmarks.published.study import Settings, Study, pruned
from resuscitate.data.images import load_labels
from resuscitate.utils.digest import digest_model

FIXED = 1.0  # the prior variance of the ablation; the published one is not stated
METHODS: dict[str, dict[str, Any]] = dict(
    zip(GAINS, ({"method": name} for name in ("bn", "layerwise", "channelwise", "asr")), strict=True)
)
# for the ablation; "bias": see `give_biases`
METHODS |= {f"{name}, bias": METHODS[name] for name in ("layer-wise", "channel-wise")}
METHODS |= {
    f"ASR, {name} prior, {bias}": {"method": "asr", "prior": prior, "bias": bias == "bias"}
    for (name, prior), bias in product(
        {"fixed": FIXED, "mean": "mean", "median": "median"}.items(), ("no bias", "bias")
    )
}
PROTOCOLS = ("none", "ema", "exact", "sequential", "refit", "compress")


class Job(NamedTuple):
    """One run, and the key of its row. b: batches of the re-estimate of BatchNorm, 0 without one."""

    net: str
    sparsity: str
    method: str
    protocol: str
    b: int
    seed: int


def jobs(nets: list[str], sparsities: list[str], counts: list[int], seeds: int, ablated: tuple[str, str]) -> list[Job]:
    """Every run in the order of its importance: the published table, other sparsities, other b, slow methods."""
    most, shown = max(counts), middle(counts)
    found = []
    for net, sparsity in product(nets, sparsities):
        case = (net, sparsity)
        found.append(Job(*case, "no repair", "none", 0, 0))
        for seed in range(seeds):
            found += [Job(*case, method, "ema", b, seed) for b, method in product(counts, GAINS)]
            if case == ablated:
                found += [Job(*case, method, "ema", shown, seed) for method in METHODS if method not in GAINS]
            found += [Job(*case, method, "exact", most, seed) for method in GAINS]
            found += [Job(*case, method, "sequential", 0, seed) for method in ("channel-wise", "ASR")]
            found += [Job(*case, "refit", "refit", 0, seed)]
            found += [Job(*case, "compress", "compress", 0, seed)] * (":" not in sparsity)
    published = {sparsity for _, sparsity in PUBLISHED}
    slow = {"refit": 1, "compress": 2}

    def order(job: Job) -> tuple[Any, ...]:
        other_b = job.protocol == "ema" and job.b != shown
        return slow.get(job.protocol, 0), other_b, job.sparsity not in published, job.seed

    return sorted(found, key=order)


def give_biases(model: nn.Module) -> None:
    """Give each convolution without a bias a bias of zero, to which the repair adds the shift of the published formula.

    Without a bias the repair puts the shift into the statistics of the next BatchNorm, and their reset removes it.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.bias is None:
            module.bias = nn.Parameter(module.weight.new_zeros(module.out_channels))


def repair(model: nn.Module, job: Job, study: Study) -> int:
    """Repair the pruned network in place, or compress the dense one; returns the number of images used."""
    how, dense = study.settings, study.dense(job.net)
    if job.protocol == "none":
        return 0
    if job.protocol in ("sequential", "refit", "compress"):
        images = study.calibration(how.images, job.seed)
        if job.protocol == "compress":
            resuscitate.compress(model, float(job.sparsity), images, ridge=1e-2, progress=False)
        else:
            refit = {"method": "refit", "ridge": 1e-2}
            options = {"method": METHODS[job.method]["method"]} if job.protocol == "sequential" else refit
            resuscitate.repair(model, dense, images, **options, keep_worse=True, progress=False)
        return len(images)
    options = dict(METHODS[job.method])
    options |= {} if job.method == "BN only" else {"schedule": "parallel", "gain_samples": how.gain_samples}
    count = job.b * how.batch_size
    if job.protocol == "ema":
        options |= {"recalibrate": resuscitate.EMA(batches=job.b, batch_size=how.batch_size)}
    else:
        options |= {"recalibrate": resuscitate.Exact(samples=count)}
    images = study.calibration(how.most, job.seed)
    if job.method.endswith(", bias"):
        give_biases(model)
    resuscitate.repair(model, dense, images, **options, keep_worse=True, batch_size=how.batch_size, progress=False)
    return count


def row_of(job: Job, study: Study) -> Row:
    """Prune, repair, test: the row of a run."""
    dense = study.dense(job.net)
    model = copy.deepcopy(dense) if job.protocol == "compress" else pruned(dense, job.sparsity)
    if job.protocol != "none":  # read the images before the clock starts
        how = study.settings
        several = job.protocol in ("ema", "exact")
        study.calibration(how.most if several else how.images, job.seed)
    count, seconds, peak = measured(lambda: repair(model, job, study), study.device)
    zeros = resuscitate.Masks.from_zeros(model).sparsity
    found = {"dense": study.dense_accuracy(job.net), "accuracy": study.score()(model), "zeros": zeros}
    return {**job._asdict(), **found, "images": count, "seconds": seconds, "images_per_s": count / seconds,
            "peak_bytes": peak}  # fmt: skip


def variances(net: str, sparsity: str, study: Study) -> dict[str, tuple[Tensor, Tensor]]:
    """For each published method, dense and pruned variance (C,) of all channels, without the first layer."""
    how, dense = study.settings, study.dense(net)
    found = {}
    for name in ("no repair", *GAINS):
        model = pruned(dense, sparsity)
        b = middle(how.ema_batches)
        repair(model, Job(net, sparsity, name, "none" if name == "no repair" else "ema", b, 0), study)
        images = study.calibration(how.most, 0)[: how.images]
        layers = list(resuscitate.damage(model, dense, images).values())[1:]
        before = torch.cat([layer.variance for layer in layers])
        found[name] = before, before * torch.cat([layer.ratio for layer in layers]).nan_to_num()
    return found


def make_table(study: Study, planned: list[Job], ablated: tuple[str, str], output: Path, budget: Budget) -> str:
    """Compute the missing rows, writing after each of them; then the tables and the figures."""
    path, settings = output / "paper_table.json", asdict(study.settings)
    digests = {net: digest_model(study.dense(net)) for net in dict.fromkeys(job.net for job in planned)}
    before = kept(path, settings, digests)
    rows, slopes = before["rows"], before["slopes"]
    found = machine() | {"settings": settings, "networks": before["networks"] | digests, "slopes": slopes, "rows": rows}
    done = {Job(*(row[key] for key in Job._fields)) for row in rows}
    missing = [job for job in planned if job not in done]
    for _ in extended(rows, missing, lambda job: row_of(job, study), budget):
        write(path, found)
    picture = output / "paper_table_variance.svg"
    if not (slopes and picture.exists()) and budget.another():
        points = variances(*ablated, study)
        slopes |= {"of": ablated, "fitted": {name: report.slope_of(*pair) for name, pair in points.items()}}
        report.draw_variances(points, picture, f"{ablated[0]}, {percent(ablated[1])}")
        write(path, found)
    report.draw_batches(rows, output / "paper_table.svg")
    table = report.markdown(rows, settings, slopes)
    (output / "paper_table.md").write_text(table)
    return table


def make_speed(
    study: Study, nets: list[str], rounds: int, hook_images: int | None, output: Path, budget: Budget, **options: Any
) -> str:
    """Time whole repairs on 1, 10 and 100 % of the images; writing after each row."""
    path, how = output / "paper_table_speed.json", study.settings
    settings = {"batch_size": how.batch_size, "images": how.images, "rounds": rounds, **options}
    settings["channels_last"] = study.channels_last
    digests = {net: digest_model(study.dense(net)) for net in nets}
    before = kept(path, settings, digests)
    rows = before["rows"]
    found = machine() | {"settings": settings, "networks": before["networks"] | digests, "rows": rows}
    done = {(row["net"], row["job"], row["images"]) for row in rows}
    counts = [max(how.images * share // 100, 1) for share in (1, 10, 100)]

    def compute(case: tuple[str, str, int]) -> Row:
        net, job, count = case
        dense, size = study.dense(net), how.batch_size
        runs = candidates(dense, size, **options)[job]
        if hook_images is not None and count > hook_images:
            runs.pop("hooks", None)
        images = study.calibration(how.images, 0)[:count]
        found = speed_report.timings(runs, pruned(dense, "0.9"), images, size, rounds)
        return {"net": net, "job": job, "images": count, **found}

    planned = [case for case in product(nets, JOBS, counts) if case not in done]
    for _ in extended(rows, planned, compute, budget):
        write(path, found)
    table = speed_report.markdown(rows)
    (output / "paper_table_speed.md").write_text(table)
    return table


def main(
    checkpoints: Annotated[Path | None, typer.Option(help="Folder that train.py wrote.")] = None,
    nets: Annotated[str | None, typer.Option(help="By comma; else all whose training is finished.")] = None,
    sparsities: Annotated[str, typer.Option(help="By comma.")] = "0.5,0.7,0.8,0.9,0.95,2:4",
    only: Annotated[str, typer.Option(help="Which kinds of runs, by comma.")] = ",".join(PROTOCOLS),
    data: Annotated[Path | None, typer.Option(help="Folder of the images; else RESUSCITATE_DATA.")] = None,
    train_images: Annotated[Path | None, typer.Option(help="An .npz to calibrate on, in place of CIFAR-10.")] = None,
    test_images: Annotated[Path | None, typer.Option(help="An .npz to test on, in place of CIFAR-10.")] = None,
    tested: Annotated[int, typer.Option(help="How many images to test on.")] = 10_000,
    seeds: Annotated[int, typer.Option(help="Draws of the calibration images.")] = 3,
    ema_batches: Annotated[str, typer.Option(help="By comma.")] = "10,20,30,50",
    batch_size: int = 128,
    gain_samples: int = 64,
    images: Annotated[int | None, typer.Option(help="For sequential repairs, 512; with --speed, all.")] = None,
    ablate: Annotated[str, typer.Option(help="Sparsity of the ablation, of ResNet-50 where it is there.")] = "0.9",
    speed: Annotated[bool, typer.Option(help="Time whole repairs instead.")] = False,
    rounds: Annotated[int, typer.Option(help="Of --speed.")] = 3,
    hook_images: Annotated[int | None, typer.Option(help="No hooks are timed on more than this.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of our repairs in --speed: bf16, fp16.")] = None,
    memory: Annotated[str | None, typer.Option(help="Of our repairs in --speed, such as 32GiB.")] = None,
    channels_last: bool = True,
    budget_seconds: Annotated[float | None, typer.Option(help="Stop in time; at least one run is done.")] = None,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    output: Path = RESULTS,
) -> None:
    """Compare the published repairs with those of this project."""
    budget = Budget(budget_seconds)
    chosen = nets.split(",") if nets else [name for name in NETS if checkpoints and is_trained(name, checkpoints)]
    if not chosen:
        sys.exit("no networks: name a folder where benchmarks/published/train.py has finished one, or --nets resnet20")
    folder = None if train_images and test_images else data_folder(data)
    given = {"train": train_images, "test": test_images}
    train, test = (path or folder / f"cifar10_jpeg_{part}.npz" for part, path in given.items())
    counts = [int(b) for b in ema_batches.split(",")]
    images = images or (len(load_labels(train)) if speed else 512)
    tested = min(tested, len(load_labels(test)))
    settings = Settings(tuple(counts), batch_size, gain_samples, images, tested, train.name, test.name)
    study = Study(settings, train, test, folder, checkpoints, torch.device(device), channels_last)
    output.mkdir(parents=True, exist_ok=True)
    if speed:
        table = make_speed(study, chosen, rounds, hook_images, output, budget, dtype=dtype, memory=memory)
    else:
        ablated = ("resnet50" if "resnet50" in chosen else chosen[0], ablate)
        planned = jobs(chosen, sparsities.split(","), counts, seeds, ablated)
        wanted = only.split(",")
        table = make_table(study, [job for job in planned if job.protocol in wanted], ablated, output, budget)
    Console().print(table, markup=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
