"""Groups of coupled channels, found by Torch-Pruning (Fang et al. 2023, "DepGraph: Towards any structural pruning").

A group is accepted only if the network without it computes what it should: see `_mismatch`.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections import Counter, namedtuple
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from ..errors import ResuscitateError
from ..network.comparison import (
    Example,
    compute_outputs,
    describe_error,
    input_tensors,
    output_tensors,
    randomise_weights,
    relative_difference,
    to_model,
    trial_copy,
)
from ..network.layers import (
    LAYERS,
    Selection,
    along_inputs,
    along_weight,
    find_layers,
    select_layers,
    stored_weight,
    unwrap,
)
from ..network.runner import Network
from ..network.snapshot import evaluation_mode

logger = logging.getLogger("resuscitate")

# role of a module in a group -> its attributes with the number of channels
WIDTHS = {
    "producers": ("out_channels", "out_features"),
    "consumers": ("in_channels", "in_features"),
    "norms": ("num_features",),
}
# relative difference in output between two computations of one random network in float32; a wrong group exceeds it
AGREEMENT = 1e-3


@dataclass(frozen=True)
class ChannelGroup:
    """Coupled channels. A unit is a set of channels, over all layers of the group, that can only be removed together.

    The tensors are int64 (units, k): row u holds the channels of the module that belong to unit u.
    """

    name: str  # the first producer, in model order
    producers: dict[str, Tensor]  # layer -> output channels; a depthwise convolution is producer and consumer
    consumers: dict[str, Tensor]  # layer -> input channels, numbered through all groups of a convolution
    norms: dict[str, Tensor] = field(default_factory=dict)  # BatchNorm between producer and consumer -> features

    @property
    def units(self) -> int:
        """Number of units."""
        return len(self.producers[self.name])


class _Part(NamedTuple):
    """A module's channels in the group of a root layer: `channels[i]` is coupled with the root's channel `roots[i]`."""

    name: str
    module: nn.Module
    role: str  # a key of WIDTHS
    channels: Tensor
    roots: Tensor


_Index = namedtuple("_Index", "idx root_idx")  # a module's and the root's channel, as torch-pruning's mappings need it


def channel_groups(
    model: nn.Module, example: Example, include: Selection = None, exclude: Selection = None
) -> list[ChannelGroup]:
    """Groups of coupled channels that can be removed, in model order, if all their producers are selected.

    example: an input batch, (N, ...), or a tuple of the model's inputs; two images are enough. Channels of the model's
    output are not among them, nor those of layers that run twice or share a parameter, those coupled with a parameter
    outside of any layer, and those that torch-pruning removes wrongly; the log gives the reasons at level INFO. Raises
    ResuscitateError if torch-pruning is missing or cannot trace the model.
    """
    model = unwrap(model)
    selected = select_layers(model, include, exclude)
    groups, refused = verified_groups(model, input_tensors(example))
    for group in groups:
        if left := [name for name in group.producers if name not in selected]:
            refused[group.name] = f"not selected: {', '.join(left)}"
    for name, reason in refused.items():
        logger.info("channels of %r are kept: %s", name, reason)
    return [group for group in groups if group.name not in refused]


def torch_pruning() -> Any:
    """The module `torch_pruning`. Raises ResuscitateError if it is not installed."""
    try:
        return importlib.import_module("torch_pruning")
    except ImportError as error:
        remedy = "pip install 'resuscitate[structured]'"
        raise ResuscitateError(f"removing channels needs torch-pruning: {remedy}") from error


def verified_groups(model: nn.Module, inputs: list[Tensor]) -> tuple[list[ChannelGroup], dict[str, str]]:
    """The groups that can be removed, and for the first layer of each other group the reason why it cannot."""
    torch_pruning()
    copied, few = trial_copy(model), [x[:2] for x in inputs]
    with evaluation_mode([copied], 0):
        reused = _reused_modules(copied, few)  # outside the try: an error of the model itself is raised unchanged
        try:
            graph = trace(copied, few)
        except Exception as error:
            raise ResuscitateError(f"torch-pruning cannot trace this network; {describe_error(error)}") from error
        candidates, refused, seen = list[ChannelGroup](), dict[str, str](), set[str]()
        for name, layer in find_layers(copied).items():
            if layer not in graph.module2node:
                refused[name] = "torch-pruning does not see a path from this layer to the output"
            elif name not in seen:
                try:
                    candidates.append(_group(graph, name, reused, seen))
                except Exception as error:
                    refused[name] = describe_error(error)
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


def trace(model: nn.Module, inputs: list[Tensor]) -> Any:
    """Torch-Pruning's dependency graph. Each model output is a node, so a group with output channels contains one."""
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch_pruning().DependencyGraph()
        return graph.build_dependency(
            model,
            example_inputs=to_model(model, (x[:2] for x in inputs)),
            forward_fn=lambda model, inputs: model(*inputs),
            output_transform=lambda out: [leaf * 1 for leaf in output_tensors(out) if leaf.requires_grad],
            verbose=False,
        )


