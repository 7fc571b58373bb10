"""The doctor: its facts, the extras that it reports as missing, and the kernels that fail its checks."""

import json

import pytest
import torch

import asr_kernels as ak
from resuscitate import doctor
from tests.user import invoke


def test_a_sound_machine_passes_every_check(capsys):
    found = doctor.examine("cpu")
    assert found.well
    assert {check.name.split()[0] for check in found.checks} == {"moments", "paired", "factors", "affine", "products"}
    assert found.facts["torch"] == torch.__version__
    assert found.facts["device"].startswith("cpu")


def test_the_random_state_is_unchanged():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    doctor.examine("cpu")
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("broken", ["wrong", "nan", "raises"])
def test_a_wrong_kernel_is_named_with_a_remedy(monkeypatch, broken):
    right = ak.backends.torch_ops.affine_

    def affine_(x, gain, shift, channel_dim, relu):
        if broken == "raises":
            raise RuntimeError("no kernel image is available\nfor execution")
        right(x, gain * 1.1 if broken == "wrong" else gain * float("nan"), shift, channel_dim, relu)

    monkeypatch.setattr(ak.backends.torch_ops, "affine_", affine_)
    monkeypatch.setattr(doctor, "SHAPES", ((3, 5, 9, 7),))
    found = doctor.examine("cpu")
    assert not found.well
    assert {check.name.split()[0] for check in found.checks if not check.passed} == {"affine"}
    assert "ASR_BACKEND=torch" in found.remedies[0]
    done = invoke("doctor", "--device", "cpu", code=1)
    assert "failed: affine of 3x5x9x7 float32" in done.stdout
    assert ("RuntimeError: no kernel image is available" in done.stdout) == (broken == "raises")


def test_missing_extras_are_named_with_the_command_that_installs_them(monkeypatch):
    monkeypatch.setattr(doctor, "SHAPES", ())
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    found = doctor.examine("cpu")
    for extra in ("plots", "images", "demo"):
        assert found.facts[f"extra {extra}"].startswith("missing")
        assert any(f"pip install 'resuscitate[{extra}]'" in remedy for remedy in found.remedies)


@pytest.mark.parametrize(
    ("variables", "fact", "expected"),
    [
        ({}, "backend", "torch: there is no GPU"),
        ({"ASR_BACKEND": "reference"}, "backend", "reference: set by ASR_BACKEND"),
        ({"TRITON_INTERPRET": "1"}, "Triton's interpreter", "on"),
    ],
)
def test_the_backend_is_reported_with_the_reason(monkeypatch, variables, fact, expected):
    for name in ("ASR_BACKEND", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(doctor, "SHAPES", ())
    assert doctor.examine("cpu").facts[fact].startswith(expected)


def test_no_check_starts_after_the_time_limit(monkeypatch):
    monkeypatch.setattr(doctor, "SECONDS", 0.0)
    assert not doctor.examine("cpu").checks


def test_the_command_prints_json_and_refuses_an_unknown_device():
    found = json.loads(invoke("doctor", "--device", "cpu", "--json").stdout)
    assert found["well"]
    assert found["checks"][0]["passed"]
    assert "Error" in invoke("doctor", "--device", "no-such-device", code=1).stderr
