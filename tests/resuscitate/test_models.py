"""The models of the package: their shapes, their keys, and the trained weights that they load."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from resuscitate.data.images import load_images, load_labels
from resuscitate.models import MODELS, BasicBlock, build
from tests.networks import DATA

JPEG_TEST = DATA / "cifar10_jpeg_test.npz"
NORMALISE = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@pytest.mark.parametrize("name", MODELS)
def test_every_model_maps_a_batch_of_images_to_ten_logits(name):
    model = build(name).eval()
    images = torch.randn(2, 1, 8, 8) if name == "digitnet" else torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert model(images).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "layers", "parameters"),
    [
        # He et al. (2015), table 6: 0.27 M, 0.46 M, 0.66 M, 0.85 M
        ("resnet20", 20, 269_722),
        ("resnet32", 32, 464_154),
        ("resnet44", 44, 658_586),
        ("resnet56", 56, 853_018),
    ],
)
def test_the_cifar_resnets_have_the_layers_and_the_parameters_of_the_paper(name, layers, parameters):
    model = build(name)
    assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules()) == layers
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("name", MODELS)
def test_torch_fx_traces_every_model_and_computes_the_same(name):
    model = build(name).eval()
    images = torch.randn(2, 1, 8, 8) if name == "digitnet" else torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(torch.fx.symbolic_trace(model)(images), model(images))


def test_the_shortcut_takes_every_other_pixel_and_pads_zero_channels_on_both_sides():
    x = torch.randn(2, 4, 5, 5)
    shortcut = BasicBlock(4, 8, stride=2).shortcut(x)
    assert shortcut.shape == (2, 8, 3, 3)
    assert torch.equal(shortcut[:, 2:6], x[:, :, ::2, ::2])
    assert shortcut[:, :2].eq(0).all()
    assert shortcut[:, 6:].eq(0).all()


def test_a_block_that_keeps_the_shape_adds_its_input_unchanged():
    x = torch.randn(2, 4, 5, 5)
    assert BasicBlock(4, 4).shortcut(x) is x


def test_build_gives_a_new_model_each_time():
    assert build("digitnet") is not build("digitnet")


def test_an_unknown_model_name_lists_the_names_and_guesses():
    with pytest.raises(ValueError, match=r"'resnet18' \(did you mean 'resnet.*'\?\).*digitnet, resnet20, resnet32"):
        build("resnet18")


@pytest.mark.real_data
@pytest.mark.skipif(not JPEG_TEST.exists(), reason="trained networks and CIFAR-10 not found; set RESUSCITATE_DATA")
@pytest.mark.parametrize(
    ("name", "accuracy"),
    [
        # measured on these 2,000; on all 10,000 images 81.03 and 82.56 %
        ("resnet20", 81.45),
        ("resnet32", 82.80),
    ],
)
def test_the_trained_weights_load_strictly_and_reach_their_accuracy(name, accuracy):
    model = build(name).eval()
    model.load_state_dict(load_file(DATA / f"cifar10_{name}.safetensors"), strict=True)
    first = {"max_samples": 2000, "seed": None}
    images, labels = load_images(JPEG_TEST, **NORMALISE, **first), load_labels(JPEG_TEST, **first)
    with torch.no_grad():
        hits = torch.cat([model(batch).argmax(1) for batch in images.split(250)]) == labels
    # other rounding or JPEG decoding on another machine can change the class of a few images
    assert 100 * hits.float().mean().item() == pytest.approx(accuracy, abs=0.3)
