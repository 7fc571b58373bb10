"""All commands: how they fail, what they are called, how they agree with the library."""

import inspect
import json
from dataclasses import fields
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import resuscitate
from resuscitate import cli
from resuscitate.methods.base import registered
from resuscitate.methods.batchnorm import RECALIBRATIONS
from resuscitate.pruning.allocation import METHODS as ALLOCATIONS
from resuscitate.runtime.options import DEFAULTS
from resuscitate.workflows.recoverability import presets
from tests.networks import chain
from tests.user import MODEL, command, invoke, repair, unframed

OF_FILES = ("mean", "std", "size", "output", "report", "timeout", "workers")
# what only a program can give, what a batch of files does not have, and what a terminal decides
PROGRAMS = {"forward_fn", "max_batches", "group", "progress"}
RECALIBRATION = {f"{name}_{field.name}" for name, kind in RECALIBRATIONS.items() for field in fields(kind)}

USAGE = [
    (["--method", "magic"], "--method magic is unknown; there are 'auto', 'bn', 'layerwise', 'channelwise', 'asr'"),
    (["-m", "resnet21"], "did you mean 'resnet"),
    (["-o", "repaired.pt"], "name it repaired.safetensors"),
    (["--mean", "red"], "'red' is neither a number"),
    (["--size", "large"], "'large' is not a size"),
    (["--include", "33"], "--include 33 selects no layer; did you mean"),
    (["--method", "asr", "--prior", "mode"], "--prior mode must be 'median', 'mean' or a positive variance"),
    (
        ["--prior", "mean"],
        "method 'refit', which 'auto' stands for here, has no option 'prior'; it is for method 'asr'",
    ),
    (["--method", "asr", "--no-relu-aware"], "method 'asr' has no option 'relu_aware'; it is for method 'refit'"),
    (["--recalibrate", "exact", "--ema-batches", "3"], "--ema-batches is for --recalibrate ema"),
    (["--exact-samples", "8", "--ema-batches", "3"], "--ema-batches is for --recalibrate ema"),
    (["-o", "./dense.safetensors"], "--dense and --output name one file"),
    (["--report", "report.txt"], "a report is written as .json or .csv"),
    (["--method", "refit", "--ridge", "-5"], "--ridge -5 must be at least 0"),
    (["--method", "asr", "--eps", "small"], "--eps small must be a number"),
    (["--method", "bn", "--recalibrate", "none"], "does nothing; choose 'exact' or 'ema'"),
]
FAILURES = [
    (["--pruned", "none.safetensors"], "none.safetensors"),
    (["--pruned", "none.pt"], "none.pt: No such file"),
    (["--dense", "pickled.pt"], "pickled.pt: not a checkpoint that can be read without unpickling"),
    (["-m", "digitnet"], "pruned.safetensors does not fit the model"),
    (["-m", "users_networks:large"], "--model users_networks:large cannot be built: AttributeError"),
    (["-m", "nowhere:small"], "No module named 'nowhere'"),
    (["-m", "nowhere.py:small"], "there is no file nowhere.py"),
    (["-m", "users_networks:broken"], "RuntimeError: out of networks"),
    (["-m", "users_networks:number"], "gave a int, not a torch.nn.Module"),
    (["-c", "none.npz"], "none.npz"),
    (["-c", "dense.safetensors"], "dense.safetensors: holds no images; they are read from .npz, .npy, .parquet"),
    (["-c", "grey.npz"], "grey.npz: the model cannot run on its images of 1x10x12"),
    (["-c", "gap.npz"], "are NaN or infinite"),
    (["--recalibrate", "ema"], "20 batches of 128 need 2560 images"),
    (["-o", "none/out.safetensors"], "none: no such folder"),
    (["--report", "."], ".: exists and is not a regular file"),
]


