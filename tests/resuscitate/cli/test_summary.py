"""What `repair`, `compress` and `regrow` say at the end, and the search of `compress`."""

import json
import re
import shlex
from pathlib import Path

import pytest

import resuscitate
from resuscitate import cli
from resuscitate.cli import summary
from tests.user import MODEL, command, invoke, loaded, repair, unframed

FILES = ["-m", MODEL, "--dense", "dense.safetensors", "-c", "images.npz"]


def last_lines(text):
    """The five lines at the end, by name."""
    lines = text.rstrip().splitlines()[-5:]
    return dict(line.split(maxsplit=1) for line in lines)


def test_five_lines_end_a_repair(user):
    found = last_lines(repair("--max-samples", 40).stdout)
    assert list(found) == ["agreement", "sparsity", "size", "time", "next"]
    assert re.fullmatch(
        r"same class 0\.\d{3} -> \d\.\d{3}, error \d\.\d{3} -> \d\.\d{3} on \d+ of the images that it used",
        found["agreement"],
    )
    network = loaded("repaired.safetensors")
    nonzero = sum(int(each.count_nonzero()) for each in network.parameters())
    total = sum(each.numel() for each in network.parameters())
    masks = resuscitate.Masks.from_zeros(network)
    assert found["sparsity"].startswith(f"{masks.sparsity:.2%} of ")
    assert found["size"].startswith(
        f"{nonzero:,} of {total:,} parameters are not zero; written to repaired.safetensors"
    )
    assert found["time"].endswith(" s")


def test_zeros_are_those_of_the_network_even_if_more_than_its_masks_have(user):
    words = ["--dense", "pruned.safetensors", "-c", "images.npz", "-o", "out.safetensors"]
    found = last_lines(invoke("compress", "-m", MODEL, "--sparsity", 0.3, "--steps", 1, *words).stdout)
    assert found["sparsity"].startswith(f"{resuscitate.Masks.from_zeros(loaded('out.safetensors')).sparsity:.2%} of ")


@pytest.mark.parametrize("words", [["--mean", "0.4,0.5,0.6", "--std", "0.2,0.25,0.3"], ["--report", "run.json"]])
def test_the_next_command_runs(user, words):
    found = last_lines(repair(*words).stdout)["next"]
    assert found.split()[1] == ("report" if "--report" in words else "export")
    assert ("--mean 0.4,0.5,0.6" in found) == ("--mean" in words)
    invoke(*shlex.split(found)[1:])
    assert Path("run.html" if "--report" in words else "repaired.pt2").exists()
    Path("repaired.pt2").unlink(missing_ok=True)


def test_after_a_repair_that_was_undone_the_next_command_compresses():
    options = {"report": None, "model": "m:f", "dense": Path("d.pt"), "output": Path("o.safetensors")}
    options |= {"calibration": Path("c"), "mean": None, "std": None, "size": (8, 9)}
    expected = (
        "resuscitate compress --model m:f --dense d.pt --calibration c --size 8x9 --output compressed.safetensors"
    )
    assert summary.next_command(options, undone=True) == expected
    assert "export" in summary.next_command(options | {"dense": None}, undone=True)


def test_without_a_dense_network_no_agreement_is_measured(user):
    words = ["--pruned", "pruned.safetensors", "-c", "images.npz", "-o", "out.safetensors", "--method", "bn"]
    assert last_lines(invoke("repair", "-m", MODEL, *words).stdout)["agreement"].startswith("not measured")


@pytest.mark.parametrize("words", [["--sparsity", 0.6, "--steps", 2], ["--target-agreement", 0.2, "--trials", 1]])
def test_compress_prints_the_lines_or_json(user, words):
    words = ["compress", *FILES, "-o", "out.safetensors", "--allocation", "global", "--ridge", 0.01, *words]
    assert list(last_lines(command(*words).stdout)) == ["agreement", "sparsity", "size", "time", "next"]
    document = json.loads(invoke(*words, "--json").stdout)
    assert document["size"]["nonzero"] < document["size"]["parameters"]
    assert ("trials" in document) == ("--trials" in words)


def test_without_a_sparsity_the_target_is_searched_for_and_098_by_default(user, monkeypatch):
    seen = []

    def search(model, agreement, calibration, **options):
        seen.append((agreement, options.get("trials"), options["steps"], "sparsity" in options))
        return resuscitate.compress(model, 0.5, calibration, steps=1, allocation="global", ridge=0.01)

    monkeypatch.setattr(cli.compress, "compress_to_agreement", search)
    invoke("compress", *FILES, "-o", "out.safetensors")
    invoke("compress", *FILES, "-o", "out.safetensors", "--target-agreement", 0.9, "--trials", 3, "--steps", 2)
    assert seen == [(0.98, None, 7, False), (0.9, 3, 2, False)]


def test_a_sparsity_and_a_target_contradict_one_another(user):
    done = invoke("compress", *FILES, "-o", "out.safetensors", "--sparsity", 0.5, "--target-agreement", 0.9, code=2)
    assert "two ways to say how much: give one" in unframed(done.stderr)


def test_the_report_of_a_repair_has_what_each_layer_keeps(user):
    document = json.loads(repair("--json").stdout)
    masks = resuscitate.Masks.from_zeros(loaded("pruned.safetensors"))
    assert [row["kept"] for row in document["masks"]] == [row.kept for row in masks.table()]
