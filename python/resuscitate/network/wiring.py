"""How a network is wired: which modules run in which order, which BatchNorm alone reads a layer, when a value dies."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from .layers import LAYERS
from .operands import PRODUCTS, named_arguments

# layers called as functions, outside any layer module: they run, and nothing can repair them
FUNCTIONAL_LAYERS = {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear"}
# functions that read a tensor's description, not its values
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
DESCRIPTIONS = {"__get__", "__len__", "dim", "is_contiguous", "is_floating_point", "numel", "size", "stride"}


@dataclass(frozen=True)
class Gate:
    """A layer's output goes into relu(batchnorm(output) + other) and nowhere else; both parts are optional.

    `adds`: there is such a sum. No layer and no BatchNorm had to run for what is added after the layer had.
    """

    batchnorm: str | None
    adds: bool


@dataclass
class Wiring:
    """What one real forward pass showed.

    `calls` counts the calls of every module that ran, by name, in the order of their first calls; `layers` has the
    types of the layers among them. `batchnorm_of` names, for a layer, the one BatchNorm that alone reads its output,
    where both are called once, and `gates` the ReLU that does so, behind that BatchNorm maybe. `products` are layers
    whose output was, in each call, their own weight times patches of an input, and a bias: the weight was not computed
    from another, and nothing was done to the product. `functional` counts the convolutions and linear maps that ran as
    functions, outside a layer module, and `borrowed` names the layers whose weight was read there. `made` counts the
    bytes of all tensors that functions returned, `largest` those of the largest one, and `draws` says whether random
    numbers were drawn.
    """

    calls: Counter[str] = field(default_factory=Counter)
    layers: dict[str, type[nn.Module]] = field(default_factory=dict)
    batchnorm_of: dict[str, str] = field(default_factory=dict)
    gates: dict[str, Gate] = field(default_factory=dict)
    products: set[str] = field(default_factory=set)
    functional: Counter[str] = field(default_factory=Counter)
    borrowed: set[str] = field(default_factory=set)
    made: int = 0
    largest: int = 0
    draws: bool = False


@dataclass
class _Value:
    """A tensor that a layer, a BatchNorm behind it or a sum of that made, and what became of it.

    `made` counts the layers and BatchNorms that had been called by then.
    """

    made: int
    layer: str = ""
    readers: int = 0
    batchnorm: str | None = None
    rectified: bool = False
    next: _Value | None = None  # what the BatchNorm or the sum made of it


class _Watch(TorchFunctionMode):
    """Counts the torch functions that read the values of the tensors it watches, and the layers called as functions.

    `borrowed` names the layers whose weight, by its id in `weights`, is read while no layer runs.
    `within`: for each layer that is running, the weights and the results of the products within it.
    """

    def __init__(self, weights: Mapping[int, str]) -> None:
        super().__init__()
        self.weights, self.borrowed = weights, set[str]()
        self.values = WeakIdKeyDictionary()
        self.within: list[list[tuple[Any, Any]]] = []
        self.called = self.made = self.largest = 0
        self.functional: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in FUNCTIONAL_LAYERS and not self.within:
            self.functional[name] += 1
        read, leaves = list[_Value](), list[Tensor]()
        if name not in DESCRIPTIONS:
            leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            read = [self.values[leaf] for leaf in leaves if leaf in self.values]
        if not self.within:
            self.borrowed.update(self.weights[id(leaf)] for leaf in leaves if id(leaf) in self.weights)
        for value in read:
            value.readers += 1
            value.rectified = is_rectifier(name, args, kwargs)
        result = func(*args, **(kwargs or {}))
        if name not in DESCRIPTIONS:
            sizes = [x.numel() * x.element_size() for x in tree_leaves(result) if isinstance(x, Tensor)]
            self.made, self.largest = self.made + sum(sizes), max([self.largest, *sizes])
        if name in PRODUCTS and self.within:
            self.within[-1].append((named_arguments(args, kwargs)["weight"], result))
        if read and is_sum(name, args, kwargs) and isinstance(result, Tensor):
            # of two that are watched, the later one: the other was there before
            latest = max(read, key=lambda value: value.made)
            latest.next = self.values[result] = _Value(self.called)
        elif read and result is leaves[0] and read[0].rectified:
            del self.values[result]  # in place: from now on it is another value
        return result


def output_leaves(output: Any) -> list[Any]:
    """Whatever a model's output holds, such as tensors: in containers, and in dataclasses and mappings of any class."""
    found = []
    for leaf in tree_leaves(output):
        if is_dataclass(leaf) and not isinstance(leaf, type):
            found += output_leaves([getattr(leaf, each.name) for each in fields(leaf)])
        elif isinstance(leaf, Mapping):
            found += output_leaves(list(leaf.values()))
        else:
            found.append(leaf)
    return found


def same_output(a: Any, b: Any) -> bool:
    """Are two outputs of a model the same, but for rounding?"""
    ours, theirs = output_leaves(a), output_leaves(b)
    return len(ours) == len(theirs) and all(
        torch.allclose(x, y, rtol=1e-4, atol=1e-6, equal_nan=True) if isinstance(x, Tensor) else bool(x == y)
        for x, y in zip(ours, theirs, strict=True)
    )


