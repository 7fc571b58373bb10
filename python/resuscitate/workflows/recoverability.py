"""The recoverability map: prune to every sparsity by every allocation, repair by every method, score."""

from __future__ import annotations

import copy
import math
import multiprocessing
import pickle
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from inspect import signature
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import count_images
from ..data.calibration import hold, read_batches
from ..engine.reference import DenseStatistics
from ..engine.room import in_memory
from ..errors import ResuscitateError, did_you_mean
from ..methods.choices import check_options
from ..network.layers import Selector, unwrap
from ..network.runner import as_dtype
from ..pruning.allocation import check_method, check_sparsity, listed
from ..pruning.patterns import NofM, parse_pattern
from ..pruning.repairability import Repairability
from ..pruning.sparsify import sparsify
from ..reports.recoverability import Cell, RecoverabilityMap
from ..runtime.distributed import Ranks
from ..runtime.journal import Journal, told
from ..utils.arguments import FUNCTION, IMAGES, NETWORK, check_places
from ..utils.digest import digest_in_order, digest_model, fingerprint
from ..utils.progress import track
from .regrow import check_choices, regrow
from .repair import DEFAULTS, repair

# by name, the options of `repair`; None is no repair; with "past" those of `regrow`, see `recoverability`
METHODS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "bn": {"method": "bn"},
    "bn-ema": {"method": "bn", "recalibrate": "ema"},
    "layerwise": {"method": "layerwise"},
    "channelwise": {"method": "channelwise"},
    "asr": {"method": "asr"},
    "refit": {"method": "refit"},
    "mean": {"method": "mean"},
    "mean-bn": {"method": "mean", "recalibrate": "exact"},
    "regrow": {"past": 0.3},
    "asr-ema": {"method": "asr", "schedule": "parallel", "recalibrate": "ema"},
}


@dataclass
class Accuracy:
    """Scores a model: top-1 accuracy in per cent on labelled images (N, ...), labels (N,) of integers."""

    images: Tensor
    labels: Tensor
    batch_size: int = 500

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> float:
        place = next(iter(model.parameters()), torch.empty(0))
        hits = 0
        for x, y in zip(self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True):
            hits += int((model(x.to(place.device, place.dtype)).argmax(1) == y.to(place.device)).sum())
        return 100 * hits / len(self.labels)


def recoverability(
    dense: nn.Module,
    calibration: Any,
    evaluate: Callable[[nn.Module], float],
    *,
    sparsities: Iterable[float] = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98),
    allocations: Iterable[str] = ("global", "uniform", "erk", "lamp"),
    methods: Iterable[str] | Mapping[str, Mapping[str, Any] | None] = ("bn", "asr"),
    pattern: str = "unstructured",
    chance: float = 0.0,
    include: Iterable[Selector] | Selector | None = None,
    exclude: Iterable[Selector] | Selector | None = None,
    max_samples: int | None = None,
    batch_size: int = 128,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    workers: int = 1,
    resume: str | Path | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> RecoverabilityMap:
    """Score every pruning of `dense` after every repair: sparsities x allocations x methods. `dense` is not changed.

    The images are read once and the dense model is measured once, for all cells; a method that compares both networks
    image by image (correlations) runs it beside.

    Args:
        evaluate: `evaluate(model)` gives the score of a model in eval mode, higher is better; such as `Accuracy`.
        sparsities, allocations, pattern, include, exclude: see `sparsify`; what "rr" measures serves all sparsities.
        methods: names ("none", "bn", "bn-ema", "layerwise", "channelwise", "asr", "refit", "mean", "mean-bn", "regrow",
            "asr-ema"; "bn" is exact, "-ema" the published protocol), or {label: options of `repair`, or None for none}.
            {label: {"past": 0.3, and options of `regrow`}} prunes until 0.3 of the weights that the sparsity leaves are
            there, and regrows to it.
        chance: the score of guessing, against which the transition regime is defined (`RecoverabilityMap.transition`).
        max_samples, batch_size, forward_fn, dtype, device, seed: as in `repair`.
        workers: processes to share the cells out to. `evaluate` and the model must then be picklable, and a script
            needs its `if __name__ == "__main__":`. Each holds the model and the images.
        resume: a journal to append each cell to. With it, a cell that is done is not done again, also when the
            map is asked for once more with other sparsities, allocations or methods. (How a `forward_fn` is known:
            `digest.fingerprint`.)
        progress: show a progress bar; None: where standard error is a terminal.

    Raises ValueError or TypeError for an unknown choice, before any work; JournalError where `resume` is of another
    model, score, option, or other images; ResuscitateError, naming the cell, where one fails.
    """
    places: dict[str, Any] = {"dense": (dense, NETWORK), "calibration": (calibration, IMAGES)}
    check_places("recoverability(dense, images, evaluate)", **places, evaluate=(evaluate, FUNCTION))
    if workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")
    common = {"batch_size": batch_size, "forward_fn": forward_fn, "dtype": dtype, "device": device, "seed": seed}
    jobs = _jobs(sparsities, allocations, methods, pattern, dense, common)
    reading: dict[str, Any] = {"max_samples": max_samples, "max_batches": None, "batch_size": batch_size}
    reading |= {"raw": forward_fn is not None, "room": in_memory(None, "cpu", dense, workers)}
    batches = hold(calibration, read_batches(calibration, **reading))
    pruning = {"pattern": pattern, "include": listed(include), "exclude": listed(exclude)}
    cells = _Cells(copy.deepcopy(unwrap(dense)).eval(), batches, evaluate, common, pruning)
    score = cells.score(cells.dense)
    if not score > chance:
        raise ValueError(
            f"the dense model scores {score:g}, which is no more than chance={chance:g}; look at its weights, and "
            "at the images that it is scored on, their normalisation and their labels"
        )
    identity: dict[str, object] = {"model": digest_model(cells.dense), "dense score": score}
    if resume is not None:
        options = told({**pruning, **common}) | {"dtype": str(as_dtype(dtype))}
        identity |= {"images": digest_in_order(batches), "options": options}
        identity |= {"evaluate": fingerprint(evaluate) if isinstance(evaluate, Accuracy) else None}
    with Journal(resume, identity, Ranks()) as journal:
        found = {key: Cell(**row) for key, (_, row) in journal.entries.items() if key in jobs}  # type: ignore[arg-type]
        left = {key: job for key, job in jobs.items() if key not in found}
        cells.prepare(left.values())
        done = cells.fill_in_processes(left, workers) if min(workers, len(left)) > 1 else cells.fill_here(left)
        for key, cell in track(done, "recoverability", len(left), progress):
            journal.add(key, {}, asdict(cell))
            found[key] = cell
    return RecoverabilityMap([found[key] for key in jobs], score, chance, pattern, sum(map(count_images, batches)))


