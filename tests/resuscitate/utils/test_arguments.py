"""An argument in the wrong place is an error that shows the correct call; nothing is changed or read."""

import copy

import pytest
import torch

import resuscitate
from resuscitate import DenseStatistics, Masks, Repairability, compress, damage, recoverability, regrow, repair
from resuscitate.errors import CalibrationError
from tests.networks import chain, images, pruned_copy, seeded

DENSE, X = seeded(chain), images()
MODEL = pruned_copy(DENSE)
MASKS = Masks.from_zeros(MODEL)
SCORE = resuscitate.Accuracy(X, torch.arange(len(X)) % 10)
REPAIR = r"write repair\(model, dense, images\), or repair\(model, images, method='bn'\)"
COMPRESS, REGROW = (
    r"write compress\(model, sparsity, images\)",
    r"write regrow\(model, dense, masks, sparsity, images\)",
)
SWAPPED = {
    "repair without a dense network": (lambda: repair(MODEL, X), f"dense must be a module.* not Tensor; {REPAIR}"),
    "repair with a list for it": (lambda: repair(MODEL, list(X.split(8)), method="asr"), f"not list; {REPAIR}"),
    "repair swapped": (lambda: repair(MODEL, X, DENSE), f"dense must be a module.* not Tensor; {REPAIR}"),
    "bn, images twice": (lambda: repair(MODEL, X, X, method="bn"), f"dense must be a module.* not Tensor; {REPAIR}"),
    "repair, two networks": (lambda: repair(MODEL, DENSE, DENSE), f"calibration must be images.*; {REPAIR}"),
    "repair, images first": (lambda: repair(X, MODEL, DENSE), f"model must be a torch.nn.Module, not Tensor; {REPAIR}"),
    "bn, a network for images": (
        lambda: resuscitate.recalibrate_batchnorm(MODEL, DENSE),
        r"calibration must be images.*Sequential; write recalibrate_batchnorm\(model, images\)",
    ),
    "repair, a list of masks": (
        lambda: repair(MODEL, DENSE, X, masks=[*MASKS.values()]),
        r"masks must be {layer: mask}, such as sparsify returns, not list; write repair\(.*masks=masks\)",
    ),
    "compress swapped": (lambda: compress(MODEL, X, 0.9), f"sparsity must be a number, not Tensor; {COMPRESS}"),
    "compress, two networks": (lambda: compress(MODEL, DENSE, X), f"sparsity must be a number.*; {COMPRESS}"),
    "compress, a network for images": (
        lambda: compress(MODEL, 0.9, DENSE),
        f"calibration must be images.*; {COMPRESS}",
    ),
    "regrow, masks second": (lambda: regrow(MODEL, MASKS, DENSE, 0.4, X), f"dense must be .* not Masks; {REGROW}"),
    "regrow, sparsity third": (lambda: regrow(MODEL, DENSE, 0.4, MASKS, X), f"masks must be .* not float; {REGROW}"),
    "regrow, images fourth": (lambda: regrow(MODEL, DENSE, MASKS, X, 0.4), f"sparsity must be .* Tensor; {REGROW}"),
    "a map swapped": (lambda: recoverability(X, DENSE, SCORE), r"write recoverability\(dense, images, evaluate\)"),
    "a map, no function": (lambda: recoverability(DENSE, X, X), "evaluate must be a function, not Tensor"),
    "damage swapped": (lambda: damage(MODEL, X, DENSE), r"write damage\(model, dense, images\)"),
    "statistics swapped": (
        lambda: DenseStatistics.measure(X, DENSE),
        r"write DenseStatistics\.measure\(dense, images\)",
    ),
    "repairability swapped": (
        lambda: Repairability.measure(X, DENSE),
        r"write Repairability\.measure\(model, images\)",
    ),
}
MISSING = {
    "repair": (lambda: repair(MODEL, DENSE), REPAIR),
    "bn": (lambda: repair(MODEL, method="bn"), REPAIR),
    "bn by its own name": (lambda: resuscitate.recalibrate_batchnorm(MODEL), r"recalibrate_batchnorm\(model, images\)"),
    "compress": (lambda: compress(MODEL, 0.9, None), COMPRESS),
    "regrow": (lambda: regrow(MODEL, DENSE, MASKS, 0.4, None), REGROW),
}


@pytest.mark.parametrize(("call", "message"), SWAPPED.values(), ids=SWAPPED)
def test_the_error_for_an_argument_in_the_wrong_place_shows_the_correct_call(call, message):
    before = copy.deepcopy(MODEL.state_dict())
    with pytest.raises(TypeError, match=message) as caught:
        call()
    assert len(str(caught.value)) < 250  # no tensor is printed
    assert all(torch.equal(value, before[key]) for key, value in MODEL.state_dict().items())


@pytest.mark.parametrize(("call", "message"), MISSING.values(), ids=MISSING)
def test_the_error_for_missing_images_shows_the_correct_call(call, message):
    with pytest.raises(CalibrationError, match=f"calibration is missing: pass images, .*{message}"):
        call()


@pytest.mark.parametrize(
    "give",
    [
        lambda x: x,
        lambda x: x.numpy(),
        lambda x: list(x.split(7)),
        lambda x: torch.utils.data.DataLoader(x, batch_size=7),
        lambda x: iter(x.split(7)),
        lambda x: lambda: x.split(7),
    ],
    ids=["tensor", "array", "list", "loader", "iterator", "function"],
)
def test_method_bn_accepts_images_as_the_second_argument(give):
    second, third = copy.deepcopy(MODEL), copy.deepcopy(MODEL)
    repair(second, give(X), method="bn", batch_size=7)
    repair(third, DENSE, X, method="bn", batch_size=7)
    torch.testing.assert_close(second.state_dict(), third.state_dict(), rtol=1e-5, atol=1e-6)
    assert not torch.equal(second[1].running_var, MODEL[1].running_var)


def test_the_error_for_a_sparsity_that_is_not_a_number_does_not_print_it():
    with pytest.raises(TypeError, match=r"^sparsity is of type Tensor; give a float"):
        resuscitate.sparsify(seeded(chain), X)


@pytest.mark.parametrize("act", [resuscitate.sparsify, resuscitate.allocate], ids=lambda act: act.__name__)
def test_images_in_place_of_the_model_are_an_error(act):
    with pytest.raises(TypeError, match=r"the model must be a torch\.nn\.Module, not Tensor; pass the model first"):
        act(X, 0.9)
