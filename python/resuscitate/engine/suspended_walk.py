"""The suspended walk: the forward passes of all batches are suspended at a layer, it is changed, and they continue.

Each batch has one pass through the pruned network, and one through the dense network where a probe needs both side by
side. A pass is suspended within a hook, before or after a layer, or at the sum behind the layer.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from ..errors import ModelMismatchError, called
from ..network.wiring import same_output
from ..runtime.heap import heap
from ..runtime.passes import Pass, PassRunner, at_a_time, end, threads_kept
from .interleaved import check_interleaved
from .pass_memory import PassStorages, SharedStore, TrialPass, Unread, model_identities
from .probes import Measurement, Request
from .relu_targets import Seen
from .suspension import Position, SuspensionPoints
from .walk import Collector, Walk

THREAD = 512 << 10  # bytes of the thread of a suspended pass: its stack, and torch's state


class SuspendedPasses:
    """The passes of one network, one for each batch, begun when they are first resumed.

    `shared`: where the values of suspended passes are kept when memory is short; None keeps all of them in memory.
    """

    def __init__(self, walk: Walk, is_dense: bool) -> None:
        self.points, self.batches = SuspensionPoints(walk, is_dense), walk.batches
        self.threads: int | None = None
        self.shared: SharedStore | None = None
        self.foreign, self.unread = set[int](), dict[str, Unread]()
        self.passes: dict[int, tuple[Pass, Position]] = {}
        self.closed, self.lock = False, threading.Lock()

    def run_trial(self, example: Any, shared: SharedStore) -> int:
        """Find with a small batch which values are not read after a suspension; returns the peak bytes of activations.

        A second pass tries this: it overwrites each such value, and its output must be the same.
        """
        self.shared, self.foreign = shared, model_identities(self.points.net.model)
        trial = TrialPass(self.foreign)
        expected = self._trial(example, trial)
        self.unread = trial.unread()
        try:
            as_expected = same_output(expected, self._trial(example, TrialPass(self.foreign, self.unread)))
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # the model's own, about a value that was overwritten
            as_expected = False
        if not as_expected:
            self.unread = {}
        return trial.peak

    def _trial(self, example: Any, live: TrialPass) -> Any:
        """The output for a small batch, in a pass that is not suspended."""
        here = Position(live)
        each = Pass(partial(self.points.run, here, lambda: example), here)
        try:
            PassRunner(1).run([iter([each])])
        finally:
            end([each])
        return here.output

    def position(self, index: int) -> Position:
        """Where the pass of this batch is."""
        return self._pass(index)[1]

    def at(self, index: int, name: str) -> bool:
        """Is the pass of this batch suspended at this module?"""
        each, here = self._pass(index)
        return not each.ended and here.at == name and name in self.points.ahead

    def to_next(self, index: int) -> Iterator[Pass]:
        """The pass of this batch, to resume it, unless it is suspended at a module ahead or has ended."""
        each, here = self._pass(index)
        if not each.ended and here.at not in self.points.ahead:
            yield each
            if each.again:
                del self.passes[index]
                yield self._pass(index, whole=True)[0]

    def rest(self, index: int) -> None:
        """The pass of this batch is suspended and measured: its values may be spilled."""
        each, here = self._pass(index)
        if not each.ended:
            here.rest()

    def keep(self, count: int) -> None:
        """Cancel the passes of all but the first batches."""
        end(self.passes.pop(index)[0] for index in list(self.passes) if index >= count)

    def close(self) -> None:
        """Cancel all passes, and begin no other: after an interrupt some chains of passes still go on."""
        with self.lock:
            self.closed = True
        self.keep(0)

    def _pass(self, index: int, whole: bool = False) -> tuple[Pass, Position]:
        """The pass of a batch. whole: it frees no value, whatever the trial found."""
        with self.lock:
            if index not in self.passes:
                if self.closed:
                    raise RuntimeError("the walk has ended")
                unread = {} if whole else self.unread
                live = None if self.shared is None else PassStorages(self.foreign, self.shared, unread)
                here = Position(live)
                run = partial(self.points.run, here, partial(self.batches.__getitem__, index))
                self.passes[index] = Pass(run, here, self.threads, None if live is None else live.finish), here
            return self.passes[index]


class SuspendedWalk:
    """One walk over the requests, through the passes of the pruned network and, if it runs beside, of the dense one."""

    def __init__(self, walk: Walk, networks: Sequence[SuspendedPasses], runner: PassRunner) -> None:
        self.walk, self.networks, self.runner = walk, networks, runner
        self.pruned, self.dense = networks[0], networks[1] if walk.beside else None
        # behind a module that is called several times in a forward pass the passes begin anew
        self.repeated = {name for name, calls in walk.wiring.calls.items() if calls > 1}

    def measurements(self) -> Iterator[Measurement]:
        """Measure at each request when all earlier modules are final."""
        threads = torch.get_num_threads()
        for part, request in enumerate(self.walk.requests):
            name, large = request.name, request.probe.statistic.large
            if self.pruned.threads is not None:
                # The threads of an OpenMP team spin for a while after their work, on cores that the passes need. So
                # this thread has a team only for large matrix products, which take longer than that.
                torch.set_num_threads(threads if large else self.pruned.threads)
            ahead = {name} if name in self.repeated else {each.name for each in self.walk.requests[part:]}
            for passes in self.networks:
                passes.points.ahead = ahead
            collector = Collector(request, self.walk)
            order = self._order(part, collector.measured)
            # passes whose outputs here are not corrected need not wait for one another
            size = self.runner.size if name in self.repeated or large else max(len(order), 1)
            for some in (order[at : at + size] for at in range(0, len(order), size)):
                self._measure(request, some, collector)
            yield collector.finish(partial(self.pruned.points.correct, name), partial(self._seen, request))
            if name in self.repeated:
                for passes in self.networks:
                    passes.keep(0)

    def _order(self, part: int, measured: int) -> Sequence[int]:
        """The batches whose passes are resumed up to a request; passes that no later request needs are cancelled.

        At every other request from the last batch to the first: the activations of the last batch are in cache.
        """
        requests = self.walk.requests[part:]
        ends = [at for at, each in enumerate(requests, 1) if each.name in self.repeated]
        later = requests[: ends[0] if ends else None]
        last = max(measured, *(each.batches for each in later))
        self.pruned.keep(last)
        if self.dense is not None:
            self.dense.keep(max((each.batches for each in later if each.probe.dense), default=0))
        # behind a layer all passes are suspended, to be corrected; before a module only those that are measured
        count = last if self.pruned.points.where[requests[0].name] == "output" else measured
        return range(count) if part % 2 == 0 else range(count - 1, -1, -1)

    def _measure(self, request: Request, indices: Sequence[int], collector: Collector) -> None:
        """Measure some batches: at the first call of the module, or at all calls of one that is called again."""
        here = indices
        while here:
            self.runner.run(self._come(request, index, collector) for index in here)
            here = [index for index in indices if self.pruned.at(index, request.name)]
            for index in indices if request.probe.statistic.large else ():
                self._add(request, index, collector)
            if request.name not in self.repeated:
                return
            for passes in self.networks:
                for index in here:
                    passes.position(index).at = None

    def _come(self, request: Request, index: int, collector: Collector) -> Iterator[Pass]:
        """Resume the passes of one batch up to a request; measure there if that is cheap."""
        name = request.name
        dense = self.dense if index < collector.dense_measured else None
        if dense is not None:
            yield from dense.to_next(index)
        yield from self.pruned.to_next(index)
        self.walk.bar.advance(name, self.walk.batches.counts[index])
        ours, theirs = self.pruned.at(index, name), dense is not None and dense.at(index, name)
        if dense is not None and request.probe.side_by_side and ours != theirs:
            calls = collector.calls(index)
            raise ModelMismatchError(
                f"{called(name)} runs {calls + ours} times in the model, {calls + theirs} in the dense one"
            )
        if not request.probe.statistic.large:
            self._add(request, index, collector)

    def _add(self, request: Request, index: int, collector: Collector) -> None:
        """Measure one batch in the networks whose passes have come to the request."""
        here = [each.position(index) if each.at(index, request.name) else None for each in self.networks]
        with ExitStack() as stack:
            for position in here:
                if position is not None:  # its value is spilled already where the pass called no earlier request
                    stack.enter_context(position.in_memory())
            collector.add(index, *(None if position is None else position.value for position in here))
        for passes in self.networks:
            passes.rest(index)

    def _seen(self, request: Request) -> Iterator[Seen]:
        """The tensors at a request, batch by batch, and the tensors added to the layer's output."""
        assert self.dense is not None
        for index in range(request.batches):
            if self.pruned.at(index, request.name):
                here, there = self.pruned.position(index), self.dense.position(index)
                with here.in_memory(), there.in_memory():
                    yield here.value, here.added, there.value, there.added


