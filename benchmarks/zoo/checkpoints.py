"""A training run on disk: NAME.safetensors has the weights, and NAME.pt, until the last epoch, all to go on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from resuscitate.utils.files import atomic

from . import build


def save_weights(model: nn.Module, path: Path, about: dict[str, Any]) -> None:
    """The state dict as safetensors, with what there is to say about it as metadata."""
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
    with atomic(path) as temporary:
        save_file(state, temporary, {key: str(value) for key, value in about.items()})


def read_about(path: Path) -> dict[str, str]:
    """That metadata; nothing where there is no such file."""
    if not path.exists():
        return {}
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def is_trained(name: str, folder: Path) -> bool:
    """To the end."""
    return (folder / f"{name}.safetensors").exists() and not (folder / f"{name}.pt").exists()


def load(name: str, folder: Path) -> tuple[nn.Module, dict[str, str]]:
    """A trained network, in eval mode, and what was said about it."""
    path = folder / f"{name}.safetensors"
    about, state = read_about(path), load_file(path)
    *_, head = (tensor for key, tensor in state.items() if key in ("fc.bias", "classifier.bias"))
    model = build(name, len(head)).eval()
    model.load_state_dict(state)
    return model, about


def save_state(path: Path, state: dict[str, Any]) -> None:
    """What a run goes on from; `read_state` reads it again, unpickling tensors and plain values alone."""
    with atomic(path) as temporary:
        torch.save(state, temporary)


def read_state(path: Path, device: torch.device) -> dict[str, Any] | None:
    """None where there is none."""
    return torch.load(path, map_location=device, weights_only=True) if path.exists() else None
