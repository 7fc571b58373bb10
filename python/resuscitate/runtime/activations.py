"""Values kept between uses: in memory up to a budget, beyond it in a scratch file (CPU) or in host memory (GPU).

Kept are storages, not tensors, so that views of one memory stay views of one memory when they come back. A scratch file
has no name: whatever ends the process, nothing is left behind. It is read and written, never mapped into memory, for a
mapped file counts as memory in use.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .heap import give_back_freed, resident_memory
from .spill import HostMemory, Place, Region, ScratchFile, free_disk

log = logging.getLogger("resuscitate")

UNITS = {unit: 1024**power for power, letter in enumerate("kmgt", 1) for unit in (letter, f"{letter}ib")}
UNITS |= {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}

HOLES = 8  # one part in so many of a budget is left to the holes between values
CHECKS = 64  # resident memory is looked at each time one part in so many of a budget has come and gone


class Store:
    """A budget of bytes, and a place for what exceeds it. A context: leaving it frees that place.

    `away` is how many bytes were ever moved out. Several threads may use it, each with `Frame`s of its own.
    """

    def __init__(self, budget: int, device: torch.device, scratch: str | Path | None = None) -> None:
        self.budget, self.reserve = budget, budget // 2  # until it is known what the computing takes
        self.resident, self.away, self._passed = 0, 0, 0
        self.before = resident_memory()
        self.lock = threading.RLock()
        self._place: Place = HostMemory() if device.type == "cuda" else ScratchFile(scratch)

    @classmethod
    def on_host(cls, scratch: str | Path | None) -> Store:
        """A store in host memory, of half of what is free."""
        host = torch.device("cpu")
        return cls(parse_memory(None, host), host, scratch)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self._place.close()

    def room(self) -> int:
        """How many more bytes it may keep: those left of its budget, and half of what is free where the rest goes."""
        place = self._place
        beyond = free_disk(place.folder) if isinstance(place, ScratchFile) else free_memory(torch.device("cpu"))
        return max(self.budget - self.reserve - self.resident, 0) + beyond // 2

    def set_aside(self, size: int) -> None:
        """Leave so many bytes of the budget to whoever computes, and a share of it to the holes between values."""
        self.reserve = size + self.budget // HOLES
        if size > self.budget:
            log.warning(
                "memory: one batch alone needs about %d MiB, the budget is %d MiB; use smaller batches",
                size >> 20,
                self.budget >> 20,
            )

    def tidy(self) -> None:
        """Have the C library give freed pages back, where the process has grown by all of a budget in host memory but
        the part for the holes.
        """
        in_host_memory = isinstance(self._place, ScratchFile)
        if in_host_memory and resident_memory() - self.before > self.budget - self.budget // HOLES:
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
        """Bytes that were admitted are in use no more."""
        with self.lock:
            self.resident -= size

    def write(self, data: Tensor, at: Region | None = None) -> Region:
        """Move bytes, uint8 (n,), out of memory, over those of a region of the same size or into a new one."""
        with self.lock:
            self.away += data.numel()
            self._count(data.numel())
            return self._place.write(data, at)

    def read(self, region: Region, data: Tensor | None = None) -> Tensor:
        """The bytes back, in `data`, uint8 (n,), or in new memory."""
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
    """Values by key, such as the activations of one batch: opened for a while, changed or not, and closed again.

    A value is any nest of tuples, lists and dicts; its tensors are what a `Store` may move out of memory.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._values: dict[Hashable, Any] = {}
        self._resident: dict[int, int] = {}  # storage address -> bytes
        self._opened: dict[Region, tuple[Tensor, int]] = {}  # its bytes in memory, and their version when read

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def open(self, keys: Iterable[Hashable], keep: Collection[Hashable] | None = None) -> dict[Hashable, Any]:
        """The values of these keys, as tensors again; `close` must follow.

        What is not in `keep` is given away, so that its memory is free as soon as the caller drops it. None: all stays.
        """
        found = {key: map_leaves(self._fetch, self._values[key]) for key in keys}
        if keep is not None:
            self._values = {key: value for key, value in self._values.items() if key in keep or key not in found}
            self._forget_dropped()
        return found

    def close(self, values: Mapping[Hashable, Any], keep: Collection[Hashable] = ()) -> None:
        """Keep `values`, and of the older ones those in `keep`; what was changed in place stays changed."""
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
        """Count what is no longer kept out of the budget."""
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
        storage = leaf.untyped_storage()
        address = storage.data_ptr()
        if address in self._resident or not storage.nbytes():
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
    """A tensor over bytes that are out of memory."""

    region: Region
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def parse_memory(memory: int | str | None, device: torch.device) -> int:
    """A budget in bytes: as given, or written as "4GiB", "500MB", "2G"; None is half of what is free on the device.

    Raises ValueError for anything else.
    """
    if memory is None:
        return free_memory(device) // 2
    match = re.fullmatch(r"\s*([0-9.]+)\s*([kmgt]?i?b?)\s*", str(memory).lower())
    try:
        assert match is not None
        size = int(float(match[1]) * UNITS[match[2]])
    except (AssertionError, KeyError, ValueError):
        raise ValueError(f"memory={memory!r} is no amount such as '4GiB', '500MB' or a number of bytes") from None
    if size < 1:
        raise ValueError(f"memory={memory!r} leaves nothing to work with")
    return size


def free_memory(device: torch.device) -> int:
    """Bytes free on the device; of the host, what the system could give without swapping, within its cgroup's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        available = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        free = int(available[1]) * 1024 if available else 0
    except OSError:
        free = 0
    if not free:
        try:  # not Linux: half of the whole is the best that the standard library tells
            free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        except (AttributeError, ValueError, OSError):
            free = 4 << 30
    try:
        limit, used = (Path("/sys/fs/cgroup", name).read_text().strip() for name in ("memory.max", "memory.current"))
        free = free if limit == "max" else min(free, max(int(limit) - int(used), 0))
    except (OSError, ValueError):
        pass
    return free


def leaves(values: Iterable[Any]) -> Iterator[Any]:
    """All leaves of some values; most are lone tensors, which need no search."""
    for value in values:
        if isinstance(value, Tensor | _Away):
            yield value
        else:
            yield from tree_leaves(value)


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """The value with each leaf put through a function."""
    return function(value) if isinstance(value, Tensor | _Away) else tree_map(function, value)


def _regions(values: Mapping[Hashable, Any]) -> set[Region]:
    return {leaf.region for leaf in leaves(values.values()) if isinstance(leaf, _Away)}
