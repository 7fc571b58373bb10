"""Groups of coupled channels that can be removed together, and their removal.

Coupled channels are found by derivatives: see `channel_flow`. A group is accepted only if the network without some of
its channels computes what it should: see `_mismatch`.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..errors import ResuscitateError
from ..network.channel_flow import (
    Axis,
    Tables,
    channel_labels,
    channelwise_modules,
    coupled_units,
    join_channels,
)
from ..network.channels import Side, width
from ..network.comparison import (
    Example,
    compute_outputs,
    describe_error,
    input_tensors,
    randomise_weights,
    relative_difference,
    to_model,
)
from ..network.copies import trial_copy
from ..network.layers import (
    LAYERS,
    Selection,
    along_inputs,
    along_weight,
    find_layers,
    is_depthwise,
    modules_by_parameter,
    select_layers,
    stored_weight,
    unwrap,
)
from ..network.resizing import resize_layers
from ..network.snapshot import evaluation_mode

logger = logging.getLogger("resuscitate")

# relative difference in output between two computations of one random network in float32; a wrong group exceeds it
AGREEMENT = 1e-3
TRIALS = 3  # random choices of units to remove; a channel shuffle allows some choices, not all


@dataclass(frozen=True)
class ChannelGroup:
    """Coupled channels. A unit is a set of channels, over all layers of the group, that can only be removed together.

    The tensors are int64 (units, k): row u holds the channels of the module that belong to unit u.
    """

    name: str  # the first producer, in model order
    producers: dict[str, Tensor]  # layer -> output channels; a depthwise convolution is producer and consumer
    consumers: dict[str, Tensor]  # layer -> input channels, numbered through all groups of a convolution
    norms: dict[str, Tensor] = field(default_factory=dict)  # norm or PReLU between producer and consumer -> channels

    @property
    def units(self) -> int:
        """Number of units."""
        return len(self.producers[self.name])

    @property
    def sides(self) -> list[tuple[Side, dict[str, Tensor]]]:
        """The producers' output channels and the consumers' input channels."""
        return [("out", self.producers), ("in", self.consumers)]


def channel_groups(
    model: nn.Module, example: Example, include: Selection = None, exclude: Selection = None
) -> list[ChannelGroup]:
    """Groups of coupled channels that can be removed, in model order, if all their producers are selected.

    example: an input batch, (N, ...), or a tuple of the model's inputs; two images are enough. Channels of the model's
    output are not among them, nor those of layers that share a parameter, those of which a layer has others too, and
    those without which the network does not run or computes something else; the log gives the reasons at level INFO.
    Raises ResuscitateError if the channels cannot be followed through the model.
    """
    return groups_and_reasons(model, example, include, exclude)[0]


def groups_and_reasons(
    model: nn.Module, example: Example, include: Selection = None, exclude: Selection = None
) -> tuple[list[ChannelGroup], dict[str, str]]:
    """`channel_groups`, and for the first layer of each other group the reason why its channels are kept."""
    model = unwrap(model)
    selected = select_layers(model, include, exclude)
    groups, refused = verified_groups(model, input_tensors(example))
    for group in groups:
        if left := [name for name in group.producers if name not in selected]:
            refused[group.name] = f"not selected: {', '.join(left)}"
    for name, reason in refused.items():
        logger.info("channels of %r are kept: %s", name, reason)
    return [group for group in groups if group.name not in refused], refused


def verified_groups(model: nn.Module, inputs: list[Tensor]) -> tuple[list[ChannelGroup], dict[str, str]]:
    """The groups that can be removed, and for the first layer of each other group the reason why it cannot."""
    copied, few = trial_copy(model), [x[:2] for x in inputs]
    with evaluation_mode([copied], 0):
        compute_outputs(copied, few)  # outside the try: an error of the model itself is raised unchanged
        try:
            labels = channel_labels(copied, channelwise_modules(copied), few, lambda net, x: net(*to_model(net, x)))
        except Exception as error:  # the model's own code, with values that it does not expect
            raise ResuscitateError(f"the channels cannot be followed; {describe_error(error)}") from error
        candidates, refused = _candidates(copied, labels)
        randomise_weights(copied)
        if not _mismatch(copied, few, candidates):
            return candidates, refused
        groups = list[ChannelGroup]()
        for group in candidates:
            if reason := _mismatch(copied, few, [*groups, group]):
                refused[group.name] = reason
            else:
                groups.append(group)
        return groups, refused


def channel_masks(model: nn.Module, groups: Iterable[ChannelGroup], dropped: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Layer -> boolean, in its weight's shape: False in the rows and columns of dropped units.

    dropped: group name -> boolean (units,); of a group without an entry no unit is dropped. The layers are the
    producers and consumers of the groups. Raises ValueError for an unknown group, or a tensor of another dtype or
    shape.
    """
    layers, by_name = find_layers(unwrap(model)), {group.name: group for group in groups}
    for name, chosen in dropped.items():
        if name not in by_name:
            raise ValueError(f"dropped names {name!r}; the groups are {', '.join(by_name) or 'none'}")
        count = by_name[name].units
        if chosen.dtype != torch.bool or chosen.shape != (count,):
            raise ValueError(f"dropped[{name!r}] is {chosen.dtype} {tuple(chosen.shape)}, not boolean ({count},)")
    masks: dict[str, Tensor] = {}
    for group in by_name.values():
        chosen = dropped.get(group.name, torch.zeros(group.units, dtype=torch.bool)).cpu()
        for side, tables in group.sides:
            for layer, table in tables.items():
                mask = _mask(layer, layers[layer], side, table[chosen])
                masks[layer] = masks[layer] & mask if layer in masks else mask
    return {name: masks[name] for name in layers if name in masks}


