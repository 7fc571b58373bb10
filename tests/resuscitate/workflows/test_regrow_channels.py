"""`regrow` of whole channels, in masked networks and in networks after `shrink`."""

import copy

import pytest
import torch

from resuscitate import regrow, sparsify
from resuscitate.errors import MaskError
from tests.compare import same
from tests.networks import chain, images, seeded

LABELLED = [(images(20, seed=s), torch.arange(20) % 10) for s in (3, 4)]


class TestChannels:
    def pruned(self, remove):
        dense = seeded(chain)
        model = copy.deepcopy(dense)
        options = {"pattern": "channels", "example": images(2), "remove": remove}
        return dense, model, sparsify(model, 0.6, **options)

    @pytest.mark.parametrize("budget", ["greedy", "damage", "proportional"])
    @pytest.mark.parametrize("remove", [False, True])
    def test_channels_come_back_with_their_batchnorm_and_their_readers(self, budget, remove):
        dense, model, masks = self.pruned(remove)
        small = copy.deepcopy(model)
        grown = regrow(model, dense, masks, 0.3, images(60), pattern="channels", budget=budget)
        units = sum(dense[index].out_channels for index in (0, 3, 6))
        assert grown.rounds[-1].sparsity == pytest.approx(round(0.3 * units) / units)
        assert sum(grown.regrown.values()) == round(0.6 * units) - round(0.3 * units)
        for layer, batchnorm, reader in ((0, 1, 3), (3, 4, 6), (6, 7, 11)):
            kept = grown[str(layer)].flatten(1).any(1)
            if remove:
                assert model[layer].out_channels == model[batchnorm].num_features == int(kept.sum())
                assert model[layer].weight.shape[0] == model[batchnorm].running_var.shape[0] == int(kept.sum())
                assert model[reader].weight.shape[1] == int(kept.sum())
        x = images(seed=5)
        with torch.no_grad():
            assert (model(x) - dense(x)).square().mean() < (small(x) - dense(x)).square().mean()

    def test_in_a_smaller_network_and_in_a_masked_one_it_is_the_same(self):
        results = []
        for remove in (False, True):
            dense, model, masks = self.pruned(remove)
            grown = regrow(model, dense, masks, 0.3, images(60), pattern="channels")
            with torch.no_grad():
                results.append((model(images(seed=5)), grown))
        torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-3, atol=1e-4)
        assert results[0][1].masks == results[1][1].masks

    def test_the_random_state_stays_as_found(self):
        dense, model, masks = self.pruned(True)
        torch.manual_seed(5)
        expected = torch.rand(1)
        torch.manual_seed(5)
        regrow(model, dense, masks, 0.3, images(), pattern="channels")
        assert torch.equal(torch.rand(1), expected)

    def test_undo_makes_it_as_small_as_it_was(self):
        dense, model, masks = self.pruned(True)
        before, sizes = copy.deepcopy(model), [model[0].out_channels, model[1].num_features, model[3].in_channels]
        grown = regrow(model, dense, masks, 0.3, images(60), pattern="channels")
        grown.undo()
        assert same(model, before)
        assert [model[0].out_channels, model[1].num_features, model[3].in_channels] == sizes
        with torch.no_grad():
            torch.testing.assert_close(model(images()), before(images()), rtol=0, atol=0)

    def test_a_labelled_saliency_and_all_channels_give_the_dense_network_back(self):
        dense, model, masks = self.pruned(True)
        options = {"pattern": "channels", "saliency": "gradient", "labelled": LABELLED}
        regrow(model, dense, masks, 0.0, images(60), **options)
        assert [p.shape for p in model.parameters()][:3] == [p.shape for p in dense.parameters()][:3]
        with torch.no_grad():
            torch.testing.assert_close(model(images()), dense(images()), rtol=1e-3, atol=1e-3)

    def test_masks_that_the_channels_did_not_go_by_are_refused(self):
        dense, model, masks = self.pruned(True)
        before = copy.deepcopy(model)
        other = copy.deepcopy(dense)
        wrong = sparsify(other, 0.4, pattern="channels", example=images(2))
        with pytest.raises(MaskError, match="not what these masks leave"):
            regrow(model, dense, wrong, 0.3, images(), pattern="channels")
        assert same(model, before)
        with pytest.raises(MaskError, match="was it made for another model"):
            regrow(model, dense, masks, 0.3, images())
