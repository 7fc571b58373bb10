"""Autocast and memory formats: the repair stays what it is."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import resuscitate
from asr_kernels.precision import full_precision_of_models
from tests.networks import Residual, Untraceable, chain, images, pruned_copy, seeded


@pytest.mark.parametrize("build", [chain, Residual, Untraceable], ids=lambda b: b.__name__)
@pytest.mark.parametrize("dtype", ["bf16", "bfloat16", torch.bfloat16], ids=str)
def test_autocast_measures_in_half_precision_and_leaves_the_model_in_float32(build, dtype):
    dense = seeded(build)
    full, half = pruned_copy(dense), pruned_copy(dense)
    resuscitate.repair(full, dense, images(), method="channelwise", batch_size=7)
    report = resuscitate.repair(half, dense, images(), method="channelwise", batch_size=7, dtype=dtype)
    assert report.walk == ("suspended" if build is Untraceable else "graph")
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    with torch.no_grad():
        wanted, found = full(images()), half(images())
    assert (found - wanted).abs().max() < 0.05 * wanted.std()
    assert any(not torch.equal(a, b) for a, b in zip(half.parameters(), full.parameters(), strict=True))


def test_other_precisions_are_refused_before_anything_is_read():
    dense = seeded(chain)
    with pytest.raises(ValueError, match="dtype='int8' is unknown; there are 'bf16', 'fp16' and None"):
        resuscitate.repair(pruned_copy(dense), dense, iter(()), dtype="int8")


class Casting(nn.Module):
    """Runs its layers under an autocast of its own, as many models do."""

    def __init__(self):
        super().__init__()
        self.body = chain()

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.body(x).float()


def acts(model, dense):
    """What a repair, a compression and a regrowth leave of the weights, and what measurements say."""
    found = []
    for method in ("asr", "refit", "bn", "mean"):
        repaired = copy.deepcopy(model)
        resuscitate.repair(repaired, None if method == "bn" else dense, images(), method=method, batch_size=7)
        found.append(repaired.state_dict())
    compressed = copy.deepcopy(dense)
    masks = resuscitate.compress(compressed, 0.7, images(), steps=2).masks
    found.append(compressed.state_dict())
    resuscitate.regrow(compressed, dense, masks, 0.5, images(), saliency="residual", budget="damage")
    found.append(compressed.state_dict())
    statistics = resuscitate.DenseStatistics.measure(dense, images())
    found.append({name: calls[0].m2 for name, calls in statistics.layers.items()})
    found.append({name: each.correlation for name, each in resuscitate.damage(model, dense, images()).items()})
    found.append(resuscitate.allocate(dense, 0.8, "rr", calibration=images()))
    return found


@pytest.mark.parametrize("build", [chain, Residual, Untraceable, Casting], ids=lambda b: b.__name__)
def test_the_callers_autocast_changes_no_bit(build):
    dense = seeded(build)
    model = pruned_copy(dense)
    wanted = acts(model, dense)
    with torch.autocast("cpu", torch.bfloat16):
        model(images()), dense(images())  # PyTorch keeps the casts of these weights from here on
        found = acts(model, dense)
        assert torch.is_autocast_cache_enabled()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_what_changes_weights_leaves_no_old_casts_to_the_callers_autocast():
    dense = seeded(chain)
    model = pruned_copy(dense)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        before = model(images())
        report = resuscitate.repair(model, dense, images())
        repaired = model(images())
        assert torch.equal(repaired, copy.deepcopy(model)(images()))
        assert not torch.equal(repaired, before)
        report.undo()
        assert torch.equal(model(images()), before)
        resuscitate.sparsify(model, 0.9)
        assert torch.equal(model(images()), copy.deepcopy(model)(images()))


class Reading(nn.Module):
    """A network that reads a setting, or makes one for itself, wherever it runs."""

    def __init__(self, setting):
        super().__init__()
        self.body, self.setting, self.found = chain(), setting, []

    def forward(self, x):
        with self.setting() or nullcontext() as found:
            self.found.append(found)
            return self.body(x)


SETTINGS = {
    "cudnn.flags": lambda: torch.backends.cudnn.flags(enabled=False),
    "cudnn.flags, all of them": lambda: torch.backends.cudnn.flags(True, False, 10, True, False),
    "backends.flags": lambda: torch.backends.flags(fp32_precision="ieee"),
    "mkldnn.matmul": lambda: nullcontext(torch.backends.mkldnn.matmul.fp32_precision),
    "cudnn.allow_tf32": lambda: nullcontext(torch.backends.cudnn.allow_tf32),
    "cuda.matmul.allow_tf32": lambda: nullcontext(torch.backends.cuda.matmul.allow_tf32),
    "get_float32_matmul_precision": lambda: nullcontext(torch.get_float32_matmul_precision()),
    "set_float32_matmul_precision": lambda: torch.set_float32_matmul_precision("high"),
    "cudnn.allow_tf32 = True": lambda: setattr(torch.backends.cudnn, "allow_tf32", True),
    "cudnn.conv.fp32_precision": lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "tf32"),
}


def older_flags():
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True


def newer_settings():
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "tf32"


def settings():
    """What each setting reads as, in both interfaces; None where they disagree."""
    found = []
    for read in (
        lambda: torch.backends.cudnn.allow_tf32,
        lambda: torch.backends.cuda.matmul.allow_tf32,
        torch.get_float32_matmul_precision,
    ):
        try:
            found.append(read())
        except RuntimeError:
            found.append(None)
    places = [torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.cudnn.conv, torch.backends.cudnn.rnn]
    places += [torch.backends, torch.backends.mkldnn, torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv]
    return [*found, *(place.fp32_precision for place in places)]


@pytest.mark.parametrize("caller", [older_flags, newer_settings], ids=lambda caller: caller.__name__)
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_model_may_read_and_make_settings_of_precision_and_the_callers_stay(setting, caller):
    dense = seeded(lambda: Reading(setting))
    plain, model = pruned_copy(dense.body), pruned_copy(dense)
    options = {"method": "channelwise", "batch_size": 6}
    resuscitate.repair(plain, dense.body, images(6), **options)
    # within it, the settings of this test do not reach the others
    with full_precision_of_models():
        caller()
        before = settings()
        resuscitate.repair(model, dense, images(6), **options)
        assert settings() == before
    assert dense.found
    assert set(dense.found) <= {None, False, "highest", "ieee"}
    torch.testing.assert_close(model.body.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.real_data
@pytest.mark.slow
def test_bf16_and_channels_last_keep_the_accuracy_within_half_a_point(real):
    dense, calibration, test, labels = real
    pruned = copy.deepcopy(dense)
    resuscitate.sparsify(pruned, 0.7)

    def accuracy(memory_format=torch.contiguous_format, **options):
        model, original = (copy.deepcopy(m).to(memory_format=memory_format) for m in (pruned, dense))
        resuscitate.repair(model, original, calibration, method="channelwise", **options)
        return resuscitate.Accuracy(test, labels)(model)

    plain = accuracy()
    assert plain > 70  # from 54 without a repair
    assert accuracy(dtype="bf16") == pytest.approx(plain, abs=0.5)
    assert accuracy(memory_format=torch.channels_last) == pytest.approx(plain, abs=0.5)
