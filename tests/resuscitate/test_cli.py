"""The command line by its real command: what it writes, what it prints, how it fails."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import asr_kernels
import resuscitate
from resuscitate import cli
from resuscitate.calibration import load_images
from resuscitate.sparsify import ALLOCATIONS
from tests.networks import chain, seeded

# the names that resuscitate and resuscitate.repair have for users are functions, not these modules
repair_module = sys.modules["resuscitate.repair"]

# what a user's own module has: a network as torch has it, one without BatchNorm or bias, and no network
NETWORKS = """
from torch import nn

def small():
    stages = []
    for c_in, c_out in ((3, 8), (8, 8), (8, 16)):
        stages += [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))

def bare():
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False), nn.ReLU())

def broken():
    raise RuntimeError("out of\\nnetworks")

number = int
"""
MODEL, BARE = "users_networks:small", "users_networks:bare"
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small only lose by a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A user's folder: a module, dense and pruned weights for each network in it, and 40 images."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "users_networks.py").write_text(NETWORKS)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 10, 12, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", images=pixels)
    bare = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False), nn.ReLU())
    for name, dense in (("", seeded(chain)), ("bare_", bare)):
        save_file(dense.state_dict(), folder / f"{name}dense.safetensors")
        resuscitate.sparsify(dense, 0.7)
        save_file(dense.state_dict(), folder / f"{name}pruned.safetensors")
    return folder


@pytest.fixture
def user(files, monkeypatch):
    """Standing in the user's folder; what a test writes there goes again."""
    monkeypatch.chdir(files)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(files.iterdir())
    yield files
    for path in set(files.iterdir()) - before:
        if path.is_file():
            path.unlink()


def command(*words, code=0):
    """Run the real command in a pipe."""
    folders = {str(Path(package.__file__).parents[1]) for package in (asr_kernels, resuscitate)}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "resuscitate", *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == code, done.stderr
    return done


def invoke(*words, code=0):
    """Run the command in this process."""
    done = CliRunner().invoke(cli.app, [str(word) for word in words])
    assert done.exit_code == code, done.output
    return done


def repair(*words, code=0, prefix=""):
    weights = {"--pruned": f"{prefix}pruned.safetensors", "--dense": f"{prefix}dense.safetensors"}
    fixed = [word for pair in weights.items() for word in pair]
    model = BARE if prefix else MODEL
    return invoke("repair", "-m", model, *fixed, "-c", "images.npz", "-o", "repaired.safetensors", *words, code=code)


def loaded(path):
    model = chain()
    model.load_state_dict(load_file(path), strict=True)
    return model.eval()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def unframed(text):
    """What Rich has broken into lines and put a frame around."""
    return " ".join(text.replace("│", "").split())


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


class TestPrune:
    def test_writes_what_sparsify_does_and_shows_each_layer(self, user):
        weights = ["--dense", "dense.safetensors", "--exclude", "11", "-o", "out.safetensors"]
        done = command("prune", "--model", MODEL, "--sparsity", 0.8, "--allocation", "uniform", *weights)
        expected = loaded("dense.safetensors")
        masks = resuscitate.sparsify(expected, 0.8, allocation="uniform", exclude="11")
        assert same(load_file("out.safetensors"), expected.state_dict())
        assert done.stderr == ""
        for row in masks.table():
            assert any(f"{row.kept}" in line and f"{row.sparsity:.2%}" in line for line in done.stdout.splitlines())
        assert f"{masks.sparsity:.2%} of these weights are zero; written to out.safetensors" in done.stdout
        written = metadata("out.safetensors")
        assert written["method"] == "prune"
        assert json.loads(written["options"])["sparsity"] == 0.8
        assert written["command"].startswith("resuscitate prune --model")

    def test_a_pattern_needs_no_sparsity(self, user):
        invoke("prune", "-m", MODEL, "--dense", "dense.safetensors", "--pattern", "2:4", "-o", "out.safetensors")
        expected = loaded("dense.safetensors")
        resuscitate.sparsify(expected, pattern="2:4")
        assert same(load_file("out.safetensors"), expected.state_dict())

    def test_an_input_may_be_written_over(self, user):
        weights = load_file("dense.safetensors")
        save_file(weights, "mine.safetensors")
        options = ["--sparsity", 0.5, "--dense", "mine.safetensors", "-o", "mine.safetensors"]
        invoke("prune", "-m", MODEL, *options)
        assert not same(load_file("mine.safetensors"), weights)


