"""The main function: repair a pruned network from unlabelled images, in place, all or nothing."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..data.batches import Batches, most_images, rebatch
from ..data.checks import NORMALISED_FROM, warn_of_normalisation
from ..engine.probes import Layer, Measurement, Probe
from ..engine.reference import (
    TARGET,
    Dense,
    DenseStatistics,
    Target,
    as_target,
    compare_images,
    describe,
    fill_reference,
    identify,
)
from ..engine.session import Session
from ..engine.writer import Writer
from ..errors import CalibrationError, ResuscitateError
from ..methods.base import DenseAccess, Method, Schedule
from ..methods.batchnorm import EMA, batchnorms_to_estimate
from ..network.layers import Selector, unwrap
from ..network.masks import Masks, in_use
from ..network.runner import first_images
from ..reports.repair import RepairReport
from ..runtime.distributed import Ranks
from ..runtime.journal import Journal
from ..runtime.options import RunOptions, identity_of
from ..statistics.base import Statistic
from ..utils.arguments import IMAGES, NETWORK, check_places
from ..utils.digest import MODULUS, digest_images, digest_model, digest_tensors, fingerprint
from ..utils.progress import Stopwatch, track
from .layer_selection import copy_statistics, layers_to_repair, left_out, matching_layers
from .plan import Plan, Recalibrate, check_read, make_plan

if TYPE_CHECKING:
    from typing_extensions import Unpack

log = logging.getLogger("resuscitate")
CALL = "repair(model, dense, images), or repair(model, images, method='bn') where there is no dense network"


def repair(
    model: nn.Module,
    dense: Dense | None = None,
    calibration: Any = None,
    *,
    method: Method | str = "auto",
    schedule: Schedule = "sequential",
    recalibrate: Recalibrate = "auto",
    gain_samples: int | None = None,
    include: Iterable[Selector] | Selector | None = None,
    exclude: Iterable[Selector] | Selector | None = None,
    masks: Mapping[str, Any] | None = None,
    skip_first: bool | None = None,
    skip_last: bool | None = None,
    diagnostics: bool = False,
    resume: str | Path | None = None,
    **options: Unpack[RunOptions],
) -> RepairReport:
    """Repair `model`, a pruned copy of `dense`, from unlabelled images, in place; returns what was done.

    All or nothing: when an error is raised, every tensor is as it was. Zeros stay zero; train/eval flags,
    requires_grad, device, dtype, memory format and random state stay as found. `report.undo()` undoes the repair.

    Args:
        dense: the network before pruning, with the same layers. Or `DenseStatistics`, or the file where they were
            saved: a study of many prunings then runs the dense network once. Or "running": the outputs of the layer
            before a BatchNorm are matched to that BatchNorm's running statistics, without a dense network. With
            method "channelwise" and skip_first=False this is **exact recalibration by another name**, and no stronger.
            Method "bn" needs none of them, and takes the images in this place too.
        calibration: images: a tensor (N, ...), or any iterable of tensors, tuples or dicts that hold one, or a
            function that returns such an iterable. Read once. No labels are used. Under ranks, this rank's own share.
        method: a `Method` such as `Refit(ridge=0.1)`, or the name of one, with its options as further keywords if any.
            "refit": new values for all surviving weights, by least squares. "asr", "channelwise" and "layerwise": a
            gain and a shift for each channel (arXiv 2605.21426). "mean": pruned weights are replaced by their mean.
            "bn": BatchNorm alone is re-estimated. "auto" is "refit" where `dense` is a model and the schedule is
            sequential, else "asr".
        schedule: "sequential" measures each layer when all earlier ones are corrected; "parallel", as published,
            measures all on the unrepaired network.
        recalibrate: None keeps the dense network's BatchNorm statistics, which corrected outputs match; they are copied
            where the pruned network's differ, except behind layers that include and exclude leave out. "exact" or
            `Exact(...)` pools them over all images and thereby **cancels** the gain and the shift of every layer that a
            BatchNorm alone reads; it does not cancel a refit. "ema" or `EMA(...)` is the published protocol, which
            also resets a shift that a BatchNorm took. "auto": "exact" for "bn", else None.
        gain_samples: the number of images for the layers; None: all that are read.
        include, exclude: layers to repair, as globs over their names or as module types.
        masks: which weights are in use, as `Masks` or {layer: boolean tensor}; a refit then finds values also for
            weights that are in use but zero. None, or a layer without a mask: the weights that are not zero.
        skip_first: leave the first convolution unchanged, as published. None: as the method says (`skips_first`).
        skip_last: leave the last layer unchanged where no BatchNorm reads it (the classifier). None: as the method
            says (`skips_last`).
        diagnostics: report for each layer which part of the dense variance a gain can restore. Needs the dense network
            itself and the sequential schedule. It changes no weight.
        resume: a journal file to which each update is appended. A killed run goes on from it; a run that differs in
            models, images or an option that changes the result is refused. Delete it once the result is saved.
        options: see `RunOptions`.

    Raises:
        TypeError: an option that the method lacks, or an argument in the place of another one.
        ValueError: an option is unknown, out of range, or contradicts another.
        CalibrationError: no images, too few, or of an unknown kind.
        ModelMismatchError: the two networks' layers differ, or they are one and the same.
        DistributedError: another rank failed, or no longer answers.
        MaskError: `masks` are of another model, or a weight that they prune is not zero.
        JournalError: `resume` names another run's journal. CheckpointError: a statistics file cannot be read.
        LayerError, NonFiniteError: a layer cannot be repaired; the message names it, and the batch.
    """
    clock, ranks = Stopwatch(), Ranks(options.get("group"))
    with ranks.together():
        choices: dict[str, Any] = {"method": method, "schedule": schedule, "recalibrate": recalibrate}
        choices |= {"diagnostics": diagnostics, "gain_samples": gain_samples}
        plan = make_plan("repair()", dense, **choices, **options)
        if plan.method.dense is DenseAccess.NONE and calibration is None and not isinstance(dense, Dense | None):
            dense, calibration = None, dense  # no dense network is needed, and these are the images
        check_places(CALL, model=(model, NETWORK), dense=(dense, TARGET), calibration=(calibration, IMAGES))
        plan.check_dense(dense)
        given: dict[str, Any] = {"include": include, "exclude": exclude, "masks": masks}
        check_read(plan.method, **given, skip_first=skip_first, skip_last=skip_last)
    model, target = unwrap(model), as_target(dense)
    recalibration = plan.recalibration
    way = None if recalibration is None else recalibration.name
    report = RepairReport(plan.method.name, schedule, way, asdict(plan.method), ranks=ranks.size)
    layers = matching_layers(model, target, include, exclude, report) if plan.method.changes_layers else {}
    batchnorms = batchnorms_to_estimate(model, recalibration, report) if recalibration else {}
    if not plan.method.changes_layers and not batchnorms:
        raise ResuscitateError("there is no BatchNorm to re-estimate; use a method that matches the dense outputs")
    models = [model, target] if layers and isinstance(target, nn.Module) else [model]
    with Session(models, plan.run, writes=True, ranks=ranks) as session:
        images = _read(session, plan, calibration, bool(layers), report)
        clock.end("reading images")
        wiring, selected = session.look(images.batches), set(layers)
        first = plan.method.skips_first if skip_first is None else skip_first
        active = recalibration if batchnorms else None
        last = plan.method.skips_last(schedule, active) if skip_last is None else skip_last
        layers = layers_to_repair(layers, wiring, report, first, last, need_batchnorm=target == "running")
        zeros = in_use(model, layers, masks)
        seen = _layers(session, layers, zeros)
        plan.method.prepare(seen)
        probes = plan.probes(seen)
        options_used = {**plan.identity(), "layers": list(layers), "batchnorms": list(batchnorms)}
        options_used["masks"] = None if masks is None else digest_tensors(zeros)
        identity = _identity(session, target, images, options_used, resume is not None)
        if any(probe.folds > 1 for probe in probes.values()):
            images.batches.number_images(ranks)
        _match_reference(model, target, images, selected, session, report)
        journal = session.stack.enter_context(Journal(resume, identity, ranks))
        report.resumed = len(journal.entries)
        writer = Writer(session.net, wiring, seen, report, journal, ranks, plan.method.dense is not DenseAccess.NONE)
        clock.end("looking at the models")
        _update(session, plan, writer, probes, batchnorms, images, target)
        if isinstance(recalibration, EMA):
            recalibration.estimate(session.net, batchnorms, images.cut_anew)
            report.batchnorm_images = recalibration.images
            for name in batchnorms:
                writer.note_batchnorm(name)
        clock.end("measuring and correcting")
        zeros.check(model)
        report.walk = session.walk_taken
        report.bytes_spilled = sum(store.bytes_spilled for store in {session.store, session.image_store})
        session.snapshot.forget_unchanged()
        report._undo = session.snapshot.restore
        clock.end("checking")
        report.stages, report.seconds = clock.stages, sum(clock.stages.values())
        return report


@dataclass
class _Images:
    """The images of a repair: all batches, and how many of them are for the layers and for an exact recalibration.

    `cut_anew` are the batches of an EMA. `totals` counts, over all ranks, all images and those of either use.
    """

    batches: Batches
    gains: int
    exact: int
    cut_anew: Iterable[Tensor]
    totals: list[int]


def _read(session: Session, plan: Plan, calibration: Any, changes_layers: bool, report: RepairReport) -> _Images:
    """Read as many images as any step needs, and note their numbers in the report. Raises CalibrationError."""
    most, ranks = most_images(plan.image_counts, plan.run["max_samples"]), session.ranks
    marks = ranks.share(plan.gain_samples), ranks.share(plan.exact.samples if plan.exact else None)
    batches = session.read(calibration, most=most, marks=marks, beside=plan.beside)
    gains = batches.batches_for(marks[0]) if changes_layers else 0
    exact = batches.batches_for(marks[1]) if plan.exact else 0
    counts = [batches.images(count) for count in (None, gains, exact)]
    *totals, report.skipped = ranks.total(*counts, session.skipped["images"])
    _, report.images, report.batchnorm_images = totals
    if not totals[0]:
        cause = f"all {report.skipped} give NaN or infinite activations" if report.skipped else "there are none"
        raise CalibrationError(f"no images are left: {cause}")
    if session.dense is not None and len(batches) and ranks.rank == 0:
        heads = (first_images(batch, NORMALISED_FROM) for batch in batches.head())
        warn_of_normalisation(session.dense.model, heads, session.dense.run)
    ema = plan.recalibration if isinstance(plan.recalibration, EMA) else None
    cut_anew = rebatch(batches, ema.batch_size, ema.batches) if ema else ()
    return _Images(batches, gains, exact, cut_anew, totals)


def _layers(session: Session, layers: Mapping[str, nn.Module], zeros: Masks) -> dict[str, Layer]:
    """The layers as the method sees them."""
    dense = session.dense.modules if session.dense is not None else {}
    products = session.wiring.products
    return {
        name: Layer(name, module, dense.get(name), zeros[name], name in products, session.ranks)
        for name, module in layers.items()
    }


def _identity(
    session: Session, target: Target, images: _Images, options: dict[str, object], resumes: bool
) -> dict[str, object]:
    """What a journal, and the other ranks, must agree with."""
    run, ranks, model = session.run, session.ranks, session.net.model
    options |= {"images": images.totals, **identity_of(run)}
    if ranks.size > 1:
        ranks.check_same("a model or options", f"{digest_model(model)} {identify(target)} {options}")
    if not resumes:
        return {}
    # the images of each step by themselves: the digest of all of them does not depend on their order
    counts = images.gains, images.exact, None
    seen = ranks.total(*(digest_images(images.batches.head(count)) for count in counts))
    options["forward_fn"] = fingerprint(run["forward_fn"])
    digests = [digest % MODULUS for digest in seen]
    return {"model": digest_model(model), "dense": identify(target), "images": digests, "options": options}


def _match_reference(
    model: nn.Module, target: Target, images: _Images, selected: set[str], session: Session, report: RepairReport
) -> None:
    """Take over the BatchNorm statistics of the reference, and note what the report says of it."""
    if not selected:
        return
    functional = session.wiring.functional.items()
    report.notes += [f"{n} calls of functional {name} run unrepaired" for name, n in functional]
    report.target = describe(target)
    if isinstance(target, DenseStatistics):
        (digest,) = session.ranks.total(digest_images(images.batches.head(images.gains)))
        compare_images(target, report, f"{digest % MODULUS:x}")
    if isinstance(target, nn.Module | DenseStatistics):
        behind = session.wiring.batchnorm_of.items()
        copy_statistics(model, target, {each for name, each in behind if name not in selected}, report)


def _update(
    session: Session,
    plan: Plan,
    writer: Writer,
    probes: Mapping[str, Probe],
    batchnorms: Mapping[str, _BatchNorm],
    images: _Images,
    target: Target,
) -> None:
    """Measure, solve and write, layer by layer."""
    method, known, title = plan.method, set(writer.journal.entries), f"repair ({plan.method.name})"
    for name, layer in writer.layers.items():
        if name not in probes:
            writer.report.layers.append(left_out(name, layer.module, "unchanged", "the method measures nothing at it"))
    at_once = [
        Measurement(name, Statistic(session.place(name))) for name in probes if probes[name].statistic is Statistic
    ]
    updates = [method.solve(writer.layers[each.name], each.found) for each in at_once]  # all, before any is written
    for measurement, update in zip(at_once, updates, strict=True):
        writer.write(measurement, update)
    requests = plan.requests(probes, batchnorms, images.gains, images.exact)
    if plan.schedule == "parallel":
        parallel = [each for each in requests if each.name in probes]
        requests = [each for each in requests if each.name not in probes]
        unknown = [each.name for each in parallel if each.name not in known]
        passes = (track(images.batches.head(images.gains), title, images.gains, session.show) for _ in session.nets)
        found: dict[str, Statistic] = {**session.measure_all(unknown, *passes)}
        found |= {each.name: Statistic(session.place(each.name)) for each in parallel if each.name in known}
        for name, statistic in found.items():
            measurement = Measurement(name, statistic)
            fill_reference(measurement, target, session.net, session.wiring)
            writer.update(measurement, method.solve)
    requests = [replace(each, batches=0) if each.name in known else each for each in requests]
    with closing(session.walk(images.batches, requests, title, known)) as walk:
        for measurement in walk:
            if measurement.name in probes:
                fill_reference(measurement, target, session.net, session.wiring)
                writer.update(measurement, method.solve)
            elif plan.exact:
                writer.update(measurement, plan.exact.solve)
