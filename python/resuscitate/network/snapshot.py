"""Snapshots that restore a model, and contexts that restore settings: modes, flags, hooks, random state, device."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack, _pop_mode

from asr_kernels.precision import full_precision_of_models

from ..errors import ModelMismatchError
from ..utils.interrupts import Interrupts
from ..utils.readout import differing
from .layers import check_writable, find_layers, refresh_weight


class Snapshot:
    """A copy of every parameter and buffer of a model, with its modules' classes, sizes and tensor names.

    As a context it restores the model when an error or an interrupt ends the block; a further interrupt waits. Torch's
    gradient and function modes are restored too: an interrupt at the end of a `with` statement can leave them set.
    Raises ResuscitateError for a model whose tensors were made under `torch.inference_mode()`.
    """

    def __init__(self, model: nn.Module) -> None:
        with torch.inference_mode(False):  # as in `evaluation_mode`, where the model is changed
            check_writable(model)
        self.model = model
        # module and name identify a tensor even after `Module.to` has replaced a buffer
        named = ((m, name, x) for m in model.modules() for name, x in [*m._parameters.items(), *m._buffers.items()])
        self.copies = {id(x): (module, name, x.detach().clone()) for module, name, x in named if x is not None}
        self.records = []
        for module in model.modules():
            sizes = {key: value for key, value in vars(module).items() if type(value) in (int, float, tuple)}
            slots = (module._parameters, module._buffers)  # no dictionaries in a scripted module, whose tensors stay
            tensors = [(each, dict(each)) for each in slots if isinstance(each, dict)]
            self.records.append((module, type(module), sizes, tensors))
        self._interrupts = Interrupts()

    def __enter__(self) -> Snapshot:
        self._gradients, self._modes = torch.is_grad_enabled(), len(_get_current_function_mode_stack())
        self._interrupts.begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._interrupts.hold()
        if kind is not None:
            torch.set_grad_enabled(self._gradients)
            while len(_get_current_function_mode_stack()) > self._modes:
                _pop_mode()
            self.restore()
        self._interrupts.release(self.restore)

    def defer_interrupts_at_end(self) -> ExitStack:
        """A context to open inside the snapshot's: from its end to the end of the snapshot, interrupts wait.

        So the code between the two ends, such as the reset of flags, runs to its end.
        """
        stack = ExitStack()
        stack.callback(self._interrupts.hold)
        return stack

    @torch.no_grad()
    def restore(self) -> None:
        """Restore every tensor bit for bit, in place where its size is the same, and remove tensors added since."""
        for module, kind, sizes, tensors in self.records:
            module.__class__ = kind
            vars(module).update(sizes)
            for slots, before in tensors:
                for name in slots.keys() - before.keys():
                    del slots[name]
                for name, tensor in before.items():
                    now = slots.get(name)
                    # a new buffer of the same size comes from `Module.to`: keep it, its values are copied below
                    if now is None or tensor is None or now.shape != tensor.shape:
                        slots[name] = tensor  # type: ignore[assignment]
        for module, name, copy in self.copies.values():
            getattr(module, name).copy_(copy)
        for module in find_layers(self.model).values():
            refresh_weight(module)
        torch.clear_autocast_cache()

    def undo(self) -> None:
        """`restore`, for a model that the caller may have changed.

        Raises ModelMismatchError for a module that was replaced, and a parameter or buffer that was removed.
        """
        present = set(self.model.modules())
        if not all(module in present for module, _, _ in self.copies.values()):
            raise ModelMismatchError("a module that was changed has been replaced since: there is nothing to restore")
        for *_, tensors in self.records:
            if lost := [name for slots, before in tensors for name in before if name not in slots]:
                raise ModelMismatchError(f"{lost[0]!r} has been removed since, as by prune.remove: undo before that")
        self.restore()

    def forget_unchanged(self) -> None:
        """Keep only the copies that differ from the model as it is now."""
        changed = differing({key: (getattr(m, name), x) for key, (m, name, x) in self.copies.items()})
        self.copies = {key: copy for key, copy in self.copies.items() if key in changed}


@contextmanager
def flags_kept(model: nn.Module) -> Iterator[None]:
    """Restore every module's train/eval flag at the end."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def autocast(device: str, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Autocast to `dtype` on a device type, or with None no autocast, whatever the caller uses. No cast is cached."""
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, dtype, enabled=dtype is not None, cache_enabled=False)


def set_seed(seed: int, devices: Iterable[torch.device]) -> None:
    """Seed the CPU and those of the devices that are GPUs: `torch.manual_seed` would seed all GPUs of the process."""
    torch.default_generator.manual_seed(seed)
    for device in devices:
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)


@contextmanager
def evaluation_mode(models: Sequence[nn.Module], seed: int) -> Iterator[None]:
    """Measure in eval mode, without gradients, in full precision and from a fixed seed; then restore all settings.

    Full precision: without the caller's autocast, and without TF32. cuDNN is deterministic. Compiled code, which does
    not support suspended forward passes, runs in eager mode. Restored too: train/eval flags, forward hooks, random
    states, and what a forward pass may set for a while, which passes side by side put back in the wrong order: the
    kernels of attention, whether cuDNN is used, the filters of warnings.
    """
    devices = {x.device for model in models for x in [*model.parameters(), *model.buffers()]}
    with ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        for model in models:
            stack.enter_context(flags_kept(model))
            for module in model.modules():
                for hooks in (module._forward_hooks, module._forward_pre_hooks):
                    stack.callback(_remove_others, hooks, set(hooks))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng([each for each in devices if each.type == "cuda"]))
        stack.enter_context(full_precision_of_models())
        stack.enter_context(warnings.catch_warnings())
        for kernel in ("flash", "mem_efficient", "math", "cudnn"):
            enabled = getattr(torch.backends.cuda, f"{kernel}_sdp_enabled")()
            stack.callback(getattr(torch.backends.cuda, f"enable_{kernel}_sdp"), enabled)
        cudnn = torch.backends.cudnn
        for setting, value in (("enabled", cudnn.enabled), ("deterministic", True), ("benchmark", False)):
            stack.callback(setattr, cudnn, setting, getattr(cudnn, setting))
            setattr(cudnn, setting, value)
        if "torch._dynamo" in sys.modules:  # else nothing is compiled yet, and this would load the compiler
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for kind in {"cpu", *(device.type for device in devices)}:
            stack.enter_context(autocast(kind, None))
        random.seed(seed)
        np.random.seed(seed % 2**32)
        set_seed(seed, devices)
        for model in models:
            model.eval()
        yield


def _remove_others(hooks: dict[int, Any], kept: set[int]) -> None:
    for key in hooks.keys() - kept:
        del hooks[key]


@contextmanager
def moved_to(device: torch.device | str | None, models: Sequence[nn.Module]) -> Iterator[None]:
    """Move the models to `device`, and back at the end. Raises ValueError for a model on several devices."""
    with ExitStack() as stack:
        for model in models if device is not None else ():
            devices = {tensor.device for tensor in [*model.parameters(), *model.buffers()]}
            if len(devices) > 1:
                names = sorted(map(str, devices))
                raise ValueError(f"the model is spread over {names}; move it to one device, or leave device out")
            for origin in devices:
                stack.callback(model.to, origin)
            model.to(device)
        yield
