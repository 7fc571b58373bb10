"""The benchmarks run: what needs a GPU, on tiny tensors in the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.slow
def test_the_gpu_benchmark_runs_dry(tmp_path):
    pytest.importorskip("triton")
    pytest.importorskip("matplotlib")
    output = tmp_path / "gpu.json"
    table = run("benchmarks/kernels.py", "--dry-run", "--output", str(output))
    assert "these figures mean nothing" in table
    found = json.loads(output.read_text())
    assert {row["operation"] for row in found["rows"]} == {"moments", "paired", "affine"}
    assert all(row["right"] for row in found["rows"])
    assert {row["job"] for row in found["repairs"]} == {"sequential ASR", "exact BatchNorm"}
    assert found["gpu"] is None
    assert output.with_suffix(".png").stat().st_size > 1000
    assert "| moments |" in output.with_suffix(".md").read_text()


def test_the_cpu_benchmark_runs(tmp_path):
    pytest.importorskip("pytest_benchmark")
    output = tmp_path / "cpu.json"
    command = ["benchmarks/cpu_kernels.py", "--threads", "1", "--rounds", "1", "--only", "64x512x1x1 and fp32"]
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
    run("benchmarks/recoverable.py", "--epochs", "1", "--seeds", "1", "--calibration", "64", *options)
    rows = json.loads((tmp_path / "recoverable.json").read_text())["rows"]
    assert len(rows) == 4 * 4
    assert {row["stored"] > 0 for row in rows if row["recovery"] == "mean per kernel"} == {True}
    assert "| hyperspherical + penalty (" in (tmp_path / "recoverable.md").read_text()
