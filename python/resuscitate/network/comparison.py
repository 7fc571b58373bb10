"""Comparison of a network with a modified copy of it: random weights, outputs, differences, FLOPs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ResuscitateError
from .layers import find_batchnorms
from .runner import Network
from .snapshot import set_seed
from .wiring import output_leaves

Example = Tensor | Sequence[Tensor]


@torch.no_grad()
def randomise_weights(model: nn.Module) -> None:
    """Set random weights, of variance 2 / fan-in, and BatchNorm statistics: a zero output would hide differences."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, (2 / max(parameter.shape[1:].numel(), 1)) ** 0.5)
        else:
            parameter.uniform_(0.5, 1.5)
    for module in find_batchnorms(model).values():
        module._buffers["running_mean"].normal_(0, 0.3)  # type: ignore[union-attr]
        module._buffers["running_var"].uniform_(0.5, 2)  # type: ignore[union-attr]


def input_tensors(example: Example) -> list[Tensor]:
    """The model's inputs as a list."""
    return [example] if isinstance(example, Tensor) else list(example)


def to_model(model: nn.Module, inputs: Iterable[Tensor]) -> list[Tensor]:
    """Copies of the inputs on the model's device and in its dtype."""
    network = Network(model)
    return [network.place(x) for x in inputs]


@torch.no_grad()
def compute_outputs(model: nn.Module, inputs: Iterable[Tensor]) -> list[Tensor]:
    """Tensors that the model returns; the random state is seeded with 0 first."""
    network = Network(model)
    set_seed(0, [network.device])
    return output_tensors(model(*map(network.place, inputs)))


def output_tensors(out: Any) -> list[Tensor]:
    """Tensors in a model's output, a nested structure."""
    return [leaf for leaf in output_leaves(out) if isinstance(leaf, Tensor)]


def relative_difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """Largest max|expected - found| / max|expected| over pairs of tensors; infinite where shapes differ."""
    if [x.shape for x in expected] != [x.shape for x in found]:
        return math.inf
    pairs = [(x.double(), y.double()) for x, y in zip(expected, found, strict=True) if not torch.equal(x, y)]
    return float(torch.tensor([0.0, *((x - y).abs().max() / x.abs().max() for x, y in pairs)]).max())


@torch.no_grad()
def count_flops(model: nn.Module, inputs: Iterable[Tensor]) -> int:
    """Floating-point operations for one image."""
    from torch.utils.flop_counter import FlopCounterMode  # a late import: it imports Triton

    with FlopCounterMode(display=False) as counter:
        model(*to_model(model, (x[:1] for x in inputs)))
    return counter.get_total_flops()


def describe_error(error: Exception) -> str:
    """First line of an error's message, with the type of the error unless it is a ResuscitateError."""
    line = str(error).strip().partition("\n")[0]
    return line if isinstance(error, ResuscitateError) else f"{type(error).__name__}: {line}"
