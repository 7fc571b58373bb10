"""Measuring with hooks, whatever the control flow: all modules in one pass, or stop by stop, each pass ended early."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import asr_kernels as ak

from .batches import Batches, count_images
from .errors import LayerError, ModelMismatchError, called
from .gates import Seen, WatchSum, aim
from .graph import Gate, Wiring
from .network import Network, check_finite
from .progress import Bar
from .stops import Calls, Stop, Visit, merge_calls, merge_folds


class _ReachedError(BaseException):
    """Ends a forward pass early. Not an Exception, lest a model's own handler take it."""


def measure(net: Network, batches: Iterable[Any], names: Iterable[str]) -> dict[str, Calls]:
    """Moments at each named module, one per call, over all batches, as the network is now: one pass per batch.

    Raises NonFiniteError.
    """
    found: dict[str, Calls] = {name: [] for name in names}
    for index, batch in enumerate(batches):
        _measure_batch(net, batch, index, found)
    return found


def prefix_walk(
    pruned: Network,
    dense: Network | None,
    batches: Batches,
    stops: Sequence[Stop],
    wiring: Wiring,
    gates: Mapping[str, tuple[Gate, Gate]],
    bar: Bar,
) -> Iterator[Visit]:
    """Visit `stops`, in the order of their first calls, by one early-stopped pass over the images for each.

    The dense network is measured in one pass at the start or, for stops that are paired, beside the pruned one.
    """
    wanted: dict[str, Calls] = {}
    if dense is not None:
        unpaired = [stop for stop in stops if stop.dense and not stop.paired]
        for count in {stop.batches for stop in unpaired}:
            wanted |= measure(dense, batches.head(count), [stop.name for stop in unpaired if stop.batches == count])
    for stop in stops:
        visit, last = Visit(stop.name, dense=wanted.get(stop.name, [])), (stop.name, wiring.calls[stop.name])
        for index, batch in enumerate(batches.head(stop.batches)):
            if stop.refit and dense is not None:
                for x, y in _reads_and_wanted(dense, pruned, batch, last, stop.wide):
                    by_fold = pruned.patches(stop.name, index, x, dense, y, batches, stop.folds)
                    visit.folds = merge_folds(visit.folds, by_fold)
            elif stop.paired and dense is not None:
                pairs = _pair_batch(dense, pruned, batch, index, last)
                visit.pairs = merge_calls(visit.pairs, pairs)
            else:
                _measure_batch(pruned, batch, index, {stop.name: visit.calls}, last)
            bar.advance(stop.name, count_images(batch))
        if dense is not None and stop.name in gates:
            seen = partial(_again, pruned, dense, batches, stop, gates[stop.name])
            visit.aim = partial(aim, pruned, dense, stop.name, gates[stop.name], seen)
        yield visit.take_pairs()


def _again(pruned: Network, dense: Network, batches: Batches, stop: Stop, gates: tuple[Gate, Gate]) -> Iterator[Seen]:
    """What a layer reads and what the dense one puts out, batch by batch, each with what is added to the output."""
    for batch in batches.head(stop.batches):
        read = _at_gate(pruned, batch, stop.name, gates[0], of_inputs=True)
        wanted = _at_gate(dense, batch, stop.name, gates[1], of_inputs=False)
        if read is not None and wanted is not None:
            yield *read, *wanted


