"""What every registered method keeps, a user's own among them: it is added here as a user would add it."""

import copy
from dataclasses import asdict, dataclass, fields

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import resuscitate
from resuscitate import EMA, DenseAccess, Exact, Gain, Layer, Masks, Method, OutputMoments, Probe
from resuscitate.errors import LayerError
from resuscitate.methods import base
from resuscitate.methods.base import register, registered
from resuscitate.reports.repair import STATUSES
from tests.compare import same_state
from tests.networks import Residual, chain, images, pruned_copy, seeded
from tests.ranks import joined


@dataclass(frozen=True, kw_only=True)
class MedianGain(Method):
    """One gain for each layer: the median of the dense over the pruned standard deviation.

    floor: added to the pruned variance.
    """

    floor: float = 1e-8

    name = "median-gain"
    dense = DenseAccess.STATISTICS

    def probe(self, layer: Layer) -> Probe:
        return Probe(OutputMoments)

    def solve(self, layer: Layer, found: OutputMoments) -> Gain:
        gain = (found.dense.var / (found.pruned.var + self.floor)).sqrt().median().expand(layer.channels)
        return Gain(gain, shift=found.dense.mean - gain * found.pruned.mean)


@pytest.fixture(autouse=True)
def users_method(monkeypatch):
    monkeypatch.setattr(base, "_METHODS", dict(base._METHODS))
    register(MedianGain)


METHODS = [*registered(), "median-gain"]


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def repaired(method, build=Residual, **options):
    dense = seeded(build)
    model = pruned_copy(dense)
    return model, resuscitate.repair(model, dense, images(), method=method, **options)


@pytest.mark.parametrize("method", METHODS)
def test_zeros_stay_zero(method):
    dense = seeded(Residual)
    model = pruned_copy(dense)
    masks = Masks.from_zeros(model)
    resuscitate.repair(model, dense, images(), method=method)
    masks.check(model)


@pytest.mark.parametrize("method", METHODS)
def test_something_is_repaired_and_every_row_says_what(method):
    _, report = repaired(method)
    assert {row.status for row in report.layers} <= set(STATUSES)
    assert any(row.status in ("repaired", "refitted", "replaced", "re-estimated") for row in report.layers)
    assert all(row.reason for row in report.layers if row.status in ("unchanged", "skipped"))
    assert report.options == asdict(registered()[method]())


@pytest.mark.parametrize("method", METHODS)
def test_undo_puts_every_tensor_back(method):
    dense = seeded(Residual)
    model = pruned_copy(dense)
    before = state(model)
    report = resuscitate.repair(model, dense, images(), method=method)
    assert not same_state(before, state(model))
    report.undo()
    assert same_state(before, state(model))


@pytest.mark.parametrize("method", METHODS)
def test_all_or_nothing(method, monkeypatch):
    dense = seeded(Residual)
    model = pruned_copy(dense)
    before = state(model)
    kind = registered()[method]

    def fail(self, layer, found):
        if layer.name == "conv2":
            raise LayerError(layer.name, "it fails")
        return original(self, layer, found)

    original = kind.solve
    monkeypatch.setattr(kind, "solve", fail)
    if not kind.changes_layers:
        monkeypatch.setattr(Exact, "solve", lambda self, layer, found: fail_batchnorm(layer))
    with pytest.raises(LayerError, match="it fails"):
        resuscitate.repair(model, dense, images(), method=method)
    assert same_state(before, state(model))


def fail_batchnorm(layer):
    raise LayerError(layer.name, "it fails")


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_bit_identical(method, tmp_path, monkeypatch):
    expected = state(repaired(method)[0])
    kind, dense = registered()[method], seeded(Residual)
    first = Exact if not kind.changes_layers else kind
    original, calls = first.solve, []

    def stop(self, layer, found):
        calls.append(layer.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, layer, found)

    monkeypatch.setattr(first, "solve", stop)
    journal = tmp_path / "run.journal"
    with pytest.raises(KeyboardInterrupt):
        resuscitate.repair(pruned_copy(dense), dense, images(), method=method, resume=journal)
    monkeypatch.setattr(first, "solve", original)
    model = pruned_copy(dense)
    report = resuscitate.repair(model, dense, images(), method=method, resume=journal)
    assert same_state(expected, state(model))
    assert report.resumed > 0 or method == "mean"  # which solves for all layers before it writes one
    other = {"seed": 1}
    with pytest.raises(resuscitate.JournalError, match="seed"):
        resuscitate.repair(pruned_copy(dense), dense, images(), method=method, resume=journal, **other)


