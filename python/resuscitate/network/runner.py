"""A model and how to run it on a batch; what its modules put out on the way, caught by hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_unflatten

import asr_kernels as ak

from ..data.batches import Batches, first_images
from ..errors import LayerError, NonFiniteError
from ..methods.refit import moments_of
from .layers import LAYERS, channel_dim
from .snapshot import autocast

# error allowed in a measured variance: far below that of any sample of images, and it saves time on a CPU
TOLERANCE = 1e-5


@dataclass
class Network:
    """A model, and how to run it on a batch: with `dtype` under autocast to that precision."""

    model: nn.Module
    forward_fn: Callable[[nn.Module, Any], Any] | None = None
    autocast: torch.dtype | None = None
    modules: dict[str, nn.Module] = field(init=False)

    def __post_init__(self) -> None:
        self.modules = dict(self.model.named_modules())
        tensors = [*self.model.parameters(), *self.model.buffers()]
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self.dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)

    def place(self, batch: Tensor) -> Tensor:
        """A copy of the batch on the model's device and in its dtype; the caller's own is never written to."""
        return batch.detach().to(self.device, self.dtype if batch.is_floating_point() else None, copy=True)

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Every part of a forward pass runs in this context: autocast to `autocast`, or none; the caller's is left.

        No cast of a weight is kept, for weights change between passes: not by this context, and not by an autocast in
        the model, whose casts PyTorch keeps until the caller's autocast ends.
        """
        with autocast(self.device.type, self.autocast):
            try:
                yield
            finally:
                torch.clear_autocast_cache()

    def run(self, batch: Any) -> Any:
        """The model's output for one batch."""
        with self.precision():
            return self.forward_fn(self.model, batch) if self.forward_fn else self.model(self.place(batch))

    def example(self, batch: Any) -> Any:
        """A small batch to look at the network with: the first images of this one.

        Of a nest of tensors the first ones of each, if all have the same length and the model takes that; else it goes
        whole.
        """
        if isinstance(batch, Tensor):
            return first_images(batch)
        leaves, whole = tree_flatten(batch)
        plain = all(leaf is None or isinstance(leaf, (Tensor, str, int, float)) for leaf in leaves)
        lengths = {leaf.shape[:1] for leaf in leaves if isinstance(leaf, Tensor)}
        if not plain or len(lengths) != 1 or lengths == {()}:
            return batch
        few = tree_unflatten([first_images(leaf) for leaf in leaves], whole)
        with suppress(Exception), torch.no_grad():
            self.run(few)
            return few
        return batch

    @contextmanager
    def hooked(self, names: Iterable[str], take: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Hand what each named BatchNorm reads, and what each named layer puts out, to `take` as it comes by."""
        handles = []
        try:
            for name in names:
                module = self.modules[name]
                if isinstance(module, _BatchNorm):
                    handles.append(module.register_forward_pre_hook(lambda m, args, name=name: take(name, args[0])))
                else:
                    handles.append(module.register_forward_hook(lambda m, args, out, name=name: take(name, out)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def observed(self) -> list[str]:
        """Every layer and every BatchNorm, by name."""
        return [name for name, module in self.modules.items() if isinstance(module, (*LAYERS, _BatchNorm))]

    def axis(self, name: str) -> int:
        """Where the channels lie in what is measured at this module."""
        module = self.modules[name]
        return 1 if isinstance(module, _BatchNorm) else channel_dim(module)

    def moments(self, name: str, x: Any, running: ak.ChannelMoments | None = None) -> ak.ChannelMoments:
        """Moments of what is measured at this module, merged with those that are running.

        Raises LayerError where that is not one tensor.
        """
        self.check_tensor(name, x)
        return ak.channel_moments(x, self.axis(name), running=running, tolerance=TOLERANCE)

    def patches(
        self, name: str, batch: int, x: Any, dense: Network, wanted: Any, batches: Batches, folds: int
    ) -> dict[int, ak.PatchMoments]:
        """Patch moments of what a layer reads, and of what the dense network wants (see `refit.moments_of`).

        One set for each of the `folds` that images of this batch belong to. Raises LayerError, NonFiniteError.
        """
        self.check_tensor(name, x)
        self.check_tensor(name, wanted)

        def deal(rows: int) -> Mapping[int, Tensor | None]:
            return {0: None} if folds == 1 else batches.folds(batch, folds, rows)

        found = moments_of(name, self.modules[name], dense.modules[name], x, wanted, deal)
        for each in found.values():
            check_finite(name, [(batch, ak.ChannelMoments(each.count, each.mean, each.xx.diagonal(dim1=1, dim2=2)))])
            check_finite(name, [(batch, ak.ChannelMoments(each.count, each.target, each.yy))])
        return found

    def check_tensor(self, name: str, x: Any) -> None:
        """Raise LayerError where a layer's output is not one tensor."""
        if not isinstance(x, Tensor):
            raise LayerError(name, f"its output is a {type(x).__name__}, not a tensor; exclude it")


def has_hooks(module: nn.Module | None) -> bool:
    """Does it carry forward hooks, of the user's?"""
    return module is not None and bool(module._forward_hooks or module._forward_pre_hooks)


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The precision for autocast. Raises ValueError for other than bfloat16 and float16, by any of their names."""
    names = {"bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp16": torch.float16, "float16": torch.float16}
    found = names.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in names.values():
        raise ValueError(f"dtype={dtype!r} is unknown; there are 'bf16', 'fp16' and None, the model's own")
    return found


def check_finite(name: str, batches: Iterable[tuple[int, ak.ChannelMoments]]) -> None:
    """Raise NonFiniteError, naming the layer and the first batch whose moments are NaN or infinite."""
    for index, moments in batches:
        if not (moments.mean.isfinite() & moments.m2.isfinite()).all():
            raise NonFiniteError(
                name,
                index,
                "activations are NaN or infinite, or their squares overflow; look at the images, try a wider dtype, or "
                "leave such images out with on_nonfinite='skip'",
            )
