"""Convert 2:4 sparse linear layers to torch's semi-structured tensors, and compare the outputs on an example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

from ..errors import ResuscitateError
from ..network.comparison import describe_error, output_tensors, relative_difference
from ..network.layers import unwrap
from ..network.runner import Network
from ..network.snapshot import evaluation_mode
from ..reports.base import Report


@dataclass(frozen=True)
class SemiStructured(Report):
    """The `converted` layers, and the reason for each `unchanged` one.

    `error` is the largest difference of the outputs, relative to the largest output; 0 where no layer was converted.
    """

    columns: ClassVar[Sequence[str]] = ("name", "status", "reason")

    converted: list[str]
    unchanged: dict[str, str]
    error: float

    def rows(self) -> list[dict[str, Any]]:
        """One row for each layer, with the status "converted" or "unchanged"."""
        converted = [{"name": name, "status": "converted"} for name in self.converted]
        return converted + [{"name": n, "status": "unchanged", "reason": why} for n, why in self.unchanged.items()]


@torch.no_grad()
def to_semi_structured(model: nn.Module, example: Tensor, *, tolerance: float = 1e-2) -> SemiStructured:
    """Convert the 2:4 sparse weights of linear layers to torch's semi-structured tensors, in place.

    Needs a GPU of compute capability 8.0 or newer, and weights of float16 or bfloat16 in sizes that torch supports. All
    other layers are unchanged, with the reason in the result. Semi-structured tensors are not stored in files: load the
    weights (`export` writes zeros as zeros), then convert.

    example: an input batch, for which the model runs in eval mode. tolerance: the largest accepted difference, relative
        to the largest output; in float16 another order of the sums rounds differently.
    Raises ResuscitateError where the outputs differ by more. On an error the model is unchanged.
    """
    model = unwrap(model)
    kept: dict[str, nn.Parameter] = {}
    try:
        with evaluation_mode([model], 0):
            net = Network(model)
            expected = output_tensors(net.run(example))
            unchanged = _convert(model, kept)
            error = relative_difference(expected, output_tensors(net.run(example))) if kept else 0.0
        if not error <= tolerance:
            differ = f"differ by {error:.3g} of the largest, more than tolerance={tolerance:g}"
            raise ResuscitateError(f"with semi-structured tensors the outputs {differ}; the model is unchanged")
    except BaseException:
        for name, weight in kept.items():
            model.get_submodule(name).weight = weight
        raise
    return SemiStructured(list(kept), unchanged, error)


def _convert(model: nn.Module, kept: dict[str, nn.Parameter]) -> dict[str, str]:
    """Convert all layers that can be, and add their weights to `kept`; the reason for each other layer."""
    unchanged: dict[str, str] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() < 2:
            continue
        if reason := _obstacle(module, weight):
            unchanged[name] = reason
            continue
        try:
            converted = nn.Parameter(to_sparse_semi_structured(weight.detach()), requires_grad=False)
        except (RuntimeError, ValueError, NotImplementedError) as problem:
            unchanged[name] = f"torch does not support it: {describe_error(problem)}"
        else:
            kept[name] = weight  # type: ignore[assignment]
            module.weight = converted
    return unchanged


def _obstacle(module: nn.Module, weight: Tensor) -> str | None:
    """The reason why a layer cannot be converted, if one is known before the conversion."""
    if type(module) is not nn.Linear:
        return f"a {type(module).__name__}; torch has semi-structured tensors for linear layers only"
    if not is_two_of_four(weight):
        return "not 2:4 sparse"
    if weight.device.type != "cuda" or torch.cuda.get_device_capability(weight.device) < (8, 0):
        return f"on {weight.device}; 2:4 sparsity needs a GPU of compute capability 8.0 or newer"
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return f"{weight.dtype}; 2:4 sparsity needs float16 or bfloat16"
    return None


def is_two_of_four(weight: Tensor) -> bool:
    """Has a weight (out, in) at most two nonzero values in every four along its inputs?"""
    inputs = weight.shape[1]
    return inputs % 4 == 0 and bool(((weight != 0).view(-1, inputs // 4, 4).sum(2) <= 2).all())
