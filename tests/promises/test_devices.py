"""The same answer on a GPU as on the CPU; without a GPU, on a device that computes on the CPU: see `tests.device`."""

from contextlib import nullcontext

import pytest
import torch

import asr_kernels as ak
import resuscitate
from tests.device import device
from tests.networks import Residual, Untraceable, chain, images, pruned_copy, seeded

OPTIONS = {
    "refit": {},
    "asr, BatchNorm": {"method": "asr", "recalibrate": "exact"},
    "channelwise, parallel": {"method": "channelwise", "schedule": "parallel"},
    "bn": {"method": "bn"},
}


@pytest.fixture
def place():
    """The GPU; without one the device that stands for it, for which the reference backend computes."""
    found = torch.device("cuda") if torch.cuda.is_available() else device()
    with nullcontext() if found.type == "cuda" else ak.use_backend("reference"):
        yield found


def act(name, model, dense, given):
    if name == "compress":
        return resuscitate.compress(model, 0.6, given, steps=2)
    options = OPTIONS[name]
    return resuscitate.repair(model, None if options.get("method") == "bn" else dense, given, **options)


def same_function(found, wanted, given):
    """Are the outputs equal, to a thousandth? Weights of inputs that are nearly alike may differ by more."""
    with torch.no_grad():
        ours, theirs = found.cpu()(given), wanted(given)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-3


@pytest.mark.parametrize("build", [chain, Residual, Untraceable], ids=lambda build: build.__name__)
@pytest.mark.parametrize("name", [*OPTIONS, "compress"])
def test_a_network_on_the_device_gets_the_answer_of_the_cpu(place, build, name):
    if name == "compress" and place.type != "cuda":
        pytest.skip("this device has no deep copies")
    dense, given = seeded(build), images(40)
    wanted = seeded(build) if name == "compress" else pruned_copy(dense)
    act(name, wanted, dense, given)
    found = (seeded(build) if name == "compress" else pruned_copy(dense)).to(place)
    act(name, found, dense.to(place), given)
    assert {value.device.type for value in found.state_dict().values()} == {place.type}
    same_function(found, wanted, given)
    ours, theirs = (resuscitate.Masks.from_zeros(each) for each in (found, wanted))
    assert {name: mask.tolist() for name, mask in ours.items()} == {n: mask.tolist() for n, mask in theirs.items()}


@pytest.mark.parametrize("name", OPTIONS)
def test_images_on_the_device_give_a_network_on_the_cpu_the_same_answer(place, name):
    dense, given = seeded(chain), images(40)
    wanted, found = pruned_copy(dense), pruned_copy(dense)
    act(name, wanted, dense, given)
    act(name, found, dense, given.to(place))
    same_function(found, wanted, given)
