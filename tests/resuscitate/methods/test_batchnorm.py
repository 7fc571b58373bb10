"""Statistics pooled exactly, statistics by momentum, and folding."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

import resuscitate
from resuscitate import EMA, Exact
from resuscitate.errors import LayerError, ResuscitateError
from tests.networks import Elaborate, Residual, Shared, Untraceable, Zoo, chain, images, pruned_copy, seeded


class TestExact:
    def test_one_batch_of_everything_is_the_definition(self):
        """With all images in one batch PyTorch's own estimate is exact, but that it passes the biased variance on."""
        ours, theirs = pruned_copy(seeded(Residual)), pruned_copy(seeded(Residual))
        resuscitate.recalibrate_batchnorm(ours, images(), batch_size=5)
        update_bn([images()], theirs)
        for (name, a), b in zip(ours.named_buffers(), theirs.buffers(), strict=True):
            if "running" in name:
                torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3, msg=name)

    def test_ragged_and_drifting_batches_are_pooled_not_averaged(self):
        model = nn.Sequential(nn.BatchNorm2d(1))
        batches = [torch.randn(40, 1, 4, 4) + 3, torch.randn(2, 1, 4, 4) - 3]
        resuscitate.recalibrate_batchnorm(model, batches)
        everything = torch.cat(batches)
        torch.testing.assert_close(model[0].running_mean, everything.mean().view(1))
        torch.testing.assert_close(model[0].running_var, everything.var().view(1))

    def test_the_number_of_images_is_the_callers_and_reported(self):
        few, many = pruned_copy(seeded(chain)), pruned_copy(seeded(chain))
        assert resuscitate.recalibrate_batchnorm(few, images(), max_samples=10).batchnorm_images == 10
        resuscitate.recalibrate_batchnorm(many, images()[:10])
        torch.testing.assert_close(few.state_dict(), many.state_dict())

    def test_one_value_per_batch_is_enough_when_there_are_two_batches(self):
        model = nn.Sequential(nn.BatchNorm1d(2))
        resuscitate.recalibrate_batchnorm(model, [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 8.0]])])
        assert model[0].running_var.tolist() == [2.0, 18.0]
        with pytest.raises(LayerError, match="at least two values"):
            resuscitate.recalibrate_batchnorm(model, torch.ones(1, 2))

    def test_a_shared_batchnorm_pools_all_its_calls(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn = nn.BatchNorm2d(3, affine=False)

            def forward(self, x):
                return self.bn(x) + self.bn(2 * x)

        model, x = Twice(), images()
        resuscitate.recalibrate_batchnorm(model, x, batch_size=7)
        both = torch.cat([x, 2 * x])
        torch.testing.assert_close(model.bn.running_mean, both.mean((0, 2, 3)))
        torch.testing.assert_close(model.bn.running_var, both.var((0, 2, 3)))

    def test_frozen_and_statisticless_batchnorms_are_kept_and_reported(self):
        model = nn.Sequential(
            nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3)
        ).train()
        model[2].eval()
        report = resuscitate.recalibrate_batchnorm(model, images())
        assert model[2].running_mean.eq(0).all()
        assert [row.name for row in report.layers] == ["0"]
        assert "'1' keeps no running statistics" in report.notes[0]
        assert "'2' is frozen" in report.notes[1]
        assert [
            r.name for r in resuscitate.recalibrate_batchnorm(model, images(), mode=Exact(frozen="recalibrate")).layers
        ] == [
            "0",
            "2",
        ]

    def test_where_all_are_frozen_the_error_says_so(self):
        model = nn.Sequential(nn.BatchNorm2d(3)).train()
        model[0].eval()
        with pytest.raises(
            ResuscitateError, match=r"no BatchNorm to .* '0' is frozen .* unless frozen='recalibrate'; use"
        ):
            resuscitate.recalibrate_batchnorm(model, images())

    def test_half_precision_statistics_that_overflow_are_refused(self):
        model = nn.Sequential(nn.BatchNorm2d(3)).half()
        with pytest.raises(LayerError, match=r"do not fit into torch.float16"):
            resuscitate.recalibrate_batchnorm(model, images() * 1000)


