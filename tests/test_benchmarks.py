"""The benchmarks run at small size; the GPU benchmark on tiny tensors in Triton's interpreter."""

import copy
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import resuscitate
from benchmarks.accuracy.peers import distil, one_shot
from benchmarks.accuracy.two_stage import aggregate
from benchmarks.networks import build
from benchmarks.networks.checkpoints import save_weights
from tests.compare import same_state
from tests.networks import depthwise, images, seeded

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> str:
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "python")))
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "ASR_BACKEND")}
    environment = {k: v for k, v in environment.items() if not k.startswith("PYTEST_")}  # of the run around this one
    environment |= {"PYTHONPATH": paths, "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda path: path.stem)
def test_a_result_says_by_which_benchmark_it_was_measured(path):
    found = json.loads(path.read_text())
    if "_resnet" not in path.stem:  # parts of recoverability.json have no command of their own
        assert found["command"].startswith("python benchmarks/")
    assert "/tmp" not in path.read_text()


@pytest.mark.slow
def test_the_gpu_benchmark_runs_dry(tmp_path):
    pytest.importorskip("triton")
    pytest.importorskip("matplotlib")
    output = tmp_path / "gpu.json"
    table = run("benchmarks/speed/kernels.py", "--dry-run", "--output", str(output))
    assert "these figures mean nothing" in table
    found = json.loads(output.read_text())
    assert {row["operation"] for row in found["rows"]} == {"moments", "paired", "affine", "refit 3x3", "refit 1x1"}
    assert all(row["right"] for row in found["rows"])
    assert {row["job"] for row in found["repairs"]} == {"sequential ASR", "exact BatchNorm"}
    assert found["gpu"] is None
    assert output.with_suffix(".png").stat().st_size > 1000
    assert "| moments |" in output.with_suffix(".md").read_text()


def test_inductor_that_does_not_end_costs_its_own_row_only(monkeypatch):
    pytest.importorskip("triton")
    from benchmarks.speed import kernels

    row = {"operation": "affine", "shape": [2, 3, 4, 4], "layout": "NCHW", "dtype": "fp32"}
    times = kernels.measure_inductor_apart("cpu", row, 2)
    assert times is not None
    assert min(times[0]) > 0
    assert kernels.measure_inductor_apart("cpu", row | {"operation": "none"}, 2) is None
    monkeypatch.setattr(kernels, "INDUCTOR_SECONDS", 0)
    assert kernels.measure_inductor_apart("cpu", row, 2) is None


def test_a_test_that_is_stopped_on_the_gpu_has_not_passed(tmp_path):
    pytest.importorskip("triton")
    from benchmarks.speed.gpu import Job, Outcomes

    kept = tmp_path / "tests.json"
    outcomes = Outcomes(kept, "this code")
    for name, code in (("passes", ""), ("fails", "1 / 0"), ("hangs", "import time; time.sleep(99)")):
        job = Job([sys.executable, "-c", code], tmp_path / "log")
        outcomes.wait(name, job, time.monotonic() + (0 if name == "hangs" else 60))
    assert Outcomes(kept, "this code").of == {"passes": "passed", "fails": "failed", "hangs": "stopped"}
    assert Outcomes(kept, "other code").of == {}


def test_a_file_of_tests_that_was_stopped_goes_on_behind_the_tests_that_have_passed(tmp_path):
    pytest.importorskip("triton")
    from benchmarks.speed import gpu

    ran, suite, passed = tmp_path / "ran.txt", tmp_path / "test_three.py", tmp_path / "passed.txt"
    suite.write_text(
        "import pathlib, pytest, time\n"
        f"ran = pathlib.Path({str(ran)!r})\n"
        "def note(name):\n    return ran.open('a').write(name + '\\n')\n"
        "def test_passes():\n    note('passes')\n"
        "@pytest.fixture\ndef fails_later():\n    yield\n    assert ran.read_text().count('fixture') > 1\n"
        "def test_with_a_fixture(fails_later):\n    note('with a fixture')\n"
        "def test_hangs():\n    note('hangs')\n    time.sleep(0 if ran.read_text().count('hangs') > 1 else 99)\n"
    )
    command = next(iter(gpu.tests(dry_run=True, passed=passed).values()))
    command = [str(suite) if part.startswith("tests/") else part for part in command]
    del command[command.index("-k") : command.index("-k") + 2]
    job = gpu.Job(command, tmp_path / "log")
    deadline = time.monotonic() + 60
    while "hangs" not in (ran.read_text() if ran.exists() else "") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert job.status(0) is None
    assert gpu.Job(command, tmp_path / "log").status(time.monotonic() + 60) == 0
    assert ran.read_text().split("\n") == ["passes", *2 * ["with a fixture", "hangs"], ""]
    # all have passed
    assert gpu.Job(command, tmp_path / "log").status(time.monotonic() + 60) == 5


def test_the_headline_has_the_draws_of_each_tool_and_the_seconds_that_were_measured():
    from benchmarks.accuracy import headline

    def row(draw, accuracy, seconds):
        return {"net": "dscnn", "target": "50%", "draw": draw, "dense": 90.0, "accuracy": accuracy, "seconds": seconds}

    rows = [
        row(0, {"no repair": 10.0, "update_bn": 70.0, "NNCF adaptation": 60.0}, {"no repair": 0.1, "update_bn": 2.0}),
        row(1, {"no repair": 12.0, "update_bn": 72.0}, {}),
    ]
    assert (
        headline.table(rows).splitlines()[-1] == "| DS-CNN (90.0), 50% | 11.0 ± 1.4 | **71.0** ± 1.4 (2.0 s) | 60.0 |"
    )
    assert "NNCF" not in headline.table(rows[1:])


def test_the_ablation_leaves_out_each_part_and_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    from benchmarks.accuracy import ablation

    dense = seeded(depthwise)
    monkeypatch.setattr(ablation, "case", lambda *_: (dense, images(40), lambda model: model[0].weight.sum().item()))
    monkeypatch.setattr(ablation, "SPARSITIES", {"resnet20": (0.6,)})
    monkeypatch.setattr(ablation, "data_folder", lambda folder: folder)
    for _ in range(2):
        ablation.main(nets="resnet20", output=tmp_path)
    rows = json.loads((tmp_path / "ablation.json").read_text())["rows"]
    found = {row["variant"]: row["error"] for row in rows}
    assert [*found] == [*ablation.VARIANTS]
    assert len(rows) == len(found)
    for variant, error in found.items():
        assert (error == found["as it is"]) == (variant == "as it is"), variant
    assert (tmp_path / "ablation.md").read_text().count("\n") == 2 + len(found)


def test_a_compact_network_is_the_one_that_was_trained_or_a_message_says_how(tmp_path, monkeypatch):
    from benchmarks.common import inputs

    monkeypatch.setattr(inputs, "COMPACT", tmp_path)
    with pytest.raises(SystemExit, match="mobilenet_v2 is not trained: `make compact` trains it"):
        inputs.network("mobilenet_v2", tmp_path, images())
    trained = build("mobilenet_v2")
    save_weights(trained, tmp_path / "mobilenet_v2.safetensors", {})
    found = inputs.network("mobilenet_v2", tmp_path, images())
    assert not found.training
    assert same_state(found.state_dict(), trained.state_dict())


def test_the_cpu_benchmark_runs(tmp_path):
    pytest.importorskip("pytest_benchmark")
    output = tmp_path / "cpu.json"
    command = ["benchmarks/speed/cpu_kernels.py", "--threads", "1", "--rounds", "1", "--only", "64x512x1x1 and fp32"]
    run(*command, "--output", str(output))
    rows = json.loads(output.read_text())["rows"]
    assert {row["operation"] for row in rows} == {"moments", "moments, mean 10 std", "paired", "affine"}
    for row in rows:
        assert row["ms_q1_median_q3"]["ours"][1] > 0
        assert "ours" not in row["ratio"]
    # a second run compares with the first
    assert "before" in run(*command, "--output", str(output))


def test_training_for_pruning_runs(tmp_path):
    pytest.importorskip("sklearn")
    options = ["--sparsities", "0.8", "--output", str(tmp_path)]
    run("benchmarks/accuracy/recoverable.py", "--epochs", "1", "--seeds", "1", "--calibration", "64", *options)
    rows = json.loads((tmp_path / "recoverable.json").read_text())["rows"]
    assert len(rows) == 4 * 4
    assert {row["stored"] > 0 for row in rows if row["recovery"] == "mean per kernel"} == {True}
    assert "| hyperspherical + penalty (" in (tmp_path / "recoverable.md").read_text()


@pytest.mark.slow
@pytest.mark.real_data
def test_the_repair_benchmark_measures_what_a_user_gets_first(tmp_path, monkeypatch):
    data = Path(os.environ.get("RESUSCITATE_DATA", ROOT.parent / "shared" / "data"))
    if not (data / "cifar10_resnet20.safetensors").exists():
        pytest.skip("needs the trained networks and images")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    script = "import torch; print(torch.get_num_threads())"
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_"))}
    threads = int(subprocess.run([sys.executable, "-c", script], env=bare, capture_output=True, check=True).stdout)
    output = tmp_path / "repair.json"
    options = ["--images", "64", "--networks", "resnet20", "--rounds", "1", "--slow-rounds", "0", "--no-scale"]
    run("benchmarks/speed/repair.py", *options, "--data", str(data), "--output", str(output))
    rows = json.loads(output.read_text())["rows"]
    settings = [("default", threads), ("tuned", 1)]
    jobs = ("sequential ASR", "exact BatchNorm")
    assert [(row["malloc"], row["threads"], row["job"]) for row in rows] == [
        (*s, job) for s in settings for job in jobs
    ]
    for row in rows[::2]:
        seconds = row["seconds"]
        assert row["ratio"]["ours / bare forwards"] == seconds["ours"] / seconds["bare forwards"]
    heads = [line for line in output.with_suffix(".md").read_text().splitlines() if "ours, s" in line]
    assert heads[0].startswith(f"| sequential ASR, {threads} thread{'s' * (threads > 1)}, default malloc |")
    assert heads[2].startswith("| sequential ASR, 1 thread, tuned malloc |")


def test_aggregation_reads_a_removed_channel_from_its_copy():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3))
    with torch.no_grad():
        dense[0].weight[3], dense[0].bias[3] = dense[0].weight[1], dense[0].bias[1]
    pruned, images = copy.deepcopy(dense), torch.randn(64, 3, 8, 8)
    with torch.no_grad():
        pruned[2].weight[:, 3] = 0
        assert aggregate(pruned, dense, images.split(16), ridge=1e-7) == ["2"]
        assert (pruned[2].weight[:, 3] == 0).all()
        torch.testing.assert_close(pruned(images), dense(images), atol=1e-4, rtol=0)


