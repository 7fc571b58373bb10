"""A training on disk: NAME.safetensors has the weights; NAME.pt the state to continue from, until the last epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.networks import build
from resuscitate.utils.files import atomic


def save_weights(model: nn.Module, path: Path, about: dict[str, Any]) -> None:
    """Write the state dict as safetensors, with `about` as metadata."""
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
    with atomic(path) as temporary:
        save_file(state, temporary, {key: str(value) for key, value in about.items()})


def read_about(path: Path) -> dict[str, str]:
    """The metadata of such a file; empty if there is no file."""
    if not path.exists():
        return {}
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def is_trained(name: str, folder: Path) -> bool:
    """Is the training of this network finished?"""
    return (folder / f"{name}.safetensors").exists() and not (folder / f"{name}.pt").exists()


def load(name: str, folder: Path) -> tuple[nn.Module, dict[str, str]]:
    """A trained network in eval mode, and its metadata."""
    path = folder / f"{name}.safetensors"
    about, state = read_about(path), load_file(path)
    *_, head = (tensor for key, tensor in state.items() if key in ("fc.bias", "classifier.bias"))
    model = build(name, len(head)).eval()
    model.load_state_dict(state)
    return model, about


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write the state from which a training continues."""
    with atomic(path) as temporary:
        torch.save(state, temporary)


def read_state(path: Path, device: torch.device) -> dict[str, Any] | None:
    """The state that `save_state` wrote, by the safe unpickler; None if there is no file."""
    return torch.load(path, map_location=device, weights_only=True) if path.exists() else None
