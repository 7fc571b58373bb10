"""Groups of coupled channels, channels that are not removable and the reason, masks of whole channels."""

import logging

import pytest
import torch
from torch import nn

from resuscitate import Masks, models
from resuscitate.errors import ResuscitateError
from resuscitate.pruning.coupling import channel_groups, channel_masks
from resuscitate.pruning.structured import shrink
from tests.networks import (
    Dense,
    Excited,
    Functional,
    Residual,
    Shared,
    Shuffled,
    Zoo,
    chain,
    images,
    seeded,
)
from tests.wired import (
    NETWORKS,
    Wired,
    choose,
    concatenated,
    conv,
    flattened,
    grouped,
    largest_difference,
    line,
    masked,
    networks,
    outputs,
    projection,
    separable,
    transposed,
)


class TestGroups:
    @networks
    def test_every_table_has_a_row_for_each_unit_and_every_channel_of_a_maker_once(self, build):
        model = seeded(build)
        groups = channel_groups(model, images(2))
        order = [name for name, _ in model.named_modules()]
        assert groups
        assert [g.name for g in groups] == sorted((g.name for g in groups), key=order.index)
        for group in groups:
            assert group.name == min(group.producers, key=order.index)
            for table in (*group.producers.values(), *group.consumers.values(), *group.norms.values()):
                assert table.dtype == torch.int64
                assert len(table) == group.units > 1
                assert table.unique().numel() == table.numel()
            for name, table in group.producers.items():
                layer = model.get_submodule(name)
                channels = layer.out_channels if hasattr(layer, "out_channels") else layer.out_features
                assert sorted(table.flatten().tolist()) == list(range(channels))

    @pytest.mark.parametrize(
        ("build", "producers", "consumers"),
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
    def test_the_first_group_has_these_makers_and_readers(self, build, producers, consumers):
        group = channel_groups(seeded(build), images(2))[0]
        assert {name: table.shape[1] for name, table in group.producers.items()} == producers
        assert {name: table.shape[1] for name, table in group.consumers.items()} == consumers

    @pytest.mark.parametrize("build", NETWORKS[: NETWORKS.index(Shared) + 1], ids=lambda build: build.__name__)
    def test_torch_pruning_couples_the_same_channels(self, build):
        torch_pruning = pytest.importorskip("torch_pruning")
        model, leaves = seeded(build), torch.utils._pytree.tree_leaves
        groups, names = channel_groups(model, images(2)), {module: name for name, module in model.named_modules()}
        graph = torch_pruning.DependencyGraph().build_dependency(model, images(2), output_transform=leaves)
        for group in groups:
            layer, channels = model.get_submodule(group.name), group.producers[group.name][0].tolist()
            found = {}
            cut = graph.get_pruner_of_module(layer).prune_out_channels
            for dependency, indices in graph.get_pruning_group(layer, cut, channels):
                if name := names.get(dependency.target.module):
                    found[name] = sorted({*found.get(name, ()), *indices})
            tables = group.producers | group.norms | group.consumers
            assert found == {name: table[0].tolist() for name, table in tables.items()}

    def test_both_ends_of_a_residual_connection_with_a_projection_are_one_group(self):
        groups = {group.name: group for group in channel_groups(seeded(projection), images(2))}
        assert set(groups["conv2"].producers) == {"conv2", "shortcut"}

    def test_a_concatenation_shifts_the_channels_that_readers_and_batchnorms_see(self):
        groups = {group.name: group for group in channel_groups(seeded(Dense), images(2))}
        assert groups["convs.1"].consumers["head"].flatten().tolist() == [10, 11, 12, 13]
        assert groups["convs.1"].norms["norm"].flatten().tolist() == [10, 11, 12, 13]

    def test_a_channel_that_is_flattened_is_read_by_all_its_pixels(self):
        group = channel_groups(seeded(flattened), images(2))[0]
        assert torch.equal(group.consumers["3"], torch.arange(8 * 81).view(8, 81))

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
        assert groups["b"].consumers["mid"].tolist() == [[14, 30], [15, 31]]

    def test_the_same_place_in_all_groups_of_a_convolution_is_one_unit(self):
        first, second, third = channel_groups(seeded(grouped), images(2))
        assert first.producers["0"].tolist() == [[i, i + 6] for i in range(6)]
        # output of 2 groups of 6, input of 3 groups of 4: both couple channels
        assert second.producers["2"].tolist() == [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]]
        assert third.producers["3"].tolist() == [[i, i + 6, i + 12] for i in range(6)]

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


