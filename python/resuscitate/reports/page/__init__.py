"""A report as one page of HTML that needs nothing beside itself: no network, no library, plain SVG, a little script.

It takes the JSON that `repair`, `compress` and `regrow` write with --report, and shows what is in it; what is missing
is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ...errors import MODEL, ResuscitateError
from ..repair import RE_ESTIMATED
from .figures import bars, figure, grid, key, log_axis, slope, table

Row = Mapping[str, Any]
MOST_POINTS = 4000  # in the cloud of channels

ASSETS = Path(__file__).parent


def render(document: Mapping[str, Any]) -> str:
    """The page, for a report as `to_dict` or the command line gives it.

    Shown where it is there: "layers" (or those of the last of "steps" or "rounds"), "scores" {name: per cent},
    "channels" {layer: {"dense", "pruned", "repaired": variances by channel}}, "masks", "stages" {name: seconds},
    "notes", "calibration", "provenance". Raises ResuscitateError for a document that is no such report.
    """
    parts = document.get("steps") or document.get("rounds") or [document]
    try:
        last = parts[-1].get("report") or parts[-1] if isinstance(parts[-1], Mapping) else {}
        layers = list(last.get("layers", ()))
        if not layers and not document.get("masks"):
            raise ResuscitateError("this is no report: it has no layers; give what --report wrote")
        sections = [
            _summary(document, last, layers),
            _scores(document.get("scores", {})),
            _steps(parts) if parts[0] is not document else "",
            _layers_figure(layers),
            _channels(document.get("channels", {})),
            _kept(document.get("masks", ())),
            bars("Time by stage", last.get("stages", {}), " s", "seconds of the (last) repair"),
            _layers_table(layers, document.get("channels", {})),
            _provenance(document),
        ]
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise ResuscitateError(f"this report is damaged ({type(error).__name__}: {error})") from error
    style, script = ((ASSETS / name).read_text() for name in ("style.css", "script.js"))
    title = escape(f"resuscitate: {_method(document, last)}")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f"{''.join(section for section in sections if section)}<script>{script}</script>\n</body>\n</html>\n"
    )


def _method(document: Row, last: Row) -> str:
    made_by = document.get("provenance", {}).get("method")
    return str(made_by or last.get("method") or "report")


def _summary(document: Row, last: Row, layers: Sequence[Row]) -> str:
    options = document.get("provenance", {}).get("options", {})
    actions = [row.get("action", "left alone") for row in layers]
    batchnorms = actions.count(RE_ESTIMATED)
    repaired = sum(not action.startswith(("left alone", "skipped", RE_ESTIMATED)) for action in actions)
    cards = {"layers repaired": f"{repaired} of {len(actions) - batchnorms}"} if len(actions) > batchnorms else {}
    cards |= {"BatchNorms re-estimated": f"{batchnorms:,}"} if batchnorms else {}
    cards |= {
        "images": f"{last.get('images') or last.get('batchnorm_images') or 0:,}",
        "seconds": f"{document.get('seconds', last.get('seconds', 0)):.1f}",
        "dead channels": f"{sum(row.get('dead', 0) for row in layers):,}",
    }
    masks = document.get("masks")
    if masks:
        total = sum(row["total"] for row in masks)
        cards["weights pruned"] = f"{1 - sum(row['kept'] for row in masks) / total:.2%}" if total else "none"
    if last.get("skipped"):
        cards["images skipped"] = f"{last['skipped']:,}"
    schedule = "" if last.get("method") == "bn" else f", {last.get('schedule')}"
    how = [f"method {last.get('method')}{schedule}"]
    how.append(f"BatchNorm {last.get('recalibrate') or 'kept as the dense model has it'}")
    how.append(f"{last.get('walk')} walk")
    shown = "".join(f'<div class="card"><b>{escape(text)}</b>{escape(name)}</div>' for name, text in cards.items())
    notes = "".join(f"<p>{escape(str(note))}</p>" for note in last.get("notes", ()))
    model = f" of {escape(str(options['model']))}" if options.get("model") else ""
    return (
        f'<h1>{escape(_method(document, last))}{model}</h1>\n<p class="soft">{escape("; ".join(how))}</p>\n'
        f'<div class="cards">{shown}</div>\n{notes}'
    )


def _scores(scores: Mapping[str, float]) -> str:
    return bars("Accuracy", scores, " %", "on labelled images that the repair did not see", 100.0)


def _steps(parts: Sequence[Row]) -> str:
    """What each step or round came to."""
    rows = []
    for index, part in enumerate(parts):
        report = part.get("report") or part
        regrown = sum(part.get("regrown", {}).values())
        shares = [row["explained"] for row in report.get("layers", ()) if row.get("explained") is not None]
        mean = sum(shares) / len(shares) if shares else None
        rows.append([index + 1, part.get("sparsity"), regrown or None, part.get("score"), mean, report.get("seconds")])
    heads = ["step", "sparsity", "given back", "score", "explained", "seconds"]
    return f"<h2>Step by step</h2>\n{table(heads, rows)}"


def _layers_figure(layers: Sequence[Row]) -> str:
    """Before and after for each layer, on a logarithmic axis."""
    rows = [row for row in layers if (row.get("variance_before") or 0) > 0 and (row.get("variance_after") or 0) > 0]
    if not rows:
        return ""
    values = [row[key] for row in rows for key in ("variance_before", "variance_after")]
    place, ticks = log_axis([*values, 1.0], 150, 540)
    height = 22 * len(rows) + 34
    parts = grid(ticks, place, height - 24)
    for index, row in enumerate(rows):
        y, before, after = 16 + 22 * index, place(row["variance_before"]), place(row["variance_after"])
        name = escape(row["name"] or MODEL)
        parts.append(f'<text x="0" y="{y + 4}">{name}</text>')
        parts.append(f'<line class="link" x1="{before:.1f}" x2="{after:.1f}" y1="{y}" y2="{y}"/>')
        for kind, x, value in (("before", before, row["variance_before"]), ("after", after, row["variance_after"])):
            hint = f"<title>{name}, {kind}: {value:.3g}</title>"
            parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y}" r="5">{hint}</circle>')
    caption = f"outputs' variance over the dense ones', 1 is ideal: {key('before')} and {key('after')} its repair"
    return figure("Variance of each layer", parts, height, caption)


def _channels(channels: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Every channel's variance against the dense one, both axes logarithmic."""
    clouds = {
        kind: [
            (x, y)
            for layer in channels.values()
            for x, y in zip(layer["dense"], layer[which], strict=True)
            if x > 0 < y
        ]
        for kind, which in (("before", "pruned"), ("after", "repaired"))
    }
    if not any(clouds.values()):
        return ""
    across, ticks = log_axis([x for cloud in clouds.values() for x, _ in cloud], 60, 480)
    up, levels = log_axis([y for cloud in clouds.values() for _, y in cloud], 340, 20)
    parts = grid(ticks, across, 345)
    for level in levels:
        parts.append(f'<line class="axis" x1="60" x2="480" y1="{up(level):.1f}" y2="{up(level):.1f}"/>')
        parts.append(f'<text class="soft" x="54" y="{up(level) + 4:.1f}" text-anchor="end">{level:g}</text>')
    lowest, highest = max(ticks[0], levels[0]), min(ticks[-1], levels[-1])
    if lowest < highest:
        ends = [
            f'{axis}="{value:.1f}"'
            for axis, value in zip(
                ("x1", "x2", "y1", "y2"), (across(lowest), across(highest), up(lowest), up(highest)), strict=True
            )
        ]
        parts.append(f'<line class="slope" stroke-dasharray="4 4" {" ".join(ends)}/>')
    said = []
    for kind, cloud in clouds.items():
        step = -(-len(cloud) // MOST_POINTS) or 1
        parts += [
            f'<circle class="{kind}" fill-opacity=".55" cx="{across(x):.1f}" cy="{up(y):.1f}" r="2.5"/>'
            for x, y in cloud[::step]
        ]
        fitted = slope(cloud)
        said.append(f"{key(kind)} slope {'none' if fitted is None else f'{fitted:.2f}'}")
    caption = f"across: in the dense network; up: {', '.join(said)}; the dashed line is where they are equal, slope 1"
    return figure("Variance of each channel", parts, 375, caption)


def _kept(masks: Sequence[Row]) -> str:
    """How much each layer keeps."""
    if not masks:
        return ""
    parts = []
    for index, row in enumerate(masks):
        y, share = 4 + 20 * index, row["kept"] / row["total"] if row["total"] else 0.0
        label = f"{share:.1%} of {row['total']:,}"
        parts.append(f'<text x="0" y="{y + 12}">{escape(row["layer"] or MODEL)}</text>')
        parts.append(f'<rect class="after" x="150" y="{y}" width="{280 * share:.1f}" height="14" rx="2"/>')
        parts.append(f'<text class="soft" x="{156 + 280 * share:.1f}" y="{y + 12}">{escape(label)}</text>')
    return figure("What each layer keeps", parts, 20 * len(masks) + 8, "share of the original weights")


def _layers_table(layers: Sequence[Row], channels: Mapping[str, Any]) -> str:
    """All that is known of each layer, to be sorted by any column."""
    if not layers:
        return ""
    heads = ["layer", "kind", "action", "channels", "dead", "variance before", "after", "gain from", "to", "explained"]
    rows = []
    for row in layers:
        low, high = row.get("gain") or (None, None)
        numbers = [row.get("variance_before"), row.get("variance_after"), low, high, row.get("explained")]
        cells = [row["name"] or MODEL, row["kind"], row["action"], row["channels"], row["dead"], *numbers]
        if channels:
            its = channels.get(row["name"])
            cells.append(slope(zip(its["dense"], its["repaired"], strict=True)) if its else None)
        rows.append(cells)
    return f"<h2>Layers</h2>\n{table([*heads, 'slope'] if channels else heads, rows)}"


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
