"""Second moments of the patches that a layer reads, with the outputs that it is to have: the data of least squares."""

from __future__ import annotations

from dataclasses import replace
from operator import itemgetter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node

import asr_kernels as ak

from ..errors import LayerError
from ..network.channels import KeptChannels
from ..network.layers import effective_weight, stored_bias
from ..network.operands import operands, product, with_batch_axis
from ..network.runner import check_finite, check_tensors
from .base import Place, Statistic
from .second_moments import Moments, merged

WIDEST = 8192  # values of a patch: their second moments take half a GiB
FEWEST = 1024  # inputs of a linear layer whose samples are kept, not their second moments, where there are few

# so that a `Store` finds the tensors of moments that it keeps
for _kind in (ak.PatchMoments, ak.RowMoments):
    register_pytree_node(
        _kind,
        lambda each: (list(vars(each).values()), type(each)),
        lambda parts, kind: kind(*parts),
    )


class PatchCovariances(Statistic):
    """`asr_kernels.PatchMoments` of a layer's inputs in the pruned network, with the outputs of the dense layer.

    `folds` holds one for each fold of the images, over all calls of the layer. For a layer of several `input_blocks`,
    the dense tensor is the *input* of the dense layer, and the outputs are the contributions of each block.

    `replay(weight, bias, moments)` is one more pass over the batches. It gives the cross products, about the means of
    `moments`, with outputs that the ReLU maps to the dense values; of these the nearest to the outputs of `weight`, in
    the layer's shape, and `bias` (O,).
    """

    large = True
    measured: ClassVar[tuple[str, ...]] = ("folds",)

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.folds: dict[int, Moments] = {}
        self.patches: ak.PatchSums | None = None
        self.sums: list[tuple[int, Tensor]] = []  # by batch, of what it adds: are all finite?

    def update(self, batch: int, pruned: Any, dense: Any) -> None:
        name, layer = self.place.name, self.place.module
        check_tensors(name, pruned, dense)
        assert self.place.dense is not None
        batched: Any = with_batch_axis(layer, pruned, dense)
        x, y = batched
        (x, window), count = operands(name, layer, x), input_blocks(layer)
        ours, theirs = (each.shape[: 1 if window.kernel else -1].numel() for each in (x, y))
        if ours != theirs:
            problem = f"it gets {ours} rows in the pruned network and {theirs} in the dense one"
            remedy = "as where a network chooses rows by their values; exclude it, or choose method='channelwise'"
            raise LayerError(name, f"{problem}, {remedy}")
        if not len(x):  # of a choice of rows
            return
        if count > 1:
            y = contributions(name, self.place.dense, y, count, self.place.kept)
            window = replace(window, groups=count)
        # one number for all values, which is not finite where one of them is not
        totals = [each.sum(dtype=torch.promote_types(each.dtype, torch.float32)).double() for each in (x, y)]
        self.sums.append((batch, torch.stack(totals).sum()))
        folds = self.place.folds(batch, len(x))
        most = 0 if window.kernel else most_samples(x.shape[-1])
        if most * x.shape[-1] * len(folds) < x.numel():
            self.patches = self.patches or ak.PatchSums(window)
            self.patches.add(x, y, folds)
            return
        for fold, rows in folds.items():
            places = None if rows is None else rows.to(x.device, non_blocking=True)
            read, outputs = (each if places is None else each[places] for each in (x, y))
            self._add(fold, ak.row_moments(read, outputs, most))

    def _add(self, fold: int, found: Moments) -> None:
        self.folds[fold] = merged([self.folds[fold], found]) if fold in self.folds else found

    def finish(self, batches: int) -> None:
        self._gather(batches)
        self.check()

    def _gather(self, batches: int) -> None:
        """Set `folds`. Where finite values have a sum of products that is not, `check` names the last batch."""
        for fold, found in self.patches.moments().items() if self.patches else ():
            self._add(fold, found)
            self.sums.append((batches - 1, found.diagonal.sum() + found.yy.sum()))
        self.patches = None

    def check(self) -> None:
        """Raise NonFiniteError for a value that is NaN or infinite; the host waits for the device."""
        check_finite(self.place.name, sorted(self.sums, key=itemgetter(0)))

    @property
    def finite(self) -> Tensor:
        """Does `check` find nothing? Boolean (), on the device, without a wait."""
        nothing = next(iter(self.folds.values())).mean.new_zeros(())
        return torch.stack([nothing, *(each for _, each in self.sums)]).isfinite().all()

    @property
    def empty(self) -> bool:
        return not self.folds and self.patches is None


class UncheckedPatchCovariances(PatchCovariances):
    """`PatchCovariances` that the walk does not check, so that the host need not wait: the method calls `check`."""

    def finish(self, batches: int) -> None:
        self._gather(batches)

    def state(self) -> Any:
        self.check()
        return super().state()


def input_blocks(layer: Any) -> int:
    """The number of blocks of input channels, the least for which no patch of a block has more than `WIDEST` values.

    A linear layer has one; see `most_samples`.
    """
    channels, values = layer.weight.shape[1], layer.weight[0].numel()
    if getattr(layer, "groups", 1) > 1 or layer.weight.ndim == 2:
        return 1
    return next(n for n in range(1, channels + 1) if channels % n == 0 and (values <= WIDEST * n or n == channels))


def most_samples(inputs: int) -> int:
    """Up to how many samples of a linear layer with so many inputs are kept in place of their second moments.

    Products with the samples take less time than with the matrix up to half as many samples as inputs. Above `WIDEST`
    inputs memory counts: samples in float32 take less of it up to twice as many.
    """
    return 0 if inputs < FEWEST else inputs // 2 if inputs <= WIDEST else 2 * inputs


def split_input_blocks(weight: Tensor, count: int) -> Tensor:
    """(O, C, ...) as (count * O, C / count, ...): one row for each output and each block of input channels."""
    return weight.unflatten(1, (count, -1)).transpose(0, 1).flatten(0, 1)


def merge_input_blocks(weight: Tensor, shape: torch.Size, count: int) -> Tensor:
    """The inverse of `split_input_blocks`: (count * O, K / count) in the shape (O, C, ...) of the layer's weight."""
    return weight.unflatten(0, (count, -1)).transpose(0, 1).reshape(shape)


def contributions(name: str, layer: nn.Module, x: Tensor, count: int, kept: KeptChannels | None = None) -> Tensor:
    """What each block of input channels adds to the output, (N, count * O, ...); the first block adds the bias.

    kept: the channels that a smaller network has: of the outputs these, and of the inputs blocks of these. An input
    channel that it lacks is in one of the blocks too.
    """
    kept = KeptChannels() if kept is None else kept
    (x, window), bias = operands(name, layer, x), stored_bias(name, layer)
    weight = kept.of_outputs(name, effective_weight(name, layer), 0)
    biases = [None if bias is None else kept.of_outputs(name, bias, 0), *[None] * (count - 1)]
    blocks = kept.blocks_of_inputs(name, layer, count)
    parts = (product(x[:, block], weight[:, block], bias, window) for block, bias in zip(blocks, biases, strict=True))
    return torch.cat(list(parts), 1)
