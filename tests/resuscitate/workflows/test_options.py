"""What each method reads: an option of another one, or out of its range, is refused before anything is read."""

import copy
from typing import get_args

import pytest
import torch
from torch import nn

import resuscitate
from resuscitate import Masks, compress, recoverability, regrow, repair
from resuscitate.engine.measure import measure
from resuscitate.errors import CalibrationError
from resuscitate.methods.choices import READ_BY, READ_WHERE, Method
from resuscitate.network.runner import Network
from resuscitate.workflows.repair import DEFAULTS
from tests.networks import chain, images, pruned_copy, seeded

METHODS = sorted(set(get_args(Method)) - {"auto"})
# other than the default, and in range
GIVEN = {
    "schedule": "parallel",
    "prior": "mean",
    "bias": False,
    "eps": 1e-3,
    "ridge": 0.5,
    "relu_aware": False,
    "means": "filter",
    "gain_samples": 9,
    "correlations": True,
    "include": ["3", "11"],
    "exclude": nn.Linear,
    "masks": Masks.from_zeros(pruned_copy(seeded(chain))),
    "skip_first": False,
    "skip_last": False,
    "recalibrate_samples": 9,
    "ema_batches": 2,
    "ema_batch_size": 4,
    "ema_momentum": 0.5,
    "frozen": "recalibrate",
}
METHOD_OF = {"exact": "bn", "ema": "bn", None: "asr"}


def never():
    raise AssertionError("the images were read")


def refused(message, method="asr", **options):
    dense = seeded(chain)
    model = pruned_copy(dense)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        repair(model, dense, never, method=method, **options)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("option", READ_BY)
def test_an_option_is_read_by_its_methods_and_refused_by_the_others(option, method):
    if method in READ_BY[option]:
        dense, rest = seeded(chain), {} if option != "skip_last" else {"schedule": "sequential"}
        assert repair(pruned_copy(dense), dense, images(), method=method, **{option: GIVEN[option]}, **rest).images
    elif option == "schedule" and method != "bn":
        refused("schedule='sequential'", method, schedule="parallel")
    else:
        refused(rf"{option}\b.* is for method.*, not '{method}'", method, **{option: GIVEN[option]})


@pytest.mark.parametrize("recalibrate", ["exact", "ema", None])
@pytest.mark.parametrize("option", READ_WHERE)
def test_an_option_of_a_recalibration_is_refused_where_there_is_another_or_none(option, recalibrate):
    if recalibrate in READ_WHERE[option]:
        cut = {"ema_batches": 1, "ema_batch_size": 8} if recalibrate == "ema" else {}
        options = {**cut, option: GIVEN[option]}
        assert resuscitate.recalibrate_batchnorm(seeded(chain), images(), mode=recalibrate, **options).layers
    else:
        method = METHOD_OF[recalibrate]
        message = rf"{option}=.* is for recalibrate=.*; method '{method}' runs with recalibrate={recalibrate!r}"
        refused(message, method, recalibrate=recalibrate, **{option: GIVEN[option]})


@pytest.mark.parametrize("method", METHODS)
def test_a_default_may_be_given_by_name_whatever_the_method(method):
    dense = seeded(chain)
    given = {name: value for name, value in DEFAULTS.items() if name not in ("model", "dense", "calibration", "method")}
    assert repair(pruned_copy(dense), dense, images(), method=method, **given).method == method


