"""Whole channels: which go together, which are left alone, and a smaller network that computes the same."""

import copy
import logging
import random
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("torch_pruning")

from resuscitate import Masks, models
from resuscitate.errors import LayerError, MaskError, ResuscitateError
from resuscitate.sparsify import structured
from resuscitate.sparsify.structured import channel_groups, channel_masks, shrink
from tests.networks import (
    Dense,
    Excited,
    Functional,
    Residual,
    Shared,
    Shuffled,
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


def resnet18():
    folder = Path(__file__).parents[2] / "benchmarks"
    sys.path.insert(0, str(folder))
    try:
        zoo = pytest.importorskip("zoo.resnet")
    finally:
        sys.path.remove(str(folder))
    return zoo.resnet18(small=True, width=8, classes=10)


NETWORKS = [
    *(chain, Residual, Untraceable, Zoo, Dense, Excited, projection, concatenated, separable, grouped, flattened),
    *(transposed, line, volume, models.resnet20, resnet18),
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


class TestGroups:
    @networks
    def test_every_table_has_a_row_for_each_unit_and_every_channel_of_a_maker_once(self, build):
        model = seeded(build)
        groups = channel_groups(model, images(2))
        order = [name for name, _ in model.named_modules()]
        assert groups
        assert [g.name for g in groups] == sorted((g.name for g in groups), key=order.index)
        for group in groups:
            assert group.name == min(group.makers, key=order.index)
            for table in (*group.makers.values(), *group.readers.values(), *group.norms.values()):
                assert table.dtype == torch.int64
                assert len(table) == group.units > 1
                assert table.unique().numel() == table.numel()
            for name, table in group.makers.items():
                layer = model.get_submodule(name)
                channels = layer.out_channels if hasattr(layer, "out_channels") else layer.out_features
                assert sorted(table.flatten().tolist()) == list(range(channels))

    @pytest.mark.parametrize(
        ("build", "makers", "readers"),
        [
            (Residual, {"stem": 1, "conv2": 1}, {"conv1": 1, "head": 1}),
            (projection, {"stem": 1}, {"conv1": 1, "shortcut": 1}),
            (concatenated, {"left": 1}, {"head": 2}),
            (separable, {"0": 1, "1": 1}, {"1": 1, "4": 1}),
            (grouped, {"0": 2}, {"2": 2}),
            (flattened, {"0": 1}, {"3": 81}),
            (line, {"conv1": 1}, {"conv2": 1}),
            (Dense, {"stem": 1}, {"convs.0": 1, "convs.1": 1, "convs.2": 1, "head": 1}),
        ],
        ids=lambda value: value.__name__ if callable(value) else "",
    )
    def test_the_first_group_has_these_makers_and_readers(self, build, makers, readers):
        group = channel_groups(seeded(build), images(2))[0]
        assert {name: table.shape[1] for name, table in group.makers.items()} == makers
        assert {name: table.shape[1] for name, table in group.readers.items()} == readers

    def test_both_ends_of_a_residual_connection_with_a_projection_are_one_group(self):
        groups = {group.name: group for group in channel_groups(seeded(projection), images(2))}
        assert set(groups["conv2"].makers) == {"conv2", "shortcut"}

    def test_a_concatenation_shifts_the_channels_that_readers_and_batchnorms_see(self):
        groups = {group.name: group for group in channel_groups(seeded(Dense), images(2))}
        assert groups["convs.1"].readers["head"].flatten().tolist() == [10, 11, 12, 13]
        assert groups["convs.1"].norms["norm"].flatten().tolist() == [10, 11, 12, 13]

    def test_a_channel_that_is_flattened_is_read_by_all_its_pixels(self):
        group = channel_groups(seeded(flattened), images(2))[0]
        assert torch.equal(group.readers["3"], torch.arange(8 * 81).view(8, 81))

    def test_few_channels_may_lie_far_back_in_what_a_grouped_convolution_reads(self):
        model = seeded(
            lambda: Wired(
                lambda net, x: net.head(net.mid(torch.cat([net.a(x), y := net.b(x), net.a(x), y], 1))),
                a=conv(3, 14),
                b=conv(3, 2),
                mid=conv(32, 4, groups=2),
                head=conv(4, 2),
            )
        )
        groups = {group.name: group for group in channel_groups(model, images(2))}
        assert groups["b"].readers["mid"].tolist() == [[14, 30], [15, 31]]

    def test_the_same_place_in_all_groups_of_a_convolution_is_one_unit(self):
        first, second, third = channel_groups(seeded(grouped), images(2))
        assert first.makers["0"].tolist() == [[i, i + 6] for i in range(6)]
        # made in 2 groups of 6 and read in 3 groups of 4: both ties at once
        assert second.makers["2"].tolist() == [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]]
        assert third.makers["3"].tolist() == [[i, i + 6, i + 12] for i in range(6)]

    @networks
    def test_no_output_of_the_network_is_in_a_group(self, build):
        model = seeded(build)
        before = [tuple(x.shape) for x in outputs(model, images(2))]
        model, _, _, masks = masked(build, 0.9)
        shrink(model, masks, images(2))
        assert [tuple(x.shape) for x in outputs(model, images(2))] == before

    def test_only_groups_whose_makers_are_all_selected_are_offered(self):
        model = seeded(Residual)
        assert [g.name for g in channel_groups(model, images(2), exclude="conv2")] == ["conv1"]
        assert [g.name for g in channel_groups(model, images(2), include=["stem", "conv2"])] == ["stem"]
        with pytest.raises(ValueError, match="selects no layer"):
            channel_groups(model, images(2), include="nothing")

    def test_a_single_image_and_several_inputs_will_do(self):
        two = Wired(
            lambda net, x, y: net.head(torch.cat([net.a(x).relu(), net.b(y)], 1)),
            a=conv(3, 4),
            b=conv(3, 5),
            head=conv(9, 2),
        )
        model, example = seeded(lambda: two), (images(1), images(1, seed=2))
        groups = channel_groups(model, example)
        assert {group.name: group.units for group in groups} == {"a": 4, "b": 5}
        masks = Masks(channel_masks(model, groups, choose(groups)))
        masks.apply_(model)
        expected = model(*example)
        assert sum(shrink(model, masks, example).removed.values()) == 4
        torch.testing.assert_close(model(*example), expected)


def swapped(net, x):
    left, right = (whole := net.stem(x).relu()).chunk(2, 1)
    return net.head(torch.cat([right, left], 1) + whole)


def shuffled(net, x):
    n, c, h, w = (x := net.stem(x).relu()).shape
    return net.head(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


def attended(net, x):
    x = net.stem(x).relu()
    return net.head(x * net.gate(x.mean(1, keepdim=True)).sigmoid())


LEFT_ALONE = {
    "option A, zero channels padded": (models.resnet20, "conv1", "as many channels"),
    "a layer that runs twice": (Shared, "stem", "runs more than once"),
    "a layer used as a function too": (
        lambda: Wired(
            lambda net, x: net.head(nn.functional.conv2d(net.mid(net.stem(x).relu()).relu(), net.mid.weight)),
            stem=conv(3, 8),
            mid=conv(8, 8),
            head=conv(8, 4),
        ),
        "stem",
        "does not run without",
    ),
    "a tied weight": (
        lambda: nn.Sequential(conv(3, 8), a := conv(8, 8), b := conv(8, 8), conv(8, 2)).apply(
            lambda module: setattr(b, "weight", a.weight) if module is b else None
        ),
        "0",
        "shares a parameter",
    ),
    "a parameter of its own": (Functional, "stem", "parameter outside"),
    "the output": (Excited, "stem", "reach the model's output"),
    "an output that was detached": (
        lambda: Wired(lambda net, x: (net.head(y := net.stem(x)), y.detach().relu()), stem=conv(3, 8), head=conv(8, 2)),
        "stem",
        "does not see",
    ),
    "the network's input": (
        lambda: Wired(lambda net, x: net.head(x + net.stem(x)), stem=conv(3, 3), head=conv(3, 2)),
        "stem",
        "does not run without",
    ),
    "GroupNorm": (
        lambda: nn.Sequential(conv(3, 8), nn.GroupNorm(2, 8), conv(8, 2)),
        "0",
        "does not see",
    ),
    "a size in the code": (
        lambda: Wired(
            lambda net, x: net.head(net.stem(x).mean((2, 3)).view(-1, 8)), stem=conv(3, 8), head=nn.Linear(8, 2)
        ),
        "stem",
        "does not run without",
    ),
    "halves that change places": (lambda: Wired(swapped, stem=conv(3, 8), head=conv(8, 2)), "stem", "loses track"),
    "shuffled channels": (lambda: Wired(shuffled, stem=conv(3, 8), head=conv(8, 2)), "stem", "does not see"),
    "a mean over channels": (
        lambda: Wired(attended, stem=conv(3, 8), gate=conv(1, 1), head=conv(8, 2)),
        "stem",
        "as many channels",
    ),
    "a pixel shuffle": (lambda: nn.Sequential(conv(3, 8), nn.PixelShuffle(2), conv(2, 2)), "0", "as many channels"),
    "a grouped transposed convolution": (Zoo, "grouped", "grouped transposed"),
    "half a convolution's groups": (
        lambda: Wired(
            lambda net, x: net.head(net.mid(torch.cat([net.left(x), net.right(x)], 1))),
            left=conv(3, 4),
            right=conv(3, 4),
            mid=conv(8, 8, groups=2),
            head=conv(8, 2),
        ),
        "left",
        "would differ in size",
    ),
    "nearly depthwise": (lambda: nn.Sequential(conv(3, 8), conv(8, 4, groups=4), conv(4, 2)), "0", "depthwise"),
    "one unit only": (lambda: nn.Sequential(conv(3, 4), conv(4, 8, groups=4), conv(8, 2)), "0", "one unit"),
    "an unused layer": (Zoo, "unused", "does not see it run"),
    "a parametrised weight": (
        lambda: nn.Sequential(conv(3, 8), nn.utils.parametrizations.weight_norm(conv(8, 8)), conv(8, 2)),
        "0",
        "recomputed",
    ),
}


class TestLeftAlone:
    @pytest.mark.parametrize(("build", "name", "reason"), LEFT_ALONE.values(), ids=LEFT_ALONE)
    def test_what_torch_pruning_gets_wrong_stays_and_the_log_says_why(self, build, name, reason, caplog):
        with caplog.at_level(logging.INFO, "resuscitate"):
            groups = channel_groups(seeded(build), images(2))
        assert name not in {maker for group in groups for maker in group.makers}
        [line] = [r.getMessage() for r in caplog.records if r.getMessage().startswith(f"channels of {name!r} stay: ")]
        assert reason in line

    def test_one_bad_group_does_not_take_the_good_ones_with_it(self):
        model = seeded(lambda: nn.Sequential(conv(3, 8), nn.GroupNorm(2, 8), conv(8, 6), nn.ReLU(), conv(6, 2)))
        assert [group.name for group in channel_groups(model, images(2))] == ["2"]

    def test_a_network_that_autograd_cannot_follow_is_refused(self):
        with pytest.raises(ResuscitateError, match="cannot trace"):
            channel_groups(seeded(Shuffled), images(2))

    def test_an_error_of_the_model_itself_comes_out_as_it_is(self):
        with pytest.raises(RuntimeError, match="to have 3 channels"):
            channel_groups(seeded(chain), images(2, channels=4))


class TestMasks:
    def test_rows_of_makers_and_columns_of_readers_are_false(self):
        model = seeded(concatenated)
        groups = channel_groups(model, images(2))
        masks = channel_masks(model, groups, {"left": torch.tensor([True] + [False] * 5)})
        assert list(masks) == ["left", "right", "head"]
        assert {name: mask.shape for name, mask in masks.items()} == {
            name: model.get_submodule(name).weight.shape for name in masks
        }
        assert (~masks["left"]).nonzero()[:, 0].unique().tolist() == [0]
        assert (~masks["left"]).sum() == 27
        assert masks["right"].all()
        assert (~masks["head"]).nonzero()[:, 1].unique().tolist() == [0, 10]
        assert (~masks["head"]).sum() == 6

    @pytest.mark.parametrize(
        ("build", "group", "layer", "rows", "columns"),
        [
            (transposed, "up", "up", [], [0]),
            (transposed, "down", "up", [0], []),
            (grouped, "0", "2", [], [0]),
            (grouped, "2", "2", [0, 2, 4, 6, 8, 10], []),
            (separable, "0", "1", [0], []),
        ],
    )
    def test_channel_axes_of_transposed_grouped_and_depthwise_convolutions(self, build, group, layer, rows, columns):
        model = seeded(build)
        groups = {g.name: g for g in channel_groups(model, images(2))}
        first = torch.arange(groups[group].units) == 0
        mask = channel_masks(model, groups.values(), {group: first})[layer]
        expected = torch.ones_like(mask)
        expected[rows] = False
        expected[:, columns] = False
        assert torch.equal(mask, expected)

    @networks
    def test_a_masked_network_does_not_depend_on_what_dropped_channels_were(self, build):
        model, groups, dropped, _ = masked(build)
        expected = outputs(model, images(3))
        with torch.no_grad():
            for group in groups:
                for name, table in group.norms.items():
                    norm, gone = model.get_submodule(name), table[dropped[group.name]].flatten()
                    norm.running_mean[gone] += 1
        assert largest_difference(expected, outputs(model, images(3))) == 0

    @pytest.mark.parametrize(
        "dropped",
        [{"4": torch.zeros(8, dtype=torch.bool)}, {"0": torch.zeros(7, dtype=torch.bool)}, {"0": torch.zeros(8)}],
        ids=["unknown group", "wrong size", "not boolean"],
    )
    def test_what_does_not_fit_the_groups_is_refused(self, dropped):
        model = seeded(chain)
        with pytest.raises(ValueError, match="dropped"):
            channel_masks(model, channel_groups(model, images(2)), dropped)


class TestShrink:
    @pytest.mark.parametrize("fraction", [0.3, 0.9])
    @networks
    def test_the_small_network_computes_what_the_masked_one_did(self, build, fraction):
        model, _, dropped, masks = masked(build, fraction)
        x = images(4, seed=7)
        expected = outputs(model, x)
        found = shrink(model, masks, images(2))
        assert found.removed == {name: int(gone.sum()) for name, gone in dropped.items()}
        # rounding: sums in another order, through up to twenty layers
        assert largest_difference(expected, outputs(model, x)) < 1e-5
        assert found.error < 1e-5

    @networks
    def test_parameters_and_flops_are_those_of_the_networks_before_and_after(self, build):
        model, _, _, masks = masked(build)
        parameters, flops = counts(model)
        found = shrink(model, masks, images(2))
        fewer_parameters, fewer_flops = counts(model)
        assert found.parameters == (parameters, fewer_parameters)
        assert found.flops == (flops, fewer_flops)
        assert fewer_parameters < parameters
        assert fewer_flops < flops

    def test_counts_of_a_chain_by_hand(self):
        model = seeded(lambda: nn.Sequential(conv(3, 8, 3), nn.ReLU(), conv(8, 4)))
        [group] = channel_groups(model, images(2))
        masks = Masks(channel_masks(model, [group], {"0": torch.arange(8) < 6}))
        masks.apply_(model)
        found = shrink(model, masks, images(2))
        assert found.parameters == (8 * 28 + 4 * 9, 2 * 28 + 4 * 3)
        assert found.flops == (2 * 81 * (8 * 27 + 4 * 8), 2 * 81 * (2 * 27 + 4 * 2))

    @networks
    def test_what_is_kept_leads_back_to_the_original_weights(self, build):
        model, _, _, masks = masked(build)
        before = copy.deepcopy(model)
        found = shrink(model, masks, images(2))
        for name, module in model.named_modules():
            old = before.get_submodule(name)
            changed = getattr(old, "weight", None) is not None and old.weight.shape != module.weight.shape
            if changed and not isinstance(module, nn.PReLU):
                assert name in found.kept or name in found.kept_inputs
            plain = getattr(module, "groups", 1) == 1 and not isinstance(module, nn.ConvTranspose2d)
            if changed and plain and not isinstance(module, nn.PReLU):
                weight = old.weight[found.kept.get(name, slice(None))]
                if name in found.kept_inputs:
                    weight = weight[:, found.kept_inputs[name]]
                assert torch.equal(weight, module.weight)
            if name in found.kept and getattr(module, "bias", None) is not None:
                assert torch.equal(old.bias[found.kept[name]], module.bias)
            if name in found.kept and getattr(module, "running_mean", None) is not None:
                assert torch.equal(old.running_mean[found.kept[name]], module.running_mean)

    @networks
    def test_sizes_that_modules_state_are_those_of_their_tensors(self, build):
        model, _, _, masks = masked(build)
        shrink(model, masks, images(2))
        for module in model.modules():
            if isinstance(module, nn.ConvTranspose2d):
                assert module.weight.shape[:2] == (module.in_channels, module.out_channels // module.groups)
            elif isinstance(module, nn.modules.conv._ConvNd):
                assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
                assert module.out_channels % module.groups == module.in_channels % module.groups == 0
            elif isinstance(module, nn.Linear):
                assert module.weight.shape == (module.out_features, module.in_features)
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                assert len(module.running_mean) == len(module.running_var) == module.num_features

    @networks
    def test_the_last_unit_of_a_group_stays(self, build):
        model = seeded(build)
        groups = channel_groups(model, images(2))
        masks = Masks(channel_masks(model, groups, {g.name: torch.ones(g.units, dtype=torch.bool) for g in groups}))
        masks.apply_(model)
        expected = outputs(model, images(2))
        found = shrink(model, masks, images(2))
        assert {name: 1 + count for name, count in found.removed.items()} == {g.name: g.units for g in groups}
        assert any("one stays" in note for note in found.notes)
        assert largest_difference(expected, outputs(model, images(2))) < 1e-5

    def test_once_more_removes_nothing_and_a_second_round_removes_more(self):
        model, _, _, masks = masked(projection)
        shrink(model, masks, images(2))
        groups = channel_groups(model, images(2))
        again = shrink(model, channel_masks(model, groups, {}), images(2))
        assert again.removed == {}
        assert again.parameters[0] == again.parameters[1]
        masks = Masks(channel_masks(model, groups, choose(groups)))
        masks.apply_(model)
        assert sum(shrink(model, masks, images(2)).removed.values()) > 0

    def test_a_network_can_be_trained_once_it_is_small(self):
        model, _, _, masks = masked(Residual)
        shrink(model, masks, images(2))
        model.train()
        model(images(4)).sum().backward()
        assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


class TestWhatStays:
    def test_masked_rows_with_live_readers_stay_and_are_counted(self):
        model = seeded(lambda: chain(bias=True))
        groups = channel_groups(model, images(2))
        masks = channel_masks(model, groups, {"0": torch.arange(8) < 3})
        masks["3"].fill_(True)
        Masks(masks).apply_(model)
        before = everything(model)
        found = shrink(model, masks, images(2))
        assert found.removed == {}
        assert any("3 units of '0' are masked but still read" in note for note in found.notes)
        assert unchanged(before, everything(model))

    def test_a_layer_without_a_mask_is_dense(self):
        model, _, _, masks = masked(chain)
        found = shrink(model, {name: mask for name, mask in masks.items() if name != "11"}, images(2))
        assert set(found.removed) == {"0", "3"}

    def test_unstructured_masks_remove_nothing_and_leave_the_model_alone(self):
        model = seeded(chain)
        masks = Masks({"3": torch.rand(8, 8, 3, 3) < 0.5})
        masks.apply_(model)
        before = everything(model)
        found = shrink(model, masks, images(2))
        assert found.removed == found.kept == found.kept_inputs == {}
        assert found.error == 0
        assert any("nothing to remove" in note for note in found.notes)
        assert unchanged(before, everything(model))

    def test_masked_channels_that_are_in_no_group_are_in_the_notes(self):
        model = seeded(models.resnet20)
        mask = torch.ones_like(model.conv1.weight, dtype=torch.bool)
        mask[0] = False
        masks = Masks({"conv1": mask})
        masks.apply_(model)
        notes = shrink(model, masks, images(2)).notes
        assert any(note.startswith("channels of 'conv1' stay: ") for note in notes)


class TestLeavesNoTrace:
    def call(self, which, model):
        groups = channel_groups(model, images(2))
        masks = channel_masks(model, groups, choose(groups))
        if which == "shrink":
            Masks(masks).apply_(model)
            shrink(model, masks, images(2))

    @pytest.mark.parametrize("build", [Residual, Zoo, models.resnet20], ids=lambda build: build.__name__)
    def test_looking_for_groups_changes_nothing(self, build, capsys):
        model = seeded(build).train()
        before = everything(model)
        self.call("groups", model)
        assert unchanged(before, everything(model))
        assert all(p.grad is None for p in model.parameters())
        assert capsys.readouterr() == ("", "")

    @pytest.mark.parametrize("which", ["groups", "shrink"])
    def test_flags_hooks_requires_grad_and_random_state_are_as_before(self, which, capsys):
        model = seeded(Residual).train()
        model.bn1.eval()
        model.conv1.weight.requires_grad_(False)
        flags = [module.training for module in model.modules()]
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        torch.manual_seed(3), random.seed(3)
        state = torch.get_rng_state(), random.getstate()
        self.call(which, model)
        assert [module.training for module in model.modules()] == flags
        assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
        assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["conv1.weight"]
        assert all(p.grad is None and p.is_leaf for p in model.parameters())
        assert torch.equal(torch.get_rng_state(), state[0])
        assert random.getstate() == state[1]
        assert torch.is_grad_enabled()
        assert capsys.readouterr() == ("", "")

    def test_what_a_forward_pass_counts_in_the_model_is_as_before(self):
        def forward(net, x):
            net.passes += 1
            return net.head(net.stem(x).relu())

        model = seeded(lambda: Wired(forward, stem=conv(3, 8), head=conv(8, 2)))
        model.passes = 0
        self.call("shrink", model)
        assert model.stem.out_channels == 4
        assert model.passes == 0

    def test_frozen_models_and_no_grad_will_do(self):
        model = seeded(Residual).requires_grad_(False)
        with torch.no_grad():
            self.call("shrink", model)
        assert not any(p.requires_grad for p in model.parameters())
        assert model.stem.out_channels < 8

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
    def test_dtype_is_kept(self, dtype):
        model = seeded(Residual).to(dtype)
        self.call("shrink", model)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert model.bn1.running_mean.dtype == dtype
        assert model.stem.out_channels < 8

    def test_memory_format_is_kept(self):
        model = seeded(Residual).to(memory_format=torch.channels_last)
        self.call("shrink", model)
        assert model.conv1.weight.shape[:2] == (4, 4)
        assert model.conv1.weight.is_contiguous(memory_format=torch.channels_last)
        assert not model.conv1.weight.is_contiguous()

    def test_modules_and_state_dict_keys_stay_and_the_file_can_be_read_back(self, tmp_path):
        model, _, _, masks = masked(projection)
        modules, keys = dict(model.named_modules()), list(model.state_dict())
        shrink(model, masks, images(2))
        assert all(module is modules[name] for name, module in model.named_modules())
        assert list(model.state_dict()) == keys
        torch.save(model.state_dict(), tmp_path / "small.pt")
        expected = outputs(model, images(2))
        other, _, _, masks = masked(projection)
        shrink(other, masks, images(2))
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        other.load_state_dict(torch.load(tmp_path / "small.pt"))
        assert largest_difference(expected, outputs(other, images(2))) == 0


class TestAllOrNothing:
    @pytest.mark.parametrize("where", ["surgery", "comparison", "adoption"])
    def test_a_failure_on_the_way_leaves_every_tensor_and_size_as_it_was(self, where, monkeypatch):
        model, _, _, masks = masked(projection)
        before = everything(model)
        function = {"surgery": "_remove", "comparison": "_flops", "adoption": "_survivors"}[where]
        original, surveying = getattr(structured, function), structured._survey

        def fail(*args):
            original(*args)
            raise RuntimeError("injected")

        def survey_then_break(*args):
            found = surveying(*args)
            monkeypatch.setattr(structured, function, fail)
            return found

        monkeypatch.setattr(structured, "_survey", survey_then_break)
        with pytest.raises((ResuscitateError, RuntimeError), match="injected"):
            shrink(model, masks, images(2))
        assert unchanged(before, everything(model))

    def test_outputs_that_differ_by_more_than_the_tolerance_are_refused(self):
        model, _, _, masks = masked(chain)
        before = everything(model)
        with pytest.raises(ResuscitateError, match=r"0, 3, 6 .* more than tolerance=-1"):
            shrink(model, masks, images(2), tolerance=-1)
        assert unchanged(before, everything(model))

    def test_zeros_that_are_not_in_the_model_are_refused(self):
        model = seeded(chain)
        groups = channel_groups(model, images(2))
        with pytest.raises(MaskError, match=r"layer '0'.*apply_"):
            shrink(model, channel_masks(model, groups, choose(groups)), images(2))

    def test_a_layer_under_torch_prune_is_named_with_the_remedy(self):
        model, _, _, masks = masked(chain)
        prune.l1_unstructured(model[3], "weight", 0.5)
        assert [group.name for group in channel_groups(model, images(2))] == ["0", "3", "6"]
        with pytest.raises(LayerError, match=r"layer '3'.*prune\.remove\(layer, 'weight'\)") as caught:
            shrink(model, masks, images(2))
        assert caught.value.layer == "3"
        prune.remove(model[3], "weight")
        assert shrink(model, masks, images(2)).removed

    def test_a_masked_layer_with_a_parametrised_weight_is_named_with_the_remedy(self):
        model, _, _, masks = masked(chain)
        nn.utils.parametrizations.weight_norm(model[3])
        with pytest.raises(LayerError, match=r"layer '3'.*remove_parametrizations"):
            shrink(model, masks, images(2))

    @pytest.mark.parametrize("which", ["channel_groups", "shrink"])
    def test_without_torch_pruning_the_message_says_what_to_install(self, which, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch_pruning", None)
        call = {"channel_groups": lambda m, x: channel_groups(m, x), "shrink": lambda m, x: shrink(m, {}, x)}[which]
        with pytest.raises(ResuscitateError, match=r"needs torch-pruning: pip install 'resuscitate\[structured\]'"):
            call(seeded(chain), images(2))
