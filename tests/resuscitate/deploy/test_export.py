"""An exported file gives the outputs of the model, or is not written."""

import copy
import sys

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn.utils import prune

import resuscitate
from resuscitate import export
from resuscitate.errors import ResuscitateError
from tests.networks import Residual, chain, images, pruned_copy, seeded

ENDINGS = [".safetensors", ".pt2", ".onnx"]


def need(ending):
    if ending == ".onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")


def residual():
    return pruned_copy(seeded(Residual))


def with_means():
    dense = seeded(chain)
    model = pruned_copy(dense)
    resuscitate.replace_by_means(model, dense)
    return model


def under_prune():
    model = seeded(chain)
    prune.l1_unstructured(model[3], "weight", amount=0.5)
    model(images(2)).sum().backward()  # `weight` is now a tensor computed with gradients
    return model


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("build", [residual, with_means, under_prune])
def test_the_exported_file_gives_the_same_outputs(tmp_path, ending, fold, build):
    need(ending)
    model = build()
    before = copy.deepcopy(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    done = export(model.train(), tmp_path / f"net{ending}", images(4), fold=fold)
    assert done.error < 1e-5
    foldable = {
        residual: 2,
        with_means: 0,
        under_prune: 3,
    }  # one BatchNorm reads a sum; none folds into mean layers
    assert done.folded == (foldable[build] if fold else 0)
    assert done.path.stat().st_size > 1000
    assert [path.name for path in tmp_path.iterdir()] == [f"net{ending}"]
    assert model.training
    assert [type(module) for module in model.modules()] == kinds
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


class NormalisesInPlace(nn.Sequential):
    def forward(self, x):
        return super().forward(x.mul_(2.0).add_(1.0))


def normalises_in_place():
    return NormalisesInPlace(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))


def normalises_by_its_batch():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU())


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("build", [normalises_in_place, normalises_by_its_batch])
def test_a_network_that_writes_to_its_input_or_reads_its_whole_batch_is_exported(tmp_path, ending, fold, build):
    need(ending)
    given = images(4)
    kept = given.clone()
    assert export(seeded(build), tmp_path / f"net{ending}", given, fold=fold).error < 1e-5
    assert torch.equal(given, kept)


def test_a_program_needs_no_code_and_takes_any_batch_size(tmp_path):
    model = pruned_copy(seeded(chain))
    export(model, tmp_path / "net.pt2", images(2))
    run = torch.export.load(tmp_path / "net.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(run(images(7)), model(images(7)), rtol=1e-5, atol=1e-6)


def test_provenance_is_written_with_the_weights(tmp_path):
    made_by = {"method": "refit", "options": {"seed": 3}}
    export(seeded(chain), tmp_path / "net.safetensors", images(2), provenance=made_by)
    with safe_open(tmp_path / "net.safetensors", "pt") as file:
        assert file.metadata()["method"] == "refit"
        assert file.metadata()["options"] == '{"seed": 3}'


def test_a_file_with_other_outputs_is_not_written(tmp_path, monkeypatch):
    writers = sys.modules["resuscitate.deploy.export"].WRITERS
    right = writers[".pt2"]

    def wrong(*args):
        read_back = right(*args)
        return lambda x: [y * 1.01 for y in read_back(x)]

    monkeypatch.setitem(writers, ".pt2", wrong)
    (tmp_path / "net.pt2").write_text("old file")
    with pytest.raises(ResuscitateError, match=r"its outputs differ from the model's by 0\.01"):
        export(seeded(chain), tmp_path / "net.pt2", images(2))
    assert (tmp_path / "net.pt2").read_text() == "old file"
    assert len(list(tmp_path.iterdir())) == 1


class DataDependent(nn.Module):
    def forward(self, x):
        return x * int(x.sum() > 0)


def test_the_innermost_error_of_the_onnx_exporter_is_said_in_plain_text(tmp_path):
    need(".onnx")
    with pytest.raises(ResuscitateError, match="exported; GuardOnDataDependentSymNode: Could not guard") as found:
        export(DataDependent(), tmp_path / "net.onnx", images(2))
    assert str(found.value).isprintable()


def test_a_failed_export_raises_and_writes_no_file(tmp_path):
    with pytest.raises(ResuscitateError, match="cannot be exported"):
        export(DataDependent(), tmp_path / "net.pt2", images(2))
    with pytest.raises(ValueError, match=r"write one of \.safetensors, \.pt2, \.onnx, not \.pb"):
        export(chain(), tmp_path / "net.pb", images(2))
    with pytest.raises(ValueError, match="two images"):
        export(chain(), tmp_path / "net.pt2", images(1))
    with pytest.raises(OSError, match="no such folder"):
        export(chain(), tmp_path / "nowhere" / "net.pt2", images(2))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ResuscitateError, match=r"pip install 'resuscitate\[onnx\]'"):
        export(chain(), tmp_path / "net.onnx", images(2))
