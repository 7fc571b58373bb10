"""Each example runs as it is, and its repair brings the outputs nearer to the dense network's."""

import re
import runpy
from pathlib import Path

import pytest

from tests.outside.networks import package

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
QUICK = ("transformers_resnet",)  # `make test` runs these, `make outside` all
PACKAGES = "torchvision", "timm", "transformers", "torch_pruning"


def _parameter(path):
    marks = [pytest.mark.outside] + [pytest.mark.slow] * (path.stem not in QUICK)
    return pytest.param(path, id=path.stem, marks=marks)


@pytest.fixture(params=map(_parameter, EXAMPLES))
def example(request, tmp_path, monkeypatch):
    """The path of an example, in a folder of its own."""
    needed = set(re.findall(r"^(?:import|from) (\w+)", request.param.read_text(), re.MULTILINE))
    for name in PACKAGES:
        try:
            package(name)  # torchvision before timm and transformers, which import it where it is installed
        except ImportError:
            if name in needed:
                pytest.skip(f"{name} is not installed; `make outside` brings it along")
    monkeypatch.chdir(tmp_path)
    return request.param


def test_it_runs_and_brings_the_outputs_nearer(example, capsys):
    found = runpy.run_path(str(example))
    agreement = found["report"].agreement
    assert agreement.error_after < agreement.error_before
    assert not found["report"].undone
    assert str(agreement) in capsys.readouterr().out
    assert list(Path().iterdir())


def test_the_table_names_every_example():
    named = re.findall(r"\]\((\w+\.py)\)", (FOLDER / "README.md").read_text())
    assert sorted(named) == [path.name for path in EXAMPLES]
    assert all("yours" in path.read_text() for path in EXAMPLES)
