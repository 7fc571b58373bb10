"""Networks whose channels hang together in many ways, and how to look at one from all sides."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.networks.resnet import resnet18
from resuscitate import Masks, models
from resuscitate.pruning.coupling import channel_groups, channel_masks
from tests.networks import (
    Dense,
    Excited,
    Residual,
    Shared,
    Untraceable,
    Zoo,
    chain,
    images,
    seeded,
)


class Wired(nn.Module):
    """Layers by name, and a function that wires them up."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.wiring = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs):
        return self.wiring(self, *inputs)


def conv(inputs, outputs, size=1, **options):
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


def projection():
    """A residual block whose shortcut is a strided 1x1 convolution."""

    def forward(net, x):
        x = net.bn(net.stem(x)).relu()
        branch = net.bn2(net.conv2(net.bn1(net.conv1(x)).relu()))
        return net.head((branch + net.bn3(net.shortcut(x))).relu().mean((2, 3)))

    return Wired(
        forward,
        stem=conv(3, 8, 3, bias=False),
        bn=nn.BatchNorm2d(8),
        conv1=conv(8, 12, 3, stride=2, bias=False),
        bn1=nn.BatchNorm2d(12),
        conv2=conv(12, 12, 3, bias=False),
        bn2=nn.BatchNorm2d(12),
        shortcut=conv(8, 12, stride=2, bias=False),
        bn3=nn.BatchNorm2d(12),
        head=nn.Linear(12, 5),
    )


def concatenated():
    """Two branches side by side, one of them read twice."""
    return Wired(
        lambda net, x: net.head(torch.cat([left := net.left(x).relu(), net.right(x), left], 1)),
        left=conv(3, 6, 3),
        right=conv(3, 4),
        head=conv(16, 3),
    )


def separable():
    """Depthwise convolutions, with a bias, between pointwise ones."""
    return nn.Sequential(
        conv(3, 8, 3),
        conv(8, 8, 3, groups=8),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        conv(8, 12),
        nn.PReLU(12),
        conv(12, 12, 3, groups=12, bias=False),
        nn.BatchNorm2d(12, affine=False),
        conv(12, 4),
    )


def grouped():
    """Convolutions in 2 and in 3 groups that read one another."""
    return nn.Sequential(conv(3, 12, 3), nn.ReLU(), conv(12, 12, 3, groups=2), conv(12, 18, 3, groups=3), conv(18, 4))


def flattened():
    """A convolution, flattened, read by a linear layer; each channel is 81 features."""
    return nn.Sequential(conv(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 81, 12), nn.ReLU(), nn.Linear(12, 4))


def transposed():
    """An encoder and a decoder with a skip connection."""

    def forward(net, x):
        deep = net.bn(net.down(x := net.stem(x).relu())).relu()
        return net.head(torch.cat([net.up(deep), x], 1).relu())

    return Wired(
        forward,
        stem=conv(3, 6, 3),
        down=nn.Conv2d(6, 10, 3, 3),
        bn=nn.BatchNorm2d(10),
        up=nn.ConvTranspose2d(10, 8, 3, 3),
        head=conv(14, 3),
    )


def line():
    return Wired(
        lambda net, x: net.head(net.conv2(net.bn(net.conv1(x.flatten(2))).relu()).relu().flatten(1)),
        conv1=nn.Conv1d(3, 8, 3),
        bn=nn.BatchNorm1d(8),
        conv2=nn.Conv1d(8, 6, 3),
        head=nn.Linear(6 * 77, 4),
    )


def volume():
    return Wired(
        lambda net, x: net.head(net.conv2(net.conv1(x[:, :, None].expand(-1, -1, 3, -1, -1)).relu()).mean((2, 3, 4))),
        conv1=nn.Conv3d(3, 8, 3),
        conv2=nn.Conv3d(8, 6, 1),
        head=nn.Linear(6, 4),
    )


