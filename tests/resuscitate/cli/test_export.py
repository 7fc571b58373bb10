"""`resuscitate export`."""

import torch

from tests.user import MODEL, invoke


def test_it_says_what_it_wrote(user):
    files = ["--weights", "pruned.safetensors", "-c", "images.npz", "-o", "out.pt2"]
    done = invoke("export", "-m", MODEL, *files, "--fold")
    assert "of the weights are zero, 3 BatchNorms folded; read again" in done.stdout
    assert torch.export.load("out.pt2")


def test_another_ending_is_a_mistake_in_the_command(user):
    files = ["--weights", "pruned.safetensors", "-c", "images.npz", "-o", "out.pb"]
    assert "write one of .safetensors, .pt2, .onnx" in invoke("export", "-m", MODEL, *files, code=2).stderr