@dataclass(frozen=True)
class _Job:
    """A cell that is to be filled: `options` of `repair`, None for no repair."""

    sparsity: float
    allocation: str
    method: str
    options: Mapping[str, Any] | None

    @property
    def samples(self) -> int | None:
        """How many images its gains come from."""
        return (self.options or {}).get("gain_samples")

    @property
    def needs_statistics(self) -> bool:
        """Does it compare with the dense model, and not image by image?"""
        options = {"method": "auto", **(self.options or {"method": "bn"})}
        image_by_image = options["method"] in ("auto", "refit", "two-stage", "mean") or options.get("correlations")
        return not (options["method"] == "bn" or image_by_image or "past" in options)

    def __str__(self) -> str:
        return f"{self.method} at sparsity {self.sparsity:g}, allocation {self.allocation}"


@dataclass
class _Cells:
    """All that cells have in common, and the pruned model of the last, for the next may want the same."""

    dense: nn.Module
    batches: list[Any]
    evaluate: Callable[[nn.Module], float]
    common: dict[str, Any]
    pruning: dict[str, Any]
    statistics: dict[int | None, DenseStatistics] = field(default_factory=dict)
    repairability: Repairability | None = None
    pruned: tuple[tuple[float, str], nn.Module, float] | None = None

    def score(self, model: nn.Module) -> float:
        """What the user's function says of a model; ValueError where that is not a finite number."""
        score = float(self.evaluate(model))
        if not math.isfinite(score):
            raise ValueError(f"evaluate returned {score}, not a score")
        return score

    def prepare(self, jobs: Iterable[_Job]) -> None:
        """Measure once what many cells need: the dense model's moments, its layers' repairability."""
        for job in jobs:
            if job.needs_statistics and job.samples not in self.statistics:
                self.statistics[job.samples] = DenseStatistics.measure(
                    self.dense, self.batches, max_samples=job.samples, **self.common, progress=False
                )
            if job.allocation == "rr" and self.repairability is None:
                include, exclude = self.pruning["include"], self.pruning["exclude"]
                self.repairability = Repairability.measure(
                    self.dense, self.batches, include=include, exclude=exclude, **self.common, progress=False
                )

    def fill(self, job: _Job) -> Cell:
        """Prune, repair, score."""
        if job.options is not None and "past" in job.options:
            return self._regrow(job, **job.options)
        if self.pruned is None or self.pruned[0] != (job.sparsity, job.allocation):
            model = copy.deepcopy(self.dense)
            masks = sparsify(
                model, job.sparsity, allocation=job.allocation, calibration=self.repairability, **self.pruning
            )
            self.pruned = (job.sparsity, job.allocation), model, masks.sparsity
        _, pruned, sparsity = self.pruned
        if job.options is None:
            return Cell(job.sparsity, job.allocation, job.method, self.score(pruned), sparsity, 0.0)
        model = copy.deepcopy(pruned)
        target: Any = None if job.options.get("method") == "bn" else self.dense
        target = self.statistics[job.samples] if job.needs_statistics else target
        report = repair(model, target, self.batches, **{**self.common, "progress": False, **job.options})
        return Cell(job.sparsity, job.allocation, job.method, self.score(model), sparsity, round(report.seconds, 3))

    def _regrow(self, job: _Job, past: float, **options: Any) -> Cell:
        """Prune past the sparsity, regrow to it, score."""
        model, started = copy.deepcopy(self.dense), time.perf_counter()
        further = 1 - past * (1 - job.sparsity)
        masks = sparsify(model, further, allocation=job.allocation, calibration=self.repairability, **self.pruning)
        options = {**self.common, "progress": False, **options}
        grown = regrow(model, self.dense, masks, job.sparsity, self.batches, **options)
        seconds = round(time.perf_counter() - started, 3)
        return Cell(job.sparsity, job.allocation, job.method, self.score(model), grown.sparsity, seconds)

    def fill_here(self, jobs: Mapping[str, _Job]) -> Iterator[tuple[str, Cell]]:
        """One after the other, in this process."""
        for key, job in jobs.items():
            try:
                cell = self.fill(job)
            except Exception as error:
                raise ResuscitateError(f"{job}: {error}") from error
            yield key, cell

    def fill_in_processes(self, jobs: Mapping[str, _Job], workers: int) -> Iterator[tuple[str, Cell]]:
        """As they come, from as many processes; when one cell fails, or the caller leaves, the rest is called off."""
        try:
            payload = pickle.dumps(self)
        except Exception as error:
            raise ValueError(
                f"workers={workers} sends evaluate and the model to other processes, and they cannot be pickled "
                f"({error}); use a function or class at the top of a module, or workers=1"
            ) from error
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
            raise ResuscitateError(
                "a worker process died, for want of memory perhaps; give resume=, fewer workers, and go on from there"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


_worker: list[_Cells] = []


def _start(payload: bytes, threads: int) -> None:
    torch.set_num_threads(threads)
    _worker.append(pickle.loads(payload))


def _fill(job: _Job) -> Cell | str:
    """In a worker: the cell, or what went wrong in words, for not every error survives the way back."""
    try:
        return _worker[0].fill(job)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _jobs(
    sparsities: Iterable[float],
    allocations: Iterable[str],
    methods: Iterable[str] | Mapping[str, Mapping[str, Any] | None],
    pattern: str,
    dense: nn.Module,
    common: Mapping[str, Any],
) -> dict[str, _Job]:
    """The cells to fill, by a key that tells all that is peculiar to each. Raises ValueError or TypeError."""
    if isinstance(parse_pattern(pattern), NofM) or pattern == "channels":
        raise ValueError(f'pattern {pattern!r} has no sparsity to vary; a map is of "unstructured" or "filter"')
    chosen = dict(methods) if isinstance(methods, Mapping) else {}
    for method in () if isinstance(methods, Mapping) else _listed("methods", methods):
        if method not in METHODS:
            hint = did_you_mean(method, METHODS)
            raise ValueError(f"unknown method {method!r}; choose from {', '.join(METHODS)}{hint}")
        chosen[method] = METHODS[method]
    for label, options in chosen.items():
        act: Any = regrow if "past" in (options or ()) else repair
        known = {"past"} if act is regrow else set[str]()
        known |= set(signature(act).parameters) - {"model", "dense", "calibration", "masks", "sparsity", "pattern"}
        if unknown := set(options or ()) - known:
            raise ValueError(f"method {label!r}: {act.__name__} has no option {', '.join(sorted(unknown))}")
        if act is regrow and not 0 < (options or {})["past"] <= 1:
            raise ValueError(f"method {label!r}: past={(options or {})['past']} must be a part of what is left, 0 to 1")
        if options is not None:
            _check_method(label, {**common, **options}, dense)
    jobs = {}
    for sparsity, allocation in product(sorted(set(sparsities)), _listed("allocations", allocations)):
        check_sparsity(sparsity)
        check_method(allocation)
        for method, options in chosen.items():
            job = _Job(sparsity, allocation, method, options)
            told = {name: fingerprint(value) for name, value in (options or {}).items()}
            jobs[f"{job}: {sorted(told.items())}"] = job
    if not jobs:
        raise ValueError("a map needs at least one sparsity, one allocation and one method")
    return jobs


def _check_method(label: str, options: Mapping[str, Any], dense: nn.Module) -> None:
    """ValueError, naming the method, for options that `repair` or `regrow` would refuse."""
    try:
        if "past" in options:
            defaults = {name: parameter.default for name, parameter in signature(regrow).parameters.items()}
            check_choices({**defaults, **options}, dense, Ranks())
        else:
            check_options({**DEFAULTS, **options}, DEFAULTS, dense, Ranks())
    except ValueError as error:
        raise ValueError(f"method {label!r}: {error}") from error


def _listed(option: str, names: Iterable[str]) -> list[str]:
    if isinstance(names, str):
        raise ValueError(f"{option}={names!r} is one name; give several, such as [{names!r}]")
    return list(dict.fromkeys(names))