def on_a_rank(rank, folder):
    register(MedianGain)
    with joined(rank, 2, folder) as group:
        for method in METHODS:
            dense = seeded(chain)
            model = pruned_copy(dense)
            share = images(24)[rank::2].split(5)
            resuscitate.repair(model, dense, share, method=method, group=group, progress=False)
            torch.save(state(model), f"{folder}/{method}.{rank}")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """The state of the model on each of two ranks, by method."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(on_a_rank, (str(folder),), nprocs=2)
    return {method: [torch.load(folder / f"{method}.{rank}") for rank in (0, 1)] for method in METHODS}


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch.distributed with Gloo")
@pytest.mark.parametrize("method", METHODS)
def test_ranks_agree_with_one_process(method, two_ranks):
    dense = seeded(chain)
    alone = pruned_copy(dense)
    resuscitate.repair(alone, dense, images(24), method=method)
    first, second = two_ranks[method]
    assert same_state(first, second)
    # products of patches are float32 sums over other batches here; a refit divides by their small eigenvalues
    torch.testing.assert_close(first, state(alone), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_the_suspended_walk_gives_the_same(method):
    by_graph, _ = repaired(method)
    suspended, report = repaired(method, forward_fn=lambda model, x: model(x))
    assert report.walk in ("suspended", "none")
    torch.testing.assert_close(by_graph.state_dict(), suspended.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_string_is_the_method_with_its_defaults_and_options_may_follow_it(method):
    kind = registered()[method]
    by_name, _ = repaired(method)
    by_object, _ = repaired(kind())
    assert same_state(state(by_name), state(by_object))
    for field in fields(kind):
        assert same_state(state(by_name), state(repaired(method, **{field.name: field.default})[0]))


@pytest.mark.parametrize("method", METHODS)
def test_an_option_of_another_method_is_refused_before_anything_is_read(method):
    dense = seeded(chain)
    model, own = pruned_copy(dense), {field.name for field in fields(registered()[method])}
    before, read = state(model), []

    def loader():
        read.append(1)
        yield images()

    for option in base.option_names() - own:
        with pytest.raises(TypeError, match=f"has no option '{option}'"):
            resuscitate.repair(model, dense, loader, method=method, **{option: 0.5})
    with pytest.raises(TypeError, match="unexpected keyword"):
        registered()[method](nonsense=1)
    with pytest.raises(TypeError, match=r"has no option 'batchsize'.*batch_size"):
        resuscitate.repair(model, dense, loader, method=method, batchsize=4)
    assert not read
    assert same_state(before, state(model))


@pytest.mark.parametrize(
    "make",
    [
        lambda: resuscitate.Refit(ridge=-5),
        lambda: resuscitate.Refit(means="layer"),
        lambda: resuscitate.ASR(prior="nonsense"),
        lambda: resuscitate.ASR(prior=0.0),
        lambda: resuscitate.ChannelWise(eps=-1),
        lambda: resuscitate.MeanReplacement(means="row"),
        lambda: EMA(batches=0),
        lambda: EMA(batch_size=0),
        lambda: EMA(momentum=1.5),
        lambda: Exact(samples=0),
        lambda: Exact(frozen="maybe"),
    ],
)
def test_a_value_out_of_range_is_a_value_error(make):
    with pytest.raises(ValueError, match=r"must be|is unknown"):
        make()


@pytest.mark.parametrize("make", [lambda: resuscitate.Refit(ridge="0.1"), lambda: EMA(batches=2.5)])
def test_a_value_of_another_kind_is_a_type_error(make):
    with pytest.raises(TypeError, match="must be a"):
        make()


def test_a_users_method_runs_through_compress_regrow_and_the_map(tmp_path):
    dense = seeded(chain)
    report = resuscitate.compress(copy.deepcopy(dense), 0.7, images(), steps=2, method="median-gain")
    assert report.steps[-1].method == "median-gain"
    model = pruned_copy(dense, 0.8)
    grown = resuscitate.regrow(
        model, dense, Masks.from_zeros(model), 0.6, images(), method=MedianGain(floor=1e-6), resume=tmp_path
    )
    assert grown.rounds[-1].report.options == {"floor": 1e-6}
    table = resuscitate.recoverability(
        dense,
        images(),
        lambda m: float(m(images()).detach().std()),
        sparsities=[0.5],
        methods=["median-gain"],
        chance=-1.0,
    )
    assert table.methods == ["median-gain"]


def test_diagnostics_never_change_the_method():
    plain, report = repaired("auto")
    with_diagnostics, other = repaired("auto", diagnostics=True)
    assert report.method == other.method == "refit"
    assert same_state(state(plain), state(with_diagnostics))


def test_two_methods_of_one_name_are_refused():
    @dataclass(frozen=True, kw_only=True)
    class Other(MedianGain):
        name = "refit"

    with pytest.raises(ValueError, match="there is a method 'refit' already"):
        register(Other)


def test_a_field_named_like_a_run_time_option_is_refused():
    @dataclass(frozen=True, kw_only=True)
    class Other(MedianGain):
        batch_size: int = 4

        name = "other"

    with pytest.raises(ValueError, match=r"Other\.batch_size has the name of a run-time option"):
        register(Other)
