"""Which weights are pruned, and must stay zero."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import MODEL, CheckpointError, MaskError
from ..utils.files import write_safetensors
from .layers import Selector, effective_weight, find_layers, refresh_weight, select_layers, stored_weight, unwrap

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

FORMAT = "resuscitate masks 1"


class MaskRow(NamedTuple):
    """One layer of `Masks.table()`: `kept` of `total` weights survive; `sparsity` is the fraction that does not.

    Of the *original* weights, always. `note` says what is special about the layer, such as why it was left dense.
    """

    layer: str
    shape: tuple[int, ...]
    kept: int
    total: int
    sparsity: float
    note: str = ""


class Masks(Mapping[str, Tensor]):
    """Layer name -> boolean tensor of the shape of the layer's weight; True = kept, False = pruned and zero for good.

    Names are those of `model.named_modules()`, without the prefixes of DataParallel or `torch.compile`. Layers that
    share one weight share one mask tensor. `notes` has a remark on some layers, for the table. A mask may also be a
    tensor or an array of nothing but 0 and 1, whatever its dtype; raises MaskError for anything else.
    """

    def __init__(self, masks: Mapping[str, Any], notes: Mapping[str, str] | None = None) -> None:
        given = dict(masks)  # held, so that no two have one id
        made = {id(mask): _as_mask(name, mask) for name, mask in given.items()}
        self._masks = {name: made[id(mask)] for name, mask in given.items()}
        self.notes = dict(notes or {})

    @classmethod
    def from_zeros(
        cls,
        model: nn.Module,
        include: Iterable[Selector] | Selector | None = None,
        exclude: Iterable[Selector] | Selector | None = None,
    ) -> Masks:
        """The masks a model already has: False where the weight that a forward pass uses is zero.

        Every convolution and linear layer, or those that `include` and `exclude` leave (see `select_layers`); a
        `torch.nn.utils.prune` mask counts. Raises LayerError for a layer whose weight is recomputed in each forward.
        """
        layers = select_layers(unwrap(model), include, exclude)
        masks: dict[str, Tensor] = {}
        for first, names in tied_layers(layers).items():
            masks |= dict.fromkeys(names, effective_weight(first, layers[first]) != 0)
        return cls({name: masks[name] for name in layers})

    @classmethod
    def from_prune(cls, model: nn.Module) -> Masks:
        """The masks that `torch.nn.utils.prune` holds in the model, and no others; empty where it holds none."""
        layers = {name: layer for name, layer in find_layers(unwrap(model)).items() if "weight_mask" in layer._buffers}
        masks: dict[str, Any] = {}
        for first, names in tied_layers(layers).items():
            masks |= dict.fromkeys(names, layers[first]._buffers["weight_mask"])
        return cls({name: masks[name] for name in layers})

    def save(self, path: str | Path, provenance: Mapping[str, Any] | None = None) -> None:
        """Write as .safetensors, a bit for each weight, whole or not at all.

        Raises OSError; ValueError for another ending.
        """
        stored: dict[int, str] = {}
        packed, layers = {}, {}
        for name, mask in self.items():
            first = stored.setdefault(id(mask), name)
            layers[name] = {"shape": list(mask.shape), "as": first}
            if first == name:
                packed[name] = torch.from_numpy(np.packbits(mask.cpu().contiguous().numpy()))
        metadata = {"format": FORMAT, "layers": json.dumps(layers), "notes": json.dumps(self.notes)}
        write_safetensors(path, packed, metadata | dict(provenance or {}))

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
            raise CheckpointError(f"{path}: holds no masks; Masks.save writes some")
        try:
            layers = json.loads(metadata["layers"])
            made = {key: _unpack(bits, layers[key]["shape"]) for key, bits in packed.items()}
            return cls({name: made[entry["as"]] for name, entry in layers.items()}, json.loads(metadata["notes"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: its masks are damaged ({type(error).__name__}: {error})") from error

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __eq__(self, other: object) -> bool:
        """Same layers, same masks (on whatever device)."""
        if not isinstance(other, Masks):
            return NotImplemented
        return self.keys() == other.keys() and all(torch.equal(m.cpu(), other[name].cpu()) for name, m in self.items())

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Masks({len(self)} layers, sparsity={self.sparsity:.4f})"

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> None:
        """Zero every pruned weight in place, all or nothing; also after an optimizer step, so that none comes back.

        Where `torch.nn.utils.prune` holds the weight, its mask takes these zeros in (what it pruned stays pruned) and
        `weight_orig` is left alone. Kept weights keep their bits. Raises MaskError where a mask has no layer of its
        shape in the model.
        """
        for name, module in self._layers_of(model).items():
            mask = module._buffers.get("weight_mask")
            target = stored_weight(name, module) if mask is None else mask
            target.masked_fill_(~self[name].to(target.device), 0)
            refresh_weight(module)
        torch.clear_autocast_cache()  # the casts of these weights that the caller's autocast keeps

    def hold(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Call `apply_` after every step of the optimizer from now on, until the handle that is returned is removed."""
        self._layers_of(model)
        return optimizer.register_step_post_hook(lambda *_: self.apply_(model))

    def check(self, model: nn.Module) -> None:
        """Raise MaskError, naming the first layer, if a pruned weight is not zero or a mask does not fit its layer."""
        for name, module in self._layers_of(model).items():
            weight = effective_weight(name, module)
            wrong = int((weight.ne(0) & ~self[name].to(weight.device)).sum())
            if wrong:
                raise MaskError(name, f"{wrong} pruned weights are not zero; masks.apply_(model) zeroes them again")

    @property
    def sparsity(self) -> float:
        """Fraction of the original weights of these layers that is pruned; a shared weight counts once."""
        unique = {id(mask): mask for mask in self.values()}.values()
        total = sum(mask.numel() for mask in unique)
        return sum(int((~mask).sum()) for mask in unique) / total if total else 0.0

    def table(self) -> list[MaskRow]:
        """One row a layer, in the model's order."""
        rows = []
        for name, mask in self.items():
            kept, total = int(mask.sum()), mask.numel()
            pruned = (total - kept) / total if total else 0.0
            rows.append(MaskRow(name, tuple(mask.shape), kept, total, pruned, self.notes.get(name, "")))
        return rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.markup import escape
        from rich.table import Table

        table = Table("layer", "shape", box=None, header_style="bold")
        for title in ("kept", "of", "sparsity"):
            table.add_column(title, justify="right")
        if self.notes:
            table.add_column("")
        for row in self.table():
            shape = "x".join(map(str, row.shape))
            cells = [escape(row.layer or MODEL), shape, f"{row.kept:,}", f"{row.total:,}", f"{row.sparsity:.2%}"]
            table.add_row(*cells, *[escape(row.note)] * bool(self.notes))
        yield table
        yield f"{self.sparsity:.2%} of the original weights of these layers are pruned"

    def _layers_of(self, model: nn.Module) -> dict[str, nn.Module]:
        """The masked layers of the model; MaskError for a name or a shape that it does not have."""
        layers = find_layers(unwrap(model))
        for name, mask in self.items():
            if name not in layers:
                raise MaskError(name, "the model has no convolution or linear layer of this name to mask")
            shape = tuple(stored_weight(name, layers[name]).shape)
            if tuple(mask.shape) != shape:
                found = tuple(mask.shape)
                raise MaskError(name, f"its mask has shape {found}, its weight {shape}; was it made for another model?")
        return {name: layers[name] for name in self}


