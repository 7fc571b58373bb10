"""The suspended walk: the forward passes of all batches are suspended at a layer, it is changed, and they continue.

Each batch has one pass through the pruned network, and one through the dense network where a probe needs both side by
side. A pass is suspended within a hook, before or after a layer, or at the sum behind the layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch

from ..data.batches import Batches
from ..errors import ModelMismatchError, called
from ..network.runner import Network
from ..network.wiring import ReluConsumer, Wiring, observe, same_output
from ..runtime.activations import Store
from ..runtime.heap import heap
from ..runtime.passes import Pass, PassRunner, at_a_time, end, threads_kept
from ..statistics.outputs import Calls
from ..utils.nested import count_images
from ..utils.progress import Bar
from .collect import BatchNormInputs, Collector, complete
from .measure import measure_apart
from .pass_memory import OverwriteTest, PassStorages, SharedStore, TrialPass, Unread, identities
from .probes import Measurement, Request
from .relu_targets import Seen, relu_equivalent_products
from .suspension import Position, SuspensionPoints

THREAD = 512 << 10  # bytes of the thread of a suspended pass: its stack, and torch's state


class SuspendedPasses:
    """The passes of one network, one for each batch, begun when they are first resumed.

    shared: where the values of suspended passes are kept when memory is short; None keeps all of them in memory.
    """

    def __init__(self, points: SuspensionPoints, batches: Batches) -> None:
        self.points, self.batches = points, batches
        self.threads: int | None = None
        self.shared: SharedStore | None = None
        self.peak, self.unread = 0, dict[str, Unread]()
        self.foreign: Set[int] = set()
        self.passes: dict[int, tuple[Pass, Position]] = {}

    def run_trial(self, example: Any) -> None:
        """Find with a small batch which values are not read after a suspension, and the peak bytes of activations.

        A second pass tries this: it overwrites each such value, and its output must be the same.
        """
        trial = TrialPass(_own(self.points.net))
        expected = self._trial(example, trial)
        self.foreign, self.peak, self.unread = trial.foreign, trial.peak, trial.unread()
        try:
            as_expected = same_output(expected, self._trial(example, OverwriteTest(self.foreign, self.unread)))
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # the model's own, about a value that was overwritten
            as_expected = False
        if not as_expected:
            self.unread = {}

    def _trial(self, example: Any, live: TrialPass | OverwriteTest) -> Any:
        """The output for a small batch, in a pass that is not suspended."""
        here = Position(0, live)
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

    def ended(self, index: int) -> bool:
        """Has the pass of this batch ended?"""
        return self._pass(index)[0].ended

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

    def _pass(self, index: int, whole: bool = False) -> tuple[Pass, Position]:
        """The pass of a batch. whole: it frees no value, whatever the trial found."""
        if index not in self.passes:
            live = (
                None if self.shared is None else PassStorages(self.foreign, self.shared, {} if whole else self.unread)
            )
            here = Position(index, live)
            run = partial(self.points.run, here, partial(self.batches.__getitem__, index))
            self.passes[index] = Pass(run, here, self.threads, None if live is None else live.finish), here
        return self.passes[index]


class SuspendedWalk:
    """One walk over the requests, which are in the order of their first calls. See `suspended_walk`."""

    def __init__(
        self,
        pruned: SuspendedPasses,
        dense: SuspendedPasses | None,
        requests: Sequence[Request],
        wiring: Wiring,
        consumers: Mapping[str, tuple[ReluConsumer, ReluConsumer]],
        runner: PassRunner,
        bar: Bar,
    ) -> None:
        self.pruned, self.dense, self.requests, self.wiring = pruned, dense, requests, wiring
        self.consumers, self.runner, self.bar = consumers, runner, bar
        self.inputs = BatchNormInputs(requests, wiring)

    def measurements(self) -> Iterator[Measurement]:
        """Measure at each request when all earlier modules are final."""
        threads = torch.get_num_threads()
        for part, request in enumerate(self.requests):
            if self.pruned.threads is not None:
                # The threads of an OpenMP team spin for a while after their work, on cores that the passes need. So
                # this thread has a team only for large matrix products, which take longer than that.
                torch.set_num_threads(threads if request.large else self.pruned.threads)
            yield self._measurement(part, request)
            for passes in self._networks():
                passes.points.ahead.discard(request.name)
                if self._called_again(request):
                    passes.keep(0)

    def _networks(self) -> list[SuspendedPasses]:
        return [passes for passes in (self.pruned, self.dense) if passes is not None]

    def _called_again(self, request: Request) -> bool:
        """Is the module called several times in a forward pass? Then the passes begin anew behind it."""
        return self.wiring.calls[request.name] > 1

    def _measurement(self, part: int, request: Request) -> Measurement:
        name, again = request.name, self._called_again(request)
        nets = self.pruned.points.net, None if self.dense is None else self.dense.points.net
        collector = Collector(request, self.inputs, *nets, self.pruned.batches, follows=not again)
        order = self._order(part, collector.measured)
        with self._only(name) if again else nullcontext():
            # passes whose outputs here are not corrected need not wait for one another
            size = self.runner.size if again or request.large else max(len(order), 1)
            for some in (order[at : at + size] for at in range(0, len(order), size)):
                self._measure(request, some, collector)
        batchnorm = self.wiring.batchnorm_of.get(name, "")
        measurement = collector.finish(lambda gain, shift: self.pruned.points.correct(name, gain, shift, batchnorm))
        if self.dense is not None and name in self.consumers:
            seen = partial(self._seen, request)
            both = self.pruned.points.net, self.dense.points.net
            measurement.found.replay = partial(relu_equivalent_products, *both, name, self.consumers[name], seen)
        return measurement

    def _order(self, part: int, measured: int) -> Sequence[int]:
        """The batches whose passes are resumed up to a request; passes that no later request needs are cancelled.

        At every other request from the last batch to the first: the activations of the last batch are in cache.
        """
        ends = [at for at, each in enumerate(self.requests) if at >= part and self._called_again(each)]
        later = self.requests[part : ends[0] + 1 if ends else None]
        last = max(each.batches for each in later)
        self.pruned.keep(max(last, measured))
        if self.dense is not None:
            self.dense.keep(max((each.batches for each in later if each.probe.dense), default=0))
        # behind a layer all passes are suspended, to be corrected; before a module only those that are measured
        count = max(last, measured) if self.pruned.points.where[self.requests[part].name] == "output" else measured
        return range(count) if part % 2 == 0 else range(count - 1, -1, -1)

    @contextmanager
    def _only(self, name: str) -> Iterator[None]:
        """Suspend passes at this module alone."""
        before = [(passes.points, passes.points.ahead) for passes in self._networks()]
        try:
            for points, ahead in before:
                points.ahead = ahead & {name}
            yield
        finally:
            for points, ahead in before:
                points.ahead = ahead

    def _measure(self, request: Request, indices: Sequence[int], collector: Collector) -> None:
        """Measure some batches: at the first call of the module, or at all calls of one that is called again."""
        self.runner.run(self._come(request, index, collector) for index in indices)
        while request.large or self._called_again(request):
            here = [index for index in indices if self.pruned.at(index, request.name)]
            for index in indices if request.large else ():
                if index in here:
                    collector.add(index, *(passes.position(index).value for passes in self._networks()))
                for passes in self._networks():
                    passes.rest(index)
            if not here or not self._called_again(request):
                return
            for passes in self._networks():
                for index in here:
                    passes.position(index).at = None
            self.runner.run(self._come(request, index, collector) for index in here)

    def _come(self, request: Request, index: int, collector: Collector) -> Iterator[Pass]:
        """Resume the passes of one batch up to a request; measure there if that is cheap."""
        name = request.name
        dense = self.dense if self.dense is not None and collector.dense_batch(index) else None
        if dense is not None:
            yield from dense.to_next(index)
        yield from self.pruned.to_next(index)
        self.bar.advance(name, self.pruned.batches.counts[index])
        ours, theirs = self.pruned.at(index, name), dense is not None and dense.at(index, name)
        if dense is not None and request.probe.side_by_side and ours != theirs:
            calls = collector.calls(index)
            raise ModelMismatchError(
                f"{called(name)} runs {calls + ours} times in the model, {calls + theirs} in the dense one"
            )
        if request.large:
            return
        x = self.pruned.position(index).value if ours else None
        y = dense.position(index).value if theirs and dense is not None else None
        collector.add(index, x, y)
        for passes in self._networks():
            passes.rest(index)

    def _seen(self, request: Request) -> Iterator[Seen]:
        """The tensors at a request, batch by batch, and the tensors added to the layer's output."""
        assert self.dense is not None
        for index in range(request.batches):
            if self.pruned.at(index, request.name):
                here, there = self.pruned.position(index), self.dense.position(index)
                with here.in_memory(), there.in_memory():
                    yield here.value, here.added, there.value, there.added