def swapped():
    """The halves of the channels change places in a residual sum."""

    def forward(net, x):
        left, right = (whole := net.stem(x).relu()).chunk(2, 1)
        return net.head(torch.cat([right, left], 1) + whole)

    return Wired(forward, stem=conv(3, 8), head=conv(8, 2))


def pixels():
    """A pixel shuffle, which makes one channel of four."""
    return nn.Sequential(conv(3, 8), nn.PixelShuffle(2), conv(2, 2))


def rectified():
    """Both signs of each channel, and both its mean and its largest value."""

    def forward(net, x):
        x = net.mid(torch.cat([(x := net.stem(x)).relu(), (-x).relu()], 1))
        return net.head(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1))

    return Wired(forward, stem=conv(3, 8), mid=conv(16, 6), head=nn.Linear(12, 2))


def half_groups():
    """Each of two layers produces the channels of one group of a convolution."""
    return Wired(
        lambda net, x: net.head(net.mid(torch.cat([net.left(x), net.right(x)], 1))),
        left=conv(3, 4),
        right=conv(3, 4),
        mid=conv(8, 8, groups=2),
        head=conv(8, 2),
    )


def nearly_depthwise():
    """One output channel in each group, and two input channels."""
    return nn.Sequential(conv(3, 8), conv(8, 4, groups=4), conv(4, 2))


def small_resnet18():
    return resnet18(small=True, width=8, classes=10)


NETWORKS = [
    *(chain, Residual, Untraceable, Zoo, Dense, Excited, projection, concatenated, separable, grouped, flattened),
    *(transposed, line, volume, models.resnet20, small_resnet18),
    *(Shared, swapped, pixels, rectified, half_groups, nearly_depthwise),
]
networks = pytest.mark.parametrize("build", NETWORKS, ids=lambda build: build.__name__)


def outputs(model, x):
    with torch.no_grad():
        return torch.utils._pytree.tree_leaves(model(x))


def largest_difference(a, b):
    return max(float((x - y).abs().max() / x.abs().max()) for x, y in zip(a, b, strict=True))


def counts(model):
    """Elements of the tensors in its state that are parameters, and operations for one image."""
    names = dict(model.named_parameters())
    with FlopCounterMode(display=False) as counter:
        outputs(model, images(1))
    return sum(t.numel() for name, t in model.state_dict().items() if name in names), counter.get_total_flops()


def choose(groups, fraction=0.5, seed=0):
    """Some units of each group at random, at least one to go and one to stay."""
    generator = torch.Generator().manual_seed(seed)
    chosen = {}
    for group in groups:
        count = min(max(round(fraction * group.units), 1), group.units - 1)
        chosen[group.name] = torch.randperm(group.units, generator=generator) < count
    return chosen


def masked(build, fraction=0.5, seed=0):
    """A network with masks of whole channels in place: the model, the groups, what is dropped, the masks."""
    model = seeded(build, seed)
    groups = channel_groups(model, images(2))
    dropped = choose(groups, fraction, seed)
    masks = Masks(channel_masks(model, groups, dropped))
    masks.apply_(model)
    return model, groups, dropped, masks


def everything(model):
    """All that a failed call must leave alone: tensors, the objects that hold them, sizes, flags."""
    return {
        name: (
            {
                key: (id(t), t.detach().clone(), t.requires_grad)
                for key, t in module._parameters.items()
                if t is not None
            },
            {key: (id(t), t.clone()) for key, t in module._buffers.items() if t is not None},
            {key: value for key, value in vars(module).items() if isinstance(value, int | bool | tuple | str)},
            (len(module._forward_hooks), len(module._forward_pre_hooks)),
        )
        for name, module in model.named_modules()
    }


def unchanged(before, after):
    def same(a, b):
        if isinstance(a, torch.Tensor):
            return torch.equal(a, b)
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        if isinstance(a, tuple):
            return len(a) == len(b) and all(map(same, a, b))
        return a == b

    return same(before, after)
