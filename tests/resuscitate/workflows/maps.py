"""A small map, and a score that counts its calls."""

from __future__ import annotations

import copy

import torch

from tests.networks import images

GRID = {"sparsities": [0.5, 0.8], "allocations": ["global", "lamp"], "methods": ["none", "bn", "asr"]}


class Likeness:
    """Scores a model by how near its outputs are to the dense model's: 100 for the same. Counts its calls."""

    def __init__(self, dense, fail_at=None):
        self.inputs, self.calls, self.fail_at = images(10, seed=5), 0, fail_at
        self.wanted = copy.deepcopy(dense)(self.inputs).detach()

    def __call__(self, model):
        self.calls += 1
        if self.calls == self.fail_at:
            raise RuntimeError("the disk is full")
        assert not any(module.training for module in model.modules())
        with torch.no_grad():
            return 100 - float((model(self.inputs) - self.wanted).abs().mean())
