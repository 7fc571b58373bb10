"""All that needs a GPU in one command, without an environment of its own: `make gpu PYTHON=python3`.

First the tests of the kernels on the device: each backend against float64, over dtypes, layouts, odd sizes, extreme
values and more than 2^31 elements; CUDA graphs, streams, devices, new memory that holds NaN; some of them again under
compute-sanitizer if it is installed, for two minutes at most. Then benchmarks/speed/kernels.py, only if the tests of
the kernels pass: first the kernels and a whole repair, then Inductor in a process of its own.

After `--seconds` all stops. The next call continues: it runs no test that has passed and measures no row that is known,
as long as the code, the GPU and PyTorch are the same.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import torch
import typer

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in (".", "python")]  # this checkout

from benchmarks.speed.kernels import AGAIN, of_this_code

ROOT = Path(__file__).parents[2]
# run in parallel: most of the time is compilation of the kernels
KERNELS = ("moments", "affine", "factors", "triton_patches", "compiled", "gpu")
SUITES = tuple(f"test_{name}.py" for name in KERNELS)
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}"}
# a failure of these tests is no error of the kernels: the kernels are timed all the same
OTHERS, SEMI_STRUCTURED = "the other backends", "2:4"
SANITIZER, SANITIZER_SECONDS = "compute-sanitizer", 120
FEW = "many_pieces or many_images or two_streams"


class Job:
    """A command in the root of the checkout, with the checkout's packages; its output goes to a log."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.log, self.started = log, time.monotonic()
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def status(self, deadline: float) -> int | None:
        """The exit status; None where the command, which is then stopped, takes longer than until the deadline."""
        try:
            return self.process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            return None


def commands(dry_run: bool) -> dict[str, list[str]]:
    """The tests by name."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    ours = "triton and many_pieces" if dry_run else "triton or gpu or operators"
    found = {suite: [*pytest, f"tests/asr_kernels/{suite}", "-k", ours] for suite in SUITES}
    if not dry_run:
        found[OTHERS] = [*pytest, "tests/asr_kernels", "-k", f"not ({ours}) and not ahead and not host_time"]
        found[SEMI_STRUCTURED] = [*pytest, "tests/resuscitate/deploy/test_semistructured.py"]
        if sanitizer := shutil.which(SANITIZER):
            prefix = [sanitizer, "--error-exitcode", "9", "--target-processes", "all"]
            found[SANITIZER] = [*prefix, *pytest, "tests/asr_kernels", "-k", f"triton and ({FEW})"]
    return found


def check(folder: Path, dry_run: bool, passed: set[str], deadline: float) -> tuple[set[str], set[str]]:
    """Run the tests that have not passed, in parallel; returns those that passed and those that failed.

    The output of those that fail is printed. Tests that the deadline stops are in neither set.
    """
    started = time.monotonic()
    wanted = {name: command for name, command in commands(dry_run).items() if name not in passed}
    running = {name: Job(command, folder / f"{name}.log") for name, command in wanted.items()}
    passed, failed = set(passed), set()
    for name, job in running.items():
        limit = min(deadline, job.started + SANITIZER_SECONDS) if name == SANITIZER else deadline
        status, text = job.status(limit), job.log.read_text(errors="replace")
        summary = text.strip().splitlines()[-1] if text.strip() else ""
        # 5: pytest collected no test, as may happen in a dry run
        right = status == 0 or (dry_run and status == 5) or (name == SANITIZER and status is None)
        outcome = "stopped" if status is None else "nothing to run" if status == 5 and right else "passed"
        print(f"{name}: {outcome if right or status is None else 'FAILED'}", end=" ")
        print(f"after {time.monotonic() - started:.0f} s, {summary}", flush=True)
        if right:
            passed.add(name)
        elif status is not None:
            print(text[-6000:])
            failed.add(name)
    return passed, failed


def main(
    output: Annotated[Path, typer.Option(help="Folder for results and logs.")] = ROOT / "benchmarks" / "results",
    name: Annotated[str, typer.Option(help="Name of the results.")] = "gpu",
    seconds: Annotated[float, typer.Option(help="Stop after so long; the next call continues.")] = 540,
    dry_run: Annotated[bool, typer.Option(help="On a CPU, tiny, in Triton's interpreter.")] = False,
) -> None:
    """Test the kernels on this GPU, then time them."""
    deadline = time.monotonic() + seconds
    logs = output / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    if dry_run:
        ENVIRONMENT["TRITON_INTERPRET"] = "1"
    code = of_this_code(None if dry_run or not torch.cuda.is_available() else torch.cuda.get_device_name())
    kept = logs / f"{name}_passed.json"
    before = json.loads(kept.read_text()) if kept.exists() else {}
    passed, failed = check(logs, dry_run, set(before.get(code, [])), deadline)
    kept.write_text(json.dumps({code: sorted(passed)}))
    apart = failed & {OTHERS, SEMI_STRUCTURED}
    if failed - apart:
        sys.exit("a test failed, so nothing was measured")
    if not set(commands(dry_run)) <= passed | apart:
        print("the time is up; run again to continue")
        sys.exit(AGAIN)
    for only in ("kernels", "repair") if dry_run else ("kernels", "repair", "inductor"):
        command = [sys.executable, "benchmarks/speed/kernels.py", "--output", str(output / f"{name}.json")]
        command += ["--only", only, *(["--dry-run"] if dry_run else [])]
        # a row more may take half a minute
        command += ["--seconds", str(max(deadline - time.monotonic() - 30, 0))]
        job = Job(command, logs / f"{only}.log")
        status = job.status(deadline)
        print(job.log.read_text(errors="replace")[-30_000:], flush=True)
        if status is None or status == AGAIN:
            print("the time is up; run again to continue")
            sys.exit(AGAIN)
        if status:
            sys.exit(status)
    sys.exit(f"failed here: {', '.join(sorted(apart))}" if apart else 0)


if __name__ == "__main__":
    typer.run(main)
