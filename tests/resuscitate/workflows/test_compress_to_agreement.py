"""The search for the highest sparsity that keeps an agreement: what it finds, what it costs, what it refuses."""

import copy
import logging

import pytest
import torch
from torch import nn

import resuscitate
from resuscitate.errors import CalibrationError, ResuscitateError
from resuscitate.workflows import compress_to_agreement as module
from tests.compare import same_state
from tests.networks import chain, images, seeded

OPTIONS = {"steps": 2, "allocation": "global", "ridge": 1e-2, "progress": False}
MANY = images(160)


def network():
    """A network that does not always give the same class."""
    model = seeded(chain)
    resuscitate.recalibrate_batchnorm(model, MANY, progress=False)
    with torch.no_grad():
        model[-1].bias -= model(MANY).mean(0)
    return model


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def agreements(monkeypatch, agreement):
    """`compress` reports this agreement, a function of the sparsity; returns the sparsities that it was called with."""
    called, original = [], module.compress

    def compress(model, sparsity, *args, **options):
        called.append(sparsity)
        report = original(model, sparsity, *args, **options)
        report.agreement = resuscitate.Agreement(0.1, agreement(sparsity), 1.0, 0.5, 100, True)
        return report

    monkeypatch.setattr(module, "compress", compress)
    return called


@pytest.mark.parametrize("limit", [0.45, 0.7, 0.95])
def test_it_finds_the_highest_sparsity_of_its_sequence(monkeypatch, limit):
    called = agreements(monkeypatch, lambda sparsity: 1.0 if sparsity <= limit else 0.5)
    model = network()
    report = resuscitate.compress_to_agreement(model, 0.98, MANY, trials=3, **OPTIONS)
    sequence = [1 - 64 ** (-index / 8) for index in range(1, 8)]
    best = max(sparsity for sparsity in sequence if sparsity <= limit)
    assert report.sparsity == pytest.approx(best, abs=2e-3)
    assert len(report.trials) == 3
    assert len(called) == 3 if report.trials[-1].agreement == 1.0 else 4
    report.masks.check(model)


def test_the_result_is_that_of_compress_and_can_be_undone():
    dense = network()
    model, expected, before = copy.deepcopy(dense), copy.deepcopy(dense), state(dense)
    report = resuscitate.compress_to_agreement(model, 0.5, MANY, trials=2, **OPTIONS)
    index = round(-torch.tensor(1 - report.sparsity).log2().item() / 6 * 4)
    resuscitate.compress(expected, 1 - 64 ** (-index / 4), MANY, **OPTIONS)
    assert same_state(state(model), state(expected))
    assert max(trial.sparsity for trial in report.trials if trial.agreement >= 0.5) == report.sparsity
    assert report.to_dict()["target"] == 0.5
    assert [set(trial) for trial in report.to_dict()["trials"]] == [{"sparsity", "agreement", "seconds"}] * 2
    assert "wanted: 0.5" in report.outcome()[-1]
    report.undo()
    assert same_state(state(model), before)


def test_images_that_can_be_read_once_are_enough(monkeypatch):
    agreements(monkeypatch, lambda sparsity: 1.0)
    resuscitate.compress_to_agreement(network(), 0.9, iter(MANY.split(40)), trials=2, **OPTIONS)


@pytest.mark.parametrize(
    ("agreement", "how", "error", "message"),
    [
        (1.5, {}, ValueError, "not in"),
        (0.0, {}, ValueError, "not in"),
        (0.9, {"trials": 0}, ValueError, "trials"),
        (0.9, {"steps": [0.5, 0.9]}, ValueError, "steps must be a number"),
        (0.9, {"sparsity": 0.5}, TypeError, "sparsity"),
        (0.9, {"pattern": "2:4"}, ValueError, "no sparsity to search for"),
        (0.9, {"calibration": None}, CalibrationError, "missing"),
        (0.9, {"ridge": -1}, ValueError, "ridge"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_changes(agreement, how, error, message):
    model, options = network(), {"calibration": MANY, **OPTIONS, **how}
    before = state(model)
    with pytest.raises(error, match=message):
        resuscitate.compress_to_agreement(model, agreement, **options)
    assert same_state(state(model), before)


def test_an_agreement_that_no_sparsity_keeps_is_an_error_and_changes_nothing(monkeypatch):
    agreements(monkeypatch, lambda sparsity: 0.5)
    model = network()
    before = state(model)
    with pytest.raises(ResuscitateError, match=r"the lowest that was tried, the agreement is 0.500, not 0.9"):
        resuscitate.compress_to_agreement(model, 0.9, MANY, trials=2, **OPTIONS)
    assert same_state(state(model), before)


@pytest.mark.parametrize("last", [[nn.Conv2d(8, 4, 3)], [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1)]])
def test_outputs_that_are_no_logits_are_refused_before_anything_is_compressed(monkeypatch, last):
    monkeypatch.setattr(module, "compress", lambda *args, **options: pytest.fail("compressed"))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), *last)
    with pytest.raises(ResuscitateError, match="not logits"):
        resuscitate.compress_to_agreement(model, 0.9, MANY, trials=2, **OPTIONS)


def test_too_few_images_for_the_agreement_are_named(monkeypatch, caplog):
    agreements(monkeypatch, lambda sparsity: 1.0)
    with caplog.at_level(logging.WARNING, "resuscitate"):
        resuscitate.compress_to_agreement(network(), 0.995, MANY, trials=1, **OPTIONS)
    assert "100 images, so that 0.995 allows none of them another class" in caplog.text


def test_each_sparsity_has_a_folder_of_its_own(monkeypatch, tmp_path):
    folders = []
    monkeypatch.setattr(module, "compress", lambda *args, resume: folders.append(resume))
    for index in range(1, 2**12):
        module._try(nn.Identity(), module._sparsity(index, 12), MANY, tmp_path, {})
    assert len(set(folders)) == 2**12 - 1
