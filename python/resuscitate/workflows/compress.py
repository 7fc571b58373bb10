"""Compression without labels: prune a little, refit what is left, prune the refitted weights a little more."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..data.batches import read_share
from ..data.calibration import hold
from ..engine.room import in_memory
from ..methods.choices import check_options
from ..network.layers import Selector, unwrap
from ..network.masks import Masks
from ..network.runner import as_dtype
from ..network.snapshot import Snapshot
from ..pruning.allocation import check_sparsity, listed
from ..pruning.sparsify import sparsify
from ..reports.repair import COLUMNS, ENDINGS, RepairReport
from ..runtime.distributed import Ranks
from ..runtime.journal import Journal, told
from ..utils.arguments import IMAGES, NETWORK, NUMBER, check_places
from ..utils.digest import MODULUS, digest_images, digest_model
from ..utils.files import check_ending, write_rows
from ..utils.progress import track
from .repair import DEFAULTS, repair

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

log = logging.getLogger("resuscitate")
FIRST = 0.5  # what a network bears without a step of its own


@dataclass
class CompressReport:
    """What `compress` did: the sparsity after each step, and the report of the refit that followed it.

    `masks` are those of the last step. `seconds` is the time of all.
    """

    sparsities: list[float]
    steps: list[RepairReport]
    masks: Masks
    seconds: float = 0.0
    _undo: Callable[[], None] | None = field(default=None, repr=False)

    @property
    def layers(self) -> list[Any]:
        """The rows of the last refit."""
        return self.steps[-1].layers

    def undo(self) -> None:
        """Put the model back as it was given, bit for bit. Raises RuntimeError the second time."""
        if self._undo is None:
            raise RuntimeError("this compression has been undone already")
        self._undo()
        self._undo = None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, ready for JSON."""
        steps = [{"sparsity": s, **report.to_dict()} for s, report in zip(self.sparsities, self.steps, strict=True)]
        return {"steps": steps, "masks": [row._asdict() for row in self.masks.table()], "seconds": self.seconds}

    def save(self, path: str | Path) -> None:
        """Write .json (everything), .csv (a row for each layer in each step) or .safetensors (the masks).

        Whole or not at all. Raises OSError; ValueError for another ending.
        """
        if check_ending(path, *ENDINGS) == ".safetensors":
            return self.masks.save(path)
        rows = []
        for index, (sparsity, report) in enumerate(zip(self.sparsities, self.steps, strict=True)):
            rows += [{"step": index + 1, "sparsity": sparsity, **row} for row in report.rows()]
        write_rows(path, self.to_dict(), ["step", "sparsity", *COLUMNS], rows)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table

        table = Table("step", box=None, header_style="bold")
        for title in ("sparsity", "explained by the refit", "seconds"):
            table.add_column(title, justify="right")
        for index, (sparsity, report) in enumerate(zip(self.sparsities, self.steps, strict=True)):
            shares = [layer.explained for layer in report.layers if layer.explained is not None]
            mean = f"{sum(shares) / len(shares):.3f}" if shares else ""
            table.add_row(str(index + 1), f"{sparsity:.2%}", mean, f"{report.seconds:.2f}")
        yield table
        yield self.masks
        yield f"{self.steps[-1].images} images, {self.seconds:.2f} s"


