"""`sparsify` by patterns: n of m weights, groups that do not divide, whole filters."""

import copy
import logging

import pytest
import torch
from torch import nn

from resuscitate import Masks, sparsify
from resuscitate.errors import LayerError
from tests.networks import Zoo, chain, seeded


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
