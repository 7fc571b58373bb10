"""Masks: which weights are pruned, and stay zero."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import MODEL, CheckpointError, MaskError
from ..reports.base import terminal_table
from ..utils.files import write_safetensors
from ..utils.readout import read_numbers
from .layers import (
    Selection,
    check_writable,
    effective_weight,
    find_layers,
    refresh_weight,
    select_layers,
    stored_weight,
    unwrap,
)

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

FORMAT = "resuscitate masks 1"


class MaskRow(NamedTuple):
    """One layer in `Masks.table()`; the numbers count the *original* weights."""

    layer: str
    shape: tuple[int, ...]
    kept: int
    total: int
    sparsity: float  # the fraction that is pruned
    note: str = ""  # such as why the layer stayed dense


class Masks(Mapping[str, Tensor]):
    """Layer name -> boolean tensor of the shape of the layer's weight; True = kept, False = pruned.

    Names are those of `model.named_modules()`, without the prefixes of DataParallel or `torch.compile`. Layers that
    share one weight share one mask tensor. `notes` maps some layers to a remark for the table. A mask may also be given
    as a tensor or array of 0 and 1 of any dtype; raises MaskError for anything else.
    """

    def __init__(self, masks: Mapping[str, Any], notes: Mapping[str, str] | None = None) -> None:
        given = dict(masks)  # keeps the masks alive, so that no two have the same id
        converted = {id(mask): _as_mask(name, mask) for name, mask in given.items()}
        self._masks = {name: converted[id(mask)] for name, mask in given.items()}
        self.notes: dict[str, str] = dict(notes or {})

    @classmethod
    def from_zeros(cls, model: nn.Module, include: Selection = None, exclude: Selection = None) -> Masks:
        """The masks of a pruned model: False where the weight that the forward pass uses is zero.

        Of every convolution and linear layer, or those that `include` and `exclude` select (see `select_layers`).
        Raises LayerError for a layer whose weight is recomputed in each forward pass.
        """
        layers = select_layers(unwrap(model), include, exclude)
        return cls._of(layers, lambda name, layer: effective_weight(name, layer) != 0)

    @classmethod
    def from_prune(cls, model: nn.Module) -> Masks:
        """The masks that `torch.nn.utils.prune` keeps in the model; empty if there are none."""
        layers = {name: layer for name, layer in find_layers(unwrap(model)).items() if "weight_mask" in layer._buffers}
        return cls._of(layers, lambda name, layer: layer._buffers["weight_mask"])

    @classmethod
    def _of(cls, layers: Mapping[str, nn.Module], mask_of: Callable[[str, nn.Module], Any]) -> Masks:
        """One mask for each weight, which all layers that share the weight share."""
        masks: dict[str, Any] = {}
        for first, names in tied_layers(layers).items():
            masks |= dict.fromkeys(names, mask_of(first, layers[first]))
        return cls({name: masks[name] for name in layers})

    def save(self, path: str | Path, provenance: Mapping[str, Any] | None = None) -> None:
        """Write a .safetensors file with one bit per weight, and `provenance` as metadata, whole or not at all.

        Raises OSError; ValueError for another ending.
        """
        stored, packed, layers = dict[int, str](), {}, {}
        for name, mask in self.items():
            first = stored.setdefault(id(mask), name)
            layers[name] = {"shape": list(mask.shape), "as": first}
            if first == name:
                packed[name] = torch.from_numpy(np.packbits(mask.cpu().contiguous().numpy()))
        about = {"format": FORMAT, "layers": layers, "notes": self.notes}
        write_safetensors(path, packed, {**about, **(provenance or {})})

    @classmethod
    def load(cls, path: str | Path) -> Masks:
        """Read what `save` wrote, to the CPU. Raises OSError, or CheckpointError for a file of another kind."""
        try:
            with safe_open(str(path), "np") as file:
                metadata = file.metadata() or {}
                packed = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error
        if metadata.get("format") != FORMAT:
            raise CheckpointError(f"{path}: holds no masks; write masks with Masks.save")
        try:
            layers = json.loads(metadata["layers"])
            unpacked = {key: _unpack(bits, layers[key]["shape"]) for key, bits in packed.items()}
            return cls({name: unpacked[entry["as"]] for name, entry in layers.items()}, json.loads(metadata["notes"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: its masks are damaged ({type(error).__name__}: {error})") from error

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __eq__(self, other: object) -> bool:
        """Same layers and same masks, on any device."""
        if not isinstance(other, Masks):
            return NotImplemented
        return self.keys() == other.keys() and all(torch.equal(m.cpu(), other[name].cpu()) for name, m in self.items())

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Masks({len(self)} layers, sparsity={self.sparsity:.4f})"

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> None:
        """Zero every pruned weight in place; call this after each optimizer step to keep pruned weights zero.

        Under `torch.nn.utils.prune` the zeros are written to its mask (weights that it pruned stay pruned), and
        `weight_orig` is unchanged. Kept weights are unchanged, bit for bit. Raises MaskError, with the model unchanged,
        where a mask has no layer of its shape in the model; ResuscitateError where its tensors were made under
        `torch.inference_mode()` and this is called outside of it.
        """
        check_writable(unwrap(model))
        for name, module in self._layers_of(model).items():
            mask = module._buffers.get("weight_mask")
            target = stored_weight(name, module) if mask is None else mask
            target.masked_fill_(~self[name].to(target.device), 0)
            refresh_weight(module)
        torch.clear_autocast_cache()  # the caller's autocast caches casts of the weights

    def hold(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Call `apply_` after every step of the optimizer, until the returned handle is removed."""
        self._layers_of(model)  # the errors of `apply_`
        return optimizer.register_step_post_hook(lambda *_: self.apply_(model))

    def check(self, model: nn.Module) -> None:
        """Raise MaskError, naming the first layer, if a pruned weight is not zero or a mask does not fit its layer."""
        weights = {name: effective_weight(name, module) for name, module in self._layers_of(model).items()}
        wrong = read_numbers({name: (w.ne(0) & ~self[name].to(w.device)).sum() for name, w in weights.items()})
        for name, count in wrong.items():
            if count:
                problem = f"{int(count)} pruned weights are not zero; masks.apply_(model) zeroes them again"
                raise MaskError(name, problem)

    @property
    def sparsity(self) -> float:
        """Fraction of the original weights of these layers that is pruned; a shared weight counts once."""
        unique = {id(mask): mask for mask in self.values()}.values()
        total = sum(mask.numel() for mask in unique)
        return sum(int((~mask).sum()) for mask in unique) / total if total else 0.0

    def table(self) -> list[MaskRow]:
        """One row per layer, in the model's order."""
        rows = []
        for name, mask in self.items():
            kept, total = int(mask.sum()), mask.numel()
            pruned = (total - kept) / total if total else 0.0
            rows.append(MaskRow(name, tuple(mask.shape), kept, total, pruned, self.notes.get(name, "")))
        return rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rows = []
        for row in self.table():
            cells = [row.layer or MODEL, "x".join(map(str, row.shape)), *[row.note] * bool(self.notes)]
            rows.append([*cells, f"{row.kept:,}", f"{row.total:,}", f"{row.sparsity:.2%}"])
        yield terminal_table(["layer", "shape", *["note"] * bool(self.notes)], ["kept", "of", "sparsity"], rows)
        yield f"{self.sparsity:.2%} of the original weights of these layers are pruned"

    def _layers_of(self, model: nn.Module) -> dict[str, nn.Module]:
        """The masked layers of the model; MaskError for a name or shape that the model does not have."""
        layers = find_layers(unwrap(model))
        for name, mask in self.items():
            if name not in layers:
                raise MaskError(name, "the model has no convolution or linear layer of this name to mask")
            found, shape = tuple(mask.shape), tuple(stored_weight(name, layers[name]).shape)
            if found != shape:
                raise MaskError(name, f"its mask has shape {found}, its weight {shape}; was it made for another model?")
        return {name: layers[name] for name in self}


