"""Which channels stand or fall together, by Torch-Pruning's picture of a network.

Torch-Pruning finds the dependencies and does the surgery (Fang et al. 2023, "DepGraph: Towards any structural
pruning"). Its picture is believed only where numbers bear it out: see `_objection`.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from ..errors import ResuscitateError
from ..network.copies import Example, difference, inputs_of, make_twin, outputs, placed, randomise, said, tensors_of
from ..network.layers import (
    LAYERS,
    Selector,
    along_inputs,
    along_weight,
    find_layers,
    select_layers,
    stored_weight,
    unwrap,
)
from ..network.runner import Network
from ..network.snapshot import undisturbed

logger = logging.getLogger("resuscitate")

# what a module may be to some channels -> where it says how many it has
WIDTHS = {
    "makers": ("out_channels", "out_features"),
    "readers": ("in_channels", "in_features"),
    "norms": ("num_features",),
}
# relative, between two ways to run one random network in single precision; a wrong picture is off by far more
AGREEMENT = 1e-3


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that stand or fall together: each unit is what goes with one of them, in every layer with a part in it.

    The tensors are int64 (units, k): row u holds the channels of that module which belong to unit u.
    """

    name: str  # the first layer, in model order, that makes these channels
    makers: dict[str, Tensor]  # layer -> its output channels; a depthwise convolution both makes and reads
    readers: dict[str, Tensor]  # layer -> its input channels, counted through all groups of a convolution
    norms: dict[str, Tensor] = field(default_factory=dict)  # BatchNorm on their way -> its features

    @property
    def units(self) -> int:
        """How many units there are."""
        return len(self.makers[self.name])


class _Part(NamedTuple):
    """A module's part in the channels of a root layer: its `channels[i]` goes with the root's `roots[i]`."""

    name: str
    module: nn.Module
    role: str  # a key of WIDTHS
    channels: Tensor
    roots: Tensor


class _Index(NamedTuple):
    """A channel of some module, and the root's channel that it goes with, as torch-pruning's mappings take them."""

    idx: int
    root_idx: int


def channel_groups(
    model: nn.Module,
    example: Example,
    include: Iterable[Selector] | Selector | None = None,
    exclude: Iterable[Selector] | Selector | None = None,
) -> list[ChannelGroup]:
    """Every group of coupled channels that can be removed, in model order. The model is not changed.

    example: a batch that the model runs on, (N, ...), or a tuple of its inputs; two images are enough.
    include, exclude: as for `select_layers`; a group is offered if every layer that makes its channels is selected.

    Channels that reach the output are never a group; nor are those of layers that run twice, those that a parameter
    outside of any layer goes with, and those whose removal torch-pruning gets wrong. A line at INFO says of each why
    it stays. Raises ResuscitateError where torch-pruning is missing or cannot trace the model.
    """
    tp, model = torch_pruning(), unwrap(model)
    selected = select_layers(model, include, exclude)
    groups, stay = survey(tp, model, inputs_of(example))
    for group in groups:
        if left := [name for name in group.makers if name not in selected]:
            stay[group.name] = f"not selected: {', '.join(left)}"
    for name, reason in stay.items():
        logger.info("channels of %r stay: %s", name, reason)
    return [group for group in groups if group.name not in stay]


def torch_pruning() -> Any:
    try:
        return importlib.import_module("torch_pruning")
    except ImportError as error:
        raise ResuscitateError(
            "removing channels needs torch-pruning: pip install 'resuscitate[structured]'"
        ) from error


def survey(tp: Any, model: nn.Module, inputs: list[Tensor]) -> tuple[list[ChannelGroup], dict[str, str]]:
    """The groups to be trusted, and for the first layer of every other why its channels stay."""
    twin, few = make_twin(model), [x[:2] for x in inputs]
    with undisturbed([twin], 0):
        shared = _shared(twin, few)  # runs the model: an error of its own comes out as it is
        try:
            graph = trace(tp, twin, few)
        except Exception as error:
            raise ResuscitateError(f"torch-pruning cannot trace this network; {said(error)}") from error
        groups, stay = _picture(tp, graph, shared)
        randomise(twin)
        if _objection(tp, twin, few, groups):
            candidates, groups = groups, []
            for group in candidates:
                if objection := _objection(tp, twin, few, [*groups, group]):
                    stay[group.name] = objection
                else:
                    groups.append(group)
    return groups, stay


