"""State dicts on disk: read without unpickling, loaded strictly, written as safetensors, whole or not at all."""

from __future__ import annotations

import logging
import platform
import re
import shlex
import sys
import zipfile
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import CheckpointError, listed
from ..network.layers import LAYERS, check_writable, out_channels, unwrap
from ..network.mean_layers import can_have_means, means_fit, to_mean_layer
from ..network.resizing import misfit, resize_layers, smaller_shapes
from ..network.snapshot import Snapshot
from ..utils.files import write_safetensors
from ..version import __version__

log = logging.getLogger("resuscitate")

NESTED_UNDER = ("state_dict", "model")  # keys of the state dict in the checkpoints of training scripts
REMEDY = "build the very model that the file was saved from"
FEWER = f"it has fewer channels, as after structured pruning: pass smaller=True, or {REMEDY}"
WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+|(?<=\.)_orig_mod\.")


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, on the CPU. Nothing is ever unpickled.

    A .safetensors file is read as such, any other (.pt, .pth) with `torch.load(weights_only=True)`: a state dict, at
    the top or under "state_dict" or "model". Raises OSError; CheckpointError for a file with other content.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error
    _check_stored(path)
    with open(path, "rb") as file:
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # the type of error depends on the kind of file
            problem = "not a checkpoint that can be read without unpickling, which may run any code"
            remedy = "if you trust it, load it and save the weights alone"
            call = "safetensors.torch.save_file(model.state_dict(), 'model.safetensors')"
            raise CheckpointError(f"{path}: {problem}; {remedy}: {call}") from error
    if _is_state(loaded):
        return _as_dense(loaded)
    states = [key for key, value in loaded.items() if _is_state(value)] if isinstance(loaded, Mapping) else []
    for key in NESTED_UNDER:
        if key in states:
            if others := [str(each) for each in states if each != key]:
                log.warning("%s: the weights under %r are taken, not those under %s", path, key, listed(others))
            return _as_dense(loaded[key])
    keys, there = " or ".join(map(repr, NESTED_UNDER)), ""
    if isinstance(loaded, Mapping):
        there = f", but {listed([repr(key) for key in loaded])}"
    remedy = "save model.state_dict()" if not states else f"save what is under {listed(list(map(repr, states)))} alone"
    raise CheckpointError(f"{path}: holds no state dict, neither at the top nor under {keys}{there}; {remedy}")


def _is_state(value: object) -> bool:
    """Is this a mapping of tensors alone?"""
    return isinstance(value, Mapping) and bool(value) and all(isinstance(each, Tensor) for each in value.values())


