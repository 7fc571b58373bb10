"""The curvature of each layer of the dense network, and its use in a compression."""

import copy

import pytest
import torch
from torch import nn

from resuscitate.engine.session import Session
from resuscitate.methods.refit import Refit
from resuscitate.runtime.options import run_options
from resuscitate.workflows import curvature
from resuscitate.workflows.compress import compress
from resuscitate.workflows.curvature import measure_curvatures
from tests.compare import same_state
from tests.networks import chain, images, seeded


def curvatures(model, batches, **options):
    with Session([model], run_options("compress()", options)) as session:
        return measure_curvatures(session, session.read(batches))


class Linear(nn.Module):
    """Two linear layers: the curvature of the first is W' W, of the second the identity."""

    def __init__(self, outputs=6):
        super().__init__()
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, outputs)

    def forward(self, x):
        return self.second(self.first(x))


def test_of_a_linear_network_it_is_known(monkeypatch):
    monkeypatch.setattr(curvature, "PROJECTIONS", 40)
    model, x = seeded(Linear), torch.randn(200, 8)
    found = curvatures(model, x)
    wanted = model.second.weight.mT @ model.second.weight
    assert torch.allclose(found["first"], wanted / wanted.diagonal().mean(), atol=0.1)
    assert torch.allclose(found["second"], torch.eye(6), atol=0.1)


def test_gradients_reach_layers_before_operations_in_place():
    inplace = seeded(lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(True), nn.Flatten(), nn.Linear(6 * 36, 5)))
    plain = copy.deepcopy(inplace)
    plain[1].inplace = False
    found, wanted = (curvatures(model, images(40, size=8)) for model in (inplace, plain))
    assert found.keys() == wanted.keys() == {"0", "3"}
    assert torch.equal(found["0"], wanted["0"])


@pytest.mark.parametrize("size", [3, 16, 70])
def test_it_does_not_depend_on_the_batches(size, monkeypatch):
    monkeypatch.setattr(curvature, "VALUES", 4 * images(1).numel())
    model, x = seeded(chain), images(70)
    found, wanted = curvatures(model, list(x.split(size))), curvatures(model, x.flip(0))
    assert found.keys() == wanted.keys()
    for name, each in found.items():
        assert torch.allclose(each, wanted[name], atol=1e-4)


def test_images_that_stand_twice_count_once():
    found = [curvatures(seeded(chain), given) for given in (images(40), images(40).repeat(2, 1, 1, 1))]
    assert found[0]
    for name, each in found[0].items():
        torch.testing.assert_close(found[1][name], each, rtol=1e-4, atol=1e-6)


def test_the_network_is_left_as_it_was():
    model = seeded(chain)
    before, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    curvatures(model, images(20))
    assert same_state(model.state_dict(), before)
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == flags


class Detached(nn.Module):
    """A network whose outputs have no gradients."""

    def __init__(self):
        super().__init__()
        self.body = chain()

    def forward(self, x):
        return self.body(x).detach()


class ForwardOnly(torch.autograd.Function):
    """The identity, without a backward pass."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()


class Deployed(Detached):
    """A network with an operation that has no backward pass."""

    def forward(self, x):
        return ForwardOnly.apply(self.body(x))


class Pooled(Detached):
    """A network whose output has no row for each image."""

    def forward(self, x):
        return self.body(x).mean(0)[:3]


@pytest.mark.parametrize("build", [Detached, Deployed, Pooled])
def test_without_gradients_for_each_image_each_channel_is_fitted_alone(build, caplog):
    model = seeded(build)
    assert curvatures(model, images(20)) == {}
    assert "each channel is fitted alone" in caplog.text
    compress(model, 0.5, images(20), steps=2)


def test_a_compression_gives_each_layer_its_curvature(monkeypatch):
    seen, solve = {}, Refit.solve

    def watched(self, layer, found):
        seen[layer.name] = layer.curvature
        return solve(self, layer, found)

    monkeypatch.setattr(Refit, "solve", watched)
    compress(seeded(chain), 0.5, images(20), steps=2)
    assert seen
    for name, each in seen.items():
        assert each is not None, name
        assert each.diagonal().mean() == pytest.approx(1, abs=1e-3)


def test_a_method_that_does_not_use_it_does_not_pay_for_it(monkeypatch):
    monkeypatch.setattr(curvature, "_add_gradients", lambda *_: pytest.fail("measured"))
    compress(seeded(chain), 0.5, images(20), steps=2, method="asr")


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError


def test_an_error_without_a_message_is_said_by_its_type(caplog):
    class Network(Linear):
        def forward(self, x):
            return NoBackward.apply(super().forward(x))

    assert curvatures(seeded(Network), torch.randn(20, 8)) == {}
    assert "each channel is fitted alone: NotImplementedError" in caplog.text
