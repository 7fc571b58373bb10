"""All reports: plain data for JSON, one row per line in CSV, and `undo` where there is something to undo."""

import copy
import csv
import io
import json

import pytest
import torch
from rich.console import Console
from torch import nn

import resuscitate
from resuscitate import Masks, RecoverabilityMap, SemiStructured
from resuscitate.pruning.coupling import channel_groups, channel_masks
from resuscitate.reports.recoverability import Cell
from tests.networks import chain, images, pruned_copy, seeded


def repaired(model, path):
    return resuscitate.repair(pruned_copy(model), model, images(), method="asr")


def compressed(model, path):
    return resuscitate.compress(model, 0.6, images(), steps=2)


def regrown(model, path):
    pruned = copy.deepcopy(model)
    return resuscitate.regrow(pruned, model, resuscitate.sparsify(pruned, 0.9), 0.7, images())


def mapped(model, path):
    return RecoverabilityMap([Cell(0.5, "global", "bn", 80.0, 0.49, 1.0)], 90.0, 10.0, "unstructured", 24)


def folded(model, path):
    model[4].__class__ = type("Other", (nn.BatchNorm2d,), {})
    return resuscitate.fold_batchnorm(model, images(2)).fold_report


def converted(model, path):
    return SemiStructured(["0"], {"1": "not 2:4 sparse"}, 0.0)


def shrunk(model, path):
    groups = channel_groups(model, images(2))
    masks = Masks(channel_masks(model, groups, {group.name: torch.arange(group.units) < 2 for group in groups}))
    masks.apply_(model)
    return resuscitate.shrink(model, masks, images(2))


def exported(model, path):
    return resuscitate.export(model, path / "network.safetensors", images(2))


# the report, the number of its rows, and can it be undone?
REPORTS = [
    (repaired, 4, True),
    (compressed, 8, True),
    (regrown, 4, True),
    (mapped, 1, False),
    (folded, 3, False),
    (converted, 2, False),
    (exported, 1, False),
    (shrunk, 3, False),
]


@pytest.mark.parametrize(("make", "count", "undoes"), REPORTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_report_is_plain_data_is_saved_and_undone(make, count, undoes, tmp_path):
    report = make(seeded(chain), tmp_path)
    plain = json.loads(json.dumps(report.to_dict()))
    report.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == plain
    report.save(tmp_path / "report.csv")
    with (tmp_path / "report.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == count
    assert all(any(row.values()) for row in rows)
    for ending in ("txt", "pt"):
        with pytest.raises(ValueError, match=r"is written as \.json or \.csv"):
            report.save(tmp_path / f"report.{ending}")
    assert not list(tmp_path.glob("report.[tp]*"))
    assert hasattr(report, "undo") == undoes
    if undoes:
        shown = io.StringIO()
        Console(file=shown, width=160).print(report)
        assert str(report) == shown.getvalue().rstrip()
        report.undo()
        assert json.loads(json.dumps(report.to_dict())) == plain
        with pytest.raises(RuntimeError, match="has been undone already"):
            report.undo()


def test_provenance_is_added_to_the_json_alone(tmp_path):
    report = mapped(None, None)
    for ending in ("json", "csv"):
        report.save(tmp_path / f"map.{ending}", {"command": "x"})
    assert json.loads((tmp_path / "map.json").read_text())["provenance"] == {"command": "x"}
    assert "command" not in (tmp_path / "map.csv").read_text()
    (tmp_path / "plain.json").write_text(json.dumps(report.to_dict()))
    assert RecoverabilityMap.load(tmp_path / "plain.json") == report


def test_tensors_and_paths_are_plain(tmp_path):
    from resuscitate.reports.base import plain

    nested = {"a": torch.arange(2), "b": [tmp_path, (1, None)], "c": Cell(0.5, "global", "bn", 80.0, 0.49, 1.0)}
    assert json.loads(json.dumps(plain(nested))) == {
        "a": [0, 1],
        "b": [str(tmp_path), [1, None]],
        "c": {"sparsity": 0.5, "allocation": "global", "method": "bn", "score": 80.0, "pruned": 0.49, "seconds": 1.0},
    }
