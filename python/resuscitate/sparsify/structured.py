"""Whole channels: which of them stand or fall together, and how to take them out of a network for good.

Torch-Pruning finds the dependencies and does the surgery (Fang et al. 2023, "DepGraph: Towards any structural
pruning"). Its picture of a network is believed only where numbers bear it out: see `_objection`.
"""

from __future__ import annotations

import copy
import importlib
import itertools
import logging
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils import prune
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ..errors import LayerError, ResuscitateError
from ..layers import LAYERS, Selector, find_batchnorms, find_layers, select_layers, stored_weight, unwrap
from ..masks import Masks
from ..network import Network
from ..state import undisturbed

logger = logging.getLogger("resuscitate")

Example = Tensor | Sequence[Tensor]
# what a module may be to some channels -> where it says how many it has
WIDTHS = {
    "makers": ("out_channels", "out_features"),
    "readers": ("in_channels", "in_features"),
    "norms": ("num_features",),
}
SIZES = {*itertools.chain(*WIDTHS.values()), "groups", "num_parameters"}
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


@dataclass(frozen=True)
class Shrinkage:
    """What `shrink` did."""

    removed: dict[str, int]  # group -> units removed
    kept: dict[str, Tensor]  # layer or BatchNorm -> int64, the original output channels that remain, where some went
    kept_inputs: dict[str, Tensor]  # layer -> int64, likewise for its input channels
    parameters: tuple[int, int]  # of the whole model, before and after
    flops: tuple[int, int]  # for one image, before and after
    error: float  # largest difference between the outputs before and after, relative to the largest output
    notes: list[str]  # what is masked and stays, and why


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
    tp, model = _torch_pruning(), unwrap(model)
    selected = select_layers(model, include, exclude)
    groups, stay = _survey(tp, model, _inputs(example))
    for group in groups:
        if left := [name for name in group.makers if name not in selected]:
            stay[group.name] = f"not selected: {', '.join(left)}"
    for name, reason in stay.items():
        logger.info("channels of %r stay: %s", name, reason)
    return [group for group in groups if group.name not in stay]


