"""Layers whose output does not follow a change of weight or bias are found by experiment, and stay unchanged."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import resuscitate
from resuscitate.errors import LayerError
from resuscitate.network.layer_checks import objections
from tests.compare import same
from tests.networks import chain, images, pruned_copy, seeded


class Standardised(nn.Conv2d):
    """Weight standardisation."""

    def forward(self, x):
        mean, std = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) / (std + 1e-5), self.bias)


class ThroughConvForward(nn.Conv2d):
    """A normalised weight in `_conv_forward` instead of `forward`."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, F.normalize(weight, dim=1), bias)


class Activated(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).relu()


class TwoBranches(nn.Conv2d):
    """An update of low rank beside the convolution."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.down, self.up = nn.Parameter(torch.randn(2, 8, 1, 1)), nn.Parameter(torch.randn(8, 2, 1, 1))

    def forward(self, x):
        return super().forward(x) + F.conv2d(F.conv2d(x, self.down), self.up)


class Transposed(nn.Conv2d):
    """An output with the channels on the last axis, which is as long as the axis of the channels should be."""

    def forward(self, x):
        return super().forward(x).movedim(1, -1)


class Harmless(nn.Conv2d):
    """A `forward` that does not change the layer's output."""

    def forward(self, x):
        return super().forward(x * 1.0)


class Masked(nn.Linear):
    """A layer with two inputs cannot be tested."""

    def forward(self, x, mask):
        return super().forward(x) * mask


def children(state, prefix):
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def with_layer(layer):
    model = seeded(chain)
    model[3] = layer
    return model


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Standardised, "does not compute with its weight as it is"),
        (ThroughConvForward, "does not compute with its weight as it is"),
        (Activated, "does more to its output than add a bias"),
        (TwoBranches, "adds more than a bias to the product with its weight"),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
