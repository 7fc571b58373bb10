"""Leaving no trace: a snapshot that can be put back, and a context in which measuring disturbs nothing."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack, _pop_mode

from asr_kernels.precision import full_precision_of_models

from ..utils.interrupts import Interrupts
from .layers import find_layers, refresh_weight


class Snapshot:
    """A copy of every parameter and buffer of a model, of its modules' classes and sizes, and of what they lack.

    As a context it puts all back when an error, or an interrupt, leaves it, and lets no interrupt through meanwhile:
    torch's modes too, which an interrupt at the end of a `with` statement leaves behind.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.copies = {id(tensor): (module, name, tensor.detach().clone()) for module, name, tensor in _slots(model)}
        self.frames = [_Frame(module) for module in model.modules()]
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

    def settling(self) -> ExitStack:
        """A context within this one. Once it is left, an interrupt waits until this one is: what lies between the two,
        such as flags that are set again, is done in full.
        """
        stack = ExitStack()
        stack.callback(self._interrupts.hold)
        return stack

    @torch.no_grad()
    def restore(self) -> None:
        """Put every tensor back, bit for bit and in place where its size is the same; take away what is new."""
        for frame in self.frames:
            frame.restore()
        for module, name, copy in self.copies.values():
            getattr(module, name).copy_(copy)
        for module in find_layers(self.model).values():
            refresh_weight(module)
        torch.clear_autocast_cache()

    def forget_unchanged(self) -> None:
        """Keep only the copies that differ from the model as it is now."""
        self.copies = {
            key: (module, name, copy)
            for key, (module, name, copy) in self.copies.items()
            if getattr(module, name).shape != copy.shape or not torch.equal(getattr(module, name), copy)
        }


class _Frame:
    """All of a module but the values of its tensors: its class, its sizes, and which tensor has which place."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.kind = module, type(module)
        self.sizes = {key: value for key, value in vars(module).items() if type(value) in (int, float)}
        self.tensors = [(slots, dict(slots)) for slots in (module._parameters, module._buffers)]

    def restore(self) -> None:
        self.module.__class__ = self.kind
        vars(self.module).update(self.sizes)
        for slots, before in self.tensors:
            for name in [name for name in slots if name not in before]:
                del slots[name]
            for name, tensor in before.items():
                now = slots.get(name)
                # `Module.to` may have put a new buffer there, of the same size: that one stays
                if now is None or tensor is None or now.shape != tensor.shape:
                    slots[name] = tensor  # type: ignore[assignment]


def _slots(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Where each tensor lives: `Module.to` may put a new one into a buffer's place, so the place is what is kept."""
    for module in model.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                yield module, name, tensor


@contextmanager
def flags_kept(model: nn.Module) -> Iterator[None]:
    """Whatever happens meanwhile, every module's train/eval flag is then as it was found."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def autocast(device: str, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Autocast to `dtype` on a type of device, or with None no autocast, whatever the caller's is. No cast is kept."""
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, dtype, enabled=dtype is not None, cache_enabled=False)


def _uncompiled() -> AbstractContextManager[object]:
    """Run compiled modules as they are written. If nothing was compiled yet, torch's compiler is not loaded for it."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def undisturbed(models: Sequence[nn.Module], seed: int) -> Iterator[None]:
    """Measure in eval mode, without gradients, in full precision and from a fixed seed; then all is as it was found.

    Full precision: without the caller's autocast, and without TF32. What a `forward_fn` compiles runs uncompiled:
    compiled code does not see that passes are suspended.

    Kept: every module's train/eval flag and forward hooks; the random state of Python, NumPy and torch; the TF32 and
    cuDNN settings.
    """
    hooks = [(found, set(found)) for model in models for module in model.modules() for found in _hooks(module)]
    flags = [(module, module.training) for model in models for module in model.modules()]
    devices = sorted({p.device.index or 0 for model in models for p in model.parameters() if p.is_cuda})
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(_full_precision())
        stack.enter_context(_uncompiled())
        for device in {"cpu", *(p.device.type for model in models for p in model.parameters())}:
            stack.enter_context(autocast(device, None))
        try:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
            for model in models:
                model.eval()
            yield
        finally:
            for module, training in flags:
                module.training = training
            for found, before in hooks:
                for key in found.keys() - before:
                    del found[key]
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _hooks(module: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    return module._forward_hooks, module._forward_pre_hooks


@contextmanager
def _full_precision() -> Iterator[None]:
    """TF32 off and cuDNN deterministic, for a while."""
    cudnn: Any = torch.backends.cudnn
    deterministic, benchmark = cudnn.deterministic, cudnn.benchmark
    with full_precision_of_models():
        try:
            cudnn.deterministic, cudnn.benchmark = True, False
            yield
        finally:
            cudnn.deterministic, cudnn.benchmark = deterministic, benchmark


@contextmanager
def moved_to(device: torch.device | str | None, models: Sequence[nn.Module]) -> Iterator[None]:
    """Have the models on `device` for a while."""
    if device is None:
        yield
        return
    homes: list[tuple[nn.Module, torch.device]] = []
    for model in models:
        places = {tensor.device for tensor in [*model.parameters(), *model.buffers()]}
        if len(places) > 1:
            raise ValueError(
                f"the model is spread over {sorted(map(str, places))}; move it to one device, or leave device out"
            )
        homes.extend((model, place) for place in places)
    try:
        for model in models:
            model.to(device)
        yield
    finally:
        for model, home in homes:
            model.to(home)
