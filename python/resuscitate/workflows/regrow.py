"""Bidirectional pruning: a network that was pruned past its target is given back what it misses most, and repaired.

After the bidirectional pruning and regrowth of arXiv 2511.11675, without its training.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..data.batches import first_images, read_share
from ..data.calibration import hold
from ..engine.room import in_memory
from ..errors import MaskError, ModelMismatchError
from ..methods.choices import check_options
from ..network.layers import find_layers, unwrap
from ..network.masks import Masks
from ..network.matching import same_layers
from ..network.runner import as_dtype
from ..network.snapshot import Snapshot, flags_kept
from ..pruning.importance import Loss, Surveyor
from ..pruning.regrowth import Budget, Channels, Chooser, Saliency, Weights, stops
from ..pruning.structured import restore_units, shrink
from ..reports.repair import COLUMNS, ENDINGS, RepairReport
from ..runtime.distributed import Ranks
from ..runtime.journal import Journal, told
from ..utils.arguments import IMAGES, MASKS, NETWORK, NUMBER, check_places
from ..utils.digest import MODULUS, digest_images, digest_model
from ..utils.files import check_ending, write_rows
from ..utils.progress import track
from .repair import DEFAULTS, repair

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

log = logging.getLogger("resuscitate")
Initial = Literal["dense", "refit", "zero"]
Pattern = Literal["unstructured", "channels"]


@dataclass(frozen=True)
class GrowthRound:
    """One round: the sparsity it ended at, the weights (or units of channels) each layer (or group) was given back.

    `damage` is what of each layer's output was lost before it, where the budget asked for that; `score` is what
    `evaluate` said after it, and `report` that of its repair.
    """

    sparsity: float
    regrown: dict[str, int]
    damage: dict[str, float]
    score: float | None = None
    report: RepairReport | None = None


class Regrowth(Masks):
    """The masks after `regrow`, and how they came about: `rounds`, and `seconds` in all."""

    def __init__(self, masks: Masks, rounds: list[GrowthRound], seconds: float, undo: Callable[[], None]) -> None:
        super().__init__(masks, masks.notes)
        self.rounds, self.seconds = rounds, seconds
        self._undo: Callable[[], None] | None = undo

    @property
    def regrown(self) -> dict[str, int]:
        """How many weights (or units of channels) each layer (or group) was given back in all."""
        totals: dict[str, int] = {}
        for each in self.rounds:
            for name, count in each.regrown.items():
                totals[name] = totals.get(name, 0) + count
        return totals

    def undo(self) -> None:
        """Put the model back as it was given, bit for bit. Raises RuntimeError the second time."""
        if self._undo is None:
            raise RuntimeError("this regrowth has been undone already")
        self._undo()
        self._undo = None

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data, ready for JSON."""
        rounds = [
            {**vars(each), "report": None if each.report is None else each.report.to_dict()} for each in self.rounds
        ]
        return {"rounds": rounds, "masks": [row._asdict() for row in self.table()], "seconds": self.seconds}

    def save(self, path: str | Path, provenance: Mapping[str, Any] | None = None) -> None:
        """Write .safetensors (the masks, as `Masks.save`), .json (everything) or .csv (a row for each layer and round).

        Whole or not at all; .csv has no place for `provenance`. Raises OSError; ValueError for another ending.
        """
        if check_ending(path, *ENDINGS) == ".safetensors":
            return super().save(path, provenance)
        rows = []
        for index, each in enumerate(self.rounds):
            repaired = {row["name"]: row for row in each.report.rows()} if each.report else {}
            shared = {"round": index + 1, "sparsity": each.sparsity, "score": each.score}
            for name in dict.fromkeys([*each.regrown, *repaired]):
                given = {"name": name, "regrown": each.regrown.get(name), "damage": each.damage.get(name)}
                rows.append({**shared, **given, **repaired.get(name, {})})
        document = self.to_dict() | ({"provenance": dict(provenance)} if provenance else {})
        write_rows(path, document, ["round", "sparsity", "score", "regrown", "damage", *COLUMNS], rows)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table

        table = Table("round", box=None, header_style="bold")
        for title in ("sparsity", "given back", "score"):
            table.add_column(title, justify="right")
        for index, each in enumerate(self.rounds):
            score = "" if each.score is None else f"{each.score:.2f}"
            table.add_row(str(index + 1), f"{each.sparsity:.2%}", f"{sum(each.regrown.values()):,}", score)
        yield table
        yield from super().__rich_console__(console, options)
        yield f"{self.seconds:.2f} s"


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
    method: str | None = "auto",
    evaluate: Callable[[nn.Module], float] | None = None,
    accuracy: float | None = None,
    finetune: Callable[[nn.Module, Masks], Any] | None = None,
    labelled: Iterable[tuple[Any, Tensor]] | None = None,
    loss: Loss | None = None,
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
) -> Regrowth:
    """Give a pruned model back the weights it misses most, down to a sparsity, and repair it, in place.

    Returns the new masks, with what each layer was given. Exact: round(sparsity * total) weights of the masked layers
    stay pruned. All or nothing: on an error every tensor is as it was.

    Args:
        dense: the network before pruning, with the layers of the masks.
        masks: what is pruned now, as from `sparsify`, `compress` or `Masks.from_zeros(model)`. Only layers with a mask
            are given weights, and the sparsity is of their original weights.
        sparsity: a float, at most what the masks have.
        pattern: "channels" gives back whole channels: the masks are those of `sparsify(pattern="channels")` and the
            sparsity is a fraction of the channels that can go, as there. A model from which they were taken out
            (`remove=True`, `shrink`) grows, in its layers, BatchNorms and their readers, and stays without the rest.
        budget: which layers are given how much. "greedy": one ranking over all of them by saliency. "damage": in
            proportion to what is pruned times what is lost of the output (1 - corr^2 per channel, by dense variance).
            "ssim": the same with 1 - SSIM of the feature maps, as published. "proportional": to what is pruned.
        densities: {glob over layer names: final density} for layers to be brought to just that.
        saliency: which weights of a layer. "magnitude": the largest dense ones. "residual": those that, each alone,
            would take most off the squared error of the layer's output on the inputs that it has now; they overlap, so
            use several rounds. "gradient": (dL/dw)^2 w^2 of the dense network, summed over the batches of `labelled`,
            pairs of images and labels (arXiv 2511.11675); `loss(output, labels)`, None: cross-entropy. Or denser masks:
            first what they keep, then the rest, by magnitude. With "channels", the mean over all that makes and reads a
            channel; "residual" is for weights.
        initial: the value of what comes back: "dense", "zero", or "refit": found by least squares alone, with no pull
            towards the dense value. (Under a refit "dense" is what its ridge pulls towards.)
        rounds: in how many equal parts.
        method: of the `repair` after each round; None: none, for `finetune` to do.
        evaluate, accuracy: stop after the first round in which `evaluate(model)` is at least `accuracy`. Under ranks
            that of rank 0 counts.
        finetune: called as `finetune(model, masks)` after each round's repair; pruned weights are set to zero after it.
            The next round's repair starts from it but pulls towards the dense network: with labels enough to train,
            method=None may be better.
        resume: a folder for journals, as in `compress`. A fine-tuning is not in them.
        calibration and the others: as in `repair`. The images are read once, and held, as in `compress`.

    Raises ValueError for a choice that there is not, a sparsity above that of the masks; MaskError for masks of another
    model, and where `finetune` changes them; what `repair` raises.
    """
    chosen, started, ranks = dict(locals()), time.perf_counter(), Ranks(group)
    places: dict[str, Any] = {"model": (model, NETWORK), "dense": (dense, NETWORK), "masks": (masks, MASKS)}
    places |= {"sparsity": (sparsity, NUMBER), "calibration": (calibration, IMAGES)}
    check_places("regrow(model, dense, masks, sparsity, images)", **places)
    with ranks.together():
        check_choices(chosen, dense, ranks)
    model, dense, masks = unwrap(model), unwrap(dense), Masks(masks)
    folder = None if resume is None else Path(resume)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    reading: dict[str, Any] = {"max_samples": max_samples, "max_batches": None, "batch_size": batch_size}
    running: dict[str, Any] = {"forward_fn": forward_fn, "dtype": dtype, "device": device, "memory": memory}
    running |= {"scratch": scratch, "seed": seed}
    found, given = list[GrowthRound](), masks
    with Snapshot(model) as snapshot, snapshot.settling() as stack, ranks.together():
        reading |= {"raw": forward_fn is not None, "room": in_memory(memory, device, model)}
        batches = hold(calibration, read_share(calibration, ranks, **reading))
        if folder is not None:
            (images,) = ranks.total(digest_images(batches))
            # evaluate and accuracy say when to stop, which is not in the journals
            options = told(chosen, "model", "dense", "calibration", "max_samples", "evaluate", "accuracy")
            options |= {"dtype": str(as_dtype(dtype))}
            identity = {"model": digest_model(model), "dense": digest_model(dense), "images": images % MODULUS}
            stack.enter_context(Journal(folder / "run.journal", {**identity, "options": options}, ranks))
        example = None
        if pattern == "channels":
            example = ranks.lend(first_images(batches[0]) if batches else None)
            example = ranks.lend(None if ranks.rank else example)  # rank 0's, for all to see the same groups
        shrunk = example is not None and restore_units(model, dense, masks, example)
        space = Weights(dense, masks) if example is None else Channels(dense, masks, example)
        _check_masks(model, dense, masks)
        chooser = Chooser(space, Surveyor(dense, batches, ranks, **running), budget, saliency, densities)
        if saliency == "gradient":
            chooser.worth = chooser.surveyor.sensitivity(space.names, labelled or (), loss)
        show = progress if ranks.rank == 0 else False
        goals = stops(*space.counts(masks), sparsity, rounds)
        for index, goal in enumerate(track(goals, "regrow", len(goals), show)):
            names = f"round-{index + 1}-needs.journal", f"round-{index + 1}.journal"
            journals = [None if folder is None else folder / name for name in names]
            grown, regrown, damage = chooser.choose(model, masks, goal, journals[0])
            space.plant(model, dense, masks, grown, initial == "dense")
            masks, report = grown, None
            if method is not None:
                repairing: dict[str, Any] = {"method": method, **running, "group": group, "resume": journals[1]}
                repairing |= {} if method == "bn" else {"masks": masks}
                report = repair(model, dense, batches, **repairing, progress=False)
                report.belongs_to("what regrow returned")
            if finetune is not None:
                _finetune(model, masks, finetune, ranks)
            total, gone = space.counts(masks)
            score = None if evaluate is None else _score(model, evaluate, ranks)
            found.append(GrowthRound(gone / total, regrown, damage, score, report))
            log.info("round %d: sparsity %.4f, score %s", index + 1, found[-1].sparsity, score)
            if score is not None and accuracy is not None and score >= accuracy:
                break
        masks = Masks(masks, {name: f"{count:,} given back" for name, count in _added(given, masks).items() if count})
        masks.check(model)
        if shrunk and example is not None:
            shrink(model, masks, example)
        snapshot.forget_unchanged()
        return Regrowth(masks, found, time.perf_counter() - started, snapshot.restore)


