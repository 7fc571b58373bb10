"""The heap: pages that are kept for the next allocation, and what is left as it was."""

import ctypes
import itertools
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from resuscitate.runtime import heap as malloc
from resuscitate.runtime.heap import give_back_freed, heap, resident_memory


def glibc():
    try:
        return hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
    except (OSError, TypeError):
        return False


pytestmark = pytest.mark.skipif(not glibc(), reason="needs glibc")

FAULTS = """
    import resource, sys
    import torch
    from resuscitate.runtime.heap import heap

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            torch.empty(8 << 20, dtype=torch.uint8).fill_(1)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    torch.set_num_threads(1)
    with heap(*((1, 2) if sys.argv[1] == "keep" else (2, 1))):
        faults()
        print(faults())
"""


def page_faults(keep, **environment):
    """Of twenty blocks of 8 MiB one after the other, in a process of its own."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    command = [sys.executable, "-c", textwrap.dedent(FAULTS), "keep" if keep else "give back"]
    done = subprocess.run(
        command,
        env=clean | environment | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return int(done.stdout)


def test_freed_blocks_are_used_again_without_new_pages():
    huge = 20 * 4  # pages of 2 MiB, if the system has them for large blocks
    assert page_faults(keep=True) < 20
    # in some processes a small block stays behind a large one: then that one is not at the unused end of the heap
    assert any(page_faults(keep=False) >= huge for _ in range(6))


class Library:
    """A C library that notes what it is asked."""

    def __init__(self):
        self.calls = []

    def mallopt(self, parameter, value):
        self.calls.append((parameter, value))

    def malloc_trim(self, pad):
        self.calls.append("trim")


@pytest.fixture
def library(monkeypatch):
    library = Library()
    monkeypatch.setattr(malloc, "_glibc", lambda: library)
    return library


AFTERWARDS = [
    (malloc.MMAP_THRESHOLD, malloc.LARGEST_MMAP),
    (malloc.TRIM_THRESHOLD, malloc.LARGEST_TRIM),
    "trim",
]


NEEDS = pytest.mark.parametrize("needed", [50, 51], ids=["the budget holds it twice", "it does not"])


@NEEDS
def test_a_context_within_another_does_nothing(library, needed):
    with heap(needed, 100):
        begun = list(library.calls)
        assert begun
        with heap(101 - needed, 100), heap(needed, 100):
            pass
        assert library.calls == begun
    assert library.calls == begun + AFTERWARDS
    with heap(needed, 100):
        assert library.calls == begun + AFTERWARDS + begun


@NEEDS
def test_freed_memory_is_kept_where_the_budget_holds_what_a_walk_needs_twice(library, needed):
    with heap(needed, 100):
        thresholds = dict(library.calls)
    assert (thresholds[malloc.MMAP_THRESHOLD] > malloc.LARGEST_MMAP) == (needed == 50)
    assert (thresholds[malloc.TRIM_THRESHOLD] > malloc.LARGEST_TRIM) == (needed == 50)
    assert (thresholds[malloc.TRIM_THRESHOLD] < malloc.LARGEST_TRIM) == (needed == 51)


@NEEDS
def test_an_error_within_puts_it_back(library, needed):
    with pytest.raises(KeyboardInterrupt), heap(needed, 100):
        raise KeyboardInterrupt
    assert library.calls[-3:] == AFTERWARDS
    library.calls.clear()
    with heap(needed, 100):
        assert library.calls


def test_an_interrupt_at_any_line_leaves_it_to_the_next_walk(library):
    def interrupted(at):
        lines = itertools.count(1)

        def trace(frame, event, arg):
            if event == "line" and next(lines) == at:
                raise KeyboardInterrupt
            return trace if frame.f_code.co_filename == malloc.__file__ else None

        before = sys.gettrace()
        try:
            sys.settrace(trace)
            with heap(50, 100):
                pass
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False

    count = next(at for at in itertools.count(1) if not interrupted(at)) - 1
    assert count > 10
    for at in range(1, count + 1):
        assert interrupted(at)
        library.calls.clear()
        with heap(50, 100):
            assert library.calls, f"after an interrupt at line {at} of {count}"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_holes_in_the_heap_are_resident_until_they_are_given_back():
    size, count = 4096, 10_000
    blocks = [bytearray(size) for _ in range(count)]
    for block in blocks:
        block[:] = b"1" * size
    full = resident_memory()
    del blocks[: count - 1]  # the last one keeps the heap's end where it is
    give_back_freed()
    assert resident_memory() < full - size * count / 2


@pytest.mark.parametrize(
    "environment",
    [
        {"MALLOC_ARENA_MAX": "2"},
        {"MALLOC_TRIM_THRESHOLD_": "100000"},
        {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"},
    ],
    ids=lambda e: next(iter(e)),
)
def test_what_the_user_has_chosen_stays(environment, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))]:
        monkeypatch.delenv(name)
    assert malloc._glibc() is not None
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert malloc._glibc() is None
    with heap(1, 2):
        assert not malloc._owners


def test_tunables_of_others_do_not_count(monkeypatch):
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.pthread.rseq=0")
    assert malloc._glibc() is not None
