"""`resuscitate regrow`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..network.masks import Masks
from ..pruning.regrowth import Budget, Saliency
from ..workflows.regrow import Initial, Pattern
from ..workflows.regrow import regrow as run
from . import flags
from .application import app, call, finish, options_of
from .flags import opt
from .inputs import load_model, opened, read_labelled
from .method_options import method_name, method_options, takes_methods


@app.command()
@takes_methods
@flags.takes(flags.REPAIRS | flags.RUN | flags.RANKS)
def regrow(
    model: flags.Model,
    pruned: flags.Pruned,
    dense: flags.Dense,
    calibration: flags.Calibration,
    output: flags.Output,
    sparsity: Annotated[float, opt("Fraction of the weights that stays pruned, such as 0.9.")],
    masks: Annotated[Path | None, opt("The masks, as `prune --masks` wrote them; default: what is zero.")] = None,
    pattern: Annotated[Pattern, opt("Single weights, or whole channels (needs --masks).")] = "unstructured",
    budget: Annotated[Budget, opt("How many weights are regrown in each layer.")] = "greedy",
    densities: flags.Densities = None,
    saliency: Annotated[Saliency, opt("Which weights of a layer; gradient needs --labelled.")] = "magnitude",
    denser: Annotated[Path | None, opt("Masks of a denser pruning: first regrow what they keep.")] = None,
    initial: Annotated[Initial, opt("The first value of regrown weights.")] = "dense",
    rounds: Annotated[int, opt("Number of equal steps.", min=1)] = 1,
    method: Annotated[str, opt("Of the repair after each round, as for `repair`; none: no repair.")] = "auto",
    labelled: Annotated[Path | None, opt("An .npz of images and `labels`, for --saliency gradient.")] = None,
    test: Annotated[Path | None, opt("An .npz of images and `labels` to score each round on.")] = None,
    accuracy: Annotated[float | None, opt("Stop when --test reaches it, in per cent.")] = None,
    resume: flags.Journals = None,
    write_masks: flags.WrittenMasks = None,
    report: flags.Report = None,
    json_: flags.Json = False,
    **given: Any,
) -> None:
    """Restore the most important weights of a network pruned too far, and repair it. Runs under torchrun too."""
    options = options_of(locals())
    if denser is not None and saliency != "magnitude":
        raise typer.BadParameter("--denser says which weights come first: leave --saliency out")
    if (accuracy is not None) > (test is not None):
        raise typer.BadParameter("--accuracy is of --test: give that too")
    network = load_model(model, pruned)
    chosen: dict[str, Any] = {"model": network, "dense": load_model(model, dense), **method_options(options)}
    chosen["densities"] = flags.parse_densities(densities)
    chosen["method"] = None if method == "none" else method_name(method)
    chosen["saliency"] = saliency if denser is None else Masks.load(denser)
    chosen["masks"] = Masks.from_zeros(network) if masks is None else Masks.load(masks)
    if labelled is not None:
        pairs, size = read_labelled(labelled, options), options["batch_size"]
        chosen["labelled"] = list(zip(pairs.images.split(size), pairs.labels.split(size), strict=True))
    chosen["evaluate"] = None if test is None else read_labelled(test, options)
    with opened(network, options) as (images, ranks):
        done = call(run, options, calibration=images.all, group=ranks.group, **chosen)
        if ranks.rank:
            return
    finish("regrow", network, options, done, images, write_masks)