def is_rectifier(name: str, args: Any, kwargs: Any) -> bool:
    """Does this function set what is below zero to zero, and leave the rest, up to some bound?"""
    if name == "hardtanh":  # ReLU6
        return (kwargs or {}).get("min_val", args[1] if len(args) > 1 else -1) == 0
    return name in ("relu", "relu_", "relu6")


def is_sum(name: str, args: Any, kwargs: Any) -> bool:
    """Does this function add two tensors of one shape?"""
    return (
        name in ("add", "add_")
        and len(args) == 2
        and not kwargs
        and all(isinstance(arg, Tensor) for arg in args)
        and args[0].shape == args[1].shape
        and args[0] is not args[1]
    )


def _on_sequences(module: nn.Module, output: Tensor) -> bool:
    """Is this a linear layer whose features are not axis 1, the channels of a BatchNorm behind it?"""
    return isinstance(module, nn.Linear) and output.dim() != 2


def observe(model: nn.Module, forward: Callable[[], Any]) -> Wiring:
    """Note how `model` is wired while `forward` runs it once, by the identity of the tensors that flow.

    Works whatever the control flow. A layer is paired with a BatchNorm when the BatchNorm is the only function that
    reads its output: the output is neither returned nor used by anything else.
    """
    wiring, outputs, others = Wiring(), list[_Value](), set[str]()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}
    watch = _Watch({id(getattr(layer, "weight", None)): name for name, layer in layers.items()})

    def before(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        wiring.calls[name] += 1
        watch.called += isinstance(module, (*LAYERS, _BatchNorm))
        if isinstance(module, LAYERS):
            wiring.layers[name] = type(module)
            watch.within.append([])
        if isinstance(module, _BatchNorm) and args and args[0] in watch.values:
            watch.values[args[0]].batchnorm = name

    def after(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, LAYERS):
            is_product = [(w is module.weight, out is output) for w, out in watch.within.pop()] == [(True, True)]
            (wiring.products if is_product else others).add(name)
        if not isinstance(output, Tensor):
            return
        if isinstance(module, LAYERS) and not _on_sequences(module, output):
            outputs.append(_Value(watch.called, name))
            watch.values[output] = outputs[-1]
        elif isinstance(module, _BatchNorm) and args and args[0] in watch.values and output is not args[0]:
            watch.values[args[0]].next = watch.values[output] = _Value(watch.called)

    handles, drawn = [], torch.get_rng_state()
    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(lambda m, a, name=name: before(name, m, a)))
            handles.append(module.register_forward_hook(lambda m, a, out, name=name: after(name, m, a, out)))
        with watch:
            result = forward()
    finally:
        for handle in handles:
            handle.remove()
    for leaf in output_leaves(result):
        if isinstance(leaf, Tensor) and leaf in watch.values:
            watch.values[leaf].readers += 1
    wiring.functional, wiring.borrowed = watch.functional, watch.borrowed
    wiring.made, wiring.largest = watch.made, watch.largest
    wiring.draws = not torch.equal(drawn, torch.get_rng_state())
    wiring.products -= others
    alone = [out for out in outputs if out.readers == 1 and wiring.calls[out.layer] == 1]
    for out in alone:
        if out.batchnorm and wiring.calls[out.batchnorm] == 1:
            wiring.batchnorm_of[out.layer] = out.batchnorm
        gate = _gate(out, wiring)
        if gate is not None:
            wiring.gates[out.layer] = gate
    return wiring


def _gate(value: _Value, wiring: Wiring) -> Gate | None:
    """What the gate is that this output of a layer alone goes through, if it does."""
    batchnorm, made, adds = wiring.batchnorm_of.get(value.layer), value.made, False
    if batchnorm is not None and value.next is not None:
        value, made = value.next, made + 1
    if value.readers == 1 and value.next is not None and value.next.made == made:
        value, adds = value.next, True
    return Gate(batchnorm, adds) if value.readers == 1 and value.rectified else None


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (*LAYERS, _BatchNorm)) or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """The model's first input, and those without a default: an option that is not given stays what it is."""
        first, *others = inspect.signature(self.root.forward).parameters.values()
        needed = [first, *(other for other in others if other.default is other.empty and other.kind in POSITIONAL)]
        return root_fn, [self.root, *(self.create_proxy("placeholder", each.name, (), {}) for each in needed)]


def trace(model: nn.Module) -> fx.Graph:
    """The model as a torch.fx graph in which layers and BatchNorms stay modules.

    Raises whatever torch.fx or the model's own code raises when the control flow depends on the data.
    """
    return _Tracer().trace(model)


def wiring_of(graph: fx.Graph, model: nn.Module) -> Wiring:
    """The same as `observe`, read off a traced graph instead of a run, as far as that goes without shapes.

    `calls` counts the modules of the graph, no linear layer is paired (see `_on_sequences`), and there are no gates.
    """
    modules = dict(model.named_modules())
    called = [node for node in graph.nodes if node.op == "call_module"]
    wiring = Wiring(Counter(str(node.target) for node in called))
    for node in called:
        source = node.args[0] if node.args else None
        if (
            isinstance(modules[node.target], _BatchNorm)
            and isinstance(source, fx.Node)
            and source.op == "call_module"
            and isinstance(modules[str(source.target)], _ConvNd)
            and len(source.users) == wiring.calls[node.target] == wiring.calls[str(source.target)] == 1
        ):
            wiring.batchnorm_of[str(source.target)] = str(node.target)
    return wiring
