"""The run-time options of `Repairability.measure`, `allocate` and `sparsify`: which images, how much memory, ranks."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from resuscitate import Repairability, allocate, sparsify
from resuscitate.errors import CalibrationError, NonFiniteError
from tests.networks import Residual, chain, images, seeded
from tests.ranks import joined


def measure(x, **options):
    return Repairability.measure(seeded(chain), x, **options)


def near(a, b):
    assert a.images == b.images
    assert a.residuals.keys() == b.residuals.keys()
    for name, curve in a.residuals.items():
        assert curve == pytest.approx(b.residuals[name], abs=1e-5)


def test_max_batches_reads_no_more():
    read = []

    def loader():
        for part in images(24).split(6):
            read.append(len(part))
            yield part

    found = measure(loader, max_batches=2)
    assert read == [6, 6]
    assert found == measure(images(24)[:12], batch_size=6)
    options = {"max_batches": 2, "batch_size": 6}
    assert allocate(seeded(chain), 0.8, "rr", calibration=images(24), **options) == allocate(
        seeded(chain), 0.8, "rr", calibration=found
    )


def test_images_that_are_not_finite_are_skipped_or_refused():
    x = images(24)
    x[5] = torch.nan
    with pytest.raises(NonFiniteError, match=r"layer '0'.*on_nonfinite='skip'"):
        measure(x)
    near(measure(x, on_nonfinite="skip"), measure(torch.cat([x[:5], x[6:]])))


def test_a_small_memory_makes_no_difference(tmp_path):
    assert measure(images(24), memory=100_000, scratch=tmp_path) == measure(images(24))


@pytest.mark.parametrize("function", [allocate, sparsify])
def test_an_option_is_refused_where_nothing_is_measured_or_there_is_none(function):
    model = seeded(chain)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="max_batches is of the measurement for allocation 'rr'"):
        function(model, 0.8, max_batches=2)
    with pytest.raises(TypeError, match="has no option 'max_batch'; did you mean max_batches"):
        function(model, 0.8, max_batch=2)
    name = "method" if function is allocate else "allocation"
    with pytest.raises(CalibrationError, match="max_batches must be"):
        function(model, 0.8, **{name: "rr"}, calibration=images(), max_batches=0)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def results(x, **options):
    """What each function that measures gives for these images."""
    dense = seeded(Residual)
    model = copy.deepcopy(dense)
    masks = sparsify(model, 0.8, allocation="rr", calibration=x, batch_size=4, **options)
    found = Repairability.measure(dense, x, batch_size=4, **options)
    densities = allocate(dense, 0.8, "rr", calibration=x, batch_size=4, **options)
    return {name: mask.clone() for name, mask in masks.items()}, dict(found.residuals), found.images, densities


def worker(rank, folder):
    with joined(rank, 2, folder) as group:
        torch.save(results(images(23)[rank::2], group=group), f"{folder}/{rank}")


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch.distributed with Gloo")
def test_two_ranks_give_the_result_of_one_process(tmp_path):
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    alone = results(images(23))
    ranks = [torch.load(tmp_path / str(rank)) for rank in range(2)]
    for masks, residuals, count, densities in ranks:
        assert count == alone[2] == 23
        assert residuals == ranks[0][1]
        assert densities == ranks[0][3] == pytest.approx(alone[3], abs=5e-3)
        assert sum(int(mask.sum()) for mask in masks.values()) == sum(int(mask.sum()) for mask in alone[0].values())
        assert all(torch.equal(mask, ranks[0][0][name]) for name, mask in masks.items())
        for name, curve in residuals.items():
            assert curve == pytest.approx(alone[1][name], abs=1e-5)


def test_a_layer_that_is_called_by_keyword_is_measured():
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = torch.nn.Conv2d(3, 6, 3), torch.nn.Linear(6, 5)

        def forward(self, x):
            return self.head(input=self.conv(x).relu().mean((2, 3)))

    found = Repairability.measure(seeded(Network), images())
    assert found.residuals["head"]
