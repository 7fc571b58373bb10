"""The graph walk, and its agreement with the suspended walk."""

import logging
import re

import pytest
import torch
from torch.nn.utils import prune

import resuscitate
from resuscitate.data.batches import Batches
from resuscitate.engine.measure import measure
from resuscitate.engine.probes import Probe, Request
from resuscitate.engine.session import measurements
from resuscitate.engine.walk import Walk
from resuscitate.network.runner import Network
from resuscitate.network.wiring import observe
from resuscitate.runtime.activations import Store
from tests.networks import (
    Checking,
    Dense,
    Elaborate,
    Excited,
    Functional,
    Positions,
    Residual,
    Shared,
    Shuffled,
    Untraceable,
    Zoo,
    chain,
    images,
    pruned_copy,
    seeded,
)

GRAPH = [chain, Residual, Zoo, Shuffled, Dense, Excited, Functional, Elaborate]
SUSPENDED = [Shared, Untraceable]


@pytest.mark.parametrize("build", GRAPH, ids=lambda b: b.__name__)
@pytest.mark.parametrize("recalibrate", [None, "exact"])
@pytest.mark.parametrize("diagnostics", [False, True], ids=["", "diagnostics"])
def test_both_walks_agree(build, recalibrate, diagnostics):
    dense = seeded(build)
    by_graph, suspended = pruned_copy(dense), pruned_copy(dense)
    options = {"method": "channelwise", "recalibrate": recalibrate, "diagnostics": diagnostics}
    report = resuscitate.repair(by_graph, dense, images(), batch_size=10, **options)
    # a forward_fn hides the input from the trace
    batches = list(images().split(10))
    fallback = resuscitate.repair(suspended, dense, batches, forward_fn=lambda m, x: m(x), **options)
    assert (report.walk, fallback.walk) == ("graph", "suspended")
    torch.testing.assert_close(by_graph.state_dict(), suspended.state_dict(), rtol=1e-4, atol=1e-6)
    explained = [[row.explained or 0.0 for row in each.layers] for each in (report, fallback)]
    assert explained[0] == pytest.approx(explained[1], rel=1e-4)
    assert any(explained[0]) == (diagnostics and any(row.gain for row in report.layers))


@pytest.mark.parametrize("build", [*GRAPH, *SUSPENDED], ids=lambda b: b.__name__)
@pytest.mark.parametrize("recalibrate", [None, "exact"])
def test_the_result_is_the_same_for_batches_of_1_7_64_and_all(build, recalibrate):
    dense, results = seeded(build), []
    if recalibrate and build is Shared:
        pytest.skip("that network has no BatchNorm to re-estimate")
    for batch_size in (70, 1, 7, 64):
        results.append(pruned_copy(dense))
        options = {"method": "channelwise", "recalibrate": recalibrate, "batch_size": batch_size, "gain_samples": 66}
        report = resuscitate.repair(results[-1], dense, images(70), **options)
        assert report.walk == ("suspended" if build in SUSPENDED else "graph")
    for other in results[1:]:
        torch.testing.assert_close(other.state_dict(), results[0].state_dict(), rtol=2e-5, atol=3e-6)


@pytest.mark.parametrize("build", [chain, Residual, Dense, Excited], ids=lambda b: b.__name__)
def test_batchnorm_statistics_by_arithmetic_are_those_that_a_pass_finds(build):
    """After gains and an exact recalibration, every BatchNorm holds the moments of what reaches it in the end."""
    dense = seeded(build)
    model = pruned_copy(dense)
    resuscitate.repair(model, dense, images(), method="channelwise", recalibrate="exact", batch_size=7)
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        found = measure(Network(model), [images()], names)
    for name in names:
        moments, batchnorm = found[name][0], model.get_submodule(name)
        torch.testing.assert_close(batchnorm.running_mean.double(), moments.mean, rtol=1e-4, atol=1e-5)
        unbiased = moments.m2 / (moments.count - 1)
        torch.testing.assert_close(batchnorm.running_var.double(), unbiased, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["refit", "asr", "channelwise"])
def test_both_walks_agree_where_a_layer_reads_a_buffer(method):
    dense = seeded(Positions)
    by_graph, suspended = pruned_copy(dense), pruned_copy(dense)
    options = {"method": method, "skip_first": False}
    report = resuscitate.repair(by_graph, dense, images(), batch_size=10, **options)
    fallback = resuscitate.repair(suspended, dense, list(images().split(10)), forward_fn=lambda m, x: m(x), **options)
    assert (report.walk, fallback.walk) == ("graph", "suspended")
    torch.testing.assert_close(by_graph.state_dict(), suspended.state_dict(), rtol=1e-4, atol=1e-5)
    assert {row.status for row in report.layers} <= {"refitted", "repaired"}


