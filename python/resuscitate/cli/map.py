"""`resuscitate map`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated, Any

from ..workflows.recoverability import presets
from . import flags
from .application import app, show
from .flags import opt
from .inputs import build_model, check_runs, read_images, read_labelled
from .method_options import method_name


@app.command("map")
def map_(
    model: flags.Model,
    dense: Annotated[Path, opt("The weights before pruning: .safetensors, .pt or .pth.")],
    calibration: flags.Calibration,
    test: Annotated[Path, opt("An .npz of images and `labels` to score on; not those of --calibration.")],
    output: Annotated[Path, opt("The folder to write to.", "--output", "-o")],
    sparsities: Annotated[str, opt("By comma.")] = "0.5,0.7,0.8,0.9,0.95,0.98",
    allocations: Annotated[str, opt("By comma; also rr.")] = "global,uniform,erk,lamp",
    methods: Annotated[str, opt(f"By comma: {', '.join(presets())}, or package.module:Class.")] = "bn,asr",
    pattern: Annotated[str, opt("unstructured or filter.")] = "unstructured",
    damage: Annotated[float | None, opt("Draw each channel's damage at this sparsity too.")] = None,
    max_samples: flags.MaxSamples = None,
    test_samples: Annotated[int | None, opt("At most so many images of --test.", min=1)] = None,
    batch_size: flags.BatchSize = 128,
    mean: flags.Mean = None,
    std: flags.Std = None,
    size: flags.Size = None,
    include: flags.Include = None,
    exclude: flags.Exclude = None,
    dtype: flags.Precision = None,
    device: flags.Device = None,
    workers: Annotated[int, opt("Processes to share the work out to.", min=1)] = 1,
    plot: Annotated[bool, opt("Draw the pictures.")] = True,
    seed: flags.Seed = 0,
) -> None:
    """Which sparsity, allocation and repair a network survives: prune, repair and score it over and over.

    Writes map.json, map.csv and a picture for each method into the folder, and a journal: the same command again goes
    on where it was stopped, and adds to what is there.
    """
    from ..deploy.checkpoints import load_weights
    from ..pruning.allocation import check_sparsity
    from ..pruning.sparsify import sparsify
    from ..reports.plots import draw_damage, draw_map, have_matplotlib
    from ..workflows.damage import damage as compare
    from ..workflows.recoverability import Accuracy, recoverability

    if damage is not None:
        check_sparsity(damage)
    network = build_model(model)
    load_weights(network, dense)
    calibrated = read_images(calibration, mean, std, size, max_samples, seed)
    images = calibrated.all
    check_runs(network, images, calibration, device)
    held_out, labels = read_labelled(test, mean, std, size, test_samples, seed)
    output.mkdir(parents=True, exist_ok=True)
    found = recoverability(
        network,
        images,
        Accuracy(held_out, labels),
        sparsities=flags.parse_numbers(sparsities),
        allocations=allocations.split(","),
        methods=[method_name(name) for name in methods.split(",")],
        pattern=pattern,
        # the share of the commonest class, which one can have without looking
        chance=100 * int(labels.bincount().max()) / len(labels),
        include=include,
        exclude=exclude,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        workers=workers,
        resume=output / "map.journal",
        seed=seed,
    )
    written = [output / name for name in ("map.json", "map.csv")]
    for path in written:
        found.save(path)
    pictures = plot and have_matplotlib()
    if pictures:
        for method in found.methods:
            written.append(output / f"map-{method}.svg")
            draw_map(found, written[-1], [method])
    if damage is not None and pictures:
        running: dict[str, Any] = {"batch_size": batch_size, "dtype": dtype, "device": device, "seed": seed}
        for allocation in found.allocations:
            pruned = copy.deepcopy(network)
            sparsify(
                pruned,
                damage,
                allocation=allocation,
                pattern=pattern,
                include=include,
                exclude=exclude,
                **({"calibration": images, **running} if allocation == "rr" else {}),
            )
            written.append(output / f"damage-{allocation}.svg")
            layers = compare(pruned, network, images, **running)
            draw_damage(layers, written[-1], f"{model}, sparsity {damage:g}, {allocation}")
    elif plot and not pictures:
        show("pictures skipped: they need matplotlib, pip install 'resuscitate[plots]'")
    show(found, calibrated.describe(), "written: " + ", ".join(map(str, written)))
