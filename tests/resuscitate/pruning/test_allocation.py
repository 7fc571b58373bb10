"""`allocate`: each allocation by hand, by its formula and by its invariants."""

import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from benchmarks.networks.resnet import resnet18
from resuscitate import Repairability, allocate, sparsify
from resuscitate.errors import CalibrationError, ModelMismatchError
from resuscitate.network.layers import select_layers
from resuscitate.pruning.allocation_rules import by_erk, by_lamp, lamp_scores
from resuscitate.pruning.units import Units
from tests.networks import Shared, Zoo, chain, images, linears, seeded

METHODS = ["global", "uniform", "erk", "lamp", "rr"]
ROWS = st.lists(st.lists(st.integers(-4, 4), min_size=2, max_size=30), min_size=1, max_size=5)


def shaped(*shapes):
    """Units of single weights, for layers of these weight shapes, the last weight of each protected."""
    units = {}
    for index, shape in enumerate(shapes):
        protected = torch.zeros(math.prod(shape), dtype=torch.bool)
        protected[-1] = True
        units[str(index)] = Units(torch.rand(len(protected)), 1, shape, protected)
    return units


def allocated(model, sparsity, method, **options):
    return allocate(model, sparsity, method, **measured(method), **options)


def measured(method):
    """Calibration images, for the one allocation that takes them."""
    return {"calibration": images(4)} if method == "rr" else {}


class TestEveryMethod:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.77, 0.95])
    def test_the_budget_is_met_to_one_weight(self, method, sparsity):
        model = seeded(chain)
        sizes = {name: layer.weight.numel() for name, layer in select_layers(model).items()}
        kept = sum(density * sizes[name] for name, density in allocated(model, sparsity, method).items())
        assert round(kept, 6) == sum(sizes.values()) - round(sparsity * sum(sizes.values()))

    @pytest.mark.parametrize("method", METHODS)
    def test_a_higher_sparsity_never_gives_a_layer_more(self, method):
        model = seeded(chain)
        steps = [allocated(model, s, method) for s in (0.1, 0.3, 0.5, 0.7, 0.9, 0.97)]
        sizes = {name: layer.weight.numel() for name, layer in select_layers(model).items()}
        # rounding to whole weights may move a single weight between layers
        for before, after in pairwise(steps):
            assert all(after[name] * sizes[name] <= before[name] * sizes[name] + 1 + 1e-9 for name in sizes)

    @pytest.mark.parametrize("method", METHODS)
    def test_the_densities_are_those_that_sparsify_leaves(self, method):
        model = seeded(chain)
        densities = allocated(model, 0.8, method)
        masks = sparsify(model, 0.8, allocation=method, **measured(method))
        assert densities == {name: int(mask.sum()) / mask.numel() for name, mask in masks.items()}

    @pytest.mark.parametrize("method", METHODS)
    def test_densities_from_one_call_are_met_by_the_next(self, method):
        model = seeded(chain)
        densities = allocated(model, 0.8, method)
        assert allocate(model, densities=densities) == densities

    @pytest.mark.parametrize("method", METHODS)
    def test_whole_filters_come_within_one_of_the_budget(self, method):
        model = seeded(chain)
        masks = sparsify(model, 0.5, pattern="filter", allocation=method, **measured(method))
        total = sum(mask.numel() for mask in masks.values())
        removed = sum(int((~mask).sum()) for mask in masks.values())
        largest = max(mask[0].numel() for mask in masks.values())
        assert round(0.5 * total) - largest < removed <= round(0.5 * total)
        assert all(len(rows.unique()) == 1 for mask in masks.values() for rows in mask.flatten(1))
        assert all(mask.any() for mask in masks.values())