def remaining_channels(
    model: nn.Module, groups: Iterable[ChannelGroup], dropped: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Output channels and input channels kept, of the modules from which some are removed."""
    kept: dict[Side, dict[str, Tensor]] = {"out": {}, "in": {}}
    for group in groups:
        if group.name in dropped:
            for side, tables in [*group.sides, ("out", group.norms)]:
                for name, table in tables.items():
                    before = kept[side].get(name, torch.arange(width(model.get_submodule(name), side)))
                    kept[side][name] = before[~torch.isin(before, table[dropped[group.name]])]
    return kept["out"], kept["in"]


@torch.no_grad()
def remove_units(model: nn.Module, groups: list[ChannelGroup], dropped: Mapping[str, Tensor]) -> None:
    """Remove the dropped units from a `trial_copy`, in place."""
    smaller: dict[str, Tensor] = {}
    for name, mask in channel_masks(model, groups, dropped).items():
        weight = model.get_submodule(name).get_parameter("weight")
        ends = [int(mask.transpose(0, axis).flatten(1).any(1).sum()) for axis in (0, 1)]
        smaller[f"{name}.weight"] = weight[mask].view(*ends, *weight.shape[2:])
    for name, channels in remaining_channels(model, groups, dropped)[0].items():
        module = model.get_submodule(name)
        for key, old in {**module._parameters, **module._buffers}.items():
            if old is not None and old.dim() == 1:
                smaller[f"{name}.{key}"] = old[channels.to(old.device)]
    resize_layers(model, {name: new.shape for name, new in smaller.items()})
    for name, new in smaller.items():
        owner, _, key = name.rpartition(".")
        getattr(model.get_submodule(owner), key).copy_(new)


def _candidates(model: nn.Module, labels: Mapping[Axis, Tensor]) -> tuple[list[ChannelGroup], dict[str, str]]:
    """Groups of coupled channels, not yet verified, and for the first layer of each other group the reason."""
    layers, shared = find_layers(model), _sharing_modules(model)
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    parts: list[tuple[set[str], list[Tables]]] = []  # layers, and the units that their output channels belong to
    for tables in coupled_units(join_channels(labels, _equal_places(model, labels))).values():
        producers, alike = {axis.module for axis in tables if axis.side == "out" and axis.module in layers}, [tables]
        for part in [part for part in parts if part[0] & producers]:
            parts.remove(part)
            producers, alike = producers | part[0], alike + part[1]
        parts += [(producers, alike)] if producers else []
    ran = {axis.module for axis in labels}
    refused = {name: "this layer does not run in a forward pass" for name in layers if name not in ran}
    groups = list[ChannelGroup]()
    for producers, alike in sorted(parts, key=lambda part: min(map(order.__getitem__, part[0]))):
        name = min(producers, key=order.__getitem__)
        try:
            groups.append(_group(model, name, alike, order, shared))
        except ResuscitateError as error:
            refused[name] = describe_error(error)
    return groups, refused


def _group(
    model: nn.Module, name: str, alike: list[Tables], order: Mapping[str, int], shared: set[str]
) -> ChannelGroup:
    """The group of layer `name`'s output channels. Raises ResuscitateError if it has none, or cannot be removed."""
    mixed = Counter(axis.module for tables in alike for axis in tables if axis.side == "out")
    for other in sorted(mixed, key=order.__getitem__):
        if mixed[other] > 1 and isinstance(model.get_submodule(other), LAYERS):
            raise ResuscitateError(f"{other!r} does not have the same number of channels in each unit")
    [tables] = alike
    producers, consumers, norms = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
    for axis in sorted(tables, key=lambda axis: order[axis.module]):
        module, table = model.get_submodule(axis.module), tables[axis]
        if axis.module in shared:
            raise ResuscitateError(f"{axis.module!r} shares a parameter with another module")
        if not isinstance(module, LAYERS):
            norms[axis.module] = table
            continue
        stored_weight(axis.module, module)
        if axis.side == "out":
            producers[axis.module] = table
        if axis.side == "in" or is_depthwise(module):
            consumers[axis.module] = table
    if not consumers:
        raise ResuscitateError("no layer reads these channels")
    if len(producers[name]) < 2:
        raise ResuscitateError("these channels are one unit, and the last unit of a group is kept")
    return ChannelGroup(name, producers, consumers, norms)


def _equal_places(model: nn.Module, axes: Iterable[Axis]) -> list[tuple[Axis, Axis, Tensor]]:
    """Pairs of channels at the same index in two groups of a convolution, the groups of which must stay equal."""
    pairs = []
    for axis in axes:
        module = model.get_submodule(axis.module)
        if isinstance(module, _ConvNd) and module.groups > 1 and not is_depthwise(module):
            channels = torch.arange(width(module, axis.side))
            pairs.append((axis, axis, torch.stack([channels, channels % (len(channels) // module.groups)])))
    return pairs


def _sharing_modules(model: nn.Module) -> set[str]:
    """Modules that share a parameter with another module."""
    return {name for names in modules_by_parameter(model).values() if len(names) > 1 for name in names}


@torch.no_grad()
def _mismatch(model: nn.Module, inputs: list[Tensor], groups: list[ChannelGroup]) -> str:
    """Reason why these groups are wrong, or the empty string.

    A random half of the units is removed from one copy; in another, the consumers' weights on these units are zero. The
    outputs differ if the units reach the output by another path, or if an index is wrong.
    """
    generator = torch.Generator().manual_seed(0)
    for _ in range(TRIALS):
        dropped = {g.name: torch.randperm(g.units, generator=generator) < g.units // 2 for g in groups}
        unconnected, small = trial_copy(model), trial_copy(model)
        for group in groups:
            for name, table in group.consumers.items():
                layer = unconnected.get_submodule(name)
                stored_weight(name, layer).masked_fill_(~_mask(name, layer, "in", table[dropped[group.name]]), 0)
        try:
            remove_units(small, groups, dropped)
            error = relative_difference(compute_outputs(unconnected, inputs), compute_outputs(small, inputs))
        except Exception as cause:
            return f"the model does not run without some of these channels; {describe_error(cause)}"
        if math.isinf(error):
            return "these channels reach the model's output"
        if not error <= AGREEMENT:
            return "without these channels the output is another than with weights of zero in the layers that read them"
    return ""


def _mask(name: str, module: nn.Module, side: Side, channels: Tensor) -> Tensor:
    """Boolean, weight's shape: False in the rows (side "out") or columns ("in") of these channels."""
    weight, kept = stored_weight(name, module), torch.ones(width(module, side), dtype=torch.bool)
    kept[channels.flatten()] = False
    along = along_weight if side == "out" else along_inputs
    return along(module, kept).expand(weight.shape).to(weight.device, copy=True)
