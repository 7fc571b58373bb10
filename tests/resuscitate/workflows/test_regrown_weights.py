"""Which weights `regrow` brings back: exact budgets, shares of the layers, choice of weights, their values."""

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from resuscitate import Masks, regrow, repair, sparsify
from resuscitate.errors import MaskError
from resuscitate.pruning.allocation_rules import by_priority
from resuscitate.pruning.units import Units
from tests.networks import Residual, chain, images, linears, seeded

LABELLED = [(images(20, seed=s), torch.arange(20) % 10) for s in (3, 4)]


def pruned(dense, sparsity=0.9, **options):
    model = copy.deepcopy(dense)
    return model, sparsify(model, sparsity, **options)


def zeros(masks):
    return sum(int((~mask).sum()) for mask in masks.values())


class TestBudget:
    @pytest.mark.parametrize("budget", ["greedy", "damage", "ssim", "proportional"])
    @pytest.mark.parametrize("saliency", ["magnitude", "residual", "gradient"])
    def test_it_is_met_exactly_and_only_kept_weights_are_not_zero(self, budget, saliency):
        dense = seeded(Residual)
        model, masks = pruned(dense)
        labelled = [(x, y % 5) for x, y in LABELLED] if saliency == "gradient" else None
        options = {"budget": budget, "saliency": saliency, "labelled": labelled, "rounds": 2}
        grown = regrow(model, dense, masks, 0.7, images(40), **options)
        total = sum(mask.numel() for mask in masks.values())
        assert zeros(grown) == round(0.7 * total)
        assert all((grown[name] | ~mask).all() for name, mask in masks.items())  # no kept weight is pruned
        assert sum(grown.regrown.values()) == zeros(masks) - zeros(grown)
        grown.masks.check(model)
        assert grown.masks == Masks.from_zeros(model)

    @settings(deadline=None, max_examples=100)
    @given(
        st.lists(st.tuples(st.integers(0, 40), st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=6),
        st.floats(0, 1),
    )
    def test_by_priority_meets_the_budget_and_regrows_more_where_the_priority_is_higher(self, layers, part):
        units, priorities = {}, {}
        for index, (pruned, kept, priority) in enumerate(layers):
            protected = torch.arange(pruned + kept) >= pruned
            units[str(index)] = Units(torch.rand(pruned + kept), 1, (pruned + kept,), protected)
            priorities[str(index)] = priority / 20
        room = sum(pruned for pruned, _, _ in layers)
        removed = by_priority(units, round(part * room), priorities)
        assert sum(removed.values()) == round(part * room)
        back = {name: units[name].removable - count for name, count in removed.items()}
        assert all(0 <= back[name] <= units[name].removable for name in units)
        for a in units:
            for b in units:
                if priorities[a] > priorities[b] and back[a] < units[a].removable:
                    assert back[a] >= back[b] - 1

    def test_proportional_gives_each_layer_the_same_share_of_what_it_misses(self):
        dense = seeded(chain)
        model, masks = pruned(dense, 0.8, allocation="uniform")
        grown = regrow(model, dense, masks, 0.4, images(), budget="proportional")
        for name, mask in masks.items():
            assert grown.regrown[name] == pytest.approx(int((~mask).sum()) / 2, abs=1)

    @pytest.mark.parametrize("budget", ["damage", "ssim"])
    def test_a_damaged_layer_is_given_more_than_a_whole_one(self, budget):
        dense = seeded(chain)
        model, masks = copy.deepcopy(dense), {}
        with torch.no_grad():
            model[3].weight[:, :4] = 0  # half of this layer's inputs, and a few weights of the next
            model[6].weight[:, :4] *= model[6].weight[:, :4].abs() > 0.02
        masks = Masks.from_zeros(model, include=["3", "6"])
        before = copy.deepcopy(masks)
        grown = regrow(model, dense, masks, 0.9 * masks.sparsity, images(), budget=budget, method=None)
        assert grown.rounds[0].damage["3"] > 0.1
        lost = {name: int((~before[name]).sum()) for name in before}
        assert grown.regrown["3"] / lost["3"] > grown.regrown["6"] / lost["6"] * 0.9
        assert masks == before

    def test_densities_may_be_given_and_the_rest_shares_what_is_left(self):
        dense = seeded(chain)
        model, masks = pruned(dense)
        grown = regrow(model, dense, masks, 0.7, images(), densities={"0": 1.0, "3": 0.5})
        assert grown["0"].all()
        assert grown["3"].float().mean() == 0.5
        assert grown.sparsity == pytest.approx(0.7, abs=1e-3)

    @pytest.mark.parametrize("rounds", [1, 3])
    def test_densities_are_approached_in_rounds(self, rounds):
        dense = seeded(chain)
        model, masks = pruned(dense, allocation="uniform")
        for densities, wanted in (({"6": 0.8}, 0.35), ({"6": 0.5, "*": 0.8}, 420 / 2104)):
            report = regrow(copy.deepcopy(model), dense, masks, wanted, images(), densities=densities, rounds=rounds)
            assert report.masks["6"].float().mean() == pytest.approx(0.8, abs=1e-3)
            seen = [masks.sparsity, *(each.sparsity for each in report.rounds)]
            steps = [before - after for before, after in pairwise(seen)]
            assert steps == pytest.approx([(masks.sparsity - wanted) / rounds] * rounds, abs=1e-3)

    def test_a_glob_of_the_densities_selects_among_the_layers_with_a_mask(self):
        dense = seeded(chain)
        model, masks = pruned(dense)
        some = Masks({name: masks[name] for name in ("0", "3")})
        grown = regrow(copy.deepcopy(model), dense, some, 0.2, images(), densities={"*": 0.8})
        assert {name: round(mask.float().mean().item(), 2) for name, mask in grown.items()} == {"0": 0.8, "3": 0.8}
        with pytest.raises(ValueError, match="selects no layer"):
            regrow(model, dense, some, 0.1, images(), densities={"6": 0.9})

    def test_the_density_of_any_layer_that_shares_a_weight_is_that_of_all(self):
        dense = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3), nn.Flatten(), nn.Linear(48, 4))
        dense[2].weight = dense[0].weight
        model, masks = pruned(dense)
        grown = regrow(model, dense, masks, 0.5, images(), densities={"2": 0.8}, method=None)
        assert grown["0"].equal(grown["2"])
        assert grown["2"].sum() == round(0.8 * 81)

    def test_the_density_of_a_producer_is_that_of_its_channels(self):
        dense = seeded(chain)
        model, masks = pruned(dense, 0.5, pattern="channels", allocation="uniform", example=images(2))
        options = {"pattern": "channels", "densities": {"*": 0.75}, "method": None}
        grown = regrow(model, dense, masks, 0.25, images(), **options)
        assert set(grown.regrown.values()) == {2, 4}  # of the 8 and the 16 channels of a layer

    def test_only_layers_with_a_mask_are_given_weights(self):
        dense = seeded(chain)
        model, masks = pruned(dense, 0.9)
        first = Masks({name: masks[name] for name in ("0", "3")})
        grown = regrow(model, dense, first, 0.5, images())
        assert set(grown) == {"0", "3"}
        assert (Masks.from_zeros(model)["6"] == masks["6"]).all()

    def test_a_shared_weight_counts_once_and_grows_in_all_its_places(self):
        dense = seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)))
        dense[2].weight = dense[0].weight
        model, masks = pruned(dense, 0.8)
        grown = regrow(model, dense, masks, 0.5, images(40).mean(3)[:, 0, :8], method="asr")
        assert model[0].weight is model[2].weight
        assert grown["0"] is grown["2"]
        assert int((model[0].weight == 0).sum() + (model[4].weight == 0).sum()) == round(0.5 * (64 + 24))


