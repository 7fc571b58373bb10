"""`resuscitate map`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated, Any

from ..pruning.allocation import check_sparsity
from ..pruning.sparsify import sparsify
from ..reports.plots import draw_damage, draw_map, have_matplotlib
from ..workflows.damage import damage as compare
from ..workflows.recoverability import presets, recoverability
from . import flags
from .application import app, call, options_of, run_time_options, show
from .flags import opt
from .inputs import check_runs, load_model, read_images, read_labelled
from .method_options import method_name

METHODS = f"By comma: {', '.join(presets())}, or package.module:Class."


@app.command("map")
@flags.takes(flags.LAYERS | flags.RUN)
def map_(
    model: flags.Model,
    dense: flags.Dense,
    calibration: flags.Calibration,
    test: Annotated[Path, opt("An .npz of images and `labels` to score on; not those of --calibration.")],
    output: Annotated[Path, opt("The folder to write to.", "--output", "-o")],
    sparsities: Annotated[str, opt("By comma.")] = "0.5,0.7,0.8,0.9,0.95,0.98",
    allocations: Annotated[str, opt("By comma; also rr.")] = "global,uniform,erk,lamp",
    methods: Annotated[str, opt(METHODS)] = "bn,asr",
    pattern: Annotated[str, opt("unstructured or filter.")] = "unstructured",
    damage: Annotated[float | None, opt("Draw each channel's damage at this sparsity too.")] = None,
    test_samples: Annotated[int | None, opt("At most so many images of --test.", min=1)] = None,
    workers: Annotated[int, opt("Processes to share the work out to.", min=1)] = 1,
    plot: Annotated[bool, opt("Draw the pictures.")] = True,
    **given: Any,
) -> None:
    """Which sparsity, allocation and repair a network survives: prune, repair and score it over and over.

    Writes map.json, map.csv and a picture for each method into the folder, and a journal: the same command again
    continues where it was stopped, and adds to what is there.
    """
    options = options_of(locals())
    if damage is not None:
        check_sparsity(damage)
    network = load_model(model, dense)
    calibrated = read_images(options)
    images = calibrated.all
    check_runs(network, images, calibration, options["device"])
    score = read_labelled(test, options, test_samples)
    output.mkdir(parents=True, exist_ok=True)
    own = {"dense": network, "calibration": images, "evaluate": score, "resume": output / "map.journal"}
    own |= {"sparsities": flags.parse_numbers(sparsities), "allocations": allocations.split(",")}
    own |= {"methods": [method_name(name) for name in methods.split(",")]}
    # the share of the most frequent class: the accuracy of a constant answer
    chance = 100 * int(score.labels.bincount().max()) / len(score.labels)
    found = call(recoverability, options, chance=chance, **own)
    written = [output / name for name in ("map.json", "map.csv")]
    for path in written:
        found.save(path)
    if plot and have_matplotlib():
        for method in found.methods:
            written.append(output / f"map-{method}.svg")
            draw_map(found, written[-1], [method])
        running = run_time_options(options)
        for allocation in found.allocations if damage is not None else ():
            pruned = copy.deepcopy(network)
            chosen = {name: options[name] for name in ("pattern", "include", "exclude")}
            chosen |= {"calibration": images, **running} if allocation == "rr" else {}
            sparsify(pruned, damage, allocation=allocation, **chosen)
            written.append(output / f"damage-{allocation}.svg")
            layers = compare(pruned, network, images, **running)
            draw_damage(layers, written[-1], f"{model}, sparsity {damage:g}, {allocation}")
    elif plot:
        show("pictures skipped: they need matplotlib, pip install 'resuscitate[plots]'")
    show(found, calibrated.describe(), "written: " + ", ".join(map(str, written)))