def check_choices(options: Mapping[str, Any], dense: nn.Module, ranks: Ranks) -> None:
    """Raise ValueError for options of `regrow`, by name, that there are not, or that do not go together."""
    names = "pattern", "saliency", "initial", "rounds", "method", "labelled"
    pattern, saliency, initial, rounds, method, labelled = (options[name] for name in names)
    for option, choices in (
        ("pattern", get_args(Pattern)),
        ("budget", get_args(Budget)),
        ("saliency", get_args(Saliency)),
        ("initial", get_args(Initial)),
    ):
        value = options[option]
        if value not in choices and not (option == "saliency" and isinstance(value, Mapping)):
            raise ValueError(f"{option}={value!r} is unknown; there are {', '.join(map(repr, choices))}")
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"rounds={rounds!r} must be a whole number of at least 1")
    if pattern == "channels" and saliency == "residual":
        raise ValueError("saliency 'residual' is of single weights; choose 'magnitude' or 'gradient' for channels")
    if pattern == "channels" and options["forward_fn"] is not None:
        raise ValueError("pattern 'channels' traces the model on plain images: it takes no forward_fn")
    if initial == "refit" and method not in ("auto", "refit"):
        raise ValueError(f"initial='refit' needs a refit to find the values, not method={method!r}")
    if (saliency == "gradient") != (labelled is not None):
        raise ValueError("labelled, pairs of images and labels, is for saliency 'gradient', which needs it")
    if options["loss"] is not None and saliency != "gradient":
        raise ValueError("loss is for saliency 'gradient'")
    if options["accuracy"] is not None and options["evaluate"] is None:
        raise ValueError("accuracy is a goal for evaluate(model): pass that too")
    if method is not None:
        check_options({**DEFAULTS, "method": method}, DEFAULTS, dense, ranks)


