"""How much of each layer's output pruning has lost, and the importance of each weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..engine.probes import Probe, Request
from ..engine.session import Session
from ..errors import CalibrationError, LayerError
from ..network.layers import effective_weight, find_layers, stored_weight
from ..network.runner import Network
from ..runtime.distributed import Ranks
from ..runtime.journal import Journal
from ..runtime.options import RunOptions
from ..statistics.base import Statistic
from ..statistics.fitting import RIDGE, single_weight_error_reduction
from ..statistics.outputs import OutputCovariances
from ..statistics.patches import PatchCovariances, input_blocks, merge_input_blocks, split_input_blocks
from ..statistics.ssim import Ssim
from ..utils.digest import digest_model

Loss = Callable[[Any, Tensor], Tensor]


@dataclass
class Importance:
    """By layer: the part of the dense output that is lost (0 to 1), and the importance of each weight, in its shape."""

    damage: dict[str, float] = field(default_factory=dict)
    weight_importance: dict[str, Tensor] = field(default_factory=dict)

    def note(self, name: str, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Add one layer, as a journal holds it."""
        self.damage[name] = 0.0 if plain["damage"] is None else min(max(float(plain["damage"]), 0.0), 1.0)
        if "importance" in tensors:
            self.weight_importance[name] = tensors["importance"]


@dataclass
class ImportanceEstimator:
    """Measures a pruned network against the dense one, over batches that the caller holds."""

    dense: nn.Module
    batches: list[Any]
    run: RunOptions
    ranks: Ranks

    @torch.no_grad()
    def measure(
        self, model: nn.Module, names: Iterable[str], *, per_weight: bool, resume: Path | None = None
    ) -> Importance:
        """Damage as 1 - corr^2, weighted by dense variance; with `per_weight` the importance of each weight too.

        That is by how much the weight alone, at its best value, reduces the error of the layer's output
        (`single_weight_error_reduction`). One walk through both networks, each on its own activations; nothing is
        changed. `resume` is a journal of what was measured; the journal of the whole regrowth refuses other images and
        options. Raises LayerError, NonFiniteError, JournalError.
        """
        layers = {name: find_layers(model)[name] for name in names}
        found = Importance()
        with Session([model, self.dense], self.run, ranks=self.ranks) as session:
            batches = session.read(self.batches, beside=True)
            wiring = session.look(batches)
            identity = {} if resume is None else {"model": digest_model(model), "weights": per_weight}
            journal = session.stack.enter_context(Journal(resume, identity, self.ranks))
            others = [name for name in layers if name in wiring.calls.keys() - wiring.products]
            if per_weight and others:
                raise LayerError(
                    others[0],
                    "its output is more than its weight times patches of its input (a transposed convolution?): "
                    "saliency 'residual' cannot rank its weights; choose 'magnitude'",
                )
            for name in layers.keys() & journal.entries.keys():
                found.note(name, *journal.entries[name])
            left = {name: layer for name, layer in layers.items() if name not in journal.entries}
            requests = [Request(name, _probe(layer, per_weight), len(batches)) for name, layer in left.items()]
            with closing(session.walk(batches, requests, "measuring")) as walk:
                for each in walk:
                    tensors, lost = _lost(layers[each.name], each.name, each.found)
                    journal.add(each.name, tensors, {"damage": lost})
                    found.note(each.name, tensors, {"damage": lost})
        for name, layer in layers.items():  # not reached by these images
            found.damage.setdefault(name, 0.0)
            if per_weight:
                found.weight_importance.setdefault(name, torch.zeros(effective_weight(name, layer).shape))
        return found

    @torch.no_grad()
    def dissimilarity(self, model: nn.Module, names: Iterable[str]) -> dict[str, float]:
        """1 - SSIM of each layer's feature maps in the two networks, from 0 to 1; see `statistics.ssim`."""
        names = list(names)
        with Session([model, self.dense], self.run, ranks=self.ranks) as session:
            found = session.compare(self.batches, names, Ssim)
        return {name: found[name].dissimilarity if name in found else 0.0 for name in names}

    def sensitivity(
        self, names: Iterable[str], labelled: Iterable[tuple[Any, Tensor]], loss: Loss | None
    ) -> dict[str, Tensor]:
        """(dL/dw)^2 w^2 of the dense network, summed over the labelled batches (arXiv 2511.11675), in each shape.

        loss: of the model's output and the labels; None: cross-entropy. Raises CalibrationError, LayerError.
        """
        loss, layers = loss or F.cross_entropy, {name: find_layers(self.dense)[name] for name in names}
        found: dict[str, Tensor] = {}
        with Session([self.dense], self.run, ranks=self.ranks) as session:
            net, ranks = session.net, session.ranks
            leaves = {f"{n}.weight": stored_weight(n, m).detach().clone().requires_grad_() for n, m in layers.items()}
            squares = {name: torch.zeros_like(leaf, dtype=torch.float64) for name, leaf in leaves.items()}
            batches = 0
            for batch in labelled:
                if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[1], Tensor):
                    raise CalibrationError("labelled must give pairs of images and labels; each batch is (x, y)")
                with torch.enable_grad(), net.precision():
                    x = batch[0] if net.forward_fn else net.place(batch[0])
                    output = functional_call(_Runner(net), {f"model.{n}": leaf for n, leaf in leaves.items()}, (x,))
                    slopes = torch.autograd.grad(loss(output, batch[1].to(net.device)), list(leaves.values()))
                for square, slope in zip(squares.values(), slopes, strict=True):
                    square += slope.double().square()
                batches += 1
            if not ranks.total(batches)[0]:
                raise CalibrationError("labelled holds no batches; saliency 'gradient' needs some")
            for name, layer in layers.items():
                product = ranks.add(squares[f"{name}.weight"]) * effective_weight(name, layer).double().square()
                found[name] = product.cpu()
        return found


def _probe(layer: Any, per_weight: bool) -> Probe:
    if not per_weight:
        return Probe(OutputCovariances)
    return Probe(PatchCovariances, pruned="input", dense="input" if input_blocks(layer) > 1 else "output")


def _lost(layer: nn.Module, name: str, found: Statistic) -> tuple[dict[str, Tensor], float | None]:
    """The importance of each weight, if it was measured, and the part of the dense variance that is lost."""
    if isinstance(found, PatchCovariances) and not found.empty:
        weight, count = effective_weight(name, layer), input_blocks(layer)
        rows = split_input_blocks(weight, count).flatten(1)
        reductions, lost = single_weight_error_reduction(found.folds[0], rows, ridge=RIDGE)
        return {"importance": merge_input_blocks(reductions, weight.shape, count).float().cpu().contiguous()}, lost
    if isinstance(found, OutputCovariances) and found.explained is not None:
        return {}, 1 - found.explained
    return {}, None


class _Runner(nn.Module):
    def __init__(self, net: Network) -> None:
        super().__init__()
        self.model, self.run = net.model, net.forward_fn

    def forward(self, x: Any) -> Any:
        return self.run(self.model, x) if self.run else self.model(x)
