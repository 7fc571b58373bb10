"""The promises of the design, one test or group of tests for each."""

import copy
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

import resuscitate
from resuscitate import EMA
from resuscitate.engine import writer
from tests.compare import same
from tests.networks import Residual, Shared, Zoo, chain, images, pruned_copy, seeded

METHODS = ["bn", "layerwise", "channelwise", "asr", "refit"]


def broken_loader():
    yield images(4)
    raise OSError("disk gone")


class TestAllOrNothing:
    @pytest.mark.parametrize("method", METHODS)
    def test_a_loader_that_fails_midway_leaves_the_model_bit_identical(self, method):
        dense = seeded(chain)
        model = pruned_copy(dense).train()
        before = copy.deepcopy(model)
        with pytest.raises(OSError, match="disk gone"):
            resuscitate.repair(model, dense, broken_loader(), method=method)
        assert same(model, before)
        assert model.training

    @pytest.mark.parametrize("build", [chain, Residual, Shared], ids=lambda b: b.__name__)
    @pytest.mark.parametrize(
        "options",
        [{"method": "asr"}, {"method": "asr", "recalibrate": "exact"}, {"method": "refit"}],
        ids=["gains", "gains and BatchNorm", "refit"],
    )
    def test_a_failure_at_the_last_layer_takes_back_what_was_written(self, build, options, monkeypatch):
        dense = seeded(build)
        model = pruned_copy(dense)
        before = copy.deepcopy(model)
        written = []
        write = writer.write_change

        def fail_at_the_second(*args):
            if written:
                raise RuntimeError("out of memory")
            written.append(write(*args))

        monkeypatch.setattr(writer, "write_change", fail_at_the_second)
        with pytest.raises(RuntimeError, match="out of memory"):
            resuscitate.repair(model, dense, images(), **options)
        assert written
        assert same(model, before)

    def test_an_interrupt_takes_back_what_was_written(self, monkeypatch):
        dense = seeded(chain)
        model = pruned_copy(dense)
        before = copy.deepcopy(model)

        written, write = [], writer.write_change

        def interrupted(change, flags):
            if isinstance(change.module, nn.BatchNorm2d):
                raise KeyboardInterrupt
            written.append(write(change, flags))

        monkeypatch.setattr(writer, "write_change", interrupted)
        with pytest.raises(KeyboardInterrupt):
            resuscitate.repair(model, dense, images(), recalibrate="exact")
        assert written
        assert same(model, before)

    @pytest.mark.parametrize("build", [chain, Residual, Shared, Zoo], ids=lambda b: b.__name__)
    def test_undo_brings_every_tensor_and_key_back(self, build):
        dense = seeded(build)
        model = pruned_copy(dense)
        before = copy.deepcopy(model)
        report = resuscitate.repair(model, dense, images(), method="channelwise", skip_first=False)
        assert not same(model, before)
        report.undo()
        assert same(model, before)
        with pytest.raises(RuntimeError, match="undone already"):
            report.undo()


class TestZerosStayZero:
    @given(sparsity=st.floats(0, 0.95), method=st.sampled_from(METHODS), seed=st.integers(0, 50))
    @settings(deadline=None, max_examples=25)
    def test_bit_for_bit_at_any_sparsity(self, sparsity, method, seed):
        dense = seeded(chain, seed)
        model = pruned_copy(dense, sparsity)
        zeros = {name: p == 0 for name, p in model.named_parameters() if p.dim() > 1}
        resuscitate.repair(model, dense, images(8), method=method)
        for name, mask in zeros.items():
            assert torch.equal(model.get_parameter(name) == 0, mask)

    def test_a_torch_prune_mask_stays_that_mask(self):
        dense = seeded(chain)
        model = copy.deepcopy(dense)
        for module in (model[0], model[3], model[6], model[11]):
            prune.l1_unstructured(module, "weight", amount=0.5)
        plain = copy.deepcopy(dense)
        with torch.no_grad():
            for a, b in zip(plain.modules(), model.modules(), strict=True):
                if hasattr(b, "weight_mask"):
                    a.weight.copy_(b.weight)
        masks = {name: b.clone() for name, b in model.named_buffers() if name.endswith("weight_mask")}
        resuscitate.repair(model, dense, images())
        resuscitate.repair(plain, dense, images())
        for name, mask in masks.items():
            assert torch.equal(model.get_buffer(name), mask)
        x = images(5, seed=9)
        torch.testing.assert_close(model(x), plain(x))  # weight_orig was scaled, so the next forward keeps the repair
        assert torch.equal(model[3].weight == 0, model[3].weight_mask == 0)

    def test_a_broken_zero_is_an_error_that_names_the_layer(self):
        dense = seeded(chain)
        model = pruned_copy(dense)
        masks = resuscitate.Masks.from_zeros(model)
        with torch.no_grad():
            model[3].weight[model[3].weight == 0] = 1e-3
        with pytest.raises(resuscitate.errors.MaskError, match="layer '3'"):
            masks.check(model)


