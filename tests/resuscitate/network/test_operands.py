"""The operands of a layer's product are those of its `forward`, whatever its attributes are."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import resuscitate
from resuscitate.errors import LayerError
from resuscitate.network.operands import operands, product
from resuscitate.network.wiring import observe
from tests.networks import chain, images, pruned_copy, seeded


class Same(nn.Conv2d):
    """TensorFlow's "SAME" padding, which depends on the input size; odd padding is larger at the end."""

    def forward(self, x):
        pads = []
        for n, k, s, d in zip(x.shape[2:], self.kernel_size, self.stride, self.dilation, strict=True):
            total = max((math.ceil(n / s) - 1) * s + (k - 1) * d + 1 - n, 0)
            pads = [total // 2, total - total // 2, *pads]
        return super().forward(F.pad(x, pads))


class Halved(nn.Conv2d):
    """Scales its input, and calls `F.conv2d` itself."""

    def forward(self, x):
        return F.conv2d(input=0.5 * x, weight=self.weight, bias=self.bias, stride=2, padding=[1], groups=self.groups)


class Cropped(nn.Conv2d):
    """Leaves out a column, so that its output is not the product of its weight."""

    def forward(self, x):
        return super().forward(x)[..., 1:]


class Twice(nn.Conv2d):
    """Multiplies with its weight twice."""

    def forward(self, x):
        return super().forward(super().forward(x))


def set_later(layer, **attributes):
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


CONVOLUTIONS = {
    "plain": nn.Conv2d(4, 6, 3),
    "padded": nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(0, 2)),
    "same, even kernel": nn.Conv2d(4, 6, (4, 2), padding="same", dilation=(1, 3)),
    "valid": nn.Conv2d(4, 6, 3, padding="valid"),
    "circular": nn.Conv2d(4, 6, 3, padding=2, padding_mode="circular"),
    "reflected, same": nn.Conv2d(4, 6, 4, padding="same", padding_mode="reflect"),
    "grouped": nn.Conv2d(4, 6, 3, groups=2, dilation=2),
    "depthwise": nn.Conv2d(4, 4, 3, groups=4, padding=1),
    "padding set later": set_later(nn.Conv2d(4, 6, 3), padding=(2, 1)),
    "padding set later, a number": set_later(nn.Conv2d(4, 6, 3), padding=1),
    "padding set later, a word": set_later(nn.Conv2d(4, 6, 3), padding="same"),
    "stride and dilation set later": set_later(nn.Conv2d(4, 6, 3), stride=2, dilation=2),
    "TensorFlow's SAME": Same(4, 6, 3, stride=2),
    "TensorFlow's SAME, dilated": Same(4, 6, (3, 4), dilation=(2, 1)),
    "calls the function itself": Halved(4, 6, 3, groups=2),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("size", [(9, 10), (12, 7)], ids=str)
@pytest.mark.parametrize("layer", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_the_product_of_the_operands_is_the_output_of_the_layer(layer, size):
    x = torch.randn(2, 4, *size)
    read, window = operands("layer", layer, x)
    found = product(read, layer.weight, layer.bias, window)
    torch.testing.assert_close(found, layer(x))
    assert window.output(read.shape[2:]) == found.shape[2:]


@pytest.mark.parametrize("dims", [1, 3])
def test_convolutions_with_one_and_three_axes(dims):
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    layer, x = kind(2, 3, 3, padding=1, stride=2), torch.randn(2, 2, *[7] * dims)
    read, window = operands("layer", layer, x)
    assert read is x
    assert window.padding == ((1, 1),) * dims
    assert window.output(x.shape[2:]) == layer(x).shape[2:]


def test_a_linear_layer_has_no_window():
    x = torch.randn(2, 5, 4)
    read, window = operands("layer", nn.Linear(4, 3), x)
    assert read is x
    assert not window.kernel


def test_a_layer_that_never_multiplies_its_own_weight_is_named():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)

    with pytest.raises(
        LayerError, match=r"'layer': Standardised\.forward does not multiply with the layer's own weight"
    ):
        operands("layer", Standardised(4, 6, 3), torch.randn(1, 4, 9, 9))


def test_one_forward_pass_shows_which_layers_are_products():
    layers = {name: copy.deepcopy(layer) for name, layer in CONVOLUTIONS.items()}
    layers |= {"linear": nn.Linear(9, 5), "cropped": Cropped(4, 4, 3, padding=1), "twice": Twice(4, 4, 3)}
    layers |= {"transposed": nn.ConvTranspose2d(4, 4, 3)}
    model = nn.ModuleDict({name.replace(".", ""): layer for name, layer in layers.items()})
    nn.utils.prune.l1_unstructured(model["plain"], "weight", 0.5)
    wiring = observe(model, lambda: [layer(torch.randn(2, 4, 9, 9)) for layer in model.values()])
    assert wiring.products == layers.keys() - {"cropped", "twice", "transposed"}


def test_a_layer_is_no_product_if_one_of_its_calls_is_not():
    class Sometimes(nn.Conv2d):
        def forward(self, x):
            found = super().forward(x)
            return found if x.mean() > 0 else 2 * found

    model = nn.ModuleList([Sometimes(3, 3, 1)])
    one = torch.ones(1, 3, 4, 4)
    assert observe(model, lambda: model[0](one)).products == {"0"}
    assert observe(model, lambda: (model[0](one), model[0](-one))).products == set()


def with_third_layer(layer):
    model = seeded(chain)
    model[3] = layer
    return model


@pytest.mark.parametrize("method", ["refit", "asr"])
def test_padding_in_forward_and_by_attributes_gives_the_same_repair(method):
    plain = seeded(chain)[3]
    same, later = Same(8, 8, 3, bias=False), nn.Conv2d(8, 8, 3, bias=False)
    later.padding = (1, 1)
    found = []
    for layer in (plain, same, later):
        layer.load_state_dict(plain.state_dict())
        dense = with_third_layer(layer)
        model = pruned_copy(dense)
        report = resuscitate.repair(model, dense, images(), method=method, skip_first=False)
        assert report.layers[1].status == ("refitted" if method == "refit" else "repaired")
        found.append(model.state_dict())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)