def suspended_walk(walk: Walk) -> Iterator[Measurement]:
    """Measure at the requests in one forward pass of each network for each batch.

    A module that is called several times costs one more pass: it is measured at all its calls, uncorrected, in passes
    to the end; then the passes start again. A batch whose pass does not call a requested module, or calls it after a
    later one, is not measured there.
    """
    store, batches, dense = walk.store, walk.batches, walk.beside
    with ExitStack() as stack, threads_kept():
        networks = [SuspendedPasses(walk, is_dense) for is_dense in ([False, True] if dense else [False])]
        for passes in networks:
            passes.points.hook(stack)
            stack.callback(passes.close)
        wirings = [walk.wiring, *([walk.dense_wiring] if dense else [])]
        several = max((each.batches for each in walk.requests), default=0) > 1
        for passes, wiring in zip(networks, wirings, strict=True):
            if several and wiring.keeps_tensors and not wiring.draws_random_numbers:
                net = passes.points.net
                check_interleaved(net, [net.example(batches[index]) for index in range(2)])
        # a network that draws random numbers runs one pass after the other, so that their order is fixed
        count = 1 if any(each.draws_random_numbers for each in wirings) else len(batches)
        needed = int(sum(each.bytes_made for each in wirings) * walk.scale) * len(batches)
        if needed <= store.budget // 2:  # all activations of all passes fit
            workers, threads = at_a_time(walk.pruned.device, count)
            store.set_aside(needed)
        else:
            shared, device = SharedStore(store), walk.pruned.device
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # the passes draw them again
                peak = int(sum(passes.run_trial(walk.example, shared) for passes in networks) * walk.scale)
            workers, threads = at_a_time(device, count, store.budget // 2, peak)
            store.set_aside(workers * peak)
            needed = peak * len(batches)
        stack.enter_context(heap(needed, store.budget))
        walk.measure_apart()
        store.reserve += THREAD * len(networks) * len(batches)
        for passes in networks:
            passes.threads = threads
        yield from SuspendedWalk(walk, networks, PassRunner(workers)).measurements()