def _check_masks(model: nn.Module, dense: nn.Module, masks: Masks) -> None:
    """Raise MaskError or ModelMismatchError unless the masks are of this model, and it has the dense one's layers."""
    if dense is model:
        raise ModelMismatchError("dense is the pruned model itself; pass a copy made before pruning")
    if not masks:
        raise ValueError("masks is empty: pass what sparsify returned, or Masks.from_zeros(model)")
    masks.check(model)
    same_layers({name: find_layers(model)[name] for name in masks}, dense)


def _added(before: Masks, after: Masks) -> dict[str, int]:
    """By layer, how many weights the masks keep more than they did."""
    return {name: int(mask.sum()) - int(before[name].sum()) for name, mask in after.items()}


def _finetune(model: nn.Module, masks: Masks, finetune: Callable[[nn.Module, Masks], Any], ranks: Ranks) -> None:
    """Let the user train, and have the pruned weights stay zero. Raises MaskError where the masks were changed."""
    given = Masks({name: mask.clone() for name, mask in masks.items()}, masks.notes)
    with flags_kept(model):
        finetune(model, given)
    for name, mask in masks.items():
        if name not in given or not torch.equal(given[name], mask):
            raise MaskError(name, "finetune changed its mask; it may change kept weights only")
    masks.apply_(model)
    ranks.check_same("a fine-tuned model", digest_model(model))


def _score(model: nn.Module, evaluate: Callable[[nn.Module], float], ranks: Ranks) -> float:
    """What the user's function says of the model in eval mode; under ranks, on rank 0."""
    with flags_kept(model):
        score = float(evaluate(model.eval()))
    if not math.isfinite(score):
        raise ValueError(f"evaluate returned {score}, not a score")
    return float(ranks.add(torch.tensor([score if ranks.rank == 0 else 0.0], dtype=torch.float64)))
