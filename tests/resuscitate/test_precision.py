"""Autocast and memory formats: the repair stays what it is."""

import copy

import pytest
import torch

import resuscitate
from tests.networks import Residual, Untraceable, chain, images, pruned_copy, seeded


@pytest.mark.parametrize("build", [chain, Residual, Untraceable], ids=lambda b: b.__name__)
@pytest.mark.parametrize("dtype", ["bf16", "bfloat16", torch.bfloat16], ids=str)
def test_autocast_measures_in_half_precision_and_leaves_the_model_in_float32(build, dtype):
    dense = seeded(build)
    full, half = pruned_copy(dense), pruned_copy(dense)
    resuscitate.repair(full, dense, images(), method="channelwise", batch_size=7)
    report = resuscitate.repair(half, dense, images(), method="channelwise", batch_size=7, dtype=dtype)
    assert report.walk == ("prefix" if build is Untraceable else "node")
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    with torch.no_grad():
        wanted, found = full(images()), half(images())
    assert (found - wanted).abs().max() < 0.05 * wanted.std()
    assert any(not torch.equal(a, b) for a, b in zip(half.parameters(), full.parameters(), strict=True))


def test_other_precisions_are_refused_before_anything_is_read():
    dense = seeded(chain)
    with pytest.raises(ValueError, match="dtype='int8' is unknown; there are 'bf16', 'fp16' and None"):
        resuscitate.repair(pruned_copy(dense), dense, iter(()), dtype="int8")


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
