"""`resuscitate report`, and what `resuscitate repair` puts into a report for it."""

import json
from pathlib import Path

import numpy as np
import pytest

from resuscitate.cli import compare
from resuscitate.reports.page import render
from tests.user import MODEL, invoke, repair, unframed


class TestCommand:
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

    def test_it_writes_the_page(self, tmp_path):
        row = {"name": "conv", "kind": "Conv2d", "status": "repaired", "channels": 3, "dead": 0}
        document = {"method": "asr", "layers": [row], "seconds": 1.5}
        (tmp_path / "run.json").write_text(json.dumps(document))
        assert "written to page.html" in invoke("report", "run.json", "-o", "page.html").stdout
        assert (tmp_path / "page.html").read_text() == render(document)

    @pytest.mark.parametrize(("text", "said"), [("{", "not JSON"), ("[]", "no report"), ("{}", "no report")])
    def test_what_it_cannot_read_is_one_line_and_leaves_nothing(self, tmp_path, text, said):
        (tmp_path / "run.json").write_text(text)
        assert said in invoke("report", "run.json", code=1).stderr
        assert "No such file" in invoke("report", "none.json", code=1).stderr
        assert not (tmp_path / "report.html").exists()

    def test_another_ending_is_refused(self, tmp_path):
        (tmp_path / "run.json").write_text("{}")
        for name in ("page.pdf", "page.htm"):
            assert "name it page.html" in unframed(invoke("report", "run.json", "-o", name, code=2).stderr)


def test_repair_reports_accuracy_and_channels_where_they_are_asked_for(user):
    with np.load("images.npz") as file:
        np.savez("labelled.npz", images=file["images"], labels=np.arange(40) % 10)
    files = [
        "--pruned",
        "pruned.safetensors",
        "--dense",
        "dense.safetensors",
        "-c",
        "images.npz",
        "-o",
        "o.safetensors",
    ]
    done = invoke("repair", "-m", MODEL, *files, "--test", "labelled.npz", "--detail", "--report", "run.json")
    document = json.loads(Path("run.json").read_text())
    assert set(document["scores"]) == {"dense", "pruned", "repaired"}
    assert "accuracy in per cent: dense " in done.stdout
    assert document["channels"]["3"]["dense"][0] > 0
    assert {len(values) for values in document["channels"]["3"].values()} == {8}
    assert set(document["stages"]) >= {"reading images", "measuring and correcting"}
    assert sum(document["stages"].values()) == pytest.approx(document["seconds"])
    assert "Variance of each channel" in render(document)


def test_channels_are_compared_with_the_precision_that_the_repair_runs_in(user, monkeypatch):
    seen, damage = [], compare.damage
    monkeypatch.setattr(compare, "damage", lambda *a, **given: seen.append(given) or damage(*a, **given))
    repair("--detail", "--dtype", "bf16", "--device", "cpu", "-b", 7, "--report", "run.json")
    assert [(given["dtype"], given["device"], given["batch_size"]) for given in seen] == [("bf16", "cpu", 7)] * 2
