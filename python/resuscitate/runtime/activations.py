"""Values kept between uses: in memory up to a budget, beyond it spilled to a scratch file (CPU) or host memory (GPU).

Storages are spilled, not tensors, so that views of one storage stay views of one storage. A scratch file has no name:
whatever ends the process, nothing remains. It is read and written, never mapped into memory: a mapped file counts as
memory in use.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Set
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .heap import give_back_freed, resident_memory
from .spill import HostMemory, Region, ScratchFile, free_disk

log = logging.getLogger("resuscitate")

UNITS = {unit: 1024**power for power, letter in enumerate("kmgt", 1) for unit in (letter, f"{letter}ib")}
UNITS |= {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}

HOLES = 8  # 1 / HOLES of a budget is left for the holes between values
CHECKS = 64  # resident memory is read each time 1 / CHECKS of a budget has been moved


class Store(AbstractContextManager["Store"]):
    """A budget of bytes, and a place for spilled bytes. A context: leaving it frees that place.

    memory: the budget, as `parse_memory` reads it. `bytes_spilled`: how many bytes were spilled so far. Several threads
    may use it, each with its own `Frame`s.
    """

    def __init__(self, memory: int | str | None, device: torch.device, scratch: str | Path | None = None) -> None:
        self.budget = parse_memory(memory, device)
        self.reserve = self.budget // 2  # until `set_aside`
        self.resident, self.bytes_spilled, self._passed = 0, 0, 0
        self.before = resident_memory()
        self.lock = threading.RLock()
        self._place = HostMemory() if device.type == "cuda" else ScratchFile(scratch)

    def __exit__(self, *_: object) -> None:
        self._place.close()

    def room(self) -> int:
        """How many more bytes it may keep: those left of its budget, and half of those free in the spill place."""
        place = self._place
        beyond = free_disk(place.folder) if isinstance(place, ScratchFile) else free_memory(torch.device("cpu"))
        return max(self.budget - self.reserve - self.resident, 0) + beyond // 2

    def set_aside(self, size: int) -> None:
        """Reserve so many bytes of the budget for forward passes, and a share for the holes between values."""
        self.reserve = size + self.budget // HOLES
        if size > self.budget:
            needs = "memory: one batch alone needs about %d MiB, the budget is %d MiB; use smaller batches"
            log.warning(needs, size >> 20, self.budget >> 20)

    def tidy(self) -> None:
        """Give freed pages back if the process has grown by a host budget, less the part for the holes."""
        limit = self.before + self.budget - self.budget // HOLES
        if isinstance(self._place, ScratchFile) and resident_memory() > limit:
            give_back_freed()

    def admit(self, size: int) -> bool:
        """Take `size` more bytes into memory, if they fit."""
        with self.lock:
            fits = self.resident + size <= self.budget - self.reserve
            if fits:
                self.resident += size
                self._count(size)
            return fits

    def release(self, size: int) -> None:
        """Return admitted bytes to the budget."""
        with self.lock:
            self.resident -= size

    def write(self, data: Tensor, at: Region | None = None) -> Region:
        """Spill bytes, uint8 (n,), over a region of the same size or into a new one."""
        with self.lock:
            self.bytes_spilled += data.numel()
            self._count(data.numel())
            return self._place.write(data, at)

    def read(self, region: Region, data: Tensor | None = None) -> Tensor:
        """Read a region into `data`, uint8 (n,), or into new memory."""
        if data is None:
            data = torch.empty(region.size, dtype=torch.uint8, device=region.device)
        with self.lock:
            self._count(data.numel())
            self._place.read(region, data)
        return data

    def free(self, region: Region) -> None:
        """Give up a region."""
        with self.lock:
            self._place.free(region)

    def _count(self, size: int) -> None:
        self._passed += size
        if self._passed > self.budget // CHECKS:
            self._passed = 0
            self.tidy()


class Frame:
    """Values by key, any nests of tuples, lists and dicts, such as the activations of one batch.

    Between `close` and `open` a `Store` may spill the tensors; between `open` and `close` they may be changed.
    foreign: addresses of storages that others hold and may change, such as those of parameters: they are not spilled.
    """

    def __init__(self, store: Store, foreign: Set[int] = frozenset()) -> None:
        self.store, self.foreign = store, foreign
        self._values: dict[Hashable, Any] = {}
        self._resident: dict[int, int] = {}  # storage address -> bytes
        self._opened: dict[Region, tuple[Tensor, int]] = {}  # its bytes in memory, and their version when read

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def open(self, keys: Iterable[Hashable], keep: Collection[Hashable] | None = None) -> dict[Hashable, Any]:
        """The values of these keys, as tensors again; `close` must follow.

        Of these the frame forgets those that are not in `keep`, so that the caller can free them. None: it keeps all.
        """
        found = {key: map_leaves(self._fetch, self._values[key]) for key in keys}
        if keep is not None:
            self._values = {key: value for key, value in self._values.items() if key in keep or key not in found}
            self._forget_dropped()
        return found

    def close(self, values: Mapping[Hashable, Any], keep: Collection[Hashable] = ()) -> None:
        """Keep `values`, and of the older ones those in `keep`, with all changes in place."""
        known = {data.untyped_storage().data_ptr(): region for region, (data, _) in self._opened.items()}
        before = _regions(self._values) | self._opened.keys()
        kept = {key: value for key, value in self._values.items() if key in keep and key not in values}
        self._values = kept | {key: map_leaves(lambda x: self._stow(x, known), value) for key, value in values.items()}
        for region in before - (after := _regions(self._values)):
            self.store.free(region)
        for region, (data, version) in self._opened.items():
            if region in after and data._version != version:
                self.store.write(data, region)
        self._opened.clear()
        self._forget_dropped()

    def _forget_dropped(self) -> None:
        """Return the bytes of values that are no longer kept to the budget."""
        alive = {x.untyped_storage().data_ptr() for x in leaves(self._values.values()) if isinstance(x, Tensor)}
        for address in self._resident.keys() - alive:
            self.store.release(self._resident.pop(address))

    def _fetch(self, leaf: Any) -> Any:
        if not isinstance(leaf, _Away):
            return leaf
        if leaf.region not in self._opened:
            data = self.store.read(leaf.region)
            self._opened[leaf.region] = data, data._version
        data = self._opened[leaf.region][0]
        whole = data[: len(data) // leaf.dtype.itemsize * leaf.dtype.itemsize].view(leaf.dtype)
        return whole.as_strided(leaf.size, leaf.stride, leaf.offset)

    def _stow(self, leaf: Any, known: dict[int, Region]) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf.resolve_conj().resolve_neg()  # bytes do not say that they are those of the conjugate
        storage = leaf.untyped_storage()
        address = storage.data_ptr()
        if address in self._resident or address in self.foreign or not storage.nbytes():
            return leaf
        if address not in known:
            if self.store.admit(storage.nbytes()):
                self._resident[address] = storage.nbytes()
                return leaf
            data = torch.empty(0, dtype=torch.uint8, device=leaf.device).set_(storage)
            known[address] = self.store.write(data)
        return _Away(known[address], leaf.dtype, leaf.size(), leaf.stride(), int(leaf.storage_offset()))


@dataclass(frozen=True)
class _Away:
    """A tensor whose bytes are spilled."""

    region: Region
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def parse_memory(memory: int | str | None, device: torch.device) -> int:
    """A budget in bytes, from a number or text such as "4GiB", "500MB", "2G"; None: half of what is free on the device.

    Raises ValueError for anything else.
    """
    if memory is None:
        return free_memory(device) // 2
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(\w*)\s*", str(memory).lower())
    if match is None or match[2] not in UNITS:
        raise ValueError(f"memory={memory!r} is no amount such as '4GiB', '500MB' or a number of bytes")
    if (size := int(float(match[1]) * UNITS[match[2]])) < 1:
        raise ValueError(f"memory={memory!r} leaves nothing to work with")
    return size


def free_memory(device: torch.device) -> int:
    """Bytes free on the device; on the host, those available without swapping, within the limit of the cgroup."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = 4 << 30
    with suppress(AttributeError, ValueError, OSError):  # not Linux: half of all memory
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    with suppress(OSError):
        if available := re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE):
            free = int(available[1]) * 1024
    with suppress(OSError, ValueError):  # no such files, or no limit
        limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, max(limit - used, 0))
    return free


def leaves(values: Iterable[Any]) -> Iterator[Any]:
    """All leaves of some values; most values are single tensors, which need no search."""
    for value in values:
        yield from [value] if isinstance(value, Tensor | _Away) else tree_leaves(value)


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """The value with a function applied to each leaf."""
    return function(value) if isinstance(value, Tensor | _Away) else tree_map(function, value)


def _regions(values: Mapping[Hashable, Any]) -> set[Region]:
    return {leaf.region for leaf in leaves(values.values()) if isinstance(leaf, _Away)}
