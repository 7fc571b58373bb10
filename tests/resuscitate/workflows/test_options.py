"""Which options each method has: an option of another one, or out of its range, is refused before anything is read."""

import copy
from dataclasses import fields
from inspect import signature
from unittest.mock import Mock

import pytest
import torch
from torch import nn

import resuscitate
from resuscitate import ASR, EMA, Exact, Masks, compress, recoverability, regrow, repair
from resuscitate.engine.measure import measure
from resuscitate.errors import CalibrationError
from resuscitate.methods.base import option_names, registered
from resuscitate.network.runner import Network
from resuscitate.runtime.options import DEFAULTS, run_options
from tests.networks import chain, images, pruned_copy, seeded

METHODS = registered()
GAINS = ("layerwise", "channelwise", "asr")
CHANGING = (*GAINS, "refit", "mean")  # methods that change layers
# fields of methods, other than the default, and in range
FIELDS = {"prior": "mean", "bias": False, "eps": 1e-3, "ridge": 0.5, "relu_aware": False, "means": "kernel"}
# options of `repair` that not every method reads, and the methods that do
SOME = {
    "schedule": ("parallel", GAINS),
    "gain_samples": (9, (*GAINS, "refit")),
    "diagnostics": (True, (*GAINS, "refit")),
    "include": (["3", "11"], CHANGING),
    "exclude": (nn.Linear, CHANGING),
    "masks": (Masks.from_zeros(pruned_copy(seeded(chain))), CHANGING),
    "skip_first": (False, CHANGING),
    "skip_last": (False, CHANGING),
}
# fields of the recalibrations
RECALIBRATIONS = {"samples": 9, "batches": 2, "batch_size": 4, "momentum": 0.5, "frozen": "recalibrate"}


def never():
    raise AssertionError("the images were read")


def refused(message, method="asr", error=ValueError, **options):
    dense = seeded(chain)
    model = pruned_copy(dense)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        repair(model, dense, never, method=method, **options)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_each_option_of_a_method_is_tried_here():
    assert FIELDS.keys() == option_names()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("option", FIELDS)
def test_an_option_is_a_field_of_its_methods_and_refused_by_the_others(option, method):
    dense, given = seeded(chain), {option: FIELDS[option]}
    if option in {field.name for field in fields(METHODS[method])}:
        by_name, by_object = pruned_copy(dense), pruned_copy(dense)
        report = repair(by_name, dense, images(), method=method, **given)
        repair(by_object, dense, images(), method=METHODS[method](**given))
        assert report.options[option] == FIELDS[option]
        torch.testing.assert_close(by_name.state_dict(), by_object.state_dict(), rtol=0, atol=0)
    else:
        message = rf"method '{method}' has no option '{option}'; it is for method"
        refused(message, method, TypeError, **given)
        with pytest.raises(TypeError, match=option):
            METHODS[method](**given)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("option", SOME)
def test_an_option_of_a_repair_is_read_by_its_methods_and_refused_by_the_others(option, method):
    value, readers = SOME[option]
    if method in readers:
        dense = seeded(chain)
        assert repair(pruned_copy(dense), dense, images(), method=method, **{option: value}).images
    elif option == "schedule" and method != "bn":
        refused("runs with schedule='sequential' only", method, schedule="parallel")
    else:
        refused(rf"{option}\b.* is for methods.*, not '{method}'", method, **{option: value})


def test_an_option_belongs_to_a_method_that_is_given_as_an_object():
    refused("prior: give it to the method, method=ASR\\(prior=...\\)", ASR(), TypeError, prior="mean")


@pytest.mark.parametrize("mode", [Exact, EMA], ids=lambda mode: mode.name)
@pytest.mark.parametrize("option", RECALIBRATIONS)
def test_an_option_of_a_recalibration_is_a_field_of_it_and_refused_by_the_other(option, mode):
    given = {option: RECALIBRATIONS[option]}
    if option in {field.name for field in fields(mode)}:
        cut = {"batches": 1, "batch_size": 8} if mode is EMA else {}
        assert resuscitate.recalibrate_batchnorm(seeded(chain), images(), mode=mode(**cut | given)).layers
    else:
        with pytest.raises(TypeError, match=option):
            mode(**given)
    if option != "batch_size":  # which is a run-time option too
        refused(f"has no option '{option}'", "bn", TypeError, recalibrate=mode.name, **given)


