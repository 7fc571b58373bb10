"""The node-major walk: one forward pass, stopping at each module once all before it is final, for all the images.

Between two stops nothing needs all the images at once, so each batch runs through that stretch in one go, dense and
pruned in lockstep, and is measured where the stretch ends, while its activations are still warm. Only then does the
next stretch begin, again with the first batch. What one stretch leaves to the next is kept in a `storage.Store`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce

from torch import Tensor, fx

import asr_kernels as ak

from ..data.batches import Batches
from ..network.runner import Network, check_finite
from ..network.wiring import Gate, Wiring
from ..runtime.activations import Frame, Store
from ..utils.progress import Bar
from .deferred import Correction, mergeable
from .probes import Calls, Stop, Visit, merge_folds
from .relu_targets import Seen, aim
from .segments import cut, run_step


def node_walk(
    pruned: Track,
    dense: Track | None,
    batches: Batches,
    stops: Sequence[Stop],
    wiring: Wiring,
    gates: Mapping[str, tuple[Gate, Gate]],
    bar: Bar,
) -> Iterator[Visit]:
    """Visit `stops`, in the order of execution, in one pass over the images; each module must be called once.

    The moments of what a BatchNorm reads follow by arithmetic where it alone reads a layer that was just measured and
    corrected. Raises NonFiniteError.
    """
    behind: dict[str, Calls] = {}  # by BatchNorm: the moments of what reaches it, batch by batch
    batches_of = {stop.name: stop.batches for stop in stops}
    for part, stop in enumerate(stops):
        follower = "" if stop.refit else wiring.batchnorm_of.get(stop.name, "")
        known = stop.name in behind
        measured = 0 if known or stop.refit else max(stop.batches, batches_of.get(follower, 0))
        last = max(later.batches for later in stops[part:])
        last_dense = max((later.batches for later in stops[part:] if later.dense), default=0) if dense else 0
        visit, found = Visit(stop.name), dict(enumerate(behind.pop(stop.name, [])))
        originals: dict[int, ak.ChannelMoments] = {}
        pairs: dict[int, ak.PairedMoments] = {}
        order = range(last if measured or pruned.parts[part].steps else 0)
        # there and back again: what one stretch wrote last is still in the cache when the next one reads it first
        for index in order if part % 2 == 0 else reversed(order):
            y = dense.advance(part, index, batches) if dense is not None and index < last_dense else None
            x = pruned.advance(part, index, batches)
            bar.advance(stop.name, batches.counts[index])
            if index < stop.batches and stop.refit and dense is not None:
                by_fold = pruned.net.patches(stop.name, index, x, dense.net, y, batches, stop.folds)
                visit.folds = merge_folds(visit.folds, by_fold)
            elif index < stop.batches and stop.paired and y is not None:
                pruned.net.check_tensor(stop.name, x)
                pairs[index] = ak.paired_moments(y, x, pruned.net.axis(stop.name))
                originals[index] = pairs[index].dense
            elif index < stop.batches and stop.dense and y is not None:
                originals[index] = pruned.net.moments(stop.name, y)
            if index < measured:
                # not of the pair: a run that resumes between a layer and its BatchNorm has none, and must find the same
                found[index] = pruned.net.moments(stop.name, x)
        moments = [found[index] for index in sorted(found)]
        visit.calls = _pooled(stop.name, moments[: stop.batches])
        visit.dense = _pooled(stop.name, [originals[index] for index in sorted(originals)])
        visit.pairs = [reduce(lambda a, b: a.merge(b), [pairs[index] for index in sorted(pairs)])] if pairs else []
        if follower in batches_of:
            behind[follower] = moments
            if batches_of[follower] == len(moments) > 0:
                # to be pooled anyway: correct the sum of them, not each
                behind[follower] = visit.calls if len(moments) <= stop.batches else _pooled(stop.name, moments)

        def correct(gain: Tensor, shift: Tensor, part: int = part, follower: str = follower) -> None:
            pruned.correct(part, gain, shift)
            if follower in behind:
                behind[follower] = [each.affine(gain, shift) for each in behind[follower]]

        visit.correct = correct
        if dense is not None and stop.name in gates:
            seen = partial(_again, pruned, dense, part, stop.batches)
            visit.aim = partial(aim, pruned.net, dense.net, stop.name, gates[stop.name], seen)
        yield visit


def _again(pruned: Track, dense: Track, part: int, batches: int) -> Iterator[Seen]:
    """What was measured at the end of a part, batch by batch, and what is added to the layer's output."""
    for index in range(batches):
        yield *pruned.again(part, index), *dense.again(part, index)


