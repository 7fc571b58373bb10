"""Where images come from: every usual kind of batch, and limits."""

from collections import UserDict, namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from resuscitate.data.calibration import input_of, read_batches
from resuscitate.errors import CalibrationError

IMAGES = torch.arange(10.0 * 3 * 2 * 2).view(10, 3, 2, 2)
LABELS = torch.arange(10)
SIZES = st.lists(st.integers(1, 7), min_size=1, max_size=8)


def _read(*args, **options):
    return list(read_batches(*args, **options))


class Stream(IterableDataset):
    """Batches of 4 without a length."""

    def __iter__(self):
        return iter(IMAGES.split(4))


class Counted:
    """An iterable that remembers how many batches were pulled from it."""

    def __init__(self, batches):
        self.batches, self.pulled = batches, 0

    def __iter__(self):
        for batch in self.batches:
            self.pulled += 1
            yield batch


def numbered(sizes):
    """Batches of the given sizes whose images are numbered 0, 1, 2, ..."""
    return list(torch.arange(float(sum(sizes))).view(-1, 1).split(list(sizes)))


KINDS = {
    "tensor": IMAGES,
    "array": IMAGES.numpy(),
    "list": list(IMAGES.split(4)),
    "tuple": tuple(IMAGES.split(4)),
    "arrays": [x.numpy() for x in IMAGES.split(4)],
    "tuples": [(x, None) for x in IMAGES.split(4)],
    "lists": [[x, "label"] for x in IMAGES.split(4)],
    "nested": [((x, x + 1), 3) for x in IMAGES.split(4)],
    "namedtuples": [namedtuple("Pair", "left right")(x, 0) for x in IMAGES.split(4)],
    "dicts": [{"label": 0, "pixel_values": x} for x in IMAGES.split(4)],
    "user dicts": [UserDict(image=x) for x in IMAGES.split(4)],
    "generator": (x for x in IMAGES.split(4)),
    "loader": DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4),
    "unsized loader": DataLoader(Stream(), batch_size=None),
    "iterable dataset": Stream(),
    "factory": lambda: (x for x in IMAGES.split(4)),
    "factory of a tensor": lambda: IMAGES,
}


class TestWhatABatchMayBe:
    @pytest.mark.parametrize("calibration", KINDS.values(), ids=KINDS)
    def test_every_usual_kind_gives_the_input_tensors(self, calibration):
        batches = _read(calibration, batch_size=4)
        assert [len(batch) for batch in batches] == [4, 4, 2]
        assert torch.equal(torch.cat(batches), IMAGES)

    @pytest.mark.parametrize("key", ["image", "images", "pixel_values", "input", "inputs", "x"])
    def test_known_keys(self, key):
        assert input_of({"y": LABELS, key: IMAGES}) is IMAGES

    def test_nothing_is_copied(self):
        batches = list(IMAGES.split(4))
        assert all(a is b for a, b in zip(_read(batches), batches, strict=True))
        assert _read(IMAGES)[0].data_ptr() == IMAGES.data_ptr()
        array = np.zeros((3, 2), np.float32)
        assert _read(array)[0].data_ptr() == array.ctypes.data

    def test_arrays_that_torch_cannot_share_are_read_all_the_same(self):
        array = IMAGES.numpy().copy()
        array.flags.writeable = False
        assert torch.equal(_read(array)[0], IMAGES)
        assert torch.equal(_read(array[::-1])[0], IMAGES.flip(0))

    def test_images_of_different_sizes_are_allowed_between_batches(self):
        assert len(_read([torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 9, 9)])) == 2


class TestLimits:
    @given(sizes=SIZES, max_samples=st.none() | st.integers(1, 40), max_batches=st.none() | st.integers(1, 10))
    def test_both_always_hold_and_nothing_is_read_beyond_them(self, sizes, max_samples, max_batches):
        source = Counted(numbered(sizes))
        batches = _read(source, max_samples=max_samples, max_batches=max_batches)
        expected = min(sum(sizes[:max_batches]), max_samples or sum(sizes))
        assert torch.cat(batches).flatten().tolist() == list(range(expected))
        assert source.pulled == len(batches)

    @given(count=st.integers(1, 50), size=st.integers(1, 12), max_samples=st.none() | st.integers(1, 60))
    def test_a_lone_tensor_is_cut_into_batches(self, count, size, max_samples):
        batches = _read(torch.arange(count).view(-1, 1), batch_size=size, max_samples=max_samples)
        assert torch.cat(batches).flatten().tolist() == list(range(min(count, max_samples or count)))
        assert all(len(batch) == size for batch in batches[:-1])
        assert 1 <= len(batches[-1]) <= size

    @pytest.mark.parametrize("option", ["max_samples", "max_batches", "batch_size"])
    @pytest.mark.parametrize("limit", [0, -1, 2.5, True])
    def test_a_limit_is_a_whole_number_of_at_least_one(self, option, limit):
        with pytest.raises(CalibrationError, match=f"{option} must be a whole number of at least 1, not {limit}"):
            _read(IMAGES, **{option: limit})


