"""How often the host waits for the device: at most twice for each layer, in a batch never.

Beside these, a refit looks at its residuals after every other step of the conjugate gradients: see `few_steps`.

For the moments of a dense network that runs alone, the host waits once for sixteen batches and all layers.
`tests.device` records the waits of a whole repair, on a device without hardware. The reference backend computes the
moments, since it has no waits of its own; nor have the Triton kernels (`test_repair_never_waits_for_the_host`).
"""

from functools import partial

import pytest
import torch
from torch import nn
from torch.multiprocessing import spawn

import asr_kernels as ak
from resuscitate import EMA, Exact, repair
from resuscitate.errors import NonFiniteError
from resuscitate.statistics import conjugate_gradients, least_squares
from tests.compare import same_state
from tests.device import device, waits
from tests.networks import Residual, Shared, Zoo, chain, images, pruned_copy, seeded, without_channels

# are the moments finite, or in a refit is the layer to be fitted again for its ReLU; the row of the report, with
# whether the new weights fit, and in a refit whether the moments are finite and the steps have reached the solution
A_LAYER = 2
FEW_STEPS = 24, 12
SETUP = 12  # of a whole repair: what is compared before and after it


def run_batch(model, batch):
    return model(batch.to(next(model.parameters()).device, non_blocking=True))


OPTIONS = {
    "refit": {},
    "refit, one ridge, BatchNorm": {"ridge": 0.1, "recalibrate": "exact"},
    "asr": {"method": "asr"},
    "asr, BatchNorm": {"method": "asr", "recalibrate": "exact"},
    "asr, BatchNorm, few images": {"method": "asr", "gain_samples": 8, "recalibrate": Exact(samples=16)},
    "asr, suspended": {"method": "asr", "forward_fn": run_batch},
    "diagnostics": {"method": "channelwise", "diagnostics": True},
    "parallel": {"method": "layerwise", "schedule": "parallel"},
    "bn": {"method": "bn"},
    "ema": {"method": "bn", "recalibrate": EMA(batches=2, batch_size=8)},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def deep(depth):
    """A network of so many convolutions, each with a BatchNorm and a ReLU, and a linear head."""
    stages = [nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()) for _ in range(depth)]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5))


def repaired(build, options, batches=2, where=None, prune=pruned_copy):
    """The repaired network, on a device; the number of rows of the report, and of waits."""
    dense = seeded(build)
    model = prune(dense)
    for net in (dense, model):
        net.to(where or device())
    with ak.use_backend("reference"), waits() as found:
        given = images(8 * batches, size=5).split(8)
        report = repair(model, None if options.get("method") == "bn" else dense, given, memory="1GiB", **options)
    return model, len(report.layers), len(found)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """Enough for these small filters, without a look at the residuals."""
    take_few_steps(monkeypatch.setattr)


def take_few_steps(setattr):
    """As many steps in every solution."""
    setattr(conjugate_gradients, "STEPS", FEW_STEPS)
    setattr(conjugate_gradients, "all_reached", lambda reached: False)


def near(one, other):
    """Weights that iterations on the device find, and factors on the CPU."""
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value.cpu(), other.state_dict()[name], rtol=1e-2, atol=1e-2)


@pytest.mark.slow
@each_option
def test_the_host_waits_few_times_for_a_layer_and_never_for_a_batch(options):
    model, rows, found = repaired(partial(deep, 2), options)
    _, _, found_in_more_batches = repaired(partial(deep, 2), options, batches=5)
    _, more_rows, found_in_more_layers = repaired(partial(deep, 3), options)
    assert found_in_more_batches == found
    assert more_rows > rows
    assert found_in_more_layers - found <= A_LAYER * (more_rows - rows)
    on_cpu, _, _ = repaired(partial(deep, 2), options, where="cpu")
    near(model, on_cpu)
    assert "method" not in options or same_state(model.cpu().state_dict(), on_cpu.state_dict())


@pytest.mark.parametrize("build", [Residual, Shared, Zoo])
@pytest.mark.parametrize("options", [{}, {"method": "asr"}], ids=["refit", "asr"])
def test_nor_for_a_batch_of_other_networks(build, options):
    (_, rows, few), (_, _, many) = (repaired(build, options, batches) for batches in (2, 4))
    assert few == many <= A_LAYER * rows + SETUP


