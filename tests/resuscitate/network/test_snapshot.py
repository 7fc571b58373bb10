"""Settings of the process during a repair, and after it."""

import copy

import pytest
import torch
from torch.nn.utils import prune

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


class Drawing(torch.nn.Module):
    """A network that draws random numbers and does not use them."""

    def __init__(self):
        super().__init__()
        self.network = chain()

    def forward(self, x):
        torch.rand(3)
        return self.network(x)


@pytest.mark.parametrize("act", ["fold", "prune channels", "augment"])
def test_nothing_draws_from_the_callers_random_numbers_or_seeds_gpus(act, monkeypatch):
    seeds = []
    dense = seeded(Drawing)
    model = pruned_copy(dense)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    before = torch.get_rng_state()
    if act == "fold":
        resuscitate.fold_batchnorm(model, images(4))
    elif act == "prune channels":
        resuscitate.sparsify(model, 0.5, pattern="channels", example=images(4))
    else:
        resuscitate.repair(model, dense, images(), augment=lambda batch: batch + torch.rand(()))
    assert torch.equal(torch.get_rng_state(), before)
    assert not seeds


def test_an_undo_refuses_a_model_that_has_lost_a_parameter():
    dense = seeded(chain)
    model = copy.deepcopy(dense)
    prune.l1_unstructured(model[3], "weight", 0.5)
    report = resuscitate.repair(model, dense, images())
    prune.remove(model[3], "weight")
    with pytest.raises(resuscitate.ModelMismatchError, match="'weight_orig' has been removed since"):
        report.undo()
    assert "weight" in model[3]._parameters
