"""Masks are read from a model's zeros, applied, checked, counted and saved."""

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations, prune

from resuscitate import Masks, sparsify
from resuscitate.errors import CheckpointError, LayerError, MaskError, ResuscitateError
from resuscitate.network.masks import tied_layers
from tests.networks import Shared, Zoo, chain, images, pruned_copy, seeded


def perturb(model):
    """Change every weight, also pruned ones, as an optimizer step does."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)


def tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
    model[2].weight = model[0].weight
    return model


class TestFromZeros:
    def test_nonzero_weights_are_kept_in_every_type_of_layer(self):
        model = pruned_copy(seeded(Zoo))
        masks = Masks.from_zeros(model)
        assert set(masks) == {"stem", "grouped", "depthwise", "up", "line", "volume", "unused", "head"}
        for name, mask in masks.items():
            assert mask.dtype == torch.bool
            assert torch.equal(mask, model.get_submodule(name).weight != 0)

    def test_a_module_used_twice_has_one_mask(self):
        assert set(Masks.from_zeros(pruned_copy(seeded(Shared)))) == {"stem", "conv", "last"}

    def test_a_prune_mask_counts_as_zeros(self):
        model = seeded(chain)
        prune.l1_unstructured(model[0], "weight", 0.5)
        assert torch.equal(Masks.from_zeros(model)["0"], model[0].weight_mask.bool())

    def test_include_and_exclude_select_the_layers(self):
        assert set(Masks.from_zeros(seeded(Zoo), include=nn.Conv2d, exclude="stem")) == {"grouped", "depthwise"}

    def test_names_are_those_of_the_model_inside_a_wrapper(self):
        model = seeded(chain)
        assert set(Masks.from_zeros(nn.DataParallel(model))) == set(Masks.from_zeros(model))

    def test_a_weight_recomputed_in_each_forward_is_refused_by_name(self):
        model = seeded(chain)
        parametrizations.weight_norm(model[3])
        with pytest.raises(LayerError, match="layer '3'"):
            Masks.from_zeros(model)
        assert "3" not in Masks.from_zeros(model, exclude="3")


class TestApply:
    def test_pruned_weights_are_zeroed_and_kept_ones_unchanged(self):
        model = pruned_copy(seeded(Zoo))
        masks = Masks.from_zeros(model)
        perturb(model)
        before = {name: model.get_submodule(name).weight.detach().clone() for name in masks}
        masks.apply_(model)
        for name, mask in masks.items():
            weight = model.get_submodule(name).weight
            assert torch.equal(weight[mask], before[name][mask])
            assert weight[~mask].eq(0).all()

    def test_a_pruned_weight_that_became_nan_is_zero_again(self):
        model = pruned_copy(seeded(chain))
        masks = Masks.from_zeros(model)
        with torch.no_grad():
            model[0].weight[~masks["0"]] = torch.nan
        masks.apply_(model)
        masks.check(model)

    def test_a_mask_that_does_not_fit_leaves_the_model_unchanged(self):
        model = seeded(chain)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        masks = Masks({"0": torch.zeros_like(model[0].weight, dtype=torch.bool), "3": torch.ones(1, dtype=torch.bool)})
        with pytest.raises(MaskError, match=r"layer '3'.*shape"):
            masks.apply_(model)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def test_under_torch_prune_the_zeros_go_into_its_mask(self):
        model = seeded(chain)
        prune.l1_unstructured(model[0], "weight", 0.25)
        original, first = model[0].weight_orig.detach().clone(), model[0].weight_mask.bool()
        mask = torch.rand(first.shape, generator=torch.Generator().manual_seed(0)) > 0.5
        Masks({"0": mask}).apply_(model)
        assert torch.equal(model[0].weight_mask.bool(), first & mask)
        assert torch.equal(model[0].weight_orig, original)
        assert model[0].weight[~mask].eq(0).all()
        model(torch.randn(1, 3, 8, 8))
        assert model[0].weight[~mask].eq(0).all()
        prune.remove(model[0], "weight")
        assert torch.equal(model[0].weight, original * (first & mask))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_dtype_memory_format_and_requires_grad_are_kept(self, dtype):
        model = seeded(chain).to(dtype).to(memory_format=torch.channels_last).requires_grad_(False)
        Masks({"3": torch.zeros(8, 8, 3, 3, dtype=torch.bool)}).apply_(model)
        weight = model[3].weight
        assert (weight.dtype, weight.requires_grad) == (dtype, False)
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert weight.eq(0).all()


class TestCheck:
    def test_a_model_with_its_zeros_passes(self):
        model = pruned_copy(seeded(Zoo))
        Masks.from_zeros(model).check(model)

    def test_nonzero_pruned_weights_are_reported_with_layer_count_and_remedy(self):
        model = pruned_copy(seeded(chain))
        masks = Masks.from_zeros(model)
        with torch.no_grad():
            model[3].weight[~masks["3"]] = 1
        count = int((~masks["3"]).sum())
        with pytest.raises(MaskError, match=rf"layer '3': {count} pruned weights are not zero; masks\.apply_\(model\)"):
            masks.check(model)
        masks.apply_(model)
        masks.check(model)

    def test_a_mask_for_another_model_is_refused_by_name(self):
        with pytest.raises(MaskError, match="layer 'elsewhere'"):
            Masks({"elsewhere": torch.ones(1, dtype=torch.bool)}).check(seeded(chain))

    def test_a_mask_of_zeros_and_ones_may_have_any_dtype(self):
        wanted = torch.tensor([[True, False]])
        for mask in (wanted.float(), wanted.to(torch.uint8), wanted.numpy(), wanted.double().numpy()):
            assert torch.equal(Masks({"0": mask})["0"], wanted)

    def test_a_mask_with_other_values_is_refused(self):
        with pytest.raises(MaskError, match=r"layer '0'.*boolean.*torch\.float32"):
            Masks({"0": torch.full((3,), 0.5)})
        with pytest.raises(MaskError, match=r"layer '0'.*it is list"):
            Masks({"0": [1, 0]})


class TestCounting:
    @given(st.lists(st.lists(st.booleans(), min_size=1, max_size=20), min_size=1, max_size=5))
    def test_sparsity_is_the_pruned_fraction_of_all_weights(self, layers):
        masks = Masks({str(i): torch.tensor(mask) for i, mask in enumerate(layers)})
        assert masks.sparsity == sum(mask.count(False) for mask in layers) / sum(map(len, layers))

    def test_the_table_has_one_row_per_layer(self):
        masks = Masks({"a": torch.tensor([[True, False], [False, False]]), "b": torch.tensor([True])})
        assert [tuple(row) for row in masks.table()] == [("a", (2, 2), 1, 4, 0.75, ""), ("b", (1,), 1, 1, 0.0, "")]

    def test_a_shared_weight_counts_once(self):
        model = tied()
        with torch.no_grad():
            model[0].weight.zero_()
        masks = Masks.from_zeros(model)
        assert masks["0"] is masks["2"]
        assert masks.sparsity == 16 / 24

    def test_tied_layers_are_grouped_under_the_first_name(self):
        model = tied()
        layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        assert tied_layers(layers) == {"0": ["0", "2"], "3": ["3"]}

    def test_masks_are_equal_if_those_of_every_layer_are(self):
        model = pruned_copy(seeded(chain))
        assert Masks.from_zeros(model) == Masks.from_zeros(model)
        assert Masks.from_zeros(model) != Masks.from_zeros(seeded(chain))
        assert Masks.from_zeros(model) != Masks.from_zeros(model, exclude="0")


class TestConstruction:
    def test_a_mapping_that_creates_its_tensors_on_access_is_read_correctly(self):
        class Fresh(Mapping):
            def __getitem__(self, name):
                return torch.full((2,), float(int(name) % 2))

            def __iter__(self):
                return map(str, range(50))

            def __len__(self):
                return 50

        masks = Masks(Fresh())
        assert all(bool(mask.all()) == bool(int(name) % 2) for name, mask in masks.items())


class TestFiles:
    @given(st.lists(st.lists(st.booleans(), max_size=40), min_size=1, max_size=5))
    def test_saved_masks_load_equal_and_take_one_bit_per_weight(self, layers):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "masks.safetensors"
            masks = Masks({str(i): torch.tensor(layer, dtype=torch.bool) for i, layer in enumerate(layers)})
            masks.save(path)
            assert Masks.load(path) == masks
            assert sum(t.numel() for t in load_file(path).values()) == sum(-(-len(layer) // 8) for layer in layers)

    def test_shared_masks_and_notes_are_loaded(self, tmp_path):
        shared = torch.rand(3, 5) > 0.5
        Masks({"a": shared, "b": shared}, {"a": "left dense"}).save(tmp_path / "m.safetensors", {"command": "x"})
        loaded = Masks.load(tmp_path / "m.safetensors")
        assert loaded["a"] is loaded["b"]
        assert loaded.notes == {"a": "left dense"}
        assert len(load_file(tmp_path / "m.safetensors")) == 1

    @pytest.mark.parametrize("name", ["masks.json", "masks.csv", "masks"])
    def test_a_path_with_another_ending_is_refused(self, tmp_path, name):
        with pytest.raises(ValueError, match=rf"{name}: it is written as \.safetensors"):
            Masks({"a": torch.ones(2)}).save(tmp_path / name)
        assert not list(tmp_path.iterdir())

    def test_a_file_without_masks_is_refused(self, tmp_path):
        path = tmp_path / "m.safetensors"
        with pytest.raises(FileNotFoundError):
            Masks.load(path)
        path.write_bytes(b"no such thing")
        with pytest.raises(CheckpointError, match="not a readable safetensors file"):
            Masks.load(path)
        save_file({"a": torch.ones(2)}, path)
        with pytest.raises(CheckpointError, match="holds no masks"):
            Masks.load(path)

    @pytest.mark.parametrize(
        "layers",
        ['{"a": {"shape": [100], "as": "a"}}', '{"a": {"shape": [-9], "as": "a"}}', '{"a": {"as": "b"}}', "[1]", "{"],
    )
    def test_a_damaged_file_is_refused(self, tmp_path, layers):
        path = tmp_path / "m.safetensors"
        metadata = {"format": "resuscitate masks 1", "layers": layers, "notes": "{}"}
        save_file({"a": torch.zeros(1, dtype=torch.uint8)}, path, metadata)
        with pytest.raises(CheckpointError, match="its masks are damaged"):
            Masks.load(path)


class TestFromPruneAndHold:
    def test_from_prune_reads_only_the_masks_of_torch_prune(self):
        model = seeded(chain)
        assert not Masks.from_prune(model)
        prune.random_unstructured(model[3], "weight", 0.3)
        masks = Masks.from_prune(model)
        assert list(masks) == ["3"]
        assert torch.equal(masks["3"], model[3].weight_mask.bool())

    def test_held_masks_keep_zeros_in_training_until_the_handle_is_removed(self):
        model = seeded(chain).train()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        masks = sparsify(model, 0.8)
        handle = masks.hold(model, optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            model(images(4)).square().sum().backward()
            optimizer.step()
            masks.check(model)
        handle.remove()
        optimizer.step()
        with pytest.raises(MaskError):
            masks.check(model)


def test_masks_write_to_tensors_of_inference_mode_only_there():
    with torch.inference_mode():
        model = copy.deepcopy(seeded(chain))
        masks = sparsify(model, 0.5)
    before = model[0].weight.clone()
    with pytest.raises(ResuscitateError, match="copy or load the model outside of it"):
        sparsify(model, 0.9)
    assert torch.equal(model[0].weight, before)
    with torch.inference_mode():
        masks.apply_(model)
