"""Importance: SSIM of feature maps, error reduction by a single weight, gradients of labelled images."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.nn.utils import prune

from asr_kernels import Window, patch_moments
from resuscitate.errors import NonFiniteError
from resuscitate.pruning.importance import ImportanceEstimator
from resuscitate.runtime.distributed import Ranks
from resuscitate.runtime.options import run_options
from resuscitate.statistics.fitting import single_weight_error_reduction
from resuscitate.statistics.ssim import ssim
from tests.networks import chain, images, seeded

LABELLED = [(images(20, seed=s), torch.arange(20) % 10) for s in (3, 4)]


class TestWeightImportance:
    @settings(deadline=None, max_examples=30)
    @given(st.integers(0, 10**6))
    def test_the_importance_of_a_weight_is_the_error_reduction_by_the_best_value_of_that_weight_alone(self, seed):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(50, 5, dtype=torch.float64, generator=generator)
        y = torch.randn(50, 3, dtype=torch.float64, generator=generator)
        weight = torch.randn(3, 5, dtype=torch.float64, generator=generator)
        found, damage = single_weight_error_reduction(patch_moments(x, y, Window()), weight, ridge=0.0)
        x, y = x - x.mean(0), y - y.mean(0)
        error = (y - x @ weight.mT).square().sum(0)
        for out in range(3):
            for into in range(5):
                left = (y - x @ weight.mT)[:, out]
                best = left - x[:, into] * (left @ x[:, into]) / x[:, into].square().sum()
                expected = (error[out] - best.square().sum()) / y.square().sum()
                assert float(found[out, into]) == pytest.approx(float(expected), rel=1e-6, abs=1e-12)
        corr = torch.stack([torch.corrcoef(torch.stack([y[:, o], (x @ weight.mT)[:, o]]))[0, 1] for o in range(3)])
        assert damage == pytest.approx(float((y.var(0) * (1 - corr**2)).sum() / y.var(0).sum()), rel=1e-6)

    def test_gradient_is_the_squared_slope_times_the_squared_weight_over_the_batches(self):
        dense = seeded(chain)
        estimator = ImportanceEstimator(dense, [], run_options("test", {}), Ranks())
        found = estimator.sensitivity(["0", "11"], LABELLED, None)
        copied, expected = copy.deepcopy(dense), 0
        for x, y in LABELLED:
            copied.zero_grad()
            F.cross_entropy(copied(x), y).backward()
            expected = expected + copied[0].weight.grad.double().square() * copied[0].weight.detach().double().square()
        torch.testing.assert_close(found["0"], expected, rtol=1e-4, atol=0)
        assert dense[0].weight.grad is None


class TestSsim:
    def test_of_a_map_and_itself_it_is_one_and_the_less_the_more_noise(self):
        x, noise = torch.randn(3, 4, 12, 10), torch.randn(3, 4, 12, 10)
        found = [float(ssim(x, x + size * noise, -3).mean()) for size in (0, 0.1, 1, 10)]
        assert found[0] == pytest.approx(1, abs=1e-5)
        assert found == sorted(found, reverse=True)
        assert found[-1] < 0.3

    def test_by_the_formula_on_one_window(self):
        generator = torch.Generator().manual_seed(0)
        x, y = torch.rand(1, 1, 7, 7, generator=generator), torch.rand(1, 1, 7, 7, generator=generator)
        spread = x.max() - x.min()
        c1, c2 = (0.01 * spread) ** 2, (0.03 * spread) ** 2
        cov = ((x - x.mean()) * (y - y.mean())).mean()
        top = (2 * x.mean() * y.mean() + c1) * (2 * cov + c2)
        bottom = (x.mean() ** 2 + y.mean() ** 2 + c1) * (x.var(correction=0) + y.var(correction=0) + c2)
        torch.testing.assert_close(ssim(x, y, -3).squeeze(), top / bottom, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4), (5, 3, 9, 2), (2, 3, 4, 8, 8)])
    def test_any_number_of_axes(self, shape):
        x = torch.randn(shape)
        assert ssim(x, x, 1 if len(shape) > 2 else -1).mean() == pytest.approx(1, abs=1e-5)


class TestImagesAndMapsThatSsimCannotCompare:
    def test_images_that_are_not_finite_are_refused(self):
        x = images(8)
        x[3] = torch.nan
        dense = seeded(chain)
        estimator = ImportanceEstimator(dense, x.split(4), run_options("regrow()", {}), Ranks())
        with pytest.raises(NonFiniteError, match="layer '3': batch 0"):
            estimator.dissimilarity(copy.deepcopy(dense), ["3"])

    def test_constant_maps_are_alike_only_if_they_are_equal(self):
        x = torch.full((2, 3, 9, 9), 0.1)
        assert (ssim(x, x.clone(), 1) == 1).all()
        assert (ssim(x, x + 1, 1) == 0).all()

    def test_means_far_above_the_spread_hide_nothing(self):
        x, noise = torch.randn(2, 4, 3, 9, 9, generator=torch.Generator().manual_seed(0))
        wanted = ssim(x + 1e3, x + noise + 1e3, 1)
        expected = ssim(x.double() + 1e3, (x + noise).double() + 1e3, 1)
        assert wanted.mean() == pytest.approx(float(expected.mean()), abs=0.01)
        assert float(wanted.mean()) < 0.9


class Unreached(torch.nn.Module):
    """A network with a layer that no forward pass reaches."""

    def __init__(self):
        super().__init__()
        self.conv, self.unused, self.head = torch.nn.Conv2d(3, 6, 3), torch.nn.Linear(4, 4), torch.nn.Linear(6, 10)

    def forward(self, x):
        return self.head(self.conv(x).relu().mean((2, 3)))


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "torch.nn.utils.prune"])
def test_the_gradient_of_a_layer_that_no_forward_pass_reaches_is_0(masked):
    dense = seeded(Unreached)
    if masked:
        prune.identity(dense.conv, "weight")
    estimator = ImportanceEstimator(dense, [], run_options("regrow()", {}), Ranks())
    found = estimator.sensitivity(["conv", "unused"], LABELLED, None)
    assert (found["conv"] > 0).any()
    assert not found["unused"].any()
