"""Finds which channels of a dense network a smaller copy of it has kept: by weights, then parameters, then outputs.

Coupled channels (see `channel_flow`) are one unit, which is matched as a whole: what is known of one layer narrows the
choice in all layers of a residual sum or a concatenation. The candidates of a unit are the dense units on the same
axes. They are narrowed to those of which

1. the filters, and the columns in the layers that read them, are proportional to those of the unit, on the channels of
   the other side of these layers that are matched already;
2. the biases, and the parameters of the norms, are equal;
3. where several are left, filters, columns and outputs on images are clearly the most similar ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelMismatchError, ResuscitateError, called, did_you_mean
from .channel_flow import Axis, Tables, channel_labels, channelwise_modules, coupled_units, is_norm
from .channels import KeptChannels, full_weight, width
from .comparison import describe_error
from .layers import LAYERS, effective_weight
from .runner import Network

PROPORTIONAL = 1e-5  # largest 1 - cosine of two filters that count as proportional: rounding, also in 16 bits
FEWEST = 4  # values of a filter; fewer are proportional by chance
EQUAL = 1e-6  # largest relative difference of two parameters that count as equal
# the most similar candidate is clear if its similarity is this large, and what it lacks to 1 is no more than this part
# of what the second one lacks
LEAST_SIMILARITY, CLEARLY = 0.5, 0.5

Correlations = Callable[[Sequence[str]], Mapping[str, Tensor]]  # by layer, float (channels, dense channels)


def is_smaller(model: nn.Module, dense: nn.Module) -> bool:
    """Has a layer or norm of the model fewer channels than in the dense network?"""
    originals = _modules(dense)
    both = ((each, originals[name]) for name, each in _modules(model).items() if name in originals)
    return any(width(ours, "out") < width(theirs, "out") for ours, theirs in both)


def find_kept_channels(
    small: Network, dense: Network, example: Any, given: Mapping[str, Any], correlations: Correlations
) -> KeptChannels:
    """The channels of `dense` that `small` has kept. A module with as many channels as in `dense` has all, in order.

    example: a small batch, to find the coupled channels with. given: by layer or norm, the dense channel of each of its
    channels, which need not be found. correlations: those of the outputs of layers, measured if they are needed. Raises
    ModelMismatchError, with the best candidates, where it is not clear which channel a channel is, and where channels
    are coupled otherwise than in the dense network; ValueError for `given`.
    """
    known, channelwise = _check_given(small, dense, given), channelwise_modules(dense.model)
    try:
        ours, theirs = (channel_labels(net.model, channelwise, example, net.forward_fn) for net in (small, dense))
    except Exception as error:  # the model's own code, with values that it does not expect
        problem = "the channels cannot be followed through the two networks"
        raise ResuscitateError(f"{problem}; {describe_error(error)}") from error
    matching, dense_units = _Matching(small, dense, ours, known), coupled_units(theirs)
    for signature, tables in coupled_units(ours).items():
        matching.add(tables, dense_units.get(signature, {}))
    return matching.solve(correlations)


@dataclass
class _Group:
    """Units with the same axes, and which of the dense units with these axes each may be: boolean (units, dense)."""

    small: Tables
    dense: Tables
    candidates: Tensor

    @property
    def matched(self) -> Tensor:
        """Boolean (units,): the unit has one candidate, which no other such unit has."""
        single = self.candidates.sum(1) == 1
        taken = (self.candidates & single[:, None]).sum(0)
        return single & (taken[self.candidates.int().argmax(1)] == 1)

    @property
    def outputs(self) -> list[Axis]:
        """The axes that are outputs of a layer or of a norm."""
        return [axis for axis in self.small if axis.side == "out"]

    def narrow(self, allowed: Tensor) -> bool:
        """Drop candidates that are not allowed, of each unit that has others; returns whether there were any."""
        before, count = int(self.candidates.sum()), -1
        self._keep(allowed)
        while count != (now := int(self.candidates.sum())):
            count, matched = now, self.matched[:, None]
            self._keep(matched | ~(self.candidates & matched).any(0))  # one of a matched unit is none of the others
        return count < before

    def _keep(self, allowed: Tensor) -> None:
        kept = self.candidates & allowed
        self.candidates = kept.where(kept.any(1, keepdim=True), self.candidates)


class _Matching:
    """The search. `kept` has by axis, for each channel, its dense channel, or -1 while that is not known."""

    def __init__(
        self, small: Network, dense: Network, axes: Mapping[Axis, Tensor], given: Mapping[str, Tensor]
    ) -> None:
        self.small, self.dense = small, dense
        self.groups: list[_Group] = []
        self.kept = {axis: torch.full_like(labels, -1) for axis, labels in axes.items()}
        self.known = {Axis(name, "out"): indices for name, indices in given.items() if Axis(name, "out") in axes}
        for axis, labels in axes.items():
            if axis not in self.known and width(dense.modules[axis.module], axis.side) == len(labels):
                self.known[axis] = torch.arange(len(labels))
        self.kept |= {axis: indices.clone() for axis, indices in self.known.items()}

    def add(self, tables: Tables, dense_tables: Tables) -> None:
        """Add units; those without dense units on the same axes must be known already."""
        count, dense_count = (len(next(iter(each.values()), ())) for each in (tables, dense_tables))
        if count > dense_count:
            if lost := [axis.module for axis in tables if axis.side == "out" and axis not in self.known]:
                problem = "are not read by the same layers as in the dense network"
                raise ModelMismatchError(f"the channels of {called(lost[0])} {problem}; {_remedy(lost[0])}")
            return
        group = _Group(tables, dense_tables, torch.ones(count, dense_count, dtype=torch.bool))
        for axis in filter(self.known.__contains__, tables):
            wanted = self.known[axis][tables[axis]]
            fits = (wanted[:, None] == dense_tables[axis]).all(2)
            if not bool((possible := (fits & group.candidates).any(1)).all()):
                unit = int(possible.int().argmin())
                raise ModelMismatchError(
                    f"channel {int(tables[axis][unit, 0])} of {called(axis.module)} cannot be channel "
                    f"{int(wanted[unit, 0])} of the dense network: another layer is coupled with it, by a sum, a "
                    "concatenation or a norm, and has kept other channels"
                )
            group.narrow(fits)
        self.groups.append(group)
        self._note(group)

    def solve(self, correlations: Correlations) -> KeptChannels:
        """Narrow the candidates until each unit with output channels is matched. Raises ModelMismatchError."""
        self._repeat(self._by_parameters)
        names = {axis.module: None for group in self._open() for axis in group.outputs}
        layers = [name for name in names if isinstance(self.small.modules[name], LAYERS)]
        found = correlations(layers) if layers else {}
        self._repeat(lambda group: self._by_similarity(group, found))
        for group in self._open():
            self._check(group, found)
        # on the device of the networks, lest each use copies them there
        device = self.dense.device
        known = {axis: kept.to(device) for axis, kept in self.kept.items() if self._is_part(axis, kept)}
        outputs, inputs = ({a.module: kept for a, kept in known.items() if a.side == side} for side in ("out", "in"))
        depthwise = {name: kept for name, kept in outputs.items() if Axis(name, "in") not in self.kept}
        return KeptChannels(outputs, depthwise | inputs)

    def _is_part(self, axis: Axis, kept: Tensor) -> bool:
        every = torch.arange(width(self.dense.modules[axis.module], axis.side))
        return bool((kept >= 0).all()) and not torch.equal(kept, every)

    def _open(self) -> list[_Group]:
        return [group for group in self.groups if not bool(group.matched.all())]

    def _repeat(self, narrow: Callable[[_Group], bool]) -> None:
        """Narrow the candidates by weights, and by another criterion where these do not, until nothing changes."""
        while sum(map(self._by_weights, self._open())) or sum(map(narrow, self._open())):
            pass

    def _note(self, group: _Group) -> None:
        """Write the matched units into `kept`."""
        matched = group.matched
        chosen = group.candidates.int().argmax(1)[matched]
        for axis, table in group.small.items():
            self.kept[axis][table[matched]] = group.dense[axis][chosen]

    def _by_weights(self, group: _Group) -> bool:
        narrowed = False
        for cosines, same_norm in self._compared(group):
            proportional = ~(1 - cosines > PROPORTIONAL)
            narrowed |= group.narrow(proportional)
            narrowed |= group.narrow(proportional & same_norm)
            if bool(group.matched.all()):
                break
        self._note(group)
        return narrowed

    def _by_parameters(self, group: _Group) -> bool:
        narrowed = False
        for axis in group.outputs:
            pairs = [
                (ours[group.small[axis]][:, None], theirs[group.dense[axis]])
                for ours, theirs in self._parameters(axis.module)
            ]
            if pairs:
                equal = [torch.isclose(ours, theirs, rtol=EQUAL, atol=0.0).all(2) for ours, theirs in pairs]
                narrowed |= group.narrow(torch.stack(equal).all(0))
        self._note(group)
        return narrowed

    def _by_similarity(self, group: _Group, correlations: Mapping[str, Tensor]) -> bool:
        similarity = self._similarity(group, correlations).masked_fill(~group.candidates, -1.0)
        best, second = similarity.topk(2, 1).values.unbind(1)
        clear = (best >= LEAST_SIMILARITY) & (1 - best <= CLEARLY * (1 - second)) & (1 - second > PROPORTIONAL)
        most_similar = torch.zeros_like(group.candidates).scatter(1, similarity.argmax(1, keepdim=True), True)
        narrowed = group.narrow(most_similar | ~clear[:, None])
        self._note(group)
        return narrowed

    def _similarity(self, group: _Group, correlations: Mapping[str, Tensor]) -> Tensor:
        """The mean of the cosines of weights and of the correlations of outputs, (units, dense units)."""
        found = [cosines for cosines, _ in self._compared(group)]
        for axis in group.outputs:
            if axis.module in correlations:
                rows, columns = group.small[axis][:, None], group.dense[axis]
                found.append(correlations[axis.module][rows, columns].mean(2))
        return torch.stack(found).nanmean(0).nan_to_num(0.0) if found else torch.zeros(group.candidates.shape)

    def _compared(self, group: _Group) -> Iterator[tuple[Tensor, Tensor]]:
        """For each layer: cosines of weights (units, dense units), NaN for weights of zero; have both the same norm?"""
        for axis in group.small:
            if not isinstance(self.small.modules[axis.module], LAYERS):
                continue
            ours, theirs = self._vectors(axis, group)
            if ours.shape[1] >= FEWEST:
                length, dense_length = ours.norm(dim=1)[:, None], theirs.norm(dim=1)
                cosines = (ours / length) @ (theirs / dense_length.clamp(min=torch.finfo(theirs.dtype).tiny)[:, None]).T
                yield cosines, torch.isclose(length, dense_length, rtol=PROPORTIONAL, atol=0.0)

    def _vectors(self, axis: Axis, group: _Group) -> tuple[Tensor, Tensor]:
        """The weights of each unit on an axis, on matched channels of the other side: float (units, n), in each net."""
        ours, theirs = (self._weight(net, axis.module) for net in (self.small, self.dense))
        across = self.kept.get(Axis(axis.module, "in" if axis.side == "out" else "out"))
        if across is not None:  # else a depthwise convolution, in which a filter reads one channel
            if axis.side == "in":
                ours, theirs = ours.transpose(0, 1), theirs.transpose(0, 1)
            ours, theirs = ours[:, across >= 0], theirs[:, across[across >= 0]]
        return ours[group.small[axis]].flatten(1), theirs[group.dense[axis]].flatten(1)

    def _weight(self, net: Network, name: str) -> Tensor:
        layer = net.modules[name]
        weight = effective_weight(name, layer).detach().float().cpu()
        return full_weight(layer, weight) if Axis(name, "in") in self.kept else weight.flatten(1)

    def _parameters(self, name: str) -> list[tuple[Tensor, Tensor]]:
        """Pairs of vectors (channels,), in each network: the bias of a layer, the parameters of a norm."""
        ours, theirs = self.small.modules[name], self.dense.modules[name]
        keys = ["bias"] if isinstance(ours, LAYERS) else ["weight", "bias"]
        if not isinstance(ours, LAYERS) and getattr(ours, "weight", None) is None:
            keys = ["running_mean", "running_var"]
        pairs = [(getattr(ours, key, None), getattr(theirs, key, None)) for key in keys]
        both = ((a, b) for a, b in pairs if a is not None and b is not None)
        return [(a.detach().float().cpu(), b.detach().float().cpu()) for a, b in both]

    def _check(self, group: _Group, correlations: Mapping[str, Tensor]) -> None:
        """Raise ModelMismatchError for the first unit that has output channels and is not matched."""
        for axis in group.outputs[:1]:
            unit = int(group.matched.int().argmin())
            similarity = self._similarity(group, correlations)[unit].masked_fill(~group.candidates[unit], -2.0)
            best = similarity.argsort(descending=True, stable=True)[: min(3, int(group.candidates[unit].sum()))]
            options = [f"{int(group.dense[axis][each, 0])} (similarity {similarity[each]:.3f})" for each in best]
            raise ModelMismatchError(
                f"{called(axis.module)}: it is not clear which channel of the dense network its channel "
                f"{int(group.small[axis][unit, 0])} is, {', '.join(options)}; {_remedy(axis.module)}"
            )


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """Layers and norms by name."""
    return {name: each for name, each in model.named_modules() if isinstance(each, LAYERS) or is_norm(each)}


def _remedy(name: str) -> str:
    return f"say it with channels={{{name!r}: indices}}, for each of its channels the index of the dense one"


def _check_given(small: Network, dense: Network, given: Mapping[str, Any]) -> dict[str, Tensor]:
    """The given channels as int64 tensors. Raises ValueError."""
    modules, found = _modules(small.model), {}
    for name, indices in given.items():
        if name not in modules or name not in dense.modules:
            raise ValueError(f"channels names {name!r}, which is no layer or norm{did_you_mean(name, modules, 3)}")
        kept, own, whole = (
            torch.as_tensor(indices).cpu(),
            width(modules[name], "out"),
            width(dense.modules[name], "out"),
        )
        if kept.is_floating_point() or kept.dtype == torch.bool or kept.shape != (own,):
            shape = f"{kept.dtype} {tuple(kept.shape)}"
            raise ValueError(f"channels[{name!r}] is {shape}, not {own} integers, one for each channel that it has")
        if int(kept.min()) < 0 or int(kept.max()) >= whole or len(kept.unique()) < own:
            raise ValueError(f"channels[{name!r}] must be {own} different indices from 0 to {whole - 1}")
        found[name] = kept.long()
    return found
