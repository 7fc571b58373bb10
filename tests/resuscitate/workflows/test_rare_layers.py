"""Layers that run on some of the images only, or on none."""

import pytest
import torch
from torch import nn

import resuscitate
from tests.networks import images, pruned_copy, seeded

METHODS = [resuscitate.ASR(), resuscitate.ChannelWise(), resuscitate.LayerWise(), resuscitate.Refit(ridge=0.01)]
by_each_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


class Chosen(nn.Module):
    """`some` runs on the images whose first pixel exceeds a bound, twice if `again`; in many a batch on none."""

    def __init__(self, bound: float, again: bool = False):
        super().__init__()
        self.bound, self.again = bound, again
        self.stem, self.some, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        features, chosen = self.stem(x).relu().mean((2, 3)), x[:, 0, 0, 0] > self.bound
        extra = self.some(features[chosen]).sum(0)
        if self.again:
            extra = extra + self.some(features).sum(0)
        return self.head(features) + 0.01 * extra[:5]


def apart():
    """Images of which the first eight exceed no bound above 1, and the others do."""
    x = images()
    x[:8, 0, 0, 0], x[8:, 0, 0, 0] = 0.0, 1.5
    return x


@by_each_method
def test_batches_without_a_row_for_a_layer_change_nothing(method):
    dense, found = seeded(lambda: Chosen(1.0)), []
    for batches in (apart()[8:], list(apart().split(8))):
        model = pruned_copy(dense)
        report = resuscitate.repair(model, dense, batches, method=method, include=["some"], keep_worse=True)
        assert [row.status for row in report.layers] in (["repaired"], ["refitted"])
        found.append(model.state_dict())
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("diagnostics", [False, True])
@by_each_method
def test_a_layer_that_gets_no_row_is_unchanged_and_reported(method, diagnostics):
    dense = seeded(lambda: Chosen(2.0))
    report = resuscitate.repair(pruned_copy(dense), dense, apart(), method=method, diagnostics=diagnostics)
    rows = {row.name: (row.status, row.reason) for row in report.layers}
    assert rows["some"] == ("unchanged", "these images never reach it")
    assert rows["head"][0] in ("repaired", "refitted")


@by_each_method
def test_a_call_without_rows_does_not_count_against_the_other_calls(method):
    dense = seeded(lambda: Chosen(2.0, again=True))
    model = pruned_copy(dense)
    report = resuscitate.repair(model, dense, apart(), method=method, keep_worse=True)
    assert {row.name: row.status for row in report.layers}["some"] in ("repaired", "refitted")
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_the_repairability_of_a_layer_without_rows_is_unknown():
    found = resuscitate.Repairability.measure(seeded(lambda: Chosen(2.0)), apart())
    assert not found.residuals["some"]
    assert found.residuals["head"]


def test_what_the_images_never_reach_is_unchanged_and_reported():
    class Branching(nn.Module):
        """Batches of two, as the first look takes them, go another way than longer ones."""

        def __init__(self):
            super().__init__()
            self.stem, self.rare, self.rare_bn = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            x = self.stem(x)
            return self.rare_bn(self.rare(x)) if len(x) == 2 else x

    dense = seeded(Branching)
    report = resuscitate.repair(pruned_copy(dense), dense, images(), skip_first=False, recalibrate="exact")
    assert {row.name: (row.status, row.reason) for row in report.layers}["rare"] == (
        "unchanged",
        "these images never reach it",
    )
    assert "BatchNorm 'rare_bn' is unchanged: these images never reach it" in report.notes


class Routed(nn.Module):
    """`expert` gets the images for which `gate` is positive: in the pruned network others than in the dense one."""

    def __init__(self):
        super().__init__()
        self.stem, self.gate, self.expert = nn.Conv2d(3, 8, 3), nn.Linear(8, 1), nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x).relu().mean((2, 3))
        chosen = self.gate(x)[:, 0]
        out = torch.zeros(len(x), 5)
        out[chosen > chosen.mean()] = self.expert(x[chosen > chosen.mean()])
        return out


def test_a_layer_that_gets_other_rows_than_in_the_dense_network_is_named():
    dense = seeded(Routed)
    model = pruned_copy(dense, 0.8)
    with pytest.raises(
        resuscitate.LayerError, match=r"layer 'expert': it gets \d+ rows .* exclude it, or choose method="
    ):
        resuscitate.repair(model, dense, images(64))
    report = resuscitate.repair(model, dense, images(64), exclude=["expert"])
    assert {row.name: row.status for row in report.layers}["stem"] != "unchanged"


@pytest.mark.parametrize("schedule", ["sequential", "parallel"])
def test_a_repair_that_has_no_layer_left_is_an_error(schedule):
    dense = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 49, 5)))
    with pytest.raises(resuscitate.ResuscitateError, match=r"no layer is left to repair.*skip_first=False"):
        resuscitate.repair(
            pruned_copy(dense), dense, images(), method="asr", schedule=schedule, skip_first=True, skip_last=True
        )
