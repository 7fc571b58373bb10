"""Networks that hold computed tensors can be copied, and so compressed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import resuscitate
from resuscitate.network.copies import deep_copy


class KeepsFeature(nn.Module):
    """Keeps an activation of its last forward pass in a dictionary."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.kept = body, dict[str, Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        self.kept["first"] = self.body[0](x)
        return self.body[1:](self.kept["first"])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    ).eval()


def masked_by_torch() -> nn.Module:
    model = network()
    prune.l1_unstructured(model[2], "weight", 0.5)
    return model


def with_feature() -> nn.Module:
    model = KeepsFeature(network())
    model(torch.randn(2, 3, 8, 8))
    return model


@pytest.mark.parametrize("make", [masked_by_torch, with_feature])
def test_tensors_with_a_graph_are_copied_without_it(make):
    model, x = make(), torch.randn(4, 3, 8, 8)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    expected = model(x)
    copied = deep_copy(model)
    assert torch.equal(copied(x), expected)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert not copied(x).any()
    assert torch.equal(model(x), expected)


def test_a_tensor_in_two_places_stays_one():
    model = network()
    model.one = model.other = model[0].weight * 2
    copied = deep_copy(model)
    assert copied.one is copied.other
    assert copied.one is not model.one
    assert not copied.one.requires_grad


@pytest.mark.parametrize("make", [masked_by_torch, with_feature])
def test_such_networks_can_be_compressed_and_mapped(make):
    model, x = make(), torch.randn(96, 3, 8, 8)
    report = resuscitate.compress(model, 0.7, x, steps=2, keep_worse=True)
    assert report.masks.sparsity == pytest.approx(0.7, abs=1e-2)
    report.masks.check(model)
    grid = {"sparsities": [0.8], "allocations": ["global"], "methods": ["channelwise"]}
    found = resuscitate.recoverability(make(), x, lambda each: float(each(x).isfinite().all()), **grid)
    assert [row["method"] for row in found.rows()] == ["channelwise"]


def test_a_copy_made_in_inference_mode_can_be_changed_and_has_gradients() -> None:
    model = network()
    with torch.inference_mode():
        copied = deep_copy(model)
    assert not any(tensor.is_inference() for tensor in copied.state_dict().values())
    copied(torch.randn(2, 3, 9, 9)).sum().backward()
