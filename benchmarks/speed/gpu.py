"""All that needs a GPU in one command, without an environment of its own: `make gpu PYTHON=python3`.

In this order, so that a short time brings what matters most; the limits are for one call of nine minutes:

1. the tests of the kernels on the device: each backend against float64, over dtypes, layouts, odd sizes, extreme values
   and more than 2^31 elements; CUDA graphs, streams, devices, new memory that holds NaN. If one fails, that is all;
2. benchmarks/speed/kernels.py: the table of the kernels, the larger batches first (a row takes seconds);
3. the repair of a ResNet-50 (started only if three minutes are left);
4. some of the tests under compute-sanitizer, if it is installed, for two minutes at most. Its outcome is kept, whatever
   it is: stopped is not passed, and the exit status says so at the end;
5. Inductor for each row of the table, in a process of its own for a minute at most.

After `--seconds` all stops. The next call continues: it runs no test that has passed, also of a file of tests that was
stopped, and measures no row that is known, as long as the code, the tests, the GPU and PyTorch are the same.
"""

from __future__ import annotations

import importlib.util
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
from typing import Annotated, NoReturn

import torch
import typer

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in (".", "python")]  # this checkout

from benchmarks.speed.kernels import AGAIN, REPAIRED, of_this_code

ROOT = Path(__file__).parents[2]
KERNELS = "the kernels"
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}"}
# a failure of these tests is no error of the kernels: the kernels are timed all the same
OTHERS, REPAIRS, SEMI_STRUCTURED = "the other backends", "repairs", "2:4"
OTHERS_SECONDS = 240
SANITIZER, SANITIZER_SECONDS = "compute-sanitizer", 120
REPAIR_SECONDS = 180
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


def pytest(*arguments: str, processes: int = 1) -> list[str]:
    """A command that runs tests, whatever version pytest has and whatever PyTorch's version deprecates.

    processes: used where pytest-xdist is installed; most of the time is compilation of the kernels.
    """
    plain = ["-o", "addopts=--import-mode=importlib", "-W", "default", "-p", "no:cacheprovider"]
    if processes > 1 and importlib.util.find_spec("xdist"):
        plain += ["-n", str(processes), "--dist", "worksteal"]
    return [sys.executable, "-m", "pytest", "-q", *plain, *arguments]


def tests(dry_run: bool, passed: Path) -> dict[str, list[str]]:
    """The commands that run the tests, by name. passed: a file that lists the single tests that have passed."""
    ours = "triton and many_pieces" if dry_run else "triton or gpu or operators"
    aside = "not ahead and not host_time and not test_pieces"
    rest = "-p", "benchmarks.speed.resumed_tests", "--passed", str(passed)
    processes = max(2 * (os.cpu_count() or 1) // 3, 1)
    found = {KERNELS: pytest("tests/asr_kernels", "-k", f"({ours}) and {aside}", *rest, processes=processes)}
    if not dry_run:
        found[OTHERS] = pytest("tests/asr_kernels", "-k", f"not ({ours}) and {aside}", *rest, processes=processes // 3)
        found[REPAIRS] = pytest("tests/promises/test_devices.py", *rest)
        found[SEMI_STRUCTURED] = pytest("tests/resuscitate/deploy/test_semistructured.py", *rest)
    return found


class Outcomes:
    """What is known of each file of tests, "passed", "failed" or "stopped", kept for this code on this GPU."""

    def __init__(self, path: Path, code: str) -> None:
        self.path, self.code = path, code
        # the single tests that have passed
        self.passed = path.with_name(f"{path.stem}_{code[:16]}.txt")
        before = json.loads(path.read_text()) if path.exists() else {}
        self.of: dict[str, str] = before.get(code, {})

    def wait(self, name: str, job: Job, deadline: float) -> None:
        """Wait for a test, print its outcome, and its output if it failed, and keep the outcome."""
        status = job.status(deadline)
        text = job.log.read_text(errors="replace")
        # 5: pytest collected no test, as happens in a dry run
        self.of[name] = "stopped" if status is None else "passed" if status in (0, 5) else "failed"
        lines = text.strip().splitlines() or [""]
        print(f"{name}: {self.of[name]} after {time.monotonic() - job.started:.0f} s, {lines[-1]}", flush=True)
        if self.of[name] == "failed":
            print(text[-6000:])
        self.path.write_text(json.dumps({self.code: self.of}))

    def run(self, folder: Path, dry_run: bool, deadline: float) -> None:
        """Run the tests that have not passed, in parallel."""
        known = {name for name, outcome in self.of.items() if outcome == "passed"}
        wanted = {name: command for name, command in tests(dry_run, self.passed).items() if name not in known}
        running = {name: Job(command, folder / f"{name}.log") for name, command in wanted.items()}
        for name, job in running.items():
            self.wait(name, job, deadline if name == KERNELS else min(deadline, job.started + OTHERS_SECONDS))

    def sanitize(self, folder: Path, deadline: float) -> None:
        """Run some tests under compute-sanitizer, if it is installed and has not run."""
        if SANITIZER in self.of or not (sanitizer := shutil.which(SANITIZER)):
            return
        if deadline - time.monotonic() < SANITIZER_SECONDS:
            stop()
        command = [sanitizer, "--error-exitcode", "9", "--target-processes", "all"]
        job = Job([*command, *pytest("tests/asr_kernels", "-k", f"triton and ({FEW})")], folder / f"{SANITIZER}.log")
        self.wait(SANITIZER, job, job.started + SANITIZER_SECONDS)


def stop() -> NoReturn:
    """End this call; the next one continues."""
    print("the time is up; run again to continue")
    sys.exit(AGAIN)


def measure(only: str, output: Path, log: Path, dry_run: bool, deadline: float) -> None:
    """Run a part of kernels.py, and end this call where that part fails or does not end in time."""
    command = [sys.executable, "benchmarks/speed/kernels.py", "--output", str(output), "--only", only]
    # a row more may take half a minute
    command += ["--seconds", str(max(deadline - time.monotonic() - 30, 0)), *(["--dry-run"] if dry_run else [])]
    job = Job(command, log)
    status = job.status(deadline)
    print(job.log.read_text(errors="replace")[-30_000:], flush=True)
    if status is None or status == AGAIN:
        stop()
    if status:
        sys.exit(status)


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
    gpu = None if dry_run or not torch.cuda.is_available() else torch.cuda.get_device_name()
    outcomes = Outcomes(logs / f"{name}_tests.json", of_this_code(gpu, *sorted((ROOT / "tests").rglob("*.py"))))
    outcomes.run(logs, dry_run, deadline)
    if outcomes.of[KERNELS] == "failed":
        sys.exit("a test of the kernels failed, so nothing was measured")
    if outcomes.of[KERNELS] == "stopped":
        stop()
    results = output / f"{name}.json"
    measure("kernels", results, logs / "kernels.log", dry_run, deadline)
    repaired = {row["images"] for row in json.loads(results.read_text())["repairs"]}
    if not dry_run and not repaired.issuperset(REPAIRED) and deadline - time.monotonic() < REPAIR_SECONDS:
        stop()
    measure("repair", results, logs / "repair.log", dry_run, deadline)
    outcomes.sanitize(logs, deadline)
    measure("inductor", results, logs / "inductor.log", dry_run, deadline)
    lacking = [f"{test}: {outcome}" for test, outcome in outcomes.of.items() if outcome != "passed"]
    sys.exit(f"measured, but not every test passed: {', '.join(lacking)}" if lacking else 0)


if __name__ == "__main__":
    typer.run(main)
