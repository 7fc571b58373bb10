"""Files of weights: which can be read, which fit a model, and that they are written whole or not at all."""

import json
import logging
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file, save_model
from torch import nn
from torch.nn.utils import prune

from resuscitate import shrink
from resuscitate.deploy.checkpoints import load_weights, read_state_dict, write_state_dict
from resuscitate.errors import CheckpointError
from resuscitate.utils.files import atomic
from tests.compare import same_state
from tests.networks import Shared, chain, images, seeded
from tests.wired import everything, masked, networks, outputs, unchanged


class TestReading:
    def test_safetensors(self, tmp_path):
        state = seeded(chain).state_dict()
        save_file(state, tmp_path / "a.safetensors")
        assert same_state(read_state_dict(tmp_path / "a.safetensors"), state)

    @pytest.mark.parametrize("suffix", [".pt", ".pth"])
    @pytest.mark.parametrize("under", [None, "state_dict", "model"])
    def test_torch_files_plain_or_nested(self, tmp_path, suffix, under):
        state = seeded(chain).state_dict()
        torch.save(state if under is None else {"epoch": 3, under: state}, tmp_path / f"a{suffix}")
        assert same_state(read_state_dict(tmp_path / f"a{suffix}"), state)

    def test_sparse_tensors_are_read_as_dense_ones(self, tmp_path):
        state = seeded(chain).state_dict()
        torch.save(
            {key: value.to_sparse() if value.dim() == 2 else value for key, value in state.items()}, tmp_path / "a.pt"
        )
        assert same_state(read_state_dict(tmp_path / "a.pt"), state)

    @pytest.mark.parametrize("under", ["state_dict", "model"])
    def test_other_weights_beside_those_that_are_taken_are_named(self, tmp_path, under, caplog):
        state = seeded(chain).state_dict()
        torch.save({under: state, "state_dict_ema": seeded(chain, 1).state_dict(), "epoch": 3}, tmp_path / "a.pt")
        assert same_state(read_state_dict(tmp_path / "a.pt"), state)
        assert f"the weights under '{under}' are taken, not those under state_dict_ema" in caplog.text

    def test_a_file_with_weights_under_another_key_is_told_what_it_has(self, tmp_path):
        torch.save({"epoch": 3, "ema": seeded(chain).state_dict()}, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match="but 'epoch', 'ema'; save what is under 'ema' alone"):
            read_state_dict(tmp_path / "a.pt")

    def test_a_pickle_is_refused_and_does_not_run(self, tmp_path):
        class Bomb:
            def __reduce__(self):
                return Path.touch, (tmp_path / "ran",)

        torch.save({"state_dict": seeded(chain).state_dict(), "bomb": Bomb()}, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match=r"a\.pt: .*without unpickling.*safetensors"):
            read_state_dict(tmp_path / "a.pt")
        torch.save(seeded(chain), tmp_path / "model.pt")
        with pytest.raises(CheckpointError, match="without unpickling"):
            read_state_dict(tmp_path / "model.pt")
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
    def test_a_file_that_is_no_checkpoint_is_named(self, tmp_path, name):
        (tmp_path / name).write_bytes(b"no weights here" * 20)
        with pytest.raises(CheckpointError, match=name):
            read_state_dict(tmp_path / name)
        with pytest.raises(FileNotFoundError):
            read_state_dict(tmp_path / f"no {name}")

    @pytest.mark.parametrize("content", [{}, {"epoch": 3}, {"state_dict": {"w": "text"}}, torch.ones(3)], ids=str)
    def test_a_file_without_a_state_dict_is_named(self, tmp_path, content):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match=r"holds no state dict.*'state_dict' or 'model'"):
            read_state_dict(tmp_path / "a.pt")


