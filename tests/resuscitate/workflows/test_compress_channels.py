"""Compression with pattern "channels": they are removed at the end."""

import copy
import json

import pytest
import torch

import resuscitate
from resuscitate import compress
from tests.compare import same_state
from tests.networks import Residual, chain, images, seeded


@pytest.mark.parametrize("build", [chain, Residual])
def test_the_network_ends_smaller_and_computes_what_the_masked_one_does(build):
    model = seeded(build)
    report = compress(model, 0.5, images(32), pattern="channels", steps=3, progress=False)
    before, after = report.removal.flops
    assert after < before
    assert report.removal.parameters[1] == sum(parameter.numel() for parameter in model.parameters())
    assert report.removal.error < 1e-5
    assert all(seconds > 0 for seconds in report.latency)
    assert report.agreement.error_after < report.agreement.error_before
    assert report.masks.keys() <= {name for name, _ in model.named_modules()}


def test_the_report_has_the_costs_before_and_after():
    report = compress(seeded(chain), 0.5, images(32), pattern="channels", steps=2, progress=False)
    document = json.loads(json.dumps(report.to_dict()))
    assert document["removal"]["flops"] == [*report.removal.flops]
    assert document["latency"] == [*report.latency]
    assert document["allocation"] == {"name": "uniform"}
    (line,) = (line for line in report.outcome() if line.startswith("FLOPs"))
    assert f"parameters {report.removal.parameters[0]:,} -> {report.removal.parameters[1]:,}, a forward pass" in line
    assert "removal" not in compress(seeded(chain), 0.5, images(16), steps=1, progress=False).to_dict()


def test_the_small_network_can_be_undone_and_repaired_again():
    model = seeded(Residual)
    dense = copy.deepcopy(model)
    report = compress(model, 0.5, images(32), pattern="channels", steps=2, progress=False)
    small = copy.deepcopy(model)
    assert resuscitate.repair(small, dense, images(32), method="channelwise", progress=False).layers
    report.undo()
    assert same_state(model.state_dict(), dense.state_dict())
    assert repr(model) == repr(dense)


def test_a_resumed_run_ends_in_the_same_network(tmp_path):
    model, again = seeded(chain), seeded(chain)
    options = {"pattern": "channels", "steps": 2, "progress": False, "resume": tmp_path / "journals"}
    compress(model, 0.5, images(32), **options)
    report = compress(again, 0.5, images(32), **options)
    assert all(step.resumed for step in report.steps)
    assert same_state(model.state_dict(), again.state_dict())


def test_a_forward_fn_is_refused():
    with pytest.raises(ValueError, match="traces the model on plain images: it takes no forward_fn"):
        compress(seeded(chain), 0.5, images(16), pattern="channels", forward_fn=lambda model, batch: model(batch))


def test_repairs_that_make_the_outputs_worse_are_undone_and_the_channels_removed_all_the_same(monkeypatch):
    monkeypatch.setattr(resuscitate.workflows.compress.Agreement, "fell", True)
    model = seeded(chain)
    report = compress(model, 0.5, images(32), pattern="channels", steps=2, progress=False)
    assert report.undone
    kept = report.removal.kept["0"]
    assert torch.equal(model[0].weight, seeded(chain)[0].weight[kept])
