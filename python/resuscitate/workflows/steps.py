"""Repairs in several steps: the images, journals, options and report that `compress` and `regrow` share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from ..data.batches import Batches
from ..data.checks import warn_of_few
from ..engine.kept import KeptStatistics
from ..engine.probes import Request
from ..engine.session import Session
from ..errors import JournalError
from ..methods.base import Method, option_names
from ..network.copies import deep_copy
from ..network.layer_checks import split_by_objections
from ..network.layers import select_layers
from ..network.masks import Masks, in_use
from ..network.runner import first_images
from ..reports.agreement import Agreement, Nearness
from ..reports.base import UndoableReport, plain, terminal_table
from ..reports.repair import RepairReport
from ..runtime.journal import Journal, fingerprints
from ..runtime.options import RunOptions, identity_of, run_options
from ..utils.digest import MODULUS, digest_images, digest_model, fingerprint
from ..utils.files import check_ending
from .agreement import MOST, Judge
from .carry_out import carry_out
from .curvature import measure_curvatures
from .plan import Plan, make_plan


def plan_of_steps(call: str, dense: nn.Module, method: Method | str, options: Mapping[str, Any], **more: Any) -> Plan:
    """The plan of each repair, from run-time options and fields of the method, and `more`. Raises as `make_plan`."""
    run_options(call, {name: value for name, value in options.items() if name not in option_names()})
    plan = make_plan(call, dense, method=method, **options, **more)
    plan.check_dense(dense)
    return plan


def check_means(method: Method, option: str, count: int) -> None:
    """Raise ValueError for a method that gives layers means, after which they cannot be pruned or repaired again.

    option, count: of the function, and how many repairs it makes.
    """
    if count > 1 and getattr(method, "means", None) is not None:
        remedy = f"choose {option}=1, or another method here and a repair by this one afterwards"
        raise ValueError(f"method {method.name!r} gives means to pruned weights, and only once: {remedy}")


def options_of_steps(run: RunOptions) -> RunOptions:
    """The options of a step: the limits have been applied when the images were read."""
    return {**run, "max_samples": None, "max_batches": None}


def run_identity(run: RunOptions) -> dict[str, object]:
    """The run-time options that change more than rounding, for a journal."""
    return {**identity_of(run), "forward_fn": fingerprint(run["forward_fn"])}


class Steps:
    """Repairs by one plan, on `batches` of images held in host memory; `run` are the options of each step.

    resume: a folder for the journals of the steps, and for one of the run, which refuses another model or plan, other
    images, or other `choices`.
    """

    def __init__(
        self, session: Session, plan: Plan, calibration: Any, resume: str | Path | None, choices: Mapping[str, Any]
    ) -> None:
        self.run = options_of_steps(plan.run)
        self.plan, self.ranks = replace(plan, run=self.run), session.ranks
        self.folder = None if resume is None else Path(resume)
        if self.folder is not None:
            if self.folder.is_file():
                raise JournalError(f"{resume} is a file, and resume= takes a folder here; `repair` takes a file")
            self.folder.mkdir(parents=True, exist_ok=True)
        self.curvatures: Mapping[str, Tensor] = {}  # of the layers of the dense network, for all repairs that follow
        self.batches = session.hold(calibration)
        if plan.holds_out:
            warn_of_few(Batches(self.batches).different(session.ranks))
        if self.folder is not None:
            (images,) = session.ranks.total(digest_images(self.batches))
            # choices last: a `regrow` without repairs has no method, though its plan has one
            options = {**plan.identity(), **run_identity(plan.run), **fingerprints(choices)}
            identity = {"model": digest_model(session.models[0]), "images": images % MODULUS, "options": options}
            session.stack.enter_context(Journal(self.folder / "run.journal", identity, session.ranks))

    def example(self) -> Any:
        """Up to 32 images, the first ones of this rank or of the first rank that has any."""
        return self.ranks.lend(first_images(self.batches[0], MOST) if self.batches else None)

    def journal(self, step: str) -> Path | None:
        """The journal of a step; None without a folder."""
        return None if self.folder is None else self.folder / f"{step}.journal"

    @contextmanager
    def dense_statistics(self, dense: nn.Module) -> Iterator[KeptStatistics | None]:
        """What the method measures at each layer, measured with the inputs that the layer has in the dense network.

        None where the method measures outputs, which depend on a layer's own weights, or re-estimates BatchNorm.
        """
        if self.plan.recalibration:
            yield None
            return
        with Session([deep_copy(dense), dense], self.run, ranks=self.ranks) as session:
            images = self.images(session, beside=True)
            wiring, (modules, _) = session.look(images), split_by_objections(select_layers(dense), "repaired")
            called = {name: session.net.modules[name] for name in wiring.calls if name in modules}
            probes = self.plan.probes(session.layers(called, in_use(session.net.model, called, None)))
            if any(probe.pruned == "output" for probe in probes.values()):
                yield None
                return
            if any(probe.folds > 1 for probe in probes.values()):
                images.number_images(session.ranks)
            count = len(images) - images.held_out
            requests = [Request(name, replace(probe, replay=False), count) for name, probe in probes.items()]
            kept = KeptStatistics(session.store)
            with closing(session.walk(images, requests, "dense network")) as walk:
                for each in walk:
                    kept.add(each.found)
            yield kept

    def measure_curvatures(self, dense: nn.Module) -> None:
        """Measure the curvatures, if the method uses them."""
        if self.plan.method.uses_curvature:
            with Session([dense], self.run, ranks=self.ranks) as session:
                self.curvatures = measure_curvatures(session, self.images(session))

    def nearness(self, model: nn.Module, dense: nn.Module, fitted: bool = False) -> Nearness | None:
        """How near the outputs of a model are to those of the dense network; None where they cannot be compared.

        fitted: on images that are not held out.
        """
        with Session([model, dense], self.run, ranks=self.ranks) as session:
            return Judge(session, self.images(session), fitted).look()

    def images(self, session: Session, **options: Any) -> Batches:
        """The images as a repair prepares them."""
        images = session.read(self.batches, **options)
        self.plan.prepare(images, session.ranks)
        return images

    def repair(self, whole: str, step: str, model: nn.Module, dense: nn.Module, **options: Any) -> RepairReport:
        """Repair the model as one step of the function `whole`, see `carry_out`. Only the whole can be undone."""
        options |= {"resume": self.journal(step), "curvatures": self.curvatures, "judged": False}
        report = carry_out(self.plan, model, dense, self.batches, self.ranks, **options)
        report.belongs_to(f"what {whole} returned")
        return report


@dataclass(kw_only=True, eq=False)
class StepsReport(UndoableReport):
    """The result of repairs in steps: `masks` are those of the last step, `seconds` the time of all steps.

    `agreement`: before and after the repairs, for these masks. `undone`: it fell, and so the repairs were undone.
    """

    masks: Masks
    seconds: float
    agreement: Agreement | None = None
    undone: bool = False
    _undo: Callable[[], None] | None = field(default=None, repr=False)

    step: ClassVar[str]
    titles: ClassVar[tuple[str, ...]]  # of the table on a terminal, after the number of the step and the sparsity

    @abstractmethod
    def each_step(self) -> Iterator[tuple[dict[str, Any], Iterable[dict[str, Any]], tuple[str, ...]]]:
        """Plain data with the sparsity, the rows of .csv by layer, and the cells of the table on a terminal."""

    @property
    def sparsity(self) -> float:
        """Of the masks: the fraction of the original weights that is pruned."""
        return self.masks.sparsity

    def to_dict(self) -> dict[str, Any]:
        """Steps, mask table and seconds as plain data, ready for JSON."""
        steps, masks = [step for step, _, _ in self.each_step()], [row._asdict() for row in self.masks.table()]
        outcome = {"agreement": plain(self.agreement), "undone": self.undone}
        return {f"{self.step}s": steps, "masks": masks, **outcome, "seconds": self.seconds}

    def save(self, path: str | Path, provenance: Mapping[str, Any] | None = None) -> None:
        """Write .safetensors (the masks, see `Masks.save`), .json (everything) or .csv (the rows, no `provenance`).

        Whole or not at all. Raises OSError; ValueError for another ending.
        """
        if check_ending(path, ".json", ".csv", ".safetensors") == ".safetensors":
            return self.masks.save(path, provenance)
        super().save(path, provenance)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each layer and step."""
        return [
            {self.step: index, "sparsity": step["sparsity"], **layer}
            for index, (step, layers, _) in enumerate(self.each_step(), 1)
            for layer in layers
        ]

    def __rich_console__(self, *_: object) -> Iterator[Any]:
        cells = [(str(i), f"{step['sparsity']:.2%}", *more) for i, (step, _, more) in enumerate(self.each_step(), 1)]
        yield terminal_table([self.step], ["sparsity", *self.titles], cells)
        yield self.masks
        yield from self.outcome()
        yield f"{self.seconds:.2f} s"
