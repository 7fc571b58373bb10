"""The table of the matrix: printed when the tests have run and, with `--table FILE`, written to that file too."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from tests.outside.networks import NETWORKS

TITLES = "network", "layers", "walk", "asr", "refit", "compress", "unchanged by the refit, and why"


def pytest_addoption(parser):
    parser.addoption("--table", type=Path, help="write the table of the networks from outside to this file")


def pytest_terminal_summary(terminalreporter, exitstatus):
    """What each test has recorded came with its report, from whichever process it ran in. A red run writes no file."""
    found = [pair for report in terminalreporter.getreports("passed") for pair in report.user_properties]
    rows: dict[str, dict] = {}
    for name, value in found:
        if name == "outside":
            rows.setdefault(value[0], {})[value[1]] = value[2:]
    lines = ["| " + " | ".join(TITLES) + " |", "|" + " --- |" * len(TITLES)]
    lines += [_line(network, rows[network]) for network in map(str, NETWORKS) if network in rows]
    if rows:
        terminalreporter.write_line("\n".join(lines))
    path = getattr(terminalreporter.config.option, "table", None)
    if path is not None and rows and exitstatus == 0:
        packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "timm", "transformers"))
        path.write_text("\n".join(lines) + f"\n\n{packages}.\n")


def _line(network, jobs):
    """A row: of each job how many layers it dealt with, and its seconds."""
    cells = [f"{jobs[job][1]}, {jobs[job][3]:.1f} s" if job in jobs else "" for job in ("asr", "refit", "compress")]
    walk, _, layers, _, left = jobs.get("refit") or next(iter(jobs.values()))
    reasons = "; ".join(f"{count}: {reason}" for reason, count in left.items())
    return "| " + " | ".join([network, str(layers), walk, *cells, reasons]) + " |"
