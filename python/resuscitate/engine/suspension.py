"""Where the forward passes of a network are suspended, and how their values are corrected when they continue."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..errors import LayerError
from ..network.wiring import DESCRIPTIONS, is_sum, output_leaves
from ..runtime.passes import current, suspend
from .deferred import DeferredCorrection, is_mergeable
from .pass_memory import RAW, PassStorages, TrialPass
from .probes import Side
from .walk import Walk

Where = Side | Literal["sum"]


@dataclass
class Position:
    """Where the pass of one batch is. `at` names the module at which it is suspended, or was last.

    `value` is the tensor measured there; at a sum, `added` is the tensor added to the layer's output.
    """

    live: PassStorages | TrialPass | None = None
    at: str | None = None
    suspended: bool = False
    value: Any = None
    added: Tensor | None = None
    awaited: _Awaited | None = None
    due: dict[str, Tensor] = field(default_factory=dict)  # by layer, an output with a correction to come
    stale: Tensor | None = None  # a value that is about to be overwritten by its new value
    output: Any = None  # of a trial
    outdated: str | None = None  # a layer whose class changed while its call was suspended

    @contextmanager
    def untracked(self) -> Iterator[None]:
        """For operators that are not part of the forward pass itself."""
        if self.live is None:
            yield
            return
        self.live.untracked = True
        yield
        self.live.untracked = False

    def rest(self) -> None:
        """The pass is suspended and measured: its values may leave memory."""
        if isinstance(self.live, PassStorages) and self.at is not None:
            self.live.put(self.at, self.used())

    def used(self) -> list[Any]:
        """Values that the walk reads, whatever the forward pass itself reads."""
        return [self.value, self.added, self.stale, None if self.awaited is None else self.awaited.output]

    @contextmanager
    def in_memory(self) -> Iterator[None]:
        """Bring the values of the suspended pass into memory for a while."""
        if isinstance(self.live, PassStorages):
            self.live.get(keep=True)
        yield
        self.rest()


class _Awaited:
    """A layer whose pass is to be suspended at the sum behind it.

    `value` is measured. `output` is the summand: the layer's output, or that of its BatchNorm once that has run.
    """

    def __init__(self, name: str, value: Any) -> None:
        self.name, self.value = name, value
        self.output: Any = None
        self.version = _version(value)


class SuspensionPoints:
    """The modules at which the passes of one network are suspended, and the corrections made when they continue.

    `ahead` names the modules at which a pass is still to be suspended. `corrections`, by layer, apply to outputs that
    passes were suspended with.
    """

    def __init__(self, walk: Walk, is_dense: bool) -> None:
        self.net, self.consumers, self.is_dense = walk.nets[is_dense], walk.consumers[is_dense], is_dense
        self.batchnorm_of = walk.wiring.batchnorm_of
        sums = {name for name, consumer in self.consumers.items() if consumer.adds}
        self.where: dict[str, Where] = {
            each.name: "sum" if each.name in sums else each.probe.side(is_dense)
            for each in walk.requests
            if each.probe.dense or not is_dense
        }
        self.ahead = set(self.where)
        self.corrections: dict[str, DeferredCorrection] = {}
        # asked before the walk adds hooks
        self.plain = {name: module for name, module in self.net.modules.items() if is_mergeable(module)}
        self.context = thread_context(self.net.device)

    def hook(self, stack: ExitStack) -> None:
        """Put hooks on the modules, until the stack is closed."""
        for name, where in self.where.items():
            module = self.net.modules[name]
            stack.enter_context(module.register_forward_pre_hook(partial(self._before, name), with_kwargs=True))
            if not isinstance(module, _BatchNorm) and (where != "input" or not self.is_dense):
                stack.enter_context(module.register_forward_hook(partial(self._after, name), with_kwargs=True))

    def run(self, here: Position, read: Callable[[], Any]) -> None:
        """The whole forward pass of one batch, in the thread of the pass."""
        with ExitStack() as stack:
            for enter in self.context:
                stack.enter_context(enter())
            stack.enter_context(_Watch(self, here))
            if here.live is not None:
                stack.enter_context(here.live)
            with here.untracked():
                batch = read()
            output = self.net.run(batch)
        self._check_sum(here)
        if isinstance(here.live, TrialPass):
            here.live.read(output_leaves(output))
            here.output = output

    def _before(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        here = current()
        if not isinstance(here, Position) or name not in self.ahead or self.where[name] == "output":
            return
        x = args[0] if args else next(iter(kwargs.values()))
        if self.where[name] == "sum":
            self._check_sum(here)
            here.awaited = _Awaited(name, x)
        elif here.awaited is None or x is not here.awaited.output:
            kind = type(module)
            self._halt(here, name, x)
            if type(module) is not kind:  # else the forward of the old class would run
                here.outdated = name

    def _after(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        here = current()
        if not isinstance(here, Position):
            return None
        if here.outdated == name:
            here.outdated = None
            return module(*args, **kwargs)
        if name not in self.ahead or self.where[name] == "input":
            return None
        if self.where[name] == "sum":
            if self.is_dense:
                here.awaited = _Awaited(name, output)
            assert here.awaited is not None
            here.awaited.output = output
            return None
        self._halt(here, name, output)
        correction = self.corrections.get(name)
        if correction is not None and correction.batchnorm is not None:
            here.due[name] = output
        elif correction is not None:
            with here.untracked():
                correction.apply(output)
        return None

    def _halt(self, here: Position, name: str, value: Any, added: Tensor | None = None) -> None:
        self._check_sum(here)
        for layer in [layer for layer, output in here.due.items() if output is value]:
            self.apply_due(here, layer)  # the BatchNorm is measured at its input
        here.at, here.value, here.added = name, value, added
        if isinstance(here.live, TrialPass):
            with here.untracked():
                here.live.suspend_at(name, here.used())
        else:
            here.suspended = True
            with nullcontext() if here.live is None else here.live.suspended():
                suspend()
            here.suspended = False
        here.value = here.added = None

    def apply_due(self, here: Position, layer: str) -> None:
        """Correct an output in place, where its BatchNorm does not take the correction."""
        with here.untracked():
            self.corrections[layer].apply(here.due.pop(layer))

    def _check_sum(self, here: Position) -> None:
        """Raise LayerError where a pass did not come to the sum that the example had."""
        if here.awaited is not None:
            raise LayerError(
                here.awaited.name, "what is added to its output is not the same for all batches; pass relu_aware=False"
            )

    def at_sum(self, here: Position, added: Tensor) -> None:
        """Suspend a pass at a sum; then compute the layer and its BatchNorm again with the new weights."""
        awaited, here.awaited = here.awaited, None
        assert awaited is not None
        if _version(awaited.value) != awaited.version:
            raise LayerError(awaited.name, "its values are overwritten before the sum behind it; pass relu_aware=False")
        self._halt(here, awaited.name, awaited.value, added)
        if self.is_dense or isinstance(here.live, TrialPass):
            return
        with here.untracked():
            output = self.net.modules[awaited.name](awaited.value)
            if (batchnorm := self.consumers[awaited.name].batchnorm) is not None:
                here.stale = awaited.output
                output = self.net.modules[batchnorm](output)
            awaited.output.copy_(output)
            here.stale = None

    def correct(self, name: str, gain: Tensor, shift: Tensor) -> None:
        """Make the outputs that passes are suspended with gain * output + shift."""
        batchnorm = self.plain.get(self.batchnorm_of.get(name, ""))
        self.corrections[name] = DeferredCorrection(gain, shift, self.net.axis(name), batchnorm)


def _version(value: Any) -> int:
    """How often a tensor was overwritten; 0 of one of inference mode, for which torch does not count this."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


