"""Where the forward passes of a network are suspended, and what is done to their values as they go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from ..network.runner import Network
from ..network.wiring import DESCRIPTIONS, Gate, is_sum, output_leaves
from ..runtime.passes import current, suspend
from .deferred import Correction, mergeable
from .pass_memory import RAW, Live, Rehearsal, Trial
from .probes import Stop

Where = Literal["input", "output", "sum"]


@dataclass
class Position:
    """Where the pass of one batch is. `at` names the stop where it is suspended, or was last.

    `value` is what is measured there; `added` what is added to the layer's output, where it is suspended at a sum.
    """

    index: int
    live: Live | Rehearsal | Trial | None = None
    at: str | None = None
    suspended: bool = False
    value: Any = None
    added: Tensor | None = None
    awaited: _Awaited | None = None
    due: list[tuple[Tensor, Correction]] = field(default_factory=list)  # outputs that are yet to be corrected
    stale: Tensor | None = None  # a value that is about to be overwritten by the one computed anew
    output: Any = None  # of a rehearsal
    outdated: str | None = None  # a layer that is given another class while its call waits

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What runs meanwhile the forward pass by itself would not run."""
        if self.live is None:
            yield
            return
        self.live.aside = True
        yield
        self.live.aside = False

    def rest(self) -> None:
        """The pass is suspended and measured: its values may leave memory."""
        if isinstance(self.live, Live) and self.at is not None:
            self.live.put(self.at, self.used())

    def used(self) -> list[Any]:
        """Values that are read whatever the forward pass by itself reads."""
        return [self.value, self.added, self.stale, None if self.awaited is None else self.awaited.output]

    @contextmanager
    def in_memory(self) -> Iterator[None]:
        """Have the values of the suspended pass in memory, to read them."""
        if isinstance(self.live, Live):
            self.live.get(keep=True)
        yield
        self.rest()


@dataclass
class _Awaited:
    """A layer whose pass is to be suspended at the sum behind it; `value` is what is measured, `output` what is added
    to, with the layer's BatchNorm once that has run.
    """

    name: str
    value: Any
    version: int
    output: Any = None


