"""What a repair does to each kind of layer, and what it says about it."""

import copy
import csv
import io
import json
import logging

import pytest
import torch
from rich.console import Console
from torch import nn

import resuscitate
from resuscitate.engine.writer import Writer
from resuscitate.network.layers import channel_dim
from tests.networks import Residual, Zoo, chain, images, pruned_copy, seeded

LAYERS = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, bias=False), (16, 4, 20)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, dilation=2), (16, 4, 12, 12)),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (16, 4, 9, 9)),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), (16, 4, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 3), (8, 2, 5, 6, 7)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, bias=False), (16, 4, 20)),
    "transposed 2d grouped": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (16, 4, 9, 9)),
    "transposed 3d depthwise": (lambda: nn.ConvTranspose3d(4, 4, 2, groups=4), (8, 4, 3, 3, 3)),
    "linear": (lambda: nn.Linear(20, 6), (64, 20)),
    "linear on sequences": (lambda: nn.Linear(20, 6, bias=False), (8, 7, 20)),
}


def channel_statistics(layer, x):
    with torch.no_grad():
        y = layer(x).movedim(channel_dim(layer), 0).flatten(1)
    return y.mean(1), y.var(1, correction=0)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_every_kind_of_layer_gets_the_dense_mean_and_variance(kind, dtype):
    build, shape = LAYERS[kind]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype) + 0.5
    dense = seeded(lambda: nn.Sequential(build())).to(dtype)
    model = pruned_copy(dense, 0.4)
    resuscitate.repair(model, dense, x, method="channelwise", skip_first=False, eps=0.0, batch_size=3)
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(channel_statistics(model[0], x), channel_statistics(dense[0], x), **tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_models_are_repaired_in_their_precision(dtype):
    dense = seeded(chain).to(dtype)
    model = pruned_copy(dense, 0.8)
    before = (model(images().to(dtype)) - dense(images().to(dtype))).float().square().mean()
    resuscitate.repair(model, dense, images(), method="channelwise")
    after = (model(images().to(dtype)) - dense(images().to(dtype))).float().square().mean()
    assert after < before / 2


def test_frozen_parameters_are_repaired_and_stay_frozen():
    dense = seeded(chain)
    model, free = pruned_copy(dense).requires_grad_(False), pruned_copy(dense)
    resuscitate.repair(model, dense, images())
    resuscitate.repair(free, dense, images())
    torch.testing.assert_close(model.state_dict(), free.state_dict(), rtol=0, atol=0)
    assert not any(p.requires_grad for p in model.parameters())


def test_the_gain_acts_on_the_weights_and_on_the_old_bias_alike():
    """The erratum: b <- b + mean_d - gain * mean_p, as published, leaves a mean off by (1 - gain) * b_old."""
    dense = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3)))
    with torch.no_grad():
        dense[0].bias.copy_(torch.tensor([3.0, -2.0, 1.0, 5.0]))
    model = pruned_copy(dense, 0.7)
    old_bias, (mean_p, _) = model[0].bias.detach().clone(), channel_statistics(model[0], images())
    old_norm = model[0].weight.detach().flatten(1).norm(dim=1)
    resuscitate.repair(model, dense, images(), method="channelwise", skip_first=False)
    mean_d, mean = channel_statistics(dense[0], images())[0], channel_statistics(model[0], images())[0]
    torch.testing.assert_close(mean, mean_d, rtol=1e-4, atol=1e-5)

    gain = model[0].weight.detach().flatten(1).norm(dim=1) / old_norm
    as_published = copy.deepcopy(model)
    with torch.no_grad():
        as_published[0].bias.copy_(old_bias + mean_d - gain * mean_p)
    off = channel_statistics(as_published[0], images())[0] - mean_d
    torch.testing.assert_close(off, (1 - gain) * old_bias, rtol=1e-3, atol=1e-4)
    assert off.abs().max() > 0.1


def test_solving_leaves_the_moments_of_the_walk_as_they_were(monkeypatch):
    dense = seeded(chain)
    model = pruned_copy(dense)
    with torch.no_grad():
        [m for m in model.modules() if isinstance(m, nn.Conv2d)][1].weight[1] = 0
    solve, compared = Writer._solve, []

    def watched(self, measurement, solve_layer):
        # as rounding would leave it
        for moments in measurement.found.calls:
            moments.m2 = moments.m2 + 1e-12
        before = [moments.m2.clone() for moments in measurement.found.calls]
        update = solve(self, measurement, solve_layer)
        compared.extend(torch.equal(a, moments.m2) for a, moments in zip(before, measurement.found.calls, strict=True))
        return update

    monkeypatch.setattr(Writer, "_solve", watched)
    report = resuscitate.repair(model, dense, images(), method="channelwise")
    assert sum(row.dead for row in report.layers) >= 1
    assert compared
    assert all(compared)