def test_the_message_says_what_auto_stands_for():
    refused("prior='mean' is for method 'asr', not 'refit', which 'auto' stands for here", "auto", prior="mean")
    refused(
        "ridge=0.5 is for methods 'refit' and 'two-stage', not 'asr', which", "auto", schedule="parallel", ridge=0.5
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": "nonsense"}, "prior='nonsense' must be 'median', 'mean' or a positive variance"),
        ({"prior": 0}, "prior=0 must be"),
        ({"eps": -1e-8}, "eps=-1e-08 must be at least 0"),
        ({"eps": float("nan")}, "eps=nan must be"),
        ({"method": "refit", "ridge": -5}, "ridge=-5 must be at least 0"),
        ({"method": "refit", "ridge": float("inf")}, "ridge=inf must be"),
        ({"method": "bn", "recalibrate": "ema", "ema_batches": 0}, "ema_batches=0 must be a whole number"),
        ({"method": "bn", "recalibrate": "ema", "ema_batch_size": 2.5}, "ema_batch_size=2.5 must be a whole number"),
        ({"method": "bn", "recalibrate": "ema", "ema_momentum": 0.0}, "ema_momentum=0.0 must be above 0"),
        ({"method": "asr", "schedule": "parallel", "correlations": True}, "schedule='sequential'"),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_an_option_out_of_range_is_refused(options, message):
    refused(message, **options)


def test_too_few_images_for_a_momentum_are_noticed_before_a_layer_is_changed(monkeypatch):
    monkeypatch.setattr("resuscitate.engine.corrections.write_weights", lambda *_: pytest.fail("a layer was refitted"))
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

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"method": "asr", "ridge": 1.0}, "method 'mine': ridge=1.0 is for methods 'refit' and 'two-stage'"),
            ({"prior": "mean"}, "method 'mine': prior='mean' is for method 'asr', not 'refit'"),
            ({"method": "magic"}, "method 'mine': method='magic' is unknown"),
            ({"past": 0.5, "method": "magic"}, "method 'mine': method='magic' is unknown"),
            ({"past": 0.5, "budget": "fair"}, "method 'mine': budget='fair' is unknown"),
        ],
        ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
    )
    def test_a_map_refuses_before_it_reads(self, options, message):
        with pytest.raises(ValueError, match=message):
            recoverability(seeded(chain), never, lambda model: 50.0, methods={"mine": options})


class TestRefitAndRecalibration:
    """`recalibrate` does not change the method: a refit is not cancelled, and BatchNorm follows it."""

    @pytest.mark.parametrize(("recalibrate", "share"), [("exact", 0.2), ("ema", 1.0)])
    def test_it_comes_nearer_than_batchnorm_alone_and_keeps_the_zeros(self, recalibrate, share):
        dense, x, errors = seeded(chain), images(200), {}
        cut = {"ema_batches": 10, "ema_batch_size": 20} if recalibrate == "ema" else {}
        for method in ("auto", "bn"):
            model = pruned_copy(dense, 0.8)
            masks = Masks.from_zeros(model)
            report = repair(model, dense, x, method=method, recalibrate=recalibrate, **cut)
            masks.check(model)
            with torch.no_grad():
                errors[report.method] = float((model(x) - dense(x)).square().mean())
        assert errors["refit"] < share * errors["bn"]

    def test_the_classifier_is_fitted_where_its_inputs_are_final(self):
        dense, actions = seeded(chain), []
        for options in ({"recalibrate": "exact"}, {"recalibrate": "ema", "ema_batches": 2, "ema_batch_size": 8}):
            report = repair(pruned_copy(dense), dense, images(), **options)
            actions.append({row.name: row.action for row in report.layers}["11"])
        assert actions == ["refitted", "skipped: the last layer, whose inputs are not matched"]

    def test_each_batchnorm_ends_with_what_reaches_it(self):
        dense = seeded(chain)
        model = pruned_copy(dense, 0.8)
        repair(model, dense, images(), recalibrate="exact")
        with torch.no_grad():
            found = measure(Network(model), [images()], ["0", "3", "6"])
        for name, behind in (("0", 1), ("3", 4), ("6", 7)):
            torch.testing.assert_close(model[behind].running_mean.double(), found[name][0].mean, rtol=1e-4, atol=1e-5)

    def test_correlations_of_a_refit_are_what_it_explains(self):
        dense = seeded(chain)
        plain, asked = pruned_copy(dense), pruned_copy(dense)
        first = repair(plain, dense, images())
        second = repair(asked, dense, images(), correlations=True)
        assert second.method == "refit"
        assert [row.explained for row in first.layers] == [row.explained for row in second.layers]
        assert all(row.explained is not None for row in first.layers)