class TestRaw:
    def test_batches_come_untouched_and_whole(self):
        batches = [{"a": x, "b": [x + 1]} for x in IMAGES.split(4)]
        source = Counted(batches)
        read = _read(source, raw=True, max_samples=5)
        assert source.pulled == 2
        assert all(a is b for a, b in zip(read, batches, strict=False))

    def test_images_are_counted_along_the_first_tensor_with_a_batch_axis(self):
        batches = [{"step": torch.tensor(7), "meta": "text", "pair": (x, LABELS)} for x in IMAGES.split(4)]
        assert len(_read(batches, raw=True, max_samples=8)) == 2

    def test_lists_of_images_are_counted_image_by_image(self):
        batches = [list(x) for x in IMAGES.split(2)]
        assert len(_read(batches, raw=True, max_samples=4)) == 2
        assert len(_read([(x, "targets") for x in batches], raw=True, max_samples=4)) == 2

    def test_max_batches_holds_without_any_tensor(self):
        assert _read(["a", "b", "c"], raw=True, max_batches=2) == ["a", "b"]


class TestRefusals:
    def test_a_used_up_generator_is_named(self):
        generator = (x for x in IMAGES.split(4))
        _read(generator)
        with pytest.raises(CalibrationError, match=r"no batches: the iterator is used up.*function that returns a new"):
            _read(generator)

    @pytest.mark.parametrize("empty", [[], IMAGES[:0], np.zeros((0, 3))], ids=["list", "tensor", "array"])
    def test_no_batches(self, empty):
        with pytest.raises(CalibrationError, match="no batches: the calibration data is empty"):
            _read(empty)

    @pytest.mark.parametrize("raw", [False, True])
    def test_a_batch_without_images_is_named(self, raw):
        with pytest.raises(CalibrationError, match=r"batch 1: there are no images in it \(shape \(0, 3, 2, 2\)\)"):
            _read([IMAGES, IMAGES[:0]], raw=raw)

    def test_a_tensor_without_dimensions(self):
        with pytest.raises(CalibrationError, match="batch 0: its images are a tensor without dimensions"):
            _read([torch.tensor(1.0)])
        with pytest.raises(CalibrationError, match="tensor without dimensions"):
            _read(torch.tensor(1.0))

    def test_an_unknown_kind_is_named_with_its_keys_and_the_way_out(self):
        with pytest.raises(
            CalibrationError, match=r"batch 0: .*dict with keys 'left', 'right'.*forward_fn=lambda model"
        ):
            _read([{"left": IMAGES, "right": IMAGES}])
        with pytest.raises(CalibrationError, match=r"batch 1: .*kind str"):
            _read([IMAGES, "cat.jpg"])
        with pytest.raises(CalibrationError, match="of kind list"):
            input_of([])

    def test_common_slips_are_answered(self):
        with pytest.raises(CalibrationError, match=r"is a path, 'images\.npz'; read it with resuscitate\.load_images"):
            _read("images.npz")
        with pytest.raises(CalibrationError, match="is one batch of kind dict with keys 'image'; put it in a list"):
            _read({"image": IMAGES})
        with pytest.raises(CalibrationError, match=r"an \(images, labels\) pair is one batch: put it in a list"):
            _read((IMAGES, LABELS))
        with pytest.raises(CalibrationError, match=r"pass DataLoader\(dataset, 128, shuffle=True\)"):
            _read(TensorDataset(IMAGES, LABELS))
        with pytest.raises(CalibrationError, match="not int"):
            _read(5)

    def test_arrays_of_objects_are_refused(self):
        with pytest.raises(CalibrationError, match="an array of object holds no images"):
            _read(np.array([None, None]))

    def test_an_error_of_the_loader_itself_is_passed_on(self):
        def loader():
            yield IMAGES
            raise OSError("disk gone")

        with pytest.raises(OSError, match="disk gone"):
            _read(loader())