def test_every_node_runs_once_per_batch_and_model_however_many_layers(monkeypatch):
    dense = seeded(Residual)
    model, ran = pruned_copy(dense), []
    forward = torch.nn.Conv2d.forward
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda self, x: ran.append(len(x)) or forward(self, x))
    resuscitate.repair(model, dense, images(), method="asr", recalibrate="exact", batch_size=6)
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    # two networks, four batches; for the normalisation the dense stem once more; the rest are looks at few images
    assert ran.count(6) == 2 * len(convolutions) * 4 + 4
    assert set(ran) <= {1, 2, 3, 6}


def output_of(name, batches):
    return Request(name, Probe(dense=None), batches)


def input_of(name, batches):
    return Request(name, Probe(pruned="input", dense=None), batches)


def test_values_are_dropped_after_their_last_reader():
    model = seeded(Residual)
    requests = [output_of(name, 2) for name in ("stem", "conv1", "conv2")] + [input_of("bn2", 2)]
    walk = walk_of(model, images().split(12), requests)
    with torch.no_grad():
        for measurement in measurements(walk):
            held = 24 * 8 * 9 * 9 * 4  # one activation of every image
            # a layer's output and, within the block, the shortcut; nothing is read after the last request
            assert walk.store.resident == {"stem": 1, "conv1": 2, "conv2": 2, "bn2": 0}[measurement.name] * held


def test_progress_names_the_layer_and_what_was_done_to_the_last_one(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    dense = seeded(chain)
    resuscitate.repair(pruned_copy(dense), dense, images(), progress=True)
    shown = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", capsys.readouterr().err)  # less colours
    assert re.search(r"repair \(refit\): 4/4 11 +error \d\.\d{3} -> \d\.\d{3}", shown)
    resuscitate.repair(pruned_copy(dense), dense, images())
    assert capsys.readouterr().err == ""


def test_the_walk_sees_repaired_inputs():
    """After a channelwise repair of every layer, each layer's own outputs have the dense moments."""
    dense = seeded(lambda: chain(batchnorm=False, bias=True))
    model = pruned_copy(dense)
    resuscitate.repair(model, dense, images(), method="channelwise", skip_first=False, eps=0.0)
    names = ["0", "2", "4", "8"]
    with torch.no_grad():
        found, wanted = (measure(Network(m), [images()], names) for m in (model, dense))
    for name in names:
        torch.testing.assert_close(found[name][0].mean, wanted[name][0].mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[name][0].var, wanted[name][0].var, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("build", "cause"),
    [
        (Untraceable, "torch.fx cannot trace it"),
        (Checking, "torch.fx cannot trace it"),
        (Shared, "conv is called 2 times"),
    ],
    ids=["control flow", "a check of shapes", "shared module"],
)
def test_the_fallback_is_logged_once_with_its_cause(build, cause, caplog):
    dense = seeded(build)
    with caplog.at_level(logging.INFO, logger="resuscitate"):
        report = resuscitate.repair(pruned_copy(dense), dense, images(), method="layerwise")
    assert report.walk == "suspended"
    said = [record.message for record in caplog.records if record.message.startswith("taking the suspended walk")]
    assert [cause in message for message in said] == [True]


def walk_of(model, batches, requests):
    net = Network(model)
    wiring = observe(model, lambda: net.run(images()))
    return Walk([net], wiring, Store(1 << 30, net.device), images()[:2], Batches(batches), requests)


def test_a_hook_on_a_container_needs_the_suspended_walk():
    model = seeded(Residual)
    for expected in ("graph", "suspended"):
        walk = walk_of(model, [images()], [output_of("conv1", 1)])
        with torch.no_grad():
            assert len(list(measurements(walk))) == 1
        assert walk.taken == expected
        model.register_forward_hook(lambda module, args, output: output * 2)


def test_both_walks_stop_in_order_and_early():
    model = seeded(Residual)
    requests = [input_of("bn2", 2), output_of("conv1", 1), input_of("bn0", 2)]
    ran = []
    model.head.register_forward_hook(lambda *_: ran.append(1))
    with torch.no_grad():
        graph = list(measurements(walk_of(model, images().split(12), requests)))
        model.register_forward_hook(lambda module, args, output: None)
        suspended = list(measurements(walk_of(model, images().split(12), requests)))
    assert [each.name for each in suspended] == [each.name for each in graph] == ["bn0", "conv1", "bn2"]
    for a, b in zip(suspended, graph, strict=True):
        assert a.found.pruned.count == b.found.pruned.count
        torch.testing.assert_close(a.found.pruned.var, b.found.pruned.var)
    # two observations, one trace and one forward to compare it with; no walk goes on to the head
    assert len(ran) == 4


def test_a_shared_module_is_measured_over_all_calls_and_corrected_once():
    dense = seeded(Shared)
    model = pruned_copy(dense)
    before = model.conv.weight.detach().clone()
    row = {r.name: r for r in resuscitate.repair(model, dense, images(), method="channelwise").layers}["conv"]
    assert row.status == "repaired"
    gain = model.conv.weight.detach().flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)
    assert float(gain.min()) == pytest.approx(row.gain[0], rel=1e-4)
    assert float(gain.max()) == pytest.approx(row.gain[1], rel=1e-4)


