"""What is said of the model itself, whose name among its modules is empty."""

import copy
import io
import logging

import pytest
import torch
from rich.console import Console
from torch import nn

import resuscitate
from resuscitate.errors import LayerError, ModelMismatchError
from resuscitate.reports.page import render
from tests.networks import images, seeded


def shown(result):
    console = Console(file=io.StringIO(), width=200)
    console.print(result)
    return console.file.getvalue()


@pytest.fixture
def layer():
    """A model that is one layer, and its pruned copy with the masks."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = nn.Conv2d(3, 8, 3).eval()
    model = copy.deepcopy(dense)
    return dense, model, resuscitate.sparsify(model, 0.5)


class UsesItsWeight(nn.Module):
    """Scales its output by a weight that folding changes."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x)) * self.conv.weight.abs().sum()


def test_tables_and_the_page_name_the_model_itself(layer):
    dense, model, masks = layer
    report = resuscitate.repair(model, dense, images(), progress=False)
    document = report.to_dict() | {"masks": [row._asdict() for row in masks.table()]}
    assert "the model itself" in shown(report)
    assert "the model itself" in shown(masks)
    page = render(document)
    assert page.count("the model itself") >= 3  # of the figure, of the masks, of the table


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda dense, model: resuscitate.repair(model, dense, images() * torch.nan), LayerError, "batch 0"),
        (lambda dense, model: resuscitate.repair(nn.Linear(3, 8), dense, images()), ModelMismatchError, "is Linear"),
        (lambda dense, model: resuscitate.repair(nn.Conv2d(3, 9, 3), dense, images()), ModelMismatchError, "is \\(9"),
        (lambda dense, model: resuscitate.sparsify(model, 0.9, min_per_layer=999), ValueError, "has 216 weights"),
        (lambda dense, model: resuscitate.sparsify(model, 0.9, include="x"), ValueError, "the layers are"),
        (lambda dense, model: resuscitate.fold_batchnorm(nn.BatchNorm2d(3), images(), strict=True), LayerError, "fold"),
        (
            lambda dense, model: resuscitate.fold_batchnorm(seeded(UsesItsWeight), images()),
            LayerError,
            "folding changed",
        ),
    ],
    ids=["activations", "kind", "shape", "floor", "include", "fold strictly", "fold"],
)
def test_errors_name_the_model_itself(layer, call, error, said):
    dense, model, _ = layer
    with pytest.raises(error, match=said) as caught:
        call(dense, model)
    assert "the model itself" in str(caught.value)
    assert "''" not in str(caught.value)


def test_warnings_name_the_model_itself(caplog):
    with caplog.at_level(logging.WARNING, logger="resuscitate"):
        resuscitate.fold_batchnorm(nn.BatchNorm2d(3), images())
    assert "the model itself is not folded: no layer is read by it alone" in caplog.text
