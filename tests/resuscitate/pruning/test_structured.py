"""`shrink`: the smaller network computes the same function, or the model is unchanged."""

import copy
import random

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from resuscitate import Masks, models
from resuscitate.errors import LayerError, MaskError, ResuscitateError
from resuscitate.pruning import structured
from resuscitate.pruning.coupling import channel_groups, channel_masks
from resuscitate.pruning.structured import shrink
from tests.networks import (
    Residual,
    Zoo,
    chain,
    images,
    seeded,
)
from tests.wired import (
    Wired,
    choose,
    conv,
    counts,
    everything,
    largest_difference,
    masked,
    networks,
    outputs,
    projection,
    unchanged,
)


class TestShrink:
    @pytest.mark.parametrize("fraction", [0.3, 0.9])
    @networks
    def test_the_small_network_computes_what_the_masked_one_did(self, build, fraction):
        model, _, dropped, masks = masked(build, fraction)
        x = images(4, seed=7)
        expected = outputs(model, x)
        found = shrink(model, masks, images(2))
        assert found.removed == {name: int(units.sum()) for name, units in dropped.items()}
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
            if changed:
                assert name in found.kept or name in found.kept_inputs
            plain = getattr(module, "groups", 1) == 1 and not isinstance(module, nn.ConvTranspose2d)
            if changed and plain:
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
        assert any("one is kept" in note for note in found.notes)
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
        assert any("3 units of '0' are masked in their producers only" in note for note in found.notes)
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
        assert any(note.startswith("channels of 'conv1' are kept: ") for note in notes)


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
        function = {"surgery": "remove_units", "comparison": "count_flops", "adoption": "remaining_channels"}[where]
        original, find = getattr(structured, function), structured.verified_groups

        def fail(*args):
            original(*args)
            raise RuntimeError("injected")

        def find_then_break(*args):
            found = find(*args)
            monkeypatch.setattr(structured, function, fail)
            return found

        monkeypatch.setattr(structured, "verified_groups", find_then_break)
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
