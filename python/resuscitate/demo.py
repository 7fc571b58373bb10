"""The demo: train a small network on real digits, prune it until it fails, and repair it with every method."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import asr_kernels as ak

from .errors import ResuscitateError
from .methods.batchnorm import EMA
from .models import digitnet
from .pruning.sparsify import sparsify
from .reports.plots import COLOURS, finish, open_figure
from .utils.progress import track
from .workflows.recoverability import Accuracy
from .workflows.repair import repair

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

SPARSITIES = (0.9, 0.95, 0.97)
MOMENTUM = EMA(batches=20, batch_size=64, momentum=0.1)
NO_REPAIR, BN_EXACT, BN_EMA = "no repair", "BN only, exact", "BN only, EMA"
# column -> options of `repair`; all are sequential, and those without recalibrate keep the dense BatchNorm statistics
METHODS: dict[str, dict[str, Any]] = {
    NO_REPAIR: {},
    BN_EXACT: {"method": "bn", "recalibrate": "exact"},
    BN_EMA: {"method": "bn", "recalibrate": MOMENTUM},
    "layer-wise": {"method": "layerwise"},
    "channel-wise": {"method": "channelwise"},
    "ASR": {"method": "asr"},
    "refit": {"method": "refit"},
}
# the figure shows the output variances of this layer, at this sparsity, before and after this repair
SHOWN_LAYER, SHOWN_SPARSITY, SHOWN_METHOD = "layer3.1.conv1", 0.97, "refit"


@dataclass
class Demo:
    """The results of the demo: test accuracies in per cent, and the variances of one layer.

    `dense` is the accuracy of the dense network, `accuracy` is {sparsity: {column: accuracy}}. `calibration` and
    `tested` count images. `variances` has the layer's per-channel output variances over the test images, in the
    "dense", the "pruned" and the "repaired" network.
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
            best = max(METHODS, key=lambda column: row[column])
            cells = (f"[bold]{row[name]:.1f}[/]" if name == best else f"{row[name]:.1f}" for name in METHODS)
            table.add_row(f"{sparsity:.0%}", *cells)
        yield f"Top-1 accuracy in per cent on {self.tested} held-out digits; dense: [bold]{self.dense:.1f}[/]\n"
        yield table
        yield (
            f"\nRepaired from {self.calibration} training images without labels. EMA: {MOMENTUM.batches} batches of "
            f"{MOMENTUM.batch_size}, momentum {MOMENTUM.momentum}.\nAll but the BatchNorm columns repair layer by "
            "layer and keep the dense BatchNorm statistics.\n"
        )
        yield from findings(self)
        yield f"\n{self.training_seconds:.1f} s of training, {self.seconds:.1f} s in all."


def findings(result: Demo) -> list[str]:
    """One or two sentences on the accuracies at the sparsity of the figure."""
    row = result.accuracy[SHOWN_SPARSITY]
    best, none, exact = max(row, key=lambda column: row[column]), row[NO_REPAIR], row[BN_EXACT]
    if best == NO_REPAIR:
        return [f"At {SHOWN_SPARSITY:.0%} sparsity no repair improves the accuracy."]
    strong = exact - none >= (result.dense - none) / 2
    return [
        f"At {SHOWN_SPARSITY:.0%} sparsity the network classifies {none:.1f} % correctly instead of "
        f"{result.dense:.1f}; the best repair, {best}, raises this to {row[best]:.1f}.",
        f"Exact BatchNorm statistics alone reach {exact:.1f}{', in itself a strong repair' if strong else ''}; "
        f"a momentum average over the same images reaches {row[BN_EMA]:.1f}.",
    ]