class TestByMomentum:
    def test_it_is_what_pytorch_does_in_training_mode(self):
        ours, theirs = pruned_copy(seeded(Residual)), pruned_copy(seeded(Residual))
        resuscitate.recalibrate_batchnorm(ours, images(), mode=EMA(batches=3, batch_size=8, momentum=0.3))
        for module in theirs.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                module.momentum = 0.3
        theirs.train()
        for batch in images().split(8):
            theirs(batch)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
        assert not ours.training

    def test_a_share_of_the_initial_variance_is_left(self):
        model = nn.Sequential(nn.BatchNorm2d(1))
        x = torch.randn(200, 1, 4, 4) * 1e-3
        resuscitate.recalibrate_batchnorm(model, x, mode=EMA(batches=20, batch_size=10))
        assert float(model[0].running_var) == pytest.approx(0.9**20, rel=1e-3)

    def test_dropout_stays_off(self):
        model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm2d(3))
        resuscitate.recalibrate_batchnorm(model, images(), mode=EMA(batches=1, batch_size=24, momentum=1.0))
        torch.testing.assert_close(model[1].running_mean, images().mean((0, 2, 3)))


class TestCancellation:
    """An exact BatchNorm undoes gain and shift: BN(g*x + c) = BN(x), but for eps -> eps / g^2 (method, section 2)."""

    @pytest.mark.parametrize("conv_bias", [False, True], ids=["no bias", "bias"])
    @pytest.mark.parametrize("method", ["layerwise", "channelwise", "asr"])
    @pytest.mark.parametrize("schedule", ["sequential", "parallel"])
    def test_every_gain_method_ends_where_batchnorm_alone_does(self, conv_bias, method, schedule):
        dense = seeded(lambda: chain(bias=conv_bias))
        for module in dense:
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 1e-12
        plain, gained = pruned_copy(dense, 0.8), pruned_copy(dense, 0.8)
        resuscitate.repair(plain, dense, images(), method="bn")
        options = {
            "method": method,
            "schedule": schedule,
            "recalibrate": "exact",
            "exclude": nn.Linear,
            "skip_first": False,
        }
        report = resuscitate.repair(gained, dense, images(), **options)
        assert max(row.gain[1] for row in report.layers if row.gain) > 1.2  # there was a gain to cancel
        x = images(10, seed=5)
        torch.testing.assert_close(gained(x), plain(x), rtol=1e-3, atol=1e-4)

    def test_momentum_does_not_cancel_a_gain(self):
        dense = seeded(chain)
        plain, gained = pruned_copy(dense, 0.8), pruned_copy(dense, 0.8)
        ema = {"recalibrate": EMA(batches=3, batch_size=8)}
        resuscitate.repair(plain, dense, images(), method="bn", **ema)
        resuscitate.repair(gained, dense, images(), method="channelwise", exclude=nn.Linear, **ema)
        assert (gained(images()) - plain(images())).abs().max() > 1e-2

    def test_kept_dense_statistics_do_not_cancel_a_gain(self):
        dense = seeded(chain)
        model = pruned_copy(dense, 0.8)
        before = (model(images()) - dense(images())).square().mean()
        resuscitate.repair(model, dense, images(), method="channelwise")
        assert (model(images()) - dense(images())).square().mean() < before


class TestDenseStatistics:
    def test_they_are_copied_where_they_differ(self):
        dense = seeded(chain)
        model, other = pruned_copy(dense), pruned_copy(dense)
        other[4].running_mean.add_(1.0)
        resuscitate.repair(model, dense, images())
        report = resuscitate.repair(other, dense, images())
        assert "1 BatchNorms had other statistics than the dense model: copied from it" in report.notes
        torch.testing.assert_close(other.state_dict(), model.state_dict())