def in_use(model: nn.Module, layers: Mapping[str, nn.Module], masks: Mapping[str, Any] | None) -> Masks:
    """Masks of the weights in use: those that `masks` keeps or, in a layer without a mask there, the nonzero ones.

    `torch.nn.utils.prune` must keep them too. Raises MaskError where `masks` does not fit the model.
    """
    given, found = Masks(masks or {}), dict[str, Tensor]()
    given.check(model)
    for name, layer in layers.items():
        weight, kept = effective_weight(name, layer), layer._buffers.get("weight_mask")
        used = given[name].to(weight.device) if name in given else weight != 0
        found[name] = used if kept is None else used & (kept != 0)
    return Masks(found)


def tied_layers(layers: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Group layers by weight: the first name of each weight -> the names of all layers that use it.

    Two layers share a weight when they read the same memory in the same way, under the same `torch.nn.utils.prune`
    mask if any. Raises LayerError for a layer whose weight is recomputed in each forward pass.
    """

    def memory(tensor: Tensor | None) -> object:
        if tensor is None or not tensor.numel() or tensor.is_meta:
            return id(tensor)
        return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()

    groups: dict[object, list[str]] = {}
    for name, module in layers.items():
        key = memory(stored_weight(name, module)), memory(module._buffers.get("weight_mask"))
        groups.setdefault(key, []).append(name)
    return {names[0]: names for names in groups.values()}


def _as_mask(name: str, mask: Any) -> Tensor:
    tensor = torch.from_numpy(mask) if isinstance(mask, np.ndarray) else mask
    binary = isinstance(tensor, Tensor) and (tensor.dtype == torch.bool or ((tensor == 0) | (tensor == 1)).all())
    if not binary:
        kind = f"{tensor.dtype} with other values" if isinstance(tensor, Tensor) else type(mask).__name__
        raise MaskError(name, f"its mask must be boolean, or hold only 0 (pruned) and 1 (kept); it is {kind}")
    return tensor.bool()


def _unpack(bits: np.ndarray, shape: list[int]) -> Tensor:
    count = math.prod(shape)
    if bits.dtype != np.uint8 or bits.shape != (-(-count // 8),) or min(shape, default=1) < 0:
        raise ValueError(f"{bits.shape} bytes of {bits.dtype} for a mask of shape {shape}")
    return torch.from_numpy(np.unpackbits(bits, count=count).astype(bool)).view(shape)
