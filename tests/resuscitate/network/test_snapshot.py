"""Settings of the process during a repair, and after it."""

import torch

import resuscitate
from resuscitate.network.snapshot import evaluation_mode
from tests.networks import chain, images, pruned_copy, seeded


def test_gpus_that_hold_no_model_are_not_seeded(monkeypatch):
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)  # `torch.manual_seed` calls it
    dense = seeded(chain)
    model = pruned_copy(dense)
    seeds.clear()
    resuscitate.repair(model, dense, images())
    with evaluation_mode([model], seed=3):
        assert torch.initial_seed() == 3
    assert not seeds