def trace(tp: Any, model: nn.Module, inputs: list[Tensor]) -> Any:
    """Torch-Pruning's dependency graph. Each output gets a node of its own, which a group that reaches it contains."""
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tp.DependencyGraph().build_dependency(
            model,
            example_inputs=placed(model, (x[:2] for x in inputs)),
            forward_fn=lambda model, inputs: model(*inputs),
            output_transform=lambda out: [leaf * 1 for leaf in tensors_of(out) if leaf.requires_grad],
            verbose=False,
        )


def _picture(tp: Any, graph: Any, shared: Mapping[nn.Module, str]) -> tuple[list[ChannelGroup], dict[str, str]]:
    """The groups that torch-pruning sees and that make sense, and why the others do not."""
    groups: list[ChannelGroup] = []
    stay: dict[str, str] = {}
    seen: set[str] = set()
    for name, layer in find_layers(graph.model).items():
        if layer not in graph.module2node:
            stay[name] = "torch-pruning does not see it run on the way to the output"
        elif name not in seen:
            try:
                groups.append(_group(tp, graph, name, shared, seen))
            except Exception as error:
                stay[name] = said(error)
    return groups, stay


def _group(tp: Any, graph: Any, name: str, shared: Mapping[nn.Module, str], seen: set[str]) -> ChannelGroup:
    """The group of layer `name`'s output channels; adds its makers to `seen`. Raises where it makes no sense."""
    names = {module: name for name, module in graph.model.named_modules()}
    count = width_of(graph.model.get_submodule(name), "makers")
    members = _walk(graph, name, count)
    parts: list[_Part] = []
    for (node, handler), root_of in members.items():
        roles = {
            "makers": isinstance(node.module, LAYERS) and graph.is_out_channel_pruning_fn(handler),
            "readers": isinstance(node.module, LAYERS) and graph.is_in_channel_pruning_fn(handler),
            "norms": hasattr(node.module, "num_features"),
        }
        channels, roots = torch.tensor([*root_of]), torch.tensor([*root_of.values()])
        parts += [
            _Part(names[node.module], node.module, role, channels, roots) for role, plays in roles.items() if plays
        ]
    seen |= {part.name for part in parts if part.role == "makers"}
    kinds = {node.type for node, _ in members}
    if tp.ops.OPTYPE.OUTPUT in kinds:
        raise ResuscitateError("they reach the model's output")
    if tp.ops.OPTYPE.PARAMETER in kinds:
        raise ResuscitateError("a parameter outside of any layer goes with them")
    if twice := [part for part in parts if part.module in shared]:
        raise ResuscitateError(f"{twice[0].name!r} {shared[twice[0].module]}")
    unit_of = _units(parts, count)
    tables: dict[str, dict[str, Tensor]] = {role: {} for role in WIDTHS}
    for part in parts:
        tables[part.role][part.name] = _table(part, unit_of[part.roots])
    if not tables["readers"]:
        raise ResuscitateError("no layer reads them")
    if len(tables["makers"][name]) < 2:
        raise ResuscitateError("they are one unit, and the last unit of a group stays")
    return ChannelGroup(name, **tables)


def _walk(graph: Any, name: str, count: int) -> dict[tuple[Any, Any], dict[int, int]]:
    """All that the `count` outputs of layer `name` come to: (node, what cuts it) -> its channel -> the layer's channel.

    Torch-Pruning's own walk, which does not end where its indices go round in circles. Raises there.
    """
    root = graph.module2node[graph.model.get_submodule(name)]
    start = (root, graph.get_pruner_of_module(root.module).prune_out_channels)
    # no concatenation is wider than all layers together
    limit = sum(width_of(layer, role) for layer in find_layers(graph.model).values() for role in ("makers", "readers"))
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
                    raise ResuscitateError("torch-pruning loses track of which of them go together")
                if fresh:
                    ahead.append((edge.target, edge.handler, fresh))
    return {key: root_of for key, root_of in found.items() if root_of}