class TestNoSurpriseState:
    def test_flags_and_requires_grad_stay_as_found(self):
        dense, model = seeded(Residual), pruned_copy(seeded(Residual)).train()
        model.bn1.eval()
        dense.bn2.train()
        model.conv1.weight.requires_grad_(False)
        flags = [m.training for net in (model, dense) for m in net.modules()]
        found = {name: (p, p.requires_grad) for name, p in model.named_parameters()}
        resuscitate.repair(model, dense, images(), recalibrate=EMA(batches=2, batch_size=8))
        assert [m.training for net in (model, dense) for m in net.modules()] == flags
        for name, (parameter, grad) in found.items():
            assert model.get_parameter(name) is parameter
            assert parameter.requires_grad == grad

    def test_the_random_state_stays_as_found(self):
        dense = seeded(chain)
        loader = torch.utils.data.DataLoader(images(), batch_size=5, shuffle=True)
        random.seed(3), np.random.seed(3), torch.manual_seed(3)
        wanted = random.random(), np.random.rand(), torch.rand(1).item()
        random.seed(3), np.random.seed(3), torch.manual_seed(3)
        resuscitate.repair(pruned_copy(dense), dense, loader)
        assert (random.random(), np.random.rand(), torch.rand(1).item()) == wanted

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
    def test_dtype_and_memory_format_stay_as_found(self, dtype):
        dense = seeded(chain).to(dtype).to(memory_format=torch.channels_last)
        model = pruned_copy(dense)
        before = {k: (v.dtype, v.stride(), v.device) for k, v in model.state_dict().items()}
        resuscitate.repair(model, dense, images(), method="channelwise")
        assert {k: (v.dtype, v.stride(), v.device) for k, v in model.state_dict().items()} == before

    def test_no_new_key_where_a_batchnorm_can_take_the_shift(self):
        dense = seeded(chain)
        model = pruned_copy(dense)
        report = resuscitate.repair(model, dense, images(), method="channelwise", skip_first=False)
        assert list(model.state_dict()) == list(dense.state_dict())
        assert [r.shift_into for r in report.layers] == ["running_mean"] * 3 + ["bias"]

    def test_the_dense_model_and_the_images_are_only_read(self):
        dense, x = seeded(chain), images()
        before, pixels = copy.deepcopy(dense), x.clone()
        resuscitate.repair(pruned_copy(dense), dense, x)
        assert same(dense, before)
        assert torch.equal(x, pixels)

    def test_precision_switches_and_momentum_stay_as_found(self):
        dense = seeded(chain)
        model = pruned_copy(dense)
        model[1].momentum = None
        found = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.deterministic
        resuscitate.recalibrate_batchnorm(model, images(), mode=EMA(batches=1, batch_size=8))
        assert model[1].momentum is None
        assert (torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.deterministic) == found


class TestSameAnswer:
    @pytest.mark.parametrize("build", [chain, Residual, Shared], ids=lambda b: b.__name__)
    @pytest.mark.parametrize("method", METHODS[1:4])
    @pytest.mark.parametrize("recalibrate", [None, "exact"])
    @pytest.mark.parametrize("schedule", ["sequential", "parallel"])
    def test_for_any_batch_size(self, build, method, recalibrate, schedule):
        if build is Shared and recalibrate:
            pytest.skip("that network has no BatchNorm to re-estimate")
        dense = seeded(build)
        results = []
        for batch_size in (64, 1, 7):
            results.append(pruned_copy(dense))
            options = {"method": method, "recalibrate": recalibrate, "schedule": schedule, "gain_samples": 20}
            resuscitate.repair(results[-1], dense, images(23), batch_size=batch_size, **options)
        for other in results[1:]:
            torch.testing.assert_close(other.state_dict(), results[0].state_dict(), rtol=2e-5, atol=2e-6)

    @pytest.mark.parametrize(("method", "rounding"), [("asr", 1), ("refit", 10)])
    def test_in_either_memory_format(self, method, rounding):
        dense = seeded(Residual)
        plain, last = pruned_copy(dense), pruned_copy(dense).to(memory_format=torch.channels_last)
        resuscitate.repair(plain, dense, images(), method=method)
        resuscitate.repair(last, dense, images().to(memory_format=torch.channels_last), method=method)
        torch.testing.assert_close(last.state_dict(), plain.state_dict(), rtol=2e-5 * rounding, atol=2e-6 * rounding)

    @pytest.mark.parametrize(
        "recalibrate", [None, "exact", EMA(batches=2, batch_size=12)], ids=["none", "exact", "ema"]
    )
    def test_bit_identical_when_run_again(self, recalibrate):
        dense = seeded(Residual)
        loader = torch.utils.data.DataLoader(images(), batch_size=5, shuffle=True)
        first, second = pruned_copy(dense), pruned_copy(dense)
        for model in (first, second):
            resuscitate.repair(model, dense, loader, recalibrate=recalibrate, gain_samples=9)
        assert same(first, second)

    def test_ema_is_cut_to_its_stated_batch_size(self):
        dense = seeded(chain)
        models = [pruned_copy(dense), pruned_copy(dense)]
        for model, batch_size in zip(models, (5, 24), strict=True):
            loader = images().split(batch_size)
            resuscitate.recalibrate_batchnorm(model, loader, mode=EMA(batches=3, batch_size=8))
        assert same(*models)


