"""The curvature of a layer's outputs from gradients, and weights that are solved for with it."""

import pytest
import torch

from resuscitate.statistics import conjugate_gradients
from resuscitate.statistics.curvature import FLOOR, curvature_from
from tests.resuscitate.statistics.test_least_squares import problem


def halves(true, samples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    root = torch.linalg.cholesky(true).float()
    found = (root @ torch.randn(len(true), samples, generator=generator) for _ in range(2))
    return torch.stack([gradients @ gradients.mT for gradients in found])


def spd(channels, rank, seed=0):
    """A matrix with a mean diagonal of 1 and a few large eigenvalues."""
    factor = torch.randn(channels, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = factor @ factor.mT + 0.01 * torch.eye(channels)
    return found / found.diagonal().mean()


def test_many_samples_give_the_true_matrix_and_the_floor():
    true = spd(12, 4)
    wanted = (true + FLOOR * torch.eye(12)) / (1 + FLOOR)
    assert torch.allclose(curvature_from(halves(true, 200_000)), wanted, atol=0.02)


def test_samples_without_a_common_direction_give_nearly_the_identity():
    found = curvature_from(halves(torch.eye(64, dtype=torch.float64), 128))
    assert (found - torch.eye(64)).norm() < 0.1 * torch.eye(64).norm()


@pytest.mark.parametrize("samples", [8, 32, 128])
def test_shrinkage_brings_few_samples_nearer_to_the_true_matrix(samples):
    true, given = spd(64, 8), halves(spd(64, 8), samples)
    mean = sum(half / half.diagonal().mean() for half in given) / 2
    assert (curvature_from(given) - true).norm() < 1.01 * (mean - true).norm()


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_layer_without_effect_or_with_gradients_that_are_not_finite_has_none(value):
    given = halves(torch.eye(4, dtype=torch.float64), 10)
    given[1] = value
    assert curvature_from(given) is None


def objective(given, targets, curvature, w):
    """tr(G E E') and the ridge, less a constant."""
    matrix, present = given.moments.xx[0], given.present.w
    error = (curvature * (w @ matrix @ w.mT - 2 * w @ targets.cross.mT)).sum()
    return float(error + (given.rho[:, None] * curvature.diagonal()[:, None] * (w - present).square()).sum())


def coupled(way="iterative", channels=20, values=64, curvature=None):
    given = problem(way, channels=channels, values=values)
    given.curvature = spd(channels, 4) if curvature is None else curvature
    return given, given.own_targets()


def alone(way="iterative", channels=20, values=64):
    given = problem(way, channels=channels, values=values)
    return given.solve(given.own_targets()).w


@pytest.mark.parametrize("way", ["iterative", "direct"])
def test_many_steps_reach_the_solution_of_the_whole_system(way, monkeypatch):
    monkeypatch.setattr(conjugate_gradients, "COUPLED_STEPS", 400)
    given, targets = coupled(way)
    kept = given.support.flatten()
    ridges = (given.rho * given.curvature.diagonal()).repeat_interleave(64)[kept]
    matrix = torch.kron(given.curvature, given.moments.xx[0])[kept][:, kept] + ridges.diag()
    right = (given.curvature @ targets.cross).flatten()[kept] + ridges * given.present.w.flatten()[kept]
    wanted = torch.zeros(kept.shape, dtype=torch.float64)
    wanted[kept] = torch.linalg.solve(matrix, right)
    found = given.solve(targets).w
    assert not found[~given.support].any()
    assert torch.allclose(found.flatten(), wanted, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("way", ["iterative", "direct"])
def test_few_steps_go_towards_it(way):
    given, targets = coupled(way)
    w, start = given.solve(targets).w, alone(way)
    assert not torch.equal(w, start)
    assert objective(given, targets, given.curvature, w) < objective(given, targets, given.curvature, start)


def test_a_diagonal_curvature_leaves_each_channel_to_itself():
    given, targets = coupled(curvature=torch.linspace(0.1, 2, 20, dtype=torch.float64).diag())
    start = alone()
    assert torch.allclose(given.solve(targets).w, start, atol=1e-3 * float(start.abs().max()))


def test_the_products_are_those_of_the_weights():
    given, targets = coupled()
    found = given.solve(targets)
    assert torch.allclose(found.product, found.w @ given.moments.xx[0])


def test_groups_stay_apart():
    given = problem(groups=2, channels=20, values=64)
    wanted = given.solve(given.own_targets()).w
    given.curvature = spd(20, 4)
    assert torch.equal(given.solve(given.own_targets()).w, wanted)
