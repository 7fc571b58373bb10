"""`sparsify`: exact budgets, the weights that are removed, refusals, and what stays unchanged."""

import copy
import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from resuscitate import Masks, allocate, sparsify
from resuscitate.errors import LayerError
from resuscitate.pruning.units import Units, smallest
from tests.compare import same
from tests.networks import Residual, Shared, Zoo, chain, images, linears, seeded

ALLOCATIONS = ["global", "uniform", "erk", "lamp"]
SPARSITIES = st.floats(0, 0.97)


def removed(masks):
    return {name: int((~mask).sum()) for name, mask in masks.items()}


class TestBudget:
    # few distinct values, so that ties and zeros are frequent
    @pytest.mark.parametrize("allocation", ALLOCATIONS)
    @given(
        rows=st.lists(st.lists(st.integers(-3, 3), min_size=1, max_size=40), min_size=1, max_size=6),
        sparsity=SPARSITIES,
    )
    def test_exactly_the_asked_number_of_weights_goes_and_no_layer_is_emptied(self, allocation, rows, sparsity):
        model, total = linears(rows), sum(map(len, rows))
        budget = round(sparsity * total)
        if budget > total - len(rows):
            before = copy.deepcopy(model)
            with pytest.raises(ValueError, match="must be kept"):
                sparsify(model, sparsity, allocation=allocation)
            assert same(model, before)
            return
        masks = sparsify(model, sparsity, allocation=allocation)
        assert sum(removed(masks).values()) == budget
        assert all(mask.any() for mask in masks.values())
        masks.check(model)

    @given(scores=st.lists(st.integers(0, 4), min_size=1, max_size=60), data=st.data())
    def test_the_smallest_are_those_a_stable_sort_puts_first(self, scores, data):
        count = data.draw(st.integers(0, len(scores)))
        chosen = smallest(torch.tensor(scores, dtype=torch.float32), count).nonzero().flatten().tolist()
        assert chosen == sorted(sorted(range(len(scores)), key=scores.__getitem__)[:count])

    @given(layer=st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=60), data=st.data())
    def test_protected_units_are_never_among_the_smallest(self, layer, data):
        scores, protected = (torch.tensor(part) for part in zip(*layer, strict=True))
        units = Units(scores.float(), 1, (len(layer),), protected)
        count = data.draw(st.integers(0, units.removable))
        free = [index for index, (_, kept) in enumerate(layer) if not kept]
        wanted = sorted(sorted(free, key=lambda index: layer[index][0])[:count])
        assert units.smallest(count).nonzero().flatten().tolist() == wanted

    @pytest.mark.parametrize("allocation", ALLOCATIONS)
    @pytest.mark.parametrize("build", [chain, Residual, Shared, Zoo], ids=lambda b: b.__name__)
    def test_the_model_holds_exactly_the_zeros_of_the_masks(self, build, allocation):
        model = seeded(build)
        masks = sparsify(model, 0.8, allocation=allocation)
        assert masks == Masks.from_zeros(model)
        assert masks.sparsity == round(0.8 * sum(m.numel() for m in masks.values())) / sum(
            m.numel() for m in masks.values()
        )

    @pytest.mark.parametrize("allocation", ALLOCATIONS)
    def test_sparsity_is_of_the_original_so_half_twice_is_half(self, allocation):
        model = seeded(Residual)
        first = sparsify(model, 0.5, allocation=allocation)
        once = copy.deepcopy(model)
        assert sparsify(model, 0.5, allocation=allocation) == first
        assert same(model, once)

    @pytest.mark.parametrize("allocation", ALLOCATIONS)
    def test_pruning_further_keeps_the_zeros_there_are(self, allocation):
        model = seeded(Residual)
        first = sparsify(model, 0.5, allocation=allocation)
        second = sparsify(model, 0.8, allocation=allocation)
        assert all((second[name] <= first[name]).all() for name in first)

    def test_zero_sparsity_changes_nothing(self):
        model = seeded(Residual)
        before = copy.deepcopy(model)
        assert sparsify(model, 0.0).sparsity == 0
        assert same(model, before)

    def test_a_model_sparser_than_asked_is_left_alone_and_logged(self, caplog):
        model = seeded(Residual)
        sparsify(model, 0.8)
        before = copy.deepcopy(model)
        with caplog.at_level(logging.WARNING, "resuscitate"):
            assert sparsify(model, 0.5).sparsity == pytest.approx(0.5, abs=1e-3)
        assert "zero already" in caplog.text
        assert same(model, before)