class TestFailing:
    @pytest.fixture(autouse=True)
    def inputs(self, user):
        torch.save(chain(), "pickled.pt")
        np.savez("grey.npz", images=np.zeros((40, 10, 12), np.uint8))
        np.savez("gap.npz", images=np.full((40, 3, 10, 12), np.nan, np.float32))
        before = {path: path.read_bytes() for path in user.iterdir() if path.is_file()}
        yield
        assert {path: path.read_bytes() for path in user.iterdir() if path.is_file()} == before

    @pytest.mark.parametrize(("words", "message"), USAGE, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
    def test_a_command_that_makes_no_sense_is_2(self, words, message):
        done = repair("--report", "run.json", *words, code=2)
        assert message in unframed(done.stderr)
        assert done.stdout == ""

    @pytest.mark.parametrize(("words", "message"), FAILURES, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
    def test_what_cannot_be_done_is_1_and_one_line(self, words, message):
        done = repair("--report", "run.json", *words, code=1)
        assert message in done.stderr
        assert done.stderr.startswith("Error: ")
        assert done.stderr.count("\n") == 1
        assert done.stdout == ""

    @pytest.mark.parametrize("words", [[], ["--resume", "run.journal"], ["--resume=run.journal"]])
    def test_an_interrupt_is_130_and_one_line(self, monkeypatch, words):
        def interrupted(**options):
            raise KeyboardInterrupt

        monkeypatch.setattr("resuscitate.cli.repair.run", interrupted)
        goes_on = ": the same command goes on from its journal" if words else ""
        assert repair(*words, code=130).stderr == f"Interrupted{goes_on}\n"

    def test_a_method_that_needs_dense_weights_says_so(self):
        options = ["--pruned", "pruned.safetensors", "-c", "images.npz", "-o", "out.safetensors"]
        done = invoke("repair", "-m", MODEL, *options, code=2)
        assert "give --dense, or --method bn" in unframed(done.stderr)

    def test_an_impossible_sparsity_is_2(self):
        options = ["--dense", "dense.safetensors", "-o", "out.safetensors"]
        assert "not in [0, 1)" in invoke("prune", "-m", MODEL, "--sparsity", 1.5, *options, code=2).stderr
        assert "give --sparsity, such as 0.9, or --densities" in unframed(
            invoke("prune", "-m", MODEL, *options, code=2).stderr
        )

    def test_an_option_without_effect_and_a_picture_of_no_known_kind_are_2(self):
        options = ["--dense", "dense.safetensors", "-c", "images.npz", "-o", "out.safetensors"]
        done = invoke("compress", "-m", MODEL, "--sparsity", 0.5, "--trials", 3, *options, code=2)
        assert "--trials is for --target-agreement" in unframed(done.stderr)
        assert "written as .png or .pdf or .svg" in unframed(invoke("demo", "-o", "demo.xyz", code=2).stderr)

    def test_a_disk_that_fills_up_leaves_nothing(self, monkeypatch):
        def fill(tensors, path, metadata):
            Path(path).write_text("half")
            raise OSError(28, "No space left on device", str(path))

        monkeypatch.setattr("resuscitate.utils.files.save_file", fill)
        assert "No space left" in repair("--report", "run.json", code=1).stderr

    def test_by_the_real_command_there_is_no_traceback(self):
        options = ["--pruned", "pickled.pt", "-c", "images.npz", "-o", "out.safetensors", "--method", "bn"]
        done = command("repair", "-m", MODEL, *options, code=1)
        assert done.stderr.startswith("Error: pickled.pt: not a checkpoint")
        assert done.stderr.count("\n") == 1


def test_the_command_line_has_the_choices_of_the_library():
    assert set(get_args(cli.repair.Recalibrate)) == {"auto", *RECALIBRATIONS, "none"}
    assert {"measured", *get_args(cli.prune.Allocation)} == set(ALLOCATIONS)
    assert ", ".join(presets()) in unframed(invoke("map", "--help").stdout)


@pytest.mark.parametrize(
    ("function", "own", "programmatic"),
    [
        (
            resuscitate.repair,
            {"pruned", "dense_stats", "json_", "fill", "test", "detail", *RECALIBRATION, *OF_FILES},
            set(),
        ),
        (
            resuscitate.sparsify,
            {"dense", "masks", "max_samples", *OF_FILES},
            # a smaller network has no name to build it by again; the images are the example
            {"remove", "example"},
        ),
        (
            resuscitate.recoverability,
            {"model", "dense", "test", "test_samples", "plot", "damage", *OF_FILES} - {"workers"},
            {"evaluate", "resume", "chance"},
        ),
        (
            resuscitate.compress,
            # without a sparsity, `compress_to_agreement` is called
            {"dense", "masks", "sparsity", "target_agreement", "trials", "json_", *OF_FILES},
            set(),
        ),
        (
            resuscitate.regrow,
            {"pruned", "masks", "write_masks", "denser", "test", "json_", *OF_FILES},
            # files stand for the labelled batches and for what evaluates; training takes a program
            {"evaluate", "finetune", "loss"},
        ),
        (resuscitate.DenseStatistics.measure, {"model", *OF_FILES}, set()),
    ],
    ids=["repair", "prune", "map", "compress", "regrow", "stats"],
)
def test_options_are_named_and_preset_like_the_keywords(function, own, programmatic):
    commands = {
        resuscitate.repair: cli.repair.repair,
        resuscitate.sparsify: cli.prune.prune,
        resuscitate.recoverability: cli.map.map_,
        resuscitate.compress: cli.compress.compress,
        resuscitate.regrow: cli.regrow.regrow,
        resuscitate.DenseStatistics.measure: cli.repair.stats,
    }
    options = inspect.signature(commands[function]).parameters
    keywords = {name: each.default for name, each in inspect.signature(function).parameters.items()} | DEFAULTS
    if "method" in keywords:
        keywords |= {field.name: None for method in registered().values() for field in fields(method)}
    del keywords["options"]
    assert options.keys() - own == keywords.keys() - own - programmatic - PROGRAMS
    for name in options.keys() & keywords.keys() - {"calibration", "dense"} - own:
        preset = keywords[name]
        written = ",".join(map(str, preset)) if isinstance(preset, tuple) else preset
        assert options[name].default == written, name


def test_verbose_logs_what_a_file_needed_to_fit(user):
    save_file({f"module.{k}": v for k, v in load_file("dense.safetensors").items()}, "wrapped.safetensors")
    words = ["prune", "-m", MODEL, "--dense", "wrapped.safetensors", "--sparsity", 0.5, "-o", "out.safetensors"]
    assert "wrapped.safetensors: stripped module." in command("--verbose", *words).stderr


def test_help_and_version():
    assert command("--version").stdout == f"resuscitate {resuscitate.__version__}\n"
    for words in (["--help"], ["repair", "-h"]):
        assert "Usage" in invoke(*words).stdout
    for name in ("demo", "prune", "repair", "compress", "regrow", "stats", "map", "report", "export", "doctor"):
        assert name in invoke("--help").stdout
    assert "or n:m, such as 2:4, which" in unframed(invoke("prune", "--help").stdout)


@pytest.mark.parametrize("method", registered())
def test_every_field_of_a_method_is_an_option(user, method):
    given = {"prior": "mean", "bias": False, "eps": 1e-3, "ridge": 0.5, "relu_aware": False, "means": "kernel"}
    own = {field.name: given[field.name] for field in fields(registered()[method])}
    words = []
    for name, value in own.items():
        flag = name.replace("_", "-")
        words += [f"--no-{flag}"] if value is False else [f"--{flag}", value]
    repair("--method", method, *words, "--report", "run.json")
    assert json.loads(Path("run.json").read_text())["options"] == own
