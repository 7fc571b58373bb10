"""Which modules are layers, which axis holds their output channels, and which tensor stores their weights."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy

from ..errors import MODEL, LayerError, ResuscitateError, did_you_mean, listed

LAYERS = (_ConvNd, nn.Linear)
BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)  # exactly these types: a subclass may compute more
Selector = str | type[nn.Module]
Selection = Iterable[Selector] | Selector | None  # layers by name or type


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside `torch.compile` and data-parallel wrappers; TypeError for anything but a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be a torch.nn.Module, not {type(model).__name__}; pass the model first")
    wraps = isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel)
    inner = model.module if wraps else getattr(model, "_orig_mod", None)
    return unwrap(inner) if isinstance(inner, nn.Module) else model


def find_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every convolution (1-3 d, also transposed) and linear layer by name; a shared layer by its first name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}


def find_batchnorms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Every BatchNorm that keeps running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats and module.running_mean is not None
    }


def no_layers(model: nn.Module) -> str:
    """What a message says of a model without convolutions and linear layers: what it has instead, and the remedy."""
    names = dict.fromkeys(_class_name(type(module)) for module in model.modules())
    remedy = "prune and repair it first, then script, export or quantize it"
    return (
        f"the model has no convolution or linear layer, but {listed(list(names))}; a scripted, exported or quantized "
        f"model can be neither pruned nor repaired: {remedy}"
    )


def qualified(kind: type) -> str:
    """The name of a class with its module."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _class_name(kind: type) -> str:
    """The name of a class, with its module where torch.nn has another class of this name."""
    return kind.__name__ if getattr(nn, kind.__name__, kind) is kind else qualified(kind)