def compress(
    model: nn.Module,
    sparsity: float,
    calibration: Any,
    *,
    allocation: str = "global",
    pattern: str = "unstructured",
    steps: int | Sequence[float] = 7,
    densities: Mapping[str, float] | None = None,
    min_per_layer: int = 1,
    min_per_channel: int = 0,
    include: Iterable[Selector] | Selector | None = None,
    exclude: Iterable[Selector] | Selector | None = None,
    ridge: float | None = None,
    relu_aware: bool = True,
    max_samples: int | None = None,
    batch_size: int = 128,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    memory: int | str | None = None,
    scratch: str | Path | None = None,
    group: Any = None,
    resume: str | Path | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> CompressReport:
    """Prune `model` to a sparsity in steps, and refit it after each to what it was, in place; returns what was done.

    The model as given is the dense target. No labels, no gradients. All or nothing: when an error is raised, every
    tensor is as it was.

    Args:
        sparsity, allocation, pattern, densities, min_per_layer, min_per_channel, include, exclude: see `sparsify`.
            "rr" is measured anew in each step, in one process.
        calibration, ridge, relu_aware, max_samples, batch_size, forward_fn, dtype, device, memory, scratch, group,
            seed, progress: as in `repair` with method "refit". The images are read once, and held: of a
            loader no more than fit `memory`, where the model runs on the host, else half of the host's.
        steps: how many, or the sparsities to stop at, ascending, the last of which is `sparsity`. A number of steps
            begins at `FIRST` and keeps the same fraction of the weights in each step from there on.
        resume: a folder for the journals of the steps, and one that says which run they are of: another one is refused.
            A run that was killed goes on from them; delete it once the result is saved.

    Raises what `sparsify` and `repair` raise; ValueError for steps that do not ascend to `sparsity`.
    """
    given, started = dict(locals()), time.perf_counter()
    places: dict[str, Any] = {"model": (model, NETWORK), "sparsity": (sparsity, NUMBER)}
    check_places("compress(model, sparsity, images)", **places, calibration=(calibration, IMAGES))
    model, stops = unwrap(model), schedule(sparsity, steps)
    ranks, reports = Ranks(group), list[RepairReport]()
    if allocation == "rr" and ranks.size > 1:
        raise ValueError("allocation 'rr' measures in one process: it takes no group")
    dense, folder = copy.deepcopy(model), None if resume is None else Path(resume)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    reading: dict[str, Any] = {"max_samples": max_samples, "max_batches": None, "batch_size": batch_size}
    pruning: dict[str, Any] = {"allocation": allocation, "pattern": pattern, "densities": densities}
    pruning |= {"min_per_layer": min_per_layer, "min_per_channel": min_per_channel}
    pruning |= {"include": listed(include), "exclude": listed(exclude)}
    running: dict[str, Any] = {"batch_size": batch_size, "forward_fn": forward_fn, "dtype": dtype, "device": device}
    running |= {"seed": seed, "progress": False}
    fitting: dict[str, Any] = {"method": "refit", "ridge": ridge, "relu_aware": relu_aware, **running}
    fitting |= {"memory": memory, "scratch": scratch, "group": group}
    check_options({**DEFAULTS, **fitting}, DEFAULTS, dense, ranks)
    with Snapshot(model) as snapshot, snapshot.settling() as stack, ranks.together():
        reading |= {"raw": forward_fn is not None, "room": in_memory(memory, device, model)}
        batches = hold(calibration, read_share(calibration, ranks, **reading))
        if folder is not None:
            (images,) = ranks.total(digest_images(batches))
            given |= {"include": pruning["include"], "exclude": pruning["exclude"]}
            options = told(given, "model", "calibration", "max_samples")
            options |= {"steps": stops, "dtype": str(as_dtype(dtype))}
            identity = {"model": digest_model(model), "images": images % MODULUS, "options": options}
            stack.enter_context(Journal(folder / "run.journal", identity, ranks))
        pruning |= {"calibration": batches, **running} if allocation == "rr" else {}
        for index, stop in enumerate(track(stops, "compress", len(stops), False if ranks.rank else progress)):
            masks = sparsify(model, stop, **pruning)
            journal = None if folder is None else folder / f"step-{index + 1}.journal"
            reports.append(repair(model, dense, batches, **fitting, resume=journal))
            reports[-1].belongs_to("what compress returned")
            log.info("step %d of %d: sparsity %.4f", index + 1, len(stops), masks.sparsity)
        snapshot.forget_unchanged()
        return CompressReport(stops, reports, masks, time.perf_counter() - started, snapshot.restore)


def schedule(sparsity: float, steps: int | Sequence[float]) -> list[float]:
    """The sparsities to stop at: from `FIRST` on, the same fraction of the weights stays in each step.

    Raises TypeError or ValueError for a sparsity or steps that are none.
    """
    check_sparsity(sparsity)
    if not isinstance(steps, int):
        stops = [check_sparsity(stop) for stop in steps]
        if not stops or stops != sorted(set(stops)) or stops[-1] != sparsity:
            raise ValueError(f"steps={stops} must ascend to sparsity={sparsity}, the last of them")
        return stops
    if isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps={steps} must be at least 1, or the sparsities to stop at")
    if sparsity <= FIRST or steps == 1:
        return [sparsity]
    kept = (1 - sparsity) / (1 - FIRST)
    return [1 - (1 - FIRST) * kept ** (index / (steps - 1)) for index in range(steps - 1)] + [sparsity]
