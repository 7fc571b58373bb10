"""Ridge regressions with a support for each channel: every way to solve them gives the solution."""

from types import SimpleNamespace

import pytest
import torch

import asr_kernels as ak
from resuscitate.runtime.distributed import Ranks
from resuscitate.statistics import conjugate_gradients, fitting, least_squares
from resuscitate.statistics.conjugate_gradients import RidgeSystems
from resuscitate.statistics.fitting import fit
from resuscitate.statistics.least_squares import Problem
from resuscitate.statistics.second_moments import Matrices

DENSITIES = {"iterative": 0.4, "direct": 0.05}


def problem(way="iterative", groups=1, channels=100, values=256, ridge=0.01, seed=0, ranks=None, **changes):
    """Correlated inputs that are not negative, and targets that depend on all of them."""
    generator = torch.Generator().manual_seed(seed)
    count, dtype = 3 * values, torch.float64
    mixed = torch.randn(groups, count, values // 4, generator=generator, dtype=dtype)
    mixing = torch.randn(groups, values // 4, values, generator=generator, dtype=dtype) / values**0.5
    x = (mixed @ mixing + 0.1 * torch.randn(groups, count, values, generator=generator, dtype=dtype)).relu()
    x[changes.get("constant", [])] = 0
    x = x - x.mean(1, keepdim=True)
    weight = torch.randn(channels, values, generator=generator, dtype=dtype) / values**0.5
    y = x @ weight.view(groups, -1, values).mT
    y = y - y.mean(1, keepdim=True)
    y.view(groups, count, -1)[0, :, changes.get("dead", [])] = 0
    zeros = x.new_zeros(groups, values), y.new_zeros(groups, channels // groups)
    moments = ak.PatchMoments(count, *zeros, x.mT @ x, x.mT @ y, y.square().sum(1))
    support = torch.rand(channels, values, generator=generator) < DENSITIES[way]
    support[changes.get("alike", [])] = support[0].clone()
    return Problem(moments, weight * support, support, ridge, ranks or Ranks(), changes.get("direct", False))


def exact(problem, targets):
    """By one dense solution for each channel."""
    present = problem.present.w
    w = torch.zeros_like(present)
    for channel, (group, places) in enumerate(zip(problem.group, problem.support, strict=True)):
        matrix = problem.moments.xx[group][places][:, places] + problem.rho[channel] * torch.eye(int(places.sum()))
        right = targets.cross[channel, places] + problem.rho[channel] * present[channel, places]
        w[channel, places] = torch.linalg.solve(matrix, right)
    return w


def excess(problem, targets, w):
    """By how much the objective exceeds its least value, as a part of the targets' squares."""
    error = w - exact(problem, targets)
    rises = problem.with_weights(error).squares + problem.rho * error.square().sum(1)
    return float((rises / targets.squares).max())


@pytest.fixture
def ways(monkeypatch):
    """The number of rows that were solved for by conjugate gradients, and of factors."""
    found = SimpleNamespace(rows=0, factors=0)
    solve, factor = RidgeSystems.solve, Problem._factor

    def counted(self, right, *rest):
        found.rows += right[..., 0].numel()
        return solve(self, right, *rest)

    def counted_factor(self, channels):
        found.factors += len(channels)
        return factor(self, channels)

    monkeypatch.setattr(RidgeSystems, "solve", counted)
    monkeypatch.setattr(Problem, "_factor", counted_factor)
    return found


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("ridge", [0.001, 0.01, 1.0])
def test_conjugate_gradients_find_the_solution_to_the_stated_excess(groups, ridge, ways):
    given = problem(groups=groups, ridge=ridge)
    targets = given.own_targets()
    found = given.solve(targets)
    w = found.w
    assert (ways.rows, ways.factors) == (100, 0)
    assert excess(given, targets, w) < 10 * least_squares.EXCESS  # which the residual estimates
    assert not w[~given.support].any()


@pytest.mark.parametrize(
    ("changes", "factors"),
    [
        ({"way": "direct"}, 100),
        ({"values": 128}, 100),
        ({"direct": True}, 100),
        ({"alike": slice(None)}, 1),
        ({"way": "direct", "alike": slice(40)}, 61),
    ],
    ids=["sparse", "narrow", "on demand", "one support", "some alike"],
)
def test_otherwise_a_factor_for_each_support_is_kept_for_the_next_targets(changes, factors, ways):
    given = problem(**changes)
    targets = given.own_targets()
    for _ in range(3):
        found = given.solve(targets)
        assert found.w == pytest.approx(exact(given, targets), abs=1e-9)
        assert found.squares == pytest.approx(given.with_weights(found.w).squares, rel=1e-9)
    assert (ways.rows, ways.factors) == (0, factors)


def test_factors_that_do_not_fit_are_made_again(ways, monkeypatch):
    first = problem("direct", alike=slice(40))
    kept = first.solve(first.own_targets()).w
    monkeypatch.setattr(least_squares, "KEPT_BYTES", first._kept[0].bytes)  # that of the channels alike
    given = problem("direct", alike=slice(40))
    for factors in (61, 60):
        ways.factors = 0
        assert torch.equal(given.solve(given.own_targets()).w, kept)
        assert ways.factors == factors


def test_a_layer_that_takes_too_many_steps_is_solved_directly(ways, monkeypatch):
    monkeypatch.setattr(conjugate_gradients, "STEPS", (2,))
    given = problem()
    found = fit(given.moments, given.present.w, given.support, most=1.0)
    assert (ways.rows, ways.factors) == (100, 100)
    expected = exact(given, given.own_targets())
    assert found.weight == pytest.approx(expected, rel=1e-2, abs=1e-2)


def test_a_start_near_the_solution_takes_fewer_steps(monkeypatch):
    given, steps = problem(), []
    targets = given.own_targets()
    descend = RidgeSystems._descend
    monkeypatch.setattr(RidgeSystems, "_descend", lambda *parts: steps.append(1) or descend(*parts))
    found = given.solve(targets)
    assert steps
    steps.clear()
    assert torch.equal(given.solve(targets, found).w, found.w)
    assert not steps


def test_a_preconditioner_serves_all_targets(monkeypatch):
    made, init = [], conjugate_gradients._Preconditioner.__init__
    monkeypatch.setattr(conjugate_gradients._Preconditioner, "__init__", lambda *given: made.append(1) or init(*given))
    given = problem()
    for seed in range(3):
        targets = problem(seed=seed).own_targets()
        assert excess(given, targets, given.solve(targets).w) < 10 * least_squares.EXCESS
    assert len(made) == 2  # for 64 channels, and for the rest


@pytest.mark.parametrize("way", ["iterative", "direct"])
@pytest.mark.parametrize("size", [2, 3])
def test_the_ranks_parts_add_up_to_the_solution_of_one_process(way, size):
    def part(rank, size):
        given = problem(way, ranks=SimpleNamespace(rank=rank, size=size, add=lambda w: w))
        return given.solve(given.own_targets()).w

    tolerance = 0 if way == "iterative" else 1e-12  # the padding of the systems depends on the ranks
    assert sum(part(rank, size) for rank in range(size)) == pytest.approx(part(0, 1), abs=tolerance, rel=0)


def test_a_ridge_too_small_for_conjugate_gradients_is_solved_directly(ways):
    given = problem(ridge=1e-4)
    fit(given.moments, given.present.w, given.support, ridge=1e-4)
    assert (ways.rows, ways.factors) == (0, 100)


def test_channels_of_few_samples_are_solved_for_in_parts_of_bounded_size(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(40, 256, generator=generator), torch.randn(150, 256, generator=generator)
    support = torch.rand(150, 256, generator=generator) < 0.4
    moments, sizes = ak.row_moments(x, x @ weight.mT + 1, 64), []
    init = Problem.__init__
    monkeypatch.setattr(Problem, "__init__", lambda *given: sizes.append(len(given[2])) or init(*given))
    whole = fit(moments, weight * support, support)
    monkeypatch.setattr(fitting, "PART_BYTES", 1)
    found = fit(moments, weight * support, support)
    assert sizes == [150, 64, 64, 22]
    for name, value in vars(whole).items():
        torch.testing.assert_close(getattr(found, name), value, rtol=1e-9, atol=1e-9)


def test_channels_without_a_target_and_groups_without_an_input_that_varies():
    given = problem(groups=2, dead=[3], constant=[1])
    given.present.w[3] = given.present.product[3] = 0
    targets = given.own_targets()
    w = given.solve(targets).w
    assert not w[3].any()
    assert torch.equal(w[50:], given.present.w[50:])


def test_weights_on_inputs_that_do_not_vary_stay_beside_others():
    given = problem("direct")
    moments, support = given.moments, torch.zeros_like(given.support)
    moments.xx[:, :3] = moments.xx[:, :, :3] = moments.xy[:, :3] = 0
    support[:50, :3], support[50:] = True, given.support[50:]
    weight = torch.randn(support.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * support
    assert fit(moments, weight, support).weight[:50] == pytest.approx(weight[:50], rel=1e-9)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_low_rank_part_exceeds_the_second_moments_in_no_direction_and_has_the_largest(groups):
    given = problem(groups=groups, values=512).moments.xx
    variances = 1 / torch.arange(1, 513, dtype=torch.float64) ** 2
    basis = torch.linalg.eigh(given).eigenvectors
    xx = Matrices((basis * variances) @ basis.mT)
    part = xx.low_rank.double()
    assert part.shape == (groups, 16, 512)
    rest = torch.linalg.eigvalsh(xx.xx - part.mT @ part)
    assert (rest[:, 0] > -1e-6).all()
    assert (rest[:, -1] < 2 * variances[15]).all()


def test_second_moments_of_few_values_have_a_low_rank_part_of_rank_1():
    assert Matrices(torch.eye(9, dtype=torch.float64)[None]).low_rank.shape == (1, 1, 9)
