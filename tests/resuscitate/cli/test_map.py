"""`resuscitate map`: the folder that it writes, and how it goes on."""

import numpy as np
import pytest

import resuscitate
from resuscitate.data.images import load_images
from resuscitate.reports.plots import have_matplotlib
from tests.user import MODEL, command, invoke, loaded, unframed

GRID = ["--sparsities", "0.5,0.8", "--allocations", "global,erk", "--methods", "bn,asr"]


def words(*more):
    files = ["--dense", "varied.safetensors", "-c", "images.npz", "--test", "test.npz", "-o", "map"]
    return ["map", "-m", MODEL, *files, *more]


def test_it_writes_what_recoverability_finds_and_goes_on_from_there(user, test_images, tmp_path, monkeypatch):
    done = command(*words(*GRID, "--damage", 0.8))
    names = {path.name for path in (user / "map").iterdir()}
    pictures = {"map-asr.svg", "map-bn.svg", "damage-global.svg", "damage-erk.svg"} if have_matplotlib() else set()
    assert names == {"map.json", "map.csv", "map.journal", *pictures}
    assert done.stderr == ""
    found = resuscitate.RecoverabilityMap.load("map/map.json")
    assert found.chance == pytest.approx(100 * int(test_images.bincount().max()) / 30)
    images, held_out = load_images("images.npz"), load_images("test.npz", seed=None)
    evaluate = resuscitate.Accuracy(held_out, test_images)
    grid = {"sparsities": [0.5, 0.8], "allocations": ["global", "erk"], "methods": ["bn", "asr"]}
    expected = resuscitate.recoverability(loaded("varied.safetensors"), images, evaluate, **grid)
    assert [c.score for c in found.cells] == pytest.approx([c.score for c in expected.cells])
    for cell in found.cells:
        assert f"{cell.score:.2f}" in done.stdout
    monkeypatch.setattr("resuscitate.workflows.cells.Cells.fill", None)  # no cell is filled again
    assert "80.0%" in invoke(*words(*GRID, "--no-plot")).stdout


def test_damage_is_shown_of_what_was_measured_with_the_options_given(user, test_images, monkeypatch):
    if not have_matplotlib():
        pytest.skip("draws pictures")
    seen, measure = [], resuscitate.Repairability.measure
    monkeypatch.setattr(
        resuscitate.Repairability, "measure", lambda *a, **given: seen.append(given) or measure(*a, **given)
    )
    grid = ["--sparsities", 0.5, "--allocations", "rr", "--methods", "bn", "--damage", 0.8]
    invoke(*words(*grid, "-o", "damaged", "--dtype", "bf16", "-b", 7, "--seed", 3))
    assert [(given["dtype"], given["batch_size"], given["seed"]) for given in seen] == [("bf16", 7, 3)] * 2


def test_what_makes_no_sense_is_refused_before_any_work(user, test_images):
    assert "did you mean erk" in invoke(*words("--allocations", "erkk"), code=2).stderr
    assert "not in [0, 1)" in invoke(*words("--damage", 1.5), code=2).stderr
    assert "neither a number" in unframed(invoke(*words("--sparsities", "many"), code=2).stderr)
    np.savez(user / "test.npz", images=np.zeros((3, 10, 12, 3), np.uint8))
    assert "holds no labels" in invoke(*words(), code=1).stderr
