"""Images on disk: arrays and folders of image files; what cannot be read is named."""

import io
import sys

import numpy as np
import pytest
import torch

from resuscitate.data import sources
from resuscitate.data.images import load_images, load_labels
from resuscitate.errors import CalibrationError
from tests.networks import DATA

JPEG_TEST = DATA / "cifar10_jpeg_test.npz"


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
            (np.zeros((0, 3, 6, 6)), {}, "holds no images"),
            (np.zeros((2, 3, 6, 6)), {"max_samples": 0}, "max_samples=0 must be at least 1"),
            (np.zeros((2, 3, 6, 6)), {"size": 8}, "size is for image files"),
            (np.zeros((2, 3, 6, 6)), {"mean": (0.5, 0.5)}, "one for each of 3 channels"),
            (np.zeros((2, 3, 6, 6)), {"std": 0.0}, "std must be above 0"),
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
        said = {"a.txt": "holds no images; they are read", "missing.npz": "not a readable", "b.npz": "left, right"}
        for name, problem in said.items():
            with pytest.raises(CalibrationError, match=rf"{name}: .*{problem}"):
                load_images(tmp_path / name)
        with pytest.raises(CalibrationError, match="none of images, x, data"):
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

    @pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
    def test_images_of_more_than_8_bits_are_refused(self, tmp_path, dtype):
        self.save(tmp_path, "deep.tiff", np.full((4, 4), 1000, dtype=dtype))
        with pytest.raises(CalibrationError, match=r"deep.tiff: its pixels have more than 8 bits \(mode (I|F)"):
            load_images(tmp_path)

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
        with pytest.raises(CalibrationError, match=r"no image files \(\.bmp, .* in this folder or below it"):
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


def test_an_archive_that_unpacks_to_more_than_the_memory_is_refused(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "bomb.npz", images=np.zeros((1000, 32, 32, 3), dtype=np.uint8))
    monkeypatch.setattr(sources, "free_memory", lambda device: 1 << 20)
    with pytest.raises(CalibrationError, match=r"bomb\.npz: unpacks to 3,072,128 bytes, more than there is memory"):
        load_images(tmp_path / "bomb.npz")
