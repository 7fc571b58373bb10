"""The walk by suspended forward passes, whatever the network does: its results, its forward passes, what it leaves."""

import contextlib
import copy
import itertools
import os
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import resuscitate
from resuscitate.engine.measure import LARGE, measure
from resuscitate.errors import LayerError, ModelMismatchError
from resuscitate.network.runner import Network
from resuscitate.runtime.journal import MAGIC
from tests.networks import Residual, Shared, Untraceable, chain, images, pruned_copy, seeded

OPTIONS = {
    "refit": {"method": "refit"},
    "refit, exact": {"method": "refit", "recalibrate": "exact"},
    "asr": {"method": "asr"},
    "channelwise, exact": {"method": "channelwise", "recalibrate": "exact", "diagnostics": True},
    "bn": {"method": "bn"},
}
methods = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def run_batch(model, batch):
    return model(batch)


pytestmark = pytest.mark.usefixtures("two_at_a_time")


def repaired(dense, model=None, x=None, **options):
    """A pruned copy, or `model`, repaired; the report."""
    model = pruned_copy(dense) if model is None else model
    x = images(40).split(16) if x is None else x
    return model, resuscitate.repair(model, dense, x, progress=False, **options)


def close(model, other, refit):
    """Equal but for rounding, which in a refit decides on which side of zero an output lies now and then."""
    tolerance = {"rtol": 1e-2, "atol": 3e-4} if refit else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(model.state_dict(), other.state_dict(), **tolerance)


def both_walks(build, options, build_other=None):
    """A network repaired by suspended passes; another one that is the same to torch.fx, along its graph."""
    dense, other = seeded(build), seeded(build_other or build)
    other.load_state_dict(dense.state_dict())
    model, report = repaired(dense, forward_fn=run_batch, **options)
    expected, by_node = repaired(other, **options)
    assert (report.walk, by_node.walk) == ("suspended", "graph")
    close(model, expected, options["method"] == "refit")
    assert any(row.status in ("repaired", "refitted", "re-estimated") for row in report.layers)
    return model


class Block(nn.Module):
    """A residual block; `how` says how its sum is written."""

    def __init__(self, how="x + out"):
        super().__init__()
        self.how = how
        self.stem, self.last = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1)
        self.conv1 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(6), nn.BatchNorm2d(6)

    def forward(self, x):
        x = F.relu(self.stem(x))
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.how == "out += x":
            out += x
            return self.last(F.relu(out, inplace=True))
        if self.how == "out.add_(x)":
            return self.last(out.add_(x).relu_())
        return self.last(F.relu(x + out if self.how == "x + out" else torch.add(out, x)))


@pytest.mark.parametrize("how", ["x + out", "torch.add", "out += x", "out.add_(x)"])
@methods
def test_residual_sums(how, options):
    both_walks(lambda: Block(how), options)


def test_the_relu_consumer_behind_a_sum_is_used():
    """What is added to a layer's output is known to its refit: without it the result is another."""
    dense = seeded(Block)
    results = [repaired(dense, forward_fn=run_batch, relu_aware=aware)[0].conv2.weight for aware in (False, True)]
    assert (results[0] - results[1]).abs().max() > 1e-2


class Keyword(nn.Module):
    """Its layers are given their input by name."""

    def __init__(self, by_name=True):
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1)
        self.conv, self.bn, self.last = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
        self.by_name = by_name

    def forward(self, x):
        x = F.relu(self.first(x))
        if self.by_name:
            return self.last(input=F.relu(self.bn(self.conv(input=x))))
        return self.last(F.relu(self.bn(self.conv(x))))


class Scaled(nn.Module):
    """Twice its input, as an operation of the network."""

    def __init__(self, factor=2.0):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


@methods
def test_layers_that_are_given_their_input_by_name(options):
    dense, other = seeded(Keyword), seeded(lambda: Keyword(by_name=False))
    model, _ = repaired(dense, forward_fn=run_batch, **options)
    expected, _ = repaired(other, forward_fn=run_batch, **options)
    close(model, expected, options["method"] == "refit")
    assert not torch.equal(model.conv.weight, pruned_copy(dense).conv.weight) or options["method"] == "bn"


