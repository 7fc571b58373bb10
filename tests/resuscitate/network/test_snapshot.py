"""Settings of the process during a repair, and after it."""

import copy

import pytest
import torch

import resuscitate
from resuscitate.network.snapshot import evaluation_mode
from tests.networks import chain, images, pruned_copy, seeded


def test_gpus_that_hold_no_model_are_not_seeded(monkeypatch):
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)  # `torch.manual_seed` calls it
    dense = seeded(chain)
    model = pruned_copy(dense)
    seeds.clear()
    resuscitate.repair(model, dense, images())
    with evaluation_mode([model], seed=3):
        assert torch.initial_seed() == 3
    assert not seeds


def test_an_undo_keeps_what_was_changed_later_elsewhere_and_refuses_a_module_that_was_replaced():
    dense = seeded(chain)
    model = pruned_copy(dense)
    before = copy.deepcopy(model.state_dict())
    report = resuscitate.repair(model, dense, images(), method="channelwise", include=["3"])
    with torch.no_grad():
        model[0].weight.mul_(2)
    layer, model[3] = model[3], copy.deepcopy(model[3])
    with pytest.raises(resuscitate.ModelMismatchError, match="has been replaced since"):
        report.undo()
    model[3] = layer
    report.undo()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"0.weight"}


@pytest.mark.parametrize("inside", [False, True])
def test_tensors_made_in_inference_mode_are_refused_before_any_image_is_read(inside, tmp_path):
    dense = seeded(chain)
    with torch.inference_mode():
        model = copy.deepcopy(dense)
        resuscitate.sparsify(model, 0.5)
    before = [tensor.clone() for tensor in model.state_dict().values()]
    never = iter([pytest.fail])
    for act in (
        lambda: resuscitate.repair(model, dense, never),
        lambda: resuscitate.recalibrate_batchnorm(model, never),
        lambda: resuscitate.compress(model, 0.5, never),
    ):
        with (
            torch.inference_mode(inside),
            pytest.raises(resuscitate.ResuscitateError, match=r"'0\.weight' was made .*inference_mode.*outside of it"),
        ):
            act()
    assert len(list(never)) == 1
    resuscitate.deploy.checkpoints.write_state_dict(tmp_path / "a.safetensors", dense.state_dict(), {})
    for act in (
        lambda: resuscitate.replace_by_means(model, dense),
        lambda: resuscitate.load_weights(model, tmp_path / "a.safetensors"),
    ):
        with pytest.raises(resuscitate.ResuscitateError, match="copy or load the model outside of it"):
            act()
    assert all(map(torch.equal, before, model.state_dict().values()))
