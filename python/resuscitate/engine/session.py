"""A session: networks prepared for measuring, and everything about the process that is put back afterwards."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import reduce
from itertools import zip_longest
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..data.batches import Batches, cut, read_share
from ..data.calibration import hold, is_held
from ..data.checks import run_first
from ..errors import DistributedError, LayerError, ModelMismatchError, NonFiniteError, called
from ..network.channel_matching import find_kept_channels, is_smaller
from ..network.channels import KeptChannels
from ..network.runner import Network, check_tensors
from ..network.snapshot import Snapshot, evaluation_mode, moved_to, set_seed
from ..network.wiring import Wiring, observe
from ..runtime.activations import Store
from ..runtime.distributed import Ranks
from ..runtime.options import RunOptions, as_dtype
from ..statistics.base import Place, Statistic
from ..statistics.correlations import OutputCorrelations
from ..statistics.outputs import OutputMoments
from ..utils.nested import copied
from .graph_walk import GraphPasses, NoGraphError, graph_walk
from .measure import measure, screen
from .probes import Layer, Measurement, Request
from .room import in_memory, in_stores
from .suspended_walk import suspended_walk
from .walk import Walk

log = logging.getLogger("resuscitate")

S = TypeVar("S", bound=Statistic)
# Sessions of several threads follow one another: torch.fx changes `nn.Module` while it traces, and the random state,
# the number of intra-op threads and the settings of malloc are those of the process.
ONE_AT_A_TIME = threading.RLock()


class Session:
    """A context in which networks are measured: on the device, in eval mode, from a fixed random state.

    Leaving it puts all of that back. `writes`: the first network is changed; an error or an interrupt restores it, on
    all ranks, and `snapshot` is its copy. `measures=False`: only that, for a function that calls others which measure.
    `ranks`: those of the group of the options, if they are made already. `store` is the memory budget, `skipped` counts
    images left out for non-finite activations. `nets` are the networks, `net` the first of them, `dense` the second, if
    any. After `look`, `wiring` and `example` are the wiring of the first network and a small batch; after
    `match_channels`, `kept` are the dense channels that the first network has; after a walk, `walk_taken` is its kind.
    One thread at a time has sessions; the others wait.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        run: RunOptions,
        *,
        writes: bool = False,
        measures: bool = True,
        ranks: Ranks | None = None,
    ) -> None:
        self.models, self.run, self.writes, self.measures = models, run, writes, measures
        self.ranks = Ranks(run["group"]) if ranks is None else ranks
        self.skipped = Counter[str]()
        self.wiring, self.example, self.kept = Wiring(), None, KeptChannels()
        self.walk_taken = "none"

    def __enter__(self) -> Session:
        with ExitStack() as stack:
            stack.enter_context(ONE_AT_A_TIME)
            if self.writes:
                self.snapshot = stack.enter_context(Snapshot(self.models[0]))
            if self.measures:
                stack.enter_context(moved_to(self.run["device"], self.models))
                stack.enter_context(evaluation_mode(self.models, self.run["seed"]))
            if self.writes:
                stack.enter_context(self.snapshot.defer_interrupts_at_end())
            stack.enter_context(self.ranks.together())
            if self.measures:
                self._prepare(stack)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.stack.__exit__(kind, error, trace)
        if isinstance(error, NonFiniteError | LayerError):
            self._check_weights(error)

    def _check_weights(self, error: BaseException) -> None:
        """Raise LayerError for a parameter or a running statistic that is not finite: that is the likely cause."""
        for which, model in zip(("the model", "the dense model"), self.models, strict=False):
            statistics = [each for each in model.named_buffers() if each[0].endswith(("running_mean", "running_var"))]
            for name, tensor in [*model.named_parameters(), *statistics]:
                if tensor.is_floating_point() and not tensor.is_meta and not tensor.isfinite().all():
                    module, _, part = name.rpartition(".")
                    problem = f"{part!r} has values in {which} that are NaN or infinite; look at its checkpoint"
                    raise LayerError(module, problem) from error

    def _prepare(self, stack: ExitStack) -> None:
        precision = as_dtype(self.run["dtype"])
        self.nets = [Network(model, self.run["forward_fn"], precision) for model in self.models]
        self.net, self.dense = self.nets[0], self.nets[1] if len(self.nets) > 1 else None
        device, scratch = self.net.device, self.run["scratch"]
        self.store = self.image_store = stack.enter_context(Store(self.run["memory"], device, scratch))
        if device.type != "cpu":
            self.image_store = stack.enter_context(Store(None, torch.device("cpu"), scratch))

    @property
    def show(self) -> bool | None:
        """Whether to show progress: only rank 0 does."""
        return self.run["progress"] if self.ranks.rank == 0 else False

    def read(
        self, calibration: Any, *, most: int | None = None, marks: Iterable[int | None] = (), beside: bool = False
    ) -> Batches:
        """This rank's images, kept to be read again.

        most: read no more than this. marks: numbers of images after which a batch must end. beside: both networks run
        side by side later, which takes more memory per image.
        """
        room = in_stores(self.image_store, self.store, self.nets if beside else [self.net])
        store = None if is_held(calibration) else self.image_store
        return Batches(cut(self._images(calibration, most, room), marks), store)

    def stream(self, calibration: Any) -> Iterator[Any]:
        """This rank's batches, read once and not kept."""
        images = self._images(calibration, self.run["max_samples"], None)
        return iter(images) if is_held(calibration) else map(copied, images)

    def hold(self, calibration: Any) -> list[Any]:
        """This rank's batches, held in host memory, for a function that calls others which measure."""
        run, limit = self.run, in_memory(self.run["memory"], self.run["device"], self.models[0])
        return hold(calibration, self._images(calibration, run["max_samples"], limit))

    def _images(self, calibration: Any, most: int | None, room: Any) -> Iterable[Any]:
        run, raw = self.run, self.run["forward_fn"] is not None
        options: dict[str, Any] = {"max_batches": run["max_batches"], "batch_size": run["batch_size"], "room": room}
        images = read_share(calibration, self.ranks, max_samples=most, raw=raw, **options)
        skips = self.measures and run["on_nonfinite"] == "skip"
        return screen(self.nets, images, self.skipped) if skips else images

    def look(self, batches: Batches) -> Wiring:
        """Observe the wiring of the first network in a pass of a small batch, the first of any rank that has one."""
        self.example = self.ranks.lend(self.net.example(batches[0]) if len(batches) else None)
        set_seed(self.run["seed"], [self.net.device])  # again: what ran before may have drawn random numbers
        self.wiring = observe(self.net.model, lambda: run_first(self.net.run, self.example))
        return self.wiring

    def match_channels(self, given: Mapping[str, Any], batches: Iterable[Any]) -> KeptChannels:
        """Find the dense channels that the first network has kept, if it is smaller; see `find_kept_channels`.

        batches: to correlate outputs on, where weights and parameters do not decide.
        """
        assert self.dense is not None
        if given or is_smaller(self.net.model, self.dense.model):

            def correlations(names: Iterable[str]) -> dict[str, Tensor]:
                found = self.compare(batches, names, OutputCorrelations)
                return {name: statistic.correlations.cpu() for name, statistic in found.items()}

            self.kept = find_kept_channels(self.net, self.dense, self.example, given, correlations)
            set_seed(self.run["seed"], [self.net.device])  # again, as in `look`
        return self.kept

    def place(self, name: str) -> Place:
        """Where a statistic of this layer is measured."""
        dense = None if self.dense is None else self.dense.modules.get(name)
        return Place(name, self.net.modules[name], dense, self.kept)

    def layers(
        self, modules: Mapping[str, nn.Module], in_use: Mapping[str, Tensor], curvatures: Mapping[str, Tensor] = {}
    ) -> dict[str, Layer]:
        """The modules as a method sees them; `in_use` has the masks of their weights."""
        return {
            name: Layer(
                name,
                module,
                self.place(name).dense,
                in_use[name],
                name in self.wiring.products,
                self.ranks,
                self.kept,
                curvatures.get(name),
            )
            for name, module in modules.items()
        }

    def walk(
        self, batches: Batches, requests: Sequence[Request], title: str, known: Collection[str] = ()
    ) -> Generator[Measurement]:
        """Measure at each request when all earlier layers are final, merged over the ranks; see `measurements`.

        known: names whose updates are known already. They are measured nowhere, and not merged. Raises
        DistributedError, too, where the ranks do not run the same modules in the same order.
        """
        walk = Walk(self.nets, self.wiring, self.store, self.example, batches, requests, title, self.show, self.kept)
        self._check_order([each.name for each in walk.requests])
        with closing(measurements(walk)) as found:
            for measurement in found:
                if measurement.name not in known:
                    measurement.found = self.merged(measurement.found)
                measurement.note = walk.bar.note
                yield measurement
        self.walk_taken = walk.taken

    def measure_all(self, names: Collection[str], *passes: Iterable[Any]) -> dict[str, OutputMoments]:
        """`OutputMoments` at all named modules, in one pass of each network over its batches; nothing is corrected."""
        self._check_order(names)
        ours, *theirs = (measure(net, batches, names) for net, batches in zip(self.nets, passes, strict=True))
        merged = {}
        for name in names:
            statistic = OutputMoments(self.place(name))
            statistic.calls = ours[name]
            statistic.dense_calls = self.kept.of_moments(name, theirs[0][name]) if theirs else []
            merged[name] = self.merged(statistic)
        return merged

    def compare(self, batches: Iterable[Any], names: Iterable[str], statistic: type[S]) -> dict[str, S]:
        """A statistic of each named layer's outputs in both networks, each on its own activations.

        The dense outputs of one batch are held at a time. By layer, in the order of execution; a layer that no image
        reaches is left out. Raises ModelMismatchError, LayerError, NonFiniteError.
        """
        assert self.dense is not None
        found, order = {name: statistic(self.place(name)) for name in names}, dict[str, None]()
        kept: dict[str, list[Tensor]] = {}
        index = 0

        def keep(name: str, x: Any) -> None:
            check_tensors(name, x)
            kept.setdefault(name, []).append(x.clone())

        def add(name: str, x: Any) -> None:
            if not kept.get(name):
                raise ModelMismatchError(f"{called(name)} runs more often in the model than in the dense one")
            order[name] = None
            found[name].update(index, x, kept[name].pop(0))

        for index, batch in enumerate(batches):  # noqa: B007 - read by `add`
            kept.clear()
            with self.dense.hooked(found, keep):
                self.dense.run(batch)
            with self.net.hooked(found, add):
                self.net.run(batch)
        merged = {}
        for name in dict.fromkeys([*order, *found]) if self.ranks.size == 1 else found:
            found[name].finish(index + 1)
            if not (total := self.merged(found[name])).empty:
                merged[name] = total
        return merged

    def _check_order(self, names: Iterable[str]) -> None:
        """Raise DistributedError where the ranks measure other modules, or in another order."""
        if self.ranks.size == 1:
            return
        first, *others = self.ranks.exchange(list(names))
        for rank, other in enumerate(others, 1):
            if other != first:
                differing = next((a or b for a, b in zip_longest(first, other) if a != b), "")
                raise DistributedError(
                    f"rank {rank} runs other modules than rank 0, or in another order, from {called(differing)} on, "
                    "as where their first images differ in kind; shuffle the images"
                )

    def merged(self, found: S) -> S:
        """The statistic of all ranks, merged in the order of the ranks: the same bits on each."""
        if self.ranks.size == 1:
            return found
        states = self.ranks.exchange(found.state(), self.net.device)
        merged = reduce(lambda a, b: a.merge(b), (type(found).of_state(found.place, state) for state in states))
        merged.replay = found.replay
        return merged


def measurements(walk: Walk) -> Generator[Measurement]:
    """Take the graph walk where torch.fx traces the networks correctly, else the suspended walk.

    Measures at each request, in the order of execution, when the updates of all earlier modules are made. Close the
    generator to end the walk early. Raises LayerError, ModelMismatchError, NonFiniteError.
    """
    if not walk.requests:
        return
    with walk.bar:
        try:
            passes = [GraphPasses(walk, is_dense) for is_dense in ([False, True] if walk.beside else [False])]
            found, walk.taken = graph_walk(walk, *passes), "graph"
        except NoGraphError as cause:
            log.info("taking the suspended walk, not the graph walk: %s", cause)
            found, walk.taken = suspended_walk(walk), "suspended"
        yield from found
