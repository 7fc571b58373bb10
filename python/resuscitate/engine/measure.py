"""Moments at many modules in whole forward passes, without corrections; images with non-finite activations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..network.runner import Network, all_finite, check_finite, moments_at
from ..network.wiring import MadeTensors
from ..runtime.passes import Pass, PassRunner, at_a_time, current, end, threads_kept
from ..statistics.base import merge_calls
from ..statistics.outputs import Calls
from ..utils.nested import count_images

AHEAD = 16  # batches that are read before their passes begin, so that all cores have work
# Bytes of a large activation. glibc's heap of a thread other than the main one has 64 MiB and holds few of these; the
# others take new pages from the system each time.
LARGE = 16 << 20


class _KeptError(Exception):
    """The network keeps a tensor of a pass, such as a feature for a later layer, and may read that of another one."""


class _Worker:
    """Runs passes one after the other, and calls `after` after each. `calls`: the moments of the present batch."""

    def __init__(self, names: Iterable[str], after: Callable[[], object]) -> None:
        self.names, self.after = list(names), after
        self.calls: dict[str, Calls] = {}

    def run(self, net: Network, batches: Iterator[tuple[int, Any]], found: dict[int, dict[str, Calls]]) -> None:
        """Run the batches that no other worker has taken."""
        for index, batch in batches:
            self.calls = found[index] = {name: [] for name in self.names}
            net.run(batch)
            self.after()

    def run_beside(self, net: Network, batches: Iterator[tuple[int, Any]], found: dict[int, dict[str, Calls]]) -> None:
        """`run`, beside other workers; raises _KeptError where the network keeps a tensor of a pass."""
        for each in batches:
            with MadeTensors() as made:
                self.run(net, iter([each]), found)
            moments = [each for calls in self.calls.values() for each in calls]
            if made.kept(but=[tensor for each in moments for tensor in (each.mean, each.m2)]):
                raise _KeptError


def measure(
    net: Network,
    batches: Iterable[Any],
    names: Iterable[str],
    largest: float = 0.0,
    after: Callable[[], object] = lambda: None,
) -> dict[str, Calls]:
    """Moments at each named module over all batches, one set for each call of the module, in one pass per batch.

    On a CPU several passes run at a time, unless an activation is LARGE: `largest` is the number of bytes of the
    largest one per image, 0 if unknown. `after` is called after each pass, in its thread. Raises NonFiniteError.
    """
    found: dict[str, Calls] = {name: [] for name in names}
    alone = _Worker(found, after)

    def take(name: str, x: Tensor) -> None:
        (current() or alone).calls[name].append(moments_at(name, net.modules[name], x))

    ahead = max(AHEAD, torch.get_num_threads())
    source, most = enumerate(batches), ahead
    with torch.no_grad(), net.hooked(found, take), threads_kept():
        while some := list(islice(source, ahead)):
            if largest * max(count_images(batch) for _, batch in some) > LARGE:
                most = 1
            size, threads = at_a_time(net.device, min(len(some), most))
            drawn = torch.get_rng_state()
            found_in = None
            try:
                found_in = _run(net, some, alone, size, threads)
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception:  # `_KeptError`, or the model's own about a value of another pass
                if size == 1:
                    raise
            if found_in is None or (size > 1 and not torch.equal(drawn, torch.get_rng_state())):
                # one pass after the other; for a network that draws random numbers, so that their order is fixed
                torch.set_rng_state(drawn)
                most = 1
                found_in = _run(net, some, alone)
            in_order = {index: found_in[index] for index, _ in some}
            _check(in_order)
            for found_here in in_order.values():
                for name, calls in found_here.items():
                    found[name] = merge_calls(found[name], calls)
    return found


def _run(
    net: Network, some: Sequence[tuple[int, Any]], alone: _Worker, size: int = 1, threads: int | None = None
) -> dict[int, dict[str, Calls]]:
    """The moments of some batches, by their numbers: `size` passes at a time, or in this thread in worker `alone`."""
    found: dict[int, dict[str, Calls]] = {}
    if size == 1:
        alone.run(net, iter(some), found)
        return found
    waiting, workers = iter(some), [_Worker(alone.names, alone.after) for _ in range(size)]
    passes = [Pass(partial(worker.run_beside, net, waiting, found), worker, threads) for worker in workers]
    try:
        PassRunner(len(passes)).run(iter([each]) for each in passes)
    finally:
        end(passes)
    return found


def _check(found: dict[int, dict[str, Calls]]) -> None:
    """Raise NonFiniteError for the first batch and its first module with non-finite moments.

    One wait for a GPU where all are finite.
    """
    seen = [
        (name, index, x)
        for index, found_here in found.items()
        for name, calls in found_here.items()
        for moments in calls
        for x in (moments.mean, moments.m2)
    ]
    if not all_finite(x for _, _, x in seen):
        for name, index, x in seen:
            check_finite(name, [(index, x)])


def screen(nets: Sequence[Network], batches: Iterable[Any], skipped: Counter[str]) -> Iterator[Any]:
    """The batches without the images that give a NaN or infinite activation in any network.

    The images left out are counted in `skipped["images"]`. A batch that is no tensor is left out whole.
    """
    for batch in batches:
        images = count_images(batch)
        good = torch.ones(images, dtype=torch.bool)

        def take(name: str, x: Tensor, good: Tensor = good) -> None:
            fine = x.float().square().isfinite()  # a square that overflows is refused as well
            finite = fine.flatten(1).all(1).cpu() if x.dim() > 1 else fine.all().cpu()
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