@methods
def test_a_hook_on_a_container_changes_what_follows(options):
    """It is the same as an operation there that the graph shows."""

    def hooked():
        stages = chain(), nn.Conv2d(16, 4, 1)
        model = nn.Sequential(stages[0][:6], stages[0][6:9], nn.Conv2d(16, 4, 1))
        model[0].register_forward_hook(lambda module, args, output: output * 2)
        return model

    def plain():
        stages = chain()
        return nn.Sequential(nn.Sequential(*stages[:6], Scaled()), stages[6:9], nn.Conv2d(16, 4, 1))

    both_walks(hooked, options, plain)


@pytest.mark.parametrize("options", [OPTIONS["asr"], OPTIONS["channelwise, exact"]], ids=["asr", "channelwise, exact"])
def test_a_hook_on_a_layer_changes_its_output(options):
    """What is matched is what the layer puts out in the end: both walks agree, with the hook in both."""
    dense = seeded(chain)
    dense[3].register_forward_hook(lambda module, args, output: output * 2 + 1)
    model, report = repaired(dense, forward_fn=run_batch, **options)
    expected, by_node = repaired(dense, **options)
    assert (report.walk, by_node.walk) == ("suspended", "graph")
    close(model, expected, refit=False)
    without, _ = repaired(seeded(chain), forward_fn=run_batch, **options)
    assert not torch.allclose(model[6].weight, without[6].weight, rtol=1e-2)


def test_batches_may_be_dictionaries_and_tuples():
    dense, results = seeded(chain), []
    x = images(40).split(16)
    for batches, forward_fn in (
        (list(x), run_batch),
        ([{"pixels": part, "label": torch.zeros(len(part))} for part in x], lambda model, b: model(b["pixels"])),
        ([(part, torch.zeros(len(part))) for part in x], lambda model, b: model(b[0])),
    ):
        results.append(repaired(dense, x=batches, forward_fn=forward_fn, ridge=0.01)[0].state_dict())
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


