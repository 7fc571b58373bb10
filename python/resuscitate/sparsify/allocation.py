"""How many weights each layer keeps: one sparsity for the model, shared out over its layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from ..errors import LayerError
from ..layers import Selector, effective_weight, select_layers, unwrap
from ..masks import tied_layers

# |w| of every layer and the number of weights to remove in all -> the number to remove from each layer
Allocation = Callable[[Mapping[str, Tensor], int], dict[str, int]]


def allocate(
    model: nn.Module,
    sparsity: float,
    method: str = "global",
    *,
    include: Iterable[Selector] | Selector | None = None,
    exclude: Iterable[Selector] | Selector | None = None,
) -> dict[str, float]:
    """Fraction of weights that each selected layer keeps, {layer name: density}, for one sparsity over all of them.

    The densities are exact counts divided by layer sizes: round(sparsity * total) weights go, to the last one. A
    weight shared by several layers counts once and gives them one density. The model is not changed.

    method: "global" ranks all weights of all layers together by magnitude; "uniform" takes the same fraction of each.
    sparsity: a float in [0, 1), of the original weights. At least one weight stays in every layer.
    Raises ValueError for an unknown method, a sparsity outside [0, 1) or one that leaves less than a weight a layer,
    TypeError for a sparsity that is not a float, LayerError for a weight that is not finite.
    """
    layers, ties = prunable(model, include, exclude)
    magnitudes = {first: magnitude(first, layers[first]) for first in ties}
    removed = removals(magnitudes, sparsity, method)
    sizes = {first: scores.numel() for first, scores in magnitudes.items()}
    density = {name: (sizes[first] - removed[first]) / sizes[first] for first, names in ties.items() for name in names}
    return {name: density[name] for name in layers}


def removals(magnitudes: Mapping[str, Tensor], sparsity: float, method: str) -> dict[str, int]:
    """Number of weights to remove from each layer, round(sparsity * total) in all; arguments as for `allocate`."""
    if method not in ALLOCATIONS:
        raise ValueError(f"unknown allocation {method!r}; choose from {', '.join(ALLOCATIONS)}")
    total = sum(scores.numel() for scores in magnitudes.values())
    budget = round(check_sparsity(sparsity) * total)
    most = sum(_spare(scores) for scores in magnitudes.values())
    if budget > most:
        raise ValueError(
            f"sparsity={sparsity} removes {budget} of {total} weights and would empty a layer: with one weight left in "
            f"each of {len(magnitudes)} layers at most {most} can go, a sparsity of {most / total:.6g}"
        )
    return ALLOCATIONS[method](magnitudes, budget)


def global_removals(magnitudes: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """One ranking by magnitude over all layers (global L1): the `budget` smallest go, but never a layer's largest."""
    common = torch.float64 if any(scores.dtype == torch.float64 for scores in magnitudes.values()) else torch.float32
    ranked = []
    for scores in magnitudes.values():
        flat = scores.flatten().to("cpu", common, copy=True)
        flat[flat.argmax() : flat.argmax() + 1] = math.inf  # each layer's survivor ranks last
        ranked.append(flat)
    removed = smallest(torch.cat(ranked), budget).split([flat.numel() for flat in ranked])
    return {name: int(chosen.sum()) for name, chosen in zip(magnitudes, removed, strict=True)}


def uniform_removals(magnitudes: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """The same fraction of every layer, by largest remainder: the sum is `budget`, a layer off by less than a weight.

    (By more only where a layer must keep its last weight.) Equal remainders go to the earlier layer.
    """
    spare = {name: _spare(scores) for name, scores in magnitudes.items()}
    total = sum(scores.numel() for scores in magnitudes.values())
    # exact integer arithmetic: quotient and remainder of budget * size / total
    shares = {name: divmod(budget * scores.numel(), total) for name, scores in magnitudes.items()}
    removed = {name: min(share, spare[name]) for name, (share, _) in shares.items()}
    order = sorted(shares, key=lambda name: -shares[name][1])
    while left := budget - sum(removed.values()):
        for name in [name for name in order if removed[name] < spare[name]][:left]:
            removed[name] += 1
    return removed


ALLOCATIONS: dict[str, Allocation] = {"global": global_removals, "uniform": uniform_removals}


def prunable(
    model: nn.Module,
    include: Iterable[Selector] | Selector | None,
    exclude: Iterable[Selector] | Selector | None,
) -> tuple[dict[str, nn.Module], dict[str, list[str]]]:
    """The selected layers, and which of them share a weight (see `tied_layers`).

    Raises ValueError when none is selected, LayerError when a selected layer shares its weight with one that is not.
    """
    model = unwrap(model)
    layers = select_layers(model, include, exclude)
    if not layers:
        raise ValueError("nothing to prune: include and exclude leave no convolution or linear layer of the model")
    owners = {id(parameter): name for name, module in layers.items() for parameter in module.parameters(recurse=False)}
    for name, module in select_layers(model).items():
        weight = module._parameters.get("weight", module._parameters.get("weight_orig"))
        if name not in layers and id(weight) in owners:
            raise LayerError(owners[id(weight)], f"shares its weight with {name!r}, which is not selected; select both")
    return layers, tied_layers(layers)


@torch.no_grad()
def magnitude(name: str, module: nn.Module) -> Tensor:
    """|w| of the weight the layer uses, float32 (float64 if the weight is); LayerError if one is NaN or infinite."""
    weight = effective_weight(name, module)
    scores = weight.abs().to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    if not bool(scores.isfinite().all()):
        count = int((~scores.isfinite()).sum())
        raise LayerError(name, f"{count} of its weights are NaN or infinite, so they cannot be ranked")
    return scores


def smallest(scores: Tensor, count: int) -> Tensor:
    """Boolean, True at exactly `count` of the smallest scores; among equals the earlier position goes first.

    The set that a stable ascending sort puts first, found by selection: about ten times faster than sorting.
    """
    flat = scores.flatten()
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    last = flat.kthvalue(count).values
    chosen, ties = flat < last, flat == last
    chosen |= ties & (ties.cumsum(0) <= count - chosen.sum())
    return chosen.view(scores.shape)


def check_sparsity(sparsity: float) -> float:
    """The sparsity itself if it is a float in [0, 1); TypeError or ValueError otherwise, saying why."""
    if not isinstance(sparsity, float):
        raise TypeError(
            f"sparsity={sparsity!r} is of type {type(sparsity).__name__}; give a float in [0, 1), the fraction of the "
            "original weights that goes (0.9 keeps every tenth)"
        )
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity={sparsity} is not in [0, 1), the fraction of the original weights that goes")
    return sparsity


def _spare(scores: Tensor) -> int:
    return max(scores.numel() - 1, 0)
