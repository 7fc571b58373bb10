"""Repairs in several steps: the images, journals, options and report that `compress` and `regrow` share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from ..engine.session import Session
from ..methods.base import Method, option_names
from ..network.masks import Masks
from ..reports.base import UndoableReport, terminal_table
from ..reports.repair import RepairReport
from ..runtime.journal import Journal, fingerprints
from ..runtime.options import RunOptions, identity_of, run_options
from ..utils.digest import MODULUS, digest_images, digest_model, fingerprint
from ..utils.files import check_ending
from .plan import Plan, make_plan
from .repair import repair


def plan_of_steps(call: str, dense: nn.Module, method: Method | str, options: Mapping[str, Any]) -> Plan:
    """The plan of each repair, from run-time options and fields of the method. Raises as `make_plan`."""
    run_options(call, {name: value for name, value in options.items() if name not in option_names()})
    plan = make_plan(call, dense, method=method, **options)
    plan.check_dense(dense)
    return plan


def options_of_steps(run: RunOptions) -> RunOptions:
    """The options of a step: the limits have been applied when the images were read."""
    return {**run, "max_samples": None, "max_batches": None, "progress": False}


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
        self.plan, self.run = plan, options_of_steps(plan.run)
        self.folder = None if resume is None else Path(resume)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.batches = session.hold(calibration)
        if self.folder is not None:
            (images,) = session.ranks.total(digest_images(self.batches))
            # choices last: a `regrow` without repairs has no method, though its plan has one
            options = {**plan.identity(), **run_identity(plan.run), **fingerprints(choices)}
            identity = {"model": digest_model(session.models[0]), "images": images % MODULUS, "options": options}
            session.stack.enter_context(Journal(self.folder / "run.journal", identity, session.ranks))

    def journal(self, step: str) -> Path | None:
        """The journal of a step; None without a folder."""
        return None if self.folder is None else self.folder / f"{step}.journal"

    def repair(self, whole: str, step: str, model: nn.Module, dense: nn.Module, **options: Any) -> RepairReport:
        """Repair the model as one step of the function `whole`. Only the whole can be undone, not the step."""
        options |= {"method": self.plan.method, "resume": self.journal(step), **self.run}
        report = repair(model, dense, self.batches, **options)
        report.belongs_to(f"what {whole} returned")
        return report


@dataclass(kw_only=True, eq=False)
class StepsReport(UndoableReport):
    """The result of repairs in steps: `masks` are those of the last step, `seconds` the time of all steps."""

    masks: Masks
    seconds: float
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
        steps, masks = [plain for plain, _, _ in self.each_step()], [row._asdict() for row in self.masks.table()]
        return {f"{self.step}s": steps, "masks": masks, "seconds": self.seconds}

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
            {self.step: index, "sparsity": plain["sparsity"], **layer}
            for index, (plain, layers, _) in enumerate(self.each_step(), 1)
            for layer in layers
        ]

    def __rich_console__(self, *_: object) -> Iterator[Any]:
        cells = [(str(i), f"{plain['sparsity']:.2%}", *more) for i, (plain, _, more) in enumerate(self.each_step(), 1)]
        yield terminal_table([self.step], ["sparsity", *self.titles], cells)
        yield self.masks
        yield f"{self.seconds:.2f} s"
