"""Which weights are pruned, and must stay zero."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .errors import MaskError
from .layers import Selector, effective_weight, find_layers, refresh_weight, select_layers, stored_weight, unwrap


class MaskRow(NamedTuple):
    """One layer of `Masks.table()`: `kept` of `total` weights survive; `sparsity` is the fraction that does not."""

    layer: str
    shape: tuple[int, ...]
    kept: int
    total: int
    sparsity: float


class Masks(Mapping[str, Tensor]):
    """Layer name -> boolean tensor of the shape of the layer's weight; True = kept, False = pruned and zero for good.

    Names are those of `model.named_modules()`, without the prefixes of DataParallel or `torch.compile`. Layers that
    share one weight share one mask tensor. Raises MaskError for a mask that is not boolean.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self._masks = dict(masks)
        for name, mask in self._masks.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise MaskError(name, f"a mask is a boolean tensor, True where a weight is kept, not {kind}")

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
            rows.append(MaskRow(name, tuple(mask.shape), kept, total, (total - kept) / total if total else 0.0))
        return rows

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
