"""Checks of layers: does the dense model have the same, and do their outputs follow a change of weight or bias?

A layer whose class has a `forward` of its own is tested on random inputs. A weight-standardised convolution cancels any
gain and replaces zeros by minus the mean; a layer with a built-in activation does not add its bias last.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ..errors import LayerError, ModelMismatchError, called, listed
from .layers import (
    LAYERS,
    channel_dim,
    effective_weight,
    find_layers,
    out_channels,
    qualified,
    refuse_means,
    with_weight,
)
from .snapshot import autocast

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CLEARLY_MORE = 0.1  # of the weights
ALIKE = 0.03  # cosine of the angle between all weights of two networks, of which one was made from the other
log = logging.getLogger("resuscitate")


def objections(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """By name, the layers whose output does not follow a change of weight or bias, each with the reason."""
    found, methods = dict[str, str](), ("forward", "_conv_forward")
    for name, layer in layers.items():
        kind = type(layer)
        base = next((base for base in (*CONVOLUTIONS, nn.Linear) if isinstance(layer, base)), None)
        overrides = base is None or any(getattr(kind, m, None) is not getattr(base, m, None) for m in methods)
        if overrides and (objection := _objection(name, layer)):
            found[name] = f"{kind.__name__} {objection}"
    return found


def split_by_objections(layers: Mapping[str, nn.Module], act: str) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers whose output follows a change of weight or bias, and the `objections` to the others.

    act: such as "repaired", for the message. Raises LayerError where there are objections to all layers, and for a
    layer with means of its pruned weights.
    """
    refuse_means(layers)
    found = objections(layers)
    if layers and len(found) == len(layers):
        name, objection = next(iter(found.items()))
        raise LayerError(name, f"{objection}; no other layer is selected, so nothing can be {act}")
    return {name: layer for name, layer in layers.items() if name not in found}, found


def same_layers(layers: Mapping[str, nn.Module], dense: nn.Module, *, smaller: bool = False) -> bool:
    """Are all weights equal? ModelMismatchError unless the dense model has these layers, in memory of its own.

    smaller: the layers may have fewer channels than in the dense model.
    """
    originals, same = dict(dense.named_modules()), True
    for name, layer in layers.items():
        if name not in originals:
            raise ModelMismatchError(f"the dense model has no layer {name!r}; both models need the same layers")
        kind, dense_kind = (type(each).__name__.removeprefix("Mean") for each in (layer, originals[name]))
        if not isinstance(originals[name], LAYERS) or kind != dense_kind:
            if kind == dense_kind:
                kind, dense_kind = qualified(type(layer)), qualified(type(originals[name]))
            raise ModelMismatchError(f"{called(name)} is {kind} in the pruned model and {dense_kind} in the dense one")
        weight, original = effective_weight(name, layer), effective_weight(name, originals[name])
        if not (_fits_into(weight, original) if smaller else weight.shape == original.shape):
            shapes = f"{tuple(weight.shape)} in the pruned model and {tuple(original.shape)} in the dense one"
            raise ModelMismatchError(f"the weight of {called(name)} is {shapes}")
        if weight.data_ptr() == original.data_ptr():
            raise ModelMismatchError(f"{called(name)} shares its weight with the dense model; pass a deep copy")
        same = same and torch.equal(weight, original.to(weight.device))
    return same


def check_no_further(model: nn.Module, dense: nn.Module) -> None:
    """Raise ModelMismatchError where the dense model has layers that the model lacks."""
    own = find_layers(model)
    if further := [name for name in find_layers(dense) if name not in own]:
        remedy = "pass the network that was pruned, or remove these layers from it"
        raise ModelMismatchError(f"the dense model has layers that the pruned one lacks: {listed(further)}; {remedy}")


def check_origin(layers: Mapping[str, nn.Module], dense: nn.Module) -> None:
    """Check that the dense model seems to be the one that was pruned.

    Raises ModelMismatchError where it clearly has more zeros: the two models seem to be swapped. Warns where its
    weights are not at all like those of the layers.
    """
    originals, found, total = dict(dense.named_modules()), [], 0
    for name, layer in layers.items():
        weight, original = effective_weight(name, layer), effective_weight(name, originals[name])
        if weight.shape == original.shape:
            w, o = weight.flatten().float(), original.flatten().to(weight.device, torch.float32)
            found.append(torch.stack([(w == 0).sum(), (o == 0).sum(), w @ o, w @ w, o @ o]))
            total += weight.numel()
    if not found:
        return
    *zeros, product, ours_squared, theirs_squared = torch.stack(found).sum(0).tolist()
    ours, theirs = (count / total for count in zeros)
    if theirs > ours + CLEARLY_MORE:
        shares = f"{theirs:.0%} of the dense model's weights are zero, and {ours:.0%} of the pruned one's"
        raise ModelMismatchError(f"{shares}: they seem to be swapped; pass the pruned model first")
    if product < ALIKE * (ours_squared * theirs_squared) ** 0.5:
        log.warning("the dense model's weights are not at all like the pruned one's: was its checkpoint loaded?")