def thread_context(device: torch.device) -> list[Callable[[], Any]]:
    """The state of this thread that the thread of a pass needs: the default device, and the GPU and its stream."""
    found: list[Callable[[], Any]] = []
    if torch.get_default_device().type != "cpu":
        found.append(partial(torch.device, torch.get_default_device()))
    if device.type == "cuda":
        found += [partial(torch.cuda.device, device), partial(torch.cuda.stream, torch.cuda.current_stream(device))]
    return found


class _Watch(TorchFunctionMode):
    """Within a pass: merges a correction into the BatchNorm that reads the output, and finds the sum behind a layer."""

    def __init__(self, points: SuspensionPoints, here: Position) -> None:
        super().__init__()
        self.points, self.here = points, here

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        here, kwargs, name = self.here, kwargs or {}, getattr(func, "__name__", "")
        if here.suspended:  # the thread runs operators of the walk
            return func(*args, **kwargs)
        if name in RAW and here.live is not None:
            here.live.read(args[:1])
        for layer, output in list(here.due.items()):
            correction = self.points.corrections[layer]
            if func is F.batch_norm and args[0] is output:
                del here.due[layer]
                with here.untracked():
                    _ = correction.factors  # computed here: its operators are not the pass's own
                return correction.through_batchnorm(output)
            if name not in DESCRIPTIONS and any(leaf is output for leaf in tree_leaves((args, kwargs))):
                self.points.apply_due(here, layer)
        if here.awaited is None or here.awaited.output is None:
            return func(*args, **kwargs)
        output, consumer = here.awaited.output, self.points.consumers[here.awaited.name]
        if func is F.batch_norm and args[0] is output and consumer.batchnorm is not None:
            here.awaited.output = result = func(*args, **kwargs)
            return result
        if is_sum(name, args, kwargs) and (args[0] is output or args[1] is output):
            self.points.at_sum(here, args[1] if args[0] is output else args[0])
        return func(*args, **kwargs)
