"""Real networks and images, for the tests that are marked so."""

import os
from pathlib import Path

import pytest
from safetensors.torch import load_file

from resuscitate.images import load_images, load_labels
from resuscitate.models import build, resnet20

DATA = Path(os.environ.get("RESUSCITATE_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
NORMALISED = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


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
