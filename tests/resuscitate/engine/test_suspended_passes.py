"""How many forward passes the suspended walk takes, what it leaves, its precision, and what it refuses."""

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

from resuscitate.engine.measure import LARGE, measure
from resuscitate.errors import ModelMismatchError
from resuscitate.network.runner import Network
from resuscitate.runtime.journal import MAGIC
from tests.networks import Shared, Untraceable, chain, images, pruned_copy, seeded
from tests.resuscitate.engine.walks import OPTIONS, both_walks, repaired, run_batch

pytestmark = pytest.mark.usefixtures("two_at_a_time")


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


def test_networks_that_call_a_layer_a_different_number_of_times_are_refused():
    dense = seeded(Shared)
    model = pruned_copy(dense)
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
