"""Hyperspherical layers keep the outputs; the penalty moves weights away from the threshold."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

import resuscitate
from resuscitate import PruningPenalty, to_hyperspherical, to_plain
from resuscitate.errors import LayerError
from tests.networks import Residual, chain, images, pruned_copy, seeded


def filters(layer):
    return layer.weight.detach().flatten(1)


class TestConversion:
    @pytest.mark.parametrize("build", [chain, Residual, lambda: chain(bias=True)], ids=["chain", "residual", "bias"])
    def test_conversion_to_hyperspherical_and_back_keeps_the_outputs(self, build):
        dense, x = seeded(build), images()
        model = copy.deepcopy(dense)
        names = to_hyperspherical(model)
        assert names == list(resuscitate.network.masks.find_layers(dense))
        with torch.no_grad():
            torch.testing.assert_close(model(x), dense(x), rtol=1e-5, atol=1e-6)
            converted = model(x)
        assert to_plain(model) == names
        assert list(model.state_dict()) == list(dense.state_dict())
        assert [type(module) for module in model.modules()] == [type(module) for module in dense.modules()]
        with torch.no_grad():
            torch.testing.assert_close(model(x), converted, rtol=0, atol=0)
        torch.testing.assert_close(model.state_dict(), dense.state_dict(), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("keep", [True, False])
    def test_trained_filters_lie_on_the_unit_sphere(self, keep):
        model = seeded(chain)
        to_hyperspherical(model, keep=keep, include="3")
        x, y = images(), torch.arange(24) % 10
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        before = filters(model[3]).clone()
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        assert not torch.equal(filters(model[3]), before)
        sphere = model[3].parametrizations.weight[0]
        unit = (model[3].weight.detach() - sphere.offset) / sphere.gain
        torch.testing.assert_close(unit.flatten(1).norm(dim=1), torch.ones(8))
        torch.testing.assert_close(unit.flatten(1).mean(1), torch.zeros(8), rtol=0, atol=1e-6)
        assert keep or torch.equal(sphere.gain, torch.ones_like(sphere.gain))

    def test_depthwise_and_constant_filters_keep_outputs_and_finite_gradients(self):
        layer = nn.Conv2d(4, 4, 1, groups=4)
        wide = nn.Conv2d(3, 2, 3)
        nn.init.constant_(wide.weight, 0.5)
        for each, x in ((layer, torch.randn(2, 4, 5, 5)), (wide, torch.randn(2, 3, 5, 5))):
            model = nn.Sequential(each)
            expected = model(x).detach()
            to_hyperspherical(model)
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
            model(x).sum().backward()
            assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)

    def test_a_state_dict_loads_into_another_hyperspherical_model(self):
        model, other = seeded(chain), seeded(chain, seed=1)
        to_hyperspherical(model)
        to_hyperspherical(other)
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(other(images()), model(images()), rtol=0, atol=0)

    def test_a_model_is_pruned_and_repaired_only_after_to_plain(self):
        model = seeded(chain)
        to_hyperspherical(model)
        with pytest.raises(LayerError, match="recomputed"):
            resuscitate.sparsify(model, 0.5)
        to_plain(model)
        dense = copy.deepcopy(model)
        resuscitate.sparsify(model, 0.5)
        resuscitate.repair(model, dense, images())

    def test_a_weight_that_is_already_recomputed_is_refused(self):
        model = seeded(chain)
        prune.l1_unstructured(model[3], "weight", amount=0.5)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(LayerError, match=r"'3'.*prune\.remove"):
            to_hyperspherical(model)
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
        prune.remove(model[3], "weight")
        to_hyperspherical(model, include="3")
        with pytest.raises(LayerError, match="recomputed"):
            to_hyperspherical(model)

    def test_a_shared_weight_is_refused_and_nothing_is_changed(self):
        model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
        model[2].weight = model[1].weight
        names = [name for name, _ in model.named_parameters()]
        with pytest.raises(LayerError, match=r"layer '1': it shares a parameter with '2'.*exclude both"):
            to_hyperspherical(model)
        assert [name for name, _ in model.named_parameters()] == names
        assert to_hyperspherical(model, exclude=["1", "2"]) == ["0"]

    def test_a_transposed_convolution_is_unchanged(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 2, 3))
        assert to_hyperspherical(model) == ["0"]


def cost(penalty):
    return float(penalty.detach())


def line(values):
    layer = nn.Linear(len(values), 1, bias=False)
    layer.weight.data.copy_(torch.tensor([values]))
    return nn.Sequential(layer)


class TestPenalty:
    def test_the_penalty_is_that_of_the_formula(self):
        values = [0.1, -0.5, 1.0, 1.5, -2.5, 0.2]
        threshold = sorted(map(abs, values))[2]  # round(0.5 * 6)
        scale = sum(v * v for v in values) / 6
        expected = sum(min(abs(v), max(2 * threshold - abs(v), 0)) ** 2 for v in values) / scale / 6
        assert cost(PruningPenalty(line(values), 0.5, strength=3.0)()) == pytest.approx(3 * expected)

    @settings(deadline=None, max_examples=60)
    @given(
        st.lists(st.floats(-3, 3).filter(lambda v: abs(v) > 1e-2), min_size=3, max_size=12, unique_by=abs),
        st.floats(0.2, 0.8),
    )
    def test_weights_below_the_threshold_shrink_and_those_above_grow(self, values, sparsity):
        model = line(values)
        PruningPenalty(model, sparsity)().backward()
        weight, slope = model[0].weight.detach().flatten(), model[0].weight.grad.flatten()
        rank = round(sparsity * len(values))
        threshold = weight.abs().sort().values[rank - 1] if rank else torch.tensor(0.0)
        outward = -slope * weight.sign()  # change of the magnitude in gradient descent
        below, above = weight.abs() < threshold, (weight.abs() > threshold) & (weight.abs() < 2 * threshold)
        assert (outward[below] < 0).all()
        assert (outward[above] > 0).all()
        assert (slope[weight.abs() > 2 * threshold] == 0).all()

    def test_minimising_the_penalty_leaves_no_weight_at_the_threshold(self):
        torch.manual_seed(0)
        model = seeded(lambda: nn.Sequential(nn.Linear(40, 30)))
        to_hyperspherical(model, keep=False)
        penalty, optimizer = PruningPenalty(model, 0.7), torch.optim.SGD(model.parameters(), lr=30.0)
        gaps = []
        for _ in range(200):
            magnitude = model[0].weight.detach().abs().flatten().sort().values
            gaps.append(float(magnitude[round(0.75 * len(magnitude))] / magnitude[round(0.65 * len(magnitude))]))
            optimizer.zero_grad()
            penalty().backward()
            optimizer.step()
        assert gaps[0] < 1.3
        assert gaps[-1] > 100

    def test_gain_and_offset_of_a_hyperspherical_layer_have_no_penalty(self):
        model = seeded(chain)
        to_hyperspherical(model, include="3")
        before = cost(PruningPenalty(model, 0.5, include="3")())
        with torch.no_grad():
            model[3].parametrizations.weight[0].gain.mul_(7)
            model[3].parametrizations.weight[0].offset.add_(1)
        assert cost(PruningPenalty(model, 0.5, include="3")()) == before

    def test_the_penalty_grows_during_the_warmup(self):
        penalty = PruningPenalty(seeded(chain), 0.5, warmup=0.4)
        assert cost(penalty(0.0)) == 0
        assert cost(penalty(0.2)) == pytest.approx(0.5 * cost(penalty(1.0)))
        assert cost(penalty(0.4)) == cost(penalty(1.0))

    def test_one_threshold_per_layer_or_for_all(self):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        before = {across: cost(PruningPenalty(model, 0.5, across=across)()) for across in (False, True)}
        with torch.no_grad():
            model[1].weight.mul_(100)
        assert cost(PruningPenalty(model, 0.5)()) == pytest.approx(before[False], rel=1e-5)
        assert cost(PruningPenalty(model, 0.5, across=True)()) != pytest.approx(before[True], rel=0.1)

    def test_zero_weights_and_zero_sparsity_have_no_penalty(self):
        assert cost(PruningPenalty(line([0.0, 0.0, 0.0]), 0.5)()) == 0
        assert cost(PruningPenalty(line([1.0, 2.0, 3.0]), 0.0)()) == 0
        model = pruned_copy(seeded(chain), 0.9)
        assert cost(PruningPenalty(model, 0.5)()) == 0

    @pytest.mark.parametrize(
        ("options", "error"),
        [
            ({"sparsity": 1.0}, ValueError),
            ({"sparsity": 1}, TypeError),
            ({"sparsity": 0.5, "strength": -1}, ValueError),
            ({"sparsity": 0.5, "warmup": 2}, ValueError),
            ({"sparsity": 0.5, "include": "nothing"}, ValueError),
        ],
    )
    def test_impossible_options_are_refused(self, options, error):
        with pytest.raises(error):
            PruningPenalty(seeded(chain), **options)
