"""The published comparison, end to end at toy size: its networks, their training, the tables, the timings."""

import json
from itertools import product

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from benchmarks.networks import NETS, build, mobilenet_v1, mobilenet_v2
from tests.test_benchmarks import run

# with 10 classes; the ResNets and VGG-16 as commonly given for CIFAR-10. DenseNet-121: torchvision's 7,978,856, less
# 1,024 weights and a bias for each of 990 classes, less 64 x 3 x (49 - 9) weights of the stem
PARAMETERS = {
    "resnet18": 11_173_962,
    "resnet50": 23_520_842,
    "densenet121": 7_978_856 - 1_025 * 990 - 64 * 3 * 40,
    "vgg16_bn": 14_728_266,
}
# how many tensors torchvision's networks have; its VGG-16 has three linear layers, ours one
TENSORS = {"resnet18": 122, "resnet50": 320, "densenet121": 727, "vgg16_bn": 97 - 4}
NAMED = {
    "resnet18": ["conv1.weight", "bn1.running_var", "layer1.0.bn2.bias", "layer2.0.downsample.0.weight", "fc.bias"],
    "resnet50": ["layer1.0.downsample.1.num_batches_tracked", "layer3.5.conv3.weight", "layer4.2.bn3.weight"],
    "densenet121": [
        "features.conv0.weight",
        "features.norm0.bias",
        "features.denseblock3.denselayer24.conv2.weight",
        "features.denseblock1.denselayer1.norm2.running_mean",
        "features.transition3.conv.weight",
        "features.transition1.norm.weight",
        "features.norm5.weight",
        "classifier.weight",
    ],
    "vgg16_bn": ["features.0.bias", "features.1.running_mean", "features.7.weight", "features.40.bias"],
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_networks_are_those_of_the_papers(name):
    model = build(name)
    state = model.state_dict()
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert len(state) == TENSORS[name]
    assert set(NAMED[name]) <= set(state)


@pytest.mark.parametrize("build", [mobilenet_v1, mobilenet_v2])
def test_a_compact_network_has_the_parameters_that_it_says(build):
    assert f"{sum(p.numel() for p in build().parameters()):,} parameters" in build.__doc__


@pytest.mark.parametrize("name", NETS)
def test_the_networks_can_be_traced(name):
    model = build(name, classes=7).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert model(images).shape == (2, 7)
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(images), model(images))


