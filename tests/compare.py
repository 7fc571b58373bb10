"""Are two networks, or two states, equal bit for bit?"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def same_state(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Are all tensors equal, under the same names?"""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same(a: nn.Module, b: nn.Module) -> bool:
    """Are all tensors of two networks equal, under the same names in the same order?"""
    x, y = a.state_dict(), b.state_dict()
    return list(x) == list(y) and same_state(x, y)