def test_a_refit_corrects_a_layer_that_is_no_product_by_a_gain():
    dense = with_third_layer(Cropped(8, 8, 3, padding=1, bias=False))
    report = resuscitate.repair(pruned_copy(dense), dense, images(), method="refit")
    row = next(row for row in report.layers if row.name == "3")
    assert row.gain is not None
    assert row.status == "repaired"


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_strided_layers_with_odd_padding_are_refitted_and_compressed(stride):
    dense = with_third_layer(Same(8, 8, (4, 3), stride=stride, bias=False))
    model = pruned_copy(dense)

    def error():
        return (model(images(seed=9)) - dense(images(seed=9))).square().mean()

    with torch.no_grad():
        before = error()
        masks = resuscitate.Masks.from_zeros(model)
        report = resuscitate.repair(model, dense, images(64))
        assert error() < 0.5 * before
        masks.check(model)
        report.undo()
        assert error() == before
        model = copy.deepcopy(dense)
        resuscitate.compress(model, 0.5, images(64), steps=2)
        assert error() < before


def test_a_wide_layer_that_pads_in_forward_is_refitted_in_blocks(monkeypatch):
    monkeypatch.setattr("resuscitate.statistics.patches.WIDEST", 40)
    dense = with_third_layer(Same(8, 8, 3, stride=2, bias=False))
    model = pruned_copy(dense)
    report = resuscitate.repair(model, dense, images(64))
    row = next(row for row in report.layers if row.name == "3")
    assert (row.status, row.reason) == ("refitted", "2 blocks of inputs")
    assert model(images()).isfinite().all()


@pytest.mark.real_data
@pytest.mark.slow
def test_the_keyword_network_is_refitted_from_its_real_weights(keywords):
    dense, clips, labels = keywords
    calibration, test, labels = clips[:250], clips[250:], labels[250:]

    def accuracy(model):
        with torch.no_grad():
            return float((model(test).argmax(1) == labels).double().mean())

    assert accuracy(dense) > 0.9
    model = copy.deepcopy(dense)
    resuscitate.sparsify(model, 0.5)
    assert accuracy(model) < 0.2
    report = resuscitate.repair(model, dense, calibration)
    assert {row.status for row in report.layers} == {"refitted"}
    assert accuracy(model) > 0.75


class Averaged(nn.Module):
    """Runs on the mean of its images, with or without a batch axis."""

    def __init__(self, keepdim):
        super().__init__()
        self.body, self.keepdim = nn.Sequential(*seeded(lambda: chain(batchnorm=False))[:5]), keepdim

    def forward(self, x):
        return self.body(x.mean(0, keepdim=self.keepdim))


def test_an_image_without_a_batch_axis_is_refitted_as_a_batch_of_one():
    found = []
    for keepdim in (False, True):
        dense = Averaged(keepdim)
        model = pruned_copy(dense)
        report = resuscitate.repair(model, dense, images(24).split(4), method="refit")
        assert {row.status for row in report.layers} == {"refitted"}
        found.append(model.state_dict())
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
