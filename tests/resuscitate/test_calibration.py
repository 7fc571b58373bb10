"""Where images come from: every usual kind of batch, limits, re-cutting, arrays and image files."""

import io
import os
import sys
from collections import UserDict, namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from resuscitate.calibration import input_of, load_images, load_labels, read_batches
from resuscitate.errors import CalibrationError

DATA = Path(os.environ.get("RESUSCITATE_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
JPEG_TEST = DATA / "cifar10_jpeg_test.npz"

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
        with pytest.raises(CalibrationError, match=r"is a path, 'images\.npz'; read it with calibration\.load_images"):
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


@pytest.fixture
def pixels():
    """(7, 6, 5, 3) uint8: images that differ in every value."""
    return np.random.default_rng(0).integers(0, 256, (7, 6, 5, 3), dtype=np.uint8)


class TestArraysFromDisk:
    def test_uint8_is_scaled_normalised_and_brought_to_channels_first(self, tmp_path, pixels):
        np.savez(tmp_path / "a.npz", images=pixels, labels=np.arange(7))
        mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
        loaded = load_images(tmp_path / "a.npz", mean=mean, std=std, seed=None)
        assert (loaded.dtype, loaded.shape) == (torch.float32, (7, 3, 6, 5))
        expected = ((pixels / 255 - np.array(mean)) / np.array(std)).transpose(0, 3, 1, 2)
        np.testing.assert_allclose(loaded.numpy(), expected, atol=1e-6)

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    def test_floats_are_taken_as_they_are(self, tmp_path, pixels, dtype):
        array = pixels.astype(dtype).transpose(0, 3, 1, 2)
        np.save(tmp_path / "a.npy", array)
        loaded = load_images(tmp_path / "a.npy", seed=None)
        assert loaded.dtype == torch.float32
        np.testing.assert_array_equal(loaded.numpy(), array.astype(np.float32))

    @pytest.mark.parametrize("name", ["images", "x", "data", "anything"])
    def test_the_array_is_found_by_name_or_because_it_is_the_only_one(self, tmp_path, pixels, name):
        np.savez(tmp_path / "a.npz", **{name: pixels})
        assert load_images(tmp_path / "a.npz").shape == (7, 3, 6, 5)

    def test_grey_images_without_a_channel_axis_get_one(self, tmp_path, pixels):
        np.save(tmp_path / "a.npy", pixels[..., 0])
        assert load_images(tmp_path / "a.npy").shape == (7, 1, 6, 5)

    def test_the_shuffle_comes_before_the_limit_and_repeats(self, tmp_path):
        np.savez(tmp_path / "sorted.npz", x=np.repeat(np.arange(100.0), 4).reshape(100, 1, 2, 2), y=np.arange(100))
        some = load_images(tmp_path / "sorted.npz", max_samples=30)
        assert len(some) == 30
        assert some.max() > 60
        assert torch.equal(some, load_images(tmp_path / "sorted.npz", max_samples=30))
        assert torch.equal(some, load_images(tmp_path / "sorted.npz")[:30])
        assert not torch.equal(some, load_images(tmp_path / "sorted.npz", max_samples=30, seed=1))

    @pytest.mark.parametrize("options", [{}, {"seed": 3, "max_samples": 9}, {"seed": None, "max_samples": 9}], ids=str)
    def test_labels_come_in_the_order_of_the_images(self, tmp_path, options):
        np.savez(
            tmp_path / "a.npz", x=np.repeat(np.arange(20.0), 4).reshape(20, 1, 2, 2), y=np.arange(20, dtype=np.uint8)
        )
        labels = load_labels(tmp_path / "a.npz", **options)
        assert labels.dtype == torch.int64
        assert torch.equal(load_images(tmp_path / "a.npz", **options)[:, 0, 0, 0].long(), labels)

    def test_nothing_is_unpickled(self, tmp_path):
        np.save(tmp_path / "a.npy", np.array([{"code": "run me"}], dtype=object), allow_pickle=True)
        np.savez(tmp_path / "b.npz", images=np.array([None], dtype=object))
        for name in ("a.npy", "b.npz"):
            with pytest.raises(CalibrationError, match=name):
                load_images(tmp_path / name)

    @pytest.mark.parametrize(
        ("array", "options", "problem"),
        [
            (np.zeros((2, 3, 6, 6), np.int64), {}, "uint8 or floating point, not int64"),
            (np.zeros((2, 5, 6, 7)), {}, "cannot tell the channels"),
            (np.zeros((2, 3, 6, 3)), {}, "cannot tell the channels"),
            (np.zeros((2, 3)), {}, "cannot tell the channels"),
            (np.zeros((0, 3, 6, 6)), {}, "0 images found"),
            (np.zeros((2, 3, 6, 6)), {"max_samples": 0}, "at most 0 asked for"),
            (np.zeros((2, 3, 6, 6)), {"size": 8}, "size is for image files"),
            (np.zeros((2, 3, 6, 6)), {"mean": (0.5, 0.5)}, "one for each of 3 channels"),
            (np.zeros((2, 3, 6, 6)), {"std": 0.0}, "std above 0"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_what_cannot_be_images_is_refused_by_file(self, tmp_path, array, options, problem):
        np.save(tmp_path / "a.npy", array)
        with pytest.raises(CalibrationError, match=rf"a\.npy: .*{problem}"):
            load_images(tmp_path / "a.npy", **options)

    def test_other_files_are_refused_by_name(self, tmp_path, pixels):
        (tmp_path / "a.txt").write_text("no array")
        np.savez(tmp_path / "b.npz", left=pixels, right=pixels)
        for name, problem in (("a.txt", "not a readable"), ("missing.npz", "not a readable"), ("b.npz", "left, right")):
            with pytest.raises(CalibrationError, match=rf"{name}: .*{problem}"):
                load_images(tmp_path / name)
        with pytest.raises(CalibrationError, match="none of labels, y among its arrays"):
            load_labels(tmp_path / "b.npz")


class TestImageFiles:
    @pytest.fixture(autouse=True)
    def pillow(self):
        return pytest.importorskip("PIL")

    def save(self, folder, name, array):
        from PIL import Image

        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)

    def test_a_folder_is_read_recursively_and_other_files_are_passed_over(self, tmp_path, pixels):
        for i, image in enumerate(pixels):
            self.save(tmp_path, f"class{i % 2}/{i}.png", image)
        (tmp_path / "class0" / "notes.txt").write_text("not an image")
        (tmp_path / "class0" / "._0.png").write_text("nor this")
        loaded = load_images(tmp_path, seed=None)
        expected = pixels[[0, 2, 4, 6, 1, 3, 5]].transpose(0, 3, 1, 2)
        torch.testing.assert_close(loaded, torch.from_numpy(expected) / 255, atol=1e-7, rtol=0)

    def test_a_folder_sorted_by_class_is_shuffled_before_the_limit(self, tmp_path):
        for i in range(40):
            self.save(tmp_path, f"class{i // 20}/{i:02}.png", np.full((2, 2, 3), i // 20 * 255, np.uint8))
        assert 0 < load_images(tmp_path, max_samples=10).mean() < 1

    def test_grey_and_transparent_images_become_rgb(self, tmp_path, pixels):
        self.save(tmp_path, "grey.png", pixels[0, :, :, 0])
        self.save(tmp_path, "rgba.png", np.concatenate([pixels[0], pixels[1, :, :, :1]], -1))
        assert load_images(tmp_path).shape == (2, 3, 6, 5)

    @pytest.mark.parametrize(("size", "shape"), [(4, (4, 4)), ((4, 8), (4, 8))])
    def test_size_brings_all_to_one_size(self, tmp_path, pixels, size, shape):
        self.save(tmp_path, "a.png", pixels[0])
        self.save(tmp_path, "b.png", pixels[1, :4])
        assert load_images(tmp_path, size=size).shape == (2, 3, *shape)

    def test_different_sizes_without_it_are_refused_by_file(self, tmp_path, pixels):
        self.save(tmp_path, "a.png", pixels[0])
        self.save(tmp_path, "b.png", pixels[1, :4])
        with pytest.raises(CalibrationError, match=r"b\.png: 4x5 pixels, but .*a\.png has 6x5; pass size="):
            load_images(tmp_path, seed=None)

    def test_a_broken_file_is_named(self, tmp_path, pixels):
        self.save(tmp_path, "a.png", pixels[0])
        (tmp_path / "b.jpg").write_bytes((tmp_path / "a.png").read_bytes()[:40])
        with pytest.raises(CalibrationError, match=r"b\.jpg: not a readable image"):
            load_images(tmp_path)

    def test_a_folder_without_images_is_refused(self, tmp_path):
        with pytest.raises(CalibrationError, match="0 images found"):
            load_images(tmp_path)

    def test_without_pillow_the_extra_is_named(self, tmp_path, pixels, monkeypatch):
        self.save(tmp_path, "a.png", pixels[0])
        monkeypatch.setitem(sys.modules, "PIL", None)
        with pytest.raises(CalibrationError, match=r"pip install 'resuscitate\[images\]'"):
            load_images(tmp_path)

    def test_jpeg_files_end_to_end_in_an_npz(self, tmp_path, pixels):
        from PIL import Image

        files = []
        for image in pixels:
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "jpeg", quality=100, subsampling=0)
            files.append(np.frombuffer(buffer.getvalue(), np.uint8))
        np.savez(
            tmp_path / "a.npz",
            jpeg=np.concatenate(files),
            offsets=np.cumsum([0, *map(len, files)]),
            labels=np.arange(7),
        )
        loaded, labels = load_images(tmp_path / "a.npz"), load_labels(tmp_path / "a.npz")
        expected = torch.from_numpy(pixels.transpose(0, 3, 1, 2)) / 255
        # JPEG at its best quality is a few grey levels off
        torch.testing.assert_close(loaded, expected[labels], atol=8 / 255, rtol=0)

    @pytest.mark.real_data
    @pytest.mark.skipif(not JPEG_TEST.exists(), reason="CIFAR-10 not found; set RESUSCITATE_DATA")
    def test_cifar10_has_all_its_classes_in_a_few_images(self):
        images, labels = load_images(JPEG_TEST, max_samples=500), load_labels(JPEG_TEST, max_samples=500)
        assert images.shape == (500, 3, 32, 32)
        assert 0 <= images.min() < images.mean() < images.max() <= 1
        assert labels.bincount().min() > 30
