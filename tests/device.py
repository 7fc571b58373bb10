"""A device that computes on the CPU and records waits: each time that the host would wait for a GPU's queue.

A tensor of the device holds a CPU tensor, on which every operator runs. Its device differs, and by that PyTorch decides
which tensors may meet, and what is copied. An operator on tensors of both devices is an error, as on a GPU. All
operators are seen, in each thread, and whether Python or C++ calls them; a value reaches the host by an operator alone.

A wait is an operator on the device's tensors that
- returns a Python number: `item`, `bool`, `int`, `float`, `torch.equal`, `torch.allclose`;
- returns as many values as the values of its inputs say: `nonzero`, `unique`, a boolean mask as an index;
- copies to the host: `cpu`, `tolist`, `numpy`;
- copies from the host and is not `non_blocking`, as `torch.tensor(..., device=...)`; CUDA's sync debug mode counts
  these too;
- reads an error code of linear algebra.
Waits inside a kernel backend of `asr_kernels` are those of that backend: the reference backend has none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import return_and_correct_aliasing

aten = torch.ops.aten
NAME = "recording"
COPIES = (aten._to_copy.default, aten.copy_.default)
INDEXING = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)


class Wait(NamedTuple):
    """An operator, and the files and lines of the packages from which it was called, from the innermost on."""

    operator: str
    lines: list[str]


class OnDevice(Tensor):
    """A tensor of the device; `held` is the CPU tensor."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = Tensor._make_wrapper_subclass(cls, held.shape, device=device(), **layout)
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, *args, **(kwargs or {}))

    # these are no operators
    def tolist(self) -> Any:
        return self.cpu().tolist()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        return self.held.data_ptr()


def device() -> torch.device:
    """The device. A test that asks for it is skipped where PyTorch takes none, and where a GPU is the accelerator."""
    if not _libraries:
        if torch.cuda.is_available() or not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
            pytest.skip("this PyTorch has another accelerator, or takes none that is written in Python")
        backend_registration._setup_privateuseone_for_python_backend(NAME, _Module(), _Hooks())
        _libraries.extend(torch.library.Library(name, "IMPL") for name in ("_", "aten"))
        _libraries[0].fallback(_run, "PrivateUse1")
        for copy in COPIES:  # `torch.tensor` does not find the fallback
            _libraries[1].impl(copy, lambda *args, copy=copy, **kwargs: _run(copy, *args, **kwargs), "PrivateUse1")
    return torch.device(NAME, 0)


@contextmanager
def waits() -> Iterator[list[Wait]]:
    """A context that records the waits within it."""
    found: list[Wait] = []
    _recording.append(found)
    try:
        yield found
    finally:
        _recording.remove(found)


_libraries: list[torch.library.Library] = []  # their kernels last as long as these objects
_recording: list[list[Wait]] = []


class _Module(getattr(backend_registration, "_DummyBackendModule", object)):
    # for PyTorch's own functions, such as `fork_rng`, there is no such device
    def device_count(self) -> int:
        return 0

    def is_available(self) -> bool:
        return False

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class _Hooks(getattr(backend_registration, "_DummyPrivateUse1Hook", object)):
    def is_available(self) -> bool:
        return False


def _run(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operator, some of whose tensors are of the device, or whose result is to be."""
    found = func(*_mapped(_held, args), **{key: _mapped(_held, value) for key, value in kwargs.items()})
    if func in COPIES:
        source, target = (args[1], args[0]) if func is aten.copy_.default else (args[0], kwargs.get("device"))
        arrives = isinstance(source if target is None else target, OnDevice) or target == device()
        async_ = kwargs.get("non_blocking") or (func is aten.copy_.default and args[2:] == (True,))
        if arrives != isinstance(source, OnDevice) and not (arrives and async_):
            _record(func)
        if not arrives:
            return args[0] if func is aten.copy_.default else found
    else:
        given = [x for x in _leaves((args, *kwargs.values())) if isinstance(x, Tensor)]
        if any(not isinstance(x, OnDevice) and x.dim() for x in given):
            raise RuntimeError(f"{func} on tensors of the host and of the device")
        if func in INDEXING:
            waits = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        else:
            waits = torch.Tag.dynamic_output_shape in func.tags or func is aten._linalg_check_errors.default
        if waits or any(isinstance(x, bool | int | float) for x in _leaves(found)):
            _record(func)
    wrapped = _mapped(lambda x: OnDevice(x) if isinstance(x, Tensor) else x, found)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _held(x: Any) -> Any:
    if isinstance(x, OnDevice):
        return x.held
    return torch.device("cpu") if isinstance(x, torch.device) and x.type == NAME else x


def _mapped(function: Callable[[Any], Any], x: Any) -> Any:
    return type(x)([_mapped(function, each) for each in x]) if isinstance(x, tuple | list) else function(x)


def _leaves(x: Any) -> Iterator[Any]:
    if isinstance(x, tuple | list):
        for each in x:
            yield from _leaves(each)
    else:
        yield x


def _record(func: Any) -> None:
    lines, frame = [], sys._getframe(1)
    while frame is not None:
        folder, _, file = frame.f_code.co_filename.rpartition("resuscitate/")
        if folder.endswith("python/"):
            lines.append(f"{file}:{frame.f_lineno}")
        frame = frame.f_back
    for found in _recording:
        found.append(Wait(str(func), lines))
