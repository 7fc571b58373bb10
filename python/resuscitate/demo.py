"""The demonstration: a small network learns real digits, is pruned until it collapses, and comes back."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import asr_kernels as ak

from .errors import ResuscitateError
from .models import digitnet
from .pruning.sparsify import sparsify
from .utils.progress import track
from .workflows.recoverability import Accuracy
from .workflows.repair import repair

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

SPARSITIES = (0.9, 0.95, 0.97)
EMA: dict[str, Any] = {"ema_batches": 20, "ema_batch_size": 64, "ema_momentum": 0.1}
NO_REPAIR, BN_EXACT, BN_EMA = "no repair", "BN only, exact", "BN only, EMA"
# column -> options of `repair`; those without recalibrate keep the dense BatchNorm, and all are sequential
METHODS: dict[str, dict[str, Any]] = {
    NO_REPAIR: {},
    BN_EXACT: {"method": "bn", "recalibrate": "exact"},
    BN_EMA: {"method": "bn", "recalibrate": "ema", **EMA},
    "layer-wise": {"method": "layerwise"},
    "channel-wise": {"method": "channelwise"},
    "ASR": {"method": "asr"},
    "refit": {"method": "refit"},
}
# the picture shows the variances behind this layer, at this sparsity, before and after this repair
SHOWN_LAYER, SHOWN_SPARSITY, SHOWN_METHOD = "layer3.1.conv1", 0.97, "refit"


@dataclass
class Demo:
    """What came out: per cent of the test images right, {sparsity: {column: accuracy}}, and one layer's variances.

    `calibration` and `tested` count images, `variances` has the layer's per-channel variance over the test images of
    the "dense", the "pruned" and the "repaired" network.
    """

    dense: float
    calibration: int
    tested: int
    accuracy: dict[float, dict[str, float]] = field(default_factory=dict)
    variances: dict[str, list[float]] = field(default_factory=dict)
    training_seconds: float = 0.0
    seconds: float = 0.0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table

        table = Table("sparsity", box=None, header_style="bold")
        for column in METHODS:
            table.add_column(column.replace(", ", "\n"), justify="right", vertical="bottom")
        for sparsity, row in self.accuracy.items():
            cells = [f"{row[column]:.1f}" for column in METHODS]
            best = max(METHODS, key=lambda column: row[column])
            table.add_row(
                f"{sparsity:.0%}",
                *(f"[bold]{c}[/]" if name == best else c for c, name in zip(cells, METHODS, strict=True)),
            )
        yield f"Top-1 accuracy in per cent on {self.tested} held-out digits; dense: [bold]{self.dense:.1f}[/]\n"
        yield table
        yield (
            f"\nRepaired from {self.calibration} training images without labels. EMA: {EMA['ema_batches']} batches of "
            f"{EMA['ema_batch_size']}, momentum {EMA['ema_momentum']}.\nAll but the BatchNorm columns go from layer to "
            "layer and keep the dense BatchNorm statistics.\n"
        )
        yield from findings(self)
        yield f"\n{self.training_seconds:.1f} s of training, {self.seconds:.1f} s in all."


def findings(result: Demo) -> list[str]:
    """What the numbers show at the sparsity of the picture, in a sentence or two."""
    row = result.accuracy[SHOWN_SPARSITY]
    best, none, exact = max(row, key=lambda column: row[column]), row[NO_REPAIR], row[BN_EXACT]
    if best == NO_REPAIR:
        return [f"At {SHOWN_SPARSITY:.0%} sparsity no repair brings anything back."]
    strong = exact - none >= (result.dense - none) / 2
    return [
        f"At {SHOWN_SPARSITY:.0%} sparsity the network is right in {none:.1f} % of cases instead of "
        f"{result.dense:.1f}; the best repair, {best}, brings it to {row[best]:.1f}.",
        f"Exact BatchNorm statistics alone reach {exact:.1f}{', in itself a strong repair' if strong else ''}; "
        f"as a momentum average over the same images they reach {row[BN_EMA]:.1f}.",
    ]


def run(seed: int = 0, epochs: int = 15, progress: bool | None = None) -> Demo:
    """Train `models.digitnet` on scikit-learn's digits, prune it, repair it with every method, and test the results.

    The test images serve nothing but the test. The same seed gives the same numbers on the same machine.
    progress: show a progress bar; None: where standard error is a terminal.
    Raises ResuscitateError where scikit-learn is missing.
    """
    started = time.perf_counter()
    images, labels = digits()
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(seed)
        order = torch.randperm(len(images))
        count = EMA["ema_batches"] * EMA["ema_batch_size"]
        seen, held_out = order[:count], order[count:]
        dense = digitnet()
        train(dense, images[seen], labels[seen], epochs, progress)
        trained = time.perf_counter()
        test = images[held_out]
        score = Accuracy(test, labels[held_out])
        result = Demo(score(dense), len(seen), len(test), training_seconds=trained - started)
        jobs = [(sparsity, column) for sparsity in SPARSITIES for column in METHODS]
        for sparsity, column in track(jobs, "pruning and repairing", len(jobs), progress):
            model = copy.deepcopy(dense)
            sparsify(model, sparsity)
            if column != NO_REPAIR:
                repair(model, dense, images[seen], **METHODS[column], seed=seed, progress=False)
            result.accuracy.setdefault(sparsity, {})[column] = score(model)
            if sparsity == SHOWN_SPARSITY and column in (NO_REPAIR, SHOWN_METHOD):
                name = "pruned" if column == NO_REPAIR else "repaired"
                result.variances[name] = _variances(model, test)
        result.variances["dense"] = _variances(dense, test)
    result.seconds = time.perf_counter() - started
    return result


def digits() -> tuple[Tensor, Tensor]:
    """1,797 images (N, 1, 8, 8), 0..1, of handwritten digits, and their labels; they come with scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ResuscitateError("the demo needs scikit-learn's digits: pip install 'resuscitate[demo]'") from None
    digits = load_digits()
    return torch.from_numpy(digits.images).float()[:, None] / 16, torch.from_numpy(digits.target).long()


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epochs: int,
    progress: bool | None,
    penalty: Callable[[float], Tensor] | None = None,
) -> None:
    """SGD with a one-cycle rate. The weight decay is high, which leaves many weights that matter little.

    `penalty`, of the part of the training that is done, is added to the loss.
    """
    batch = 64
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, nesterov=True, weight_decay=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=epochs * len(images.split(batch)))
    model.train()
    for _ in track(range(epochs), "training", epochs, progress):
        for chosen in torch.randperm(len(images)).split(batch):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[chosen]), labels[chosen])
            loss = loss if penalty is None else loss + penalty(schedule.last_epoch / schedule.total_steps)
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def _variances(model: nn.Module, images: Tensor) -> list[float]:
    """The variance of every channel of the shown layer's output."""
    found: list[float] = []
    layer = model.get_submodule(SHOWN_LAYER)
    with layer.register_forward_hook(lambda module, args, out: found.extend(ak.channel_moments(out).var.tolist())):
        model(images)
    return found


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for a while: so small a network gains little from more, and on a busy machine loses much by them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
