"""Train networks on CIFAR-10 in minutes, on one GPU (toy networks on a CPU): `python benchmarks/published/train.py`.

    python benchmarks/published/train.py --nets resnet18,resnet50 --output FOLDER --budget-seconds 420

SGD with Nesterov momentum, one rise and one fall of the learning rate, weight decay, label smoothing, random flips and
crops. The images stay on the device as uint8; a batch is cropped, flipped and normalised there. bf16 autocast on a GPU.
After every epoch the weights are written to NAME.safetensors, with the test accuracy as metadata, and a line is added
to train.jsonl. The same command continues a training that was stopped. Random numbers depend only on the seed and the
epoch, so on a CPU the result is bit-identical to that of an uninterrupted training.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in (".", "python")]  # this checkout

import resuscitate
from benchmarks.common.inputs import MEAN, STD, data_folder
from benchmarks.common.results import console
from benchmarks.networks import build
from benchmarks.networks.checkpoints import read_about, read_state, save_state, save_weights
from benchmarks.published.budget import Budget
from resuscitate.data.images import load_images, load_labels
from resuscitate.utils.files import atomic

PAD = 4


@dataclass(frozen=True)
class Recipe:
    """The settings that determine the result, together with the images."""

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    label_smoothing: float
    seed: int


@dataclass(frozen=True)
class Data:
    """Training images (N, 3, H, W) uint8 and labels (N,) on the device, and the accuracy on the test images."""

    images: Tensor
    labels: Tensor
    score: resuscitate.Accuracy


def decoded(path: Path, cache: Path) -> tuple[Tensor, Tensor]:
    """Images (N, 3, H, W) uint8 and labels (N,) int64 of an .npz; decoded once and cached in a folder."""
    kept = cache / f"{path.stem}-{path.stat().st_size}.npz"
    if not kept.exists():
        images = load_images(path, seed=None).mul_(255).round_().byte().numpy()
        with atomic(kept) as temporary, temporary.open("wb") as file:
            np.savez(file, images=images, labels=load_labels(path, seed=None).numpy())
    with np.load(kept) as arrays:
        return torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])


def normalise(images: Tensor) -> Tensor:
    """uint8 images to normalised float32 in channels_last, the input of the networks."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, STD))
    return images.float().div_(255).sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by up to `PAD` pixels, padded with black, and mirror half of them; in one gather."""
    count, channels, height, width = images.shape
    options: dict[str, Any] = {"generator": generator, "device": images.device}
    down, right = torch.randint(2 * PAD + 1, (2, count, 1), **options)
    mirrored = torch.randint(2, (count, 1), **options).bool()
    across = torch.arange(width, device=images.device)
    rows = down + torch.arange(height, device=images.device)
    columns = right + torch.where(mirrored, width - 1 - across, across)
    which, channel = (torch.arange(n, device=images.device) for n in (count, channels))
    padded = F.pad(images, (PAD,) * 4)
    return padded[which[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None]]


def learning_rate(progress: float, peak: float) -> float:
    """Linear rise to the peak over the first fifth of all steps, then linear fall to 0. progress: in (0, 1)."""
    return peak * min(progress / 0.2, (1 - progress) / 0.8)


def optimizer_of(model: nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.Optimizer:
    """SGD; weight decay for the weights, none for biases and BatchNorm."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=0.9, nesterov=True, fused=device.type == "cuda")