class TestErk:
    def test_density_is_proportional_to_the_sum_of_dimensions_over_their_product(self):
        # by hand: 20/100 and 20/400 per weight, so the 60 weights kept of 500 (88 %) are split 20 to 40
        units = shaped((10, 10), (20, 20))
        removed = by_erk(units, 440)
        assert removed == {"0": 100 - 20, "1": 400 - 40}

    def test_layers_that_would_exceed_one_are_capped_and_the_rest_shares_what_is_left(self):
        # eps = 156 / (10 + 42) = 3 gives 30 of 25 weights to the first layer, so all 25, and 131 of 216 to the other
        assert by_erk(shaped((5, 5), (6, 36)), 241 - 156) == {"0": 0, "1": 216 - 131}

    @given(
        shapes=st.lists(st.lists(st.integers(1, 12), min_size=2, max_size=4).map(tuple), min_size=1, max_size=6),
        sparsity=st.floats(0, 0.9),
    )
    def test_it_is_the_fixed_point_of_iterated_capping(self, shapes, sparsity):
        units = shaped(*shapes)
        total = sum(layer.count for layer in units.values())
        budget = min(round(sparsity * total), sum(layer.removable for layer in units.values()))
        removed, expected = by_erk(units, budget), iterated(units, total - budget)
        assert sum(removed.values()) == budget
        if all(
            density * math.prod(shape) >= 1 for density, shape in zip(expected, shapes, strict=True)
        ):  # no floor binds
            for (name, layer), density in zip(units.items(), expected, strict=True):
                assert abs(layer.count - removed[name] - density * layer.count) < 1 + 1e-6

    def test_resnet18_for_cifar_100_at_90_per_cent_is_as_published(self):
        model = resnet18(small=True, classes=100)
        densities = allocate(model, 0.9, "erk")
        dense = {name for name, density in densities.items() if density == 1}
        assert dense == {"conv1", "layer2.0.downsample.0", "layer3.0.downsample.0", "fc"}
        assert densities["layer4.0.downsample.0"] == pytest.approx(0.745, abs=1e-3)
        last = [d for name, d in densities.items() if name.startswith("layer4") and "downsample" not in name]
        assert all(0.055 <= density <= 0.0833 for density in last)


def iterated(units, kept):
    """ERK densities by capping the layers that exceed 1, all that tie at once, and solving again for the rest."""
    raw = {name: sum(layer.shape) / math.prod(layer.shape) for name, layer in units.items()}
    capped = set()
    while True:
        free = [name for name in units if name not in capped]
        left = kept - sum(units[name].count for name in capped)
        if not free:
            return [1.0 for _ in units]
        eps = left / sum(raw[name] * units[name].count for name in free)
        over = {name for name in free if eps * raw[name] > 1}
        if not over:
            return [1.0 if name in capped else eps * raw[name] for name in units]
        most = max(raw[name] for name in over)
        capped |= {name for name in over if raw[name] == most}


class TestLamp:
    def test_a_score_is_the_share_of_what_is_left_when_all_smaller_are_gone(self):
        layer = Units(torch.tensor([3.0, 1.0, 2.0]), 1, (1, 3), torch.zeros(3, dtype=torch.bool))
        assert lamp_scores(layer).tolist() == pytest.approx([1 / 14, 4 / 13, 9 / 9])

    def test_two_layers_worked_by_hand(self):
        # scores 1/26 and 25/25 against 4/8 and 4/4 (ties by position): 1/26, then 4/8 are removed
        model = linears([[1, 5], [2, 2]])
        assert sparsify(model, 0.25)["0"].tolist() == [[False, True]]
        masks = sparsify(linears([[1, 5], [2, 2]]), 0.5, allocation="lamp")
        assert [mask.tolist() for mask in masks.values()] == [[[False, True]], [[False, True]]]

    @given(scores=st.lists(st.floats(2**-20, 2**20, width=32), min_size=1, max_size=60))
    def test_scores_rise_with_the_weight_and_end_at_one(self, scores):
        none = torch.zeros(len(scores), dtype=torch.bool)
        found = lamp_scores(Units(torch.tensor(scores), 1, (1, len(scores)), none))
        assert (np.diff(found) >= 0).all()
        assert found[-1] == 1
        assert (found > 0).all()

    @given(rows=ROWS, sparsity=st.floats(0, 0.9))
    def test_the_global_top_by_score_is_kept(self, rows, sparsity):
        model, total = linears(rows), sum(map(len, rows))
        budget = round(sparsity * total)
        if budget > total - len(rows):
            return
        naive = []
        for layer, row in enumerate(rows):
            order = sorted(range(len(row)), key=lambda i: abs(row[i]))
            squares = [float(row[i]) ** 2 for i in order]
            for place in range(len(row) - 1):  # the largest is protected
                left = sum(squares[place:])
                naive.append((squares[place] / left if squares[place] else 0.0, layer, place))
        threshold = sorted(score for score, _, _ in naive)[budget - 1] if budget else -1.0
        removed = {n: int((~m).sum()) for n, m in sparsify(model, sparsity, allocation="lamp").items()}
        for layer in range(len(rows)):
            mine = [score for score, owner, _ in naive if owner == layer]
            below = sum(score < threshold * (1 - 1e-12) for score in mine)
            upto = sum(score <= threshold * (1 + 1e-12) for score in mine)
            assert below <= removed[str(layer)] <= upto

    def test_a_layer_in_another_scale_is_treated_alike(self):
        model, scaled = seeded(chain), seeded(chain)
        with torch.no_grad():
            scaled[3].weight.mul_(1024)
        assert allocate(model, 0.8, "lamp") == allocate(scaled, 0.8, "lamp")
        assert allocate(model, 0.8) != allocate(scaled, 0.8)

    def test_it_reads_no_more_than_one_sort_of_each_layer(self, monkeypatch):
        units = shaped((30, 30), (10, 10), (5, 50))
        sorted_sizes, sort = [], np.sort
        monkeypatch.setattr(
            np, "sort", lambda values, *rest: (sorted_sizes.append(len(values)), sort(values, *rest))[1]
        )
        by_lamp(units, 700)
        assert sorted(sorted_sizes) == sorted(layer.removable for layer in units.values())


