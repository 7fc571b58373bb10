"""The carrying out of a repair that has been planned: read the images, measure, solve, write, and judge the outputs."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..data.batches import Batches, most_images, rebatch
from ..data.checks import NORMALISED_FROM, warn_of_few, warn_of_normalisation
from ..engine.kept import KeptStatistics
from ..engine.probes import Measurement, Probe, Request
from ..engine.reference import Dense, DenseStatistics, Target, as_target, fill_reference, identify
from ..engine.session import Session
from ..engine.writer import Writer
from ..errors import CalibrationError, ModelMismatchError, ResuscitateError, called, listed
from ..methods.base import DenseAccess
from ..methods.batchnorm import EMA, batchnorms_to_estimate
from ..network.layers import Selection, running_statistics, sharing_layers, unwrap
from ..network.masks import in_use
from ..network.runner import first_images
from ..reports.agreement import Agreement
from ..reports.repair import RepairReport
from ..runtime.distributed import Ranks
from ..runtime.journal import Journal
from ..runtime.options import identity_of
from ..statistics.base import Statistic
from ..utils.digest import MODULUS, digest_images, digest_model, digest_tensors, fingerprint
from ..utils.progress import Stopwatch, track
from ..utils.readout import differing
from .agreement import Judge
from .plan import Plan, layers_to_repair, left_out, matching_layers

log = logging.getLogger("resuscitate")


def carry_out(
    plan: Plan,
    model: nn.Module,
    dense: Dense | None,
    calibration: Any,
    ranks: Ranks,
    *,
    include: Selection = None,
    exclude: Selection = None,
    masks: Mapping[str, Any] | None = None,
    channels: Mapping[str, Any] | None = None,
    skip_first: bool | None = None,
    skip_last: bool | None = None,
    resume: str | Path | None = None,
    measured: KeptStatistics | None = None,
    curvatures: Mapping[str, Tensor] = {},
    judged: bool = True,
    keep_worse: bool = False,
) -> RepairReport:
    """Repair by a plan; see `repair`.

    measured: statistics of some layers, which are not measured again. curvatures: of layers of the dense network.
    judged: compare the outputs before and after.
    """
    clock = Stopwatch()
    model, target = unwrap(model), as_target(dense)
    recalibration = plan.recalibration
    way = recalibration.name if recalibration else None
    report = RepairReport(plan.method.name, plan.schedule, way, asdict(plan.method), ranks=ranks.size)
    layers = matching_layers(model, target, include, exclude, report) if plan.method.changes_layers else {}
    batchnorms = batchnorms_to_estimate(model, recalibration, report) if recalibration else {}
    if not plan.method.changes_layers and not batchnorms:
        why = "".join(f": {note}" for note in report.notes[:1])
        raise ResuscitateError(
            f"there is no BatchNorm to re-estimate{why}; use a method that matches the dense outputs"
        )
    models = [model, target] if isinstance(target, nn.Module) else [model]
    with Session(models, plan.run, writes=True, ranks=ranks) as session:
        images = _read(session, plan, calibration, bool(layers), report)
        if judged and layers and plan.holds_out:
            warn_of_few(images.batches.different(ranks, images.gains))
        clock.end("reading images")
        wiring, selected = session.look(images.batches), layers
        if selected and isinstance(target, nn.Module):
            kept = session.match_channels(channels or {}, images.batches.head(images.gains))
            report.notes += kept.notes(model, target)
        first = plan.method.skips_first if skip_first is None else skip_first
        active = recalibration if batchnorms else None
        last = plan.method.skips_last(plan.schedule, active) if skip_last is None else skip_last
        sharing = sharing_layers(model) if plan.method.measures_layers else {}
        layers = layers_to_repair(layers, wiring, report, first, last, running=target == "running", sharing=sharing)
        if selected and not layers and not batchnorms:
            row = report.layers[0]
            remedy = "; pass skip_first=False, or skip_last=False" if row.status == "skipped" else ""
            raise ResuscitateError(f"no layer is left to repair: {called(row.name)}: {row.reason}{remedy}")
        zeros = in_use(model, layers, masks)
        seen = session.layers(layers, zeros, curvatures)
        plan.method.prepare(seen)
        probes = plan.probes(seen)
        options_used = {**plan.identity(), "layers": list(layers), "batchnorms": list(batchnorms)}
        options_used["masks"] = None if masks is None else digest_tensors(zeros)
        if session.kept.outputs:
            options_used["channels"] = digest_tensors(session.kept.outputs)
        identity = _identity(session, target, images, options_used, resume is not None)
        if any(probe.folds > 1 for probe in probes.values()):
            images.batches.number_images(ranks)
        judge = Judge(session, images.batches) if judged else None
        before = judge.look() if judge else None
        _match_reference(session, target, images, selected, report)
        journal = session.stack.enter_context(Journal(resume, identity, ranks))
        report.resumed = len(journal.entries)
        writer = Writer(session.net, wiring, seen, report, journal, ranks, plan.method.dense is not DenseAccess.NONE)
        clock.end("looking at the models")
        without_bias = [name for name, layer in layers.items() if layer.bias is None]
        _update(session, plan, writer, probes, batchnorms, images, target, measured)
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
        report._undo = session.snapshot.undo
        report.agreement = Agreement.of(before, judge.look() if judge else None)
        if plan.follows_dense and not keep_worse:
            report.undo_if_worse()
        if new := [f"{name}.bias".lstrip(".") for name in without_bias if layers[name].bias is not None]:
            report.notes.append(f"layers that had no bias have one now, so the state dict has new keys: {listed(new)}")
        clock.end("checking")
        report.stages, report.seconds = clock.stages, sum(clock.stages.values())
        return report


@dataclass
class _Images:
    batches: Batches
    gains: int  # how many of the batches are for the layers
    exact: int  # how many of them are for an exact recalibration
    cut_anew: Iterable[Tensor]  # the batches of an EMA
    totals: list[int]  # images over all ranks: all, for the layers, for an exact recalibration


def _read(session: Session, plan: Plan, calibration: Any, changes_layers: bool, report: RepairReport) -> _Images:
    """Read as many images as any step needs, and note their numbers in the report. Raises CalibrationError."""
    most, ranks = most_images(plan.image_counts, plan.run["max_samples"]), session.ranks
    marks = ranks.share(plan.gain_samples), ranks.share(plan.exact.samples if plan.exact else None)
    beside = plan.diagnostics or (plan.method.dense is DenseAccess.MODEL and plan.method.measures_layers)
    batches = session.read(calibration, most=most, marks=marks, beside=beside)
    first, exactly = (batches.batches_for(mark) for mark in marks)  # before any are held out or copied
    plan.prepare(batches, ranks)
    gains = batches.batches_of(first) if changes_layers else 0
    exact = 0
    if plan.exact:
        exact = len(batches) if marks[1] is None else batches.batches_of(exactly)
    counts = [batches.images(count) for count in (None, gains, exact)]
    *totals, report.skipped = ranks.total(*counts, session.skipped["images"])
    _, report.images, report.batchnorm_images = totals
    if not totals[0]:
        cause = f"all {report.skipped} give NaN or infinite activations" if report.skipped else "there are none"
        raise CalibrationError(f"no images are left: {cause}")
    if (changes_layers and not totals[1]) or (plan.exact and not totals[2]):
        remedy = "raise gain_samples, or the samples of Exact"
        raise CalibrationError(f"the few images that were asked for are all held out of the fit: {remedy}")
    if session.dense is not None and changes_layers and len(batches) and ranks.rank == 0:
        heads = (first_images(batch, NORMALISED_FROM) for batch in batches.head())
        warn_of_normalisation(session.dense.model, heads, session.dense.run)
    ema = plan.recalibration if isinstance(plan.recalibration, EMA) else None
    cut_anew = rebatch(batches, ema.batch_size, ema.batches) if ema else ()
    return _Images(batches, gains, exact, cut_anew, totals)


def _identity(
    session: Session, target: Target, images: _Images, options: dict[str, object], resumes: bool
) -> dict[str, object]:
    """What a journal, and the other ranks, must agree with."""
    run, ranks, model = session.run, session.ranks, session.net.model
    options = {**options, "images": images.totals, **identity_of(run)}
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
    session: Session, target: Target, images: _Images, selected: Collection[str], report: RepairReport
) -> None:
    """Copy the reference's BatchNorm statistics where they differ, and note what the report says of it."""
    if not selected:
        return
    report.notes += [f"{n} calls of functional {name} run unrepaired" for name, n in session.wiring.functional.items()]
    if target is not None:
        report.target = "dense model" if isinstance(target, nn.Module) else "running statistics"
    if isinstance(target, DenseStatistics):
        report.target = f"dense statistics ({target.path})"
        (digest,) = session.ranks.total(digest_images(images.batches.head(images.gains)))
        if (target.images, target.digest) != (report.images, f"{digest % MODULUS:x}"):
            images_used = f"{target.images} images, and not from the {report.images} used here"
            report.notes.append(f"the dense statistics come from {images_used}: the same images match better")
            log.warning(report.notes[-1])
    if not isinstance(target, nn.Module | DenseStatistics):
        return
    # BatchNorms behind layers that were not selected may hold the shift of an earlier repair
    kept = {batchnorm for name, batchnorm in session.wiring.batchnorm_of.items() if name not in selected}
    originals = target.batchnorms if isinstance(target, DenseStatistics) else running_statistics(target)
    pairs = dict[tuple[str, int], tuple[Tensor, Tensor]]()
    for name, mine in running_statistics(session.net.model).items():
        if name in kept:
            continue
        found, channels = originals.get(name), len(mine[0])
        theirs = [] if found is None else [session.kept.of_outputs(name, each, 0) for each in found]
        if not theirs or len(theirs[0]) != channels:
            raise ModelMismatchError(f"the dense model has no BatchNorm {name!r} with {channels} channels")
        pairs |= {(name, at): (m, original.to(m)) for at, (m, original) in enumerate(zip(mine, theirs, strict=True))}
    stale = differing(pairs)
    for m, original in (pairs[key] for key in stale):
        m.copy_(original)
    if stale:
        copied = len({name for name, _ in stale})
        report.notes.append(f"{copied} BatchNorms had other statistics than the dense model: copied from it")


