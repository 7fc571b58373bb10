"""The results of a benchmark: JSON with the machine and the command, a Markdown table, a progress bar."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import track

import resuscitate
from resuscitate.utils.files import atomic

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
T = TypeVar("T")
console = Console(stderr=True)


def command() -> str:
    """The command line of this process, with the script's path from the root of the checkout."""
    script = Path(sys.argv[0]).resolve()
    shown = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script
    return shlex.join(["python", shown.as_posix(), *sys.argv[1:]])


def machine() -> dict[str, Any]:
    """What a result is published with: processor, GPU, threads, versions, date and command."""
    cpuinfo = Path("/proc/cpuinfo")
    cpus = re.findall(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    packages = {"resuscitate": resuscitate.__version__, "torch": torch.__version__}
    if torch.cuda.is_available():
        packages |= {"cuda": torch.version.cuda, "hip": torch.version.hip}
        with contextlib.suppress(ImportError):
            packages["triton"] = importlib.import_module("triton").__version__
    return {
        "cpu": cpus[0] if cpus else platform.machine(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "versions": {"python": platform.python_version(), **packages},
        "date": date.today().isoformat(),
        "command": command(),
    }


def write(path: Path, found: dict[str, Any], table: str | None = None) -> None:
    """Write a result as JSON, and its table as a .md beside the JSON. An interrupt leaves each file old or new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = {path: json.dumps(found, indent=1) + "\n"} | ({} if table is None else {path.with_suffix(".md"): table})
    for file, text in texts.items():
        with atomic(file) as temporary:
            temporary.write_text(text)


def publish(output: Path, found: dict[str, Any], table: str) -> None:
    """Write the result of this script as NAME.json and NAME.md into the folder `output`, and print the table."""
    write(output / f"{Path(sys.argv[0]).stem}.json", machine() | found, table)
    Console().print(table, markup=False, soft_wrap=True)


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table that ends with a newline. The first head may be empty."""
    head, *lines = (f"| {' | '.join(line)} |\n" for line in (heads, ["---"] * len(heads), *rows))
    return "".join([head.replace("|  |", "| |"), *lines])


def accuracy_cell(accuracy: float, best: float) -> str:
    """Per cent with one decimal, in bold if it is the best."""
    return f"**{accuracy:.1f}**" if accuracy == best else f"{accuracy:.1f}"


def progress(jobs: Sequence[T], text: str) -> Iterable[T]:
    """The jobs one after another, with a progress bar if stderr is a terminal."""
    return track(jobs, text, console=console, disable=not console.is_terminal)
