"""What README and docs say is so: their Python runs, their tables are the committed results, their commands exist."""

import re
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from resuscitate.models import digitnet
from tests.networks import pruned_copy, seeded

ROOT = Path(__file__).parents[1]
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
TEXT = "\n".join(PAGES.values())
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0])
def test_every_python_block_runs(block, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dense = seeded(digitnet)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(320, 1, 8, 8, generator=generator)
    names = {"dense": dense, "model": pruned_copy(dense), "images": images, "loader": DataLoader(images, 16)}
    with torch.no_grad():
        names["labels"] = dense(images).argmax(1)
    names |= {"dense_x": images[:, :, :4], "pruned_x": images[:, :, 4:].clone()}
    exec("import copy\n\nimport torch\n\nimport resuscitate\n" + block, names)


@pytest.mark.parametrize("table", sorted((ROOT / "benchmarks" / "results").glob("*.md")), ids=lambda path: path.name)
def test_every_table_is_the_committed_result(table):
    assert table.read_text().strip() in TEXT


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`make ([a-z-]+)", TEXT)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_linked_file_exists():
    for page, text in PAGES.items():
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_every_test_that_the_docs_name_exists():
    code = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_[a-z0-9_]+)`", TEXT))
    assert len(named) > 50
    assert not {name for name in named if f"def {name}(" not in code}