def _update(
    session: Session,
    plan: Plan,
    writer: Writer,
    probes: Mapping[str, Probe],
    batchnorms: Iterable[str],
    images: _Images,
    target: Target,
    kept: KeptStatistics | None,
) -> None:
    """Measure, solve and write, layer by layer. kept: statistics that are solved for first."""
    method, known, title = plan.method, writer.journal.entries, f"repair ({plan.method.name})"
    for name, layer in writer.layers.items():
        if name not in probes:
            writer.report.layers.append(left_out(name, layer.module, "unchanged", "the method measures nothing at it"))
    if kept is not None:
        for name in filter(kept.__contains__, probes):
            writer.update(Measurement(name, kept.get(session.place(name))), method.solve)
        probes = {name: probe for name, probe in probes.items() if name not in kept}
    measured = [name for name, probe in probes.items() if probe.statistic is not Statistic]
    at_once = [Measurement(name, Statistic(session.place(name))) for name in probes if name not in measured]
    updates = [method.solve(writer.layers[each.name], each.found) for each in at_once]  # all, before any is written
    for measurement, update in zip(at_once, updates, strict=True):
        writer.write(measurement, update)
    requests = [Request(name, plan.exact.probe(), images.exact) for name in batchnorms] if plan.exact else []
    if plan.schedule == "parallel":
        passes = (track(images.batches.head(images.gains), title, images.gains, session.show) for _ in session.nets)
        found: dict[str, Statistic] = {**session.measure_all([name for name in measured if name not in known], *passes)}
        found |= {name: Statistic(session.place(name)) for name in measured if name in known}
        for name, statistic in found.items():
            measurement = Measurement(name, statistic)
            fill_reference(measurement, target, session.net, session.wiring)
            writer.update(measurement, method.solve)
    else:
        requests += [Request(name, probes[name], images.gains) for name in measured]
    requests = [replace(each, batches=0) if each.name in known else each for each in requests]
    with closing(session.walk(images.batches, requests, title, known)) as walk:
        for measurement in walk:
            if measurement.name in probes:
                fill_reference(measurement, target, session.net, session.wiring)
                writer.update(measurement, method.solve)
            elif plan.exact:
                writer.update(measurement, plan.exact.solve)
