"""The formulas of the repair rules, on C numbers (arXiv 2605.21426)."""

import math
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import asr_kernels as ak

variances = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=9)


def moments(var, mean=0.0, count=100):
    var = torch.tensor(var, dtype=torch.float64)
    return ak.ChannelMoments(count, torch.as_tensor(mean, dtype=torch.float64).expand_as(var), var * count)


def gains(vd, vp, **options):
    return ak.repair_factors(moments(vd), moments(vp), **options)[0].tolist()


def test_layerwise_is_one_gain_from_the_mean_variances():
    assert gains([4.0, 12.0], [1.0, 3.0], rule="layerwise", eps=0.0) == [2.0, 2.0]


def test_channelwise_is_the_root_of_each_variance_ratio():
    assert gains([4.0, 9.0], [1.0, 1.0], rule="channelwise", eps=0.0) == [2.0, 3.0]


def test_asr_equals_a_computation_by_hand():
    # lam = median(1, 3, 4) = 3; trust = 1/4, 3/6, 4/7; raw = 2, 1, 1/2
    wanted = [0.25 * 2 + 0.75, 1.0, 4 / 7 * 0.5 + 3 / 7]
    assert gains([4.0, 3.0, 1.0], [1.0, 3.0, 4.0], eps=0.0) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(("prior", "lam"), [("median", 2.0), ("mean", 3.75), (0.5, 0.5)], ids=str)
def test_the_prior_is_the_lower_median_the_mean_or_a_number(prior, lam):
    vp = [1.0, 2.0, 4.0, 8.0]
    wanted = [v / (v + lam) * math.sqrt(9 / v) + lam / (v + lam) for v in vp]
    assert gains([9.0] * 4, vp, prior=prior, eps=0.0) == pytest.approx(wanted, rel=1e-12)


@given(st.data(), variances)
def test_asr_lies_between_one_and_raw(data, vp):
    vd = data.draw(st.lists(st.floats(1e-6, 1e6), min_size=len(vp), max_size=len(vp)))
    for gain, raw in zip(gains(vd, vp), gains(vd, vp, rule="channelwise"), strict=True):
        assert min(1, raw) * (1 - 1e-12) <= gain <= max(1, raw) * (1 + 1e-12)


@given(variances, st.sampled_from(["layerwise", "channelwise", "asr"]))
def test_equal_moments_need_no_repair(var, rule):
    gain, shift = ak.repair_factors(moments(var, 3.0), moments(var, 3.0), rule=rule, eps=0.0)
    torch.testing.assert_close(gain, torch.ones_like(gain), rtol=1e-12, atol=0)
    torch.testing.assert_close(shift, torch.zeros_like(shift), rtol=0, atol=1e-9)


@pytest.mark.parametrize("rule", ["layerwise", "channelwise", "asr"])
def test_gain_and_shift_restore_the_dense_mean(rule):
    dense, pruned = moments([4.0, 1.0], [2.0, -3.0]), moments([1.0, 0.5], [0.5, 7.0])
    gain, shift = ak.repair_factors(dense, pruned, rule=rule)
    torch.testing.assert_close(gain * pruned.mean + shift, dense.mean)
    assert not ak.repair_factors(dense, pruned, rule=rule, bias=False)[1].any()


@pytest.mark.parametrize("rule", ["channelwise", "asr"])
def test_a_dead_channel_has_gain_one(rule):
    assert gains([1.0, 1.0, 1.0], [0.0, 1.0, 2.0], rule=rule)[0] == 1.0


def test_with_half_the_channels_dead_all_gains_are_one():
    assert gains([1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.5, 2.0]) == [1.0] * 4


@pytest.mark.parametrize("rule", ["layerwise", "channelwise", "asr"])
def test_a_wholly_dead_layer_has_gains_of_one_and_the_dense_mean_as_shift(rule):
    gain, shift = ak.repair_factors(moments([1.0, 2.0], [3.0, 4.0]), moments([0.0, 0.0]), rule=rule)
    assert gain.tolist() == [1.0, 1.0]
    assert shift.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("prior", ["median", "mean"])
def test_a_channel_with_nan_or_infinity_does_not_change_the_others(bad, prior):
    clean = gains([4.0, 3.0, 1.0], [1.0, 3.0, 4.0], prior=prior)
    assert gains([4.0, 3.0, 1.0, 2.0], [1.0, 3.0, 4.0, bad], prior=prior)[:3] == clean
    layerwise = gains([4.0, 3.0, 1.0], [1.0, 3.0, 4.0], rule="layerwise")
    assert gains([4.0, 3.0, 1.0, bad], [1.0, 3.0, 4.0, bad], rule="layerwise")[:3] == layerwise


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "best"}, "unknown rule 'best'; there are layerwise, channelwise, asr"),
        ({"prior": "mode"}, "prior must be"),
        ({"prior": 0.0}, "prior must be"),
        ({"prior": -1.0}, "prior must be"),
        ({"eps": -1.0}, "eps must not be negative"),
    ],
    ids=str,
)
def test_invalid_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        gains([1.0], [1.0], **options)


def test_moments_of_no_values_or_of_other_channels_are_errors():
    with pytest.raises(ValueError, match="no values"):
        ak.repair_factors(moments([1.0]), ak.ChannelMoments.empty(1))
    with pytest.raises(ValueError, match="2 dense channels cannot repair 1"):
        ak.repair_factors(moments([1.0, 1.0]), moments([1.0]))


