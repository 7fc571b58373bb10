"""`resuscitate compress`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from ..workflows.compress import CompressReport
from ..workflows.compress import compress as run
from ..workflows.compress_to_agreement import compress_to_agreement
from . import flags
from .application import app, finish, keywords, options_of
from .flags import opt
from .inputs import load_model, opened
from .method_options import method_name, method_options, takes_methods
from .prune import Allocation

AGREEMENT = 0.98  # where neither a sparsity nor an agreement is given


@app.command()
@takes_methods
@flags.takes(flags.FLOORS | flags.LAYERS | flags.REPAIRS | flags.RUN | flags.RANKS)
def compress(
    model: flags.Model,
    dense: flags.Dense,
    calibration: flags.Calibration,
    output: flags.Output,
    sparsity: Annotated[float | None, opt("Fraction of the weights that is pruned, such as 0.9.")] = None,
    target_agreement: Annotated[
        float | None, opt("In its place: find the highest sparsity that keeps this agreement; default: 0.98.")
    ] = None,
    trials: Annotated[
        int | None, opt("Number of sparsities that are tried for it, a compression each; default: 6.", min=1)
    ] = None,
    allocation: Annotated[Literal["measured", Allocation], opt("How it is distributed over the layers.")] = "measured",
    pattern: Annotated[
        str, opt("unstructured, filter, channels (which are removed), or n:m, such as 2:4.")
    ] = "unstructured",
    steps: Annotated[
        Any, opt("A number, or each sparsity: 0.5,0.8,0.9.", parser=flags.parse_steps, metavar="STEPS")
    ] = 7,
    walks: Annotated[int, opt("The last so many steps measure the pruned network.", min=1)] = 2,
    curvature: Annotated[bool, opt("Fit the channels of a layer together, by their effect on the outputs.")] = True,
    min_per_channel: Annotated[
        int | None, opt("Weights kept in each output channel at least; default: 2 or 1 in depthwise layers.", min=0)
    ] = None,
    densities: flags.Densities = None,
    method: Annotated[str, opt("Of the repair after each step, as for `repair`.")] = "refit",
    resume: flags.Journals = None,
    masks: flags.WrittenMasks = None,
    report: flags.Report = None,
    json_: flags.Json = False,
    **given: Any,
) -> None:
    """Prune in steps, and repair after each step from unlabelled images. Runs under torchrun too."""
    options = options_of(locals())
    if sparsity is not None and target_agreement is not None:
        raise typer.BadParameter("--sparsity and --target-agreement are two ways to say how much: give one")
    if isinstance(steps, list) and sparsity is None and target_agreement is None:
        sparsity = options["sparsity"] = steps[-1]
    if sparsity is not None and trials is not None:
        raise typer.BadParameter("--trials is for --target-agreement: with a --sparsity there is one compression")
    searched: dict[str, Any] = {"agreement": AGREEMENT if target_agreement is None else target_agreement}
    searched |= {} if trials is None else {"trials": trials}
    network = load_model(model, dense)
    chosen = {"method": method_name(method), "densities": flags.parse_densities(densities), **method_options(options)}
    with opened(network, options) as (images, ranks):
        settings = keywords(run, options) | chosen
        settings |= {"model": network, "calibration": images.all, "group": ranks.group}
        if sparsity is None:
            del settings["sparsity"]
            done: CompressReport = compress_to_agreement(**searched, **settings)
        else:
            done = run(**settings)
        if ranks.rank:
            return
    finish("compress", network, options, done, images, masks)
