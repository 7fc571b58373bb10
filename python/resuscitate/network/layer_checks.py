"""Does a layer compute with its weight and bias as they are? Tried out where its class has a forward of its own.

A weight-standardised convolution undoes any gain and fills zeros with minus the mean; one with a built-in activation
takes no shift. What is written into such a layer would not do what it should.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..errors import LayerError
from .layers import channel_dim, effective_weight, out_channels, refuse_means, with_weight
from .snapshot import autocast

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
AGREEMENT = 1e-3  # relative, or eight roundings of a shorter dtype; what standardises is off by as much as there is


def objections(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Of each layer where a change of its weight or bias would not come out as that change, by name: why."""
    found = {name: _objection(name, layer) for name, layer in layers.items() if _has_forward_of_its_own(layer)}
    return {name: f"{type(layers[name]).__name__} {objection}" for name, objection in found.items() if objection}


def _has_forward_of_its_own(layer: nn.Module) -> bool:
    base = next((base for base in (*CONVOLUTIONS, nn.Linear) if isinstance(layer, base)), None)
    methods = ("forward", "_conv_forward")
    return base is None or any(getattr(type(layer), m, None) is not getattr(base, m, None) for m in methods)


def set_apart(layers: Mapping[str, nn.Module], act: str) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers that a change of weight or bias comes out of as that change, and the `objections` to the others.

    act: what is to be done to them, such as "repaired". Raises LayerError where there are objections to all, and for a
    layer with means of its pruned weights.
    """
    refuse_means(layers)
    found = objections(layers)
    if layers and len(found) == len(layers):
        name, objection = next(iter(found.items()))
        raise LayerError(name, f"{objection}; no other layer is selected, so that nothing can be {act}")
    return {name: layer for name, layer in layers.items() if name not in found}, found


@torch.no_grad()
def _objection(name: str, layer: nn.Module) -> str:
    """What is not as it should be: y(2 w) - y(0) = 2 (y(w) - y(0)), and a bias more by 1 makes an output more by 1."""
    weight = effective_weight(name, layer)
    x, bias = _probe(layer, weight), weight.new_zeros(out_channels(layer))

    def output(scale: float, shift: float) -> Tensor:
        double = with_weight(layer, weight * scale, bias + shift)
        double.training = False
        with autocast(weight.device.type, None):
            found: Tensor = double(x)
        return found.double()

    agreement = max(AGREEMENT, 8 * torch.finfo(weight.dtype).eps)
    try:
        none, once, twice, shifted = (output(*change) for change in ((0, 0), (1, 0), (2, 0), (1, 1)))
    except Exception:  # the forward is the user's own code, which may want other inputs; then a walk will show
        return ""
    size = float((once - none).abs().max()) or 1.0
    if not float((twice - none - 2 * (once - none)).abs().max()) <= agreement * size:
        return "does not compute with its weight as it is (a weight standardisation?), so that a gain would be lost"
    if none.shape[channel_dim(layer)] == len(bias) and not float((shifted - once - 1).abs().max()) <= agreement * max(
        size, 1
    ):
        return "does more to its output than add a bias (a built-in activation?), so that a shift would be lost"
    return ""


def _probe(layer: nn.Module, weight: Tensor) -> Tensor:
    """Random inputs, (2, channels, just large enough)."""
    sizes: list[int] = []
    if isinstance(layer, _ConvNd):
        sizes = [(k - 1) * d + 3 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
    channels = layer.in_channels if isinstance(layer, _ConvNd) else weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, channels, *sizes, generator=generator).to(weight)
