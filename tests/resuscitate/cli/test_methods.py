"""A method in a module of the user's own: its flags, and what every command makes of it."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

import resuscitate
from tests.compare import same_state
from tests.user import METHODS, MODEL, command, unframed

DENSE = ("-m", MODEL, "--dense", "dense.safetensors", "-c", "images.npz")
FILES = (*DENSE, "--pruned", "pruned.safetensors")
OUTPUTS = ("-o", "out.safetensors", "--report", "run.json")
METHOD = ("--method", "users_methods:MedianGain")
FLAGS = ("--median-eps", 0.001, "--no-match-mean", "--power", "none")
OPTIONS = {"median_eps": 0.001, "match_mean": False, "power": None}


@pytest.fixture(autouse=True)
def module(user):
    (user / "users_methods.py").write_text(METHODS)


def written():
    return json.loads(Path("run.json").read_text())


def test_repair_takes_its_fields_as_flags_and_its_report_becomes_a_page():
    command("repair", *FILES, *OUTPUTS, *METHOD, *FLAGS)
    document = written()
    assert (document["method"], document["options"]) == ("median-gain", OPTIONS)
    assert {row["status"] for row in document["layers"]} == {"skipped", "repaired"}
    assert not same_state(load_file("out.safetensors"), load_file("pruned.safetensors"))
    command("report", "run.json", "-o", "page.html")
    assert "median-gain" in Path("page.html").read_text()
    refused = command("repair", *FILES, *OUTPUTS, *METHOD, "--ridge", 1, code=2)
    assert "method 'median-gain' has no option 'ridge'" in refused.stderr


def test_repair_goes_on_from_its_journal(monkeypatch):
    command("repair", *FILES, *OUTPUTS, *METHOD)
    expected = load_file("out.safetensors")
    Path("out.safetensors").unlink()
    monkeypatch.setenv("FAIL_AT", "6")
    stopped = command("repair", *FILES, *OUTPUTS, *METHOD, "--resume", "journal", code=2)
    assert stopped.stderr.endswith("Error: no gain for 6\n")
    assert not Path("out.safetensors").exists()
    monkeypatch.delenv("FAIL_AT")
    assert "another" in command("repair", *FILES, *OUTPUTS, *METHOD, *FLAGS, "--resume", "journal", code=1).stderr
    command("repair", *FILES, *OUTPUTS, *METHOD, "--resume", "journal")
    assert same_state(load_file("out.safetensors"), expected)
    assert written()["resumed"] == 1
    assert not Path("journal").exists()


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        (["compress", *DENSE, "--sparsity", 0.5, "--steps", "0.3,0.5"], "steps"),
        (["regrow", *FILES, "--sparsity", 0.5, "--rounds", 2], "rounds"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_compress_and_regrow_repair_with_it(words, steps):
    command(*words, *OUTPUTS, *METHOD, *FLAGS)
    reports = [step.get("report", step) for step in written()[steps]]
    assert [(report["method"], report["options"]) for report in reports] == [("median-gain", OPTIONS)] * 2


@pytest.mark.parametrize("workers", [1, 2])
def test_map_has_a_column_for_it(test_images, workers):
    files = ["--dense", "varied.safetensors", "-c", "images.npz", "--test", "test.npz"]
    grid = ["--sparsities", "0.5,0.7", "--allocations", "global", "--methods", "none,users_methods:MedianGain"]
    folder = f"map{workers}"
    command("map", "-m", MODEL, *files, *grid, "-o", folder, "--workers", workers, "--no-plot")
    found = resuscitate.RecoverabilityMap.load(f"{folder}/map.json")
    assert [cell.method for cell in found.cells] == ["none", "median-gain"] * 2


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("nowhere:Gain", "", "No module named 'nowhere'"),
        ("users_methods:Gain", "", "has no attribute 'Gain'"),
        ("users_methods:os", "", "is no registered method: decorate its class with @register"),
        ("clash:Gain", METHODS.replace("median-gain", "refit"), "there is a method 'refit' already"),
        ("broken:Gain", "raise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
    ],
)
def test_what_cannot_be_loaded_is_1_and_one_line(user, name, source, message):
    if source:
        (user / f"{name.partition(':')[0]}.py").write_text(source)
    done = command("repair", *FILES, *OUTPUTS, "--method", name, code=1)
    assert message in done.stderr
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1


def test_a_field_named_like_an_option_of_the_command_is_refused(user):
    source = METHODS.replace("median_eps", "steps")
    (user / "users_methods.py").write_text(source)
    said = command("compress", *DENSE, "--sparsity", 0.5, *OUTPUTS, *METHOD, code=1).stderr
    assert said == "Error: rename the field 'steps': `compress` has an option of that name\n"
    command("repair", *FILES, *OUTPUTS, *METHOD, "--steps", 0.001, "--resume", "compress")
    assert written()["options"]["steps"] == 0.001


def test_its_flags_are_in_the_help():
    said = unframed(command("repair", *METHOD, "--help").stdout)
    assert "--match-mean --no-match-mean" in said
    assert "Of median-gain: added to the pruned variances" in said