def shuffled(net, x):
    n, c, h, w = (x := net.stem(x).relu()).shape
    return net.head(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


def attended(net, x):
    x = net.stem(x).relu()
    return net.head(x * net.gate(x.mean(1, keepdim=True)).sigmoid())


LEFT_ALONE = {
    "option A, zero channels padded": (models.resnet20, "conv1", "same number of channels"),
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
    "a parameter of its own": (Functional, "stem", "no layer reads"),
    "the output": (Excited, "stem", "reach the model's output"),
    "an output that was detached": (
        lambda: Wired(lambda net, x: (net.head(y := net.stem(x)), y.detach().relu()), stem=conv(3, 8), head=conv(8, 2)),
        "stem",
        "reach the model's output",
    ),
    "the network's input": (
        lambda: Wired(lambda net, x: net.head(x + net.stem(x)), stem=conv(3, 3), head=conv(3, 2)),
        "stem",
        "does not run without",
    ),
    "GroupNorm": (
        lambda: nn.Sequential(conv(3, 8), nn.GroupNorm(2, 8), conv(8, 2)),
        "0",
        "output is another than",
    ),
    "a size in the code": (
        lambda: Wired(
            lambda net, x: net.head(net.stem(x).mean((2, 3)).view(-1, 8)), stem=conv(3, 8), head=nn.Linear(8, 2)
        ),
        "stem",
        "does not run without",
    ),
    "shuffled channels": (lambda: Wired(shuffled, stem=conv(3, 8), head=conv(8, 2)), "stem", "output is another than"),
    "a mean over channels": (
        lambda: Wired(attended, stem=conv(3, 8), gate=conv(1, 1), head=conv(8, 2)),
        "stem",
        "one unit",
    ),
    "one unit only": (lambda: nn.Sequential(conv(3, 4), conv(4, 8, groups=4), conv(8, 2)), "0", "one unit"),
    "an unused layer": (Zoo, "unused", "does not run"),
    "a parametrised weight": (
        lambda: nn.Sequential(conv(3, 8), nn.utils.parametrizations.weight_norm(conv(8, 8)), conv(8, 2)),
        "0",
        "recomputed",
    ),
}


class TestLeftAlone:
    @pytest.mark.parametrize(("build", "name", "reason"), LEFT_ALONE.values(), ids=LEFT_ALONE)
    def test_what_cannot_be_removed_stays_and_the_log_says_why(self, build, name, reason, caplog):
        with caplog.at_level(logging.INFO, "resuscitate"):
            groups = channel_groups(seeded(build), images(2))
        assert name not in {producer for group in groups for producer in group.producers}
        [line] = [
            r.getMessage() for r in caplog.records if r.getMessage().startswith(f"channels of {name!r} are kept: ")
        ]
        assert reason in line

    def test_one_bad_group_does_not_take_the_good_ones_with_it(self):
        model = seeded(lambda: nn.Sequential(conv(3, 8), nn.GroupNorm(2, 8), conv(8, 6), nn.ReLU(), conv(6, 2)))
        assert [group.name for group in channel_groups(model, images(2))] == ["2"]

    def test_a_network_that_autograd_cannot_follow_is_refused(self):
        with pytest.raises(ResuscitateError, match="cannot be followed"):
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
                    norm, channels = model.get_submodule(name), table[dropped[group.name]].flatten()
                    (norm.weight if isinstance(norm, nn.PReLU) else norm.running_mean)[channels] += 1
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