def different_elsewhere(model: nn.Module, dense: nn.Module) -> list[str]:
    """The parameters that differ from the dense model's, of modules that are no layer and no BatchNorm, as an LSTM."""
    originals, found = dict(dense.named_modules()), []
    for name, module in model.named_modules():
        if isinstance(module, (*LAYERS, _BatchNorm)) or name not in originals:
            continue
        for parameter in module._parameters if isinstance(module._parameters, dict) else ():
            attribute = parameter.removesuffix("_orig")  # of a parameter with a mask of torch.nn.utils.prune
            ours, theirs = (getattr(each, attribute, None) for each in (module, originals[name]))
            if not isinstance(ours, Tensor) or not isinstance(theirs, Tensor) or ours.shape != theirs.shape:
                continue
            if not torch.equal(ours, theirs.to(ours.device)):
                found.append(f"{name}.{attribute}".lstrip("."))
    return found


def _fits_into(weight: Tensor, original: Tensor) -> bool:
    """Have both the same kernel, and the weight no more channels?"""
    channels = zip(weight.shape[:2], original.shape[:2], strict=True)
    return weight.shape[2:] == original.shape[2:] and all(own <= whole for own, whole in channels)


@torch.no_grad()
def _objection(name: str, layer: nn.Module) -> str:
    """Which test of the output y(weight, bias) fails; empty where none does, or the layer runs on no random input.

    y(2 w, 0) - y(0, 0) = 2 (y(w, 0) - y(0, 0)); y(0, 0) = 0; y(w, b) = y(w, 0) + b on the axis of the channels.
    """
    weight = effective_weight(name, layer)
    none, bias = weight.new_zeros(out_channels(layer)), 1 + torch.arange(out_channels(layer)).to(weight) % 2

    def outputs(x: Tensor) -> list[Tensor]:
        found = []
        for scale, shift in ((0, none), (1, none), (2, none), (1, bias)):
            stand_in = with_weight(layer, weight * scale, shift)
            stand_in.training = False
            with autocast(weight.device.type, None):
                found.append(stand_in(x).double())
        return found

    for x in _random_inputs(layer, weight):
        try:
            zero, once, twice, shifted = outputs(x)
            break
        except Exception:  # user code, which may need other inputs; the walk reports its error
            continue
    else:
        return ""
    agreement = max(1e-3, 8 * torch.finfo(weight.dtype).eps)  # relative; a standardising layer errs by about 1
    size = float((once - zero).abs().max()) or 1.0
    if not float((twice - zero - 2 * (once - zero)).abs().max()) <= agreement * size:
        return "does not compute with its weight as it is (a weight standardisation?), so that a gain would be lost"
    if not float(zero.abs().max()) <= agreement * max(size, 1):
        return "adds more than a bias to the product with its weight (a second branch?), which no fit would know"
    axis = channel_dim(layer)
    if once.shape[axis] != len(bias):
        return f"has no axis of {len(bias)} channels where this layer has it, so that they cannot be told apart"
    wanted = once.movedim(axis, -1) + bias.double()
    if not float((shifted.movedim(axis, -1) - wanted).abs().max()) <= agreement * max(size, 1):
        return "does more to its output than add a bias (a built-in activation?), so that a shift would be lost"
    return ""


def _random_inputs(layer: nn.Module, weight: Tensor) -> Iterator[Tensor]:
    """Random inputs of two images: (2, channels, *sizes), each size the kernel's extent plus 2.

    For a linear layer (2, channels), and with spatial axes behind the channels, for one that is a 1x1 convolution.
    """
    if isinstance(layer, _ConvNd):
        extents = ((k - 1) * d + 1 for k, d in zip(layer.kernel_size, layer.dilation, strict=True))
        shapes = [[layer.in_channels, *(extent + 2 for extent in extents)]]
    else:
        shapes = [[weight.shape[1]], [weight.shape[1], 3, 3]]
    for shape in shapes:
        yield torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(weight)
