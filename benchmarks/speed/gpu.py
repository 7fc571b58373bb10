"""All that needs a GPU in one command, without an environment of its own: `make gpu PYTHON=python3`.

First the tests of the kernels on the device: each backend against float64, over dtypes, layouts, odd sizes, extreme
values and more than 2^31 elements; CUDA graphs, streams, devices, new memory that holds NaN; some of them again under
compute-sanitizer if it is installed. Then benchmarks/speed/kernels.py, only if the tests of the kernels pass.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).parents[2]
# run in parallel: most of the time is compilation of the kernels
KERNELS = ("moments", "affine", "factors", "triton_patches", "compiled", "gpu")
SUITES = tuple(f"test_{name}.py" for name in KERNELS)
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}"}
# a failure of these tests is no error of the kernels: the kernels are timed all the same
OTHERS, SEMI_STRUCTURED = "the other backends", "2:4"
FEW = "many_pieces or many_images or two_streams"


def start(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a command in the root of the checkout, with the checkout's packages; its output goes to the log."""
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=log.open("wb"), stderr=subprocess.STDOUT)


def check(folder: Path, dry_run: bool) -> set[str]:
    """Run all tests in parallel; print the output of those that fail, and return their names."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    ours = "triton and many_pieces" if dry_run else "triton or gpu or operators"
    commands = {suite: [*pytest, f"tests/asr_kernels/{suite}", "-k", ours] for suite in SUITES}
    if not dry_run:
        others = f"not ({ours}) and not ahead"
        commands[OTHERS] = [*pytest, "tests/asr_kernels", "-k", others]
        commands[SEMI_STRUCTURED] = [*pytest, "tests/resuscitate/deploy/test_semistructured.py"]
        if sanitizer := shutil.which("compute-sanitizer"):
            prefix = [sanitizer, "--error-exitcode", "9", "--target-processes", "all"]
            commands["compute-sanitizer"] = [*prefix, *pytest, "tests/asr_kernels", "-k", f"triton and ({FEW})"]
    started = time.monotonic()
    running = {name: start(command, folder / f"{name}.log") for name, command in commands.items()}
    failed = set()
    for name, process in running.items():
        status, text = process.wait(), (folder / f"{name}.log").read_text(errors="replace")
        summary = text.strip().splitlines()[-1] if text.strip() else ""
        # 5: pytest collected no test, as may happen in a dry run
        right = status == 0 or (dry_run and status == 5)
        outcome = "nothing to run" if status == 5 and right else "passed" if right else "FAILED"
        print(f"{name}: {outcome} after {time.monotonic() - started:.0f} s, {summary}", flush=True)
        if not right:
            print(text[-6000:])
            failed.add(name)
    return failed


def main(
    output: Annotated[Path, typer.Option(help="Folder for results and logs.")] = ROOT / "benchmarks" / "results",
    name: Annotated[str, typer.Option(help="Name of the results.")] = "gpu",
    seconds: Annotated[float, typer.Option(help="How long new cases may be compiled by Inductor.")] = 100,
    dry_run: Annotated[bool, typer.Option(help="On a CPU, tiny, in Triton's interpreter.")] = False,
) -> None:
    """Test the kernels on this GPU, then time them."""
    logs = output / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    if dry_run:
        ENVIRONMENT["TRITON_INTERPRET"] = "1"
    failed = check(logs, dry_run)
    apart = failed & {OTHERS, SEMI_STRUCTURED}
    if failed - apart:
        sys.exit("a test failed, so nothing was measured")
    command = [sys.executable, "benchmarks/speed/kernels.py", "--output", str(output / f"{name}.json")]
    command += ["--dry-run"] if dry_run else ["--seconds", str(seconds)]
    status = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=False).returncode
    sys.exit(status or (f"failed here: {', '.join(sorted(apart))}" if apart else 0))


if __name__ == "__main__":
    typer.run(main)
