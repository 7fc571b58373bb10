"""The package as it is shipped: one version, light to import, its dependencies and their licences told."""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest

import resuscitate
from resuscitate import doctor

ROOT = Path(__file__).parents[1]
if not (ROOT / "pyproject.toml").exists():
    pytest.skip("beside the installed package there is no pyproject.toml", allow_module_level=True)
tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def names(requirements):
    return {re.split(r"[\[<>=; ]", requirement)[0] for requirement in requirements} - {"resuscitate"}


def test_there_is_one_version():
    assert "version" in PROJECT["dynamic"]
    assert f"version: {resuscitate.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{resuscitate.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_importing_it_brings_in_little_beside_torch():
    """By count, for a time would hang on the machine: nothing but its own modules and those of safetensors."""
    program = "import torch, sys; before = set(sys.modules); import resuscitate; print(*set(sys.modules) - before)"
    folders = [str(Path(resuscitate.__file__).parents[1]), str(ROOT)]
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {folders}; {program}"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    foreign = {name.partition(".")[0] for name in found} - {"resuscitate", "asr_kernels"} - sys.stdlib_module_names
    assert foreign <= {"safetensors", "numpy", "torch"}
    assert not {"typer", "rich", "matplotlib", "triton", "PIL", "torch._dynamo", "torch.onnx"} & set(found)


@pytest.mark.parametrize("package", sorted(names(PROJECT["dependencies"] + [r for e in EXTRAS.values() for r in e])))
def test_every_dependency_is_listed_with_its_licence(package):
    page = (ROOT / "docs" / "dependencies.md").read_text()
    (row,) = re.findall(rf"^\|.*\[{package}\]\(\S+\)[^|]*\| ([^|]+) \|", page, re.MULTILINE)
    try:
        found = metadata(package)
    except PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    classifiers = [c for c in found.get_all("Classifier") or [] if c.startswith("License")]
    told = " ".join([found.get("License-Expression") or "", (found.get("License") or "")[:300], *classifiers])
    assert row.replace("Apache-2.0", "Apache").split()[0].lower() in told.lower()


def test_the_doctor_knows_every_extra():
    assert set(doctor.EXTRAS) == set(EXTRAS) - {"dev"}


def test_every_dependency_of_the_development_environment_is_pinned():
    pinned = (ROOT / "constraints.txt").read_text().lower()
    for package in names(PROJECT["dependencies"] + [r for extra in EXTRAS.values() for r in extra]):
        assert re.search(rf"^{package.lower()}[=><]", pinned, re.MULTILINE), package
