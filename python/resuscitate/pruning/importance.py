"""Where a pruned network hurts: how much of each layer is lost, and what each of its weights is worth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..data.batches import Batches
from ..engine.corrections import explained
from ..engine.probes import Stop
from ..engine.walk import Walker
from ..errors import CalibrationError, LayerError, ModelMismatchError, called
from ..methods.refit import RIDGE, blocks, by_block, drops, whole
from ..network.layers import effective_weight, find_layers, stored_weight
from ..network.runner import Network, as_dtype
from ..network.snapshot import moved_to, undisturbed
from ..network.wiring import observe
from ..runtime.activations import Store, parse_memory
from ..runtime.distributed import Ranks
from ..runtime.journal import Journal
from ..utils.digest import MODULUS, digest_images, digest_model, fingerprint

SSIM_WINDOW = 7
Loss = Callable[[Any, Tensor], Tensor]


@dataclass
class Needs:
    """By layer: the share of the dense output that is lost (0 to 1), and the worth of each weight, in its shape."""

    damage: dict[str, float] = field(default_factory=dict)
    worth: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Surveyor:
    """Measures a pruned network against the dense one, over batches in the caller's hands; options as in `repair`."""

    dense: nn.Module
    batches: list[Any]
    ranks: Ranks
    forward_fn: Callable[[nn.Module, Any], Any] | None = None
    dtype: torch.dtype | str | None = None
    device: torch.device | str | None = None
    memory: int | str | None = None
    scratch: str | Path | None = None
    seed: int = 0

    @torch.no_grad()
    def survey(
        self, model: nn.Module, names: Iterable[str], *, worth: bool, resume: Path | None = None, progress: bool | None
    ) -> Needs:
        """Damage as 1 - corr^2, weighted by dense variance, and if asked for what each weight would take off the error.

        One walk through both networks, each on its own activations; nothing is changed. See `refit.drops`. A journal,
        `resume`, keeps what was found. Raises LayerError, NonFiniteError, JournalError.
        """
        layers = {name: find_layers(model)[name] for name in names}
        (images,) = self.ranks.total(digest_images(self.batches)) if resume is not None else (0,)
        identity: dict[str, object] = {"model": digest_model(model), "dense": digest_model(self.dense)}
        identity |= {"images": images % MODULUS, "worth": worth, "dtype": str(as_dtype(self.dtype)), "seed": self.seed}
        identity |= {"forward_fn": fingerprint(self.forward_fn) if resume is not None else None}
        needs = Needs()
        with self._side_by_side(model) as (walker, batches), Journal(resume, identity, self.ranks) as journal:
            odd = [name for name in layers if name in walker.wiring.calls.keys() - walker.wiring.products]
            if worth and odd:
                raise LayerError(
                    odd[0],
                    "its output is more than its weight times patches of its input (a transposed convolution?): "
                    "saliency 'residual' cannot rank its weights; choose 'magnitude'",
                )
            stops, show = [], False if self.ranks.rank else progress
            for name, layer in layers.items():
                if name in journal.entries:
                    tensors, plain = journal.entries[name]
                    _note(needs, name, tensors, plain)
                else:
                    how = {"refit": True, "wide": blocks(layer) > 1} if worth else {"paired": True}
                    stops.append(Stop(name, len(batches), dense=True, **how))
            with closing(walker.walk(batches, stops, "measuring", show)) as walk:
                for visit in walk:
                    visit = self.ranks.merge(visit, walker.pruned.device)
                    tensors, lost = {}, None
                    if visit.folds:
                        layer = layers[visit.name]
                        weight, parts = effective_weight(visit.name, layer), blocks(layer)
                        found, lost = drops(visit.folds[0], by_block(weight, parts).flatten(1), ridge=RIDGE)
                        tensors["worth"] = whole(found, weight.shape, parts).float().cpu().contiguous()
                    elif visit.pairs and any(pair.dense.m2.any() for pair in visit.pairs):
                        lost = 1 - explained(visit.pairs)
                    journal.add(visit.name, tensors, {"damage": lost})
                    _note(needs, visit.name, tensors, {"damage": lost})
        for name, layer in layers.items():  # that these images never reach
            needs.damage.setdefault(name, 0.0)
            if worth:
                needs.worth.setdefault(name, torch.zeros(effective_weight(name, layer).shape))
        return needs

    @torch.no_grad()
    def dissimilarity(self, model: nn.Module, names: Iterable[str]) -> dict[str, float]:
        """1 - SSIM of each layer's feature maps in the two networks, a mean over images, channels and places, 0 to 1.

        Windows of 7 x 7 or what fits (Wang et al. 2004, equation 13); L is the range of the dense channel in a batch.
        """
        names = list(names)
        sums = torch.zeros(len(names), 2, dtype=torch.float64)
        with ExitStack() as stack:
            stack.enter_context(moved_to(self.device, [model, self.dense]))
            stack.enter_context(undisturbed([model, self.dense], self.seed))
            stack.enter_context(self.ranks.together())
            pruned, original = (Network(m, self.forward_fn, as_dtype(self.dtype)) for m in (model, self.dense))
            for batch in self.batches:
                wanted: dict[str, list[Tensor]] = {name: [] for name in names}

                def keep(name: str, x: Tensor, wanted: dict[str, list[Tensor]] = wanted) -> None:
                    wanted[name].append(x.clone())

                def compare(name: str, x: Tensor, wanted: dict[str, list[Tensor]] = wanted) -> None:
                    pruned.check_tensor(name, x)
                    if not wanted[name]:
                        raise ModelMismatchError(f"{called(name)} runs more often in the model than in the dense one")
                    similar = ssim(wanted[name].pop(0), x, pruned.axis(name))
                    sums[names.index(name)] += torch.tensor([float(similar.sum()), similar.numel()])

                with original.hooked(names, keep):
                    original.run(batch)
                with pruned.hooked(names, compare):
                    pruned.run(batch)
        total = self.ranks.add(sums)
        return {
            name: min(max(1 - float(found / count), 0.0), 1.0) if count else 0.0
            for name, (found, count) in zip(names, total, strict=True)
        }

    def sensitivity(
        self, names: Iterable[str], labelled: Iterable[tuple[Any, Tensor]], loss: Loss | None
    ) -> dict[str, Tensor]:
        """(dL/dw)^2 w^2 of the dense network, added up over the labelled batches (arXiv 2511.11675), in each shape.

        loss: of the model's output and the labels; None: cross-entropy. Raises CalibrationError, LayerError.
        """
        loss, layers = loss or F.cross_entropy, {name: find_layers(self.dense)[name] for name in names}
        found: dict[str, Tensor] = {}
        with moved_to(self.device, [self.dense]), undisturbed([self.dense], self.seed), self.ranks.together():
            net = Network(self.dense, self.forward_fn, as_dtype(self.dtype))
            leaves = {f"{n}.weight": stored_weight(n, m).detach().clone().requires_grad_() for n, m in layers.items()}
            squares = {name: torch.zeros_like(leaf, dtype=torch.float64) for name, leaf in leaves.items()}
            batches = 0
            for batch in labelled:
                if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[1], Tensor):
                    raise CalibrationError("labelled must give pairs of images and labels; each batch is (x, y)")
                with torch.enable_grad(), net.precision():
                    x = batch[0] if self.forward_fn else net.place(batch[0])
                    output = functional_call(_Runner(net), {f"model.{n}": leaf for n, leaf in leaves.items()}, (x,))
                    slopes = torch.autograd.grad(loss(output, batch[1].to(net.device)), list(leaves.values()))
                for square, slope in zip(squares.values(), slopes, strict=True):
                    square += slope.double().square()
                batches += 1
            if not self.ranks.total(batches)[0]:
                raise CalibrationError("labelled holds no batches; saliency 'gradient' needs some")
            for name, layer in layers.items():
                worth = self.ranks.add(squares[f"{name}.weight"]) * effective_weight(name, layer).double().square()
                found[name] = worth.cpu()
        return found

    @contextmanager
    def _side_by_side(self, model: nn.Module) -> Iterator[tuple[Walker, Batches]]:
        """The two networks, undisturbed and ready to be walked through, and the batches for it."""
        with ExitStack() as stack:
            stack.enter_context(moved_to(self.device, [model, self.dense]))
            stack.enter_context(undisturbed([model, self.dense], self.seed))
            stack.enter_context(self.ranks.together())
            pruned, dense = (Network(m, self.forward_fn, as_dtype(self.dtype)) for m in (model, self.dense))
            batches = Batches(self.batches)
            store = stack.enter_context(Store(parse_memory(self.memory, pruned.device), pruned.device, self.scratch))
            example = self.ranks.lend(pruned.example(batches[0]) if len(batches) else None)
            wiring = observe(model, lambda: pruned.run(example))
            yield Walker(pruned, dense, wiring, store, example), batches


