"""`resuscitate compress`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from ..workflows.compress import compress as run
from . import flags
from .application import app, call, options_of, show, write_results
from .flags import opt
from .inputs import load_model, opened
from .method_options import method_name, method_options, takes_methods
from .prune import Allocation


@app.command()
@takes_methods
@flags.takes(flags.FLOORS | flags.LAYERS | flags.REPAIRS | flags.RUN | flags.RANKS)
def compress(
    model: flags.Model,
    dense: flags.Dense,
    calibration: flags.Calibration,
    output: flags.Output,
    sparsity: Annotated[float, opt("Fraction of the weights that is pruned, such as 0.9.")],
    allocation: Annotated[Literal["measured", Allocation], opt("How it is distributed over the layers.")] = "measured",
    pattern: Annotated[
        str, opt("unstructured, filter, channels (which are removed), or n:m, such as 2:4.")
    ] = "unstructured",
    steps: Annotated[
        Any, opt("A number, or each sparsity: 0.5,0.8,0.9.", parser=flags.parse_steps, metavar="STEPS")
    ] = 7,
    walks: Annotated[int, opt("The last so many steps measure the pruned network.", min=1)] = 2,
    densities: flags.Densities = None,
    method: Annotated[str, opt("Of the repair after each step, as for `repair`.")] = "refit",
    resume: flags.Journals = None,
    masks: flags.WrittenMasks = None,
    report: flags.Report = None,
    **given: Any,
) -> None:
    """Prune in steps, and repair after each step from unlabelled images. Runs under torchrun too."""
    options = options_of(locals())
    network = load_model(model, dense)
    chosen = {"method": method_name(method), "densities": flags.parse_densities(densities), **method_options(options)}
    with opened(network, options) as (images, ranks):
        done = call(run, options, model=network, calibration=images.all, group=ranks.group, **chosen)
        if ranks.rank:
            return
    write_results("compress", network, options, done, images, masks)
    show(done, images.describe(), f"written to {output}")
