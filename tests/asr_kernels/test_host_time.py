"""Calls of one signature repeat a plan: the host binds no arguments and divides no tensor again."""

from __future__ import annotations

import os
import sys
from types import FrameType

import pytest
import torch

import asr_kernels as ak
from benchmarks.speed.host import without_launches

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter launches nothing")

# calls of functions, Python's and C's; 47, 56, 54, 49 and 146 with PyTorch 2.13
MOST_CALLS = {"channel_moments": 60, "paired_moments": 70, "repair_factors": 70, "affine_": 60, "repair_": 180}


def test_the_host_calls_few_functions_where_the_plan_is_known():
    x, factor = torch.randn(2, 64, 14, 14), torch.ones(64)
    calls = dict.fromkeys(MOST_CALLS, 0)
    with without_launches():
        dense = ak.channel_moments(x)
        functions = {
            "channel_moments": lambda: ak.channel_moments(x),
            "paired_moments": lambda: ak.paired_moments(x, x),
            "repair_factors": lambda: ak.repair_factors(dense, dense),
            "affine_": lambda: ak.affine_(x, factor, factor),
            "repair_": lambda: ak.repair_(x, dense),
        }
        for name, function in functions.items():

            def count(frame: FrameType, event: str, argument: object, name: str = name) -> None:
                calls[name] += event in ("call", "c_call")

            function()
            before = sys.getprofile()
            sys.setprofile(count)
            try:
                function()
            finally:
                sys.setprofile(before)
    assert {name: count for name, count in calls.items() if not 0 < count <= MOST_CALLS[name]} == {}


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
