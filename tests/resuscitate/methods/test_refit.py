"""A repair by the refit: what it makes of the layers, in both walks, and what it says."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import asr_kernels as ak
import resuscitate
from asr_kernels import Window, patch_moments, row_moments
from resuscitate.errors import NonFiniteError
from resuscitate.statistics import patches
from resuscitate.statistics.fitting import fit
from resuscitate.statistics.patches import (
    contributions,
    input_blocks,
    merge_input_blocks,
    most_samples,
    split_input_blocks,
)
from tests.networks import Dense, Excited, Residual, Shared, Untraceable, Zoo, chain, images, pruned_copy, seeded


def at(network, name, x):
    """What a layer reads, and its output."""
    seen = []
    with network.get_submodule(name).register_forward_hook(lambda module, args, out: seen.append((*args, out))):
        network(x)
    return seen[0]


class TestRepair:
    @pytest.mark.parametrize("count", [1, 64, 1000])
    @pytest.mark.parametrize("ridge", [None, 0.0, 1e-2])
    def test_equal_windows_leave_the_weights_and_set_the_bias(self, count, ridge):
        dense = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 5), nn.ReLU(), nn.Flatten(), nn.Linear(8, 10)))
        model, given = pruned_copy(dense), images(1, size=5)
        before = model[0].weight.clone()
        equal = given.expand(count, -1, -1, -1).clone()
        resuscitate.repair(model, dense, equal, ridge=ridge, skip_last=False, keep_worse=True)
        assert torch.equal(model[0].weight, before)
        torch.testing.assert_close(model(given), dense(given), rtol=1e-3, atol=1e-4)

    def test_windows_that_differ_a_little_are_fitted(self):
        dense = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 5), nn.ReLU(), nn.Flatten(), nn.Linear(8, 10)))
        model, given = pruned_copy(dense), images(1, size=5) + 0.03 * images(100, size=5)
        row = resuscitate.repair(model, dense, given, ridge=1e-2, keep_worse=True).layers[0]
        assert row.error_after < 0.9 * row.error_before

    @pytest.mark.parametrize("build", [chain, Residual, Dense, Excited], ids=lambda build: build.__name__)
    def test_what_was_not_pruned_comes_back_as_it_is(self, build):
        dense = seeded(build)
        model = copy.deepcopy(dense)
        resuscitate.repair(model, dense, images(60), method="refit", skip_last=False)
        torch.testing.assert_close(model.state_dict(), dense.state_dict(), rtol=2e-3, atol=2e-4)

    @pytest.mark.parametrize("build", [chain, Residual, Dense, Excited, Zoo, Shared], ids=lambda build: build.__name__)
    def test_zeros_stay_zero_and_the_outputs_come_nearer_than_by_any_gain(self, build):
        dense, errors = seeded(build), {}
        x = images(60)

        def flat(out):
            return torch.cat([part.flatten(1) for part in torch.utils._pytree.tree_leaves(out)], 1)

        for method in ("channelwise", "refit"):
            model = pruned_copy(dense)
            masks = resuscitate.Masks.from_zeros(model)
            resuscitate.repair(model, dense, x, method=method, skip_first=False)
            assert resuscitate.Masks.from_zeros(model) == masks
            with torch.no_grad():
                errors[method] = float((flat(model(x)) - flat(dense(x))).square().mean())
        assert errors["refit"] < 0.8 * errors["channelwise"]

    @pytest.mark.parametrize("build", [chain, Residual, Dense, Excited, Zoo], ids=lambda build: build.__name__)
    def test_both_walks_and_any_batches_agree(self, build):
        # what a ReLU hides turns on the sign of single outputs, and so on rounding: see test_relu_targets
        dense, results, plain = seeded(build), [], {"method": "refit", "relu_aware": False}
        for size in (48, 1, 7):
            results.append(pruned_copy(dense))
            report = resuscitate.repair(results[-1], dense, images(48), **plain, batch_size=size)
            assert report.walk == "graph"
        results.append(pruned_copy(dense))
        batches = list(images(48).split(10))
        report = resuscitate.repair(results[-1], dense, batches, **plain, forward_fn=lambda m, x: m(x))
        assert report.walk == "suspended"
        for other in results[1:]:
            torch.testing.assert_close(other.state_dict(), results[0].state_dict(), rtol=1e-3, atol=2e-5)

    @pytest.mark.parametrize("build", [Shared, Untraceable], ids=lambda build: build.__name__)
    def test_networks_without_a_graph_are_refitted_too(self, build):
        dense = seeded(build)
        model = pruned_copy(dense)
        report = resuscitate.repair(model, dense, images(40), method="refit")
        assert report.walk == "suspended"
        assert {row.status for row in report.layers} == {"refitted"}

    def test_a_layer_is_fitted_on_what_the_repaired_network_gives_it(self):
        dense, x = seeded(chain), images(40)
        model = pruned_copy(dense)
        weight = model[6].weight.detach().clone().flatten(1)
        resuscitate.repair(model, dense, x, method="refit", relu_aware=False)
        with torch.no_grad():
            reads, wanted = model[:6](x), dense[:7](x)
        window = Window((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
        found = fit(patch_moments(reads, wanted, window), weight, weight != 0)
        torch.testing.assert_close(model[6].weight.flatten(1).double(), found.weight, rtol=1e-3, atol=1e-5)
        shift = dense[7].running_mean - model[7].running_mean
        torch.testing.assert_close(shift.double(), found.bias, rtol=1e-3, atol=1e-5)

    def test_a_transposed_convolution_is_given_its_gain(self):
        dense = seeded(Zoo)
        report = resuscitate.repair(pruned_copy(dense), dense, images(40), method="refit")
        rows = {row.name: row for row in report.layers}
        assert rows["up"].status == "repaired"
        assert rows["up"].gain
        assert rows["depthwise"].status == rows["grouped"].status == rows["line"].status == "refitted"
        assert rows["unused"].status == "unchanged"
        assert rows["unused"].reason == "no forward pass of the first images reaches it"

    def test_a_torch_prune_mask_stays_that_mask(self):
        dense = seeded(chain)
        model = copy.deepcopy(dense)
        prune.l1_unstructured(model[3], "weight", amount=0.6)
        mask = model[3].weight_mask.clone()
        plain = copy.deepcopy(dense)
        with torch.no_grad():
            plain[3].weight.copy_(model[3].weight)
        for net in (model, plain):
            resuscitate.repair(net, dense, images(40), method="refit")
        assert torch.equal(model[3].weight_mask, mask)
        torch.testing.assert_close(model[3].weight, plain[3].weight)

    def test_the_report_says_what_was_explained(self):
        dense = seeded(chain)
        report = resuscitate.repair(pruned_copy(dense), dense, images(60), method="refit")
        for row in report.layers:
            assert row.status == "refitted"
            assert 0 < row.explained <= 1 + 1e-6
            assert row.variance_after == pytest.approx(1, abs=0.2)

    def test_the_report_says_the_error_of_each_layer_before_and_after(self):
        dense, x = seeded(chain), images(60)
        model = pruned_copy(dense)
        old = copy.deepcopy(model)
        report = resuscitate.repair(model, dense, x, relu_aware=False, progress=False)
        for row in report.layers:  # on the inputs that the layer has in the repaired network
            (inputs, _), (_, wanted) = (at(network, row.name, x) for network in (model, dense))
            wanted = wanted.transpose(0, 1).flatten(1)
            errors = []
            for layer in (old.get_submodule(row.name), model.get_submodule(row.name)):
                missed = layer(inputs).transpose(0, 1).flatten(1) - wanted
                errors.append((missed.var(1).sum() / wanted.var(1).sum()).sqrt().item())
            assert [row.error_before, row.error_after] == pytest.approx(errors, rel=1e-3)
            assert row.error_after < row.error_before

    def test_relu_aware_errors_fall_too(self):
        dense = seeded(Residual)
        report = resuscitate.repair(pruned_copy(dense), dense, images(60), progress=False)
        assert sum(row.error_after for row in report.layers) < sum(row.error_before for row in report.layers)

    def test_undo_brings_everything_back(self):
        dense = seeded(chain)
        model = pruned_copy(dense)
        before = copy.deepcopy(model.state_dict())
        resuscitate.repair(model, dense, images(), method="refit").undo()
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def test_a_nan_is_refused_with_the_layer_and_the_batch(self):
        dense, x = seeded(chain), images()
        x[13] = torch.nan
        model = pruned_copy(dense)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(NonFiniteError, match="layer '0': batch 1"):
            resuscitate.repair(model, dense, x, method="refit", batch_size=10)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def test_it_needs_the_dense_model_itself_in_sequence(self):
        dense = seeded(chain)
        statistics = resuscitate.DenseStatistics.measure(dense, images())
        for target in (statistics, "running", None):
            with pytest.raises(ValueError, match="pass dense as a model"):
                resuscitate.repair(pruned_copy(dense), target, images(), method="refit")
        with pytest.raises(ValueError, match="method 'refit' runs with schedule='sequential' only"):
            resuscitate.repair(pruned_copy(dense), dense, images(), method="refit", schedule="parallel")
        with pytest.raises(TypeError, match="has no option 'bias'; it is for methods 'layerwise'"):
            resuscitate.repair(pruned_copy(dense), dense, images(), method="refit", bias=False)
        with pytest.raises(ValueError, match="ridge=-1 must be at least 0"):
            resuscitate.repair(pruned_copy(dense), dense, images(), method="refit", ridge=-1)


class TestWideLayers:
    """A layer with more values in a patch than a second-moment matrix should have is fitted block by block."""

    @pytest.mark.parametrize("build", [chain, Residual, Untraceable], ids=lambda build: build.__name__)
    def test_blocks_come_nearer_than_any_gain_and_keep_the_zeros(self, build, monkeypatch):
        monkeypatch.setattr(patches, "WIDEST", 36)
        dense, x, errors = seeded(build), images(60), {}
        for method in ("channelwise", "refit"):
            model = pruned_copy(dense)
            masks = resuscitate.Masks.from_zeros(model)
            report = resuscitate.repair(model, dense, x, method=method, skip_first=False)
            assert resuscitate.Masks.from_zeros(model) == masks
            with torch.no_grad():
                a, b = (torch.utils._pytree.tree_leaves(net(x))[0] for net in (model, dense))
            errors[method] = float((a - b).square().mean())
        assert any(row.reason.endswith("blocks of inputs") for row in report.layers)
        assert errors["refit"] < errors["channelwise"]

    @pytest.mark.parametrize("layer", [nn.Conv2d(6, 5, 3, padding=1), nn.Conv1d(6, 4, 3, bias=False)])
    def test_the_contributions_of_all_blocks_are_the_output(self, layer):
        shape = {nn.Conv2d: (7, 6, 5, 5), nn.Conv1d: (7, 6, 9)}[type(layer)]
        x = torch.randn(shape)
        parts = contributions("layer", layer, x, 3).unflatten(1, (3, -1)).sum(1)
        torch.testing.assert_close(parts.view(layer(x).shape), layer(x))
        weight = layer.weight.detach()
        assert torch.equal(merge_input_blocks(split_input_blocks(weight, 3).flatten(1), weight.shape, 3), weight)

    def test_a_layer_is_cut_only_where_it_must_be(self, monkeypatch):
        assert input_blocks(nn.Conv2d(512, 512, 3)) == 1
        assert input_blocks(nn.Linear(25088, 16)) == 1
        assert [most_samples(inputs) for inputs in (512, 4096, 25088)] == [0, 2048, 50176]
        assert input_blocks(nn.Conv2d(64, 64, 3, groups=64)) == 1
        monkeypatch.setattr(patches, "WIDEST", 4)
        assert input_blocks(nn.Conv2d(6, 8, 3)) == 6  # a channel alone has nine

    @pytest.mark.parametrize("ridge", [0.01, None])
    def test_a_linear_layer_of_many_inputs_has_the_weights_that_its_matrix_gives(self, ridge, monkeypatch):
        dense, x, found = seeded(lambda: chain(width=130)), images(60), []
        kept = []
        monkeypatch.setattr(ak, "row_moments", lambda *parts: kept.append(1) or row_moments(*parts))
        for fewest in (1024, 8):
            assert not kept
            monkeypatch.setattr(patches, "FEWEST", fewest)
            model = pruned_copy(dense)
            method = resuscitate.Refit(ridge=ridge)
            report = resuscitate.repair(model, dense, x, method=method, include=nn.Linear, batch_size=17)
            found.append(next(module for module in model.modules() if isinstance(module, nn.Linear)))
            assert not any("blocks" in row.reason for row in report.layers)
        assert kept
        torch.testing.assert_close(found[1].weight, found[0].weight, rtol=1e-2, atol=1e-3)
        assert torch.equal(found[1].weight != 0, found[0].weight != 0)


class TestShrinking:
    def test_a_projection_network_is_repaired_and_shrunk(self):
        dense, x, errors = seeded(Residual), images(60), {}
        for method in ("bn", "refit"):
            model = copy.deepcopy(dense)
            masks = resuscitate.sparsify(model, 0.4, pattern="channels", example=x[:2])
            resuscitate.repair(model, dense, x, method=method)
            with torch.no_grad():
                errors[method] = float((model(x) - dense(x)).square().mean())
            before = model(x).detach()
            resuscitate.shrink(model, masks, x[:2])
            torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-5)
        assert errors["refit"] < errors["bn"]