def running_statistics(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """The running mean and variance of every BatchNorm that keeps them, by name."""
    found = find_batchnorms(model).items()
    return {name: (each.get_buffer("running_mean"), each.get_buffer("running_var")) for name, each in found}


def reusable(selection: Selection) -> list[Selector] | Selector | None:
    """The selection, its selectors in a list, which can be iterated more than once."""
    return selection if selection is None or isinstance(selection, str | type) else list(selection)


def select_layers(model: nn.Module, include: Selection = None, exclude: Selection = None) -> dict[str, nn.Module]:
    """The layers that `include` names (all when None) without those that `exclude` names.

    A selector is a glob over layer names (`"layer3.*"`; a module's name selects every layer within) or a module type.
    Raises ValueError, with close matches, for a selector that selects nothing.
    """
    layers = find_layers(model)
    chosen = set(layers) if include is None else matching(layers, include, "include")
    excluded = set() if exclude is None else matching(layers, exclude, "exclude")
    return {name: module for name, module in layers.items() if name in chosen and name not in excluded}


def matching(layers: Mapping[str, nn.Module], selectors: Iterable[Selector] | Selector, option: str) -> set[str]:
    """The names of the layers that the selectors select; ValueError, naming the option, if one selects none."""
    found: set[str] = set()
    for selector in [selectors] if isinstance(selectors, str | type) else selectors:
        if isinstance(selector, str):
            hits = {n for n in layers if fnmatchcase(n, selector) or n.startswith(f"{selector}.")}
        else:
            hits = {n for n, module in layers.items() if isinstance(module, selector)}
        if not hits:
            names = ", ".join(n or MODEL for n in layers) or "none"
            hint = did_you_mean(str(selector), layers, 3) or f"; the layers are {names}"
            raise ValueError(f"{option}={selector!r} selects no layer{hint}")
        found |= hits
    return found


def stored_weight(name: str, module: nn.Module) -> nn.Parameter:
    """The parameter that stores the weight: `weight`, or `weight_orig` under `torch.nn.utils.prune`.

    Raises LayerError where the weight is recomputed in each forward pass, where it is not initialised, and where it is
    on the meta device.
    """
    weight = module._parameters.get("weight")
    if weight is None and "weight_mask" in module._buffers:
        weight = module._parameters.get("weight_orig")
    if weight is None:
        problem = "is recomputed from other parameters in every forward, so a change would be lost"
        remedy = "bake it first (remove_weight_norm, remove_parametrizations) or exclude it"
        raise LayerError(name, f"{type(module).__name__}.weight {problem}; {remedy}")
    if is_lazy(weight):
        raise LayerError(name, "its parameters are not initialised yet; run one forward pass first")
    if weight.is_meta:
        raise LayerError(name, "its weight is on the meta device and has no values; load the weights first")
    return weight


def stored_bias(name: str, module: nn.Module) -> nn.Parameter | None:
    """The layer's bias parameter, or None. Raises LayerError where the bias is recomputed in each forward pass."""
    if getattr(module, "bias", None) is not None and module._parameters.get("bias") is None:
        raise LayerError(name, "its bias is recomputed in every forward; call prune.remove(layer, 'bias') first")
    return module._parameters.get("bias")


def memory_of(tensor: Tensor | None) -> object:
    """The same for two tensors whose values begin at one address; of one without values, its identity."""
    if tensor is None or is_lazy(tensor) or tensor.is_meta or not tensor.numel():
        return id(tensor)
    return tensor.device, tensor.data_ptr()


def modules_by_parameter(model: nn.Module) -> dict[object, list[str]]:
    """By `memory_of` each parameter, the names of the modules that have it."""
    found: dict[object, list[str]] = {}
    for name, module in model.named_modules():
        for memory in {memory_of(each) for each in module._parameters.values() if each is not None}:
            found.setdefault(memory, []).append(name)
    return found


def sharing_layers(model: nn.Module) -> dict[str, str]:
    """By name, the layers that share a parameter, each with the name of a module that has it too.

    That is any other module for a weight, and another layer for a bias, which modules around a layer may have as well.
    """
    owners, layers, found = modules_by_parameter(model), find_layers(model), dict[str, str]()
    for name, layer in layers.items():
        parameters = {key: each for key, each in layer._parameters.items() if each is not None}
        others = (
            other
            for key, each in parameters.items()
            for other in owners[memory_of(each)]
            if other != name and (key.startswith("weight") or other in layers)
        )
        if (other := next(others, None)) is not None:
            found[name] = other
    return found


@torch.no_grad()
def gain_and_shift(module: _BatchNorm, offset: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """Gain and shift, float64 (C,), of a BatchNorm in eval mode: batchnorm(x + offset) = gain * x + shift."""
    mean, var = module.get_buffer("running_mean"), module.get_buffer("running_var")
    gain = (var.double() + module.eps).rsqrt() * (1.0 if module.weight is None else module.weight)
    return gain, (offset - mean) * gain + (0.0 if module.bias is None else module.bias)


def refuse_means(layers: Mapping[str, nn.Module]) -> None:
    """Raise LayerError for a layer with means of its pruned weights: it computes with more than its weight."""
    for name, layer in layers.items():
        if "means" in layer._parameters:
            remedy = "remove them with resuscitate.densify(model, keep_zeros=True)"
            raise LayerError(name, f"it has means of its pruned weights; {remedy}")


def check_writable(model: nn.Module) -> None:
    """Raise ResuscitateError, outside of `torch.inference_mode()`, for a tensor that was made under it."""
    if torch.is_inference_mode_enabled():
        return
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_inference():
            remedy = "copy or load the model outside of it"
            raise ResuscitateError(
                f"{name!r} was made under torch.inference_mode() and cannot be changed outside of it; {remedy}"
            )


def refresh_weight(module: nn.Module) -> None:
    """Under `torch.nn.utils.prune`, recompute the module's `weight` from `weight_orig` and its mask."""
    if (mask := module._buffers.get("weight_mask")) is not None:
        module.weight = (module.weight_orig * mask).detach()  # type: ignore[operator]


@torch.no_grad()
def effective_weight(name: str, module: nn.Module) -> Tensor:
    """The weight that the forward pass uses: stored weight times its `torch.nn.utils.prune` mask, if any."""
    weight, mask = stored_weight(name, module), module._buffers.get("weight_mask")
    return weight.detach() if mask is None else weight * mask


def out_channels(module: nn.Module) -> int:
    """Number of output channels, C."""
    return int(module.out_channels if isinstance(module, _ConvNd) else module.out_features)  # type: ignore[arg-type]


def is_depthwise(module: nn.Module) -> bool:
    """Is this a depthwise convolution, of one output channel for each input channel?"""
    return isinstance(module, _ConvNd) and 1 < module.groups == module.in_channels == module.out_channels


def channel_dim(module: nn.Module) -> int:
    """Axis of the channels: 1 in a BatchNorm's input, counted from the end in a layer's output (may be unbatched)."""
    if isinstance(module, _BatchNorm):
        return 1
    return -1 - len(module.kernel_size) if isinstance(module, _ConvNd) else -1


def along_weight(module: nn.Module, vector: Tensor) -> Tensor:
    """A (C,) vector over output channels, shaped to broadcast against the layer's weight."""
    if isinstance(module, _ConvTransposeNd):  # has the output channels of one group on axis 1
        groups, rows = module.groups, module.in_channels // module.groups
        spread = vector.view(groups, 1, -1).expand(-1, rows, -1).reshape(module.in_channels, -1)
        return spread.view(*spread.shape, *[1] * len(module.kernel_size))
    return vector.view(-1, *[1] * (len(module.kernel_size) + 1 if isinstance(module, _ConvNd) else 1))


def along_inputs(module: nn.Module, vector: Tensor) -> Tensor:
    """A vector over the input channels of all groups, shaped to broadcast against the layer's weight."""
    kernel = [1] * len(module.kernel_size) if isinstance(module, _ConvNd) else []
    if isinstance(module, _ConvTransposeNd):
        return vector.view(-1, 1, *kernel)
    groups = module.groups if isinstance(module, _ConvNd) else 1
    spread = vector.view(groups, -1).repeat_interleave(out_channels(module) // groups, 0)
    return spread.view(*spread.shape, *kernel)


def rows_of(module: nn.Module, weight: Tensor) -> Tensor:
    """A tensor of the shape of the layer's weight as (C, fan-in): one row per output channel."""
    if isinstance(module, _ConvTransposeNd):
        return weight.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(0, 1).flatten(1)
    return weight.flatten(1)


def columns_of(module: nn.Module, weight: Tensor) -> Tensor:
    """A tensor of the shape of the layer's weight as (input channels of all groups, rest): a row per input channel."""
    if isinstance(module, _ConvTransposeNd):
        return weight.flatten(1)
    groups = module.groups if isinstance(module, _ConvNd) else 1
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flatten(1)


def dead_channels(name: str, module: nn.Module) -> Tensor:
    """Boolean (C,): output channels whose weights are all zero."""
    rows = rows_of(module, effective_weight(name, module))
    return rows.abs().amax(-1) == 0 if rows.shape[-1] else rows.new_ones(len(rows), dtype=torch.bool)


def with_weight(module: nn.Module, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    """A copy of the layer, without hooks, that computes with another weight and, if given, bias."""
    stand_in = copy.copy(module)
    stand_in.__dict__.pop("weight", None)  # an attribute under torch.nn.utils.prune
    stand_in._parameters = {**module._parameters, "weight": weight}  # type: ignore[dict-item]
    if bias is not None:
        stand_in._parameters["bias"] = bias  # type: ignore[assignment]
    stand_in._forward_hooks, stand_in._forward_pre_hooks = OrderedDict(), OrderedDict()
    return stand_in
