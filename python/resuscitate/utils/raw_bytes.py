"""The memory of a tensor as bytes, without a copy."""

from __future__ import annotations

import ctypes
from typing import Any

from torch import Tensor


def view_bytes(data: Tensor) -> memoryview:
    """A view of the memory of a contiguous tensor, uint8 (n,), on the CPU."""
    # `Tensor.numpy` makes the storage unresizable
    array: Any = (ctypes.c_ubyte * data.numel()).from_address(data.data_ptr())
    array.tensor = data  # keeps the tensor alive as long as the view
    return memoryview(array).cast("B")
