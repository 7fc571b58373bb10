"""`sparsify(pattern="channels")`: how many channels go, and which."""

import copy

import pytest
import torch
from torch import nn

from resuscitate import repair, sparsify
from resuscitate.errors import ResuscitateError
from resuscitate.pruning import structured
from resuscitate.pruning.structured import shrink
from tests.networks import (
    chain,
    images,
    seeded,
)
from tests.wired import (
    everything,
    largest_difference,
    outputs,
    projection,
    unchanged,
)


class TestSparsify:
    """`sparsify(..., pattern="channels")`: which channels, how many, and their removal."""

    @pytest.mark.parametrize("allocation", ["global", "uniform", "lamp"])
    @pytest.mark.parametrize("build", [chain, projection], ids=lambda build: build.__name__)
    def test_removed_channels_leave_the_function_that_the_masked_network_has(self, build, allocation):
        model, smaller = seeded(build), seeded(build)
        options = {"pattern": "channels", "allocation": allocation, "example": images(2)}
        masks = sparsify(model, 0.5, **options)
        masks.check(model)
        assert sparsify(smaller, 0.5, **options, remove=True) == masks
        assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())
        assert largest_difference(outputs(model, images(4)), outputs(smaller, images(4))) < 1e-5

    @pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.7])
    def test_exactly_the_asked_number_of_channels_goes(self, sparsity):
        model = seeded(chain)
        masks = sparsify(model, sparsity, pattern="channels", example=images(2))
        rows = torch.cat([mask.flatten(1).any(1) for name, mask in masks.items() if name != "11"])
        assert int((~rows).sum()) == round(sparsity * len(rows))
        uniform = sparsify(seeded(chain), sparsity, pattern="channels", allocation="uniform", example=images(2))
        for name in ("0", "3", "6"):
            removed = int((~uniform[name].flatten(1).any(1)).sum())
            assert abs(removed - sparsity * len(uniform[name])) < 1 + 1e-9

    def test_the_channels_of_least_mean_magnitude_go(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor([4.0, 1, 3, 2]).view(4, 1, 1, 1).expand(4, 3, 1, 1))
            model[2].weight.fill_(1)
            model[2].weight[:, 1] = 9  # the filter of least magnitude has the consumer weights of largest magnitude
        masks = sparsify(model, 0.25, pattern="channels", example=images(2))
        assert masks["0"].flatten(1).all(1).tolist() == [True, True, True, False]
        assert masks["2"].flatten(1).all(0).tolist() == [True, True, True, False]

    def test_a_masked_network_is_repaired_against_the_dense_one_and_shrunk_then(self):
        dense = seeded(projection)
        model = copy.deepcopy(dense)
        masks = sparsify(model, 0.4, pattern="channels", example=images(2))
        repair(model, dense, images())
        expected = outputs(model, images(4))
        found = shrink(model, masks, images(2))
        assert found.parameters[1] < found.parameters[0]
        assert largest_difference(expected, outputs(model, images(4))) < 1e-5

    def test_what_makes_no_sense_is_refused_and_nothing_is_changed(self, monkeypatch):
        model = seeded(chain)
        before = everything(model)
        for options, message in (
            ({}, "pass example, a batch of one or two images"),
            ({"example": images(2), "allocation": "erk"}, "'erk' is for weights; .* global, uniform or lamp"),
            ({"example": images(2), "allocation": "rr"}, "'rr' is for weights"),
            ({"example": images(2), "calibration": images(2)}, "leave calibration out; the images to trace .* example"),
            ({"example": images(2), "densities": {"0": 0.5}}, "leave densities out"),
            (
                {"example": images(2), "include": "11"},
                "no channels can be removed from the .* layers: layer '11': no layer reads these channels; the log",
            ),
        ):
            with pytest.raises(ValueError, match=message):
                sparsify(model, 0.5, pattern="channels", **options)
        with pytest.raises(ValueError, match=r"removes \d+ of 32 channels; with the channels .* at most 29 can"):
            sparsify(model, 0.99, pattern="channels", example=images(2))
        with pytest.raises(ValueError, match="needs pattern=\"channels\", not 'filter'"):
            sparsify(model, 0.5, pattern="filter", remove=True)
        monkeypatch.setattr(structured, "remove_units", lambda *args: 1 / 0)
        with pytest.raises(ResuscitateError, match="cannot be removed"):
            sparsify(model, 0.5, pattern="channels", example=images(2), remove=True)
        assert unchanged(before, everything(model))