def run(seed: int = 0, epochs: int = 15, progress: bool | None = None) -> Demo:
    """Train `models.digitnet` on scikit-learn's digits, prune it, repair it with every method, and test the results.

    The test images are used only for testing. The same seed gives the same numbers on the same machine.
    progress: show a progress bar; None: if standard error is a terminal.
    Raises ResuscitateError where scikit-learn is missing.
    """
    started = time.perf_counter()
    images, labels = digits()
    with torch.random.fork_rng(devices=[]), ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # more threads gain little on so small a network, and lose on a busy machine
        torch.manual_seed(seed)
        training, held_out = torch.randperm(len(images)).tensor_split([MOMENTUM.images])
        dense = digitnet()
        train(dense, images[training], labels[training], epochs, progress)
        trained = time.perf_counter()
        test = images[held_out]
        score = Accuracy(test, labels[held_out])
        result = Demo(score(dense), len(training), len(test), training_seconds=trained - started)
        jobs = [(sparsity, column) for sparsity in SPARSITIES for column in METHODS]
        for sparsity, column in track(jobs, "pruning and repairing", len(jobs), progress):
            model = copy.deepcopy(dense)
            sparsify(model, sparsity)
            if column != NO_REPAIR:
                repair(model, dense, images[training], **METHODS[column], keep_worse=True, seed=seed, progress=False)
            result.accuracy.setdefault(sparsity, {})[column] = score(model)
            if sparsity == SHOWN_SPARSITY and column in (NO_REPAIR, SHOWN_METHOD):
                result.variances["pruned" if column == NO_REPAIR else "repaired"] = _variances(model, test)
        result.variances["dense"] = _variances(dense, test)
    result.seconds = time.perf_counter() - started
    return result


def digits() -> tuple[Tensor, Tensor]:
    """The 1,797 images (N, 1, 8, 8), 0..1, of handwritten digits in scikit-learn, and their labels."""
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
    """Train in place by SGD with a one-cycle rate. The weight decay is high, so that many weights become unimportant.

    `penalty`, a function of the fraction of the training that is done, is added to the loss.
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
    """The variance of each channel of the output of `SHOWN_LAYER`."""
    found: list[float] = []
    layer = model.get_submodule(SHOWN_LAYER)
    with layer.register_forward_hook(lambda module, args, out: found.extend(ak.channel_moments(out).var.tolist())):
        model(images)
    return found


def draw_demo(result: Demo, path: str | Path) -> None:
    """Accuracy by method and sparsity, and one layer's per-channel variance (log scale): dense, pruned, repaired.

    A channel that has no variance left has no mark. Raises ResuscitateError where matplotlib is missing, ValueError
    for a format (the path's suffix) that it does not know, OSError where nothing can be written.
    """
    with open_figure(path, 12, 5) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(4, 3))
        _accuracy_bars(left, result)
        _variance_dots(right, result)


def _accuracy_bars(axes: Any, result: Demo) -> None:
    width = 0.88 / len(METHODS)
    axes.axhline(result.dense, color="black", linestyle="--", linewidth=1, label=f"dense, {result.dense:.1f}")
    for place, (column, colour) in enumerate(zip(METHODS, COLOURS.values(), strict=True)):
        heights = [row[column] for row in result.accuracy.values()]
        offsets = [group + (place - (len(METHODS) - 1) / 2) * width for group in range(len(heights))]
        bars = axes.bar(offsets, heights, width * 0.94, color=colour, label=column)
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 1.2}  # the dense line must not strike a number out
        axes.bar_label(bars, fmt="%.0f", fontsize=8.5, padding=2, bbox=paper)
    axes.set_xticks(range(len(result.accuracy)), [f"{sparsity:.0%} sparsity" for sparsity in result.accuracy])
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(0, 109)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel(f"right, of {result.tested} held-out digits (%)")
    axes.set_title("Accuracy after pruning, by repair", loc="left", fontweight="bold")
    finish(axes, legend_columns=4)


def _variance_dots(axes: Any, result: Demo) -> None:
    order = sorted(range(len(result.variances["dense"])), key=lambda channel: -result.variances["dense"][channel])
    dense, pruned, repaired = (
        [result.variances[name][channel] for channel in order] for name in ("dense", "pruned", "repaired")
    )
    axes.set_yscale("log", nonpositive="mask")
    axes.vlines(range(len(order)), pruned, repaired, color="#D9D9D9", linewidth=0.8)
    axes.plot(dense, color="black", linewidth=1.8, label="dense")
    axes.plot(repaired, "D", color=COLOURS["blue"], markersize=3.4, label=f"repaired ({SHOWN_METHOD})")
    axes.plot(pruned, "o", color=COLOURS["vermilion"], markersize=3.4, label="pruned")
    axes.set_xlabel("channel, in the order of its dense variance")
    axes.set_ylabel("variance of the channel's output")
    axes.set_title(f"Signal in {SHOWN_LAYER}, {SHOWN_SPARSITY:.0%} sparsity", loc="left", fontweight="bold")
    axes.margins(x=0.02)
    finish(axes, legend_columns=3)
