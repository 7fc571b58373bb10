"""A user's folder for every test of the command line."""

import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import resuscitate
from resuscitate.data.images import load_images
from tests.networks import chain, seeded
from tests.user import MEAN, NETWORKS, STD, loaded


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
    trained = seeded(chain)  # on images normalised like these
    resuscitate.recalibrate_batchnorm(trained, load_images(folder / "images.npz", mean=MEAN, std=STD), progress=False)
    for name, dense in (("", trained), ("bare_", bare)):
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


@pytest.fixture
def test_images(user):
    """30 images and labels that a dense network mostly agrees with; returns the labels."""
    pixels = np.random.default_rng(1).integers(0, 256, (30, 10, 12, 3), dtype=np.uint8)
    np.savez(user / "test.npz", images=pixels)
    images, network = load_images("test.npz", seed=None), loaded("dense.safetensors")
    with torch.no_grad():  # a network that does not always give the same class
        network[-1].bias -= network(images).mean(0)
        labels = network(images).argmax(1)
    labels[::4] = torch.arange(8)
    save_file(network.state_dict(), "varied.safetensors")
    np.savez(user / "test.npz", images=pixels, labels=labels.numpy())
    return labels
