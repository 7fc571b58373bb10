"""Regrowth: restore the most important weights or channels of a network pruned past its target, and repair it.

After the bidirectional pruning and regrowth of arXiv 2511.11675, without its training.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Unpack, get_args

import torch
from torch import Tensor, nn

from ..data.augment import Augment
from ..engine.session import Session
from ..errors import MaskError, ModelMismatchError
from ..methods.base import Method, check_number
from ..network.layer_checks import same_layers
from ..network.layers import find_layers, unwrap
from ..network.masks import Masks
from ..network.runner import first_images
from ..network.snapshot import flags_kept
from ..pruning.allocation import check_sparsity
from ..pruning.importance import ImportanceEstimator, Loss
from ..pruning.regrowth import Budget, RegrowableChannels, RegrowableWeights, RegrowthSelector, Saliency, sparsity_steps
from ..pruning.structured import restore_units, shrink
from ..reports.agreement import Agreement
from ..reports.repair import COLUMNS, RepairReport
from ..runtime.distributed import Ranks, fails_on_all
from ..runtime.options import RunOptions, check_choice
from ..utils.arguments import IMAGES, MASKS, NETWORK, NUMBER, check_places
from ..utils.digest import digest_model
from ..utils.progress import track
from .plan import Plan
from .steps import Steps, StepsReport, check_means, plan_of_steps

log = logging.getLogger("resuscitate")
Initial = Literal["dense", "refit", "zero"]
Pattern = Literal["unstructured", "channels"]


@dataclass(frozen=True)
class GrowthRound:
    """One round of `regrow`.

    `sparsity` and `score`, of `evaluate`, after the round; `report` of its repair. `regrown`: by layer the number of
    weights, or by group the number of units of channels. `damage`: by layer, before the round, the part of the outputs'
    variance that is lost, or 1 - SSIM; empty if not measured.
    """

    sparsity: float
    regrown: dict[str, int]
    damage: dict[str, float]
    score: float | None = None
    report: RepairReport | None = None


@dataclass(kw_only=True, eq=False)
class RegrowthReport(StepsReport, Mapping[str, Tensor]):
    """The result of `regrow`: the new `masks`, the `rounds`, `seconds` in all. As a mapping it is the masks."""

    rounds: list[GrowthRound]

    work: ClassVar[str] = "regrowth"
    step: ClassVar[str] = "round"
    titles: ClassVar[tuple[str, ...]] = "regrown", "score"
    columns: ClassVar[Sequence[str]] = "round", "sparsity", "score", "regrown", "damage", *COLUMNS

    def __getitem__(self, name: str) -> Tensor:
        return self.masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.masks)

    def __len__(self) -> int:
        return len(self.masks)

    @property
    def regrown(self) -> dict[str, int]:
        """Layer (or group) -> number of weights (or units of channels) regrown, over all rounds."""
        names = dict.fromkeys(name for each in self.rounds for name in each.regrown)
        return {name: sum(each.regrown.get(name, 0) for each in self.rounds) for name in names}

    def each_step(self) -> Iterator[tuple[dict[str, Any], Iterable[dict[str, Any]], tuple[str, ...]]]:
        for each in self.rounds:
            repaired = {row["name"]: row for row in each.report.rows()} if each.report else {}
            names = dict.fromkeys([*each.regrown, *repaired])
            given = {n: {"name": n, "regrown": each.regrown.get(n), "damage": each.damage.get(n)} for n in names}
            rows = [{"score": each.score, **given[name], **repaired.get(name, {})} for name in names]
            cells = f"{sum(each.regrown.values()):,}", "" if each.score is None else f"{each.score:.2f}"
            yield {**vars(each), "report": each.report and each.report.to_dict()}, rows, cells


@fails_on_all
def regrow(
    model: nn.Module,
    dense: nn.Module,
    masks: Mapping[str, Any],
    sparsity: float,
    calibration: Any,
    *,
    pattern: Pattern = "unstructured",
    budget: Budget = "greedy",
    densities: Mapping[str, float] | None = None,
    saliency: Saliency | Mapping[str, Any] = "magnitude",
    initial: Initial = "dense",
    rounds: int = 1,
    method: Method | str | None = "auto",
    evaluate: Callable[[nn.Module], float] | None = None,
    accuracy: float | None = None,
    finetune: Callable[[nn.Module, Masks], Any] | None = None,
    labelled: Iterable[tuple[Any, Tensor]] | None = None,
    loss: Loss | None = None,
    augment: Augment | None = None,
    draws: int = 1,
    resume: str | Path | None = None,
    keep_worse: bool = False,
    **options: Unpack[RunOptions],
) -> RegrowthReport:
    """Regrow the most important pruned weights of a model until it has a lower sparsity, and repair it, in place.

    Exactly round(sparsity * total) weights of the masked layers stay pruned. All or nothing: on an error nothing is
    changed. Returns the new masks and a report of each round.

    Args:
        dense: the network before pruning, with the layers of the masks.
        masks: the present masks, as from `sparsify`, `compress` or `Masks.from_zeros(model)`. Weights are regrown only
            in layers with a mask; the sparsity, at most that of the masks, is of these layers' original weights.
        pattern: "channels" regrows whole channels: the masks are those of `sparsify(pattern="channels")`, and the
            sparsity is a fraction of the channels that can be removed, as there. If the channels were removed from the
            model (`remove=True`, `shrink`), the regrown ones are added again to its layers, BatchNorms and consumers.
        budget: how many weights are regrown in each layer. "greedy": one ranking over all layers by saliency.
            "proportional": in proportion to the number of pruned weights. "damage": the same, times the fraction of the
            output lost (1 - corr^2 per channel, averaged with the dense variance as weight). "ssim": with 1 - SSIM of
            the feature maps in its place, as published.
        densities: {glob over layer names: density after the last round} of layers with a fixed density, which they
            approach in equal steps.
        saliency: which weights of a layer are regrown. "magnitude": the largest dense ones. "residual": those that,
            each alone, reduce the squared error of the layer's output most, on its present inputs; the reductions
            overlap, so use several rounds. "gradient": largest (dL/dw)^2 w^2 of the dense network, summed over the
            batches of `labelled`, pairs of images and labels (arXiv 2511.11675); `loss(output, labels)`, None:
            cross-entropy. Or denser masks: first the weights that these keep, then the others, by magnitude. With
            "channels": the mean over the weights of a channel's producers and consumers; "residual" is for weights.
        initial: the first value of regrown weights: "dense", "zero", or "refit": the least-squares solution without a
            ridge towards the dense value. (In a refit, the ridge is towards "dense".)
        rounds: number of equal steps.
        method: of the `repair` after each round; None: no repair, only `finetune`.
        evaluate, accuracy: stop after the first round in which `evaluate(model)` is at least `accuracy`. All ranks call
            it, and the value of rank 0 counts.
        finetune: called as `finetune(model, masks)` after each round's repair; pruned weights are set to zero after it.
            The next round's repair starts from its result, but its targets are those of the dense network: with enough
            labels to train, method=None may be better.
        augment, draws: as in `repair`, for the repairs.
        resume: a folder for journals, as in `compress`. They do not contain a fine-tuning.
        keep_worse: keep a regrowth that takes the outputs further from the dense network's, as in `repair`. By default
            it is undone, with a warning, unless there is a `finetune`, which may do so on purpose.
        calibration: as in `repair`, held in memory as in `compress`.
        options: see `RunOptions`; the options of the method may be among them, with its name.

    Raises ValueError for an unknown choice and for a sparsity above that of the masks; MaskError for masks of another
    model and if `finetune` changes the masks; the errors of `repair`.
    """
    started = time.perf_counter()
    places: dict[str, Any] = {"model": (model, NETWORK), "dense": (dense, NETWORK), "masks": (masks, MASKS)}
    places |= {"sparsity": (sparsity, NUMBER), "calibration": (calibration, IMAGES)}
    check_places("regrow(model, dense, masks, sparsity, images)", **places)
    choices: dict[str, Any] = {"budget": budget, "saliency": saliency, "initial": initial, "rounds": rounds}
    choices |= {"labelled": labelled, "loss": loss}
    plan = plan_of_growth(
        dense,
        pattern,
        method=method,
        evaluate=evaluate,
        accuracy=accuracy,
        augment=augment,
        draws=draws,
        **choices,
        **options,
    )
    check_sparsity(sparsity)
    model, dense, masks = unwrap(model), unwrap(dense), Masks(masks)
    found, given = list[GrowthRound](), masks
    with Session([model], plan.run, writes=True, measures=False) as session:
        choices |= {"pattern": pattern, "densities": densities, "finetune": finetune}
        choices |= {"dense": dense, "masks": masks, "sparsity": sparsity}
        if method is None:  # the plan has method "bn" in its place
            choices["method"] = None
        steps, ranks = Steps(session, plan, calibration, resume, choices), session.ranks
        example = None
        if pattern == "channels":
            example = ranks.lend(first_images(steps.batches[0]) if steps.batches else None)
            example = ranks.lend(None if ranks.rank else example)  # rank 0's, so that all see the same groups
        shrunk = example is not None and restore_units(model, dense, masks, example)
        space = RegrowableWeights(dense, masks) if example is None else RegrowableChannels(dense, masks, example)
        if dense is model:
            raise ModelMismatchError("dense is the pruned model itself; pass a copy made before pruning")
        if not masks:
            raise ValueError("masks is empty: pass what sparsify returned, or Masks.from_zeros(model)")
        masks.check(model)
        same_layers({name: find_layers(model)[name] for name in masks}, dense)
        estimator = ImportanceEstimator(dense, steps.batches, steps.run, ranks)
        selector = RegrowthSelector(space, estimator, budget, saliency, densities)
        if saliency == "gradient":
            selector.importance = estimator.sensitivity(space.names, labelled or (), loss)
        before = None if method is None else steps.nearness(model, dense)
        goals = sparsity_steps(*space.counts(masks), sparsity, rounds)
        for index, goal in enumerate(track(goals, "regrow", len(goals), session.show), 1):
            journal = steps.journal(f"round-{index}-importance")
            grown, regrown, damage = selector.select(model, masks, goal, len(goals) + 1 - index, journal)
            space.initialise_weights(model, masks, grown, initial == "dense")
            masks, report = grown, None
            if method is not None:
                more = {"masks": masks} if plan.method.changes_layers else {}
                report = steps.repair("regrow", f"round-{index}", model, dense, **more)
            if finetune is not None:
                _finetune(finetune, model, masks, ranks)
            total, pruned = space.counts(masks)
            score = None if evaluate is None else _score(evaluate, model, ranks)
            found.append(GrowthRound(pruned / total, regrown, damage, score, report))
            log.info("round %d: sparsity %.4f, score %s", index, found[-1].sparsity, score)
            if score is not None and accuracy is not None and score >= accuracy:
                break
        counts = {name: int(mask.sum()) - int(given[name].sum()) for name, mask in masks.items()}
        masks = Masks(masks, {name: f"{count:,} regrown" for name, count in counts.items() if count})
        masks.check(model)
        agreement = Agreement.of(before, steps.nearness(model, dense) if before else None)
        if shrunk and example is not None:
            shrink(model, masks, example)
        session.snapshot.forget_unchanged()
        seconds, undo = time.perf_counter() - started, session.snapshot.undo
        result = RegrowthReport(masks=masks, seconds=seconds, agreement=agreement, _undo=undo, rounds=found)
        if plan.follows_dense and not keep_worse and finetune is None:
            result.undo_if_worse()
            result.masks = given if result.undone else masks
        return result


def plan_of_growth(
    dense: nn.Module,
    pattern: Pattern,
    /,
    budget: Budget = "greedy",
    saliency: Saliency | Mapping[str, Any] = "magnitude",
    initial: Initial = "dense",
    rounds: int = 1,
    method: Method | str | None = "auto",
    evaluate: object = None,
    accuracy: float | None = None,
    labelled: object = None,
    loss: object = None,
    augment: Augment | None = None,
    draws: int = 1,
    **options: Any,
) -> Plan:
    """The plan of the repairs in a `regrow` with these choices, and with options of the method and of the run.

    `pattern` is positional-only, so that a column of a map that names it is refused. Raises ValueError for a choice
    that there is not, or that contradicts another.
    """
    check_number("rounds", rounds, 1, whole=True)
    check_choice("pattern", pattern, get_args(Pattern))
    check_choice("budget", budget, get_args(Budget))
    check_choice("initial", initial, get_args(Initial))
    if not isinstance(saliency, Mapping):
        check_choice("saliency", saliency, get_args(Saliency))
    if pattern == "channels" and saliency == "residual":
        raise ValueError("saliency 'residual' is of single weights; choose 'magnitude' or 'gradient' for channels")
    if (saliency == "gradient") != (labelled is not None):
        raise ValueError("labelled, pairs of images and labels, is for saliency 'gradient', which needs it")
    if loss is not None and saliency != "gradient":
        raise ValueError("loss is for saliency 'gradient'")
    if accuracy is not None and evaluate is None:
        raise ValueError("accuracy is a goal for evaluate(model): pass that too")
    plan = plan_of_steps("regrow()", dense, "bn" if method is None else method, options, augment=augment, draws=draws)
    check_means(plan.method, "rounds", rounds)
    if pattern == "channels" and plan.run["forward_fn"] is not None:
        raise ValueError("pattern 'channels' traces the model on plain images: it takes no forward_fn")
    if initial == "refit" and (method is None or not plan.method.finds_weights):
        raise ValueError("initial='refit' needs a refit to find the values: choose method='refit'")
    return plan


def _finetune(finetune: Callable[[nn.Module, Masks], Any], model: nn.Module, masks: Masks, ranks: Ranks) -> None:
    """Call `finetune`, then set pruned weights to zero. Raises MaskError if it changed the masks."""
    given = Masks({name: mask.clone() for name, mask in masks.items()}, masks.notes)
    with flags_kept(model):
        finetune(model, given)
    for name, mask in masks.items():
        if name not in given or not torch.equal(given[name], mask):
            raise MaskError(name, "finetune changed its mask; it may change kept weights only")
    masks.apply_(model)
    ranks.check_same("a fine-tuned model", digest_model(model))


def _score(evaluate: Callable[[nn.Module], float], model: nn.Module, ranks: Ranks) -> float:
    """The value of `evaluate` for the model in eval mode; with ranks, that of rank 0."""
    with flags_kept(model):
        score = float(evaluate(model.eval()))
    if not math.isfinite(score):
        raise ValueError(f"evaluate returned {score}; it must return a finite score")
    return float(ranks.add(torch.tensor([score if ranks.rank == 0 else 0.0], dtype=torch.float64)))
