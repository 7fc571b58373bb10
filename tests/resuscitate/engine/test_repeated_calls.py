"""Layers that one forward pass calls several times, or not at all, by suspended passes."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from resuscitate.engine.measure import measure
from resuscitate.network.runner import Network
from tests.networks import images, pruned_copy, seeded
from tests.resuscitate.engine.walks import close, methods, repaired

pytestmark = pytest.mark.usefixtures("two_at_a_time")


class ImageByImage(nn.Module):
    """Runs its first layer once for each image, so that the number of calls is the batch's size."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.last = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        return self.last(F.relu(self.bn(torch.cat([self.conv(image[None]) for image in x]))))


class AtOnce(ImageByImage):
    def forward(self, x):
        return self.last(F.relu(self.bn(self.conv(x))))


@pytest.mark.parametrize("sizes", [(8, 8), (2, 7, 5)], ids=str)
def test_a_layer_that_is_called_once_for_each_image(sizes):
    dense, other = seeded(ImageByImage), seeded(AtOnce)
    x = images(sum(sizes)).split(sizes)
    options = {"method": "refit", "relu_aware": False, "ridge": 0.01, "recalibrate": "exact"}
    model, report = repaired(dense, x=x, **options)
    expected, _ = repaired(other, x=x, **options)
    assert report.walk == "suspended"
    close(model, expected, refit=False)


class Twice(nn.Module):
    """A layer between ordinary ones that is called twice, or that has a copy of itself for its second call."""

    def __init__(self, shared=True):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv, self.shared = nn.Conv2d(6, 6, 3, padding=1), shared
        self.after, self.last = nn.Conv2d(6, 6, 3), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)))
        if self.shared:
            x = torch.cat([self.conv(x[:, :, :5]), self.conv(x[:, :, 5:])])
        else:
            x = self.conv(torch.cat([x[:, :, :5], x[:, :, 5:10]]))
        return self.last(F.relu(self.after(F.relu(x))))


@pytest.mark.parametrize(
    "options",
    [
        {"method": "refit", "relu_aware": False, "ridge": 0.01},
        {"method": "refit", "relu_aware": False, "ridge": 0.01, "recalibrate": "exact"},
        {"method": "asr"},
        {"method": "channelwise", "diagnostics": True, "recalibrate": "exact"},
    ],
    ids=["refit", "refit, exact", "asr", "channelwise, exact"],
)
def test_a_shared_layer_is_as_one_whose_calls_are_made_at_once(options):
    x = images(40, size=10).split(16)
    dense, other = seeded(Twice), seeded(lambda: Twice(shared=False))
    model, report = repaired(dense, x=x, **options)
    expected, by_node = repaired(other, x=x, **options)
    assert (report.walk, by_node.walk) == ("suspended", "graph")
    disagree = [row.name for row in report.layers if "incompatible" in row.reason]
    assert not disagree
    close(model, expected, refit=False)


def test_a_batchnorm_that_is_called_twice_is_recalibrated_over_both_calls():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = (nn.Conv2d(c, 6, 3, padding=1, bias=False) for c in (3, 6))
            self.bn, self.last = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)

        def forward(self, x):
            return self.last(F.relu(self.bn(self.conv2(F.relu(self.bn(self.conv1(x)))))))

    dense = seeded(Model)
    model = pruned_copy(dense)
    statistics = copy.deepcopy(model.bn)
    _, report = repaired(dense, model, method="bn")
    assert report.walk == "suspended"
    model.bn.running_mean, statistics.running_mean = statistics.running_mean, model.bn.running_mean
    model.bn.running_var, statistics.running_var = statistics.running_var, model.bn.running_var
    with torch.no_grad():  # what both calls read while it was as it had been
        first, second = measure(Network(model), images(40).split(16), ["bn"])["bn"]
    both = first.merge(second)
    torch.testing.assert_close(statistics.running_mean.double(), both.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(statistics.running_var.double(), both.m2 / (both.count - 1), rtol=1e-4, atol=1e-6)


class Sometimes(nn.Module):
    """Dark batches pass a layer and its BatchNorm by."""

    def __init__(self):
        super().__init__()
        self.first, self.often = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 5, 3, padding=1)
        self.bn, self.last = nn.BatchNorm2d(5), nn.Conv2d(5, 5, 1)

    def forward(self, x):
        bright = bool(x.mean() > -5)
        x = F.relu(self.first(x))
        if bright:
            x = F.relu(self.bn(self.often(x)))
        return self.last(x)


@methods
@pytest.mark.parametrize("dark", [1, 2], ids=["a middle batch", "the last batch"])
def test_batches_that_pass_a_layer_by(dark, options):
    """The layer is repaired as if there were the other batches alone; those behind it by all."""
    dense, x = seeded(Sometimes), list(images(48).split(16))
    x[dark] = x[dark] - 10
    options = {"ridge": 0.01, **options} if options["method"] == "refit" else options
    options = options | ({} if options["method"] == "bn" else {"skip_first": False, "exclude": "first"})
    model, report = repaired(dense, x=x, **options)
    bright, _ = repaired(dense, x=[b for at, b in enumerate(x) if at != dark], **options)
    assert report.walk == "suspended"
    for name in ("often", "bn"):
        close(model.get_submodule(name), bright.get_submodule(name), refit=False)
    if options["method"] == "refit":
        assert not torch.allclose(model.last.weight, bright.last.weight, rtol=1e-4)