@pytest.mark.parametrize("method", METHODS)
def test_a_default_may_be_given_by_name_whatever_the_method(method):
    dense = seeded(chain)
    own = {each.name: each.default for each in signature(repair).parameters.values() if each.kind is each.KEYWORD_ONLY}
    given = {**own, **DEFAULTS, "method": method}
    assert repair(pruned_copy(dense), dense, images(), **given).method == method


def test_the_message_says_what_auto_stands_for():
    refused(
        "method 'refit', which 'auto' stands for here, has no option 'prior'; it is for method 'asr'",
        "auto",
        TypeError,
        prior="mean",
    )
    refused("method 'asr', which 'auto' stands for here", "auto", TypeError, schedule="parallel", ridge=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": "nonsense"}, "prior='nonsense' must be 'median', 'mean' or a positive variance"),
        ({"prior": 0}, "prior=0 must be"),
        ({"eps": -1e-8}, "eps=-1e-08 must be at least 0"),
        ({"eps": float("nan")}, "eps=nan must be"),
        ({"method": "refit", "ridge": -5}, "ridge=-5 must be at least 0"),
        ({"method": "refit", "ridge": float("inf")}, "ridge=inf must be"),
        ({"method": "refit", "means": "layer"}, "means='layer' is unknown; there are 'filter', 'kernel'"),
        ({"method": "asr", "schedule": "parallel", "diagnostics": True}, "schedule='sequential'"),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_an_option_out_of_range_is_refused(options, message):
    refused(message, **options)


@pytest.mark.parametrize(
    ("mode", "given", "error", "message"),
    [
        (EMA, {"batches": 0}, ValueError, "batches=0 must be at least 1"),
        (EMA, {"batch_size": 2.5}, TypeError, "batch_size=2.5 must be a whole number"),
        (EMA, {"momentum": 0.0}, ValueError, "momentum=0.0 must be above 0 and at most 1"),
        (EMA, {"frozen": "thaw"}, ValueError, "frozen='thaw' is unknown; there are 'keep', 'recalibrate'"),
        (Exact, {"samples": 0}, ValueError, "samples=0 must be at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_field_of_a_recalibration_out_of_range_is_refused(mode, given, error, message):
    with pytest.raises(error, match=message):
        mode(**given)


def test_too_few_images_for_a_momentum_are_noticed_before_a_layer_is_changed(monkeypatch):
    monkeypatch.setattr("resuscitate.engine.writer.write_change", lambda *_: pytest.fail("a layer was refitted"))
    dense = seeded(chain)
    with pytest.raises(CalibrationError, match="20 batches of 128 need 2560 images and there are 24"):
        repair(pruned_copy(dense), dense, images(), recalibrate="ema")


class TestElsewhere:
    def test_compress_refuses_before_it_reads(self):
        with pytest.raises(ValueError, match="ridge=-5 must be at least 0"):
            compress(seeded(chain), 0.8, never, ridge=-5)

    def test_regrow_refuses_an_unknown_method_before_it_reads_and_takes_every_known_one(self):
        dense = seeded(chain)
        model = pruned_copy(dense)
        masks = Masks.from_zeros(model)
        with pytest.raises(ValueError, match="method='magic' is unknown"):
            regrow(model, dense, masks, 0.4, never, method="magic")
        for method in ("bn", "asr", "refit"):
            grown = regrow(pruned_copy(dense), dense, masks, 0.4, images(), method=method)
            assert grown.rounds[0].report.method == method

    @pytest.mark.parametrize("options", [{"method": "mean"}, {"means": "filter"}], ids=["mean", "refit"])
    def test_means_of_pruned_weights_are_given_once(self, options):
        dense = seeded(chain)
        model = pruned_copy(dense)
        with pytest.raises(ValueError, match=r"gives means to pruned weights, and only once: choose steps=1, or"):
            compress(seeded(chain), 0.5, never, **options)
        with pytest.raises(ValueError, match=r"gives means to pruned weights, and only once: choose rounds=1, or"):
            regrow(model, dense, Masks.from_zeros(model), 0.4, never, rounds=2, **options)
        assert compress(seeded(chain), 0.5, images(), steps=1, **options).masks.sparsity == 0.5
        assert regrow(model, dense, Masks.from_zeros(model), 0.4, images(), **options).rounds

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"method": "asr", "ridge": 1.0},
                "method 'mine': method 'asr' has no option 'ridge'; it is for method 'refit'",
            ),
            ({"prior": "mean"}, "method 'mine': method 'refit', which 'auto' stands for here, has no option 'prior'"),
            ({"method": "magic"}, "method 'mine': method='magic' is unknown"),
            ({"past": 0.5, "method": "magic"}, "method 'mine': method='magic' is unknown"),
            ({"past": 0.5, "budget": "fair"}, "method 'mine': budget='fair' is unknown"),
        ],
        ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
    )
    def test_a_map_refuses_before_it_reads(self, options, message):
        with pytest.raises(TypeError if "no option" in message else ValueError, match=message):
            recoverability(seeded(chain), never, lambda model: 50.0, methods={"mine": options})