def _as_dense(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with sparse tensors as dense ones."""
    return {key: value if value.layout is torch.strided else value.to_dense() for key, value in state.items()}


@torch.no_grad()
def load_weights(model: nn.Module, path: str | Path, *, smaller: bool = False) -> None:
    """Load a checkpoint into `model`, strictly: file and model must have the same tensors.

    These differences are allowed; all but the last are logged:
    - the prefixes `module.` and `_orig_mod.` of DataParallel, AveragedModel and `torch.compile` are removed from names;
    - `weight_orig` and `weight_mask` of `torch.nn.utils.prune` are replaced by their product;
    - a bias of a convolution or linear layer that has none in the model is added to the layer (a repair adds one where
      no BatchNorm can take the shift), as are the `means` of a layer (see `replace_by_means`);
    - a tied tensor may be stored once, and `num_batches_tracked` may be missing.
    smaller: the file may have fewer channels, as after structured pruning; layers and norms are made smaller then.
    Raises CheckpointError, naming the keys that do not fit, with the model unchanged; ResuscitateError where its
    tensors were made under `torch.inference_mode()`.
    """
    model = unwrap(model)
    check_writable(model)
    wanted = model.state_dict()
    optional = {f"{name}.{part}" for name in _layers(model) for part in ("bias", "means")}
    state = _strip_wrappers(path, read_state_dict(path), {*wanted, *optional})
    state = _bake_masks(path, state, wanted)
    shapes = smaller_shapes(wanted, {key: value.shape for key, value in state.items()}) if smaller else {}
    if not shapes:
        return _load(model, path, state, optional)
    log.info("%s: has fewer channels than the model: %s", path, listed(list(shapes)))
    with Snapshot(model):
        resize_layers(model, shapes)
        _load(model, path, state, optional)
        if problem := misfit(model):
            raise CheckpointError(f"{path} does not fit the model: {problem}; {REMEDY}")


def _layers(model: nn.Module) -> dict[str, Any]:
    """Layers by each of their names."""
    return {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, LAYERS)}


def _load(model: nn.Module, path: str | Path, state: dict[str, Tensor], optional: set[str]) -> None:
    """Load a state of the model's shapes. optional: tensors that a layer may get. Raises CheckpointError."""
    wanted, layers = model.state_dict(), _layers(model)
    added = [key for key in state if key in optional and key not in wanted and _fits(state[key], layers, key)]
    common = {key: value for key, value in state.items() if key in wanted and not is_lazy(wanted[key])}
    stored_memory = {wanted[key].data_ptr() for key in common}
    absent = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    missing = [key for key in absent if is_lazy(wanted[key]) or wanted[key].data_ptr() not in stored_memory]
    unexpected = [key for key in state if key not in wanted and key not in added]
    shapes = {key: (tuple(value.shape), tuple(wanted[key].shape)) for key, value in common.items()}
    reshaped = [
        f"{key} ({stored} in the file, {own} in the model)" for key, (stored, own) in shapes.items() if stored != own
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    if found := [f"{len(keys)} {what}: {listed(keys)}" for what, keys in problems.items() if keys]:
        fewer = smaller_shapes(wanted, {key: value.shape for key, value in common.items()})
        remedy = _prefix(state, wanted) or (FEWER if reshaped and len(fewer) == len(reshaped) else REMEDY)
        raise CheckpointError(f"{path} does not fit the model: {'; '.join(found)}; {remedy}")
    for key in added:
        name, _, part = key.rpartition(".")
        if part == "bias":
            layers[name].bias = nn.Parameter(torch.zeros_like(state[key]).to(layers[name].weight))
        elif can_have_means(layers[name]):  # a module with two names is a mean layer already
            to_mean_layer(layers[name], state[key])
    for part, what in (("bias", "biases"), ("means", "means of pruned weights")):
        if keys := [key for key in added if key.endswith(part)]:
            log.info("%s: %s added to layers that had none: %s", path, what, listed(keys))
    model.load_state_dict(state, strict=False)


def write_state_dict(path: str | Path, state: Mapping[str, Tensor], provenance: Mapping[str, Any]) -> None:
    """Write tensors as safetensors, with `provenance` as metadata (strings unchanged, other values as JSON).

    Each name is stored with its own contiguous tensor, so that tied tensors and channels_last models load with
    `load_state_dict(strict=True)`. The file is written whole or not at all. Raises OSError.
    """
    tensors = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in state.items()}
    write_safetensors(path, tensors, {"format": "pt", **provenance})


def provenance(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata on how a file was made: method, options, versions, the command line and the date."""
    versions = {name: version(name) for name in ("torch", "numpy", "safetensors")}
    return {
        "method": method,
        "options": dict(options),
        "versions": {"resuscitate": __version__, "python": platform.python_version(), **versions},
        "command": shlex.join(["resuscitate", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _check_stored(path: Path) -> None:
    """Refuse an archive that unpacks to more bytes than it has: torch compresses nothing."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":
            return  # the format before torch 1.6, or no checkpoint
        try:
            size = sum(entry.file_size for entry in zipfile.ZipFile(file).infolist())
        except Exception as error:  # a damaged zip directory may raise anything
            raise CheckpointError(f"{path}: not a readable checkpoint ({error})") from error
    if size > path.stat().st_size:
        raise CheckpointError(f"{path}: unpacks to {size:,} bytes, more than its size; no file of torch.save does that")


def _strip_wrappers(path: str | Path, state: dict[str, Tensor], known: Collection[str]) -> dict[str, Tensor]:
    """The state dict without wrappers' prefixes in its names, where only the bare name is known."""
    bare = {key: name for key in state if key not in known and (name := WRAPPERS.sub("", key)) != key}
    # torch.nn.utils.prune adds an ending to the name of the tensor
    bare = {key: name for key, name in bare.items() if name in known or re.sub("_(orig|mask)$", "", name) in known}
    if bare:
        log.info("%s: stripped module. or _orig_mod. from tensor names", path)
    # beside these, torch.optim.swa_utils.AveragedModel keeps the number of averaged models
    unread = {"n_averaged"} - set(known) if bare else set()
    return {bare.get(key, key): value for key, value in state.items() if key not in unread}


def _bake_masks(path: str | Path, state: dict[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
    """Replace x_orig and x_mask by their product x, where the model has x only."""
    names = [key.removesuffix("_orig") for key in state if key.endswith("_orig") and key not in wanted]
    masked = [name for name in names if name in wanted and f"{name}_mask" in state]
    if not masked:
        return state
    log.info("%s: applied the masks of torch.nn.utils.prune to %s", path, listed(masked))
    products = {name: state[f"{name}_orig"] * state[f"{name}_mask"] for name in masked}
    parts = {f"{name}{part}" for name in masked for part in ("_orig", "_mask")}
    return {key: value for key, value in state.items() if key not in parts} | products


def _fits(value: Tensor, layers: Mapping[str, Any], key: str) -> bool:
    """Can this bias or these means be added to the layer?"""
    name, _, part = key.rpartition(".")
    if part == "means":
        return means_fit(value, layers[name])
    return layers[name].bias is None and value.shape == (out_channels(layers[name]),)


def _prefix(state: Collection[str], wanted: Collection[str]) -> str:
    """What to do where all names in the file have a prefix before names of the model, as of a training wrapper."""
    first = next(iter(state), "")
    for prefix in (first[: end + 1] for end, letter in enumerate(first) if letter == "."):
        if all(key.startswith(prefix) for key in state) and any(key.removeprefix(prefix) in wanted for key in state):
            return f"all names in the file begin with {prefix!r}: remove it"
    return ""