class TestLoading:
    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
    def test_wrappers_prefixes_are_stripped_with_one_log_line(self, tmp_path, caplog, prefix):
        source, model = seeded(chain), seeded(chain, seed=1)
        save_file({prefix + key: value for key, value in source.state_dict().items()}, tmp_path / "a.safetensors")
        with caplog.at_level(logging.INFO, "resuscitate"):
            load_weights(model, tmp_path / "a.safetensors")
        assert same_state(model.state_dict(), source.state_dict())
        assert len(caplog.records) == 1

    def test_an_averaged_model_is_unwrapped(self, tmp_path):
        model = seeded(chain)
        torch.save(torch.optim.swa_utils.AveragedModel(model).state_dict(), tmp_path / "a.pt")
        fresh = seeded(chain, 1)
        load_weights(fresh, tmp_path / "a.pt")
        assert same_state(fresh.state_dict(), model.state_dict())

    def test_only_prefixes_that_the_model_does_not_have_are_stripped(self, tmp_path):
        def build():
            return nn.ModuleDict({"module": nn.Linear(3, 2, bias=False), "body": nn.Linear(2, 2)})

        source, model = build(), build()
        state = {key.replace("body.", "body._orig_mod."): value for key, value in source.state_dict().items()}
        save_file(state, tmp_path / "a.safetensors")
        load_weights(model, tmp_path / "a.safetensors")
        assert same_state(model.state_dict(), source.state_dict())

    def test_prefixes_masks_and_an_added_bias_at_once(self, tmp_path):
        source, model = seeded(lambda: chain(bias=True)), seeded(chain, seed=1)
        prune.l1_unstructured(source[3], "weight", amount=0.5)
        torch.save({"state_dict": nn.DataParallel(source).state_dict()}, tmp_path / "a.pt")
        load_weights(model, tmp_path / "a.pt")
        x = torch.randn(2, 3, 9, 9)
        assert torch.equal(model(x), source(x))

    def test_a_compiled_model_is_unwrapped(self, tmp_path):
        source, model = seeded(chain), seeded(chain, seed=1)
        save_file(source.state_dict(), tmp_path / "a.safetensors")
        load_weights(torch.compile(model), tmp_path / "a.safetensors")
        assert same_state(model.state_dict(), source.state_dict())

    def test_the_masks_of_torch_prune_are_applied(self, tmp_path):
        source, model = seeded(chain), seeded(chain, seed=1)
        prune.l1_unstructured(source[3], "weight", amount=0.5)
        torch.save(source.state_dict(), tmp_path / "a.pt")
        load_weights(model, tmp_path / "a.pt")
        assert torch.equal(model[3].weight, source[3].weight)
        assert model[3].weight.eq(0).float().mean() == 0.5

    def test_a_bias_that_a_repair_added_is_registered(self, tmp_path):
        source, model = seeded(lambda: chain(bias=True)), seeded(chain, seed=1)
        save_file(source.state_dict(), tmp_path / "a.safetensors")
        load_weights(model, tmp_path / "a.safetensors")
        assert same_state(model.state_dict(), source.state_dict())
        x = torch.randn(2, 3, 9, 9)
        assert torch.equal(model(x), source(x))

    def test_tied_tensors_may_be_stored_once(self, tmp_path):
        def tied():
            model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
            model["b"].weight = model["a"].weight
            return model

        source, model = tied(), tied()
        save_model(source, str(tmp_path / "once.safetensors"))
        assert len(load_file(tmp_path / "once.safetensors")) == 3
        load_weights(model, tmp_path / "once.safetensors")
        assert same_state(model.state_dict(), source.state_dict())

    def test_keys_that_do_not_fit_are_named_and_the_model_is_unchanged(self, tmp_path):
        model = seeded(chain)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        state = seeded(chain, seed=1).state_dict()
        state["3.weights"] = state.pop("3.weight")
        state["0.weight"] = torch.ones(8, 3, 5, 5)
        save_file(state, tmp_path / "a.safetensors")
        named = r"1 missing: 3\.weight; 1 unexpected: 3\.weights; 1 of another shape: 0\.weight \(\(8, 3, 5, 5\) in the"
        with pytest.raises(CheckpointError, match=rf"a\.safetensors does not fit .*{named}.*build the very model"):
            load_weights(model, tmp_path / "a.safetensors")
        assert same_state(model.state_dict(), before)

    def test_a_prefix_of_all_names_is_named(self, tmp_path):
        for prefix in ("model.", "model.net."):
            save_file({prefix + key: x for key, x in seeded(chain).state_dict().items()}, tmp_path / "a.safetensors")
            with pytest.raises(CheckpointError, match=f"all names in the file begin with '{prefix}': remove it"):
                load_weights(seeded(chain), tmp_path / "a.safetensors")

    def test_a_bias_of_another_shape_is_not_taken_for_an_added_one(self, tmp_path):
        state = seeded(chain).state_dict() | {"0.bias": torch.zeros(5)}
        save_file(state, tmp_path / "a.safetensors")
        with pytest.raises(CheckpointError, match=r"1 unexpected: 0\.bias"):
            load_weights(seeded(chain), tmp_path / "a.safetensors")


