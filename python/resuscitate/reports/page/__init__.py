"""A report as one page of HTML that needs no other file and no network: plain SVG and a short script.

The page shows the JSON that `repair`, `compress` and `regrow` write with --report. Missing parts are not shown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from itertools import chain, count
from pathlib import Path
from typing import Any

from ...errors import MODEL, ResuscitateError
from .figures import Axis, bars, figure, grid, key, label, line, linear_axis, log_axis, slope, table, tag, text

Row = Mapping[str, Any]
MOST_POINTS = 4000  # in the figure of the channels
DONE = {
    "compress": "A network was pruned in steps, and repaired after each,",
    "regrow": "A pruned network got some of its weights back, and was repaired,",
}
WORDS = {
    "dense network": "the network before pruning",
    "sparsity": "the part of the weights that is zero",
    "agreement": "the part of the images for which the network gives the class that the dense network gives, no labels",
    "held-out images": "images that were given, but to which no weight was fitted",
    "error": "standard deviation of the outputs less the dense network's, over that of the dense network's; 0 is ideal",
    "refit": "new values for the weights of a layer that are not zero, by least squares",
    "gain": "a factor for each output channel of a layer",
    "variance": "of a layer's outputs, over that of the dense network; 1 is ideal",
    "explained": "the part of the dense network's variance that the repaired outputs of a layer can explain",
    "dead": "channels of which every weight is zero",
    "slope": "of the line through the channels' variances; 1 is ideal",
}


def render(document: Mapping[str, Any]) -> str:
    """The page of a report as `to_dict` or the command line gives it.

    Shown if present: "layers" (or those of the last of "steps" or "rounds"), "scores" {name: per cent}, "channels"
    {layer: {"dense", "pruned", "repaired": variances by channel}}, "agreement", "masks", "size", "trials", "stages"
    {name: seconds}, "notes", "calibration", "provenance". Raises ResuscitateError for another document.
    """
    parts = document.get("steps") or document.get("rounds") or [document]
    try:
        last = parts[-1].get("report") or parts[-1] if isinstance(parts[-1], Mapping) else {}
        layers = list(last.get("layers", ()))
        if not layers and not document.get("masks"):
            raise ResuscitateError("this is no report: it has no layers; give what --report wrote")
        scores = [(name, score / 100, f"{score:.1f} %") for name, score in document.get("scores", {}).items()]
        stages = last.get("stages", {})
        kept = [_share_kept(row) for row in document.get("masks", ())]
        times = [(name, took / (max(stages.values()) or 1.0), f"{took:.1f} s") for name, took in stages.items()]
        sections = [
            _summary(document, last, layers),
            _agreement(document.get("agreement") or {}),
            bars("Accuracy", scores, "on labelled images that the repair did not see"),
            _trials(document),
            _steps(parts) if parts[0] is not document else "",
            _errors_figure(layers) or _variances_figure(layers),
            _channels(document.get("channels", {})),
            bars("What each layer keeps", kept, "the part of its weights that is not pruned"),
            bars("Time", times, f"in seconds{', of the last repair' if parts[0] is not document else ''}"),
            _layers_table(layers, document.get("channels", {})),
            _words(),
            _provenance(document),
        ]
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise ResuscitateError(f"this report is damaged ({type(error).__name__}: {error})") from error
    style, script = (Path(__file__).with_name(name).read_text() for name in ("style.css", "script.js"))
    title = escape(f"resuscitate: {_method(document, last)}")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f"{''.join(sections)}<script>{script}</script>\n</body>\n</html>\n"
    )


def _method(document: Row, last: Row) -> str:
    return str(document.get("provenance", {}).get("method") or last.get("method") or "report")


def _summary(document: Row, last: Row, layers: Sequence[Row]) -> str:
    statuses = [row.get("status", "unchanged") for row in layers]
    batchnorms = statuses.count("re-estimated")
    repaired = sum(status in ("repaired", "refitted", "replaced") for status in statuses)
    cards = {"layers repaired": f"{repaired} of {len(statuses) - batchnorms}"} if len(statuses) > batchnorms else {}
    cards |= {"BatchNorms re-estimated": f"{batchnorms:,}"} if batchnorms else {}
    cards["images"] = f"{last.get('images') or last.get('batchnorm_images') or 0:,}"
    cards["seconds"] = f"{document.get('seconds', last.get('seconds', 0)):.1f}"
    cards["dead channels"] = f"{sum(row.get('dead', 0) for row in layers):,}"
    if masks := document.get("masks"):
        kept, total = (sum(row[key] for row in masks) for key in ("kept", "total"))
        cards["weights pruned"] = f"{1 - kept / total:.2%}" if total else "none"
    cards |= {"images skipped": f"{last['skipped']:,}"} if last.get("skipped") else {}
    options = ", ".join(f"{name} {value}" for name, value in last.get("options", {}).items())
    how = f"method {last.get('method')}{f' ({options})' if options else ''}, {last.get('schedule')}"
    how += f"; BatchNorm {last.get('recalibrate') or 'as in the dense model'}; {last.get('walk')} walk"
    if allocation := document.get("allocation"):
        how += f"; {allocation['name']} allocation" + (
            f" (factors to the power {allocation['exponent']:g})" if "exponent" in allocation else ""
        )
    shown = "".join(f'<div class="card"><b>{escape(value)}</b>{escape(name)}</div>' for name, value in cards.items())
    notes = "".join(tag("p", escape(str(note))) for note in last.get("notes", ()))
    model = document.get("provenance", {}).get("options", {}).get("model")
    title = escape(_method(document, last) + (f" of {model}" if model else ""))
    said = tag("p", escape(_sentences(document, last)))
    return f'<h1>{title}</h1>\n{said}\n<p class="soft">{escape(how)}</p>\n<div class="cards">{shown}</div>\n{notes}'


def _sentences(document: Row, last: Row) -> str:
    """What was done and what came of it, for a reader who has not seen the command."""
    found = document.get("agreement") or {}
    images = document.get("calibration", {}).get("images") or last.get("images") or last.get("batchnorm_images") or 0
    done = DONE.get(_method(document, last), "A pruned network was repaired")
    said = [f"{done} from {images:,} unlabelled images."]
    kept, total = (sum(row[key] for row in document.get("masks", ())) for key in ("kept", "total"))
    said += [f"{1 - kept / total:.1%} of the original weights are pruned."] if total else []
    if found.get("before") is not None:
        which = "images to which no weight was fitted" if found["held_out"] else "of these images, which it used"
        said.append(
            f"On {found['images']:,} {which}, it gives the same class as the network before pruning for "
            f"{found['after']:.1%} (without repair: {found['before']:.1%})."
        )
    said += ["The repair made the outputs worse and was undone."] if document.get("undone") else []
    return " ".join(said)


def _agreement(found: Row) -> str:
    """The part of the images with the dense network's class, and the error of the outputs, before and after."""
    kinds = ("same class", "", "{:.1%}"), ("error", "error_", "{:.3f}")
    rows = [
        (f"{kind}, {when}", min(value, 1.0), shown.format(value), when)
        for kind, prefix, shown in kinds
        for when in ("before", "after")
        if (value := found.get(prefix + when)) is not None
    ]
    caption = "same class as the dense network: the higher the better; error of the outputs: the lower the better"
    return bars("Agreement with the dense network", rows, caption)