def run_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Data, recipe: Recipe, epoch: int
) -> tuple[float, float]:
    """Train for an epoch, without an incomplete last batch; returns mean loss and training accuracy in per cent."""
    device = data.images.device
    generator = torch.Generator(device).manual_seed(1000 * recipe.seed + epoch)
    order = torch.randperm(len(data.images), generator=generator, device=device)
    size = min(recipe.batch_size, len(order))
    steps, sums = len(order) // size, torch.zeros(2, device=device)
    model.train()
    for step, chosen in enumerate(order[: steps * size].split(size)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate((epoch * steps + step + 1) / (recipe.epochs * steps + 1), recipe.lr)
        x, y = normalise(augment(data.images[chosen], generator)), data.labels[chosen]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(x)
            loss = F.cross_entropy(logits, y, label_smoothing=recipe.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sums += torch.stack([loss.detach(), (logits.argmax(1) == y).float().mean()])
    loss_sum, right = sums.tolist()
    return loss_sum / steps, 100 * right / steps


def train(name: str, data: Data, recipe: Recipe, folder: Path, budget: Budget) -> bool:
    """Train one network from its state on disk until the budget is used up; True if the training is finished."""
    weights, pending, device = folder / f"{name}.safetensors", folder / f"{name}.pt", data.images.device
    about = read_about(weights)
    if about and json.loads(about["recipe"]) != asdict(recipe):
        sys.exit(f"{weights} was trained by another recipe, {about['recipe']}: choose another --output")
    torch.manual_seed(recipe.seed)
    model = build(name, int(data.labels.max()) + 1).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer, begun = optimizer_of(model, recipe, device), 0
    state = read_state(pending, device)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        begun = state["about"]["epoch"]
        if about.get("epoch") != str(begun):  # the process was killed between the two writes
            save_weights(model, weights, state["about"])
    elif about and int(about["epoch"]) == recipe.epochs:
        return True
    for epoch in range(begun, recipe.epochs):
        if not budget.another():
            return False
        started = time.perf_counter()
        loss, accuracy = run_epoch(model, optimizer, data, recipe, epoch)
        seconds = time.perf_counter() - started
        tested = data.score(model.eval())
        row = {"net": name, "epoch": epoch + 1, "loss": loss, "train": accuracy, "test": tested, "seconds": seconds}
        said = {"net": name, "epoch": epoch + 1, "accuracy": tested, "recipe": json.dumps(asdict(recipe))}
        save_state(pending, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "about": said})
        save_weights(model, weights, said)
        with (folder / "train.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
        console.print(f"{name}, epoch {epoch + 1}: loss {loss:.3f}, test {tested:.2f} %, {seconds:.1f} s")
    pending.unlink(missing_ok=True)
    return True


def main(
    output: Annotated[Path, typer.Option(help="Folder of the checkpoints.")],
    nets: Annotated[str, typer.Option(help="Which networks, by comma.")] = "resnet18,resnet50,densenet121,vgg16_bn",
    data: Annotated[Path | None, typer.Option(help="Folder of the images; else RESUSCITATE_DATA.")] = None,
    train_images: Annotated[Path | None, typer.Option(help="An .npz to train on, in place of CIFAR-10.")] = None,
    test_images: Annotated[Path | None, typer.Option(help="An .npz to test on, in place of CIFAR-10.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder of the decoded images; else the output.")] = None,
    budget_seconds: Annotated[float | None, typer.Option(help="Stop in time; at least one epoch is done.")] = None,
    epochs: int = 16,
    batch_size: int = 512,
    lr: Annotated[float, typer.Option(help="The highest learning rate.")] = 0.2,
    weight_decay: float = 5e-4,
    label_smoothing: float = 0.1,
    seed: int = 0,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Train the networks one after another."""
    budget, place = Budget(budget_seconds), torch.device(device)
    output.mkdir(parents=True, exist_ok=True)
    kept = cache or output
    kept.mkdir(parents=True, exist_ok=True)
    torch.backends.cudnn.benchmark = True
    given = {"train": train_images, "test": test_images}
    paths = [path or data_folder(data) / f"cifar10_jpeg_{part}.npz" for part, path in given.items()]
    (images, labels), (tested, truth) = ([t.to(place) for t in decoded(path, kept)] for path in paths)
    everything = Data(images, labels, resuscitate.Accuracy(normalise(tested), truth))
    recipe = Recipe(epochs, batch_size, lr, weight_decay, label_smoothing, seed)
    for name in nets.split(","):
        if not train(name, everything, recipe, output, budget):
            console.print(f"{name} is not finished: the same command goes on")
            return


if __name__ == "__main__":
    typer.run(main)