class TestWhichWeightsGo:
    def test_global_ranks_all_layers_together(self):
        model = linears([[1, -2, 3, 4], [5, -6, 0.5, 8]])
        assert removed(sparsify(model, 0.5)) == {"0": 3, "1": 1}
        assert model[0].weight.tolist() == [[0, 0, 0, 4]]
        assert model[1].weight.tolist() == [[5, -6, 0, 8]]

    def test_the_largest_weight_of_a_weak_layer_survives_and_another_layer_pays(self):
        model = linears([[0.1, 0.2], [5, 6, 7, 8]])
        assert removed(sparsify(model, 0.5)) == {"0": 1, "1": 2}
        assert model[0].weight[0].tolist() == pytest.approx([0, 0.2])

    def test_among_equal_weights_the_earlier_goes_first(self):
        model = linears([[1, 1, -1, 1], [1, 1, 1, 1]])
        sparsify(model, 0.625)
        assert model[0].weight.tolist() == [[0, 0, 0, 1]]
        assert model[1].weight.tolist() == [[0, 0, 1, 1]]

    def test_uniform_takes_the_same_fraction_of_every_layer(self):
        model = linears([list(range(1, 11)), list(range(101, 121))])
        assert removed(sparsify(model, 0.7, allocation="uniform")) == {"0": 7, "1": 14}

    @given(sizes=st.lists(st.integers(3, 60), min_size=1, max_size=8), sparsity=st.floats(0, 0.5))
    def test_uniform_is_off_by_less_than_a_weight_in_any_layer(self, sizes, sparsity):
        masks = sparsify(linears([range(1, n + 1) for n in sizes]), sparsity, allocation="uniform")
        # the budget itself is rounded, by at most half a weight in all
        assert all(abs(count - sparsity * masks[name].numel()) < 1.5 for name, count in removed(masks).items())

    @pytest.mark.parametrize("allocation", ALLOCATIONS)
    def test_memory_format_does_not_change_the_choice(self, allocation):
        model = seeded(chain)
        # halves of integers: many ties
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_((parameter * 8).round() / 2)
        other = copy.deepcopy(model).to(memory_format=torch.channels_last)
        assert sparsify(model, 0.7, allocation=allocation) == sparsify(other, 0.7, allocation=allocation)

    def test_include_and_exclude_set_what_the_sparsity_is_a_fraction_of(self):
        model = seeded(Residual)
        before = copy.deepcopy(model)
        masks = sparsify(model, 0.5, include=nn.Conv2d, exclude="stem")
        assert set(masks) == {"conv1", "conv2"}
        assert masks.sparsity == 0.5
        assert torch.equal(model.stem.weight, before.stem.weight)
        assert torch.equal(model.head.weight, before.head.weight)

    def test_a_shared_weight_is_ranked_and_counted_once(self):
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False))
        model[1].weight = model[0].weight
        masks = sparsify(model, 0.5)
        assert masks["0"] is masks["1"]
        assert masks.sparsity == 0.5

    def test_a_shared_weight_is_not_pruned_behind_the_back_of_an_excluded_layer(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = model[0].weight
        with pytest.raises(LayerError, match="layer '0': shares its weight with '1', which is not selected"):
            sparsify(model, 0.5, exclude="1")


class TestNofM:
    @pytest.mark.parametrize(
        "layer",
        [
            nn.Linear(16, 5),
            nn.Conv1d(8, 6, 3),
            nn.Conv2d(8, 6, 3),
            nn.Conv3d(8, 2, 2),
            nn.Conv2d(16, 8, 3, groups=2),
            nn.ConvTranspose1d(8, 3, 3),
            nn.ConvTranspose2d(16, 6, 3, groups=2),
        ],
        ids=lambda layer: f"{type(layer).__name__}, groups={getattr(layer, 'groups', 1)}",
    )
    @pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 2)])
    def test_the_n_largest_of_every_m_input_channels_survive_at_each_position(self, layer, n, m):
        model = nn.Sequential(copy.deepcopy(layer))
        magnitude = model[0].weight.detach().abs()
        masks = sparsify(model, pattern=f"{n}:{m}")
        axis = 0 if "Transpose" in type(layer).__name__ else 1
        groups = masks["0"].movedim(axis, -1).unflatten(-1, (-1, m))
        assert groups.sum(-1).eq(n).all()
        ranked = magnitude.movedim(axis, -1).unflatten(-1, (-1, m))
        assert (ranked.where(groups, torch.inf).amin(-1) >= ranked.where(~groups, 0).amax(-1)).all()
        masks.check(model)

    def test_layers_whose_input_channels_do_not_divide_stay_dense_all_true_and_logged(self, caplog):
        model = seeded(Zoo)
        before = copy.deepcopy(model)
        with caplog.at_level(logging.INFO, "resuscitate"):
            masks = sparsify(model, pattern="2:4")
        # input channels per group: 3, 2, 1, 6, 6, 1, 3; only the head has 4
        for name in ("stem", "grouped", "depthwise", "up", "line", "volume", "unused"):
            assert masks[name].all()
            assert name in caplog.text
            assert torch.equal(model.get_submodule(name).weight, before.get_submodule(name).weight)
        assert masks["head"].sum(1).eq(2).all()

    def test_its_own_sparsity_may_be_given_and_no_other(self):
        assert sparsify(nn.Sequential(nn.Linear(6, 2)), 2 / 3, pattern="1:3").sparsity == pytest.approx(2 / 3)
        with pytest.raises(ValueError, match=r"2:4 keeps 2 of 4, a sparsity of 0\.5"):
            sparsify(seeded(chain), 0.9, pattern="2:4")

    def test_densities_and_floors_that_it_cannot_hold_are_refused(self):
        model = nn.Sequential(nn.Linear(8, 2))
        with pytest.raises(ValueError, match="leave densities out, and use exclude"):
            sparsify(model, pattern="2:4", densities={"0": 1.0})
        with pytest.raises(ValueError, match="min_per_channel=5: this pattern keeps 4 in layer '0'"):
            sparsify(model, pattern="2:4", min_per_channel=5)
        with pytest.raises(ValueError, match="min_per_layer=9: this pattern keeps 8 in layer '0'"):
            sparsify(model, pattern="2:4", min_per_layer=9)
        assert Masks.from_zeros(model).sparsity == 0
        assert sparsify(model, pattern="2:4", min_per_channel=4).sparsity == 0.5

    def test_zeros_go_first_so_the_pattern_twice_is_the_pattern_once(self):
        model = seeded(chain)
        assert sparsify(model, pattern="2:4") == sparsify(model, pattern="2:4")

    def test_a_model_in_which_nothing_divides_is_refused(self):
        with pytest.raises(ValueError, match="whole groups of 4"):
            sparsify(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8)), pattern="2:4")


