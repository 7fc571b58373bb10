"""Training that prepares for pruning: filters on the unit sphere, and a penalty that keeps weights off the threshold.

After "Pruning on the fly" (arXiv 2212.12651), of which only the abstract was at hand: hyperspherical learning, and a
penalty that drives some weights far from zero and the rest to it, so that the small ones can go at once. The formulas
here are this project's reading of that.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils import parametrize

from ..errors import LayerError
from ..network.layers import Selector, find_layers, refuse_means, select_layers, stored_weight, unwrap
from ..pruning.allocation import check_sparsity

SMALLEST = 1e-12  # norm of a filter that is taken for zero


class Hypersphere(nn.Module):
    """Parametrization of a weight by directions: each filter is centred and normalised, then scaled and shifted.

        weight = gain * u / |u| + offset,   u = v - mean(v), over all but the first axis

    v is what is trained. gain and offset (O, 1, ...) are those of the weight that was there, and are trained too, so
    that nothing changes when a layer is converted; or 1 and 0, for good, where `keep` is False: then the filters lie on
    the unit sphere itself, and what normalises the outputs (a BatchNorm) gives them their scale.
    """

    def __init__(self, weight: Tensor, keep: bool = True) -> None:
        super().__init__()
        self.keep = keep
        shape = (len(weight), *[1] * (weight.dim() - 1))
        gain, offset = weight.new_ones(shape), weight.new_zeros(shape)
        self.gain, self.offset = (nn.Parameter(vector, requires_grad=keep) for vector in (gain, offset))

    def forward(self, v: Tensor) -> Tensor:
        return self.gain * _normalised(v) + self.offset

    @torch.no_grad()
    def right_inverse(self, weight: Tensor) -> Tensor:
        """The direction of a weight; its norms and means become gain and offset where they are kept."""
        if self.keep:
            axes = tuple(range(1, weight.dim()))
            self.offset.copy_(weight.mean(axes, keepdim=True))
            self.gain.copy_(torch.linalg.vector_norm(weight - self.offset, dim=axes, keepdim=True))
        return _normalised(weight)


def _normalised(v: Tensor) -> Tensor:
    axes = tuple(range(1, v.dim()))
    u = v - v.mean(axes, keepdim=True)
    return u / torch.linalg.vector_norm(u, dim=axes, keepdim=True).clamp(min=SMALLEST)


def to_hyperspherical(
    model: nn.Module,
    *,
    keep: bool = True,
    include: Iterable[Selector] | Selector | None = None,
    exclude: Iterable[Selector] | Selector | None = None,
) -> list[str]:
    """Have convolutions and linear layers compute with filters on a sphere (see `Hypersphere`), in place; their names.

    keep: the model computes what it did, to rounding. False: filters are normalised for good, to begin a training with.
    Uses `torch.nn.utils.parametrize`: `layer.weight` is recomputed from `layer.parametrizations.weight`, whose
    parameters are new, so make the optimizer afterwards. Transposed convolutions stay as they are; a parametrized layer
    is not pruned or repaired before `to_plain`. Raises LayerError for a layer whose weight is recomputed already.
    """
    layers = {
        name: layer
        for name, layer in select_layers(unwrap(model), include, exclude).items()
        if not isinstance(layer, _ConvTransposeNd)
    }
    refuse_means(layers)
    for name, layer in layers.items():
        stored_weight(name, layer)
        if "weight_mask" in layer._buffers:
            raise LayerError(name, "its weight is under torch.nn.utils.prune; prune.remove(layer, 'weight') first")
    for layer in layers.values():
        weight: Tensor = layer.weight  # type: ignore[assignment]
        parametrize.register_parametrization(layer, "weight", Hypersphere(weight.detach(), keep))
    return list(layers)


def to_plain(model: nn.Module) -> list[str]:
    """Undo `to_hyperspherical`, in place: plain layers with the weights as they are now, bit for bit; their names."""
    changed = []
    for name, layer in find_layers(unwrap(model)).items():
        if is_hyperspherical(layer):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
            for key in [key for key in layer._parameters if key != "weight"]:  # back into their order
                layer._parameters[key] = layer._parameters.pop(key)
            changed.append(name)
    return changed


def is_hyperspherical(layer: nn.Module) -> bool:
    """Is the layer's weight parametrized by a `Hypersphere`, and nothing else?"""
    if not parametrize.is_parametrized(layer, "weight"):
        return False
    stages = layer.parametrizations["weight"]  # type: ignore[index]
    return len(stages) == 1 and isinstance(stages[0], Hypersphere)


class PruningPenalty:
    """A loss term that is greatest for weights at the pruning threshold, and drives them off it, either way.

        penalty = strength * ramp * mean over weights of min(|w|, max(2 t - |w|, 0))^2 / r^2

    r is the root mean square of a layer's weights and t the threshold, the magnitude below which the fraction
    `sparsity` of them lies now (one r and t for each layer, as "uniform" prunes; `across=True`: for all of them
    together, as "global" does); no gradient flows through either. A weight below t is drawn to zero; one above it is
    pushed away, to 2 t at most, where the penalty is zero again. ramp grows from 0 to 1 over the first `warmup` of the
    training, so that the weights first find their order. The formula is this project's reading of the abstract of
    arXiv 2212.12651.

    Works for plain layers and for hyperspherical ones, for which |w| is that on the sphere (gain and offset apart).
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float,
        *,
        strength: float = 1.0,
        warmup: float = 0.5,
        across: bool = False,
        include: Iterable[Selector] | Selector | None = None,
        exclude: Iterable[Selector] | Selector | None = None,
    ) -> None:
        self.layers = select_layers(unwrap(model), include, exclude)
        self.sparsity, self.strength, self.across = check_sparsity(sparsity), strength, across
        if not self.layers:
            raise ValueError("nothing to penalise: include and exclude leave no layer of the model")
        if not strength >= 0 or not 0 <= warmup <= 1:
            raise ValueError(
                f"strength={strength} must be at least 0, and warmup={warmup} a part of the training, 0 to 1"
            )
        self.warmup = warmup

    def __call__(self, progress: float = 1.0) -> Tensor:
        """The penalty now, to be added to the loss; `progress` is how much of the training is done, 0 to 1."""
        ramp = min(progress / self.warmup, 1.0) if self.warmup else 1.0
        magnitudes = [_on_sphere(layer).abs().flatten() for layer in self.layers.values()]
        if self.across:
            magnitudes = [torch.cat(magnitudes)]
        count = sum(each.numel() for each in magnitudes)
        return sum((_well(each, self.sparsity) for each in magnitudes), magnitudes[0].new_zeros(())) * (
            self.strength * ramp / count
        )


def _on_sphere(layer: nn.Module) -> Tensor:
    if is_hyperspherical(layer):
        return _normalised(layer.get_parameter("parametrizations.weight.original"))
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight


def _well(magnitude: Tensor, sparsity: float) -> Tensor:
    """The sum of the penalties of these magnitudes."""
    place = round(sparsity * magnitude.numel())
    if not place:
        return magnitude.new_zeros(())
    fixed = magnitude.detach()
    threshold, scale = fixed.kthvalue(place).values, fixed.square().mean().clamp(min=SMALLEST)
    return torch.minimum(magnitude, (2 * threshold - magnitude).clamp(min=0)).square().sum() / scale
