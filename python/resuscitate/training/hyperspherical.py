"""Training before pruning: filters on the unit sphere, and a penalty on weights near the pruning threshold.

After "Pruning on the fly" (arXiv 2212.12651), of which only the abstract was available: the formulas are this project's
reading of the abstract.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils import parametrize

from ..errors import LayerError
from ..network.layers import Selection, find_layers, refuse_means, select_layers, sharing_layers, stored_weight, unwrap
from ..pruning.allocation import check_sparsity

SMALLEST = 1e-12  # lower bound of divisors


class Hypersphere(nn.Module):
    """Parametrization of a weight by its filters' directions: centred and normalised, then scaled and shifted.

        weight = gain * u / |u| + offset,   u = v - mean(v), over all but the first axis

    v is trained. With `keep`, gain and offset (O, 1, ...) start as those of the converted weight, so that the
    conversion does not change the layer, and are trained too. Without `keep` they stay 1 and 0: the filters lie on the
    unit sphere, and a BatchNorm scales the outputs.
    """

    def __init__(self, weight: Tensor, keep: bool = True) -> None:
        super().__init__()
        self.keep, shape = keep, (len(weight), *[1] * (weight.dim() - 1))
        self.gain = nn.Parameter(weight.new_ones(shape), requires_grad=keep)
        self.offset = nn.Parameter(weight.new_zeros(shape), requires_grad=keep)

    def forward(self, v: Tensor) -> Tensor:
        return self.gain * _decompose(v)[2] + self.offset

    @torch.no_grad()
    def right_inverse(self, weight: Tensor) -> Tensor:
        """The directions of a weight's filters; with `keep`, their norms and means are stored in gain and offset."""
        mean, norm, direction = _decompose(weight)
        if self.keep:
            self.offset.copy_(mean)
            self.gain.copy_(norm)
        return direction


def _decompose(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, norm and direction of each filter: v = mean + norm * direction."""
    axes = tuple(range(1, v.dim()))
    mean = v.mean(axes, keepdim=True)
    u = v - mean
    norm = torch.linalg.vector_norm(u, dim=axes, keepdim=True)
    return mean, norm, u / norm.clamp(min=SMALLEST)


def to_hyperspherical(
    model: nn.Module, *, keep: bool = True, include: Selection = None, exclude: Selection = None
) -> list[str]:
    """Parametrize convolutions and linear layers by a `Hypersphere`, in place; returns their names.

    keep: the outputs are unchanged up to rounding. False: the filters stay normalised, for training from the start.
    Uses `torch.nn.utils.parametrize`: the parameters are new, so make the optimizer afterwards. Transposed convolutions
    are unchanged. Call `to_plain` before pruning or repair. Raises LayerError for a layer whose weight is already
    recomputed in each forward pass, or that shares a parameter with another module.
    """
    selected = select_layers(unwrap(model), include, exclude)
    layers = {name: layer for name, layer in selected.items() if not isinstance(layer, _ConvTransposeNd)}
    refuse_means(layers)
    sharing = sharing_layers(unwrap(model))
    for name, layer in layers.items():
        stored_weight(name, layer)
        if "weight_mask" in layer._buffers:
            raise LayerError(name, "its weight is under torch.nn.utils.prune; prune.remove(layer, 'weight') first")
        if name in sharing:
            raise LayerError(name, f"it shares a parameter with {sharing[name]!r}, and would no longer; exclude both")
    for layer in layers.values():
        weight = layer.get_parameter("weight").detach()
        parametrize.register_parametrization(layer, "weight", Hypersphere(weight, keep))
    return list(layers)


def to_plain(model: nn.Module) -> list[str]:
    """Undo `to_hyperspherical`, in place, with the current weights bit for bit; returns the names of the layers."""
    layers = {name: layer for name, layer in find_layers(unwrap(model)).items() if is_hyperspherical(layer)}
    for layer in layers.values():
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
        for key in [key for key in layer._parameters if key != "weight"]:  # as before: weight first
            layer._parameters[key] = layer._parameters.pop(key)
    return list(layers)


def is_hyperspherical(layer: nn.Module) -> bool:
    """Is the layer's weight parametrized by a `Hypersphere`, and nothing else?"""
    if not parametrize.is_parametrized(layer, "weight"):
        return False
    stages = layer.parametrizations["weight"]  # type: ignore[index]
    return len(stages) == 1 and isinstance(stages[0], Hypersphere)


class PruningPenalty:
    """A loss term that moves weights away from the pruning threshold, to zero or to larger magnitudes.

        penalty = strength * ramp * mean over weights of min(|w|, max(2 t - |w|, 0))^2 / r^2

    r is the root mean square of a layer's weights. t is the threshold: the fraction `sparsity` of the weights has a
    magnitude below t. Each layer has its own r and t, as in "uniform" pruning; with `across=True` all layers share
    them, as in "global" pruning. No gradient flows through r and t. The gradient moves a weight below t towards zero,
    and a weight above t up to 2 t, where the penalty is zero. ramp grows from 0 to 1 over the fraction `warmup` of the
    training, so that the loss alone orders the weights first. For a hyperspherical layer, |w| is the weight on the
    sphere, without gain and offset. The formula is this project's reading of the abstract of arXiv 2212.12651.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float,
        *,
        strength: float = 1.0,
        warmup: float = 0.5,
        across: bool = False,
        include: Selection = None,
        exclude: Selection = None,
    ) -> None:
        self.layers: dict[str, nn.Module] = select_layers(unwrap(model), include, exclude)
        self.sparsity: float = check_sparsity(sparsity)
        self.strength: float = strength
        self.warmup: float = warmup
        self.across: bool = across
        if not self.layers:
            raise ValueError("nothing to penalise: include and exclude select no layer of the model")
        if not strength >= 0 or not 0 <= warmup <= 1:
            raise ValueError(f"strength={strength} must be at least 0, and warmup={warmup} must be between 0 and 1")

    def __call__(self, progress: float = 1.0) -> Tensor:
        """The penalty, to be added to the loss; `progress` is the fraction of the training that is done, 0 to 1."""
        ramp = min(progress / self.warmup, 1.0) if self.warmup else 1.0
        magnitudes = [_penalised_weight(layer).abs().flatten() for layer in self.layers.values()]
        if self.across:
            magnitudes = [torch.cat(magnitudes)]
        count = sum(each.numel() for each in magnitudes)
        total = sum((_penalty_sum(each, self.sparsity) for each in magnitudes), magnitudes[0].new_zeros(()))
        return total * (self.strength * ramp / count)


def _penalised_weight(layer: nn.Module) -> Tensor:
    if is_hyperspherical(layer):
        return _decompose(layer.get_parameter("parametrizations.weight.original"))[2]
    return layer.weight  # type: ignore[return-value]


def _penalty_sum(magnitude: Tensor, sparsity: float) -> Tensor:
    """The sum over weights in the formula of `PruningPenalty`, for weights of these magnitudes."""
    rank = round(sparsity * magnitude.numel())
    if not rank:
        return magnitude.new_zeros(())
    constant = magnitude.detach()
    threshold, scale = constant.kthvalue(rank).values, constant.square().mean().clamp(min=SMALLEST)
    return torch.minimum(magnitude, (2 * threshold - magnitude).clamp(min=0)).square().sum() / scale