class TestRefusals:
    @pytest.mark.parametrize("sparsity", [0, 1, True, "0.5"])
    def test_a_sparsity_that_is_not_a_float_is_refused_with_the_reason(self, sparsity):
        with pytest.raises(TypeError, match=r"give a float in \[0, 1\), the fraction of the original weights"):
            sparsify(seeded(chain), sparsity)

    @pytest.mark.parametrize("sparsity", [1.0, -0.1, 1.5, float("nan"), float("inf")])
    def test_a_sparsity_outside_its_range_is_refused(self, sparsity):
        with pytest.raises(ValueError, match=r"not in \[0, 1\)"):
            sparsify(seeded(chain), sparsity)

    def test_a_missing_sparsity_is_refused(self):
        with pytest.raises(ValueError, match="sparsity is missing"):
            sparsify(seeded(chain))

    def test_unknown_choices_list_what_there_is(self):
        with pytest.raises(ValueError, match="'erk-ish'; choose from global, uniform"):
            sparsify(seeded(chain), 0.5, allocation="erk-ish")
        for pattern in ("blocks", "4:2", "4:4", "0:4", "2:", 24):
            with pytest.raises(ValueError, match='choose "unstructured", "filter", "channels", or "n:m"'):
                sparsify(seeded(chain), 0.5, pattern=pattern)

    def test_options_without_an_effect_are_refused_and_nothing_is_changed(self):
        for options, message in (
            ({"indivisible": "pad"}, "indivisible='pad' is for patterns n:m, not 'unstructured'"),
            ({"calibration": images()}, "'global' measures nothing: leave calibration out, or choose allocation 'rr'"),
            ({"calibration": images(), "allocation": "erk"}, "'erk' measures nothing: leave calibration out"),
            ({"calibration": images(), "pattern": "filter"}, "'global' measures nothing: leave calibration out"),
            ({"calibration": images(), "pattern": "2:4"}, "2:4 measures nothing: leave calibration out"),
            ({"allocation": "rr", "pattern": "2:4"}, "2:4 fixes every density: leave allocation out instead of 'rr'"),
            ({"allocation": "erk", "pattern": "2:4"}, "2:4 fixes every density: leave allocation out instead of 'erk'"),
            ({"pattern": "channels", "min_per_layer": 5}, "count weights"),
            ({"pattern": "channels", "min_per_channel": 5}, "count weights"),
        ):
            model = seeded(chain)
            with pytest.raises(ValueError, match=message):
                sparsify(model, 0.5, example=images(2), **options)
            assert same(model, seeded(chain))

    def test_selectors_that_leave_nothing_are_refused(self):
        with pytest.raises(ValueError, match="did you mean conv1"):
            sparsify(seeded(Residual), 0.5, include="conv11")
        with pytest.raises(ValueError, match="nothing to prune"):
            sparsify(seeded(chain), 0.5, exclude="*")
        with pytest.raises(ValueError, match="nothing to prune"):
            sparsify(nn.Sequential(nn.ReLU()), 0.5)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
    def test_weights_that_are_not_finite_are_refused_by_name_and_nothing_is_written(self, value, pattern):
        model = seeded(chain)
        with torch.no_grad():
            model[6].weight[0, 0, 0, 0] = value
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        with pytest.raises(LayerError, match="layer '6': 1 of its weights"):
            sparsify(model, 0.5, pattern=pattern)
        assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items() if k != "6.weight")


