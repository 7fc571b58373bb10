"""Models by name: from this package, from libraries of models, from the user's own module."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from torch import nn

from resuscitate.cli.inputs import build_model, read_images
from resuscitate.errors import ResuscitateError
from tests.networks import chain
from tests.user import MODEL, invoke, unframed


def test_from_this_package_and_from_the_users_module(user):
    assert type(build_model("digitnet")).__name__ == "ResNet"
    assert [type(part) for part in build_model(MODEL)] == [type(part) for part in chain()]
    assert not build_model(MODEL).training


def test_from_timm_and_torchvision_where_they_are(monkeypatch):
    asked = []

    def make(*args, **options):
        asked.append((args, options))
        return chain()

    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=make))
    monkeypatch.setitem(sys.modules, "torchvision.models", SimpleNamespace(get_model=make))
    for name in ("timm:resnet18.a1_in1k", "torchvision:resnet18"):
        assert isinstance(build_model(name), nn.Sequential)
    assert asked == [(("resnet18.a1_in1k",), {"pretrained": False}), (("resnet18",), {"weights": None})]


def test_from_a_hugging_face_configuration(tmp_path):
    transformers = pytest.importorskip("transformers")
    options = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 3}
    transformers.ResNetConfig(**options).save_pretrained(tmp_path)
    model = build_model(f"hf:{tmp_path}")
    with torch.no_grad():
        assert model(torch.rand(2, 3, 32, 32)).logits.shape == (2, 3)


@pytest.mark.parametrize(("source", "package"), [("timm", "timm"), ("hf", "transformers")])
def test_a_library_that_is_missing_is_named_with_its_remedy(monkeypatch, source, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ResuscitateError, match=f"pip install {package}"):
        build_model(f"{source}:anything")


def test_from_the_users_file(user, monkeypatch, tmp_path):
    """By its path, from any folder."""
    monkeypatch.chdir(tmp_path)
    network = build_model(f"{user / 'users_networks.py'}:small")
    assert [name for name, _ in network.named_children()][-1] == "11"


class TestLoader:
    SOURCE = """
import torch

def batches():
    for begin in range(0, 40, 8):
        yield {"images": torch.rand(8, 3, 10, 12, generator=torch.Generator().manual_seed(begin)), "labels": None}

def broken():
    raise OSError("no such\\nbucket")
"""

    @pytest.fixture(autouse=True)
    def module(self, user):
        (user / "users_data.py").write_text(self.SOURCE)

    def test_a_function_of_the_users_own_gives_the_images(self):
        options = {"calibration": Path("users_data:batches"), "max_samples": 20, "seed": 0}
        options |= dict.fromkeys(("mean", "std", "size"))
        found = read_images(options)
        assert found.all.shape == (20, 3, 10, 12)
        assert found.measured["images"] == 20
        for rank in range(3):
            part = read_images(options, (rank, 3), workers=0)
            assert torch.equal(torch.cat(list(part.all)), found.all[rank::3])
            assert part.measured["images"] == len(found.all[rank::3])

    def test_by_the_command(self):
        words = ["repair", "-m", MODEL, "--pruned", "pruned.safetensors", "--method", "bn"]
        words += ["-o", "out.safetensors", "-c"]
        assert "40 images of 3x10x12 from users_data:batches" in invoke(*words, "users_data:batches").stdout
        assert "OSError: no such bucket" in invoke(*words, "users_data:broken", code=1).stderr
        done = invoke(*words, "users_data:batches", "--mean", 0.5, code=2)
        assert "leave --mean" in unframed(done.stderr)


def test_what_cannot_be_built_is_one_line():
    words = ["prune", "--dense", "dense.safetensors", "--sparsity", 0.5, "-o", "out.safetensors", "-m"]
    assert "ModuleNotFoundError" not in invoke(*words, "no_such_module:factory", code=1).stderr
    assert "timm:NAME" in invoke(*words, "resnet21", code=2).stderr


def test_an_unknown_name_is_a_mistake_in_the_command():
    with pytest.raises(typer.BadParameter, match="resnet20"):
        build_model("resnet21")
