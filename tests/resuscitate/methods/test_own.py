"""Methods and statistics of a user's own: what a report and several ranks need of them."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from resuscitate import repair
from resuscitate.engine.probes import Probe
from resuscitate.methods.base import DenseAccess, Method
from resuscitate.network.updates import Gain, Weights
from resuscitate.statistics.base import Place, Statistic
from tests.networks import chain, images, pruned_copy, seeded


@dataclass(frozen=True, kw_only=True)
class UnitVariance(Method):
    """Gives each channel the variance 1; it needs no dense network."""

    name: ClassVar[str] = "unit-variance"
    dense: ClassVar[DenseAccess] = DenseAccess.NONE

    def probe(self, layer):
        return Probe(dense=None)

    def solve(self, layer, found):
        gain = found.pruned.var.clamp(min=1e-12).rsqrt()
        return Gain(gain, torch.zeros_like(gain))


def test_the_report_of_a_method_without_a_dense_network_names_no_target():
    report = repair(pruned_copy(seeded(chain)), images(), method=UnitVariance())
    assert [row.status for row in report.layers].count("repaired") >= 3
    assert report.target == "none"


@dataclass(frozen=True, kw_only=True)
class Same(Method):
    """Keeps all weights, with numbers for the report that are still tensors."""

    name: ClassVar[str] = "same"

    def probe(self, layer):
        return Probe()

    def solve(self, layer, found):
        share = torch.tensor(0.25)
        return Weights(layer.weight, details={"explained": share, "variance_after": share / 0 * 0, "ridge": 0.5})


def test_numbers_for_the_report_may_be_tensors():
    dense = seeded(chain)
    for row in repair(pruned_copy(dense), dense, images(), method=Same()).layers[1:-1]:
        assert (row.explained, row.variance_after, row.ridge) == (0.25, None, 0.5)


class Total(Statistic):
    """The sum of the outputs."""

    total = 0.0

    def update(self, batch, pruned, dense):
        self.total += float(pruned.sum())


def test_a_statistic_that_does_not_say_what_ranks_exchange_is_refused_where_they_do():
    with pytest.raises(TypeError, match="Total has no `measured`: name the attributes that ranks exchange"):
        Total(Place("0", nn.Identity())).state()
    found = type("Measured", (Total,), {"measured": ("total",)})(Place("0", nn.Identity()))
    found.update(0, torch.ones(3), None)
    assert found.merge(found).total == 6.0