@pytest.mark.parametrize("options", [{}, {"method": "asr"}], ids=["refit", "asr"])
def test_nor_for_a_batch_of_a_smaller_network(options):
    """Its channels are followed by gradients, which take a device only if it was there before any others were."""
    device()
    spawn(_repair_a_smaller_network, (options,))


def _repair_a_smaller_network(process, options):
    take_few_steps(setattr)
    smaller = partial(without_channels, channels=[0, 3, 6])
    (_, _, few), (model, _, many) = (repaired(chain, options, batches, prune=smaller) for batches in (2, 4))
    on_cpu, _, _ = repaired(chain, options, 4, where="cpu", prune=smaller)
    assert few == many
    near(model, on_cpu)


def test_a_model_that_is_moved_for_the_repair_comes_back_repaired_and_can_be_restored():
    dense = seeded(Residual)
    models = [pruned_copy(dense) for _ in range(3)]
    with ak.use_backend("reference"):
        reports = [repair(models[i], dense, images(), device=where) for i, where in enumerate((device(), "cpu"))]
        near(*models[:2])
        reports[0].undo()
    assert same_state(models[0].state_dict(), models[2].state_dict())


@pytest.mark.parametrize("where", ["cpu", "device"])
@each_option
def test_the_error_names_the_first_batch_that_is_not_finite(options, where):
    dense = seeded(Residual)
    model, before = pruned_copy(dense), pruned_copy(dense)
    for net in (dense, model):
        net.to(device() if where == "device" else "cpu")
    given = images(40).clone()
    given[[9, 30]] = torch.nan  # in batches 1 and 3
    bn = options.get("method") == "bn"
    if bn and "recalibrate" in options:
        pytest.skip("a moving average takes what comes")
    with pytest.raises(NonFiniteError, match=f"layer '{'bn0' if bn else '.*'}': batch 1: "):
        repair(model, None if bn else dense, given.split(8), **{**options, "gain_samples": None})
    assert same_state(model.cpu().state_dict(), before.state_dict())


@pytest.mark.parametrize("where", ["cpu", "device"])
def test_a_layer_whose_steps_do_not_reach_the_solution_is_solved_directly_before_it_is_written(where, monkeypatch):
    expected, _, _ = repaired(partial(deep, 2), {"ridge": 0.01}, where="cpu")
    monkeypatch.setattr(conjugate_gradients, "STEPS", (1,))
    monkeypatch.setattr(least_squares, "LEAST_VALUES", 0)
    direct, init = [], least_squares.Problem.__init__
    monkeypatch.setattr(least_squares.Problem, "__init__", lambda *given: direct.append(given[6]) or init(*given))
    model, _, _ = repaired(partial(deep, 2), {"ridge": 0.01}, where="cpu" if where == "cpu" else device())
    assert True in direct
    near(model, expected)


class TestTheDevice:
    @pytest.mark.parametrize(
        "use",
        [
            lambda x: x.sum().item(),
            lambda x: bool(x.any()),
            lambda x: torch.equal(x, x),
            lambda x: x.tolist(),
            lambda x: x.cpu(),
            lambda x: torch.empty(3).copy_(x),
            lambda x: x[x > 1],
            lambda x: x.nonzero(),
            lambda x: x.unique(),
            lambda x: torch.tensor([1.0], device=x.device),
            lambda x: torch.ones(3).to(x.device),
        ],
    )
    def test_records_a_wait(self, use):
        x = torch.arange(3.0).to(device())
        with waits() as found:
            use(x)
        assert len(found) == 1

    def test_records_no_wait_where_there_is_none(self):
        x = torch.arange(3.0).to(device())
        with waits() as found:
            y = torch.ones(3).to(x.device, non_blocking=True)
            y += x.cumsum(0)[torch.zeros(2, dtype=torch.int64, device=x.device)].mean()
            torch.where(y > x, torch.zeros(3, device=x.device), 1.0).clamp_(max=2)
        assert not found
        assert y.tolist() == [1, 1, 1]

    def test_refuses_tensors_of_both_devices(self):
        with pytest.raises(RuntimeError, match="of the host and of the device"):
            torch.ones(3).to(device()) + torch.ones(3)
