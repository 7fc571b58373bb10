"""The walk by suspended forward passes: those of all batches stop at a layer, it is changed, and they go on.

Each batch has one pass through the pruned network, and one through the dense network where the two are compared image
by image. A pass is suspended within a hook, before or after a layer, or where something is added to what it puts out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

import asr_kernels as ak

from ..data.batches import Batches, count_images
from ..errors import ModelMismatchError, called
from ..network.runner import Network, check_finite
from ..network.wiring import Gate, Wiring, observe, same_output
from ..runtime.activations import Store
from ..runtime.heap import heap
from ..runtime.passes import Crew, Pass, at_a_time, end, threads_kept
from ..utils.progress import Bar
from .measure import measure_apart
from .pass_memory import Live, Rehearsal, Shelf, Spent, Trial, identities
from .probes import Calls, Stop, Visit, merge_calls, merge_folds
from .relu_targets import Seen, aim
from .suspension import Position, Route

THREAD = 512 << 10  # bytes that the thread of a suspended pass takes, its stack and torch's own state


class Track:
    """The passes of one network, one for each batch, begun when they are first resumed.

    shelf: where the values of suspended passes are kept when memory is short; None keeps all of them in memory.
    """

    def __init__(self, route: Route, batches: Batches) -> None:
        self.route, self.batches = route, batches
        self.threads: int | None = None
        self.shelf: Shelf | None = None
        self.peak, self.spent = 0, dict[str, Spent]()
        self.foreign: Set[int] = set()
        self.passes: dict[int, tuple[Pass, Position]] = {}

    def rehearse(self, example: Any) -> None:
        """Learn from a small batch which values are read no more behind a stop, and how many bytes are in use at most.

        What was learned is tried: each such value is overwritten, and the output must be the same.
        """
        rehearsal = Rehearsal(_own(self.route.net))
        expected = self._example(example, rehearsal)
        self.foreign, self.peak, self.spent = rehearsal.foreign, rehearsal.peak, rehearsal.spent()
        try:
            as_expected = same_output(expected, self._example(example, Trial(self.foreign, self.spent)))
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # of a value that was overwritten
            as_expected = False
        if not as_expected:
            self.spent = {}

    def _example(self, example: Any, live: Rehearsal | Trial) -> Any:
        """The output of a small batch, in a pass that is not suspended."""
        here = Position(0, live)
        each = Pass(partial(self.route.run, here, lambda: example), here)
        try:
            Crew(1).run([iter([each])])
        finally:
            end([each])
        return here.output

    def position(self, index: int) -> Position:
        """Where the pass of this batch is."""
        return self._pass(index)[1]

    def at(self, index: int, name: str) -> bool:
        """Is the pass of this batch suspended at this stop?"""
        each, here = self._pass(index)
        return not each.ended and here.at == name and name in self.route.ahead

    def ended(self, index: int) -> bool:
        """Has the pass of this batch ended?"""
        return self._pass(index)[0].ended

    def to_next(self, index: int) -> Iterator[Pass]:
        """The pass of this batch, to resume it, unless it waits at a stop ahead or has ended."""
        each, here = self._pass(index)
        if not each.ended and here.at not in self.route.ahead:
            yield each
            if each.again:
                del self.passes[index]
                yield self._pass(index, whole=True)[0]

    def rest(self, index: int) -> None:
        """The pass of this batch is suspended and measured."""
        each, here = self._pass(index)
        if not each.ended:
            here.rest()

    def keep(self, count: int) -> None:
        """Cancel the passes of all but the first batches."""
        end(self.passes.pop(index)[0] for index in list(self.passes) if index >= count)

    def _pass(self, index: int, whole: bool = False) -> tuple[Pass, Position]:
        """The pass of a batch. whole: it keeps what a rehearsal says that it will not read."""
        if index not in self.passes:
            live = None if self.shelf is None else Live(self.foreign, self.shelf, {} if whole else self.spent)
            here = Position(index, live)
            run = partial(self.route.run, here, partial(self.batches.__getitem__, index))
            self.passes[index] = Pass(run, here, self.threads, None if live is None else live.finish), here
        return self.passes[index]


@dataclass
class SuspendedWalk:
    """One walk over the stops of `stops`, which are in the order of their first calls. See `suspended_walk`."""

    pruned: Track
    dense: Track | None
    stops: Sequence[Stop]
    wiring: Wiring
    gates: Mapping[str, tuple[Gate, Gate]]
    crew: Crew
    bar: Bar
    behind: dict[str, Calls] = field(default_factory=dict)  # by BatchNorm: the moments of what reaches it, by batch

    def visits(self) -> Iterator[Visit]:
        """Visit the stops, each when all before it are final."""
        threads = torch.get_num_threads()
        for part, stop in enumerate(self.stops):
            if self.pruned.threads is not None:
                # the threads of a team spin for a while when their work is done, on the cores that the passes need:
                # there is no team of this thread but for a refit, whose products and solutions take longer than that
                torch.set_num_threads(threads if stop.refit else self.pruned.threads)
            yield self._visit(part, stop)
            for track in self._tracks():
                track.route.ahead.discard(stop.name)
                if self._called_again(stop):
                    track.keep(0)

    def _tracks(self) -> list[Track]:
        return [track for track in (self.pruned, self.dense) if track is not None]

    def _called_again(self, stop: Stop) -> bool:
        """Is the module called several times in a forward pass? Then the passes begin anew behind it."""
        return self.wiring.calls[stop.name] > 1

    def _visit(self, part: int, stop: Stop) -> Visit:
        name, again = stop.name, self._called_again(stop)
        batches_of = {each.name: each.batches for each in self.stops}
        follower = "" if stop.refit or again else self.wiring.batchnorm_of.get(name, "")
        known = self.behind.pop(name, None)
        measured = 0 if known is not None else max(stop.batches, batches_of.get(follower, 0))
        found = _Found(stop, measured)
        order = self._order(part, measured)
        with self._only(name) if again else nullcontext():
            # passes that are not to be corrected behind the stop need not wait for one another
            size = self.crew.size if again or stop.refit else max(len(order), 1)
            for some in (order[at : at + size] for at in range(0, len(order), size)):
                self._measure(stop, some, found)
        visit = found.visit(known or [])
        if follower in batches_of:
            self.behind[follower] = moments = found.moments()
            if batches_of[follower] == len(moments) > 0:
                # to be pooled anyway: correct the sum of them, not each
                few = len(moments) <= stop.batches
                self.behind[follower] = visit.calls if few else _pooled(name, dict(enumerate(moments)))

        def correct(gain: Tensor, shift: Tensor) -> None:
            if again:
                return
            self.pruned.route.correct(name, gain, shift, self.wiring.batchnorm_of.get(name, ""))
            if follower in self.behind:
                self.behind[follower] = [each.affine(gain, shift) for each in self.behind[follower]]

        visit.correct = correct
        if self.dense is not None and name in self.gates:
            nets = self.pruned.route.net, self.dense.route.net
            visit.aim = partial(aim, *nets, name, self.gates[name], partial(self._seen, stop))
        return visit

    def _order(self, part: int, measured: int) -> Sequence[int]:
        """The batches whose passes are to come to a stop; passes that no stop up to the next restart needs end here.

        From the last to the first at every other stop: the activations of the last are in the cache.
        """
        ends = [at for at, stop in enumerate(self.stops) if at >= part and self._called_again(stop)]
        later = self.stops[part : ends[0] + 1 if ends else None]
        last = max(each.batches for each in later)
        self.pruned.keep(max(last, measured))
        if self.dense is not None:
            self.dense.keep(max((each.batches for each in later if each.dense), default=0))
        # behind a layer all wait, to be corrected; before a module only those that are measured
        count = max(last, measured) if self.pruned.route.where[self.stops[part].name] == "output" else measured
        return range(count) if part % 2 == 0 else range(count - 1, -1, -1)

    @contextmanager
    def _only(self, name: str) -> Iterator[None]:
        """Suspend passes at this stop alone."""
        before = [(track.route, track.route.ahead) for track in self._tracks()]
        try:
            for route, ahead in before:
                route.ahead = ahead & {name}
            yield
        finally:
            for route, ahead in before:
                route.ahead = ahead

    def _measure(self, stop: Stop, indices: Sequence[int], found: _Found) -> None:
        """Measure some batches at a stop: at the first call, or at all calls of a module that is called again."""
        self.crew.run(self._come(stop, index, found) for index in indices)
        while stop.refit or self._called_again(stop):
            here = [index for index in indices if self.pruned.at(index, stop.name)]
            for index in indices if stop.refit else ():
                if index in here:
                    found.add_patches(self._patches(stop, index))
                for track in self._tracks():
                    track.rest(index)
            if not here or not self._called_again(stop):
                return
            for track in self._tracks():
                for index in here:
                    track.position(index).at = None
            self.crew.run(self._come(stop, index, found) for index in here)

    def _come(self, stop: Stop, index: int, found: _Found) -> Iterator[Pass]:
        """Bring the passes of one batch to a stop, and measure what is small there."""
        name, net, compared = stop.name, self.pruned.route.net, stop.refit or stop.paired
        dense = self.dense if self.dense is not None and stop.dense and index < stop.batches else None
        if dense is not None:
            yield from dense.to_next(index)
        yield from self.pruned.to_next(index)
        self.bar.advance(name, self.pruned.batches.counts[index])
        ours, theirs = self.pruned.at(index, name), dense is not None and dense.at(index, name)
        if dense is not None and compared and ours != theirs:
            calls = len(found.pairs.get(index, []))
            raise ModelMismatchError(
                f"{called(name)} runs {calls + ours} times in the model, {calls + theirs} in the dense one"
            )
        if stop.refit:
            return
        if theirs and dense is not None:
            y = dense.position(index).value
            if stop.paired:
                x = self.pruned.position(index).value
                for each in (x, y):
                    net.check_tensor(name, each)
                found.pairs.setdefault(index, []).append(ak.paired_moments(y, x, net.axis(name)))
            else:
                found.dense.setdefault(index, []).append(net.moments(name, y))
        if ours and index < found.measured:
            # not of the pair: a run that resumes between a layer and its BatchNorm has none, and must find the same
            found.calls.setdefault(index, []).append(net.moments(name, self.pruned.position(index).value))
        for track in self._tracks():
            track.rest(index)

    def _patches(self, stop: Stop, index: int) -> dict[int, ak.PatchMoments]:
        assert self.dense is not None
        x, y = (track.position(index).value for track in (self.pruned, self.dense))
        net, batches = self.pruned.route.net, self.pruned.batches
        return net.patches(stop.name, index, x, self.dense.route.net, y, batches, stop.folds)

    def _seen(self, stop: Stop) -> Iterator[Seen]:
        """What was measured at a stop, batch by batch, and what is added to the layer's output."""
        assert self.dense is not None
        for index in range(stop.batches):
            if self.pruned.at(index, stop.name):
                here, there = self.pruned.position(index), self.dense.position(index)
                with here.in_memory(), there.in_memory():
                    yield here.value, here.added, there.value, there.added


