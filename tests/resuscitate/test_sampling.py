"""What makes a loader's images a poor sample is said: classes one after the other, samplers that repeat images."""

import io
import logging

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from resuscitate.calibration import read_batches
from resuscitate.distributed import Ranks
from resuscitate.sampling import warn_of_padding

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
