"""`resuscitate repair`: what it writes, what it prints."""

import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import resuscitate
from resuscitate.data.images import load_images
from tests.compare import same_state
from tests.user import BARE, MEAN, MODEL, STD, command, invoke, loaded, metadata, repair, unframed


def smaller(path):
    """The dense network with fewer channels, which is also written to a file."""
    model = loaded("dense.safetensors")
    resuscitate.sparsify(model, 0.4, pattern="channels", remove=True, example=load_images("images.npz")[:2])
    save_file(model.state_dict(), path)
    return model


class TestRepair:
    def test_writes_what_repair_does(self, user):
        images = load_images("images.npz", mean=MEAN, std=STD, max_samples=32, seed=0)
        expected = loaded("pruned.safetensors")
        resuscitate.repair(expected, loaded("dense.safetensors"), images, method="channelwise")
        weights = ["--pruned", "pruned.safetensors", "--dense", "dense.safetensors", "-o", "repaired.safetensors"]
        numbers = ["--mean", "0.4,0.5,0.6", "--std", "0.2 0.25 0.3", "--max-samples", 32]
        options = ["-m", MODEL, "-c", "images.npz", "--method", "channelwise", *numbers]
        done = command("repair", *options, *weights)
        assert same_state(load_file("repaired.safetensors"), expected.state_dict())
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
            (["--method", "asr", "--prior", "0.5", "--no-bias"], {"method": "asr", "prior": 0.5, "bias": False}),
            (["--method", "asr", "--prior", "mean"], {"method": "asr", "prior": "mean"}),
            (["--no-skip-first", "--skip-last"], {"skip_first": False, "skip_last": True}),
            (["--include", "3", "--include", "6", "--exclude", "3"], {"include": ["3", "6"], "exclude": "3"}),
            (
                ["--recalibrate", "ema", "--ema-batches", "3", "--ema-batch-size", "10", "--ema-momentum", "0.5"],
                {"recalibrate": resuscitate.EMA(batches=3, batch_size=10, momentum=0.5)},
            ),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_options_are_passed_on(self, user, words, keywords):
        repair(*words)
        expected = loaded("pruned.safetensors")
        resuscitate.repair(expected, loaded("dense.safetensors"), load_images("images.npz"), **keywords)
        assert same_state(load_file("repaired.safetensors"), expected.state_dict())

    def test_the_pruned_weights_may_be_written_over(self, user):
        weights = load_file("pruned.safetensors")
        save_file(weights, "mine.safetensors")
        repair("--pruned", "mine.safetensors", "-o", "mine.safetensors")
        assert not same_state(load_file("mine.safetensors"), weights)

    def test_a_report_is_written_as_csv_too(self, user):
        repair("--report", "run.csv")
        with Path("run.csv").open() as file:
            assert [row["name"] for row in csv.DictReader(file)] == ["0", "3", "6", "11"]

    def test_method_bn_needs_no_dense_weights(self, user):
        options = ["--pruned", "pruned.safetensors", "-c", "images.npz", "-o", "out.safetensors", "--method", "bn"]
        invoke("repair", "-m", MODEL, *options)
        expected = loaded("pruned.safetensors")
        resuscitate.recalibrate_batchnorm(expected, load_images("images.npz"))
        assert same_state(load_file("out.safetensors"), expected.state_dict())

    def test_only_as_many_images_are_read_as_are_used(self, user, monkeypatch):
        asked = []
        original = resuscitate.data.images.ImageStream
        monkeypatch.setattr(
            resuscitate.data.images,
            "ImageStream",
            lambda *args, **options: asked.append(options["max_samples"]) or original(*args, **options),
        )
        repair("--gain-samples", 8)
        repair("--gain-samples", 8, "--recalibrate", "exact", "--exact-samples", 16)
        repair("--gain-samples", 8, "--recalibrate", "exact", "--max-samples", 20)
        assert asked == [8, 16, 20]

    def test_json_is_the_report_on_the_terminal_and_in_a_file(self, user):
        done = repair("--json", "--report", "run.json")
        document = json.loads(done.stdout)
        assert document == json.loads(Path("run.json").read_text())
        assert [layer["name"] for layer in document["layers"]] == ["0", "3", "6", "11"]
        assert document["calibration"]["images"] == 40
        assert document["method"] == document["provenance"]["method"] == "refit"

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

    def test_a_smaller_network_is_repaired_and_read_again(self, user):
        small, images = smaller("small.safetensors"), load_images("images.npz")
        resuscitate.repair(small, loaded("dense.safetensors"), images, method="channelwise", progress=False)
        repair("--pruned", "small.safetensors", "--method", "channelwise")
        assert same_state(load_file("repaired.safetensors"), small.state_dict())
        invoke("export", "-m", MODEL, "--weights", "repaired.safetensors", "-c", "images.npz", "-o", "small.pt2")

    def test_the_channels_of_a_smaller_network_may_be_given(self, user):
        kept = len(smaller("small.safetensors")[0].weight)
        options = ["--pruned", "small.safetensors", "--channels", "channels.json", "--method", "channelwise"]
        repaired = []
        for channels in (range(kept), range(8 - kept, 8)):
            Path("channels.json").write_text(json.dumps({"0": [*channels]}))
            repair(*options, "--keep-worse")
            repaired.append(load_file("repaired.safetensors"))
        assert not same_state(*repaired)
        Path("channels.json").write_text(json.dumps({"0": [0] * kept}))
        assert f"must be {kept} different indices from 0 to 7" in unframed(repair(*options, code=2).output)

    @pytest.mark.parametrize("text", ["[1, 2]", '{"0": 1}', '{"0": [true]}', "nonsense"])
    def test_a_file_of_channels_is_checked(self, user, text):
        Path("channels.json").write_text(text)
        assert "channels.json" in unframed(repair("--channels", "channels.json", code=2).output)

    def test_detail_needs_all_channels(self, user):
        smaller("small.safetensors")
        done = repair("--pruned", "small.safetensors", "--detail", code=2)
        assert "--detail compares channel by channel" in unframed(done.output)

    @pytest.mark.parametrize("how", ["workers", "little memory"])
    def test_images_that_fill_the_memory_are_read_as_they_are_wanted(self, user, monkeypatch, how):
        repair("-b", 7)
        expected = load_file("repaired.safetensors")
        read = []
        original = resuscitate.data.images.ImageStream._read
        monkeypatch.setattr(
            resuscitate.data.images.ImageStream,
            "_read",
            lambda self, rows: read.append(len(rows)) or original(self, rows),
        )
        if how == "little memory":
            monkeypatch.setattr(
                resuscitate.runtime.activations, "free_memory", lambda device: 40 * 3 * 10 * 12 * 4 * 4 - 1
            )
        done = repair("-b", 7, *(["-j", 1] if how == "workers" else []), "--memory", "1MiB")
        assert same_state(load_file("repaired.safetensors"), expected)
        assert "40 images of 3x10x12" in done.stdout
        assert "of the first 40 mean" in done.stdout
        # a worker reads in a process of its own
        assert read == ([40] if how == "workers" else [40, *[7] * 5, 5])
