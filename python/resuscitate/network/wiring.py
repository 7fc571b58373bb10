"""How a network is wired: which modules run, in which order, and which BatchNorm or ReLU alone reads a layer."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from .copies import copy_sharing_tensors
from .layers import LAYERS, find_layers
from .operands import PRODUCTS, named_arguments

# layers as functions: called outside any layer module, they cannot be repaired
FUNCTIONAL_LAYERS = {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear"}
# functions that are a ReLU where their lower bound, the second argument, is 0; its name
CLAMPS = {
    "hardtanh": "min_val",
    **dict.fromkeys(("clamp", "clamp_", "clip", "clip_", "clamp_min", "clamp_min_"), "min"),
}
# functions that read a tensor's metadata, not its values
DESCRIPTIONS = {"__get__", "__len__", "dim", "is_contiguous", "is_floating_point", "numel", "size", "stride"}
# functions that make a tensor like another one; of the others, values of the first argument only
LIKE = {"empty_like", "full_like", "new_empty", "new_full", "new_ones", "new_tensor", "new_zeros", "ones_like"}
LIKE |= {"rand_like", "randn_like", "zeros_like"}
LIKE_THE_SECOND = {"expand_as", "reshape_as", "to", "type_as", "view_as"}


@dataclass(frozen=True)
class ReluConsumer:
    """Only relu(batchnorm(output) + other) reads a layer's output; `batchnorm` and `other` are optional."""

    batchnorm: str | None
    adds: bool  # there is an `other`; it depends on no layer and no BatchNorm that runs after this layer


@dataclass
class Wiring:
    """The modules and tensors of one forward pass; modules are identified by their names."""

    calls: Counter[str] = field(default_factory=Counter)  # of each module that ran, in the order of first calls
    layers: dict[str, type[nn.Module]] = field(default_factory=dict)  # types of the layers among these modules
    # for a layer, the BatchNorm that alone reads its output, where both are called once; the model's output is read too
    batchnorm_of: dict[str, str] = field(default_factory=dict)
    # for a layer, the ReLU that alone reads its output, directly or after that BatchNorm or a sum
    relu_consumers: dict[str, ReluConsumer] = field(default_factory=dict)
    # layers whose output is, in each call, their own weight times patches of an input, plus a bias: the weight is not
    # computed from another one, and the output is the product itself
    products: set[str] = field(default_factory=set)
    functional: Counter[str] = field(default_factory=Counter)  # calls of `FUNCTIONAL_LAYERS`, by function
    read_elsewhere: set[str] = field(default_factory=set)  # layers whose weight a function reads while no layer runs
    bytes_made: int = 0  # of all tensors that functions returned
    largest_bytes: int = 0  # of the largest one
    draws_random_numbers: bool = False
    keeps_tensors: bool = False  # something refers to a tensor of the pass after its end, such as an attribute


@dataclass
class _Value:
    """A watched tensor: the output of a layer, of a BatchNorm or of a sum."""

    calls_before: int  # of layers and BatchNorms, when the tensor was created
    layer: str = ""
    readers: int = 0  # functions that read it
    batchnorm: str | None = None
    rectified: bool = False  # the last reader is a ReLU
    next: _Value | None = None  # the output of the BatchNorm or the sum that reads this tensor