class TestWhatStays:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
    def test_dtype_memory_format_flags_and_identity(self, dtype, pattern):
        model = seeded(chain).to(dtype).to(memory_format=torch.channels_last)
        model[3].weight.requires_grad_(False)
        model.train()
        model[1].eval()
        parameters, modes = dict(model.named_parameters()), [m.training for m in model.modules()]
        masks = sparsify(model, 0.5, pattern=pattern)
        masks.check(model)
        assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
        assert [m.training for m in model.modules()] == modes
        assert not model[3].weight.requires_grad
        assert model[3].weight.dtype == dtype
        assert model[3].weight.is_contiguous(memory_format=torch.channels_last)

    def test_random_state_biases_and_batchnorm(self):
        model = seeded(chain)
        before, state = copy.deepcopy(model), torch.random.get_rng_state()
        sparsify(model, 0.9)
        assert torch.equal(torch.random.get_rng_state(), state)
        changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before.state_dict()[key])}
        assert changed == {"0.weight", "3.weight", "6.weight", "11.weight"}

    def test_a_prune_parametrisation_stays_and_takes_the_new_zeros_in(self):
        model = seeded(chain)
        prune.random_unstructured(model[3], "weight", 0.3)
        before = model[3].weight_mask.bool()
        masks = sparsify(model, 0.8)
        assert prune.is_pruned(model[3])
        assert torch.equal(model[3].weight_mask.bool(), masks["3"])
        assert not (masks["3"] & ~before).any()
        model(images())
        masks.check(model)

    def test_the_same_weights_give_the_same_masks_again(self):
        a, b = seeded(Zoo), seeded(Zoo)
        assert sparsify(a, 0.77) == sparsify(b, 0.77)
        assert same(a, b)