def _own(net: Network) -> set[int]:
    """The identities of the storages of a model's parameters and buffers."""
    return identities([*net.model.parameters(), *net.model.buffers()])


def peak_memory(net: Network, batch: Any) -> int:
    """The peak bytes of activations of a batch in a forward pass."""
    with TrialPass(_own(net)) as found:
        net.run(batch)
    return found.peak


def suspended_walk(
    pruned: Network,
    dense: Network | None,
    batches: Batches,
    requests: Sequence[Request],
    wiring: Wiring,
    consumers: Mapping[str, tuple[ReluConsumer, ReluConsumer]],
    store: Store,
    example: Any,
    bar: Bar,
) -> Iterator[Measurement]:
    """Measure at the requests, in the order of their first calls, in one forward pass of each network for each batch.

    A module that is called several times costs one more pass: it is measured at all its calls, uncorrected, in passes
    to the end; then the passes start again. A batch whose pass does not call a requested module, or calls it after a
    later one, is not measured there. The inputs of a BatchNorm that alone reads a layer follow from the layer's moments
    by arithmetic. The dense network runs before the walk, or beside the pruned one where a probe needs both side by
    side. Raises LayerError, ModelMismatchError, NonFiniteError.
    """
    apart: dict[str, Calls] = {}
    beside = dense is not None and any(each.probe.side_by_side for each in requests)
    of_pruned, of_dense = ({name: pair[side] for name, pair in consumers.items()} for side in (0, 1))
    both = [SuspensionPoints(pruned, requests, of_pruned, is_dense=False)]
    if dense is not None and beside:
        compared = [each for each in requests if each.probe.dense]
        both.append(SuspensionPoints(dense, compared, of_dense, is_dense=True))
    with ExitStack() as stack, threads_kept():
        for points in both:
            points.hook(stack)
        networks = [SuspendedPasses(points, batches) for points in both]
        for passes in networks:
            stack.callback(passes.keep, 0)
        largest = max(batches.counts, default=0) / count_images(example)
        wirings = [wiring]
        if dense is not None and beside:
            wirings.append(observe(dense.model, lambda: dense.run(example)))
        # a network that draws random numbers runs one pass after the other, so that their order is fixed
        count = 1 if any(each.draws_random_numbers for each in wirings) else len(batches)
        needed = int(sum(each.bytes_made for each in wirings) * largest) * len(batches)
        if needed <= store.budget // 2:  # all activations of all passes fit
            workers, threads = at_a_time(pruned.device, count)
            store.set_aside(needed)
        else:
            shared = SharedStore(store)
            for passes in networks:
                passes.run_trial(example)
                passes.shared = shared
            peak = int(sum(passes.peak for passes in networks) * largest)
            workers, threads = at_a_time(pruned.device, count, store.budget // 2, peak)
            store.set_aside(workers * peak)
            needed = peak * len(batches)
        stack.enter_context(heap(needed, store.budget))
        if dense is not None and not beside:
            apart = measure_apart(dense, batches, requests, store, bar, wiring.largest_bytes / count_images(example))
        store.reserve += THREAD * len(networks) * len(batches)
        for passes in networks:
            passes.threads = threads
        second = networks[1] if beside else None
        walk = SuspendedWalk(networks[0], second, requests, wiring, consumers, PassRunner(workers), bar)
        for measurement in walk.measurements():
            yield complete(measurement, apart)
