"""The main function: repair a pruned network from unlabelled images; and the re-estimation of BatchNorm alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

from torch import nn

from ..data.augment import Augment
from ..engine.reference import TARGET, Dense
from ..methods.base import DenseAccess, Method, Schedule
from ..methods.batchnorm import EMA, Exact
from ..network.layers import Selection
from ..reports.repair import RepairReport
from ..runtime.distributed import Ranks, fails_on_all
from ..runtime.options import RunOptions
from ..utils.arguments import IMAGES, MASKS, NETWORK, check_places
from .carry_out import carry_out
from .plan import Recalibrate, check_read, make_plan

CALL = "repair(model, dense, images), or repair(model, images, method='bn') where there is no dense network"


@fails_on_all
def repair(
    model: nn.Module,
    dense: Dense | None = None,
    calibration: Any = None,
    *,
    method: Method | str = "auto",
    schedule: Schedule = "sequential",
    recalibrate: Recalibrate = "auto",
    gain_samples: int | None = None,
    include: Selection = None,
    exclude: Selection = None,
    masks: Mapping[str, Any] | None = None,
    channels: Mapping[str, Any] | None = None,
    skip_first: bool | None = None,
    skip_last: bool | None = None,
    diagnostics: bool = False,
    augment: Augment | None = None,
    draws: int = 1,
    resume: str | Path | None = None,
    keep_worse: bool = False,
    **options: Unpack[RunOptions],
) -> RepairReport:
    """Repair `model`, a pruned copy of `dense`, from unlabelled images, in place; returns what was done.

    All or nothing: when an error is raised, every tensor is as it was. Zeros stay zero; train/eval flags,
    requires_grad, device, dtype, memory format and random state stay as found. `report.undo()` undoes the repair.

    Args:
        dense: the network before pruning, with the same layers. Where they have more channels, it is found which ones
            `model` has kept; see `channels`. Or `DenseStatistics` or their file: many prunings then need one run of the
            dense network. Or "running": outputs are matched to the running statistics of the
            BatchNorm behind the layer, without a dense network. With "channelwise" and skip_first=False this is **exact
            recalibration by another name**, and no stronger. Method "bn" takes None, or the images in this place.
        calibration: images: a tensor (N, ...), or any iterable of tensors, tuples or dicts that hold one, or a
            function that returns such an iterable. Read once. No labels are used. Under ranks, this rank's own share.
        method: a `Method` such as `Refit(ridge=0.1)`, or its name, with its options as further keywords. "refit": new
            values for all surviving weights, by least squares. "asr", "channelwise" and "layerwise": a gain and a shift
            for each channel (arXiv 2605.21426). "mean": pruned weights are replaced by their mean. "bn": BatchNorm
            alone is re-estimated. "auto": "refit" where `dense` is a model and the schedule is sequential, else "asr".
        schedule: "sequential" measures each layer when all earlier ones are corrected; "parallel", as published,
            measures all on the unrepaired network.
        recalibrate: None keeps the dense network's BatchNorm statistics, which corrected outputs match; they are copied
            where the pruned network's differ, except behind layers that include and exclude leave out. "exact" or
            `Exact(...)` pools them over all images, which **cancels** gain and shift of a layer that a BatchNorm alone
            reads, but no refit. "ema" or `EMA(...)` is the published protocol, which also resets a shift that a
            BatchNorm took. "auto": "exact" for "bn", else None.
        gain_samples: the number of images for the layers, the first ones that are read, less those that are held out;
            None: all. As is `samples` of `Exact` for BatchNorm.
        include, exclude: layers to repair, as globs over their names or as module types.
        masks: which weights are in use, as `Masks` or {layer: boolean tensor}; a refit then finds values also for
            weights that are in use but zero. None, or a layer without a mask: the weights that are not zero.
        channels: for a model with fewer channels than `dense`, {layer: indices}: which of the dense layer's channels
            each of its channels is, of layers where that is not clear. Channels that are coupled with them follow.
        skip_first: leave the first convolution unchanged, as published. skip_last: leave the last layer unchanged where
            no BatchNorm reads it (the classifier). None: as the method says (`skips_first`, `skips_last`).
        diagnostics: report which part of each layer's dense variance a gain can restore. It changes no weight. Needs
            the dense network itself and the sequential schedule.
        augment: use changed copies of the images too: "flip" mirrors them, "crop" moves them by up to an eighth of
            their size, a list has both, and a function gets a batch and returns it changed, with as many images.
            Copies come on top of the numbers of images that are asked for. Not with "ema".
        draws: the number of copies of each image. Every other one is mirrored, from the first on.
        resume: a journal file to which each update is appended. A killed run goes on from it; a run that differs in
            models, images or an option that changes the result is refused. Delete it once the result is saved.
        keep_worse: keep a repair that takes the outputs further from the dense network's: their error has risen, and no
            more images have the same largest logit. By default it is undone, with a warning. See `Agreement`.
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
    choices: dict[str, Any] = {"method": method, "schedule": schedule, "recalibrate": recalibrate}
    choices |= {"diagnostics": diagnostics, "gain_samples": gain_samples, "augment": augment, "draws": draws}
    plan = make_plan("repair()", dense, **choices, **options)
    if plan.method.dense is DenseAccess.NONE and calibration is None and not isinstance(dense, Dense | None):
        dense, calibration = None, dense  # no dense network is needed, and these are the images
    check_places(CALL, model=(model, NETWORK), dense=(dense, TARGET), calibration=(calibration, IMAGES))
    if masks is not None:
        check_places("repair(model, dense, images, masks=masks)", masks=(masks, MASKS))
    plan.check_dense(dense)
    if channels is not None and not isinstance(dense, nn.Module):
        raise ValueError("channels are those of a dense network: pass dense as a model")
    given: dict[str, Any] = {"include": include, "exclude": exclude, "masks": masks, "channels": channels}
    check_read(plan.method, **given, skip_first=skip_first, skip_last=skip_last)
    given |= {"skip_first": skip_first, "skip_last": skip_last, "resume": resume, "keep_worse": keep_worse}
    return carry_out(plan, model, dense, calibration, Ranks(plan.run["group"]), **given)


@fails_on_all
def recalibrate_batchnorm(
    model: nn.Module, calibration: Any = None, *, mode: Exact | EMA | str = "exact", **options: Unpack[RunOptions]
) -> RepairReport:
    """Re-estimate every BatchNorm's running statistics from images, in place: `repair` with method "bn".

    mode: "exact" or `Exact(...)`: each BatchNorm gets the mean and unbiased variance, pooled over all images, of its
        inputs once the earlier ones are final; any split into batches gives the same. (`update_bn` of
        `torch.optim.swa_utils` averages the batches' variances and counts a short last batch in full.) "ema" or
        `EMA(...)`: the protocol of arXiv 2605.21426.
    options: see `RunOptions`. Raises what `repair` raises.
    """
    call = "recalibrate_batchnorm(model, images)"
    check_places(call, model=(model, NETWORK), calibration=(calibration, IMAGES))
    return repair(model, None, calibration, method="bn", recalibrate=mode, **options)  # type: ignore[arg-type]
