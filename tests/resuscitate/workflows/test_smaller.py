"""`repair` of a network that has lost whole channels: as the repair of one in which they are masked."""

import copy

import pytest
import torch
from torch import nn

import resuscitate
from resuscitate import Masks, repair, shrink
from resuscitate.errors import JournalError, ModelMismatchError
from resuscitate.network.channels import KeptChannels
from resuscitate.network.layers import find_layers
from resuscitate.statistics.patches import contributions
from tests.networks import Dense, Residual, Untraceable, Zoo, chain, disturb, images, seeded
from tests.wired import (
    concatenated,
    flattened,
    grouped,
    largest_difference,
    line,
    masked,
    outputs,
    projection,
    separable,
    small_resnet18,
    transposed,
    volume,
)

CALIBRATION = images(32)
NETWORKS = [
    chain,
    Residual,
    Untraceable,
    Zoo,
    Dense,
    projection,
    concatenated,
    separable,
    grouped,
    flattened,
    transposed,
]
NETWORKS += [line, volume, small_resnet18]


def pair(build, fraction=0.4, seed=0):
    """A dense network, a copy with masked channels, a copy without them, and what was removed."""
    model, _, _, masks = masked(build, fraction, seed)
    small = copy.deepcopy(model)
    return seeded(build, seed), model, small, shrink(small, masks, images(2))


def run(model, dense, **options):
    return repair(model, dense, CALIBRATION, keep_worse=True, progress=False, **options)


def difference(ours, theirs):
    x = images(6, seed=3)
    return largest_difference(outputs(ours, x), outputs(theirs, x))


class TestEqualsTheMaskedRepair:
    """Not with a prior, a gain or a ridge that is a mean over all channels of a layer, removed ones too."""

    @pytest.mark.parametrize("build", NETWORKS, ids=lambda build: build.__name__)
    def test_a_gain_for_each_channel(self, build):
        dense, whole, small, _ = pair(build)
        before = difference(whole, dense)
        reports = [run(model, dense, method="channelwise") for model in (whole, small)]
        assert difference(whole, small) < 1e-5 < before  # rounding, through up to twenty layers
        rows = [[(row.name, row.status, row.reason) for row in report.layers] for report in reports]
        assert rows[0] == rows[1]

    @pytest.mark.parametrize(
        "options",
        [
            {"method": "asr", "prior": 0.01},
            {"method": "asr", "prior": 0.01, "schedule": "parallel"},
            {"method": "channelwise", "recalibrate": "exact", "skip_first": False},
            {"method": "channelwise", "diagnostics": True},
            {"method": "bn"},
            {"method": "refit", "ridge": 0.0},
            {"method": "refit", "ridge": 0.0, "relu_aware": False},
            {"method": "refit", "ridge": 0.0, "recalibrate": "exact"},
        ],
        ids=lambda options: "-".join(str(value) for value in options.values()),
    )
    @pytest.mark.parametrize("build", [Residual, Untraceable, Dense, projection, separable])
    def test_every_method(self, build, options):
        dense, whole, small, _ = pair(build)
        for model in (whole, small):
            run(model, dense, **options)
        assert difference(whole, small) < 2e-5  # least squares without a ridge

    def test_with_little_memory(self):
        dense, whole, small, _ = pair(Residual)
        repair(whole, dense, images(64).split(4), method="refit", ridge=0.0, keep_worse=True, progress=False)
        options = {"memory": "200KiB", "keep_worse": True, "progress": False, "max_samples": 64}
        report = repair(small, dense, images(64).split(4), method="refit", ridge=0.0, **options)
        assert report.bytes_spilled
        assert difference(whole, small) < 1e-5


