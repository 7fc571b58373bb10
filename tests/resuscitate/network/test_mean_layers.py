"""Mean replacement: the compact and the dense mean term are equal up to rounding, and the model stays sparse."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

import resuscitate
from asr_kernels import Window, patch_moments
from resuscitate import Masks, densify, repair, replace_by_means, sparsify
from resuscitate.deploy.checkpoints import load_weights, write_state_dict
from resuscitate.errors import CheckpointError, LayerError, ModelMismatchError
from resuscitate.network.mean_layers import MeanConv2d
from resuscitate.statistics.fitting import fit, fit_with_means
from tests.compare import same
from tests.networks import Residual, Zoo, chain, images, pruned_copy, seeded

PER = ["layer", "filter", "kernel"]
LAYERS = {
    "plain": (nn.Conv2d(4, 6, 3, padding=1), (5, 4, 9, 7)),
    "strided": (nn.Conv2d(4, 6, (3, 2), stride=2, padding=(2, 0), dilation=(1, 2)), (5, 4, 9, 8)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, bias=False), (5, 4, 9, 7)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, padding="same"), (5, 4, 9, 7)),
    "circular": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (5, 4, 9, 7)),
    "pointwise": (nn.Conv2d(4, 6, 1), (5, 4, 9, 7)),
    "unbatched": (nn.Conv2d(4, 6, 3), (4, 9, 7)),
    "1d": (nn.Conv1d(4, 6, 5, padding=2), (5, 4, 11)),
    "3d": (nn.Conv3d(2, 3, 3, padding=1), (3, 2, 4, 5, 4)),
    "linear": (nn.Linear(7, 5), (6, 7)),
    "sequence": (nn.Linear(7, 5), (6, 3, 7)),
}


def naive_replacement(dense, model, per):
    """The weight with its zeros replaced by the mean of the dense values there, in float64."""
    weight, dense_weight = model.weight.detach().double(), dense.weight.detach().double()
    result = weight.clone()
    pruned = weight == 0
    if per == "layer":
        result[pruned] = dense_weight[pruned].mean()
    elif per == "filter" or weight.dim() == 2 or weight.shape[2:].numel() == 1:
        for row, mask, dense_row in zip(result, pruned, dense_weight, strict=True):
            row[mask] = dense_row[mask].mean()
    else:
        for o in range(weight.shape[0]):
            for i in range(weight.shape[1]):
                mask = pruned[o, i]
                if mask.any():
                    result[o, i][mask] = dense_weight[o, i][mask].mean()
    return result


class TestTerm:
    @pytest.mark.parametrize("kind", LAYERS)
    @pytest.mark.parametrize("per", PER)
    def test_the_compact_and_the_dense_mean_term_are_equal_to_rounding(self, kind, per):
        torch.manual_seed(0)
        layer, shape = LAYERS[kind]
        dense, x = nn.Sequential(copy.deepcopy(layer)).double(), torch.randn(shape, dtype=torch.float64)
        model = copy.deepcopy(dense)
        masks = sparsify(model, 0.6)
        expected = naive_replacement(dense[0], model[0], per)
        counts = replace_by_means(model, dense, per=per)
        masks.check(model)  # the stored weight is still sparse
        assert counts["0"] == model[0].means.numel()
        compact = model(x)
        assert densify(model) == ["0"]
        assert type(model[0]) is type(layer)
        torch.testing.assert_close(model[0].weight.detach(), expected)
        torch.testing.assert_close(model(x), compact)
        assert list(model.state_dict()) == list(dense.state_dict())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_the_mean_terms_are_equal_in_lower_precision(self, dtype):
        dense = seeded(chain).to(dtype)
        model = pruned_copy(dense)
        replace_by_means(model, dense)
        assert model[0].means.dtype == dtype
        x, plain = images().to(dtype), copy.deepcopy(model)
        densify(plain)
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
        with torch.no_grad():
            torch.testing.assert_close(model(x), plain(x), rtol=tolerance, atol=tolerance)

    def test_densify_with_keep_zeros_restores_the_pruned_model(self):
        dense = seeded(chain)
        model = pruned_copy(dense)
        before = copy.deepcopy(model)
        replace_by_means(model, dense, per="kernel")
        densify(model, keep_zeros=True)
        torch.testing.assert_close(model.state_dict(), before.state_dict())
        assert Masks.from_zeros(model) == Masks.from_zeros(before)

    def test_batchnorm_does_not_cancel_the_mean_term(self):
        dense = seeded(chain)
        results = []
        for replaced in (False, True):
            model = pruned_copy(dense, 0.8)
            if replaced:
                replace_by_means(model, dense, per="kernel")
            resuscitate.recalibrate_batchnorm(model, images(60))
            with torch.no_grad():
                results.append(model(images(seed=4)))
        assert (results[0] - results[1]).abs().max() > 0.01

    def test_layers_that_share_a_weight_share_its_means(self):
        dense = seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))
        dense[2].weight = dense[0].weight
        model, x = pruned_copy(dense), torch.randn(5, 8)
        expected = naive_replacement(dense[0], model[0], "filter")
        replace_by_means(model, dense)
        assert model[0].means is model[2].means
        densify(model)
        assert model[0].weight is model[2].weight
        torch.testing.assert_close(model[2].weight.detach().double(), expected, rtol=1e-6, atol=1e-6)
        assert model(x).shape == (5, 8)

    def test_a_torch_prune_mask_is_kept(self):
        dense = seeded(chain)
        model = copy.deepcopy(dense)
        prune.l1_unstructured(model[3], "weight", amount=0.6)
        pruned, x = copy.deepcopy(dense), images()
        pruned[3].weight.data.copy_(model[3].weight.detach())
        expected = naive_replacement(dense[3], pruned[3], "filter").float()
        replace_by_means(model, dense, include="3")
        assert int(model[3].weight_mask.sum()) == int((pruned[3].weight != 0).sum())
        assert (model[3].weight[model[3].weight_mask == 0] == 0).all()
        pruned[3].weight.data.copy_(expected)
        with torch.no_grad():
            torch.testing.assert_close(model(x), pruned(x), rtol=1e-4, atol=1e-5)

    def test_mean_layers_can_be_copied_pickled_and_trained(self):
        dense = seeded(chain)
        model = pruned_copy(dense)
        replace_by_means(model, dense)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        twin = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
        assert isinstance(twin[0], MeanConv2d)
        assert same(copy.deepcopy(model), twin)
        twin(images()).sum().backward()
        assert twin[0].means.grad.abs().sum() > 0

    def test_a_checkpoint_loads_mean_layers(self, tmp_path):
        dense = seeded(chain)
        model = pruned_copy(dense)
        replace_by_means(model, dense, per="kernel")
        write_state_dict(tmp_path / "means.safetensors", model.state_dict(), {})
        fresh = chain().eval()
        load_weights(fresh, tmp_path / "means.safetensors")
        assert same(model, fresh)
        with torch.no_grad():
            torch.testing.assert_close(fresh(images()), model(images()), rtol=0, atol=0)
        state = model.state_dict()
        state["0.means"] = torch.zeros(5, 5)
        write_state_dict(tmp_path / "wrong.safetensors", state, {})
        plain = chain()
        with pytest.raises(CheckpointError, match=r"0\.means"):
            load_weights(plain, tmp_path / "wrong.safetensors")
        assert type(plain[3]) is nn.Conv2d


class TestRepair:
    @pytest.mark.parametrize("recalibrate", [None, "exact"])
    def test_method_mean_replaces_and_optionally_re_estimates_batchnorm(self, recalibrate):
        dense = seeded(Residual)
        model = pruned_copy(dense)
        expected, before = copy.deepcopy(model), copy.deepcopy(model)
        replace_by_means(expected, dense)
        if recalibrate:
            resuscitate.recalibrate_batchnorm(expected, images(40))
        report = repair(model, dense, images(40), method="mean", recalibrate=recalibrate)
        torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=1e-5, atol=1e-6)
        assert report.walk == ("graph" if recalibrate else "none")
        assert (report.layers[0].status, report.layers[0].reason) == ("replaced", "8 means of pruned weights")
        report.undo()
        assert same(model, before)
        assert type(model.stem) is nn.Conv2d

    def test_after_an_error_the_layers_are_plain(self):
        dense = seeded(chain)
        model = pruned_copy(dense)
        before = copy.deepcopy(model)
        bad = images(20)
        bad[7] = float("nan")
        with pytest.raises(LayerError, match="NaN"):
            repair(model, dense, bad, method="mean", recalibrate="exact")
        assert same(model, before)
        assert type(model[0]) is nn.Conv2d

    @pytest.mark.parametrize("means", ["filter", "kernel"])
    @pytest.mark.parametrize("build", [chain, Residual, Zoo], ids=lambda build: build.__name__)
    def test_a_refit_with_means_explains_more_variance_than_one_without(self, means, build):
        dense, errors, x = seeded(build), [], images(200, size=12)
        for chosen in (None, means):
            model = pruned_copy(dense, 0.9)
            masks = Masks.from_zeros(model)
            report = repair(model, dense, x, means=chosen, relu_aware=False)
            masks.check(model)
            errors.append([row.explained for row in report.layers if row.explained is not None])
        assert errors[1][0] > errors[0][0]  # on the same inputs
        assert any("means" in row.reason for row in report.layers)

    @pytest.mark.parametrize("relu_aware", [False, True])
    def test_walks_and_journals_do_not_change_the_result(self, tmp_path, relu_aware):
        dense, results = seeded(Residual), []
        for extra in ({}, {"resume": tmp_path / "j"}, {"resume": tmp_path / "j"}, {"forward_fn": lambda m, x: m(x)}):
            model = pruned_copy(dense)
            x = images(40).split(16)
            report = repair(model, dense, x, means="kernel", relu_aware=relu_aware, **extra)
            results.append(model)
        assert same(results[0], results[1])
        assert same(results[1], results[2])
        assert report.walk == "suspended"
        torch.testing.assert_close(results[0].state_dict(), results[3].state_dict(), rtol=1e-2, atol=1e-3)

    @settings(deadline=None, max_examples=20)
    @given(st.integers(0, 10**6))
    def test_the_fit_is_least_squares_with_the_window_sums_as_inputs(self, seed):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(300, 2, 3, 3, dtype=torch.float64, generator=generator)
        y = torch.randn(300, 3, 1, 1, dtype=torch.float64, generator=generator)
        window = Window((3, 3), (1, 1), ((0, 0), (0, 0)), (1, 1))
        weight = torch.randn(3, 18, dtype=torch.float64, generator=generator)
        support = torch.rand(3, 18, generator=generator) > 0.7
        moments = patch_moments(x, y, window)
        options = {"ridge": 0.0, "most": 1.0}
        found, means = fit_with_means(moments, weight, support, torch.Size((3, 2, 3, 3)), "kernel", **options)
        assert means.shape == (3, 2, 1, 1)
        for channel in range(3):
            inputs = torch.cat([x.flatten(1)[:, support[channel]], x.sum((2, 3))], 1)
            solved = torch.linalg.lstsq(inputs - inputs.mean(0), y[:, channel, 0] - y[:, channel, 0].mean(0)).solution
            expected = torch.cat([found.weight[channel, support[channel]], means[channel].flatten()])
            # `fit` scales the solution by at most `most` = 1
            scale = float(expected @ expected / (expected @ solved.flatten()))
            torch.testing.assert_close(expected, solved.flatten() * scale, rtol=1e-6, atol=1e-8)
        assert fit(moments, weight, support, **options).explained <= found.explained


class TestRefused:
    def test_layers_that_already_have_means_are_refused(self):
        dense = seeded(chain)
        model = pruned_copy(dense)
        replace_by_means(model, dense)
        before = copy.deepcopy(model)
        for act in (
            lambda: replace_by_means(model, dense),
            lambda: repair(model, dense, images()),
            lambda: sparsify(model, 0.9),
            lambda: resuscitate.to_hyperspherical(model),
        ):
            with pytest.raises(LayerError, match=r"has means.*keep_zeros=True"):
                act()
        assert same(model, before)

    def test_impossible_options_are_refused(self):
        dense = seeded(chain)
        model = pruned_copy(dense)
        before = copy.deepcopy(model)
        for options, error, message in (
            ({"method": "mean", "means": "row"}, ValueError, "means='row' is unknown"),
            ({"method": "asr", "means": "filter"}, TypeError, "for methods 'mean' and 'refit'"),
            ({"means": "filter", "schedule": "parallel"}, TypeError, "for methods 'mean' and 'refit'"),
            ({"means": "layer"}, ValueError, "'filter', 'kernel'"),
            ({"method": "mean", "schedule": "parallel"}, ValueError, "schedule='sequential' only"),
        ):
            with pytest.raises(error, match=message):
                repair(model, dense, images(), **options)
        with pytest.raises(ValueError, match="per='row'"):
            replace_by_means(model, dense, per="row")
        with pytest.raises(ModelMismatchError):
            replace_by_means(model, model)
        with pytest.raises(ModelMismatchError):
            replace_by_means(model, seeded(Residual))
        assert same(model, before)

    def test_batchnorm_is_not_folded_into_a_layer_with_means(self):
        dense = seeded(chain)
        model = pruned_copy(dense)
        replace_by_means(model, dense)
        folded = resuscitate.fold_batchnorm(model, images(2))
        assert isinstance(folded[1], nn.BatchNorm2d)
        densify(model)
        assert isinstance(resuscitate.fold_batchnorm(model, images(2))[1], nn.Identity)
