"""Launches of the kernels, and how they are repeated: Triton binds and specialises arguments the first time only."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

# threads that run in lockstep: 64 on AMD's data-centre GPUs, 32 on NVIDIA's
WARP = 64 if torch.version.hip else 32
# plans kept for each operation
MOST_PLANS = 4096


class Launch(NamedTuple):
    """A kernel, its grid and every argument by name: `run` launches it, the ahead-of-time tests compile it."""

    kernel: Any
    grid: tuple[int]
    arguments: dict[str, Any]
    threads: int
    registers: int | None = None  # of a thread, at most, on NVIDIA's GPUs

    def options(self, warp: int = WARP) -> dict[str, Any]:
        """Fusion is written as tl.fma: Triton's default changes between 3.9 and 3.10."""
        options = {"num_warps": min(max(self.threads // warp, 1), 8), "enable_fp_fusion": False}
        return options | ({"maxnreg": self.registers} if self.registers and warp == 32 else {})

    def run(self) -> None:
        """Launch on the current device and stream."""
        self.kernel[self.grid](**self.arguments, **self.options())


class Repeated:
    """A launch that is repeated with other values of its first arguments.

    Triton takes a dozen microseconds to bind the arguments of a kernel and to look at each for the compiled variant
    that it needs. Here only the first call does this. So the first arguments must be such that the variant stays the
    same: the plan of a tensor is kept by its shape, strides, dtype, device and alignment.
    """

    def __init__(self, launch: Launch, first: int) -> None:
        self._kernel, self._grid, self._options = launch.kernel, launch.grid, launch.options()
        self._rest = [launch.arguments[name] for name in launch.kernel.arg_names[first:]]
        self._call: Any = None

    def __call__(self, *first: Any) -> None:
        """Launch with these first arguments on the current device and stream."""
        if self._call is not None:
            self._call(*first, *self._rest)
            return
        compiled = self._kernel[self._grid](*first, *self._rest, **self._options)
        # the interpreter compiles nothing
        if compiled is not None:
            self._call = compiled[(*self._grid, 1, 1)]


class Plans(dict[Any, Any]):
    """Launches by what they depend on; the oldest are forgotten beyond `MOST_PLANS`."""

    def add(self, key: Any, plan: Any) -> Any:
        """Keep a plan, and return it."""
        if len(self) >= MOST_PLANS:
            del self[next(iter(self))]
        self[key] = plan
        return plan


def signature(x: Tensor) -> tuple[Any, ...]:
    """What the launches for a tensor depend on; last, whether its storage begins at an aligned address before it."""
    behind = x.data_ptr() % 16
    return x.shape, x.stride(), x.dtype, x.device, behind, behind <= x.storage_offset() * x.itemsize


def on_device_of(x: Tensor) -> Any:
    """A context in which the current device is that of x."""
    here = not x.is_cuda or x.get_device() == torch.cuda.current_device()
    return nullcontext() if here else torch.cuda.device_of(x)