def test_a_dead_filter_with_a_bias_is_dead_and_given_the_dense_mean():
    dense = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3)))
    model = copy.deepcopy(dense)
    with torch.no_grad():
        model[0].weight[1] = 0
    report = resuscitate.repair(model, dense, images(), method="channelwise", skip_first=False)
    assert report.layers[0].dead == 1
    assert model[0].weight[1].eq(0).all()
    wanted = channel_statistics(dense[0], images())[0][1]
    assert float(model[0].bias[1].detach()) == pytest.approx(float(wanted), rel=1e-5)


def test_the_first_convolution_is_skipped_unless_asked_for():
    dense = seeded(chain)
    model = pruned_copy(dense)
    first = model[0].weight.detach().clone()
    report = resuscitate.repair(model, dense, images(), method="asr")
    assert torch.equal(model[0].weight, first)
    assert (report.layers[0].status, report.layers[0].reason) == ("skipped", "its input is the image")
    resuscitate.repair(model, dense, images(), method="asr", skip_first=False)
    assert not torch.equal(model[0].weight, first)


def test_auto_is_a_refit_where_the_dense_model_is_followed_in_sequence_else_asr():
    dense, chosen = seeded(chain), []
    statistics = resuscitate.DenseStatistics.measure(dense, images())
    for target, options in (
        (dense, {}),
        (dense, {"recalibrate": None, "batch_size": 7}),
        (dense, {"diagnostics": True}),
        (dense, {"recalibrate": "exact"}),
        (dense, {"schedule": "parallel"}),
        (dense, {"schedule": "parallel", "prior": "mean", "bias": False}),
        (statistics, {}),
        (statistics, {"recalibrate": "exact"}),
        ("running", {}),
    ):
        chosen.append(resuscitate.repair(pruned_copy(dense), target, images(), **options).method)
    assert chosen == ["refit"] * 4 + ["asr"] * 5


def test_the_last_layer_is_skipped_where_its_inputs_are_not_matched():
    dense = seeded(chain)
    actions = {}
    for options in ({"schedule": "sequential"}, {"schedule": "parallel"}, {"recalibrate": "exact"}):
        report = resuscitate.repair(pruned_copy(dense), dense, images(), method="asr", **options)
        actions[tuple(options.values())] = {row.name: f"{row.status}: {row.reason}" for row in report.layers}["11"]
    skipped = "skipped: the last layer, whose inputs are not matched"
    assert actions == {("sequential",): "repaired: ", ("parallel",): skipped, ("exact",): skipped}


def test_include_and_exclude_select_by_glob_and_type():
    dense = seeded(Residual)
    report = resuscitate.repair(pruned_copy(dense), dense, images(), include=["conv*", nn.Linear], exclude="conv1")
    assert [row.name for row in report.layers] == ["conv2", "head"]


@pytest.mark.parametrize("method", ["channelwise", "refit"])
def test_a_second_repair_of_other_layers_keeps_the_first(method):
    dense, x = seeded(chain), images(40)
    model = pruned_copy(dense)
    resuscitate.repair(model, dense, x, method=method, include=["0", "3"], skip_first=False)
    first = {name: value.clone() for name, value in model.state_dict().items() if name[:2] in ("0.", "1.", "3.", "4.")}
    resuscitate.repair(model, dense, x, method=method, include=["6", "11"])
    assert all(torch.equal(model.state_dict()[name], value) for name, value in first.items())
    at_once = pruned_copy(dense)
    resuscitate.repair(at_once, dense, x, method=method, skip_first=False)
    torch.testing.assert_close(model.state_dict(), at_once.state_dict(), rtol=1e-4, atol=1e-5)


def test_an_output_with_two_readers_gets_a_new_bias_that_is_reported():
    dense = seeded(Residual)
    model = pruned_copy(dense)
    report = resuscitate.repair(model, dense, images(), method="channelwise")
    into = {row.name: row.shift_into for row in report.layers}
    assert into == {"stem": None, "conv1": "running_mean", "conv2": "new bias", "head": "bias"}
    assert set(model.state_dict()) - set(dense.state_dict()) == {"conv2.bias"}