class TestRepair:
    def test_writes_what_repair_does(self, user):
        images = load_images("images.npz", mean=MEAN, std=STD, max_samples=32, seed=0)
        expected = loaded("pruned.safetensors")
        resuscitate.repair(expected, loaded("dense.safetensors"), images, method="channelwise")
        weights = ["--pruned", "pruned.safetensors", "--dense", "dense.safetensors", "-o", "repaired.safetensors"]
        numbers = ["--mean", "0.4,0.5,0.6", "--std", "0.2 0.25 0.3", "--max-samples", 32]
        options = ["-m", MODEL, "-c", "images.npz", "--method", "channelwise", *numbers]
        done = command("repair", *options, *weights)
        assert same(load_file("repaired.safetensors"), expected.state_dict())
        assert done.stderr == ""
        assert "channelwise, sequential" in done.stdout
        assert "32 images of 3x10x12 from images.npz, normalised with mean 0.4 0.5 0.6, std 0.2 0.25 0.3" in done.stdout
        assert f"per channel mean {images[:, 0].mean():.3g} " in done.stdout
        assert "written to repaired.safetensors" in done.stdout
        written = metadata("repaired.safetensors")
        assert written["method"] == "channelwise"
        assert json.loads(written["options"])["mean"] == MEAN
        assert json.loads(written["versions"])["resuscitate"] == resuscitate.__version__

    @pytest.mark.parametrize(
        ("words", "keywords"),
        [
            (["--schedule", "parallel", "--recalibrate", "exact"], {"schedule": "parallel", "recalibrate": "exact"}),
            (["--gain-samples", "8", "-b", "5"], {"gain_samples": 8, "batch_size": 5}),
            (["--prior", "0.5", "--no-bias", "--no-skip-first"], {"prior": 0.5, "bias": False, "skip_first": False}),
            (["--prior", "mean", "--skip-last"], {"prior": "mean", "skip_last": True}),
            (["--include", "3", "--include", "6", "--exclude", "3"], {"include": ["3", "6"], "exclude": "3"}),
            (
                ["--recalibrate", "ema", "--ema-batches", "3", "--ema-batch-size", "10", "--ema-momentum", "0.5"],
                {"recalibrate": "ema", "ema_batches": 3, "ema_batch_size": 10, "ema_momentum": 0.5},
            ),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_options_are_passed_on(self, user, words, keywords):
        repair(*words)
        expected = loaded("pruned.safetensors")
        resuscitate.repair(expected, loaded("dense.safetensors"), load_images("images.npz"), **keywords)
        assert same(load_file("repaired.safetensors"), expected.state_dict())

    def test_method_bn_needs_no_dense_weights(self, user):
        options = ["--pruned", "pruned.safetensors", "-c", "images.npz", "-o", "out.safetensors", "--method", "bn"]
        invoke("repair", "-m", MODEL, *options)
        expected = loaded("pruned.safetensors")
        resuscitate.recalibrate_batchnorm(expected, load_images("images.npz"))
        assert same(load_file("out.safetensors"), expected.state_dict())

    def test_only_as_many_images_are_read_as_are_used(self, user, monkeypatch):
        asked = []
        original = resuscitate.calibration.load_images
        monkeypatch.setattr(
            resuscitate.calibration,
            "load_images",
            lambda *args, **options: asked.append(options["max_samples"]) or original(*args, **options),
        )
        repair("--gain-samples", 8)
        repair("--gain-samples", 8, "--recalibrate", "exact", "--recalibrate-samples", 16)
        repair("--gain-samples", 8, "--recalibrate", "exact", "--max-samples", 20)
        assert asked == [8, 16, 20]

    def test_json_is_the_report_on_the_terminal_and_in_a_file(self, user):
        done = repair("--json", "--report", "run.json")
        document = json.loads(done.stdout)
        assert document == json.loads(Path("run.json").read_text())
        assert [layer["name"] for layer in document["layers"]] == ["0", "3", "6", "11"]
        assert document["calibration"]["images"] == 40
        assert document["provenance"]["options"]["method"] == "asr"

    def test_json_has_no_nan_where_a_layer_is_dead(self, user):
        for name in ("dense", "pruned"):
            state = load_file(f"{name}.safetensors")
            state["3.weight"] = torch.zeros_like(state["3.weight"])
            save_file(state, f"dead_{name}.safetensors")
        done = repair("--json", "--pruned", "dead_pruned.safetensors", "--dense", "dead_dense.safetensors")
        assert json.loads(done.stdout, parse_constant=pytest.fail)["layers"][1]["dead"] == 8

    def test_a_bias_that_the_repair_added_can_be_read_again(self, user):
        repair(prefix="bare_")
        assert "2.bias" in load_file("repaired.safetensors")
        options = ["--dense", "repaired.safetensors", "--sparsity", 0.7, "-o", "again.safetensors"]
        invoke("prune", "-m", BARE, *options)
        assert torch.equal(load_file("again.safetensors")["2.bias"], load_file("repaired.safetensors")["2.bias"])


USAGE = [
    (["--method", "magic"], "'magic' is not one of 'bn', 'layerwise', 'channelwise', 'asr'"),
    (["-m", "resnet21"], "did you mean 'resnet"),
    (["-o", "repaired.pt"], "name it repaired.safetensors"),
    (["--mean", "red"], "'red' is neither a number"),
    (["--size", "large"], "'large' is not a size"),
    (["--include", "33"], "include='33' selects no layer; did you mean"),
    (["--prior", "mode"], "prior must be 'median', 'mean' or a positive variance"),
    (["--method", "bn", "--recalibrate", "none"], "does nothing; choose 'exact' or 'ema'"),
]
FAILURES = [
    (["--pruned", "none.safetensors"], "none.safetensors"),
    (["--pruned", "none.pt"], "none.pt: No such file"),
    (["--dense", "pickled.pt"], "pickled.pt: not a checkpoint that can be read without unpickling"),
    (["-m", "digitnet"], "pruned.safetensors does not fit the model"),
    (["-m", "users_networks:large"], "--model users_networks:large cannot be built: AttributeError"),
    (["-m", "nowhere:small"], "No module named 'nowhere'"),
    (["-m", "users_networks:broken"], "RuntimeError: out of networks"),
    (["-m", "users_networks:number"], "gave a int, not a torch.nn.Module"),
    (["-c", "none.npz"], "none.npz"),
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

    def test_a_method_that_needs_dense_weights_says_so(self):
        options = ["--pruned", "pruned.safetensors", "-c", "images.npz", "-o", "out.safetensors"]
        done = invoke("repair", "-m", MODEL, *options, code=2)
        assert "give --dense, or --method bn" in unframed(done.stderr)

    def test_an_impossible_sparsity_is_2(self):
        options = ["--dense", "dense.safetensors", "-o", "out.safetensors"]
        assert "not in [0, 1)" in invoke("prune", "-m", MODEL, "--sparsity", 1.5, *options, code=2).stderr
        assert "sparsity is missing" in invoke("prune", "-m", MODEL, *options, code=2).stderr

    def test_a_disk_that_fills_up_leaves_nothing(self, monkeypatch):
        def fill(tensors, path, metadata):
            Path(path).write_text("half")
            raise OSError(28, "No space left on device", str(path))

        monkeypatch.setattr("resuscitate.checkpoints.save_file", fill)
        assert "No space left" in repair("--report", "run.json", code=1).stderr

    def test_by_the_real_command_there_is_no_traceback(self):
        options = ["--pruned", "pickled.pt", "-c", "images.npz", "-o", "out.safetensors", "--method", "bn"]
        done = command("repair", "-m", MODEL, *options, code=1)
        assert done.stderr.startswith("Error: pickled.pt: not a checkpoint")
        assert done.stderr.count("\n") == 1


def test_the_command_line_has_the_choices_of_the_library():
    assert set(get_args(cli.Recalibrate)) == {*get_args(repair_module.Recalibrate), "none"}
    assert set(get_args(cli.Allocation)) == set(ALLOCATIONS)


@pytest.mark.parametrize(
    ("function", "own", "programmatic"),
    [
        (
            resuscitate.repair,
            {"pruned", "dense_stats", "timeout", "output", "report", "json_", "mean", "std", "size"},
            # what only a program can give, what a batch of files does not have, and what a terminal decides
            {"forward_fn", "max_batches", "frozen", "group", "progress"},
        ),
        (resuscitate.sparsify, {"dense", "output"}, set()),
    ],
    ids=["repair", "prune"],
)
def test_options_are_named_and_preset_like_the_keywords(function, own, programmatic):
    options = inspect.signature(cli.repair if function is resuscitate.repair else cli.prune).parameters
    keywords = inspect.signature(function).parameters
    assert options.keys() - own == keywords.keys() - own - programmatic
    for name in options.keys() & keywords.keys() - {"calibration", "dense"}:
        assert options[name].default == keywords[name].default, name


def test_verbose_logs_what_a_file_needed_to_fit(user):
    save_file({f"module.{k}": v for k, v in load_file("dense.safetensors").items()}, "wrapped.safetensors")
    words = ["prune", "-m", MODEL, "--dense", "wrapped.safetensors", "--sparsity", 0.5, "-o", "out.safetensors"]
    assert "wrapped.safetensors: stripped module." in command("--verbose", *words).stderr


def test_help_and_version():
    assert command("--version").stdout == f"resuscitate {resuscitate.__version__}\n"
    for words in (["--help"], ["repair", "-h"]):
        assert "Usage" in invoke(*words).stdout
    for name in ("demo", "prune", "repair"):
        assert name in invoke("--help").stdout