class ImageByImage(nn.Module):
    """Runs its first layer once for each image, so that the number of calls is the batch's size."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.last = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        return self.last(F.relu(self.bn(torch.cat([self.conv(image[None]) for image in x]))))


class AtOnce(ImageByImage):
    def forward(self, x):
        return self.last(F.relu(self.bn(self.conv(x))))


@pytest.mark.parametrize("sizes", [(8, 8), (2, 7, 5)], ids=str)
def test_a_layer_that_is_called_once_for_each_image(sizes):
    dense, other = seeded(ImageByImage), seeded(AtOnce)
    x = images(sum(sizes)).split(sizes)
    options = {"method": "refit", "relu_aware": False, "ridge": 0.01, "recalibrate": "exact"}
    model, report = repaired(dense, x=x, **options)
    expected, _ = repaired(other, x=x, **options)
    assert report.walk == "suspended"
    close(model, expected, refit=False)


class Twice(nn.Module):
    """A layer between ordinary ones that is called twice, or that has a copy of itself for its second call."""

    def __init__(self, shared=True):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv, self.shared = nn.Conv2d(6, 6, 3, padding=1), shared
        self.after, self.last = nn.Conv2d(6, 6, 3), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)))
        if self.shared:
            x = torch.cat([self.conv(x[:, :, :5]), self.conv(x[:, :, 5:])])
        else:
            x = self.conv(torch.cat([x[:, :, :5], x[:, :, 5:10]]))
        return self.last(F.relu(self.after(F.relu(x))))


@pytest.mark.parametrize(
    "options",
    [
        {"method": "refit", "relu_aware": False, "ridge": 0.01},
        {"method": "refit", "relu_aware": False, "ridge": 0.01, "recalibrate": "exact"},
        {"method": "asr"},
        {"method": "channelwise", "diagnostics": True, "recalibrate": "exact"},
    ],
    ids=["refit", "refit, exact", "asr", "channelwise, exact"],
)
def test_a_shared_layer_is_as_one_whose_calls_are_made_at_once(options):
    x = images(40, size=10).split(16)
    dense, other = seeded(Twice), seeded(lambda: Twice(shared=False))
    model, report = repaired(dense, x=x, **options)
    expected, by_node = repaired(other, x=x, **options)
    assert (report.walk, by_node.walk) == ("suspended", "graph")
    disagree = [row.name for row in report.layers if "incompatible" in row.reason]
    assert not disagree
    close(model, expected, refit=False)


def test_a_batchnorm_that_is_called_twice_is_recalibrated_over_both_calls():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = (nn.Conv2d(c, 6, 3, padding=1, bias=False) for c in (3, 6))
            self.bn, self.last = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)

        def forward(self, x):
            return self.last(F.relu(self.bn(self.conv2(F.relu(self.bn(self.conv1(x)))))))

    dense = seeded(Model)
    model = pruned_copy(dense)
    statistics = copy.deepcopy(model.bn)
    _, report = repaired(dense, model, method="bn")
    assert report.walk == "suspended"
    model.bn.running_mean, statistics.running_mean = statistics.running_mean, model.bn.running_mean
    model.bn.running_var, statistics.running_var = statistics.running_var, model.bn.running_var
    with torch.no_grad():  # what both calls read while it was as it had been
        first, second = measure(Network(model), images(40).split(16), ["bn"])["bn"]
    both = first.merge(second)
    torch.testing.assert_close(statistics.running_mean.double(), both.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(statistics.running_var.double(), both.m2 / (both.count - 1), rtol=1e-4, atol=1e-6)


class Sometimes(nn.Module):
    """Dark batches pass a layer and its BatchNorm by."""

    def __init__(self):
        super().__init__()
        self.first, self.often = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 5, 3, padding=1)
        self.bn, self.last = nn.BatchNorm2d(5), nn.Conv2d(5, 5, 1)

    def forward(self, x):
        bright = bool(x.mean() > -5)
        x = F.relu(self.first(x))
        if bright:
            x = F.relu(self.bn(self.often(x)))
        return self.last(x)


@methods
@pytest.mark.parametrize("dark", [1, 2], ids=["a middle batch", "the last batch"])
def test_batches_that_pass_a_layer_by(dark, options):
    """The layer is repaired as if there were the other batches alone; those behind it by all."""
    dense, x = seeded(Sometimes), list(images(48).split(16))
    x[dark] = x[dark] - 10
    options = {"ridge": 0.01, **options} if options["method"] == "refit" else options
    options = options | ({} if options["method"] == "bn" else {"skip_first": False, "exclude": "first"})
    model, report = repaired(dense, x=x, **options)
    bright, _ = repaired(dense, x=[b for at, b in enumerate(x) if at != dark], **options)
    assert report.walk == "suspended"
    for name in ("often", "bn"):
        close(model.get_submodule(name), bright.get_submodule(name), refit=False)
    if options["method"] == "refit":
        assert not torch.allclose(model.last.weight, bright.last.weight, rtol=1e-4)


@methods
@pytest.mark.parametrize("build", [chain, Residual], ids=lambda build: build.__name__)
def test_both_walks_agree(build, options):
    both_walks(build, options)


@pytest.mark.parametrize("per", ["kernel", "filter"])
def test_a_refit_with_means(per):
    """A layer is of another class once it has means, while the passes wait in its call."""
    dense = seeded(chain)
    expected, model = (repaired(dense, means=per, ridge=0.01, forward_fn=each)[0] for each in (None, run_batch))
    assert [type(m) for m in model] == [type(m) for m in expected]
    assert type(model[3]) is not nn.Conv2d
    close(model, expected, refit=True)


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = chain()

    def forward(self, x):
        return self.body(x + 0.5 * torch.rand_like(x))


def test_random_numbers_are_the_same_with_the_same_seed():
    dense, results = seeded(Noisy), []
    for seed in (0, 0, 1):
        x = images(64).split(4)  # many passes, each of which could draw before another
        results.append(repaired(dense, x=x, method="asr", forward_fn=run_batch, seed=seed)[0].body[3].weight)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


class TestForwardPasses:
    """How often a layer is called: once for each batch and network, and once more for each shared layer."""

    def count(self, dense, **options):
        """Calls of each convolution, by name and number of images, without those of the first layer for the look at
        the normalisation.
        """
        ran, model = [], pruned_copy(dense)
        repaired(dense, copy.deepcopy(model), images(24).split(6), **options)  # the first time has more looks
        for net in (dense, model):
            for name, module in net.named_modules():
                if isinstance(module, nn.Conv2d):
                    module.register_forward_pre_hook(lambda m, args, name=name: ran.append((name, len(args[0]))))
        repaired(dense, model, images(24).split(6), **options)
        assert {images for _, images in ran} <= {1, 2, 3, 6}  # beside the batches only looks at few images
        return ran

    @pytest.mark.parametrize("recalibrate", [None, "exact"])
    @pytest.mark.parametrize("method", ["asr", "refit"])
    def test_of_a_repair(self, method, recalibrate):
        ran = self.count(seeded(Untraceable), method=method, recalibrate=recalibrate)
        for name in ("body.3", "body.6"):
            assert ran.count((name, 6)) == 2 * 4

    def test_of_a_shared_layer(self):
        ran = self.count(seeded(Shared), method="asr", skip_first=False, skip_last=False)
        # one pass of the dense network, one to the end of the pruned one, and one more behind the shared layer
        assert 3 * 2 * 4 <= ran.count(("conv", 6)) <= 3 * 2 * 4 + 2
        assert 3 * 4 <= ran.count(("last", 6)) <= 3 * 4 + 1


class RefusedError(Exception):
    pass


class TestWhatIsLeft:
    """No thread (see `two_at_a_time`) and no hook."""

    @pytest.mark.parametrize("error", [RefusedError, KeyboardInterrupt, SystemExit])
    @pytest.mark.parametrize("where", ["a layer", "forward_fn", "the loader"])
    def test_after_an_error(self, error, where):
        dense = seeded(chain)
        model, calls = pruned_copy(dense), itertools.count()
        before = {key: value.clone() for key, value in model.state_dict().items()}

        def failing(*args):
            if next(calls) == 12:
                raise error("no more")

        def run(m, x):
            if where == "forward_fn":
                failing()
            return m(x)

        def loader():
            for part in images(60).split(4):
                if where == "the loader":
                    failing()
                yield part

        if where == "a layer":
            model[6].register_forward_hook(failing)
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        with pytest.raises(error, match="no more"):
            repaired(dense, model, loader(), forward_fn=run)
        assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def test_a_forward_pass_that_is_given_up_runs_its_clean_up(self):
        entered, left = [], []

        class Careful(nn.Module):
            def __init__(self):
                super().__init__()
                self.body = chain()

            def forward(self, x):
                entered.append(1)
                try:
                    return self.body(x)
                except Exception:
                    return None  # no handler of the model's may take what unwinds it
                finally:
                    left.append(1)

        dense = seeded(Careful)
        repaired(dense, method="asr", include="body.3", skip_first=False)
        assert len(entered) == len(left) > 5


@pytest.mark.parametrize("options", [OPTIONS["refit, exact"], OPTIONS["channelwise, exact"]], ids=lambda o: o["method"])
@pytest.mark.parametrize("build", [Untraceable, Shared], ids=lambda build: build.__name__)
def test_every_prefix_of_a_journal_leads_to_the_same_end(build, options, tmp_path):
    if build is Shared:
        options = {key: value for key, value in options.items() if key != "recalibrate"}
    dense, whole, part = seeded(build), tmp_path / "whole", tmp_path / "part"
    undisturbed, report = repaired(dense, x=images(24).split(7), resume=whole, **options)
    assert report.walk == "suspended"
    content, counts = whole.read_bytes(), set()
    for length in sorted({len(MAGIC), *range(30, len(content), len(content) // 9), len(content)}):
        part.write_bytes(content[:length])
        model, report = repaired(dense, x=images(24).split(7), resume=part, **options)
        assert all(
            torch.equal(a, b)
            for a, b in zip(model.state_dict().values(), undisturbed.state_dict().values(), strict=True)
        )
        assert len(part.read_bytes()) == len(content)
        counts.add(report.resumed)
    assert {0, max(counts)} < counts


class TestPrecision:
    @pytest.mark.parametrize("method", ["asr", "channelwise"])
    def test_under_autocast(self, method):
        both_walks(chain, {"method": method, "dtype": "bf16"})

    def test_a_refit_under_autocast(self):
        """One rounding of bfloat16 is 1/256."""
        dense, options = seeded(chain), {"dtype": "bf16", "ridge": 0.01, "relu_aware": False}
        results = [repaired(dense, forward_fn=each, **options)[0] for each in (None, run_batch)]
        torch.testing.assert_close(results[0].state_dict(), results[1].state_dict(), rtol=2e-2, atol=4e-3)

    def test_the_precision_of_a_batch_is_its_own(self):
        """Passes with and without autocast wait at the same time in one another's midst."""
        seen = []

        def run(model, batch):
            with torch.autocast("cpu", torch.bfloat16, enabled=len(batch) == 7):
                return model(batch)

        dense = seeded(chain)
        model = pruned_copy(dense)
        for net in (dense, model):
            net[3].register_forward_hook(lambda m, args, out: seen.append((len(out), out.dtype)))
        repaired(dense, model, [*images(21).split(7), *images(24).split(6)], forward_fn=run, method="asr")
        assert set(seen) - {(2, torch.float32)} == {(7, torch.bfloat16), (6, torch.float32)}

    @pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
    @pytest.mark.parametrize("options", [OPTIONS["asr"], OPTIONS["refit"]], ids=lambda o: o["method"])
    def test_a_model_that_enters_a_mode_around_some_layers(self, context, options):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.body = chain()

            def forward(self, x):
                x = self.body[:2](x)
                with context():
                    x = self.body[2:5](x)
                return self.body[5:](x)

        dense, plain = seeded(Model), seeded(chain)
        model, _ = repaired(dense, forward_fn=run_batch, **options)
        expected, _ = repaired(plain, forward_fn=run_batch, **options)
        torch.testing.assert_close(model.body.state_dict(), expected.state_dict(), rtol=1e-2, atol=3e-4)