def _group(graph: Any, name: str, reused: Mapping[nn.Module, str], seen: set[str]) -> ChannelGroup:
    """The group of layer `name`'s output channels; adds its producers to `seen`. Raises if it is inconsistent."""
    names = {module: name for name, module in graph.model.named_modules()}
    count = width_of(graph.model.get_submodule(name), "producers")
    members, parts = _coupled_channels(graph, name, count), list[_Part]()
    for (node, handler), root_of in members.items():
        module, is_layer = node.module, isinstance(node.module, LAYERS)
        roles = ["producers"] * (is_layer and graph.is_out_channel_pruning_fn(handler))
        roles += ["consumers"] * (is_layer and graph.is_in_channel_pruning_fn(handler))
        roles += ["norms"] * hasattr(module, "num_features")
        channels, roots = torch.tensor([*root_of]), torch.tensor([*root_of.values()])
        parts += [_Part(names[module], module, role, channels, roots) for role in roles]
    seen |= {part.name for part in parts if part.role == "producers"}
    kinds, types = {node.type for node, _ in members}, torch_pruning().ops.OPTYPE
    if types.OUTPUT in kinds:
        raise ResuscitateError("these channels reach the model's output")
    if types.PARAMETER in kinds:
        raise ResuscitateError("a parameter outside of any layer is coupled with these channels")
    if twice := [part for part in parts if part.module in reused]:
        raise ResuscitateError(f"{twice[0].name!r} {reused[twice[0].module]}")
    unit_of = _unit_of_channel(parts, count)
    tables: dict[str, dict[str, Tensor]] = {role: {} for role in WIDTHS}
    for part in parts:
        tables[part.role][part.name] = _table(part, unit_of[part.roots])
    if not tables["consumers"]:
        raise ResuscitateError("no layer reads these channels")
    if len(tables["producers"][name]) < 2:
        raise ResuscitateError("these channels are one unit, and the last unit of a group is kept")
    return ChannelGroup(name, **tables)


def _coupled_channels(graph: Any, name: str, count: int) -> dict[tuple[Any, Any], dict[int, int]]:
    """Channels coupled with the `count` outputs of layer `name`: (node, pruning function) -> channel -> output channel.

    Raises where torch-pruning's own traversal does not terminate, because its index mappings are cyclic.
    """
    root = graph.module2node[graph.model.get_submodule(name)]
    start = (root, graph.get_pruner_of_module(root.module).prune_out_channels)
    layers = find_layers(graph.model).values()
    # a concatenation has at most as many channels as all layers together
    limit = sum(width_of(layer, "producers") + width_of(layer, "consumers") for layer in layers)
    found = {start: {channel: channel for channel in range(count)}}
    ahead = [(*start, [_Index(channel, channel) for channel in range(count)])]
    while ahead:
        node, cut, indices = ahead.pop()
        for edge in node.dependencies:
            if edge.is_triggered_by(cut):
                mapped = indices
                for mapping in filter(None, edge.index_mapping):
                    mapped = mapping(mapped)
                there = found.setdefault((edge.target, edge.handler), {})
                fresh = [index for index in mapped if index.idx not in there]
                there |= {index.idx: index.root_idx for index in fresh}
                if any(index.idx >= limit or there[index.idx] != index.root_idx for index in mapped):
                    raise ResuscitateError("torch-pruning's index mappings contradict each other")
                if fresh:
                    ahead.append((edge.target, edge.handler, fresh))
    return {key: root_of for key, root_of in found.items() if root_of}


def _unit_of_channel(parts: Iterable[_Part], count: int) -> Tensor:
    """(count,): unit of each channel of the root; one unit per channel, unless grouped convolutions couple channels.

    The groups of a convolution must stay equal in size, so channels at the same index in all groups are one unit.
    """
    labels, before = torch.arange(count), None
    while before is None or not torch.equal(labels, before):
        before = labels
        for _, module, role, channels, roots in parts:
            if (groups := _groups(module)) > 1:
                per_group = width_of(module, role) // groups
                place = channels % per_group
                lowest = torch.full((per_group,), count).scatter_reduce(0, place, labels[roots], "amin")
                labels = labels.scatter_reduce(0, roots, lowest[place], "amin")
    return labels.unique(return_inverse=True)[1]