def in_use(model: nn.Module, layers: Mapping[str, nn.Module], masks: Mapping[str, Any] | None) -> Masks:
    """Masks of the layers' weights that are in use: not zero, or not said to be pruned."""
    given = Masks(masks or {})
    given.check(model)
    weights = {name: effective_weight(name, layer) for name, layer in layers.items()}
    held = {name: layer._buffers.get("weight_mask") for name, layer in layers.items()}
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        found[name] = given[name].to(weight.device) if name in given else weight != 0
        if (pruned := held[name]) is not None:
            found[name] = found[name] & (pruned != 0)
    return Masks(found)


def tied_layers(layers: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Layers by the weight they use: the first name of each weight -> the names of all layers that hold it.

    Two layers share a weight when they read the same memory in the same way, under the same `torch.nn.utils.prune`
    mask if any. Raises LayerError for a layer whose weight is recomputed in each forward.
    """
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, module in layers.items():
        tensors = (stored_weight(name, module), module._buffers.get("weight_mask"))
        groups.setdefault(tuple(map(_memory, tensors)), []).append(name)
    return {names[0]: names for names in groups.values()}


def _memory(tensor: Tensor | None) -> object:
    if tensor is None:
        return None
    if math.prod(tensor.shape) == 0 or tensor.is_meta:
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _as_mask(name: str, mask: Any) -> Tensor:
    tensor = torch.from_numpy(mask) if isinstance(mask, np.ndarray) else mask
    if isinstance(tensor, Tensor) and tensor.dtype == torch.bool:
        return tensor
    if not isinstance(tensor, Tensor) or not bool(((tensor == 0) | (tensor == 1)).all()):
        kind = f"{tensor.dtype} of other values" if isinstance(tensor, Tensor) else type(mask).__name__
        raise MaskError(name, f"a mask is a boolean tensor, or one of 0 and 1, True where a weight is kept, not {kind}")
    return tensor.bool()


def _unpack(bits: np.ndarray, shape: list[int]) -> Tensor:
    count = math.prod(shape)
    if bits.dtype != np.uint8 or bits.shape != (-(-count // 8),) or min(shape, default=1) < 0:
        raise ValueError(f"{bits.shape} bytes of {bits.dtype} for a mask of shape {shape}")
    return torch.from_numpy(np.unpackbits(bits, count=count).astype(bool)).view(shape)