class TestRepair:
    def test_auto_refits_and_the_report_says_what_was_kept(self):
        dense, _, small, found = pair(small_resnet18)
        before = difference(small, dense)
        report = repair(small, dense, CALIBRATION, progress=False)
        layers = [name for name in found.kept if name in find_layers(dense)]
        kept, whole = (
            sum(len(found.kept[name]) for name in layers),
            sum(dense.get_submodule(n).out_channels for n in layers),
        )
        assert report.method == "refit"
        assert not report.undone
        assert f"{len(layers)} layers have {kept} of the {whole} channels of the dense network" in report.notes
        assert difference(small, dense) < before

    def test_it_can_be_undone(self):
        dense, _, small, _ = pair(projection)
        before = copy.deepcopy(small.state_dict())
        run(small, dense).undo()
        assert small.state_dict().keys() == before.keys()
        assert all(torch.equal(before[key], value) for key, value in small.state_dict().items())

    def test_the_gain_of_a_layer_gives_it_the_variance_of_its_kept_dense_channels(self):
        dense, _, small, found = pair(chain)
        small[0].weight.data *= 3  # as another script may leave it
        run(small, dense, method="layerwise", skip_first=False, include="0")
        ours, theirs = outputs(small[0], CALIBRATION)[0], outputs(dense[0], CALIBRATION)[0][:, found.kept["0"]]
        assert torch.allclose(ours.var((0, 2, 3)).mean(), theirs.var((0, 2, 3)).mean(), rtol=1e-4)

    def test_changed_weights_are_matched_by_outputs(self):
        dense, _, small, found = pair(chain)
        disturb(small, 0.1)
        report = run(small, dense, method="channelwise")
        assert any("of the dense network" in note for note in report.notes)
        truth = copy.deepcopy(small)
        report.undo()
        run(small, dense, method="channelwise", channels={name: found.kept[name] for name in ("0", "3", "6")})
        assert all(
            torch.equal(a, b) for a, b in zip(truth.state_dict().values(), small.state_dict().values(), strict=True)
        )

    def test_masks_within_the_smaller_network_are_kept(self):
        dense, _, small, _ = pair(projection)
        resuscitate.sparsify(small, 0.5)
        zeros = Masks.from_zeros(small)
        run(small, dense, masks=zeros)
        zeros.check(small)

    def test_means_are_those_of_the_dense_weights(self):
        dense, _, small, found = pair(chain)
        rows, columns = found.kept["3"], found.kept_inputs["3"]
        pruned = torch.rand(small[3].weight.shape) < 0.5
        small[3].weight.data.masked_fill_(pruned, 0)
        run(small, dense, method="mean", means="layer", include="3")
        weight = dense[3].weight[rows][:, columns]
        assert torch.allclose(small[3].means, weight[pruned].mean())

    def test_blocks_of_inputs_add_up_to_the_kept_dense_outputs(self):
        layer, x = nn.Conv2d(12, 8, 3, padding=1), images(4, 12)
        kept = KeptChannels({"conv": torch.tensor([1, 4, 5])}, {"conv": torch.tensor([0, 2, 3, 7, 8, 11])})
        parts = contributions("conv", layer, x, 3, kept).unflatten(1, (3, -1))
        assert torch.allclose(parts.sum(1), layer(x)[:, [1, 4, 5]], atol=1e-5)
        assert [each.tolist()[:2] for each in kept.blocks_of_inputs("conv", layer, 3)] == [[0, 2], [3, 7], [8, 11]]

    def test_a_resumed_run_is_refused_with_other_channels(self, tmp_path):
        dense, _, small, found = pair(chain)
        first = copy.deepcopy(small)
        run(first, dense, method="channelwise", resume=tmp_path / "run.journal")
        again = copy.deepcopy(small)
        assert run(again, dense, method="channelwise", resume=tmp_path / "run.journal").resumed
        assert difference(first, again) == 0
        other = {"0": found.kept["0"].flip(0)}
        with pytest.raises(JournalError):
            run(small, dense, method="channelwise", resume=tmp_path / "run.journal", channels=other)


class TestRefusal:
    def test_nothing_is_changed_where_a_match_is_unclear(self):
        _, _, small, _ = pair(chain)
        other = seeded(chain, 5)
        before = copy.deepcopy(small.state_dict())
        with pytest.raises(ModelMismatchError, match=r"layer '0': it is not clear .*channels=\{'0': indices\}"):
            run(small, other)
        assert all(torch.equal(before[key], value) for key, value in small.state_dict().items())

    def test_a_network_with_more_channels_than_the_dense_one_is_refused(self):
        dense, _, small, _ = pair(chain)
        with pytest.raises(ModelMismatchError, match="the weight of layer '0' is"):
            run(dense, small)

    def test_channels_need_the_dense_network(self):
        with pytest.raises(ValueError, match="channels are those of a dense network: pass dense as a model"):
            repair(seeded(chain), "running", CALIBRATION, method="channelwise", channels={"0": [0]})

    def test_dense_statistics_say_to_pass_the_network(self):
        dense, _, small, _ = pair(chain)
        statistics = resuscitate.DenseStatistics.measure(dense, CALIBRATION, progress=False)
        with pytest.raises(ModelMismatchError, match="or pass that model where channels are removed"):
            run(small, statistics, method="channelwise")
