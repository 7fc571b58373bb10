"""The choice of a backend: Triton kernels on a GPU, vectorised PyTorch elsewhere, a float64 reference for tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Literal, get_args

from torch import Tensor

Backend = Literal["auto", "triton", "torch", "reference"]

_chosen: ContextVar[str | None] = ContextVar("asr_kernels_backend", default=None)


@contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Run the operations of the `with` block on one backend: "auto", "triton", "torch" or "reference".

    Without `use_backend`, the environment variable ASR_BACKEND names the backend; the default is "auto": Triton for
    tensors on a GPU if Triton is installed, else torch. The choice holds for the current thread or asyncio task.
    Raises ValueError for an unknown name.
    """
    token = _chosen.set(_checked(name))
    try:
        yield
    finally:
        _chosen.reset(token)


def backend_for(x: Tensor, part: Literal["moments", "factors", "affine", "patches"]) -> ModuleType:
    """The module that computes `part` for the tensor x on the chosen backend.

    Raises RuntimeError where the Triton backend was chosen and cannot run, ValueError for an unknown ASR_BACKEND.
    """
    name = _chosen.get() or _checked(os.environ.get("ASR_BACKEND", "auto"))
    if name == "auto":
        name = "triton" if x.is_cuda and _has_triton() else "torch"
    # PyTorch multiplies patches on every backend, in the way that suits the device
    if part == "patches" and name != "reference":
        return _module(".whole_patches" if x.is_cuda else ".torch_patches")
    if name != "triton":
        return _module(f".{name}_ops" if name == "torch" else f".{name}")
    if not _has_triton():
        raise RuntimeError("the triton backend needs the package triton (pip install triton); or use_backend('torch')")
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"the triton backend needs a tensor on a GPU, not on {x.device}; move it, use_backend('auto'), or set "
            "TRITON_INTERPRET=1 before the first import to run the kernels in Triton's interpreter"
        )
    return _module(f".triton_{part}")


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@cache
def _module(name: str) -> ModuleType:
    # the lookup in sys.modules takes a microsecond, and find_spec five
    return import_module(name, __name__)


def _checked(name: str) -> str:
    if name not in get_args(Backend):
        raise ValueError(f"unknown backend {name!r}; there are {', '.join(get_args(Backend))}")
    return name
