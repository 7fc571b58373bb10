"""Allocation by measured loss: layers whose pruning moves the outputs of the network keep more."""

import copy
import sys
from types import MappingProxyType

import pytest
import torch
from torch import nn

import resuscitate
from resuscitate.errors import CalibrationError
from resuscitate.pruning.layer_scales import LayerScales
from resuscitate.pruning.units import units_of
from resuscitate.runtime.distributed import Ranks
from resuscitate.statistics.fitting import RIDGE, fit, lost_variance
from resuscitate.workflows.compress import compress
from tests.compare import same_state
from tests.networks import Residual, chain, depthwise, images, seeded
from tests.resuscitate.statistics.test_least_squares import problem


def test_layers_that_a_global_ranking_would_strip_are_kept():
    dense, found = seeded(depthwise), {}
    resuscitate.recalibrate_batchnorm(dense, images(140))
    for allocation in ("global", "measured"):
        model = copy.deepcopy(dense)
        found[allocation] = compress(model, 0.6, images(140), allocation=allocation, min_per_channel=0)
    measured, ranked = found["measured"], found["global"]
    assert measured.allocation["name"] == "measured"
    assert measured.allocation["exponent"] > 0
    assert measured.masks["2"].float().mean() > 2 * ranked.masks["2"].float().mean()
    assert measured.agreement.error_after < 0.8 * ranked.agreement.error_after
    assert measured.sparsity == pytest.approx(0.6, abs=1e-3)


@pytest.mark.parametrize("sparsity", [0.3, 0.8])
@pytest.mark.parametrize("build", [Residual, depthwise, chain])
def test_the_draft_with_the_least_error_is_taken_if_it_is_clearly_better(build, sparsity):
    report = compress(seeded(build), sparsity, images(40), steps=4)
    about = report.to_dict()["allocation"]
    errors = about["errors"]
    assert list(errors) == [0.0, 0.5, 1.0]
    best = min(errors, key=errors.get)
    assert about["exponent"] == (best if errors[best] < 0.95 * errors[0.0] else 0.0)


@pytest.mark.parametrize("options", [{"pattern": "filter"}, {"method": "channelwise"}])
def test_otherwise_the_ranking_is_global(options):
    by_default, ranked = seeded(chain), seeded(chain)
    report = compress(by_default, 0.6, images(40), steps=2, **options)
    assert report.allocation == {"name": "global"}
    compress(ranked, 0.6, images(40), steps=2, allocation="global", **options)
    assert same_state(by_default.state_dict(), ranked.state_dict())


def test_layers_of_fixed_densities_have_no_factor_and_the_others_lose_the_rest(monkeypatch):
    found, of_losses = [], LayerScales.of_losses
    monkeypatch.setattr(LayerScales, "of_losses", lambda *given: found.append(given) or of_losses(*given))
    dense = seeded(chain)
    sizes = {name: layer.weight.numel() for name, layer in dense.named_modules() if hasattr(layer, "in_channels")}
    fixed = max(sizes, key=sizes.get)
    report = compress(dense, 0.5, images(40), steps=2, densities={fixed: 0.75})
    ((units, sparsity, *_),) = found
    assert report.allocation["name"] == "measured"
    assert fixed not in units
    left = sum(each.count for each in units.values())
    total = left + sizes[fixed]
    assert sparsity == pytest.approx((0.5 * total - 0.25 * sizes[fixed]) / left)
    assert report.masks[fixed].float().mean() == pytest.approx(0.75, abs=1e-2)


def test_an_interrupted_run_makes_no_draft_twice(tmp_path, monkeypatch):
    undisturbed, model = seeded(chain), seeded(chain)
    compress(undisturbed, 0.8, images(), steps=3)
    module = sys.modules["resuscitate.methods.refit"]
    original, fits = module.attempt, []

    def interrupted(*args, **options):
        fits.append(1)
        if len(fits) == 7:
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(module, "attempt", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compress(model, 0.8, images(), steps=3, resume=tmp_path)
    compress(model, 0.8, images(), steps=3, resume=tmp_path)
    assert len(fits) == 1 + (3 + 3) * 4  # three drafts and three steps, of four layers
    assert same_state(model.state_dict(), undisturbed.state_dict())


@pytest.mark.parametrize("groups", [1, 2])
def test_the_lost_variance_is_that_of_a_fit_on_each_support(groups):
    given = problem(groups=groups, channels=8, values=48)
    moments, weight = given.moments, given.present.w
    order = weight.abs().argsort(1, descending=True)
    supports = torch.stack([torch.zeros_like(given.support).scatter(1, order[:, :count], 1) for count in (12, 4)])
    lost = lost_variance(moments, weight, supports.sum(0), 2, Ranks())
    for part, support in zip(lost.tolist(), supports, strict=True):
        explained = fit(moments, weight * support, support, ridge=RIDGE).explained
        assert part == pytest.approx(1 - float(explained), abs=1e-6)
    assert 0 < lost[0] < lost[1] < 1


def test_a_layer_that_is_called_by_keyword_is_measured():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

        def forward(self, x):
            return self.head(input=self.conv(input=x).relu().mean((2, 3)))

    report = compress(seeded(Named), 0.5, images(40), steps=3)
    assert report.allocation["name"] == "measured"


class TestScales:
    LOST = MappingProxyType({0.5: 0.1, 0.1: 0.5, 0.01: 0.9})

    @staticmethod
    def model():
        return seeded(lambda: nn.ModuleDict({name: nn.Linear(30, 30) for name in "ab"}))

    def scales(self, cost):
        units = {name: units_of(name, layer) for name, layer in self.model().items()}
        return LayerScales.of_losses(units, 2 / 3, dict.fromkeys(units, self.LOST), cost)

    def kept(self, cost, exponent=1.0):
        scales = self.scales(cost).power(exponent)
        found = resuscitate.allocate(self.model(), 2 / 3, "measured", calibration=scales)
        return found, resuscitate.allocate(self.model(), 2 / 3)

    def test_equal_costs_keep_as_much(self):
        found, _ = self.kept({"a": 1.0, "b": 1.0})
        assert found["a"] == pytest.approx(found["b"], abs=0.1)  # the curve has few points

    def test_the_higher_cost_keeps_more(self):
        found, _ = self.kept({"a": 9.0, "b": 1.0})
        assert found["a"] > 2 * found["b"]
        assert (found["a"] + found["b"]) / 2 == pytest.approx(1 / 3)

    def test_the_power_0_is_a_global_ranking(self):
        found, ranked = self.kept({"a": 9.0, "b": 1.0}, exponent=0.0)
        assert found == ranked

    def test_a_layer_that_was_not_measured_gets_the_median(self):
        assert self.scales({"a": 2.0}).factors == {"a": 1.0, "b": 1.0}

    def test_sparsify_needs_them(self):
        with pytest.raises(CalibrationError, match="needs the factors of the layers: use compress"):
            resuscitate.sparsify(seeded(chain), 0.5, allocation="measured", calibration=images())
