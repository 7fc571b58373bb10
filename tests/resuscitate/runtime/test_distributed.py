"""Ranks: bit-identical results on all ranks, equal to one process; a failure on one rank is an error on all."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import asr_kernels as ak
import resuscitate
from resuscitate import cli
from resuscitate.models import digitnet
from resuscitate.runtime.distributed import Ranks
from resuscitate.statistics.base import Place
from resuscitate.statistics.outputs import OutputCovariances
from tests.networks import (
    Residual,
    Shared,
    Untraceable,
    chain,
    disturb,
    images,
    pruned_copy,
    seeded,
    without_channels,
)
from tests.ranks import joined

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch.distributed with Gloo")
BUILDS = {"chain": chain, "Residual": Residual, "Shared": Shared, "Untraceable": Untraceable}


def shard(rank, size, sizes):
    """The images of a rank: every `size`-th one of 23, or the numbers of images in `sizes`."""
    x = images(23 if sizes is None else sum(sizes))
    if sizes is None:
        return x[rank::size]
    begin = sum(sizes[:rank])
    return x[begin : begin + sizes[rank]]


AGREEING = {
    "sequential": {"options": {"method": "asr"}},
    "two counts": {"options": {"method": "channelwise", "recalibrate": "exact", "gain_samples": 10}},
    "parallel": {"options": {"method": "asr", "schedule": "parallel", "recalibrate": "exact"}, "build": "Residual"},
    "uneven": {"options": {"method": "bn"}, "sizes": (20, 3, 0)},
    "first empty": {
        "options": {"method": "channelwise", "diagnostics": True},
        "build": "Residual",
        "sizes": (0, 1, 22),
    },
    "suspended passes, all but one empty": {"options": {"method": "layerwise"}, "build": "Shared", "sizes": (0, 23, 0)},
    "refit": {"options": {"method": "refit"}, "sizes": (12, 11, 0)},
    "a rank without held-out images": {"options": {"ridge": 0.1}, "sizes": (2, 63, 63)},
    "refit by suspended passes": {"options": {"ridge": 0.01}, "build": "Untraceable", "sizes": (12, 11, 0)},
    "compress": {"options": {}, "build": "Residual", "sizes": (12, 11, 0), "compress": True},
    "smaller": {"options": {"ridge": 0.01}, "sizes": (12, 11, 0), "smaller": True},
    "means": {"options": {"method": "mean", "recalibrate": "exact"}, "sizes": (12, 11, 0)},
    "refit with means": {"options": {"means": "kernel"}, "sizes": (12, 11, 0)},
    "regrow": {"options": {"budget": "damage", "saliency": "residual"}, "sizes": (12, 11, 0), "regrow": True},
    "regrow by likeness": {"options": {"budget": "ssim"}, "sizes": (0, 12, 11), "regrow": True},
    "statistics": {"options": {"method": "asr"}, "statistics": True},
}
FAILING = {
    "a loader fails": {"broken": 1},
    "an image is not finite": {"nan": 0},
    "a loader fails in compress": {"broken": 1, "compress": True},
    "a loader fails in regrow": {"broken": 1, "regrow": True},
    "different models": {"other weights": 1},
    "different options": {"mistake": {"ridge": 0.5}},
    "a stray option": {"mistake": {"prior": "mean"}},
    "no statistics file": {"options": {"method": "asr"}, "mistake": {"dense": "missing.safetensors"}},
    "a glob without layers": {"mistake": {"include": "conv*"}},
    "a batch size in statistics": {"mistake": {"batch_size": 0}, "statistics": True},
    "a sparsity in compress": {"mistake": {"sparsity": 1.5}, "compress": True},
    "a sparsity in regrow": {"mistake": {"sparsity": 1.5}, "regrow": True},
    "no images": {"sizes": (0, 0, 0)},
    "momentum": {"options": {"recalibrate": resuscitate.EMA(batches=1, batch_size=8)}},
}


def worker(rank, size, folder, jobs):
    with joined(rank, size, folder):
        for name, job in jobs.items():
            outcome, state = work(rank, size, {"build": "chain", "options": {}, **job})
            torch.save((outcome, state), f"{folder}/{name}.{rank}")


def work(rank, size, job):
    dense = seeded(BUILDS[job["build"]])
    model, part, options = pruned(dense, job), shard(rank, size, job.get("sizes")), dict(job["options"])
    if rank == job.get("kill"):
        resuscitate.engine.writer.write_change = die_at_the_second
    if rank == job.get("broken"):
        part = iter(broken(part))
    if rank == job.get("nan"):
        part = part.clone()
        part[0] = torch.nan
    if rank == job.get("other weights"):
        with torch.no_grad():
            next(model.parameters()).add_(1)
    if rank == 1:
        options |= job.get("mistake", {})
    before = {k: v.clone() for k, v in model.state_dict().items()}
    try:
        if job.get("statistics"):
            given = {"batch_size": options.pop("batch_size", 4), "group": dist.group.WORLD}
            dense = resuscitate.DenseStatistics.measure(dense, part, **given)
        dense = options.pop("dense", dense)
        report = work_on(model, dense, part, job, group=dist.group.WORLD, **options)
        return {"error": None, "images": report.images, "walk": report.walk}, model.state_dict()
    except Exception as error:
        unchanged = all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        return {"error": f"{type(error).__name__}: {error}", "unchanged": unchanged}, model.state_dict()


def pruned(dense, job):
    """A copy with zeros; or with fewer channels, and other weights, so that they are found by their outputs."""
    return disturb(without_channels(dense, [0, 3, 6]), 0.1) if job.get("smaller") else pruned_copy(dense)


def work_on(model, dense, x, job, *, sparsity=None, batch_size=4, **options):
    options["batch_size"] = batch_size
    if job.get("compress"):
        return resuscitate.compress(model, sparsity or 0.8, x, steps=3, **options).steps[-1]
    if job.get("regrow"):
        masks = resuscitate.Masks.from_zeros(model)
        return resuscitate.regrow(model, dense, masks, sparsity or 0.3, x, rounds=2, **options).rounds[-1].report
    return resuscitate.repair(model, dense, x, **options)


def die_at_the_second(*args, seen=[]):  # noqa: B006
    seen.append(args)
    if len(seen) == 2:
        os.kill(os.getpid(), signal.SIGKILL)


def broken(x):
    yield x[:2]
    raise OSError("disk gone")


def run(folder, size, jobs):
    """For every job, the outcome and the final state of every rank that finished it."""
    context = mp.spawn(worker, (size, str(folder), jobs), nprocs=size, join=False)
    deadline = time.monotonic() + 120
    for process in context.processes:
        process.join(max(deadline - time.monotonic(), 0))
        assert not process.is_alive(), "a rank hangs"
    return {
        job: {rank: torch.load(folder / f"{job}.{rank}") for rank in range(size) if (folder / f"{job}.{rank}").exists()}
        for job in jobs
    }


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory):
    """The outcomes of every job on two or three ranks; with two ranks the second also gets the images of the third."""
    size = request.param
    jobs = {}
    for name, job in {**AGREEING, **FAILING}.items():
        sizes = job.get("sizes")
        jobs[name] = job if sizes is None else {**job, "sizes": (*sizes[: size - 1], sum(sizes[size - 1 :]))}
    return run(tmp_path_factory.mktemp("ranks"), size, jobs)


@pytest.mark.parametrize("job", AGREEING)
def test_ranks_are_bit_identical_and_agree_with_one_process(job, ranks):
    found, options = ranks[job], AGREEING[job]["options"]
    assert [outcome["error"] for outcome, _ in found.values()] == [None] * len(found)
    state = found[0][1]
    for _, other in found.values():
        assert all(torch.equal(v, state[k]) for k, v in other.items())
    dense = seeded(BUILDS[AGREEING[job].get("build", "chain")])
    alone = pruned(dense, AGREEING[job])
    given = images(sum(AGREEING[job].get("sizes", (23,))))
    report = work_on(alone, dense, given, AGREEING[job], **options)
    torch.testing.assert_close(dict(alone.state_dict()), dict(state), rtol=2e-5, atol=2e-6)
    assert (found[0][0]["images"], found[0][0]["walk"]) == (report.images, report.walk)


@pytest.mark.parametrize(
    ("job", "first", "second"),
    [
        ("a loader fails", "DistributedError: rank 1 failed", "OSError: disk gone"),
        ("a loader fails in compress", "DistributedError: rank 1 failed", "OSError: disk gone"),
        ("an image is not finite", "NonFiniteError: layer '0': batch 0", "DistributedError: rank 0 failed"),
        ("different models", *["rank 1 has a model or options other than rank 0"] * 2),
        ("different options", *["rank 1 has a model or options other than rank 0"] * 2),
        ("a stray option", "DistributedError: rank 1 failed", "has no option 'prior'; it is for method 'asr'"),
        ("no statistics file", "DistributedError: rank 1 failed", "FileNotFoundError: "),
        ("a glob without layers", "DistributedError: rank 1 failed", "'conv*'"),
        ("a batch size in statistics", "DistributedError: rank 1 failed", "CalibrationError: batch_size"),
        ("a sparsity in compress", "DistributedError: rank 1 failed", "ValueError: sparsity=1.5 is not in [0, 1)"),
        ("a sparsity in regrow", "DistributedError: rank 1 failed", "ValueError: sparsity=1.5 is not in [0, 1)"),
        ("no images", *["no images are left"] * 2),
        ("momentum", *["it takes no forward_fn and no group of several ranks"] * 2),
    ],
)
def test_a_failure_on_one_rank_is_an_error_on_all_and_nothing_is_changed(job, first, second, ranks):
    for rank, (outcome, _) in ranks[job].items():
        expected = {0: first, 1: second}.get(rank, first if "DistributedError" in first else second)
        assert expected in outcome["error"]
        assert outcome["unchanged"]


def test_a_killed_rank_is_an_error_on_the_others_and_nothing_is_changed(tmp_path):
    found = run(tmp_path, 3, {"killed": {"kill": 2}})["killed"]
    assert sorted(found) == [0, 1]
    for outcome, _ in found.values():
        assert "DistributedError" in outcome["error"]
        assert outcome["unchanged"]


class TestOneProcess:
    def test_collectives_return_their_arguments(self):
        ranks = Ranks()
        with ranks.together():
            assert ranks.total(3, 4) == [3, 4]
            assert ranks.broadcast(b"abc") == b"abc"
            assert ranks.share(7) == 7
            assert ranks.share(None) is None
        with pytest.raises(KeyError), ranks.together():
            raise KeyError

    def test_shares_add_up_to_the_limit(self):
        for size in (1, 2, 3, 7):
            shares = []
            for rank in range(size):
                ranks = Ranks()
                ranks.rank, ranks.size = rank, size
                shares.append(ranks.share(10))
            assert sum(shares) == 10
            assert max(shares) - min(shares) <= 1

    def test_sending_a_statistic_changes_nothing(self):
        x, y = torch.randn(2, 4, 3, 5)
        found = OutputCovariances(Place("conv", torch.nn.Linear(3, 3)))
        found.calls = [ak.channel_moments(x), ak.channel_moments(y)]
        found.dense_calls, found.pairs = [ak.channel_moments(y)], [ak.paired_moments(x, y)]
        (state,) = Ranks().exchange(found.state())
        back = OutputCovariances.of_state(found.place, state)
        assert [m.count for m in back.calls] == [20, 20]
        assert torch.equal(back.calls[1].m2, found.calls[1].m2)
        assert torch.equal(back.dense_calls[0].mean, found.dense_calls[0].mean)
        assert torch.equal(back.pairs[0].comoment, found.pairs[0].comoment)
        assert torch.equal(back.pairs[0].pruned.m2, found.pairs[0].pruned.m2)


def torchrun(tmp_path, *arguments, ranks=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "-m", "resuscitate", *map(str, arguments)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A digitnet, a pruned copy of it, and images, on disk."""
    folder = tmp_path_factory.mktemp("files")
    dense = seeded(digitnet)
    save_file(dense.state_dict(), folder / "dense.safetensors")
    save_file(pruned_copy(dense, 0.8).state_dict(), folder / "pruned.safetensors")
    np.save(folder / "images.npy", images(37, channels=1, size=8).numpy())
    return folder


