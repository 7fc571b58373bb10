"""The highest sparsity at which a compressed network still agrees with the dense one."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ..data.checks import run_first
from ..engine.session import Session
from ..errors import ResuscitateError
from ..methods.base import check_number
from ..network.layers import unwrap
from ..network.runner import first_images
from ..reports.agreement import Agreement
from ..reports.base import plain
from ..runtime.distributed import fails_on_all
from ..runtime.options import DEFAULTS, run_options
from ..utils.arguments import IMAGES, NETWORK, NUMBER, check_places
from ..utils.progress import track
from .agreement import are_logits, comparable
from .compress import CompressReport, compress
from .steps import options_of_steps

log = logging.getLogger("resuscitate")
PATTERNS = "unstructured", "filter"
NO_LOGITS = (
    "the outputs are not logits (N, K), so there is no agreement to keep: call compress with a sparsity, and compare "
    "the networks by a measure of your own"
)
LEAST_DENSITY = 1 / 64  # of the weights, the fewest that a trial keeps is a little more


class Trial(NamedTuple):
    """One sparsity that was tried: the part of the images with the dense network's class, and the seconds taken."""

    sparsity: float
    agreement: float
    seconds: float


@dataclass(kw_only=True)
class TargetReport(CompressReport):
    """The result of `compress_to_agreement`: that of its best `compress`, the `target`, and all `trials` in order."""

    target: float
    trials: list[Trial] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As `CompressReport.to_dict`, with target and trials."""
        trials = [plain(trial._asdict()) for trial in self.trials]
        return {**super().to_dict(), "target": self.target, "trials": trials}

    def outcome(self) -> list[str]:
        tried = ", ".join(f"{agreement:.3f} at {sparsity:.1%}" for sparsity, agreement, _ in sorted(self.trials))
        return [*super().outcome(), f"agreement by sparsity: {tried}; wanted: {self.target:g}"]


@fails_on_all
def compress_to_agreement(
    model: nn.Module,
    agreement: float,
    calibration: Any,
    *,
    trials: int = 6,
    resume: str | Path | None = None,
    **options: Any,
) -> TargetReport:
    """Compress `model` in place to the highest sparsity that keeps an agreement with the dense network.

    The agreement is that of the report of `compress`: the part of the images that have the same largest logit in both
    networks, measured on images that no weight was fitted to. So the images must be many: of 512, 51 are held out, and
    each of them counts 0.02.

    The cost is `trials` calls of `compress`, and one more unless the last one is the best. They bisect a sequence of
    2^trials - 1 sparsities; from one to the next the same fraction of the remaining weights is pruned, and the last
    keeps about one weight of 64. The search takes it that the agreement falls with the sparsity. All or nothing, as
    `compress`.

    Args:
        agreement: from 0 to 1, such as 0.98.
        calibration: as in `compress`. The images are read once.
        trials: the number of sparsities to try. 6: each prunes a sixteenth of what the one before keeps.
        resume: a folder, with one folder of journals for each trial, as in `compress`.
        options: of `compress`, but for the sparsity; `steps` is a number, `pattern` "unstructured" or "filter".

    Raises what `compress` raises; ResuscitateError where no trial keeps the agreement, or the outputs are not logits;
    ValueError for an agreement or a number that is out of range.
    """
    places: dict[str, Any] = {"model": (model, NETWORK), "agreement": (agreement, NUMBER)}
    check_places("compress_to_agreement(model, 0.98, images)", **places, calibration=(calibration, IMAGES))
    if not 0 < agreement <= 1:
        raise ValueError(f"agreement={agreement} is not in (0, 1]: it is a part of the images, such as 0.98")
    check_number("trials", trials, 1, whole=True)
    if not isinstance(options.get("steps", 1), int):
        raise ValueError("steps must be a number here: the sparsities are searched for")
    if (pattern := options.get("pattern", "unstructured")) not in PATTERNS:
        raise ValueError(f"pattern={pattern!r} has no sparsity to search for; there are {', '.join(PATTERNS)}")
    model, started = unwrap(model), time.perf_counter()
    run = run_options("compress_to_agreement()", {name: options[name] for name in DEFAULTS if name in options})
    with Session([model], run, writes=True, measures=False) as session:
        images, settings = session.hold(calibration), {**options, **options_of_steps(run)}
        _check_logits(session, images)
        found, low, high = list[Trial](), 0, 2**trials
        for _ in track(range(trials), "search", trials, session.show):
            middle = (low + high) // 2
            report = _try(model, _sparsity(middle, trials), images, resume, settings)
            found.append(Trial(report.sparsity, _reached(report), report.seconds))
            if len(found) == 1:
                _warn_if_few(report.agreement, agreement)
            log.info("sparsity %.4f: agreement %.4f", report.sparsity, found[-1].agreement)
            kept = found[-1].agreement >= agreement
            low, high = (middle, high) if kept else (low, middle)
            if not (kept and high - low == 1):
                report.undo()
        if not low:
            raise ResuscitateError(
                f"at a sparsity of {found[-1].sparsity:.1%}, the lowest that was tried, the agreement "
                f"is {found[-1].agreement:.3f}, not {agreement:g}: ask for less, or give more images"
            )
        if not kept:
            report = _try(model, _sparsity(low, trials), images, resume, settings)
        session.snapshot.forget_unchanged()
        parts = {each.name: getattr(report, each.name) for each in fields(report)}
        parts |= {"seconds": time.perf_counter() - started, "_undo": session.snapshot.undo}
        return TargetReport(**parts, target=agreement, trials=found)


def _check_logits(session: Session, images: list[Any]) -> None:
    """Raise ResuscitateError where the outputs of the dense network for a few images are no logits."""
    example = session.ranks.lend(first_images(images[0]) if images else None)
    with Session(session.models, session.run, ranks=session.ranks) as looking:
        if not are_logits(comparable(run_first(looking.net.run, example))):
            raise ResuscitateError(NO_LOGITS)


def _sparsity(index: int, trials: int) -> float:
    return 1 - LEAST_DENSITY ** (index / 2**trials)


def _try(
    model: nn.Module, sparsity: float, images: Any, resume: str | Path | None, options: dict[str, Any]
) -> CompressReport:
    folder = None if resume is None else Path(resume) / f"sparsity-{sparsity!r}"
    return compress(model, sparsity, images, resume=folder, **options)


def _reached(report: CompressReport) -> float:
    """The agreement of the model as it is now."""
    found = report.agreement
    reached = None if found is None else found.before if report.undone else found.after
    if reached is None:
        raise ResuscitateError(NO_LOGITS)
    return reached


def _warn_if_few(found: Agreement | None, wanted: float) -> None:
    if found is not None and found.images * (1 - wanted) < 1 and wanted < 1:
        few = "the agreement is measured on %d images, so that %g allows none of them another class; give more images"
        log.warning(few, found.images, wanted)
