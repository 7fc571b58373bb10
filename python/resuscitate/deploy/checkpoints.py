"""State dicts on disk: read without unpickling anything, loaded strictly, written as safetensors, all or nothing."""

from __future__ import annotations

import logging
import platform
import re
import shlex
import sys
import zipfile
from collections.abc import Collection, Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import CheckpointError
from ..network.layers import LAYERS, out_channels, unwrap
from ..utils.files import write_safetensors

log = logging.getLogger("resuscitate")

# where training scripts keep the state dict in a checkpoint that holds more than that
NESTED_UNDER = ("state_dict", "model")
WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+|(?<=\.)_orig_mod\.")


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, on the CPU. Nothing is ever unpickled.

    A name that ends in .safetensors is read as that; any other (.pt, .pth) with `torch.load(weights_only=True)`, and
    holds a plain state dict, or one under "state_dict" or "model".
    Raises OSError for a file that cannot be opened, CheckpointError for one that holds something else.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error
    _check_stored(path)
    try:
        with open(path, "rb") as file:
            loaded = _unpacked(file)
    except ValueError as error:
        raise CheckpointError(
            f"{path}: not a checkpoint that can be read without unpickling, which may run any code; if you trust it, "
            "load it and save the weights alone: safetensors.torch.save_file(model.state_dict(), 'model.safetensors')"
        ) from error
    nested = [loaded.get(key) for key in NESTED_UNDER] if isinstance(loaded, Mapping) else []
    for found in (loaded, *nested):
        if isinstance(found, Mapping) and found and all(isinstance(value, Tensor) for value in found.values()):
            return dict(found)
    raise CheckpointError(
        f"{path}: holds no state dict, neither as such nor under {' or '.join(map(repr, NESTED_UNDER))}; "
        "save model.state_dict()"
    )


@torch.no_grad()
def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a checkpoint into `model`, strictly: every tensor of either must find its place in the other.

    What is reconciled, with one log line each: the `module.` and `_orig_mod.` that DataParallel and `torch.compile` put
    into names; the `weight_orig` and `weight_mask` of `torch.nn.utils.prune`, which become their product; a bias for a
    convolution or linear layer that has none in the model, as a repair may add one where no BatchNorm can take the
    shift: it is registered on the layer, so that the model then has that key too; likewise the `means` of a layer whose
    pruned weights were replaced by them. A tied tensor may be stored once.
    Raises CheckpointError, naming the keys that do not fit, with the model as it was.
    """
    model = unwrap(model)
    from ..network.mean_layers import carry, may_carry  # here, for they need masks, which are written by this file

    wanted = model.state_dict()
    kinds = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, LAYERS)}
    layers, means = ({f"{name}.{key}": layer for name, layer in kinds.items()} for key in ("bias", "means"))
    state = _strip_wrappers(path, read_state_dict(path), {*wanted, *layers, *means})
    state = _bake_masks(path, state, wanted)
    biases = {key: layers[key] for key, value in state.items() if key in layers and _may_be_added(value, layers[key])}
    carried = {
        k: means[k] for k, value in state.items() if k in means and k not in wanted and may_carry(value, means[k])
    }
    stored = {wanted[key].data_ptr() for key in state if key in wanted and not is_lazy(wanted[key])}
    missing = [
        key
        for key, value in wanted.items()
        # num_batches_tracked: files older than it are complete without
        if key not in state
        and not key.endswith("num_batches_tracked")
        and (is_lazy(value) or value.data_ptr() not in stored)
    ]
    unexpected = [key for key in state if key not in wanted and key not in biases and key not in carried]
    reshaped = [
        f"{key} ({tuple(value.shape)} in the file, {tuple(wanted[key].shape)} in the model)"
        for key, value in state.items()
        if key in wanted and not is_lazy(wanted[key]) and value.shape != wanted[key].shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    found = [f"{len(keys)} {what}: {_few(keys)}" for what, keys in problems.items() if keys]
    if found:
        raise CheckpointError(
            f"{path} does not fit the model: {'; '.join(found)}; build the very model that the file was saved from"
        )
    for key, layer in biases.items():
        layer.bias = nn.Parameter(torch.zeros_like(state[key], dtype=layer.weight.dtype, device=layer.weight.device))
    if biases:
        log.info("%s: biases added to layers that had none: %s", path, _few(list(biases)))
    for key, layer in carried.items():
        carry(layer, state[key])
    if carried:
        log.info("%s: layers with means of their pruned weights: %s", path, _few(list(carried)))
    model.load_state_dict(state, strict=False)


def write_state_dict(path: str | Path, state: Mapping[str, Tensor], provenance: Mapping[str, Any]) -> None:
    """Write tensors as safetensors, with `provenance` as metadata (strings as they are, all else as JSON).

    Written in a contiguous layout and once per name, so that tied tensors, and a channels_last model, load anywhere
    with `load_state_dict(strict=True)`. The file appears whole or not at all. Raises OSError.
    """
    tensors = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in state.items()}
    write_safetensors(path, tensors, {"format": "pt", **provenance})


def provenance(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What made a file: method, options, versions, the command line and the date, for its metadata."""
    from .. import __version__

    versions = {"resuscitate": __version__, "python": platform.python_version()}
    return {
        "method": method,
        "options": dict(options),
        "versions": versions | {name: version(name) for name in ("torch", "numpy", "safetensors")},
        "command": shlex.join(["resuscitate", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _unpacked(file: IO[bytes]) -> Any:
    """What is in it, without unpickling. Raises ValueError."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what it raises for a file of another kind depends on the kind
        raise ValueError from error


def _check_stored(path: Path) -> None:
    """Refuse an archive that would unpack to more than it is: torch compresses nothing."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":
            return  # the format before torch 1.6, or none
        try:
            size = sum(entry.file_size for entry in zipfile.ZipFile(file).infolist())
        except Exception as error:  # a broken directory may raise anything
            raise CheckpointError(f"{path}: not a readable checkpoint ({error})") from error
    if size > path.stat().st_size:
        raise CheckpointError(f"{path}: unpacks to {size:,} bytes, as no file of torch.save does; it is refused")


def _strip_wrappers(path: str | Path, state: dict[str, Tensor], known: Collection[str]) -> dict[str, Tensor]:
    """Names without wrappers' prefixes, where the model knows only those."""
    bare = {key: name for key in state if key not in known and (name := WRAPPERS.sub("", key)) != key}
    # under torch.nn.utils.prune the tensor itself has another ending
    bare = {key: name for key, name in bare.items() if name in known or re.sub("_(orig|mask)$", "", name) in known}
    if bare:
        log.info("%s: stripped module. or _orig_mod. from its names", path)
    return {bare.get(key, key): value for key, value in state.items()}


def _bake_masks(path: str | Path, state: dict[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
    """Each pair of x_orig and x_mask as their product x, where the model knows an x only."""
    names = [key.removesuffix("_orig") for key in state if key.endswith("_orig") and key not in wanted]
    masked = [name for name in names if name in wanted and f"{name}_mask" in state]
    if not masked:
        return state
    log.info("%s: applied the masks of torch.nn.utils.prune to %s", path, _few(masked))
    products = {name: state[f"{name}_orig"] * state[f"{name}_mask"] for name in masked}
    parts = {f"{name}{part}" for name in masked for part in ("_orig", "_mask")}
    return {key: value for key, value in state.items() if key not in parts} | products


def _may_be_added(bias: Tensor, layer: Any) -> bool:
    return layer.bias is None and bias.shape == (out_channels(layer),)


def _few(keys: list[str], most: int = 3) -> str:
    rest = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + rest
