"""`resuscitate prune`: what it writes, what it prints."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

import resuscitate
from resuscitate.data.images import load_images
from tests.compare import same_state
from tests.user import MODEL, command, invoke, loaded, metadata, unframed


class TestPrune:
    def test_writes_what_sparsify_does_and_shows_each_layer(self, user):
        weights = ["--dense", "dense.safetensors", "--exclude", "11", "-o", "out.safetensors"]
        done = command("prune", "--model", MODEL, "--sparsity", 0.8, "--allocation", "uniform", *weights)
        expected = loaded("dense.safetensors")
        masks = resuscitate.sparsify(expected, 0.8, allocation="uniform", exclude="11")
        assert same_state(load_file("out.safetensors"), expected.state_dict())
        assert done.stderr == ""
        for row in masks.table():
            assert any(f"{row.kept}" in line and f"{row.sparsity:.2%}" in line for line in done.stdout.splitlines())
        assert f"{masks.sparsity:.2%} of the original weights" in done.stdout
        assert "written to out.safetensors" in done.stdout
        written = metadata("out.safetensors")
        assert written["method"] == "prune"
        assert json.loads(written["options"])["sparsity"] == 0.8
        assert written["command"].startswith("resuscitate prune --model")

    def test_a_pattern_needs_no_sparsity(self, user):
        invoke("prune", "-m", MODEL, "--dense", "dense.safetensors", "--pattern", "2:4", "-o", "out.safetensors")
        expected = loaded("dense.safetensors")
        resuscitate.sparsify(expected, pattern="2:4")
        assert same_state(load_file("out.safetensors"), expected.state_dict())

    def test_zeros_that_the_network_had_before_are_said(self, user):
        options = ["--sparsity", 0.5, "--dense", "pruned.safetensors", "-o", "out.safetensors"]
        done = invoke("prune", "-m", MODEL, *options)
        assert "70.01% of the weights of the network are zero: it had zeros before" in done.stdout

    def test_the_dense_weights_are_not_written_over(self, user):
        before = Path("dense.safetensors").read_bytes()
        options = ["--sparsity", 0.5, "--dense", "dense.safetensors", "-o", "out.safetensors"]
        for option in ("-o", "--masks"):
            invoke("prune", "-m", MODEL, *options, option, "dense.safetensors", code=2)
        assert Path("dense.safetensors").read_bytes() == before
        assert not Path("out.safetensors").exists()

    def test_every_choice_of_the_library_is_passed_on(self, user):
        words = ["--sparsity", 0.6, "--allocation", "erk", "--densities", "0=1.0", "--densities", "11=0.5"]
        words += ["--min-per-layer", 20, "--min-per-channel", 3]
        invoke("prune", "-m", MODEL, "--dense", "dense.safetensors", "-o", "out.safetensors", *words)
        expected = loaded("dense.safetensors")
        floors = {"min_per_layer": 20, "min_per_channel": 3}
        resuscitate.sparsify(expected, 0.6, allocation="erk", densities={"0": 1.0, "11": 0.5}, **floors)
        assert same_state(load_file("out.safetensors"), expected.state_dict())

    def test_relative_repairability_reads_the_images(self, user):
        words = ["prune", "-m", MODEL, "--dense", "dense.safetensors", "-o", "out.safetensors"]
        words += ["--sparsity", 0.6, "--allocation", "rr"]
        assert "calibration: 20 images" in invoke(*words, "-c", "images.npz", "--max-samples", 20).stdout
        expected = loaded("dense.safetensors")
        images = load_images("images.npz", max_samples=20)
        resuscitate.sparsify(expected, 0.6, allocation="rr", calibration=images)
        assert same_state(load_file("out.safetensors"), expected.state_dict())
        assert "allocation rr needs images: --calibration" in unframed(invoke(*words, code=2).stderr)

    def test_relative_repairability_is_measured_with_the_options_given(self, user, monkeypatch):
        seen, measure = {}, resuscitate.Repairability.measure
        monkeypatch.setattr(
            resuscitate.Repairability, "measure", lambda *a, **given: seen.update(given) or measure(*a, **given)
        )
        words = ["prune", "-m", MODEL, "--dense", "dense.safetensors", "-o", "out.safetensors", "--sparsity", 0.6]
        given = [*words, "-c", "images.npz"]
        running = ["--dtype", "bf16", "--device", "cpu", "-b", 7, "--memory", "1GiB", "--on-nonfinite", "skip"]
        invoke(*given, *running, "--allocation", "rr", "--seed", 3)
        wanted = {
            "dtype": "bf16",
            "device": "cpu",
            "batch_size": 7,
            "memory": "1GiB",
            "on_nonfinite": "skip",
            "seed": 3,
        }
        assert wanted.items() <= seen.items()
        assert "'global' measures nothing: leave calibration out" in unframed(invoke(*given, code=2).stderr)
        assert "leave memory out" in unframed(invoke(*words, "--memory", "1GiB", code=2).stderr)

    @pytest.mark.parametrize("words", [["--pattern", "2:4"], ["--sparsity", 0.6, "--pattern", "filter"]])
    def test_images_that_nothing_reads_are_2(self, user, words):
        given = ["prune", "-m", MODEL, "--dense", "dense.safetensors", "-o", "out.safetensors", "-c", "images.npz"]
        assert "measures nothing: leave calibration out" in unframed(invoke(*given, *words, code=2).stderr)
        assert not Path("out.safetensors").exists()

    def test_whole_channels_are_traced_with_the_images(self, user):
        given = ["prune", "-m", MODEL, "--dense", "dense.safetensors", "-o", "out.safetensors", "-c", "images.npz"]
        invoke(*given, "--sparsity", 0.3, "--pattern", "channels")
        expected = loaded("dense.safetensors")
        resuscitate.sparsify(expected, 0.3, pattern="channels", example=load_images("images.npz"))
        assert same_state(load_file("out.safetensors"), expected.state_dict())

    def test_masks_are_written_and_notes_shown(self, user):
        words = ["--pattern", "2:4", "--masks", "masks.safetensors", "-o", "out.safetensors"]
        done = invoke("prune", "-m", MODEL, "--dense", "dense.safetensors", *words)
        masks = resuscitate.Masks.load("masks.safetensors")
        masks.check(loaded("out.safetensors"))
        assert "left dense: 3 input channels, groups of 4" in done.stdout
        assert metadata("masks.safetensors")["method"] == "prune"

    def test_a_density_that_is_none_is_2(self, user):
        words = ["--densities", "conv1", "-o", "out.safetensors"]
        done = invoke("prune", "-m", MODEL, "--dense", "dense.safetensors", *words, code=2)
        assert "'conv1' is not GLOB=DENSITY" in unframed(done.stderr)


PRUNED = ["--pruned", "pruned.safetensors", "--dense", "dense.safetensors", "-c", "images.npz"]


@pytest.mark.parametrize(
    "words",
    [
        ["prune", "--dense", "dense.safetensors", "--masks", "masks.json"],
        ["compress", "--dense", "dense.safetensors", "-c", "images.npz", "--masks", "masks.json"],
        ["regrow", *PRUNED, "--write-masks", "masks.json"],
    ],
    ids=lambda words: words[0],
)
def test_masks_are_named_safetensors_before_any_work(user, words):
    done = invoke(*words, "-m", MODEL, "--sparsity", 0.5, "-o", "out.safetensors", code=2)
    assert "name it masks.safetensors" in unframed(done.stderr)
    assert not Path("out.safetensors").exists()


class TestRegrow:
    FILES = ("--pruned", "pruned.safetensors", "--dense", "dense.safetensors", "-c", "images.npz")
    WRITTEN = ("-o", "out.safetensors", "--report", "run.json", "--write-masks", "new.safetensors")

    def labelled(self):
        with np.load("images.npz") as file:
            np.savez("labelled.npz", images=file["images"], labels=np.arange(40) % 10)

    @pytest.mark.parametrize(
        ("words", "options"),
        [
            ([], {}),
            (["--budget", "damage", "--saliency", "residual", "--rounds", 2], {"budget": "damage", "rounds": 2}),
            (["--method", "none", "--initial", "zero"], {"method": None, "initial": "zero"}),
        ],
    )
    def test_writes_what_regrow_does(self, user, words, options):
        done = invoke("regrow", "-m", MODEL, "--sparsity", 0.5, *self.FILES, *self.WRITTEN, *words)
        if "residual" in words:
            options = options | {"saliency": "residual"}
        model, dense = loaded("pruned.safetensors"), loaded("dense.safetensors")
        now = resuscitate.Masks.from_zeros(model)
        grown = resuscitate.regrow(model, dense, now, 0.5, load_images("images.npz"), **options)
        assert same_state(load_file("out.safetensors"), model.state_dict())
        assert resuscitate.Masks.load("new.safetensors") == grown.masks
        written = json.loads(Path("run.json").read_text())
        assert [each["regrown"] for each in written["rounds"]] == [each.regrown for each in grown.rounds]
        assert "regrown" in done.stdout

    def test_scores_and_labelled_batches_come_from_files(self, user):
        self.labelled()
        words = ["--saliency", "gradient", "--labelled", "labelled.npz", "--test", "labelled.npz", "--accuracy", 1]
        invoke("regrow", "-m", MODEL, "--sparsity", 0.2, *self.FILES, *self.WRITTEN, *words, "--rounds", 4)
        rounds = json.loads(Path("run.json").read_text())["rounds"]
        assert len(rounds) == 1
        assert rounds[0]["score"] >= 1

    def test_denser_masks_come_first(self, user):
        model = loaded("dense.safetensors")
        denser = resuscitate.sparsify(model, 0.6, allocation="uniform")
        denser.save("denser.safetensors")
        words = ["--denser", "denser.safetensors", "--masks", "now.safetensors"]
        now = resuscitate.Masks.from_zeros(loaded("pruned.safetensors"))
        now.save("now.safetensors")
        invoke("regrow", "-m", MODEL, "--sparsity", 0.65, *self.FILES, *self.WRITTEN, *words)
        grown = resuscitate.Masks.load("new.safetensors")
        assert all((denser[name] | now[name] | ~grown[name]).all() for name in grown)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--sparsity", 0.9], "is above the 0.7"),
            (["--sparsity", 0.5, "--accuracy", 3], "--accuracy is of --test"),
            (["--sparsity", 0.5, "--saliency", "gradient"], "labelled"),
            (["--sparsity", 0.5, "--denser", "x.safetensors", "--saliency", "residual"], "leave --saliency out"),
        ],
    )
    def test_what_makes_no_sense_is_2(self, user, words, message):
        done = invoke("regrow", "-m", MODEL, *self.FILES, *self.WRITTEN, *words, code=2)
        assert message in unframed(done.stderr)
        assert not Path("out.safetensors").exists()


class TestCompress:
    @pytest.mark.parametrize(
        ("words", "steps"),
        [
            (["--sparsity", 0.6], 7),
            (["--sparsity", 0.6, "--steps", 2], 2),
            (["--sparsity", 0.6, "--steps", "0.4,0.6"], [0.4, 0.6]),
            (["--steps", "0.4,0.6"], [0.4, 0.6]),
        ],
    )
    def test_writes_what_compress_does(self, user, words, steps):
        files = ["--dense", "dense.safetensors", "-c", "images.npz", "-o", "out.safetensors", "--report", "run.json"]
        done = invoke("compress", "-m", MODEL, *files, "--masks", "masks.safetensors", *words)
        expected = loaded("dense.safetensors")
        report = resuscitate.compress(expected, 0.6, load_images("images.npz"), steps=steps)
        assert same_state(load_file("out.safetensors"), expected.state_dict())
        assert resuscitate.Masks.load("masks.safetensors") == report.masks
        written = json.loads(Path("run.json").read_text())
        assert [step["sparsity"] for step in written["steps"]] == report.sparsities
        assert "written to out.safetensors" in done.stdout

    def test_a_network_without_its_channels_is_read_by_the_name_of_the_model(self, user):
        files = ["--dense", "dense.safetensors", "-c", "images.npz", "-o", "small.safetensors", "--report", "run.json"]
        invoke("compress", "-m", MODEL, "--sparsity", 0.5, "--pattern", "channels", "--steps", 2, *files)
        flops, parameters = (
            json.loads(Path("run.json").read_text())["removal"][key] for key in ("flops", "parameters")
        )
        assert flops[1] < flops[0]
        state = load_file("small.safetensors")
        trained = [key for key in state if key.endswith(("weight", "bias"))]
        assert parameters[1] == sum(state[key].numel() for key in trained) < parameters[0]
        files = ["--weights", "small.safetensors", "-c", "images.npz", "-o", "small.pt2"]
        assert "read again" in invoke("export", "-m", MODEL, *files).stdout