class TestPlainErrors:
    def run(self, message, error=ValueError, model=None, dense=None, calibration=None, **options):
        reference = seeded(chain)
        model = pruned_copy(reference) if model is None else model
        before = copy.deepcopy(model)
        with pytest.raises(error, match=message):
            resuscitate.repair(
                model,
                reference if dense is None else dense,
                images() if calibration is None else calibration,
                **options,
            )
        assert same(model, before)

    def test_unknown_choices_list_what_there_is(self):
        names = "'auto', 'bn', 'layerwise', 'channelwise', 'asr', 'mean', 'refit'"
        self.run(f"method='magic' is unknown; there are {names}", method="magic")
        self.run("schedule='never' is unknown", schedule="never")
        self.run("recalibrate='often' is unknown", recalibrate="often")

    def test_counts_below_one(self):
        self.run("gain_samples must be", gain_samples=0)
        with pytest.raises(ValueError, match="samples=-1 must be at least 1"):
            resuscitate.Exact(samples=-1)
        self.run("max_samples must be", max_samples=0)

    def test_an_unknown_layer_name_comes_with_close_matches(self):
        model = seeded(Residual)
        self.run("'conv3'.*did you mean conv", model=pruned_copy(model), dense=model, include="conv3")

    def test_a_missing_dense_model(self):
        with pytest.raises(ValueError, match=r"pass dense, or .*call recalibrate_batchnorm\(model, images\)"):
            resuscitate.repair(pruned_copy(seeded(chain)), None, images())

    def test_models_that_do_not_match(self):
        self.run("layer '0' is .*8, 3, 3, 3.* and .*4, 3, 3, 3", dense=seeded(lambda: chain(width=4)))
        self.run("layer '3' is Conv2d.* ReLU", dense=seeded(lambda: chain(batchnorm=False)))
        self.run("has no layer '11'", dense=seeded(chain)[:11])
        model = seeded(chain)
        self.run("the pruned model itself", model=model, dense=model)
        self.run("shares its weight", model=model, dense=copy.copy(model))

    def test_a_recomputed_weight_is_refused_by_name(self):
        dense = seeded(chain)
        model = pruned_copy(dense)
        nn.utils.parametrizations.weight_norm(model[3])
        with pytest.raises(ValueError, match=r"layer '3'.*recomputed.*bake it first"):
            resuscitate.repair(model, dense, images())

    def test_a_lazy_layer_is_refused_by_name(self):
        lazy = nn.Sequential(nn.LazyConv2d(4, 3))
        with pytest.raises(ValueError, match=r"layer '0'.*run one forward pass first"):
            resuscitate.repair(lazy, nn.Sequential(nn.LazyConv2d(4, 3)), images())

    def test_no_images(self):
        self.run("no batches", calibration=[])
        self.run("the iterator is used up", calibration=iter(()))

    def test_too_few_images_for_the_published_protocol(self):
        self.run("2560", recalibrate="ema")

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_non_finite_activations_name_the_batch_and_the_layer(self, bad):
        x = images()
        x[9, 1, 2, 2] = bad
        self.run("layer '0|layer '3'.*batch 1", calibration=x, batch_size=8)

    def test_non_finite_images_can_be_skipped_and_are_counted(self):
        x, dense = images(), seeded(chain)
        clean = torch.cat([x[:9], x[10:]])
        x = x.clone()
        x[9, 1, 2, 2] = float("nan")
        skipping, without = pruned_copy(dense), pruned_copy(dense)
        report = resuscitate.repair(skipping, dense, x, method="asr", on_nonfinite="skip", batch_size=8)
        resuscitate.repair(without, dense, clean, method="asr")
        assert (report.skipped, report.images) == (1, 23)
        torch.testing.assert_close(skipping.state_dict(), without.state_dict(), rtol=2e-5, atol=2e-6)

    def test_a_half_precision_overflow_is_refused_by_name(self):
        dense = seeded(chain).half()
        with torch.no_grad():
            dense[0].weight.mul_(6e4 / float(dense[0].weight.abs().max()))
        options = {"model": pruned_copy(dense, 0.9), "dense": dense, "calibration": images() * 1e-3}
        self.run("layer '0'.*do not fit into torch.float16", method="channelwise", skip_first=False, **options)

    def test_no_batchnorm_to_re_estimate(self):
        model = pruned_copy(seeded(lambda: chain(batchnorm=False)))
        with pytest.raises(resuscitate.errors.ResuscitateError, match="no BatchNorm"):
            resuscitate.recalibrate_batchnorm(model, images())

    def test_a_pruned_bias_is_refused_by_name(self):
        dense = seeded(lambda: chain(bias=True))
        model = pruned_copy(dense)
        prune.l1_unstructured(model[3], "bias", amount=0.5)
        with pytest.raises(ValueError, match=r"layer '3'.*bias is recomputed"):
            resuscitate.repair(model, dense, images())
