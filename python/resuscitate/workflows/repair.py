"""The main job: repair a pruned model from unlabelled images, in place, all or nothing."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn

import asr_kernels as ak
from asr_kernels.factors import Prior

from ..data.batches import Batches, cut, first_images, most_images, read_share, rebatch
from ..data.calibration import check_count, is_held
from ..data.checks import NORMALISED_FROM, warn_of_normalisation
from ..engine.corrections import Corrector
from ..engine.measure import measure, screen
from ..engine.probes import Stop, Visit
from ..engine.reference import TARGET, Dense, DenseStatistics, as_target, compare_images, describe, identify, wanted_by
from ..engine.room import in_stores
from ..engine.walk import Walker
from ..errors import CalibrationError, ResuscitateError
from ..methods.aggregate import aggregate
from ..methods.batchnorm import batchnorms_to_estimate, estimate_by_momentum
from ..methods.choices import FITS, Frozen, Method, OnNonfinite, Recalibrate, Schedule, check_options
from ..methods.refit import blocks, folds_of_layer
from ..network.layers import Selector, out_channels, unwrap
from ..network.masks import in_use
from ..network.matching import copy_statistics, layers_to_repair, matching_layers
from ..network.mean_layers import Per, replace_by_means
from ..network.runner import Network, as_dtype
from ..network.snapshot import Snapshot, moved_to, undisturbed
from ..network.wiring import observe
from ..reports.repair import LayerReport, RepairReport
from ..runtime.activations import Store, parse_memory
from ..runtime.distributed import Ranks
from ..runtime.journal import Journal, told
from ..utils.arguments import IMAGES, NETWORK, check_places
from ..utils.digest import MODULUS, digest_images, digest_model, digest_tensors, fingerprint
from ..utils.progress import Stopwatch, track

log = logging.getLogger("resuscitate")


def repair(
    model: nn.Module,
    dense: Dense | None = None,
    calibration: Any = None,
    *,
    method: Method = "auto",
    schedule: Schedule = "sequential",
    recalibrate: Recalibrate | None = "auto",
    max_samples: int | None = None,
    max_batches: int | None = None,
    gain_samples: int | None = None,
    recalibrate_samples: int | None = None,
    batch_size: int = 128,
    prior: Prior = "median",
    bias: bool = True,
    eps: float = 1e-8,
    include: Iterable[Selector] | Selector | None = None,
    exclude: Iterable[Selector] | Selector | None = None,
    masks: Mapping[str, Any] | None = None,
    means: Per | None = None,
    ridge: float | None = None,
    relu_aware: bool = True,
    skip_first: bool | None = None,
    skip_last: bool | None = None,
    ema_batches: int = 20,
    ema_batch_size: int = 128,
    ema_momentum: float = 0.1,
    correlations: bool = False,
    frozen: Frozen = "keep",
    on_nonfinite: OnNonfinite = "raise",
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    memory: int | str | None = None,
    scratch: str | Path | None = None,
    group: Any = None,
    resume: str | Path | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> RepairReport:
    """Repair `model`, a pruned copy of `dense`, from unlabelled images, in place; returns what was done.

    All or nothing: when an error is raised, every tensor is as it was. Zeros stay zero; train/eval flags,
    requires_grad, device, dtype, memory format and random state stay as found. `report.undo()` takes the repair back.

    Args:
        dense: the network before pruning, with the same layers. Or what `DenseStatistics.measure` found of it, or the
            file where that was saved: a study over many prunings then runs it once. Or "running": the layer before a
            BatchNorm is to have that BatchNorm's running statistics, for which no dense network is needed. With
            "channelwise" and skip_first=False this is **exact recalibration by another name**, and no stronger (see
            recalibrate); layers that no BatchNorm alone reads are left alone. Only method "bn" needs none of them, and
            takes images in this place too.
        calibration: images: a tensor (N, ...), or any iterable of tensors, tuples or dicts that hold one, or a
            function that returns such an iterable. Read once; what is no tensor, array or list, only as far as there is
            room (see memory). No labels are used. Under ranks, this rank's own share.
        method: "refit" finds all surviving weights anew, by least squares from the inputs that the layer now has to the
            dense outputs (`refit.fit`); a transposed convolution is given its channel-wise gain. "asr", "channelwise"
            and "layerwise" (arXiv 2605.21426; formulas at `asr_kernels.repair_factors`) match each layer's outputs to
            the dense ones by a gain and a shift. "two-stage", for whole channels that went: first the layers that read
            them take over what they carried from those that stay (`aggregate.aggregate`), then refit. "mean" replaces
            what was pruned by its mean; BatchNorm then as recalibrate says. (`replace_by_means` takes no images.)
            "bn" re-estimates BatchNorm alone. "auto" is "refit" where `dense` is a model and the schedule is
            "sequential", else "asr". An option that is given and that the method does not read is an error.
        schedule: "sequential" measures each layer once all before it are corrected; "parallel", as published, measures
            them all on the unrepaired network.
        recalibrate: None keeps the dense model's BatchNorm statistics, which corrected outputs match (copied where the
            pruned model's differ, but for those behind layers that include and exclude leave out). "exact" pools them
            over all images and thereby **cancels** the gain and the shift of every layer that is read through a
            BatchNorm alone; a refit it does not cancel. "ema" is the published protocol: reset, then `ema_batches`
            batches of `ema_batch_size` at `ema_momentum`; a shift that a BatchNorm took is reset with it. "auto":
            "exact" for "bn", else None.
        max_samples, max_batches: read no more than this.
        gain_samples, recalibrate_samples: images for the gains or the refit, and for an exact recalibration; None: all
            that are read.
        batch_size: how a lone tensor is cut. It never changes the result beyond rounding.
        prior, bias, eps: of the gains, prior of "asr" alone: see `asr_kernels.repair_factors`.
        masks: which weights are in use, as `Masks` or {layer: tensor of True and False}; a refit then finds values for
            those, too, that are in use but zero. None, or a layer left out: the weights that are not zero.
        means: what shares a mean: of "mean" a "layer", a "filter" (None) or a "kernel", a filter's window on one input
            channel. Of "refit", which finds means along with the weights: a "filter", a "kernel", or None: no means.
            Layers with means have another class and one more parameter; `densify(model)` makes plain ones of them.
        ridge: of "refit": how strongly weights are pulled towards what they are, in units of the inputs' mean variance.
            None: for each layer what predicts best, by cross-validation over images (`refit.choose_ridge`).
        relu_aware: of "refit": where a ReLU alone reads a layer, straight or through a BatchNorm and a sum, an output
            that it sets to zero need not be right, only low enough (see `gates`). Doubles the time.
        include, exclude: layers to repair, as globs over their names or as module types.
        skip_first: leave the first convolution alone, as published: its input is the image. None: not if refitted.
        skip_last: leave the last layer alone where no BatchNorm reads it (the classifier). None: in the "parallel"
            schedule and where BatchNorm is re-estimated, for there its inputs are not the dense ones, and matching
            the dense logits costs accuracy; where they were matched too it gains some. But a refit with exact
            statistics fits it to the inputs that it then has.
        correlations: report for each layer what share of the dense variance a gain can bring back at all; of a refit,
            which says it anyway, what the refit explains. Needs the dense network itself, schedule="sequential".
        frozen: of a recalibration: "keep" leaves a BatchNorm alone that is in eval mode while the model trains.
        on_nonfinite: "raise", or "skip" the images (with `forward_fn`: batches) that give NaN or infinite activations.
        forward_fn: `forward_fn(model, batch)` runs one batch as it came, for models that take more than one tensor.
        dtype: run under autocast to "bf16" or "fp16"; moments stay float32 sums in float64. None: as the model is.
            The caller's own autocast is left meanwhile.
        device: where to run; the models are moved there and back.
        memory: for images and activations on the device, such as "4GiB" or a number of bytes; None: half of what is
            free. What exceeds it goes to a scratch file (CPU) or to pinned host memory (GPU); results do not change.
            A loader is read until its images and their activations would take more than half of it and half of what is
            free there; then the log says how many were used, and `report.images` too.
        scratch: folder for that file, which has no name and cannot be left behind. None: TMPDIR, or /var/tmp.
        group: a `torch.distributed` process group whose ranks all call this with the same model and options, and with
            images of their own (dealt out one by one, image i to rank i modulo the ranks, the result is that of one
            process). Counts of images are those of all ranks together, `max_batches` that of each.
        resume: a journal to append each layer's correction to. A run that was killed goes on from it, measuring
            nothing twice; one that differs in models, images or an option that changes the result is refused. (How
            `forward_fn` is known: `digest.fingerprint`.) Not removed: delete it once the result is saved.
        seed: of the random numbers drawn meanwhile, such as a loader's shuffling.
        progress: show a progress bar; None: where standard error is a terminal.

    Raises:
        TypeError: an argument stands in another one's place; the message says what to write.
        CalibrationError: no images, too few, or of an unknown kind.
        ModelMismatchError: the two models' layers differ, or they are one and the same.
        DistributedError: another rank failed, or no longer answers.
        MaskError: `masks` are of another model, or a weight that they prune is not zero.
        JournalError: `resume` names another run's journal. CheckpointError: a statistics file cannot be read.
        LayerError, NonFiniteError: a layer cannot be repaired; the message names it, and the batch.
        ValueError: an option is unknown, out of range, not read by the method, or contradicts another.
    """
    given, clock = dict(locals()), Stopwatch()
    if method == "bn" and calibration is None and not isinstance(dense, Dense | None):
        dense, calibration = None, dense  # no dense network is needed, and these are the images
    call = "repair(model, dense, images), or repair(model, images, method='bn') where there is no dense network"
    check_places(call, model=(model, NETWORK), dense=(dense, TARGET), calibration=(calibration, IMAGES))
    ranks, precision = Ranks(group), as_dtype(dtype)
    method, recalibrate = check_options(given, DEFAULTS, dense, ranks)
    model, target, fits = unwrap(model), as_target(dense), method in FITS
    limits = {"max_samples": max_samples, "gain_samples": gain_samples, "recalibrate_samples": recalibrate_samples}
    for option, limit in limits.items():
        check_count(option, limit)
    report = RepairReport(method, schedule, recalibrate, ranks=ranks.size)
    layers = {} if method == "bn" else matching_layers(model, target, include, exclude, report)
    batchnorms = {} if recalibrate is None else batchnorms_to_estimate(model, frozen == "keep", report)
    if method == "bn" and not batchnorms:
        raise ResuscitateError("there is no BatchNorm to re-estimate; use a method that matches the dense outputs")
    models = [model, target] if layers and isinstance(target, nn.Module) else [model]

    with Snapshot(model) as snapshot, ExitStack() as stack:
        stack.enter_context(moved_to(device, models))
        stack.enter_context(undisturbed(models, seed))
        stack.enter_context(snapshot.settling())
        stack.enter_context(ranks.together())
        net, *others = (Network(m, forward_fn, precision) for m in models)
        store = stack.enter_context(Store(parse_memory(memory, net.device), net.device, scratch))
        for_images = store if net.device.type == "cpu" else stack.enter_context(Store.on_host(scratch))

        wanted = [gain_samples] if layers else []
        if recalibrate is not None:
            wanted.append(recalibrate_samples if recalibrate == "exact" else ema_batches * ema_batch_size)
        reading: dict[str, Any] = {"max_samples": most_images(wanted, max_samples), "max_batches": max_batches}
        reading |= {"batch_size": batch_size, "raw": forward_fn is not None}
        room = in_stores(for_images, store, [net, *others] if fits or correlations else [net])
        images, skipped = read_share(calibration, ranks, **reading, room=room), Counter[str]()
        images = screen([net, *others], images, skipped) if on_nonfinite == "skip" else images
        marks = ranks.share(gain_samples), ranks.share(recalibrate_samples)
        chosen_by_fold = fits and ridge is None
        batches = Batches(cut(images, marks), None if is_held(calibration) else for_images, to_deal=chosen_by_fold)
        gains = batches.holding(marks[0]) if layers else 0
        exact = batches.holding(marks[1]) if recalibrate == "exact" else 0
        counts = [batches.images(count) for count in (None, gains, exact)]
        total, report.images, report.batchnorm_images, report.skipped = ranks.total(*counts, skipped["images"])
        if not total:
            cause = f"all {report.skipped} give NaN or infinite activations" if report.skipped else "there are none"
            raise CalibrationError(f"no images are left: {cause}")
        cuts = rebatch(batches, ema_batch_size, ema_batches) if recalibrate == "ema" else ()
        clock.end("reading images")
        example = ranks.lend(net.example(batches[0]) if len(batches) else None)

        if others and len(batches) and ranks.rank == 0:
            heads = (first_images(batch, NORMALISED_FROM) for batch in batches.head())
            warn_of_normalisation(others[0].model, heads, others[0].run)
        torch.manual_seed(seed)  # anew: not every repair takes that look
        wiring = observe(model, lambda: net.run(example))
        if layers:
            report.notes += [f"{n} calls of functional {name} run unrepaired" for name, n in wiring.functional.items()]
        selected = set(layers)
        # an exact recalibration is done before a later layer is refitted, a momentum one once all are
        unmatched = schedule == "parallel" or (bool(batchnorms) and not (fits and recalibrate == "exact"))
        skip_first = method not in (*FITS, "mean") if skip_first is None else skip_first
        ends = skip_first, unmatched and method != "mean" if skip_last is None else skip_last
        layers = layers_to_repair(layers, wiring, report, *ends, need_batchnorm=target == "running")
        zeros = in_use(model, layers, masks)
        options = told(given, *SEEN)
        options |= {"method": method, "recalibrate": recalibrate, "dtype": str(precision)}
        options |= {"layers": list(layers), "batchnorms": list(batchnorms)}
        options |= {"masks": None if masks is None else digest_tensors(zeros)}
        options |= {"images": [total, report.images, report.batchnorm_images]}
        if ranks.size > 1:
            ranks.check_same("a model or options", f"{digest_model(model)} {identify(target)} {options}")
        if chosen_by_fold:
            batches.deal(ranks)
        if layers:
            report.target = describe(target)
            if isinstance(target, DenseStatistics):
                (digest,) = ranks.total(digest_images(batches.head(gains)))
                compare_images(target, report, f"{digest % MODULUS:x}")
            if not isinstance(target, str) and target is not None:
                kept = {behind for name, behind in wiring.batchnorm_of.items() if name not in selected}
                copy_statistics(model, target, kept, report)
        identity: dict[str, object] = {}
        if resume is not None:
            # each step's images by themselves, for the digest of them all is the same in any order
            seen = ranks.total(*(digest_images(batches.head(count)) for count in (gains, exact, None)))
            seen = [digest % MODULUS for digest in seen]
            options |= {"forward_fn": fingerprint(forward_fn)}
            identity = {"model": digest_model(model), "dense": identify(target), "images": seen, "options": options}
        journal = stack.enter_context(Journal(resume, identity, ranks))
        report.resumed = len(journal.entries)

        fit = {name for name in layers if fits and name in wiring.products}
        wide = {name for name in fit if blocks(layers[name]) > 1}
        rule: Any = "asr" if method in ("bn", "mean") else "channelwise" if fits else method
        factors = partial(ak.repair_factors, rule=rule, prior=prior, bias=bias, eps=eps)
        if method == "two-stage":
            changed = aggregate(model, others[0], batches.head(gains), names=layers)
            report.notes.append(f"{len(changed)} layers took over what removed channels carried: {', '.join(changed)}")
        if method == "mean":
            _fill(model, others[0].model, means or "filter", layers, report)
            layers = {}
        corrector = Corrector(net, wiring, factors, zeros, report, journal, ranks, means if fits else None)
        matched = wanted_by(target, net, wiring)
        show = progress if ranks.rank == 0 else False
        known = set(journal.entries)
        stops = [Stop(name, exact) for name in batchnorms if recalibrate == "exact"]
        if schedule == "parallel":
            unknown = [name for name in layers if name not in known]
            passes = [track(batches.head(gains), f"repair ({method})", gains, show) for _ in models]
            for visit in _measure_at_once([net, *others], passes, unknown):
                corrector.correct(merged := ranks.merge(visit, net.device), matched(merged))
            for visit in (Visit(name) for name in layers if name in known):
                corrector.correct(visit, matched(visit))
        else:
            how: dict[str, bool] = {"dense": bool(others), "paired": correlations}
            stops += [Stop(name, gains, **how) for name in layers if name not in fit]
            how = {"dense": True, "refit": True}
            folds = {name: folds_of_layer(layers[name]) if chosen_by_fold else 1 for name in fit}
            stops += [Stop(name, gains, **how, gated=relu_aware, folds=folds[name]) for name in fit - wide]
            stops += [Stop(name, gains, **how, wide=True, folds=folds[name]) for name in wide]
        stops = [replace(stop, batches=0) if stop.name in known else stop for stop in stops]
        clock.end("looking at the models")
        walker = Walker(net, others[0] if others else None, wiring, store, example)
        with closing(walker.walk(batches, stops, f"repair ({method})", show)) as walk:
            for visit in walk:
                if visit.name not in known:
                    visit = ranks.merge(visit, net.device)
                if visit.name in fit:
                    corrector.refit(visit, ridge)
                elif visit.name in layers:
                    corrector.correct(visit, matched(visit))
                else:
                    corrector.recalibrate(visit)
        report.walk = walker.taken
        if recalibrate == "ema":
            estimate_by_momentum(net, batchnorms, cuts, ema_momentum)
            report.batchnorm_images = ema_batches * ema_batch_size
            for name in batchnorms:
                corrector.note_batchnorm(name)
        clock.end("measuring and correcting")
        zeros.check(model)
        report.scratch = sum(each.away for each in {store, for_images})
        snapshot.forget_unchanged()
        report._undo = snapshot.restore
        clock.end("checking")
        report.stages, report.seconds = clock.stages, sum(clock.stages.values())
        return report


# arguments that a journal knows by what comes of them: the models, the layers, the images; or as another kind of value
SEEN = [
    "model",
    "dense",
    "calibration",
    "masks",
    "forward_fn",
    "dtype",
    "include",
    "exclude",
    "skip_first",
    "skip_last",
]
SEEN += ["max_samples", "max_batches", "gain_samples", "recalibrate_samples"]
DEFAULTS = {name: parameter.default for name, parameter in signature(repair).parameters.items()}


def _measure_at_once(nets: Sequence[Network], passes: Sequence[Iterable[Any]], names: Sequence[str]) -> list[Visit]:
    """What each layer gives in the unrepaired network, and in the dense one where that is there: a pass of each."""
    pruned, *dense = (measure(net, batches, names) for net, batches in zip(nets, passes, strict=True))
    return [Visit(name, pruned[name], dense[0].get(name, []) if dense else []) for name in names]


def _fill(model: nn.Module, dense: nn.Module, per: Per, layers: Mapping[str, nn.Module], report: RepairReport) -> None:
    """Replace what was pruned by its mean, and report it."""
    counts = replace_by_means(model, dense, per=per, include=list(layers))
    for name, layer in layers.items():
        row = LayerReport(name, type(layer).__name__, out_channels(layer), "left alone: nothing to replace")
        row.action = f"{counts[name]:,} means for what was pruned" if name in counts else row.action
        report.layers.append(row)