class Track:
    """One network on its way through its graph, from stop to stop, for every batch."""

    def __init__(
        self,
        net: Network,
        graph: fx.Graph,
        stops: Sequence[Stop],
        store: Store,
        others: Mapping[str, fx.Node | None],
        is_dense: bool = False,
    ) -> None:
        self.net, self.store, self.others = net, store, others
        self.parts = cut(graph, net, stops, others, is_dense)
        self.frames: list[Frame] = []
        self.pending: _Due | None = None

    def advance(self, part: int, index: int, batches: Batches) -> Tensor:
        """Run the part before one stop for one batch; returns what is measured there."""
        if index == len(self.frames):
            self.frames.append(Frame(self.store))
        frame, stretch, due = self.frames[index], self.parts[part], self._due(part)
        wanted = stretch.reads if due is None else {*stretch.reads, due.source}
        values = frame.open([source for source in wanted if source in frame], stretch.keep)
        if due is not None and due.reader is None and due.source in values:
            due.correction.apply(values[due.source])
        with self.net.precision():
            for step in stretch.steps:
                if due is not None and step.node is due.reader:
                    values[step.node] = due.correction.through_batchnorm(values.pop(due.source))
                else:
                    run_step(self.net, step, values, lambda: batches[index])
        result = values[stretch.source]
        frame.close({node: value for node, value in values.items() if node in stretch.keep}, stretch.keep)
        return result

    def again(self, part: int, index: int) -> tuple[Tensor, Tensor | None]:
        """What was measured at the end of a part for one batch, and what its gate adds to it, if anything."""
        frame, stretch = self.frames[index], self.parts[part]
        other = self.others[stretch.name]
        values = frame.open({stretch.source, other} - {None}, stretch.keep)
        found = values[stretch.source], values.get(other)
        frame.close({}, stretch.keep)
        return found

    def correct(self, part: int, gain: Tensor, shift: Tensor) -> None:
        """Have the output that this part ends with become gain * output + shift, when each batch is next in hand."""
        stopped_at = self.parts[part]
        self.pending = _Due(stopped_at.source, Correction(gain, shift, self.net.axis(stopped_at.name)))

    def _due(self, part: int) -> _Due | None:
        """The correction to make in this part: the pending one, in the first part that runs after it."""
        due = self.pending
        if due is not None and due.part is None:
            due.part = part
            readers = list(due.source.users)
            module = self.net.modules.get(str(readers[0].target)) if len(readers) == 1 else None
            if mergeable(module) is not None and readers[0] in {step.node for step in self.parts[part].steps}:
                due.reader, due.correction.batchnorm = readers[0], mergeable(module)
        return due if due is not None and due.part == part else None


@dataclass
class _Due:
    """A correction of stored outputs that is yet to be made: in place or, where a BatchNorm alone reads them, in it."""

    source: fx.Node
    correction: Correction
    part: int | None = None
    reader: fx.Node | None = None


def _pooled(name: str, moments: Calls) -> Calls:
    """One set of moments for all batches, as a list of one; of none, none."""
    if not moments:
        return []
    pooled = ak.ChannelMoments.pool(moments)
    if not (pooled.mean.isfinite() & pooled.m2.isfinite()).all():
        check_finite(name, enumerate(moments))
    return [pooled]
