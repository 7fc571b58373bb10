"""Batches kept, counted and cut."""

from collections import UserDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import resuscitate
from resuscitate.data.batches import Batches, cut, rebatch
from resuscitate.errors import CalibrationError
from resuscitate.runtime.activations import Store
from resuscitate.runtime.distributed import Ranks
from tests.networks import chain, images, seeded

IMAGES = torch.arange(10.0 * 3 * 2 * 2).view(10, 3, 2, 2)
SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=6)


def numbered(sizes):
    """Batches of the given sizes whose images are numbered 0, 1, 2, ..."""
    return list(torch.arange(float(sum(sizes))).view(-1, 1).split(list(sizes)))


def in_one_buffer(source, size):
    """Batches of some images, each in the memory of the last one."""
    buffer = torch.empty_like(source[:size])
    for part in source.split(size):
        yield buffer.copy_(part)


def _rebatched(batches, *args):
    return list(rebatch(Batches(batches), *args))


class TestBatches:
    @given(sizes=SIZES, images=st.none() | st.integers(0, 40))
    def test_they_know_how_many_hold_so_many_images(self, sizes, images):
        batches = Batches(numbered(sizes))
        held = batches.images(batches.batches_for(images))
        assert held == sum(sizes) if images is None or images > sum(sizes) else held >= images
        assert (
            not batches.batches_for(images)
            or images is None
            or batches.images(batches.batches_for(images) - 1) < images
        )

    @given(sizes=SIZES, marks=st.lists(st.none() | st.integers(0, 30), max_size=3))
    def test_a_cut_lets_whole_batches_end_at_each_mark(self, sizes, marks):
        found = Batches(cut(numbered(sizes), marks))
        assert torch.equal(torch.cat(list(found.head())), torch.cat(numbered(sizes)))
        for mark in marks:
            assert found.images(found.batches_for(mark)) == min(sum(sizes) if mark is None else mark, sum(sizes))

    @pytest.mark.parametrize("budget", [1 << 20, 1], ids=["in memory", "in scratch"])
    def test_kept_batches_come_back_again_and_again(self, budget):
        with Store(budget, torch.device("cpu")) as store:
            batches = Batches(({"image": part, "labels": [1]} for part in IMAGES.split(4)), store)
            for _ in range(2):
                assert torch.equal(torch.cat([batch["image"] for batch in batches.head()]), IMAGES)
            assert batches[1]["labels"] == [1]
            assert (store.bytes_spilled > 0) == (budget == 1)

    @pytest.mark.parametrize("nest", [lambda x: x, lambda x: (x, 1), lambda x: {"image": x}], ids=["", "tuple", "dict"])
    def test_a_part_of_a_tensor_does_not_keep_the_whole(self, nest):
        with Store(1 << 20, torch.device("cpu")) as store:
            Batches(iter([nest(IMAGES[:2])]), store)
            assert store.resident == IMAGES[:2].numel() * 4

    @pytest.mark.parametrize("kind", [dict, UserDict], ids=lambda kind: kind.__name__)
    def test_a_loader_may_use_the_same_memory_for_each_batch(self, kind):
        with Store(1 << 20, torch.device("cpu")) as store:
            batches = Batches((kind(image=part) for part in in_one_buffer(IMAGES, 5)), store)
            assert torch.equal(torch.cat([batch["image"] for batch in batches.head()]), IMAGES)


def test_passes_that_read_ahead_allow_such_a_loader():
    dense = seeded(chain)
    expected = resuscitate.DenseStatistics.measure(dense, images(30), batch_size=5)
    found = resuscitate.DenseStatistics.measure(dense, in_one_buffer(images(30), 5))
    assert found.digest == expected.digest
    assert all(torch.equal(found.layers[name][0].mean, expected.layers[name][0].mean) for name in expected.layers)


class TestImagesThatStandSeveralTimes:
    """They count as one where images are told apart by their contents."""

    @pytest.mark.parametrize("times", [1, 2, 4, 10])
    def test_a_tenth_is_held_out_with_all_its_repeats_and_the_folds_are_alike(self, times):
        batches = Batches(images(320).repeat(times, 1, 1, 1).split(64))
        batches.hold_out(Ranks())
        held = torch.cat([batches[index] for index in range(len(batches))[-batches.held_out :]])
        fitted = torch.cat(list(batches.head(len(batches) - batches.held_out)))
        assert len(held) == 32 * times
        assert not {*map(bytes, held.numpy())} & {*map(bytes, fitted.numpy())}
        batches.number_images(Ranks())
        sizes = torch.zeros(4)
        for index in range(len(batches) - batches.held_out):
            for fold, rows in batches.folds(index, 4, batches.counts[index]).items():
                sizes[fold] += len(rows)
        assert sizes.tolist() == [72 * times] * 4

    @pytest.mark.parametrize("draws", [1, 3])
    def test_changed_copies_leave_the_folds_alike(self, draws):
        batches = Batches([images(40)])
        batches.augment("flip", draws)
        batches.number_images(Ranks())
        assert sorted(map(len, batches.folds(0, 4, 40).values())) == [10] * 4

    def test_a_sample_takes_each_once(self):
        batches = Batches(images(20).repeat(5, 1, 1, 1).split(8))
        found = [batches[index][rows] for index, rows in batches.sample(12, Ranks()).items()]
        assert len(torch.cat(found)) == len(torch.cat(found).unique(dim=0)) == 12


class TestRebatch:
    @given(sizes=SIZES, size=st.integers(1, 9), count=st.none() | st.integers(1, 9))
    def test_the_same_images_in_the_same_order_in_equal_batches(self, sizes, size, count):
        batches, available = numbered(sizes), sum(sizes)
        if available < size * (count or 1):
            with pytest.raises(CalibrationError, match=f"need {size * (count or 1)} images and there are {available}"):
                _rebatched(batches, size, count)
            return
        cut = _rebatched(batches, size, count)
        assert len(cut) == (count or available // size)
        assert all(len(batch) == size for batch in cut)
        assert torch.cat(cut).flatten().tolist() == list(range(size * len(cut)))

    def test_a_batch_within_a_batch_is_a_view(self):
        assert _rebatched([IMAGES], 5)[1].data_ptr() == IMAGES[5:].data_ptr()

    def test_images_of_different_sizes_cannot_share_a_batch(self):
        with pytest.raises(CalibrationError, match=r"\(3, 8, 8\) and \(3, 9, 9\) cannot share a batch of 4"):
            _rebatched([torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 9, 9)], 4)
