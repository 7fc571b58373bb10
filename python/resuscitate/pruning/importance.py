"""How much of each layer's output pruning has lost, and the importance of each weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
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
from ..runtime.distributed import Ranks
from ..runtime.journal import Entry, Journal
from ..runtime.options import RunOptions
from ..statistics.base import Statistic
from ..statistics.fitting import RIDGE, single_weight_error_reduction
from ..statistics.outputs import OutputCovariances
from ..statistics.patches import PatchCovariances, input_blocks, merge_input_blocks, split_input_blocks
from ..statistics.ssim import Ssim
from ..utils.digest import digest_model

Loss = Callable[[Any, Tensor], Tensor]


@dataclass
class ImportanceEstimator:
    """Measures a pruned network against the dense one, over batches that the caller holds."""

    dense: nn.Module
    batches: list[Any]
    run: RunOptions
    ranks: Ranks

    @torch.no_grad()
    def measure(
        self, model: nn.Module, names: list[str], *, per_weight: bool, resume: Path | None
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """By layer, the part of the dense output that is lost (0 to 1); with `per_weight` each weight's importance too.

        That part is 1 - corr^2, weighted by dense variance. The importance, in the weight's shape, is by how much the
        weight alone, at its best value, reduces the error of the layer's output (`single_weight_error_reduction`). Each
        network runs on its own activations. `resume` is a journal of what was measured; that of the whole regrowth
        refuses other images and options. Raises LayerError, NonFiniteError, JournalError.
        """
        layers = {name: find_layers(model)[name] for name in names}
        with Session([model, self.dense], self.run, ranks=self.ranks) as session:
            batches = session.read(self.batches, beside=True)
            wiring = session.look(batches)
            identity = {} if resume is None else {"model": digest_model(model), "weights": per_weight}
            journal = session.stack.enter_context(Journal(resume, identity, self.ranks))
            others = [name for name in layers if name in wiring.calls.keys() - wiring.products]
            if per_weight and others:
                problem = "its output is more than its weight times patches of its input (a transposed convolution?)"
                remedy = "saliency 'residual' cannot rank its weights; choose 'magnitude'"
                raise LayerError(others[0], f"{problem}: {remedy}")
            known = {name: journal.entries[name] for name in layers if name in journal.entries}
            probes = {name: _probe(layer, per_weight) for name, layer in layers.items() if name not in known}
            requests = [Request(name, probe, len(batches)) for name, probe in probes.items()]
            with closing(session.walk(batches, requests, "measuring")) as walk:
                for each in walk:
                    known[each.name] = _lost(layers[each.name], each.name, each.found)
                    journal.add(each.name, *known[each.name])
        damage, importance = dict[str, float](), dict[str, Tensor]()
        for name in layers:
            tensors, row = known.get(name, ({}, {"damage": None}))  # not known: these images do not reach the layer
            lost: Any = row["damage"]
            damage[name] = 0.0 if lost is None else min(max(lost, 0.0), 1.0)
            if per_weight:
                shape = effective_weight(name, layers[name]).shape
                importance[name] = tensors["importance"] if "importance" in tensors else torch.zeros(shape)
        return damage, importance

    @torch.no_grad()
    def dissimilarity(self, model: nn.Module, names: list[str]) -> dict[str, float]:
        """1 - SSIM of each layer's feature maps in the two networks, from 0 to 1; see `statistics.ssim`."""
        with Session([model, self.dense], self.run, ranks=self.ranks) as session:
            found = session.compare(self.batches, names, Ssim)
        return {name: found[name].dissimilarity if name in found else 0.0 for name in names}

    def sensitivity(self, names: list[str], labelled: Iterable[Any], loss: Loss | None) -> dict[str, Tensor]:
        """(dL/dw)^2 w^2 of the dense network, summed over the labelled batches (arXiv 2511.11675), in each shape.

        loss: of the model's output and the labels; None: cross-entropy. Raises CalibrationError, LayerError.
        """
        loss, layers = loss or F.cross_entropy, {name: find_layers(self.dense)[name] for name in names}
        with Session([self.dense], self.run, ranks=self.ranks) as session:
            net, ranks = session.net, session.ranks
            leaves = {n: stored_weight(n, layer).detach().clone().requires_grad_() for n, layer in layers.items()}
            stored = {
                name: "weight_orig" if "weight_mask" in each._buffers else "weight" for name, each in layers.items()
            }
            places = {f"model.{name}.{stored[name]}": leaf for name, leaf in leaves.items()}
            squares = {name: torch.zeros_like(leaf, dtype=torch.float64) for name, leaf in leaves.items()}
            batches, runner = 0, nn.Module()  # functional_call needs a module: this one runs the network
            runner.model, runner.forward = net.model, net.run
            for batch in labelled:
                if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[1], Tensor):
                    raise CalibrationError("labelled must give pairs of images and labels; each batch is (x, y)")
                with torch.enable_grad(), net.precision():
                    output = functional_call(runner, places, (batch[0],))
                    lost = loss(output, batch[1].to(net.device))
                    slopes = torch.autograd.grad(lost, list(leaves.values()), allow_unused=True)
                for square, slope in zip(squares.values(), slopes, strict=True):
                    square += 0 if slope is None else slope.double().square()  # None: no pass reaches the layer
                batches += 1
            if not ranks.total(batches)[0]:
                raise CalibrationError("labelled holds no batches; saliency 'gradient' needs some")
            return {
                name: (ranks.add(squares[name]) * effective_weight(name, layer).double().square()).cpu()
                for name, layer in layers.items()
            }


def _probe(layer: Any, per_weight: bool) -> Probe:
    if not per_weight:
        return Probe(OutputCovariances)
    return Probe(PatchCovariances, pruned="input", dense="input" if input_blocks(layer) > 1 else "output")


def _lost(layer: nn.Module, name: str, found: Statistic) -> Entry:
    """As a journal holds it: the importance of each weight, if measured, and the part of the dense variance lost."""
    if isinstance(found, PatchCovariances) and not found.empty:
        weight, count = effective_weight(name, layer), input_blocks(layer)
        rows = split_input_blocks(weight, count).flatten(1)
        reductions, lost = single_weight_error_reduction(found.folds[0], rows, ridge=RIDGE)
        importance = merge_input_blocks(reductions, weight.shape, count).float().cpu().contiguous()
        return {"importance": importance}, {"damage": lost}
    share = found.explained if isinstance(found, OutputCovariances) else None
    return {}, {"damage": None if share is None else 1 - share}
