"""The recoverability map: prune to every sparsity by every allocation, repair by every method, score."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from ..data.calibration import hold, read_batches
from ..engine.room import in_memory
from ..errors import did_you_mean
from ..methods.base import DenseAccess, Method, check_number, registered
from ..network.copies import deep_copy
from ..network.layers import Selection, reusable, unwrap
from ..pruning.allocation import check_method, check_sparsity
from ..pruning.sparsify import NofM, parse_pattern
from ..reports.recoverability import Cell, RecoverabilityMap
from ..runtime.distributed import Ranks
from ..runtime.journal import Journal, fingerprints
from ..runtime.options import RunOptions, run_options
from ..utils.arguments import FUNCTION, IMAGES, NETWORK, check_places
from ..utils.digest import digest_in_order, digest_model, fingerprint
from ..utils.nested import count_images
from ..utils.progress import track
from .cells import Cells, Job
from .plan import check_read, make_plan
from .regrow import plan_of_growth
from .steps import options_of_steps, run_identity

Columns = Iterable[str] | Mapping[str, Method | Mapping[str, Any] | None]
# by name, the options of `repair`; None is no repair; with "past" those of `regrow`, see `recoverability`
PRESETS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "bn-ema": {"method": "bn", "recalibrate": "ema"},
    "mean-bn": {"method": "mean", "recalibrate": "exact"},
    "regrow": {"past": 0.3},
    "asr-ema": {"method": "asr", "schedule": "parallel", "recalibrate": "ema"},
}


def presets() -> dict[str, dict[str, Any] | None]:
    """The named columns of a map: every registered method with its defaults, and `PRESETS`."""
    return {name: {"method": name} for name in registered()} | PRESETS


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
    methods: Columns = ("bn", "asr"),
    pattern: str = "unstructured",
    chance: float = 0.0,
    include: Selection = None,
    exclude: Selection = None,
    workers: int = 1,
    resume: str | Path | None = None,
    **options: Unpack[RunOptions],
) -> RecoverabilityMap:
    """Score every pruning of `dense` after every repair: sparsities x allocations x methods. `dense` is not changed.

    The images are read once. The dense network is measured once for all cells whose method needs only its statistics.

    Args:
        evaluate: `evaluate(model)` gives the score of a model in eval mode, higher is better; such as `Accuracy`.
        sparsities, allocations, pattern, include, exclude: see `sparsify`; what "rr" measures serves all sparsities.
        methods: names of registered methods, or of `PRESETS` ("none", "bn-ema", "mean-bn", "asr-ema", "regrow"; "-ema"
            is the published protocol), or {label: a `Method`, options of `repair`, or None for no repair}. {"past":
            0.3, and options of `regrow`} prunes to 0.3 of the weights that the sparsity leaves, and regrows to it.
        chance: the score of guessing, for the transition regime (`RecoverabilityMap.transition`).
        workers: number of processes that fill cells; each holds the model and the images. With more than one,
            `evaluate` and the model must be picklable, and a script needs its `if __name__ == "__main__":`.
        resume: a journal to which each cell is appended. Cells in it are not filled again, also in a map with other
            sparsities, allocations or methods. (How a `forward_fn` is identified: `digest.fingerprint`.)
        options: see `RunOptions`, without `group`.

    Raises ValueError or TypeError for an unknown choice, before any work; JournalError where `resume` is of another
    model, score, option, or other images; ResuscitateError, naming the cell, where one fails, as for a glob of a column
    that selects no layer.
    """
    places: dict[str, Any] = {"dense": (dense, NETWORK), "calibration": (calibration, IMAGES)}
    check_places("recoverability(dense, images, evaluate)", **places, evaluate=(evaluate, FUNCTION))
    if workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")
    run = run_options("recoverability()", options)
    if run["group"] is not None:
        raise ValueError("a recoverability map takes no group: its cells are shared out with workers=")
    if isinstance(parse_pattern(pattern), NofM) or pattern == "channels":
        raise ValueError(f'pattern {pattern!r} has no sparsity to vary; a map is of "unstructured" or "filter"')
    common: RunOptions = {**options_of_steps(run), "progress": False}
    jobs = _jobs(sparsities, allocations, methods, dense, common)
    room = in_memory(run["memory"], "cpu", dense, workers)  # each worker holds a copy
    limits: dict[str, Any] = {name: run[name] for name in ("max_samples", "max_batches", "batch_size")}
    raw = run["forward_fn"] is not None
    batches = hold(calibration, read_batches(calibration, **limits, raw=raw, room=room))
    pruning = {"pattern": pattern, "include": reusable(include), "exclude": reusable(exclude)}
    cells = Cells(deep_copy(unwrap(dense)).eval(), batches, evaluate, common, pruning)
    score = cells.score(cells.dense)
    if not score > chance:
        remedy = (
            "look at its weights and at the normalisation and labels of the images it is scored on, or give chance="
        )
        raise ValueError(f"the dense model scores {score:g}, which is no more than chance={chance:g}; {remedy}")
    identity = dict[str, object]()
    if resume is not None:
        identity = {"model": digest_model(cells.dense), "dense score": score, "images": digest_in_order(batches)}
        identity["options"] = {**fingerprints(pruning), **run_identity(run)}
        identity["evaluate"] = fingerprint(evaluate) if isinstance(evaluate, Accuracy) else None
    with Journal(resume, identity, Ranks()) as journal:
        found = {key: Cell(**row) for key, (_, row) in journal.entries.items() if key in jobs}  # type: ignore[arg-type]
        left = {key: job for key, job in jobs.items() if key not in found}
        cells.prepare(left.values())
        done = cells.fill_in_processes(left, workers) if min(workers, len(left)) > 1 else cells.fill_here(left)
        for key, cell in track(done, "recoverability", len(left), run["progress"]):
            journal.add(key, {}, asdict(cell))
            found[key] = cell
    return RecoverabilityMap([found[key] for key in jobs], score, chance, pattern, sum(map(count_images, batches)))


def _jobs(
    sparsities: Iterable[float], allocations: Iterable[str], methods: Columns, dense: nn.Module, common: RunOptions
) -> dict[str, Job]:
    """The cells to fill, by a key made of their settings. Raises ValueError or TypeError."""
    if isinstance(methods, Mapping):
        columns = {label: {"method": each} if isinstance(each, Method) else each for label, each in methods.items()}
    else:
        known, names = presets(), _several("methods", methods)
        for name in names:
            if name not in known:
                raise ValueError(f"unknown method {name!r}; choose from {', '.join(known)}{did_you_mean(name, known)}")
        columns = {name: known[name] for name in names}
    statistics = {label: _check_column(label, each, dense, common) for label, each in columns.items()}
    jobs = {}
    for sparsity, allocation in product(sorted(set(sparsities)), _several("allocations", allocations)):
        check_sparsity(sparsity)
        check_method(allocation)
        for label, options in columns.items():
            job = Job(sparsity, allocation, label, options, statistics[label])
            jobs[f"{job}: {sorted(fingerprints(options or {}).items())}"] = job
    if not jobs:
        raise ValueError("a map needs at least one sparsity, one allocation and one method")
    return jobs


def _check_column(label: str, options: Mapping[str, Any] | None, dense: nn.Module, common: RunOptions) -> bool:
    """Check the options of a column as `repair` or `regrow` would; are the dense statistics enough for it?

    Raises TypeError or ValueError, naming the column.
    """
    if options is None:
        return False
    regrows = "past" in options
    others = ("past", "densities", "finetune") if regrows else ("include", "exclude", "skip_first", "skip_last")
    chosen = {**common, **{name: value for name, value in options.items() if name not in others}}  # those of the plan
    try:
        if regrows:
            check_number("past", options["past"], 0, most=1, above=True)
            plan_of_growth(dense, "unstructured", **chosen)
            return False
        plan = make_plan("repair()", dense, **chosen)
        plan.check_dense(dense)
        check_read(plan.method, **{name: options.get(name) for name in others})
    except (TypeError, ValueError) as error:
        raise type(error)(f"method {label!r}: {error}") from error
    return plan.method.dense is DenseAccess.STATISTICS and not plan.diagnostics


def _several(option: str, names: Iterable[str]) -> list[str]:
    if isinstance(names, str):
        raise ValueError(f"{option}={names!r} is one name; give several, such as [{names!r}]")
    return list(dict.fromkeys(names))
