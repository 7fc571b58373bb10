"""`find_kept_channels`: the channels that a smaller network has kept, whatever cut it."""

import copy

import pytest
import torch
from torch import nn

from resuscitate import shrink
from resuscitate.errors import ModelMismatchError
from resuscitate.network.channel_flow import Axis, channel_labels, channelwise_modules
from resuscitate.network.channel_matching import find_kept_channels, is_smaller
from resuscitate.network.layers import effective_weight, find_layers
from resuscitate.network.runner import Network
from tests.networks import Residual, chain, disturb, images, seeded, without_channels
from tests.wired import Wired, conv, masked, networks, projection, separable


def unmeasured(names):
    raise AssertionError(f"outputs of {names} were to be correlated")


def find(small, dense, given=None, correlations=unmeasured):
    return find_kept_channels(Network(small), Network(dense), images(2), given or {}, correlations)


def cut(build, seed=0, fraction=0.5):
    """A dense network, a smaller copy of it, and what `shrink` says that this has kept."""
    small, _, _, masks = masked(build, fraction, seed)
    return seeded(build, seed), small, shrink(small, masks, images(2))


class TestFlow:
    def test_channels_are_followed_through_slices_padding_shuffles_and_gates(self):
        def forward(net, x):
            y = net.first(x).relu()
            y = y.unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2)  # 0 3 1 4 2 5
            y = nn.functional.pad(y[:, 2:] * net.gate(x).sigmoid(), (0, 0, 0, 0, 1, 1))
            return net.last(y)

        model = Wired(forward, first=conv(3, 6, 3), gate=conv(3, 4), last=conv(6, 2))
        labels = channel_labels(model, channelwise_modules(model), images(2), None)
        first, gate, last = (labels[axis] for axis in (Axis("first", "out"), Axis("gate", "out"), Axis("last", "in")))
        assert last[1:5].tolist() == first[[1, 4, 2, 5]].tolist() == gate.tolist()
        assert len({*labels[Axis("last", "in")].tolist(), *first.tolist()}) == 8  # the padding is coupled with nothing

    def test_the_model_is_unchanged(self):
        model = seeded(Residual)
        before = copy.deepcopy(model.state_dict())
        channel_labels(model, channelwise_modules(model), images(2), None)
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class TestFinding:
    @pytest.mark.parametrize("fraction", [0.3, 0.8])
    @networks
    def test_the_channels_that_a_shrunk_network_has_kept_are_found_by_its_weights(self, build, fraction):
        dense, small, truth = cut(build, fraction=fraction)
        kept = find(small, dense)
        assert kept.outputs.keys() == truth.kept.keys()
        assert all(torch.equal(kept.outputs[name], channels) for name, channels in truth.kept.items())
        # a head of few outputs, which reads a channel twice, does not show which of its columns is which
        inputs = {name: channels for name, channels in truth.kept_inputs.items() if name in kept.inputs}
        assert all(torch.equal(kept.inputs[name], channels) for name, channels in inputs.items())

    @pytest.mark.filterwarnings("ignore:input's size at dim=1")
    @pytest.mark.parametrize("affine", [False, True])
    def test_channels_are_followed_through_instance_norms(self, affine):
        def build():
            norms = (nn.InstanceNorm2d(8, affine=affine) for _ in range(2))
            return nn.Sequential(conv(3, 8), next(norms), nn.ReLU(), conv(8, 8), next(norms), nn.ReLU(), conv(8, 4))

        dense, small, truth = cut(build)
        kept = find(small, dense)
        assert {"0", "3"} <= truth.kept.keys() <= kept.outputs.keys()
        assert all(torch.equal(kept.outputs[name], channels) for name, channels in truth.kept.items())

    @networks
    def test_the_dense_weights_between_kept_channels_are_those_of_the_small_network(self, build):
        dense, small, _ = cut(build)
        kept, layers = find(small, dense), find_layers(small)
        for name, layer in layers.items():
            if name in kept.inputs or effective_weight(name, layer).shape == dense.get_submodule(name).weight.shape:
                weight = kept.of_weight(name, layer, dense.get_submodule(name))
                assert torch.equal(weight, effective_weight(name, layer))

    @pytest.mark.parametrize("build", [chain, Residual, projection, separable])
    def test_scaled_filters_are_found(self, build):
        dense, small, truth = cut(build)
        for layer in find_layers(small).values():
            layer.weight.data *= torch.rand(len(layer.weight), *[1] * (layer.weight.dim() - 1)) + 0.5
        kept = find(small, dense)
        assert all(torch.equal(kept.outputs[name], channels) for name, channels in truth.kept.items())

    def test_any_order_of_the_channels_is_found(self):
        dense, order = seeded(chain), [5, 0, 7, 2]
        kept = find(without_channels(dense, order), dense)
        assert kept.outputs["0"].tolist() == kept.outputs["1"].tolist() == kept.inputs["3"].tolist() == order

    def test_a_network_with_all_channels_is_not_smaller(self):
        dense, small, _ = cut(Residual)
        assert is_smaller(small, dense)
        assert not is_smaller(copy.deepcopy(dense), dense)
        assert not find(copy.deepcopy(dense), dense).outputs

    def test_equal_filters_are_told_apart_by_the_columns_that_read_them(self):
        dense = seeded(chain)
        twins(dense, norm=True)
        assert find(without_channels(dense, [0, 3, 6]), dense).outputs["0"].tolist() == [0, 3, 6]

    def test_equal_filters_are_told_apart_by_their_norms(self):
        dense = seeded(chain)
        twins(dense, columns=True)
        assert find(without_channels(dense, [0, 3, 6]), dense).outputs["0"].tolist() == [0, 3, 6]

    def test_a_filter_of_zeros_is_told_apart_by_its_norm(self):
        dense = seeded(chain)
        small = without_channels(dense, [0, 3, 6])
        small[0].weight.data[1] = 0
        small[3].weight.data[:, 1] = 0
        assert find(small, dense).outputs["0"].tolist() == [0, 3, 6]

    def test_other_weights_are_told_apart_by_correlated_outputs(self):
        dense = seeded(chain)
        small = without_channels(dense, [0, 3, 6])
        disturb(small, 0.3)
        asked = []

        def correlations(names):
            asked.extend(names)
            return {"0": torch.eye(8)[[0, 3, 6]] * 0.8}

        assert find(small, dense, correlations=correlations).outputs["0"].tolist() == [0, 3, 6]
        assert asked[0] == "0"