class TestLayersThatWouldLoseAGainOrAShift:
    def test_they_are_unchanged_and_the_others_are_repaired(self, kind, message, bias):
        dense = with_layer(kind(8, 8, 3, padding=1, bias=bias))
        model = pruned_copy(dense)
        before = copy.deepcopy(model.state_dict())
        report = resuscitate.repair(model, dense, images())
        rows = {row.name: row for row in report.layers}
        assert rows["3"].status == "unchanged"
        assert rows["3"].reason.startswith(f"{kind.__name__} {message}")
        assert {rows[name].status for name in ("0", "6", "11")} == {"refitted"}
        torch.testing.assert_close(model[3].state_dict(), children(before, "3."), rtol=0, atol=0)
        report.undo()
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)

    def test_they_stay_dense_with_a_warning(self, kind, message, bias, caplog):
        dense = with_layer(kind(8, 8, 3, padding=1, bias=bias))
        model = copy.deepcopy(dense)
        masks = resuscitate.sparsify(model, 0.5)
        assert sorted(masks) == ["0", "11", "6"]
        assert f"1 of 4 layers are left dense: '3': {kind.__name__} {message}" in caplog.text
        assert torch.equal(model[3].weight, dense[3].weight)
        report = resuscitate.compress(copy.deepcopy(dense), 0.5, images(), steps=1)
        assert "3" not in report.masks

    def test_they_are_refused_by_name_where_no_other_layer_is_selected(self, kind, message, bias):
        dense = with_layer(kind(8, 8, 3, padding=1, bias=bias))
        model = pruned_copy(dense)
        before = copy.deepcopy(model.state_dict())
        for act in (
            lambda: resuscitate.repair(model, dense, images(), include="3"),
            lambda: resuscitate.sparsify(model, 0.5, include="3"),
            lambda: resuscitate.compress(model, 0.5, images(), steps=1, include="3"),
        ):
            with pytest.raises(LayerError, match=rf"'3': {kind.__name__} {message}.*no other layer is selected"):
                act()
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "layer",
    [
        Harmless(8, 8, 3, padding=1),
        Harmless(8, 8, 3, padding="same", padding_mode="circular"),
        Harmless(8, 8, 3, groups=8, dilation=2),
        Masked(4, 4),
        nn.ConvTranspose2d(8, 8, 3, groups=2),
        nn.Linear(5, 3).double(),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_that_compute_with_their_weight_have_no_objection(layer):
    state = torch.get_rng_state()
    assert objections({"layer": layer}) == {}
    assert torch.equal(torch.get_rng_state(), state)


def test_a_fully_pruned_layer_and_one_in_training_have_no_objection():
    empty = Harmless(8, 8, 3)
    nn.init.zeros_(empty.weight)
    assert objections({"empty": empty, "training": Harmless(8, 8, 3).train()}) == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_short_dtype_or_the_callers_autocast_causes_no_objection(dtype):
    layer = Harmless(8, 8, 3, padding=1)
    assert objections({"layer": copy.deepcopy(layer).to(dtype)}) == {}
    assert objections({"layer": Standardised(8, 8, 3).to(dtype)}).keys() == {"layer"}
    with torch.autocast("cpu", dtype):
        assert objections({"layer": layer}) == {}


def test_swapped_models_are_refused():
    dense = seeded(chain)
    pruned = pruned_copy(dense, 0.5)
    before = copy.deepcopy(dense)
    with pytest.raises(resuscitate.ModelMismatchError, match="50% of the dense model's weights are zero, and 0% of"):
        resuscitate.repair(dense, pruned, images())
    assert same(dense, before)
    resuscitate.repair(pruned, dense, images())


class Recurrent(nn.Module):
    """A convolution, an LSTM over its columns, a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.lstm, self.head = nn.LSTM(28, 8, batch_first=True), nn.Linear(8, 5)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu().permute(0, 3, 1, 2).flatten(2)
        return self.head(self.lstm(x)[0][:, -1])


@pytest.mark.parametrize("removed", [True, False])
def test_weights_that_nothing_repairs_are_named_where_they_are_pruned(removed, caplog):
    dense = seeded(Recurrent)
    model = pruned_copy(dense)
    assert resuscitate.repair(copy.deepcopy(model), dense, images()).notes == []
    for name in ("weight_ih_l0", "weight_hh_l0"):
        prune.l1_unstructured(model.lstm, name, 0.5)
        if removed:
            prune.remove(model.lstm, name)
    report = resuscitate.repair(model, dense, images())
    assert "unchanged, but not as in the dense network: " in (note := "".join(report.notes))
    assert "lstm.weight_ih_l0" in note
    assert "lstm.weight_hh_l0" in note
    assert note in caplog.text


def test_layers_that_get_a_bias_are_named():
    def build():
        return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 4, 1))

    dense = seeded(build)
    model = pruned_copy(dense)
    before = model.state_dict().keys()
    report = resuscitate.repair(model, dense, images(), keep_worse=True)
    assert model.state_dict().keys() - before == {"0.bias"}
    assert report.notes == ["layers that had no bias have one now, so the state dict has new keys: 0.bias"]
    report.undo()
    assert model.state_dict().keys() == before
    chained = seeded(chain)
    assert resuscitate.repair(pruned_copy(chained), chained, images()).notes == []


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_quantized_layer_of_the_same_name_is_named_with_its_module():
    dense = seeded(chain)
    dense[11] = torch.ao.nn.quantized.dynamic.Linear(dense[11].in_features, dense[11].out_features)
    plain = r"'11' is torch.nn.modules.linear.Linear in .* and torch.ao.nn.quantized.dynamic.modules.linear.Linear in"
    with pytest.raises(resuscitate.ModelMismatchError, match=plain):
        resuscitate.repair(pruned_copy(seeded(chain)), dense, images())


class ChannelsFirst(nn.Linear):
    """A linear layer as a 1x1 convolution."""

    def forward(self, x):
        return F.conv2d(x, self.weight[:, :, None, None], self.bias)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Transposed(8, 8, 3), "has no axis of 8 channels"),
        (Transposed(8, 3, 3), "does more to its output than add a bias"),  # maps of 3x3
        (ChannelsFirst(8, 8), "has no axis of 8 channels"),
        (ChannelsFirst(8, 3), "does more to its output than add a bias"),
    ],
)
def test_layers_with_channels_on_another_axis_are_unchanged(layer, message):
    assert objections({"layer": layer})["layer"].startswith(f"{type(layer).__name__} {message}")


class Adapted(nn.Linear):
    """A linear layer that contains two others, and adds nothing as long as the second is zero."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Linear(inputs, 2, bias=False), nn.Linear(2, outputs, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return super().forward(x) + self.up(self.down(x))


@pytest.mark.parametrize("method", ["refit", "channelwise"])
def test_a_layer_that_contains_others_is_unchanged(method):
    dense = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(243, 16), nn.ReLU(), Adapted(16, 5)))
    report = resuscitate.repair(pruned_copy(dense), dense, images(), method=method, exclude=["3.up", "3.down"])
    rows = {row.name: (row.status, row.reason) for row in report.layers}
    assert rows["3"] == ("unchanged", "it contains another layer, '3.down'")
    assert rows["1"][0] != "unchanged"


@pytest.mark.parametrize("function", [resuscitate.repair, resuscitate.damage])
def test_a_dense_network_with_further_layers_is_refused(function):
    dense = seeded(lambda: nn.Sequential(*chain(), nn.ReLU(), nn.Linear(10, 10)))
    with pytest.raises(resuscitate.ModelMismatchError, match="layers that the pruned one lacks: 13; pass the"):
        function(pruned_copy(seeded(chain)), dense, images())


@pytest.mark.parametrize("which", ["the model", "the dense model"])
def test_a_weight_that_is_not_finite_is_named_and_not_the_images(which):
    dense = seeded(chain)
    model = pruned_copy(dense)
    (model if which == "the model" else dense)[3].weight.data[2, 1] = torch.nan
    with pytest.raises(LayerError, match=f"layer '3': 'weight' has values in {which} that are NaN or infinite"):
        resuscitate.repair(model, dense, images())


@pytest.mark.parametrize("seed", [0, 1])
def test_a_dense_network_whose_weights_are_of_another_one_is_warned_of(seed, caplog):
    wide = partial(chain, width=32)
    resuscitate.repair(pruned_copy(seeded(wide), 0.9), seeded(wide, seed), images(), method="asr")
    assert ("was its checkpoint loaded?" in caplog.text) == (seed == 1)
