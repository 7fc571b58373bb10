"""Numbers on a device, read together: each read of a value waits until the device has done all that was asked of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

K = TypeVar("K")


def read_numbers(numbers: Mapping[K, Tensor]) -> dict[K, float]:
    """The values of some tensors of one element each, numbers or flags, by their keys; one wait for all of them."""
    if not numbers:
        return {}
    device = next(iter(numbers.values())).device
    packed = torch.stack([x.reshape(()).to(device, torch.float64) for x in numbers.values()])
    return dict(zip(numbers, packed.tolist(), strict=True))


def differing(pairs: Mapping[K, tuple[Tensor, Tensor]]) -> set[K]:
    """The keys of the pairs of tensors that differ, in shape or in a value; NaN differs from NaN. One wait for all.

    The second tensors may be on the host, and the first on a device.
    """
    found, flags = set[K](), dict[K, Tensor]()
    for key, (a, b) in pairs.items():
        if a.shape != b.shape:
            found.add(key)
        else:
            flags[key] = (a != b.to(a.device, non_blocking=b.device.type == "cpu")).any()
    return found | {key for key, differ in read_numbers(flags).items() if differ}
