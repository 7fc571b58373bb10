"""The damage view: what pruning has done to each channel, and its picture."""

import copy

import pytest
import torch

from resuscitate import damage, repair, sparsify
from resuscitate.errors import ModelMismatchError
from resuscitate.network.layers import rows_of
from resuscitate.reports.plots import draw_damage
from tests.networks import Residual, Shared, Zoo, chain, images, seeded


def outputs(model, name, x):
    found = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, args, out: found.append(out.detach()))
    model(x)
    handle.remove()
    return torch.cat(found).double().transpose(0, 1).flatten(1)


@pytest.mark.parametrize("build", [chain, Residual, Shared], ids=lambda build: build.__name__)
def test_ratio_and_correlation_are_those_of_each_channel_over_all_images(build):
    dense, x = seeded(build), images(20)
    pruned = copy.deepcopy(dense)
    sparsify(pruned, 0.7)
    for name, found in damage(pruned, dense, x, batch_size=7).items():
        d, p = outputs(dense, name, x), outputs(pruned, name, x)
        assert found.variance == pytest.approx(d.var(1, correction=0), rel=1e-4)
        assert found.ratio == pytest.approx(p.var(1, correction=0) / d.var(1, correction=0), rel=1e-3)
        alive = p.var(1) > 1e-9
        corr = [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(d[alive], p[alive], strict=True)]
        assert found.correlation[alive] == pytest.approx(corr, abs=1e-4)


def test_nothing_pruned_is_no_damage_and_a_dead_channel_is_total():
    dense = seeded(chain)
    model = copy.deepcopy(dense)
    with torch.no_grad():
        rows_of(model[6], model[6].weight)[2] = 0
    found = damage(model, dense, images())
    assert found["3"].ratio == pytest.approx(1)
    assert found["3"].correlation == pytest.approx(1)
    assert found["6"].ratio[2] == 0
    assert found["6"].correlation[2] == 0


def test_a_repair_mends_the_ratio():
    dense = seeded(chain)
    model = copy.deepcopy(dense)
    sparsify(model, 0.8)
    before = damage(model, dense, images())
    repair(model, dense, images(), method="channelwise")
    after = damage(model, dense, images())
    assert before["6"].ratio.log().abs().mean() > 0.3
    assert after["6"].ratio == pytest.approx(1, rel=0.05)


def test_both_models_stay_as_they_are():
    dense = seeded(Zoo).train()
    model = copy.deepcopy(dense)
    sparsify(model, 0.5)
    before = [copy.deepcopy(net.state_dict()) for net in (model, dense)]
    damage(model, dense, images())
    for net, state in zip((model, dense), before, strict=True):
        assert net.training
        assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


def test_another_network_is_refused():
    with pytest.raises(ModelMismatchError, match="the dense model has no layer"):
        damage(seeded(chain), seeded(Residual), images())
    model = seeded(chain)
    with pytest.raises(ModelMismatchError, match="shares its weight with the dense model"):
        damage(model, model, images())


def test_it_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    dense = seeded(Zoo)
    model = copy.deepcopy(dense)
    sparsify(model, 0.7)
    for name in ("damage.png", "damage.svg"):
        draw_damage(damage(model, dense, images()), tmp_path / name, "a zoo")
        assert (tmp_path / name).stat().st_size > 5000
    draw_damage(damage(model, dense, images()), tmp_path / "again.svg", "a zoo")
    assert (tmp_path / "again.svg").read_bytes() == (tmp_path / "damage.svg").read_bytes()