def test_what_a_pass_leaves_out_that_the_example_had_is_an_error_that_names_the_layer():
    class Model(Block):
        def forward(self, x):
            y = F.relu(self.stem(x))
            out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(y)))))
            return self.last(F.relu(out + y if x.mean() > -5 else out))

    dense, x = seeded(Model), list(images(48).split(16))
    x[1] = x[1] - 10
    with pytest.raises(LayerError, match=r"conv2.*relu_aware=False"):
        repaired(dense, x=x)
    repaired(dense, x=x, relu_aware=False)


def test_networks_that_call_a_layer_a_different_number_of_times_are_refused():
    dense = seeded(Shared)
    model = pruned_copy(dense)
    once = [False]

    def pre(module, args):
        if not once[0]:
            return
        raise AssertionError

    with contextlib.suppress(AssertionError):
        pre(None, None)
    model.forward = lambda x: model.last(model.conv(model.stem(x).relu()).relu())
    with pytest.raises(ModelMismatchError, match="conv"):
        repaired(dense, model, method="asr", forward_fn=run_batch)


@pytest.mark.parametrize("largest", [0, LARGE // 8, LARGE // 8 + 1])
def test_passes_with_large_values_are_measured_in_the_calling_thread(largest):
    """`largest` is for each image; each batch has eight."""
    model, threads = seeded(chain), set()
    model[0].register_forward_hook(lambda *_: threads.add(threading.current_thread()))
    found = measure(Network(model), images(32).split(8), ["0"], largest)
    assert (threads == {threading.main_thread()}) == (8 * largest > LARGE)
    assert found["0"][0].count == 32 * 9 * 9


@pytest.mark.parametrize("memory", [None, "50KiB"], ids=["kept", "moved out"])
def test_what_a_forward_fn_has_compiled_runs_uncompiled(memory):
    dense = seeded(chain)
    plain, model = pruned_copy(dense), pruned_copy(dense)
    compiled = {id(net): torch.compile(net, backend="eager") for net in (model, dense)}
    for each in compiled.values():
        each(images(2))
    repaired(dense, plain, forward_fn=run_batch, method="asr")
    _, report = repaired(dense, model, forward_fn=lambda net, x: compiled[id(net)](x), method="asr", memory=memory)
    assert (report.bytes_spilled > 0) == (memory is not None)
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_the_compiler_of_torch_is_not_loaded():
    """It takes 1.7 s and 140 MB, which no budget knows of."""
    script = """
    import copy, sys, torch, resuscitate
    from torch import nn
    dense = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    run = lambda model, x: model(x)
    x = [torch.rand(8, 3, 16, 16) for _ in range(4)]
    report = resuscitate.repair(copy.deepcopy(dense), dense, x, forward_fn=run, memory="128KiB", progress=False)
    assert report.bytes_spilled > 0
    print("torch._dynamo" in sys.modules)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.split() == ["False"]
