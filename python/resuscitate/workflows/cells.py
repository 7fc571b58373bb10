"""The cells of a recoverability map: how each is filled, in this process or in several."""

from __future__ import annotations

import math
import multiprocessing
import pickle
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..engine.reference import DenseStatistics
from ..errors import ResuscitateError
from ..methods.base import register, registered
from ..network.copies import deep_copy
from ..network.masks import Masks
from ..pruning.repairability import Repairability
from ..pruning.sparsify import sparsify
from ..reports.recoverability import Cell
from ..runtime.options import RunOptions
from .regrow import regrow
from .repair import repair


@dataclass(frozen=True)
class Job:
    """A cell to fill: `options` of `repair`, None for no repair. `statistics`: it needs only the dense statistics."""

    sparsity: float
    allocation: str
    method: str
    options: Mapping[str, Any] | None
    statistics: bool

    @property
    def samples(self) -> int | None:
        """How many images its layers are measured with; None: all."""
        return (self.options or {}).get("gain_samples")

    def __str__(self) -> str:
        return f"{self.method} at sparsity {self.sparsity:g}, allocation {self.allocation}"


@dataclass
class Cells:
    """What all cells share, and the last pruned model, which the next cell may need too."""

    dense: nn.Module
    batches: list[Any]
    evaluate: Callable[[nn.Module], float]
    common: RunOptions
    pruning: dict[str, Any]
    statistics: dict[int | None, DenseStatistics] = field(default_factory=dict)
    repairability: Repairability | None = None
    pruned: tuple[tuple[float, str], nn.Module, float] | None = None

    def score(self, model: nn.Module) -> float:
        """The score of a model by `evaluate`. Raises ValueError unless it is a finite number."""
        score = float(self.evaluate(model))
        if not math.isfinite(score):
            raise ValueError(f"evaluate returned {score}, not a score")
        return score

    def prepare(self, jobs: Iterable[Job]) -> None:
        """Measure once what many cells need: the dense moments and the repairability of the layers."""
        for job in jobs:
            if job.statistics and job.samples not in self.statistics:
                options: RunOptions = {**self.common, "max_samples": job.samples}
                self.statistics[job.samples] = DenseStatistics.measure(self.dense, self.batches, **options)
            if job.allocation == "rr" and self.repairability is None:
                selection: dict[str, Any] = {name: self.pruning[name] for name in ("include", "exclude")}
                self.repairability = Repairability.measure(self.dense, self.batches, **selection, **self.common)

    def fill(self, job: Job) -> Cell:
        """Prune, repair or regrow, score."""
        options: dict[str, Any] = {**self.common, "keep_worse": True, **(job.options or {})}
        seconds = 0.0
        if "past" in options:
            model, started = deep_copy(self.dense), time.perf_counter()
            masks = self._sparsify(model, 1 - options.pop("past") * (1 - job.sparsity), job.allocation)
            sparsity = regrow(model, self.dense, masks, job.sparsity, self.batches, **options).sparsity
            seconds = time.perf_counter() - started
        else:
            if self.pruned is None or self.pruned[0] != (job.sparsity, job.allocation):
                model = deep_copy(self.dense)
                masks = self._sparsify(model, job.sparsity, job.allocation)
                self.pruned = (job.sparsity, job.allocation), model, masks.sparsity
            _, model, sparsity = self.pruned
            if job.options is not None:
                model = deep_copy(model)
                target = self.statistics[job.samples] if job.statistics else self.dense
                seconds = repair(model, target, self.batches, **options).seconds
        return Cell(job.sparsity, job.allocation, job.method, self.score(model), sparsity, round(seconds, 3))

    def _sparsify(self, model: nn.Module, sparsity: float, allocation: str) -> Masks:
        measured = self.repairability if allocation == "rr" else None
        return sparsify(model, sparsity, allocation=allocation, calibration=measured, **self.pruning)

    def fill_here(self, jobs: Mapping[str, Job]) -> Iterator[tuple[str, Cell]]:
        """One after the other, in this process."""
        for key, job in jobs.items():
            try:
                cell = self.fill(job)
            except Exception as error:
                raise ResuscitateError(f"{job}: {error}") from error
            yield key, cell

    def fill_in_processes(self, jobs: Mapping[str, Job], workers: int) -> Iterator[tuple[str, Cell]]:
        """Fill cells in `workers` processes, in order of completion; an error or leaving the loop cancels the rest."""
        used = [(job.options or {}).get("method") for job in jobs.values()]
        try:
            payload = pickle.dumps((self, [method for name, method in registered().items() if name in used]))
        except Exception as error:
            sent = f"workers={workers} sends evaluate, the model and the methods to other processes"
            remedy = "use a function or class at the top of a module, or workers=1"
            raise ValueError(f"{sent}, and they cannot be pickled ({error}); {remedy}") from error
        threads = max(torch.get_num_threads() // workers, 1)
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(min(workers, len(jobs)), context, _start, (payload, threads))
        try:
            waiting = {pool.submit(_fill, job): key for key, job in jobs.items()}
            for future in as_completed(waiting):
                cell = future.result()
                if isinstance(cell, str):
                    raise ResuscitateError(f"{jobs[waiting[future]]}: {cell}")
                yield waiting[future], cell
        except BrokenProcessPool as error:
            remedy = "give resume=, fewer workers, and go on from there"
            raise ResuscitateError(f"a worker process died, for want of memory perhaps; {remedy}") from error
        finally:
            pool.shutdown(cancel_futures=True)


_worker: list[Cells] = []


def _start(payload: bytes, threads: int) -> None:
    torch.set_num_threads(threads)
    cells, methods = pickle.loads(payload)
    for method in methods:  # a user's own too
        register(method)
    _worker.append(cells)


def _fill(job: Job) -> Cell | str:
    """In a worker: the cell, or the error as text, because not every error can be pickled."""
    try:
        return _worker[0].fill(job)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
