"""A model and how to run it on a batch; the inputs and outputs of its modules, found by hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_unflatten

import asr_kernels as ak

from ..errors import LayerError, NonFiniteError
from ..utils.nested import copied
from .layers import LAYERS, channel_dim
from .snapshot import autocast


@dataclass
class Network:
    """A model, and how to run it on a batch, under autocast to the dtype `autocast` if that is given."""

    model: nn.Module
    forward_fn: Callable[[nn.Module, Any], Any] | None = None
    autocast: torch.dtype | None = None

    def __post_init__(self) -> None:
        self.modules: dict[str, nn.Module] = dict(self.model.named_modules())
        tensors = [*self.model.parameters(), *self.model.buffers()]
        self.device: torch.device = tensors[0].device if tensors else torch.device("cpu")
        self.dtype: torch.dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)

    def place(self, batch: Tensor) -> Tensor:
        """A copy of the batch on the model's device and in its dtype; the caller's own is never written to.

        Pinned memory would be read after the return, when the caller may have changed it, and memory of the host could
        be read before a GPU has written it: these copies are waited for.
        """
        dtype, waits = self.dtype if batch.is_floating_point() else None, self.device.type == "cpu" or batch.is_pinned()
        return batch.detach().to(self.device, dtype, non_blocking=not waits, copy=True)

    @contextmanager
    def precision(self) -> Iterator[None]:
        """The context of each part of a forward pass: autocast to `autocast`, or none, instead of the caller's.

        Weights change between passes, so the cache of casts is cleared at its end. PyTorch would keep the casts of an
        autocast within the model until the caller's autocast ends.
        """
        with autocast(self.device.type, self.autocast):
            try:
                yield
            finally:
                torch.clear_autocast_cache()

    def run(self, batch: Any) -> Any:
        """The model's output for one batch, of which a `forward_fn` gets a copy: it may write to it."""
        with self.precision():
            if self.forward_fn is None:
                return self.model(self.place(batch))
            return self.forward_fn(self.model, copied(batch))

    def example(self, batch: Any) -> Any:
        """The first images of a batch, to observe the network with.

        Of nested tensors those of each, if all have the same length and the model accepts them; else the whole batch.
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
        """Call `take` with the input of each named BatchNorm and the output of each named layer, in each pass."""

        def before(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            take(name, next(iter((*args, *kwargs.values()))))

        with ExitStack() as hooks:
            for name in names:
                module = self.modules[name]
                if isinstance(module, _BatchNorm):
                    handle = module.register_forward_pre_hook(partial(before, name), with_kwargs=True)
                else:
                    handle = module.register_forward_hook(lambda m, args, out, name=name: take(name, out))
                hooks.enter_context(handle)
            yield

    def observed(self) -> list[str]:
        """Every layer and every BatchNorm, by name."""
        return [name for name, module in self.modules.items() if isinstance(module, (*LAYERS, _BatchNorm))]

    def axis(self, name: str) -> int:
        """The channel axis of the tensor that is measured at this module."""
        return channel_dim(self.modules[name])


def moments_at(name: str, module: nn.Module, x: Any) -> ak.ChannelMoments:
    """Moments of a BatchNorm's input, or of a layer's output. Raises LayerError where it is no tensor.

    It may have no values: a layer may run on a choice of its input's rows, and in some batch on none.
    """
    check_tensors(name, x)
    if not x.numel():
        return ak.ChannelMoments.empty(x.shape[channel_dim(module)], x.device)
    # the tolerance of the variance is far below the error of any sample of images, and saves time on a CPU
    return ak.channel_moments(x, channel_dim(module), tolerance=1e-5)


def paired_moments_at(name: str, module: nn.Module, dense: Any, pruned: Any) -> ak.PairedMoments:
    """As `moments_at`, of a layer's outputs in both networks."""
    check_tensors(name, dense, pruned)
    if dense.numel() or pruned.numel():
        return ak.paired_moments(dense, pruned, channel_dim(module))
    nothing = moments_at(name, module, pruned)
    return ak.PairedMoments(nothing, nothing, nothing.mean.clone())


def check_tensors(name: str, *outputs: Any) -> None:
    """Raise LayerError where an output of a layer is not one tensor."""
    for x in outputs:
        if not isinstance(x, Tensor):
            raise LayerError(name, f"its output is a {type(x).__name__}, not a tensor; exclude it")


def first_images(batch: Any, images: int = 2) -> Any:
    """The first images of a tensor; a whole batch of another kind (see `Network.example`)."""
    return batch[:images] if isinstance(batch, Tensor) else batch


def has_hooks(module: nn.Module | None) -> bool:
    """Has the module forward hooks, those of the user?"""
    return module is not None and bool(module._forward_hooks or module._forward_pre_hooks)


def all_finite(values: Iterable[Tensor]) -> bool:
    """Are all values of these tensors finite? One wait for the device."""
    flat = [x.flatten() for x in values]
    return not flat or bool(torch.cat(flat).isfinite().all())


def check_finite(name: str, values: Iterable[tuple[int, Tensor]]) -> None:
    """Raise NonFiniteError, naming the layer and the first batch with a NaN or an infinity among its values.

    values: with the number of the batch that they belong to, in order. One wait for the device where all are finite.
    """
    found = list(values)
    if not all_finite(x for _, x in found):
        batch = next(index for index, x in found if not all_finite([x]))
        remedy = "look at the images, try a wider dtype, or leave such images out with on_nonfinite='skip'"
        raise NonFiniteError(name, batch, f"activations are NaN or infinite, or their squares overflow; {remedy}")
