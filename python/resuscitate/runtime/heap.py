"""The C library's heap during a walk: freed memory is kept for the next allocation, or returned to the system."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # parameters of mallopt
LARGEST_MMAP, LARGEST_TRIM = 32 << 20, 64 << 20  # bytes; malloc raises its thresholds up to these as blocks are freed
LARGEST_END = 1 << 20  # bytes; trim threshold of a walk that must save memory


class _Owner:
    """Lives as long as the context that configures malloc."""


# weak references: after an interrupt at any line of `heap` the next walk configures malloc, once the traceback is gone
_owners: weakref.WeakSet[_Owner] = weakref.WeakSet()


def _glibc() -> Any:
    """The C library, if it is glibc and no environment variable configures malloc; else None."""
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018
    except (AttributeError, OSError, TypeError):
        return None
    chosen = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    return None if chosen or any(name.startswith("MALLOC_") for name in os.environ) else library


def give_back_freed() -> None:
    """Return the pages of freed memory to the system, also those between used pages (glibc only).

    Allocating and freeing large values of several sizes fragments the heap; freed pages count as memory in use.
    """
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def resident_memory() -> int:
    """The resident memory of this process in bytes (Linux; elsewhere 0)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return 0


@contextmanager
def heap(needed: float, budget: int) -> Iterator[None]:
    """Configure malloc for a walk that has `needed` bytes of activations at once within a `budget` in bytes.

    If the budget is at least twice `needed` (a heap fragments), malloc keeps freed memory. Otherwise malloc takes new
    pages from the system for each activation, which takes as much time as computing it. If the budget is smaller, the
    unused ends of the heaps of all threads are returned to the system, which `give_back_freed` does not do.

    On exit freed memory is returned and the thresholds are set to the values that malloc reaches by itself in a process
    that frees large blocks. A nested context does nothing. Walks of two threads that begin at once may both configure
    malloc: this costs time only.
    """
    library = _glibc()
    if library is None or _owners:
        yield
        return
    owner, keep = _Owner(), 2 * needed <= budget
    try:
        _owners.add(owner)
        library.mallopt(MMAP_THRESHOLD, 1 << 30 if keep else LARGEST_MMAP)
        library.mallopt(TRIM_THRESHOLD, (1 << 31) - 1 if keep else LARGEST_END)
        yield
    finally:
        _owners.discard(owner)
        library.mallopt(MMAP_THRESHOLD, LARGEST_MMAP)
        library.mallopt(TRIM_THRESHOLD, LARGEST_TRIM)
        library.malloc_trim(0)
