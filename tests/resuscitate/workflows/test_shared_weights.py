"""A weight that two layers share has no one value that suits the inputs of both: it stays as it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import resuscitate
from resuscitate.network.layers import sharing_layers
from tests.networks import images, pruned_copy, seeded


class Tied(nn.Module):
    """Two convolutions with one weight."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 10)
        self.a, self.b = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        self.b.weight = self.a.weight

    def forward(self, x):
        for layer in (self.stem, self.a, self.b):
            x = layer(x).relu()
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("method", ["refit", "channelwise"])
@pytest.mark.parametrize("exclude", [None, "a"])
def test_layers_that_share_a_weight_stay_unchanged(method, exclude):
    dense = seeded(Tied)
    model = pruned_copy(dense, 0.7)
    weight = model.a.weight.clone()
    report = resuscitate.repair(model, dense, images(), method=method, exclude=exclude, keep_worse=True)
    rows = {row.name: row for row in report.layers}
    assert torch.equal(model.a.weight, weight)
    assert rows["b"].status == "unchanged"
    assert rows["b"].reason == "it shares a parameter with 'a', which has other inputs"
    assert rows["head"].status != "unchanged"


def test_a_weight_is_shared_in_other_shapes_and_with_other_modules_too():
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model[2].weight = nn.Parameter(model[0].weight.data.T)
    assert sharing_layers(model) == {"1": "0", "2": "0"}


def test_parts_of_one_buffer_are_not_shared():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    flat = torch.randn(2, 4, 4)
    for layer, part in zip(model, flat, strict=True):
        layer.weight = nn.Parameter(part)
    assert not sharing_layers(model)


class SharedBias(nn.Module):
    """Two heads with one bias."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3), nn.Linear(8, 5), nn.Linear(8, 5)
        self.b.bias = self.a.bias

    def forward(self, x):
        x = self.stem(x).relu()
        return self.a(x.mean((2, 3))), self.b(x.amax((2, 3)))


@pytest.mark.parametrize("method", ["refit", "channelwise"])
def test_layers_that_share_a_bias_stay_unchanged(method):
    dense = seeded(SharedBias)
    model = pruned_copy(dense)
    report = resuscitate.repair(model, dense, images(), method=method, skip_first=False)
    rows = {row.name: row for row in report.layers}
    assert rows["a"].reason == "it shares a parameter with 'b', which has other inputs"
    assert rows["b"].status in ("unchanged", "skipped")  # gains leave out the last layer
    assert torch.equal(model.a.bias, dense.a.bias)


def test_a_bias_that_a_module_around_the_layer_has_too_is_not_shared():
    head = nn.Module()
    head.decoder = nn.Linear(4, 5)
    head.bias = head.decoder.bias
    assert not sharing_layers(nn.ModuleDict({"head": head}))


def one_memory():
    """Two layers with parameters of their own that have one memory, and a BatchNorm behind each."""
    layers = [nn.Conv2d(3, 3, 3, bias=False) for _ in range(2)]
    layers[1].weight = nn.Parameter(layers[0].weight.data)
    return nn.Sequential(layers[0], nn.BatchNorm2d(3), layers[1], nn.BatchNorm2d(3))


def test_a_layer_of_which_another_one_has_the_memory_is_not_pruned_alone():
    model = seeded(one_memory)
    with pytest.raises(resuscitate.LayerError, match="layer '0': shares its weight with '2', which is not selected"):
        resuscitate.sparsify(model, 0.5, include=["0"])
    assert (model[2].weight != 0).all()


@pytest.mark.parametrize("example", [None, images(4)], ids=["traced", "observed"])
def test_no_batchnorm_is_folded_into_a_weight_that_two_layers_share(example):
    model, given = seeded(one_memory), images(4)
    model[2].weight = model[0].weight
    folded = resuscitate.fold_batchnorm(model, example)
    reasons = {"1": "'0' shares a parameter with '2'", "3": "'2' shares a parameter with '0'"}
    assert folded.fold_report.unchanged == reasons
    torch.testing.assert_close(folded(given), model(given))