def twins(dense, norm=False, columns=False):
    """Make channel 2 of a `chain`'s first layer equal to channel 3: its filter and, if asked, what is behind it."""
    dense[0].weight.data[2] = dense[0].weight[3]
    if norm:
        for tensor in (dense[1].weight.data, dense[1].bias.data, dense[1].running_mean, dense[1].running_var):
            tensor[2] = tensor[3]
    if columns:
        dense[3].weight.data[:, 2] = dense[3].weight[:, 3]


class TestRefusal:
    def test_equal_channels_are_refused_with_the_candidates_and_the_remedy(self):
        dense = seeded(chain)
        twins(dense, norm=True, columns=True)
        expected = (
            r"layer '0': it is not clear which channel of the dense network its channel 1 is, 2 \(similarity 1\.000\), "
            r"3 \(similarity 1\.000\); say it with channels=\{'0': indices\}"
        )
        with pytest.raises(ModelMismatchError, match=expected):
            find(without_channels(dense, [0, 3, 6]), dense, correlations=lambda names: {})

    def test_given_channels_decide_and_couple(self):
        dense = seeded(chain)
        twins(dense, norm=True, columns=True)
        kept = find(without_channels(dense, [0, 3, 6]), dense, {"0": [0, 3, 6]})
        assert kept.outputs["1"].tolist() == kept.inputs["3"].tolist() == [0, 3, 6]

    def test_the_three_best_candidates_of_another_network_are_named(self):
        dense, small = seeded(chain), without_channels(seeded(chain, 1), [0, 3, 6])
        named = r"layer '0': it is not clear .* channel 0 is, \d \(sim.*\), \d \(sim.*\), \d \(sim[^,]*; say"
        with pytest.raises(ModelMismatchError, match=named):
            find(small, dense, correlations=lambda names: {})

    @pytest.mark.parametrize(
        ("given", "problem"),
        [
            ({"9": [0]}, "channels names '9', which is no layer or norm"),
            ({"0": [0, 3]}, r"channels\['0'\] is torch.int64 \(2,\), not 3 integers"),
            ({"0": [0.0, 3.0, 6.0]}, r"channels\['0'\] is torch.float32 \(3,\), not 3 integers"),
            ({"0": [0, 3, 3]}, r"channels\['0'\] must be 3 different indices from 0 to 7"),
            ({"0": [0, 3, 8]}, r"channels\['0'\] must be 3 different indices from 0 to 7"),
        ],
    )
    def test_given_channels_are_checked(self, given, problem):
        dense = seeded(chain)
        with pytest.raises(ValueError, match=problem):
            find(without_channels(dense, [0, 3, 6]), dense, given)

    def test_given_channels_that_contradict_each_other_are_refused(self):
        dense = seeded(chain)
        problem = r"cannot be channel \d of the dense network: another layer is coupled with it"
        with pytest.raises(ModelMismatchError, match=problem):
            find(without_channels(dense, [0, 3, 6]), dense, {"0": [0, 3, 6], "1": [0, 3, 7]})

    def test_layers_that_are_wired_otherwise_are_refused(self):
        small = Wired(lambda net, x: net.last(net.first(x).relu()), first=conv(3, 4, 3), last=conv(4, 2))
        wide = Wired(lambda net, x: net.last(net.first(x).mean(1, True).expand(-1, 6, -1, -1)), first=conv(3, 6, 3))
        wide.add_module("last", conv(6, 2))
        with pytest.raises(ModelMismatchError, match="channels of layer 'first' are not read by the same layers"):
            find(small, wide)
