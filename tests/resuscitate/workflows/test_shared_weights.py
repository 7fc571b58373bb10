"""A weight that two layers share has no one value that suits the inputs of both: it stays as it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import resuscitate
from resuscitate.network.layers import sharing_weights
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
    assert rows["b"].reason == "it shares its weight with 'a', which has other inputs"
    assert rows["head"].status != "unchanged"


def test_a_weight_is_shared_in_other_shapes_and_with_other_modules_too():
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model[2].weight = nn.Parameter(model[0].weight.data.T)
    assert sharing_weights(model) == {"1": "0", "2": "0"}


def test_parts_of_one_buffer_are_not_shared():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    flat = torch.randn(2, 4, 4)
    for layer, part in zip(model, flat, strict=True):
        layer.weight = nn.Parameter(part)
    assert not sharing_weights(model)
