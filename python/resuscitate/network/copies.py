"""Copies of a network to try things on, and how two of them compare."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from ..errors import ResuscitateError
from .layers import find_batchnorms
from .runner import Network
from .wiring import output_leaves

Example = Tensor | Sequence[Tensor]


def make_twin(model: nn.Module) -> nn.Module:
    """A deep copy to try things on: single precision at least, open to autograd, `torch.nn.utils.prune` baked in."""
    # a tensor that was computed from others cannot be deep-copied, so it is handed over as copied already
    plain = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    twin = copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in plain})
    for module in twin.modules():
        for key in ("weight", "bias"):
            if f"{key}_mask" in module._buffers:
                prune.remove(module, key)
    twin.to(torch.promote_types(Network(twin).dtype, torch.float32)).eval()
    for parameter in twin.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return twin


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Weights and statistics that keep signals alive, so that no dead or collapsed layer can hide a difference."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, (2 / max(parameter.shape[1:].numel(), 1)) ** 0.5)
        else:
            parameter.uniform_(0.5, 1.5)
    for module in find_batchnorms(model).values():
        module._buffers["running_mean"].normal_(0, 0.3)  # type: ignore[union-attr]
        module._buffers["running_var"].uniform_(0.5, 2)  # type: ignore[union-attr]


def inputs_of(example: Example) -> list[Tensor]:
    return [example] if isinstance(example, Tensor) else list(example)


def placed(model: nn.Module, inputs: Iterable[Tensor]) -> list[Tensor]:
    network = Network(model)
    return [network.place(x) for x in inputs]


@torch.no_grad()
def outputs(model: nn.Module, inputs: Iterable[Tensor]) -> list[Tensor]:
    torch.manual_seed(0)
    return tensors_of(model(*placed(model, inputs)))


def tensors_of(out: Any) -> list[Tensor]:
    return [leaf for leaf in output_leaves(out) if isinstance(leaf, Tensor)]


def difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """Largest difference between tensors, relative to the largest value of each; infinite where shapes differ."""
    if [x.shape for x in expected] != [x.shape for x in found]:
        return math.inf
    pairs = [(x.double(), y.double()) for x, y in zip(expected, found, strict=True) if not torch.equal(x, y)]
    return float(torch.tensor([0.0, *((x - y).abs().max() / x.abs().max() for x, y in pairs)]).max())


@torch.no_grad()
def count_flops(model: nn.Module, inputs: Iterable[Tensor]) -> int:
    """Floating-point operations for one image."""
    from torch.utils.flop_counter import FlopCounterMode  # here, for it imports Triton

    with FlopCounterMode(display=False) as counter:
        model(*placed(model, (x[:1] for x in inputs)))
    return counter.get_total_flops()


def said(error: Exception) -> str:
    """What an error says in its first line, and of what kind it is if it is not our own."""
    line = str(error).partition("\n")[0]
    return line if isinstance(error, ResuscitateError) else f"{type(error).__name__}: {line}"