def test_torchrun_agrees_with_one_process_and_one_rank_prints(files, tmp_path):
    common = ["--model", "digitnet", "--calibration", files / "images.npy"]
    stats = [*common, "--dense", files / "dense.safetensors"]
    repair = [*common, "--pruned", files / "pruned.safetensors", "--dense-stats", tmp_path / "stats.safetensors"]
    done = torchrun(tmp_path, "stats", *stats, "--output", tmp_path / "stats.safetensors")
    assert done.returncode == 0, done.stderr
    done = torchrun(tmp_path, "repair", *repair, "--output", tmp_path / "ranks.safetensors", "--batch-size", 8)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1
    assert "37 images measured" in " ".join(done.stdout.split())
    assert "2 ranks" in " ".join(done.stdout.split())
    alone = [*repair[:-2], "--method", "asr", "--dense", files / "dense.safetensors"]
    alone += ["--output", tmp_path / "alone.safetensors"]
    assert CliRunner().invoke(cli.app, ["repair", *map(str, alone)]).exit_code == 0
    one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("alone", "ranks"))
    torch.testing.assert_close(one, two, rtol=2e-5, atol=2e-6)


def test_nothing_is_written_under_torchrun_when_a_rank_fails(files, tmp_path):
    (tmp_path / "failing.py").write_text(
        "import os\n"
        "from resuscitate.models import digitnet\n"
        "def build():\n"
        "    model = digitnet()\n"
        "    if os.environ['RANK'] == '1':\n"
        "        model.layer3.register_forward_hook(lambda *_: os.kill(os.getpid(), 9))\n"
        "    return model\n"
    )
    arguments = ["--model", "failing:build", "--calibration", files / "images.npy", "--method", "bn"]
    arguments += ["--pruned", files / "pruned.safetensors", "--output", tmp_path / "out.safetensors"]
    done = torchrun(tmp_path, "repair", *arguments)
    assert done.returncode != 0
    assert not (tmp_path / "out.safetensors").exists()