def _units(parts: Iterable[_Part], count: int) -> Tensor:
    """(count,): the unit of each channel of the root; one each, unless grouped convolutions tie them.

    The groups of a convolution must stay equal in size, so what has the same place in each of them is one unit.
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
    """(units, k): the module's channels in each unit, ascending. Raises where units are not alike, or cannot be cut."""
    name, module, role, channels, _ = part
    if role != "norms":
        stored_weight(name, module)
    width, groups, count = width_of(module, role), _groups(module), int(units.max()) + 1
    if groups > 1 and isinstance(module, _ConvTransposeNd):
        raise ResuscitateError(f"torch-pruning cannot cut {name!r}, a grouped transposed convolution")
    if groups > 1 and groups == module.out_channels:
        raise ResuscitateError(f"torch-pruning takes {name!r} for a depthwise convolution, which it is not")
    sizes = units.bincount(minlength=count)
    if channels.max() >= width or (sizes != sizes[0]).any() or (role == "makers" and len(channels) < width):
        raise ResuscitateError(f"{name!r} does not have as many channels for each of them")
    table = channels[(units * width + channels).argsort()].view(count, -1)
    per_group, rest = divmod(table.shape[1], groups)
    places = table % (width // groups)
    if rest or (places.view(count, groups, -1) != places[:, None, :per_group]).any():
        raise ResuscitateError(f"the groups of {name!r} would differ in size")
    return table


def width_of(module: nn.Module, role: str) -> int:
    return int(next(getattr(module, key) for key in WIDTHS[role] if hasattr(module, key)))


def _groups(module: nn.Module) -> int:
    """Groups of a convolution that must stay equal in size; a depthwise one has fewer of them afterwards instead."""
    groups = int(getattr(module, "groups", 1))
    return 1 if groups == getattr(module, "in_channels", 0) == module.out_channels else groups


def _shared(model: nn.Module, inputs: list[Tensor]) -> dict[nn.Module, str]:
    """Modules that run more than once in a forward pass, or hold a parameter that another one holds too."""
    network, runs = Network(model), Counter[str]()
    with network.hooked(network.observed(), lambda name, x: runs.update([name])):
        outputs(model, inputs)
    holders = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    shared = {network.modules[name]: "runs more than once" for name, times in runs.items() if times > 1}
    for module in model.modules():
        if any(p is not None and holders[id(p)] > 1 for p in module._parameters.values()):
            shared[module] = "shares a parameter with another module"
    return shared


def _objection(tp: Any, model: nn.Module, inputs: list[Tensor], groups: list[ChannelGroup]) -> str:
    """Why these groups are not what they seem, or nothing.

    A random half of the units is taken out of one copy. In another copy all of them are still made, but their readers
    no longer read them: if any other way led from them to the output, or an index were wrong, the outputs would differ.
    """
    dropped = {group.name: torch.randperm(group.units) < group.units // 2 for group in groups}
    unread, small = make_twin(model), make_twin(model)
    for group in groups:
        for name, table in group.readers.items():
            weight = unread.get_parameter(f"{name}.weight")
            mask = without(name, unread.get_submodule(name), "readers", table[dropped[group.name]])
            weight.masked_fill_(~mask, 0)
    try:
        remove_units(tp, small, inputs, groups, dropped)
        error = difference(outputs(unread, inputs), outputs(small, inputs))
    except Exception as problem:
        return f"the model does not run without some of them; {said(problem)}"
    return "" if error <= AGREEMENT else "the output depends on them in a way that torch-pruning does not see"


def remove_units(
    tp: Any, model: nn.Module, inputs: list[Tensor], groups: Iterable[ChannelGroup], dropped: Mapping[str, Tensor]
) -> None:
    """Take the dropped units out of a twin."""
    graph = trace(tp, model, inputs)
    for group in groups:
        if group.name in dropped:
            layer, rows = model.get_submodule(group.name), group.makers[group.name][dropped[group.name]]
            cut = graph.get_pruner_of_module(layer).prune_out_channels
            graph.get_pruning_group(layer, cut, rows.flatten().tolist()).prune(record_history=False)


def without(name: str, module: nn.Module, role: str, channels: Tensor) -> Tensor:
    """Boolean of the weight's shape: False in the rows ("makers") or the columns ("readers") of these channels."""
    weight, kept = stored_weight(name, module), torch.ones(width_of(module, role), dtype=torch.bool)
    kept[channels.flatten()] = False
    along = along_weight if role == "makers" else along_inputs
    return along(module, kept).expand(weight.shape).to(weight.device, copy=True)
