"""Results on disk that are written after each row, so that a run can be stopped and continued."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.common.results import console, progress
from benchmarks.published.budget import Budget

Row = dict[str, Any]


def kept(path: Path, settings: dict[str, Any], digests: dict[str, str]) -> dict[str, Any]:
    """The results on disk; exits if they are of other settings or other networks."""
    empty: dict[str, Any] = {"networks": {}, "slopes": {}, "rows": []}
    wanted = json.loads(json.dumps(settings))
    found = empty | (json.loads(path.read_text()) if path.exists() else {"settings": wanted})
    same = found["settings"] == wanted
    differs = [] if same else [f"settings, {found['settings']}"]
    differs += [f"weights of {net}" for net, digest in digests.items() if found["networks"].get(net, digest) != digest]
    if differs:
        sys.exit(f"{path} was made with other {differs[0]}: remove it, or choose another --output")
    return {key: found[key] for key in empty}


def extended(rows: list[Row], planned: list[Any], compute: Callable[[Any], Row], budget: Budget) -> Iterator[list[Row]]:
    """Append the row of each planned job, yielding the rows after each; stops when the budget is used up."""
    for index, job in enumerate(progress(planned, "repairing")):
        if not budget.another():
            console.print(f"{len(planned) - index} of {len(planned)} runs are left: the same command goes on")
            return
        rows.append(compute(job))
        yield rows
