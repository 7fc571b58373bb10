"""Digests of models, images and options: are they those that a journal, a file or another rank refers to?"""

from __future__ import annotations

import dis
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import partial
from inspect import getattr_static
from pathlib import PurePath
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .nested import as_tensor, images_of
from .raw_bytes import view_bytes

MODULUS = 1 << 56  # sums over a hundred ranks stay within int64
WORTH_THREADS = 1 << 20  # bytes of images
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")  # in a `repr`; it is another one in each process
# types whose `repr` is complete
PLAIN = (type(None), bool, int, float, complex, str, bytes, range, PurePath, np.generic, torch.dtype, torch.device)
LEAVES = (*PLAIN, Tensor, np.ndarray)
NAMED = (type, ModuleType, BuiltinFunctionType)  # known by their names only


def digest_model(model: nn.Module) -> str:
    """Of the modules as `repr` shows them, and of every parameter and buffer, saved or not, wherever the model lies."""
    found = hashlib.sha256(ADDRESS.sub("", repr(model)).encode())
    found.update(digest_tensors({**model.state_dict(), **dict(model.named_buffers())}).encode())
    return found.hexdigest()[:32]


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Of tensors with their names, dtypes and shapes, wherever they lie."""
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        found.update(_bytes(tensor))
    return found.hexdigest()[:32]


def digest_images(batches: Iterable[Any]) -> int:
    """Of a set of images: a sum over them, so that neither their order nor their split into batches matters.

    A batch that is no tensor counts as one image, with all that it holds: its keys, and what is no tensor, too.
    """
    return sum(int.from_bytes(digest, "big") for digest in _each_image(batches)) % MODULUS


def digest_in_order(batches: Iterable[Any]) -> str:
    """The same of a sequence of images, whose order matters, but not their split into batches of tensors."""
    return hashlib.sha256(b"".join(_each_image(batches))).hexdigest()[:32]


def _each_image(batches: Iterable[Any]) -> Iterator[bytes]:
    for batch in batches:
        if isinstance(batch, Tensor):
            yield from _digests(batch)
        else:
            found = hashlib.blake2b(digest_size=8)
            _feed(found.update, batch)
            yield found.digest()


def _digests(images: Tensor) -> Iterator[bytes]:
    """A digest of each image, on as many threads as PyTorch uses; `hashlib` releases the interpreter's lock."""

    def digest(image: Tensor) -> bytes:
        return hashlib.blake2b(_bytes(image), digest_size=8).digest()

    images = images.detach().cpu()  # one copy from a GPU, not one for each image
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        yield from (pool.map if images.nbytes > WORTH_THREADS else map)(digest, images)


def fingerprint(value: Any) -> object:
    """Of an option, what a journal can compare: a number, a word or None itself; of others a name and a digest.

    Containers, tensors, arrays, networks (their tensors and their `repr`) and dataclasses are digested in full. A
    function is known by its name, its code (the same in one version of Python), its defaults and the values in its
    closure, in its `partial` and of the global names that it reads; so are the functions of its own module that it
    calls. Of another object count its class, its `__call__`, and its attributes that are plain or tensors. Functions of
    other modules, deeper objects and files are not looked into. A function that counts its calls, in a closure or a
    global name, is another one each time.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    found = hashlib.sha256()
    _feed(found.update, value)
    named = value if isinstance(value, (FunctionType, MethodType, *NAMED)) else type(value)
    return f"{_name(named)} {found.hexdigest()[:32]}"


def _feed(update: Callable[[Any], object], value: Any, seen: dict[int, Any] | None = None) -> None:
    """Give `update` the contents of a value, the same in every process. seen: what contains it, and functions done."""
    seen = {} if seen is None else seen
    if id(value) in seen:
        update(b"seen;")
        return
    seen[id(value)] = value
    own, parts = _apart(value)
    update(f"{_name(type(value))} {len(own)} {len(parts)};".encode())
    update(own)
    for part in parts:
        _feed(update, part, seen)
    if not isinstance(value, FunctionType):
        del seen[id(value)]


def _apart(value: Any) -> tuple[bytes | memoryview, list[Any]]:
    """A value's own bytes, and the values that it consists of."""
    if isinstance(value, PLAIN):
        return repr(value).encode(), []
    if isinstance(value, Tensor):
        return _bytes(value), [value.dtype, *value.shape]
    if isinstance(value, np.ndarray):
        return (b"", value.tolist()) if value.dtype.hasobject else (value.tobytes(), [str(value.dtype), *value.shape])
    if isinstance(value, Mapping):
        return b"", [part for pair in sorted(value.items(), key=lambda pair: repr(pair[0])) for part in pair]
    if isinstance(value, set | frozenset):
        return b"", sorted(map(repr, map(fingerprint, value)))
    if isinstance(value, list | tuple):
        return b"", list(value)
    if isinstance(value, partial):
        return b"", [value.func, value.args, value.keywords]
    if isinstance(value, MethodType):
        return b"", [value.__func__, value.__self__]
    if isinstance(value, FunctionType):
        cells = [_held(cell) for cell in value.__closure__ or ()]
        parts = [value.__code__, value.__defaults__, value.__kwdefaults__, cells, dict(_globals(value))]
        return _name(value).encode(), parts
    if isinstance(value, CodeType):
        return value.co_code, [value.co_names, value.co_consts, value.co_freevars, value.co_argcount, value.co_flags]
    if isinstance(value, NAMED):
        return _name(value).encode(), []
    if isinstance(value, nn.Module):
        return repr(value).encode(), [dict(value.state_dict())]
    if is_dataclass(value):
        return b"", [getattr(value, field.name) for field in fields(value)]
    attributes = {name: part for name, part in getattr(value, "__dict__", {}).items() if isinstance(part, LEAVES)}
    call = getattr_static(type(value), "__call__", None)
    return b"", [attributes, *([call] if isinstance(call, FunctionType) else [])]


def _name(value: Any) -> str:
    module = getattr(value, "__module__", None)
    name = getattr(value, "__qualname__", getattr(value, "__name__", type(value).__name__))
    return f"{module}.{name}" if module not in (None, "builtins") else name


def _held(cell: CellType) -> Any:
    with suppress(ValueError):  # empty as yet
        return cell.cell_contents


def _globals(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """The global names that a function reads, and their values; for a function of another module, its name."""
    for name in sorted(set(_names(function.__code__)) & function.__globals__.keys()):
        value = function.__globals__[name]
        elsewhere = isinstance(value, FunctionType) and value.__module__ != function.__module__
        yield name, _name(value) if elsewhere else value


def _names(code: CodeType) -> Iterator[str]:
    yield from (str(step.argval) for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL")
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield from _names(part)


def image_keys(batch: Any) -> list[int]:
    """A whole number of 63 bits for each image of a batch, as `images_of` finds them, from its contents."""
    images = images_of(batch)
    if images is None or not len(images):
        return [0]
    stacks: Any = [each[None] for each in images] if isinstance(images, list | tuple) else [images]
    tensors = (each if isinstance(each, Tensor) else as_tensor(each) for each in stacks)
    return [int.from_bytes(digest, "big") >> 1 for rows in tensors for digest in _digests(rows)]


def _bytes(tensor: Tensor) -> memoryview:
    tensor = tensor.detach() if tensor.layout is torch.strided else tensor.detach().to_dense()
    flat = tensor.cpu().contiguous().reshape(-1)
    return view_bytes(flat.view(torch.uint8)) if flat.numel() else memoryview(b"")