@dataclass
class _Found:
    """What was measured at a stop: by batch, one set of moments for each call; patch moments over all."""

    stop: Stop
    measured: int
    calls: dict[int, Calls] = field(default_factory=dict)
    dense: dict[int, Calls] = field(default_factory=dict)
    pairs: dict[int, list[ak.PairedMoments]] = field(default_factory=dict)
    folds: dict[int, ak.PatchMoments] = field(default_factory=dict)

    def add_patches(self, found: dict[int, ak.PatchMoments]) -> None:
        """Add the patch moments of one batch."""
        self.folds = merge_folds(self.folds, found)

    def moments(self) -> Calls:
        """The moments of a module that is called once, batch by batch."""
        return [self.calls[index][0] for index in sorted(self.calls)]

    def visit(self, known: Calls) -> Visit:
        """All batches together, in their order; `known` are the moments of a module that was not measured."""
        name, count = self.stop.name, self.stop.batches
        calls = {index: [each] for index, each in enumerate(known)} | self.calls
        visit = Visit(name, folds=self.folds)
        visit.calls = _by_call(name, {index: each for index, each in calls.items() if index < count})
        pairs = [self.pairs[index] for index in sorted(self.pairs)]
        visit.pairs = reduce(merge_calls, pairs) if pairs else []
        visit.dense = _by_call(name, self.dense) if not pairs else [pair.dense for pair in visit.pairs]
        return visit