def test_an_unknown_network_is_refused():
    with pytest.raises(ValueError, match="no network 'resnet19'"):
        build("resnet19")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Noise on a colour for each of four classes, 400 to learn from and 200 to test on; the options that name them."""
    folder = tmp_path_factory.mktemp("images")
    colours = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200], [160, 160, 60]])
    options = []
    for part, count in (("train", 400), ("test", 200)):
        random = np.random.default_rng(count)
        labels = random.integers(0, 4, count)
        pixels = colours[labels][:, None, None] + random.normal(0, 60, (count, 16, 16, 3))
        np.savez(folder / f"{part}.npz", images=pixels.clip(0, 255).astype(np.uint8), labels=labels.astype(np.uint8))
        options += [f"--{part}-images", str(folder / f"{part}.npz")]
    return options


def train(folder, images, nets, *options):
    run(
        "benchmarks/published/train.py",
        *("--nets", nets, "--epochs", "2", "--batch-size", "16", "--lr", "0.1", "--device", "cpu"),
        *("--output", str(folder), *images, *options),
    )


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, images):
    folder = tmp_path_factory.mktemp("zoo")
    train(folder, images, "toy-resnet,toy-vgg")
    return folder


def test_training_learns_and_logs(checkpoints):
    log = [json.loads(line) for line in (checkpoints / "train.jsonl").read_text().splitlines()]
    assert [(row["net"], row["epoch"]) for row in log] == [
        (net, epoch) for net in ("toy-resnet", "toy-vgg") for epoch in (1, 2)
    ]
    for row in log[1::2]:
        assert row["test"] > 50  # a guess is right in 25 % of the cases
        with safe_open(checkpoints / f"{row['net']}.safetensors", "pt") as file:
            assert float(file.metadata()["accuracy"]) == row["test"]
    assert not list(checkpoints.glob("*.pt"))


def test_training_in_pieces_ends_in_the_same_weights(checkpoints, images, tmp_path):
    for done in (1, 2):  # without time for anything, an epoch is done all the same
        train(tmp_path, images, "toy-vgg", "--budget-seconds", "0")
        assert len((tmp_path / "train.jsonl").read_text().splitlines()) == done
        assert (tmp_path / "toy-vgg.pt").exists() == (done == 1)
    ours, theirs = (load_file(folder / "toy-vgg.safetensors") for folder in (tmp_path, checkpoints))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def compare(checkpoints, images, output, *options):
    return run(
        "benchmarks/published/paper_table.py",
        *("--checkpoints", str(checkpoints), *images, "--device", "cpu", "--output", str(output)),
        *("--batch-size", "16", "--images", "64", *options),
    )


def test_the_table(checkpoints, images, tmp_path):
    pytest.importorskip("matplotlib")
    path, nets, sparsities = tmp_path / "paper_table.json", ("toy-resnet", "toy-vgg"), ("0.7", "2:4")
    how = ["--sparsities", ",".join(sparsities), "--ema-batches", "2,4", "--gain-samples", "32", "--ablate", "0.7"]
    compare(checkpoints, images, tmp_path, *how, "--seeds", "1", "--budget-seconds", "0")
    first = json.loads(path.read_text())["rows"]
    assert len(first) == 1
    report = compare(checkpoints, images, tmp_path, *how, "--seeds", "1")
    found = json.loads(path.read_text())
    rows = found["rows"]
    assert rows[:1] == first

    gains = ("BN only", "layer-wise", "channel-wise", "ASR")
    wanted = {("no repair", "none", 0), ("refit", "refit", 0)}
    wanted |= {(name, "ema", b) for name, b in product(gains, (2, 4))} | {(name, "exact", 4) for name in gains}
    wanted |= {(name, "sequential", 0) for name in ("channel-wise", "ASR")}
    for net, sparsity in product(nets, sparsities):
        mine = [row for row in rows if (row["net"], row["sparsity"]) == (net, sparsity)]
        runs = {(row["method"], row["protocol"], row["b"]) for row in mine}
        ablated = {run for run in runs if "bias" in run[0]}
        assert len(ablated) == (8 if (net, sparsity) == (nets[0], "0.7") else 0)
        assert runs - ablated == wanted | ({("compress", "compress", 0)} if sparsity == "0.7" else set())
        assert len(mine) == len(runs)
        for row in mine:
            assert 0 < row["accuracy"] <= 100
            # 2:4 leaves dense the layer whose input channels 4 does not divide
            assert row["zeros"] == pytest.approx(0.7 if sparsity == "0.7" else 0.48, abs=0.06)
        # an exact recalibration cancels gains but for BatchNorm's eps, which may turn an image or two of the 200
        exact = {row["method"]: row["accuracy"] for row in mine if row["protocol"] == "exact"}
        assert exact == pytest.approx(dict.fromkeys(gains, exact["BN only"]), abs=1.0)
    assert found["slopes"]["of"] == [nets[0], "0.7"]
    assert set(found["slopes"]["fitted"]) == {"no repair", *gains}
    assert "the published (for ResNets) order ASR > layer-wise > BN only" in report
    assert "Exact recalibration: the largest difference" in report
    for name in ("paper_table.svg", "paper_table_variance.svg"):
        assert "<svg" in (tmp_path / name).read_text()

    # the same again computes nothing, and another seed nothing but its own rows
    more = ["--seeds", "2", "--nets", "toy-vgg", "--only", "none,exact"]
    report = compare(checkpoints, images, tmp_path, *how, *more)
    after = json.loads(path.read_text())["rows"]
    assert after[: len(rows)] == rows
    assert {(row["net"], row["protocol"], row["seed"]) for row in after[len(rows) :]} == {("toy-vgg", "exact", 1)}
    assert " ± " in report
    assert f"| {nets[0]}, 70%, EMA, b = 4 | top-1 | published" in report


def test_the_timings(checkpoints, images, tmp_path):
    table = compare(checkpoints, images, tmp_path, "--speed", "--rounds", "1", "--nets", "toy-vgg")
    path = tmp_path / "paper_table_speed.json"
    rows = json.loads(path.read_text())["rows"]
    assert [(row["job"], row["images"]) for row in rows] == [
        (job, count) for job in ("sequential ASR", "exact BatchNorm") for count in (1, 6, 64)
    ]
    for row in rows:
        peer = "hooks" if row["job"] == "sequential ASR" else "update_bn"
        assert set(row["seconds"]) == {"ours", "bare forwards", peer}
        assert row["images_per_s"] == pytest.approx(row["images"] / row["seconds"]["ours"])
    assert "- toy-vgg, exact BatchNorm: 11 times 6 images take" in table
    compare(checkpoints, images, tmp_path, "--speed", "--rounds", "1", "--nets", "toy-vgg")
    assert json.loads(path.read_text())["rows"] == rows
