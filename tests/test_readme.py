"""What README and docs say is so: their Python and commands run, their tables are the committed results."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from resuscitate.methods import base
from resuscitate.methods.base import registered
from resuscitate.models import MODELS, ResNet
from tests.networks import pruned_copy, seeded
from tests.user import invoke

ROOT = Path(__file__).parents[1]
FILES = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples/README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
)
PAGES = {path: path.read_text() for path in FILES}
TEXT = "\n".join(PAGES.values())
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
CONSOLE = "\n".join(re.findall(r"```console\n(.*?)```", TEXT, re.DOTALL))
METHODS = ROOT / "docs" / "methods"
HEADINGS = ["What", "When", "When not", "Knobs", "Cost", "Source"]
METHOD_PAGES = sorted(set(METHODS.glob("*.md")) - {METHODS / "README.md"})


def commands(text):
    """The `resuscitate` commands of a page, in its order, as lists of words; what `torchrun` would start, alone."""
    script = "\n".join(re.findall(r"```console\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in script.splitlines()]
    return [line[line.index("resuscitate") + 1 :] for line in lines if "resuscitate" in line]


def small():
    """A network with the names of the CIFAR ResNets, for images of 1x8x8."""
    return ResNet(2, inputs=1, widths=(8, 16, 32))


COMMANDS = {str(path.relative_to(ROOT)): found for path, text in PAGES.items() if (found := commands(text))}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0])
def test_every_python_block_runs(block, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(base, "_METHODS", {**registered()})  # a block may register a method
    dense = seeded(small)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(320, 1, 8, 8, generator=generator)
    names = {"dense": dense, "model": pruned_copy(dense), "images": images, "loader": DataLoader(images, 16)}
    with torch.no_grad():
        names["labels"] = dense(images).argmax(1)
    names |= {"dense_x": images[:, :, :4], "pruned_x": images[:, :, 4:].clone()}
    exec("import copy\n\nimport torch\n\nimport resuscitate\n" + block, names)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What the commands name: weights, images, and the same images with the classes that the dense network sees."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(MODELS, "resnet20", small)
    dense, images = seeded(small), np.random.default_rng(0).random((32, 8, 8), np.float32)
    with torch.no_grad():
        dense.linear.bias -= dense(torch.from_numpy(images)[:, None]).mean(0)  # lest it sees one class only
        labels = dense(torch.from_numpy(images)[:, None]).argmax(1).numpy()
    save_file(dense.state_dict(), "dense.safetensors")
    save_file(pruned_copy(dense).state_dict(), "pruned.safetensors")
    np.savez("images.npz", images=images)
    np.savez("labelled.npz", images=images, labels=labels)
    return tmp_path


@pytest.mark.parametrize("page", COMMANDS)
def test_every_command_runs(page, folder):
    for words in COMMANDS[page]:
        invoke(*words)
        written = [words[at + 1] for at, word in enumerate(words) if word in ("--output", "--masks", "--report")]
        assert all((folder / name).exists() for name in written), words


@pytest.mark.parametrize("table", sorted((ROOT / "benchmarks" / "results").glob("*.md")), ids=lambda path: path.name)
def test_every_table_is_the_committed_result(table):
    assert table.read_text().strip() in TEXT


def test_the_picture_of_a_run_and_its_last_lines_are_the_committed_result():
    results = ROOT / "benchmarks" / "results"
    shown, picture = (results / "picture.txt").read_text(), (results / "picture.svg").read_text()
    assert "(benchmarks/results/picture.svg)" in PAGES[ROOT / "README.md"]
    last = shown.splitlines()[-5:]
    assert "\n".join(last) in PAGES[ROOT / "docs/command-line.md"]
    assert all(line.split()[-1] in picture for line in last)
    for share in re.findall(r"same class (\S+) -> (\S+),", last[0])[0]:
        assert f"for {share}" in PAGES[ROOT / "README.md"]


@pytest.mark.parametrize(
    ("column", "words", "pages"),
    [
        ("ours / bare forwards", "times the bare forward passes", ["docs/walk.md", "docs/methods/asr.md"]),
        ("update_bn / ours", "times ours", ["docs/walk.md"]),
    ],
)
def test_what_a_repair_costs_is_said_as_measured(column, words, pages):
    rows = json.loads((ROOT / "benchmarks" / "results" / "repair.json").read_text())["rows"]
    claims = set()
    for malloc in ("default", "tuned"):
        found = [row["ratio"][column] for row in rows if row["malloc"] == malloc and column in row["ratio"]]
        claims.add(f"{min(found):.2f} to {max(found):.2f} {words}" if found else "not yet measured")
    for page in pages:
        text = " ".join(PAGES[ROOT / page].split())
        assert all(claim in text for claim in claims), claims
        assert set(re.findall(rf"[\d.]+ to [\d.]+ {words}", text)) <= claims


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`make ([a-z-]+)", TEXT) + re.findall(r"^make ([a-z-]+)", CONSOLE, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def anchors(text):
    """Of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_leads_somewhere():
    links = [(page, *found) for page, text in PAGES.items() for found in re.findall(r"\]\(([^)#:]*)#?([^):]*)\)", text)]
    assert len(links) > 100
    for page, path, anchor in links:
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {path}"
        assert target.is_relative_to(ROOT), f"{page.name}: {path}"
        assert not anchor or anchor in anchors(target.read_text()), f"{page.name}: {path}#{anchor}"


def test_every_page_is_linked_from_another():
    linked = {
        (page.parent / path).resolve() for page, text in PAGES.items() for path in re.findall(r"\]\(([^)#:]+)", text)
    }
    assert set(PAGES) - {ROOT / "README.md"} <= linked


def test_every_test_that_the_docs_name_exists():
    code = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_[a-z0-9_]+)`", TEXT))
    assert len(named) > 50
    assert not {name for name in named if f"def {name}(" not in code}


@pytest.mark.parametrize("method", sorted(registered()))
def test_every_method_has_a_page_and_the_table_of_methods_names_it(method):
    assert METHODS / f"{method}.md" in METHOD_PAGES
    assert f"[`{method}`]({method}.md)" in PAGES[METHODS / "README.md"]


@pytest.mark.parametrize("page", METHOD_PAGES, ids=lambda page: page.stem)
def test_pages_of_methods_are_built_alike(page):
    assert re.findall(r"^## (.+)$", PAGES[page], re.MULTILINE) == HEADINGS
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL)
    assert 2 <= len(snippet.splitlines()) <= 6