def _at_gate(net: Network, batch: Any, name: str, gate: Gate, of_inputs: bool) -> tuple[Tensor, Tensor | None] | None:
    """A layer's input, or its output, for one batch, and what is added to the output behind it.

    None where the batch never reaches it. Raises LayerError where a sum that was seen once does not come.
    """
    found: list[Tensor] = []
    added: list[Tensor] = []

    def add(other: Tensor) -> None:
        added.append(other.clone())
        raise _ReachedError

    watch = WatchSum(add)

    def at_layer(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        found.append((args[0] if of_inputs else output).clone())
        watch.watched = output
        if not gate.adds:
            raise _ReachedError

    def at_batchnorm(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        watch.watched = output

    handles = [net.modules[name].register_forward_hook(at_layer)]
    if gate.batchnorm is not None:
        handles.append(net.modules[gate.batchnorm].register_forward_hook(at_batchnorm))
    try:
        with watch, suppress(_ReachedError):
            net.run(batch)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        return None
    if gate.adds and not added:
        raise LayerError(name, "what is added to its output is not the same for all batches; pass relu_aware=False")
    return found[0], added[0] if added else None


def screen(nets: Sequence[Network], batches: Iterable[Any], skipped: Counter[str]) -> Iterator[Any]:
    """The batches without the images that give a NaN or infinite activation in any network; counts those as "images".

    The networks are taken as they are. An opaque batch (not a tensor) goes whole.
    """
    for batch in batches:
        images = count_images(batch)
        good = torch.ones(images, dtype=torch.bool)

        def take(name: str, x: Tensor, good: Tensor = good) -> None:
            finite = x.isfinite().flatten(1).all(1).cpu() if x.dim() > 1 else x.isfinite().all().cpu()
            good &= finite if finite.shape == good.shape else finite.all()

        with ExitStack() as stack:
            for net in nets:
                stack.enter_context(net.hooked(net.observed(), take))
            for net in nets:
                net.run(batch)
        if not isinstance(batch, Tensor):
            good &= good.all()
        skipped["images"] += images - int(good.sum())
        if good.all():
            yield batch
        elif good.any():
            yield batch[good.to(batch.device)]


def _measure_batch(
    net: Network, batch: Any, index: int, found: dict[str, Calls], last: tuple[str, int] | None = None
) -> None:
    """Merge one batch's moments at the named modules into those found so far, call by call.

    They are taken at once, for what follows may work in place. Whether they are finite is asked when all are there, so
    that a GPU waits but once.
    """
    calls_of: Counter[str] = Counter()

    def take(name: str, x: Tensor) -> None:
        calls, call = found[name], calls_of[name]
        calls_of[name] += 1
        if call < len(calls):
            calls[call] = net.moments(name, x, running=calls[call])
        else:
            calls.append(net.moments(name, x))

    _run(net, batch, found, take, last)
    seen = [t for calls in found.values() for moments in calls for t in (moments.mean, moments.m2)]
    if seen and not torch.cat(seen).isfinite().all():
        for name, calls in found.items():
            check_finite(name, [(index, moments) for moments in calls])


def _reads_and_wanted(
    dense: Network, pruned: Network, batch: Any, last: tuple[str, int], wide: bool
) -> list[tuple[Tensor, Tensor]]:
    """What one layer reads in the pruned network, and what it puts out (`wide`: reads) in the dense one, by call."""
    name, wanted = last[0], list[Tensor]()
    if wide:
        wanted = _reads(dense, batch, last)
    else:
        _run(dense, batch, [name], lambda _, y: wanted.append(y.clone()), last)
    reads = _reads(pruned, batch, last)
    if len(reads) != len(wanted):
        raise ModelMismatchError(f"{called(name)} runs {len(reads)} times in the model, {len(wanted)} in the dense one")
    return list(zip(reads, wanted, strict=True))


def _reads(net: Network, batch: Any, last: tuple[str, int]) -> list[Tensor]:
    """What one layer reads, call by call."""
    found: list[Tensor] = []
    keep = net.modules[last[0]].register_forward_pre_hook(lambda module, args: found.append(args[0].clone()))
    try:
        _run(net, batch, [last[0]], lambda _, x: None, last)
    finally:
        keep.remove()
    return found


def _pair_batch(
    dense: Network, pruned: Network, batch: Any, index: int, last: tuple[str, int]
) -> list[ak.PairedMoments]:
    """Paired moments of one batch at one layer, call by call."""
    name, pairs = last[0], list[ak.PairedMoments]()
    originals: list[Tensor] = []
    _run(dense, batch, [name], lambda _, x: originals.append(x.clone()), last)

    def take(name: str, x: Tensor) -> None:
        pruned.check_tensor(name, x)
        if len(pairs) == len(originals):
            raise ModelMismatchError(f"{called(name)} runs more often in the model than in the dense one")
        pairs.append(ak.paired_moments(originals[len(pairs)], x, pruned.axis(name)))
        check_finite(name, [(index, pairs[-1].pruned), (index, pairs[-1].dense)])

    _run(pruned, batch, [name], take, last)
    return pairs


def _run(
    net: Network, batch: Any, names: Iterable[str], take: Callable[[str, Tensor], None], last: tuple[str, int] | None
) -> None:
    """One pass with `take` hooked in, ended once the module `last[0]` has been called `last[1]` times."""
    turns: Counter[str] = Counter()

    def count(name: str, x: Tensor) -> None:
        take(name, x)
        turns[name] += 1
        if last == (name, turns[name]):
            raise _ReachedError

    with net.hooked(names, count), suppress(_ReachedError):
        net.run(batch)
