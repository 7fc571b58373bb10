"""What the benchmarks share: where the data is, what machine this is, networks to prune."""

from __future__ import annotations

import copy
import json
import os
import platform
import re
import shlex
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

import resuscitate
from resuscitate.data.images import load_images, load_labels
from resuscitate.models import build

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESULTS = Path(__file__).parent / "results"


def data_folder(given: Path | None) -> Path:
    """The folder with the trained networks and images, or a clear way out."""
    folder = given or Path(os.environ.get("RESUSCITATE_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "cifar10_resnet20.safetensors").exists():
        sys.exit(
            f"no data in {folder}: this benchmark needs cifar10_resnet20.safetensors, cifar10_resnet32.safetensors,\n"
            "cifar10_jpeg_train.npz and cifar10_jpeg_test.npz; name their folder with --data or RESUSCITATE_DATA"
        )
    return folder


def calibration_images(folder: Path, count: int) -> Tensor:
    """CIFAR-10 training images, normalised as the networks were trained."""
    return load_images(folder / "cifar10_jpeg_train.npz", mean=MEAN, std=STD, max_samples=count)


def scorer(folder: Path, count: int) -> resuscitate.Accuracy:
    """Top-1 accuracy on so many CIFAR-10 test images, which no calibration sees."""
    test, options = folder / "cifar10_jpeg_test.npz", {"max_samples": count, "seed": None}
    return resuscitate.Accuracy(load_images(test, mean=MEAN, std=STD, **options), load_labels(test, **options))


def network(name: str, folder: Path, images: Tensor) -> nn.Module:
    """A trained network where there are weights; else one of that shape, its BatchNorm measured on the images."""
    torch.manual_seed(0)
    model = build(name).eval()
    weights = folder / f"cifar10_{name}.safetensors"
    if weights.exists():
        model.load_state_dict(load_file(weights))
    else:
        resuscitate.recalibrate_batchnorm(model, images[:512])
    return model


def pruned_copy(dense: nn.Module, sparsity: float = 0.8) -> nn.Module:
    """The network with its smallest weights set to zero."""
    model = copy.deepcopy(dense)
    resuscitate.sparsify(model, sparsity)
    return model


def machine(command: str) -> dict[str, Any]:
    """What a result needs beside it: processor, threads, versions, the date and the command."""
    cpuinfo = Path("/proc/cpuinfo")
    cpus = re.findall(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return {
        "cpu": cpus[0] if cpus else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "date": date.today().isoformat(),
        "command": command,
    }


def publish(output: Path, found: dict[str, Any], table: str) -> None:
    """Write what this script found into a folder, under its name: as JSON, with machine and command, and as a table."""
    name = Path(sys.argv[0]).stem
    about = machine(shlex.join(["python", f"benchmarks/{name}.py", *sys.argv[1:]]))
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{name}.json").write_text(json.dumps(about | found, indent=1) + "\n")
    (output / f"{name}.md").write_text(table)
    Console().print(table, markup=False, soft_wrap=True)