def channel_masks(model: nn.Module, groups: Iterable[ChannelGroup], dropped: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks without the rows and the columns of dropped units: layer -> boolean of its weight's shape, True = kept.

    dropped: group name -> boolean (units,); a group that is missing drops nothing.
    There is a mask for every layer that makes or reads channels of some group. Raises ValueError for a name that is
    not among `groups`, and for a tensor that is not boolean (units,).
    """
    layers, by_name = find_layers(unwrap(model)), {group.name: group for group in groups}
    for name, gone in dropped.items():
        if name not in by_name:
            raise ValueError(f"dropped names {name!r}; the groups are {', '.join(by_name) or 'none'}")
        count = by_name[name].units
        if gone.dtype != torch.bool or gone.shape != (count,):
            raise ValueError(f"dropped[{name!r}] is {gone.dtype} {tuple(gone.shape)}, not boolean ({count},)")
    masks: dict[str, Tensor] = {}
    for group in by_name.values():
        gone = dropped.get(group.name, torch.zeros(group.units, dtype=torch.bool)).cpu()
        for role, tables in (("makers", group.makers), ("readers", group.readers)):
            for layer, table in tables.items():
                mask = _without(layer, layers[layer], role, table[gone])
                masks[layer] = masks[layer] & mask if layer in masks else mask
    return {name: masks[name] for name in layers if name in masks}


def shrink(model: nn.Module, masks: Mapping[str, Tensor], example: Example, *, tolerance: float = 1e-4) -> Shrinkage:
    """Take out, in place, every unit of channels that `masks` leave neither made nor read; say what went.

    masks: layer -> boolean of its weight's shape, True = kept; a layer without one is dense. Their zeros must be in
        the model already (`Masks.apply_`).
    example: a batch (N, ...), or a tuple of inputs, on which the small network must agree with the masked one.
    tolerance: the largest difference in output to accept, relative to the largest output.

    Modules and state-dict keys stay as they are; parameters that shrink are new tensors, so make optimizers anew. A
    unit whose rows are masked but that is still read stays, for it may emit a constant, and so does a group's last
    unit; the notes count them. All or nothing: on an error the model is as it was.
    Raises MaskError where a mask does not fit, LayerError for a layer under `torch.nn.utils.prune` or recomputed in
    each forward, ResuscitateError where torch-pruning is missing or fails, or where the outputs differ.
    """
    tp, model, inputs = _torch_pruning(), unwrap(model), _inputs(example)
    for name, layer in find_layers(model).items():
        for key in ("weight", "bias"):
            if f"{key}_mask" in layer._buffers:
                raise LayerError(name, f"its {key} is under torch.nn.utils.prune; prune.remove(layer, {key!r}) first")
    masks = Masks(masks)
    masks.check(model)
    groups, stay = _survey(tp, model, inputs)
    dropped, notes = _droppable(model, groups, masks)
    notes += [f"channels of {n!r} stay: {why}" for n, why in stay.items() if _masked(model, masks, n, "makers").any()]
    if not dropped:
        notes.append("nothing to remove: no unit is masked in all layers that make it and all that read it")
    dense, small, which = _twin(model), _twin(model), ", ".join(dropped)
    with undisturbed([dense, small], 0):
        try:
            _remove(tp, small, inputs, groups, dropped)
            error = _difference(_outputs(dense, inputs), _outputs(small, inputs))
        except Exception as problem:
            raise ResuscitateError(f"channels of {which} cannot be removed; {_said(problem)}") from problem
        if not error <= tolerance:
            raise ResuscitateError(
                f"without the masked channels of {which} the output differs by {error:.3g} of its largest value, more "
                f"than tolerance={tolerance:g}; the model is as it was"
            )
        flops = _flops(dense, inputs), _flops(small, inputs)
    parameters = sum(p.numel() for p in dense.parameters()), sum(p.numel() for p in small.parameters())
    kept, kept_inputs = _survivors(dense, groups, dropped)
    _adopt(model, small)
    removed = {name: int(gone.sum()) for name, gone in dropped.items()}
    return Shrinkage(removed, kept, kept_inputs, parameters, flops, error, notes)


def _torch_pruning() -> Any:
    try:
        return importlib.import_module("torch_pruning")
    except ImportError as error:
        raise ResuscitateError(
            "removing channels needs torch-pruning: pip install 'resuscitate[structured]'"
        ) from error


def _survey(tp: Any, model: nn.Module, inputs: list[Tensor]) -> tuple[list[ChannelGroup], dict[str, str]]:
    """The groups to be trusted, and for the first layer of every other why its channels stay."""
    twin, few = _twin(model), [x[:2] for x in inputs]
    with undisturbed([twin], 0):
        shared = _shared(twin, few)  # runs the model: an error of its own comes out as it is
        try:
            graph = _graph(tp, twin, few)
        except Exception as error:
            raise ResuscitateError(f"torch-pruning cannot trace this network; {_said(error)}") from error
        groups, stay = _picture(tp, graph, shared)
        _randomise(twin)
        if _objection(tp, twin, few, groups):
            candidates, groups = groups, []
            for group in candidates:
                if objection := _objection(tp, twin, few, [*groups, group]):
                    stay[group.name] = objection
                else:
                    groups.append(group)
    return groups, stay


def _graph(tp: Any, model: nn.Module, inputs: list[Tensor]) -> Any:
    """Torch-Pruning's dependency graph. Each output gets a node of its own, which a group that reaches it contains."""
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tp.DependencyGraph().build_dependency(
            model,
            example_inputs=_placed(model, (x[:2] for x in inputs)),
            forward_fn=lambda model, inputs: model(*inputs),
            output_transform=lambda out: [leaf * 1 for leaf in _tensors(out) if leaf.requires_grad],
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
                stay[name] = _said(error)
    return groups, stay


def _group(tp: Any, graph: Any, name: str, shared: Mapping[nn.Module, str], seen: set[str]) -> ChannelGroup:
    """The group of layer `name`'s output channels; adds its makers to `seen`. Raises where it makes no sense."""
    names = {module: name for name, module in graph.model.named_modules()}
    count = _width(graph.model.get_submodule(name), "makers")
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
    limit = sum(_width(layer, role) for layer in find_layers(graph.model).values() for role in ("makers", "readers"))
    found = {start: {channel: channel for channel in range(count)}}
    todo = [(*start, [_Index(channel, channel) for channel in range(count)])]
    while todo:
        node, cut, indices = todo.pop()
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
                    todo.append((edge.target, edge.handler, fresh))
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
                per_group = _width(module, role) // groups
                place = channels % per_group
                lowest = torch.full((per_group,), count).scatter_reduce(0, place, labels[roots], "amin")
                labels = labels.scatter_reduce(0, roots, lowest[place], "amin")
    return labels.unique(return_inverse=True)[1]


def _table(part: _Part, units: Tensor) -> Tensor:
    """(units, k): the module's channels in each unit, ascending. Raises where units are not alike, or cannot be cut."""
    name, module, role, channels, _ = part
    if role != "norms":
        stored_weight(name, module)
    width, groups, count = _width(module, role), _groups(module), int(units.max()) + 1
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


def _width(module: nn.Module, role: str) -> int:
    return int(next(getattr(module, key) for key in WIDTHS[role] if hasattr(module, key)))


def _groups(module: nn.Module) -> int:
    """Groups of a convolution that must stay equal in size; a depthwise one has fewer of them afterwards instead."""
    groups = int(getattr(module, "groups", 1))
    return 1 if groups == getattr(module, "in_channels", 0) == module.out_channels else groups


def _shared(model: nn.Module, inputs: list[Tensor]) -> dict[nn.Module, str]:
    """Modules that run more than once in a forward pass, or hold a parameter that another one holds too."""
    network, runs = Network(model), Counter[str]()
    with network.hooked(network.observed(), lambda name, x: runs.update([name])):
        _outputs(model, inputs)
    holders = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    shared = {network.modules[name]: "runs more than once" for name, times in runs.items() if times > 1}
    for module in model.modules():
        if any(p is not None and holders[id(p)] > 1 for p in module._parameters.values()):
            shared[module] = "shares a parameter with another module"
    return shared


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Weights and statistics that keep signals alive, so that no dead or collapsed layer can hide a difference."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, (2 / max(parameter.shape[1:].numel(), 1)) ** 0.5)
        else:
            parameter.uniform_(0.5, 1.5)
    for module in find_batchnorms(model).values():
        module._buffers["running_mean"].normal_(0, 0.3)  # type: ignore[union-attr]
        module._buffers["running_var"].uniform_(0.5, 2)  # type: ignore[union-attr]


def _objection(tp: Any, model: nn.Module, inputs: list[Tensor], groups: list[ChannelGroup]) -> str:
    """Why these groups are not what they seem, or nothing.

    A random half of the units is taken out of one copy. In another copy all of them are still made, but their readers
    no longer read them: if any other way led from them to the output, or an index were wrong, the outputs would differ.
    """
    dropped = {group.name: torch.randperm(group.units) < group.units // 2 for group in groups}
    unread, small = _twin(model), _twin(model)
    for group in groups:
        for name, table in group.readers.items():
            weight = unread.get_parameter(f"{name}.weight")
            mask = _without(name, unread.get_submodule(name), "readers", table[dropped[group.name]])
            weight.masked_fill_(~mask, 0)
    try:
        _remove(tp, small, inputs, groups, dropped)
        error = _difference(_outputs(unread, inputs), _outputs(small, inputs))
    except Exception as problem:
        return f"the model does not run without some of them; {_said(problem)}"
    return "" if error <= AGREEMENT else "the output depends on them in a way that torch-pruning does not see"


def _remove(
    tp: Any, model: nn.Module, inputs: list[Tensor], groups: Iterable[ChannelGroup], dropped: Mapping[str, Tensor]
) -> None:
    """Take the dropped units out of a twin."""
    graph = _graph(tp, model, inputs)
    for group in groups:
        if group.name in dropped:
            layer, rows = model.get_submodule(group.name), group.makers[group.name][dropped[group.name]]
            cut = graph.get_pruner_of_module(layer).prune_out_channels
            graph.get_pruning_group(layer, cut, rows.flatten().tolist()).prune(record_history=False)


def _droppable(
    model: nn.Module, groups: Iterable[ChannelGroup], masks: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Group -> boolean (units,): those masked in all layers that make them and all that read them; notes on others."""
    dropped: dict[str, Tensor] = {}
    notes: list[str] = []
    for group in groups:
        unmade, unread = (
            torch.stack([_masked(model, masks, name, role)[table].all(1) for name, table in tables.items()]).all(0)
            for role, tables in (("makers", group.makers), ("readers", group.readers))
        )
        gone = unmade & unread
        if read := int((unmade & ~unread).sum()):
            notes.append(f"{read} units of {group.name!r} are masked but still read; they may emit a constant and stay")
        if gone.all():
            gone[0] = False
            notes.append(f"all units of {group.name!r} are masked; one stays")
        if gone.any():
            dropped[group.name] = gone
    return dropped, notes


def _masked(model: nn.Module, masks: Mapping[str, Tensor], name: str, role: str) -> Tensor:
    """Boolean (channels,): those that the layer's mask leaves no weight to make, or to read."""
    module = model.get_submodule(name)
    if name not in masks:
        return torch.zeros(_width(module, role), dtype=torch.bool)
    return ~_cells(module, masks[name].cpu()).any(3).any(2 if role == "makers" else 1).flatten()


def _without(name: str, module: nn.Module, role: str, channels: Tensor) -> Tensor:
    """Boolean of the weight's shape: False in the rows ("makers") or the columns ("readers") of these channels."""
    weight = stored_weight(name, module)
    kept, mask = torch.ones(_width(module, role), dtype=torch.bool), torch.ones(weight.shape, dtype=torch.bool)
    kept[channels.flatten()] = False
    cells = _cells(module, mask)
    cells &= kept.view(len(cells), *((-1, 1) if role == "makers" else (1, -1)), 1)
    return mask.to(weight.device)


def _cells(module: nn.Module, weight: Tensor) -> Tensor:
    """A layer's weight, or mask, as [groups, outputs of a group, inputs of a group, kernel]; a view where it can be."""
    groups = getattr(module, "groups", 1)
    cells = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return cells.transpose(1, 2) if isinstance(module, _ConvTransposeNd) else cells


def _survivors(
    model: nn.Module, groups: Iterable[ChannelGroup], dropped: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The output channels, and the input channels, that remain of the model's modules where some went."""
    kept: dict[str, Tensor] = {}
    kept_inputs: dict[str, Tensor] = {}
    for group in groups:
        if group.name in dropped:
            sides = (
                ("makers", group.makers, kept),
                ("norms", group.norms, kept),
                ("readers", group.readers, kept_inputs),
            )
            for role, tables, remaining in sides:
                for name, table in tables.items():
                    before = remaining.get(name, torch.arange(_width(model.get_submodule(name), role)))
                    remaining[name] = before[~torch.isin(before, table[dropped[group.name]])]
    return kept, kept_inputs


def _adopt(model: nn.Module, small: nn.Module) -> None:
    """Give each module the tensors and the sizes of its twin in `small` where they differ, all at once."""
    changes: list[tuple[dict[str, Any], str, Any]] = []
    for name, module in model.named_modules():
        twin = small.get_submodule(name)
        for slots in (module._parameters, module._buffers):
            for key, old in slots.items():
                if old is not None and old.shape != (new := getattr(twin, key).detach()).shape:
                    # in the memory format of the old one
                    new = torch.empty_like(old[tuple(map(slice, new.shape))]).copy_(new)
                    changes.append(
                        (slots, key, nn.Parameter(new, old.requires_grad) if slots is module._parameters else new)
                    )
        changes += [(vars(module), key, vars(twin)[key]) for key in SIZES if key in vars(module)]
    for slots, key, value in changes:
        slots[key] = value


def _twin(model: nn.Module) -> nn.Module:
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


def _inputs(example: Example) -> list[Tensor]:
    return [example] if isinstance(example, Tensor) else list(example)


def _placed(model: nn.Module, inputs: Iterable[Tensor]) -> list[Tensor]:
    network = Network(model)
    return [network.place(x) for x in inputs]


def _tensors(out: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Iterable[Tensor]) -> list[Tensor]:
    torch.manual_seed(0)
    return _tensors(model(*_placed(model, inputs)))


def _difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """Largest difference between tensors, relative to the largest value of each; infinite where shapes differ."""
    if [x.shape for x in expected] != [x.shape for x in found]:
        return math.inf
    pairs = [(x.double(), y.double()) for x, y in zip(expected, found, strict=True) if not torch.equal(x, y)]
    return float(torch.tensor([0.0, *((x - y).abs().max() / x.abs().max() for x, y in pairs)]).max())


@torch.no_grad()
def _flops(model: nn.Module, inputs: Iterable[Tensor]) -> int:
    """Floating-point operations for one image."""
    with FlopCounterMode(display=False) as counter:
        model(*_placed(model, (x[:1] for x in inputs)))
    return counter.get_total_flops()


def _said(error: Exception) -> str:
    """What an error says in its first line, and of what kind it is if it is not our own."""
    line = str(error).partition("\n")[0]
    return line if isinstance(error, ResuscitateError) else f"{type(error).__name__}: {line}"
