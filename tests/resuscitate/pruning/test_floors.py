"""Floors and fixed densities, which every allocation respects."""

import pytest
from torch import nn

from resuscitate import Masks, allocate, sparsify
from resuscitate.network.layers import rows_of, select_layers
from resuscitate.pruning.allocation import depthwise_floors
from tests.networks import Zoo, chain, images, linears, seeded

METHODS = ["global", "uniform", "erk", "lamp", "rr"]


def measured(method):
    """Calibration images, for the one allocation that takes them."""
    return {"calibration": images(4)} if method == "rr" else {}


class TestFloors:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("build", [chain, Zoo], ids=lambda build: build.__name__)
    def test_every_layer_and_every_channel_keeps_its_floor(self, build, method):
        model = seeded(build)
        layers = select_layers(model)
        options = {"min_per_layer": 6, "min_per_channel": 2}
        masks = sparsify(model, 0.75, allocation=method, **measured(method), **options)
        assert masks.sparsity == pytest.approx(0.75, abs=1e-3)
        for name, mask in masks.items():
            assert mask.sum() >= 6
            assert rows_of(layers[name], mask).sum(1).min() >= 2

    def test_floors_of_channels_are_given_by_layer_and_a_later_one_overrides(self):
        floors = {"*": 1, "depthwise": 3, "line": 0}
        model = seeded(Zoo)
        masks, layers = sparsify(model, 0.9, min_per_channel=floors), select_layers(model)
        least = {name: int(rows_of(layers[name], mask).sum(1).min()) for name, mask in masks.items()}
        assert least.pop("depthwise") >= 3
        assert least.pop("line") == 0
        assert min(least.values()) >= 1
        assert allocate(model, 0.9, min_per_channel=floors) == {n: float(m.double().mean()) for n, m in masks.items()}
        with pytest.raises(ValueError, match=r"min_per_channel='x' selects no layer"):
            sparsify(model, 0.5, min_per_channel={"x": 1})
        with pytest.raises(ValueError, match="min_per_channel=-1 is not a number of weights"):
            sparsify(model, 0.5, min_per_channel={"*": -1})

    def test_depthwise_layers_get_floors_that_take_a_quarter_of_the_kept_weights_at_most(self):
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 16, 1, groups=16), nn.Conv2d(16, 10, 1)
        )
        total = sum(layer.weight.numel() for layer in model)  # 432 + 144 + 16 + 160
        for kept, floors in ((256, {"1": 2, "2": 1}), (255, {"1": 1, "2": 1}), (128, {"1": 1, "2": 1}), (127, {})):
            assert depthwise_floors(model, 1 - kept / total) == floors
        assert depthwise_floors(model, 0.5, {"1": 0.5}) == {"2": 1}
        assert depthwise_floors(model, 0.5, exclude="1") == {"2": 1}
        assert depthwise_floors(seeded(chain), 0.5) == {}

    def test_a_floor_keeps_the_largest(self):
        model = linears([[1, 2, 3, 4], [50, 60, 70, 80]])
        assert sparsify(model, 0.5, min_per_layer=2)["0"].tolist() == [[False, False, True, True]]

    def test_floors_that_leave_no_room_are_refused_with_what_would_do(self):
        model = linears([[1, 2, 3, 4], [5, 6, 7, 8]])
        with pytest.raises(ValueError, match=r"at most 4 can be removed, a sparsity of 0\.5"):
            sparsify(model, 0.75, min_per_layer=2)
        with pytest.raises(ValueError, match="'0': it has 4 weights; lower the floor to 4 at most, or exclude"):
            sparsify(model, 0.5, min_per_layer=5)
        with pytest.raises(ValueError, match="each of its output channels has 4 weights"):
            sparsify(model, 0.5, min_per_channel=5)
        with pytest.raises(ValueError, match="forbids every removal of a whole filter"):
            sparsify(model, 0.5, pattern="filter", min_per_channel=1)
        for wrong in (-1, 0.5):
            with pytest.raises(ValueError, match="is not a number of weights"):
                sparsify(model, 0.5, min_per_layer=wrong)


class TestDensities:
    def test_a_glob_fixes_a_density_and_the_rest_meets_the_budget(self):
        model = seeded(chain)
        total = sum(layer.weight.numel() for layer in select_layers(model).values())
        masks = sparsify(model, 0.6, densities={"0": 1.0, "1*": 0.5}, allocation="erk")
        assert masks["0"].all()
        assert masks["11"].float().mean() == 0.5
        assert sum(int((~mask).sum()) for mask in masks.values()) == round(0.6 * total)

    def test_a_later_glob_overrules_an_earlier_one(self):
        masks = sparsify(seeded(chain), densities={"*": 0.5, "3": 1.0})
        assert masks["3"].all()
        assert masks["0"].float().mean() == 0.5

    def test_without_a_sparsity_only_the_named_layers_lose_any(self):
        masks = sparsify(seeded(chain), densities={"3": 0.25})
        assert {name for name, mask in masks.items() if not mask.all()} == {"3"}

    def test_what_cannot_be_met_is_refused_with_what_can(self):
        model = linears([[1, 2, 3, 4], [5, 6, 7, 8]])
        with pytest.raises(ValueError, match=r"at most 3 can be removed, a sparsity of 0\.375"):
            sparsify(model, 0.5, densities={"0": 1.0})
        with pytest.raises(ValueError, match=r"at least 3 .*fixed densities"):
            sparsify(model, 0.25, densities={"0": 0.25})
        with pytest.raises(ValueError, match=r"must keep at least 0\.25 of its weights, not 0\.01"):
            sparsify(model, densities={"0": 0.01})
        for wrong in (1, 0.0, 1.5, "0.5"):
            with pytest.raises(ValueError, match=r"is not a float in \(0, 1\]"):
                sparsify(model, densities={"0": wrong})
        with pytest.raises(ValueError, match="densities='7' selects no layer"):
            sparsify(model, densities={"7": 0.5})
        assert Masks.from_zeros(model).sparsity == 0