class Route:
    """Where the passes of one network are suspended, and what is done to their values as they go on.

    `ahead` names the stops where a pass is suspended. `corrections` holds those of outputs that passes were suspended
    with.
    """

    def __init__(self, net: Network, stops: Sequence[Stop], gates: Mapping[str, Gate], is_dense: bool) -> None:
        self.net, self.gates, self.is_dense = net, gates, is_dense
        self.ahead = {stop.name for stop in stops}
        self.where = {stop.name: self._where(stop) for stop in stops}
        self.corrections: dict[str, Correction] = {}
        # before there are hooks of our own
        self.plain = {name for name, module in net.modules.items() if mergeable(module) is not None}
        self.context = _thread_context(net.device)

    def _where(self, stop: Stop) -> Where:
        if isinstance(self.net.modules[stop.name], _BatchNorm):
            return "input"
        if not stop.refit:
            return "output"
        if stop.name in self.gates and self.gates[stop.name].adds:
            return "sum"
        return "input" if stop.wide or not self.is_dense else "output"

    def hook(self, stack: ExitStack) -> None:
        """Put hooks on the modules, until the stack is closed."""
        for name, where in self.where.items():
            module = self.net.modules[name]
            before, after = partial(self._before, name), partial(self._after, name)
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            if not isinstance(module, _BatchNorm) and (where != "input" or not self.is_dense):
                stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)

    def run(self, here: Position, read: Callable[[], Any]) -> None:
        """The forward pass of one batch, from its beginning to its end, in the thread of the pass."""
        with ExitStack() as stack:
            for enter in self.context:
                stack.enter_context(enter())
            stack.enter_context(_Watch(self, here))
            if here.live is not None:
                stack.enter_context(here.live)
            with here.aside():
                batch = read()
            output = self.net.run(batch)
        self._check_sum(here)
        if isinstance(here.live, Rehearsal | Trial):
            here.live.read(output_leaves(output))
            here.output = output

    def _before(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        here = current()
        if not isinstance(here, Position) or name not in self.ahead or self.where[name] == "output":
            return
        x = args[0] if args else next(iter(kwargs.values()))
        if self.where[name] == "sum":
            self._check_sum(here)
            here.awaited = _Awaited(name, x, getattr(x, "_version", 0))
        elif here.awaited is None or x is not here.awaited.output:
            kind = type(module)
            self._halt(here, name, x)
            if type(module) is not kind:  # the forward of the old class is about to run
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
            assert here.awaited is not None
            here.awaited.output = output
            if self.is_dense:
                here.awaited.value, here.awaited.version = output, getattr(output, "_version", 0)
            return None
        self._halt(here, name, output)
        correction = self.corrections.get(name)
        if correction is not None and correction.batchnorm is not None:
            here.due.append((output, correction))
        elif correction is not None:
            with here.aside():
                correction.apply(output)
        return None

    def _halt(self, here: Position, name: str, value: Any, added: Tensor | None = None) -> None:
        self._check_sum(here)
        here.at, here.value, here.added = name, value, added
        if isinstance(here.live, Rehearsal | Trial):
            with here.aside():
                here.live.stop(name, here.used())
            here.at = here.value = here.added = None
            return
        here.suspended = True
        with here.live.suspended() if isinstance(here.live, Live) else nullcontext():
            suspend()
        here.suspended = False
        here.value = here.added = None

    def _check_sum(self, here: Position) -> None:
        """Raise LayerError where a pass has left the sum out that the example had."""
        if here.awaited is not None:
            raise LayerError(
                here.awaited.name, "what is added to its output is not the same for all batches; pass relu_aware=False"
            )

    def at_sum(self, here: Position, added: Tensor) -> None:
        """Suspend a pass at a sum; then compute anew what is added to, if the layer was changed."""
        awaited, here.awaited = here.awaited, None
        assert awaited is not None
        if getattr(awaited.value, "_version", 0) != awaited.version:
            raise LayerError(awaited.name, "its values are overwritten before the sum behind it; pass relu_aware=False")
        self._halt(here, awaited.name, awaited.value, added)
        if self.is_dense or isinstance(here.live, Rehearsal | Trial):
            return
        with here.aside():
            output = self.net.modules[awaited.name](awaited.value)
            if (batchnorm := self.gates[awaited.name].batchnorm) is not None:
                here.stale = awaited.output
                output = self.net.modules[batchnorm](output)
            awaited.output.copy_(output)
            here.stale = None

    def correct(self, name: str, gain: Tensor, shift: Tensor, batchnorm: str) -> None:
        """Have the outputs that passes are suspended with become gain * output + shift."""
        module = self.net.modules[batchnorm] if batchnorm in self.plain else None
        plain = module if isinstance(module, _BatchNorm) else None
        self.corrections[name] = Correction(gain, shift, self.net.axis(name), plain)


def _thread_context(device: torch.device) -> list[Callable[[], Any]]:
    """What of this thread's state a pass needs in its own: the device for new tensors, and the GPU and its stream."""
    found: list[Callable[[], Any]] = []
    if torch.get_default_device().type != "cpu":
        found.append(partial(torch.device, torch.get_default_device()))
    if device.type == "cuda":
        found += [partial(torch.cuda.device, device), partial(torch.cuda.stream, torch.cuda.current_stream(device))]
    return found


class _Watch(TorchFunctionMode):
    """Within a pass: merges a correction into the BatchNorm that reads it, and finds the sum behind a layer."""

    def __init__(self, route: Route, here: Position) -> None:
        super().__init__()
        self.route, self.here = route, here

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        here, kwargs = self.here, kwargs or {}
        if here.suspended:  # its thread works for others
            return func(*args, **kwargs)
        if getattr(func, "__name__", "") in RAW and here.live is not None:
            here.live.read(args[:1])
        for each in list(here.due):
            output, correction = each
            if func is F.batch_norm and args[0] is output:
                here.due = [other for other in here.due if other is not each]
                with here.aside():
                    correction.factors()
                return correction.through_batchnorm(output)
            if getattr(func, "__name__", "") not in DESCRIPTIONS and _reads(output, args, kwargs):
                here.due = [other for other in here.due if other is not each]
                with here.aside():
                    correction.apply(output)
        if here.awaited is None or here.awaited.output is None:
            return func(*args, **kwargs)
        output, gate = here.awaited.output, self.route.gates[here.awaited.name]
        if func is F.batch_norm and args[0] is output and gate.batchnorm is not None:
            here.awaited.output = result = func(*args, **kwargs)
            return result
        if is_sum(getattr(func, "__name__", ""), args, kwargs) and (args[0] is output or args[1] is output):
            self.route.at_sum(here, args[1] if args[0] is output else args[0])
        return func(*args, **kwargs)


def _reads(x: Tensor, args: Any, kwargs: Any) -> bool:
    return any(leaf is x for leaf in tree_leaves((args, kwargs)))
