"""The demo: its command, its figure, and that its sentences follow from its numbers."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import asr_kernels
import resuscitate
from resuscitate import cli, demo
from resuscitate.errors import ResuscitateError
from resuscitate.reports import plots

PNG = b"\x89PNG\r\n\x1a\n"


def result(**row):
    """Made-up results, the same at every sparsity."""
    accuracy = dict.fromkeys(demo.METHODS, 50.0) | {demo.NO_REPAIR: 10.0} | row
    # zero variances cannot be drawn on a log scale
    variances = {"dense": [1.0, 3.0, 2.0], "pruned": [0.01, 0.0, 0.02], "repaired": [0.5, 0.0, 1.5]}
    return demo.Demo(98.0, 1280, 517, dict.fromkeys(demo.SPARSITIES, accuracy), variances)


def printed(numbers):
    console = Console(width=140, file=io.StringIO())
    console.print(numbers)
    return console.file.getvalue()


@pytest.mark.slow
def test_the_command_prints_a_table_and_draws_a_picture(tmp_path):
    folders = {str(Path(package.__file__).parents[1]) for package in (asr_kernels, resuscitate)}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    line = [sys.executable, "-m", "resuscitate", "demo", "--epochs", "1", "--output", "picture.png"]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    table = done.stdout.splitlines()
    for column in demo.METHODS:
        assert all(any(word in row for row in table) for word in column.split(", "))
    for sparsity in demo.SPARSITIES:
        numbers = next(row for row in table if row.strip().startswith(f"{sparsity:.0%}")).split()[1:]
        assert len(numbers) == len(demo.METHODS)
        assert all(0 <= float(number) <= 100 for number in numbers)
    assert "517 held-out digits" in done.stdout
    assert "20 batches of 64" in done.stdout
    assert os.listdir(tmp_path) == ["picture.png"]
    picture = (tmp_path / "picture.png").read_bytes()
    assert picture.startswith(PNG)
    assert len(picture) > 20_000


def test_the_findings_follow_from_the_numbers():
    strong = printed(result(**{demo.BN_EXACT: 93.0, "ASR": 94.0}))
    assert f"At {demo.SHOWN_SPARSITY:.0%} sparsity the network classifies 10.0 % correctly instead of 98.0" in strong
    assert "the best repair, ASR, raises this to 94.0" in strong
    assert "Exact BatchNorm statistics alone reach 93.0, in itself a strong repair" in strong
    assert "strong repair" not in printed(result(**{demo.BN_EXACT: 40.0}))
    assert "no repair improves the accuracy" in printed(result(**{demo.NO_REPAIR: 97.0}))


def test_channels_without_variance_can_be_drawn(tmp_path):
    demo.draw_demo(result(), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)
    demo.draw_demo(result(), tmp_path / "a.svg")
    assert b"<svg" in (tmp_path / "a.svg").read_bytes()


def test_a_picture_with_an_unknown_ending_is_refused_and_not_written(tmp_path):
    with pytest.raises(ValueError, match="txt"):
        demo.draw_demo(result(), tmp_path / "a.txt")
    assert os.listdir(tmp_path) == []


def test_without_matplotlib_the_table_is_printed_and_the_picture_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "run", lambda **options: result())
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    done = CliRunner().invoke(cli.app, ["demo", "--output", str(tmp_path / "a.png")])
    assert done.exit_code == 0
    assert "channel-wise" in done.stdout
    assert "picture skipped: it needs matplotlib, pip install 'resuscitate[plots]'" in done.stdout
    assert os.listdir(tmp_path) == []
    with pytest.raises(ResuscitateError, match=r"pip install 'resuscitate\[plots\]'"):
        demo.draw_demo(result(), tmp_path / "a.png")


def test_without_scikit_learn_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    done = CliRunner().invoke(cli.app, ["demo", "--no-plot"])
    assert done.exit_code == 1
    assert done.stderr == "Error: the demo needs scikit-learn's digits: pip install 'resuscitate[demo]'\n"


def test_a_picture_that_cannot_be_written_is_refused_before_training(monkeypatch):
    monkeypatch.setattr(demo, "run", pytest.fail)
    done = CliRunner().invoke(cli.app, ["demo", "--output", "no/such/folder.png"])
    assert done.exit_code == 1
    assert "no such folder" in done.stderr


def test_the_random_state_and_the_number_of_threads_are_unchanged(monkeypatch):
    monkeypatch.setattr(demo, "SPARSITIES", (demo.SHOWN_SPARSITY,))
    monkeypatch.setattr(demo, "METHODS", {demo.NO_REPAIR: {}, demo.SHOWN_METHOD: demo.METHODS[demo.SHOWN_METHOD]})
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    first, second = demo.run(seed=1, epochs=1, progress=False), demo.run(seed=1, epochs=1, progress=False)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert (first.accuracy, first.variances) == (second.accuracy, second.variances)