def _trials(document: Row) -> str:
    """The sparsities that a search has tried."""
    trials = sorted(document.get("trials", ()), key=lambda trial: trial["sparsity"])
    rows = [(f"{each['sparsity']:.1%} pruned", each["agreement"], f"{each['agreement']:.1%}") for each in trials]
    return bars("Sparsities that were tried", rows, f"agreement; wanted: {document['target']:.1%}") if rows else ""


def _words() -> str:
    """What the words of the page mean."""
    said = "".join(tag("dt", escape(word)) + tag("dd", escape(meaning)) for word, meaning in WORDS.items())
    return f"<details><summary>what the words mean</summary><dl>{said}</dl></details>\n"


def _steps(parts: Sequence[Row]) -> str:
    """The result of each step or round."""
    rows = []
    for index, part in enumerate(parts, 1):
        report, regrown = part.get("report") or part, sum(part.get("regrown", {}).values()) or None
        shares = [row["explained"] for row in report.get("layers", ()) if row.get("explained") is not None]
        row = {"step": index, "sparsity": part.get("sparsity"), "regrown": regrown, "score": part.get("score")}
        row |= {"explained": sum(shares) / len(shares) if shares else None, "seconds": report.get("seconds")}
        rows.append(row)
    return f"<h2>Step by step</h2>\n{table(rows)}"


def _errors_figure(layers: Sequence[Row]) -> str:
    """The error of each layer before and after its repair."""
    pairs = {row["name"]: (row.get("error_before"), row.get("error_after")) for row in layers}
    found = {name or MODEL: (a, b) for name, (a, b) in pairs.items() if a is not None and b is not None}
    caption = f"error of the layer's outputs: {key('before')} and {key('after')} its repair; layers from first to last"
    return _dots("Error of each layer", found, linear_axis([*chain(*found.values()), 1.0], 190, 545), caption)


