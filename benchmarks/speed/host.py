"""The time that the host takes for one call of a kernel's public function, with the launch itself left out.

    python benchmarks/speed/host.py

It needs no GPU: everything runs but Triton's compiled launcher, which takes two to three microseconds more for each
kernel. The minimum of several rounds is printed, in microseconds; a device is idle for that long where a kernel is
shorter.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import typer

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in (".", "python")]  # this checkout

import asr_kernels as ak


@contextmanager
def without_launches() -> Iterator[None]:
    """Run the Triton backend on CPU tensors, without its launches."""
    from asr_kernels.backends import triton_affine, triton_factors, triton_launch, triton_moments

    prepare = triton_launch.Repeated.__init__

    def prepared(self: Any, launch: Any, first: int) -> None:
        prepare(self, launch, first)
        self._call = lambda *arguments: None

    kernels = (triton_moments, triton_factors, triton_affine)
    with (
        patch.object(triton_launch.Repeated, "__init__", prepared),
        patch.dict(os.environ, {"TRITON_INTERPRET": "1"}),
        ak.use_backend("triton"),
    ):
        for kernel in kernels:
            kernel.PLANS.clear()
        yield
        for kernel in kernels:
            kernel.PLANS.clear()


def microseconds(call: Callable[[], Any]) -> float:
    """The shortest mean of some calls."""
    calls, found = 500, []
    for _ in range(20):
        started = time.perf_counter()
        for _ in range(calls):
            call()
        found.append(1e6 * (time.perf_counter() - started) / calls)
    return min(found)


def measure() -> dict[str, float]:
    """Microseconds of each function, for activations of 64 channels."""
    x = torch.randn(2, 64, 14, 14)
    y, running, factor = x.clone(), ak.ChannelMoments.empty(64), torch.ones(64)
    with without_launches():
        dense = ak.channel_moments(x)
        functions: dict[str, Callable[[], Any]] = {
            "channel_moments": lambda: ak.channel_moments(x),
            "channel_moments, running": lambda: ak.channel_moments(x, running=running),
            "paired_moments": lambda: ak.paired_moments(x, y),
            "repair_factors": lambda: ak.repair_factors(dense, dense),
            "affine_": lambda: ak.affine_(x, factor, factor),
            "repair_": lambda: ak.repair_(x, dense),
        }
        return {name: microseconds(call) for name, call in functions.items()}


def main() -> None:
    """Print a line for each function."""
    for name, value in measure().items():
        print(f"{name:26} {value:6.1f} us")


if __name__ == "__main__":
    typer.run(main)
