"""The C library's heap during a walk: when freed memory is kept for the next allocation, and when it is given back."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # parameters of mallopt
LARGEST_MMAP, LARGEST_TRIM = 32 << 20, 64 << 20  # bytes; malloc moves its thresholds up to these as blocks are freed
LARGEST_END = 1 << 20  # bytes of the unused end of a heap, of a walk that has to save memory

_entered = threading.Lock()


def _glibc() -> Any:
    """The C library, if it is glibc and its user has not chosen how malloc works; else None."""
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018
    except (AttributeError, OSError, TypeError):
        return None
    chosen = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    return None if chosen or any(name.startswith("MALLOC_") for name in os.environ) else library


def give_back_freed() -> None:
    """Have the C library return the pages of freed memory to the system, those between used ones too (glibc only).

    A heap in which large values of several sizes come and go is full of holes, which count as memory in use.
    """
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def resident_memory() -> int:
    """Bytes of this process that are in memory (Linux; elsewhere 0)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return 0


@contextmanager
def heap(needed: float, budget: int) -> Iterator[None]:
    """The heap of a walk that has `needed` bytes of activations at once and may take `budget` bytes.

    Where the budget holds the activations twice, for a heap has holes, malloc keeps what is freed: otherwise it takes
    new pages from the system for each activation, which costs as much time as computing them. Where it does not, the
    unused ends of all threads' heaps are given back, which `give_back_freed` does not do.

    Afterwards freed memory is given back, and the thresholds are those that malloc comes to by itself in a process that
    frees large blocks. Within another such context this one does nothing.
    """
    library = _glibc()
    if library is None or not _entered.acquire(blocking=False):
        yield
        return
    keep = 2 * needed <= budget
    try:
        library.mallopt(MMAP_THRESHOLD, 1 << 30 if keep else LARGEST_MMAP)
        library.mallopt(TRIM_THRESHOLD, (1 << 31) - 1 if keep else LARGEST_END)
        yield
    finally:
        library.mallopt(MMAP_THRESHOLD, LARGEST_MMAP)
        library.mallopt(TRIM_THRESHOLD, LARGEST_TRIM)
        library.malloc_trim(0)
        _entered.release()
