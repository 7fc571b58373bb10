"""Layers that do not compute with their weight as it is are found by trying, and refused by name."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import resuscitate
from resuscitate.behaviour import check_layers
from resuscitate.errors import LayerError
from tests.networks import chain, images, pruned_copy, seeded


class Standardised(nn.Conv2d):
    """As weight standardisation has it."""

    def forward(self, x):
        mean, std = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) / (std + 1e-5), self.bias)


class ThroughConvForward(nn.Conv2d):
    """The same by another door."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, F.normalize(weight, dim=1), bias)


class Activated(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).relu()


class Harmless(nn.Conv2d):
    """A forward of its own that changes nothing."""

    def forward(self, x):
        return super().forward(x * 1.0)


class Masked(nn.Linear):
    """One that wants more than one input cannot be tried."""

    def forward(self, x, mask):
        return super().forward(x) * mask


def with_layer(layer):
    model = seeded(chain)
    model[3] = layer
    return model


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Standardised, "does not compute with its weight as it is"),
        (ThroughConvForward, "does not compute with its weight as it is"),
        (Activated, "does more to its output than add a bias"),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_what_would_lose_a_gain_or_a_shift_is_refused_by_name(kind, message, bias):
    dense = with_layer(kind(8, 8, 3, padding=1, bias=bias))
    model = pruned_copy(dense)
    before = copy.deepcopy(model.state_dict())
    for act in (
        lambda: resuscitate.repair(model, dense, images()),
        lambda: resuscitate.sparsify(model, 0.5),
        lambda: resuscitate.compress(model, 0.5, images(), steps=1),
    ):
        with pytest.raises(LayerError, match=rf"'3': {kind.__name__} {message}.*exclude it"):
            act()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    resuscitate.repair(model, dense, images(), exclude="3")
    resuscitate.sparsify(model, 0.9, exclude="3")


@pytest.mark.parametrize(
    "layer",
    [
        Harmless(8, 8, 3, padding=1),
        Harmless(8, 8, 3, padding="same", padding_mode="circular"),
        Harmless(8, 8, 3, groups=8, dilation=2),
        Masked(4, 4),
        nn.ConvTranspose2d(8, 8, 3, groups=2),
        nn.Linear(5, 3).double(),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_what_computes_with_its_weight_is_let_through(layer):
    state = torch.get_rng_state()
    check_layers({"layer": layer})
    assert torch.equal(torch.get_rng_state(), state)


def test_a_layer_with_nothing_left_and_one_in_training_are_let_through():
    empty = Harmless(8, 8, 3)
    nn.init.zeros_(empty.weight)
    check_layers({"empty": empty, "training": Harmless(8, 8, 3).train()})
