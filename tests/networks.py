"""Small networks, each with one thing about its wiring that a repair can trip over."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

# trained networks and CIFAR-10 images, which are not in the repository
DATA = Path(os.environ.get("RESUSCITATE_DATA", Path(__file__).parents[1] / ".." / "shared" / "data"))


def seeded(build, seed: int = 0) -> nn.Module:
    """A network in eval mode with reproducible weights and BatchNorm statistics that are not the initial ones."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
                if module.affine:
                    nn.init.uniform_(module.weight, 0.5, 1.5)
                    nn.init.normal_(module.bias, 0, 0.2)
    return model.eval()


def pruned_copy(dense: nn.Module, sparsity: float = 0.6) -> nn.Module:
    """A deep copy with the smallest weights of every layer set to zero."""
    model = copy.deepcopy(dense)
    with torch.no_grad():
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.dim() > 1:
                order = weight.abs().flatten().argsort()[: int(sparsity * weight.numel())]
                weight[torch.unravel_index(order, weight.shape)] = 0
    return model


def images(count: int = 24, channels: int = 3, size: int = 9, seed: int = 1) -> Tensor:
    """Smooth random images, no two channels alike."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, channels, size, size, generator=generator)
    smooth = nn.functional.avg_pool2d(noise, 3, 1, 1)
    return smooth * torch.linspace(1, 2, channels).view(1, -1, 1, 1) + torch.linspace(-1, 1, channels).view(1, -1, 1, 1)


def chain(bias: bool = False, batchnorm: bool = True, width: int = 8) -> nn.Module:
    """conv, BatchNorm, ReLU three times over, then a linear head."""
    stages: list[nn.Module] = []
    for c_in, c_out in ((3, width), (width, width), (width, 2 * width)):
        stages += [nn.Conv2d(c_in, c_out, 3, padding=1, bias=bias)]
        stages += [nn.BatchNorm2d(c_out)] if batchnorm else []
        stages += [nn.ReLU(inplace=True)]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


def without_channels(dense: nn.Module, channels: list[int]) -> nn.Module:
    """A copy of a `chain` whose first layer has these channels alone."""
    small: nn.Module = copy.deepcopy(dense)
    first, norm, second = (small.get_submodule(name) for name in ("0", "1", "3"))
    first.weight, first.out_channels = nn.Parameter(first.weight[channels].detach()), len(channels)
    second.weight, second.in_channels = nn.Parameter(second.weight[:, channels].detach()), len(channels)
    norm.weight, norm.bias = (nn.Parameter(x[channels].detach()) for x in (norm.weight, norm.bias))
    norm.running_mean, norm.running_var = (x[channels].clone() for x in (norm.running_mean, norm.running_var))
    norm.num_features = len(channels)
    return small


def disturb(model: nn.Module, part: float) -> nn.Module:
    """Add noise to the weights and parameters of all layers and norms, in place: this part of their deviation."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += part * parameter.data.std() * torch.randn(parameter.shape, generator=generator)
    return model


def linears(rows: list[list[float]]) -> nn.Module:
    """A model of one bias-free linear layer for each list of weights."""
    model = nn.Sequential(*(nn.Linear(len(row), 1, bias=False) for row in rows))
    with torch.no_grad():
        for layer, row in zip(model, rows, strict=True):
            layer.weight.copy_(torch.tensor([row], dtype=torch.float32))
    return model


def depthwise():
    """Pairs of a depthwise and a pointwise convolution; the depthwise weights are the smaller ones."""
    stages = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()]
    for _ in range(2):
        stages += [nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16), nn.ReLU()]
        stages += [nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.ReLU()]
    model = nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.Conv2d) and layer.groups > 1:
                layer.weight *= 0.1
    return model


class Residual(nn.Module):
    """A residual block around a pre-activation BatchNorm that reads a sum, not a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn0(self.stem(x)).relu()
        x = self.bn2(x + self.conv2(self.bn1(self.conv1(x)).relu_()))
        return self.head(x.mean((2, 3)))


class Shared(nn.Module):
    """One convolution used twice, without a BatchNorm of its own."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 4, 1)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = self.conv(x).relu() * self.scale
        return self.last(self.conv(x).relu())


