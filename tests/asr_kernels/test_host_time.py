"""Calls of one signature repeat a plan: the host binds no arguments and divides no tensor again."""

from __future__ import annotations

import os

import pytest
import torch

import asr_kernels as ak
from benchmarks.speed.host import measure, without_launches

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter launches nothing")

# the aim on an idle machine at 2.5 GHz is a fifth of these microseconds
BOUNDS = {"channel_moments": 100, "affine_": 75, "repair_": 250}


def test_the_host_takes_no_longer_than_a_kernel_of_medium_size():
    # the shortest of many rounds: a busy machine makes some of them slow, but not all
    times = measure(calls=50, rounds=40)
    assert {name: time for name, time in times.items() if time > BOUNDS.get(name, 250)} == {}


def test_a_plan_is_kept_for_each_shape_layout_dtype_and_alignment():
    from asr_kernels.backends.triton_affine import PLANS as OF_AFFINE
    from asr_kernels.backends.triton_moments import PLANS as OF_MOMENTS

    memory = torch.randn(2 * 3 * 49 + 1)
    x, factor = memory[:-1].view(2, 3, 7, 7), torch.ones(4)[:3]
    other = [x.half(), x.contiguous(memory_format=torch.channels_last), memory[1:].view(2, 3, 7, 7), x[:1]]
    with without_launches():
        for number, tensor in enumerate([x, *other], start=1):
            for _ in range(2):
                ak.channel_moments(tensor)
                ak.affine_(tensor, factor, factor)
            assert len(OF_MOMENTS) == len(OF_AFFINE) == number
        ak.channel_moments(x, running=ak.ChannelMoments.empty(3))
        assert len(OF_MOMENTS) == 6


def test_the_oldest_plans_are_forgotten(monkeypatch):
    from asr_kernels.backends import triton_launch

    monkeypatch.setattr(triton_launch, "MOST_PLANS", 2)
    plans = triton_launch.Plans()
    for key in "abc":
        assert plans.add(key, 2 * key) == 2 * key
    assert plans == {"b": "bb", "c": "cc"}