def test_a_shared_module_whose_calls_disagree_is_unchanged_and_reported():
    dense = seeded(Shared)
    model = pruned_copy(dense, 0.0)
    with torch.no_grad():
        model.conv.weight.mul_(0.5)  # the first use is too weak ...
    model.scale = 40.0  # ... the second too strong
    before = model.conv.weight.detach().clone()
    report = resuscitate.repair(model, dense, images(), method="channelwise", include="conv")
    row = report.layers[-1]
    assert (row.status, row.reason) == ("unchanged", "called 2 times with incompatible statistics")
    assert torch.equal(model.conv.weight, before)


def test_a_layer_inside_one_of_torchs_own_modules_is_reached_all_the_same():
    def build():
        return torch.nn.Sequential(
            torch.nn.Flatten(2),
            torch.nn.Linear(81, 8),
            torch.nn.TransformerEncoderLayer(8, 2, 16),
            torch.nn.Linear(8, 4),
        )

    dense = seeded(build)
    report = resuscitate.repair(pruned_copy(dense), dense, images(), method="channelwise")
    rows = {row.name: row.status for row in report.layers}
    assert report.walk == "suspended"
    assert rows["2.linear1"] == rows["2.linear2"] == "repaired"


def with_pre_hook(where):
    """A chain with a module that changes its own input before its forward."""
    model = chain()
    model[where].register_forward_pre_hook(lambda module, args: (2 * args[0].relu() + 1,))
    return model


@pytest.mark.parametrize(
    ("where", "options", "walk"),
    [
        (3, {"method": "refit"}, "suspended"),
        (3, {"method": "asr"}, "graph"),  # measured at its output
        (4, {"method": "bn"}, "suspended"),
        (4, {"method": "asr", "recalibrate": "exact"}, "suspended"),
    ],
)
def test_an_input_that_a_pre_hook_changes_is_measured_behind_the_hook(where, options, walk):
    dense, results = seeded(lambda: with_pre_hook(where)), []
    for forward_fn in (None, lambda model, x: model(x)):
        results.append(seeded(lambda: with_pre_hook(where)))
        results[-1].load_state_dict(pruned_copy(dense).state_dict())
        report = resuscitate.repair(results[-1], dense, images(40).split(8), forward_fn=forward_fn, **options)
        assert report.walk == (walk if forward_fn is None else "suspended")
    torch.testing.assert_close(results[0].state_dict(), results[1].state_dict(), rtol=1e-4, atol=1e-6)


def test_masks_of_torch_change_no_input():
    dense = seeded(chain)
    model = seeded(chain)
    prune.l1_unstructured(model[3], "weight", 0.5)
    assert resuscitate.repair(model, dense, images(), method="refit").walk == "graph"


def test_a_model_that_is_one_layer():
    dense = seeded(lambda: torch.nn.Conv2d(3, 4, 3))
    model = pruned_copy(dense)
    resuscitate.repair(model, dense, images(), method="channelwise", skip_first=False, eps=0.0)
    with torch.no_grad():
        torch.testing.assert_close(model(images()).var((0, 2, 3)), dense(images()).var((0, 2, 3)))


class Branches(torch.nn.Module):
    """Both layers run before either BatchNorm does."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 6, 1)
        self.a, self.b = (torch.nn.Conv2d(6, 5, 3, bias=False) for _ in range(2))
        self.bn_a, self.bn_b = torch.nn.BatchNorm2d(5), torch.nn.BatchNorm2d(5)
        self.last = torch.nn.Conv2d(5, 4, 1)

    def forward(self, x):
        x = self.stem(x).relu()
        a, b = self.a(x), self.b(x)
        return self.last(self.bn_a(a).relu() + self.bn_b(b))


@pytest.mark.parametrize("recalibrate", [None, "exact"])
def test_both_walks_agree_where_two_outputs_wait_for_their_batchnorms(recalibrate):
    dense, results = seeded(Branches), []
    for forward_fn in (None, lambda model, x: model(x)):
        results.append(pruned_copy(dense))
        options = {"method": "channelwise", "recalibrate": recalibrate, "forward_fn": forward_fn}
        resuscitate.repair(results[-1], dense, images(40).split(8), **options)
    torch.testing.assert_close(results[0].state_dict(), results[1].state_dict(), rtol=1e-4, atol=1e-6)
