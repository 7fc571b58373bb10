"""The C library's heap during a walk: whether freed memory is kept for the next allocation, or given back at once."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3  # parameters of mallopt
# bytes; malloc moves its thresholds up to the last two by itself, as large blocks are freed
PAD, LARGEST_MMAP, LARGEST_TRIM = 128 << 10, 32 << 20, 64 << 20


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


def heap_for(needed: float, budget: int) -> AbstractContextManager[None]:
    """The heap of a walk that has `needed` bytes of activations at once and may take `budget` bytes.

    Freed memory is kept where the budget admits the activations twice, for a heap has holes. It is given back at once
    where the budget does not admit them all. In between malloc does as it comes.
    """
    if 2 * needed <= budget:
        return heap(keep=True)
    return heap(keep=False) if needed > budget else nullcontext()


@contextmanager
def heap(keep: bool) -> Iterator[None]:
    """keep: malloc keeps freed memory, so that activations do not take new pages from the system each time, which costs
    as much time as computing them. Else it gives large blocks back at once, for a process that has a budget to keep.

    Afterwards freed memory is given back and the thresholds are those that malloc comes to by itself in a process that
    frees large blocks. Within another such context this one does nothing.
    """
    library = _glibc()
    if library is None or not _entered.acquire(blocking=False):
        yield
        return
    try:
        if keep:
            library.mallopt(MMAP_THRESHOLD, 1 << 30)
            library.mallopt(TRIM_THRESHOLD, (1 << 31) - 1)
        else:
            library.mallopt(MMAP_THRESHOLD, 1 << 20)
            library.mallopt(TRIM_THRESHOLD, 1 << 20)
            library.malloc_trim(0)  # of what was freed before
        yield
    finally:
        library.mallopt(MMAP_THRESHOLD, LARGEST_MMAP)
        library.mallopt(TRIM_THRESHOLD, LARGEST_TRIM)
        library.malloc_trim(0)
        _entered.release()