class _Runner(nn.Module):
    """A network as a module, with its way to run a batch."""

    def __init__(self, net: Network) -> None:
        super().__init__()
        self.model, self.run = net.model, net.forward_fn

    def forward(self, x: Any) -> Any:
        return self.run(self.model, x) if self.run else self.model(x)


def _note(needs: Needs, name: str, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    needs.damage[name] = 0.0 if plain["damage"] is None else min(max(float(plain["damage"]), 0.0), 1.0)
    if "worth" in tensors:
        needs.worth[name] = tensors["worth"]


def ssim(wanted: Tensor, found: Tensor, axis: int) -> Tensor:
    """Structural similarity, float32, one for each window, image and channel (Wang et al. 2004, equation 13).

    wanted, found: of one shape, (N, C, H, W) or with other spatial axes, the channels on `axis`; without any, (N, C),
    the images are the places of one map. Windows of 7 along each spatial axis, or all of a shorter one; uniform
    weights, K1 = 0.01, K2 = 0.03, and L the range of the wanted channel.
    """
    x, y = (t.float().T[None] if t.dim() == 2 else t.float().movedim(axis, 1) for t in (wanted, found))
    places = [0, *range(2, x.dim())]
    spread = x.amax(places, keepdim=True) - x.amin(places, keepdim=True)
    pool: Any = {3: F.avg_pool1d, 4: F.avg_pool2d, 5: F.avg_pool3d}[x.dim()]

    def mean(t: Tensor) -> Tensor:
        return pool(t, [min(SSIM_WINDOW, size) for size in t.shape[2:]], stride=1)

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = (0.01 * spread).square(), (0.03 * spread).square()
    top, bottom = (2 * mx * my + c1) * (2 * cov + c2), (mx * mx + my * my + c1) * (vx + vy + c2)
    return torch.where(bottom > 0, top / bottom, 1.0)