class TestSmaller:
    @networks
    def test_a_file_with_fewer_channels_makes_the_model_smaller(self, tmp_path, build):
        small, _, _, masks = masked(build)
        shrink(small, masks, images(2))
        save_file(small.state_dict(), tmp_path / "small.safetensors")
        model = seeded(build, seed=1)
        load_weights(model, tmp_path / "small.safetensors", smaller=True)
        assert same_state(model.state_dict(), small.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(outputs(model, images(3)), outputs(small, images(3)), strict=True))
        assert repr(model) == repr(small)

    def test_tied_weights_stay_tied(self, tmp_path):
        def tied(width):
            model = nn.ModuleDict({"a": nn.Linear(width, 3), "b": nn.Linear(width, 3)})
            model["b"].weight = model["a"].weight
            return model

        save_model(tied(2), str(tmp_path / "small.safetensors"))
        model = tied(4)
        load_weights(model, tmp_path / "small.safetensors", smaller=True)
        assert model["a"].weight is model["b"].weight
        assert model["b"].in_features == 2

    def test_only_if_it_is_asked_for_and_only_in_channels(self, tmp_path):
        model = seeded(chain)
        save_file(seeded(lambda: chain(width=4)).state_dict(), tmp_path / "small.safetensors")
        with pytest.raises(CheckpointError, match=r"of another shape.*fewer channels.*: pass smaller=True, or "):
            load_weights(model, tmp_path / "small.safetensors")
        save_file(seeded(lambda: chain(width=16)).state_dict(), tmp_path / "wide.safetensors")
        with pytest.raises(CheckpointError, match=r"of another shape.* more; build the very model"):
            load_weights(model, tmp_path / "wide.safetensors")
        kernel = seeded(chain).state_dict() | {"0.weight": torch.ones(8, 3, 1, 1)}
        save_file(kernel, tmp_path / "kernel.safetensors")
        with pytest.raises(CheckpointError, match=r"1 of another shape: 0\.weight"):
            load_weights(model, tmp_path / "kernel.safetensors", smaller=True)

    def test_the_model_is_unchanged_where_something_else_does_not_fit(self, tmp_path):
        model = seeded(chain)
        before = everything(model)
        state = seeded(lambda: chain(width=4)).state_dict()
        del state["3.weight"]
        save_file(state, tmp_path / "small.safetensors")
        with pytest.raises(CheckpointError, match=r"1 missing: 3\.weight"):
            load_weights(model, tmp_path / "small.safetensors", smaller=True)
        assert unchanged(before, everything(model))

    @pytest.mark.parametrize(
        ("cut", "problem"),
        [
            ({"4.weight": (7, 288)}, "layer '4' has different numbers of channels: 7 in its weight and 10 in its bias"),
            ({"0.weight": (5, 3, 3, 3), "0.bias": (5,)}, "layer '0' has 5 channels, and BatchNorm '1' behind it 8"),
            ({"1.running_var": (5,)}, "layer '1' has different numbers of channels: 8 in its weight"),
        ],
    )
    def test_tensors_that_do_not_fit_one_another_are_refused(self, tmp_path, cut, problem):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        before = everything(model)
        state = model.state_dict() | {key: torch.zeros(shape) for key, shape in cut.items()}
        save_file(state, tmp_path / "odd.safetensors")
        with pytest.raises(CheckpointError, match=f"odd.safetensors does not fit the model: {problem}"):
            load_weights(model, tmp_path / "odd.safetensors", smaller=True)
        assert unchanged(before, everything(model))


class TestWriting:
    def test_tied_and_channels_last_tensors_load_strictly_anywhere(self, tmp_path):
        source = seeded(Shared).to(memory_format=torch.channels_last)
        source.again = source.conv
        write_state_dict(tmp_path / "a.safetensors", source.state_dict(), {})
        plain = seeded(Shared, seed=1)
        plain.again = plain.conv
        plain.load_state_dict(load_file(tmp_path / "a.safetensors"), strict=True)
        assert same_state(plain.state_dict(), source.state_dict())

    def test_provenance_is_metadata_of_strings(self, tmp_path):
        write_state_dict(tmp_path / "a.safetensors", {"w": torch.ones(2)}, {"method": "asr", "options": {"seed": 0}})
        with safe_open(tmp_path / "a.safetensors", "pt") as file:
            metadata = file.metadata()
        assert metadata["method"] == "asr"
        assert json.loads(metadata["options"]) == {"seed": 0}

    def test_the_file_takes_the_usual_permissions(self, tmp_path):
        write_state_dict(tmp_path / "a.safetensors", {"w": torch.ones(2)}, {})
        (tmp_path / "usual").touch()
        modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.safetensors", "usual")}
        assert len(modes) == 1

    def test_an_error_leaves_the_old_file_and_nothing_else(self, tmp_path):
        target = tmp_path / "a.txt"
        target.write_text("old")

        def interrupted():
            with atomic(target) as temporary:
                assert temporary.parent == tmp_path
                temporary.write_text("half of the n")
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert target.read_text() == "old"
        assert os.listdir(tmp_path) == ["a.txt"]
        with atomic(target) as temporary:
            temporary.write_text("new")
        assert target.read_text() == "new"
        assert os.listdir(tmp_path) == ["a.txt"]

    def test_a_link_stays_a_link(self, tmp_path):
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "real" / "a.txt")
        with atomic(tmp_path / "link") as temporary:
            temporary.write_text("new")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "real" / "a.txt").read_text() == "new"

    def test_a_path_that_cannot_be_written_is_refused(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no such folder"), atomic(tmp_path / "none" / "a"):
            pass
        with pytest.raises(FileExistsError, match="not a regular file"), atomic(tmp_path):
            pass
        with pytest.raises(FileExistsError, match="not a regular file"), atomic("/dev/null"):
            pass
