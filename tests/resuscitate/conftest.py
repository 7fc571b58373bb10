"""Real networks and images, for the tests that are marked so; forward passes that run beside one another."""

import os
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

import resuscitate
from resuscitate.images import load_images, load_labels
from resuscitate.models import build, resnet20

DATA = Path(os.environ.get("RESUSCITATE_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
NORMALISED = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@pytest.fixture
def two_at_a_time(monkeypatch):
    """Two suspended passes run at a time, with one intra-op thread each; afterwards the threads of all are gone.

    By the number of intra-op threads there would be two as well, but these wait for one another on a busy machine.
    """

    def two(device, passes, memory=1, each=0):
        return max(min(passes, 2, memory // each if each else 2), 1), 1

    for module in (resuscitate.suspended, resuscitate.outputs):
        monkeypatch.setattr(module, "at_a_time", two)
    yield
    assert not running_passes()


def running_passes():
    """The threads of forward passes that do not end within a second."""
    deadline = time.monotonic() + 1
    while (found := [t for t in threading.enumerate() if t.name == "forward pass"]) and time.monotonic() < deadline:
        time.sleep(0.001)
    return found


@pytest.fixture(scope="session")
def real():
    """The trained ResNet-20, unlabelled images to repair from, and labelled ones to test on."""
    if not (DATA / "cifar10_resnet20.safetensors").exists():
        pytest.skip("needs the trained networks and images")
    dense = resnet20().eval()
    dense.load_state_dict(load_file(DATA / "cifar10_resnet20.safetensors"))
    calibration = load_images(DATA / "cifar10_jpeg_train.npz", max_samples=256, **NORMALISED)
    test = DATA / "cifar10_jpeg_test.npz"
    return dense, calibration, load_images(test, max_samples=2000, **NORMALISED), load_labels(test, max_samples=2000)


@pytest.fixture
def trained_network():
    """A function from the name of a trained network, "resnet20" or "resnet32", to it."""

    def load(name):
        path = DATA / f"cifar10_{name}.safetensors"
        if not path.exists():
            pytest.skip("needs the trained networks and images")
        network = build(name).eval()
        network.load_state_dict(load_file(path))
        return network

    return load


@pytest.fixture
def keywords():
    """The trained keyword-spotting DS-CNN, which pads as TensorFlow's "SAME"; its clips, and their labels."""
    if not (DATA / "kws_dscnn.safetensors").exists():
        pytest.skip("needs the trained networks and images")
    from benchmarks.zoo.dscnn import load_dscnn

    return load_dscnn(DATA)
