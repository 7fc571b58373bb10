"""2:4 sparse layers are converted where torch can, and unchanged, with a reason, where it cannot."""

import itertools

import pytest
import torch
from torch import nn

import resuscitate
from resuscitate.deploy import semistructured
from resuscitate.deploy.semistructured import is_two_of_four, to_semi_structured
from resuscitate.errors import ResuscitateError
from tests.networks import chain, images, seeded


def wide():
    return nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def test_sparsify_makes_weights_two_of_four():
    model = wide()
    assert not is_two_of_four(model[0].weight)
    resuscitate.sparsify(model, pattern="2:4")
    assert all(is_two_of_four(model[index].weight) for index in (0, 2, 4))
    assert not is_two_of_four(torch.zeros(3, 6))
    assert is_two_of_four(torch.tensor([[0.0, 1, 0, 1, 1, 0, 0, 0]]))
    assert not is_two_of_four(torch.tensor([[0.0, 1, 1, 1, 1, 0, 0, 0]]))


def test_unsupported_layers_are_unchanged_with_a_reason():
    model = seeded(chain)
    resuscitate.sparsify(model, pattern="2:4")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = to_semi_structured(model, images(4))
    assert (found.converted, found.error) == ([], 0.0)
    assert "a Conv2d; torch has semi-structured tensors for linear layers only" in found.unchanged["3"]
    assert "compute capability 8.0" in found.unchanged["11"]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert to_semi_structured(wide(), torch.rand(4, 128)).unchanged["0"] == "not 2:4 sparse"


def fake_conversion(monkeypatch, error=0.0):
    """Convert without a GPU: the weight stays dense, with `error` added."""
    monkeypatch.setattr(semistructured, "_obstacle", lambda module, weight: None if len(weight) > 10 else "too small")
    monkeypatch.setattr(semistructured, "to_sparse_semi_structured", lambda weight: weight + error)


def test_a_wrong_output_is_refused_and_the_model_unchanged(monkeypatch):
    model, x = wide(), torch.rand(4, 128)
    resuscitate.sparsify(model, pattern="2:4")
    fake_conversion(monkeypatch)
    found = to_semi_structured(model, x)
    assert (found.converted, found.unchanged, found.error) == (["0", "2"], {"4": "too small"}, 0.0)
    before = list(model.parameters())
    fake_conversion(monkeypatch, error=0.5)
    with pytest.raises(ResuscitateError, match="the model is unchanged"):
        to_semi_structured(model, x)
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))


def test_an_error_of_the_second_pass_leaves_the_model_unchanged(monkeypatch):
    model = wide()
    resuscitate.sparsify(model, pattern="2:4")
    fake_conversion(monkeypatch)
    before, calls = list(model.parameters()), itertools.count(1)

    def fail(module, args):
        if next(calls) == 2:
            raise RuntimeError("the kernel refuses this input")

    model[4].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="the kernel refuses"):
        to_semi_structured(model, torch.rand(4, 128))
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))


def test_the_passes_are_in_eval_mode(monkeypatch):
    model = nn.Sequential(nn.Linear(128, 64), nn.BatchNorm1d(64), nn.Dropout(0.5))
    resuscitate.sparsify(model, pattern="2:4")
    fake_conversion(monkeypatch)
    assert to_semi_structured(model, torch.rand(4, 128)).error == 0.0
    assert all(module.training for module in model.modules())
    assert model[1].num_batches_tracked == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu_the_outputs_are_the_same(dtype):
    model = wide().to("cuda", dtype).eval()
    resuscitate.sparsify(model, pattern="2:4")
    x = torch.rand(64, 128, device="cuda", dtype=dtype)
    expected = model(x)
    found = to_semi_structured(model, x)
    assert {"0", "2"} <= set(found.converted)
    torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-2)