def peers_network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8 * 6 * 6, 5)).eval(), torch.randn(96, 4, 8, 8)


@pytest.mark.parametrize(("target", "n_of_m"), [({"sparsity": 0.6}, None), ({"pattern": "2:4"}, (2, 4))])
def test_one_shot_pruning_beats_magnitude_at_the_same_densities(target, n_of_m):
    dense, images = peers_network()
    pruned, other = copy.deepcopy(dense), copy.deepcopy(dense)
    masks = resuscitate.sparsify(pruned, **target)
    one_shot(other, images, masks, n_of_m)
    found = resuscitate.Masks.from_zeros(other)
    for name, mask in masks.items():
        assert abs(float(found[name].float().mean() - mask.float().mean())) < 0.02
        if n_of_m:
            assert (found[name].unflatten(1, (-1, 4)).sum(2) == 2).all()
    with torch.no_grad():
        errors = [float((each(images) - dense(images)).norm()) for each in (pruned, other)]
    assert errors[1] < 0.8 * errors[0]


def test_distillation_brings_the_outputs_nearer_and_keeps_the_masks():
    dense, images = peers_network()
    pruned = copy.deepcopy(dense)
    masks = resuscitate.sparsify(pruned, 0.6)
    before = (pruned(images) - dense(images)).norm().item()
    distil(pruned, dense, images, masks, seconds=2.0, augmented=False)
    assert (pruned(images) - dense(images)).norm().item() < before
    assert resuscitate.Masks.from_zeros(pruned) == masks


@pytest.mark.slow
@pytest.mark.real_data
def test_the_picture_of_a_run_has_both_commands_and_the_last_lines(tmp_path):
    data = Path(os.environ.get("RESUSCITATE_DATA", ROOT.parent / "shared" / "data"))
    if not (data / "cifar10_resnet20.safetensors").exists():
        pytest.skip("needs the trained networks and images")
    run("benchmarks/accuracy/picture.py", "--data", str(data), "--output", str(tmp_path / "picture.svg"))
    shown = (tmp_path / "picture.txt").read_text()
    assert [line.split()[2] for line in shown.splitlines() if line.startswith("$ ")] == ["prune", "repair"]
    assert [line.split()[0] for line in shown.splitlines()[-5:]] == ["agreement", "sparsity", "size", "time", "next"]
    assert "@font-face" not in (tmp_path / "picture.svg").read_text()
