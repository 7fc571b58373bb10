"""What makes images a poor sample is said: sorted classes, samplers that repeat images, another normalisation."""

import io
import logging

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import resuscitate
from resuscitate.calibration import read_batches
from resuscitate.distributed import Ranks
from resuscitate.errors import NonFiniteError
from resuscitate.sampling import warn_of_padding
from tests.networks import chain, images, pruned_copy, seeded

IMAGES = torch.rand(100, 1, 2, 2)
SORTED = torch.arange(10).repeat_interleave(10)
SHUFFLED = SORTED[torch.randperm(100, generator=torch.Generator().manual_seed(0))]


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


class TestClassOrder:
    @pytest.mark.parametrize("kind", [tuple, list, "label", "targets", "numpy"])
    def test_a_limit_on_a_class_sorted_loader_is_warned_of(self, caplog, kind):
        pairs = [(IMAGES[i : i + 16], SORTED[i : i + 16]) for i in range(0, 100, 16)]
        if kind == "numpy":
            batches = [(images.numpy(), labels.numpy().astype(np.uint8)) for images, labels in pairs]
        else:
            batches = [{"image": x, kind: y} if isinstance(kind, str) else kind((x, y)) for x, y in pairs]
        list(read_batches(batches, max_samples=40))
        (warning,) = warnings(caplog)
        # the batch that reaches the limit is whole: its labels were seen too
        assert "sorted by class" in warning
        assert "class: images: 0: 10, 1: 10, 2: 10, 3: 10, 4: 8)" in warning

    def test_one_class_alone_is_the_worst_case(self, caplog):
        list(read_batches([(IMAGES[:64], torch.zeros(64, dtype=torch.int64))] * 2, max_batches=1))
        assert "(class: images: 0: 64)" in warnings(caplog)[0]

    @pytest.mark.parametrize(
        ("labels", "limit"),
        [(SHUFFLED, 40), (SORTED, None), (SORTED, 20), (SORTED.float(), 40), (SORTED[:, None], 40), (IMAGES, 40)],
        ids=["shuffled", "all are used", "too few to tell", "no classes", "boxes", "images to images"],
    )
    def test_nothing_is_said_otherwise(self, caplog, labels, limit):
        list(read_batches(DataLoader(TensorDataset(IMAGES, labels), 10), max_samples=limit))
        assert not warnings(caplog)


class TestPadding:
    def loader(self, images, ranks, **options):
        sampler = DistributedSampler(TensorDataset(IMAGES[:images]), ranks, rank=0, **options)
        return DataLoader(sampler.dataset, 4, sampler=sampler)

    def test_a_sampler_that_repeats_images_is_warned_of(self, caplog):
        warn_of_padding(self.loader(10, 4))
        assert "repeats 2 images" in warnings(caplog)[0]

    def test_nothing_is_said_otherwise(self, caplog):
        for loader in (self.loader(12, 4), self.loader(10, 4, drop_last=True), DataLoader(IMAGES, 4), [IMAGES], IMAGES):
            warn_of_padding(loader)
        assert not warnings(caplog)


@pytest.mark.parametrize("same", [True, False])
def test_ranks_that_begin_with_the_same_images_are_warned_of(caplog, monkeypatch, same):
    ranks = Ranks()
    ranks.size = 2
    other = IMAGES[:2] if same else IMAGES[2:4]
    monkeypatch.setattr(Ranks, "gather", lambda self, mine: [mine, mine if same else packed(other)])
    assert torch.equal(ranks.lend(IMAGES[:2].clone()), IMAGES[:2])
    said = ["all 2 ranks begin with the same images" in warning for warning in warnings(caplog)]
    assert said == ([True] if same else [])


def packed(images):
    buffer = io.BytesIO()
    torch.save(images.clone(), buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


class TestNormalisation:
    @pytest.fixture
    def trained(self):
        dense = seeded(chain)
        resuscitate.recalibrate_batchnorm(dense, images(seed=2), progress=False)
        return dense

    @pytest.mark.parametrize("change", [lambda x: x * 4, lambda x: x / 4, lambda x: x + 9, lambda x: (x + 2) * 60])
    @pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [x], lambda x: [(x, None)]])
    def test_images_of_another_normalisation_are_warned_of_once(self, trained, caplog, change, wrap):
        model = pruned_copy(trained)
        resuscitate.repair(model, trained, wrap(change(images())), progress=False)
        resuscitate.repair(model, trained, wrap(change(images())), progress=False)
        said = [w for w in warnings(caplog) if "may not be normalised as the network was trained" in w]
        assert len(said) == 1
        assert all(not module._forward_pre_hooks for module in trained.modules())

    @pytest.mark.parametrize("change", [lambda x: x, lambda x: x * 1.5, lambda x: x + 0.2, lambda x: x[:1, :, :2, :2]])
    def test_nothing_is_said_of_what_is_near_or_too_little(self, trained, caplog, change):
        resuscitate.repair(pruned_copy(trained), trained, change(images()), progress=False)
        assert not [w for w in warnings(caplog) if "normalised" in w]

    def test_nothing_is_said_of_values_that_are_not_finite(self, trained, caplog):
        x = images()
        x[0] = torch.nan
        with pytest.raises(NonFiniteError):
            resuscitate.repair(pruned_copy(trained), trained, x, progress=False)
        assert not [w for w in warnings(caplog) if "normalised" in w]

    @pytest.mark.real_data
    @pytest.mark.parametrize("wrong", [False, True])
    def test_on_a_real_network(self, real, caplog, wrong):
        dense, calibration, _, _ = real
        std = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
        mean = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
        x = calibration[:64] * std + mean if wrong else calibration[:64]
        resuscitate.repair(pruned_copy(dense), dense, x, method="asr", progress=False)
        assert bool([w for w in warnings(caplog) if "normalised" in w]) == wrong
