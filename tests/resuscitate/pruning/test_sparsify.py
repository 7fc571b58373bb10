"""`sparsify`: exact budgets, the weights that are removed, refusals, and what stays unchanged."""

import copy
import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from resuscitate import Masks, allocate, repair, sparsify
from resuscitate.errors import LayerError, ResuscitateError
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

    @pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:`torch.jit.script` is deprecated")
    def test_a_model_without_layers_is_told_what_it_has_instead(self):
        exported = torch.export.export(seeded(chain), (images(2),)).module()
        quantized = nn.Sequential(torch.ao.nn.quantized.Conv2d(3, 4, 3), nn.ReLU())
        for model, has in (
            (torch.jit.script(seeded(chain)), "RecursiveScriptModule;"),
            (exported, "GraphModule, Module, GuardsFn;"),
            (quantized, "Sequential, torch.ao.nn.quantized.modules.conv.Conv2d, ReLU;"),
        ):
            message = f"no convolution or linear layer, but {has}.*repair it first, then script, export or quantize"
            with pytest.raises(ValueError, match=message):
                sparsify(model, 0.5)
            with pytest.raises(ResuscitateError, match=message):
                repair(model, seeded(chain), images())

    def test_weights_without_values_are_refused_by_name(self):
        with pytest.raises(LayerError, match=r"'0': its weight is on the meta device.*load the weights first"):
            sparsify(seeded(chain).to("meta"), 0.5)
        with pytest.raises(LayerError, match=r"'0': its weight is on the meta device.*load the weights first"):
            repair(seeded(chain).to("meta"), seeded(chain).to("meta"), images())

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