class TestRepairability:
    def test_it_refuses_missing_images(self):
        with pytest.raises(CalibrationError, match="pass calibration, unlabelled images"):
            allocate(seeded(chain), 0.5, "rr")

    def test_it_refuses_what_cannot_be_before_it_measures(self, monkeypatch):
        monkeypatch.setattr(Repairability, "measure", None)
        with pytest.raises(ValueError, match=r"not in \[0, 1\)"):
            allocate(seeded(chain), 1.0, "rr", calibration=images(4))

    def test_a_residual_is_one_less_the_squared_correlation_weighted_by_dense_variance(self):
        model, x = seeded(chain), images(12)
        found = Repairability.measure(model, x, densities=[0.3], batch_size=5)
        pruned = seeded(chain)
        layer, inputs = pruned[3], []
        model[3].register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
        dense = model[:4](x)
        sparsify(pruned, densities={"3": 0.3}, include="3")
        y = layer(inputs[0]).detach().double()
        d, p = (t.detach().double().transpose(0, 1).flatten(1) for t in (dense, y))
        corr = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(d, p, strict=True)])
        variance = d.var(1, correction=0)
        assert found.residuals["3"][0.3] == pytest.approx(
            float(1 - (corr**2 * variance).sum() / variance.sum()), rel=1e-4
        )

    def test_a_fine_grid_has_the_residuals_of_its_densities(self):
        grid = [i / 200 for i in range(1, 200)]
        fine, coarse = (Repairability.measure(seeded(chain), images(8), densities=d) for d in (grid, [0.3, 0.7]))
        for name, residuals in fine.residuals.items():
            assert len(residuals) == 199
            assert {density: residuals[density] for density in (0.3, 0.7)} == pytest.approx(coarse.residuals[name])

    def test_the_curves_fall_with_density_and_do_not_depend_on_the_batches(self):
        model = seeded(chain)
        one, many = (Repairability.measure(model, images(16), batch_size=size) for size in (16, 3))
        for name, curve in one.residuals.items():
            values = list(curve.values())
            assert values == pytest.approx(sorted(values), abs=0.05)
            assert values == pytest.approx(list(many.residuals[name].values()), rel=1e-4)
            assert all(0 <= value <= 1 for value in values)

    def test_the_cheapest_weights_go_first(self):
        # the smaller half of the first layer's weights multiplies zeros, so its output does not depend on them
        model = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 4, 1, bias=False))
        with torch.no_grad():
            model[0].weight.copy_(torch.rand(4, 4, 1, 1) + 1)
            model[0].weight[:, 2:] *= 0.5
            model[1].weight.copy_(torch.rand(4, 4, 1, 1) + 1)
        x = images(8, channels=4)
        x[:, 2:] = 0
        assert allocate(model, 0.25, "rr", calibration=x) == {"0": 0.5, "1": 1.0}

    def test_a_measurement_serves_many_budgets_and_knows_its_layers(self):
        model = seeded(chain)
        measured = Repairability.measure(model, images(8), include=["0", "3"])
        assert allocate(model, 0.5, "rr", calibration=measured, include=["0", "3"]).keys() == {"0", "3"}
        with pytest.raises(ModelMismatchError, match="'6' is not among the layers measured"):
            allocate(model, 0.5, "rr", calibration=measured)

    @pytest.mark.parametrize("act", [allocate, sparsify], ids=lambda act: act.__name__)
    def test_it_measures_with_the_callers_options(self, act, monkeypatch):
        batches = [{"a": part, "scale": 2.0} for part in images(16).split(5)]
        options = {"forward_fn": lambda model, batch: model(batch["a"] * batch["scale"]), "dtype": "bf16", "seed": 3}
        options |= {"max_samples": 7, "batch_size": 4, "device": "cpu", "progress": False}
        measured = Repairability.measure(seeded(chain), batches, **options)
        how = {"method" if act is allocate else "allocation": "rr"}
        expected = act(seeded(chain), 0.7, calibration=measured, **how)
        assert act(seeded(chain), 0.7, calibration=batches, **options, **how) == expected
        seen = {}
        monkeypatch.setattr(Repairability, "measure", lambda *_, **found: seen.update(found) or measured)
        act(seeded(chain), 0.7, calibration=batches, **options, **how)
        assert options.items() <= seen.items()

    @pytest.mark.parametrize("act", [allocate, sparsify], ids=lambda act: act.__name__)
    def test_its_options_are_refused_where_nothing_is_measured(self, act):
        model = seeded(chain)
        measured = Repairability.measure(model, images(8))
        how = "method" if act is allocate else "allocation"
        for chosen in ({how: "erk"}, {how: "rr", "calibration": measured}):
            with pytest.raises(ValueError, match="dtype is of the measurement for allocation 'rr'"):
                act(model, 0.5, dtype="bf16", **chosen)
        assert all(module.weight.all() for module in model if isinstance(module, nn.Conv2d))

    @pytest.mark.parametrize("act", [allocate, sparsify], ids=lambda act: act.__name__)
    def test_images_are_refused_where_nothing_is_measured(self, act):
        model, how = seeded(chain), "method" if act is allocate else "allocation"
        for method in ("global", "uniform", "erk", "lamp"):
            with pytest.raises(
                ValueError, match=f"{method!r} measures nothing: leave calibration out, or choose .* 'rr'"
            ):
                act(model, 0.5, calibration=images(4), **{how: method})
        with pytest.raises(ValueError, match="unknown allocation 'magic'"):
            act(model, 0.5, calibration=images(4), **{how: "magic"})
        assert all(module.weight.all() for module in model if isinstance(module, nn.Conv2d))

    def test_selectors_may_be_an_iterator(self):
        expected = allocate(seeded(chain), 0.5, "rr", calibration=images(8), include=["0", "3"])
        assert allocate(seeded(chain), 0.5, "rr", calibration=images(8), include=iter(["0", "3"])) == expected

    @pytest.mark.parametrize("build", [Zoo, Shared], ids=lambda build: build.__name__)
    def test_transposed_grouped_shared_and_unreached_layers_are_measured_or_taken_evenly(self, build):
        model = seeded(build)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        measured = Repairability.measure(model, images(6))
        assert measured.images == 6
        if build is Zoo:  # no image reaches it
            assert measured.curve("unused") == [(0.0, 0.0), (1.0, 1.0)]
        masks = sparsify(copy.deepcopy(model), 0.6, allocation="rr", calibration=measured)
        assert masks.sparsity == pytest.approx(0.6, abs=1e-3)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert not any(module._forward_hooks for module in model.modules())
