"""Forward passes that can be suspended: each runs in its own thread, a given number of them at a time.

The Python frames of a suspended pass hold its activations. So it needs no graph of the network, and it works for any
control flow. Threads, not coroutines: gradient mode, autocast and function modes are states of a thread.
"""

from __future__ import annotations

import contextvars
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from typing import Any

import torch

from ..errors import ResuscitateError

# Seconds. A signal that comes just before the main thread begins to wait does not end the wait, and until it is handled
# Python 3.11 runs no other thread that is traced (by a debugger, by coverage). So no wait is longer than this.
WAIT = 0.5

Run = Callable[[], object]
Chain = Iterator["Pass"]
_thread = threading.local()


class _CancelledError(BaseException):
    """Unwinds a suspended forward pass. Not an Exception, so that no handler of the model takes it."""


class RestartError(BaseException):
    """Unwinds a forward pass that has to start again: `Pass.again` is then True."""


def current() -> Any:
    """The `state` of this thread's pass; None in a thread without a pass."""
    return getattr(_thread, "state", None)


def _nothing() -> None:
    pass


class _Control:
    """What a pass and its thread share. The thread does not refer to the `Pass`, so that this can be dropped."""

    def __init__(self, run: Run, state: object, threads: int | None, finish: Run) -> None:
        self.run, self.state, self.threads, self.finish = run, state, threads, finish
        self.ended = self.again = self.cancelled = self.begun = False
        self.error: BaseException | None = None
        self.then: Callable[[], None] = _nothing
        self.go = threading.Lock()  # free while the pass may run
        self.go.acquire()
        self.over = threading.Event()

    def resume(self, then: Callable[[], None]) -> None:
        """Let the pass run, and return at once. It calls `then` in its thread when it is suspended or has ended."""
        self.then = then
        if self.begun:
            self.go.release()
        elif self.cancelled:
            self.ended = True
            then()
        else:
            context = contextvars.copy_context()
            thread = threading.Thread(target=context.run, args=(self.body,), name="forward pass", daemon=True)
            self.begun = True  # beforehand: the pass may be resumed again before `start` returns
            try:
                thread.start()
            except BaseException as error:
                if thread.ident is None:
                    self.over.set()
                if isinstance(error, RuntimeError):
                    cause = f"{error}: each batch needs its own thread; use larger batches"
                    raise ResuscitateError(cause) from error
                raise

    def cancel(self) -> None:
        """Unwind the pass from where it is suspended; one that runs, from where it is suspended next."""
        self.cancelled = True
        with suppress(RuntimeError):  # it is free already
            self.go.release()

    def join(self) -> None:
        """Wait until its thread has ended."""
        while self.begun and not self.over.wait(WAIT):
            pass

    def body(self) -> None:
        _thread.control, _thread.state = self, self.state
        try:
            torch.set_grad_enabled(False)
            if self.threads is not None:
                torch.set_num_threads(self.threads)
            if not self.cancelled:
                self.run()
        except _CancelledError:
            pass
        except RestartError:
            self.again = True
        except BaseException as error:
            self.error = error
        try:
            self.finish()
        except BaseException as error:
            self.error = self.error or error
        _thread.state = self.state = None
        self.run = self.finish = _nothing
        self.ended = True
        self.hand_on()
        self.over.set()

    def hand_on(self) -> None:
        """Call `then`, which refers to the `Pass`: no frame of a suspended pass may hold it."""
        then, self.then = self.then, _nothing
        then()


class Pass:
    """One forward pass. It runs from `resume` until it calls `suspend`, or ends: returns, or raises an `error`.

    run: the forward pass. state: what `current` returns in its thread. The thread begins with the first `resume`, with
    gradients off and `threads` intra-op threads; None leaves their number. At its end, however it comes, it calls
    `finish`. A pass that is dropped is cancelled.
    """

    def __init__(self, run: Run, state: object = None, threads: int | None = None, finish: Run | None = None) -> None:
        self._control = control = _Control(run, state, threads, finish or _nothing)
        self.resume, self.cancel, self.join = control.resume, control.cancel, control.join

    @property
    def ended(self) -> bool:
        """Whether the forward pass has returned or has raised an error."""
        return self._control.ended

    @property
    def error(self) -> BaseException | None:
        """What the forward pass raised."""
        return self._control.error

    @property
    def again(self) -> bool:
        """Whether the forward pass has ended by RestartError."""
        return self._control.again

    def __del__(self) -> None:
        with suppress(AttributeError):  # an interrupt came before it had one
            try:
                self._control.cancel()
            finally:  # once more, lest an interrupt came within it
                self._control.cancel()


def suspend() -> None:
    """Suspend the pass of this thread until it is resumed. Raises the error that unwinds it, if it is cancelled."""
    control: _Control = _thread.control
    control.hand_on()
    if not control.cancelled:
        control.go.acquire()
    if control.cancelled:
        raise _CancelledError


def end(passes: Iterable[Pass]) -> None:
    """Cancel passes, and wait until their threads have ended."""
    passes = list(passes)
    for each in passes:
        each.cancel()
    for each in passes:
        each.join()


class PassRunner:
    """Runs chains of passes, `size` chains at a time; it waits without using a core.

    A chain is an iterator of passes. It is asked for the next one in the thread of the last one, when that is suspended
    or has ended. So the code of a chain between two passes runs beside the other chains.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def run(self, chains: Iterable[Chain]) -> None:
        """Run all chains to their ends. Raises the first error of a pass or a chain; no pass is resumed after it.

        After an interrupt some passes may still run: the caller cancels and joins them.
        """
        waiting, failed = iter(list(chains)), list[BaseException]()  # `next` of a list's iterator is atomic
        idle = queue.SimpleQueue[None]()

        def go_on(stream: Chain) -> None:
            """Resume the next pass of a stream: the passes of one chain, and then of the next waiting chain."""
            try:
                each = None if failed else next(stream, None)
                if each is not None:
                    each.resume(partial(came, stream, each))
                    return
            except BaseException as error:
                failed.append(error)
            idle.put(None)

        def came(stream: Chain, each: Pass) -> None:
            if each.error is not None:
                failed.append(each.error)
            go_on(stream)

        try:
            for _ in range(self.size):
                go_on(chain.from_iterable(waiting))
            for _ in range(self.size):
                _get(idle)
        except BaseException as error:  # an interrupt
            failed.append(error)
            raise
        if failed:
            raise failed[0]


def _get(idle: queue.SimpleQueue[None]) -> None:
    """Take the next item of the queue, in waits of at most `WAIT`."""
    while True:
        with suppress(queue.Empty):
            return idle.get(timeout=WAIT)


def at_a_time(device: torch.device, passes: int, memory: int = 1, each: int = 0) -> tuple[int, int | None]:
    """How many passes run at a time, and with how many intra-op threads each; None leaves their number.

    On a CPU as many as this thread has intra-op threads, or as there are passes, or as fit into `memory` at `each`
    bytes; they share the threads. Else one: one pass fills the queue of the device as fast as several.
    """
    if device.type != "cpu":
        return 1, None
    threads = torch.get_num_threads()
    size = max(min(passes, threads, memory // each if each else threads), 1)
    return size, threads // size


@contextmanager
def threads_kept() -> Iterator[None]:
    """A context that restores the number of intra-op threads, which passes change, for all other threads."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