class Untraceable(nn.Module):
    """Control flow that depends on the data, which torch.fx cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.body = chain()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if x.abs().sum() > 0 else self.body(x + 1)


class Checking(nn.Module):
    """A check of shapes, as the networks of transformers have it: torch.fx cannot trace that either."""

    def __init__(self) -> None:
        super().__init__()
        self.body = chain()

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 3:
            raise ValueError(f"images need 3 channels, not {x.shape[1]}")
        return self.body(x)


class Zoo(nn.Module):
    """Conv1d, Conv3d, grouped, depthwise and transposed convolutions, an unused layer, a dict as output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.bn = nn.BatchNorm2d(12)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2, groups=2, bias=False)
        self.line = nn.Conv1d(6, 5, 3)
        self.volume = nn.Conv3d(1, 4, 2)
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.bn(self.depthwise(self.grouped(self.stem(x)).relu())).relu()
        x = self.up(x).relu()
        line = self.line(x.flatten(2)).relu()
        volume = self.volume(x[:, None, :, :4, :4]).relu()
        return {"logits": self.head(volume.mean((2, 3, 4))), "line": line}


class Shuffled(nn.Module):
    """Both halves of a split are read later, and one is changed in place: values that share memory across the walk."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.branch, self.bn_branch = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.head = nn.Conv2d(8, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        whole = self.bn(self.stem(x))
        left, right = whole.chunk(2, dim=1)
        left.relu_()
        right = self.bn_branch(self.branch(right))
        return self.head(torch.cat([left, right], 1) + whole)


class Dense(nn.Module):
    """A dense block: every convolution reads the concatenation of all before it, through a BatchNorm of that."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6 + 4 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(6 + 4 * i, 4, 3, padding=1, bias=False) for i in range(3))
        self.norm, self.head = nn.BatchNorm2d(18), nn.Linear(18, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(norm(torch.cat(features, 1)).relu()))
        return self.head(self.norm(torch.cat(features, 1)).relu().mean((2, 3)))


class Excited(nn.Module):
    """Squeeze-and-excite in nested residual blocks; one ReLU module in several places; a tuple as output."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.squeeze, self.excite = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x = self.relu(self.bn(self.stem(x)))
        y = self.relu(self.bn1(self.conv1(x)))
        y = y + self.bn2(self.conv2(y))
        gate = self.excite(self.relu(self.squeeze(y.mean((2, 3), keepdim=True)))).sigmoid()
        x = self.relu(x + y * gate)
        return self.head(x.mean((2, 3))), {"features": x}


class Positions(nn.Module):
    """Adds what a layer with a ReLU makes of each place's coordinates, which are a buffer."""

    def __init__(self):
        super().__init__()
        self.first, self.bias, self.last = nn.Conv2d(3, 6, 3), nn.Linear(2, 6), nn.Conv2d(6, 4, 1)
        self.register_buffer("places", torch.cartesian_prod(torch.linspace(-1, 1, 7), torch.linspace(-1, 1, 7)))

    def forward(self, x):
        x = self.first(x)
        return self.last((x + self.bias(self.places).relu().T.view(6, 7, 7)).relu())


class Functional(nn.Module):
    """A convolution called as a function, beside one that is a module."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.kernel = nn.Parameter(torch.randn(8, 8, 3, 3) / 9)
        self.conv = nn.Conv2d(8, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(nn.functional.conv2d(self.bn(self.stem(x)).relu(), self.kernel, padding=1).relu())


@dataclass
class Outputs:
    """What a network gives back, as an object that torch.utils._pytree does not know."""

    logits: Tensor
    features: Tensor


class Elaborate(nn.Module):
    """Options that nobody gives, read in a branch; a dataclass as output, with what a BatchNorm reads in it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv, self.head = nn.Conv2d(8, 8, 3, bias=False), nn.Linear(8, 5)

    def forward(self, x: Tensor, mask: Tensor | None = None, **options: bool) -> Outputs:
        features = self.stem(x)
        x = self.bn(features).relu()
        if mask is not None:
            x = x * mask
        x = self.conv(x, **options)
        return Outputs(self.head(x.mean((2, 3))), features)