class TestRefitAndRecalibration:
    """`recalibrate` does not change the method: a refit is not cancelled, and BatchNorm follows it."""

    @pytest.mark.parametrize(
        ("recalibrate", "share"), [("exact", 0.2), (EMA(batches=10, batch_size=20), 1.0)], ids=["exact", "ema"]
    )
    def test_it_comes_nearer_than_batchnorm_alone_and_keeps_the_zeros(self, recalibrate, share):
        dense, x, errors = seeded(chain), images(200), {}
        for method in ("auto", "bn"):
            model = pruned_copy(dense, 0.8)
            masks = Masks.from_zeros(model)
            report = repair(model, dense, x, method=method, recalibrate=recalibrate)
            masks.check(model)
            with torch.no_grad():
                errors[report.method] = float((model(x) - dense(x)).square().mean())
        assert errors["refit"] < share * errors["bn"]

    def test_the_classifier_is_fitted_where_its_inputs_are_final(self):
        dense, rows = seeded(chain), []
        for recalibrate in ("exact", EMA(batches=2, batch_size=8)):
            report = repair(pruned_copy(dense), dense, images(), recalibrate=recalibrate)
            rows += [(row.status, row.reason) for row in report.layers if row.name == "11"]
        assert rows == [("refitted", ""), ("skipped", "the last layer, whose inputs are not matched")]

    def test_each_batchnorm_ends_with_what_reaches_it(self):
        dense = seeded(chain)
        model = pruned_copy(dense, 0.8)
        repair(model, dense, images(), recalibrate="exact")
        with torch.no_grad():
            found = measure(Network(model), [images()], ["0", "3", "6"])
        for name, behind in (("0", 1), ("3", 4), ("6", 7)):
            torch.testing.assert_close(model[behind].running_mean.double(), found[name][0].mean, rtol=1e-4, atol=1e-5)

    def test_diagnostics_of_a_refit_are_what_it_explains(self):
        dense = seeded(chain)
        plain, asked = pruned_copy(dense), pruned_copy(dense)
        first = repair(plain, dense, images())
        second = repair(asked, dense, images(), diagnostics=True)
        assert second.method == "refit"
        assert [row.explained for row in first.layers] == [row.explained for row in second.layers]
        assert all(row.explained is not None for row in first.layers)


@pytest.mark.parametrize("reason", [AssertionError("Torch not compiled with X"), RuntimeError("no such")])
def test_a_device_that_torch_cannot_use_is_refused_with_the_reason(reason, monkeypatch):
    refused("device='gpu' cannot be used: .*; name another, such as 'cpu', or leave device out", device="gpu")
    monkeypatch.setattr(torch, "empty", Mock(side_effect=reason))
    with pytest.raises(ValueError, match=f"device='cuda:7' cannot be used: {reason}; name another"):
        run_options("repair()", {"device": torch.device("cuda:7")})
