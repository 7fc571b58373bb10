"""The input and the window of a layer's product, from the convolution or matrix product that its `forward` calls.

A layer's attributes are not enough: TensorFlow's "SAME" padding is computed in the `forward` of a subclass, from the
size of the input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from asr_kernels import Window

from ..errors import LayerError

# functions whose outputs are products of a weight with patches of an input
PRODUCTS = {"conv1d", "conv2d", "conv3d", "linear"}


def named_arguments(args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """The arguments of a call of one of `PRODUCTS`, by name."""
    parameters = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    return {**dict(zip(parameters, args, strict=False)), **(kwargs or {})}


def operands(name: str, layer: nn.Module, x: Tensor) -> tuple[Tensor, Window]:
    """The tensor that a layer multiplies its weight with, for the input `x`, after its own padding; and the window.

    x: (N, C, *spatial), or (..., C) for a linear layer. The layer's `forward` runs up to its product, without hooks.
    Raises LayerError where it never multiplies its own weight; see `Wiring.products`.
    """
    try:
        with _ProductCatcher(layer):
            layer.forward(x)
    except _ProductReachedError as reached:
        (call,) = reached.args
        return call["input"], _window(call)
    raise LayerError(name, f"{type(layer).__name__}.forward does not multiply with the layer's own weight; exclude it")


def with_batch_axis(layer: nn.Module, *tensors: Tensor | None) -> list[Tensor | None]:
    """A layer's inputs or outputs with a batch axis: a convolution's (C, *spatial) as (1, C, *spatial)."""
    unbatched = isinstance(layer, _ConvNd) and any(x is not None and x.dim() < layer.weight.dim() for x in tensors)
    return [x[None] if unbatched and x is not None else x for x in tensors]


def product(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    """The product of a weight with `x`, as `operands` returns it, plus bias, in the dtype of the weight."""
    x = x.to(weight.dtype)
    if not window.kernel:
        return F.linear(x, weight, bias)
    padding = [before for before, _ in window.padding]
    if any(before != after for before, after in window.padding):
        x, padding = F.pad(x, [pad for pair in reversed(window.padding) for pad in pair]), [0] * len(padding)
    conv: Any = (F.conv1d, F.conv2d, F.conv3d)[len(window.kernel) - 1]
    return conv(x, weight, bias, window.stride, padding, window.dilation, window.groups)


class _ProductReachedError(BaseException):
    """Ends a forward pass at its product, with the arguments. Not an Exception: the layer's code may catch those."""


class _ProductCatcher(TorchFunctionMode):
    """Ends a layer's `forward` at the product with its own weight."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in PRODUCTS:
            named = named_arguments(args, kwargs)
            if named["weight"] is self.layer.weight:
                raise _ProductReachedError(named)
        return func(*args, **(kwargs or {}))


def _window(call: Mapping[str, Any]) -> Window:
    """The window that the arguments of a product describe."""
    if not (kernel := tuple(call["weight"].shape[2:])):
        return Window()
    stride, dilation = (_per_axis(call.get(key, 1), kernel) for key in ("stride", "dilation"))
    padding = call.get("padding", 0)
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        pads = tuple((total // 2, total - total // 2) for total in totals)
    else:
        pads = tuple((n, n) for n in _per_axis(0 if padding == "valid" else padding, kernel))
    return Window(kernel, stride, pads, dilation, call.get("groups", 1))


def _per_axis(value: int | Sequence[int], kernel: tuple[int, ...]) -> tuple[int, ...]:
    """One number per spatial axis, from any form that convolutions accept."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * len(kernel) if len(values) == 1 else values