def _by_call(name: str, found: Mapping[int, Calls]) -> Calls:
    """Over all batches, in their order, one set of moments for each call; a batch may have fewer than another."""
    longest = max(map(len, found.values()), default=0)
    return [
        each
        for call in range(longest)
        for each in _pooled(name, {index: found[index][call] for index in sorted(found) if len(found[index]) > call})
    ]


def _pooled(name: str, moments: Mapping[int, ak.ChannelMoments]) -> Calls:
    """One set of moments for all batches, as a list of one; of none, none. Raises NonFiniteError."""
    if not moments:
        return []
    pooled = ak.ChannelMoments.pool(list(moments.values()))
    if not (pooled.mean.isfinite() & pooled.m2.isfinite()).all():
        check_finite(name, moments.items())
    return [pooled]


def _own(net: Network) -> set[int]:
    """The identities of the storages of a model's parameters and buffers."""
    return identities([*net.model.parameters(), *net.model.buffers()])


def peak_memory(net: Network, batch: Any) -> int:
    """The most bytes of activations of a batch that are in use at once in a forward pass."""
    with Rehearsal(_own(net)) as found:
        net.run(batch)
    return found.peak


def suspended_walk(
    pruned: Network,
    dense: Network | None,
    batches: Batches,
    stops: Sequence[Stop],
    wiring: Wiring,
    gates: Mapping[str, tuple[Gate, Gate]],
    store: Store,
    example: Any,
    bar: Bar,
) -> Iterator[Visit]:
    """Visit `stops`, in the order of their first calls, in one forward pass of each network for each batch.

    A module that is called several times costs one pass more: it is measured at all its calls, uncorrected, in passes
    to the end, and those behind it begin anew. A batch that passes a stop by, or comes to it after a later one, is not
    measured there. The moments of what a BatchNorm reads follow by arithmetic where it alone reads a layer that was
    just measured and corrected. The dense network is measured in passes before, or beside the pruned one where a stop
    is `paired` or a `refit`. Raises LayerError, ModelMismatchError, NonFiniteError.
    """
    wanted: dict[str, Calls] = {}
    beside = dense is not None and any(stop.paired or stop.refit for stop in stops)
    of_pruned, of_dense = ({name: pair[side] for name, pair in gates.items()} for side in (0, 1))
    routes = [Route(pruned, stops, of_pruned, is_dense=False)]
    if dense is not None and beside:
        routes.append(Route(dense, [stop for stop in stops if stop.dense], of_dense, is_dense=True))
    with ExitStack() as stack, threads_kept():
        for route in routes:
            route.hook(stack)
        tracks = [Track(route, batches) for route in routes]
        for track in tracks:
            stack.callback(track.keep, 0)
        largest = max(batches.counts, default=0) / count_images(example)
        wirings = [wiring]
        if dense is not None and beside:
            wirings.append(observe(dense.model, lambda: dense.run(example)))
        # what draws random numbers draws them in order, one pass after the other
        passes = 1 if any(each.draws for each in wirings) else len(batches)
        needed = int(sum(each.made for each in wirings) * largest) * len(batches)
        if needed <= store.budget // 2:  # there is room for whatever the passes make
            lanes, threads = at_a_time(pruned.device, passes)
            store.set_aside(needed)
        else:
            shelf = Shelf(store)
            for track in tracks:
                track.rehearse(example)
                track.shelf = shelf
            peak = int(sum(track.peak for track in tracks) * largest)
            lanes, threads = at_a_time(pruned.device, passes, store.budget // 2, peak)
            store.set_aside(lanes * peak)
            needed = peak * len(batches)
        stack.enter_context(heap(needed, store.budget))
        if dense is not None and not beside:
            wanted = measure_apart(dense, batches, stops, store, bar, wiring.largest / count_images(example))
        store.reserve += THREAD * len(tracks) * len(batches)
        for track in tracks:
            track.threads = threads
        walk = SuspendedWalk(tracks[0], tracks[1] if beside else None, stops, wiring, gates, Crew(lanes), bar)
        for visit in walk.visits():
            visit.dense = visit.dense or wanted.get(visit.name, [])
            yield visit
