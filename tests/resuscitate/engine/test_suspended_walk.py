"""The walk by suspended forward passes gives what the walk along a graph gives, whatever the network does."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from resuscitate.engine.probes import Probe
from resuscitate.errors import LayerError
from resuscitate.methods.base import Method
from resuscitate.network.updates import Gain
from resuscitate.statistics.base import Statistic
from tests.networks import Residual, chain, images, pruned_copy, seeded
from tests.resuscitate.engine.walks import OPTIONS, both_walks, close, methods, repaired, run_batch

pytestmark = pytest.mark.usefixtures("two_at_a_time")


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


class KeywordNorm(Keyword):
    """Its BatchNorm is given its input by name."""

    def forward(self, x):
        return self.last(F.relu(self.bn(input=self.conv(self.first(x)))))


def test_images_are_screened_at_a_batchnorm_that_is_given_its_input_by_name():
    x = images(40)
    x[3] = torch.nan
    _, report = repaired(seeded(KeywordNorm), x=x.split(16), on_nonfinite="skip")
    assert report.images == 39


def run_in_inference_mode(model, batch):
    with torch.inference_mode():
        return model(batch)


@methods
def test_a_forward_fn_may_use_inference_mode(options):
    dense = seeded(Block)
    model, expected = (repaired(dense, forward_fn=run, **options)[0] for run in (run_in_inference_mode, run_batch))
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)


class Magnitude(Statistic):
    """The mean magnitude of the outputs of the pruned layer, and of the dense one."""

    measured = ("sums",)

    def __init__(self, place):
        super().__init__(place)
        self.by_batch = {}  # several threads update it, each with batches of its own

    def update(self, batch, pruned, dense):
        self.by_batch[batch] = torch.stack([pruned.abs().sum(), dense.abs().sum()])

    def finish(self, batches):
        self.sums = torch.stack([self.by_batch[batch] for batch in range(batches)]).sum(0)


@dataclass(frozen=True, kw_only=True)
class Rescale(Method):
    """A gain from a statistic of its own, and a shift."""

    name = "rescale"

    def probe(self, layer):
        return Probe(Magnitude)

    def solve(self, layer, found):
        gain = (found.sums[1] / found.sums[0]).double().repeat(layer.channels)
        return Gain(gain, torch.full_like(gain, 0.5))


def test_a_batchnorm_behind_a_layer_with_a_statistic_of_its_own_has_the_moments_of_its_corrected_inputs():
    both_walks(chain, {"method": Rescale(), "recalibrate": "exact", "skip_first": False, "keep_worse": True})


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


def test_random_numbers_are_the_same_in_a_small_memory():
    dense, results = seeded(Noisy), []
    for memory in ("1GiB", "20KB"):
        x = images(32, size=16).split(4)
        model, report = repaired(dense, x=x, method="channelwise", forward_fn=run_batch, memory=memory)
        assert (report.bytes_spilled > 0) == (memory == "20KB")
        results.append(model.body[3].weight)
    assert torch.equal(results[0], results[1])


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