class TestAllocate:
    @pytest.mark.parametrize("method", ALLOCATIONS)
    def test_the_densities_are_those_that_sparsify_leaves(self, method):
        model = seeded(Zoo)
        before = copy.deepcopy(model)
        densities = allocate(model, 0.8, method)
        assert same(model, before)
        masks = sparsify(model, 0.8, allocation=method)
        assert densities == {name: int(mask.sum()) / mask.numel() for name, mask in masks.items()}

    def test_an_unknown_method_lists_what_there_is(self):
        with pytest.raises(ValueError, match="choose from global, uniform"):
            allocate(seeded(chain), 0.5, "magic")

    def test_the_largest_possible_sparsity_is_told(self):
        with pytest.raises(ValueError, match=r"removes 4 of 4 weights.* at most 2 can be removed, a sparsity of 0\.5"):
            allocate(linears([[1, 2], [3, 4]]), 0.95)


class TestIndivisible:
    def test_padding_fills_the_last_group_with_channels_that_are_not_there(self):
        model = nn.Sequential(nn.Linear(6, 1, bias=False))
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor([[1.0, 2, 3, 4, 5, 6]]))
        # groups 1 2 3 4 | 5 6 0 0: two kept of each
        masks = sparsify(model, pattern="2:4", indivisible="pad")
        assert masks["0"].tolist() == [[False, False, True, True, True, True]]
        assert "filled up: 6 input channels, groups of 4" in masks.notes["0"]

    @pytest.mark.parametrize(("groups", "channels"), [(1, 6), (2, 6), (3, 3)])
    @pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
    def test_padding_holds_the_pattern_within_each_group_of_a_convolution(self, kind, groups, channels):
        model = nn.Sequential(kind(groups * channels, groups * 4, 3, groups=groups))
        mask = sparsify(model, pattern="1:4", indivisible="pad")["0"]
        axis = 0 if kind is nn.ConvTranspose2d else 1
        for part in mask.split(channels, axis):
            for four in part.split(4, axis):
                assert four.sum(axis).eq(1).all()

    def test_a_layer_left_dense_is_noted_in_the_table(self):
        masks = sparsify(seeded(Zoo), pattern="2:4")
        notes = {row.layer: row.note for row in masks.table()}
        assert notes["stem"] == "left dense: 3 input channels, groups of 4"
        assert notes["head"] == ""

    def test_raising_names_the_layer_and_what_would_do(self):
        model = nn.Sequential(nn.Conv2d(8, 6, 3), nn.Conv2d(6, 4, 3))
        with pytest.raises(LayerError, match=r"layer '1': its 6 input channels .* 'pad', or groups of 3"):
            sparsify(model, pattern="2:4", indivisible="raise")
        with pytest.raises(ValueError, match="indivisible='skip' is unknown; there are 'dense', 'pad', 'raise'"):
            sparsify(model, pattern="2:4", indivisible="skip")


class TestFilters:
    def test_the_filters_of_least_mean_magnitude_go_whole_and_the_bias_stays(self):
        model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 2, 1))
        with torch.no_grad():
            for index, scale in enumerate((4.0, 1.0, 3.0, 2.0)):
                model[0].weight[index] = scale * torch.sign(torch.randn(2, 3, 3))
            model[1].weight.fill_(9)
        bias = model[0].bias.clone()
        masks = sparsify(model, 0.5, pattern="filter", include="0")
        assert masks["0"].flatten(1).all(1).tolist() == [True, False, True, False]
        assert torch.equal(model[0].bias, bias)

    @pytest.mark.parametrize("groups", [1, 2])
    def test_a_transposed_convolution_keeps_its_output_channels_on_axis_one(self, groups):
        model = nn.Sequential(nn.ConvTranspose2d(4, 6, 2, groups=groups, bias=False))
        mask = sparsify(model, 1 / 3, pattern="filter")["0"]
        out = model(torch.rand(2, 4, 3, 3))
        assert int((out.flatten(2).abs().sum((0, 2)) == 0).sum()) == 2
        assert (~mask).float().mean() == pytest.approx(1 / 3)

    def test_dead_channels_are_noted(self):
        model = seeded(chain)
        masks = sparsify(model, 0.5, pattern="filter", allocation="uniform", include=["0", "3"])
        assert masks.notes == {"0": "4 of 8 channels dead", "3": "4 of 8 channels dead"}
        assert sparsify(seeded(chain), 0.5, min_per_channel=1).notes == {}
