"""Allocation by measured loss: how much the pruning of each layer moves the outputs of the network, without labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from ..engine.kept import KeptStatistics
from ..engine.session import Session
from ..network.copies import deep_copy
from ..network.layers import Selection, effective_weight, with_weight
from ..pruning.allocation import fixed_densities
from ..pruning.layer_scales import LayerScales
from ..pruning.repairability import DENSITIES
from ..pruning.units import ChannelFloors, channel_floors, prunable_layers, units_of
from ..runtime.distributed import Ranks
from ..statistics.fitting import fit, lost_variance
from ..statistics.patches import PatchCovariances, input_blocks
from ..statistics.second_moments import Moments, merged
from .agreement import Judge
from .steps import Steps

ALONE = 0.2  # each layer alone is pruned so far that about this part of the variance of its outputs is lost


def measure_scales(
    steps: Steps,
    dense: nn.Module,
    kept: KeptStatistics,
    sparsity: float,
    *,
    densities: Mapping[str, float] | None = None,
    min_per_layer: int = 1,
    min_per_channel: ChannelFloors = 0,
    include: Selection = None,
    exclude: Selection = None,
) -> LayerScales | None:
    """The factors of the layers for one sparsity, from the moments of the dense network; None without any.

    The options are those of `sparsify`. Layers of fixed densities have none: the others lose the rest of the weights.

    For each layer alone: the part e of the variance of its outputs that is lost at each density, after a refit. Then
    the layer is refitted at the density where e is about `ALONE`, and the error of the outputs of the network is
    measured; its square over e is the cost of the layer. Each costs one forward pass over a few images.
    """
    layers, first_of = prunable_layers(dense, include, exclude)
    floors = channel_floors(layers, min_per_channel)
    units = {
        name: units_of(name, layers[name], min_per_layer, floors[name]) for name in dict.fromkeys(first_of.values())
    }
    fixed, total = fixed_densities(layers, first_of, densities), sum(each.count for each in units.values())
    removed = sparsity * total - sum((1 - density) * units.pop(name).count for name, density in fixed.items())
    left = removed / max(sum(each.count for each in units.values()), 1)  # the sparsity of the other layers
    lost, cost = dict[str, dict[float, float]](), dict[str, float]()
    with Session([deep_copy(dense), dense], steps.run, ranks=steps.ranks) as session:
        judge = Judge(session, steps.images(session), fitted=True)
        for name in filter(kept.__contains__, units):
            found, layer = kept.get(session.place(name)), layers[name]
            if not isinstance(found, PatchCovariances) or input_blocks(layer) > 1:
                continue
            moments, weight = merged(found.folds.values()), effective_weight(name, layer)
            kept_at = units[name].times_kept(DENSITIES).to(weight.device).view(len(weight), -1)
            parts = lost_variance(moments, weight.flatten(1), kept_at, len(DENSITIES), steps.ranks).tolist()
            if not parts[-1]:  # constant outputs
                continue
            lost[name] = dict(zip(DENSITIES, parts, strict=True))
            at = min(range(len(parts)), key=lambda index: abs(parts[index] - ALONE))
            changed = _refitted(layer, moments, weight, kept_at > at, steps.ranks)
            with in_its_place(session.net.modules[name], changed):
                seen = judge.look()
            if seen is None:
                return None
            # outputs that are not finite count as if nothing of them were left
            cost[name] = (1.0 if seen.error is None else seen.error**2) / max(parts[at], 1e-6)
    return LayerScales.of_losses(units, min(max(left, 0.0), 1.0), lost, cost) if cost else None


@contextmanager
def in_its_place(layer: nn.Module, changed: nn.Module) -> Iterator[None]:
    """Within this context another layer gives the outputs of a layer."""
    handle = layer.register_forward_hook(lambda _, args, kwargs, output: changed(*args, **kwargs), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _refitted(layer: nn.Module, moments: Moments, weight: Tensor, support: Tensor, ranks: Ranks) -> nn.Module:
    """The layer, refitted to its dense outputs on a support (O, K) of its weight (O, ...)."""
    found = fit(moments, weight.flatten(1) * support, support, ranks=ranks)
    return with_weight(layer, found.weight.to(weight).view_as(weight), found.bias.to(weight))