class MadeTensors(TorchFunctionMode):
    """Knows, without keeping them alive, the tensors that functions return within it."""

    def __init__(self) -> None:
        super().__init__()
        self.made = list[ReferenceType[Tensor]]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.made += [ref(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        return result

    def kept(self, but: Iterable[Tensor] = ()) -> bool:
        """Does something still refer to one of them, `but` for these?"""
        known = {id(tensor) for tensor in but}
        return any(tensor is not None and id(tensor) not in known for tensor in (each() for each in self.made))


class _Watch(TorchFunctionMode):
    """Counts the torch functions that read watched tensors, and layers called as functions."""

    def __init__(self, wiring: Wiring, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.wiring, self.layer_calls = wiring, 0  # calls of layers and BatchNorms
        self.weights = WeakIdKeyDictionary()  # the names of layers by weight
        for name, layer in layers.items():
            weight = layer._parameters.get("weight", vars(layer).get("weight"))
            if isinstance(weight, Tensor):
                self.weights[weight] = name
        self.values = WeakIdKeyDictionary()  # of the watched tensors
        self.products: list[list[tuple[Any, Any]]] = []  # by layer that is running: weight and result of each product

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, wiring = getattr(func, "__name__", ""), self.wiring
        result = func(*args, **(kwargs or {}))
        if name in DESCRIPTIONS and not isinstance(result, Tensor):  # x.T and x.data are attributes, and its values
            return result
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        read = [self.values[leaf] for leaf in leaves if leaf in self.values]
        if not self.products:
            wiring.functional.update({name} & FUNCTIONAL_LAYERS)
            values = [] if name in LIKE else leaves[:1] if name in LIKE_THE_SECOND else leaves
            wiring.read_elsewhere |= {self.weights[leaf] for leaf in values if leaf in self.weights}
        for value in read:
            value.readers += 1
            value.rectified = is_rectifier(name, args, kwargs)
        sizes = [x.numel() * x.element_size() for x in tree_leaves(result) if isinstance(x, Tensor)]
        wiring.bytes_made += sum(sizes)
        wiring.largest_bytes = max([wiring.largest_bytes, *sizes])
        if name in PRODUCTS and self.products:
            self.products[-1].append((named_arguments(args, kwargs)["weight"], result))
        if read and is_sum(name, args, kwargs) and isinstance(result, Tensor):
            # if both summands are watched, this is the sum of the later one: the earlier one is its `other`
            latest = max(read, key=lambda value: value.calls_before)
            latest.next = self.values[result] = _Value(self.layer_calls)
        elif read and result is leaves[0] and read[0].rectified:
            del self.values[result]  # an in-place ReLU: later readers read another value
        return result


def output_leaves(output: Any) -> list[Any]:
    """The leaves of a model's output, such as tensors, in containers, dataclasses and mappings of any class."""
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
    """Are two outputs of a model equal up to rounding?"""
    ours, theirs = output_leaves(a), output_leaves(b)
    return len(ours) == len(theirs) and all(
        torch.allclose(x, y, rtol=1e-4, atol=1e-6, equal_nan=True) if isinstance(x, Tensor) else bool(x == y)
        for x, y in zip(ours, theirs, strict=True)
    )


def is_rectifier(name: str, args: Any, kwargs: Any) -> bool:
    """Is this function a ReLU, with or without an upper bound?"""
    if name not in CLAMPS:
        return name in ("relu", "relu_", "relu6")
    least = (kwargs or {}).get(CLAMPS[name], args[1] if len(args) > 1 else None)
    return isinstance(least, (int, float)) and least == 0


def is_sum(name: str, args: Any, kwargs: Any) -> bool:
    """Does this function add two tensors of one shape?"""
    if name not in ("add", "add_") or len(args) != 2 or kwargs or not all(isinstance(arg, Tensor) for arg in args):
        return False
    return args[0].shape == args[1].shape and args[0] is not args[1]


def observe(model: nn.Module, forward: Callable[[], Any]) -> Wiring:
    """The wiring of `model` in one call of `forward`, found by the identity of tensors, whatever the control flow."""
    wiring, outputs, others = Wiring(), list[_Value](), set[str]()
    watch = _Watch(wiring, find_layers(model))

    def before(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        wiring.calls[name] += 1
        watch.layer_calls += isinstance(module, (*LAYERS, _BatchNorm))
        if isinstance(module, LAYERS):
            wiring.layers[name] = type(module)
            watch.products.append([])
        if isinstance(module, _BatchNorm) and args and args[0] in watch.values:
            watch.values[args[0]].batchnorm = name

    def after(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, LAYERS):
            is_product = [(w is module.weight, out is output) for w, out in watch.products.pop()] == [(True, True)]
            (wiring.products if is_product else others).add(name)
        if not isinstance(output, Tensor):
            return
        # the features of a linear layer are on axis 1, as a BatchNorm needs them, in an output of two axes only
        if isinstance(module, LAYERS) and (output.dim() == 2 or not isinstance(module, nn.Linear)):
            outputs.append(_Value(watch.layer_calls, name))
            watch.values[output] = outputs[-1]
        elif isinstance(module, _BatchNorm) and args and args[0] in watch.values and output is not args[0]:
            watch.values[args[0]].next = watch.values[output] = _Value(watch.layer_calls)

    random_state = torch.get_rng_state()
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):  # it takes no hooks, and has no layers that are found
                continue
            hooks.enter_context(module.register_forward_pre_hook(partial(before, name)))
            hooks.enter_context(module.register_forward_hook(partial(after, name)))
        with watch, MadeTensors() as made:
            result = forward()
    for leaf in output_leaves(result):
        if isinstance(leaf, Tensor) and leaf in watch.values:
            watch.values[leaf].readers += 1
    result = leaf = None  # lest these refer to a tensor
    wiring.keeps_tensors = made.kept()
    wiring.draws_random_numbers = not torch.equal(random_state, torch.get_rng_state())
    wiring.products -= others
    for out in (out for out in outputs if out.readers == 1 and wiring.calls[out.layer] == 1):
        if out.batchnorm and wiring.calls[out.batchnorm] == 1:
            wiring.batchnorm_of[out.layer] = out.batchnorm
        if (consumer := _relu_consumer(out, wiring)) is not None:
            wiring.relu_consumers[out.layer] = consumer
    return wiring


def _relu_consumer(value: _Value, wiring: Wiring) -> ReluConsumer | None:
    """The ReLU consumer of this output of a layer, if there is one."""
    batchnorm, calls, adds = wiring.batchnorm_of.get(value.layer), value.calls_before, False
    if batchnorm is not None and value.next is not None:
        value, calls = value.next, calls + 1
    if value.readers == 1 and value.next is not None and value.next.calls_before == calls:
        value, adds = value.next, True
    return ReluConsumer(batchnorm, adds) if value.readers == 1 and value.rectified else None


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (*LAYERS, _BatchNorm)) or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Placeholders for the first input and those without a default; other inputs keep their defaults."""
        first, *others = inspect.signature(self.root.forward).parameters.values()
        positional = (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD)
        needed = [first, *(other for other in others if other.default is other.empty and other.kind in positional)]
        return root_fn, [self.root, *(self.create_proxy("placeholder", each.name, (), {}) for each in needed)]


def trace(model: nn.Module) -> fx.Graph:
    """The model as a torch.fx graph in which layers and BatchNorms stay modules; errors are those of torch.fx.

    `meta["constant"]` of a `get_attr` node is the value of a constant that is no attribute of the model.
    """
    # A trace adds constants to the module, and a forward pass may keep proxies in it: both stay in the copy.
    root = copy_sharing_tensors(model)
    graph = _Tracer().trace(root)
    for node in graph.nodes:
        name = str(node.target)
        if node.op == "get_attr" and name in vars(root).keys() - vars(model).keys():
            node.meta["constant"] = getattr(root, name)
    return graph


def wiring_of(graph: fx.Graph, model: nn.Module) -> Wiring:
    """`calls` and `batchnorm_of` of a graph, without pairs of linear layers, for which `observe` needs the shapes."""
    modules = dict(model.named_modules())
    called = {node: str(node.target) for node in graph.nodes if node.op == "call_module"}
    wiring = Wiring(Counter(called.values()))
    for node, name in called.items():
        source: Any = node.args[0] if node.args else None
        layer = called.get(source, "")
        alone = wiring.calls[name] == wiring.calls[layer] == 1 == len(source.users)
        if alone and isinstance(modules[name], _BatchNorm) and isinstance(modules[layer], _ConvNd):
            wiring.batchnorm_of[layer] = name
    return wiring