FOLDS = [
    (nn.Conv1d(4, 6, 3, groups=2), nn.BatchNorm1d(6), (2, 4, 9)),
    (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), (2, 4, 7, 7)),
    (nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4, affine=False), (2, 4, 7, 7)),
    (nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3), (2, 2, 4, 4, 4)),
    (nn.ConvTranspose1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 9)),
    (nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), (2, 4, 7, 7)),
    (nn.ConvTranspose2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), (2, 4, 7, 7)),
    (nn.ConvTranspose3d(4, 6, 2, groups=2), nn.BatchNorm3d(6), (2, 4, 3, 3, 3)),
    (nn.Linear(5, 7), nn.BatchNorm1d(7), (3, 5)),
    (nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7), (3, 5)),
]


class TestFolding:
    @pytest.mark.parametrize(
        ("layer", "norm", "shape"), FOLDS, ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else ""
    )
    def test_every_kind_of_layer(self, layer, norm, shape):
        model = seeded(lambda: copy.deepcopy(nn.Sequential(layer, norm)))
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        folded = resuscitate.fold_batchnorm(model, x)
        assert isinstance(folded[1], nn.Identity)
        torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("build", [chain, Residual, Zoo], ids=lambda b: b.__name__)
    def test_whole_networks_without_an_example(self, build):
        model = seeded(build)
        before = copy.deepcopy(model)
        folded = resuscitate.fold_batchnorm(model)
        assert type(folded) is type(model)
        torch.testing.assert_close(folded(images()), model(images()), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.state_dict(), before.state_dict(), rtol=0, atol=0)

    def test_what_cannot_be_folded_stays_and_is_named(self, caplog):
        folded = resuscitate.fold_batchnorm(seeded(Residual))
        assert isinstance(folded.bn2, nn.BatchNorm2d)
        assert "'bn2' is not folded" in caplog.text
        assert folded.fold_report.unchanged == {"bn2": "no layer is read by it alone"}
        assert folded.fold_report.folded == {"bn0": "stem", "bn1": "conv1"}
        assert folded.fold_report.error is None
        assert resuscitate.fold_batchnorm(seeded(Residual), images()).fold_report.error < 1e-5
        with pytest.raises(LayerError, match="'bn2'"):
            resuscitate.fold_batchnorm(seeded(Residual), strict=True)

    @pytest.mark.parametrize("example", [None, images()], ids=["traced", "observed"])
    def test_a_layer_whose_output_is_returned_in_a_dataclass_is_not_folded(self, example):
        model = seeded(Elaborate)
        folded = resuscitate.fold_batchnorm(model, example)
        assert isinstance(folded.bn, nn.BatchNorm2d)
        torch.testing.assert_close(folded(images()).features, model(images()).features)

    def test_a_convolution_used_twice_is_not_folded(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

            def forward(self, x):
                return self.bn(self.conv(x)) + self.conv(x)

        model = seeded(Twice)
        for example in (None, images()):
            folded = resuscitate.fold_batchnorm(model, example)
            torch.testing.assert_close(folded(images()), model(images()))

    def test_a_batchnorm_with_something_more_in_it_is_left_alone(self):
        class BatchNormAct(nn.BatchNorm2d):
            def forward(self, x):
                return super().forward(x).relu()

        model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct(4)))
        folded = resuscitate.fold_batchnorm(model)
        torch.testing.assert_close(folded(images()), model(images()))

    def test_pruned_layers_are_baked_first(self):
        model = seeded(chain)
        nn.utils.prune.l1_unstructured(model[3], "weight", amount=0.5)
        model(images())
        folded = resuscitate.fold_batchnorm(model)
        assert (folded[3].weight == 0).float().mean() == 0.5
        torch.testing.assert_close(folded(images()), model(images()), rtol=1e-4, atol=1e-5)

    def test_control_flow_needs_an_example(self):
        model = seeded(Untraceable)
        with pytest.raises(ValueError, match="pass example="):
            resuscitate.fold_batchnorm(model)
        folded = resuscitate.fold_batchnorm(model, images())
        assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())

    def test_a_network_without_batchnorm_comes_back_unchanged(self):
        model = seeded(Shared)
        torch.testing.assert_close(resuscitate.fold_batchnorm(model).state_dict(), model.state_dict())
