"""The fit of a layer: the least-squares solution on every support."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from asr_kernels import Window, patch_moments
from resuscitate.statistics.fitting import fit, fit_with_means

PADDED = Window((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))


def problem(groups=1, count=30, noise=1.0, seed=0):
    """Inputs, outputs of a random convolution of them with noise, and its weight (O, K), all float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, 6, 6, dtype=torch.float64, generator=generator) + 1
    weight = torch.randn(8, 4 // groups, 3, 3, dtype=torch.float64, generator=generator)
    y = F.conv2d(x, weight, padding=1, groups=groups) + 3
    y = y + noise * torch.randn(y.shape, dtype=torch.float64, generator=generator)
    window = Window((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), groups)
    columns = F.unfold(x, 3, padding=1).view(count, groups, -1, 36).permute(1, 2, 0, 3).flatten(2)
    return patch_moments(x, y, window), weight.flatten(1), columns, y.transpose(0, 1).flatten(1)


class TestSolution:
    @pytest.mark.parametrize("groups", [1, 2, 4])
    @given(density=st.floats(0, 1), seed=st.integers(0, 5), alike=st.booleans())
    @settings(deadline=None, max_examples=15)
    def test_it_is_that_of_lstsq_on_each_support(self, groups, density, seed, alike):
        moments, weight, columns, y = problem(groups, seed=seed)
        support = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < density
        support[1] = False
        if alike:
            support[:] = support[0]
        found = fit(moments, weight * support, support, ridge=1e-13, most=torch.inf)
        assert (found.weight[~support] == 0).all()
        for o in range(8):
            u, places = columns[o // (8 // groups)], support[o].nonzero().flatten()
            wanted = y[o]
            if not len(places):
                assert found.bias[o] == pytest.approx(float(wanted.mean()))
                continue
            design = torch.cat([u[places], torch.ones(1, u.shape[1], dtype=torch.float64)]).mT
            solution = torch.linalg.lstsq(design, wanted[:, None]).solution[:, 0]
            gain = wanted.std(correction=0) / (design @ solution).std(correction=0)
            assert found.weight[o, places] == pytest.approx(gain * solution[:-1], rel=1e-6, abs=1e-8)
            assert found.bias[o] == pytest.approx(
                float((wanted - gain * (design[:, :-1] @ solution[:-1])).mean()), abs=1e-7
            )

    def test_the_ridge_pulls_towards_the_present_weights(self):
        moments, weight, _, _ = problem()
        support, present = torch.ones_like(weight, dtype=torch.bool), torch.zeros_like(weight)
        present[:, ::3] = 0.1
        distances = [
            float((fit(moments, present, support, ridge=ridge, most=torch.inf).weight - present).norm())
            for ridge in (1e-6, 1.0, 1e8)
        ]
        assert distances == sorted(distances, reverse=True)
        weak = fit(moments, present, support, ridge=1e8, most=1.0)
        assert weak.weight == pytest.approx(present, abs=1e-5)

    def test_the_variance_that_a_regression_loses_is_given_back_up_to_a_limit(self):
        moments, weight, _, _ = problem(noise=20.0)
        support = torch.ones_like(weight, dtype=torch.bool)
        support[:, ::2] = False
        whole = fit(moments, weight * support, support, most=torch.inf)
        assert whole.after == pytest.approx(1)
        assert whole.explained < 0.5
        assert fit(moments, weight * support, support, most=1.1).after < 1

    def test_a_bias_that_is_small_beside_the_mean_is_still_a_bias(self):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(400, 4, dtype=torch.float64, generator=generator) + 500
        weight = torch.rand(3, 4, dtype=torch.float64, generator=generator) + 0.5
        y = x @ weight.mT + 0.05
        found = fit(patch_moments(x, y, Window()), weight, weight != 0, ridge=1e-9)
        assert found.bias == pytest.approx(torch.full((3,), 0.05, dtype=torch.float64), rel=1e-2)

    def test_constant_inputs_keep_the_weights_and_set_the_bias(self):
        x, y = torch.full((3, 4, 5, 5), 2.0), torch.randn(3, 8, 3, 3)
        weight = torch.randn(8, 36)
        moments = patch_moments(x, y, Window((3, 3), (1, 1), ((0, 0), (0, 0)), (1, 1)))
        found = fit(moments, weight, weight != 0)
        assert torch.equal(found.weight, weight.double())
        assert found.bias == pytest.approx(y.double().mean((0, 2, 3)) - 2 * weight.double().sum(1), rel=1e-5)

    @pytest.mark.parametrize("ridge", [0.0, 1e-2])
    def test_a_dead_input_and_one_that_stands_twice_leave_it_finite_and_right(self, ridge):
        x = torch.randn(30, 4, 6, 6, dtype=torch.float64)
        x[:, 1], x[:, 3] = 0, x[:, 2]
        weight = torch.randn(8, 4, 3, 3, dtype=torch.float64)
        y = F.conv2d(x, weight, padding=1)
        support = torch.ones(8, 36, dtype=torch.bool)
        support[0, :3] = False
        found = fit(patch_moments(x, y, PADDED), weight.flatten(1) * support, support, ridge=ridge)
        assert found.weight.isfinite().all()
        again = F.conv2d(x, found.weight.view_as(weight), found.bias, padding=1)
        assert (again[:, 1:] - y[:, 1:]).abs().max() < 1e-3

    def test_fewer_samples_than_weights_reproduce_the_samples(self):
        x, weight = torch.randn(1, 4, 3, 3, dtype=torch.float64), torch.randn(8, 4, 3, 3, dtype=torch.float64)
        y = torch.randn(1, 8, 3, 3, dtype=torch.float64)
        found = fit(patch_moments(x, y, PADDED), weight.flatten(1), torch.ones(8, 36, dtype=torch.bool), ridge=1e-10)
        assert found.weight.isfinite().all()
        assert F.conv2d(x, found.weight.view_as(weight), found.bias, padding=1) == pytest.approx(y, abs=1e-3)


@pytest.mark.parametrize("ridge", [0.01, 0.25, torch.tensor(0.05, dtype=torch.float64)], ids=["0.01", "0.25", "tensor"])
@pytest.mark.parametrize("per", ["filter", "kernel"])
def test_means_beside_the_weights_do_not_make_the_ridge_stronger(per, ridge):
    """The sum of a window of like inputs varies about a hundred times as much as one of them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 8, 8, 8, generator=generator) + 3 * torch.randn(40, 1, 1, 1, generator=generator)
    weight = 0.1 * torch.randn(12, 8, 3, 3, generator=generator) + 0.02
    moments = patch_moments(x, F.conv2d(x, weight), Window((3, 3), (1, 1), ((0, 0), (0, 0)), (1, 1)))
    support = torch.rand(12, 72, generator=generator) < 0.3
    present = weight.flatten(1) * support
    found, means = fit_with_means(moments, present, support, weight.shape, per, ridge=ridge, most=1.0)
    assert found.ridge == ridge
    rows = torch.ones(1, 72) if per == "filter" else torch.eye(8).repeat_interleave(9, 1)
    t = torch.cat([torch.eye(72), rows]).double()
    xx, xy, rho = t @ moments.xx[0] @ t.mT, t @ moments.xy[0], ridge * moments.diagonal.mean()
    for o in range(12):
        used = torch.cat([support[o], torch.ones(len(rows), dtype=torch.bool)]).nonzero().flatten()
        right = xy[used, o] + rho * torch.cat([present[o], torch.zeros(len(rows))])[used]
        wanted = torch.linalg.solve(xx[used][:, used] + rho * torch.eye(len(used)), right)
        assert torch.cat([found.weight[o], means[o].flatten()])[used] == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_means_beside_constant_inputs_leave_the_weights():
    x, weight = torch.full((3, 4, 5, 5), 2.0), torch.randn(8, 4, 3, 3)
    moments = patch_moments(x, torch.randn(3, 8, 3, 3), Window((3, 3), (1, 1), ((0, 0), (0, 0)), (1, 1)))
    support = torch.rand(8, 36) < 0.5
    found, means = fit_with_means(moments, weight.flatten(1) * support, support, weight.shape, "filter")
    assert torch.equal(found.weight, weight.flatten(1).double() * support)
    assert not means.any()