def _table(part: _Part, units: Tensor) -> Tensor:
    """(units, k): the module's channels in each unit, ascending. Raises if units differ in size or cannot be pruned."""
    name, module, role, channels, _ = part
    if role != "norms":
        stored_weight(name, module)
    width, groups, count = width_of(module, role), _groups(module), int(units.max()) + 1
    if groups > 1 and isinstance(module, _ConvTransposeNd):
        raise ResuscitateError(f"torch-pruning cannot prune {name!r}, a grouped transposed convolution")
    if groups > 1 and groups == module.out_channels:
        raise ResuscitateError(f"torch-pruning treats {name!r} as a depthwise convolution, which it is not")
    sizes = units.bincount(minlength=count)
    if channels.max() >= width or (sizes != sizes[0]).any() or (role == "producers" and len(channels) < width):
        raise ResuscitateError(f"{name!r} does not have the same number of channels in each unit")
    table = channels[(units * width + channels).argsort()].view(count, -1)
    per_group, rest = divmod(table.shape[1], groups)
    places = table % (width // groups)
    if rest or (places.view(count, groups, -1) != places[:, None, :per_group]).any():
        raise ResuscitateError(f"the groups of {name!r} would differ in size")
    return table


def width_of(module: nn.Module, role: str) -> int:
    """Number of the module's channels in this role, a key of `WIDTHS`."""
    return int(next(getattr(module, key) for key in WIDTHS[role] if hasattr(module, key)))


def _groups(module: nn.Module) -> int:
    """Groups of a convolution that must stay equal in size; 1 for a depthwise one, which loses whole groups."""
    groups = int(getattr(module, "groups", 1))
    return 1 if groups == getattr(module, "in_channels", 0) == module.out_channels else groups


def _reused_modules(model: nn.Module, inputs: list[Tensor]) -> dict[nn.Module, str]:
    """Modules that run more than once in a forward pass or share a parameter, with the reason."""
    network, runs = Network(model), Counter[str]()
    with network.hooked(network.observed(), lambda name, x: runs.update([name])):
        compute_outputs(model, inputs)
    holders = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    reused = {network.modules[name]: "runs more than once" for name, times in runs.items() if times > 1}
    for module in model.modules():
        if any(p is not None and holders[id(p)] > 1 for p in module._parameters.values()):
            reused[module] = "shares a parameter with another module"
    return reused


def _mismatch(model: nn.Module, inputs: list[Tensor], groups: list[ChannelGroup]) -> str:
    """Reason why these groups are wrong, or the empty string.

    A random half of the units is removed from one copy; in another, the consumers' weights on these units are zero. The
    outputs differ if the units reach the output by another path, or if an index is wrong.
    """
    dropped = {group.name: torch.randperm(group.units) < group.units // 2 for group in groups}
    unconnected, small = trial_copy(model), trial_copy(model)
    for group in groups:
        for name, table in group.consumers.items():
            layer = unconnected.get_submodule(name)
            kept = mask_channels(name, layer, "consumers", table[dropped[group.name]])
            stored_weight(name, layer).masked_fill_(~kept, 0)
    try:
        error = remove_units(small, inputs, groups, dropped, unconnected)
    except Exception as problem:
        return f"the model does not run without some of these channels; {describe_error(problem)}"
    return "" if error <= AGREEMENT else "the output depends on these channels in a way that torch-pruning does not see"


def remove_units(
    model: nn.Module, inputs: list[Tensor], groups: list[ChannelGroup], dropped: Mapping[str, Tensor], like: nn.Module
) -> float:
    """Remove the dropped units from a `trial_copy`, in place; returns how far its output is from that of `like`."""
    graph = trace(model, inputs)
    for group in groups:
        if group.name in dropped:
            layer, rows = model.get_submodule(group.name), group.producers[group.name][dropped[group.name]]
            cut = graph.get_pruner_of_module(layer).prune_out_channels
            graph.get_pruning_group(layer, cut, rows.flatten().tolist()).prune(record_history=False)
    return relative_difference(compute_outputs(like, inputs), compute_outputs(model, inputs))


def mask_channels(name: str, module: nn.Module, role: str, channels: Tensor) -> Tensor:
    """Boolean, weight's shape: False in the rows (role "producers") or columns ("consumers") of these channels."""
    weight, kept = stored_weight(name, module), torch.ones(width_of(module, role), dtype=torch.bool)
    kept[channels.flatten()] = False
    along = along_weight if role == "producers" else along_inputs
    return along(module, kept).expand(weight.shape).to(weight.device, copy=True)