def _variances_figure(layers: Sequence[Row]) -> str:
    """The variance of each layer before and after its repair, on a logarithmic axis."""
    pairs = {row["name"]: (row.get("variance_before") or 0.0, row.get("variance_after") or 0.0) for row in layers}
    pairs = {name or MODEL: pair for name, pair in pairs.items() if min(pair) > 0}
    caption = f"outputs' variance over the dense ones', 1 is ideal: {key('before')} and {key('after')} its repair"
    return _dots("Variance of each layer", pairs, log_axis([*chain(*pairs.values()), 1.0], 190, 545), caption)


def _dots(title: str, pairs: Mapping[str, tuple[float, float]], axis: Axis, caption: str) -> str:
    """A row for each layer with the values before and after."""
    if not pairs:
        return ""
    place, ticks = axis
    height = 22 * len(pairs) + 34
    parts = grid(ticks, place, height - 24)
    for y, (name, (before, after)) in zip(count(16, 22), pairs.items(), strict=False):
        parts += [label(0, y + 4, name), line((place(before), place(after)), (y, y), "link")]
        for kind, value in (("before", before), ("after", after)):
            hint = tag("title", escape(f"{name}, {kind}: {value:.3g}"))
            parts.append(tag("circle", hint, class_=kind, cx=place(value), cy=y, r=5))
    return figure(title, parts, height, caption)


def _channels(channels: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """The variance of each channel against the dense one, both axes logarithmic."""
    clouds = {"before": list[tuple[float, float]](), "after": list[tuple[float, float]]()}
    for layer in channels.values():
        for cloud, which in zip(clouds.values(), ("pruned", "repaired"), strict=True):
            cloud += [(x, y) for x, y in zip(layer["dense"], layer[which], strict=True) if x > 0 < y]
    points = [*chain(*clouds.values())]
    if not points:
        return ""
    across, ticks = log_axis([x for x, _ in points], 60, 480)
    up, levels = log_axis([y for _, y in points], 340, 20)
    parts, slopes = grid(ticks, across, 345), []
    for y, level in zip(map(up, levels), levels, strict=True):
        parts += [line((60, 480), (y, y)), text(54, y + 4, f"{level:g}", class_="soft", text_anchor="end")]
    low, high = max(ticks[0], levels[0]), min(ticks[-1], levels[-1])
    if low < high:
        parts.append(line((across(low), across(high)), (up(low), up(high)), "slope", stroke_dasharray="4 4"))
    for kind, cloud in clouds.items():
        shown = cloud[:: -(-len(cloud) // MOST_POINTS) or 1]
        parts += [tag("circle", class_=kind, fill_opacity=".55", cx=across(x), cy=up(y), r="2.5") for x, y in shown]
        fitted = slope(cloud)
        slopes.append(f"{key(kind)} slope {'none' if fitted is None else f'{fitted:.2f}'}")
    caption = f"across: in the dense network; up: {', '.join(slopes)}; the dashed line is where they are equal, slope 1"
    return figure("Variance of each channel", parts, 375, caption)


def _share_kept(mask: Row) -> tuple[str, float, str]:
    share = mask["kept"] / mask["total"] if mask["total"] else 0.0
    return mask["layer"] or MODEL, share, f"{share:.1%} of {mask['total']:,}"


def _layers_table(layers: Sequence[Row], channels: Mapping[str, Any]) -> str:
    """A row for each layer; the page sorts it by any column."""
    rows = []
    for row in layers:
        low, high = row.get("gain") or (None, None)
        cells = {"layer": row["name"] or MODEL, "kind": row["kind"], "status": row["status"]}
        cells |= {"reason": row.get("reason") or None, "channels": row["channels"], "dead": row["dead"]}
        cells |= {"error before": row.get("error_before"), "error after": row.get("error_after")}
        cells |= {"variance before": row.get("variance_before"), "variance after": row.get("variance_after")}
        cells |= {"gain from": low, "to": high, "explained": row.get("explained")}
        its = channels.get(row["name"])
        rows.append(cells | {"slope": slope(zip(its["dense"], its["repaired"], strict=True)) if its else None})
    return f"<h2>Layers</h2>\n{table(rows)}" if rows else ""


def _provenance(document: Row) -> str:
    made_by = document.get("provenance", {})
    if not made_by:
        return ""
    versions = ", ".join(f"{name} {number}" for name, number in made_by.get("versions", {}).items())
    details = {key: document[key] for key in ("calibration", "output") if key in document}
    details |= {"options": made_by.get("options", {})}
    return (
        f"<h2>How it was made</h2>\n<pre>{escape(str(made_by.get('command', '')))}</pre>\n"
        f'<p class="soft">{escape(str(made_by.get("date", "")))}; {escape(versions)}</p>\n'
        f"<details><summary>options and images</summary><pre>{escape(json.dumps(details, indent=2))}</pre></details>\n"
    )