def test_layers_that_never_run_are_unchanged_and_named():
    dense = seeded(Zoo)
    report = resuscitate.repair(pruned_copy(dense), dense, images())
    assert {row.name: (row.status, row.reason) for row in report.layers}["unused"] == (
        "unchanged",
        "no forward pass of the first images reaches it",
    )


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compile"])
def test_wrapped_models_are_unwrapped(wrap):
    dense = seeded(chain)
    plain, wrapped = pruned_copy(dense), pruned_copy(dense)
    resuscitate.repair(plain, dense, images())
    resuscitate.repair(wrap(wrapped), wrap(dense), images())
    torch.testing.assert_close(wrapped.state_dict(), plain.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "give",
    [
        lambda x: [(part, torch.zeros(len(part))) for part in x.split(7)],
        lambda x: [{"pixel_values": part, "label": 3} for part in x.split(7)],
        lambda x: iter(x.split(7)),
        lambda x: lambda: iter(x.split(7)),
        lambda x: x.numpy(),
    ],
    ids=["tuples", "dicts", "generator", "factory", "array"],
)
def test_any_kind_of_calibration_gives_the_same_repair(give):
    dense = seeded(chain)
    wanted, model = pruned_copy(dense), pruned_copy(dense)
    resuscitate.repair(wanted, dense, images(), method="asr")
    resuscitate.repair(model, dense, give(images()), method="asr")
    torch.testing.assert_close(model.state_dict(), wanted.state_dict(), rtol=2e-5, atol=2e-6)


def test_gains_and_batchnorm_take_their_own_numbers_of_images():
    dense = seeded(chain)
    options = {"recalibrate": resuscitate.Exact(samples=17), "gain_samples": 5, "batch_size": 4}
    report = resuscitate.repair(pruned_copy(dense), dense, images(), **options)
    assert (report.images, report.batchnorm_images) == (5, 17)
    bn_alone, gained = pruned_copy(dense), pruned_copy(dense)
    resuscitate.recalibrate_batchnorm(bn_alone, images()[:17])
    resuscitate.repair(gained, dense, images(), method="channelwise", **options)
    torch.testing.assert_close(gained(images()), bn_alone(images()), rtol=1e-2, atol=1e-3)


def test_no_more_is_read_than_is_used():
    read = []

    def loader():
        for part in images().split(2):
            read.append(len(part))
            yield part

    dense = seeded(chain)
    resuscitate.repair(pruned_copy(dense), dense, loader, gain_samples=5)
    assert sum(read) == 6


def test_parallel_measures_the_unrepaired_network():
    dense = seeded(chain)
    model = pruned_copy(dense)
    with torch.no_grad():
        variances = [net[:4](images()).var((0, 2, 3), correction=0).mean() for net in (dense, model)]
    rows = resuscitate.repair(model, dense, images(), schedule="parallel", method="layerwise", eps=0.0).layers
    assert {row.name: row for row in rows}["3"].gain[0] == pytest.approx(
        float((variances[0] / variances[1]).sqrt()), rel=1e-4
    )
    assert {row.name: row for row in rows}["6"].variance_after == pytest.approx(1.0, rel=1e-4)


def test_the_report_is_plain_data_and_a_table():
    dense = seeded(chain)
    report = resuscitate.repair(pruned_copy(dense), dense, images(), method="channelwise", recalibrate="exact")
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["method"] == "channelwise"
    row = next(row for row in plain["layers"] if row["name"] == "3")
    assert row["channels"] == 8
    assert abs(row["variance_before"] - 1) > 0.1
    assert row["variance_after"] == pytest.approx(1, abs=1e-3)
    assert row["gain"][0] <= row["gain"][1]
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(report)
    text = console.export_text()
    assert "re-estimated" in text
    assert "24 images measured; 24 images for BatchNorm" in text
    report.undo()


@pytest.mark.parametrize("method", ["asr", "bn"])
def test_a_report_is_saved_as_json_and_csv(method, tmp_path):
    dense = seeded(chain)
    report = resuscitate.repair(pruned_copy(dense), dense, images(), method=method)
    report.save(tmp_path / "run.json")
    assert json.loads((tmp_path / "run.json").read_text()) == json.loads(json.dumps(report.to_dict()))
    report.save(tmp_path / "run.csv")
    with open(tmp_path / "run.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [layer.name for layer in report.layers]
    gains = [layer.gain or ("", "") for layer in report.layers]
    assert [(row["gain_least"], row["gain_greatest"]) for row in rows] == [tuple(map(str, gain)) for gain in gains]
    with pytest.raises(ValueError, match=r"written as \.json or \.csv"):
        report.save(tmp_path / "run.txt")


def test_equal_models_are_noticed(caplog):
    dense = seeded(chain)
    with caplog.at_level(logging.WARNING, logger="resuscitate"):
        report = resuscitate.repair(copy.deepcopy(dense), dense, images(), method="asr", eps=0.0)
    assert "no layer was pruned" in caplog.text
    assert "no layer was pruned" in report.notes[0]
    assert all(row.gain == pytest.approx((1, 1), abs=1e-4) for row in report.layers if row.gain)


def test_the_device_option_brings_the_models_back(monkeypatch):
    dense = seeded(chain)
    model, moved = pruned_copy(dense), []
    to = nn.Module.to
    monkeypatch.setattr(nn.Module, "to", lambda self, *args: moved.append(args) or to(self, *args))
    resuscitate.repair(model, dense, images(), device="cpu")
    assert moved == [("cpu",)] * 2 + [(torch.device("cpu"),)] * 2
