"""How strong the ridge of a refit is follows from cross-validation over the images, layer by layer."""

import copy
from functools import reduce

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import resuscitate
from asr_kernels import PatchMoments, Window, patch_moments
from resuscitate.data.batches import Batches
from resuscitate.runtime.distributed import Ranks
from resuscitate.statistics import fitting
from resuscitate.statistics.fitting import RIDGE, RIDGES, choose_ridge, fit
from tests.networks import Residual, Untraceable, chain, images, pruned_copy, seeded


def regression(samples, inputs=40, outputs=6, noise=1.0, folds=4, seed=0):
    """A noisy linear layer: its folds, present weights and supports, and samples that are in no fold."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    support = torch.rand(outputs, inputs, generator=generator) < 0.7
    present = (true + 0.3 * torch.randn(true.shape, generator=generator, dtype=torch.float64)) * support
    x = torch.randn(samples + 4096, inputs, generator=generator, dtype=torch.float64) + 1
    y = x @ true.mT + noise * torch.randn(len(x), outputs, generator=generator, dtype=torch.float64)
    parts = {n: (x[n:samples:folds], y[n:samples:folds]) for n in range(folds)}
    moments = {n: patch_moments(*part, Window()) for n, part in parts.items()}
    return parts, moments, present, support, (x[samples:], y[samples:])


def left_unexplained(parts, present, support, ridge):
    """What the weights that the other parts give leave unexplained of each part, image by image, up to a gain."""
    total = 0.0
    for channel, places in enumerate(support):
        predicted, wanted = [], []
        for left_out, (x, y) in parts.items():
            seen = [part for n, part in parts.items() if n != left_out]
            x_seen, y_seen = (torch.cat(each) for each in zip(*seen, strict=True))
            c = x_seen.T.cov(correction=0)
            cross = ((x_seen - x_seen.mean(0)).mT @ (y_seen - y_seen.mean(0)))[places, channel] / len(x_seen)
            rho = ridge * c.diagonal().mean()
            c = c[places][:, places] + rho * torch.eye(int(places.sum()))
            w = torch.linalg.solve(c, cross + rho * present[channel, places])
            predicted.append((x - x.mean(0))[:, places] @ w)
            wanted.append((y - y.mean(0))[:, channel])
        p, t = torch.cat(predicted), torch.cat(wanted)
        total += float(t @ t - max(float(p @ t), 0.0) ** 2 / (p @ p))
    return total


def chosen(moments, present, support):
    return choose_ridge(moments, reduce(PatchMoments.merge, moments.values()), present, support, Ranks())


@pytest.mark.parametrize("at_once", [(), ("cpu",)], ids=["by fold", "at once"])
@pytest.mark.parametrize("samples", [24, 48, 200])
def test_the_ridge_is_the_first_whose_successor_predicts_no_better(samples, at_once, monkeypatch):
    monkeypatch.setattr(fitting, "AT_ONCE", at_once)
    parts, moments, present, support, _ = regression(samples)
    errors = [left_unexplained(parts, present, support, ridge) for ridge in RIDGES]
    rises = [index for index in range(len(RIDGES) - 1) if errors[index + 1] >= errors[index]]
    assert chosen(moments, present, support) == RIDGES[min(rises, default=len(RIDGES) - 1)]


def test_samples_in_plenty_take_the_weakest_ridge_and_few_a_stronger_one():
    found = []
    for samples, noise in ((40000, 0.1), (40, 1.0)):
        _, moments, present, support, _ = regression(samples, noise=noise)
        found.append(chosen(moments, present, support))
    assert found[0] == RIDGES[0] < found[1]


@pytest.mark.parametrize("seed", range(3))
def test_where_there_are_as_many_inputs_as_samples_it_predicts_far_better(seed):
    _, moments, present, support, (x, y) = regression(32, inputs=40, noise=3.0, seed=seed)
    pooled = moments[0].merge(moments[1]).merge(moments[2]).merge(moments[3])

    def error(ridge):
        found = fit(pooled, present, support, ridge=ridge, most=1.0)
        return float((x @ found.weight.mT + found.bias - y).square().mean())

    assert error(chosen(moments, present, support)) < 0.7 * error(RIDGE)


def test_one_part_or_a_layer_without_weights_has_no_say():
    _, moments, present, support, _ = regression(40)
    assert chosen({2: moments[2]}, present, support) == RIDGE
    assert chosen(moments, present * 0, support & False) in RIDGES


def ridges(report):
    return {row.name: row.ridge for row in report.layers if row.ridge is not None}


@settings(max_examples=8)
@given(st.permutations(range(20)), st.integers(1, 20))
def test_neither_the_order_of_the_images_nor_their_batches_matter(order, batch_size):
    dense = seeded(chain)
    found = []
    for x, size in ((images(20), 20), (images(20)[torch.tensor(order)], batch_size)):
        model = pruned_copy(dense)
        report = resuscitate.repair(model, dense, x, method="refit", batch_size=size)
        found.append((ridges(report), model.state_dict()))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-3, atol=1e-4)


def test_images_that_are_equal_fall_into_one_fold_and_folds_are_of_equal_size():
    distinct = images(20)
    batches = Batches([distinct[:7], distinct[7:], distinct[:7]])
    batches.number_images(Ranks())
    first, _, again = (batches.folds(index, 4, rows) for index, rows in enumerate((7, 13, 7)))
    assert {fold: rows.tolist() for fold, rows in first.items()} == {f: rows.tolist() for f, rows in again.items()}
    alone = Batches([distinct])
    alone.number_images(Ranks())
    assert sorted(len(rows) for rows in alone.folds(0, 4, 20).values()) == [5, 5, 5, 5]


def test_several_rows_of_an_image_stay_in_one_fold():
    batches = Batches([images(6)])
    batches.number_images(Ranks())
    by_image, by_row = batches.folds(0, 4, 6), batches.folds(0, 4, 18)
    for fold, rows in by_row.items():
        assert sorted(set((rows // 3).tolist())) == by_image[fold].tolist()


@pytest.mark.parametrize("build", [chain, Residual, Untraceable], ids=lambda b: b.__name__)
def test_both_walks_and_a_forward_fn_report_the_ridge_of_each_layer(build):
    dense = seeded(build)
    fitted = ridges(resuscitate.repair(pruned_copy(dense), dense, images(), method="refit"))
    batches = [{"x": each} for each in images().split(9)]
    by_function = resuscitate.repair(
        pruned_copy(dense), dense, batches, method="refit", forward_fn=lambda model, batch: model(batch["x"])
    )
    assert fitted == ridges(by_function)
    assert set(fitted.values()) <= set(RIDGES)


def test_a_number_fixes_it():
    dense = seeded(chain)
    report = resuscitate.repair(pruned_copy(dense), dense, images(), method="refit", ridge=0.2)
    assert set(ridges(report).values()) == {0.2}
    assert report.to_dict()["layers"][0]["ridge"] == 0.2


class TestAWidePooledClassifier:
    """As many kept inputs as there are images, one pooled sample of each: where a fixed weak ridge explodes."""

    @pytest.fixture(scope="class")
    @classmethod
    def errors(cls):
        width = 192
        dense = seeded(
            lambda: nn.Sequential(
                *(nn.Conv2d(16, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU()),
                *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 24)),
            )
        )
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(640, 16, 3, 3, generator=generator) + torch.randn(640, 16, 1, 1, generator=generator)
        pruned, test = copy.deepcopy(dense), x[384:]
        resuscitate.sparsify(pruned, 0.7, allocation="uniform")

        def error(count, ridge):
            model = copy.deepcopy(pruned)
            resuscitate.repair(model, dense, x[:count], method="refit", ridge=ridge)
            with torch.no_grad():
                wanted = dense(test)
                return float((model(test) - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())

        return {(count, ridge): error(count, ridge) for count in (48, 96, 192, 384) for ridge in (None, RIDGE)}

    @pytest.mark.slow
    def test_more_images_are_never_worse(self, errors):
        assert errors[384, None] < errors[192, None] < errors[96, None] < errors[48, None]

    @pytest.mark.slow
    def test_it_is_nearer_to_the_dense_network_than_with_the_weak_ridge(self, errors):
        assert errors[48, None] < 0.75 * errors[48, RIDGE]
        assert all(errors[count, None] < errors[count, RIDGE] for count in (48, 96, 192))
        assert errors[384, None] < 1.02 * errors[384, RIDGE]
