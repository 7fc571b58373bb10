"""Results on disk that grow by a row at a time, so that a run can be stopped and taken up again."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import machine
from rich.console import Console
from rich.progress import track

from resuscitate.utils.files import atomic

from .budget import Budget

Row = dict[str, Any]
console = Console(stderr=True)


def about() -> dict[str, Any]:
    """Machine, versions, date and command; the GPU if there is one."""
    found = machine(shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]))
    if torch.cuda.is_available():
        import triton

        found["versions"] |= {"triton": triton.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}
    return found | {"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}


def kept(path: Path, settings: dict[str, Any], digests: dict[str, str]) -> dict[str, Any]:
    """What is there already; ends the program where it is of other settings or other networks."""
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
    """The rows, each time with one more."""
    for index, job in enumerate(track(planned, "repairing", console=console, disable=not console.is_terminal)):
        if not budget.another():
            console.print(f"{len(planned) - index} of {len(planned)} runs are left: the same command goes on")
            return
        rows.append(compute(job))
        yield rows


def write(path: Path, found: dict[str, Any]) -> None:
    """As JSON, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n")
