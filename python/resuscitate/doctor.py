"""Report the installed software and hardware, and check the kernels on this device against the reference."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import asr_kernels as ak

from .errors import ResuscitateError

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

# extra -> (a module that it installs, what the extra is for)
EXTRAS = {
    "plots": ("matplotlib", "the figures of demo and map"),
    "images": ("PIL", "folders of image files"),
    "demo": ("sklearn", "the images of the demo"),
    "onnx": ("onnxscript", "ONNX files"),
    "parquet": ("pyarrow", "parquet tables"),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SHAPES = ((16, 32, 32, 32), (64, 64, 7, 7), (3, 5, 9, 7), (33, 17))
SECONDS = 10.0
# allowed errors: of moments, sums in float32 at least; of written values, in roundings to the tensor's dtype
MOMENTS, WRITTEN = 1e-5, 1.01


@dataclass
class Check:
    """One operation on the device: its largest error, divided by the allowed error; `cause` if it raised."""

    name: str
    error: float
    cause: str = ""

    @property
    def passed(self) -> bool:
        """Did the operation run, with an error within the allowed one?"""
        return not self.cause and self.error <= 1


@dataclass
class Findings:
    """The result of `examine`: facts by name, checks, and a remedy for each problem."""

    facts: dict[str, str]
    checks: list[Check] = field(default_factory=list)
    remedies: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def well(self) -> bool:
        """Did every check pass?"""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """The findings as plain data, ready for JSON."""
        checks = [{**vars(check), "passed": check.passed} for check in self.checks]
        return {**vars(self), "checks": checks, "well": self.well}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.markup import escape
        from rich.table import Table

        table = Table("", "", box=None, show_header=False)
        for name, fact in self.facts.items():
            table.add_row(name, escape(fact))
        yield table
        failed = [check for check in self.checks if not check.passed]
        worst = max((check.error for check in self.checks if check.passed), default=0.0)
        yield (
            f"\n{len(self.checks) - len(failed)} of {len(self.checks)} checks against the float64 reference passed in "
            f"{self.seconds:.1f} s; the largest error is {worst:.0%} of the allowed error"
        )
        for check in failed:
            yield escape(f"failed: {check.name}: {check.cause or f'{check.error:.3g} times the allowed error'}")
        for remedy in self.remedies:
            yield escape(f"- {remedy}")


def examine(device: torch.device | str | None = None) -> Findings:
    """Collect facts, and check every operation on the device, in a few shapes and dtypes, against the reference.

    device: None means the first GPU, or else the CPU. No further checks start after `SECONDS`.
    Raises ResuscitateError where the device cannot be used.
    """
    started = time.perf_counter()
    try:
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without GPU support
        raise ResuscitateError(f"device {device!r} cannot be used: {str(error).partition(chr(10))[0]}") from error
    found = _facts(target)
    with torch.random.fork_rng(devices=[target] if target.type == "cuda" else []):
        torch.manual_seed(0)
        for shape in SHAPES:
            for dtype in DTYPES:
                if time.perf_counter() - started < SECONDS:
                    found.checks += _check(shape, dtype, target)
    if not found.well:
        found.remedies.insert(0, "run with ASR_BACKEND=torch, which needs no Triton, and report the failures above")
    found.seconds = time.perf_counter() - started
    return found


def _facts(device: torch.device) -> Findings:
    """The facts and the remedies, before any check."""
    remedies = []
    wanted, triton = os.environ.get("ASR_BACKEND", "auto"), find_spec("triton") is not None
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if wanted != "auto":
        backend = f"{wanted}: set by ASR_BACKEND"
    elif device.type == "cuda" and triton:
        backend = "triton: there is a GPU, and Triton is installed"
    elif device.type == "cuda":
        backend = "torch: Triton is not installed"
        remedies.append("install Triton for the faster kernels: pip install triton")
    else:
        backend = "torch: there is no GPU for Triton"
    if interpreted:
        remedies.append("TRITON_INTERPRET=1 runs Triton's kernels in its slow interpreter; unset it except for tests")
    if device.type == "cpu" and torch.version.cuda and not torch.cuda.is_available():
        remedies.append("this torch is built for CUDA and sees no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES")
    facts = {"python": f"{platform.python_version()} on {platform.platform(terse=True)}"}
    facts |= {name: _version(name) for name in ("resuscitate", "torch", "triton", "numpy", "safetensors")}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    facts |= {"device": f"{device}, {name}", "backend": backend, "Triton's interpreter": "on" if interpreted else "off"}
    for extra, (module, purpose) in EXTRAS.items():
        installed = find_spec(module) is not None
        facts[f"extra {extra}"] = f"installed, for {purpose}" if installed else f"missing, for {purpose}"
        if not installed:
            remedies.append(f"for {purpose}: pip install 'resuscitate[{extra}]'")
    return Findings(facts, remedies=remedies)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _check(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[Check]:
    """Check every operation on one tensor whose channel means are a few standard deviations from zero."""
    spread = torch.linspace(0.5, 2, shape[1], device=device).view(-1, *[1] * (len(shape) - 2))
    dense = (torch.randn(shape, device=device) * spread + 3).to(dtype)
    pruned = (dense.float() * 0.3 + 0.2 * torch.randn(shape, device=device)).to(dtype)
    gain, shift = torch.rand(2, shape[1], dtype=torch.float64, device=device) + 0.5

    def moments() -> list[Tensor]:
        found = ak.channel_moments(dense)
        return [found.mean, found.m2]

    def paired() -> list[Tensor]:
        found = ak.paired_moments(dense, pruned)
        return [found.dense.m2, found.pruned.m2, found.comoment]

    def factors() -> list[Tensor]:
        return list(ak.repair_factors(*(ak.channel_moments(x) for x in (dense, pruned))))

    def affine() -> list[Tensor]:
        return [ak.affine_(pruned.clone(), gain, shift)]

    def products() -> list[Tensor]:
        spatial = len(shape) - 2
        window = ak.Window((3,) * spatial, (1,) * spatial, ((1, 1),) * spatial, (1,) * spatial)
        found = ak.patch_moments(pruned[:, :8], dense, window)
        return [found.xx, found.xy]

    label = f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
    checks = []
    for operation in (moments, paired, factors, affine, products):
        name = f"{operation.__name__} of {label}"
        try:
            found = operation()
            with ak.use_backend("reference"):
                expected = operation()
        except Exception as error:  # a driver or a compiler may raise anything
            checks.append(Check(name, float("inf"), f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"))
            continue
        allowed = WRITTEN * torch.finfo(dtype).eps if operation is affine else MOMENTS
        checks.append(Check(name, max(_error(a, b) for a, b in zip(found, expected, strict=True)) / allowed))
    return checks


def _error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    if not found.isfinite().all():
        return float("inf")
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())