class TestSaliency:
    def test_magnitude_brings_back_the_largest_dense_weights(self):
        dense = linears([[5.0, -4.0, 3.0, 2.0, 1.0, 0.5]])
        model = copy.deepcopy(dense)
        model[0].weight.data[:] = 0
        model[0].weight.data[0, 4] = 7.0
        grown = regrow(model, dense, Masks.from_zeros(model), 0.5, torch.randn(30, 6), method=None)
        assert grown["0"].tolist() == [[True, True, False, False, True, False]]
        assert model[0].weight.tolist() == [[5, -4, 0, 0, 7, 0]]  # kept weights are unchanged

    def test_residual_brings_back_what_takes_most_off_the_error(self):
        # a large weight on an input of small variance reduces the error less than a small one on large variance
        dense = linears([[5.0, 0.5, 0.3, 1.0]])
        model = copy.deepcopy(dense)
        model[0].weight.data[0, :3] = 0
        x = torch.randn(200, 4) * torch.tensor([0.01, 3.0, 0.1, 1.0])
        grown = regrow(model, dense, Masks.from_zeros(model), 0.5, x, saliency="residual", method=None)
        assert grown["0"].tolist() == [[False, True, False, True]]

    def test_denser_masks_come_first_then_the_rest_by_magnitude(self):
        dense = linears([[5.0, -4.0, 3.0, 2.0, 1.0, 0.5]])
        model = copy.deepcopy(dense)
        model[0].weight.data[:] = 0
        reference = {"0": torch.tensor([[0, 0, 0, 1, 0, 1]])}
        options = {"saliency": reference, "method": None}
        grown = regrow(model, dense, Masks.from_zeros(model), 0.5, torch.randn(30, 6), **options)
        assert grown["0"].tolist() == [[True, False, False, True, False, True]]

    @pytest.mark.parametrize("saliency", ["magnitude", "residual"])
    def test_regrowing_all_and_refitting_restores_the_dense_function(self, saliency):
        dense = seeded(chain)
        model, masks = pruned(dense, 0.9)
        regrow(model, dense, masks, 0.0, images(60), saliency=saliency)
        x = images(seed=9)
        with torch.no_grad():
            torch.testing.assert_close(model(x), dense(x), rtol=1e-3, atol=1e-3)


class TestInitial:
    def test_zero_stays_zero_without_a_refit(self):
        dense = seeded(chain)
        model, masks = pruned(dense)
        grown = regrow(model, dense, masks, 0.5, images(), initial="zero", method=None)
        assert zeros(grown) == round(0.5 * sum(mask.numel() for mask in masks.values()))
        assert Masks.from_zeros(model) == masks

    def test_refit_finds_values_for_weights_that_are_zero_but_in_use(self):
        dense = seeded(chain)
        model, masks = pruned(dense)
        grown = regrow(model, dense, masks, 0.5, images(60), initial="refit")
        found = Masks.from_zeros(model)  # weights on constant inputs stay zero
        assert zeros(grown) <= zeros(found) < zeros(masks)
        grown.masks.check(model)

    def test_repair_takes_the_masks_for_what_is_in_use(self):
        dense = seeded(chain)
        model, masks = pruned(dense)
        wider = Masks({name: torch.ones_like(mask) if name == "3" else mask for name, mask in masks.items()})
        repair(model, dense, images(60), masks=wider)
        assert Masks.from_zeros(model) == wider
        with pytest.raises(MaskError, match="pruned weights are not zero"):
            repair(model, dense, images(60), masks=masks)
