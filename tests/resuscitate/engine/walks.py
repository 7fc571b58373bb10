"""Repairs of one network by both walks, for tests."""

import pytest
import torch

import resuscitate
from tests.networks import images, pruned_copy, seeded

OPTIONS = {
    "refit": {"method": "refit"},
    "refit, exact": {"method": "refit", "recalibrate": "exact"},
    "asr": {"method": "asr"},
    "channelwise, exact": {"method": "channelwise", "recalibrate": "exact", "diagnostics": True},
    "bn": {"method": "bn"},
}
methods = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def run_batch(model, batch):
    return model(batch)


def repaired(dense, model=None, x=None, **options):
    """A pruned copy, or `model`, repaired; the report."""
    model = pruned_copy(dense) if model is None else model
    x = images(40).split(16) if x is None else x
    return model, resuscitate.repair(model, dense, x, progress=False, **options)


def close(model, other, refit):
    """Equal but for rounding, which in a refit decides on which side of zero an output lies now and then."""
    tolerance = {"rtol": 1e-2, "atol": 3e-4} if refit else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(model.state_dict(), other.state_dict(), **tolerance)


def both_walks(build, options, build_other=None):
    """A network repaired by suspended passes; another one that is the same to torch.fx, along its graph."""
    dense, other = seeded(build), seeded(build_other or build)
    other.load_state_dict(dense.state_dict())
    model, report = repaired(dense, forward_fn=run_batch, **options)
    expected, by_node = repaired(other, **options)
    assert (report.walk, by_node.walk) == ("suspended", "graph")
    close(model, expected, options["method"] == "refit")
    assert any(row.status in ("repaired", "refitted", "re-estimated") for row in report.layers)
    return model


def is_empty(store):
    """Is every region of the scratch file free again?"""
    place = store._place
    return sum(size for size, _ in place.gaps) == place.end
