"""The last lines of `repair`, `compress` and `regrow`: what came out, and the next command."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..reports.agreement import Agreement
from . import flags
from .flags import Options


def size_of(network: nn.Module, kept: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The number of parameters, and of those that are not zero; the same of weights, from a row for each layer."""
    parameters = list(network.parameters())
    found = {"parameters": sum(each.numel() for each in parameters)}
    found["nonzero"] = sum(int(each.count_nonzero()) for each in parameters)
    return found | {"weights": sum(row["total"] for row in kept), "nonzero_weights": sum(row["kept"] for row in kept)}


def summarise(document: Mapping[str, Any], options: Options) -> list[str]:
    """Five lines: agreement, with accuracy where it was measured; sparsity; size; time; the next command.

    document: the report as it is written to a file. options: those of the command.
    """
    output, size, found = options["output"], document["size"], document["agreement"]
    agreement = str(Agreement(**found)) if found else "not measured: it needs the dense network, and outputs to compare"
    agreement += "; undone, because the outputs were worse" if document["undone"] else ""
    scores = ", ".join(f"{name} {score:.2f}" for name, score in document.get("scores", {}).items())
    kept, total = size["nonzero_weights"], size["weights"]
    lines = {
        "agreement": agreement + (f"; accuracy in per cent: {scores}" if scores else ""),
        "sparsity": f"{1 - kept / total:.2%} of {total:,} weights are zero" if total else "no layer has weights",
        "size": f"{size['nonzero']:,} of {size['parameters']:,} parameters are not zero; "
        f"written to {output}, {output.stat().st_size / 1e6:.2f} MB",
        "time": f"{document['seconds']:.1f} s",
        "next": next_command(options, document["undone"]),
    }
    return [f"{name:<10} {text}" for name, text in lines.items()]


def next_command(options: Options, undone: bool) -> str:
    """The command that a user is likely to want next: a report of this run, a better way, or an export."""
    report, model = options["report"], ["--model", options["model"]]
    if undone and options.get("dense") not in (None, "running"):
        output = options["output"].with_stem("compressed")
        return _command("compress", *model, "--dense", options["dense"], *_images(options), "--output", output)
    if report is not None and report.suffix == ".json":
        return _command("report", report, "--output", report.with_suffix(".html"))
    output = options["output"].with_suffix(".pt2")
    return _command("export", *model, "--weights", options["output"], *_images(options), "--output", output)


def _images(options: Options) -> list[Any]:
    """The options of the images, as they were given."""
    words: list[Any] = ["--calibration", options["calibration"]]
    for name, separator in zip(flags.PIXELS, ",,x", strict=True):
        if options[name] is not None:
            words += [f"--{name}", separator.join(map(str, options[name]))]
    return words


def _command(*words: Any) -> str:
    return shlex.join(["resuscitate", *map(str, words)])
