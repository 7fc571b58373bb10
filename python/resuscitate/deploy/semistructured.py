"""2:4 sparsity put to use: linear layers that compute with torch's semi-structured tensors, checked on an example."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

from ..errors import ResuscitateError
from ..network.copies import difference, tensors_of
from ..network.layers import unwrap
from ..network.runner import Network

CAPABILITY = (8, 0)  # the GPUs that multiply 2:4 matrices


@dataclass(frozen=True)
class SemiStructured:
    """Which linear layers were `converted`, why others were `left`, and the largest difference of the outputs.

    `error` is relative to the largest output, and 0 where nothing was converted.
    """

    converted: list[str]
    left: dict[str, str]
    error: float


@torch.no_grad()
def to_semi_structured(model: nn.Module, example: Tensor, *, tolerance: float = 1e-2) -> SemiStructured:
    """Have linear layers whose weights are 2:4 sparse compute with torch's semi-structured tensors, in place.

    On a GPU of compute capability 8.0 or newer, for weights of float16 or bfloat16 whose sizes torch takes. It has
    these tensors for linear layers only: convolutions, and whatever else does not apply, are left with the reason.
    Files do not hold them: load the weights (`export` writes the zeros as they are), then convert.

    example: a batch that the model runs on, in eval mode. tolerance: the largest difference to accept, relative to the
        largest output; float16 rounds otherwise when sums run in another order.
    Raises ResuscitateError, with the model as it was, where the outputs differ by more.
    """
    model = unwrap(model)
    net = Network(model)
    expected = tensors_of(net.run(example))
    kept: dict[str, nn.Parameter] = {}
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() < 2:
            continue
        reason = _obstacle(module, weight)
        if reason is None:
            try:
                converted = nn.Parameter(to_sparse_semi_structured(weight.detach()), requires_grad=False)
            except (RuntimeError, ValueError, NotImplementedError) as problem:
                reason = f"torch does not take it: {str(problem).strip().splitlines()[0]}"
            else:
                kept[name] = weight  # type: ignore[assignment]
                module.weight = converted
        if reason is not None:
            left[name] = reason
    error = difference(expected, tensors_of(net.run(example))) if kept else 0.0
    if not error <= tolerance:
        for name, weight in kept.items():
            model.get_submodule(name).weight = weight
        raise ResuscitateError(
            f"with semi-structured tensors the outputs differ by {error:.3g} of the largest, more than "
            f"tolerance={tolerance:g}: the model is as it was"
        )
    return SemiStructured(list(kept), left, error)


def _obstacle(module: nn.Module, weight: Tensor) -> str | None:
    """Why a layer cannot be converted, as far as that shows before trying."""
    if type(module) is not nn.Linear:
        return f"a {type(module).__name__}; torch has semi-structured tensors for linear layers only"
    if not is_two_of_four(weight):
        return "not 2:4 sparse"
    if weight.device.type != "cuda" or torch.cuda.get_device_capability(weight.device) < CAPABILITY:
        return f"on {weight.device}; it takes a GPU of compute capability {'.'.join(map(str, CAPABILITY))} or newer"
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return f"{weight.dtype}; it takes float16 or bfloat16"
    return None


def is_two_of_four(weight: Tensor) -> bool:
    """Has a weight (out, in) at most two values other than zero in every four along its inputs?"""
    inputs = weight.shape[1]
    return inputs % 4 == 0 and bool(((weight != 0).view(-1, inputs // 4, 4).sum(2) <= 2).all())