def test_a_rule_without_a_formula_is_an_error_on_every_backend(backend, device, monkeypatch):
    dense, pruned = moments([4.0, 3.0, 1.0]), moments([1.0, 3.0, 4.0])
    there = [ak.ChannelMoments(m.count, m.mean.to(device), m.m2.to(device)) for m in (dense, pruned)]
    # "new" is in `Rule` and nowhere else
    monkeypatch.setattr(ak.ops, "Rule", Literal["layerwise", "channelwise", "asr", "new"])
    with pytest.raises(ValueError, match="no formula for the rule 'new'"):
        ak.repair_factors(*there, rule="new")


def test_triton_uses_the_pytorch_formula_of_a_rule_that_its_kernel_lacks(monkeypatch):
    kernels = pytest.importorskip("asr_kernels.backends.triton_factors")
    dense, pruned = moments([4.0, 3.0, 1.0], 2.0), moments([1.0, 3.0, 4.0])
    monkeypatch.setattr(ak.factors, "repair_factors", lambda dense, pruned, *_: (dense.var, pruned.var))
    gain, shift = kernels.repair_factors(dense, pruned, "new", "median", True, 1e-8)
    assert gain.tolist() == [4, 3, 1]
    assert shift.tolist() == [1, 3, 4]


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_kernel_raises_for_an_unknown_rule(backend, device):
    from asr_kernels.backends.triton_factors import plan_factors

    there = ak.ChannelMoments.empty(3, device)
    launch, _ = plan_factors(there, there, "new", "median", True, 1e-8)
    with pytest.raises(Exception, match="no other rule"):
        launch.run()


AWKWARD = {
    "ordinary": ([4.0, 3.0, 1.0, 0.5, 7.0], [1.0, 3.0, 4.0, 2.0, 1e-3]),
    "even": ([1.0, 2.0], [2.0, 1.0]),
    "one channel": ([2.0], [0.5]),
    "half of them dead": ([1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 3.0, 4.0]),
    "all dead": ([1.0, 1.0], [0.0, 0.0]),
    "not finite": ([1.0, math.nan, 2.0, math.inf, 3.0], [math.nan, 1.0, math.inf, 2.0, 5e-324]),
    "nothing finite": ([1.0, 1.0], [math.nan, math.inf]),
    "constant but for rounding": ([1.0, 2.0, 3.0, 1.0], [1e-13, 2.0, 1e-14, 0.5]),
    "many, some equal": ([1.0] * 37, [float(i % 5) for i in range(37)]),
}


def test_a_channel_constant_up_to_rounding_is_dead():
    # channel 1: 0.3 in float32, with some values one unit in the last place away
    pruned = moments([1.0, 1e-16, 1e-16], torch.tensor([0.0, 0.3, 0.0], dtype=torch.float64))
    for rule in ("channelwise", "asr"):
        gain, _ = ak.repair_factors(moments([4.0] * 3), pruned, rule=rule, prior=1.0, eps=0.0)
        assert gain[1] == 1
    assert ak.repair_factors(moments([4.0] * 3), pruned, rule="channelwise", eps=0.0)[0][2] > 1e7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rule", ["layerwise", "channelwise", "asr"])
def test_moments_of_any_dtype_are_converted_to_float64(backend, device, rule, dtype):
    mean, m2 = torch.tensor([1.0, -2.0, 0.5], device=device), torch.tensor([100.0, 400.0, 300.0], device=device)
    wanted = [ak.ChannelMoments(100, mean.double(), (m2 * k).double()) for k in (1, 0.5)]
    short = [ak.ChannelMoments(100, mean.to(dtype), (m2 * k).to(dtype)) for k in (1, 0.5)]
    for a, b in zip(ak.repair_factors(*short, rule=rule), ak.repair_factors(*wanted, rule=rule), strict=True):
        assert a.dtype == torch.float64
        assert torch.equal(a, b)


def test_dense_moments_are_moved_to_the_device_of_the_pruned_moments():
    # "meta" acts as another device, without values
    dense, x = moments([4.0, 3.0, 1.0]), torch.randn(4, 3, 5, device="meta")
    with ak.use_backend("reference"):
        gain, shift = ak.repair_factors(dense, ak.channel_moments(x))
        repaired, _, pruned = ak.repair_(x, dense)
    for found in (gain, shift, repaired, pruned.mean):
        assert found.device.type == "meta"
        assert found.shape == (3,)


@pytest.mark.parametrize("channels", [2048, 3001, 8193])
def test_the_median_of_many_channels_is_the_lower_of_the_middle_two(backend, device, channels):
    vp = torch.rand(channels, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).exp2().tolist()
    lam = sorted(vp)[(channels - 1) // 2]
    dense, pruned = (ak.ChannelMoments(m.count, m.mean.to(device), m.m2.to(device)) for m in map(moments, (vp, vp)))
    wanted = ak.repair_factors(dense, pruned, prior=lam, eps=1.0)[0]
    torch.testing.assert_close(ak.repair_factors(dense, pruned, eps=1.0)[0], wanted, rtol=1e-14, atol=0)


@pytest.mark.parametrize("case", AWKWARD.values(), ids=AWKWARD.keys())
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(
    ("rule", "prior"),
    [("layerwise", "median"), ("channelwise", "median"), ("asr", "median"), ("asr", "mean"), ("asr", 0.1)],
    ids=str,
)
# NumPy warns about NaN in the interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_every_backend_agrees_with_the_formulas(backend, device, rule, prior, bias, case):
    dense, pruned = (moments(var, 3.0, count) for var, count in zip(case, (100, 49), strict=True))
    with ak.use_backend("torch"):
        wanted = ak.repair_factors(dense, pruned, rule=rule, prior=prior, bias=bias)
    there = [ak.ChannelMoments(m.count, m.mean.to(device), m.m2.to(device)) for m in (dense, pruned)]
    found = ak.repair_factors(*there, rule=rule, prior=prior, bias=bias)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-14, atol=1e-14, equal_nan=True)
