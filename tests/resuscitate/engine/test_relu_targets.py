"""What a ReLU hides: which layers it stands behind, what they may put out then, and what a refit makes of that."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import resuscitate
from asr_kernels import Window, cross_products, patch_moments
from resuscitate.engine.relu_targets import ReluEquivalentTargets
from resuscitate.network.wiring import ReluConsumer, observe
from resuscitate.statistics.fitting import fit
from tests.networks import Residual, Zoo, chain, images, pruned_copy, seeded


class Block(nn.Module):
    """A basic block; `how` is what becomes of its sum."""

    def __init__(self, how="relu"):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.project, self.bn3 = nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3)
        self.relu6, self.in_place, self.how = nn.ReLU6(), nn.ReLU(inplace=True), how

    def forward(self, x):
        if self.how == "relu6":
            return self.bn2(self.conv2(self.relu6(self.bn1(self.conv1(x)))))
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.how == "projected":
            return F.relu(out + self.bn3(self.project(x)))
        if self.how == "twice":
            return F.relu(out + x) + out
        if self.how == "bounded":
            return F.hardtanh(out + x)
        out += x.flip(1)
        return self.in_place(out)


class Sometimes(nn.Module):
    """Dark batches pass a layer by."""

    def __init__(self):
        super().__init__()
        self.often, self.last = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 5, 1)

    def forward(self, x):
        if bool(x.mean() > -5):
            x = F.relu(self.often(x))
        return self.last(x)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (chain(), {"0": ReluConsumer("1", False), "3": ReluConsumer("4", False), "6": ReluConsumer("7", False)}),
        (
            chain(batchnorm=False, bias=True),
            {"0": ReluConsumer(None, False), "2": ReluConsumer(None, False), "4": ReluConsumer(None, False)},
        ),
        (Block(), {"conv1": ReluConsumer("bn1", False), "conv2": ReluConsumer("bn2", True)}),
        (Block("relu6"), {"conv1": ReluConsumer("bn1", False)}),
        # when conv2 runs the projection has yet to be refitted; when that runs, conv2 is done
        (Block("projected"), {"conv1": ReluConsumer("bn1", False), "project": ReluConsumer("bn3", True)}),
        (Block("twice"), {"conv1": ReluConsumer("bn1", False)}),
        (Block("bounded"), {"conv1": ReluConsumer("bn1", False)}),
        (nn.Sequential(nn.Flatten(), nn.Linear(243, 9), nn.ReLU(), nn.Linear(9, 9)), {"1": ReluConsumer(None, False)}),
        (nn.Sequential(nn.Flatten(), nn.Linear(243, 9), nn.GELU()), {}),
    ],
    ids=str,
)
def test_the_relu_behind_a_layer_is_found(model, expected):
    assert observe(model.eval(), lambda: model(images())).relu_consumers == expected


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        pytest.param(F.relu, True, id="relu"),
        pytest.param(F.relu6, True, id="relu6"),
        pytest.param(nn.Hardtanh(0, 2), True, id="hardtanh from 0"),
        pytest.param(lambda x: x.clamp(min=0), True, id="clamp from 0"),
        pytest.param(lambda x: x.clamp_(0, 4), True, id="clamp_ 0 to 4"),
        pytest.param(lambda x: x.clamp_min(0), True, id="clamp_min"),
        pytest.param(lambda x: torch.clip(x, min=0, max=3), True, id="clip 0 to 3"),
        pytest.param(F.hardtanh, False, id="hardtanh"),
        pytest.param(F.hardswish, False, id="hardswish"),
        pytest.param(lambda x: x.clamp(max=1), False, id="clamp to 1"),
        pytest.param(lambda x: x.clamp(0.5, 1), False, id="clamp from 0.5"),
        pytest.param(lambda x: x.clamp(torch.zeros(()), torch.ones(())), False, id="clamp by tensors"),
    ],
)
def test_functions_that_are_a_relu_are_known(activation, expected):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return activation(self.conv(x))

    found = observe(net := Net().eval(), lambda: net(images())).relu_consumers
    assert found == ({"conv": ReluConsumer(None, False)} if expected else {})


numbers = st.floats(-3, 3).filter(lambda x: x == 0 or abs(x) > 1e-3)


class TestReluEquivalentTargets:
    @given(st.lists(st.tuples(numbers, numbers, numbers, numbers, numbers), min_size=1), numbers, numbers)
    def test_no_other_output_that_does_as_well_is_nearer(self, values, scale, offset):
        now, wanted, own, theirs, other = torch.tensor(values, dtype=torch.float64).T.clone()
        s, o = (torch.tensor(x, dtype=torch.float64) for x in (scale, offset))
        far = torch.tensor(1e9, dtype=torch.float64)
        found = ReluEquivalentTargets(s, o, s, o, -far, far).nearest(now.clone(), wanted, own, theirs)
        hidden = s * wanted + o + theirs <= 0

        def good(y):
            return torch.where(hidden & (s != 0), s * y + o + own <= 1e-9, y == wanted)

        assert good(found).all()
        assert ((found - now).abs() <= (other - now).abs() + 1e-9)[good(other)].all()

    def test_nothing_goes_further_than_it_is_let(self):
        one, zero = torch.tensor(1.0), torch.tensor(0.0)
        targets = ReluEquivalentTargets(one, zero, one, zero, torch.tensor(-2.0), torch.tensor(2.0))
        now, wanted = torch.tensor([-9.0, 9.0, 9.0]), torch.tensor([-1.0, -1.0, 7.0])
        assert targets.nearest(now, wanted, None, None).tolist() == [-2, 0, 7]


def test_cross_products_are_those_of_the_patch_moments():
    generator = torch.Generator().manual_seed(0)
    for window, x, y in (
        (Window((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)), (6, 4, 7, 5), (6, 8, 7, 5)),
        (Window((3, 2), (2, 1), ((1, 1), (0, 1)), (1, 2), groups=2), (6, 4, 7, 5), (6, 8, 4, 4)),
        (Window((3,), (1,), ((2, 1),), (1,), mode="circular"), (6, 4, 7), (6, 8, 8)),
        (Window((2, 2, 2), (1,) * 3, ((0, 0),) * 3, (1,) * 3), (6, 1, 4, 4, 4), (6, 3, 3, 3, 3)),
        (Window(), (6, 5, 4), (6, 5, 3)),
    ):
        x, y = torch.randn(x, generator=generator) * 3 + 100, torch.randn(y, generator=generator) - 50
        moments = patch_moments(x, y, window)
        moved = y + torch.rand(y.shape, generator=generator)
        found = [
            cross_products(a, b, window, moments.mean, moments.target)
            for a, b in zip(x.split(4), moved.split(4), strict=True)
        ]
        total, expected = found[0] + found[1], patch_moments(x, moved, window)
        scale = (moments.xx.diagonal(dim1=1, dim2=2).amax() * moments.yy.amax()).sqrt()
        assert (total.xy - expected.xy).abs().max() < 1e-5 * scale
        mean = total.y / moments.count
        torch.testing.assert_close(moments.target + mean, expected.target, rtol=1e-7, atol=0)
        variance = total.yy - moments.count * mean.square()
        torch.testing.assert_close(variance, expected.yy, rtol=1e-4, atol=0)


def rectified_error(model, dense, x):
    with torch.no_grad():
        return float((model(x).relu() - dense(x).relu()).square().mean())


class TestFit:
    @settings(deadline=None, max_examples=20)
    @given(st.integers(0, 10**6))
    def test_what_can_be_right_after_the_relu_becomes_so(self, seed):
        # below zero the wanted outputs have nothing to do with the inputs; above, all
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(400, 6, dtype=torch.float64, generator=generator)
        weight = torch.randn(4, 6, dtype=torch.float64, generator=generator)
        y = x @ weight.mT
        wanted = torch.where(y > 0, y, -5 * torch.rand(y.shape, dtype=torch.float64, generator=generator))
        one, zero, far = torch.ones(4), torch.zeros(4), torch.full((4,), 1e9)
        targets = ReluEquivalentTargets(*(v.double() for v in (one, zero, one, zero, -far, far)))
        moments, window = patch_moments(x, wanted, Window()), Window()

        def replay(w, b):
            nearest = targets.nearest(x @ w.mT + b, wanted, None, None)
            return cross_products(x, nearest, window, moments.mean, moments.target)

        def error(found):
            return float(((x @ found.weight.mT + found.bias).relu() - wanted.relu()).square().mean())

        present, support = torch.randn(4, 6, dtype=torch.float64, generator=generator), torch.ones(4, 6) > 0
        plain = fit(moments, present, support, ridge=1e-6, most=1.0)
        refined = fit(moments, present, support, ridge=1e-6, most=1.0, replay=replay)
        assert error(refined) < 0.7 * error(plain)
        assert refined.explained > plain.explained


class TestRepair:
    @pytest.mark.parametrize("build", [chain, Block, Residual, Zoo], ids=lambda build: build.__name__)
    def test_the_walk_makes_no_difference(self, build):
        dense, results = seeded(build), []
        for forward_fn in (None, lambda model, x: model(x)):
            model = pruned_copy(dense)
            resuscitate.repair(model, dense, images(40).split(16), method="refit", forward_fn=forward_fn)
            results.append(model.state_dict())
        # the same but for rounding, which now and then decides on which side of zero an output lies
        torch.testing.assert_close(*results, rtol=1e-2, atol=3e-4)

    def test_a_block_comes_nearer_to_what_it_was_behind_its_relu(self):
        x = images(200, size=12)
        for seed in range(3):
            dense, errors = seeded(Block, seed), {}
            for batchnorm in (dense.bn1, dense.bn2):
                nn.init.constant_(batchnorm.bias, -1)  # most is hidden
            for aware in (False, True):
                model = pruned_copy(dense, 0.8)
                resuscitate.repair(model, dense, x, method="refit", relu_aware=aware)
                errors[aware] = rectified_error(model, dense, x)
            assert errors[True] < 0.99 * errors[False]

    @pytest.mark.parametrize("forward_fn", [None, lambda model, x: model(x)], ids=["graph", "suspended"])
    def test_a_clamp_at_zero_is_a_relu(self, forward_fn):
        class Clamp(nn.Module):
            def forward(self, x):
                return x.clamp_(min=0)

        results = []
        for activation in (nn.ReLU(), Clamp()):
            dense = seeded(
                lambda a=activation: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), a, nn.Conv2d(8, 4, 1))
            )
            model = pruned_copy(dense)
            resuscitate.repair(model, dense, images(40), method="refit", forward_fn=forward_fn, batch_size=16)
            results.append(model.state_dict())
        torch.testing.assert_close(*results, rtol=0, atol=0)

    def test_few_outputs_far_out_do_no_harm(self):
        # a bound of four standard deviations on what is hidden moved the outputs that weigh most in the fit
        x = images(300, size=12)
        x[::100] *= 40
        for seed in range(3):
            dense, errors = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), seed), {}
            for aware in (False, True):
                model = pruned_copy(dense, 0.5)
                resuscitate.repair(model, dense, x, method="refit", relu_aware=aware, keep_worse=True)
                errors[aware] = rectified_error(model[:1], dense[:1], x)
            assert errors[True] < 1.05 * errors[False]

    def test_where_no_relu_follows_it_changes_nothing(self):
        dense = nn.Sequential(nn.Conv2d(3, 6, 3), nn.GELU(), nn.Conv2d(6, 4, 3)).eval()
        results = []
        for aware in (False, True):
            results.append(pruned_copy(dense))
            resuscitate.repair(results[-1], dense, images(), method="refit", relu_aware=aware)
        torch.testing.assert_close(results[0].state_dict(), results[1].state_dict(), rtol=0, atol=0)

    def test_batchnorms_that_turn_a_channel_round_or_off_do_no_harm(self):
        dense = seeded(chain)
        dense[1].weight.data[0] = 0  # a channel that goes nowhere
        dense[4].weight.data[1] *= -1
        model = pruned_copy(dense)
        report = resuscitate.repair(model, copy.deepcopy(dense), images(60), method="refit")
        assert all(torch.isfinite(value).all() for value in model.state_dict().values())
        assert report.layers[0].explained > 0.5

    def test_batches_that_do_not_reach_a_layer_are_passed_over(self):
        dense, x = seeded(Sometimes), images(48)
        x[16:32] -= 10
        results = []
        for aware in (False, True):
            results.append(pruned_copy(dense))
            report = resuscitate.repair(results[-1], dense, x.split(16), method="refit", relu_aware=aware)
            assert report.walk == "suspended"
        assert report.layers[0].explained > 0
        assert not torch.equal(results[0].often.weight, results[1].often.weight)

    def test_its_passes_survive_a_small_memory(self, tmp_path):
        dense, x, results = seeded(Block), images(64, size=32), []
        for memory in (None, 300_000):
            results.append(pruned_copy(dense))
            report = resuscitate.repair(
                results[-1], dense, x, method="refit", batch_size=8, memory=memory, scratch=tmp_path
            )
        assert report.bytes_spilled > 0
        torch.testing.assert_close(results[0].state_dict(), results[1].state_dict(), rtol=0, atol=0)
